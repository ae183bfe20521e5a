// The scan of one flag per row into ascending survivor indices. The last block of a grid to finish
// does it, so no second launch is needed.
#pragma once

#include "row_state.cuh"

namespace elf_fast {

constexpr int kBlock = 256;
constexpr int kBlockWarps = kBlock / 32;

// Bits of a row's flag, which is one byte: the row survives; its target is out of range.
constexpr unsigned char kGoesOn = 1, kBadTarget = 2;

// Adds 1 and returns the value before, as an acquire-release operation: a thread that adds later
// sees all writes that this thread made or saw before. __threadfence() on both sides of atomicAdd
// has the same effect, but these fences are sequentially consistent: on sm_90 they are two
// MEMBAR.SC, and this is one MEMBAR.ALL. Every block waits for them.
__device__ inline unsigned arrive(unsigned* arrived) {
#ifdef __CUDA_ARCH__
  unsigned before;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
  return before;
#else
  return atomicAdd(arrived, 1u);
#endif
}

// Whether this block is the last one of the grid to call this. If so, it sees everything that the
// other blocks wrote before their calls. *arrived must be 0 before the grid starts, and is 0 after.
__device__ inline bool is_last_block(unsigned* arrived) {
  __shared__ bool last;
  const unsigned blocks = gridDim.x * gridDim.y;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = blocks == 1 || arrive(arrived) == blocks - 1;
    if (last && blocks > 1) *arrived = 0;
  }
  __syncthreads();
  return last;
}

// Writes the ascending indices of the surviving rows to survivors [N] and fills the rest with N.
// *count is their number, or -1 if a target is out of range. Must be called by one block of kBlock
// threads. Each warp takes kEach times 32 neighbouring rows, one row per lane at a time, so that
// the writes of its lanes are adjacent. Flags of other blocks are read from the second-level cache
// (__ldcg), because the first-level cache may hold old values.
__device__ inline void scan_flags(const unsigned char* flags, unsigned N, int64_t* survivors,
                                  int64_t* count) {
  constexpr unsigned kEach = 16;
  __shared__ unsigned of_warp[kBlockWarps];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned lower_lanes = (1u << lane) - 1;
  unsigned kept = 0;  // survivors among the rows before `start`
  bool bad = false;
  for (unsigned start = 0; start < N; start += kBlock * kEach) {
    const unsigned first = start + warp * (32 * kEach) + lane;
    unsigned char flag[kEach];
#pragma unroll
    for (unsigned k = 0; k < kEach; ++k)
      flag[k] = first + 32 * k < N ? __ldcg(flags + first + 32 * k) : 0;
    unsigned go_on[kEach];  // one bit per lane
    unsigned n = 0;
#pragma unroll
    for (unsigned k = 0; k < kEach; ++k) {
      bad |= (flag[k] & kBadTarget) != 0;
      go_on[k] = __ballot_sync(kWholeWarp, flag[k] & kGoesOn);
      n += __popc(go_on[k]);
    }
    __syncthreads();  // all warps have read of_warp
    if (lane == 0) of_warp[warp] = n;
    __syncthreads();
    unsigned at = kept;
#pragma unroll
    for (unsigned w = 0; w < kBlockWarps; ++w) {
      if (w < warp) at += of_warp[w];
      kept += of_warp[w];
    }
#pragma unroll
    for (unsigned k = 0; k < kEach; ++k) {
      if (go_on[k] >> lane & 1) survivors[at + __popc(go_on[k] & lower_lanes)] = first + 32 * k;
      at += __popc(go_on[k]);
    }
  }
  for (unsigned n = kept + threadIdx.x; n < N; n += kBlock) survivors[n] = N;
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) *count = bad ? -1 : int64_t{kept};
}

}  // namespace elf_fast
