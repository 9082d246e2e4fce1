// How the kernel sees its operands: tiles of keys and values in place or copied, queries packed, masks transposed.
#pragma once

static void transpose_bits(const uint64_t* in, uint64_t* out) {  // 64 x 64, recursive block swap
  for (int i = 0; i < 64; ++i) out[i] = in[i];
  uint64_t mask = 0x00000000ffffffffull;
  for (int j = 32; j; j >>= 1, mask ^= mask << j)
    for (int k = 0; k < 64; k = (k + j + 1) & ~j) {
      uint64_t t = ((out[k] >> j) ^ out[k + j]) & mask;
      out[k] ^= t << j;
      out[k + j] ^= t;
    }
}

// Q^T (or dO^T) of one tile: [d][query] times `factor`, or unscaled pairs [d / 2][query]; zeros up to whole steps of 4.
template <class E>
static void pack_queries(const E* q, int64_t stride, int64_t dim, int queries, float factor, float* qt) {
  const int64_t steps = PAIRS ? (dim + 1) / 2 : dim;
  for (int64_t n = steps * T; n < up(steps, 4) * T; ++n) qt[n] = 0.f;
  if (!PAIRS) {
    if (sizeof(E) == 4)
      transpose_in((const float*)(const void*)q, stride, queries, (int)dim, factor, qt);
    else
      for (int r = 0; r < T; ++r)
        for (int64_t d = 0; d < dim; ++d) qt[d * T + r] = r < queries ? as_float(q + r * stride + d) * factor : 0.f;
    return;
  }
  uint32_t* pairs = (uint32_t*)qt;
  for (int r = 0; r < T; ++r)
    for (int64_t d = 0; d < dim; d += 2) {
      uint32_t lo = 0, hi = 0;
      if (r < queries) {
        const uint16_t* row = (const uint16_t*)(const void*)(q + r * stride);
        lo = row[d];
        hi = d + 1 < dim ? row[d + 1] : 0;
      }
      pairs[d / 2 * T + r] = lo | hi << 16;
    }
}

template <class E>
static void widen_rows(const E* from, int64_t stride, int rows, int64_t dim, float* to, int64_t to_stride) {
  for (int r = 0; r < rows; ++r) {
    const E* x = from + r * stride;
    float* y = to + r * to_stride;
    int64_t d = 0;
    for (; d + W <= dim; d += W) store(y + d, widen(x + d));
    for (; d < dim; ++d) y[d] = as_float(x + d);
    for (; d < to_stride; ++d) y[d] = 0.f;
  }
}

// Which of keys and values can be read where they are. The backward reads keys as vectors too, values only one by one.
template <class E>
FV_INLINE bool keys_in_place(const fv_args& a, bool backward) {
  if (PAIRS) return a.dim % 8 == 0 && a.k_stride[0] % 2 == 0 && a.k_stride[1] % 2 == 0 && a.k_stride[2] % 2 == 0 && ((uintptr_t)a.k & 3) == 0;
  return sizeof(E) == 4 && a.dim % (backward ? W : 4) == 0;
}
template <class E>
FV_INLINE bool values_in_place(const fv_args& a, bool backward) {
  return !PAIRS && sizeof(E) == 4 && a.v_dim % (backward ? 4 : W) == 0;
}

// One tile of keys: rows of up(dim, 16) floats (or half as many pairs), zeros beyond dim and up to a multiple of 4 keys.
template <class E>
static void copy_keys(const fv_args& a, const E* k, int keys, float* to) {
  const int64_t dim = up(a.dim, 16);
  if (!PAIRS) {
    widen_rows(k, a.k_stride[2], keys, a.dim, to, dim);
    for (int64_t n = keys * dim; n < up(keys, 4) * dim; ++n) to[n] = 0.f;
    return;
  }
  uint32_t* pairs = (uint32_t*)to;
  for (int c = 0; c < keys; ++c) {
    const uint16_t* row = (const uint16_t*)(const void*)(k + c * a.k_stride[2]);
    for (int64_t d = 0; d < dim; d += 2)
      pairs[c * (dim / 2) + d / 2] = (d < a.dim ? row[d] : 0u) | (d + 1 < a.dim ? (uint32_t)row[d + 1] << 16 : 0u);
  }
}

