// Checks every size, picks the kernel, spreads the query tiles over the threads.
#include <pthread.h>

#include <cfloat>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "foveate.h"
#include "tile.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes) ((void)(from), (void)(bytes))
#endif

extern const fv_kernel fv_portable_kernel;
#ifdef FV_X86
extern const fv_kernel fv_avx2_kernel, fv_avx512_kernel, fv_bf16dot_emulated_kernel;
#endif
#ifdef FV_AVX512BF16
extern const fv_kernel fv_avx512bf16_kernel;
#endif
#ifdef FV_HAS_AMX
extern const fv_kernel fv_amx_kernel;
bool fv_amx_enable();  // asks the kernel for the tile registers, once
#endif

namespace {

#ifndef FV_WORKSPACE  // the sanitizer builds take less, so that small requests need several rounds
#define FV_WORKSPACE (16 << 20)
#endif
const int64_t WORKSPACE = FV_WORKSPACE;  // floats of prepared keys and values held at once

const fv_kernel* kernel_of(int32_t isa) {
  switch (isa) {
    case FV_PORTABLE: return &fv_portable_kernel;
#ifdef FV_X86
    case FV_AVX2: return &fv_avx2_kernel;
    case FV_AVX512: return &fv_avx512_kernel;
    case FV_BF16DOT_EMULATED: return &fv_bf16dot_emulated_kernel;
#endif
#ifdef FV_AVX512BF16
    case FV_AVX512_BF16: return &fv_avx512bf16_kernel;
#endif
#ifdef FV_HAS_AMX
    case FV_AMX: return &fv_amx_kernel;
#endif
    default: return nullptr;
  }
}

bool cpu_has(int32_t isa) {
  if (isa == FV_PORTABLE) return true;
#ifdef FV_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case FV_AVX2: return avx2;
    case FV_AVX512: return avx512;
    case FV_BF16DOT_EMULATED: return avx512;
    case FV_AVX512_BF16: return avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef FV_HAS_AMX
    case FV_AMX: return avx512 && __builtin_cpu_supports("avx512bf16") && fv_amx_enable();
#endif
  }
#endif
  return false;
}

enum Phase { PREPARE, FORWARD, JOIN, BACKWARD, WRITE };

struct Job {
  const fv_args* args;
  const fv_kernel* kernel;
  fv_prepared ready;
  Phase phase;
  bool backward;
  int64_t first_head, heads;  // the run of (batch, kv head) pairs of this round
  int64_t tasks, q_tiles, k_tiles;
  int64_t floats;  // scratch of one thread
  float* scratch;
  int64_t parts, state_floats;  // forward: parts of each row of key tiles
  float* states;
  int64_t chunks;      // backward: ranges of query tiles that add up apart
  int64_t sum_floats;  // one task's sums
  float* sums;         // chunks > 1: one per head of the round and chunk; else one per thread
  fv_sums* found;      // the same, carved
  int64_t next_task, next_thread;  // atomic
};

