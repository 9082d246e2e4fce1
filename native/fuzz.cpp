// Random requests to the C ABI, compared with the definition in double precision; invalid ones must be refused.
//
//   fuzz [--seed S] [--cases N] [--case K] [--threads-least T] [--work W] [--quiet]
//
// W bounds the multiplications of one pass of a case. Case K of seed S is the same request whatever came before it: a
// failure prints the options that repeat it. Each case
//   - draws a request: every dtype, kind, normaliser, score and instruction set, odd lengths and dims, any strides;
//   - holds each tensor in a heap block of exactly its size (an address sanitizer sees one element too far), with NaN
//     in the gaps between rows, in outputs before the call and sometimes in keys and values that are masked;
//   - runs forward and backward, again (the same bits), and again with other threads and another instruction set;
//   - compares with the definition within a bound made from the sizes of the sums, and looks that gaps and inputs are
//     as they were and that what sees nothing is exactly 0;
//   - corrupts the request in a few places, each of which must be refused with a message (or need no work).
// Exit status 0 when every case passed, 1 at the first failure, 2 for a wrong command line.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "foveate.h"

// What the sanitizers are told, unless the environment says otherwise: fresh memory holds NaN, impossible allocations
// return null as they do without a sanitizer, and the first report ends the run.
#define FUZZ_OPTIONS(name, options) \
  extern "C" __attribute__((visibility("default"), used)) const char* name() { return options; }
FUZZ_OPTIONS(__asan_default_options, "allocator_may_return_null=1:max_malloc_fill_size=1073741824:malloc_fill_byte=255")
FUZZ_OPTIONS(__ubsan_default_options, "print_stacktrace=1")
FUZZ_OPTIONS(__tsan_default_options, "halt_on_error=1:allocator_may_return_null=1")
extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));

namespace {

const double NAN_ = std::numeric_limits<double>::quiet_NaN(), INF = std::numeric_limits<double>::infinity();
const int64_t BIG = INT64_MAX;

struct Limits {  // of what is drawn
  int threads = 1;     // at least
  uint64_t work = 15000000;  // multiplications of one pass, at most
};

uint64_t run_seed = 1;
long run_case = 0;
Limits limits;

struct Failure {
  std::string what;
};

template <class... Args>
std::string text(const char* format, Args... args) {
  char line[1024];
  std::snprintf(line, sizeof line, format, args...);
  return line;
}

void demand(bool good, const std::string& what) {
  if (!good) throw Failure{what};
}

// ------------------------------------------------------------------------------------------------------- randomness
struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  bool chance(double p) { return unit() < p; }
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - unit()));
    return radius * std::cos(6.283185307179586 * unit());
  }
  template <class X>
  X pick(std::initializer_list<X> from) { return from.begin()[below(static_cast<int64_t>(from.size()))]; }
};

// ---------------------------------------------------------------------------------------------------------- tensors
float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float widen_half(uint16_t x) {
  const int exponent = x >> 10 & 31, rest = x & 1023;
  const float size = exponent == 31 ? (rest ? NAN : INFINITY) : std::ldexp(exponent ? 1024.f + rest : rest, std::max(exponent, 1) - 25);
  return x & 0x8000 ? -size : size;
}

uint16_t narrow_half(float x) {  // ties away from 0: only makes inputs
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return 0x7e00;
  if (size >= 65504.f) return sign | (std::isinf(x) ? 0x7c00 : 0x7bff);
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | std::lround(size * 0x1p24f));
  const int exponent = std::ilogb(size);
  return static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + std::lround(std::ldexp(size, 10 - exponent))));
}

template <class X>
struct Exact {  // an array in a heap block of exactly its size
  std::unique_ptr<X, void (*)(void*)> memory{nullptr, std::free};
  int64_t count = 0;
  explicit Exact(int64_t n = 0) : count(n) {
    if (n) memory.reset(static_cast<X*>(std::malloc(sizeof(X) * static_cast<size_t>(n))));
  }
  Exact(const Exact& from) : Exact(from.count) {
    if (count) std::memcpy(memory.get(), from.memory.get(), sizeof(X) * static_cast<size_t>(count));
  }
  Exact(Exact&&) = default;
  Exact& operator=(Exact&&) = default;
  Exact& operator=(const Exact& from) { return *this = Exact(from); }
  X* data() const { return memory.get(); }
  X& operator[](int64_t n) const { return memory.get()[n]; }
};

struct Tensor {
  int dtype = FV_F32, rank = 0;
  int64_t size[4] = {1, 1, 1, 1}, stride[4] = {};
  int64_t offset = 0, count = 0;  // of the first element in the block; elements of the block
  Exact<uint8_t> block;

  int64_t width() const { return dtype == FV_F32 ? 4 : 2; }
  bool present() const { return count > 0; }
  void* data() const { return present() ? block.data() + offset * width() : nullptr; }
  float* floats() const { return static_cast<float*>(data()); }
  int64_t elements() const { return size[0] * size[1] * size[2] * size[3]; }
  void allocate() {  // all NaN
    block = Exact<uint8_t>(count * width());
    std::memset(block.data(), 0xff, static_cast<size_t>(block.count));
  }
  int64_t at(int64_t n) const {  // place in the block of element n in row-major order
    int64_t place = offset;
    for (int d = rank - 1; d >= 0; n /= size[d], --d)
      if (n % size[d]) place += n % size[d] * stride[d];
    return place;
  }
  double load(int64_t place) const {
    if (dtype == FV_F32) return reinterpret_cast<float*>(block.data())[place];
    const uint16_t bits = reinterpret_cast<uint16_t*>(block.data())[place];
    return dtype == FV_BF16 ? widen(bits) : widen_half(bits);
  }
  void store(int64_t place, double x) const {
    if (dtype == FV_F32)
      reinterpret_cast<float*>(block.data())[place] = static_cast<float>(x);
    else
      reinterpret_cast<uint16_t*>(block.data())[place] =
          dtype == FV_BF16 ? narrow(static_cast<float>(x)) : narrow_half(static_cast<float>(x));
  }
  void fill(const std::function<double()>& draw) const {
    for (int64_t n = 0; n < elements(); ++n) store(at(n), draw());
  }
  std::vector<double> dense(bool infinities) const {  // else they become NaN: what they reach is not compared
    std::vector<double> x(static_cast<size_t>(elements()));
    for (int64_t n = 0; n < elements(); ++n) {
      x[n] = load(at(n));
      if (!infinities && std::isinf(x[n])) x[n] = NAN_;
    }
    return x;
  }
  // Bytes between the elements must still be what `allocate` put there.
  void check_gaps(const char* name) const {
    if (!present()) return;
    std::vector<bool> covered(static_cast<size_t>(count));
    for (int64_t n = 0; n < elements(); ++n) covered[at(n)] = true;
    for (int64_t n = 0; n < count; ++n)
      for (int64_t byte = 0; !covered[n] && byte < width(); ++byte)
        demand(block[n * width() + byte] == 0xff, text("%s: written between its rows", name));
  }
};

struct Style {
  bool contiguous = true;
  bool rows = true;  // the last dimension is contiguous
  bool broadcast = false, backwards = false, huge = false;
  int broadcast_dims = 4;  // the first so many
};

Tensor draw_tensor(Random& random, int dtype, std::vector<int64_t> size, const Style& style) {
  Tensor x;
  x.dtype = dtype;
  x.rank = static_cast<int>(size.size());
  std::copy(size.begin(), size.end(), x.size);
  std::vector<int> order;  // innermost first
  for (int d = x.rank - 1; d >= 0; --d) order.push_back(d);
  const bool gaps = !style.contiguous && random.chance(0.5);
  if (!style.contiguous)
    for (int n = style.rows ? 1 : 0; n < x.rank; ++n) std::swap(order[n], order[random.between(n, x.rank - 1)]);
  int64_t unit = 1;
  x.count = 1;
  for (const int d : order) {
    const bool row = style.rows && d == x.rank - 1;
    if (style.broadcast && !row && d < style.broadcast_dims && random.chance(0.25)) continue;
    x.stride[d] = unit + (gaps && !row ? random.below(9) : 0);
    if (x.size[d] == 1 && !row) {
      if (style.huge && random.chance(0.1)) x.stride[d] = random.pick({BIG, INT64_MIN, BIG / 3, -BIG / 65, BIG / 4 + 1});
      continue;
    }
    unit = x.stride[d] * x.size[d];
    x.count += x.stride[d] * (x.size[d] - 1);
    if (style.backwards && !row && random.chance(0.05)) {
      x.offset += x.stride[d] * (x.size[d] - 1);
      x.stride[d] = -x.stride[d];
    }
  }
  if (!style.contiguous && random.chance(0.2)) ++x.offset, ++x.count;  // not aligned beyond its dtype
  x.allocate();
  return x;
}

