// The softmax state of a row over some of its classes, and the merge of two states into one. So a
// row can be split over loop iterations, lanes, warps and blocks. Exponentials have base 2:
// exp((z - m) / T) = 2^(a (z - m)) with a = log2(e) / T.
//
// The loops have no special case for NaN and infinities. They make the sum NaN or 0, or leave no
// class; such a row is read again by `careful`.
#pragma once

#include "../criterion.h"
#include "../tensor.h"

namespace elf_fast {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kNowhere = 0x7fffffff;  // no class; larger than every class index

template <class A>
struct RowState {
  A m;        // largest logit
  A s;        // sum e, with e = 2^(a (z - m))
  A u;        // margin: the second largest logit; entropy: sum a (z - m) e
  int index;  // class of the largest logit, the lowest of equals
};

// Initial maximum. It is finite, so that the first difference z - m is not infinity - infinity.
template <class A>
constexpr A kLowest = std::is_same_v<A, double> ? static_cast<A>(-1.7976931348623157e308)
                                                : static_cast<A>(-3.4028234663852886e38);

template <Criterion kCriterion, class A>
__device__ __forceinline__ RowState<A> no_state() {
  return {kLowest<A>, A(0), kCriterion == Criterion::margin ? kLowest<A> : A(0), kNowhere};
}

__device__ __forceinline__ float power_of_2(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }
__device__ __forceinline__ float largest(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double largest(double x, double y) { return fmax(x, y); }
__device__ __forceinline__ float smallest(float x, float y) { return fminf(x, y); }
__device__ __forceinline__ double smallest(double x, double y) { return fmin(x, y); }

// Makes the sums of a state relative to the maximum m >= r.m.
template <Criterion kCriterion, class A>
__device__ __forceinline__ void rebase(RowState<A>& r, A m, A a) {
  const A shift = a * (r.m - m);
  const A scale = power_of_2(shift);
  if constexpr (kCriterion == Criterion::entropy)
    r.u = scale > A(0) ? scale * (r.u + shift * r.s) : A(0);
  r.s *= scale;
  r.m = m;
}

// Adds the logits z of kCount neighbouring classes to a state. `first` is the first class.
template <Criterion kCriterion, int kCount, class A>
__device__ __forceinline__ void take(RowState<A>& r, const A (&z)[kCount], int first, A a) {
  A top = z[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) top = largest(top, z[k]);
  if constexpr (kCriterion == Criterion::margin) {
    A best = r.m;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      r.u = largest(r.u, smallest(best, z[k]));
      best = largest(best, z[k]);
    }
  }
  if (top > r.m) {  // rare after the first few classes
    rebase<kCriterion>(r, top, a);
#pragma unroll
    for (int k = kCount - 1; k >= 0; --k)
      if (z[k] == top) r.index = first + k;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const A t = a * (z[k] - r.m);
    const A e = power_of_2(t);
    r.s += e;
    // For t = -infinity, e is 0. t is limited so that t * e is 0, too, instead of NaN.
    if constexpr (kCriterion == Criterion::entropy) r.u += largest(t, A(-2000)) * e;
  }
}

// The state over the classes of x and y. merge(x, y) and merge(y, x) have the same bits, so any
// fixed tree of merges is deterministic.
template <Criterion kCriterion, class A>
__device__ __forceinline__ RowState<A> merge(RowState<A> x, RowState<A> y, A a) {
  const A m = largest(x.m, y.m);
  const int index = x.m > y.m   ? x.index
                    : y.m > x.m ? y.index
                                : (x.index < y.index ? x.index : y.index);
  const A lower = smallest(x.m, y.m);
  rebase<kCriterion>(x, m, a);
  rebase<kCriterion>(y, m, a);
  RowState<A> r{m, x.s + y.s, x.u, index};
  if constexpr (kCriterion == Criterion::margin) r.u = largest(largest(x.u, y.u), lower);
  if constexpr (kCriterion == Criterion::entropy) r.u = x.u + y.u;
  return r;
}

// The state of the lane whose index differs in the bits of `lanes`.
template <Criterion kCriterion, class A>
__device__ __forceinline__ RowState<A> shuffled(const RowState<A>& r, unsigned mask, int lanes) {
  RowState<A> other = r;
  other.m = __shfl_xor_sync(mask, r.m, lanes);
  other.s = __shfl_xor_sync(mask, r.s, lanes);
  if constexpr (kCriterion != Criterion::confidence) other.u = __shfl_xor_sync(mask, r.u, lanes);
  other.index = __shfl_xor_sync(mask, r.index, lanes);
  return other;
}

// Merges the states of kLanes neighbouring lanes. Every one of them gets the result.
template <Criterion kCriterion, int kLanes, class A>
__device__ __forceinline__ RowState<A> over_lanes(RowState<A> r, unsigned mask, A a) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
    r = merge<kCriterion>(r, shuffled<kCriterion>(r, mask, lanes), a);
  return r;
}

