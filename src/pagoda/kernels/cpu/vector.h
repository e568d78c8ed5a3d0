// Sixteen float or int32 lanes (types F and I) on the vectors that the compiler was told the machine has:
// one AVX-512 register, two AVX ones, or four of SSE or NEON. Everything above this file is written once.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int PART = 16;
#elif defined(__AVX2__)
constexpr int PART = 8;
#else
constexpr int PART = 4;
#endif
constexpr int PARTS = 16 / PART;
#if defined(__aarch64__)
constexpr int MAX_ROWS = 4;  // activation rows that one register tile holds: 16 of 32 registers
#else
constexpr int MAX_ROWS = PART == 16 ? 8 : PART == 8 ? 4 : 2;
#endif
#if defined(__AVX512BF16__)
constexpr bool BF16_DOT = true;
#else
constexpr bool BF16_DOT = false;
#endif

typedef float fpart __attribute__((vector_size(PART * 4), aligned(PART * 4)));
typedef int32_t ipart __attribute__((vector_size(PART * 4), aligned(PART * 4)));
struct F { fpart p[PARTS]; };
struct I { ipart p[PARTS]; };

#define EACH for (int i = 0; i < PARTS; i++)
#define OPERATOR(T, op) static inline T operator op(T a, T b) { T r; EACH r.p[i] = a.p[i] op b.p[i]; return r; }
OPERATOR(F, +) OPERATOR(F, -) OPERATOR(F, *) OPERATOR(F, /)
OPERATOR(I, +) OPERATOR(I, -) OPERATOR(I, *) OPERATOR(I, &) OPERATOR(I, |)
#undef OPERATOR
static inline I shift_left(I a, int n) { I r; EACH r.p[i] = a.p[i] << n; return r; }
static inline I shift_right(I a, int n) {  // zeros come in from the left
  typedef uint32_t upart __attribute__((vector_size(PART * 4)));
  I r; EACH r.p[i] = (ipart)((upart)a.p[i] >> n); return r;
}
static inline F set1(float v) { F r; EACH r.p[i] = fpart{} + v; return r; }
static inline I iset1(int32_t v) { I r; EACH r.p[i] = ipart{} + v; return r; }
static inline F zero() { return set1(0.f); }
static inline F as_float(I a) { F r; EACH r.p[i] = (fpart)a.p[i]; return r; }
static inline I as_int(F a) { I r; EACH r.p[i] = (ipart)a.p[i]; return r; }
static inline F to_float(I a) { F r; EACH r.p[i] = __builtin_convertvector(a.p[i], fpart); return r; }
static inline F load(const float* p) { F r; memcpy(&r, p, 64); return r; }
static inline void store(float* p, F v) { memcpy(p, &v, 64); }
static inline I iload(const void* p) { I r; memcpy(&r, p, 64); return r; }
static inline F fma(F a, F b, F c) {  // a * b + c, rounded once where the machine can: never left to the compiler
  F r;
#if defined(__AVX512F__)
  EACH r.p[i] = (fpart)_mm512_fmadd_ps((__m512)a.p[i], (__m512)b.p[i], (__m512)c.p[i]);
#elif defined(__FMA__)
  EACH r.p[i] = (fpart)_mm256_fmadd_ps((__m256)a.p[i], (__m256)b.p[i], (__m256)c.p[i]);
#elif defined(__aarch64__)
  EACH r.p[i] = (fpart)vfmaq_f32((float32x4_t)c.p[i], (float32x4_t)a.p[i], (float32x4_t)b.p[i]);
#else
  EACH r.p[i] = a.p[i] * b.p[i] + c.p[i];
#endif
  return r;
}
static inline F max(F a, F b) { F r; EACH r.p[i] = a.p[i] > b.p[i] ? a.p[i] : b.p[i]; return r; }
static inline F min(F a, F b) { F r; EACH r.p[i] = a.p[i] < b.p[i] ? a.p[i] : b.p[i]; return r; }
static inline F abs(F a) { return as_float(as_int(a) & iset1(0x7fffffff)); }
static inline float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