// ---------------------------------------------------------------------------------------------------------- threads
struct Crew {
  void (*body)(void*);
  void* data;
  pthread_barrier_t start;  // all begin at once, so that races have a chance
};

void* run_body(void* crew) {
  auto* x = static_cast<Crew*>(crew);
  pthread_barrier_wait(&x->start);
  x->body(x->data);
  return nullptr;
}

void pool_threads(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Crew crew = {body, data, {}};
  pthread_barrier_init(&crew.start, nullptr, threads);
  std::vector<pthread_t> others(threads - 1);
  for (auto& other : others)
    if (pthread_create(&other, nullptr, run_body, &crew)) std::abort();
  run_body(&crew);
  for (auto& other : others) pthread_join(other, nullptr);
  pthread_barrier_destroy(&crew.start);
}
void pool_once(void (*body)(void*), void* data, unsigned, unsigned) { body(data); }  // a nested region has one thread
void pool_turns(void (*body)(void*), void* data, unsigned threads, unsigned) {
  for (unsigned n = 0; n < threads; ++n) body(data);
}

// ---------------------------------------------------------------------------------------------------------- requests
struct Layout {
  int64_t batch = 1, heads = 1, q_tiles = 0, k_tiles = 0;
  Exact<int64_t> row_ptr;
  Exact<int32_t> tile_idx, tile_id;
  Exact<uint64_t> dictionary;
  std::vector<int32_t> ids;  // of every tile, -1 where it is not listed
};

struct Result {
  Tensor out, lse, dq, dk, dv, delta, dtemperature, dbias, dbias_query, dbias_key, dtable;
  template <class F>
  void each(const F& visit) const {
    visit("out", out), visit("lse", lse), visit("dq", dq), visit("dk", dk), visit("dv", dv), visit("delta", delta);
    visit("dtemperature", dtemperature), visit("dbias", dbias), visit("dbias_query", dbias_query);
    visit("dbias_key", dbias_key), visit("dtable", dtable);
  }
};

struct Case {
  fv_args a = {};
  Tensor q, k, v, temperature, bias, table, sinks, dout, dlse;
  Exact<int32_t> q_code, k_code;
  Layout layout;
  Result shape;  // outputs as they are planned; each run gets blocks of its own
  std::vector<double> Q, K, V, DOUT, BIAS;

  int64_t groups() const { return a.heads / a.kv_heads; }
  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (a.kind == FV_FULL) return true;
    if (a.kind == FV_CAUSAL) return j <= i + a.k_len - a.q_len;
    const int64_t lb = layout.batch == 1 ? 0 : b, lh = layout.heads == 1 ? 0 : h;
    const int32_t id = layout.ids[((lb * layout.heads + lh) * layout.q_tiles + i / 64) * layout.k_tiles + j / 64];
    return id == 0 || (id > 0 && layout.dictionary[(id - 1) * 64 + i % 64] >> (j % 64) & 1);
  }
  std::string words() const {
    return text("dtype %d kind %d normalizer %d B %ld H %ld/%ld N %ld M %ld D %ld/%ld scale %g "
                "softcap %g shift %g dropout %g sinks %d temperature %d bias %d table %d nnz %ld bitmaps %ld dbias %d",
                a.dtype, a.kind, a.normalizer, a.batch, a.heads, a.kv_heads, a.q_len, a.k_len, a.dim, a.v_dim, a.scale, a.softcap, a.shift, a.dropout, sinks.present(),
                temperature.present(), bias.present() ? 1 + a.bias_dtype : 0, table.present(), a.nnz, a.bitmaps,
                shape.dbias.present());
  }
};

void draw_layout(Random& random, Case& c) {
  fv_args& a = c.a;
  Layout& x = c.layout;
  x.batch = random.chance(0.5) ? 1 : a.batch;
  x.heads = random.chance(0.5) ? 1 : a.heads;
  x.q_tiles = (a.q_len + 63) / 64;
  x.k_tiles = (a.k_len + 63) / 64;
  const int64_t bitmaps = random.chance(0.15) ? 0 : random.between(1, 6), rows = x.batch * x.heads * x.q_tiles;
  x.dictionary = Exact<uint64_t>(bitmaps * 64);
  for (int64_t n = 0; n < bitmaps; ++n) {
    const int64_t style = random.below(7), lane = random.below(64);
    for (int r = 0; r < 64; ++r) {
      uint64_t word = random.next();
      if (style == 0) word = 0;
      if (style == 1) word = ~UINT64_C(0);
      if (style == 2) word = ~UINT64_C(0) >> (63 - r);                        // causal
      if (style == 3) word = r == lane ? UINT64_C(1) << random.below(64) : 0;  // one pair
      if (style == 4) word &= random.next() & random.next();
      if (style == 5) word = random.chance(0.3) ? word : 0;                    // few rows
      if (style == 6) word = UINT64_C(1) << lane;                              // one key
      x.dictionary[n * 64 + r] = word;
    }
  }
  std::vector<int32_t> idx, id;
  x.row_ptr = Exact<int64_t>(rows + 1);
  x.row_ptr[0] = 0;
  const double density = random.pick({0.0, 0.1, 0.5, 0.5, 0.8, 1.0});
  for (int64_t row = 0; row < rows; ++row) {
    const bool empty = random.chance(0.15);
    for (int64_t j = 0; j < x.k_tiles; ++j) {
      const bool listed = !empty && random.chance(density);
      x.ids.push_back(listed ? static_cast<int32_t>(random.between(0, bitmaps)) : -1);
      if (listed) idx.push_back(static_cast<int32_t>(j)), id.push_back(x.ids.back());
    }
    x.row_ptr[row + 1] = static_cast<int64_t>(idx.size());
  }
  x.tile_idx = Exact<int32_t>(static_cast<int64_t>(idx.size()));
  x.tile_id = Exact<int32_t>(static_cast<int64_t>(id.size()));
  for (size_t n = 0; n < idx.size(); ++n) x.tile_idx[n] = idx[n], x.tile_id[n] = id[n];
  a.layout_batch = x.batch, a.layout_heads = x.heads;
  a.nnz = static_cast<int64_t>(idx.size()), a.bitmaps = bitmaps;
  a.row_ptr = x.row_ptr.data(), a.tile_idx = x.tile_idx.data(), a.tile_id = x.tile_id.data();
  a.dictionary = x.dictionary.data();
}

void draw_table(Random& random, Case& c) {
  fv_args& a = c.a;
  const bool ramp = random.chance(0.5);
  const int64_t q_span = ramp ? a.q_len - 1 : random.below(20), k_span = ramp ? a.k_len - 1 : random.below(20);
  const int64_t spare = random.chance(0.5) ? 0 : random.below(5), below = spare ? random.below(spare + 1) : 0;
  a.table_len = q_span + k_span + 1 + spare;
  const bool shared = random.chance(0.5);
  Style style;
  style.contiguous = false;
  c.table = draw_tensor(random, FV_F32, {shared ? 1 : a.heads, a.table_len}, style);
  c.table.fill([&] { return random.normal(); });
  a.table = c.table.floats();
  a.table_stride = shared ? 0 : c.table.stride[0];
  const int64_t width = q_span + k_span + below;
  const int64_t least = random.pick({int64_t{0}, int64_t{-40}, int64_t{INT32_MIN}, INT32_MAX - width});
  c.q_code = Exact<int32_t>(a.q_len);
  c.k_code = Exact<int32_t>(a.k_len);
  for (int64_t i = 0; i < a.q_len; ++i)
    c.q_code[i] = static_cast<int32_t>(least + k_span + below + (ramp ? i : random.between(0, q_span)));
  for (int64_t j = 0; j < a.k_len; ++j) c.k_code[j] = static_cast<int32_t>(least + (ramp ? j : random.between(0, k_span)));
  a.q_code = c.q_code.data(), a.k_code = c.k_code.data();
}

