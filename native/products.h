// Matrix products on register tiles, written once and compiled per instruction set.
//
// Scores are held TRANSPOSED: S^T[key][query]. Then
//   - q is packed once per tile as Q^T[d][query]; keys are read in place, one broadcast scalar per (key, d);
//   - the running maximum and sum of the online softmax are plain vectors over queries: no horizontal reduction;
//   - P^T[key][query] is read back as broadcasts, values in place as vectors.
// So neither keys nor values are packed, transposed or copied (float32, value dim a multiple of the vector width).
//
//   S^T = K Q^T, dP^T = V dO^T          score_block  NK keys x NV query vectors, over d
//   O = O alpha + P V, dQ += dS K       value_block  NQ queries x NV vectors of d, over keys
//   dV += P^T dO, dK += dS^T Q          outer_block  NK keys x NV vectors of d, over queries (outer.h)
//
// bfloat16 with a dot-product instruction uses the first two on 32-bit *pairs*: two consecutive d for the scores, two
// consecutive keys for the values. Without the instruction, tiles are widened to float32 on the way.
#pragma once

// ------------------------------------------------------------------------------------------------ S^T = K Q^T
// S[key][lane] for NK_ keys and NV_ vectors of queries; with TOP masked pairs become -inf and the running maximum of
// each query is updated on the way.
template <int NK_, int NV_, bool MASKED, bool TOP>
FV_INLINE void score_block(const float* qt, const float* k, int64_t k_stride, int steps, float* s, float* top,
                           const uint64_t* by_key, int first_lane, float factor) {
  Vec acc[NK_][NV_];
  FV_UNROLL for (int i = 0; i < NK_; ++i) FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = zero();
  // three rows share a pointer, [p], [p + stride], [p + 2 stride]: twelve pointers would not fit the registers
  const float* row[(NK_ + 2) / 3];
  FV_UNROLL for (int i = 0; i < (NK_ + 2) / 3; ++i) {
    row[i] = k + 3 * i * k_stride;
    FV_OPAQUE(row[i]);
  }
#define FV_DEPTH(u)                                                                                   \
  {                                                                                                   \
    Vec q[NV_];                                                                                       \
    FV_UNROLL for (int j = 0; j < NV_; ++j) q[j] = load(qt + (u) * T + j * W);                        \
    FV_UNROLL for (int i = 0; i < NK_; ++i) {                                                         \
      const float* p = row[i / 3] + (i % 3) * k_stride + (u);                                         \
      const Vec kb = bcast32(p);                                                                      \
      FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = mac(kb, q[j], acc[i][j]);                   \
    }                                                                                                 \
  }
  for (int d = 0; d < steps; d += 4) {  // steps is a multiple of 4; one loop, or the accumulators get spilled
    FV_DEPTH(0) FV_DEPTH(1) FV_DEPTH(2) FV_DEPTH(3)
    qt += 4 * T;
    FV_UNROLL for (int i = 0; i < (NK_ + 2) / 3; ++i) row[i] += 4;
  }
#undef FV_DEPTH
  if (!TOP) {
    FV_UNROLL for (int i = 0; i < NK_; ++i) FV_UNROLL for (int j = 0; j < NV_; ++j) store(s + i * T + j * W, acc[i][j]);
    return;
  }
  if (PAIRS) {  // q was packed unscaled
    Vec f = set1(factor);
    FV_UNROLL for (int i = 0; i < NK_; ++i) FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = mul(acc[i][j], f);
  }
  if (MASKED) {
    FV_UNROLL for (int i = 0; i < NK_; ++i) FV_UNROLL for (int j = 0; j < NV_; ++j)
      acc[i][j] = select_bits(by_key[i] >> (first_lane + j * W), acc[i][j], set1(NEG_INF));
  }
  FV_UNROLL for (int j = 0; j < NV_; ++j) {
    Vec m = load(top + j * W);
    FV_UNROLL for (int i = 0; i < NK_; ++i) {
      m = vmax(acc[i][j], m);
      store(s + i * T + j * W, acc[i][j]);
    }
    store(top + j * W, m);
  }
}

// How many of the `left` keys (or queries, or vectors) the next register tile takes.
FV_INLINE int group_of(int left, int most) { return left < most ? left : most; }
enum { MAX_GROUPS = 64 / NK + 1 };

// Calls of a register tile for its number of rows, 1..6, and of vectors, 1..4; more than the instruction set has never
// occur.
#define FV_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define FV_VECTORS(X) X(1) X(2) X(3) X(4)

// The vectors of queries in [0, nv) that see at least one of the keys.
FV_INLINE void lane_range(const uint64_t* by_key, int keys, int nv, int* v0, int* v1) {
  uint64_t any = 0;
  for (int i = 0; i < keys; ++i) any |= by_key[i];
  if (nv * W < 64) any &= ((uint64_t)1 << (nv * W)) - 1;
  if (!any) {
    *v0 = *v1 = 0;
    return;
  }
  *v0 = __builtin_ctzll(any) / W;
  *v1 = (63 - __builtin_clzll(any)) / W + 1;
}

template <int NK_, bool MASKED, bool TOP>
FV_INLINE void score_keys(const float* qt, const float* k, int64_t k_stride, int steps, float* s, float* top,
                          const uint64_t* by_key, int v, int nv, float factor) {
  const int lane = v * W;
#define FV_CASE(n)                                                                                                     \
  case n:                                                                                                              \
    return score_block<NK_, (n) <= NV ? (n) : NV, MASKED, TOP>(qt + lane, k, k_stride, steps, s + lane, top + lane, by_key, \
                                                               lane, factor);
  switch (nv) { FV_VECTORS(FV_CASE) }
#undef FV_CASE
}

