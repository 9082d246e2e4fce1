// Block-sparse flash attention, forward: one query tile at a time, written once and compiled per instruction set.
//
// For a tile of 64 queries the scores are held TRANSPOSED: S^T[key][query]. Then
//   - q is packed once per tile as Q^T[d][query]; keys are read in place, one broadcast scalar per (key, d);
//   - the running maximum and sum of the online softmax are plain vectors over queries: no horizontal reduction;
//   - P^T[key][query] is read back as broadcasts, values in place as vectors.
// So neither keys nor values are packed, transposed or copied (float32, value dim a multiple of the vector width).
//
//   S^T = K Q^T                         score_block  register tile: NK keys x NV query vectors
//   m' = max(m, S), P = 2^(S - m')      softmax_pass
//   O = O 2^(m - m') + P V              value_block  register tile: NQ queries x NV value vectors
//
// bfloat16 with a dot-product instruction uses the same two register tiles on 32-bit *pairs*: two consecutive d for
// the scores, two consecutive keys for the values. Without the instruction, tiles are widened to float32 on the way.
//
// Included by kernel_<isa>.cpp after it has defined, inside a namespace of its own:
//   Vec (type), W (lanes), NK x 2 and NQ x 2 (register tiles), load/store/zero/set1/bcast32/mul/add/sub/fma/vmax,
//   mac(a, b, c) = a b + c, mac_mem(p, b, c) = *p b + c,
//   exp2v, select_bits(bits, x, otherwise), widen(bf16*), and PAIRS (1: mac works on bfloat16 pairs).
#pragma once
#include "foveate.h"
#include "tile.h"

#define FV_INLINE static inline __attribute__((always_inline))
#define FV_UNROLL _Pragma("GCC unroll 16")
#define FV_OPAQUE(p) __asm__("" : "+r"(p))  // keeps the compiler from deriving p anew

static const float LOG2E = 1.44269504088896340736f;
static const float LN2 = 0.69314718055994530942f;
static const float NEG_INF = -__builtin_inff();
enum { T = FV_TILE, STEP = FV_STEP };

typedef uint16_t bf16;

FV_INLINE float from_bf16(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

// One listed key tile while it is being processed.
struct Tile {
  const float* k;      // key rows, in units of float (or of bf16 pairs)
  int64_t k_stride;    // floats (or pairs) between key rows
  const float* v;      // value rows (or rows of key pairs)
  int64_t v_stride;
  int keys;            // valid keys, 1..64
  bool partial;
  const uint64_t* by_query;  // 64 words: bit c of word r
  uint64_t by_key[T];        // the transposed bitmap: bit r of word c
};

// ------------------------------------------------------------------------------------------------ S^T = K Q^T
// S[key][lane] for NK_ keys and NV_ vectors of queries; the running maximum is updated on the way.
template <int NK_, int NV_, bool MASKED>
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
      if (i % 3 == 0) {                                                                               \
        FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = mac_mem(p, q[j], acc[i][j]);              \
      } else {                                                                                        \
        Vec kb = bcast32(p);                                                                          \
        FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = mac(kb, q[j], acc[i][j]);                 \
      }                                                                                               \
    }                                                                                                 \
  }
  for (int d = 0; d < steps; d += 4) {  // steps is a multiple of 4; one loop, or the accumulators get spilled
    FV_DEPTH(0) FV_DEPTH(1) FV_DEPTH(2) FV_DEPTH(3)
    qt += 4 * T;
    FV_UNROLL for (int i = 0; i < (NK_ + 2) / 3; ++i) row[i] += 4;
  }
#undef FV_DEPTH
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

// How many of the `left` keys (or queries) the next register tile takes: NK, but 16 go as 8 + 8, because a remainder
// of 4 would leave the multipliers waiting for each other.
FV_INLINE int group_of(int left, int most) { return left == 16 && most == 12 ? 8 : left < most ? left : most; }
enum { MAX_GROUPS = 64 / (NK < 8 ? NK : 8) + 2 };

#define FV_CASES_12(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)

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

