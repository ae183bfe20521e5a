// Helpers of the row kernels that do not depend on the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../criterion.h"
#include "../tensor.h"
#include "isa.h"

#define ELF_INLINE static inline __attribute__((always_inline))
#define ELF_LAMBDA __attribute__((always_inline))

namespace elf_fast {

template <class A>
constexpr A kLn2 = static_cast<A>(0.6931471805599453);

// The entropy divided by log C, from S = sum 2^t and W = sum t 2^t: (log2 S - W / S) / log2 C.
// Rounding can make it slightly negative; then the result is 0.
template <class A>
inline A entropy_of(A sum, A weighted, int64_t C) {
  if (C == 1) return 0;
  const A bits = std::log2(sum) - weighted / sum;
  return bits > 0 ? bits / std::log2(static_cast<A>(C)) : (bits == bits ? A(0) : bits);
}

// A buffer of at least C values per thread and slot. The gate uses slot 0, the loss slot 1.
template <class A, int kSlot = 0>
inline A* scratch_row(int64_t C) {
  thread_local std::vector<A> row;
  if (row.size() < static_cast<size_t>(C)) row.resize(static_cast<size_t>(C));
  return row.data();
}
template float* scratch_row<float, 0>(int64_t);
template float* scratch_row<float, 1>(int64_t);
template double* scratch_row<double, 0>(int64_t);
template double* scratch_row<double, 1>(int64_t);

}  // namespace elf_fast