void draw_sizes(Random& random, fv_args& a) {
  const auto length = [&]() -> int64_t {
    if (random.chance(0.4)) return random.between(1, 330);
    return random.pick<int64_t>({1, 2, 3, 5, 13, 16, 31, 63, 64, 65, 67, 80, 127, 128, 129, 131, 192, 193, 256, 257, 320});
  };
  const auto dim = [&]() -> int64_t {
    if (random.chance(0.02)) return random.pick<int64_t>({509, 512});
    if (random.chance(0.3)) return random.between(1, 140);
    return random.pick<int64_t>({1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 64, 64, 80, 96, 128, 256});
  };
  a.batch = random.pick({1, 1, 2, 3});
  a.kv_heads = random.pick({1, 1, 2, 3});
  a.q_len = length(), a.k_len = random.chance(0.3) ? a.q_len : length();
  a.dim = dim(), a.v_dim = random.chance(0.6) ? a.dim : dim();
  int64_t groups = random.pick({1, 1, 1, 2, 3, 5});
  if (random.chance(0.12)) {  // decoding: rows are cut into parts, groups are folded
    a.q_len = random.chance(0.8) ? random.between(1, 5) : random.between(1, 70);
    if (random.chance(0.7)) a.dim = 16 * random.between(1, 8), a.v_dim = random.chance(0.7) ? a.dim : 16 * random.between(1, 8);
    a.k_len = random.between(600, 4200);
    groups = random.pick({1, 2, 4, 7, 64, 65});
  } else if (random.chance(0.15)) {  // few heads of many queries: the backward cuts them into chunks
    a.batch = 1, a.kv_heads = random.pick({1, 1, 2}), groups = random.pick({1, 1, 2});
    a.q_len = random.between(257, 1100), a.k_len = random.chance(0.3) ? a.q_len : random.between(1, 200);
    a.dim = random.between(1, 20), a.v_dim = random.between(1, 20);
  }
  const double most = static_cast<double>(limits.work) * std::pow(10.0, -2.2 * random.unit());
  const auto work = [&] { return static_cast<double>(a.batch * a.kv_heads * groups * a.q_len * a.k_len * (a.dim + a.v_dim)); };
  while (work() > most) {
    switch (random.below(6)) {
      case 0: a.batch = 1; break;
      case 1: a.kv_heads = 1; break;
      case 2: groups = groups > 2 ? groups / 2 : 1; break;
      case 3: a.dim = std::min<int64_t>(a.dim, random.between(1, 96)), a.v_dim = std::min<int64_t>(a.v_dim, random.between(1, 96)); break;
      case 4: if (a.q_len > 64) a.q_len -= random.between(1, a.q_len / 2); break;
      case 5: if (a.k_len > 64) a.k_len -= random.between(1, a.k_len / 2); break;
    }
    if (a.q_len <= 64 && a.k_len <= 64 && a.batch * a.kv_heads * groups == 1) break;
  }
  a.heads = a.kv_heads * groups;
}

void draw_threads(Random& random, fv_args& a) {
  a.threads = static_cast<int32_t>(random.between(limits.threads, 8));
  a.parallel = nullptr;
  if (random.chance(0.6)) a.parallel = random.pick<fv_parallel>({pool_threads, pool_threads, pool_threads, pool_once, pool_turns});
}

void draw_isa(Random& random, fv_args& a) {
  do a.isa = static_cast<int32_t>(random.below(FV_ISAS));
  while (!fv_isa_available(a.isa));
}

// NaN and infinities in some rows of keys, values, queries, gradients or in the bias: what they reach is not compared,
// everything else must not notice.
void spoil(Random& random, const Tensor& x, double share) {
  for (int64_t n = 0; n < x.elements(); ++n)
    if (random.chance(share)) x.store(x.at(n), random.pick({NAN_, NAN_, INF, -INF}));
}

Case draw_case(Random& random) {
  Case c;
  fv_args& a = c.a;
  a.abi = FV_ABI;
  a.dtype = random.chance(0.5) ? FV_F32 : FV_BF16;
  a.kind = random.pick({FV_FULL, FV_CAUSAL, FV_LAYOUT, FV_LAYOUT});
  a.normalizer = random.pick({FV_SOFTMAX, FV_SOFTMAX, FV_SOFTMAX, FV_SIGMOID, FV_RELU});
  draw_isa(random, a);
  draw_threads(random, a);
  draw_sizes(random, a);
  const bool few = a.q_len < 6 && random.chance(0.6), plain = few || random.chance(0.3), softmax = a.normalizer == FV_SOFTMAX;
  a.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(a.dim)));
  if (random.chance(0.2)) a.scale = random.pick({0.f, 1.f, -0.3f, 0.01f});
  if (!plain && random.chance(0.25)) a.softcap = random.pick({0.1f, 1.f, 5.f, 50.f, 1e4f});
  if (!plain && random.chance(0.25)) a.shift = static_cast<float>(2 * random.normal());
  if (!few && random.chance(0.25)) a.dropout = random.pick({0.1f, 0.5f, 0.9f, 1e-6f, 0.9999999f});
  a.seed = random.next();

  Style input, strided, output;
  input.contiguous = random.chance(0.3);
  input.broadcast = random.chance(0.2);
  input.backwards = input.huge = true;
  strided = input;
  strided.broadcast = true;
  strided.rows = false;
  output.contiguous = input.contiguous;
  output.backwards = output.huge = true;
  const auto tensor = [&](int64_t heads, int64_t length, int64_t dim, double size) {
    Tensor x = draw_tensor(random, a.dtype, {a.batch, heads, length, dim}, input);
    x.fill([&] { return size * random.normal(); });
    return x;
  };
  const bool extreme = random.chance(0.1);
  const auto size = [&](double exponent) { return extreme ? std::pow(10.0, exponent * (2 * random.unit() - 1)) : 1.0; };
  c.q = tensor(a.heads, a.q_len, a.dim, size(2.0));
  c.k = tensor(a.kv_heads, a.k_len, a.dim, size(2.0));
  c.v = tensor(a.kv_heads, a.k_len, a.v_dim, size(10.0));
  c.dout = tensor(a.heads, a.q_len, a.v_dim, size(8.0));
  if (softmax && random.chance(0.4)) {
    c.dlse = draw_tensor(random, FV_F32, {a.batch, a.heads, a.q_len}, Style());
    c.dlse.fill([&] { return random.normal(); });
  }
  if (softmax && random.chance(0.3)) {
    c.sinks = draw_tensor(random, FV_F32, {a.heads}, Style());
    c.sinks.fill([&] { return random.chance(0.1) ? -INF : random.pick({1.0, 1.0, 30.0}) * random.normal(); });
  }
  if (!plain && random.chance(0.3)) {
    c.temperature = draw_tensor(random, FV_F32, {a.batch, a.heads, a.q_len}, strided);
    c.temperature.fill([&] { return random.chance(0.05) ? 0.0 : 1 + 0.5 * random.normal(); });
  }
  if (!plain && random.chance(0.5)) {
    a.bias_dtype = random.pick({FV_F32, FV_BF16, FV_F16});
    c.bias = draw_tensor(random, a.bias_dtype, {a.batch, a.heads, a.q_len, a.k_len}, strided);
    const double masked = random.pick({0.0, 0.0, 0.1, 1.0});
    c.bias.fill([&] { return random.chance(masked) ? -INF : random.normal(); });
  }
  if (!plain && random.chance(0.3)) draw_table(random, c);
  if (a.kind == FV_LAYOUT) draw_layout(random, c);

  if (random.chance(0.3)) {
    const double rate = random.pick({0.3, 3.0, 20.0});
    const auto some = [&](const Tensor& x) { spoil(random, x, rate / static_cast<double>(x.elements())); };
    if (random.chance(0.6)) some(c.k);
    if (random.chance(0.6)) some(c.v);
    if (random.chance(0.3)) some(c.q);
    if (random.chance(0.3)) some(c.dout);
  }
  c.BIAS = c.bias.present() ? c.bias.dense(true) : std::vector<double>();
  if (c.bias.present() && !(c.bias.stride[0] == 0 || c.bias.stride[1] == 0 || c.bias.stride[2] == 0 || c.bias.stride[3] == 0))
    for (int64_t n = 0; n < c.bias.elements(); ++n) {  // NaN in masked places
      const int64_t j = n % a.k_len, i = n / a.k_len % a.q_len, bh = n / a.k_len / a.q_len;
      if (!c.sees(bh / a.heads, bh % a.heads, i, j) && random.chance(0.2)) c.bias.store(c.bias.at(n), random.pick({NAN_, INF}));
    }
  c.Q = c.q.dense(false), c.K = c.k.dense(false), c.V = c.v.dense(false), c.DOUT = c.dout.dense(false);

  a.q = c.q.data(), a.k = c.k.data(), a.v = c.v.data(), a.dout = c.dout.data();
  std::copy(c.q.stride, c.q.stride + 3, a.q_stride);
  std::copy(c.k.stride, c.k.stride + 3, a.k_stride);
  std::copy(c.v.stride, c.v.stride + 3, a.v_stride);
  std::copy(c.dout.stride, c.dout.stride + 3, a.dout_stride);
  std::copy(c.bias.stride, c.bias.stride + 4, a.bias_stride);
  std::copy(c.temperature.stride, c.temperature.stride + 3, a.temperature_stride);
  a.dlse = c.dlse.floats(), a.sinks = c.sinks.floats(), a.temperature = c.temperature.floats(), a.bias = c.bias.data();

  Result& y = c.shape;
  const auto plan = [&](bool wanted, int dtype, std::vector<int64_t> sizes, const Style& style) {
    return wanted ? draw_tensor(random, dtype, sizes, style) : Tensor();
  };
  const Style packed;
  y.out = plan(true, a.dtype, {a.batch, a.heads, a.q_len, a.v_dim}, output);
  y.lse = plan(softmax, FV_F32, {a.batch, a.heads, a.q_len}, packed);
  y.delta = plan(softmax, FV_F32, {a.batch, a.heads, a.q_len}, packed);
  y.dq = plan(true, a.dtype, {a.batch, a.heads, a.q_len, a.dim}, packed);
  y.dk = plan(true, a.dtype, {a.batch, a.kv_heads, a.k_len, a.dim}, packed);
  y.dv = plan(true, a.dtype, {a.batch, a.kv_heads, a.k_len, a.v_dim}, packed);
  y.dtemperature = plan(c.temperature.present() && random.chance(0.7), FV_F32, {a.batch, a.heads, a.q_len}, packed);
  Style sums = strided;
  sums.broadcast_dims = 2;
  y.dbias = plan(c.bias.present() && random.chance(0.75), FV_F32, {a.batch, a.heads, a.q_len, a.k_len}, sums);
  y.dbias_query = plan(c.bias.present() && random.chance(0.4), FV_F32, {a.batch, a.heads, a.q_len}, packed);
  y.dbias_key = plan(c.bias.present() && random.chance(0.4), FV_F32, {a.batch, a.heads, a.k_len}, packed);
  y.dtable = plan(c.table.present() && random.chance(0.7), FV_F32, {a.batch, a.heads, a.table_len}, packed);
  std::copy(y.out.stride, y.out.stride + 3, a.out_stride);
  std::copy(y.dbias.stride, y.dbias.stride + 4, a.dbias_stride);
  return c;
}