template <int NK_, bool MASKED>
FV_INLINE void score_keys(const float* qt, const float* k, int64_t k_stride, int steps, float* s, float* top,
                          const uint64_t* by_key, int v, int nv, float factor) {
  const int lane = v * W;
  if (nv == 2)
    score_block<NK_, 2, MASKED>(qt + lane, k, k_stride, steps, s + lane, top + lane, by_key, lane, factor);
  else
    score_block<NK_, 1, MASKED>(qt + lane, k, k_stride, steps, s + lane, top + lane, by_key, lane, factor);
}

static __attribute__((noinline)) void score_tile(const float* qt, const Tile& tile, int steps, int nv, float* s,
                                                 float* top, float factor) {
  for (int v = 0; v < nv; v += 2)  // two vectors of queries at a time: their part of Q^T stays in the first-level cache
    for (int c = 0, keys; c < tile.keys; c += keys) {
      keys = group_of(tile.keys - c, NK);
      const float* k = tile.k + c * tile.k_stride;
      int v0 = v, v1 = v + 2 < nv ? v + 2 : nv;
      if (tile.partial) {
        int lo, hi;
        lane_range(tile.by_key + c, keys, nv, &lo, &hi);
        v0 = lo > v0 ? lo : v0;
        v1 = hi < v1 ? hi : v1;
        if (v0 >= v1) continue;
      }
#define FV_CASE(n)                                                                                                    \
  case n:                                                                                                             \
    if (tile.partial)                                                                                                 \
      score_keys<(n) <= NK ? (n) : NK, true>(qt, k, tile.k_stride, steps, s + c * T, top, tile.by_key + c, v0, v1 - v0, \
                                             factor);                                                            \
    else                                                                                                              \
      score_keys<(n) <= NK ? (n) : NK, false>(qt, k, tile.k_stride, steps, s + c * T, top, nullptr, v0, v1 - v0,       \
                                              factor);                                                           \
    break;
      switch (keys) { FV_CASES_12(FV_CASE) }
#undef FV_CASE
    }
}

// S -> cap tanh(S / cap) log2(e), apart from the register tile because few models need it.
static __attribute__((noinline)) void softcap_pass(const Tile& tile, int nv, float* s, float* top, float factor, float cap) {
  for (int v = 0; v < nv; ++v) {
    Vec m = load(top + v * W);
    for (int c = 0; c < tile.keys; ++c) {
      if (tile.partial && !(tile.by_key[c] >> (v * W))) continue;  // may never have been computed; P is set to 0 there
      Vec x = mul(tanhv(mul(load(s + c * T + v * W), set1(factor / cap))), set1(cap * LOG2E));
      if (tile.partial) x = select_bits(tile.by_key[c] >> (v * W), x, set1(NEG_INF));
      m = vmax(x, m);
      store(s + c * T + v * W, x);
    }
    store(top + v * W, m);
  }
}

// ------------------------------------------------------------------------------------------- P = 2^(S - m), sums
// In place; with PAIRS, rows (2i, 2i+1) become row i of bfloat16 pairs.
static __attribute__((noinline)) void softmax_pass(const Tile& tile, int nv, float* s, const float* top, float* sum) {
  int lo[MAX_GROUPS], hi[MAX_GROUPS];
  if (tile.partial)
    for (int c = 0, g = 0, keys; c < tile.keys; c += keys, ++g) {
      keys = group_of(tile.keys - c, NK);
      lane_range(tile.by_key + c, keys, nv, &lo[g], &hi[g]);
    }
  for (int v = 0; v < nv; ++v) {
    float* column = s + v * W;
    Vec m = load(top + v * W), total = load(sum + v * W), held = zero();
    for (int c = 0, g = 0, keys; c < tile.keys; c += keys, ++g) {
      keys = group_of(tile.keys - c, NK);
      if (!tile.partial) {
        if (!PAIRS) {
          for (int i = c; i < c + keys; ++i) {
            Vec p = exp2v(sub(load(column + i * T), m));
            store(column + i * T, p);
            total = add(total, p);
          }
        } else {
          for (int i = c; i < c + keys; ++i) {
            Vec p = exp2v(sub(load(column + i * T), m));
            total = add(total, p);
            if (i & 1) store(column + (i >> 1) * T, pair(held, p));
            held = p;
          }
        }
        continue;
      }
      bool computed = lo[g] <= v && v < hi[g];
      for (int i = c; i < c + keys; ++i) {
        Vec p = zero();
        if (computed) {
          p = exp2v(sub(load(column + i * T), m));
          p = select_bits(tile.by_key[i] >> (v * W), p, zero());
          total = add(total, p);
        }
        if (!PAIRS)
          store(column + i * T, p);
        else if (i & 1)
          store(column + (i >> 1) * T, pair(held, p));
        held = p;
      }
    }
    int row = tile.keys;
    if (PAIRS) {
      row = (tile.keys + 1) >> 1;
      if (tile.keys & 1) store(column + (tile.keys >> 1) * T, pair(held, zero()));
    }
    for (; row & 3; ++row) store(column + row * T, zero());
    store(sum + v * W, total);
  }
}

