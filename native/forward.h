// One query tile forward: an online softmax over its key tiles.
//
//   S^T = K Q^T                         score_tile
//   m' = max(m, S), P = 2^(S - m')      softmax_pass   (logit_pass before it where more than the scale acts)
//   O = O 2^(m - m') + P V              value_pass
#pragma once

struct Scratch {  // carved out of the caller's buffer, 64-byte aligned
  float *qt, *s, *o, *k, *v, *extra;
  Tile* tiles;
};

static int64_t state_floats(const fv_args& a) { return 2 * T + T * up(a.v_dim, 16); }

static int64_t forward_floats(const fv_args& a) {
  const int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  return T * dim + STEP * T * T + T * v_dim + STEP * T * dim + STEP * T * v_dim + T * T + 64 +
         up(STEP * sizeof(Tile), 64) / 4 + 16;
}

static Scratch carve(const fv_args& a, float* base) {
  const int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  Scratch x;
  x.qt = base;
  x.s = x.qt + T * dim;
  x.o = x.s + STEP * T * T;
  x.k = x.o + T * v_dim;
  x.v = x.k + STEP * T * dim;
  x.extra = x.v + STEP * T * v_dim;
  x.tiles = (Tile*)(x.extra + T * T + 64);
  return x;
}

// Running state of one query tile: the unnormalised result o, and per query the reference and the sum of the weights.
struct State {
  alignas(64) float top[T];
  alignas(64) float sum[T];
};

// Divides by the sums, adds the sink, writes out and lse.
template <class E>
static void finish(const fv_args& a, State& x, float* o, int queries, int64_t b, int64_t h, int64_t i) {
  const int64_t first = i * T, v_dim = up(a.v_dim, 16);
  const float grow = a.dropout > 0.f ? 1.f / (1.f - a.dropout) : 1.f;
  E* out = (E*)a.out + b * a.out_stride[0] + h * a.out_stride[1] + first * a.out_stride[2];
  if (a.normalizer != FV_SOFTMAX) {
    for (int r = 0; r < queries; ++r) write_row(o + r * v_dim, grow, (int)a.v_dim, false, out + r * a.out_stride[2]);
    return;
  }
  float* lse = a.lse + (b * a.heads + h) * a.q_len + first;
  for (int r = 0; r < queries; ++r) {
    float m = x.top[r], total = x.sum[r];
    if (a.sinks) {  // one more logit, with no value
      float sink = a.sinks[h] * LOG2E, high = sink > m ? sink : m;
      if (m == NEG_INF && sink == NEG_INF) high = 0.f;
      float keep = m == NEG_INF ? 0.f : __builtin_exp2f(m - high);
      total = total * keep + __builtin_exp2f(sink - high);
      for (int64_t d = 0; d < a.v_dim; ++d) o[r * v_dim + d] *= keep;
      m = high;
    }
    const bool blank = total == 0.f;
    const float inverse = blank ? 0.f : grow / total;
    lse[r] = blank ? NEG_INF : (m + __builtin_log2f(total)) * LN2;
    write_row(o + r * v_dim, inverse, (int)a.v_dim, blank, out + r * a.out_stride[2]);
  }
}

