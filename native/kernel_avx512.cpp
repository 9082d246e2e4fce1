// AVX-512.
#include <immintrin.h>  // outside the namespace

#include "tile.h"
namespace fv_avx512 {
#define FV_PAIRS 0
#include "simd_avx512.h"
#include "simd_common.h"
#include "kernel.h"
}  // namespace fv_avx512
FV_KERNEL(fv_avx512)
