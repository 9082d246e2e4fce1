// The gradients of the queries that share one kv head, for a range of query tiles; keys and values by their tiles.
//
// With P the weights, dO the gradient of the result and delta = rowsum(dO . O) - dlse:
//   S^T = K Q^T, dP^T = V dO^T          score_tile, twice
//   P = 2^(S - lse), dS = P (dP - delta)  gradient_pass
//   dV += P^T dO, dK += dS^T Q          outer_pass, over the query tiles of a block
//   dQ += dS K                          value_pass, over the key tiles of a step
// Five products, each logit recomputed once. dQ of a block stays at hand, dK and dV of the kv head add up in `sums`, in
// a fixed order: nothing is shared between tasks. The scale joins dQ here and dK when its sums are written.
#pragma once

enum { BACK_STEP = FV_BACK_STEP, BACK_ROWS = FV_BACK_ROWS };

struct QueryTile {  // one query tile of a block
  Rows rows;
  Logits logits;
  alignas(64) float warm[T];  // gradient of the temperature
  int queries, nv;
  bool finite;      // no NaN or Inf in its rows of q and dout
  int64_t i;
  int64_t at, end;  // position in its row of key tiles
};

struct Block : QueryTile {
  float *qt, *dot;  // Q^T, dO^T
  float *q, *dout;  // panels
  float *dq;        // rows of up(dim, 16)
  float *s, *dp;    // BACK_STEP tiles each
  Tile tiles[BACK_STEP];
  uint64_t words[BACK_STEP][T];
  bool present[BACK_STEP], broken[BACK_STEP];
};

struct BackScratch {
  Block* blocks;
  float *k, *v, *extra, *ones;
};

// With base null only counts the floats.
static BackScratch carve_backward(const fv_args& a, float* base, int64_t* floats) {
  const int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* here = base ? base + used : nullptr;
    used += up(n, 16);
    return here;
  };
  BackScratch x;
  x.blocks = (Block*)take(BACK_ROWS * (int64_t)sizeof(Block) / 4);
  x.k = take(BACK_STEP * T * dim);
  x.v = take(BACK_STEP * T * v_dim);
  x.extra = take(T * T);
  x.ones = take(T);
  for (int u = 0; u < BACK_ROWS; ++u) {
    Block ignored, &y = base ? x.blocks[u] : ignored;
    y.qt = take(T * dim);
    y.dot = take(T * v_dim);
    y.q = take(T * panels_of(a.dim) * PANEL);
    y.dout = take(T * panels_of(a.v_dim) * PANEL);
    y.dq = take(T * dim);
    y.s = take(BACK_STEP * T * T);
    y.dp = take(BACK_STEP * T * T);
  }
  if (floats) *floats = used;
  return x;
}

// [panel][query][PANEL], zeros beyond dim and beyond the last query.
template <class E>
static void copy_panels(const E* from, int64_t stride, int queries, int64_t dim, float* to) {
  for (int64_t p = 0; p < panels_of(dim); ++p, to += T * PANEL)
    for (int r = 0; r < T; ++r) {
      const E* x = from + r * stride + p * PANEL;
      float* y = to + r * PANEL;
      const int64_t left = r < queries ? dim - p * PANEL : 0;
      int64_t d = 0;
      for (; d + W <= left && d < PANEL; d += W) store(y + d, widen(x + d));
      for (; d < left && d < PANEL; ++d) y[d] = as_float(x + d);
      for (; d < PANEL; ++d) y[d] = 0.f;
    }
}

// Where the rows of one query tile begin, in any tensor of queries.
template <class E>
FV_INLINE const E* rows_of(const void* tensor, const int64_t* stride, int64_t b, int64_t h, int64_t i) {
  return (const E*)tensor + b * stride[0] + h * stride[1] + i * T * stride[2];
}

