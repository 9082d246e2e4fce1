// AMX: bfloat16 products on tile registers, everything else AVX-512. float32 never comes here.
#include <immintrin.h>  // outside the namespace
#include <sys/syscall.h>
#include <unistd.h>

#include "tile.h"
namespace fv_amx {
#define FV_PAIRS 2  // weights leave the passes of logits.h as pairs
#define FV_TILES
#pragma GCC diagnostic ignored "-Wunused-function"
#include "simd_avx512.h"
#include "simd_common.h"
#include "kernel.h"

#include "amx_tiles.h"
#include "amx_forward.h"
#include "amx_backward.h"

static void amx_prepare(const fv_args& a, const fv_prepared& ready, bool backward, int64_t b, int64_t hkv, int64_t j) {
  if (backward)
    prepare_back(a, ready, b, hkv, j);
  else
    amx_prepare_forward(a, ready, b, hkv, j);
}

static void amx_floats(const fv_args& a, bool backward, int64_t* k, int64_t* v) {
  if (backward)
    back_tile_floats(a, k, v);
  else
    amx_tile_floats(a, backward, k, v);
}

static int64_t amx_scratch(const fv_args& a, bool backward) {
  int64_t floats;
  if (backward)
    carve_tiles(a, nullptr, &floats);
  else
    carve_amx(a, nullptr, &floats);
  return floats;
}
}  // namespace fv_amx

extern const fv_kernel fv_amx_kernel = {fv_amx::amx_query_tile, fv_amx::join_tile,   fv_amx::run_back,
                                        fv_amx::write_keys,     fv_amx::amx_prepare, fv_amx::amx_scratch,
                                        fv_amx::state_floats,   fv_amx::amx_floats};

// Asks the kernel for the tile registers: whole process, for good. False where the CPU or the kernel has none.
bool fv_amx_enable() {
  static const bool granted = [] {
    const long request_permission = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    const bool there = (d >> 22 & 1) && (d >> 24 & 1);  // amx_bf16, amx_tile
    return there && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
}
