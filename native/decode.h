// Few queries over many keys: decoding. Keys and values pass through once, at the speed of memory.
//
// Row by row instead of S^T: a dot product per (query, key), exp over vectors of keys, then o += p v for each key.
#pragma once

enum { FEW = 4 };

static bool takes_few(const fv_args& a) {
  return a.q_len <= FEW && a.normalizer == FV_SOFTMAX && a.softcap == 0.f && !a.temperature && !a.bias && !a.table &&
         a.shift == 0.f && a.dropout == 0.f && a.dim % W == 0 && a.v_dim % 16 == 0;  // results have rows of up(v_dim, 16)
}

// The next tile's rows, while this one is worked on.
template <class E>
FV_INLINE void fetch_rows(const E* x, int64_t stride, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; d += 64 / (int64_t)sizeof(E)) __builtin_prefetch(x + r * stride + d, 0, 2);
}

// s[query][key] for four keys at once; q is scaled and contiguous.
template <class E, int NR>
FV_INLINE void dot_keys(const float* q, const E* k, int64_t stride, int keys, int64_t dim, float* s) {
  for (int c = 0; c < keys; c += 4) {
    const E* row[4];
    for (int n = 0; n < 4; ++n) row[n] = k + (c + n < keys ? c + n : keys - 1) * stride;
    Vec acc[4][NR];
    FV_UNROLL for (int n = 0; n < 4; ++n) FV_UNROLL for (int r = 0; r < NR; ++r) acc[n][r] = zero();
    for (int64_t d = 0; d < dim; d += W)
      FV_UNROLL for (int n = 0; n < 4; ++n) {
        const Vec x = widen(row[n] + d);
        FV_UNROLL for (int r = 0; r < NR; ++r) acc[n][r] = fma(x, load(q + r * dim + d), acc[n][r]);
      }
    FV_UNROLL for (int n = 0; n < 4; ++n) FV_UNROLL for (int r = 0; r < NR; ++r) s[r * T + c + n] = total_of(acc[n][r]);
  }
}

// o[query] += sum over keys of p v. Four vectors of a row at a time.
template <class E, int NR>
FV_INLINE void add_values(const float* p, const E* v, int64_t stride, int keys, int64_t dim, float* o) {
  for (int64_t d = 0; d < dim; d += 4 * W) {
    const int vectors = dim - d < 4 * W ? (int)((dim - d) / W) : 4;
    Vec acc[NR][4];
    FV_UNROLL for (int r = 0; r < NR; ++r) FV_UNROLL for (int j = 0; j < 4; ++j)
      acc[r][j] = j < vectors ? load(o + r * dim + d + j * W) : zero();
    if (vectors == 4)
      for (int c = 0; c < keys; ++c) {
        const E* x = v + c * stride + d;
        FV_UNROLL for (int j = 0; j < 4; ++j) {
          const Vec y = widen(x + j * W);
          FV_UNROLL for (int r = 0; r < NR; ++r) acc[r][j] = fma(y, bcast32(p + r * T + c), acc[r][j]);
        }
      }
    else
      for (int c = 0; c < keys; ++c)
        for (int j = 0; j < vectors; ++j) {
          const Vec y = widen(v + c * stride + d + j * W);
          FV_UNROLL for (int r = 0; r < NR; ++r) acc[r][j] = fma(y, bcast32(p + r * T + c), acc[r][j]);
        }
    FV_UNROLL for (int r = 0; r < NR; ++r)
      for (int j = 0; j < vectors; ++j) store(o + r * dim + d + j * W, acc[r][j]);
  }
}