template <class E>
static void open_query_tile(const fv_args& a, int64_t b, int64_t h, int64_t i, QueryTile& x) {
  const int64_t first = i * T, row = (b * a.heads + h) * a.q_len + first;
  const E* q = rows_of<E>(a.q, a.q_stride, b, h, i);
  const E* out = rows_of<E>(a.out, a.out_stride, b, h, i);
  const E* dout = rows_of<E>(a.dout, a.dout_stride, b, h, i);
  x.i = i;
  x.queries = a.q_len - first < T ? (int)(a.q_len - first) : T;
  x.nv = (x.queries + W - 1) / W;
  open_logits(a, b, h, i, x.queries, x.logits);
  if (a.dropout > 0.f) x.logits.plain = false;
  x.finite = all_finite(q, a.q_stride[2], x.queries, a.dim) && all_finite(dout, a.dout_stride[2], x.queries, a.v_dim);
  for (int r = 0; r < T; ++r) x.warm[r] = x.rows.lse[r] = x.rows.delta[r] = 0.f;
  if (a.normalizer == FV_SOFTMAX)
    for (int r = 0; r < x.queries; ++r) {
      const float lse = a.lse[row + r];
      float delta = a.dlse ? -a.dlse[row + r] : 0.f;
      if (lse == NEG_INF)
        delta = 0.f;  // saw nothing: its gradient is 0, whatever came back for it
      else
        delta += dot_rows(dout + r * a.dout_stride[2], out + r * a.out_stride[2], a.v_dim);
      x.rows.lse[r] = lse == NEG_INF ? 0.f : lse * LOG2E;
      x.rows.delta[r] = delta;
      a.delta[row + r] = delta;
    }
  fv_rows rows(a, b, h, i);
  x.at = rows.begin;
  x.end = rows.end;
}

template <class E>
static void open_block(const fv_args& a, int64_t b, int64_t h, int64_t i, Block& x) {
  const E* q = rows_of<E>(a.q, a.q_stride, b, h, i);
  const E* dout = rows_of<E>(a.dout, a.dout_stride, b, h, i);
  open_query_tile<E>(a, b, h, i, x);
  pack_queries(q, a.q_stride[2], a.dim, x.queries, x.logits.plain ? a.scale * LOG2E : 1.f, x.qt);
  pack_queries(dout, a.dout_stride[2], a.v_dim, x.queries, 1.f, x.dot);
  copy_panels(q, a.q_stride[2], x.queries, a.dim, x.q);
  copy_panels(dout, a.dout_stride[2], x.queries, a.v_dim, x.dout);
  for (int64_t n = 0; n < T * up(a.dim, 16); ++n) x.dq[n] = 0.f;
}

// Gradients of the biases from dS[key][query] of one tile.
static void add_extra_gradients(const fv_args& a, const fv_sums& sums, const QueryTile& x, const Tile& tile, int64_t b,
                                int64_t h, int64_t g, int64_t j, const float* ds) {
  if (a.dbias) {
    float* to = a.dbias + b * a.dbias_stride[0] + h * a.dbias_stride[1] + x.i * T * a.dbias_stride[2] + j * T * a.dbias_stride[3];
    for (int r = 0; r < x.queries; ++r)
      for (int c = 0; c < tile.keys; ++c) to[r * a.dbias_stride[2] + c * a.dbias_stride[3]] += ds[c * T + r];
  }
  if (a.dbias_query) {
    float* to = a.dbias_query + (b * a.heads + h) * a.q_len + x.i * T;
    for (int c = 0; c < tile.keys; ++c)
      for (int r = 0; r < x.queries; ++r) to[r] += ds[c * T + r];
  }
  if (sums.key_bias) {
    float* to = sums.key_bias + g * a.k_len + j * T;
    for (int c = 0; c < tile.keys; ++c) {
      float total = 0.f;
      for (int r = 0; r < x.queries; ++r) total += ds[c * T + r];
      to[c] += total;
    }
  }
  if (sums.table)
    for (int c = 0; c < tile.keys; ++c) {
      float* to = sums.table + g * a.table_len - a.k_code[j * T + c];
      const float* from = ds + c * T;
      if (x.logits.ramp) {
        to += x.logits.q_code[0];
        for (int r = 0; r < T; r += W) store(to + r, add(load(to + r), load(from + r)));
      } else {
        for (int r = 0; r < x.queries; ++r) to[x.logits.q_code[r]] += from[r];
      }
    }
}

// A tile with masked pairs where a row is not finite: pair by pair, so that 0 * NaN never arises.
template <class E>
static void add_pairs(const fv_args& a, const fv_sums& sums, Block& x, int n, int64_t b, int64_t h, int64_t hkv, int64_t j) {
  const int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  const E* q = (const E*)a.q + b * a.q_stride[0] + h * a.q_stride[1] + x.i * T * a.q_stride[2];
  const E* dout = (const E*)a.dout + b * a.dout_stride[0] + h * a.dout_stride[1] + x.i * T * a.dout_stride[2];
  const E* k = (const E*)a.k + b * a.k_stride[0] + hkv * a.k_stride[1] + j * T * a.k_stride[2];
  const Tile& tile = x.tiles[n];
  for (int c = 0; c < tile.keys; ++c)
    for (int r = 0; r < x.queries; ++r) {
      if (!(tile.by_key[c] >> r & 1)) continue;
      const float p = x.s[n * T * T + c * T + r], ds = x.dp[n * T * T + c * T + r];
      float *dk = sums.dk + (j * T + c) * dim, *dv = sums.dv + (j * T + c) * v_dim;
      for (int64_t d = 0; d < a.v_dim; ++d) dv[d] += p * as_float(dout + r * a.dout_stride[2] + d);
      for (int64_t d = 0; d < a.dim; ++d) {
        dk[d] += ds * as_float(q + r * a.q_stride[2] + d);
        x.dq[r * dim + d] += ds * as_float(k + c * a.k_stride[2] + d);
      }
    }
}

