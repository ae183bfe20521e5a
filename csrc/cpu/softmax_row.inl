// Softmax statistics of one row z [C], from one read of it out of memory: later passes find the
// row in the first-level cache. Each function comes for the vectorised dtypes (float arithmetic)
// and for double (scalar, for gradient checks).
//
// Exponentials are taken to base 2: with a = log2(e) / T, exp((z - m) / T) = 2^(a (z - m)). The
// difference first: it is exact near the maximum, where a z - a m would carry the rounding of a m.
// Only one_pass() may take the single instruction fma(a, z, -shift) with shift = a origin: its
// ratio of exponentials has the same rounded shift above and below.

template <class T>
struct ExpSums {
  T sum;       // sum 2^t
  T weighted;  // sum t 2^t, for the entropy
};

template <class T>
struct OnePass {
  T max, second;  // the two largest values
  T origin;       // the value that the exponents are taken against
  T sum;          // sum 2^(a (z - origin))
};

// Calls f(slot, x, keep) on the row's vectors; slot in 0..3 names one of four accumulators, so that
// the chain of additions is short and the partial sums are many.
template <class T, class F>
ELF_INLINE void sweep(const T* z, int64_t C, F f) {
  const vi all = ~vi{};
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes) {
    f(0, load(z + c), all);
    f(1, load(z + c + kLanes), all);
    f(2, load(z + c + 2 * kLanes), all);
    f(3, load(z + c + 3 * kLanes), all);
  }
  for (; c + kLanes <= C; c += kLanes) f(0, load(z + c), all);
  if (c < C) {
    const Tail tail = load_tail(z, C);
    f(0, tail.x, tail.keep);
  }
}

template <class T>
ELF_INLINE float row_max(const T* z, int64_t C) {
  const vf lowest = splat(-INFINITY);
  vf m[4] = {lowest, lowest, lowest, lowest};
  sweep(z, C, [&](int u, vf x, vi keep) ELF_LAMBDA { m[u] = vmax(select(keep, x, lowest), m[u]); });
  return horizontal_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
}

inline double row_max(const double* z, int64_t C) {
  double m = -INFINITY;
  for (int64_t c = 0; c < C; ++c) m = z[c] > m ? z[c] : m;
  return m;
}

template <class T>
ELF_INLINE float row_sum(const T* z, int64_t C) {
  vf s[4] = {};
  sweep(z, C, [&](int u, vf x, vi keep) ELF_LAMBDA { s[u] += select(keep, x, vf{}); });
  return horizontal_sum((s[0] + s[1]) + (s[2] + s[3]));
}

inline double row_sum(const double* z, int64_t C) {
  double s = 0;
  for (int64_t c = 0; c < C; ++c) s += z[c];
  return s;
}

template <bool kWeighted, class T>
ELF_INLINE ExpSums<float> exp_sums(const T* z, int64_t C, float a, float m) {
  vf s[4] = {}, w[4] = {};
  sweep(z, C, [&](int u, vf x, vi keep) ELF_LAMBDA {
    const vf t = (x - m) * a;
    const vf e = select(keep, exp2_vector(t), vf{});
    s[u] += e;
    // Where t is -infinity, e is 0 and so must their product be.
    if constexpr (kWeighted) w[u] += select(keep, vmax(t, splat(-1000.0f)), vf{}) * e;
  });
  return {horizontal_sum((s[0] + s[1]) + (s[2] + s[3])),
          horizontal_sum((w[0] + w[1]) + (w[2] + w[3]))};
}

template <bool kWeighted>
inline ExpSums<double> exp_sums(const double* z, int64_t C, double a, double m) {
  ExpSums<double> sums{0, 0};
  for (int64_t c = 0; c < C; ++c) {
    const double t = a * (z[c] - m), e = std::exp2(t);
    sums.sum += e;
    if (e > 0) sums.weighted += t * e;
  }
  return sums;
}

// sum 2^(a (z - m)), given up as soon as it passes `limit`: m is the row's maximum, so the sum only
// grows. What comes back above the limit is some partial sum.
template <class T>
ELF_INLINE float exp_sum_until(const T* z, int64_t C, float a, float m, float limit) {
  constexpr int64_t kBlock = 8 * kLanes;
  float sum = 0;
  for (int64_t c = 0; c < C && !(sum > limit); c += kBlock)
    sum += exp_sums<false>(z + c, C - c < kBlock ? C - c : kBlock, a, m).sum;
  return sum;
}