// One tile of values: rows of up(v_dim, 16) floats (or rows of key pairs), zero rows up to a multiple of 4.
template <class E>
static void copy_values(const fv_args& a, const E* v, int keys, float* to) {
  const int64_t v_dim = up(a.v_dim, 16);
  if (!PAIRS) {
    widen_rows(v, a.v_stride[2], keys, a.v_dim, to, v_dim);
    for (int64_t n = keys * v_dim; n < up(keys, 4) * v_dim; ++n) to[n] = 0.f;
    return;
  }
  for (int c = 0; c < up(keys, 8); c += 2) {
    const uint16_t* r0 = c < keys ? (const uint16_t*)(const void*)(v + c * a.v_stride[2]) : nullptr;
    const uint16_t* r1 = c + 1 < keys ? (const uint16_t*)(const void*)(v + (c + 1) * a.v_stride[2]) : nullptr;
    uint32_t* row = (uint32_t*)to + c / 2 * v_dim;
    if (r1)
      for (int64_t d = 0; d < a.v_dim; ++d) row[d] = r0[d] | (uint32_t)r1[d] << 16;
    else
      for (int64_t d = 0; d < a.v_dim; ++d) row[d] = r0 ? r0[d] : 0u;
    for (int64_t d = a.v_dim; d < v_dim; ++d) row[d] = 0;
  }
}

// Points the tile at its keys and values: in place, prepared, or copied into `own_k`, `own_v`.
template <class E>
static void open_tile(const fv_args& a, const fv_prepared& ready, bool backward, const E* k, const E* v, int64_t bh,
                      int64_t j, float* own_k, float* own_v, Tile& tile) {
  const int64_t first = j * T, at = (bh - ready.first) * ((a.k_len + T - 1) / T) + j;
  tile.keys = a.k_len - first < T ? (int)(a.k_len - first) : T;
  const bool whole = tile.keys % 4 == 0;  // products run over keys in steps of 4
  if (keys_in_place<E>(a, backward) && (whole || !backward)) {
    tile.k = (const float*)(const void*)(k + first * a.k_stride[2]);
    tile.k_stride = PAIRS ? a.k_stride[2] / 2 : a.k_stride[2];
  } else {
    float* copy = ready.k ? ready.k + at * ready.k_tile : own_k;
    if (!ready.k) copy_keys(a, k + first * a.k_stride[2], tile.keys, copy);
    tile.k = copy;
    tile.k_stride = PAIRS ? up(a.dim, 16) / 2 : up(a.dim, 16);
  }
  if (values_in_place<E>(a, backward) && (whole || backward)) {
    tile.v = (const float*)(const void*)(v + first * a.v_stride[2]);
    tile.v_stride = a.v_stride[2];
  } else {
    float* copy = ready.v ? ready.v + at * ready.v_tile : own_v;
    if (!ready.v) copy_values(a, v + first * a.v_stride[2], tile.keys, copy);
    tile.v = copy;
    tile.v_stride = up(a.v_dim, 16);
  }
}

template <class E>
static void prepare(const fv_args& a, const fv_prepared& ready, int64_t b, int64_t hkv, int64_t j) {
  const int64_t first = j * T, at = (b * a.kv_heads + hkv - ready.first) * ((a.k_len + T - 1) / T) + j;
  const int keys = a.k_len - first < T ? (int)(a.k_len - first) : T;
  if (ready.k)
    copy_keys(a, (const E*)a.k + b * a.k_stride[0] + hkv * a.k_stride[1] + first * a.k_stride[2], keys, ready.k + at * ready.k_tile);
  if (ready.v)
    copy_values(a, (const E*)a.v + b * a.v_stride[0] + hkv * a.v_stride[1] + first * a.v_stride[2], keys, ready.v + at * ready.v_tile);
}

// Is every value of the tile finite? Adding x * 0 keeps a sum at 0 unless x is NaN or infinite.
template <class E>
static bool all_finite(const E* v, int64_t stride, int rows, int64_t dim) {
  Vec sum = zero();
  float rest = 0.f;
  for (int r = 0; r < rows; ++r) {
    const E* x = v + r * stride;
    int64_t d = 0;
    for (; d + W <= dim; d += W) sum = fma(widen(x + d), zero(), sum);
    for (; d < dim; ++d) rest += as_float(x + d) * 0.f;
  }
  return rest + total_of(sum) == 0.f;
}


template <class E>
static float dot_rows(const E* x, const E* y, int64_t dim) {
  Vec sum = zero();
  int64_t d = 0;
  for (; d + W <= dim; d += W) sum = fma(widen(x + d), widen(y + d), sum);
  float rest = 0.f;
  for (; d < dim; ++d) rest += as_float(x + d) * as_float(y + d);
  return total_of(sum) + rest;
}