// ------------------------------------------------------------------------------------------------------------- runs
void attach(fv_args& a, const Result& y) {
  a.out = y.out.data(), a.lse = y.lse.floats();
  a.dq = y.dq.data(), a.dk = y.dk.data(), a.dv = y.dv.data(), a.delta = y.delta.floats();
  a.dtemperature = y.dtemperature.floats(), a.dbias = y.dbias.floats(), a.dbias_query = y.dbias_query.floats();
  a.dbias_key = y.dbias_key.floats(), a.dtable = y.dtable.floats();
}

Result fresh(const Result& shape) {
  Result y = shape;
  y.each([](const char*, const Tensor& x) {
    if (x.present()) std::memset(x.block.data(), 0xff, static_cast<size_t>(x.block.count));
  });
  if (y.dbias.present()) y.dbias.fill([] { return 0.0; });
  return y;
}

void run(const fv_args& a, bool back, const Result& y, std::string* words) {
  *words = text("%s, isa %d threads %d pool %d", back ? "backward" : "forward", a.isa, a.threads, a.parallel != nullptr);
  fv_args call = a;
  attach(call, y);
  char message[256] = "";
  const int32_t code = (back ? fv_backward : fv_forward)(&call, message, sizeof message);
  demand(code == 0, text("a valid request was refused by the %s: %s", back ? "backward" : "forward", message));
  y.each([](const char* name, const Tensor& x) { x.check_gaps(name); });
}

void same_bits(const Result& x, const Result& y) {
  std::vector<const Tensor*> first;
  x.each([&](const char*, const Tensor& t) { first.push_back(&t); });
  size_t n = 0;
  y.each([&](const char* name, const Tensor& t) {
    const Tensor& other = *first[n++];
    if (!t.present()) return;
    demand(!std::memcmp(t.block.data(), other.block.data(), static_cast<size_t>(t.block.count)),
           text("%s: the same call gave other bits", name));
  });
}

uint64_t digest(const Case& c) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&](const void* data, int64_t bytes) {
    for (int64_t n = 0; n < bytes; ++n) hash = (hash ^ static_cast<const uint8_t*>(data)[n]) * 0x100000001b3u;
  };
  for (const Tensor* x : {&c.q, &c.k, &c.v, &c.temperature, &c.bias, &c.table, &c.sinks, &c.dout, &c.dlse})
    add(x->block.data(), x->block.count);
  add(c.layout.row_ptr.data(), c.layout.row_ptr.count * 8), add(c.layout.dictionary.data(), c.layout.dictionary.count * 8);
  add(c.layout.tile_idx.data(), c.layout.tile_idx.count * 4), add(c.layout.tile_id.data(), c.layout.tile_id.count * 4);
  add(c.q_code.data(), c.q_code.count * 4), add(c.k_code.data(), c.k_code.count * 4);
  return hash;
}

// ------------------------------------------------------------------------------------------------------- definition
// What a result may be off by, from first principles: u is half a unit in the last place of float32, a sum of n rounded
// terms is off by about LAMBDA sqrt(n) u times the sum of magnitudes, exponentials by EXP relative to themselves.
const double U = 0x1p-24, EXP = 0x1p-20, LEAST = 0x1p-124, LAMBDA = 4;

double summing(double terms) { return LAMBDA * U * (std::sqrt(terms) + 8); }
double unit_of(int dtype) { return dtype == FV_F32 ? U : 0x1p-8; }

struct Expected {
  std::vector<double> value, slack;  // value NaN: not compared
  std::vector<char> seen;            // false: nothing adds up here, exactly 0
  explicit Expected(int64_t n = 0)
      : value(static_cast<size_t>(n)), slack(static_cast<size_t>(n)), seen(static_cast<size_t>(n)) {}
  void add(int64_t n, double x, double error) { value[n] += x, slack[n] += error, seen[n] = 1; }
};

struct Pair {  // of one query and one key that it sees
  int64_t j;
  double raw, magnitude;  // q k, sum |q| |k|
  double s, error;        // logit and what it may be off by
  double slope, slope_error;
  double keep;  // 0, or 1 / (1 - dropout)
};

