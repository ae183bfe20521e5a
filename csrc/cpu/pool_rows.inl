// Means over positions, samples [begin, end) of a batch.

// Sum of P neighbouring values, P small enough for a vector to be mostly padding.
template <class T, class A>
ELF_INLINE A short_sum(const T* x, int64_t P) {
  A s = 0;
  for (int64_t p = 0; p < P; ++p) s += static_cast<A>(x[p]);
  return s;
}

// Channels first: x [N, D, P], D means of P neighbouring values each.
template <class T, class A = acc_t<T>>
void pool_channels_first(const T* x, int64_t begin, int64_t end, int64_t D, int64_t P, T* pooled) {
  const A share = A(1) / static_cast<A>(P);
  if (P < kLanes) {
    for (int64_t i = begin * D; i < end * D; ++i)
      pooled[i] = static_cast<T>(short_sum<T, A>(x + i * P, P) * share);
  } else {
    for (int64_t i = begin * D; i < end * D; ++i)
      pooled[i] = static_cast<T>(row_sum(x + i * P, P) * share);
  }
}

// The means of kVectors * kLanes channels of one sample, x [P, D] from the first of them.
template <int kVectors, class T>
ELF_INLINE void pool_columns(const T* x, int64_t P, int64_t D, float share, T* out) {
  vf s[kVectors] = {};
  for (int64_t p = 0; p < P; ++p)
    for (int u = 0; u < kVectors; ++u) s[u] += load(x + p * D + u * kLanes);
  for (int u = 0; u < kVectors; ++u) store(out + u * kLanes, s[u] * share);
}

// Channels last, or tokens: x [N, P, D], sums run down the positions, a few vectors of D at a time.
// The last D % kLanes channels come with the kLanes - 1 before them again, written twice alike.
template <class T>
void pool_channels_last(const T* x, int64_t begin, int64_t end, int64_t P, int64_t D, T* pooled) {
  const float share = 1.0f / static_cast<float>(P);
  for (int64_t n = begin; n < end; ++n) {
    const T* sample = x + n * P * D;
    T* out = pooled + n * D;
    if (D < kLanes) {
      float s[kLanes] = {};
      for (int64_t p = 0; p < P; ++p)
        for (int64_t d = 0; d < D; ++d) s[d] += static_cast<float>(sample[p * D + d]);
      for (int64_t d = 0; d < D; ++d) out[d] = static_cast<T>(s[d] * share);
      continue;
    }
    int64_t d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes) pool_columns<4>(sample + d, P, D, share, out + d);
    for (; d + kLanes <= D; d += kLanes) pool_columns<1>(sample + d, P, D, share, out + d);
    if (d < D) pool_columns<1>(sample + D - kLanes, P, D, share, out + D - kLanes);
  }
}

inline void pool_channels_last(const double* x, int64_t begin, int64_t end, int64_t P, int64_t D,
                               double* pooled) {
  for (int64_t n = begin; n < end; ++n)
    for (int64_t d = 0; d < D; ++d) {
      double s = 0;
      for (int64_t p = 0; p < P; ++p) s += x[(n * P + p) * D + d];
      pooled[n * D + d] = s / static_cast<double>(P);
    }
}
