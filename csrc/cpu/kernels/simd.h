// Vectors of float32 for the instruction set that the including file is compiled for: AVX-512 by intrinsics, anything else
// through the compiler's vector extension. MADTP_ISA names the namespace, so that one program holds several copies.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MADTP_INLINE static inline __attribute__((always_inline))

namespace madtp::cpu::MADTP_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

MADTP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MADTP_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

MADTP_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

MADTP_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// 2^f = p(f) for f in [0, 1): relative minimax polynomials, highest coefficient first.
constexpr float kExp2[7] = {0.000215659718378447f, 0.0012482289457693696f, 0.009673775173723698f, 0.05548618361353874f,
                            0.24022908508777618f,  0.6931470632553101f,    1.0f};  // 6e-8 after rounding
constexpr float kExp2Weights[6] = {0.0018775766948238015f, 0.00898933969438076f, 0.05582631751894951f,
                                   0.24015361070632935f,   0.6931530833244324f,  0.9999999403953552f};  // 1.5e-7
constexpr float kExp2Short[5] = {0.01353416033089161f, 0.05201147496700287f, 0.2414427548646927f, 0.6930038332939148f,
                                 1.0000026226043701f};  // 3e-6, for weights that are rounded to bfloat16

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kSums = 24;  // of 32 registers
constexpr int kPanelVectors = 4, kLinearVectors = 2;
using vf = __m512;

MADTP_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

MADTP_INLINE vf broadcast(float x) { return _mm512_set1_ps(x); }
MADTP_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
MADTP_INLINE vf maximum(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where one is NaN
MADTP_INLINE float sum_lanes(vf a) { return _mm512_reduce_add_ps(a); }
MADTP_INLINE float max_lanes(vf a) { return _mm512_reduce_max_ps(a); }
MADTP_INLINE vf square_root(vf a) { return _mm512_sqrt_ps(a); }
// 0 for lanes of -inf.
MADTP_INLINE vf zero_if_lowest(vf a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, broadcast(-__builtin_inff()), _CMP_NEQ_UQ), a);
}
// a where it is NaN, else b.
MADTP_INLINE vf where_nan(vf a, vf b) { return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a); }
// The first n lanes, -inf in the others.
MADTP_INLINE vf hide_from(vf a, int64_t n) {
  return n >= kLanes ? a : _mm512_mask_mov_ps(broadcast(-__builtin_inff()), first_lanes(n), a);
}
// c where a equals b, else 0.
MADTP_INLINE vf where_equal(vf a, vf b, vf c) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), c); }
// The first lane where a equals b; kLanes if there is none.
MADTP_INLINE int first_equal(vf a, vf b) { return __builtin_ctz(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) | 1 << kLanes); }
// 0 in the first n lanes.
MADTP_INLINE vf zero_before(vf a, int64_t n) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(~first_lanes(n)), a); }
MADTP_INLINE vf magnitude(vf a) { return _mm512_abs_ps(a); }
// b where a < 0 (and where its sign is set), else c.
MADTP_INLINE vf where_negative(vf a, vf b, vf c) { return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(a)), c, b); }

MADTP_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
MADTP_INLINE vf widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
MADTP_INLINE vf load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
MADTP_INLINE vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
MADTP_INLINE vf load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
MADTP_INLINE vf load_n(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
MADTP_INLINE vf load_n(const f16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

// Round to nearest even; a NaN stays one.
MADTP_INLINE __m256i to_bf16(vf a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i kept = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), bits,
                                            _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
MADTP_INLINE __m256i to_f16(vf a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

MADTP_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
MADTP_INLINE void store(bf16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
MADTP_INLINE void store(f16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(a)); }
MADTP_INLINE void store_n(float* p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
MADTP_INLINE void store_n(bf16* p, vf a, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(a)); }
MADTP_INLINE void store_n(f16* p, vf a, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_f16(a)); }

template <int kTerms>
MADTP_INLINE vf exp2_polynomial(vf x, const float (&terms)[kTerms]) {
  // reduce: x - floor(x), 0 for -inf; scalef: p * 2^floor(x), which underflows to 0.
  const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p = broadcast(terms[0]);
  for (int i = 1; i < kTerms; ++i) p = fma(p, f, broadcast(terms[i]));
  return _mm512_scalef_ps(p, x);
}

#else

#if defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__aarch64__)
constexpr int kSums = 24;  // of 32 registers
constexpr int kPanelVectors = 4, kLinearVectors = 4;
#else
constexpr int kSums = 12;  // of 16 registers
constexpr int kPanelVectors = 2, kLinearVectors = 2;
#endif
typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));

MADTP_INLINE vf broadcast(float x) { return x - vf{}; }

MADTP_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

MADTP_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }  // b where one is NaN

