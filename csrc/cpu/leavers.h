// Results of the samples that leave at an exit, written to their places in the batch's outputs; and
// who goes on. exit_gate_into and exit_head_into share this.
#pragma once

#include <cstring>

#include "survivors.h"

namespace elf_fast {

// The outputs of a whole batch of M samples, and of the n samples that reach this exit.
struct Outputs {
  const std::optional<Tensor>& rows;  // [n] ascending: their places below M; none: n == M, in order
  Tensor& logits;                     // [M, C]
  Tensor& confidence;                 // [M] float32
  Tensor& prediction;                 // [M]
  Tensor& exit_index;                 // [M]
  Tensor& survivors;                  // [>= n]: who goes on, as indices into the n samples
  Tensor& next_rows;                  // [>= n]: their places
  Tensor& count;                      // [] how many go on
};

inline void check_outputs(const Outputs& to, const Tensor& logits) {
  const int64_t n = logits.size(0), C = logits.size(1);
  STD_TORCH_CHECK(to.logits.dim() == 2 && to.logits.size(1) == C &&
                      to.logits.scalar_type() == logits.scalar_type() && to.logits.is_contiguous(),
                  "out_logits: expected contiguous [M, C] with C = ", C, " and the logits' dtype");
  const int64_t M = to.logits.size(0);
  check_vector(to.confidence, "out_confidence", M, ScalarType::Float);
  check_vector(to.prediction, "out_prediction", M, ScalarType::Long);
  check_vector(to.exit_index, "out_exit_index", M, ScalarType::Long);
  for (const Tensor* t : {&to.survivors, &to.next_rows})
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) >= n && t->scalar_type() == ScalarType::Long &&
                        t->is_contiguous(),
                    "survivors, next_rows: expected contiguous int64 [m] with m >= ", n);
  STD_TORCH_CHECK(to.count.scalar_type() == ScalarType::Long && to.count.numel() == 1,
                  "count: expected one int64");
  if (!to.rows.has_value()) {
    STD_TORCH_CHECK(M >= n, "out_logits: expected at least ", n, " rows, got ", M);
    return;
  }
  check_vector(*to.rows, "rows", n, ScalarType::Long);
  STD_TORCH_CHECK(n == 0 || to.rows->data_ptr() != to.next_rows.data_ptr(),
                  "next_rows: expected memory of its own, got that of rows");
  const int64_t* row = data<const int64_t>(*to.rows);
  for (int64_t k = 0; k < n; ++k)
    STD_TORCH_CHECK(row[k] > (k ? row[k - 1] : -1) && row[k] < M,
                    "rows: expected ascending indices below M = ", M, ", got ", row[k],
                    " at position ", k);
}

// Writes what the gate found of the logits [n, C], whose rows are contiguous: statistic [n],
// prediction [n] and goes_on [n], 1 for a survivor and 0 for a sample that leaves.
template <class A>
void write_leavers(const Tensor& logits, const A* statistic, const int64_t* prediction,
                   const int64_t* goes_on, int64_t exit, const Outputs& to) {
  const int64_t n = logits.size(0), C = logits.size(1);
  const int64_t* rows = to.rows.has_value() ? data<const int64_t>(*to.rows) : nullptr;
  const auto place = [&](int64_t k) { return rows == nullptr ? k : rows[k]; };
  int64_t* survivors = data<int64_t>(to.survivors);
  int64_t* next_rows = data<int64_t>(to.next_rows);
  int64_t kept = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (!goes_on[k]) continue;
    survivors[kept] = k;
    next_rows[kept++] = place(k);
  }
  *data<int64_t>(to.count) = kept;
  const int64_t bytes = C * static_cast<int64_t>(logits.element_size());
  const int64_t pitch = logits.stride(0) * static_cast<int64_t>(logits.element_size());
  const char* from = data<const char>(logits);
  char* out = data<char>(to.logits);
  float* confidence = data<float>(to.confidence);
  int64_t* predictions = data<int64_t>(to.prediction);
  int64_t* exits = data<int64_t>(to.exit_index);
  over_rows(n, C / 8 + 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (goes_on[k]) continue;
      const int64_t row = place(k);
      std::memcpy(out + row * bytes, from + k * pitch, static_cast<size_t>(bytes));
      confidence[row] = static_cast<float>(statistic[k]);
      predictions[row] = prediction[k];
      exits[row] = exit;
    }
  });
}

}  // namespace elf_fast
