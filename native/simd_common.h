// Pieces of the vector vocabulary that are the same for every instruction set. Included after Vec and its operations.
#pragma once

// tanh: odd polynomial near 0 (no cancellation), else (e - 1) / (e + 1) with e = exp(2x).
static inline Vec tanhv(Vec x) {
  float in[W], out[W];
  store(in, x);
  for (int i = 0; i < W; ++i) out[i] = __builtin_tanhf(in[i]);
  return load(out);
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
