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

#include "leavers.h"

namespace elf_fast {
namespace {
#define ELF_ROW_KERNELS "exit_gate_rows.inl"
#include "for_each_isa.inl"
}  // namespace

GateOutputs run_gate(const Tensor& logits, const Tensor& threshold, const Tensor& temperature,
                     int64_t criterion, const std::optional<Tensor>& target, bool early_stop) {
  const Tensor rows = dense_rows(logits);
  const int64_t N = rows.size(0), C = rows.size(1), stride = rows.stride(0);
  const ScalarType acc = acc_type(rows.scalar_type());
  GateOutputs out(rows, acc);
  for_floating(rows.scalar_type(), "exit_gate", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const GateTest<A> test =
        gate_test<A>(threshold, temperature, criterion, target, early_stop, N, C, acc);
    const T* z = data<const T>(rows);
    A* confidence = data<A>(out.confidence);
    int64_t* prediction = data<int64_t>(out.prediction);
    int64_t* goes_on = data<int64_t>(out.survivors);
    over_rows(N, C, [&](int64_t begin, int64_t end) {
      ELF_ON_ISA(gate_rows(z, stride, begin, end, C, test, confidence, prediction, goes_on));
    });
  });
  out.scan();
  return out;
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
  const Outputs to{rows,           out_logits, out_confidence, out_prediction,
                   out_exit_index, survivors,  next_rows,      count};
  check_outputs(to, logits);
  const GateOutputs gate =
      run_gate(logits, threshold, temperature, criterion, std::nullopt, !is_last);
  write_leavers(logits, gate, is_last, exit, to);
}

}  // namespace
}  // namespace elf_fast

STABLE_TORCH_LIBRARY_IMPL(elf_fast, CPU, m) {
  m.impl("exit_gate", TORCH_BOX(&elf_fast::exit_gate));
  m.impl("exit_gate_into", TORCH_BOX(&elf_fast::exit_gate_into));
}