// ---------------------------------------------------------------------------------------- O = O alpha + P V
struct Span {
  const float* p;  // P^T of this tile
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
      if (i % 3 == 0) {                                                                               \
        FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = mac_mem(p + (u) * T + i, row[j], acc[i][j]); \
      } else {                                                                                        \
        Vec pb = bcast32(p + (u) * T + i);                                                            \
        FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = mac(pb, row[j], acc[i][j]);               \
      }                                                                                               \
    }                                                                                                 \
  }
    for (int left = spans[n].k1 - spans[n].k0; left > 0; left -= 4, p += 4 * T, v += 4 * v_stride) {
      FV_KEY(0) FV_KEY(1) FV_KEY(2) FV_KEY(3)
    }
#undef FV_KEY
  }
  FV_UNROLL for (int i = 0; i < NQ_; ++i) FV_UNROLL for (int j = 0; j < NV_; ++j) store(out + i * out_stride + j * W, acc[i][j]);
}

static __attribute__((noinline)) void value_pass(float* out, int64_t out_stride, const float* alpha, const Tile* tiles,
                                                 int count, const float* s, int queries, int vectors) {
  Span spans[MAX_GROUPS][STEP];
  for (int q = 0, g = 0, rows; q < queries; q += rows, ++g) {
    rows = group_of(queries - q, NQ);
    for (int n = 0; n < count; ++n) {
      const Tile& tile = tiles[n];
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
      spans[g][n] = Span{s + n * T * T, tile.v, tile.v_stride, k0, k1};
    }
  }
  for (int v = 0; v < vectors; v += 2) {  // two vectors of value columns at a time, as for the scores
    const int col = v * W;
    const bool two = vectors - v >= 2;
    for (int q = 0, g = 0, rows; q < queries; q += rows, ++g) {
      rows = group_of(queries - q, NQ);
      float* o = out + q * out_stride + col;
#define FV_CASE(n)                                                                                    \
  case n:                                                                                             \
    if (two)                                                                                          \
      value_block<(n) <= NQ ? (n) : NQ, 2>(o, out_stride, alpha + q, spans[g], count, q, col);        \
    else                                                                                              \
      value_block<(n) <= NQ ? (n) : NQ, 1>(o, out_stride, alpha + q, spans[g], count, q, col);        \
    break;
      switch (rows) { FV_CASES_12(FV_CASE) }
#undef FV_CASE
    }
  }
}

// ------------------------------------------------------------------------------------------------ one query tile
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

struct Scratch {  // carved out of the caller's buffer, 64-byte aligned
  float *qt, *s, *o, *k, *v;
  Tile* tiles;
};

FV_INLINE int64_t up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

static int64_t scratch_floats(const fv_forward_args& a) {
  int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  return T * dim + STEP * T * T + T * v_dim + STEP * T * dim + STEP * T * v_dim + 64 +
         up(STEP * sizeof(Tile), 64) / 4 + 16;
}

static Scratch carve(const fv_forward_args& a, float* base) {
  int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  Scratch x;
  x.qt = base;
  x.s = x.qt + T * dim;
  x.o = x.s + STEP * T * T;
  x.k = x.o + T * v_dim;
  x.v = x.k + STEP * T * dim;
  x.tiles = (Tile*)(x.v + STEP * T * v_dim + 64);
  return x;
}

