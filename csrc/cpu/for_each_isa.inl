// Compiles ELF_ROW_KERNELS (a file of templates over rows) once per instruction set, in namespaces
// avx512, avx2 and portable. The kernels are written with the compiler's vector types, so one
// source serves all three; only the register width and two intrinsics in vec.inl differ.
// Everything the kernels need from the standard library is included before, outside the target
// regions: a std:: template first instantiated inside one could be called on a lesser processor.

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