// The state over the share of `lane`, one of kLanes threads, in the classes [begin, end) of a row.
// A load takes 16 bytes, and kLoads of them are in flight before the first is used. The few classes
// before and after the 16-byte words are loaded one by one, at the same time.
template <Criterion kCriterion, int kLoads, int kLanes, class T, class A>
__device__ __forceinline__ RowState<A> state_of(const T* row, int begin, int end, int lane, A a) {
  constexpr int kWidth = 16 / sizeof(T);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row + begin) % 16 / sizeof(T));
  int head = past == 0 ? 0 : kWidth - past;
  if (head > end - begin) head = end - begin;
  const int vectors = (end - begin - head) / kWidth;
  const int outside = end - begin - vectors * kWidth;
  constexpr int kOutside = (2 * (kWidth - 1) + kLanes - 1) / kLanes;
  T odd[kOutside];
#pragma unroll
  for (int k = 0; k < kOutside; ++k) {
    const int i = lane + k * kLanes;
    if (i < outside) odd[k] = row[begin + i + (i < head ? 0 : vectors * kWidth)];
  }
  RowState<A> r = no_state<kCriterion, A>();
  const uint4* wide = reinterpret_cast<const uint4*>(row + begin + head);
  for (int v = lane; v < vectors; v += kLoads * kLanes) {
    uint4 loaded[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (v + k * kLanes < vectors) loaded[k] = __ldg(wide + v + k * kLanes);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (v + k * kLanes >= vectors) break;
      T narrow[kWidth];
      memcpy(narrow, &loaded[k], 16);
      A z[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) z[i] = static_cast<A>(narrow[i]);
      take<kCriterion>(r, z, begin + head + (v + k * kLanes) * kWidth, a);
    }
  }
#pragma unroll
  for (int k = 0; k < kOutside; ++k) {
    const int i = lane + k * kLanes;
    if (i >= outside) break;
    RowState<A> one = no_state<kCriterion, A>();
    const A z[1] = {static_cast<A>(odd[k])};
    take<kCriterion>(one, z, begin + i + (i < head ? 0 : vectors * kWidth), a);
    r = merge<kCriterion>(r, one, a);  // takes the lower class of equal maxima
  }
  return r;
}

// The maximum of a row with infinities or NaN.
template <class A>
struct Careful {
  A m;        // largest logit; NaN if a logit is NaN
  int index;  // its class, the lowest of equals (of NaN, the first)
  int ties;   // number of classes with this logit
};

// All of the kLanes lanes of `mask` must call this. They share one row and get the same result.
template <int kLanes, class A, class T>
__device__ Careful<A> careful(const T* row, int C, int lane, unsigned mask) {
  A m = -INFINITY;
  int nan = kNowhere, index = kNowhere, ties = 0;
  for (int c = lane; c < C; c += kLanes) {
    const A z = static_cast<A>(row[c]);
    if (z != z) {
      nan = c < nan ? c : nan;
    } else if (z > m || index == kNowhere) {
      m = z, index = c, ties = 1;
    } else if (z == m) {
      ++ties;
    }
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    const A other_m = __shfl_xor_sync(mask, m, lanes);
    const int other_index = __shfl_xor_sync(mask, index, lanes);
    const int other_ties = __shfl_xor_sync(mask, ties, lanes);
    const int other_nan = __shfl_xor_sync(mask, nan, lanes);
    nan = other_nan < nan ? other_nan : nan;
    if (index == kNowhere || (other_index != kNowhere && other_m > m)) {
      m = other_m, index = other_index, ties = other_ties;
    } else if (other_index != kNowhere && other_m == m) {
      index = other_index < index ? other_index : index;
      ties += other_ties;
    }
  }
  if (nan != kNowhere) return {static_cast<A>(NAN), nan, 0};
  return {m, index, ties};
}

}  // namespace elf_fast