// S^T of one tile: `rows` are its keys (or values), `stride` apart. What a partial tile's register tiles do not see at
// all is left as it is.
template <bool TOP>
static __attribute__((noinline)) void score_tile(const float* qt, const Tile& tile, const float* rows, int64_t stride,
                                                 int steps, int nv, float* s, float* top, float factor) {
  for (int v = 0; v < nv; v += NV)
    for (int c = 0, keys; c < tile.keys; c += keys) {
      keys = group_of(tile.keys - c, NK);
      const float* k = rows + c * stride;
      int v0 = v, v1 = v + group_of(nv - v, NV);
      if (tile.partial) {
        int lo, hi;
        lane_range(tile.by_key + c, keys, nv, &lo, &hi);
        v0 = lo > v0 ? lo : v0;
        v1 = hi < v1 ? hi : v1;
        if (v0 >= v1) continue;
      }
#define FV_CASE(n)                                                                                                \
  case n:                                                                                                         \
    if (TOP && tile.partial)                                                                                      \
      score_keys<(n) <= NK ? (n) : NK, TOP, TOP>(qt, k, stride, steps, s + c * T, top, tile.by_key + c, v0, v1 - v0, \
                                                 factor);                                                         \
    else                                                                                                          \
      score_keys<(n) <= NK ? (n) : NK, false, TOP>(qt, k, stride, steps, s + c * T, top, nullptr, v0, v1 - v0, factor); \
    break;
      switch (keys) { FV_ROWS(FV_CASE) }
#undef FV_CASE
    }
}

// ---------------------------------------------------------------------------------------- O = O alpha + P V
struct Factor {  // P^T (or dS^T) of one tile and the rows it is multiplied with
  const float* p;
  const Tile* tile;
  const float* rows;
  int64_t stride;
};

struct Span {
  const float* p;
  const float* v;
  int64_t v_stride;
  int k0, k1;  // key rows (or rows of pairs) that the query group sees, widened to multiples of 4
};

template <int NQ_, int NV_>
FV_INLINE void value_block(float* out, int64_t out_stride, const float* alpha, const Span* spans, int count, int q, int col) {
  Vec acc[NQ_][NV_];
  FV_UNROLL for (int i = 0; i < NQ_; ++i) {
    Vec a = set1(alpha[i]);
    FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = mul(load(out + i * out_stride + j * W), a);
  }
  for (int n = 0; n < count; ++n) {
    const float* p = spans[n].p + q + (int64_t)spans[n].k0 * T;
    const float* v = spans[n].v + col + spans[n].k0 * spans[n].v_stride;
    const int64_t v_stride = spans[n].v_stride;
#define FV_KEY(u)                                                                                     \
  {                                                                                                   \
    Vec row[NV_];                                                                                     \
    FV_UNROLL for (int j = 0; j < NV_; ++j) row[j] = load(v + (u) * v_stride + j * W);                \
    FV_UNROLL for (int i = 0; i < NQ_; ++i) {                                                         \
      const Vec pb = bcast32(p + (u) * T + i);                                                        \
      FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = mac(pb, row[j], acc[i][j]);                 \
    }                                                                                                 \
  }
    for (int left = spans[n].k1 - spans[n].k0; left > 0; left -= 4, p += 4 * T, v += 4 * v_stride) {
      FV_KEY(0) FV_KEY(1) FV_KEY(2) FV_KEY(3)
    }
#undef FV_KEY
  }
  FV_UNROLL for (int i = 0; i < NQ_; ++i) FV_UNROLL for (int j = 0; j < NV_; ++j) store(out + i * out_stride + j * W, acc[i][j]);
}

template <int NQ_>
FV_INLINE void value_rows(float* out, int64_t out_stride, const float* alpha, const Span* spans, int count, int q, int col,
                          int nv) {
#define FV_CASE(n) \
  case n: return value_block<NQ_, (n) <= NV ? (n) : NV>(out, out_stride, alpha, spans, count, q, col);
  switch (nv) { FV_VECTORS(FV_CASE) }
#undef FV_CASE
}

static __attribute__((noinline)) void value_pass(float* out, int64_t out_stride, const float* alpha, const Factor* factors,
                                                 int count, int queries, int vectors) {
  Span spans[MAX_GROUPS][STEP];
  for (int q = 0, g = 0, rows; q < queries; q += rows, ++g) {
    rows = group_of(queries - q, NQ);
    for (int n = 0; n < count; ++n) {
      const Tile& tile = *factors[n].tile;
      int k0 = 0, k1 = tile.keys;
      if (tile.partial) {
        uint64_t any = 0;
        for (int i = 0; i < rows; ++i) any |= tile.by_query[q + i];
        if (tile.keys < 64) any &= ((uint64_t)1 << tile.keys) - 1;
        k0 = any ? __builtin_ctzll(any) : 0;
        k1 = any ? 64 - __builtin_clzll(any) : 0;
      }
      if (PAIRS) k0 >>= 1, k1 = (k1 + 1) >> 1;
      k0 &= ~3, k1 = (k1 + 3) & ~3;  // the keys added have weight 0
      spans[g][n] = Span{factors[n].p, factors[n].rows, factors[n].stride, k0, k1};
    }
  }
  for (int v = 0; v < vectors; v += NV) {
    const int col = v * W;
    for (int q = 0, g = 0, rows; q < queries; q += rows, ++g) {
      rows = group_of(queries - q, NQ);
      float* o = out + q * out_stride + col;
#define FV_CASE(n) \
  case n: value_rows<(n) <= NQ ? (n) : NQ>(o, out_stride, alpha + q, spans[g], count, q, col, group_of(vectors - v, NV)); break;
      switch (rows) { FV_ROWS(FV_CASE) }
#undef FV_CASE
    }
  }
}
