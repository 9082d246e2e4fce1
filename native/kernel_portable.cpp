// Baseline of any CPU.
#include <string.h>  // outside the namespace

#include "tile.h"
namespace fv_portable {
#define FV_PAIRS 0
#include "simd_portable.h"
#include "simd_common.h"
#include "kernel.h"
}  // namespace fv_portable
FV_KERNEL(fv_portable)
