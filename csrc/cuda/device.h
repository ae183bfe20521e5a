// The device and stream of an operator's tensors, kernel launches, and settings as kernel
// arguments.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <utility>

#include "../tensor.h"

namespace elf_fast {

// Makes the device of a tensor the current device until the end of the object's life.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : index_(t.get_device_index()) {
    STD_CUDA_CHECK(cudaGetDevice(&before_));
    if (index_ < 0) index_ = before_;
    if (index_ != before_) STD_CUDA_CHECK(cudaSetDevice(index_));
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~OnDeviceOf() {
    if (index_ != before_) cudaSetDevice(before_);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  int index() const { return index_; }
  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const {
    int count;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

  template <class... P, class... A>
  void launch(dim3 grid, int threads, void (*kernel)(P...), A&&... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
  }

 private:
  int index_, before_;
  cudaStream_t stream_;
};

inline void check_same_device(const Tensor& t, const char* name, const Tensor& as) {
  STD_TORCH_CHECK(t.is_cpu() == as.is_cpu() && t.get_device_index() == as.get_device_index(), name,
                  ": expected it on the device of the other tensors");
}

// A threshold or temperature as a kernel argument: a number, if it is in host memory, or a pointer
// to values in device memory.
template <class A>
struct Setting {
  const A* values;  // null: use `value` for every class
  int64_t stride;   // from one class to the next
  A value;

  __device__ A operator[](int64_t c) const {
    return values == nullptr ? value : values[c * stride];
  }
};

template <class A>
Setting<A> setting(const Tensor& t, const char* name, int64_t C, ScalarType dtype,
                   const Tensor& logits) {
  const int64_t stride = check_setting(t, name, C, dtype);
  if (t.is_cpu() && t.dim() == 0) return {nullptr, 0, *data<const A>(t)};
  check_same_device(t, name, logits);
  return {data<const A>(t), stride, A(0)};
}

}  // namespace elf_fast