int64_t groups_of(const fv_args& a) { return a.heads / a.kv_heads; }
int64_t rounded(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

// ------------------------------------------------------------------------------------------------- backward tasks
// Key tiles of query tile i, over the heads that share one kv head; the range they lie in grows by them.
int64_t work_of(const Job& job, int64_t b, int64_t hkv, int64_t i, int64_t* first, int64_t* last) {
  const fv_args& a = *job.args;
  int64_t work = 0;
  for (int64_t h = hkv * groups_of(a); h < (hkv + 1) * groups_of(a); ++h) {
    const fv_rows rows(a, b, h, i);
    if (rows.begin == rows.end) continue;
    work += rows.end - rows.begin;
    if (rows.tile(rows.begin) < *first) *first = rows.tile(rows.begin);
    if (rows.tile(rows.end - 1) >= *last) *last = rows.tile(rows.end - 1) + 1;
    if (a.kind != FV_LAYOUT || a.layout_heads == 1) {  // the same for every head of the group
      work *= groups_of(a);
      break;
    }
  }
  return work;
}

fv_sums carve_sums(const fv_args& a, float* base) {
  fv_sums x = {};
  const int64_t rows = rounded(a.k_len, FV_TILE);
  x.dk = base;
  x.dv = x.dk + rows * rounded(a.dim, 16);
  float* at = x.dv + rows * rounded(a.v_dim, 16);
  if (a.dbias_key) x.key_bias = at, at += rounded(groups_of(a) * a.k_len, 16);
  if (a.dtable) x.table = at;
  return x;
}

int64_t sum_floats(const fv_args& a) {
  return rounded(a.k_len, FV_TILE) * (rounded(a.dim, 16) + rounded(a.v_dim, 16)) +
         (a.dbias_key ? rounded(groups_of(a) * a.k_len, 16) : 0) + (a.dtable ? rounded(groups_of(a) * a.table_len, 16) : 0);
}

// The query tiles [first, last) of one chunk: equal shares of the key tiles to visit, cut at whole blocks.
void chunk_of(const Job& job, int64_t b, int64_t hkv, int64_t chunk, int64_t* first, int64_t* last) {
  *first = 0;
  *last = job.q_tiles;
  if (job.chunks == 1) return;
  int64_t ignored_first = INT64_MAX, ignored_last = 0, total = 0, seen = 0;
  for (int64_t i = 0; i < job.q_tiles; ++i) total += work_of(job, b, hkv, i, &ignored_first, &ignored_last);
  *first = *last = chunk ? job.q_tiles : 0;
  for (int64_t i = 0, number = 0; i < job.q_tiles; ++i) {
    if (i % FV_BACK_ROWS == 0)
      while (number < job.chunks - 1 && seen * job.chunks >= total * (number + 1)) {
        ++number;
        if (number == chunk) *first = i;
        if (number == chunk + 1) *last = i;
      }
    seen += work_of(job, b, hkv, i, &ignored_first, &ignored_last);
    if (i == job.q_tiles - 1) {
      if (number <= chunk) *last = job.q_tiles;
      if (number < chunk) *first = job.q_tiles;
    }
  }
}

void write_tables(const Job& job, const fv_sums* sums, int64_t tasks, int64_t b, int64_t hkv) {
  const fv_args& a = *job.args;
  if (!a.dtable) return;
  const int64_t size = groups_of(a) * a.table_len;
  float* to = a.dtable + (b * a.heads + hkv * groups_of(a)) * a.table_len;
  for (int64_t x = 0; x < size; ++x) {
    float total = 0.f;
    for (int64_t n = 0; n < tasks; ++n) total += sums[n].table[x];
    to[x] = total;
  }
}

void zero(float* x, int64_t count) { std::memset(x, 0, sizeof(float) * static_cast<size_t>(count)); }

void backward_task(Job& job, float* buffer, int64_t task, int64_t thread) {
  const fv_args& a = *job.args;
  const int64_t head = task / job.chunks, chunk = task % job.chunks;
  const int64_t b = (job.first_head + head) / a.kv_heads, hkv = (job.first_head + head) % a.kv_heads;
  const int64_t slot = job.chunks > 1 ? task : thread, dim = rounded(a.dim, 16), v_dim = rounded(a.v_dim, 16);
  fv_sums& sums = job.found[slot];
  sums = carve_sums(a, job.sums + slot * job.sum_floats);
  int64_t first, last;
  chunk_of(job, b, hkv, chunk, &first, &last);
  sums.first = INT64_MAX;
  sums.last = 0;
  for (int64_t i = first; i < last; ++i) work_of(job, b, hkv, i, &sums.first, &sums.last);
  if (sums.first < sums.last) {
    zero(sums.dk + sums.first * FV_TILE * dim, (sums.last - sums.first) * FV_TILE * dim);
    zero(sums.dv + sums.first * FV_TILE * v_dim, (sums.last - sums.first) * FV_TILE * v_dim);
  }
  if (sums.key_bias) zero(sums.key_bias, groups_of(a) * a.k_len);
  if (sums.table) zero(sums.table, groups_of(a) * a.table_len);
  job.kernel->backward_rows(a, job.ready, buffer, sums, b, hkv, first, last);
  if (job.chunks > 1) return;
  for (int64_t j = 0; j < job.k_tiles; ++j) job.kernel->write_keys(a, &sums, 1, b, hkv, j);
  write_tables(job, &sums, 1, b, hkv);
}

// --------------------------------------------------------------------------------------------------------- threads
void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  const fv_args& a = *job.args;
  const int64_t groups = groups_of(a);
  const int64_t thread = __atomic_fetch_add(&job.next_thread, 1, __ATOMIC_RELAXED);
  if (thread >= a.threads) return;  // a pool that runs more than it was asked for: there is no scratch for it
  float* buffer = job.scratch + job.floats * thread;
  for (;;) {
    const int64_t task = __atomic_fetch_add(&job.next_task, 1, __ATOMIC_RELAXED);
    if (task >= job.tasks) return;
    switch (job.phase) {
      case PREPARE: {
        const int64_t bh = job.first_head + task / job.k_tiles;
        job.kernel->prepare_tile(a, job.ready, job.backward, bh / a.kv_heads, bh % a.kv_heads, task % job.k_tiles);
        break;
      }
      case FORWARD: case JOIN: {
        // consecutive tasks: the parts of a row, then the heads of one group on the same query tile, so keys and values
        // stay in cache; the last query tile first, because under causality it has the most to do
        const int64_t parts = job.phase == JOIN ? 1 : job.parts;
        const int64_t part = task % parts, g = task / parts % groups, rest = task / parts / groups;
        const int64_t i = job.q_tiles - 1 - rest % job.q_tiles, bh = job.first_head + rest / job.q_tiles;
        const int64_t b = bh / a.kv_heads, h = bh % a.kv_heads * groups + g;
        float* states = job.states + task / parts * job.parts * job.state_floats;
        if (job.phase == JOIN)
          job.kernel->join_tile(a, states, job.parts, b, h, i);
        else
          job.kernel->query_tile(a, job.ready, buffer, b, h, i,
                                 fv_part{part, parts, parts > 1 ? states + part * job.state_floats : nullptr});
        break;
      }
      case BACKWARD: backward_task(job, buffer, task, thread); break;
      case WRITE: {
        const int64_t head = task / job.k_tiles, bh = job.first_head + head, j = task % job.k_tiles;
        const fv_sums* sums = job.found + head * job.chunks;
        job.kernel->write_keys(a, sums, job.chunks, bh / a.kv_heads, bh % a.kv_heads, j);
        if (j == 0) write_tables(job, sums, job.chunks, bh / a.kv_heads, bh % a.kv_heads);
        break;
      }
    }
  }
}