FV_INLINE float as_float(const float* p) { return *p; }
FV_INLINE float as_float(const bf16* p) { return from_bf16(*p); }

template <class E>
static void pack_queries(const fv_forward_args& a, const E* q, int queries, float* qt) {
  const float factor = a.softcap != 0.f ? 1.f : a.scale * LOG2E;
  for (int64_t n = (PAIRS ? (a.dim + 1) / 2 : a.dim) * T; n < up(PAIRS ? (a.dim + 1) / 2 : a.dim, 4) * T; ++n) qt[n] = 0.f;
  if (!PAIRS) {
    if (sizeof(E) == 4)
      transpose_in((const float*)(const void*)q, a.q_stride[2], queries, (int)a.dim, factor, qt);
    else
      for (int r = 0; r < T; ++r)
        for (int64_t d = 0; d < a.dim; ++d)
          qt[d * T + r] = r < queries ? as_float(q + r * a.q_stride[2] + d) * factor : 0.f;
    return;
  }
  uint32_t* pairs = (uint32_t*)qt;
  for (int r = 0; r < T; ++r)
    for (int64_t d = 0; d < a.dim; d += 2) {
      uint32_t lo = 0, hi = 0;
      if (r < queries) {
        const uint16_t* row = (const uint16_t*)(const void*)(q + r * a.q_stride[2]);
        lo = row[d];
        hi = d + 1 < a.dim ? row[d + 1] : 0;
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

// Which of keys and values can be read where they are.
template <class E>
FV_INLINE bool keys_in_place(const fv_forward_args& a) {
  if (PAIRS) return a.dim % 8 == 0 && a.k_stride[0] % 2 == 0 && a.k_stride[1] % 2 == 0 && a.k_stride[2] % 2 == 0 && ((uintptr_t)a.k & 3) == 0;
  return sizeof(E) == 4 && a.dim % 4 == 0;
}
template <class E>
FV_INLINE bool values_in_place(const fv_forward_args& a) {
  return !PAIRS && sizeof(E) == 4 && a.v_dim % W == 0;
}

// One tile of keys: rows of up(dim, 16) floats (or half as many pairs), zeros beyond dim.
template <class E>
static void copy_keys(const fv_forward_args& a, const E* k, int keys, float* to) {
  const int64_t dim = up(a.dim, 16);
  if (!PAIRS) return widen_rows(k, a.k_stride[2], keys, a.dim, to, dim);
  uint32_t* pairs = (uint32_t*)to;
  for (int c = 0; c < keys; ++c) {
    const uint16_t* row = (const uint16_t*)(const void*)(k + c * a.k_stride[2]);
    for (int64_t d = 0; d < dim; d += 2)
      pairs[c * (dim / 2) + d / 2] = (d < a.dim ? row[d] : 0u) | (d + 1 < a.dim ? (uint32_t)row[d + 1] << 16 : 0u);
  }
}

// One tile of values: rows of up(v_dim, 16) floats (or rows of key pairs), zero rows up to a multiple of 4.
template <class E>
static void copy_values(const fv_forward_args& a, const E* v, int keys, float* to) {
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

// Points the tile at its keys and values: in place, prepared, or copied into the scratch of this slot.
template <class E>
static void open_tile(const fv_forward_args& a, const fv_prepared& ready, const E* k, const E* v, int64_t bh, int64_t j,
                      int slot, const Scratch& x, Tile& tile) {
  const int64_t first = j * T, k_tiles = (a.k_len + T - 1) / T, dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  tile.keys = a.k_len - first < T ? (int)(a.k_len - first) : T;
  if (keys_in_place<E>(a)) {
    tile.k = (const float*)(const void*)(k + first * a.k_stride[2]);
    tile.k_stride = PAIRS ? a.k_stride[2] / 2 : a.k_stride[2];
  } else {
    float* copy = ready.k ? ready.k + ((bh - ready.first) * k_tiles + j) * ready.k_tile : x.k + slot * T * dim;
    if (!ready.k) copy_keys(a, k + first * a.k_stride[2], tile.keys, copy);
    tile.k = copy;
    tile.k_stride = PAIRS ? dim / 2 : dim;
  }
  if (values_in_place<E>(a) && tile.keys % 4 == 0) {
    tile.v = (const float*)(const void*)(v + first * a.v_stride[2]);
    tile.v_stride = a.v_stride[2];
  } else {
    float* copy = ready.v ? ready.v + ((bh - ready.first) * k_tiles + j) * ready.v_tile : x.v + slot * T * v_dim;
    if (!ready.v) copy_values(a, v + first * a.v_stride[2], tile.keys, copy);
    tile.v = copy;
    tile.v_stride = v_dim;
  }
}

template <class E>
static void prepare(const fv_forward_args& a, const fv_prepared& ready, int64_t b, int64_t hkv, int64_t j) {
  const int64_t first = j * T, k_tiles = (a.k_len + T - 1) / T, at = (b * a.kv_heads + hkv - ready.first) * k_tiles + j;
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
  float lanes[W];
  store(lanes, sum);
  for (int i = 0; i < W; ++i) rest += lanes[i];
  return rest == 0.f;
}

template <class E>
static void query_tile(const fv_forward_args& a, const fv_prepared& ready, float* buffer, int64_t b, int64_t h, int64_t i) {
  Scratch x = carve(a, buffer);
  const int64_t hkv = h / (a.heads / a.kv_heads), first = i * T;
  const E* q = (const E*)a.q + b * a.q_stride[0] + h * a.q_stride[1] + first * a.q_stride[2];
  const E* k = (const E*)a.k + b * a.k_stride[0] + hkv * a.k_stride[1];
  const E* v = (const E*)a.v + b * a.v_stride[0] + hkv * a.v_stride[1];
  const int queries = a.q_len - first < T ? (int)(a.q_len - first) : T;
  const int nv = (queries + W - 1) / W, v_vectors = (int)((a.v_dim + W - 1) / W);
  const int64_t v_dim = up(a.v_dim, 16);
  const int steps = (int)up(PAIRS ? (a.dim + 1) / 2 : a.dim, 4);
  const float factor = a.scale * LOG2E;
  alignas(64) float top[T], next[T], sum[T], alpha[T], ignored[T] = {};
  for (int r = 0; r < T; ++r) top[r] = NEG_INF, sum[r] = 0.f;
  for (int64_t n = 0; n < T * v_dim; ++n) x.o[n] = 0.f;
  pack_queries(a, q, queries, x.qt);

  fv_rows rows(a, b, h, i);
  for (int64_t at = rows.begin; at < rows.end;) {
    int count = 0;
    for (int r = 0; r < T; ++r) next[r] = top[r];
    for (; count < STEP && at < rows.end; ++at, ++count) {
      Tile& tile = x.tiles[count];
      uint64_t made[T];
      tile.by_query = rows.bitmap(at, made);
      tile.partial = tile.by_query != nullptr;
      open_tile(a, ready, k, v, b * a.kv_heads + hkv, rows.tile(at), count, x, tile);
      if (tile.partial) {
        transpose_bits(tile.by_query, tile.by_key);
        if (tile.by_query == made) {  // causal: the words live only in this scope
          for (int r = 0; r < T; ++r) rows.words[count][r] = made[r];
          tile.by_query = rows.words[count];
        }
      }
      if (a.softcap == 0.f) {
        score_tile(x.qt, tile, steps, nv, x.s + count * T * T, next, factor);
      } else {  // the running maximum belongs after the cap
        score_tile(x.qt, tile, steps, nv, x.s + count * T * T, ignored, PAIRS ? 1.f : factor);
        softcap_pass(tile, nv, x.s + count * T * T, next, a.scale, a.softcap);
      }
    }
    for (int v = 0; v < nv; ++v) {  // rows that have seen nothing keep a reference of 0, so that no -inf - -inf arises
      Vec m = load(next + v * W), safe = select_eq(m, set1(NEG_INF), set1(0.f), m);
      Vec al = exp2v(sub(load(top + v * W), safe));
      store(alpha + v * W, al);
      store(sum + v * W, mul(load(sum + v * W), al));
      store(top + v * W, m);
      store(next + v * W, safe);
    }
    for (int n = 0; n < count; ++n) softmax_pass(x.tiles[n], nv, x.s + n * T * T, next, sum);
    // masked pairs must not meet NaN or Inf values: such tiles are taken out and added pair by pair
    int kept = 0;
    bool broken[STEP];
    for (int n = 0; n < count; ++n) {
      const E* vt = v + rows.tile(at - count + n) * T * a.v_stride[2];
      broken[n] = x.tiles[n].partial && !all_finite(vt, a.v_stride[2], x.tiles[n].keys, a.v_dim);
      kept += !broken[n];
    }
    if (kept == count) {
      value_pass(x.o, v_dim, alpha, x.tiles, count, x.s, queries, v_vectors);
      continue;
    }
    for (int r = 0; r < queries; ++r)
      for (int64_t d = 0; d < v_dim; ++d) x.o[r * v_dim + d] *= alpha[r];
    for (int r = 0; r < T; ++r) alpha[r] = 1.f;
    for (int n = 0; n < count; ++n) {
      const Tile& tile = x.tiles[n];
      if (!broken[n]) {
        value_pass(x.o, v_dim, alpha, x.tiles + n, 1, x.s + n * T * T, queries, v_vectors);
        continue;
      }
      const E* vt = v + rows.tile(at - count + n) * T * a.v_stride[2];
      for (int c = 0; c < tile.keys; ++c)
        for (int r = 0; r < queries; ++r)
          if (tile.by_key[c] >> r & 1) {
            const float* cell = x.s + n * T * T + (PAIRS ? c >> 1 : c) * T + r;
            const float p = PAIRS ? from_bf16(((const uint16_t*)(const void*)cell)[c & 1]) : *cell;
            for (int64_t d = 0; d < a.v_dim; ++d) x.o[r * v_dim + d] += p * as_float(vt + c * a.v_stride[2] + d);
          }
    }
  }

  E* out = (E*)a.out + b * a.out_stride[0] + h * a.out_stride[1] + first * a.out_stride[2];
  float* lse = a.lse + (b * a.heads + h) * a.q_len + first;
  for (int r = 0; r < queries; ++r) {
    float m = top[r], total = sum[r];
    if (a.sinks) {  // one more logit, with no value
      float sink = a.sinks[h] * LOG2E, high = sink > m ? sink : m;
      if (m == NEG_INF && sink == NEG_INF) high = 0.f;
      float keep = m == NEG_INF ? 0.f : __builtin_exp2f(m - high);
      total = total * keep + __builtin_exp2f(sink - high);
      for (int64_t d = 0; d < a.v_dim; ++d) x.o[r * v_dim + d] *= keep;
      m = high;
    }
    const bool blank = total == 0.f;
    const float inverse = blank ? 0.f : 1.f / total;
    lse[r] = blank ? NEG_INF : (m + __builtin_log2f(total)) * LN2;
    write_row(x.o + r * v_dim, inverse, (int)a.v_dim, blank, out + r * a.out_stride[2]);
  }
}

static void run_tile(const fv_forward_args& a, const fv_prepared& ready, float* buffer, int64_t b, int64_t h, int64_t i) {
#if FV_PAIRS  // float32 requests never come here
  query_tile<bf16>(a, ready, buffer, b, h, i);
#else
  if (a.dtype == FV_F32)
    query_tile<float>(a, ready, buffer, b, h, i);
  else
    query_tile<bf16>(a, ready, buffer, b, h, i);
#endif
}

static void prepare_tile(const fv_forward_args& a, const fv_prepared& ready, int64_t b, int64_t hkv, int64_t j) {
  if (a.dtype == FV_F32)
    prepare<float>(a, ready, b, hkv, j);
  else
    prepare<bf16>(a, ready, b, hkv, j);
}

static void tile_floats(const fv_forward_args& a, int64_t* k, int64_t* v) {
  const bool f32 = a.dtype == FV_F32;
  *k = (f32 ? keys_in_place<float>(a) : keys_in_place<bf16>(a)) ? 0 : T * up(a.dim, 16) / (PAIRS ? 2 : 1);
  *v = (f32 ? values_in_place<float>(a) : values_in_place<bf16>(a)) ? 0 : T * up(a.v_dim, 16) / (PAIRS ? 2 : 1);
}
