// A stand-in for the CUDA runtime: it runs kernels on the CPU, so that csrc/cuda/*.cu can be tested
// without a GPU.
//
//   g++ -x c++ -std=c++20 -O2 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wno-unknown-pragmas
//       -I tests/cuda_on_cpu -include cuda_runtime.h ... x.cu
//
// -include: this header must come before PyTorch's, or PyTorch's DeviceGuard does not call the
// emulation. -fvisibility=hidden: otherwise the dynamic linker merges the __shared__ variables of
// two libraries in one process.
//
// Every CUDA thread of a block is a fiber. It runs to its next barrier or warp primitive; then
// another fiber runs, chosen by a seeded generator (ELF_FAST_SCHEDULE_SEED). Blocks run one after
// another in shuffled order. A missing barrier gives a wrong or poisoned value. A deadlock gives an
// error of the launch. See shim_scheduler.h for the rules.
//
// Not detected: races between blocks (blocks never overlap), a missing __threadfence, and, without
// -fsanitize=address, accesses outside an array. Not supported: dynamic shared memory, cooperative
// and cluster launches, textures.
#pragma once

// The headers below do not use these qualifiers; sources that include this one do.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// Shared variables are in the thread-local segment, because its bounds are known at run time, and
// it can hold variables of plain functions, templates and inline functions. A named section cannot:
// GCC refuses to mix comdat and other data in one. The whole segment is poisoned before each block,
// so the sources must have no other thread-local variables.
#define __shared__ static thread_local

// PyTorch's functions that need a GPU are renamed to functions in shim_host.h. PyTorch's headers
// may declare the originals before this point, or these names after it.
#define torch_c10_cuda_check_msg elf_shim_check_msg
#define torch_c10_cuda_free_error_msg elf_shim_free_error_msg
#define __assert_fail elf_shim_assert_fail
#define aoti_torch_get_current_cuda_stream elf_shim_current_stream
#define aoti_torch_create_device_guard elf_shim_create_device_guard
#define aoti_torch_delete_device_guard elf_shim_delete_device_guard
#define aoti_torch_device_guard_set_index elf_shim_device_guard_set_index

#include "shim_types.h"
#include "shim_scheduler.h"
#include "shim_device.h"
#include "shim_host.h"