void* work_thread(void* data) {
  work(data);
  return nullptr;
}

// Threads of our own for the length of one call, where no pool was handed in.
void spawn(Job* job, int64_t threads) {
  pthread_t* others = static_cast<pthread_t*>(std::malloc(sizeof(pthread_t) * static_cast<size_t>(threads)));
  int64_t started = 0;
  if (others)
    while (started < threads - 1 && pthread_create(&others[started], nullptr, work_thread, job) == 0) ++started;
  work(job);
  for (int64_t n = 0; n < started; ++n) pthread_join(others[n], nullptr);
  std::free(others);
}

void run(Job* job, int64_t tasks, Phase phase) {
  const fv_args& a = *job->args;
  job->tasks = tasks;
  job->phase = phase;
  job->next_task = job->next_thread = 0;
  const int64_t threads = tasks < a.threads ? tasks : a.threads;
  if (threads == 1)
    work(job);
  else if (a.parallel)
    a.parallel(work, job, static_cast<unsigned>(threads), 0);
  else
    spawn(job, threads);
}

// --------------------------------------------------------------------------------------------------------- checks
// So far below the end of int64 that sums and small multiples of counts that pass need no checks of their own.
const int64_t MOST = INT64_C(1) << 56;

bool product_fits(std::initializer_list<int64_t> counts) {
  int64_t x = 1;
  for (const int64_t count : counts)
    if (__builtin_mul_overflow(x, count, &x) || x > MOST) return false;
  return true;
}