// Up to BACK_ROWS query tiles of one head against all their key tiles.
template <class E>
static void backward_block(const fv_args& a, const fv_prepared& ready, BackScratch& x, const fv_sums& sums, int64_t b,
                           int64_t hkv, int64_t g, int64_t i, int count) {
  const int64_t h = hkv * (a.heads / a.kv_heads) + g, bh = b * a.kv_heads + hkv;
  const int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  const int d_steps = (int)up(a.dim, 4), v_steps = (int)up(a.v_dim, 4);
  const E* k = (const E*)a.k + b * a.k_stride[0] + hkv * a.k_stride[1];
  const E* v = (const E*)a.v + b * a.v_stride[0] + hkv * a.v_stride[1];
  for (int u = 0; u < count; ++u) open_block<E>(a, b, h, i + u, x.blocks[u]);

  for (;;) {
    int64_t js[BACK_STEP];
    int steps = 0;
    for (; steps < BACK_STEP; ++steps) {  // the next key tile that any of the rows lists
      int64_t j = -1;
      for (int u = 0; u < count; ++u) {
        Block& y = x.blocks[u];
        if (y.at == y.end) continue;
        const int64_t mine = a.kind == FV_LAYOUT ? a.tile_idx[y.at] : y.at;
        if (j < 0 || mine < j) j = mine;
      }
      if (j < 0) break;
      js[steps] = j;
      const Tile* first = nullptr;
      int checked = -1;  // are the keys and values of this tile finite?
      for (int u = 0; u < count; ++u) {
        Block& y = x.blocks[u];
        Tile& tile = y.tiles[steps];
        y.present[steps] = y.at != y.end && (a.kind == FV_LAYOUT ? a.tile_idx[y.at] : y.at) == j;
        if (!y.present[steps]) continue;
        const fv_rows row(a, b, h, y.i);
        tile.by_query = row.bitmap(y.at++, y.words[steps]);
        tile.partial = tile.by_query != nullptr;
        if (tile.partial) transpose_bits(tile.by_query, tile.by_key);
        if (first) {
          tile.k = first->k, tile.k_stride = first->k_stride, tile.v = first->v, tile.v_stride = first->v_stride;
          tile.keys = first->keys;
        } else {
          open_tile(a, ready, true, k, v, bh, j, x.k + steps * T * dim, x.v + steps * T * v_dim, tile);
          first = &tile;
        }
        if (tile.partial && checked < 0)
          checked = all_finite(k + j * T * a.k_stride[2], a.k_stride[2], tile.keys, a.dim) &&
                    all_finite(v + j * T * a.v_stride[2], a.v_stride[2], tile.keys, a.v_dim);
        y.broken[steps] = tile.partial && !(checked == 1 && y.finite);

        float *s = y.s + steps * T * T, *dp = y.dp + steps * T * T;
        score_tile<false>(y.qt, tile, tile.k, tile.k_stride, d_steps, y.nv, s, nullptr, 1.f);
        score_tile<false>(y.dot, tile, tile.v, tile.v_stride, v_steps, y.nv, dp, nullptr, 1.f);
        if (y.logits.plain) {
          gradient_pass(tile, y.rows, y.nv, s, dp);
        } else {
          uint64_t keep[T];
          if (y.logits.drops) keep_bits(a.seed, y.logits.threshold, y.i * T, j * T, (uint32_t)(b * a.heads + h), keep);
          if (y.logits.extra) extra_tile(a, y.logits, b, h, y.i, j, y.queries, tile.keys, x.extra);
          gradient_pass(y.logits, tile, y.rows, y.nv, s, dp, x.extra, keep, y.warm);
          add_extra_gradients(a, sums, y, tile, b, h, g, j, x.extra);
        }
      }
      Factor weights[BACK_ROWS], changes[BACK_ROWS];
      int queries[BACK_ROWS], used = 0;
      for (int u = 0; u < count; ++u) {
        Block& y = x.blocks[u];
        if (!y.present[steps] || y.broken[steps]) continue;
        weights[used] = Factor{y.s + steps * T * T, &y.tiles[steps], y.dout, 0};
        changes[used] = Factor{y.dp + steps * T * T, &y.tiles[steps], y.q, 0};
        queries[used++] = y.queries;
      }
      if (!used) continue;
      outer_pass(sums.dv + j * T * v_dim, v_dim, weights, queries, used, a.v_dim);
      outer_pass(sums.dk + j * T * dim, dim, changes, queries, used, a.dim);
    }
    if (!steps) break;
    for (int u = 0; u < count; ++u) {
      Block& y = x.blocks[u];
      Factor changes[BACK_STEP];
      int used = 0;
      for (int n = 0; n < steps; ++n) {
        if (!y.present[n]) continue;
        if (y.broken[n])
          add_pairs<E>(a, sums, y, n, b, h, hkv, js[n]);
        else
          changes[used++] = Factor{y.dp + n * T * T, &y.tiles[n], y.tiles[n].k, y.tiles[n].k_stride};
      }
      if (used) value_pass(y.dq, dim, x.ones, changes, used, y.queries, (int)((a.dim + W - 1) / W));
    }
  }
  for (int u = 0; u < count; ++u) {
    Block& y = x.blocks[u];
    const int64_t row = (b * a.heads + h) * a.q_len + y.i * T;
    for (int r = 0; r < y.queries; ++r) {
      write_row(y.dq + r * dim, a.scale, (int)a.dim, false, (E*)a.dq + (row + r) * a.dim);
      if (a.dtemperature) a.dtemperature[row + r] = y.warm[r];
    }
  }
}

