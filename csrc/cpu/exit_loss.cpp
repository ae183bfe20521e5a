// exit_loss: the long-tail loss family of logits [N, C], its gradient, and the exit gate.
//
//   x = s (z - delta_y e_y) + b,  q = softmax(x),  p = q_y
//   loss = w_y (1 - p)^gamma [(1 - eps) (-log p) + eps mean_c(-log q_c)]
//
// Members: cross-entropy, focal, class-balanced, LDAM, balanced softmax and logit adjustment. The
// gate uses z, not x. Each thread takes a range of rows. Bytes: forward reads the logits once and
// writes 8 bytes per row for the loss and the log of the sum, besides the gate's outputs. Backward
// reads the logits once and writes the gradient once. Deterministic.
#include <algorithm>

#include "survivors.h"

namespace elf_fast {
namespace {

template <class A>
struct LossFamily {
  const A* weight;   // w [C] or null
  const A* margins;  // delta [C] or null
  const A* bias;     // b [C] or null
  A gamma, scale, smoothing;

  bool plain() const { return scale == 1 && margins == nullptr && bias == nullptr; }
};

#define ELF_ROW_KERNELS "exit_loss_rows.inl"
#include "for_each_isa.inl"

template <class A>
const A* per_class(const std::optional<Tensor>& t, const char* name, int64_t C, ScalarType acc) {
  if (!t.has_value()) return nullptr;
  check_vector(*t, name, C, acc);
  return data<const A>(*t);
}

template <class A>
LossFamily<A> family(const std::optional<Tensor>& weight, const std::optional<Tensor>& margins,
                     const std::optional<Tensor>& bias, double gamma, double scale,
                     double smoothing, int64_t C, ScalarType acc) {
  return {per_class<A>(weight, "weight", C, acc),
          per_class<A>(margins, "margins", C, acc),
          per_class<A>(bias, "bias", C, acc),
          static_cast<A>(gamma),
          static_cast<A>(scale),
          static_cast<A>(smoothing)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> exit_loss(
    const Tensor& logits, const Tensor& target, std::optional<Tensor> weight,
    std::optional<Tensor> margins, std::optional<Tensor> bias, double gamma, double scale,
    double label_smoothing, const Tensor& threshold, const Tensor& temperature, int64_t criterion) {
  const Tensor rows = dense_rows(logits);
  const int64_t N = rows.size(0), C = rows.size(1), stride = rows.stride(0);
  check_target(target, N, C);
  const ScalarType acc = acc_type(rows.scalar_type());
  GateOutputs gate(rows, acc);
  Tensor loss = empty_vector(N, acc, rows), log_sum = empty_vector(N, acc, rows);
  for_floating(rows.scalar_type(), "exit_loss", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const LossFamily<A> f = family<A>(weight, margins, bias, gamma, scale, label_smoothing, C, acc);
    const T* z = data<const T>(rows);
    const int64_t* y = data<const int64_t>(target);
    const GateTest<A> test =
        gate_test<A>(threshold, temperature, criterion, target, false, N, C, acc);
    A* losses = data<A>(loss);
    A* sums = data<A>(log_sum);
    A* confidence = data<A>(gate.confidence);
    int64_t* prediction = data<int64_t>(gate.prediction);
    int64_t* goes_on = data<int64_t>(gate.survivors);
    over_rows(N, C, [&](int64_t begin, int64_t end) {
      // Blocks of at most 64 KB: the loss finds the rows that the gate has read in cache.
      const int64_t block = std::max<int64_t>(1, (int64_t{1} << 16) / (C * int64_t{sizeof(T)}));
      for (int64_t from = begin; from < end; from += block) {
        const int64_t to = std::min(end, from + block);
        ELF_ON_ISA(gate_rows(z, stride, from, to, C, test, confidence, prediction, goes_on));
        ELF_ON_ISA(loss_rows(z, stride, from, to, C, y, f, losses, sums));
      }
    });
  });
  gate.scan();
  return {loss, log_sum, gate.confidence, gate.prediction, gate.survivors, gate.count};
}

Tensor exit_loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                          const Tensor& log_sum, std::optional<Tensor> weight,
                          std::optional<Tensor> margins, std::optional<Tensor> bias, double gamma,
                          double scale, double label_smoothing) {
  const Tensor rows = dense_rows(logits);
  const int64_t N = rows.size(0), C = rows.size(1), stride = rows.stride(0);
  const ScalarType acc = acc_type(rows.scalar_type());
  check_target(target, N, C);
  check_vector(grad_loss, "grad_loss", N, acc, /*strided=*/true);
  check_vector(log_sum, "log_sum", N, acc);
  const int64_t sizes[2] = {N, C}, strides[2] = {C, 1};
  Tensor grad = empty_strided(sizes, strides, 2, rows.scalar_type(), rows);
  for_floating(rows.scalar_type(), "exit_loss_backward", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const LossFamily<A> f = family<A>(weight, margins, bias, gamma, scale, label_smoothing, C, acc);
    const T* z = data<const T>(rows);
    const int64_t* y = data<const int64_t>(target);
    const A* sums = data<const A>(log_sum);
    const A* g = data<const A>(grad_loss);
    const int64_t grad_stride = grad_loss.stride(0);
    T* out = data<T>(grad);
    over_rows(N, C, [&](int64_t begin, int64_t end) {
      ELF_ON_ISA(loss_backward_rows(z, stride, begin, end, C, y, f, sums, g, grad_stride, out));
    });
  });
  return grad;
}

}  // namespace
}  // namespace elf_fast

STABLE_TORCH_LIBRARY_IMPL(elf_fast, CPU, m) {
  m.impl("exit_loss", TORCH_BOX(&elf_fast::exit_loss));
  m.impl("exit_loss_backward", TORCH_BOX(&elf_fast::exit_loss_backward));
}
