// One query tile forward on AMX, everything transposed:
//
//   S^T = K Q^T          A = key rows, B = Q^T as pairs of dims, packed once per query tile
//   P = 2^(S - m)        vectors over queries; two rows of weights become one of bfloat16 pairs, in the place of S
//   O^T += V^T P         A = V^T, prepared once per head, B = the pairs
//
// Where the lengths of queries and keys bound the logits (Cauchy and Schwarz), no maximum is needed: m = 0 and nothing is
// ever rescaled.
#pragma once

// What is known of one tile of keys and values before it is visited.
struct Bounds {
  float key;    // the longest key; not a number or infinite where some key is not finite
  float value;  // the largest value, likewise
};
enum { BOUNDS_FLOATS = sizeof(Bounds) / sizeof(float) };
static const float MOST_LOGIT = 60.f;  // in units of log2

struct Piece {
  Tile tile;
  const char* k;      // key rows
  int64_t k_stride;   // bytes
  const char* v;      // V^T
  bool masked;        // partial, or fewer than 64 keys
  bool broken;
  uint8_t seen[4];    // bit v: do any of these 16 keys meet any of queries 16 v .. 16 v + 15?
  int64_t j;
};

struct AmxScratch {
  uint32_t* qt;
  float *s, *ot, *o, *extra;
  bf16 *k, *v;
  Piece* pieces;
};

static AmxScratch carve_amx(const fv_args& a, float* base, int64_t* floats) {
  const int64_t dim = up(a.dim, 32), v_dim = up(a.v_dim, 32);
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* here = base ? base + used : nullptr;
    used += up(n, 16);
    return here;
  };
  AmxScratch x;
  x.qt = (uint32_t*)(void*)take(T * dim / 2);
  x.s = take(STEP * T * T);
  x.ot = take(T * v_dim);
  x.o = take(T * v_dim);
  x.extra = take(T * T + 64);
  x.k = (bf16*)(void*)take(STEP * T * dim / 2);
  x.v = (bf16*)(void*)take(STEP * T * v_dim / 2);
  x.pieces = (Piece*)(void*)take(STEP * (int64_t)sizeof(Piece) / 4);
  if (floats) *floats = used;
  return x;
}

// Rows are read where they are if whole registers can be loaded and the rows do not crowd the same cache sets.
static bool rows_in_place(int64_t dim, int64_t stride) { return dim % 32 == 0 && stride > 0 && stride <= 256; }

static Bounds bounds_of(const fv_args& a, const bf16* k, const bf16* v, int keys) {
  Bounds x = {0.f, 0.f};
  bool good = true;
  for (int c = 0; c < keys; ++c) {
    const float square = dot_rows(k + c * a.k_stride[2], k + c * a.k_stride[2], a.dim);
    good = good && square < __builtin_inff();
    x.key = square > x.key ? square : x.key;
  }
  x.key = good ? __builtin_sqrtf(x.key) : __builtin_inff();
  uint16_t most = 0;  // positive bfloat16 bits rise with the value; 0x7f80 and more are not finite
  for (int c = 0; c < keys; ++c)
    for (int64_t d = 0; d < a.v_dim; ++d) {
      const uint16_t size = v[c * a.v_stride[2] + d] & 0x7fff;
      most = size > most ? size : most;
    }
  x.value = most < 0x7f80 ? from_bf16(most) : __builtin_inff();
  return x;
}

// The prepared values of one head: k_tiles times V^T, then k_tiles times Bounds.
static int64_t amx_v_tile(const fv_args& a) { return T * up(a.v_dim, 32) / 2 + 16; }
static bf16* prepared_values(const fv_args& a, const fv_prepared& ready, int64_t bh, int64_t j) {
  const int64_t tiles = (a.k_len + T - 1) / T;
  return (bf16*)(void*)(ready.v + (bh - ready.first) * tiles * ready.v_tile + j * (ready.v_tile - 16));
}
static Bounds* prepared_bounds(const fv_args& a, const fv_prepared& ready, int64_t bh) {
  const int64_t tiles = (a.k_len + T - 1) / T;
  return (Bounds*)(void*)(ready.v + (bh - ready.first) * tiles * ready.v_tile + tiles * (ready.v_tile - 16));
}

