// From raw products to weights: scores, masks, normalisers, dropout. All on S^T[key][query], vectors over queries.
#pragma once

// What turns the raw products of one query tile into logits.
struct Logits {
  bool plain;         // nothing but the scale: q is packed with scale log2(e), scores come out in units of log2
  bool extra;         // an additive tile: bias, table
  bool drops;
  int normalizer;
  float scale, cap, shift;
  alignas(64) float temperature[T];
  alignas(64) float factor[T];  // scale temperature
  const float* table;
  int32_t q_code[T];
  bool ramp;          // q_code rises by one: the table is read in a row
  uint32_t threshold;
  float grow;         // 1 / (1 - dropout)
};

static void open_logits(const fv_args& a, int64_t b, int64_t h, int64_t i, int queries, Logits& x) {
  x.normalizer = a.normalizer;
  x.extra = a.bias || a.table;
  x.plain = a.normalizer == FV_SOFTMAX && a.softcap == 0.f && !a.temperature && !x.extra && a.shift == 0.f;
  x.scale = a.scale;
  x.cap = a.softcap;
  x.shift = a.shift;
  for (int r = 0; r < T; ++r) {
    const int64_t row = i * T + (r < queries ? r : queries - 1);
    x.temperature[r] = 1.f;
    if (a.temperature)
      x.temperature[r] = a.temperature[b * a.temperature_stride[0] + h * a.temperature_stride[1] + row * a.temperature_stride[2]];
    x.factor[r] = a.scale * x.temperature[r];
  }
  x.table = a.table ? a.table + h * a.table_stride : nullptr;
  x.ramp = true;
  for (int r = 0; a.table && r < T; ++r) {
    x.q_code[r] = a.q_code[i * T + (r < queries ? r : queries - 1)];
    x.ramp = x.ramp && queries == T && x.q_code[r] == (int64_t)x.q_code[0] + r;
  }
  x.drops = a.dropout > 0.f;
  const double threshold = (double)a.dropout * 4294967296.0 + 0.5;
  x.threshold = threshold >= 4294967295.0 ? 4294967295u : (uint32_t)threshold;
  x.grow = x.drops ? 1.f / (1.f - a.dropout) : 1.f;
}

template <class E>
static void add_bias(const E* from, int64_t by_query, int64_t by_key, int queries, int keys, float* to) {
  for (int c = 0; c < keys; ++c) {
    for (int r = 0; r < queries; ++r) to[c * T + r] = as_float(from + r * by_query + c * by_key);
    for (int r = queries; r < T; ++r) to[c * T + r] = 0.f;
  }
}

// extra[key][query] = bias + table, for key tile j.
static __attribute__((noinline)) void extra_tile(const fv_args& a, const Logits& x, int64_t b, int64_t h, int64_t i, int64_t j,
                                                 int queries, int keys, float* extra) {
  if (a.bias) {
    const int64_t* st = a.bias_stride;
    const int64_t at = b * st[0] + h * st[1] + i * T * st[2] + j * T * st[3];
    if (a.bias_dtype == FV_F32)
      add_bias((const float*)a.bias + at, st[2], st[3], queries, keys, extra);
    else if (a.bias_dtype == FV_BF16)
      add_bias((const bf16*)a.bias + at, st[2], st[3], queries, keys, extra);
    else
      add_bias((const half*)a.bias + at, st[2], st[3], queries, keys, extra);
  } else {
    for (int n = 0; n < keys * T; ++n) extra[n] = 0.f;
  }
  if (!x.table) return;
  for (int c = 0; c < keys; ++c) {
    const int32_t code = a.k_code[j * T + c];
    float* row = extra + c * T;
    if (x.ramp) {
      const float* t = x.table + (x.q_code[0] - code);
      for (int r = 0; r < T; r += W) store(row + r, add(load(row + r), load(t + r)));
    } else {
      for (int r = 0; r < queries; ++r) row[r] += x.table[x.q_code[r] - code];
    }
  }
}

// 1 / (1 + 2^-x)
FV_INLINE Vec sigmoid2(Vec x) {
  const Vec least = set1(-126.f), minus = set1(-1.f);  // exp2v takes no more than 2^127
  return div(set1(1.f), add(set1(1.f), exp2v(mul(vmax(least, x), minus))));
}

FV_INLINE Vec capped(const Logits& x, Vec u) { return x.cap == 0.f ? u : tanhv(mul(u, set1(1.f / x.cap))); }