bool kept(uint64_t seed, double dropout, int64_t i, int64_t j, int64_t bh) {  // Philox4x32-10, see philox.h
  uint32_t x[4] = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(bh), 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round, key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u) {
    const uint64_t m0 = UINT64_C(0xD2511F53) * x[0], m1 = UINT64_C(0xCD9E8D57) * x[2];
    const uint32_t y[4] = {static_cast<uint32_t>(m1 >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(m1),
                           static_cast<uint32_t>(m0 >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(m0)};
    std::copy(y, y + 4, x);
  }
  return x[j % 4] >= static_cast<uint32_t>(std::min(dropout * 4294967296.0 + 0.5, 4294967295.0));
}

std::vector<Pair> pairs_of(const Case& c, int64_t b, int64_t h, int64_t i) {
  const fv_args& a = c.a;
  std::vector<Pair> pairs;
  const int64_t bh = b * a.heads + h, bkv = b * a.kv_heads + h / c.groups();
  const double* q = c.Q.data() + (bh * a.q_len + i) * a.dim;
  const double temperature = c.temperature.present() ? c.temperature.load(c.temperature.at(bh * a.q_len + i)) : 1;
  const double factor = a.scale * temperature, grow = 1 / (1 - static_cast<double>(a.dropout));
  for (int64_t j = 0; j < a.k_len; ++j) {
    if (!c.sees(b, h, i, j)) continue;
    Pair x = {};
    x.j = j;
    const double* k = c.K.data() + (bkv * a.k_len + j) * a.dim;
    for (int64_t d = 0; d < a.dim; ++d) x.raw += q[d] * k[d], x.magnitude += std::fabs(q[d] * k[d]);
    x.s = factor * x.raw;
    x.error = std::fabs(factor) * (summing(static_cast<double>(a.dim)) * x.magnitude + static_cast<double>(a.dim) * LEAST) +
              4 * U * std::fabs(x.s);
    x.slope = 1;
    if (a.softcap > 0) {
      const double t = std::tanh(x.s / a.softcap), off = x.error / a.softcap;
      x.slope = 1 - t * t;
      x.error = std::min(x.error, x.error * (x.slope + 2 * off)) + a.softcap * std::fabs(t) * 4 * EXP;
      const double wrong = x.error / a.softcap;
      x.slope_error = std::min(1.0, 2 * std::fabs(t) * wrong + wrong * wrong + 8 * U);
      x.s = a.softcap * t;
    }
    double size = std::fabs(x.s) + std::fabs(static_cast<double>(a.shift));
    x.s += a.shift;
    if (c.bias.present()) {
      const double bias = c.BIAS[(bh * a.q_len + i) * a.k_len + j];
      x.s += bias;
      if (!std::isinf(bias)) size += std::fabs(bias);
    }
    if (c.table.present()) {
      const int64_t code = static_cast<int64_t>(c.q_code[i]) - c.k_code[j];
      const double entry = c.table.load(c.table.at((c.table.size[0] == 1 ? 0 : h * a.table_len) + code));
      x.s += entry, size += std::fabs(entry);
    }
    x.error += 8 * U * size;
    x.keep = a.dropout > 0 ? (kept(a.seed, a.dropout, i, j, bh) ? grow : 0) : 1;
    pairs.push_back(x);
  }
  return pairs;
}

struct Weight {
  double p, error;
};

// A weight that needs no normaliser's sum.
Weight single_weight(const fv_args& a, const Pair& x) {
  if (a.normalizer == FV_RELU) return {x.s > 0 ? x.s : x.s <= 0 ? 0 : NAN_, x.s < -2 * x.error ? 0 : 2 * x.error};
  const double p = 1 / (1 + std::exp(-x.s));
  return {p, p * (std::expm1(x.error) + 2 * EXP) + LEAST};
}

// Are weights rounded to bfloat16 before they are multiplied?
bool rounds_weights(const fv_args& a, bool back) {
  if (a.dtype != FV_BF16) return false;
  return a.isa == FV_AMX || (!back && (a.isa == FV_AVX512_BF16 || a.isa == FV_BF16DOT_EMULATED));
}

void define_forward(const Case& c, bool rounded, Expected* out, Expected* lse) {
  const fv_args& a = c.a;
  *out = Expected(a.batch * a.heads * a.q_len * a.v_dim);
  *lse = Expected(a.batch * a.heads * a.q_len);
  const double keys = static_cast<double>(a.k_len), tiles = std::ceil(keys / 64);
  const double weight_unit = rounded ? 0x1p-8 : 0;
  for (int64_t row = 0; row < a.batch * a.heads * a.q_len; ++row) {
    const int64_t i = row % a.q_len, h = row / a.q_len % a.heads, b = row / a.q_len / a.heads;
    const std::vector<Pair> pairs = pairs_of(c, b, h, i);
    std::vector<Weight> weights;
    if (a.normalizer == FV_SOFTMAX) {
      double top = -INF, worst = 0, total = 0;
      for (const Pair& x : pairs) {
        top = std::isnan(x.s) ? NAN_ : std::max(x.s, top);
        if (x.s > -INF) worst = std::max(worst, x.error);
      }
      for (const Pair& x : pairs)
        if (std::isnan(x.s)) top = NAN_;
      const double sink = c.sinks.present() ? c.sinks.load(h) : -INF;
      if (sink > -INF) top = std::isnan(top) ? top : std::max(top, sink), worst = std::max(worst, 8 * U * std::fabs(sink));
      lse->seen[row] = 1;
      if (top == -INF) {  // nothing to see
        lse->value[row] = -INF;
        continue;
      }
      for (const Pair& x : pairs) total += std::exp(x.s - top);
      if (sink > -INF) total += std::exp(sink - top);
      const double relative = worst + (2 + tiles) * (EXP + U) + 4 * U * std::fabs(top);
      for (const Pair& x : pairs) {
        const double p = std::exp(x.s - top) / total;
        weights.push_back({p, p * std::expm1(2 * relative + summing(keys)) + (x.s > -INF ? LEAST : 0)});
      }
      lse->value[row] = top + std::log(total);
      lse->slack[row] = relative + summing(keys) + EXP + 8 * U * std::fabs(lse->value[row]);
    } else {
      for (const Pair& x : pairs) weights.push_back(single_weight(a, x));
    }
    for (size_t n = 0; n < pairs.size(); ++n) {
      const double* v = c.V.data() + ((b * a.kv_heads + h / c.groups()) * a.k_len + pairs[n].j) * a.v_dim;
      const double w = weights[n].p * pairs[n].keep;
      const double error = pairs[n].keep * (weights[n].error + (summing(keys) + weight_unit) * weights[n].p);
      for (int64_t d = 0; d < a.v_dim; ++d) out->add(row * a.v_dim + d, w * v[d], error * std::fabs(v[d]));
    }
  }
}

struct Gradients {
  Expected dq, dk, dv, delta, dtemperature, dbias, dbias_query, dbias_key, dtable;
};

// The gradients as a function of what the backward is given, out and lse included.
Gradients define_backward(const Case& c, const Result& given, bool rounded) {
  const fv_args& a = c.a;
  const int64_t rows = a.batch * a.heads * a.q_len;
  Gradients g;
  g.dq = Expected(rows * a.dim);
  g.dk = Expected(a.batch * a.kv_heads * a.k_len * a.dim);
  g.dv = Expected(a.batch * a.kv_heads * a.k_len * a.v_dim);
  g.delta = Expected(rows), g.dtemperature = Expected(rows), g.dbias_query = Expected(rows);
  g.dbias = Expected(c.shape.dbias.count);  // by place
  g.dbias_key = Expected(a.batch * a.heads * a.k_len);
  g.dtable = Expected(a.batch * a.heads * a.table_len);
  const double keys = static_cast<double>(a.k_len), queries = static_cast<double>(a.q_len * c.groups());
  const double half = rounded ? 0x1p-8 : 0, scale = a.scale, wide = static_cast<double>(a.v_dim);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row % a.q_len, h = row / a.q_len % a.heads, b = row / a.q_len / a.heads;
    const int64_t bkv = b * a.kv_heads + h / c.groups();
    const double *q = c.Q.data() + row * a.dim, *dout = c.DOUT.data() + row * a.v_dim;
    const bool softmax = a.normalizer == FV_SOFTMAX;
    const double lse = softmax ? given.lse.load(given.lse.at(row)) : 0;
    const double temperature = c.temperature.present() ? c.temperature.load(c.temperature.at(row)) : 1;
    double delta = 0, delta_error = 0;
    g.delta.seen[row] = lse != -INF;
    if (softmax && lse != -INF) {
      double size = 0;
      for (int64_t d = 0; d < a.v_dim; ++d) {
        const double x = dout[d] * given.out.load(given.out.at(row * a.v_dim + d));
        delta += x, size += std::fabs(x);
      }
      delta_error = summing(wide) * size;
      if (c.dlse.present()) delta -= c.dlse.load(row), delta_error += 2 * U * std::fabs(c.dlse.load(row));
      g.delta.add(row, delta, delta_error + U * std::fabs(delta));
    }
    for (const Pair& x : pairs_of(c, b, h, i)) {
      const int64_t key = bkv * a.k_len + x.j;
      const double *k = c.K.data() + key * a.dim, *v = c.V.data() + key * a.v_dim;
      double dp = 0, size = 0;
      for (int64_t d = 0; d < a.v_dim; ++d) dp += dout[d] * v[d], size += std::fabs(dout[d] * v[d]);
      const double dp_error = summing(wide) * size * x.keep, change = dp * x.keep;
      Weight w;
      double ds, error;
      if (softmax && lse == -INF && !std::isnan(x.s)) {  // every logit is -inf
        w = {0, 0};
        ds = 0 * change;
        error = 0;
      } else if (softmax) {
        w.p = std::exp(x.s - lse);
        w.error = w.p * std::expm1(x.error + 8 * U * (std::isinf(x.s) ? 0 : std::fabs(x.s) + std::fabs(lse)) + 2 * EXP) +
                  (x.s > -INF ? LEAST : 0);
        ds = w.p * (change - delta);
        error = w.error * std::fabs(change - delta) +
                (w.p + w.error) * (dp_error + delta_error + 4 * U * (std::fabs(change) + std::fabs(delta)));
      } else if (a.normalizer == FV_SIGMOID) {
        w = single_weight(a, x);
        const double slope = w.p * (1 - w.p), off = slope * (std::expm1(x.error) + 2 * EXP) + 8 * U * w.p + 4 * LEAST;
        ds = change * slope;
        error = dp_error * (slope + off) + std::fabs(change) * off;
      } else {
        w = single_weight(a, x);
        ds = x.s > 0 ? change : std::isnan(x.s) ? NAN_ : 0 * change;
        error = (x.s > -2 * x.error ? dp_error : 0) + (std::fabs(x.s) <= 2 * x.error ? std::fabs(change) : 0) + 4 * U * std::fabs(ds);
      }
      const double weight = w.p * x.keep, weight_error = x.keep * w.error + (summing(queries) + half) * weight;
      for (int64_t d = 0; d < a.v_dim; ++d) g.dv.add(key * a.v_dim + d, weight * dout[d], weight_error * std::fabs(dout[d]));
      const double slope = x.slope * temperature, t = ds * slope * scale;
      const double bent = error * x.slope + (std::fabs(ds) + error) * x.slope_error;
      const double t_error = std::fabs(scale * temperature) * bent + (8 * U + half) * std::fabs(t);
      for (int64_t d = 0; d < a.dim; ++d) {
        g.dk.add(key * a.dim + d, t * q[d], (t_error + summing(queries) * std::fabs(t)) * std::fabs(q[d]));
        g.dq.add(row * a.dim + d, t * k[d], (t_error + summing(keys) * std::fabs(t)) * std::fabs(k[d]));
      }
      const double heat = ds * x.slope * scale * x.raw;
      g.dtemperature.add(row, heat, bent * std::fabs(scale * x.raw) + summing(keys) * std::fabs(heat) +
                                        std::fabs(ds * x.slope * scale) * summing(static_cast<double>(a.dim)) * x.magnitude);
      const double shared = std::fabs(ds);
      if (c.shape.dbias.present())
        g.dbias.add(c.shape.dbias.at(row * a.k_len + x.j), ds, error + summing(static_cast<double>(a.batch * a.heads)) * shared);
      g.dbias_query.add(row, ds, error + summing(keys) * shared);
      g.dbias_key.add((b * a.heads + h) * a.k_len + x.j, ds, error + summing(queries) * shared);
      if (c.table.present()) {
        const int64_t code = static_cast<int64_t>(c.q_code[i]) - c.k_code[x.j];
        g.dtable.add((b * a.heads + h) * a.table_len + code, ds, error + summing(keys * queries) * shared);
      }
    }
  }
  return g;
}

