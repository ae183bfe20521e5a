// Helpers for CPU and CUDA operators on PyTorch's stable ABI: types, allocation, checks and dtype
// dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <type_traits>

namespace elf_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type of the arithmetic on T: double for double, else float.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType acc_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class A>
constexpr A kLog2e = static_cast<A>(1.4426950408889634);

// The new tensor is on the device of `like`.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim,
                            ScalarType dtype, const Tensor& like) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(dtype),
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_vector(int64_t n, ScalarType dtype, const Tensor& like) {
  const int64_t one = 1;
  return empty_strided(&n, &one, 1, dtype, like);
}

inline Tensor empty_scalar(ScalarType dtype, const Tensor& like) {
  return empty_strided(nullptr, nullptr, 0, dtype, like);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// The logits [N, C] with contiguous rows (column stride 1). The row stride may be anything.
inline Tensor dense_rows(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits: expected [N, C] with C >= 1");
  return logits.size(1) == 1 || logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

// Checks that t is [n] of the dtype and, unless `strided`, contiguous.
inline void check_vector(const Tensor& t, const char* name, int64_t n, ScalarType dtype,
                         bool strided = false) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == n &&
                      (strided || n <= 1 || t.stride(0) == 1),
                  name, ": expected a ", strided ? "" : "contiguous ", "[", n, "] of dtype ",
                  static_cast<int>(dtype));
}

// Checks that t is a scalar [] or one value per class [C], of the dtype of the arithmetic. Returns
// the stride from one class to the next, 0 for a scalar.
inline int64_t check_setting(const Tensor& t, const char* name, int64_t C, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": dtype does not match the logits' arithmetic");
  const bool scalar = t.numel() == 1 && t.dim() == 0;
  STD_TORCH_CHECK(scalar || (t.dim() == 1 && t.size(0) == C), name,
                  ": expected shape [] or [C] with C = ", C, ", got ", t.numel(), " values");
  return scalar ? 0 : t.stride(0);
}

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) with the type T of a floating dtype.
template <class F>
void for_floating(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Tag<float>{});
    case ScalarType::Double: return f(Tag<double>{});
    case ScalarType::BFloat16: return f(Tag<BFloat16>{});
    case ScalarType::Half: return f(Tag<Half>{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, bfloat16 or float16, got dtype ",
                      static_cast<int>(dtype));
  }
}

}  // namespace elf_fast