inline double exp_sum_until(const double* z, int64_t C, double a, double m, double limit) {
  double sum = 0;
  for (int64_t c = 0; c < C && !(sum > limit); ++c) sum += std::exp2(a * (z[c] - m));
  return sum;
}

// a (x - origin), fused where the processor can: without it a x would be rounded on its own.
ELF_INLINE vf exponent(vf x, float a, float origin, float shift) {
#if ELF_LANES >= 8
  return x * a - shift;
#else
  return (x - origin) * a;
#endif
}

// Maxima and sum in a single pass. Floating point is scale free, so any value near the top serves
// as origin: the largest of the first vector. Where it is too far below the maximum the sum
// overflows and the caller takes the careful path.
template <bool kSecond, class T>
ELF_INLINE OnePass<float> one_pass(const T* z, int64_t C, float a) {
  const vf lowest = splat(-INFINITY);
  float origin;
  if (C >= kLanes) {
    origin = horizontal_max(load(z));
  } else {
    const Tail tail = load_tail(z, C);
    origin = horizontal_max(select(tail.keep, tail.x, lowest));
  }
  const float shift = a * origin;
  vf m[4] = {lowest, lowest, lowest, lowest}, second[4] = {lowest, lowest, lowest, lowest};
  vf s[4] = {};
  sweep(z, C, [&](int u, vf x, vi keep) ELF_LAMBDA {
    const vf top = select(keep, x, lowest);
    if constexpr (kSecond) {
      const vf lesser = m[u] < top ? m[u] : top;
      second[u] = vmax(lesser, second[u]);
    }
    m[u] = vmax(top, m[u]);
    s[u] += select(keep, exp2_vector(exponent(x, a, origin, shift)), vf{});
  });
  OnePass<float> row;
  row.max = horizontal_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
  row.second = -INFINITY;
  if constexpr (kSecond) {
    // The maximum again if two lanes hold it; else the best of that lane's second and the others.
    vf rest[4], holders = {};
    for (int u = 0; u < 4; ++u) {
      const vi holds = (vi)(m[u] == row.max);
      rest[u] = select(holds, second[u], m[u]);
      holders += select(holds, splat(1.0f), vf{});
    }
    row.second = horizontal_sum(holders) > 1.0f
                     ? row.max
                     : horizontal_max(vmax(vmax(rest[0], rest[1]), vmax(rest[2], rest[3])));
  }
  row.origin = origin;
  row.sum = horizontal_sum((s[0] + s[1]) + (s[2] + s[3]));
  return row;
}

template <bool kSecond>
inline OnePass<double> one_pass(const double* z, int64_t C, double a) {
  OnePass<double> row{-INFINITY, -INFINITY, 0, 0};
  for (int64_t c = 0; c < C; ++c) {
    if (z[c] > row.max) {
      row.second = row.max;
      row.max = z[c];
    } else if (z[c] > row.second) {
      row.second = z[c];
    }
  }
  row.origin = row.max;
  row.sum = exp_sums<false>(z, C, a, row.max).sum;
  return row;
}

// The lowest class whose value is m (C when there is none, which only a NaN makes possible).
template <class T>
ELF_INLINE int64_t first_equal(const T* z, int64_t C, float m) {
  const vf value = splat(m);
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes) {
    uint64_t hits = 0;
    for (int u = 0; u < 4; ++u) hits |= equal_lanes(load(z + c + u * kLanes), value) << u * kLanes;
    if (hits) return c + __builtin_ctzll(hits);
  }
  for (; c + kLanes <= C; c += kLanes) {
    const uint64_t hits = equal_lanes(load(z + c), value);
    if (hits) return c + __builtin_ctzll(hits);
  }
  if (c < C) {
    // No false hits: what the tail repeats had none, and zeros that pad it lie past the maximum.
    const uint64_t hits = equal_lanes(load_tail(z, C).x, value);
    if (hits) return (C >= kLanes ? C - kLanes : 0) + __builtin_ctzll(hits);
  }
  return C;
}

inline int64_t first_equal(const double* z, int64_t C, double m) {
  int64_t c = 0;
  while (c < C && !(z[c] == m)) ++c;
  return c;
}

