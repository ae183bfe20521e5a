// exit_gate: softmax statistic, argmax, exit test and survivor indices of logits [N, C].
//
//   p = softmax(z / T);  statistic = max p | max p - second largest p | entropy(p) / log C
//
// One launch. Each row is read once, by 4 lanes if it is short, by a warp, or by a block if rows
// are long and there are too few of them for all warps. If there are still fewer rows, each is
// split into pieces, one per block. The last block to finish merges the pieces and turns the flags
// of the rows into survivors. A block's arrival (one atomic) costs about as much as reading one
// row, so the grid just fills the device and each block handles many rows.
//
// Early stop is not used. It needs the row's maximum, which is known only after the whole row has
// been read, and reading is what limits this kernel.
//
// Bytes: L (the bytes of the logits) read, 17 per row written (confidence, prediction, flag; 21 for
// float64), and 9 per row for the scan (flag read, survivor written).
// Deterministic: states are merged in a fixed order. The only atomic counts arrivals.
#include "device.h"
#include "survivors.cuh"

#include <atomic>
#include <map>
#include <mutex>

namespace elf_fast {
namespace {

// Minimum number of blocks per multiprocessor. It limits a thread to 64 registers, or 128 for
// float64.
template <class A>
constexpr int kResident = std::is_same_v<A, double> ? 2 : 4;

template <class A>
struct GateArguments {
  int64_t N;
  int C;
  int64_t stride;  // from one row of logits to the next
  Setting<A> threshold, temperature;
  const int64_t* target;  // [N] or null
  A* confidence;          // [N]
  int64_t* prediction;    // [N]
  unsigned char* flags;   // [N], see survivors.cuh
  RowState<A>* pieces;    // [N, gridDim.y] if rows are split
  int64_t* survivors;     // [N]
  int64_t* count;         // []
  unsigned slot;          // index into kArrived
};

// Numbers of blocks that have arrived, one counter for each grid that may be running. All are zero
// when the library is loaded, and each grid leaves its counter at zero.
constexpr unsigned kSlots = 1u << 18;
constexpr unsigned kStreamSlots = 1u << 12;
__device__ unsigned kArrived[kSlots];

template <Criterion kCriterion, class A>
__device__ A statistic(const RowState<A>& r, int C, A a) {
  if constexpr (kCriterion == Criterion::confidence) return A(1) / r.s;
  if (C == 1) return kCriterion == Criterion::margin ? A(1) : A(0);
  if constexpr (kCriterion == Criterion::margin) return (A(1) - power_of_2(a * (r.u - r.m))) / r.s;
  static_assert(kCriterion <= Criterion::entropy, "a criterion without a formula");
  const A bits = log2(r.s) - r.u / r.s;
  return bits > A(0) ? bits / log2(static_cast<A>(C)) : A(0);
}

// The statistic if the maximum is infinite: the classes that have it share the probability equally.
template <Criterion kCriterion, class A>
__device__ A statistic_of_ties(int ties, int C) {
  if constexpr (kCriterion == Criterion::confidence) return A(1) / static_cast<A>(ties);
  if (C == 1) return kCriterion == Criterion::margin ? A(1) : A(0);
  if constexpr (kCriterion == Criterion::margin) return ties > 1 ? A(0) : A(1);
  static_assert(kCriterion <= Criterion::entropy, "a criterion without a formula");
  return log2(static_cast<A>(ties)) / log2(static_cast<A>(C));
}

// Values for all rows. They are loaded before the first row, so that the two latencies overlap.
template <class A>
struct Settings {
  A a;          // log2(e) / T
  A threshold;  // of class 0

