// Softmax statistics of one row z [C]. The row is read from memory once; later passes find it in
// the first-level cache. Each function has a version for dtypes with float arithmetic, which is
// vectorised, and a scalar one for double, which gradient checks use.
//
// Exponentials have base 2: exp((z - m) / T) = 2^(a (z - m)) with a = log2(e) / T. The difference
// z - m is computed first, because it is exact near the maximum; a z - a m would contain the
// rounding error of a m. Only the gate may use the single instruction fma(a, z, -a m): it divides
// exponentials by a sum of exponentials, and the rounding error of a m is the same factor in both.

template <class T>
struct ExpSums {
  T sum;       // sum 2^t
  T weighted;  // sum t 2^t; only the entropy needs it
};

template <class T>
struct Top {
  T max, second;  // the two largest values
  // Bit i: the maximum is at a class c with c % (2 kLanes) = i. Does not cover the last C % kLanes
  // classes.
  uint64_t holders;
};

// Calls f(slot, c, keep, x...) for each vector of one or more rows. x are the rows' values from
// class c on, and `keep` the lanes that f must use. Slots 0 to kSlots - 1 alternate, so that f can
// keep kSlots independent accumulators, whose additions overlap. Slot kSlots gets the classes at
// the end of the row that do not fill a vector.
template <int kSlots, class F, class... Rows>
ELF_INLINE void sweep(int64_t C, F f, const Rows*... z) {
  constexpr int64_t kBlock = kSlots * kLanes;
  const vi all = ~vi{};
  int64_t c = 0;
  for (; c + kBlock <= C; c += kBlock) {
#pragma GCC unroll 4
    for (int u = 0; u < kSlots; ++u) f(u, c + u * kLanes, all, load(z + c + u * kLanes)...);
  }
#pragma GCC unroll 4
  for (int u = 0; u < kSlots - 1; ++u)
    if (c + (u + 1) * kLanes <= C) f(u, c + u * kLanes, all, load(z + c + u * kLanes)...);
  if (C % kLanes) f(kSlots, C - C % kLanes, tail_lanes(C), load_tail(z, C)...);
}

// Running maxima of a row, one per lane and slot of sweep<2>().
template <bool kSecond>
struct Maxima {
  vf max[3], second[3];
};

template <bool kSecond>
ELF_INLINE Maxima<kSecond> no_maxima() {
  Maxima<kSecond> m;
  for (int u = 0; u < 3; ++u) m.max[u] = m.second[u] = splat(-INFINITY);
  return m;
}

template <bool kSecond>
ELF_INLINE void take(Maxima<kSecond>& m, int u, vi keep, vf x) {
  const vf value = select(keep, x, splat(-INFINITY));
  if constexpr (kSecond) {
    const vf lesser = m.max[u] < value ? m.max[u] : value;
    m.second[u] = vmax(lesser, m.second[u]);
  }
  m.max[u] = vmax(value, m.max[u]);
}

ELF_INLINE vf vmax_of_slots(const vf* v) { return vmax(vmax(v[0], v[1]), v[2]); }

template <bool kSecond>
ELF_INLINE Top<float> top_of(const Maxima<kSecond>& m) {
  Top<float> top{horizontal_max(vmax_of_slots(m.max)), -INFINITY, 0};
  const vf max = splat(top.max);
  for (int u = 0; u < 2; ++u) top.holders |= equal_lanes(m.max[u], max) << u * kLanes;
  if constexpr (kSecond) {
    // If two lanes hold the maximum, it is the second value, too. Otherwise the second value is the
    // largest among that lane's second and the maxima of the other lanes.
    const uint64_t rest = equal_lanes(m.max[2], max);
    const bool twice = __builtin_popcountll(top.holders) + __builtin_popcountll(rest) > 1;
    vf others[3];
    for (int u = 0; u < 3; ++u) others[u] = select((vi)(m.max[u] == max), m.second[u], m.max[u]);
    top.second = twice ? top.max : horizontal_max(vmax_of_slots(others));
  }
  return top;
}

template <bool kSecond, class T>
ELF_INLINE Top<float> row_top(const T* z, int64_t C) {
  Maxima<kSecond> m = no_maxima<kSecond>();
  sweep<2>(C, [&](int u, int64_t, vi keep, vf x) ELF_LAMBDA { take(m, u, keep, x); }, z);
  return top_of(m);
}

template <bool kSecond>
inline Top<double> row_top(const double* z, int64_t C) {
  Top<double> top{-INFINITY, -INFINITY, 0};
  for (int64_t c = 0; c < C; ++c) {
    if (z[c] > top.max) {
      top.second = top.max;
      top.max = z[c];
    } else if (z[c] > top.second) {
      top.second = z[c];
    }
  }
  return top;
}

