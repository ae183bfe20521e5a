// Helpers over PyTorch's stable ABI: allocation, checks and dtype dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "rows.h"

namespace elf_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim,
                            ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_vector(int64_t n, ScalarType dtype) {
  const int64_t one = 1;
  return empty_strided(&n, &one, 1, dtype);
}

inline Tensor empty_scalar(ScalarType dtype) { return empty_strided(nullptr, nullptr, 0, dtype); }

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline ScalarType acc_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rows of a matrix [N, C] whose values lie next to each other; rows may be any distance apart.
inline Tensor dense_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// float32 (float64 for float64 logits) values on the CPU: a scalar [] or one per class [C].
inline const void* scalar_or_classes(const Tensor& t, const char* name, int64_t C, ScalarType dtype,
                                     int64_t* stride) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": dtype does not match the logits' arithmetic");
  const bool scalar = t.numel() == 1 && t.dim() == 0;
  STD_TORCH_CHECK(scalar || (t.dim() == 1 && t.size(0) == C), name,
                  ": expected shape [] or [C] with C = ", C, ", got ", t.numel(), " values");
  *stride = scalar ? 0 : t.stride(0);
  return t.data_ptr();
}

inline void check_target(const Tensor& target, int64_t N, int64_t C) {
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.dim() == 1 &&
                      target.size(0) == N && (N <= 1 || target.stride(0) == 1),
                  "target: expected contiguous int64 [N] with N = ", N);
  const int64_t* y = data<const int64_t>(target);
  for (int64_t n = 0; n < N; ++n)
    STD_TORCH_CHECK(y[n] >= 0 && y[n] < C, "target: expected 0 <= target < ", C, ", got ", y[n],
                    " at index ", n);
}

// Rows per task: enough work, in elements, to pay for waking a thread.
inline int64_t grain(int64_t row_elements) {
  constexpr int64_t kElements = 1 << 15;
  return row_elements >= kElements ? 1 : kElements / (row_elements > 0 ? row_elements : 1);
}

template <class F>
void over_rows(int64_t N, int64_t row_elements, const F& f) {
  const int64_t rows = grain(row_elements);
  if (N <= rows)
    f(int64_t{0}, N);
  else
    torch::stable::parallel_for(0, N, rows, f);
}

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>) for the floating dtypes that the kernels take.
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
