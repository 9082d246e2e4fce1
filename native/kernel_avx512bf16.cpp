// AVX-512 with bfloat16 dot products.
#include <immintrin.h>  // outside the namespace

#include "tile.h"
namespace fv_avx512bf16 {
#define FV_PAIRS 1
#include "simd_avx512.h"
#include "simd_common.h"
#include "kernel.h"
}  // namespace fv_avx512bf16
FV_KERNEL(fv_avx512bf16)