template <class E>
static void query_tile(const fv_args& a, const fv_prepared& ready, float* buffer, int64_t b, int64_t h, int64_t i,
                       const fv_part& part) {
  Scratch x = carve(a, buffer);
  const int64_t hkv = h / (a.heads / a.kv_heads), first = i * T;
  const E* q = (const E*)a.q + b * a.q_stride[0] + h * a.q_stride[1] + first * a.q_stride[2];
  const E* k = (const E*)a.k + b * a.k_stride[0] + hkv * a.k_stride[1];
  const E* v = (const E*)a.v + b * a.v_stride[0] + hkv * a.v_stride[1];
  const int queries = a.q_len - first < T ? (int)(a.q_len - first) : T;
  const int nv = (queries + W - 1) / W, v_vectors = (int)((a.v_dim + W - 1) / W);
  const int64_t dim = up(a.dim, 16), v_dim = up(a.v_dim, 16);
  const int steps = (int)up(PAIRS ? (a.dim + 1) / 2 : a.dim, 4);
  const float factor = a.scale * LOG2E;
  const bool softmax = a.normalizer == FV_SOFTMAX;
  State state;
  Logits logits;
  alignas(64) float next[T], alpha[T], ignored[T] = {};
  open_logits(a, b, h, i, queries, logits);
  for (int r = 0; r < T; ++r) state.top[r] = NEG_INF, state.sum[r] = 0.f;
  for (int64_t n = 0; n < T * v_dim; ++n) x.o[n] = 0.f;
  pack_queries(q, a.q_stride[2], a.dim, queries, logits.plain ? factor : 1.f, x.qt);

  fv_rows rows(a, b, h, i);
  const int64_t length = rows.end - rows.begin, end = rows.begin + length * (part.part + 1) / part.parts;
  for (int64_t at = rows.begin + length * part.part / part.parts; at < end;) {
    int count = 0;
    uint64_t made[STEP][T];
    for (int r = 0; r < T; ++r) next[r] = state.top[r];
    for (; count < STEP && at < end; ++at, ++count) {
      Tile& tile = x.tiles[count];
      float* s = x.s + count * T * T;
      tile.by_query = rows.bitmap(at, made[count]);
      tile.partial = tile.by_query != nullptr;
      open_tile(a, ready, false, k, v, b * a.kv_heads + hkv, rows.tile(at), x.k + count * T * dim, x.v + count * T * v_dim, tile);
      if (tile.partial) transpose_bits(tile.by_query, tile.by_key);
      if (logits.plain) {
        score_tile<true>(x.qt, tile, tile.k, tile.k_stride, steps, nv, s, next, factor);
        continue;
      }
      score_tile<true>(x.qt, tile, tile.k, tile.k_stride, steps, nv, s, ignored, 1.f);
      if (logits.extra) extra_tile(a, logits, b, h, i, rows.tile(at), queries, tile.keys, x.extra);
      if (softmax)
        logit_pass(logits, tile, nv, s, x.extra, next);
      else
        weight_pass(logits, tile, nv, s, x.extra);
    }
    if (softmax) {
      for (int v = 0; v < nv; ++v) {  // rows that have seen nothing keep a reference of 0, so that no -inf - -inf arises
        Vec m = load(next + v * W), safe = select_eq(m, set1(NEG_INF), set1(0.f), m);
        Vec al = exp2v(sub(load(state.top + v * W), safe));
        store(alpha + v * W, al);
        store(state.sum + v * W, mul(load(state.sum + v * W), al));
        store(state.top + v * W, m);
        store(next + v * W, safe);
      }
      for (int n = 0; n < count; ++n) {
        if (a.bias)
          softmax_pass<true>(x.tiles[n], nv, x.s + n * T * T, next, state.sum);
        else
          softmax_pass<false>(x.tiles[n], nv, x.s + n * T * T, next, state.sum);
      }
    } else {
      for (int r = 0; r < T; ++r) alpha[r] = 1.f;
    }
    if (logits.drops)
      for (int n = 0; n < count; ++n) {
        uint64_t keep[T];
        keep_bits(a.seed, logits.threshold, first, rows.tile(at - count + n) * T, (uint32_t)(b * a.heads + h), keep);
        drop_pass(x.tiles[n], keep, x.s + n * T * T);
      }
    // masked pairs must not meet NaN or Inf values: such tiles are taken out and added pair by pair
    Factor factors[STEP];
    int kept = 0;
    bool broken[STEP];
    for (int n = 0; n < count; ++n) {
      const E* vt = v + rows.tile(at - count + n) * T * a.v_stride[2];
      broken[n] = x.tiles[n].partial && !all_finite(vt, a.v_stride[2], x.tiles[n].keys, a.v_dim);
      if (!broken[n]) factors[kept++] = Factor{x.s + n * T * T, &x.tiles[n], x.tiles[n].v, x.tiles[n].v_stride};
    }
    if (kept)
      value_pass(x.o, v_dim, alpha, factors, kept, queries, v_vectors);
    else
      for (int r = 0; r < queries; ++r)
        for (int64_t d = 0; d < v_dim; ++d) x.o[r * v_dim + d] *= alpha[r];
    for (int n = 0; n < count; ++n) {
      if (!broken[n]) continue;
      const Tile& tile = x.tiles[n];
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
  if (!part.state) return finish<E>(a, state, x.o, queries, b, h, i);
  for (int r = 0; r < T; ++r) part.state[r] = state.top[r], part.state[T + r] = state.sum[r];
  for (int64_t n = 0; n < queries * v_dim; ++n) part.state[2 * T + n] = x.o[n];
}

// The parts of one query tile, each relative to its own reference, in the order of the keys.
static void join_tile(const fv_args& a, float* states, int64_t parts, int64_t b, int64_t h, int64_t i) {
  const int64_t floats = state_floats(a), v_dim = up(a.v_dim, 16);
  const int queries = a.q_len - i * T < T ? (int)(a.q_len - i * T) : T;
  float* o = states + 2 * T;
  State x;
  for (int r = 0; r < queries; ++r) {
    float m = NEG_INF, total = 0.f;
    for (int64_t n = 0; n < parts; ++n) m = states[n * floats + r] > m ? states[n * floats + r] : m;
    const bool softmax = a.normalizer == FV_SOFTMAX;
    for (int64_t n = 0; n < parts; ++n) {
      const float* from = states + n * floats;
      const float keep = !softmax ? 1.f : from[r] == NEG_INF ? 0.f : __builtin_exp2f(from[r] - m);
      total += from[T + r] * keep;
      for (int64_t d = 0; d < v_dim; ++d) {
        const float y = keep == 0.f ? 0.f : from[2 * T + r * v_dim + d] * keep;
        o[r * v_dim + d] = n ? o[r * v_dim + d] + y : y;
      }
    }
    x.top[r] = m;
    x.sum[r] = total;
  }
  if (a.dtype == FV_F32)
    finish<float>(a, x, o, queries, b, h, i);
  else
    finish<bf16>(a, x, o, queries, b, h, i);
}

#include "decode.h"

static void run_tile(const fv_args& a, const fv_prepared& ready, float* buffer, int64_t b, int64_t h, int64_t i,
                     const fv_part& part) {
  if (takes_few(a)) {
    if (a.dtype == FV_F32)
      run_few<float>(a, buffer, b, h, part);
    else
      run_few<bf16>(a, buffer, b, h, part);
    return;
  }
#if FV_PAIRS  // float32 requests never come here
  query_tile<bf16>(a, ready, buffer, b, h, i, part);
#else
  if (a.dtype == FV_F32)
    query_tile<float>(a, ready, buffer, b, h, i, part);
  else
    query_tile<bf16>(a, ready, buffer, b, h, i, part);
#endif
}

static void prepare_tile(const fv_args& a, const fv_prepared& ready, bool, int64_t b, int64_t hkv, int64_t j) {
  if (a.dtype == FV_F32)
    prepare<float>(a, ready, b, hkv, j);
  else
    prepare<bf16>(a, ready, b, hkv, j);
}

static void tile_floats(const fv_args& a, bool backward, int64_t* k, int64_t* v) {
  const bool f32 = a.dtype == FV_F32;
  *k = (f32 ? keys_in_place<float>(a, backward) : keys_in_place<bf16>(a, backward)) ? 0 : T * up(a.dim, 16) / (PAIRS ? 2 : 1);
  *v = (f32 ? values_in_place<float>(a, backward) : values_in_place<bf16>(a, backward)) ? 0 : T * up(a.v_dim, 16) / (PAIRS ? 2 : 1);
}
