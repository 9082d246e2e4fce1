// The gradients of the queries that share one kv head on AMX: the five products of backward.h on bfloat16.
//
//   S^T = K Q^T, dP^T = V dO^T    A = rows of K, V;   B = Q, dO as pairs of dims
//   P = 2^(S - lse), dS = P (dP - delta)               vectors over queries, rounded to bfloat16
//   dQ^T += K^T dS                A = K^T;            B = dS as pairs of keys
//   dV += P^T dO, dK += dS^T Q    A = P^T, dS^T rows; B = dO, Q as pairs of queries
//
// A block of BACK_ROWS query tiles visits each of its key tiles once, so that a row of dV and dK is fetched once for up
// to 256 queries. Sums are float32 and lie as in backward.h.
#pragma once

enum { MOST_CHUNKS = 2 * BACK_ROWS > FV_MAX_DIM / 32 ? 2 * BACK_ROWS : FV_MAX_DIM / 32 };

// C[16 R][16 C] += (FRESH: =) the sum over `count` chunks of 32. Strides and offsets in bytes.
template <bool FRESH, int R, int C>
FV_INLINE void product_block(char* c, int64_t c_stride, const Chunk* chunks, int count, int64_t a, int64_t b, int64_t a_stride,
                             int64_t b_stride) {
  char* low = c + 16 * c_stride;
  if (FRESH) {
    FV_TILE_ZERO(0);
    if (C > 1) FV_TILE_ZERO(1);
    if (R > 1) FV_TILE_ZERO(2);
    if (R > 1 && C > 1) FV_TILE_ZERO(3);
  } else {
    FV_TILE_LOAD(0, c, c_stride);
    if (C > 1) FV_TILE_LOAD(1, c + 64, c_stride);
    if (R > 1) FV_TILE_LOAD(2, low, c_stride);
    if (R > 1 && C > 1) FV_TILE_LOAD(3, low + 64, c_stride);
  }
  for (int n = 0; n < count; ++n) {
    const char *x = chunks[n].a + a, *y = chunks[n].b + b;
    FV_TILE_LOAD(4, x, a_stride);
    FV_TILE_LOAD(6, y, b_stride);
    FV_TILE_DOT(0, 4, 6);
    if (C > 1) {
      FV_TILE_LOAD(7, y + 64, b_stride);
      FV_TILE_DOT(1, 4, 7);
    }
    if (R > 1) {
      FV_TILE_LOAD(5, x + 16 * a_stride, a_stride);
      FV_TILE_DOT(2, 5, 6);
      if (C > 1) FV_TILE_DOT(3, 5, 7);
    }
  }
  FV_TILE_STORE(0, c, c_stride);
  if (C > 1) FV_TILE_STORE(1, c + 64, c_stride);
  if (R > 1) FV_TILE_STORE(2, low, c_stride);
  if (R > 1 && C > 1) FV_TILE_STORE(3, low + 64, c_stride);
}

template <bool FRESH>
FV_INLINE void product_32(int rows, int columns, char* c, int64_t c_stride, const Chunk* chunks, int count, int64_t a,
                          int64_t b, int64_t a_stride, int64_t b_stride) {
  if (rows > 1 && columns > 1)
    product_block<FRESH, 2, 2>(c, c_stride, chunks, count, a, b, a_stride, b_stride);
  else if (rows > 1)
    product_block<FRESH, 2, 1>(c, c_stride, chunks, count, a, b, a_stride, b_stride);
  else if (columns > 1)
    product_block<FRESH, 1, 2>(c, c_stride, chunks, count, a, b, a_stride, b_stride);
  else
    product_block<FRESH, 1, 1>(c, c_stride, chunks, count, a, b, a_stride, b_stride);
}

struct TileBlock : QueryTile {
  uint32_t *q_dims, *g_dims;  // q and dout as pairs of dims
  uint32_t *q_rows, *g_rows;  // and as pairs of queries, in the order of `order_of`
  float* dq;                  // dQ^T [up(dim, 32)][64]
  bf16 *p, *ds;               // P^T, dS^T [64 keys][64 queries]
  Piece piece;
  uint64_t words[T];
  bool present, broken;
};

struct TileScratch {
  TileBlock* blocks;
  float *s, *dp, *extra, *turned;
  uint32_t* pairs;  // dS as pairs of keys [32][64]
  bf16 *k, *kt, *v;
};

