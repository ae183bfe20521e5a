// Device functions.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstring>
#include <type_traits>

#include "shim_scheduler.h"

#pragma GCC visibility push(hidden)
namespace elf_shim {

template <class T, class... Options>
concept one_of = (std::same_as<T, Options> || ...);

// The types that CUDA's shuffles accept.
template <class T>
concept shuffled =
    one_of<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>;

template <Op op, shuffled T>
T shuffle(unsigned mask, T value, int source, const Where& where) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_wait<op>(mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() { return scheduler.running % 32; }

// The first lane of this lane's segment of `width` lanes.
inline int segment(int width, const Where& where) {
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
    fail("shuffle: expected a width that is a power of 2 up to 32, got ", width, " (",
         line_of(where), ")");
  return lane() & ~(width - 1);
}

template <class T>
void check_aligned(const T* p, const char* function) {
  static_assert(std::has_single_bit(sizeof(T)) && sizeof(T) <= 16);
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
    fail("misaligned address in ", function, ": ", static_cast<const void*>(p), " for ", sizeof(T),
         " bytes");
}

template <class T>
T load(const T* p, const char* function) {
  polled();
  check_aligned(p, function);
  return *p;
}

template <class T>
void store(T* p, const T& value, const char* function) {
  check_aligned(p, function);
  *p = value;
}

// Atomic, because no other fiber runs between the load and the store.
template <class T, class F>
T exchange(T* p, const char* function, F next) {
  polled();
  check_aligned(p, function);
  const T old = *p;
  *p = next(old);
  return old;
}

template <class T>
using as_is = std::type_identity_t<T>;

template <class To, class From>
To bits_as(From value) {
  return std::bit_cast<To>(value);
}

}  // namespace elf_shim

// Barriers

inline void __syncthreads(elf_shim::Where where = elf_shim::Where::current()) {
  elf_shim::barrier_wait(false, where);
}
inline int __syncthreads_count(int predicate, elf_shim::Where where = elf_shim::Where::current()) {
  elf_shim::barrier_wait(predicate != 0, where);
  return elf_shim::scheduler.last_votes;
}
inline int __syncthreads_or(int predicate, elf_shim::Where where = elf_shim::Where::current()) {
  return __syncthreads_count(predicate, where) != 0;
}
inline int __syncthreads_and(int predicate, elf_shim::Where where = elf_shim::Where::current()) {
  return __syncthreads_count(predicate, where) == elf_shim::scheduler.last_arrived;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { elf_shim::yield(); }
[[noreturn]] inline void __trap(elf_shim::Where where = elf_shim::Where::current()) {
  elf_shim::fail(elf_shim::LaneName{elf_shim::scheduler.running}, " called __trap (",
                 elf_shim::line_of(where), ")");
}

// Warp primitives

inline void __syncwarp(unsigned mask = ~0u, elf_shim::Where where = elf_shim::Where::current()) {
  elf_shim::warp_wait<elf_shim::Op::kSyncwarp>(mask, 0, 0, where);
}

template <elf_shim::shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              elf_shim::Where where = elf_shim::Where::current()) {
  const int from = elf_shim::segment(width, where) | (source & (width - 1));
  return elf_shim::shuffle<elf_shim::Op::kShfl>(mask, value, from, where);
}

// A lane whose source is past the end of its segment keeps its value. Sources in earlier segments
// are allowed.
template <elf_shim::shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  elf_shim::Where where = elf_shim::Where::current()) {
  const int own = elf_shim::lane(), end = elf_shim::segment(width, where) + width;
  const int from = own ^ (lane_mask & 31);
  return elf_shim::shuffle<elf_shim::Op::kShflXor>(mask, value, from < end ? from : own, where);
}

template <elf_shim::shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 elf_shim::Where where = elf_shim::Where::current()) {
  const int own = elf_shim::lane(), first = elf_shim::segment(width, where);
  const bool inside = delta <= static_cast<unsigned>(own - first);
  const int from = inside ? own - static_cast<int>(delta) : own;
  return elf_shim::shuffle<elf_shim::Op::kShflUp>(mask, value, from, where);
}

