// From one flag a row to ascending survivor indices, by the last block of a grid to arrive.
#pragma once

#include "row_state.cuh"

namespace elf_fast {

constexpr int kBlock = 256;
constexpr int kBlockWarps = kBlock / 32;

// Flags of a row, one byte.
constexpr unsigned char kGoesOn = 1, kBadTarget = 2;

// Whether this block is the last of the grid to call this. What every other block wrote before is
// then visible to it. `arrived` is 0 before and after.
__device__ inline bool is_last_block(unsigned* arrived) {
  __shared__ bool last;
  const unsigned blocks = gridDim.x * gridDim.y;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = blocks == 1 || atomicAdd(arrived, 1u) == blocks - 1;
    if (last && blocks > 1) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Writes the rows that go on, ascending, and fills the rest of survivors [N] with N. One block of
// kBlock threads, 16 flags each at a time; `flags` is 16-byte aligned and may be read to the next
// multiple of 16.
__device__ inline void scan_flags(const unsigned char* flags, int64_t N, int64_t* survivors,
                                  int64_t* count) {
  constexpr int kEach = 16;
  __shared__ int of_warp[kBlockWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t kept = 0;  // survivors among the rows before `start`
  bool bad = false;
  for (int64_t start = 0; start < N; start += kBlock * kEach) {
    const int64_t first = start + threadIdx.x * kEach;
    unsigned char mine[kEach] = {};
    if (first < N) {
      const uint4 loaded = __ldcg(reinterpret_cast<const uint4*>(flags + first));
      memcpy(mine, &loaded, kEach);
    }
    int n = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (first + k >= N) mine[k] = 0;
      n += mine[k] & kGoesOn;
      bad |= (mine[k] & kBadTarget) != 0;
    }
    int before = n;  // becomes the number up to and with this lane
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(kWholeWarp, before, lanes);
      if (lane >= lanes) before += other;
    }
    __syncthreads();  // of_warp is free again
    if (lane == 31) of_warp[warp] = before;
    __syncthreads();
    int64_t at = kept + before - n;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) {
      if (w < warp) at += of_warp[w];
      kept += of_warp[w];
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (mine[k] & kGoesOn) survivors[at++] = first + k;
  }
  for (int64_t n = kept + threadIdx.x; n < N; n += kBlock) survivors[n] = N;
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) *count = bad ? -1 : kept;
}

}  // namespace elf_fast
