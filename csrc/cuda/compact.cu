// compact: dense batches of the surviving samples of features [N, ...], and the gradient.
//
//   compact           out[k] = features[survivors[k]]: 2 s F bytes
//   compact_into      the same into a given batch, for the first `count` survivors; count is in
//                     device memory
//   compact_          features[j] = old features[order[j]] for j < count. Survivors with indices
//                     >= count move into the free rows below count: about 2 s (1 - s) F bytes
//   compact_backward  grad_in[survivors[k]] = grad[k], 0 elsewhere: (1 + s) F bytes
//
// Here n is the number of survivors, s = n / N and F the bytes of the features. A sample is one
// block of memory in either memory format. A warp copies 2 KB of a row at a time: 16 bytes per
// load, four loads per lane in flight (128 KB per multiprocessor). The grid fills the device, and
// its warps loop over all pieces.
//
// compact_ and compact_backward need a row's rank among the survivors. A warp finds it by a search
// with 32 probes per round: 2 rounds for 1024 survivors, 3 for 32768. This needs no inverse index
// map. In compact_ most rows may stay where they are, and the search is then the only work. So a
// warp searches once for up to 16 KB of a row.
//
// Deterministic: every byte is written by one lane. In compact_, rows are read from index `count`
// on and written below it. A survivor outside [0, N) stops the kernel with an assertion.
#include <torch/headeronly/macros/Macros.h>

#include "../samples.h"
#include "device.h"

