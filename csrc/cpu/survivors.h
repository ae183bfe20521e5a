// The exit test's arguments and outputs, and the scan of the rows' flags into survivor indices.
// exit_gate, exit_head and exit_loss share them.
#pragma once

#include "threads.h"

namespace elf_fast {

inline void check_target(const Tensor& target, int64_t N, int64_t C) {
  check_vector(target, "target", N, ScalarType::Long);
  const int64_t* y = data<const int64_t>(target);
  for (int64_t n = 0; n < N; ++n)
    STD_TORCH_CHECK(y[n] >= 0 && y[n] < C, "target: expected 0 <= target < ", C, ", got ", y[n],
                    " at index ", n);
}

// The test's arguments in the form that the row kernels take.
template <class A>
struct GateTest {
  A a;                 // log2(e) / temperature
  const A* threshold;  // [] or [C]
  int64_t threshold_stride;
  Criterion criterion;
  const int64_t* target;  // [N]: a sample exits only if its prediction is right; null: no such test
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

// confidence [N], prediction [N], survivors [N] (the first `count` are valid), count [].
struct GateOutputs {
  Tensor confidence, prediction, survivors, count;

  GateOutputs(const Tensor& logits, ScalarType acc)
      : confidence(empty_vector(logits.size(0), acc, logits)),
        prediction(empty_vector(logits.size(0), ScalarType::Long, logits)),
        survivors(empty_vector(logits.size(0), ScalarType::Long, logits)),
        count(empty_scalar(ScalarType::Long, logits)) {}

  // The row kernels write a flag to survivors[n]: 1 if row n survives, else 0. This replaces the
  // flags by the ascending indices of the survivors. It works in place because output k is written
  // after flag k has been read. The rest is filled with N, so that equal input gives equal bits.
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
