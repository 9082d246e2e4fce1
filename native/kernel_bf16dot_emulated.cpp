// The bfloat16 pair kernel with its dot product spelled out: tests the packing on CPUs without the instruction.
#include <immintrin.h>  // outside the namespace

#include "tile.h"
namespace fv_bf16dot_emulated {
#define FV_PAIRS 2
#include "simd_avx512.h"
#include "simd_common.h"
#include "kernel.h"
}  // namespace fv_bf16dot_emulated
FV_KERNEL(fv_bf16dot_emulated)