// Can every element be reached without overflow? Strides of dimensions of size 1 are never used.
bool strides_fit(const int64_t* strides, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) {
    int64_t reach;
    if (size > 1 && (__builtin_mul_overflow(*strides, size - 1, &reach) || reach > MOST || reach < -MOST)) return false;
    ++strides;
  }
  return true;
}

int32_t fail(char* message, int64_t size, const char* what) {
  if (message && size > 0) {
    std::snprintf(message, static_cast<size_t>(size), "%s", what);
  }
  return -1;
}

bool nothing_to_do(const fv_args& a) { return a.batch == 0 || a.heads == 0 || a.q_len == 0; }

const char* check_layout(const fv_args& a) {
  const int64_t q_tiles = (a.q_len + FV_TILE - 1) / FV_TILE, k_tiles = (a.k_len + FV_TILE - 1) / FV_TILE;
  if (a.layout_batch != 1 && a.layout_batch != a.batch) return "layout batch must be 1 or the batch";
  if (a.layout_heads != 1 && a.layout_heads != a.heads) return "layout heads must be 1 or the heads";
  if (a.nnz < 0 || a.bitmaps < 0 || !a.row_ptr) return "bad layout";
  if (a.nnz > 0 && (!a.tile_idx || !a.tile_id)) return "bad layout";
  if (a.bitmaps > 0 && !a.dictionary) return "bad layout";
  const int64_t rows = a.layout_batch * a.layout_heads * q_tiles;
  int64_t tiles;  // as many as there can be: what is read of tile_idx and tile_id is bounded by the lengths
  if (!__builtin_mul_overflow(rows, k_tiles, &tiles) && a.nnz > tiles) return "bad layout";
  if (a.row_ptr[0] != 0 || a.row_ptr[rows] != a.nnz) return "row_ptr must run from 0 to the number of tiles";
  bool rising = true;
  for (int64_t r = 0; r < rows; ++r) {
    if (a.row_ptr[r + 1] < a.row_ptr[r] || a.row_ptr[r + 1] > a.nnz) return "row_ptr must not fall";
    for (int64_t n = a.row_ptr[r] + 1; n < a.row_ptr[r + 1]; ++n) rising &= a.tile_idx[n] > a.tile_idx[n - 1];
  }
  bool bad = false;
  for (int64_t n = 0; n < a.nnz; ++n)
    bad |= (uint64_t)(int64_t)a.tile_idx[n] >= (uint64_t)k_tiles || (uint64_t)(int64_t)a.tile_id[n] > (uint64_t)a.bitmaps;
  if (bad) return "tile_idx or tile_id out of range";
  return rising ? nullptr : "tile_idx must rise within each row";
}

const char* check_table(const fv_args& a) {
  if (!a.q_code || !a.k_code || a.table_len < 1 || a.table_len > INT32_MAX)
    return "a table needs its codes and a length";
  if (a.table_stride != 0 && a.table_stride < a.table_len) return "table heads overlap";
  if (!strides_fit(&a.table_stride, {a.heads})) return "strides overflow";
  int32_t low[2], high[2];
  for (int side = 0; side < 2; ++side) {
    const int32_t* codes = side ? a.k_code : a.q_code;
    low[side] = high[side] = codes[0];
    for (int64_t n = 1; n < (side ? a.k_len : a.q_len); ++n) {
      low[side] = codes[n] < low[side] ? codes[n] : low[side];
      high[side] = codes[n] > high[side] ? codes[n] : high[side];
    }
  }
  const int64_t least = static_cast<int64_t>(low[0]) - high[1], most = static_cast<int64_t>(high[0]) - low[1];
  return least < 0 || most >= a.table_len ? "codes point outside the table" : nullptr;
}

