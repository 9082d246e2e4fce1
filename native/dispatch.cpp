// Checks every size, picks the kernel, spreads the query tiles over the threads.
#include <pthread.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "foveate.h"
#include "tile.h"

extern const fv_kernel fv_portable_kernel;
#ifdef FV_X86
extern const fv_kernel fv_avx2_kernel, fv_avx512_kernel, fv_bf16dot_emulated_kernel;
#endif
#ifdef FV_AVX512BF16
extern const fv_kernel fv_avx512bf16_kernel;
#endif

namespace {

const int64_t WORKSPACE = 16 << 20;  // floats of prepared keys and values held at once

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
  }
#endif
  return false;
}

struct Job {
  const fv_forward_args* args;
  const fv_kernel* kernel;
  fv_prepared ready;
  bool preparing;
  int64_t first_head, heads;  // the run of (batch, kv head) pairs of this round
  int64_t tasks, q_tiles, k_tiles;
  int64_t floats;             // scratch of one thread
  float* scratch;
  int64_t next_task, next_thread;  // atomic
};

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  const fv_forward_args& a = *job.args;
  const int64_t groups = a.heads / a.kv_heads;
  float* buffer = job.scratch + job.floats * __atomic_fetch_add(&job.next_thread, 1, __ATOMIC_RELAXED);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&job.next_task, 1, __ATOMIC_RELAXED);
    if (task >= job.tasks) return;
    if (job.preparing) {
      const int64_t bh = job.first_head + task / job.k_tiles;
      job.kernel->prepare_tile(a, job.ready, bh / a.kv_heads, bh % a.kv_heads, task % job.k_tiles);
      continue;
    }
    // consecutive tasks: the heads of one group on the same query tile, so keys and values stay in cache;
    // the last query tile first, because under causality it has the most to do
    const int64_t g = task % groups, rest = task / groups;
    const int64_t i = job.q_tiles - 1 - rest % job.q_tiles, bh = job.first_head + rest / job.q_tiles;
    job.kernel->run_tile(a, job.ready, buffer, bh / a.kv_heads, bh % a.kv_heads * groups + g, i);
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

void run(Job* job, int64_t tasks, bool preparing) {
  const fv_forward_args& a = *job->args;
  job->tasks = tasks;
  job->preparing = preparing;
  job->next_task = job->next_thread = 0;
  const int64_t threads = tasks < a.threads ? tasks : a.threads;
  if (threads == 1)
    work(job);
  else if (a.parallel)
    a.parallel(work, job, static_cast<unsigned>(threads), 0);
  else
    spawn(job, threads);
}

bool product_fits(int64_t a, int64_t b, int64_t c) {
  int64_t x;
  return !__builtin_mul_overflow(a, b, &x) && !__builtin_mul_overflow(x, c, &x);
}

int32_t fail(char* message, int64_t size, const char* what) {
  if (message && size > 0) {
    std::snprintf(message, static_cast<size_t>(size), "%s", what);
  }
  return -1;
}

const char* check(const fv_forward_args& a) {
  if (a.dtype != FV_F32 && a.dtype != FV_BF16) return "dtype must be float32 or bfloat16";
  if (a.kind != FV_FULL && a.kind != FV_CAUSAL && a.kind != FV_LAYOUT) return "unknown kind";
  if (a.batch < 0 || a.heads < 0 || a.q_len < 0) return "negative size";
  if (a.batch == 0 || a.heads == 0 || a.q_len == 0) return nullptr;  // nothing to write
  if (a.kv_heads < 1 || a.heads % a.kv_heads) return "heads must be a multiple of kv_heads";
  if (a.k_len < 1) return "k_len must be at least 1";
  if (a.dim < 1 || a.dim > FV_MAX_DIM || a.v_dim < 1 || a.v_dim > FV_MAX_DIM) return "head dims must lie in 1..512";
  if (a.threads < 1 || a.threads > 4096) return "threads must lie in 1..4096";
  if (!(a.softcap >= 0.f)) return "softcap must not be negative";
  if (!a.q || !a.k || !a.v || !a.out || !a.lse) return "null tensor";
  if (!product_fits(a.batch, a.heads, a.q_len + FV_TILE) || !product_fits(a.batch, a.heads, a.k_len + FV_TILE))
    return "sizes overflow";
  if (a.kind != FV_LAYOUT) return nullptr;
  const int64_t q_tiles = (a.q_len + FV_TILE - 1) / FV_TILE, k_tiles = (a.k_len + FV_TILE - 1) / FV_TILE;
  if (a.layout_batch != 1 && a.layout_batch != a.batch) return "layout batch must be 1 or the batch";
  if (a.layout_heads != 1 && a.layout_heads != a.heads) return "layout heads must be 1 or the heads";
  if (a.nnz < 0 || a.bitmaps < 0 || !a.row_ptr) return "bad layout";
  if (a.nnz > 0 && (!a.tile_idx || !a.tile_id)) return "bad layout";
  if (a.bitmaps > 0 && !a.dictionary) return "bad layout";
  const int64_t rows = a.layout_batch * a.layout_heads * q_tiles;
  if (a.row_ptr[0] != 0 || a.row_ptr[rows] != a.nnz) return "row_ptr must run from 0 to the number of tiles";
  for (int64_t r = 0; r < rows; ++r)
    if (a.row_ptr[r + 1] < a.row_ptr[r] || a.row_ptr[r + 1] > a.nnz) return "row_ptr must not fall";
  bool bad = false;
  for (int64_t n = 0; n < a.nnz; ++n)
    bad |= (uint64_t)(int64_t)a.tile_idx[n] >= (uint64_t)k_tiles || (uint64_t)(int64_t)a.tile_id[n] > (uint64_t)a.bitmaps;
  return bad ? "tile_idx or tile_id out of range" : nullptr;
}

}  // namespace

