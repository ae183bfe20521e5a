// selftest CASE [MUTANT]: runs a small kernel and prints its result, one line per launch, or its
// error. A mutant of a case lacks one synchronisation or misuses a primitive.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

template <class T, int kBytes>
__device__ T* warp_buffer() {
  __shared__ __align__(16) T buffer[kBytes / sizeof(T)];
  return buffer + threadIdx.x / 32 * 32;
}

template <class T>
__device__ T block_sum(T x, bool barrier) {
  __shared__ T partial[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int lanes = min(32, static_cast<int>(blockDim.x) - 32 * warp);  // in this warp
  for (int offset = 16; offset > 0; offset /= 2) {
    const bool both = lane + offset < lanes;  // the last warp may have fewer than 32 lanes
    const T other = __shfl_down_sync(~0u, x, both ? offset : 0);
    if (both) x += other;
  }
  if (lane == 0) partial[warp] = x;
  if (barrier) __syncthreads();
  T total = 0;
  for (unsigned w = 0; w < (blockDim.x + 31) / 32; ++w) total += partial[w];
  return total;
}

// out[block] = n (n + 1) / 2 from n threads.
template <class T>
__global__ void __launch_bounds__(1024) sum(T* out, int mutant) {
  const T x = static_cast<T>(threadIdx.x + 1);
  const T once = block_sum(x, mutant != 1);
  if (mutant != 2) __syncthreads();
  const T twice = block_sum(2 * x, true);
  if (3 * once != once + twice) out[blockIdx.x] = -1;
  if (threadIdx.x == 0 && out[blockIdx.x] == 0) out[blockIdx.x] = once;
}

// Each lane adds up the values of its left neighbour in many rounds.
__global__ void exchange(int* out, int rounds, int mutant) {
  int* buffer = warp_buffer<int, 4096>();
  const int lane = threadIdx.x % 32;
  int total = 0;
  for (int r = 0; r < rounds; ++r) {
    buffer[lane] = r * lane;
    if (mutant != 1) __syncwarp();
    total += buffer[(lane + 31) % 32];
    if (mutant != 2) __syncwarp();
  }
  out[threadIdx.x] = total;
}

__global__ void misuse(int* out, int mutant) {
  const int lane = threadIdx.x % 32;
  if (mutant == 1 && lane == 7) return;
  if (mutant == 2 && lane == 7) __syncthreads();
  if (mutant == 3) {
    if (threadIdx.x < 40)
      __syncthreads();
    else
      __syncthreads();
  }
  if (mutant == 4 && lane == 7) __ballot_sync(~0u, 1);
  if (mutant == 5) out[lane] = __shfl_sync(0xFFu << lane / 8 * 8, lane, (lane + 1) % 32);
  if (mutant == 6)
    while (atomicAdd(&out[0], 0) == 0) continue;
  if (mutant == 7)
    while (*static_cast<volatile int*>(&out[0]) == 0) continue;
  if (mutant == 8 && threadIdx.x == 5) __trap();
  if (mutant == 9) __syncwarp(1);
  out[threadIdx.x] = __shfl_sync(~0u, lane, 3);
}

// Correct use: the two halves of a warp take different branches, and 4 of the 40 threads return
// early.
__global__ void allowed(unsigned* out) {
  const unsigned t = threadIdx.x, half = t % 32 / 16, mask = 0xFFFFu << 16 * half;
  if (t >= 32) {
    out[t] = __ballot_sync(~0u, t % 2);
    if (t % 2) return;
  } else if (half) {
    out[t] = __reduce_max_sync(mask, t);
    __syncwarp(mask);
  } else {
    out[t] = static_cast<unsigned>(__reduce_min_sync(mask, -static_cast<int>(t)));
  }
  out[t] += 1000 * __syncthreads_count(t < 20) + (__syncthreads_and(1) ? 100000 : 0);
}

__global__ void poison(unsigned* out) {
  __shared__ unsigned block[64];
  unsigned* warp = warp_buffer<unsigned, 8192>();
  out[blockIdx.x * blockDim.x + threadIdx.x] = block[threadIdx.x] & warp[threadIdx.x % 32];
  block[threadIdx.x] = warp[threadIdx.x % 32] = 7;
}

__global__ void last_block(int* partial, unsigned* ticket, int* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    __threadfence();
    last = atomicAdd(ticket, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  int total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += __ldcg(&partial[b]);
  *out = total;
}

__global__ void misaligned(const char* p, uint4* out) {
  *out = __ldcg(reinterpret_cast<const uint4*>(p));
}

__global__ void order(unsigned* out, unsigned* next) { out[atomicAdd(next, 1u)] = blockIdx.x; }

__global__ void many_shuffles(unsigned* out, int rounds) {
  unsigned x = threadIdx.x;
  for (int r = 0; r < rounds; ++r) x += __shfl_xor_sync(~0u, x, 1);
  out[threadIdx.x] = x;
}

__global__ void many_barriers(int rounds) {
  for (int r = 0; r < rounds; ++r) __syncthreads();
}

// Whether the launch succeeded. Prints its error otherwise.
template <class... P, class... A>
bool run(unsigned grid, unsigned block, void (*kernel)(P...), A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaGetLastError()) std::printf("lost error\n");
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error));
  return error == cudaSuccess;
}

