// From one flag a row to ascending survivor indices, by the last block of a grid to arrive.
#pragma once

#include "row_state.cuh"

namespace elf_fast {

constexpr int kBlock = 256;
constexpr int kBlockWarps = kBlock / 32;

// Flags of a row, one byte.
constexpr unsigned char kGoesOn = 1, kBadTarget = 2;

// Adds 1 and returns what was there. What the calling thread saw written before, whoever adds later
// sees. __threadfence() on both sides of atomicAdd would do it, too, but as sequentially consistent
// fences: on sm_90 two MEMBAR.SC where this takes one MEMBAR.ALL, and every block waits for them.
__device__ inline unsigned arrive(unsigned* arrived) {
#ifdef __CUDA_ARCH__
  unsigned before;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
  return before;
#else
  return atomicAdd(arrived, 1u);
#endif
}

// Whether this block is the last of the grid to call this. What every other block wrote before is
// then visible to it. `arrived` is 0 before and after.
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

// Writes the rows that go on, ascending, and fills the rest of survivors [N] with N. One block of
// kBlock threads. A warp takes kEach times 32 neighbouring rows, so that the lanes that write do so
// side by side.
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
    unsigned go_on[kEach];  // a bit for each lane
    unsigned n = 0;
#pragma unroll
    for (unsigned k = 0; k < kEach; ++k) {
      bad |= (flag[k] & kBadTarget) != 0;
      go_on[k] = __ballot_sync(kWholeWarp, flag[k] & kGoesOn);
      n += __popc(go_on[k]);
    }
    __syncthreads();  // of_warp is free again
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
