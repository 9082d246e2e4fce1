// AVX-512 vector vocabulary. FV_PAIRS: 0 float32 products, 1 the bfloat16 dot-product instruction, 2 the same emulated.
#pragma once
#include <immintrin.h>
#include <stdint.h>

struct Vec { __m512 x; };
enum { W = 16, NK = 6, NQ = 6, NV = 4, PAIRS = FV_PAIRS != 0 };

#define FV_OP static inline __attribute__((always_inline))
FV_OP Vec zero() { return {_mm512_setzero_ps()}; }
FV_OP Vec set1(float x) { return {_mm512_set1_ps(x)}; }
FV_OP Vec bcast32(const float* p) { return {_mm512_set1_ps(*p)}; }
FV_OP Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FV_OP void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
FV_OP Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
FV_OP Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
FV_OP Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
FV_OP Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
FV_OP Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
FV_OP Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }  // b where either is NaN
FV_OP Vec select_bits(uint64_t bits, Vec a, Vec b) { return {_mm512_mask_blend_ps((__mmask16)bits, b.x, a.x)}; }
FV_OP Vec select_eq(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.x, b.x, _CMP_EQ_OQ), no.x, yes.x)};
}
FV_OP Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ), no.x, yes.x)};
}
FV_OP float total_of(Vec a) { return _mm512_reduce_add_ps(a.x); }
FV_OP Vec widen(const float* p) { return load(p); }
FV_OP Vec widen(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(const void*)p)), 16))};
}
FV_OP __m512i round_bf16(Vec a) {  // the bfloat16 bits in the low half of each lane, nearest even, NaN stays NaN
  __m512i bits = _mm512_castps_si512(a.x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  return _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000)), 16);
}
FV_OP Vec pair(Vec lo, Vec hi) {
  return {_mm512_castsi512_ps(_mm512_or_si512(round_bf16(lo), _mm512_slli_epi32(round_bf16(hi), 16)))};
}
FV_OP void store_bf16(uint16_t* p, Vec a) { _mm256_storeu_si256((__m256i*)(void*)p, _mm512_cvtepi32_epi16(round_bf16(a))); }

#if FV_PAIRS == 1
FV_OP Vec mac(Vec a, Vec b, Vec c) { return {_mm512_dpbf16_ps(c.x, (__m512bh)a.x, (__m512bh)b.x)}; }
#elif FV_PAIRS == 2
FV_OP Vec mac(Vec a, Vec b, Vec c) {
  __m512i ai = _mm512_castps_si512(a.x), bi = _mm512_castps_si512(b.x), high = _mm512_set1_epi32((int)0xffff0000u);
  __m512 odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(ai, high)),
                               _mm512_castsi512_ps(_mm512_and_si512(bi, high)), c.x);
  return {_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(ai, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(bi, 16)), odd)};
}
#else
FV_OP Vec mac(Vec a, Vec b, Vec c) {  // spelled out: left to itself the compiler moves accumulators about and spills
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(c.x) : "v"(b.x), "v"(a.x));
  return c;
}
#endif

// 2^x = 2^(n / 32) (1 + r (c1 + c2 r)), |r| <= 1/64: the 32 roots sit in two registers, their exponent is added as an
// integer. Minimax relative error 5.3e-8. x below -126 is taken as -126; NaN stays NaN.
alignas(64) static const uint32_t ROOTS[32] = {
#include "exp2_roots.inc"
};
FV_OP Vec exp2v(Vec x) {
  const __m512 magic = _mm512_set1_ps(393216.f);  // 1.5 * 2^18: adding it rounds to a multiple of 1/32
  __m512 y = _mm512_max_ps(_mm512_set1_ps(-126.f), x.x);
  __m512 t = _mm512_add_ps(y, magic);
  __m512 r = _mm512_reduce_ps(y, 5 << 4);  // y minus that multiple
  __m512i n = _mm512_castps_si512(t);
  __m512i root = _mm512_permutex2var_epi32(_mm512_load_si512(ROOTS), n, _mm512_load_si512(ROOTS + 16));
  __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_slli_epi32(n, 18)));
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.2402265f), r, _mm512_set1_ps(0.69315733f));
  return {_mm512_fmadd_ps(_mm512_mul_ps(power, r), p, power)};
}