alignas(64) static const int32_t LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
// x in the lanes from lo up to (not including) hi, `other` elsewhere
static inline F between(F x, int lo, int hi, float other) {
  I lane = iload(LANE); F r;
  EACH r.p[i] = (lane.p[i] >= lo) & (lane.p[i] < hi) ? x.p[i] : fpart{} + other;
  return r;
}
static inline F above(F x, F limit, F a) {  // a where x > limit, else 0
  F r; EACH r.p[i] = x.p[i] > limit.p[i] ? a.p[i] : fpart{}; return r;
}
#undef EACH

static inline float reduce_max(F a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)a.p[0]);
#else
  float v[16], r; store(v, a); r = v[0];
  for (int i = 1; i < 16; i++) r = v[i] > r ? v[i] : r;
  return r;
#endif
}
static inline float reduce_add(F a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)a.p[0]);
#else
  float v[16]; store(v, a);
  for (int n = 8; n; n /= 2) for (int i = 0; i < n; i++) v[i] += v[i + n];
  return v[0];
#endif
}
static inline int32_t reduce_add(I a) {
  int32_t v[16], r = 0; memcpy(v, &a, 64);
  for (int i = 0; i < 16; i++) r += v[i];
  return r;
}

// Round to the nearest integer, ties to even; |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
static inline I round_int(F x) { return as_int(x + set1(12582912.f)) - iset1(0x4b400000); }

// e^x with a relative error of 3e-7, for x up to 88; below -87 the result is that of -87 (1.6e-38).
static inline F exp(F x) {
  F t = max(x, set1(-87.f)) * set1(1.44269504f);
  F n = (t + set1(12582912.f)) - set1(12582912.f), f = t - n;
  F p = set1(1.54035304e-4f);
  p = fma(p, f, set1(1.33335581e-3f));
  p = fma(p, f, set1(9.61812911e-3f));
  p = fma(p, f, set1(5.55041087e-2f));
  p = fma(p, f, set1(2.40226507e-1f));
  p = fma(p, f, set1(6.93147181e-1f));
  p = fma(p, f, set1(1.f));
  return p * as_float(shift_left(round_int(t) + iset1(127), 23));
}
static inline F tanh(F x) {
  F e = exp(min(x + x, set1(60.f)));
  return set1(1.f) - set1(2.f) / (e + set1(1.f));
}
static inline F silu(F x) { return x / (set1(1.f) + exp(min(zero() - x, set1(80.f)))); }
static inline F gelu_tanh(F x) {
  F inner = set1(0.79788456f) * fma(set1(0.044715f) * x, x * x, x);
  return set1(0.5f) * x * (set1(1.f) + tanh(inner));
}

// ---- narrow floats. A pair of bf16 lies in one int32: the even element in the low half.
static inline F pair_even(I w) { return as_float(shift_left(w, 16)); }
static inline F pair_odd(I w) { return as_float(w & iset1((int32_t)0xffff0000)); }
static inline float bf16_float(uint16_t v) { return bits_float((uint32_t)v << 16); }
static inline uint16_t float_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u = float_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 64);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline float f16_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));  // the product rebases the exponent
}
static inline uint16_t float_f16(float f) {  // to nearest, ties to even; too large becomes infinity
  uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x47800000) return (uint16_t)(sign | 0x7c00);
  if (a < 0x38800000) return (uint16_t)(sign | (float_bits(bits_float(a) + 0.5f) - 0x3f000000));
  return (uint16_t)(sign | ((a + 0xfff + (a >> 13 & 1)) - 0x38000000) >> 13);
}
static inline F load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  return {{(fpart)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)}};
#else
  float v[16];
  for (int i = 0; i < 16; i++) v[i] = bf16_float(p[i]);
  return load(v);
#endif
}
static inline F load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return {{(fpart)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}};
#elif defined(__F16C__)
  return {{(fpart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
           (fpart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))}};
#elif defined(__aarch64__)
  F r;
  for (int i = 0; i < PARTS; i++) r.p[i] = (fpart)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return r;
#else
  float v[16];
  for (int i = 0; i < 16; i++) v[i] = f16_float(p[i]);
  return load(v);