template <class T>
void print(const std::vector<T>& values) {
  for (const T v : values) std::printf("%lld ", static_cast<long long>(v));
  std::printf("\n");
}

template <class F>
void time(const char* what, double switches, F launch) {
  const auto start = std::chrono::steady_clock::now();
  launch();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%s: %.1f ns\n", what, seconds.count() * 1e9 / switches);
}

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const int mutant = argc > 2 ? std::atoi(argv[2]) : 0;
  std::vector<int> out(1024, 0);
  std::vector<unsigned> bits(1024, 0);
  if (name == "sum") {
    for (int n = 1; n <= 1024; n += n < 70 ? 1 : 53) {
      std::vector<double> sums(2, 0.0);
      if (run(2, static_cast<unsigned>(n), sum<double>, sums.data(), mutant))
        std::printf("%d\n", sums[0] == n * (n + 1) / 2 && sums[1] == sums[0]);
    }
  } else if (name == "exchange") {
    if (run(1, 96, exchange, out.data(), 50, mutant)) {
      bool right = true;
      for (int t = 0; t < 96; ++t) right &= out[static_cast<size_t>(t)] == 1225 * ((t + 31) % 32);
      std::printf("%d\n", right);
    }
  } else if (name == "misuse") {
    if (run(1, 96, misuse, out.data(), mutant)) std::printf("no error\n");
  } else if (name == "allowed") {
    if (run(1, 40, allowed, bits.data())) print(std::vector(bits.begin(), bits.begin() + 40));
  } else if (name == "poison") {
    if (run(16, 64, poison, bits.data())) {
      bool poisoned = true;
      for (size_t i = 0; i < 1024; ++i) poisoned &= bits[i] == ~0u;
      std::printf("%d\n", poisoned);
    }
  } else if (name == "last_block") {
    if (run(37, 64, last_block, out.data() + 1, bits.data(), out.data()))
      std::printf("%d\n", out[0]);
  } else if (name == "misaligned") {
    alignas(16) char memory[64] = {};
    uint4 value;
    for (const int offset : {16, 8})
      if (run(1, 1, misaligned, memory + offset, &value)) std::printf("fine\n");
  } else if (name == "order") {
    for (int launch = 0; launch < 2; ++launch) {
      bits.assign(16, 0);
      unsigned next = 0;
      if (run(16, 1, order, bits.data(), &next)) print(bits);
    }
  } else if (name == "time") {
    for (const unsigned block : {32u, 256u, 1024u}) {
      std::printf("%u threads, a shuffle and switch of one lane", block);
      time("", 20000.0 * block, [&] { run(1, block, many_shuffles, bits.data(), 20000); });
      std::printf("%u threads, a barrier of one thread", block);
      time("", 2000.0 * block, [&] { run(1, block, many_barriers, 2000); });
      std::printf("%u threads, start and end of one", block);
      time("", 1000.0 * block, [&] { run(1000, block, many_barriers, 0); });
      time("a launch", 1000.0, [&] {
        for (int i = 0; i < 1000; ++i) run(1, 1, many_barriers, 0);
      });
    }
  } else {
    return 2;
  }
  return 0;
}
