// What only the CPU operators share: checks of values, and threads over rows.
#pragma once

#include "../tensor.h"
#include "rows.h"

namespace elf_fast {

inline void check_target(const Tensor& target, int64_t N, int64_t C) {
  check_vector(target, "target", N, ScalarType::Long);
  const int64_t* y = data<const int64_t>(target);
  for (int64_t n = 0; n < N; ++n)
    STD_TORCH_CHECK(y[n] >= 0 && y[n] < C, "target: expected 0 <= target < ", C, ", got ", y[n],
                    " at index ", n);
}

// Rows per task: enough work, in elements, to pay for waking a thread.
inline int64_t grain(int64_t row_elements) {
  constexpr int64_t kElements = 1 << 15;
  return row_elements >= kElements ? 1 : kElements / (row_elements > 0 ? row_elements : 1);
}

template <class F>
void over_rows(int64_t N, int64_t row_elements, const F& f) {
  const int64_t rows = grain(row_elements);
  if (N <= rows)
    f(int64_t{0}, N);
  else
    torch::stable::parallel_for(0, N, rows, f);
}

}  // namespace elf_fast
