// Vectors of ELF_LANES floats: loads from and stores to each dtype, reductions, and 2^x.

constexpr int kLanes = ELF_LANES;
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

ELF_INLINE vf splat(float x) { return vf{} + x; }

// a > b ? a : b per lane; b if one of them is NaN. The intrinsics are here because compilers turn
// the expression into a compare and a blend, which cost twice as much as the max instruction.
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

// binary16 -> binary32. Without an instruction for it: shift exponent and mantissa into place and
// multiply by 2^112, which is exact for subnormals, too. Then set the exponent of infinities and
// NaN.
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

// Rounds to nearest, ties to even. NaN stays NaN.
ELF_INLINE void store(BFloat16* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu is_nan = (vu)(v != v);
  const vh h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), vh);
  std::memcpy(p, &h, sizeof h);
}

// The first n < kLanes values, and zeros in the other lanes. Reads nothing past them. AVX-512 uses
// masked loads: with narrow stores and a wide load of the same bytes, store forwarding fails, and a
// row of ten classes takes 66 ns instead of 19.
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

// The lanes of load_tail(z, C) that hold the last C % kLanes values of a row.
ELF_INLINE vi tail_lanes(int64_t C) {
  const int rest = static_cast<int>(C % kLanes);
  return C >= kLanes ? lane_index() >= vi{} + (kLanes - rest) : lane_index() < vi{} + rest;
}

// A vector with the last C % kLanes values of a row. It starts at C - kLanes if the row is long
// enough, so it repeats values of the vector before and reads nothing past the end of the row.
template <class T>
ELF_INLINE vf load_tail(const T* z, int64_t C) {
  return C >= kLanes ? load(z + C - kLanes) : load_first(z, static_cast<int>(C));
}

// Combines all lanes, halving their number in each step: 16 -> 8 -> 4 -> 2 -> 1.
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

// Bit i is 1 if a and b are equal in lane i.
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

// 2^t = 2^n p(f), where t = n + f with n an integer and |f| <= 1/2. p has degree 5 and is the
// minimax polynomial of 2^f among those with p(0) = 1. Relative error: 9.2e-8, and 1.9e-7 with
// float32 rounding. Overflow gives infinity, and NaN gives NaN. -infinity gives about 0; exactly 0
// with AVX-512, because scalef(NaN, -infinity) is 0.
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
