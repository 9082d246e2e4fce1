// The key tiles of one row of query tiles, whatever the kind of request, and what an instruction set offers.
#pragma once
#include "foveate.h"

#define FV_STEP 4       // key tiles that share one rescaling of the output
#define FV_BACK_STEP 2  // key tiles the backward holds at once,
#define FV_BACK_ROWS 4  // for this many query tiles

// Keys and values in the form the kernel reads, made once per head instead of once per visit; null where they are read
// in place. Both hold whole tiles for a run of (batch, kv head) pairs that begins at `first`.
struct fv_prepared {
  float* k;
  float* v;
  int64_t first, k_tile, v_tile;  // k_tile, v_tile: floats of one tile
};

// A part of a query tile's row of key tiles: number `part` of `parts`. What it found goes to `state`, to be merged.
struct fv_part {
  int64_t part, parts;
  float* state;  // null: the row is whole and its result goes to out and lse
};

// Where one task of the backward adds up: gradients of one kv head, float32, rows of up(dim, 16) and up(v_dim, 16).
struct fv_sums {
  float* dk;
  float* dv;
  float* key_bias;      // (groups, k_len) or null
  float* table;         // (groups, table_len) or null
  int64_t first, last;  // key tiles that the task may touch: only these rows of dk and dv are set
};

// What each instruction set offers to the dispatcher. `backward` chooses what tiles are prepared for.
struct fv_kernel {
  void (*query_tile)(const fv_args& a, const fv_prepared& ready, float* buffer, int64_t b, int64_t h, int64_t i,
                     const fv_part& part);
  // Joins the states of the parts of one query tile and writes its result.
  void (*join_tile)(const fv_args& a, float* states, int64_t parts, int64_t b, int64_t h, int64_t i);
  // The gradients of the query tiles [first, last) of all heads that share one kv head.
  void (*backward_rows)(const fv_args& a, const fv_prepared& ready, float* buffer, const fv_sums& sums, int64_t b,
                        int64_t hkv, int64_t first, int64_t last);
  // Joins the sums of the tasks of one kv head for key tile j and writes dk, dv and dbias_key.
  void (*write_keys)(const fv_args& a, const fv_sums* sums, int64_t tasks, int64_t b, int64_t hkv, int64_t j);
  void (*prepare_tile)(const fv_args& a, const fv_prepared& ready, bool backward, int64_t b, int64_t hkv, int64_t j);
  int64_t (*scratch_floats)(const fv_args& a, bool backward);
  int64_t (*state_floats)(const fv_args& a);
  // Floats of one prepared tile of keys and of values; 0 where the caller's memory serves as it is.
  void (*tile_floats)(const fv_args& a, bool backward, int64_t* k, int64_t* v);
};
#define FV_KERNEL(isa)                                                                                    \
  extern const fv_kernel isa##_kernel = {isa::run_tile,     isa::join_tile,    isa::run_backward,          \
                                         isa::write_keys,   isa::prepare_tile, isa::scratch_floats,        \
                                         isa::state_floats, isa::tile_floats};

namespace {  // internal linkage: each instruction set keeps its own copy
struct fv_rows {
  const fv_args& a;
  int64_t begin, end;  // positions in the row: indices into tile_idx, or key tiles
  int64_t reach;       // causal: the last key that query 0 of this tile sees

  fv_rows(const fv_args& args, int64_t b, int64_t h, int64_t i) : a(args), begin(0), end(0), reach(0) {
    const int64_t k_tiles = (a.k_len + FV_TILE - 1) / FV_TILE;
    if (a.kind == FV_FULL) {
      end = k_tiles;
    } else if (a.kind == FV_CAUSAL) {
      reach = i * FV_TILE + (a.k_len - a.q_len);
      const int64_t last_query = i * FV_TILE + FV_TILE - 1 < a.q_len - 1 ? i * FV_TILE + FV_TILE - 1 : a.q_len - 1;
      const int64_t last_key = last_query + (a.k_len - a.q_len);
      end = last_key < 0 ? 0 : last_key / FV_TILE + 1;
      if (end > k_tiles) end = k_tiles;
    } else {
      const int64_t q_tiles = (a.q_len + FV_TILE - 1) / FV_TILE;
      const int64_t lb = a.layout_batch == 1 ? 0 : b, lh = a.layout_heads == 1 ? 0 : h;
      const int64_t row = (lb * a.layout_heads + lh) * q_tiles + i;
      begin = a.row_ptr[row];
      end = a.row_ptr[row + 1];
    }
  }

  int64_t tile(int64_t at) const { return a.kind == FV_LAYOUT ? a.tile_idx[at] : at; }

  // The tile's bitmap, or null when every pair is allowed. `made` is room for one that has to be made.
  const uint64_t* bitmap(int64_t at, uint64_t* made) const {
    if (a.kind == FV_FULL) return nullptr;
    if (a.kind == FV_LAYOUT) return a.tile_id[at] ? a.dictionary + (int64_t)(a.tile_id[at] - 1) * FV_TILE : nullptr;
    const int64_t room = reach - at * FV_TILE;  // query r sees keys c <= r + room of this tile
    if (room >= FV_TILE - 1) return nullptr;
    for (int r = 0; r < FV_TILE; ++r) {
      const int64_t seen = r + room + 1;
      made[r] = seen <= 0 ? 0 : seen >= FV_TILE ? ~(uint64_t)0 : ((uint64_t)1 << seen) - 1;
    }
    return made;
  }
};
}  // namespace