// `by_place`: expected values belong to places of the block instead of elements in order.
void compare(const char* name, const Tensor& got, const Expected& want, bool by_place = false) {
  if (!got.present()) return;
  for (int64_t n = 0; n < got.elements(); ++n) {
    const int64_t e = by_place ? got.at(n) : n;
    const double x = got.load(got.at(n)), y = want.value[e];
    if (std::isnan(y)) continue;
    bool good;
    double slack = 0;
    if (!want.seen[e] || std::isinf(y)) {
      good = x == y;
    } else {
      slack = want.slack[e] + unit_of(got.dtype) * (std::fabs(y) + want.slack[e]) + (want.slack[e] > 0 ? 1e-36 : 0);
      good = std::fabs(x - y) <= slack && std::isfinite(x);
    }
    demand(good, text("%s[%ld]: got %.9g, want %.9g, off by %.3g, allowed %.3g", name, n, x, y, std::fabs(x - y), slack));
  }
}

// A NaN among the visible inputs must not vanish from the result.
void check_lost(const Case& c, const Tensor& out) {
  const fv_args& a = c.a;
  const auto has_nan = [&](const Tensor& x, int64_t row, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d)
      if (std::isnan(x.load(x.at(row * dim + d)))) return true;
    return false;
  };
  std::vector<bool> bad(static_cast<size_t>(a.batch * a.kv_heads * a.k_len));
  bool any = false;
  for (int64_t n = 0; n < static_cast<int64_t>(bad.size()); ++n) any |= bad[n] = has_nan(c.k, n, a.dim);
  if (!any) return;
  for (int64_t row = 0; row < a.batch * a.heads * a.q_len; ++row) {
    const int64_t i = row % a.q_len, h = row / a.q_len % a.heads, b = row / a.q_len / a.heads;
    for (int64_t j = 0; j < a.k_len; ++j)
      if (bad[(b * a.kv_heads + h / c.groups()) * a.k_len + j] && c.sees(b, h, i, j)) {
        bool finite = true;
        for (int64_t d = 0; d < a.v_dim; ++d) finite &= std::isfinite(out.load(out.at(row * a.v_dim + d)));
        demand(!finite || a.dropout > 0, text("row %ld sees a NaN key and is finite", row));
        break;
      }
  }
}

void check_forward(const Case& c, const fv_args& a, const Result& y, bool rounded_done, Expected* out, Expected* lse) {
  if (!rounded_done) define_forward(c, rounds_weights(a, false), out, lse);
  compare("out", y.out, *out);
  if (y.lse.present()) compare("lse", y.lse, *lse);
  check_lost(c, y.out);
}

void check_backward(const Case& c, const fv_args& a, const Result& y) {
  const Gradients g = define_backward(c, y, rounds_weights(a, true));
  compare("delta", y.delta, g.delta);
  compare("dq", y.dq, g.dq);
  compare("dk", y.dk, g.dk);
  compare("dv", y.dv, g.dv);
  compare("dtemperature", y.dtemperature, g.dtemperature);
  compare("dbias", y.dbias, g.dbias, true);
  compare("dbias_query", y.dbias_query, g.dbias_query);
  compare("dbias_key", y.dbias_key, g.dbias_key);
  compare("dtable", y.dtable, g.dtable);
}

void check_valid(Random& random, const Case& c, std::string* words) {
  const uint64_t before = digest(c);
  Result y = fresh(c.shape);
  Expected out, lse;
  run(c.a, false, y, words);
  check_forward(c, c.a, y, false, &out, &lse);
  if (random.chance(0.5)) {
    const Result again = fresh(c.shape);
    run(c.a, false, again, words);
    same_bits(y, again);
  }
  if (random.chance(0.5)) {  // other threads, another instruction set
    fv_args other = c.a;
    draw_threads(random, other);
    draw_isa(random, other);
    const Result varied = fresh(c.shape);
    run(other, false, varied, words);
    check_forward(c, other, varied, rounds_weights(other, false) == rounds_weights(c.a, false), &out, &lse);
  }
  const bool back = random.chance(0.75);
  if (back) {
    const Result start = y;
    run(c.a, true, y, words);
    check_backward(c, c.a, y);
    demand(!std::memcmp(start.out.block.data(), y.out.block.data(), static_cast<size_t>(y.out.block.count)),
           "the backward wrote to out");
    if (random.chance(0.4)) {
      const Result again = start;
      run(c.a, true, again, words);
      same_bits(y, again);
    }
    if (random.chance(0.3)) {
      fv_args other = c.a;
      draw_threads(random, other);
      draw_isa(random, other);
      const Result varied = start;
      run(other, true, varied, words);
      check_backward(c, other, varied);
    }
  }
  demand(digest(c) == before, "an input was written to");
}

// -------------------------------------------------------------------------------------------------- invalid requests
// What a corrupted request must give: a refusal; nothing to do (0, gradients of keys and values 0); either of both.
enum Verdict { REFUSED, NOTHING, ANY };

struct Corruption {
  const char* name;
  bool back;  // only the backward looks at it
  Verdict verdict;
  std::function<bool(Random&, Case&)> apply;  // false: does not fit this request
};

#define FUZZ_IF(condition, ...) [](Random& random, Case& c) {       \
    fv_args& a = c.a; (void)random; (void)a;                        \
    if (!(condition)) return false;                                 \
    __VA_ARGS__;                                                    \
    return true;                                                    \
  }