#endif
}
static inline void store_bf16(uint16_t* p, F x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x.p[0]));
#else
  float v[16]; store(v, x);
  for (int i = 0; i < 16; i++) p[i] = float_bf16(v[i]);
#endif
}
static inline void store_i8(int8_t* p, I x) {  // lanes lie in -128..127
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x.p[0]));
#else
  int32_t v[16]; memcpy(v, &x, 64);
  for (int i = 0; i < 16; i++) p[i] = (int8_t)v[i];
#endif
}
static inline F load_i8(const int8_t* p) {
#if defined(__AVX512F__)
  return {{(fpart)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}};
#else
  float v[16];
  for (int i = 0; i < 16; i++) v[i] = p[i];
  return load(v);
#endif
}
static inline I load_u8(const uint8_t* p) {
#if defined(__AVX512F__)
  return {{(ipart)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}};
#else
  int32_t v[16];
  for (int i = 0; i < 16; i++) v[i] = p[i];
  return iload(v);
#endif
}

// ---- dot products: each lane holds a pair of bf16 or four bytes, the other factor is the same for all lanes
static inline I broadcast4(const void* p) { int32_t v; memcpy(&v, p, 4); return iset1(v); }
static inline F dot_bf16(F acc, I w, I a) {
#if defined(__AVX512BF16__)
  return {{(fpart)_mm512_dpbf16_ps((__m512)acc.p[0], (__m512bh)w.p[0], (__m512bh)a.p[0])}};
#else
  return fma(pair_odd(w), pair_odd(a), fma(pair_even(w), pair_even(a), acc));
#endif
}

#if defined(__AVX512VNNI__)
constexpr int BYTE_ZERO = 128;  // what a stored weight byte (q + 128) counts above q in dot_w8
#else
constexpr int BYTE_ZERO = 0;
#endif
// acc + w . a with w four unsigned bytes of at most 15 and a four signed bytes
static inline I dot_w4(I acc, I w, I a) {
#if defined(__AVX512VNNI__)
  return {{(ipart)_mm512_dpbusd_epi32((__m512i)acc.p[0], (__m512i)w.p[0], (__m512i)a.p[0])}};
#elif defined(__AVX2__)
  I r;
  for (int i = 0; i < PARTS; i++)
#if defined(__AVXVNNI__)
    r.p[i] = (ipart)_mm256_dpbusd_avx_epi32((__m256i)acc.p[i], (__m256i)w.p[i], (__m256i)a.p[i]);
#else
    r.p[i] = acc.p[i] + (ipart)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w.p[i], (__m256i)a.p[i]),
                                                 _mm256_set1_epi16(1));
#endif
  return r;
#elif defined(__ARM_FEATURE_DOTPROD)
  I r;
  for (int i = 0; i < PARTS; i++) r.p[i] = (ipart)vdotq_s32((int32x4_t)acc.p[i], (int8x16_t)w.p[i], (int8x16_t)a.p[i]);
  return r;
#else
  int8_t wb[64], ab[64]; int32_t v[16];
  memcpy(wb, &w, 64); memcpy(ab, &a, 64); memcpy(v, &acc, 64);
  for (int i = 0; i < 64; i++) v[i / 4] += (int32_t)wb[i] * ab[i];
  return iload(v);
#endif
}
// acc + (w - 128) . a with w four bytes, or, where BYTE_ZERO is 128, acc + w . a
static inline I dot_w8(I acc, I w, I a) {
#if defined(__AVX512VNNI__)
  return dot_w4(acc, w, a);
#elif defined(__AVX2__)
  I r;
  for (int i = 0; i < PARTS; i++) {  // |w| <= 128 and |a| <= 127: two products fit 16 bits
    __m256i s = _mm256_xor_si256((__m256i)w.p[i], _mm256_set1_epi8((char)0x80));
    __m256i d = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8((__m256i)a.p[i], s));
    r.p[i] = acc.p[i] + (ipart)_mm256_madd_epi16(d, _mm256_set1_epi16(1));
  }
  return r;
#else
  I flip; for (int i = 0; i < PARTS; i++) flip.p[i] = w.p[i] ^ (int32_t)0x80808080;
  return dot_w4(acc, flip, a);
#endif
}
static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