  __device__ explicit Settings(const GateArguments<A>& g)
      : a(kLog2e<A> / g.temperature[0]), threshold(g.threshold[0]) {}
};

// Writes statistic, prediction and flag of row n from its state. All of the row's kLanes lanes must
// call this.
template <Criterion kCriterion, int kLanes, class T, class A>
__device__ void finish_row(const GateArguments<A>& g, const Settings<A>& settings, const T* row,
                           int64_t n, RowState<A> r, int lane, unsigned mask) {
  const A a = settings.a;
  A value;
  if (r.s > A(0) && r.s < static_cast<A>(INFINITY) && r.index != kNowhere) {
    value = statistic<kCriterion>(r, g.C, a);
  } else {
    const Careful<A> found = careful<kLanes, A>(row, g.C, lane, mask);
    r.index = found.index;
    if (found.m != found.m)
      value = static_cast<A>(NAN);
    else if (found.m - found.m != A(0))  // infinite
      value = statistic_of_ties<kCriterion, A>(found.ties, g.C);
    else
      value = statistic<kCriterion>(r, g.C, a);
  }
  if (lane != 0) return;
  const A t = g.threshold.stride == 0 ? settings.threshold : g.threshold[r.index];
  bool leaves = passes<kCriterion>(value, t);
  unsigned char flag = 0;
  if (g.target != nullptr) {
    const int64_t y = g.target[n];
    leaves = leaves && y == r.index;
    if (y < 0 || y >= g.C) flag = kBadTarget;
  }
  g.confidence[n] = value;
  g.prediction[n] = r.index;
  g.flags[n] = leaves ? flag : flag | kGoesOn;
}

// kLanes lanes per row. Each group of lanes handles rows n, n + rows, n + 2 rows, ...
template <Criterion kCriterion, int kLanes, class T, class A>
__global__ void __launch_bounds__(kBlock, kResident<A>)
    gate_by_lanes(const T* logits, GateArguments<A> g) {
  const int lane = threadIdx.x % kLanes;
  const unsigned group = kLanes == 32 ? kWholeWarp : (1u << kLanes % 32) - 1;
  const unsigned mask = group << (threadIdx.x % 32 - lane);
  const Settings<A> settings(g);
  const int64_t rows = int64_t{gridDim.x} * (kBlock / kLanes);  // at a time
  int64_t n = int64_t{blockIdx.x} * (kBlock / kLanes) + threadIdx.x / kLanes;
  for (; n < g.N; n += rows) {
    const T* row = logits + n * g.stride;
    RowState<A> r = state_of<kCriterion, 4, kLanes>(row, 0, g.C, lane, settings.a);
    r = over_lanes<kCriterion, kLanes>(r, mask, settings.a);
    finish_row<kCriterion, kLanes>(g, settings, row, n, r, lane, mask);
  }
  if (is_last_block(&kArrived[g.slot]))
    scan_flags(g.flags, static_cast<unsigned>(g.N), g.survivors, g.count);
}

// One block per row or, with gridDim.y > 1, per piece of a row.
template <Criterion kCriterion, class T, class A>
__global__ void __launch_bounds__(kBlock, kResident<A>)
    gate_by_blocks(const T* logits, GateArguments<A> g) {
  __shared__ RowState<A> of_warp[kBlockWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.x;
  const T* row = logits + n * g.stride;
  const Settings<A> settings(g);
  const A a = settings.a;
  // Pieces are multiples of 64 classes, so they are whole 16-byte words if the rows are aligned.
  const int words = (g.C + 63) / 64;
  const int begin = static_cast<int>(int64_t{words} * blockIdx.y / gridDim.y) * 64;
  const int end = static_cast<int>(int64_t{words} * (blockIdx.y + 1) / gridDim.y) * 64;
  RowState<A> r =
      state_of<kCriterion, 4, kBlock>(row, begin, end < g.C ? end : g.C, threadIdx.x, a);
  r = over_lanes<kCriterion, 32>(r, kWholeWarp, a);
  if (lane == 0) of_warp[warp] = r;
  __syncthreads();
  if (warp == 0) {
    r = over_lanes<kCriterion, kBlockWarps>(of_warp[lane % kBlockWarps], kWholeWarp, a);
    if (gridDim.y == 1)
      finish_row<kCriterion, 32>(g, settings, row, n, r, lane, kWholeWarp);
    else if (lane == 0)
      g.pieces[n * gridDim.y + blockIdx.y] = r;
  }
  if (!is_last_block(&kArrived[g.slot])) return;
  if (gridDim.y > 1) {
    for (int64_t i = warp; i < g.N; i += kBlockWarps) {
      RowState<A> whole = no_state<kCriterion, A>();
      for (unsigned piece = lane; piece < gridDim.y; piece += 32)
        whole = merge<kCriterion>(whole, g.pieces[i * gridDim.y + piece], a);
      whole = over_lanes<kCriterion, 32>(whole, kWholeWarp, a);
      finish_row<kCriterion, 32>(g, settings, logits + i * g.stride, i, whole, lane, kWholeWarp);
    }
    __syncthreads();
  }
  scan_flags(g.flags, static_cast<unsigned>(g.N), g.survivors, g.count);
}

// The index of a counter that no other running grid uses. Grids on one stream run one after another
// and share a counter. A grid that is captured in a graph may later run at the same time as any
// other, so it gets a counter of its own, which is never reused.
unsigned arrival_slot(const OnDeviceOf& device) {
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, unsigned> of_stream;
  static std::map<int, unsigned> captured;
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(device.stream(), &status));
  const std::lock_guard<std::mutex> lock(mutex);
  if (status == cudaStreamCaptureStatusNone) {
    const auto key = std::make_pair(device.index(), device.stream());
    const auto found = of_stream.find(key);
    if (found != of_stream.end()) return found->second;
    if (of_stream.size() < kStreamSlots)
      return of_stream[key] = static_cast<unsigned>(of_stream.size());
  }
  const unsigned slot = kStreamSlots + captured[device.index()]++;
  STD_TORCH_CHECK(slot < kSlots, "exit_gate: more than ", kSlots - kStreamSlots,
                  " calls captured in CUDA graphs on one device");
  return slot;
}

template <Criterion kCriterion, class T, class A>
void launch_gate(const OnDeviceOf& device, const T* logits, GateArguments<A> g, unsigned pieces) {
  const int64_t fill = int64_t{kResident<A>} * device.multiprocessors();
  const auto blocks = [&](int lanes) {
    const int64_t needed = (g.N * lanes + kBlock - 1) / kBlock;
    return dim3(static_cast<unsigned>(needed < fill ? needed : fill));
  };
  // A warp has 2 KB of loads in flight, so half as many rows as warps are enough for one warp per
  // row to read as fast as one block per row.
  const bool many = g.N >= fill * kBlockWarps / 2;
  if (g.C <= 32)
    device.launch(blocks(4), kBlock, gate_by_lanes<kCriterion, 4, T, A>, logits, g);
  else if (g.C <= 512 || many)
    device.launch(blocks(32), kBlock, gate_by_lanes<kCriterion, 32, T, A>, logits, g);
  else
    device.launch(dim3(static_cast<unsigned>(g.N), pieces), kBlock,
                  gate_by_blocks<kCriterion, T, A>, logits, g);
}

// Blocks per row: enough to fill the device, but each with at least kLeast classes.
unsigned pieces_of_row(const OnDeviceOf& device, int64_t N, int64_t C) {
  constexpr int64_t kLeast = 2048;  // classes in a piece
  const int64_t fill = 2 * device.multiprocessors() / N;
  const int64_t most = C / kLeast;
  const int64_t pieces = fill < most ? fill : most;
  return pieces > 1 ? static_cast<unsigned>(pieces) : 1;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> exit_gate(const Tensor& logits, const Tensor& threshold,
                                                     const Tensor& temperature, int64_t criterion,
                                                     std::optional<Tensor> target,
                                                     bool /*early_stop*/) {
  const OnDeviceOf device(logits);
  const Tensor rows = dense_rows(logits);
  const int64_t N = rows.size(0), C = rows.size(1);
  STD_TORCH_CHECK(C < kNowhere && N <= 0x7fffffff, "logits: expected fewer than 2^31 rows and ",
                  "classes, got [", N, ", ", C, "]");
  const Criterion kind = checked_criterion(criterion);
  const ScalarType acc = acc_type(rows.scalar_type());
  if (target.has_value()) {
    check_vector(*target, "target", N, ScalarType::Long);
    check_same_device(*target, "target", rows);
  }
  const Tensor confidence = empty_vector(N, acc, rows);
  const Tensor prediction = empty_vector(N, ScalarType::Long, rows);
  Tensor survivors = empty_vector(N, ScalarType::Long, rows);
  Tensor count = empty_scalar(ScalarType::Long, rows);
  if (N == 0) return {confidence, prediction, survivors, torch::stable::zero_(count)};
  for_floating(rows.scalar_type(), "exit_gate", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const unsigned pieces = pieces_of_row(device, N, C);
    const int64_t piece_bytes = pieces > 1 ? N * pieces * sizeof(RowState<A>) : 0;
    const Tensor room = empty_vector(piece_bytes + N, ScalarType::Byte, rows);
    GateArguments<A> g;
    g.N = N;
    g.C = static_cast<int>(C);
    g.stride = rows.stride(0);
    g.threshold = setting<A>(threshold, "threshold", C, acc, rows);
    g.temperature = setting<A>(temperature, "temperature", 1, acc, rows);
    g.target = target.has_value() ? data<const int64_t>(*target) : nullptr;
    g.confidence = data<A>(confidence);
    g.prediction = data<int64_t>(prediction);
    g.pieces = data<RowState<A>>(room);
    g.flags = data<unsigned char>(room) + piece_bytes;
    g.survivors = data<int64_t>(survivors);
    g.count = data<int64_t>(count);
    g.slot = arrival_slot(device);
    const T* z = data<const T>(rows);
    for_criterion(kind, [&](auto k) { launch_gate<k()>(device, z, g, pieces); });
  });
  return {confidence, prediction, survivors, count};
}

}  // namespace
}  // namespace elf_fast

STABLE_TORCH_LIBRARY_IMPL(elf_fast, CUDA, m) {
  m.impl("exit_gate", TORCH_BOX(&elf_fast::exit_gate));
}
