// AVX2 and FMA.
#include <immintrin.h>  // outside the namespace

#include "tile.h"
namespace fv_avx2 {
#define FV_PAIRS 0
#include "simd_avx2.h"
#include "simd_common.h"
#include "kernel.h"
}  // namespace fv_avx2
FV_KERNEL(fv_avx2)