static void amx_prepare_forward(const fv_args& a, const fv_prepared& ready, int64_t b, int64_t hkv, int64_t j) {
  const int64_t first = j * T, bh = b * a.kv_heads + hkv;
  const int keys = a.k_len - first < T ? (int)(a.k_len - first) : T;
  const bf16* k = (const bf16*)a.k + b * a.k_stride[0] + hkv * a.k_stride[1] + first * a.k_stride[2];
  const bf16* v = (const bf16*)a.v + b * a.v_stride[0] + hkv * a.v_stride[1] + first * a.v_stride[2];
  if (ready.k) {
    const int64_t at = (bh - ready.first) * ((a.k_len + T - 1) / T) + j;
    copy_rows(k, a.k_stride[2], keys, a.dim, (bf16*)(void*)(ready.k + at * ready.k_tile));
  }
  if (ready.v) {
    transpose_rows(v, a.v_stride[2], keys, a.v_dim, prepared_values(a, ready, bh, j));
    prepared_bounds(a, ready, bh)[j] = bounds_of(a, k, v, keys);
  }
}

// Masks of a tile from its bitmap (or null) and its number of keys.
static void open_mask(const uint64_t* bitmap, Piece& x) {
  Tile& tile = x.tile;
  tile.by_query = bitmap;
  tile.partial = bitmap != nullptr;
  x.masked = tile.partial || tile.keys < T;
  for (int g = 0; g < 4; ++g) x.seen[g] = 15;
  if (!x.masked) return;
  if (tile.partial)
    transpose_bits(bitmap, tile.by_key);
  else
    for (int c = 0; c < tile.keys; ++c) tile.by_key[c] = ~(uint64_t)0;
  for (int c = tile.keys; c < T; ++c) tile.by_key[c] = 0;
  for (int g = 0; g < 4; ++g) {
    uint64_t any = 0;
    for (int c = 16 * g; c < 16 * g + 16; ++c) any |= tile.by_key[c];
    x.seen[g] = 0;
    for (int v = 0; v < 4; ++v) x.seen[g] |= (uint8_t)((any >> (16 * v) & 0xffff) != 0) << v;
  }
}

static void open_piece(const fv_args& a, const fv_prepared& ready, const bf16* k, const bf16* v, int64_t bh, int64_t j,
                       const uint64_t* bitmap, bf16* own_k, bf16* own_v, Piece& x) {
  const int64_t first = j * T, tiles = (a.k_len + T - 1) / T;
  k += first * a.k_stride[2];
  v += first * a.v_stride[2];
  x.j = j;
  x.tile.keys = a.k_len - first < T ? (int)(a.k_len - first) : T;
  open_mask(bitmap, x);
  if (rows_in_place(a.dim, a.k_stride[2]) && x.tile.keys == T) {
    x.k = (const char*)k;
    x.k_stride = a.k_stride[2] * 2;
  } else {
    const bool made = ready.k != nullptr;
    const bf16* copy = made ? (const bf16*)(const void*)(ready.k + ((bh - ready.first) * tiles + j) * ready.k_tile) : own_k;
    if (!made) copy_rows(k, a.k_stride[2], x.tile.keys, a.dim, own_k);
    x.k = (const char*)copy;
    x.k_stride = up(a.dim, 32) * 2;
  }
  if (ready.v) {
    x.v = (const char*)prepared_values(a, ready, bh, j);
    x.broken = x.tile.partial && !(prepared_bounds(a, ready, bh)[j].value < __builtin_inff());
  } else {
    transpose_rows(v, a.v_stride[2], x.tile.keys, a.v_dim, own_v);
    x.v = (const char*)own_v;
    x.broken = x.tile.partial && !all_finite(v, a.v_stride[2], x.tile.keys, a.v_dim);
  }
}

