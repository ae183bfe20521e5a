// A stand-in for the CUDA runtime: kernels run on the CPU, to test csrc/cuda/*.cu without a GPU.
//
//   g++ -x c++ -std=c++20 -O2 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wno-unknown-pragmas
//       -I tests/cuda_on_cpu -include cuda_runtime.h ... x.cu
//
// -include: PyTorch's DeviceGuard calls the emulation only where this header comes before its own.
// Hidden: __shared__ variables of two libraries in one process must not become one.
//
// Every CUDA thread of a block is a fiber that runs to its next barrier or warp primitive; then
// another one goes on, drawn by a seeded generator (ELF_FAST_SCHEDULE_SEED). Blocks run one after
// another in shuffled order. A missing barrier shows as a wrong or poisoned value, a wait that
// nobody can end as an error of the launch. See shim_scheduler.h for the rules.
//
// Not seen: races between blocks (they never overlap), a missing __threadfence, and accesses
// outside an array but with -fsanitize=address. Absent: dynamic shared memory, cooperative and
// cluster launches, textures.
#pragma once

// The qualifiers come first: the headers below use none of them, sources after this one do.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// The thread-local segment is the one place whose bounds are known at run time and that takes
// variables of plain functions, templates and inline functions alike. A named section does not:
// GCC refuses to mix comdat and other data in one. Each block starts with all of it poisoned, so
// the sources may have no other thread-local variables.
#define __shared__ static thread_local

// What needs a GPU in PyTorch, under the names of functions in shim_host.h. Its headers may have
// declared the originals before or declare these again after.
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
