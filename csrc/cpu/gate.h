// The gate's outputs and its last step, shared by exit_gate, exit_head and exit_loss.
#pragma once

#include "tensor.h"

namespace elf_fast {

// Arguments of the confidence test, as the row kernels take them.
template <class A>
struct GateTest {
  A a;                 // log2(e) / temperature
  const A* threshold;  // [] or [C]
  int64_t threshold_stride;
  Criterion criterion;
  const int64_t* target;  // [N], or null: leaving takes no correctness
  bool early_stop;
};

template <class A>
GateTest<A> gate_test(const Tensor& threshold, const Tensor& temperature, int64_t criterion,
                      const std::optional<Tensor>& target, bool early_stop, int64_t N, int64_t C,
                      ScalarType acc) {
  GateTest<A> test;
  check_setting(temperature, "temperature", 1, acc);
  test.a = kLog2e<A> / *data<const A>(temperature);
  test.threshold_stride = check_setting(threshold, "threshold", C, acc);
  test.threshold = data<const A>(threshold);
  test.criterion = checked_criterion(criterion);
  test.early_stop = early_stop;
  test.target = nullptr;
  if (target.has_value()) {
    check_target(*target, N, C);
    test.target = data<const int64_t>(*target);
  }
  return test;
}

// confidence [N], prediction [N], survivors [N] of which the first `count` are written, count [].
struct GateOutputs {
  Tensor confidence, prediction, survivors, count;

  GateOutputs(const Tensor& logits, ScalarType acc)
      : confidence(empty_vector(logits.size(0), acc, logits)),
        prediction(empty_vector(logits.size(0), ScalarType::Long, logits)),
        survivors(empty_vector(logits.size(0), ScalarType::Long, logits)),
        count(empty_scalar(ScalarType::Long, logits)) {}

  // The row kernels leave 1 (goes on) or 0 in survivors[n]; this turns the flags into ascending
  // indices in place: index k of the output never lies past flag k of the input. The rest is
  // filled with N, so that the same input gives the same bits.
  void scan() {
    int64_t* flags = data<int64_t>(survivors);
    const int64_t N = survivors.size(0);
    int64_t kept = 0;
    for (int64_t n = 0; n < N; ++n) {
      const int64_t goes_on = flags[n];
      flags[kept] = n;
      kept += goes_on;
    }
    for (int64_t n = kept; n < N; ++n) flags[n] = N;
    *data<int64_t>(count) = kept;
  }
};

}  // namespace elf_fast
