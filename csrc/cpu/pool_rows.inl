// Means over positions, samples [begin, end) of a batch.

// Channels first: x [N, D, P], D means of P neighbouring values each.
template <class T, class A = acc_t<T>>
void pool_channels_first(const T* x, int64_t begin, int64_t end, int64_t D, int64_t P, T* pooled) {
  for (int64_t i = begin * D; i < end * D; ++i)
    pooled[i] = static_cast<T>(row_sum(x + i * P, P) / static_cast<A>(P));
}

// Channels last, or tokens: x [N, P, D], sums run down the positions, a few vectors of D at a time.
template <class T>
void pool_channels_last(const T* x, int64_t begin, int64_t end, int64_t P, int64_t D, T* pooled) {
  const float share = 1.0f / static_cast<float>(P);
  for (int64_t n = begin; n < end; ++n) {
    const T* sample = x + n * P * D;
    T* out = pooled + n * D;
    int64_t d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes) {
      vf s[4] = {};
      for (int64_t p = 0; p < P; ++p)
        for (int u = 0; u < 4; ++u) s[u] += load(sample + p * D + d + u * kLanes);
      for (int u = 0; u < 4; ++u) store(out + d + u * kLanes, s[u] * share);
    }
    for (; d < D; ++d) {
      float s = 0;
      for (int64_t p = 0; p < P; ++p) s += static_cast<float>(sample[p * D + d]);
      out[d] = static_cast<T>(s * share);
    }
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
