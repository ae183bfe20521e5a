// exit_head: global average pool, linear classifier and exit gate in one operator.
//
//   pooled = mean of features over positions;  logits = pooled W^T + b;  then exit_gate(logits)
//
// features: [N, D, H, W] in either memory format, tokens [N, T, D], or vectors [N, D]. Bytes: the
// pool reads the features once; the gate finds the logits in cache. The product is computed in the
// classifier's dtype: small ones here, large ones by PyTorch, whose matrix library is faster there.
// Pool and small products are deterministic: each output is computed by one thread.
#include "exit_gate.h"

#include <array>

namespace elf_fast {
namespace {
#define ELF_ROW_KERNELS "exit_head_rows.inl"
#include "for_each_isa.inl"

bool is_channels_last(const Tensor& t) {
  const int64_t D = t.size(1), H = t.size(2), W = t.size(3);
  return t.stride(1) == 1 && t.stride(3) == D && t.stride(2) == W * D && t.stride(0) == H * W * D;
}

Tensor pool(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() >= 2 && features.dim() <= 4,
                  "features: expected [N, D], [N, T, D] or [N, D, H, W], got ", features.dim(),
                  " dimensions");
  if (features.dim() == 2) return torch::stable::clone(features);
  const bool image = features.dim() == 4;
  const bool last = !image || (is_channels_last(features) && !features.is_contiguous());
  const Tensor x = image && last ? features : torch::stable::contiguous(features);
  const int64_t N = x.size(0);
  const int64_t D = image ? x.size(1) : x.size(2);
  const int64_t P = image ? x.size(2) * x.size(3) : x.size(1);
  STD_TORCH_CHECK(P > 0 && D > 0, "features: expected at least one position and one channel");
  const int64_t sizes[2] = {N, D}, strides[2] = {D, 1};
  Tensor pooled = empty_strided(sizes, strides, 2, x.scalar_type(), x);
  for_floating(x.scalar_type(), "exit_head", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* src = data<const T>(x);
    T* dst = data<T>(pooled);
    over_rows(N, P * D, [&](int64_t begin, int64_t end) {
      if (last)
        ELF_ON_ISA(pool_channels_last(src, begin, end, P, D, dst));
      else
        ELF_ON_ISA(pool_channels_first(src, begin, end, D, P, dst));
    });
  });
  return pooled;
}

// Number of multiplications up to which the product is computed here: a cold call of a matrix
// library takes longer (docs/cpu-kernels.md).
constexpr int64_t kSmallProduct = int64_t{1} << 21;

bool is_small(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ScalarType dtype = weight.scalar_type();
  return dtype != ScalarType::Double && x.is_contiguous() && weight.is_contiguous() &&
         x.numel() * weight.size(0) <= kSmallProduct &&
         (!bias.has_value() || (bias->scalar_type() == dtype && bias->is_contiguous()));
}

Tensor small_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0);
  const int64_t sizes[2] = {N, C}, strides[2] = {C, 1};
  const Tensor logits = empty_strided(sizes, strides, 2, weight.scalar_type(), x);
  for_floating(weight.scalar_type(), "exit_head", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, double>) {
      const T *in = data<const T>(x), *w = data<const T>(weight);
      const T* b = bias.has_value() ? data<const T>(*bias) : nullptr;
      T* out = data<T>(logits);
      over_rows(N, C * D, [&](int64_t begin, int64_t end) {
        ELF_ON_ISA(linear_rows(in, begin, end, D, w, b, C, out));
      });
    }
  });
  return logits;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1),
                  "weight: expected [C, D] with D = ", x.size(1));
  STD_TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                  "bias: expected [C] with C = ", weight.size(0));
  if (is_small(x, weight, bias)) return small_linear(x, weight, bias);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor pooled_as(const Tensor& features, const Tensor& weight) {
  const Tensor pooled = pool(features);
  return pooled.scalar_type() == weight.scalar_type()
             ? pooled
             : torch::stable::to(pooled, weight.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> exit_head(
    const Tensor& features, const Tensor& weight, std::optional<Tensor> bias,
    const Tensor& threshold, const Tensor& temperature, int64_t criterion,
    std::optional<Tensor> target, bool early_stop, bool with_logits) {
  const Tensor pooled = pooled_as(features, weight);
  const Tensor logits = linear(pooled, weight, bias);
  GateOutputs out = run_gate(logits, threshold, temperature, criterion, target, early_stop);
  const int64_t none[2] = {0, weight.size(0)}, strides[2] = {weight.size(0), 1};
  const Tensor handed =
      with_logits ? logits : empty_strided(none, strides, 2, weight.scalar_type(), weight);
  return {handed, pooled, out.confidence, out.prediction, out.survivors, out.count};
}

void exit_head_into(const Tensor& features, const Tensor& weight, std::optional<Tensor> bias,
                    const Tensor& threshold, const Tensor& temperature, int64_t criterion,
                    bool is_last, int64_t exit, std::optional<Tensor> rows, Tensor out_logits,
                    Tensor out_confidence, Tensor out_prediction, Tensor out_exit_index,
                    Tensor survivors, Tensor next_rows, Tensor count) {
  const Tensor logits = linear(pooled_as(features, weight), weight, bias);
  run_gate_into(logits, threshold, temperature, criterion, is_last, exit,
                {rows, out_logits, out_confidence, out_prediction, out_exit_index, survivors,
                 next_rows, count});
}

}  // namespace
}  // namespace elf_fast

STABLE_TORCH_LIBRARY_IMPL(elf_fast, CPU, m) {
  m.impl("exit_head", TORCH_BOX(&elf_fast::exit_head));
  m.impl("exit_head_into", TORCH_BOX(&elf_fast::exit_head_into));
}
