// Pieces of the vector vocabulary that are the same for every instruction set. Included after Vec and its operations.
#pragma once

// tanh: an odd polynomial below 5/8 (minimax, relative error 1e-7; there is nothing to cancel), above it
// (1 - e) / (1 + e) with e = e^-2|x|. NaN stays NaN.
static inline Vec tanhv(Vec x) {
  const Vec size = vmax(mul(x, set1(-1.f)), x), square = mul(x, x);
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  p = fma(mul(p, square), x, x);
  const Vec e = exp2v(mul(size, set1(-2.885390081777927f)));  // e^-2|x|
  Vec far = div(sub(set1(1.f), e), add(set1(1.f), e));
  far = select_lt(x, zero(), mul(far, set1(-1.f)), far);
  return select_lt(size, set1(0.625f), p, far);
}

static inline void transpose_in(const float* q, int64_t stride, int rows, int dim, float factor, float* qt) {
  for (int d = 0; d < dim; ++d) {
    for (int r = 0; r < rows; ++r) qt[d * FV_TILE + r] = q[r * stride + d] * factor;
    for (int r = rows; r < FV_TILE; ++r) qt[d * FV_TILE + r] = 0.f;
  }
}

// One finished row: o * inverse (0 for a row that saw nothing, whatever o holds).
static inline void write_row(const float* o, float inverse, int dim, bool blank, float* out) {
  for (int d = 0; d < dim; ++d) out[d] = blank ? 0.f : o[d] * inverse;
}
static inline void write_row(const float* o, float inverse, int dim, bool blank, uint16_t* out) {
  const Vec factor = set1(inverse);
  int d = 0;
  if (!blank)
    for (; d + W <= dim; d += W) store_bf16(out + d, mul(load(o + d), factor));
  for (; d < dim; ++d) {
    float x[W] = {blank ? 0.f : o[d] * inverse};
    uint16_t y[W];
    store_bf16(y, load(x));
    out[d] = y[0];
  }
}
