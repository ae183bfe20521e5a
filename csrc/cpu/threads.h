// Distribution of rows over threads.
#pragma once

#include "../tensor.h"
#include "rows.h"

namespace elf_fast {

// Rows per task. A task must hold enough elements to outweigh the cost of waking a thread.
inline int64_t grain(int64_t row_elements) {
  constexpr int64_t kElements = 1 << 15;
  return row_elements >= kElements ? 1 : kElements / (row_elements > 0 ? row_elements : 1);
}

// Calls f(begin, end) on ranges that together cover rows [0, N).
template <class F>
void over_rows(int64_t N, int64_t row_elements, const F& f) {
  const int64_t rows = grain(row_elements);
  if (N <= rows)
    f(int64_t{0}, N);
  else
    torch::stable::parallel_for(0, N, rows, f);
}

}  // namespace elf_fast