static TileScratch carve_tiles(const fv_args& a, float* base, int64_t* floats) {
  const int64_t dim = up(a.dim, 32), v_dim = up(a.v_dim, 32);
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* here = base ? base + used : nullptr;
    used += up(n, 16);
    return here;
  };
  const auto take_bf16 = [&](int64_t n) { return (bf16*)(void*)take(n / 2); };
  TileScratch x;
  x.blocks = (TileBlock*)(void*)take(BACK_ROWS * (int64_t)sizeof(TileBlock) / 4);
  x.s = take(T * T);
  x.dp = take(T * T);
  x.extra = take(T * T);
  x.turned = take(T * dim);
  x.pairs = (uint32_t*)(void*)take(T * T / 2);
  x.k = take_bf16(T * dim);
  x.kt = take_bf16(T * dim);
  x.v = take_bf16(T * v_dim);
  for (int u = 0; u < BACK_ROWS; ++u) {
    TileBlock ignored, &y = base ? x.blocks[u] : ignored;
    y.q_dims = (uint32_t*)(void*)take(T * dim / 2);
    y.g_dims = (uint32_t*)(void*)take(T * v_dim / 2);
    y.q_rows = (uint32_t*)(void*)take(T * dim / 2);
    y.g_rows = (uint32_t*)(void*)take(T * v_dim / 2);
    y.dq = take(T * dim);
    y.p = take_bf16(T * T);
    y.ds = take_bf16(T * T);
  }
  if (floats) *floats = used;
  return x;
}

// The order in which 32 queries stand in a row of P^T: that in which two vectors of 16 are packed into one of 32.
FV_INLINE int order_of(int n) { return n / 8 * 4 + n % 4 + (n % 8 >= 4 ? 16 : 0); }