const char* check(const fv_args& a, bool backward) {
  if (a.dtype != FV_F32 && a.dtype != FV_BF16) return "dtype must be float32 or bfloat16";
  if (a.kind != FV_FULL && a.kind != FV_CAUSAL && a.kind != FV_LAYOUT) return "unknown kind";
  if (a.normalizer != FV_SOFTMAX && a.normalizer != FV_SIGMOID && a.normalizer != FV_RELU) return "unknown normalizer";
  if (a.batch < 0 || a.heads < 0 || a.q_len < 0 || a.kv_heads < 0 || a.k_len < 0) return "negative size";
  if (a.dim < 1 || a.dim > FV_MAX_DIM || a.v_dim < 1 || a.v_dim > FV_MAX_DIM) return "head dims must lie in 1..512";
  if (nothing_to_do(a)) {  // nothing to write, or zeros
    const bool fits = product_fits({a.batch, a.kv_heads, a.k_len, FV_MAX_DIM}) && product_fits({a.batch, a.heads, a.k_len}) &&
                      (!a.dtable || (a.table_len >= 0 && product_fits({a.batch, a.heads, a.table_len})));
    return backward && !fits ? "sizes overflow" : nullptr;
  }
  if (a.kv_heads < 1 || a.heads % a.kv_heads) return "heads must be a multiple of kv_heads";
  if (a.k_len < 1) return "k_len must be at least 1";
  if (a.threads < 1 || a.threads > 4096) return "threads must lie in 1..4096";
  // its reciprocal is used, which must be finite and not 0
  if (a.softcap != 0.f && !(a.softcap >= FLT_MIN && a.softcap <= FLT_MAX)) return "softcap must be 0 or positive and finite";
  if (!(a.dropout >= 0.f && a.dropout < 1.f)) return "dropout must lie in [0, 1)";
  if (!a.q || !a.k || !a.v || !a.out) return "null tensor";
  const bool softmax = a.normalizer == FV_SOFTMAX;
  if (softmax != (a.lse != nullptr)) return "lse belongs to softmax and to nothing else";
  if (!softmax && a.sinks) return "sinks belong to softmax";
  // whatever is counted later in elements or floats fits
  if (!product_fits({a.batch, a.heads, a.q_len}) || !product_fits({a.batch, a.heads, a.k_len}) ||
      !product_fits({a.batch, a.heads, a.q_len + FV_TILE, rounded(a.dim, 16) + rounded(a.v_dim, 16)}) ||
      !product_fits({a.batch, a.heads, a.k_len + FV_TILE, rounded(a.dim, 16) + rounded(a.v_dim, 16)}))
    return "sizes overflow";
  if (!strides_fit(a.q_stride, {a.batch, a.heads, a.q_len}) || !strides_fit(a.out_stride, {a.batch, a.heads, a.q_len}) ||
      !strides_fit(a.k_stride, {a.batch, a.kv_heads, a.k_len}) || !strides_fit(a.v_stride, {a.batch, a.kv_heads, a.k_len}) ||
      (a.temperature && !strides_fit(a.temperature_stride, {a.batch, a.heads, a.q_len})) ||
      (a.bias && !strides_fit(a.bias_stride, {a.batch, a.heads, a.q_len, a.k_len})))
    return "strides overflow";
  if (a.bias && a.bias_dtype != FV_F32 && a.bias_dtype != FV_BF16 && a.bias_dtype != FV_F16)
    return "bias must be float32, bfloat16 or float16";
  if (a.table)
    if (const char* what = check_table(a)) return what;
  if (backward) {
    if (!a.dout || !a.dq || !a.dk || !a.dv) return "null gradient";
    if (softmax != (a.delta != nullptr)) return "delta belongs to softmax and to nothing else";
    if (!softmax && a.dlse) return "dlse belongs to softmax";
    if ((a.dbias || a.dbias_query || a.dbias_key) && !a.bias) return "a gradient for a bias that is not there";
    if (a.dbias && (a.dbias_stride[2] == 0 || a.dbias_stride[3] == 0)) return "dbias must have queries and keys";
    if (a.dtable && !a.table) return "a gradient for a table that is not there";
    if (!product_fits({rounded(a.q_len, FV_TILE) / FV_TILE, rounded(a.k_len, FV_TILE) / FV_TILE, groups_of(a), a.threads}) ||
        (a.dtable && !product_fits({a.batch, a.heads, a.table_len})))
      return "sizes overflow";
    if (!strides_fit(a.dout_stride, {a.batch, a.heads, a.q_len}) ||
        (a.dbias && !strides_fit(a.dbias_stride, {a.batch, a.heads, a.q_len, a.k_len})))
      return "strides overflow";
    if (a.dtemperature && !a.temperature) return "a gradient for a temperature that is not there";
  }
  return a.kind == FV_LAYOUT ? check_layout(a) : nullptr;
}