std::vector<Corruption> corruptions() {
  std::vector<Corruption> list;
  const auto refuse = [&](const char* name, std::function<bool(Random&, Case&)> f) { list.push_back({name, false, REFUSED, f}); };
  const auto refuse_back = [&](const char* name, std::function<bool(Random&, Case&)> f) { list.push_back({name, true, REFUSED, f}); };
  const auto nothing = [&](const char* name, std::function<bool(Random&, Case&)> f) { list.push_back({name, false, NOTHING, f}); };
  const auto either = [&](const char* name, std::function<bool(Random&, Case&)> f) { list.push_back({name, false, ANY, f}); };
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  static float bad_softcap[5], bad_dropout[6];
  std::copy_n(std::initializer_list<float>{-1.f, nan, inf, -inf, 1e-42f}.begin(), 5, bad_softcap);
  std::copy_n(std::initializer_list<float>{-0.1f, 1.f, nan, 2.f, inf, -inf}.begin(), 6, bad_dropout);

  refuse("abi", FUZZ_IF(true, a.abi = random.pick({0, 1, FV_ABI + 1, -1, INT32_MAX})));
  refuse("dtype", FUZZ_IF(true, a.dtype = random.pick({-1, 2, INT32_MAX, INT32_MIN})));
  refuse("kind", FUZZ_IF(true, a.kind = random.pick({-1, 3, INT32_MAX, INT32_MIN})));
  refuse("normalizer", FUZZ_IF(true, a.normalizer = random.pick({-1, 3, INT32_MAX})));
  refuse("isa", FUZZ_IF(true, a.isa = random.pick<int>({-1, FV_ISAS, 99, INT32_MAX, INT32_MIN})));
  refuse("threads", FUZZ_IF(true, a.threads = random.pick({0, -1, 4097, INT32_MIN, INT32_MAX})));
  refuse("softcap", FUZZ_IF(true, a.softcap = bad_softcap[random.below(5)]));
  refuse("dropout", FUZZ_IF(true, a.dropout = bad_dropout[random.below(6)]));
  refuse("negative size", FUZZ_IF(true, int64_t* sizes[] = {&a.batch, &a.heads, &a.kv_heads, &a.q_len, &a.k_len};
                                  *sizes[random.below(5)] = random.pick<int64_t>({-1, -64, INT64_MIN})));
  refuse("dim", FUZZ_IF(true, (random.chance(0.5) ? a.dim : a.v_dim) = random.pick<int64_t>({0, -1, 513, BIG, INT64_MIN})));
  refuse("kv_heads 0", FUZZ_IF(true, a.kv_heads = 0));
  refuse("k_len 0", FUZZ_IF(true, a.k_len = 0));
  refuse("heads not a multiple", FUZZ_IF(a.kv_heads > 1, ++a.heads));
  refuse("more kv_heads than heads", FUZZ_IF(true, a.kv_heads = a.heads + 1));
  refuse("null tensor", FUZZ_IF(true, const void** tensors[] = {&a.q, &a.k, &a.v}; *tensors[random.below(3)] = nullptr));
  refuse("null out", FUZZ_IF(true, c.shape.out = Tensor()));
  refuse("lse misplaced", FUZZ_IF(true, c.shape.lse = c.shape.lse.present() ? Tensor() : c.shape.out));
  refuse("sinks without softmax", FUZZ_IF(a.normalizer != FV_SOFTMAX, a.sinks = reinterpret_cast<float*>(&a)));
  refuse("batch overflows", FUZZ_IF(true, a.batch = random.pick<int64_t>({BIG, BIG / 2, BIG / 64, INT64_C(1) << 60});
                                    a.layout_batch = random.chance(0.5) ? 1 : a.batch));
  refuse("heads overflow", FUZZ_IF(true, a.heads = random.pick<int64_t>({BIG, BIG / 2, BIG / 64, INT64_C(1) << 60});
                                   a.kv_heads = random.chance(0.5) ? 1 : a.heads));
  refuse("q_len overflows", FUZZ_IF(true, a.q_len = random.pick<int64_t>({BIG, BIG - 62, BIG / 2, INT64_C(1) << 60})));
  refuse("k_len overflows", FUZZ_IF(true, a.k_len = random.pick<int64_t>({BIG, BIG - 62, BIG / 2, INT64_C(1) << 60})));
  refuse("product overflows", FUZZ_IF(true, a.batch = INT64_C(1) << 30; a.kv_heads = 1; a.heads = INT64_C(1) << 31));
  refuse("strides overflow", [](Random& random, Case& c) {
    fv_args& a = c.a;
    const int64_t q_sizes[] = {a.batch, a.heads, a.q_len}, k_sizes[] = {a.batch, a.kv_heads, a.k_len};
    int64_t* strides[] = {a.q_stride, a.k_stride, a.v_stride, a.out_stride};
    const int64_t tensor = random.below(4), d = random.below(3);
    if ((tensor == 0 || tensor == 3 ? q_sizes : k_sizes)[d] == 1) return false;
    strides[tensor][d] = random.pick({BIG, INT64_MIN, BIG / 2, -BIG, BIG / 4 * 3});
    return true;
  });
  refuse("score strides overflow", [](Random& random, Case& c) {
    fv_args& a = c.a;
    const int64_t sizes[] = {a.batch, a.heads, a.q_len, a.k_len}, d = random.below(4);
    if (sizes[d] == 1) return false;
    if (a.bias)
      a.bias_stride[d] = random.pick({BIG, INT64_MIN, BIG / 2, -BIG});
    else if (a.temperature && d < 3)
      a.temperature_stride[d] = random.pick({BIG, INT64_MIN, BIG / 2, -BIG});
    else if (a.table && a.heads > 1)
      a.table_stride = random.pick({BIG, BIG / 2});
    else
      return false;
    return true;
  });
  refuse("bias dtype", FUZZ_IF(a.bias, a.bias_dtype = random.pick({-1, 3, INT32_MAX})));
  refuse("table without codes", FUZZ_IF(a.table, (random.chance(0.5) ? a.q_code : a.k_code) = nullptr));
  refuse("table_len", FUZZ_IF(a.table, a.table_len = random.pick<int64_t>({0, -1, INT64_MIN, BIG, INT64_C(1) << 32})));
  refuse("table too short", FUZZ_IF(a.table && a.table_len > 1,
                                    int64_t most = 0;
                                    for (int64_t i = 0; i < a.q_len; ++i) for (int64_t j = 0; j < a.k_len; ++j)
                                        most = std::max<int64_t>(most, int64_t{a.q_code[i]} - a.k_code[j]);
                                    a.table_len = random.chance(0.5) ? most : random.between(0, most)));
  refuse("table heads overlap", FUZZ_IF(a.table && a.table_len > 1, a.table_stride = random.pick<int64_t>({1, a.table_len - 1, -1, INT64_MIN})));
  refuse("code outside", [](Random& random, Case& c) {
    if (!c.a.table) return false;
    const bool query = random.chance(0.5), above = random.chance(0.5);
    Exact<int32_t>& codes = query ? c.q_code : c.k_code;
    const Exact<int32_t>& others = query ? c.k_code : c.q_code;
    const auto ends = std::minmax_element(others.data(), others.data() + others.count);
    // just past an end of the table, as far as 32 bits reach
    const int64_t code = query ? (above ? *ends.first + c.a.table_len : *ends.second - INT64_C(1))
                               : (above ? *ends.first + INT64_C(1) : *ends.second - c.a.table_len);
    if (code < INT32_MIN || code > INT32_MAX) return false;
    codes[random.below(codes.count)] = static_cast<int32_t>(code);
    return true;
  });

  const auto layout = [&](const char* name, std::function<bool(Random&, Case&)> f) {
    refuse(name, [f](Random& random, Case& c) { return c.a.kind == FV_LAYOUT && f(random, c); });
  };
  layout("layout batch", FUZZ_IF(true, a.layout_batch = random.pick<int64_t>({0, -1, a.batch + 1, BIG, INT64_MIN})));
  layout("layout heads", FUZZ_IF(true, a.layout_heads = random.pick<int64_t>({0, -1, a.heads + 1, BIG, INT64_MIN})));
  layout("nnz", FUZZ_IF(true, a.nnz = random.pick<int64_t>({-1, a.nnz + 1, a.nnz - 1, BIG, INT64_MIN})));
  layout("no row_ptr", FUZZ_IF(true, a.row_ptr = nullptr));
  layout("row_ptr start", FUZZ_IF(true, c.layout.row_ptr[0] = random.pick<int64_t>({1, -1, BIG, INT64_MIN})));
  layout("row_ptr", FUZZ_IF(c.layout.row_ptr.count > 2,
                            const int64_t n = random.between(1, c.layout.row_ptr.count - 2);
                            c.layout.row_ptr[n] = random.pick<int64_t>({-1, a.nnz + 1, BIG, INT64_MIN})));
  layout("no tiles", FUZZ_IF(a.nnz > 0, (random.chance(0.5) ? a.tile_idx : a.tile_id) = nullptr));
  layout("tile_idx", FUZZ_IF(a.nnz > 0, c.layout.tile_idx[random.below(a.nnz)] =
                                 static_cast<int32_t>(random.pick<int64_t>({-1, c.layout.k_tiles, INT32_MAX, INT32_MIN}))));
  layout("tile_id", FUZZ_IF(a.nnz > 0, c.layout.tile_id[random.below(a.nnz)] =
                                static_cast<int32_t>(random.pick<int64_t>({-1, a.bitmaps + 1, INT32_MAX, INT32_MIN}))));
  layout("tile twice", [](Random&, Case& c) {
    for (int64_t row = 0; row + 1 < c.layout.row_ptr.count; ++row)
      if (c.layout.row_ptr[row + 1] - c.layout.row_ptr[row] > 1) {
        const int64_t n = c.layout.row_ptr[row];
        c.layout.tile_idx[n + 1] = c.layout.tile_idx[n];
        return true;
      }
    return false;
  });
  layout("no dictionary", FUZZ_IF(a.bitmaps > 0, a.dictionary = nullptr));
  layout("bitmaps", FUZZ_IF(true, a.bitmaps = random.pick<int64_t>({-1, INT64_MIN})));

  refuse_back("null gradient", FUZZ_IF(true, const int64_t n = random.below(4);
                                       if (n == 0) a.dout = nullptr;
                                       if (n == 1) c.shape.dq = Tensor();
                                       if (n == 2) c.shape.dk = Tensor();
                                       if (n == 3) c.shape.dv = Tensor()));
  refuse_back("delta misplaced", FUZZ_IF(true, c.shape.delta = c.shape.delta.present() ? Tensor() : c.shape.out));
  refuse_back("dlse without softmax", FUZZ_IF(a.normalizer != FV_SOFTMAX, a.dlse = reinterpret_cast<float*>(&a)));
  refuse_back("dbias without bias", FUZZ_IF(!a.bias, (random.chance(0.5) ? c.shape.dbias_query : c.shape.dbias_key) = c.shape.dq));
  refuse_back("dbias stride 0", FUZZ_IF(c.shape.dbias.present(), a.dbias_stride[random.between(2, 3)] = 0));
  refuse_back("dbias strides overflow", FUZZ_IF(c.shape.dbias.present() && a.q_len > 1, a.dbias_stride[2] = random.pick({BIG, INT64_MIN, -BIG})));
  refuse_back("dout strides overflow", FUZZ_IF(a.q_len > 1, a.dout_stride[2] = random.pick({BIG, INT64_MIN, -BIG})));
  refuse_back("dtable without table", FUZZ_IF(!a.table, c.shape.dtable = c.shape.dq));
  refuse_back("dtemperature without temperature", FUZZ_IF(!a.temperature, c.shape.dtemperature = c.shape.dq));

  const auto no_tensors = [](fv_args& a) { a.q = a.k = a.v = a.dout = a.bias = nullptr, a.table = a.temperature = nullptr; };
  nothing("no queries", FUZZ_IF(true, a.q_len = 0; if (random.chance(0.5)) a.q = a.dout = nullptr));
  nothing("no batch", FUZZ_IF(true, a.batch = 0; if (random.chance(0.5)) a.q = a.k = a.v = a.dout = nullptr));
  nothing("no heads", FUZZ_IF(true, a.heads = 0; if (random.chance(0.3)) a.kv_heads = 0));
  nothing("nothing, any strides", FUZZ_IF(true, a.q_len = 0;
      for (int64_t* strides : {a.q_stride, a.k_stride, a.v_stride, a.out_stride, a.dout_stride, a.bias_stride, a.temperature_stride})
        for (int d = 0; d < 3; ++d) strides[d] = random.pick({BIG, INT64_MIN, int64_t{0}, int64_t{-1}})));
  list.push_back({"nothing, no tensors", false, NOTHING, [no_tensors](Random& random, Case& c) {
    (random.chance(0.5) ? c.a.q_len : c.a.batch) = 0;
    no_tensors(c.a);
    c.shape = Result();
    return true;
  }});
  either("nothing, huge sizes", FUZZ_IF(true, a.q_len = 0; int64_t* sizes[] = {&a.batch, &a.heads, &a.kv_heads, &a.k_len, &a.dim, &a.v_dim};
      *sizes[random.below(6)] = random.pick<int64_t>({BIG, BIG / 2, BIG / 4 + 1, INT64_C(1) << 62, INT64_MIN});
      *sizes[random.below(6)] = random.pick<int64_t>({BIG, BIG / 2, BIG / 4 + 1, INT64_C(1) << 62, INT64_MIN, 0})));
  either("scale", FUZZ_IF(true, a.scale = random.chance(0.5) ? std::numeric_limits<float>::quiet_NaN() : 3e38f));
  either("shift", FUZZ_IF(true, a.shift = random.chance(0.5) ? std::numeric_limits<float>::quiet_NaN() : -3e38f));
  either("softcap at the edge", FUZZ_IF(true, a.softcap = random.pick({1.2e-38f, 3.4e38f})));
  return list;
}