// S^T = rows Q^T for what is seen; also dP^T = V dO^T.
static void score_product(const char* rows, int64_t stride, const uint32_t* qt, int64_t dim, int query_blocks,
                          const uint8_t* seen, float* s) {
  Chunk chunks[FV_MAX_DIM / 32];
  const int count = (int)(up(dim, 32) / 32);
  for (int n = 0; n < count; ++n) chunks[n] = Chunk{rows + n * 64, (const char*)(qt + n * 16 * T)};
  Multiplier<true> product(stride, T * 4, T * 4);
  for (int v = 0; v < query_blocks; v += 2)
    for (int g = 0; g < 4; ++g) {
      const int need = seen[g] >> v & (query_blocks - v > 1 ? 3 : 1);
      if (!need) continue;
      const int col = need == 2 ? v + 1 : v;
      product.block(chunks, count, Block16{(char*)(s + 16 * g * T + 16 * col), 16 * g * stride, 64 * col, need == 3 ? 2 : 1});
    }
  product.flush();
}

// The largest raw product of each query.
static void max_pass(const Piece& x, int nv, const float* s, float* top) {
  for (int v = 0; v < nv; ++v) {
    const float* column = s + v * W;
    __m512 m0 = _mm512_loadu_ps(top + v * W), m1 = m0;
    for (int g = 0; g < 4; ++g) {
      if (!(x.seen[g] >> v & 1)) continue;
      if (!x.masked) {
        FV_UNROLL for (int c = 16 * g; c < 16 * g + 16; c += 2) {
          m0 = _mm512_max_ps(_mm512_loadu_ps(column + c * T), m0);
          m1 = _mm512_max_ps(_mm512_loadu_ps(column + c * T + T), m1);
        }
      } else {
        for (int c = 16 * g; c < 16 * g + 16; ++c)
          m0 = _mm512_mask_max_ps(m0, (__mmask16)(x.tile.by_key[c] >> (v * W)), _mm512_loadu_ps(column + c * T), m0);
      }
    }
    _mm512_storeu_ps(top + v * W, _mm512_max_ps(m0, m1));
  }
}

// P = 2^(factor S - m) as pairs in the place of S, and the sums. BOUNDED: m = 0.
template <bool BOUNDED>
static __attribute__((noinline)) void weigh_pass(const Piece& x, int nv, float* s, const float* top, float factor, float* sum) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int v = 0; v < nv; ++v) {
    float* column = s + v * W;
    const __m512 m = _mm512_loadu_ps(top + v * W);
    __m512 t0 = _mm512_loadu_ps(sum + v * W), t1 = _mm512_setzero_ps();
    const auto weight = [&](int c) {
      const __m512 y = _mm512_loadu_ps(column + c * T);
      return exp2_fine(BOUNDED ? _mm512_mul_ps(y, f) : _mm512_fmsub_ps(y, f, m));
    };
    for (int g = 0; g < 4; ++g) {
      float* to = column + 8 * g * T;
      if (!(x.seen[g] >> v & 1)) {
        FV_UNROLL for (int i = 0; i < 8; ++i) _mm512_storeu_ps(to + i * T, _mm512_setzero_ps());
      } else if (!x.masked) {
        FV_UNROLL for (int i = 0; i < 8; ++i) {
          const __m512 p0 = weight(16 * g + 2 * i), p1 = weight(16 * g + 2 * i + 1);
          t0 = _mm512_add_ps(t0, p0);
          t1 = _mm512_add_ps(t1, p1);
          _mm512_storeu_si512(to + i * T, join_halves(half_up(p0), half_up(p1)));
        }
      } else {
        const uint64_t* bits = x.tile.by_key + 16 * g;
        for (int i = 0; i < 8; ++i) {
          const __m512 p0 = _mm512_maskz_mov_ps((__mmask16)(bits[2 * i] >> (v * W)), weight(16 * g + 2 * i));
          const __m512 p1 = _mm512_maskz_mov_ps((__mmask16)(bits[2 * i + 1] >> (v * W)), weight(16 * g + 2 * i + 1));
          t0 = _mm512_add_ps(t0, p0);
          t1 = _mm512_add_ps(t1, p1);
          _mm512_storeu_si512(to + i * T, join_halves(half_up(p0), half_up(p1)));
        }
      }
    }
    _mm512_storeu_ps(sum + v * W, _mm512_add_ps(t0, t1));
  }
}