template <class T>
ELF_INLINE float row_sum(const T* z, int64_t C) {
  vf s[4] = {};
  sweep<4>(
      C, [&](int u, int64_t, vi keep, vf x) ELF_LAMBDA { s[u & 3] += select(keep, x, vf{}); }, z);
  return horizontal_sum((s[0] + s[1]) + (s[2] + s[3]));
}

inline double row_sum(const double* z, int64_t C) {
  double s = 0;
  for (int64_t c = 0; c < C; ++c) s += z[c];
  return s;
}

template <bool kWeighted>
ELF_INLINE void add_exp(vf t, vi keep, vf& sum, vf& weighted) {
  const vf e = select(keep, exp2_vector(t), vf{});
  sum += e;
  // For t = -infinity, e is 0. t is limited so that t * e is 0, too, instead of NaN.
  if constexpr (kWeighted) weighted += select(keep, vmax(t, splat(-1000.0f)), vf{}) * e;
}

template <bool kWeighted, class T>
ELF_INLINE ExpSums<float> exp_sums(const T* z, int64_t C, float a, float m) {
  vf s[4] = {}, w[4] = {};
  const auto add = [&](int u, int64_t, vi keep, vf x)
                       ELF_LAMBDA { add_exp<kWeighted>((x - m) * a, keep, s[u & 3], w[u & 3]); };
  sweep<4>(C, add, z);
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

// sum 2^(a (z - m)), m the row's maximum. Stops as soon as the sum exceeds `limit`, because all
// terms are positive. A result above the limit is a partial sum.
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

// a (x - m), as fma(a, x, -a m) where the processor has FMA. Without FMA that form would round a x
// as well, so the difference is used.
ELF_INLINE vf exponent(vf x, float a, float m) {
#if ELF_LANES >= 8
  return x * a - a * m;
#else
  return (x - m) * a;
#endif
}

// The lowest class whose value is m. C if there is none, which happens only in rows with NaN.
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
    // The first hit is the right one: values that the tail repeats were compared above without a
    // hit, and zeros that pad it come after the class that holds m.
    const uint64_t hits = equal_lanes(load_tail(z, C), value);
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
struct Swept {
  ExpSums<A> sums;     // relative to the row's maximum
  int64_t prediction;  // the lowest class that holds the maximum
  Top<A> next;         // of the next row
};

// The sums and the prediction of a row whose top is known and, in the same pass, the top of the
// next row. Therefore the end of a row (reduction over lanes, a division) overlaps with the
// exponentials of the next row. The class of the maximum is found without a branch: top.holders
// tells its place in a block of two vectors, so one class per block is compared. A search after the
// loop takes 10% of the time, because its branch is mispredicted in every row.
template <Criterion kCriterion, class T>
ELF_INLINE Swept<float> sums_and_next_top(const T* z, const T* next, int64_t C, float a,
                                          const Top<float>& top) {
  constexpr bool kWeighted = kCriterion == Criterion::entropy;
  constexpr bool kSecond = kCriterion == Criterion::margin;
  // Terms are added in groups of 16 per lane, then the groups' sums: in one long sum of thousands
  // of equal terms the rounding errors would all have the same sign.
  constexpr int64_t kPiece = 16 * 2 * kLanes;
  // Values are compared by their bits, which uses idle integer units. A maximum of 0 is excluded,
  // because -0 and 0 have different bits.
  const bool one_holder = __builtin_popcountll(top.holders) == 1 && top.max != 0;
  const int64_t lane = one_holder ? __builtin_ctzll(top.holders) : 0;
  const T max = static_cast<T>(top.max);
  int64_t unseen = 1, blocks = 0;  // 1 until the maximum was found; whole blocks before it
  vf s[2] = {}, w[2] = {}, sum{}, weighted{};
  Maxima<kSecond> m = no_maxima<kSecond>();
  const auto visit = [&](int u, int64_t c, vi keep, vf x, vf ahead) ELF_LAMBDA {
    if (u == 0 && c % kPiece == 0) {
      sum += s[0] + s[1];
      weighted += w[0] + w[1];
      s[0] = s[1] = w[0] = w[1] = vf{};
    }
    if (u == 0 && c + 2 * kLanes <= C) {
      unseen &= std::memcmp(z + c + lane, &max, sizeof max) != 0;
      blocks += unseen;
    }
    take(m, u, keep, ahead);
    add_exp<kWeighted>(exponent(x, a, top.max), keep, s[u & 1], w[u & 1]);
  };
  sweep<2>(C, visit, z, next);
  return {{horizontal_sum(sum + (s[0] + s[1])), horizontal_sum(weighted + (w[0] + w[1]))},
          one_holder ? blocks * 2 * kLanes + lane : first_equal(z, C, top.max),
          top_of(m)};
}

template <Criterion kCriterion>
inline Swept<double> sums_and_next_top(const double* z, const double* next, int64_t C, double a,
                                       const Top<double>& top) {
  return {exp_sums<kCriterion == Criterion::entropy>(z, C, a, top.max), first_equal(z, C, top.max),
          row_top<kCriterion == Criterion::margin>(next, C)};
}

template <class A>
struct GatedRow {
  A statistic;
  int64_t prediction;
};

// Statistic and prediction of rows with NaN or infinite logits, and of rows with |a max| >= 2^16.
// NaN: the statistic is NaN, the prediction the first NaN. Infinite maximum: the classes that hold
// it share the probability equally, which is softmax's limit. Otherwise a logit of -infinity is a
// class of probability 0.
template <Criterion kCriterion, class A, class T>
GatedRow<A> careful_gate(const T* z, int64_t C, A a) {
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
  constexpr bool kEntropy = kCriterion == Criterion::entropy;
  const ExpSums<A> sums = exp_sums<kEntropy>(finite, C, A(1), A(0));
  if constexpr (kEntropy) {
    return {entropy_of(sums.sum, sums.weighted, C), prediction};
  } else if constexpr (kCriterion == Criterion::margin) {
    return {(1 - std::exp2(row_top<true>(finite, C).second)) / sums.sum, prediction};
  } else {
    static_assert(kCriterion == Criterion::confidence, "a criterion without a formula");
    return {1 / sums.sum, prediction};
  }
}

// 2^(a (z - max)) with the same rounding as in sums_and_next_top(), so that the errors cancel in
// the ratio.
ELF_INLINE float power_of_two(float a, float z, float max) {
  return exp2_vector(exponent(splat(z), a, max))[0];
}

inline double power_of_two(double a, double z, double max) { return std::exp2(a * (z - max)); }

// power_of_two(a, max, max). It is 2^t with t the rounding error of a * max, at most 2^-8, so three
// Taylor terms suffice.
ELF_INLINE float peak_power(float a, float max) {
  const float t = kLn2<float> * exponent(splat(max), a, max)[0];
  return 1 + t * (1 + t / 2);
}

inline double peak_power(double, double) { return 1; }

// Statistic and prediction of row z.
template <Criterion kCriterion, class A, class T>
ELF_INLINE GatedRow<A> gate_row(const T* z, int64_t C, A a, const Top<A>& top,
                                const Swept<A>& row) {
  // For larger maxima the rounding error of a max could make every term of the sum underflow.
  if (std::abs(a * top.max) < A(1 << 16)) {
    A statistic;
    if constexpr (kCriterion == Criterion::entropy) {
      statistic = entropy_of(row.sums.sum, row.sums.weighted, C);
    } else {
      static_assert(kCriterion == Criterion::confidence || kCriterion == Criterion::margin,
                    "a criterion without a formula");
      A peak = peak_power(a, top.max);
      if constexpr (kCriterion == Criterion::margin) peak -= power_of_two(a, top.second, top.max);
      statistic = peak / row.sums.sum;
    }
    if (!std::isnan(statistic)) return {statistic, row.prediction};
  }
  return careful_gate<kCriterion, A>(z, C, a);
}

// Like gate_row for the criterion `confidence`, but stops as soon as the row cannot reach the
// threshold. Then its statistic is NaN, which passes no test.
template <class A, class T>
ELF_INLINE GatedRow<A> gate_row_until(const T* z, int64_t C, A a, const A* threshold,
                                      int64_t threshold_stride) {
  const A m = row_top<false>(z, C).max;
  const int64_t prediction = first_equal(z, C, m);
  if (prediction < C && std::isfinite(m)) {
    const A t = threshold[prediction * threshold_stride];
    // The statistic is 1 / sum, so it cannot reach t once the sum exceeds 1 / t. The factor covers
    // the rounding error of the sum.
    const A limit = t > 0 ? (1 + A(1e-5)) / t : A(INFINITY);
    const A sum = exp_sum_until(z, C, a, m, limit);
    if (sum > limit) return {static_cast<A>(NAN), prediction};
    if (std::isfinite(sum)) return {1 / sum, prediction};
  }
  return careful_gate<Criterion::confidence, A>(z, C, a);
}