// ----------------------------------------------------------------------------------------------------------- calls
// Room for everything, in one allocation. Behind each part, and behind each thread's scratch, lie floats that are nobody's:
// the address sanitizer watches them.
const int64_t GUARD = 16;

void guard(float* end) { ASAN_POISON_MEMORY_REGION(end, sizeof(float) * GUARD); }

struct Room {
  int64_t floats = 0, ends[5], parts = 0;
  bool overflow = false;
  void* memory = nullptr;
  int64_t take(int64_t count, int64_t times) {
    int64_t wanted, here = floats;
    if (__builtin_mul_overflow(rounded(count, 16), times, &wanted) || wanted > INT64_MAX / 64) {
      overflow = true;
      return 0;
    }
    floats += wanted + GUARD;
    ends[parts++] = floats - GUARD;
    return here;
  }
  bool get() {
    if (posix_memalign(&memory, 64, static_cast<size_t>(floats) * sizeof(float))) return false;
    for (int64_t n = 0; n < parts; ++n) guard(at(ends[n]));
    return true;
  }
  float* at(int64_t offset) { return static_cast<float*>(memory) + offset; }
  ~Room() { std::free(memory); }
};

void open_job(const fv_args& a, const fv_kernel* kernel, bool backward, Job* job) {
  *job = Job();
  job->args = &a;
  job->kernel = kernel;
  job->backward = backward;
  job->q_tiles = (a.q_len + FV_TILE - 1) / FV_TILE;
  job->k_tiles = (a.k_len + FV_TILE - 1) / FV_TILE;
  job->floats = rounded(kernel->scratch_floats(a, backward), 16) + GUARD;
  job->parts = job->chunks = 1;
}

// Copies are worth making ahead when each key tile is visited several times; a bounded number of heads at once.
// Returns how many (batch, kv head) pairs one round takes; `enough` of them keep the threads fed.
int64_t plan_copies(Job* job, int64_t all_heads, int64_t enough) {
  const fv_args& a = *job->args;
  fv_prepared& ready = job->ready;
  job->kernel->tile_floats(a, job->backward, &ready.k_tile, &ready.v_tile);
  const int64_t visits = a.kind == FV_LAYOUT ? a.nnz / (a.layout_batch * a.layout_heads) * groups_of(a) / job->k_tiles
                                             : job->q_tiles * groups_of(a) / (a.kind == FV_CAUSAL ? 2 : 1);
  if (visits < 3) ready.k_tile = ready.v_tile = 0;
  const int64_t head_floats = (ready.k_tile + ready.v_tile) * job->k_tiles;
  if (head_floats == 0 || head_floats <= WORKSPACE / all_heads) return all_heads;
  const int64_t round = WORKSPACE / head_floats;
  return round >= enough ? round : enough < all_heads ? enough : all_heads;
}

// Strides of dimensions of size 1 mean nothing and may be anything; here they become 0.
void settle(int64_t* strides, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) {
    if (size == 1) *strides = 0;
    ++strides;
  }
}

void settle_strides(fv_args* a) {
  for (int64_t* strides : {a->q_stride, a->out_stride, a->dout_stride, a->temperature_stride})
    settle(strides, {a->batch, a->heads, a->q_len});
  for (int64_t* strides : {a->k_stride, a->v_stride}) settle(strides, {a->batch, a->kv_heads, a->k_len});
  for (int64_t* strides : {a->bias_stride, a->dbias_stride}) settle(strides, {a->batch, a->heads, a->q_len, a->k_len});
  settle(&a->table_stride, {a->heads});
}

