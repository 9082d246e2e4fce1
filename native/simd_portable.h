// Vectors of four floats in the compiler's own notation: SSE2, NEON or plain scalar code, whatever the target has.
#pragma once
#include <stdint.h>
#include <string.h>

typedef float fv_f4 __attribute__((vector_size(16)));
typedef int32_t fv_i4 __attribute__((vector_size(16)));
struct Vec { fv_f4 x; };
enum { W = 4, NK = 4, NQ = 4, NV = 2, PAIRS = 0 };

#define FV_OP static inline __attribute__((always_inline))
FV_OP Vec set1(float x) { return {fv_f4{x, x, x, x}}; }
FV_OP Vec zero() { return set1(0.f); }
FV_OP Vec bcast32(const float* p) { return set1(*p); }
FV_OP Vec load(const float* p) { Vec a; memcpy(&a.x, p, 16); return a; }
FV_OP void store(float* p, Vec a) { memcpy(p, &a.x, 16); }
FV_OP Vec add(Vec a, Vec b) { return {a.x + b.x}; }
FV_OP Vec sub(Vec a, Vec b) { return {a.x - b.x}; }
FV_OP Vec mul(Vec a, Vec b) { return {a.x * b.x}; }
FV_OP Vec div(Vec a, Vec b) { return {a.x / b.x}; }
FV_OP Vec fma(Vec a, Vec b, Vec c) { return {a.x * b.x + c.x}; }
FV_OP Vec mac(Vec a, Vec b, Vec c) { return fma(a, b, c); }
FV_OP Vec pick(fv_i4 on, Vec a, Vec b) { return {(fv_f4)((on & (fv_i4)a.x) | (~on & (fv_i4)b.x))}; }
FV_OP Vec vmax(Vec a, Vec b) { return pick(a.x > b.x, a, b); }  // b where either is NaN
FV_OP Vec select_bits(uint64_t bits, Vec a, Vec b) {
  const fv_i4 lane = {1, 2, 4, 8};
  int32_t low = (int32_t)(bits & 15);
  fv_i4 on = (fv_i4{low, low, low, low} & lane) == lane;
  return pick(on, a, b);
}
FV_OP Vec select_eq(Vec a, Vec b, Vec yes, Vec no) { return pick(a.x == b.x, yes, no); }
FV_OP Vec select_lt(Vec a, Vec b, Vec yes, Vec no) { return pick(a.x < b.x, yes, no); }
FV_OP float total_of(Vec a) { return (a.x[0] + a.x[1]) + (a.x[2] + a.x[3]); }
FV_OP Vec widen(const float* p) { return load(p); }
FV_OP Vec widen(const uint16_t* p) {
  fv_i4 bits = {(int32_t)((uint32_t)p[0] << 16), (int32_t)((uint32_t)p[1] << 16), (int32_t)((uint32_t)p[2] << 16), (int32_t)((uint32_t)p[3] << 16)};
  return {(fv_f4)bits};
}
FV_OP Vec pair(Vec lo, Vec) { return lo; }  // no bfloat16 products here
FV_OP void store_bf16(uint16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) {
    float f = a.x[i];
    uint32_t bits;
    memcpy(&bits, &f, 4);
    p[i] = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
}
#include "exp2_poly.h"
FV_OP Vec exp2v(Vec x) {
  FV_EXP2_POLY(x);
  typedef uint32_t fv_u4 __attribute__((vector_size(16)));
  return {(fv_f4)((fv_u4)p.x + ((fv_u4)t.x << 23))};
}