template <class A>
struct GatedRow {
  A statistic;
  int64_t prediction;
};

// Rows with NaN or infinite logits, and rows whose values span more than one_pass() can take.
// NaN anywhere: the statistic is NaN. An infinite maximum: softmax's limit, all mass spread evenly
// over the maxima. Otherwise -infinity stands for a class of probability 0.
template <class A, class T>
GatedRow<A> careful_gate(const T* z, int64_t C, A a, Criterion criterion) {
  A* finite = scratch_row<A>(C);
  A m = -INFINITY;
  for (int64_t c = 0; c < C; ++c) {
    finite[c] = static_cast<A>(z[c]);
    if (std::isnan(finite[c])) return {static_cast<A>(NAN), c};
    m = finite[c] > m ? finite[c] : m;
  }
  const int64_t prediction = first_equal(finite, C, m);
  const bool flat = std::isinf(m);
  for (int64_t c = 0; c < C; ++c) {
    const A drop = flat ? (finite[c] == m ? 0 : -INFINITY) : a * (finite[c] - m);
    finite[c] = drop < A(-1000) ? A(-1000) : drop;
  }
  if (criterion == Criterion::entropy) {
    const ExpSums<A> sums = exp_sums<true>(finite, C, A(1), A(0));
    return {entropy_of(sums.sum, sums.weighted, C), prediction};
  }
  const OnePass<A> row = one_pass<true>(finite, C, A(1));
  const A total = exp_sums<false>(finite, C, A(1), A(0)).sum;
  const A second = C > 1 && criterion == Criterion::margin ? std::exp2(row.second) : A(0);
  return {(1 - second) / total, prediction};
}

// 2^(a (z - origin)) as one_pass() computes it: the errors of the two then cancel.
ELF_INLINE float power_of_two(float a, float z, float origin) {
  return exp2_vector(exponent(splat(z), a, origin, a * origin))[0];
}

inline double power_of_two(double a, double z, double origin) {
  return std::exp2(a * (z - origin));
}

// Statistic and prediction of a row under a criterion (design: the gate's section).
template <Criterion kCriterion, class A, class T>
ELF_INLINE GatedRow<A> gate_row(const T* z, int64_t C, A a) {
  if constexpr (kCriterion == Criterion::entropy) {
    const A m = row_max(z, C);
    const ExpSums<A> sums = exp_sums<true>(z, C, a, m);
    if (std::isfinite(sums.sum) && std::isfinite(m))
      return {entropy_of(sums.sum, sums.weighted, C), first_equal(z, C, m)};
  } else {
    constexpr bool kSecond = kCriterion == Criterion::margin;
    const OnePass<A> row = one_pass<kSecond>(z, C, a);
    // Beyond 2^16 the rounding of a origin alone could overflow or empty the sum.
    if (std::isfinite(row.sum) && std::isfinite(row.max) && std::abs(a * row.origin) < A(1 << 16)) {
      A top = power_of_two(a, row.max, row.origin);
      if constexpr (kSecond)
        if (C > 1) top -= power_of_two(a, row.second, row.origin);
      const A statistic = top / row.sum;
      if (std::isfinite(statistic)) return {statistic, first_equal(z, C, row.max)};
    }
  }
  return careful_gate<A>(z, C, a, kCriterion);
}

// As gate_row for the criterion `confidence`, but a row that cannot reach `threshold` is given up
// early; its statistic comes back as NaN, which passes no test.
template <class A, class T>
ELF_INLINE GatedRow<A> gate_row_until(const T* z, int64_t C, A a, const A* threshold,
                                      int64_t threshold_stride) {
  const A m = row_max(z, C);
  const int64_t prediction = first_equal(z, C, m);
  if (prediction < C && std::isfinite(m)) {
    const A t = threshold[prediction * threshold_stride];
    // Past 1/t by more than the rounding of the sum: the full sum could not come back under it.
    const A limit = t > 0 ? (1 + A(1e-5)) / t : A(INFINITY);
    const A sum = exp_sum_until(z, C, a, m, limit);
    if (sum > limit) return {static_cast<A>(NAN), prediction};
    if (std::isfinite(sum)) return {1 / sum, prediction};
  }
  return careful_gate<A>(z, C, a, Criterion::confidence);
}