namespace elf_fast {
namespace {

constexpr int kBlock = 256;
constexpr int kLoads = 4;            // loads in flight per lane, one word each
constexpr int kPiece = 32 * kLoads;  // words that a warp copies at a time
constexpr unsigned kWholeWarp = 0xffffffffu;

enum class Kind { gather, fill_holes, scatter };

// Blocks per multiprocessor; the number of registers limits them.
template <Kind kKind>
constexpr int kResident = kKind == Kind::fill_holes ? 6 : 8;

struct Move {
  const char* from;
  char* to;
  int64_t from_pitch, to_pitch;  // bytes from one sample to the next
  int64_t words;                 // in a sample
  int64_t stretch;               // words that a warp copies per visit, a multiple of kPiece
  unsigned stretches;            // visits per row
  const int64_t* survivors;      // [n], ascending
  int64_t n;
  const int64_t* count;  // number of valid survivors; null: n
  int64_t N;             // survivors are below N
  int64_t* order;        // [n], fill_holes only
};

// How many of survivors [n] are below `row`. All lanes of the warp must call this with the same
// arguments.
__device__ int rank(const int64_t* survivors, int n, int64_t row) {
  const int lane = threadIdx.x % 32;
  int low = 0;  // the answer lies in [low, low + n]
  while (n > 0) {
    const int step = (n + 31) / 32;
    const int begin = lane * step, end = begin + step < n ? begin + step : n;  // this lane's share
    const bool below = begin < n && survivors[low + end - 1] < row;
    const int shares = __popc(__ballot_sync(kWholeWarp, below));
    if (shares * step >= n) return low + n;
    low += shares * step;
    n = (step < n - shares * step ? step : n - shares * step) - 1;
  }
  return low;
}

// The source row of row k of the result. -1: there is none (scatter writes 0), or row k stays as it
// is (fill_holes).
template <Kind kKind>
__device__ int64_t source_of(const Move& m, int number, int64_t k, bool first) {
  if constexpr (kKind == Kind::gather) {
    const int64_t row = m.survivors[k];
    CUDA_KERNEL_ASSERT_MSG(row >= 0 && row < m.N, "survivors: expected indices in [0, N)");
    return row;
  } else if constexpr (kKind == Kind::scatter) {
    const int at = rank(m.survivors, number, k);
    return at < number && m.survivors[at] == k ? at : -1;
  } else {
    int64_t row = m.N;
    if (k < number) {
      const int below = rank(m.survivors, number, k);
      row = k;
      if (m.survivors[below] != k) {
        // Row k is the (k - below)-th free row. It takes the survivor of that rank among those with
        // indices >= number.
        const int64_t at = rank(m.survivors, number, number) + k - below;
        row = m.survivors[at < number ? at : number - 1];
        CUDA_KERNEL_ASSERT_MSG(row >= number && row < m.N,
                               "survivors: expected ascending indices in [0, N)");
      }
    }
    if (first && threadIdx.x % 32 == 0) m.order[k] = row;
    return k < number && row != k ? row : -1;
  }
}

template <Kind kKind, class W>
__global__ void __launch_bounds__(kBlock) move_rows(Move m) {
  const int lane = threadIdx.x % 32;
  int64_t number = m.n;
  if (m.count != nullptr && *m.count < number) number = *m.count > 0 ? *m.count : 0;
  const int64_t rows = kKind == Kind::gather ? number : kKind == Kind::scatter ? m.N : m.n;
  const unsigned visits = static_cast<unsigned>(rows) * m.stretches;
  const unsigned warps = gridDim.x * (kBlock / 32);
  for (unsigned visit = blockIdx.x * (kBlock / 32) + threadIdx.x / 32; visit < visits;
       visit += warps) {
    const unsigned k = visit / m.stretches, which = visit - k * m.stretches;
    const int64_t row = source_of<kKind>(m, static_cast<int>(number), k, which == 0);
    if (kKind == Kind::fill_holes && row < 0) continue;
    const W* from = reinterpret_cast<const W*>(m.from + row * m.from_pitch);
    W* to = reinterpret_cast<W*>(m.to + int64_t{k} * m.to_pitch);
    int64_t at = int64_t{which} * m.stretch + lane;
    const int64_t end = at - lane + m.stretch < m.words ? at - lane + m.stretch : m.words;
    do {
      W held[kLoads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (row >= 0 && at + 32 * i < end) held[i] = from[at + 32 * i];
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (at + 32 * i < end) to[at + 32 * i] = held[i];
      at += kPiece;
    } while (kKind == Kind::fill_holes && at < end);
  }
}

template <Kind kKind, class W>
void launch_words(const OnDeviceOf& device, Move m, int64_t bytes, int64_t rows) {
  m.words = bytes / static_cast<int64_t>(sizeof(W));
  // A row without bytes is visited, too, because its entry of `order` must be written.
  const int64_t pieces = m.words > 0 ? (m.words + kPiece - 1) / kPiece : 1;
  STD_TORCH_CHECK(rows * pieces < (int64_t{1} << 31), "features: expected fewer than 2^31 pieces ",
                  "of ", kPiece * sizeof(W), " bytes, got ", rows * pieces);
  const int64_t fill = int64_t{kResident<kKind>} * device.multiprocessors();
  int64_t each = 1;  // pieces per visit: as many as still give every warp a visit
  if (kKind == Kind::fill_holes)
    each = std::clamp<int64_t>(rows * pieces / (fill * (kBlock / 32)), 1, 8);
  m.stretch = each * kPiece;
  m.stretches = static_cast<unsigned>((pieces + each - 1) / each);
  const int64_t needed = (rows * m.stretches + kBlock / 32 - 1) / (kBlock / 32);
  device.launch(dim3(static_cast<unsigned>(needed < fill ? needed : fill)), kBlock,
                move_rows<kKind, W>, m);
}

// Copies in the widest words that divide the sample size, the pitches and the addresses.
template <Kind kKind>
void launch_move(const OnDeviceOf& device, const Move& m, int64_t bytes, int64_t rows) {
  if (rows == 0 || (bytes == 0 && kKind != Kind::fill_holes)) return;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(m.from) | reinterpret_cast<uintptr_t>(m.to) |
                         static_cast<uintptr_t>(bytes | m.from_pitch | m.to_pitch);
  if (bits % 16 == 0) return launch_words<kKind, uint4>(device, m, bytes, rows);
  if (bits % 8 == 0) return launch_words<kKind, uint2>(device, m, bytes, rows);
  if (bits % 4 == 0) return launch_words<kKind, uint32_t>(device, m, bytes, rows);
  if (bits % 2 == 0) return launch_words<kKind, uint16_t>(device, m, bytes, rows);
  return launch_words<kKind, uint8_t>(device, m, bytes, rows);
}

// Checks survivors and count and sets them in a Move. The caller sets the rest.
Move move_of(const Tensor& survivors, const std::optional<Tensor>& count, const Tensor& features) {
  check_survivors(survivors, count);
  check_same_device(survivors, "survivors", features);
  if (count.has_value()) check_same_device(*count, "count", features);
  Move m{};
  m.survivors = data<const int64_t>(survivors);
  m.n = survivors.size(0);
  m.count = count.has_value() ? data<const int64_t>(*count) : nullptr;
  return m;
}

void gather(const OnDeviceOf& device, const Tensor& source, const Samples& from,
            const Tensor& survivors, const std::optional<Tensor>& count, const Tensor& out,
            int64_t pitch) {
  Move m = move_of(survivors, count, source);
  m.from = data<const char>(source);
  m.from_pitch = from.pitch;
  m.to = data<char>(out);
  m.to_pitch = pitch;
  m.N = from.count;
  launch_move<Kind::gather>(device, m, from.bytes, m.n);
}

Tensor compact(const Tensor& features, const Tensor& survivors) {
  const OnDeviceOf device(features);
  const Tensor source = with_dense_samples(features);
  const Samples from = samples_of(source);
  STD_TORCH_CHECK(survivors.dim() == 1, "survivors: expected [n]");
  Tensor out = empty_batch(from, survivors.size(0), source);
  gather(device, source, from, survivors, std::nullopt, out, from.bytes);
  return out;
}

void compact_into(Tensor out, const Tensor& features, const Tensor& survivors,
                  std::optional<Tensor> count) {
  const OnDeviceOf device(features);
  const Samples from = checked_samples(features), to = samples_of(out);
  check_room(out, to, features, from, survivors.size(0));
  check_apart(to, "out");
  check_same_device(out, "out", features);
  gather(device, features, from, survivors, count, out, to.pitch);
}

Tensor compact_(Tensor features, const Tensor& survivors, std::optional<Tensor> count) {
  const OnDeviceOf device(features);
  const Samples batch = checked_samples(features);
  check_apart(batch, "features");
  Move m = move_of(survivors, count, features);
  Tensor order = empty_vector(m.n, ScalarType::Long, survivors);
  m.from = m.to = data<char>(features);
  m.from_pitch = m.to_pitch = batch.pitch;
  m.N = batch.count;
  m.order = data<int64_t>(order);
  launch_move<Kind::fill_holes>(device, m, batch.bytes, m.n);
  return order;
}

Tensor compact_backward(const Tensor& grad, const Tensor& survivors, int64_t N) {
  const OnDeviceOf device(grad);
  const Tensor source = with_dense_samples(grad);
  const Samples from = samples_of(source);
  Move m = move_of(survivors, std::nullopt, source);
  STD_TORCH_CHECK(from.count == m.n, "grad: expected ", m.n, " rows, got ", from.count);
  Tensor out = empty_batch(from, N, source);
  if (from.bytes == 0) return out;  // N may be anything then
  m.from = data<const char>(source);
  m.from_pitch = from.pitch;
  m.to = data<char>(out);
  m.to_pitch = from.bytes;
  m.N = N;
  launch_move<Kind::scatter>(device, m, from.bytes, N);
  return out;
}

}  // namespace
}  // namespace elf_fast

STABLE_TORCH_LIBRARY_IMPL(elf_fast, CUDA, m) {
  m.impl("compact", TORCH_BOX(&elf_fast::compact));
  m.impl("compact_into", TORCH_BOX(&elf_fast::compact_into));
  m.impl("compact_", TORCH_BOX(&elf_fast::compact_));
  m.impl("compact_backward", TORCH_BOX(&elf_fast::compact_backward));
}