// Takes the dropped weights out of rows of pairs.
static void drop_pairs(const uint64_t* keep, float* s) {
  for (int c = 0; c < T; c += 2)
    for (int v = 0; v < T; v += W) {
      float* p = s + c / 2 * T + v;
      const __m512i low = _mm512_maskz_set1_epi32((__mmask16)(keep[c] >> v), 0xffff);
      const __m512i bits = _mm512_mask_or_epi32(low, (__mmask16)(keep[c + 1] >> v), low, _mm512_set1_epi32((int)0xffff0000u));
      _mm512_storeu_si512(p, _mm512_and_si512(bits, _mm512_loadu_si512(p)));
    }
}

// O^T += V^T P over the pieces.
static void value_product(const fv_args& a, const Piece* pieces, int count, const float* s, int query_blocks, float* ot) {
  Multiplier<false> product(T * 2, T * 4, T * 4);
  const int dims = (int)(up(a.v_dim, 16) / 16);
  Chunk chunks[2][2 * STEP];
  for (int v = 0, turn = 0; v < query_blocks; v += 2, turn ^= 1) {
    const int columns = query_blocks - v > 1 ? 2 : 1;
    int used = 0;
    for (int n = 0; n < count; ++n)
      for (int half = 0; half < 2; ++half) {
        const Piece& x = pieces[n];
        if (x.broken || !((x.seen[2 * half] | x.seen[2 * half + 1]) >> v & (columns > 1 ? 3 : 1))) continue;
        chunks[turn][used++] = Chunk{x.v + half * 64, (const char*)(s + n * T * T + half * 16 * T)};
      }
    if (!used) continue;
    for (int d = 0; d < dims; ++d)
      product.block(chunks[turn], used, Block16{(char*)(ot + d * 16 * T + v * 16), (int64_t)d * 16 * T * 2, v * 64, columns});
  }
  product.flush();
}

static void rescale(float* ot, int64_t rows, int nv, const float* alpha) {
  for (int v = 0; v < nv; ++v) {
    const __m512 al = _mm512_loadu_ps(alpha + v * W);
    if (_mm512_cmp_ps_mask(al, _mm512_set1_ps(1.f), _CMP_NEQ_UQ) == 0) continue;
    for (int64_t d = 0; d < rows; ++d)
      _mm512_storeu_ps(ot + d * T + v * W, _mm512_mul_ps(_mm512_loadu_ps(ot + d * T + v * W), al));
  }
}

// [rows][64] to [64][rows], rows a multiple of 16.
static void turn_over(const float* from, int64_t rows, float* to) {
  for (int64_t d = 0; d < rows; d += 16)
    for (int r = 0; r < T; r += 16) {
      __m512i x[16];
      FV_UNROLL for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + (d + i) * T + r);
      transpose16(x);
      FV_UNROLL for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (r + i) * rows + d, x[i]);
    }
}

