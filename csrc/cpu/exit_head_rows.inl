// Samples [begin, end) of exit_head: means over positions, and small matrix products.

// Sum of P contiguous values, in scalar arithmetic. For small P a vector would be mostly padding.
template <class T, class A>
ELF_INLINE A short_sum(const T* x, int64_t P) {
  A s = 0;
  for (int64_t p = 0; p < P; ++p) s += static_cast<A>(x[p]);
  return s;
}

// Channels first: x [N, D, P]. Each mean is over P contiguous values.
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

// Means of kVectors * kLanes neighbouring channels of one sample [P, D]. x points to the first.
template <int kVectors, class T>
ELF_INLINE void pool_columns(const T* x, int64_t P, int64_t D, float share, T* out) {
  vf s[kVectors] = {};
  for (int64_t p = 0; p < P; ++p)
    for (int u = 0; u < kVectors; ++u) s[u] += load(x + p * D + u * kLanes);
  for (int u = 0; u < kVectors; ++u) store(out + u * kLanes, s[u] * share);
}

// Channels last, or tokens: x [N, P, D]. Sums over positions, for one or four vectors of channels
// at a time. The last vector of a row may overlap the one before; both write the same values.
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

// out[r, k] = x[r] . w[k] + b[k] for samples x [kRows, D] and classes w [kClasses, D]. The row
// stride of `out` is C. Sums are float32.
template <int kRows, int kClasses, class T>
ELF_INLINE void product_tile(const T* x, const T* w, const T* b, int64_t D, int64_t C, T* out) {
  vf s[kRows][kClasses] = {};
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    vf values[kRows];
    for (int r = 0; r < kRows; ++r) values[r] = load(x + r * D + d);
    for (int k = 0; k < kClasses; ++k) {
      const vf weights = load(w + k * D + d);
      for (int r = 0; r < kRows; ++r) s[r][k] += values[r] * weights;
    }
  }
  if (d < D) {
    // Both factors are masked. The tail repeats values, and 0 times a repeated infinite weight
    // would be NaN.
    const auto last = [&](const T* row)
                          ELF_LAMBDA { return select(tail_lanes(D), load_tail(row, D), vf{}); };
    for (int k = 0; k < kClasses; ++k)
      for (int r = 0; r < kRows; ++r) s[r][k] += last(x + r * D) * last(w + k * D);
  }
  for (int k = 0; k < kClasses; ++k)
    for (int r = 0; r < kRows; ++r)
      out[r * C + k] =
          static_cast<T>(horizontal_sum(s[r][k]) + (b ? static_cast<float>(b[k]) : 0.0f));
}

// All classes of kRows samples.
template <int kRows, class T>
ELF_INLINE void product_rows(const T* x, const T* w, const T* b, int64_t D, int64_t C, T* out) {
  constexpr int kClasses = kLanes == 16 ? 4 : 2;  // the most whose sums fit in registers
  int64_t c = 0;
  for (; c + kClasses <= C; c += kClasses)
    product_tile<kRows, kClasses>(x, w + c * D, b ? b + c : b, D, C, out + c);
  for (; c < C; ++c) product_tile<kRows, 1>(x, w + c * D, b ? b + c : b, D, C, out + c);
}

// logits [N, C] = x [N, D] w [C, D]^T + b [C]. b may be null.
template <class T>
void linear_rows(const T* x, int64_t begin, int64_t end, int64_t D, const T* w, const T* b,
                 int64_t C, T* logits) {
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) product_rows<4>(x + n * D, w, b, D, C, logits + n * C);
  for (; n < end; ++n) product_rows<1>(x + n * D, w, b, D, C, logits + n * C);
}
