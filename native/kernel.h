// Block-sparse flash attention, forward and backward: written once, compiled per instruction set.
//
// Included by kernel_<isa>.cpp after it has defined, inside a namespace of its own:
//   Vec (type), W (lanes), NK x NV and NQ x NV (register tiles), load/store/zero/set1/bcast32/mul/div/add/sub/fma/vmax,
//   mac(a, b, c) = a b + c, exp2v, tanhv, total_of, select_bits(bits, x, otherwise), select_eq and select_lt(a, b, yes,
//   no), widen(bf16*), and PAIRS (1: mac works on bfloat16 pairs).
#pragma once
#include "foveate.h"
#include "tile.h"

#define FV_INLINE static inline __attribute__((always_inline))
#define FV_UNROLL _Pragma("GCC unroll 16")
#define FV_OPAQUE(p) __asm__("" : "+r"(p))  // keeps the compiler from deriving p anew

static const float LOG2E = 1.44269504088896340736f;
static const float LN2 = 0.69314718055994530942f;
static const float NEG_INF = -__builtin_inff();
enum { T = FV_TILE, STEP = FV_STEP };

typedef uint16_t bf16;

FV_INLINE float from_bf16(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
struct half {
  uint16_t bits;
};
FV_INLINE float as_float(const half* p) {
  const uint32_t sign = (uint32_t)(p->bits & 0x8000) << 16, rest = (uint32_t)(p->bits & 0x7fff) << 13;
  uint32_t bits;
  float y;
  if (rest >= 0x0f800000u) {  // infinity, NaN
    bits = rest + 0x70000000u;
  } else {  // 2^112 moves the exponent, subnormals included
    __builtin_memcpy(&y, &rest, 4);
    y *= 5192296858534827628530496329220096.f;
    __builtin_memcpy(&bits, &y, 4);
  }
  bits |= sign;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
FV_INLINE float as_float(const float* p) { return *p; }
FV_INLINE float as_float(const bf16* p) { return from_bf16(*p); }
FV_INLINE int64_t up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

// One listed key tile while it is being processed.
struct Tile {
  const float* k;      // key rows, in units of float (or of bf16 pairs)
  int64_t k_stride;    // floats (or pairs) between key rows
  const float* v;      // value rows (or rows of key pairs)
  int64_t v_stride;
  int keys;            // valid keys, 1..64
  bool partial;
  const uint64_t* by_query;  // 64 words: bit c of word r
  uint64_t by_key[T];        // the transposed bitmap: bit r of word c
};


#include "philox.h"
#include "products.h"
#include "logits.h"
#include "operands.h"
#include "forward.h"
#if FV_PAIRS && !defined(FV_TILES)  // bfloat16 trains on the widened kernel
static const auto run_backward = nullptr, write_keys = nullptr;
static int64_t backward_floats(const fv_args&) { return 0; }
#else
#include "outer.h"
#include "gradients.h"
#include "backward.h"
#endif

static int64_t scratch_floats(const fv_args& a, bool backward) { return backward ? backward_floats(a) : forward_floats(a); }
