// From S and dP to P and dS, in their places, on S^T[key][query].
#pragma once

// What the backward knows of its query rows.
struct Rows {
  alignas(64) float lse[T];    // in units of log2; 0 in rows that see nothing
  alignas(64) float delta[T];  // dO . O - dlse
};

// Which vectors of queries a group of keys has scores for; everything else becomes 0.
struct Ranges {
  int lo[MAX_GROUPS], hi[MAX_GROUPS];
  Ranges(const Tile& tile, int nv) {
    for (int c = 0, g = 0, keys; c < tile.keys; c += keys, ++g) {
      keys = group_of(tile.keys - c, NK);
      lo[g] = 0, hi[g] = nv;
      if (tile.partial) lane_range(tile.by_key + c, keys, nv, &lo[g], &hi[g]);
    }
  }
};

// Scale only: p = 2^(s - lse), ds = p (dp - delta).
static __attribute__((noinline)) void gradient_pass(const Tile& tile, const Rows& rows, int nv, float* s, float* dp) {
  const Ranges ranges(tile, nv);
  for (int v = 0; v < nv; ++v) {
    const Vec lse = load(rows.lse + v * W), delta = load(rows.delta + v * W);
    for (int c = 0, g = 0, keys; c < tile.keys; c += keys, ++g) {
      keys = group_of(tile.keys - c, NK);
      float *x = s + c * T + v * W, *y = dp + c * T + v * W;
      if (v < ranges.lo[g] || v >= ranges.hi[g]) {
        for (int i = 0; i < keys; ++i) store(x + i * T, zero()), store(y + i * T, zero());
      } else if (!tile.partial) {
        for (int i = 0; i < keys; ++i) {
          Vec p = exp2v(sub(load(x + i * T), lse));
          store(x + i * T, p);
          store(y + i * T, mul(p, sub(load(y + i * T), delta)));
        }
      } else {
        for (int i = 0; i < keys; ++i) {
          Vec p = select_bits(tile.by_key[c + i] >> (v * W), exp2v(sub(load(x + i * T), lse)), zero());
          Vec ds = select_bits(tile.by_key[c + i] >> (v * W), mul(p, sub(load(y + i * T), delta)), zero());
          store(x + i * T, p);
          store(y + i * T, ds);
        }
      }
    }
    clear_rows(s + v * W, tile.keys);
    clear_rows(dp + v * W, tile.keys);
  }
}

// Any scores and normaliser. On return `extra` holds the gradient of the logits (before soft-cap and temperature are
// taken back), dp that of scale q k, and `warm` has gained the gradient of each query's temperature.
static __attribute__((noinline)) void gradient_pass(const Logits& l, const Tile& tile, const Rows& rows, int nv, float* s,
                                                    float* dp, float* extra, const uint64_t* keep, float* warm) {
  const Ranges ranges(tile, nv);
  for (int v = 0; v < nv; ++v) {
    const Vec lse = load(rows.lse + v * W), delta = load(rows.delta + v * W), factor = load(l.factor + v * W);
    const Vec temperature = load(l.temperature + v * W);
    Vec heat = load(warm + v * W);
    for (int c = 0, g = 0, keys; c < tile.keys; c += keys, ++g) {
      keys = group_of(tile.keys - c, NK);
      const bool computed = v >= ranges.lo[g] && v < ranges.hi[g];
      for (int i = c; i < c + keys; ++i) {
        float *x = s + i * T + v * W, *y = dp + i * T + v * W, *z = extra + i * T + v * W;
        if (!computed) {
          store(x, zero()), store(y, zero()), store(z, zero());
          continue;
        }
        const uint64_t seen = tile.partial ? tile.by_key[i] >> (v * W) : ~(uint64_t)0;
        const Vec raw = load(x);
        Vec t = mul(raw, factor), slope = set1(1.f);
        if (l.cap != 0.f) {
          t = capped(l, t);
          slope = sub(set1(1.f), mul(t, t));
          t = mul(t, set1(l.cap));
        }
        if (l.extra) t = add(t, load(z));
        t = add(t, set1(l.shift));
        Vec p, change = load(y);
        if (l.drops) change = select_bits(keep[i] >> (v * W), mul(change, set1(l.grow)), zero());
        if (l.normalizer == FV_SOFTMAX) {
          p = exp2v(sub(mul(t, set1(LOG2E)), lse));
          p = select_eq(t, set1(NEG_INF), zero(), p);
          change = mul(p, sub(change, delta));
        } else if (l.normalizer == FV_SIGMOID) {
          p = sigmoid2(mul(t, set1(LOG2E)));
          change = mul(change, mul(p, sub(set1(1.f), p)));
        } else {
          p = vmax(zero(), t);
          change = select_eq(p, zero(), zero(), change);
        }
        if (l.drops) p = select_bits(keep[i] >> (v * W), mul(p, set1(l.grow)), zero());
        p = select_bits(seen, p, zero());
        change = select_bits(seen, change, zero());
        store(x, p);
        store(z, change);
        change = mul(change, slope);
        heat = select_bits(seen, fma(change, mul(raw, set1(l.scale)), heat), heat);
        store(y, mul(change, temperature));
      }
    }
    store(warm + v * W, heat);
    clear_rows(s + v * W, tile.keys);
    clear_rows(dp + v * W, tile.keys);
  }
}
