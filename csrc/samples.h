// Batches [N, ...] whose samples are each one block of memory; compaction copies such samples.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "tensor.h"

namespace elf_fast {

struct Samples {
  int64_t count, bytes, pitch;         // bytes of one sample; bytes from one sample to the next
  std::vector<int64_t> sizes;          // [N, ...]
  std::vector<int64_t> dense_strides;  // of a batch whose samples have no gaps between them
};

// Whether the dimensions 1.. of t, in some order, fill one block of memory without gaps.
inline bool sample_is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> stride_size;
  for (int64_t d = 1; d < t.dim(); ++d)
    if (t.size(d) != 1) stride_size.emplace_back(t.stride(d), t.size(d));
  std::sort(stride_size.begin(), stride_size.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : stride_size) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline Samples samples_of(const Tensor& t) {
  Samples s;
  s.count = t.size(0);
  int64_t elements = 1;
  for (int64_t d = 0; d < t.dim(); ++d) {
    s.sizes.push_back(t.size(d));
    s.dense_strides.push_back(t.stride(d));
    if (d > 0) elements *= t.size(d);
  }
  s.dense_strides[0] = std::max<int64_t>(elements, 1);
  s.bytes = elements * static_cast<int64_t>(t.element_size());
  s.pitch = t.stride(0) * static_cast<int64_t>(t.element_size());
  return s;
}

inline Tensor with_dense_samples(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1, "features: expected [N, ...], got a scalar");
  return sample_is_dense(t) ? t : torch::stable::contiguous(t);
}

// A batch of `count` samples laid out like those of t, without gaps between them.
inline Tensor empty_batch(const Samples& like, int64_t count, const Tensor& t) {
  std::vector<int64_t> sizes = like.sizes;
  sizes[0] = count;
  return empty_strided(sizes.data(), like.dense_strides.data(), static_cast<int64_t>(sizes.size()),
                       t.scalar_type(), t);
}

inline Samples checked_samples(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() >= 1 && sample_is_dense(features),
                  "features: expected [N, ...] with every sample dense in memory");
  return samples_of(features);
}

// Checks that `out` has room for n samples in the layout of the features.
inline void check_room(const Tensor& out, const Samples& to, const Tensor& features,
                       const Samples& from, int64_t n) {
  STD_TORCH_CHECK(out.scalar_type() == features.scalar_type() && out.dim() == features.dim() &&
                      std::equal(to.sizes.begin() + 1, to.sizes.end(), from.sizes.begin() + 1) &&
                      std::equal(to.dense_strides.begin() + 1, to.dense_strides.end(),
                                 from.dense_strides.begin() + 1) &&
                      to.count >= n,
                  "out: expected at least ", n,
                  " samples of the features' shape, dtype and memory format");
}

inline void check_apart(const Samples& batch, const char* name) {
  STD_TORCH_CHECK(batch.count <= 1 || batch.pitch >= batch.bytes, name,
                  ": expected samples that do not share memory");
}

inline void check_survivors(const Tensor& survivors, const std::optional<Tensor>& count) {
  STD_TORCH_CHECK(survivors.dim() == 1, "survivors: expected [n]");
  check_vector(survivors, "survivors", survivors.size(0), ScalarType::Long);
  STD_TORCH_CHECK(
      !count.has_value() || (count->scalar_type() == ScalarType::Long && count->numel() == 1),
      "count: expected one int64");
}

}  // namespace elf_fast
