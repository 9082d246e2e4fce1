// AVX2 + FMA vector vocabulary.
#pragma once
#include <immintrin.h>
#include <stdint.h>

struct Vec { __m256 x; };
enum { W = 8, NK = 6, NQ = 6, NV = 2, PAIRS = 0 };

#define FV_OP static inline __attribute__((always_inline))
FV_OP Vec zero() { return {_mm256_setzero_ps()}; }
FV_OP Vec set1(float x) { return {_mm256_set1_ps(x)}; }
FV_OP Vec bcast32(const float* p) { return {_mm256_broadcast_ss(p)}; }
FV_OP Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
FV_OP void store(float* p, Vec a) { _mm256_storeu_ps(p, a.x); }
FV_OP Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
FV_OP Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
FV_OP Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
FV_OP Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.x, b.x)}; }
FV_OP Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
FV_OP Vec mac(Vec a, Vec b, Vec c) { return fma(a, b, c); }
FV_OP Vec vmax(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x)}; }  // b where either is NaN
FV_OP Vec select_bits(uint64_t bits, Vec a, Vec b) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)(bits & 0xff)), lane), lane);
  return {_mm256_blendv_ps(b.x, a.x, _mm256_castsi256_ps(on))};
}
FV_OP Vec select_eq(Vec a, Vec b, Vec yes, Vec no) { return {_mm256_blendv_ps(no.x, yes.x, _mm256_cmp_ps(a.x, b.x, _CMP_EQ_OQ))}; }
FV_OP Vec select_lt(Vec a, Vec b, Vec yes, Vec no) { return {_mm256_blendv_ps(no.x, yes.x, _mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ))}; }
FV_OP float total_of(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
FV_OP Vec widen(const float* p) { return load(p); }
FV_OP Vec widen(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(const void*)p)), 16))};
}
FV_OP Vec pair(Vec lo, Vec) { return lo; }  // no bfloat16 products here
FV_OP void store_bf16(uint16_t* p, Vec a) {
  __m256i bits = _mm256_castps_si256(a.x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q));
  __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i*)(void*)p, _mm256_castsi256_si128(packed));
}
#include "exp2_poly.h"
FV_OP Vec exp2v(Vec x) {
  FV_EXP2_POLY(x);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.x), _mm256_slli_epi32(_mm256_castps_si256(t.x), 23)))};
}