static void run_backward(const fv_args& a, const fv_prepared& ready, float* buffer, const fv_sums& sums, int64_t b,
                         int64_t hkv, int64_t first, int64_t last) {
  BackScratch x = carve_backward(a, buffer, nullptr);
  for (int r = 0; r < T; ++r) x.ones[r] = 1.f;
  for (int64_t i = first; i < last; i += BACK_ROWS) {
    const int count = last - i < BACK_ROWS ? (int)(last - i) : BACK_ROWS;
    for (int64_t g = 0; g < a.heads / a.kv_heads; ++g)
      if (a.dtype == FV_F32)
        backward_block<float>(a, ready, x, sums, b, hkv, g, i, count);
      else
        backward_block<bf16>(a, ready, x, sums, b, hkv, g, i, count);
  }
}

static int64_t backward_floats(const fv_args& a) {
  int64_t floats;
  carve_backward(a, nullptr, &floats);
  return floats;
}

// Adds up what the tasks found for key tile j, in their order, and writes dk, dv (and the sums per key).
template <class E>
static void write_rows(const fv_args& a, const fv_sums* sums, int64_t tasks, int64_t b, int64_t hkv, int64_t j) {
  const int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16), bh = b * a.kv_heads + hkv, groups = a.heads / a.kv_heads;
  const int64_t last = (j + 1) * T < a.k_len ? (j + 1) * T : a.k_len;
  alignas(64) float dk[FV_MAX_DIM], dv[FV_MAX_DIM];
  for (int64_t c = j * T; c < last; ++c) {
    for (int64_t d = 0; d < dim; ++d) dk[d] = 0.f;
    for (int64_t d = 0; d < v_dim; ++d) dv[d] = 0.f;
    for (int64_t n = 0; n < tasks; ++n) {
      if (j < sums[n].first || j >= sums[n].last) continue;
      for (int64_t d = 0; d < dim; d += W) store(dk + d, add(load(dk + d), load(sums[n].dk + c * dim + d)));
      for (int64_t d = 0; d < v_dim; d += W) store(dv + d, add(load(dv + d), load(sums[n].dv + c * v_dim + d)));
    }
    write_row(dk, a.scale, (int)a.dim, false, (E*)a.dk + (bh * a.k_len + c) * a.dim);
    write_row(dv, 1.f, (int)a.v_dim, false, (E*)a.dv + (bh * a.k_len + c) * a.v_dim);
    for (int64_t g = 0; a.dbias_key && g < groups; ++g) {
      float total = 0.f;
      for (int64_t n = 0; n < tasks; ++n) total += sums[n].key_bias[g * a.k_len + c];
      a.dbias_key[(b * a.heads + hkv * groups + g) * a.k_len + c] = total;
    }
  }
}

static void write_keys(const fv_args& a, const fv_sums* sums, int64_t tasks, int64_t b, int64_t hkv, int64_t j) {
  if (a.dtype == FV_F32)
    write_rows<float>(a, sums, tasks, b, hkv, j);
  else
    write_rows<bf16>(a, sums, tasks, b, hkv, j);
}