// Raw products -> logits in units of log2, masked pairs -inf, and the running maximum.
static __attribute__((noinline)) void logit_pass(const Logits& x, const Tile& tile, int nv, float* s, const float* extra,
                                                 float* top) {
  for (int v = 0; v < nv; ++v) {
    Vec m = load(top + v * W);
    const Vec factor = load(x.factor + v * W);
    for (int c = 0; c < tile.keys; ++c) {
      if (tile.partial && !(tile.by_key[c] >> (v * W))) continue;  // may never have been computed; P is set to 0 there
      Vec y = mul(load(s + c * T + v * W), factor);
      if (x.cap != 0.f) y = mul(capped(x, y), set1(x.cap));
      if (x.extra) y = add(y, load(extra + c * T + v * W));
      y = mul(add(y, set1(x.shift)), set1(LOG2E));
      if (tile.partial) y = select_bits(tile.by_key[c] >> (v * W), y, set1(NEG_INF));
      m = vmax(y, m);
      store(s + c * T + v * W, y);
    }
    store(top + v * W, m);
  }
}

// Rows of zeros up to a multiple of 4 keys (or pairs of keys).
FV_INLINE void clear_rows(float* column, int rows) {
  for (; rows & 3; ++rows) store(column + rows * T, zero());
}

// Raw products -> weights of a normaliser that needs no sum: sigmoid, ReLU.
static __attribute__((noinline)) void weight_pass(const Logits& x, const Tile& tile, int nv, float* s, const float* extra) {
  for (int v = 0; v < nv; ++v) {
    const Vec factor = load(x.factor + v * W);
    Vec held = zero();
    for (int c = 0; c < tile.keys; ++c) {
      Vec y = mul(load(s + c * T + v * W), factor);
      if (x.cap != 0.f) y = mul(capped(x, y), set1(x.cap));
      if (x.extra) y = add(y, load(extra + c * T + v * W));
      y = add(y, set1(x.shift));
      Vec p = x.normalizer == FV_SIGMOID ? sigmoid2(mul(y, set1(LOG2E))) : vmax(zero(), y);
      if (tile.partial) p = select_bits(tile.by_key[c] >> (v * W), p, zero());
      if (!PAIRS)
        store(s + c * T + v * W, p);
      else if (c & 1)
        store(s + (c >> 1) * T + v * W, pair(held, p));
      held = p;
    }
    if (PAIRS && tile.keys & 1) store(s + (tile.keys >> 1) * T + v * W, pair(held, zero()));
    clear_rows(s + v * W, PAIRS ? (tile.keys + 1) >> 1 : tile.keys);
  }
}

// ------------------------------------------------------------------------------------------- P = 2^(S - m), sums
// In place; with PAIRS, rows (2i, 2i+1) become row i of bfloat16 pairs.
// EXACT: a logit of -inf that a bias made weighs exactly 0, not 2^-126.
template <bool EXACT>
static __attribute__((noinline)) void softmax_pass(const Tile& tile, int nv, float* s, const float* top, float* sum) {
  int lo[MAX_GROUPS], hi[MAX_GROUPS];
  if (tile.partial)
    for (int c = 0, g = 0, keys; c < tile.keys; c += keys, ++g) {
      keys = group_of(tile.keys - c, NK);
      lane_range(tile.by_key + c, keys, nv, &lo[g], &hi[g]);
    }
  for (int v = 0; v < nv; ++v) {
    float* column = s + v * W;
    const auto weight = [&](int i, Vec m) {
      Vec y = load(column + i * T), p = exp2v(sub(y, m));
      return EXACT ? select_eq(y, set1(NEG_INF), zero(), p) : p;
    };
    Vec m = load(top + v * W), total = load(sum + v * W), held = zero();
    for (int c = 0, g = 0, keys; c < tile.keys; c += keys, ++g) {
      keys = group_of(tile.keys - c, NK);
      if (!tile.partial) {
        if (!PAIRS) {
          for (int i = c; i < c + keys; ++i) {
            Vec p = weight(i, m);
            store(column + i * T, p);
            total = add(total, p);
          }
        } else {
          for (int i = c; i < c + keys; ++i) {
            Vec p = weight(i, m);
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
          p = weight(i, m);
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
    clear_rows(column, row);
    store(sum + v * W, total);
  }
}

// Takes the dropped weights out. What is kept grows at the end, with the whole row.
static __attribute__((noinline)) void drop_pass(const Tile& tile, const uint64_t* keep, float* s) {
  if (!PAIRS) {
    for (int c = 0; c < tile.keys; ++c)
      for (int v = 0; v < T; v += W) store(s + c * T + v, select_bits(keep[c] >> v, load(s + c * T + v), zero()));
    return;
  }
  for (int c = 0; c < (tile.keys + 1) / 2; ++c)
    for (int r = 0; r < T; ++r) {
      uint32_t x;
      __builtin_memcpy(&x, s + c * T + r, 4);
      x &= (keep[2 * c] >> r & 1 ? 0xffffu : 0u) | (keep[2 * c + 1] >> r & 1 ? 0xffff0000u : 0u);
      __builtin_memcpy(s + c * T + r, &x, 4);
    }
}