MADTP_INLINE float sum_lanes(vf a) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += a[i];
  return total;
}
MADTP_INLINE float max_lanes(vf a) {
  float top = a[0];
  for (int i = 1; i < kLanes; ++i) top = a[i] > top ? a[i] : top;
  return top;
}
MADTP_INLINE vf square_root(vf a) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}

// 0 for lanes of -inf.
MADTP_INLINE vf zero_if_lowest(vf a) { return a == broadcast(-__builtin_inff()) ? vf{} : a; }

// a where it is NaN, else b.
MADTP_INLINE vf where_nan(vf a, vf b) { return a == a ? b : a; }

// The first n lanes, -inf in the others.
MADTP_INLINE vf hide_from(vf a, int64_t n) {
  for (int64_t i = n; i < kLanes; ++i) a[i] = -__builtin_inff();
  return a;
}

// c where a equals b, else 0.
MADTP_INLINE vf where_equal(vf a, vf b, vf c) { return a == b ? c : vf{}; }

// The first lane where a equals b; kLanes if there is none.
MADTP_INLINE int first_equal(vf a, vf b) {
  const vi equal = a == b;
#if defined(__AVX2__)
  return __builtin_ctz(static_cast<unsigned>(_mm256_movemask_ps((__m256)equal)) | 1u << kLanes);
#else
  for (int i = 0; i < kLanes; ++i) {
    if (equal[i]) return i;
  }
  return kLanes;
#endif
}

// 0 in the first n lanes.
MADTP_INLINE vf zero_before(vf a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] = 0.0f;
  return a;
}

MADTP_INLINE vf magnitude(vf a) { return (vf)((vi)a & 0x7fffffff); }
// b where a < 0 (and where its sign is set), else c.
MADTP_INLINE vf where_negative(vf a, vf b, vf c) {
  const vi negative = (vi)a < 0;
  return (vf)(((vi)b & negative) | ((vi)c & ~negative));
}

MADTP_INLINE float to_float(float x) { return x; }
MADTP_INLINE float to_float(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
MADTP_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);  // infinity, NaN
  // The exponent field lands 112 too low; a multiplication corrects it, subnormal numbers included.
  return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
}

MADTP_INLINE void from_float(float x, float& to) { to = x; }
MADTP_INLINE void from_float(float x, bf16& to) {
  const uint32_t bits = as_bits(x);
  to.bits = static_cast<uint16_t>((x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
MADTP_INLINE void from_float(float x, f16& to) {
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // subnormal: units of 2^-24, rounded by the float addition
    half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  to.bits = static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(half);
}

template <class T>
MADTP_INLINE vf load(const T* p) {
  vf a;
  for (int i = 0; i < kLanes; ++i) a[i] = to_float(p[i]);
  return a;
}
MADTP_INLINE vf load(const float* p) {
  vf a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
template <class T>
MADTP_INLINE vf load_n(const T* p, int64_t n) {
  vf a = {};
  for (int64_t i = 0; i < n; ++i) a[i] = to_float(p[i]);
  return a;
}
template <class T>
MADTP_INLINE void store_n(T* p, vf a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(a[i], p[i]);
}
template <class T>
MADTP_INLINE void store(T* p, vf a) {
  store_n(p, a, kLanes);
}
MADTP_INLINE void store(float* p, vf a) {
  std::memcpy(p, &a, sizeof a);
}

template <int kTerms>
MADTP_INLINE vf exp2_polynomial(vf x, const float (&terms)[kTerms]) {
  // Below 2^-126 the result is 0, for -inf too. Adding 1.5 * 2^23 leaves the rounded exponent in the low bits.
  const vi underflows = x < broadcast(-126.0f);
  const vf normal = underflows ? broadcast(-126.0f) : x;
  const vf shifted = normal - 0.5f + broadcast(0x1.8p23f);
  const vf f = normal - (shifted - broadcast(0x1.8p23f));
  vf p = broadcast(terms[0]);
  for (int i = 1; i < kTerms; ++i) p = fma(p, f, broadcast(terms[i]));
  const vf power = (vf)(((vi)p + ((vi)shifted << 23)) & ~underflows);
  return x == x ? power : x;
}

#endif

// NaN where one is NaN.
MADTP_INLINE vf maximum_or_nan(vf a, vf b) { return where_nan(a, maximum(a, b)); }

MADTP_INLINE float max_lanes_or_nan(vf a) {
  const float sum = sum_lanes(where_nan(a, vf{}));
  return sum == sum ? max_lanes(a) : sum;
}

MADTP_INLINE vf exp2(vf x) { return exp2_polynomial(x, kExp2); }
MADTP_INLINE vf exp2_weights(vf x) { return exp2_polynomial(x, kExp2Weights); }
MADTP_INLINE vf exp2_short(vf x) { return exp2_polynomial(x, kExp2Short); }

}  // namespace
}  // namespace madtp::cpu::MADTP_ISA
