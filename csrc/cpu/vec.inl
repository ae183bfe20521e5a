// Vectors of ELF_LANES floats, their loads and stores from each dtype, and 2^x.

constexpr int kLanes = ELF_LANES;
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

ELF_INLINE vf splat(float x) { return vf{} + x; }

// a > b ? a : b in every lane, b where one is NaN. Compilers make a compare and a blend of that
// expression, at twice the price of the instruction that does the same.
ELF_INLINE vf vmax(vf a, vf b) {
#if ELF_LANES == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif ELF_LANES == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

ELF_INLINE vf select(vi keep, vf a, vf b) { return (vf)(((vi)a & keep) | ((vi)b & ~keep)); }

ELF_INLINE vi lane_index() {
  vi index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

ELF_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

ELF_INLINE vf load(const BFloat16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

// binary16 -> binary32, where there is no instruction for it: move the exponent and mantissa up,
// scale by 2^112 (exact, subnormals included), put the exponent of infinities and NaN back.
ELF_INLINE vf load(const Half* p) {
#if ELF_LANES == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif ELF_LANES == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu bits = __builtin_convertvector(h, vu);
  const vu magnitude = (bits & 0x7fff) << 13;
  const vu finite = (vu)((vf)magnitude * 0x1p112f);
  const vu special = (vu)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (vf)(finite | special | ((bits & 0x8000) << 16));
#endif
}

ELF_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

template <class T>
ELF_INLINE void store(T* p, vf v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<T>(v[i]);
}

// Round to nearest, ties to even; NaN stays NaN.
ELF_INLINE void store(BFloat16* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu is_nan = (vu)(v != v);
  const vh h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), vh);
  std::memcpy(p, &h, sizeof h);
}

// The first `n` < kLanes values, with zeros in the other lanes; reads nothing past them. A mask
// spares waiting for narrow stores that a wide load takes back: a row of ten classes takes 19 ns
// instead of 66.
template <class T>
ELF_INLINE vf load_first(const T* p, int n) {
  T values[kLanes] = {};
#if ELF_LANES == 16
  const __mmask16 lanes = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) return (vf)_mm512_maskz_loadu_ps(lanes, p);
  const __m256i halves = _mm256_maskz_loadu_epi16(lanes, p);
  std::memcpy(values, &halves, sizeof halves);
#else
  for (int i = 0; i < n; ++i) values[i] = p[i];
#endif
  return load(values);
}

// The last C % kLanes values of a row, in the lanes tail_lanes(C). A row of at least kLanes values
// is read again from C - kLanes, so nothing past its end is touched.
ELF_INLINE vi tail_lanes(int64_t C) {
  const int rest = static_cast<int>(C % kLanes);
  return C >= kLanes ? lane_index() >= vi{} + (kLanes - rest) : lane_index() < vi{} + rest;
}

template <class T>
ELF_INLINE vf load_tail(const T* z, int64_t C) {
  return C >= kLanes ? load(z + C - kLanes) : load_first(z, static_cast<int>(C));
}

// Folds the lanes by halves: 16 -> 8 -> 4 -> 2 -> 1.
template <class Combine>
ELF_INLINE float fold(vf v, Combine combine) {
#if ELF_LANES == 16
  typedef float v8 __attribute__((vector_size(32)));
  v8 halves[2];
  std::memcpy(halves, &v, sizeof v);
  const v8 eight = combine(halves[0], halves[1]);
#elif ELF_LANES == 8
  const vf eight = v;
#endif
#if ELF_LANES == 4
  const vf four = v;
#else
  typedef float v4 __attribute__((vector_size(16)));
  v4 quarters[2];
  std::memcpy(quarters, &eight, sizeof eight);
  const v4 four = combine(quarters[0], quarters[1]);
#endif
  return combine(combine(four[0], four[1]), combine(four[2], four[3]));
}

ELF_INLINE float horizontal_sum(vf v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}

ELF_INLINE float horizontal_max(vf v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// One bit a lane, the lowest for lane 0: where a and b are equal.
ELF_INLINE uint64_t equal_lanes(vf a, vf b) {
#if ELF_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
#elif ELF_LANES == 8
  return static_cast<uint64_t>(_mm256_movemask_ps((__m256)(a == b)));
#else
  const vi equal = (vi)(a == b);
  uint64_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint64_t>(equal[i] & 1) << i;
  return bits;
#endif
}

// 2^t: t = n + f with |f| <= 1/2, times a polynomial of degree 5 in f, the minimax one among those
// with 2^0 = 1 (relative error 9.2e-8, 1.9e-7 with float32 rounding). Overflow gives infinity, NaN
// gives NaN, -infinity about 0 (exactly 0 with AVX-512: scalef(NaN, -infinity) is 0).
ELF_INLINE vf exp2_vector(vf t) {
#if ELF_LANES == 16
  const vf n = (vf)_mm512_roundscale_ps((__m512)t, 0x08);
  const vf f = t - n;
#else
  const vf rounder = splat(0x1.8p23f);
  const vf least = splat(-126.0f), most = splat(128.0f);
  t = least > t ? least : t;
  t = t > most ? most : t;
  const vf shifted = t + rounder;
  const vf f = t - (shifted - rounder);
#endif
  vf p = splat(0x1.5bba14p-10f);
  p = p * f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  p = p * f + 1.0f;
#if ELF_LANES == 16
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (vf)(((vi)shifted + 127) << 23);
#endif
}