void check_zero(const char* name, const Tensor& x) {
  for (int64_t n = 0; n < x.elements() && x.present(); ++n)
    demand(x.load(x.at(n)) == 0, text("%s is not 0 where there was nothing to do", name));
}

void check_corrupted(Random& random, const Corruption& wrong, int64_t seed) {
  Random again{static_cast<uint64_t>(seed)};
  Case c = draw_case(again);
  if (!wrong.apply(random, c)) return;
  const bool back = wrong.back || random.chance(0.5);
  const Result y = fresh(c.shape);
  attach(c.a, y);
  const int64_t room = random.pick<int64_t>({0, 1, 5, 256});
  Exact<char> message(std::max<int64_t>(room, 1));
  message[0] = '\0';
  char* to = room == 0 && random.chance(0.5) ? nullptr : message.data();
  const int32_t code = (back ? fv_backward : fv_forward)(&c.a, to, room);
  demand(code <= 0, text("%s: code %d", wrong.name, code));
  if (wrong.verdict == REFUSED) demand(code < 0, text("%s: accepted by the %s", wrong.name, back ? "backward" : "forward"));
  if (wrong.verdict == NOTHING) demand(code == 0, text("%s: refused: %s", wrong.name, message.data()));
  if (code < 0 && room > 0) {
    demand(std::memchr(message.data(), 0, static_cast<size_t>(room)), text("%s: a message without an end", wrong.name));
    demand(room == 1 || message[0], text("%s: refused without a message", wrong.name));
  }
  if (wrong.verdict == NOTHING && back && c.a.batch > 0 && c.a.kv_heads > 0) {
    check_zero("dk", y.dk), check_zero("dv", y.dv);
    if (c.a.heads > 0) check_zero("dbias_key", y.dbias_key), check_zero("dtable", y.dtable);
  }
}

void check_invalid(Random& random, const std::vector<Corruption>& list) {
  const int64_t seed = static_cast<int64_t>(random.next() >> 1);
  for (int n = 0; n < 4; ++n)
    check_corrupted(random, list[random.below(static_cast<int64_t>(list.size()))], seed);
  char message[64];
  demand(fv_forward(nullptr, message, sizeof message) < 0 && fv_backward(nullptr, nullptr, 0) < 0, "null arguments accepted");
  for (const int32_t isa : {-1, static_cast<int32_t>(FV_ISAS), INT32_MAX, INT32_MIN, static_cast<int32_t>(random.next())})
    demand(fv_isa_available(isa) == 0 || (isa >= 0 && isa < FV_ISAS), "an instruction set that does not exist is available");
}

// -------------------------------------------------------------------------------------------------------------- main
void say_case() {
  char line[128];
  const int size = std::snprintf(line, sizeof line, "\nfailed: fuzz --seed %llu --case %ld --threads-least %d --work %llu\n",
                                 static_cast<unsigned long long>(run_seed), run_case, limits.threads,
                                 static_cast<unsigned long long>(limits.work));
  if (write(STDERR_FILENO, line, static_cast<size_t>(size)) < 0) _exit(1);
}

void on_signal(int number) {
  say_case();
  signal(number, SIG_DFL);
  raise(number);
}

bool run_one(long number, const std::vector<Corruption>& list) {
  run_case = number;
  Random random{run_seed * 0x9E3779B97F4A7C15u ^ static_cast<uint64_t>(number) * 0xD1342543DE82EF95u};
  std::string words, call;
  try {
    const Case c = draw_case(random);
    words = c.words();
    check_valid(random, c, &call);
    words = "a corrupted request";
    call.clear();
    check_invalid(random, list);
  } catch (const Failure& failure) {
    std::fprintf(stderr, "%s\n  %s of %s", failure.what.c_str(), call.c_str(), words.c_str());
    say_case();
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  long cases = 2000, only = -1;
  bool quiet = false;
  for (int n = 1; n < argc; ++n) {
    const std::string option = argv[n];
    if (option == "--quiet") {
      quiet = true;
      continue;
    }
    char* end = nullptr;
    const unsigned long long value = n + 1 < argc ? std::strtoull(argv[n + 1], &end, 10) : 0;
    if (!end || *end || end == argv[n + 1]) {
      std::fprintf(stderr, "fuzz: %s needs a number\n", argv[n]);
      return 2;
    }
    ++n;
    if (option == "--seed") {
      run_seed = value;
    } else if (option == "--cases") {
      cases = static_cast<long>(value);
    } else if (option == "--case") {
      only = static_cast<long>(value);
    } else if (option == "--threads-least" && value >= 1 && value <= 8) {
      limits.threads = static_cast<int>(value);
    } else if (option == "--work" && value >= 1) {
      limits.work = value;
    } else {
      std::fprintf(stderr, "usage: fuzz [--seed S] [--cases N] [--case K] [--threads-least 1..8] [--work W] [--quiet]\n");
      return 2;
    }
  }
  if (__sanitizer_set_death_callback)
    __sanitizer_set_death_callback(say_case);
  else
    for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) signal(number, on_signal);
  if (fv_sizeof_args() != static_cast<int64_t>(sizeof(fv_args))) {
    std::fprintf(stderr, "fuzz: the library has another fv_args\n");
    return 1;
  }
  const std::vector<Corruption> list = corruptions();
  if (only >= 0) return run_one(only, list) ? 0 : 1;
  std::string sets;
  for (int isa = 0; isa < FV_ISAS; ++isa)
    if (fv_isa_available(isa)) sets += " " + std::to_string(isa);
  if (!quiet) std::printf("fuzz: seed %llu, %ld cases, instruction sets%s\n", static_cast<unsigned long long>(run_seed), cases, sets.c_str()), std::fflush(stdout);
  for (long n = 0; n < cases; ++n) {
    if (!run_one(n, list)) return 1;
    if (!quiet && (n + 1) % 200 == 0) std::printf("fuzz: %ld of %ld cases\n", n + 1, cases), std::fflush(stdout);
  }
  std::printf("fuzz: %ld cases passed\n", cases);
  return 0;
}
