// exit_gate: softmax statistic, argmax, exit test and survivor indices of logits [N, C].
//
//   p = softmax(z / T);  statistic = max p | max p - second largest p | entropy(p) / log C
//   A sample exits if its statistic passes the threshold of its predicted class and, where a target
//   is given, its prediction is right. Otherwise it survives.
//
// exit_gate_into writes the results of samples that leave to their places in the outputs of the
// whole batch instead, and lists who goes on (leavers.h).
//
// Each thread takes a range of rows and writes a flag per row. One thread then turns the N flags
// into ascending indices. Bytes: the logits are read once. 20 bytes per row are written (24 for
// float64); the scan reads and writes the 8 of the survivors again. Deterministic: no result
// depends on the number of threads.
#include "exit_gate.h"

#include <algorithm>

namespace elf_fast {
namespace {
#define ELF_ROW_KERNELS "exit_gate_rows.inl"
#include "for_each_isa.inl"
}  // namespace

namespace {

// Writes each row's statistic, prediction and flag: 1 if it survives, else 0. `rows`: the logits
// [N, C] with contiguous rows; `statistic`: [N] of the dtype of the arithmetic.
void gate_all_rows(const Tensor& rows, const Tensor& threshold, const Tensor& temperature,
                   int64_t criterion, const std::optional<Tensor>& target, bool early_stop,
                   void* statistic, int64_t* prediction, int64_t* goes_on) {
  const int64_t N = rows.size(0), C = rows.size(1), stride = rows.stride(0);
  const ScalarType acc = acc_type(rows.scalar_type());
  for_floating(rows.scalar_type(), "exit_gate", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const GateTest<A> test =
        gate_test<A>(threshold, temperature, criterion, target, early_stop, N, C, acc);
    const T* z = data<const T>(rows);
    A* confidence = static_cast<A*>(statistic);
    over_rows(N, C, [&](int64_t begin, int64_t end) {
      ELF_ON_ISA(gate_rows(z, stride, begin, end, C, test, confidence, prediction, goes_on));
    });
  });
}

}  // namespace

GateOutputs run_gate(const Tensor& logits, const Tensor& threshold, const Tensor& temperature,
                     int64_t criterion, const std::optional<Tensor>& target, bool early_stop) {
  const Tensor rows = dense_rows(logits);
  GateOutputs out(rows, acc_type(rows.scalar_type()));
  gate_all_rows(rows, threshold, temperature, criterion, target, early_stop,
                out.confidence.data_ptr(), data<int64_t>(out.prediction),
                data<int64_t>(out.survivors));
  out.scan();
  return out;
}

void run_gate_into(const Tensor& logits, const Tensor& threshold, const Tensor& temperature,
                   int64_t criterion, bool is_last, int64_t exit, const Outputs& to) {
  check_outputs(to, logits);
  const Tensor rows = dense_rows(logits);
  const auto n = static_cast<size_t>(rows.size(0));
  // Three values of 8 bytes per row, because new tensors take longer than a small gate.
  thread_local std::vector<unsigned char> scratch;
  if (scratch.size() < 24 * n) scratch.resize(24 * n);
  auto* prediction = reinterpret_cast<int64_t*>(scratch.data());
  int64_t* goes_on = prediction + n;
  void* statistic = goes_on + n;
  gate_all_rows(rows, threshold, temperature, criterion, std::nullopt, !is_last, statistic,
                prediction, goes_on);
  if (is_last) std::fill(goes_on, goes_on + n, 0);
  if (acc_type(rows.scalar_type()) == ScalarType::Double)
    write_leavers(rows, static_cast<const double*>(statistic), prediction, goes_on, exit, to);
  else
    write_leavers(rows, static_cast<const float*>(statistic), prediction, goes_on, exit, to);
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> exit_gate(const Tensor& logits, const Tensor& threshold,
                                                     const Tensor& temperature, int64_t criterion,
                                                     std::optional<Tensor> target,
                                                     bool early_stop) {
  GateOutputs out = run_gate(logits, threshold, temperature, criterion, target, early_stop);
  return {out.confidence, out.prediction, out.survivors, out.count};
}

void exit_gate_into(const Tensor& logits, const Tensor& threshold, const Tensor& temperature,
                    int64_t criterion, bool is_last, int64_t exit, std::optional<Tensor> rows,
                    Tensor out_logits, Tensor out_confidence, Tensor out_prediction,
                    Tensor out_exit_index, Tensor survivors, Tensor next_rows, Tensor count) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected [n, C]");
  run_gate_into(logits, threshold, temperature, criterion, is_last, exit,
                {rows, out_logits, out_confidence, out_prediction, out_exit_index, survivors,
                 next_rows, count});
}

}  // namespace
}  // namespace elf_fast

STABLE_TORCH_LIBRARY_IMPL(elf_fast, CPU, m) {
  m.impl("exit_gate", TORCH_BOX(&elf_fast::exit_gate));
  m.impl("exit_gate_into", TORCH_BOX(&elf_fast::exit_gate_into));
}