template <class E, int NR>
static void few_rows(const fv_args& a, float* buffer, int64_t b, int64_t h, const fv_part& part) {
  const int64_t hkv = h / (a.heads / a.kv_heads), dim = a.dim, v_dim = a.v_dim;
  const E* q = (const E*)a.q + b * a.q_stride[0] + h * a.q_stride[1];
  const E* k = (const E*)a.k + b * a.k_stride[0] + hkv * a.k_stride[1];
  const E* v = (const E*)a.v + b * a.v_stride[0] + hkv * a.v_stride[1];
  float *rows_q = buffer, *o = rows_q + NR * dim;
  alignas(64) float s[NR * T];
  State state;
  for (int r = 0; r < T; ++r) state.top[r] = NEG_INF, state.sum[r] = 0.f;
  for (int r = 0; r < NR; ++r)
    for (int64_t d = 0; d < dim; ++d) rows_q[r * dim + d] = as_float(q + r * a.q_stride[2] + d) * (a.scale * LOG2E);
  for (int64_t n = 0; n < NR * v_dim; ++n) o[n] = 0.f;

  const fv_rows rows(a, b, h, 0);
  const int64_t length = rows.end - rows.begin, end = rows.begin + length * (part.part + 1) / part.parts;
  for (int64_t at = rows.begin + length * part.part / part.parts; at < end; ++at) {
    const int64_t first = rows.tile(at) * T;
    const int keys = a.k_len - first < T ? (int)(a.k_len - first) : T;
    if (at + 1 < end) {
      const int64_t next = rows.tile(at + 1) * T, count = a.k_len - next < T ? a.k_len - next : (int64_t)T;
      fetch_rows(k + next * a.k_stride[2], a.k_stride[2], count, dim);
      fetch_rows(v + next * a.v_stride[2], a.v_stride[2], count, v_dim);
    }
    uint64_t made[T];
    const uint64_t* words = rows.bitmap(at, made);
    dot_keys<E, NR>(rows_q, k + first * a.k_stride[2], a.k_stride[2], keys, dim, s);
    for (int r = 0; r < NR; ++r) {
      float* x = s + r * T;
      for (int c = keys; c < T; ++c) x[c] = NEG_INF;
      if (words)
        for (int c = 0; c < T; c += W) store(x + c, select_bits(words[r] >> c, load(x + c), set1(NEG_INF)));
      Vec most = set1(state.top[r]);
      for (int c = 0; c < T; c += W) most = vmax(load(x + c), most);
      float lanes[W], top = state.top[r];
      store(lanes, most);
      for (int n = 0; n < W; ++n) top = lanes[n] > top || lanes[n] != lanes[n] ? lanes[n] : top;
      const Vec safe = set1(top == NEG_INF ? 0.f : top);
      if (top != state.top[r]) {
        const float keep = state.top[r] == NEG_INF ? 0.f : __builtin_exp2f(state.top[r] - top);
        for (int64_t d = 0; d < v_dim; ++d) o[r * v_dim + d] *= keep;
        state.sum[r] *= keep;
        state.top[r] = top;
      }
      Vec sum = zero();
      for (int c = 0; c < T; c += W) {
        const Vec y = load(x + c), p = select_eq(y, set1(NEG_INF), zero(), exp2v(sub(y, safe)));
        sum = add(sum, p);
        store(x + c, p);
      }
      state.sum[r] += total_of(sum);
    }
    const E* x = v + first * a.v_stride[2];
    if (!words) {
      add_values<E, NR>(s, x, a.v_stride[2], keys, v_dim, o);
      continue;
    }
    for (int r = 0; r < NR; ++r)  // masked pairs never meet their values: they may be NaN
      for (int c = 0; c < keys; ++c)
        if (words[r] >> c & 1) add_values<E, 1>(s + r * T + c, x + c * a.v_stride[2], 0, 1, v_dim, o + r * v_dim);
  }
  if (!part.state) return finish<E>(a, state, o, NR, b, h, 0);
  for (int r = 0; r < T; ++r) part.state[r] = state.top[r], part.state[T + r] = state.sum[r];
  for (int64_t n = 0; n < NR * v_dim; ++n) part.state[2 * T + n] = o[n];
}

template <class E>
static void run_few(const fv_args& a, float* buffer, int64_t b, int64_t h, const fv_part& part) {
  switch (a.q_len) {
    case 1: return few_rows<E, 1>(a, buffer, b, h, part);
    case 2: return few_rows<E, 2>(a, buffer, b, h, part);
    case 3: return few_rows<E, 3>(a, buffer, b, h, part);
    default: return few_rows<E, 4>(a, buffer, b, h, part);
  }
}