// One query per head: the heads that share a kv head become the queries of one, so that keys and values are read once.
bool fold_groups(const fv_args& a, fv_args* folded) {
  if (a.q_len != 1 || a.heads == a.kv_heads || groups_of(a) > FV_TILE || a.kind == FV_LAYOUT || a.sinks || a.temperature ||
      a.bias || a.table || a.dropout > 0.f)
    return false;
  *folded = a;
  folded->kind = FV_FULL;  // one query: bottom-right causal sees everything
  folded->q_len = groups_of(a);
  folded->heads = a.kv_heads;
  folded->q_stride[2] = a.q_stride[1];
  folded->q_stride[1] = a.q_stride[1] * groups_of(a);
  folded->out_stride[2] = a.out_stride[1];
  folded->out_stride[1] = a.out_stride[1] * groups_of(a);
  return true;
}

const char* forward(const fv_args& a, const fv_kernel* kernel) {
  Job job;
  open_job(a, kernel, false, &job);
  const int64_t all_heads = a.batch * a.kv_heads, groups = groups_of(a), rows = job.q_tiles * groups;
  const int64_t round = plan_copies(&job, all_heads, (2 * a.threads + rows - 1) / rows);
  const int64_t tasks = round * rows;
  if (tasks < 4 * a.threads && a.threads > 1) {  // too few for the threads: cut the rows of key tiles
    job.parts = (4 * a.threads + tasks - 1) / tasks;
    if (job.parts > job.k_tiles / 8) job.parts = job.k_tiles / 8 ? job.k_tiles / 8 : 1;
    if (tasks >= a.threads && tasks % a.threads == 0 && a.kind == FV_FULL) job.parts = 1;  // an equal share each
  }
  job.state_floats = kernel->state_floats(a);
  Room room;
  const int64_t scratch = room.take(job.floats, a.threads), k = room.take(job.ready.k_tile, job.k_tiles * round),
                v = room.take(job.ready.v_tile, job.k_tiles * round),
                states = room.take(job.parts > 1 ? job.state_floats : 0, tasks * job.parts);
  if (room.overflow) return "sizes overflow";
  if (!room.get()) return "out of memory";
  job.scratch = room.at(scratch);
  for (int64_t thread = 1; thread <= a.threads; ++thread) guard(job.scratch + job.floats * thread - GUARD);
  job.ready.k = job.ready.k_tile ? room.at(k) : nullptr;
  job.ready.v = job.ready.v_tile ? room.at(v) : nullptr;
  job.states = room.at(states);
  for (int64_t first = 0; first < all_heads; first += round) {
    job.first_head = job.ready.first = first;
    job.heads = all_heads - first < round ? all_heads - first : round;
    if (job.ready.k || job.ready.v) run(&job, job.heads * job.k_tiles, PREPARE);
    run(&job, job.heads * rows * job.parts, FORWARD);
    if (job.parts > 1) run(&job, job.heads * rows, JOIN);
  }
  return nullptr;
}