// The longest of the packed queries.
static float longest_query(const uint32_t* qt, int64_t dim) {
  __m512 most = _mm512_setzero_ps();
  for (int r = 0; r < T; r += W) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t d = 0; d < up(dim, 32) / 2; ++d) {
      const __m512i x = _mm512_loadu_si512(qt + d * T + r);
      const __m512 l = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
      const __m512 h = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000u)));
      low = _mm512_fmadd_ps(l, l, low);
      high = _mm512_fmadd_ps(h, h, high);
    }
    const __m512 square = _mm512_add_ps(low, high);
    if (_mm512_cmp_ps_mask(square, square, _CMP_UNORD_Q)) return __builtin_inff();
    most = _mm512_max_ps(most, square);
  }
  return __builtin_sqrtf(_mm512_reduce_max_ps(most));
}

// Do all logits of these key tiles stay within MOST_LOGIT, and all sums within float32?
static bool is_bounded(const fv_args& a, const fv_prepared& ready, int64_t bh, const fv_rows& rows, int64_t begin,
                       int64_t end, float query) {
  if (!ready.v) return false;
  const Bounds* bounds = prepared_bounds(a, ready, bh);
  Bounds most = {0.f, 0.f};
  for (int64_t at = begin; at < end; ++at) {
    const Bounds x = bounds[rows.tile(at)];
    most.key = x.key > most.key ? x.key : most.key;
    most.value = x.value > most.value ? x.value : most.value;
  }
  return query * most.key * __builtin_fabsf(a.scale) * LOG2E <= MOST_LOGIT && most.value <= 1e12f;
}

// Broken pieces are added pair by pair, so that 0 * NaN never arises.
static void add_broken(const fv_args& a, const bf16* v, const Piece& x, int queries, const float* s, float* ot) {
  for (int c = 0; c < x.tile.keys; ++c)
    for (int r = 0; r < queries; ++r) {
      if (!(x.tile.by_key[c] >> r & 1)) continue;
      const float p = from_bf16(((const bf16*)(const void*)(s + c / 2 * T + r))[c & 1]);
      for (int64_t d = 0; d < a.v_dim; ++d) ot[d * T + r] += p * from_bf16(v[(x.j * T + c) * a.v_stride[2] + d]);
    }
}

