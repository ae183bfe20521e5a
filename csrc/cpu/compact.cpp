// compact: dense batches of the surviving samples of features [N, ...], and the gradient.
//
//   compact           out[k] = features[survivors[k]]: 2 s F bytes
//   compact_into      the same into a given batch, for the first `count` survivors
//   compact_          features[j] = old features[order[j]] for j < n. Survivors with indices >= n
//                     move into the free rows below n: about 2 s (1 - s) F bytes
//   compact_backward  grad_in[survivors[k]] = grad[k], 0 elsewhere: (1 + s) F bytes
//
// Here n is the number of survivors, s = n / N and F the bytes of the features. A sample is one
// block of memory in either memory format. It is copied as it is, so channels-last features are as
// fast as contiguous ones and keep their format. Each thread takes a range of rows or, if rows are
// long, of 64 KB pieces of rows. Deterministic: each byte is written by one thread.
#include <algorithm>

#include "../samples.h"
#include "threads.h"

namespace elf_fast {
namespace {

// The valid survivors: all, or the first `count` of them.
struct Survivors {
  const int64_t* rows;  // [n], ascending, below N
  int64_t n;
};

Survivors checked_survivors(const Tensor& survivors, const std::optional<Tensor>& count,
                            int64_t N) {
  check_survivors(survivors, count);
  const int64_t* rows = data<const int64_t>(survivors);
  int64_t n = survivors.size(0);
  if (count.has_value()) {
    n = *data<const int64_t>(*count);
    STD_TORCH_CHECK(n >= 0 && n <= survivors.size(0), "count: expected at most ", survivors.size(0),
                    " survivors, got ", n);
  }
  int64_t last = -1;
  for (int64_t k = 0; k < n; ++k) {
    STD_TORCH_CHECK(rows[k] > last && rows[k] < N,
                    "survivors: expected ascending indices below N = ", N, ", got ", rows[k],
                    " at position ", k);
    last = rows[k];
  }
  return {rows, n};
}

// Calls f(row, offset, length) for rows of `bytes` bytes, split into pieces of at most 64 KB, so
// that threads get equal shares even of a few long rows.
template <class F>
void over_pieces(int64_t rows, int64_t bytes, const F& f) {
  constexpr int64_t kPiece = 1 << 16;
  const int64_t pieces = (bytes + kPiece - 1) / kPiece;
  over_rows(rows * pieces, std::min(bytes, kPiece) / 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = i % pieces * kPiece;
      f(i / pieces, offset, static_cast<size_t>(std::min(bytes - offset, kPiece)));
    }
  });
}

void gather(const Tensor& source, const Samples& from, const Survivors& survivors, char* dst,
            int64_t dst_pitch) {
  const char* src = data<const char>(source);
  over_pieces(survivors.n, from.bytes, [&](int64_t k, int64_t offset, size_t length) {
    std::memcpy(dst + k * dst_pitch + offset, src + survivors.rows[k] * from.pitch + offset,
                length);
  });
}

Tensor compact(const Tensor& features, const Tensor& survivors) {
  const Tensor source = with_dense_samples(features);
  const Samples from = samples_of(source);
  const Survivors kept = checked_survivors(survivors, std::nullopt, from.count);
  Tensor out = empty_batch(from, kept.n, source);
  gather(source, from, kept, data<char>(out), from.bytes);
  return out;
}

void compact_into(Tensor out, const Tensor& features, const Tensor& survivors,
                  std::optional<Tensor> count) {
  const Samples from = checked_samples(features), to = samples_of(out);
  check_room(out, to, features, from, survivors.size(0));
  check_apart(to, "out");
  const Survivors kept = checked_survivors(survivors, count, from.count);
  gather(features, from, kept, data<char>(out), to.pitch);
}

Tensor compact_(Tensor features, const Tensor& survivors, std::optional<Tensor> count) {
  const Samples batch = checked_samples(features);
  check_apart(batch, "features");
  const Survivors kept = checked_survivors(survivors, count, batch.count);
  const int64_t* rows = kept.rows;
  const int64_t n = kept.n;
  Tensor order_tensor = empty_vector(survivors.size(0), ScalarType::Long, survivors);
  int64_t* order = data<int64_t>(order_tensor);
  std::fill(order + n, order + survivors.size(0), batch.count);
  // rows[0, staying) are below n and stay. rows[staying, n) move into the free rows, in order.
  const int64_t staying = std::lower_bound(rows, rows + n, n) - rows;
  std::vector<int64_t> holes;
  holes.reserve(static_cast<size_t>(n - staying));
  for (int64_t j = 0, k = 0; j < n; ++j) {
    if (k < staying && rows[k] == j) {
      order[j] = j;
      ++k;
    } else {
      order[j] = rows[staying + static_cast<int64_t>(holes.size())];
      holes.push_back(j);
    }
  }
  char* base = data<char>(features);
  const auto filled = static_cast<int64_t>(holes.size());
  over_pieces(filled, batch.bytes, [&](int64_t h, int64_t offset, size_t length) {
    std::memcpy(base + holes[h] * batch.pitch + offset,
                base + order[holes[h]] * batch.pitch + offset, length);
  });
  return order_tensor;
}

Tensor compact_backward(const Tensor& grad, const Tensor& survivors, int64_t N) {
  const Tensor source = with_dense_samples(grad);
  const Samples from = samples_of(source);
  const Survivors kept = checked_survivors(survivors, std::nullopt, N);
  const int64_t* rows = kept.rows;
  const int64_t n = kept.n;
  STD_TORCH_CHECK(from.count == n, "grad: expected ", n, " rows, got ", from.count);
  Tensor out = empty_batch(from, N, source);
  if (from.bytes == 0) return out;  // there is no memory to copy or clear, and N may be huge
  const char* src = data<const char>(source);
  char* dst = data<char>(out);
  over_rows(N, from.bytes / 4, [&](int64_t begin, int64_t end) {
    int64_t k = std::lower_bound(rows, rows + n, begin) - rows;
    for (int64_t row = begin; row < end; ++row) {
      char* to = dst + row * from.bytes;
      if (k < n && rows[k] == row)
        std::memcpy(to, src + k++ * from.pitch, static_cast<size_t>(from.bytes));
      else
        std::memset(to, 0, static_cast<size_t>(from.bytes));
    }
  });
  return out;
}

}  // namespace
}  // namespace elf_fast

STABLE_TORCH_LIBRARY_IMPL(elf_fast, CPU, m) {
  m.impl("compact", TORCH_BOX(&elf_fast::compact));
  m.impl("compact_into", TORCH_BOX(&elf_fast::compact_into));
  m.impl("compact_", TORCH_BOX(&elf_fast::compact_));
  m.impl("compact_backward", TORCH_BOX(&elf_fast::compact_backward));
}