FV_EXPORT int64_t fv_sizeof_forward_args(void) { return sizeof(fv_forward_args); }

FV_EXPORT int32_t fv_isa_available(int32_t isa) { return kernel_of(isa) != nullptr && cpu_has(isa) ? 1 : 0; }

FV_EXPORT int32_t fv_forward(const fv_forward_args* args, char* message, int64_t message_size) {
  if (!args) return fail(message, message_size, "no arguments");
  if (args->abi != FV_ABI) return fail(message, message_size, "the library and its caller are of different versions");
  const fv_forward_args& a = *args;
  if (const char* what = check(a)) return fail(message, message_size, what);
  if (a.batch == 0 || a.heads == 0 || a.q_len == 0) return 0;
  int32_t isa = a.isa;
  if (!fv_isa_available(isa)) return fail(message, message_size, "this CPU or build lacks the instruction set asked for");
  if (a.dtype == FV_F32 && (isa == FV_AVX512_BF16 || isa == FV_BF16DOT_EMULATED)) isa = FV_AVX512;

  Job job;
  job.args = args;
  job.kernel = kernel_of(isa);
  job.q_tiles = (a.q_len + FV_TILE - 1) / FV_TILE;
  job.k_tiles = (a.k_len + FV_TILE - 1) / FV_TILE;
  job.floats = (job.kernel->scratch_floats(a) + 31) / 16 * 16;
  const int64_t all_heads = a.batch * a.kv_heads, groups = a.heads / a.kv_heads;

  // Copies are worth making ahead when each key tile is visited several times; a bounded number of heads at once.
  fv_prepared& ready = job.ready;
  ready.k = ready.v = nullptr;
  job.kernel->tile_floats(a, &ready.k_tile, &ready.v_tile);
  const int64_t visits = a.kind == FV_LAYOUT ? a.nnz / (a.layout_batch * a.layout_heads) * groups / job.k_tiles
                                             : job.q_tiles * groups / (a.kind == FV_CAUSAL ? 2 : 1);
  const bool prepare = visits >= 3 && ready.k_tile + ready.v_tile > 0;
  const int64_t head_floats = (ready.k_tile + ready.v_tile) * job.k_tiles;
  int64_t round = all_heads;
  if (prepare && head_floats * all_heads > WORKSPACE) {
    round = WORKSPACE / head_floats;
    const int64_t enough = (2 * a.threads + job.q_tiles * groups - 1) / (job.q_tiles * groups);  // keep the threads fed
    if (round < enough) round = enough < all_heads ? enough : all_heads;
  }

  int64_t floats;
  if (__builtin_mul_overflow(job.floats, static_cast<int64_t>(a.threads), &floats) ||
      (prepare && __builtin_mul_overflow(head_floats, round, &job.tasks)) ||
      (prepare && __builtin_add_overflow(floats, job.tasks, &floats)) || floats > INT64_MAX / 8)
    return fail(message, message_size, "sizes overflow");
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(floats) * sizeof(float)))
    return fail(message, message_size, "out of memory");
  job.scratch = static_cast<float*>(memory);
  if (prepare) {
    float* room = job.scratch + job.floats * a.threads;
    ready.k = ready.k_tile ? room : nullptr;
    ready.v = ready.v_tile ? room + ready.k_tile * job.k_tiles * round : nullptr;
  }
  for (int64_t first = 0; first < all_heads; first += round) {
    job.first_head = ready.first = first;
    job.heads = all_heads - first < round ? all_heads - first : round;
    if (prepare) run(&job, job.heads * job.k_tiles, true);
    run(&job, job.heads * groups * job.q_tiles, false);
  }
  std::free(memory);
  return 0;
}