template <elf_shim::shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   elf_shim::Where where = elf_shim::Where::current()) {
  const int own = elf_shim::lane(), last = elf_shim::segment(width, where) + width - 1;
  const bool inside = delta <= static_cast<unsigned>(last - own);
  const int from = inside ? own + static_cast<int>(delta) : own;
  return elf_shim::shuffle<elf_shim::Op::kShflDown>(mask, value, from, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              elf_shim::Where where = elf_shim::Where::current()) {
  return static_cast<unsigned>(
      elf_shim::warp_wait<elf_shim::Op::kBallot>(mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate,
                      elf_shim::Where where = elf_shim::Where::current()) {
  return elf_shim::warp_wait<elf_shim::Op::kAny>(mask, predicate != 0, 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      elf_shim::Where where = elf_shim::Where::current()) {
  return elf_shim::warp_wait<elf_shim::Op::kAll>(mask, predicate != 0, 0, where) != 0;
}
inline unsigned __activemask() {
  return elf_shim::scheduler.warps[elf_shim::scheduler.running / 32].live;
}

// Signed values are sign-extended to 64 bits, so that 64-bit comparisons order them.
template <elf_shim::one_of<int, unsigned> T>
T __reduce_add_sync(unsigned mask, T value, elf_shim::Where where = elf_shim::Where::current()) {
  const auto bits = static_cast<uint64_t>(value);
  return static_cast<T>(elf_shim::warp_wait<elf_shim::Op::kReduceAdd>(mask, bits, 0, where));
}
template <elf_shim::one_of<int, unsigned> T>
T __reduce_min_sync(unsigned mask, T value, elf_shim::Where where = elf_shim::Where::current()) {
  constexpr auto op =
      std::is_signed_v<T> ? elf_shim::Op::kReduceMinInt : elf_shim::Op::kReduceMinUnsigned;
  return static_cast<T>(elf_shim::warp_wait<op>(mask, static_cast<uint64_t>(value), 0, where));
}
template <elf_shim::one_of<int, unsigned> T>
T __reduce_max_sync(unsigned mask, T value, elf_shim::Where where = elf_shim::Where::current()) {
  constexpr auto op =
      std::is_signed_v<T> ? elf_shim::Op::kReduceMaxInt : elf_shim::Op::kReduceMaxUnsigned;
  return static_cast<T>(elf_shim::warp_wait<op>(mask, static_cast<uint64_t>(value), 0, where));
}

// Memory. Only the types that CUDA accepts: its atomics do not take int64_t, for example.

template <elf_shim::one_of<int, unsigned, unsigned long long> T>
T atomicAdd(T* p, elf_shim::as_is<T> v) {
  return elf_shim::exchange(p, "atomicAdd", [v](T old) { return static_cast<T>(old + v); });
}
template <elf_shim::one_of<int, unsigned, long long, unsigned long long> T>
T atomicMax(T* p, elf_shim::as_is<T> v) {
  return elf_shim::exchange(p, "atomicMax", [v](T old) { return std::max(old, v); });
}
template <elf_shim::one_of<int, unsigned, long long, unsigned long long> T>
T atomicMin(T* p, elf_shim::as_is<T> v) {
  return elf_shim::exchange(p, "atomicMin", [v](T old) { return std::min(old, v); });
}
template <elf_shim::one_of<int, unsigned, unsigned long long> T>
T atomicOr(T* p, elf_shim::as_is<T> v) {
  return elf_shim::exchange(p, "atomicOr", [v](T old) { return old | v; });
}
template <elf_shim::one_of<int, unsigned, unsigned long long> T>
T atomicAnd(T* p, elf_shim::as_is<T> v) {
  return elf_shim::exchange(p, "atomicAnd", [v](T old) { return old & v; });
}
template <elf_shim::one_of<int, unsigned, unsigned long long, float> T>
T atomicExch(T* p, elf_shim::as_is<T> v) {
  return elf_shim::exchange(p, "atomicExch", [v](T) { return v; });
}
template <elf_shim::one_of<int, unsigned, unsigned long long> T>
T atomicCAS(T* p, elf_shim::as_is<T> expected, elf_shim::as_is<T> v) {
  return elf_shim::exchange(p, "atomicCAS", [=](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return elf_shim::exchange(p, "atomicInc",
                            [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

#define ELF_SHIM_LOAD(name)          \
  template <class T>                 \
  T name(const T* p) {               \
    return elf_shim::load(p, #name); \
  }
#define ELF_SHIM_STORE(name)                  \
  template <class T>                          \
  void name(T* p, elf_shim::as_is<T> value) { \
    elf_shim::store(p, value, #name);         \
  }
ELF_SHIM_LOAD(__ldg)
ELF_SHIM_LOAD(__ldcg)
ELF_SHIM_LOAD(__ldcs)
ELF_SHIM_LOAD(__ldca)
ELF_SHIM_LOAD(__ldlu)
ELF_SHIM_LOAD(__ldcv)
ELF_SHIM_STORE(__stcs)
ELF_SHIM_STORE(__stcg)
ELF_SHIM_STORE(__stwb)
ELF_SHIM_STORE(__stwt)
#undef ELF_SHIM_LOAD
#undef ELF_SHIM_STORE

// Arithmetic

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

inline float __int_as_float(int x) { return elf_shim::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return elf_shim::bits_as<float>(x); }
inline int __float_as_int(float x) { return elf_shim::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return elf_shim::bits_as<unsigned>(x); }
inline double __longlong_as_double(long long x) { return elf_shim::bits_as<double>(x); }
inline long long __double_as_longlong(double x) { return elf_shim::bits_as<long long>(x); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? fminf(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
// The empty asm prevents the compiler from fusing a product and a sum into one operation.
inline float __fmul_rn(float x, float y) {
  float product = x * y;
  asm("" : "+g"(product));
  return product;
}
inline float __fadd_rn(float x, float y) {
  float sum = x + y;
  asm("" : "+g"(sum));
  return sum;
}
inline float __fsub_rn(float x, float y) { return __fadd_rn(x, -y); }

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255u) * (b >> i & 255u);
  return c;
}

// The same pairs of types as in CUDA, so that a call that is ambiguous there is ambiguous here.
#define ELF_SHIM_MIN_MAX(R, A, B)                         \
  inline R min(A a, B b) {                                \
    const R x = static_cast<R>(a), y = static_cast<R>(b); \
    return y < x ? y : x;                                 \
  }                                                       \
  inline R max(A a, B b) {                                \
    const R x = static_cast<R>(a), y = static_cast<R>(b); \
    return x < y ? y : x;                                 \
  }
#define ELF_SHIM_MIN_MAX_INTEGER(S, U) \
  ELF_SHIM_MIN_MAX(S, S, S)            \
  ELF_SHIM_MIN_MAX(U, U, U)            \
  ELF_SHIM_MIN_MAX(U, S, U)            \
  ELF_SHIM_MIN_MAX(U, U, S)
ELF_SHIM_MIN_MAX_INTEGER(int, unsigned)
ELF_SHIM_MIN_MAX_INTEGER(long, unsigned long)
ELF_SHIM_MIN_MAX_INTEGER(long long, unsigned long long)
#undef ELF_SHIM_MIN_MAX_INTEGER
#undef ELF_SHIM_MIN_MAX
// If one argument is NaN, these return the other.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

// Grids run one after another here, so there is nothing to wait for.
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
#pragma GCC visibility pop

// Called by CUDA_KERNEL_ASSERT in kernels.
extern "C" __attribute__((visibility("default"), noreturn)) inline void elf_shim_assert_fail(
    const char* message, const char*, unsigned, const char*) noexcept {
  elf_shim::fail(elf_shim::LaneName{elf_shim::scheduler.running}, ": assertion failed: ", message);
}
