// Host functions: launches, errors, device attributes. All work is done synchronously.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "shim_scheduler.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

#pragma GCC visibility push(hidden)
namespace elf_shim {

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t failed_with(cudaError_t error) { return last_error = error; }

// The limit of compute capability 9.0 that a launch exceeds, or null.
inline const char* why_not(const cudaLaunchConfig_t& c) {
  const dim3 b = c.blockDim, g = c.gridDim;
  if (!(b.x && b.y && b.z && g.x && g.y && g.z)) return "a block or grid without threads";
  if (b.x > 1024 || b.y > 1024 || b.z > 64 || uint64_t{b.x} * b.y * b.z > 1024)
    return "more than 1024 threads a block (or 64 along z)";
  if (g.x > 0x7FFFFFFF || g.y > 65535 || g.z > 65535) return "more than 65535 blocks along y or z";
  if (c.dynamicSmemBytes) return "dynamic shared memory is not emulated";
  for (unsigned i = 0; i < c.numAttrs; ++i)
    if (c.attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization)
      return "cooperative and cluster launches are not emulated";
  return nullptr;
}

}  // namespace elf_shim

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  if (const char* reason = elf_shim::why_not(*config)) {
    elf_shim::scheduler.reason = reason;
    return elf_shim::failed_with(cudaErrorInvalidConfiguration);
  }
  static_assert((std::is_trivially_destructible_v<P> && ...), "fibers are abandoned on error");
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  };
  const Call call{kernel, std::tuple<P...>(static_cast<P>(std::forward<A>(arguments))...)};
  const auto run = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    std::apply(c.kernel, c.arguments);
  };
  return elf_shim::run_grid(config->gridDim, config->blockDim, run, &call)
             ? cudaSuccess
             : elf_shim::failed_with(cudaErrorLaunchFailure);
}

inline cudaError_t cudaGetLastError() { return std::exchange(elf_shim::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return elf_shim::last_error; }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorLaunchFailure:
    case cudaErrorInvalidConfiguration: return elf_shim::scheduler.reason.c_str();
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "operation not supported";
  }
  return "unrecognized error code";
}

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaError";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device <= 0 ? cudaSuccess : elf_shim::failed_with(cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 3;  // few, so that blocks loop; odd, so that their numbers of rows differ
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = 32; return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; return cudaSuccess;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
  }
  return elf_shim::failed_with(cudaErrorInvalidValue);
}

template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int,
                                                          size_t) {
  *blocks = 2;
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
#pragma GCC visibility pop

// Visible, because PyTorch declares these names with default visibility.
#define ELF_SHIM_FOR_TORCH extern "C" __attribute__((visibility("default"))) inline
ELF_SHIM_FOR_TORCH int32_t elf_shim_check_msg(int32_t error, const char* file, const char* function,
                                              uint32_t line, bool, char** message) {
  *message = nullptr;
  if (error == cudaSuccess) return 0;
  cudaGetLastError();
  const std::string text = std::string("emulated CUDA error: ") +
                           cudaGetErrorString(static_cast<cudaError_t>(error)) + " (" + function +
                           ", " + file + ":" + std::to_string(line) + ")";
  *message = strdup(text.c_str());
  return 0;
}
ELF_SHIM_FOR_TORCH void elf_shim_free_error_msg(char* message) { std::free(message); }
ELF_SHIM_FOR_TORCH int32_t elf_shim_current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
struct DeviceGuardOpaque;
ELF_SHIM_FOR_TORCH int32_t elf_shim_create_device_guard(int32_t, DeviceGuardOpaque** guard) {
  *guard = nullptr;
  return 0;
}
ELF_SHIM_FOR_TORCH int32_t elf_shim_delete_device_guard(DeviceGuardOpaque*) { return 0; }
ELF_SHIM_FOR_TORCH int32_t elf_shim_device_guard_set_index(DeviceGuardOpaque*, int32_t) {
  return 0;
}
#undef ELF_SHIM_FOR_TORCH
