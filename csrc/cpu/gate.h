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
  STD_TORCH_CHECK(criterion >= 0 && criterion <= 2, "criterion: expected 0, 1 or 2, got ",
                  criterion);
  GateTest<A> test;
  int64_t unused;
  const void* t = scalar_or_classes(temperature, "temperature", 1, acc, &unused);
  test.a = kLog2e<A> / *static_cast<const A*>(t);
  test.threshold = static_cast<const A*>(
      scalar_or_classes(threshold, "threshold", C, acc, &test.threshold_stride));
  test.criterion = static_cast<Criterion>(criterion);
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

  GateOutputs(int64_t N, ScalarType acc)
      : confidence(empty_vector(N, acc)),
        prediction(empty_vector(N, ScalarType::Long)),
        survivors(empty_vector(N, ScalarType::Long)),
        count(empty_scalar(ScalarType::Long)) {}

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