static void amx_query_tile(const fv_args& a, const fv_prepared& ready, float* buffer, int64_t b, int64_t h, int64_t i,
                           const fv_part& part) {
  const Registers registers;
  AmxScratch x = carve_amx(a, buffer, nullptr);
  const int64_t hkv = h / (a.heads / a.kv_heads), first = i * T, bh = b * a.kv_heads + hkv;
  const bf16* q = (const bf16*)a.q + b * a.q_stride[0] + h * a.q_stride[1] + first * a.q_stride[2];
  const bf16* k = (const bf16*)a.k + b * a.k_stride[0] + hkv * a.k_stride[1];
  const bf16* v = (const bf16*)a.v + b * a.v_stride[0] + hkv * a.v_stride[1];
  const int queries = a.q_len - first < T ? (int)(a.q_len - first) : T, nv = (queries + W - 1) / W;
  const int64_t dim = up(a.dim, 32), v_dim = up(a.v_dim, 16);
  const bool softmax = a.normalizer == FV_SOFTMAX;
  State state;
  Logits logits;
  alignas(64) float next[T], alpha[T];
  open_logits(a, b, h, i, queries, logits);
  // a negative scale goes into the queries' signs: the largest product is then the largest logit
  const bool negative = logits.plain && a.scale < 0.f;
  const float factor = __builtin_fabsf(a.scale) * LOG2E;
  pack_dims(q, a.q_stride[2], queries, a.dim, negative ? 0x80008000u : 0u, x.qt);
  for (int64_t n = 0; n < T * v_dim; n += W) _mm512_storeu_ps(x.ot + n, _mm512_setzero_ps());

  fv_rows rows(a, b, h, i);
  const int64_t length = rows.end - rows.begin, end = rows.begin + length * (part.part + 1) / part.parts;
  int64_t at = rows.begin + length * part.part / part.parts;
  const bool bounded = logits.plain && is_bounded(a, ready, bh, rows, at, end, longest_query(x.qt, a.dim));
  for (int r = 0; r < T; ++r) state.top[r] = bounded ? 0.f : NEG_INF, state.sum[r] = 0.f;

  while (at < end) {
    int count = 0;
    uint64_t made[STEP][T];
    for (int r = 0; r < T; ++r) next[r] = logits.plain ? NEG_INF : state.top[r];
    for (; count < STEP && at < end; ++at, ++count) {
      Piece& y = x.pieces[count];
      float* s = x.s + count * T * T;
      open_piece(a, ready, k, v, bh, rows.tile(at), rows.bitmap(at, made[count]), x.k + count * T * dim,
                 x.v + count * T * up(a.v_dim, 32), y);
      score_product(y.k, y.k_stride, x.qt, a.dim, nv, y.seen, s);
      if (logits.plain) {
        if (!bounded) max_pass(y, nv, s, next);
        continue;
      }
      if (logits.extra) extra_tile(a, logits, b, h, i, y.j, queries, y.tile.keys, x.extra);
      if (softmax)
        logit_pass(logits, y.tile, nv, s, x.extra, next);
      else
        weight_pass(logits, y.tile, nv, s, x.extra);
    }
    if (softmax && !bounded) {
      for (int u = 0; u < nv * W; u += W) {  // rows that have seen nothing keep a reference of 0: no -inf - -inf
        const Vec before = load(state.top + u), found = load(next + u);
        const Vec scaled = logits.plain ? select_eq(found, set1(NEG_INF), found, mul(found, set1(factor))) : found;
        const Vec m = vmax(scaled, before), safe = select_eq(m, set1(NEG_INF), set1(0.f), m);
        const Vec al = exp2v(sub(before, safe));
        store(alpha + u, al);
        store(state.sum + u, mul(load(state.sum + u), al));
        store(state.top + u, m);
        store(next + u, safe);
      }
      rescale(x.ot, v_dim, nv, alpha);
    }
    for (int n = 0; n < count; ++n) {
      Piece& y = x.pieces[n];
      float* s = x.s + n * T * T;
      if (logits.plain) {
        if (bounded)
          weigh_pass<true>(y, nv, s, next, factor, state.sum);
        else
          weigh_pass<false>(y, nv, s, next, factor, state.sum);
      } else {
        if (softmax && a.bias)
          softmax_pass<true>(y.tile, nv, s, next, state.sum);
        else if (softmax)
          softmax_pass<false>(y.tile, nv, s, next, state.sum);
        for (int64_t z = up((y.tile.keys + 1) / 2, 4) * T; z < T / 2 * T; z += W) store(s + z, zero());
      }
      if (logits.drops) {
        uint64_t keep[T];
        keep_bits(a.seed, logits.threshold, first, y.j * T, (uint32_t)(b * a.heads + h), keep);
        drop_pairs(keep, s);
      }
    }
    value_product(a, x.pieces, count, x.s, nv, x.ot);
    for (int n = 0; n < count; ++n)
      if (x.pieces[n].broken) add_broken(a, v, x.pieces[n], queries, x.s + n * T * T, x.ot);
  }
  if (bounded)
    for (int r = 0; r < T; ++r) state.top[r] = state.sum[r] == 0.f ? NEG_INF : 0.f;
  turn_over(x.ot, v_dim, x.o);
  if (!part.state) return finish<bf16>(a, state, x.o, queries, b, h, i);
  for (int r = 0; r < T; ++r) part.state[r] = state.top[r], part.state[T + r] = state.sum[r];
  for (int64_t n = 0; n < queries * v_dim; n += W) store(part.state + 2 * T + n, load(x.o + n));
}

static void amx_tile_floats(const fv_args& a, bool, int64_t* k, int64_t* v) {
  *k = rows_in_place(a.dim, a.k_stride[2]) ? 0 : T * up(a.dim, 32) / 2;
  *v = amx_v_tile(a);
}
