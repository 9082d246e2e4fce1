// The C ABI of the native engine. Plain structs and functions; every size is checked before anything is read.
#pragma once
#include <stdint.h>

#define FV_ABI 1
#define FV_TILE 64
#define FV_MAX_DIM 512

#if defined(__GNUC__)
#define FV_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define FV_EXPORT extern "C"
#endif

enum fv_dtype { FV_F32 = 0, FV_BF16 = 1 };
enum fv_kind { FV_FULL = 0, FV_CAUSAL = 1, FV_LAYOUT = 2 };  // causal: bottom-right aligned
enum fv_isa { FV_PORTABLE = 0, FV_AVX2 = 1, FV_AVX512 = 2, FV_AVX512_BF16 = 3, FV_BF16DOT_EMULATED = 4, FV_ISAS = 5 };

// Runs body(data) on `threads` threads at once and returns when all have; GOMP_parallel has this signature.
typedef void (*fv_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

typedef struct fv_forward_args {
  int32_t abi;    // FV_ABI
  int32_t dtype;  // fv_dtype of q, k, v, out
  int32_t kind;   // fv_kind
  int32_t isa;    // fv_isa
  int32_t threads;
  float scale;    // on q k^T
  float softcap;  // 0 = none
  int32_t reserved;
  int64_t batch, heads, kv_heads, q_len, k_len, dim, v_dim;
  const void* q;      // element strides below; the last dimension is contiguous
  const void* k;
  const void* v;
  void* out;
  float* lse;         // (batch, heads, q_len) contiguous
  const float* sinks; // (heads) or null
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, position
  // FV_LAYOUT only: see BlockLayout
  int64_t layout_batch, layout_heads, nnz, bitmaps;
  const int64_t* row_ptr;
  const int32_t* tile_idx;
  const int32_t* tile_id;
  const uint64_t* dictionary;
  fv_parallel parallel;  // the pool to run on; null: threads of our own for the length of the call
} fv_forward_args;

// 0 on success, else a negative code; `message` receives the reason.
FV_EXPORT int32_t fv_forward(const fv_forward_args* args, char* message, int64_t message_size);
// 1 if this build and this CPU can run the instruction set.
FV_EXPORT int32_t fv_isa_available(int32_t isa);
FV_EXPORT int64_t fv_sizeof_forward_args(void);