// B of a sum over queries: [32][up(dim, 16)] of pairs of rows, in that order; zeros beyond the last query.
static void pack_queries_in_order(const bf16* from, int64_t stride, int queries, int64_t dim, uint32_t* to) {
  const int64_t wide = up(dim, 16);
  for (int n = 0; n < T / 2; ++n) {
    const int r = n / 16 * 32 + order_of(n % 16 * 2);  // and r + 1
    for (int64_t d = 0; d < wide; d += 16) {
      const int64_t left = dim - d < 16 ? dim - d : 16;
      const __m512i x = load_row(from + r * stride + d, r < queries, left);
      const __m512i y = load_row(from + (r + 1) * stride + d, r + 1 < queries, left);
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x));
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(y));
      _mm512_storeu_si512(to + n * wide + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// S^T of one tile in float32, 32 x 32 at a time; blocks in which nothing counts stay as they are.
static void score_tiles(const bf16* rows, const uint32_t* packed, int64_t dim, const Piece& piece, float* s) {
  Chunk chunks[MOST_CHUNKS];
  const int64_t stride = up(dim, 32) * 2;
  const int count = (int)(up(dim, 32) / 32);
  for (int n = 0; n < count; ++n) chunks[n] = Chunk{(const char*)rows + n * 64, (const char*)(packed + n * 16 * T)};
  FV_FENCE();
  for (int g = 0; g < 4; g += 2)
    for (int v = 0; v < 4; v += 2)
      if ((piece.seen[g] | piece.seen[g + 1]) >> v & 3)
        product_32<true>(2, 2, (char*)(s + 16 * g * T + 16 * v), T * 4, chunks, count, 16 * g * stride, 64 * v, stride, T * 4);
  FV_FENCE();
}

FV_INLINE __m512i pack_order(__m512i low, __m512i high) {  // rounded halves of two vectors, in the order of order_of
  return _mm512_packus_epi32(_mm512_srli_epi32(low, 16), _mm512_srli_epi32(high, 16));
}

// Stores two keys of P and dS for 32 queries in the three forms the products read.
FV_INLINE void store_weights(const TileBlock& y, uint32_t* pairs, int c, int v, const Vec (&p)[2][2], const Vec (&ds)[2][2]) {
  __m512i d[2][2];
  FV_UNROLL for (int n = 0; n < 2; ++n) {
    FV_UNROLL for (int h = 0; h < 2; ++h) d[n][h] = half_up(ds[n][h].x);
    _mm512_storeu_si512(y.p + (c + n) * T + 16 * v, pack_order(half_up(p[n][0].x), half_up(p[n][1].x)));
    _mm512_storeu_si512(y.ds + (c + n) * T + 16 * v, pack_order(d[n][0], d[n][1]));
  }
  FV_UNROLL for (int h = 0; h < 2; ++h)
    _mm512_storeu_si512(pairs + c / 2 * T + 16 * (v + h), join_halves(d[0][h], d[1][h]));
}

// Scale only: raw products -> weights and their gradients, as bfloat16.
template <bool MASKED>
static __attribute__((noinline)) void tile_gradient_pass(const TileBlock& y, float factor, const float* s, const float* dp,
                                                         uint32_t* pairs) {
  const Vec scale = set1(factor);
  for (int v = 0; v < 4; v += 2) {
    Vec lse[2], delta[2];
    FV_UNROLL for (int h = 0; h < 2; ++h) {
      lse[h] = load(y.rows.lse + (v + h) * W);
      delta[h] = load(y.rows.delta + (v + h) * W);
    }
    for (int c = 0; c < T; c += 2) {
      Vec p[2][2], ds[2][2];
      if (MASKED && !(y.piece.seen[c / 16] >> v & 3)) {
        FV_UNROLL for (int n = 0; n < 2; ++n) FV_UNROLL for (int h = 0; h < 2; ++h) p[n][h] = ds[n][h] = zero();
      } else {
        FV_UNROLL for (int n = 0; n < 2; ++n) FV_UNROLL for (int h = 0; h < 2; ++h) {
          const int64_t at = (c + n) * T + (v + h) * W;
          Vec x = {exp2_fine(_mm512_fmsub_ps(load(s + at).x, scale.x, lse[h].x))};
          Vec change = mul(x, sub(load(dp + at), delta[h]));
          if (MASKED) {
            const uint64_t bits = y.piece.tile.by_key[c + n] >> ((v + h) * W);
            x = select_bits(bits, x, zero());
            change = select_bits(bits, change, zero());
          }
          p[n][h] = x;
          ds[n][h] = change;
        }
      }
      store_weights(y, pairs, c, v, p, ds);
    }
  }
}

// P and dS as floats -> bfloat16; what lies beyond the keys or the vectors of queries is 0.
static void round_pass(const TileBlock& y, const float* s, const float* dp, uint32_t* pairs) {
  for (int v = 0; v < 4; v += 2)
    for (int c = 0; c < T; c += 2) {
      Vec p[2][2], ds[2][2];
      FV_UNROLL for (int n = 0; n < 2; ++n) FV_UNROLL for (int h = 0; h < 2; ++h) {
        const int64_t at = (c + n) * T + (v + h) * W;
        const bool there = c + n < y.piece.tile.keys && v + h < y.nv;
        p[n][h] = there ? load(s + at) : zero();
        ds[n][h] = there ? load(dp + at) : zero();
      }
      store_weights(y, pairs, c, v, p, ds);
    }
}

// A tile with masked pairs where a row is not finite: pair by pair, so that 0 * NaN never arises.
static void add_tile_pairs(const fv_args& a, const fv_sums& sums, TileBlock& y, const float* s, const float* dp, int64_t b,
                           int64_t h, int64_t hkv, int64_t j) {
  const int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  const bf16* q = rows_of<bf16>(a.q, a.q_stride, b, h, y.i);
  const bf16* dout = rows_of<bf16>(a.dout, a.dout_stride, b, h, y.i);
  const bf16* k = rows_of<bf16>(a.k, a.k_stride, b, hkv, j);
  for (int c = 0; c < y.piece.tile.keys; ++c)
    for (int r = 0; r < y.queries; ++r) {
      if (!(y.piece.tile.by_key[c] >> r & 1)) continue;
      const float p = s[c * T + r], ds = dp[c * T + r];
      float *dk = sums.dk + (j * T + c) * dim, *dv = sums.dv + (j * T + c) * v_dim;
      for (int64_t d = 0; d < a.v_dim; ++d) dv[d] += p * from_bf16(dout[r * a.dout_stride[2] + d]);
      for (int64_t d = 0; d < a.dim; ++d) {
        dk[d] += ds * from_bf16(q[r * a.q_stride[2] + d]);
        y.dq[d * T + r] += ds * from_bf16(k[c * a.k_stride[2] + d]);
      }
    }
}

// sum[64 keys][dim] += the weights of the query tiles that see these keys times their rows.
static void outer_tiles(TileBlock* blocks, int count, bool changes, int64_t dim, float* sum) {
  const int64_t wide = up(dim, 16);
  FV_FENCE();
  for (int g = 0; g < 4; g += 2) {
    Chunk chunks[MOST_CHUNKS];
    int used = 0;
    for (int u = 0; u < count; ++u) {
      const TileBlock& y = blocks[u];
      if (!y.present || y.broken) continue;
      for (int n = 0; n < 2; ++n)
        if ((y.piece.seen[g] | y.piece.seen[g + 1]) >> (2 * n) & 3)
          chunks[used++] = Chunk{(const char*)((changes ? y.ds : y.p) + 16 * g * T + 32 * n),
                                 (const char*)((changes ? y.q_rows : y.g_rows) + n * 16 * wide)};
    }
    if (!used) continue;
    for (int64_t d = 0; d < wide; d += 32)
      product_32<false>(2, wide - d > 16 ? 2 : 1, (char*)(sum + 16 * g * wide + d), wide * 4, chunks, used, 0, d * 4, T * 2,
                        wide * 4);
  }
  FV_FENCE();
}

// Keys and values of one tile as the products read them: rows of up(dim, 32), and the keys turned over.
struct TileOperands {
  const bf16 *k, *kt, *v;
};

static void make_operands(const fv_args& a, int64_t b, int64_t hkv, int64_t j, bf16* k, bf16* kt, bf16* v) {
  const int keys = a.k_len - j * T < T ? (int)(a.k_len - j * T) : T;
  const bf16* from = rows_of<bf16>(a.k, a.k_stride, b, hkv, j);
  copy_rows(from, a.k_stride[2], keys, a.dim, k);
  transpose_rows(from, a.k_stride[2], keys, a.dim, kt);
  copy_rows(rows_of<bf16>(a.v, a.v_stride, b, hkv, j), a.v_stride[2], keys, a.v_dim, v);
}

static void back_tile_floats(const fv_args& a, int64_t* k, int64_t* v) {
  *k = T * up(a.dim, 32);        // rows, and turned over
  *v = T * up(a.v_dim, 32) / 2;  // rows
}

static void prepare_back(const fv_args& a, const fv_prepared& ready, int64_t b, int64_t hkv, int64_t j) {
  const int64_t at = (b * a.kv_heads + hkv - ready.first) * ((a.k_len + T - 1) / T) + j;
  bf16* k = (bf16*)(void*)(ready.k + at * ready.k_tile);
  make_operands(a, b, hkv, j, k, k + T * up(a.dim, 32), (bf16*)(void*)(ready.v + at * ready.v_tile));
}

// Up to BACK_ROWS query tiles of one head against all their key tiles.
static void backward_tiles(const fv_args& a, const fv_prepared& ready, TileScratch& x, const fv_sums& sums, int64_t b,
                           int64_t hkv, int64_t g, int64_t i, int count) {
  const int64_t h = hkv * (a.heads / a.kv_heads) + g, bh = b * a.kv_heads + hkv, tiles = (a.k_len + T - 1) / T;
  const int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  for (int u = 0; u < count; ++u) {
    TileBlock& y = x.blocks[u];
    const bf16* q = rows_of<bf16>(a.q, a.q_stride, b, h, i + u);
    const bf16* dout = rows_of<bf16>(a.dout, a.dout_stride, b, h, i + u);
    open_query_tile<bf16>(a, b, h, i + u, y);
    pack_dims(q, a.q_stride[2], y.queries, a.dim, 0, y.q_dims);
    pack_dims(dout, a.dout_stride[2], y.queries, a.v_dim, 0, y.g_dims);
    pack_queries_in_order(q, a.q_stride[2], y.queries, a.dim, y.q_rows);
    pack_queries_in_order(dout, a.dout_stride[2], y.queries, a.v_dim, y.g_rows);
    for (int64_t n = 0; n < T * up(a.dim, 32); ++n) y.dq[n] = 0.f;
  }
  for (;;) {
    int64_t j = -1;  // the next key tile that any of the rows lists
    for (int u = 0; u < count; ++u) {
      const TileBlock& y = x.blocks[u];
      if (y.at == y.end) continue;
      const int64_t mine = a.kind == FV_LAYOUT ? a.tile_idx[y.at] : y.at;
      if (j < 0 || mine < j) j = mine;
    }
    if (j < 0) break;
    const int keys = a.k_len - j * T < T ? (int)(a.k_len - j * T) : T;
    TileOperands it = {x.k, x.kt, x.v};
    if (ready.k) {
      const bf16* k = (const bf16*)(const void*)(ready.k + ((bh - ready.first) * tiles + j) * ready.k_tile);
      it = TileOperands{k, k + T * up(a.dim, 32), (const bf16*)(const void*)(ready.v + ((bh - ready.first) * tiles + j) * ready.v_tile)};
    } else {
      make_operands(a, b, hkv, j, x.k, x.kt, x.v);
    }
    int finite = -1;
    for (int u = 0; u < count; ++u) {
      TileBlock& y = x.blocks[u];
      y.present = y.at != y.end && (a.kind == FV_LAYOUT ? a.tile_idx[y.at] : y.at) == j;
      if (!y.present) continue;
      const fv_rows row(a, b, h, y.i);
      y.piece.tile.keys = keys;
      open_mask(row.bitmap(y.at++, y.words), y.piece);
      const Tile& tile = y.piece.tile;
      if (tile.partial && finite < 0)
        finite = all_finite(rows_of<bf16>(a.k, a.k_stride, b, hkv, j), a.k_stride[2], keys, a.dim) &&
                 all_finite(rows_of<bf16>(a.v, a.v_stride, b, hkv, j), a.v_stride[2], keys, a.v_dim);
      y.broken = tile.partial && !(finite == 1 && y.finite);
      score_tiles(it.k, y.q_dims, a.dim, y.piece, x.s);
      score_tiles(it.v, y.g_dims, a.v_dim, y.piece, x.dp);
      if (y.logits.plain && !y.broken) {
        if (y.piece.masked)
          tile_gradient_pass<true>(y, a.scale * LOG2E, x.s, x.dp, x.pairs);
        else
          tile_gradient_pass<false>(y, a.scale * LOG2E, x.s, x.dp, x.pairs);
      } else {
        uint64_t keep[T];
        if (y.logits.drops) keep_bits(a.seed, y.logits.threshold, y.i * T, j * T, (uint32_t)(b * a.heads + h), keep);
        if (y.logits.extra) extra_tile(a, y.logits, b, h, y.i, j, y.queries, keys, x.extra);
        gradient_pass(y.logits, tile, y.rows, y.nv, x.s, x.dp, x.extra, keep, y.warm);
        add_extra_gradients(a, sums, y, tile, b, h, g, j, x.extra);
        if (y.broken) {
          add_tile_pairs(a, sums, y, x.s, x.dp, b, h, hkv, j);
          continue;
        }
        round_pass(y, x.s, x.dp, x.pairs);
      }
      const Chunk chunks[2] = {{(const char*)it.kt, (const char*)x.pairs}, {(const char*)(it.kt + 32), (const char*)(x.pairs + 16 * T)}};
      FV_FENCE();
      for (int64_t d = 0; d < dim; d += 32)
        for (int v = 0; v < 4; v += 2)
          product_32<false>(dim - d > 16 ? 2 : 1, 2, (char*)(y.dq + d * T + 16 * v), T * 4, chunks, 2, d * T * 2, 64 * v, T * 2,
                            T * 4);
      FV_FENCE();
    }
    outer_tiles(x.blocks, count, false, a.v_dim, sums.dv + j * T * v_dim);
    outer_tiles(x.blocks, count, true, a.dim, sums.dk + j * T * dim);
  }
  for (int u = 0; u < count; ++u) {
    TileBlock& y = x.blocks[u];
    const int64_t row = (b * a.heads + h) * a.q_len + y.i * T;
    turn_over(y.dq, dim, x.turned);
    for (int r = 0; r < y.queries; ++r) {
      write_row(x.turned + r * dim, a.scale, (int)a.dim, false, (bf16*)a.dq + (row + r) * a.dim);
      if (a.dtemperature) a.dtemperature[row + r] = y.warm[r];
    }
  }
}

static void run_back(const fv_args& a, const fv_prepared& ready, float* buffer, const fv_sums& sums, int64_t b, int64_t hkv,
                     int64_t first, int64_t last) {
  const Registers registers;
  TileScratch x = carve_tiles(a, buffer, nullptr);
  for (int64_t i = first; i < last; i += BACK_ROWS)
    for (int64_t g = 0; g < a.heads / a.kv_heads; ++g)
      backward_tiles(a, ready, x, sums, b, hkv, g, i, last - i < BACK_ROWS ? (int)(last - i) : BACK_ROWS);
}
