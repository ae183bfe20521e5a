// Compiles ELF_ROW_KERNELS (a file of templates over rows) once per instruction set, in the
// namespaces avx512, avx2 and portable. The kernels use the compiler's vector types, so one source
// serves all three. Only the register width and a few intrinsics in vec.inl differ.
//
// Headers of the standard library must be included before this file, outside the target regions. A
// std:: template that is instantiated inside one may contain its instructions, and the linker may
// keep that copy for the whole library. Processors without these instructions would then crash.

#if ELF_X86
#define ELF_LANES 16
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace avx512 {
#include "vec.inl"
#include "softmax_row.inl"
#include ELF_ROW_KERNELS
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef ELF_LANES

#define ELF_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include "vec.inl"
#include "softmax_row.inl"
#include ELF_ROW_KERNELS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef ELF_LANES
#endif  // ELF_X86

#define ELF_LANES 4
namespace portable {
#include "vec.inl"
#include "softmax_row.inl"
#include ELF_ROW_KERNELS
}  // namespace portable
#undef ELF_LANES