const char* backward(const fv_args& a, const fv_kernel* kernel) {
  Job job;
  open_job(a, kernel, true, &job);
  const int64_t all_heads = a.batch * a.kv_heads, blocks = (job.q_tiles + FV_BACK_ROWS - 1) / FV_BACK_ROWS;
  // heads that add to the same dbias must follow each other; their query tiles need not
  const bool shared = a.dbias && ((a.dbias_stride[0] == 0 && a.batch > 1) || (a.dbias_stride[1] == 0 && a.kv_heads > 1));
  int64_t round = plan_copies(&job, all_heads, a.threads);
  if (shared) {
    job.chunks = a.threads < blocks ? a.threads : blocks;
    round = 1;
  } else {  // the fewest chunks that leave at most a tenth of the threads' time idle
    for (; job.chunks < a.threads && job.chunks < blocks; ++job.chunks) {
      const int64_t tasks = all_heads * job.chunks, turns = (tasks + a.threads - 1) / a.threads;
      if (tasks * 10 >= turns * a.threads * 9) break;
    }
    if (job.chunks > 1) {
      const int64_t most = (a.threads + job.chunks - 1) / job.chunks * 2;  // as many sums as there are threads, twice
      round = round < most ? round : most;
    }
  }
  job.sum_floats = rounded(sum_floats(a), 16);
  const int64_t slots = job.chunks > 1 ? round * job.chunks : a.threads;
  Room room;
  const int64_t scratch = room.take(job.floats, a.threads), k = room.take(job.ready.k_tile, job.k_tiles * round),
                v = room.take(job.ready.v_tile, job.k_tiles * round), sums = room.take(job.sum_floats, slots),
                found = room.take((sizeof(fv_sums) + 3) / 4, slots);
  if (room.overflow) return "sizes overflow";
  if (!room.get()) return "out of memory";
  job.scratch = room.at(scratch);
  for (int64_t thread = 1; thread <= a.threads; ++thread) guard(job.scratch + job.floats * thread - GUARD);
  job.ready.k = job.ready.k_tile ? room.at(k) : nullptr;
  job.ready.v = job.ready.v_tile ? room.at(v) : nullptr;
  job.sums = room.at(sums);
  job.found = reinterpret_cast<fv_sums*>(room.at(found));
  if (a.dbias_query) zero(a.dbias_query, a.batch * a.heads * a.q_len);  // the tiles add to it
  for (int64_t first = 0; first < all_heads; first += round) {
    job.first_head = job.ready.first = first;
    job.heads = all_heads - first < round ? all_heads - first : round;
    if (job.ready.k || job.ready.v) run(&job, job.heads * job.k_tiles, PREPARE);
    run(&job, job.heads * job.chunks, BACKWARD);
    if (job.chunks > 1) run(&job, job.heads * job.k_tiles, WRITE);
  }
  return nullptr;
}

// Without queries the sums over queries are 0.
void clear_sums(const fv_args& a) {
  const int64_t size = a.dtype == FV_F32 ? 4 : 2, rows = a.batch * a.kv_heads * a.k_len;
  if (a.dk) std::memset(a.dk, 0, static_cast<size_t>(rows * a.dim * size));
  if (a.dv) std::memset(a.dv, 0, static_cast<size_t>(rows * a.v_dim * size));
  if (a.dbias_key) zero(a.dbias_key, a.batch * a.heads * a.k_len);
  if (a.dtable) zero(a.dtable, a.batch * a.heads * a.table_len);
}

int32_t call(const fv_args* args, char* message, int64_t message_size, bool back) {
  if (!args) return fail(message, message_size, "no arguments");
  if (args->abi != FV_ABI) return fail(message, message_size, "the library and its caller are of different versions");
  if (const char* what = check(*args, back)) return fail(message, message_size, what);
  int32_t isa = args->isa;
  if (!fv_isa_available(isa)) return fail(message, message_size, "this CPU or build lacks the instruction set asked for");
  if (nothing_to_do(*args)) {
    if (back) clear_sums(*args);
    return 0;
  }
  const bool pairs = isa == FV_AVX512_BF16 || isa == FV_BF16DOT_EMULATED;
  if (pairs && (back || args->dtype == FV_F32)) isa = FV_AVX512;
  if (isa == FV_AMX && args->dtype == FV_F32) isa = FV_AVX512;
  fv_args settled = *args, folded;
  settle_strides(&settled);
  const fv_args& a = !back && fold_groups(settled, &folded) ? folded : settled;
  const char* what = back ? backward(a, kernel_of(isa)) : forward(a, kernel_of(isa));
  return what ? fail(message, message_size, what) : 0;
}

}  // namespace

FV_EXPORT int64_t fv_sizeof_args(void) { return sizeof(fv_args); }

FV_EXPORT int32_t fv_isa_available(int32_t isa) { return kernel_of(isa) != nullptr && cpu_has(isa) ? 1 : 0; }

FV_EXPORT int32_t fv_forward(const fv_args* args, char* message, int64_t message_size) {
  return call(args, message, message_size, false);
}

FV_EXPORT int32_t fv_backward(const fv_args* args, char* message, int64_t message_size) {
  return call(args, message, message_size, true);
}
