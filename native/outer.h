// dV += P^T dO, dK += dS^T Q
#pragma once

enum { PANEL = NV * W };  // Q and dO are copied as panels of NV vectors: [panel][query][PANEL]

FV_INLINE int64_t panels_of(int64_t dim) { return (dim + PANEL - 1) / PANEL; }

struct Strip {  // P^T (or dS^T) of one tile against the panels of its query tile
  const float* p;
  const float* panels;
  int q0, q1;  // queries that the key group sees, widened to multiples of 4
};

template <int NK_, int NV_>
FV_INLINE void outer_block(float* sum, int64_t stride, const Strip* strips, int count, int64_t panel) {
  Vec acc[NK_][NV_];
  FV_UNROLL for (int i = 0; i < NK_; ++i) FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = load(sum + i * stride + j * W);
  for (int n = 0; n < count; ++n) {
    const float* x = strips[n].panels + panel + strips[n].q0 * PANEL;
    const float* row[(NK_ + 2) / 3];
    FV_UNROLL for (int i = 0; i < (NK_ + 2) / 3; ++i) {
      row[i] = strips[n].p + strips[n].q0 + 3 * i * T;
      FV_OPAQUE(row[i]);
    }
#define FV_QUERY(u)                                                                                   \
  {                                                                                                   \
    Vec y[NV_];                                                                                       \
    FV_UNROLL for (int j = 0; j < NV_; ++j) y[j] = load(x + (u) * PANEL + j * W);                     \
    FV_UNROLL for (int i = 0; i < NK_; ++i) {                                                         \
      const float* p = row[i / 3] + (i % 3) * T + (u);                                                \
      const Vec pb = bcast32(p);                                                                      \
      FV_UNROLL for (int j = 0; j < NV_; ++j) acc[i][j] = mac(pb, y[j], acc[i][j]);                   \
    }                                                                                                 \
  }
    for (int left = strips[n].q1 - strips[n].q0; left > 0; left -= 4) {
      FV_QUERY(0) FV_QUERY(1) FV_QUERY(2) FV_QUERY(3)
      x += 4 * PANEL;
      FV_UNROLL for (int i = 0; i < (NK_ + 2) / 3; ++i) row[i] += 4;
    }
#undef FV_QUERY
  }
  FV_UNROLL for (int i = 0; i < NK_; ++i) FV_UNROLL for (int j = 0; j < NV_; ++j) store(sum + i * stride + j * W, acc[i][j]);
}

template <int NK_>
FV_INLINE void outer_rows(float* sum, int64_t stride, const Strip* strips, int count, int64_t panel, int nv) {
#define FV_CASE(n) \
  case n: return outer_block<NK_, (n) <= NV ? (n) : NV>(sum, stride, strips, count, panel);
  switch (nv) { FV_VECTORS(FV_CASE) }
#undef FV_CASE
}

// sum[key][d] += sum over the query tiles listed; `queries[n]` of them in tile n; rows of `sum` are `stride` apart.
static __attribute__((noinline)) void outer_pass(float* sum, int64_t stride, const Factor* factors, const int* queries,
                                                 int count, int64_t dim) {
  const int keys = factors[0].tile->keys;
  Strip strips[MAX_GROUPS][FV_BACK_ROWS];
  int used[MAX_GROUPS];
  for (int c = 0, g = 0, rows; c < keys; c += rows, ++g) {
    rows = group_of(keys - c, NK);
    used[g] = 0;
    for (int n = 0; n < count; ++n) {
      const Tile& tile = *factors[n].tile;
      int q0 = 0, q1 = queries[n];
      if (tile.partial) {
        uint64_t any = 0;
        for (int i = 0; i < rows; ++i) any |= tile.by_key[c + i];
        if (queries[n] < 64) any &= ((uint64_t)1 << queries[n]) - 1;
        if (!any) continue;
        q0 = __builtin_ctzll(any);
        q1 = 64 - __builtin_clzll(any);
      }
      strips[g][used[g]++] = Strip{factors[n].p + c * T, factors[n].rows, q0 & ~3, (q1 + 3) & ~3};
    }
  }
  const int vectors = (int)((dim + W - 1) / W);
  for (int v = 0; v < vectors; v += NV) {
    const int64_t panel = (int64_t)(v / NV) * T * PANEL;
    for (int c = 0, g = 0, rows; c < keys; c += rows, ++g) {
      rows = group_of(keys - c, NK);
      if (!used[g]) continue;
      float* to = sum + c * stride + v * W;
#define FV_CASE(n) \
  case n: outer_rows<(n) <= NK ? (n) : NK>(to, stride, strips[g], used[g], panel, group_of(vectors - v, NV)); break;
      switch (rows) { FV_ROWS(FV_CASE) }
#undef FV_CASE
    }
  }
}
