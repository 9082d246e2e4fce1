// The C ABI of the native engine. Plain structs and functions; every size is checked before anything is read.
#pragma once
#include <stdint.h>

#define FV_ABI 2
#define FV_TILE 64
#define FV_MAX_DIM 512

#if defined(__GNUC__)
#define FV_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define FV_EXPORT extern "C"
#endif

enum fv_dtype { FV_F32 = 0, FV_BF16 = 1, FV_F16 = 2 };  // float16: biases only
enum fv_kind { FV_FULL = 0, FV_CAUSAL = 1, FV_LAYOUT = 2 };  // causal: bottom-right aligned
enum fv_normalizer { FV_SOFTMAX = 0, FV_SIGMOID = 1, FV_RELU = 2 };
enum fv_isa {
  FV_PORTABLE = 0,
  FV_AVX2 = 1,
  FV_AVX512 = 2,
  FV_AVX512_BF16 = 3,
  FV_AMX = 4,
  FV_BF16DOT_EMULATED = 5,
  FV_ISAS = 6
};

// Runs body(data) on `threads` threads at once and returns when all have; GOMP_parallel has this signature.
typedef void (*fv_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// One attention call. The logits of query i and key j, in this order:
//   s = scale temperature_i q_i k_j;  s = softcap tanh(s / softcap);  s += bias_ij + table[q_code_i - k_code_j] + shift
// weights p by the normalizer; each is dropped with probability `dropout`, kept ones grow by 1 / (1 - dropout).
typedef struct fv_args {
  int32_t abi;    // FV_ABI
  int32_t dtype;  // fv_dtype of q, k, v, out and, in the backward, dout, dq, dk, dv
  int32_t kind;   // fv_kind
  int32_t isa;    // fv_isa
  int32_t threads;
  int32_t normalizer;  // fv_normalizer
  float scale;
  float softcap;  // 0 = none
  float shift;
  float dropout;
  uint64_t seed;
  int64_t batch, heads, kv_heads, q_len, k_len, dim, v_dim;
  const void* q;  // element strides below; the last dimension is contiguous
  const void* k;
  const void* v;
  void* out;
  float* lse;          // (batch, heads, q_len) contiguous; softmax only, else null
  const float* sinks;  // (heads) or null; softmax only
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, head, position
  // scores; null = absent
  const float* temperature;
  int64_t temperature_stride[3];  // batch, head, query; 0 broadcasts
  const void* bias;
  int64_t bias_stride[4];  // batch, head, query, key; 0 broadcasts
  int32_t bias_dtype;      // fv_dtype
  int32_t reserved;
  const float* table;
  int64_t table_len, table_stride;  // entries per head, floats between heads (0: shared)
  const int32_t* q_code;            // (q_len)
  const int32_t* k_code;            // (k_len)
  // FV_LAYOUT only: see BlockLayout
  int64_t layout_batch, layout_heads, nnz, bitmaps;
  const int64_t* row_ptr;
  const int32_t* tile_idx;
  const int32_t* tile_id;
  const uint64_t* dictionary;
  fv_parallel parallel;  // the pool to run on; null: threads of our own for the length of the call
  // backward only: out and lse are read, and
  const void* dout;
  int64_t dout_stride[3];
  const float* dlse;  // (batch, heads, q_len) contiguous, or null
  void* dq;           // contiguous (batch, heads, q_len, dim), (batch, kv_heads, k_len, dim or v_dim)
  void* dk;
  void* dv;
  float* delta;            // (batch, heads, q_len) contiguous: dout . out - dlse; softmax only, else null
  float* dtemperature;     // (batch, heads, q_len) contiguous, or null
  float* dbias;            // null, or floats that begin as 0; strides as below, 0 where they are summed
  int64_t dbias_stride[4];  // batch and head may be 0, query and key not
  float* dbias_query;      // (batch, heads, q_len) contiguous or null: the sum over keys
  float* dbias_key;        // (batch, heads, k_len) contiguous or null: the sum over queries
  float* dtable;           // (batch, heads, table_len) contiguous or null
} fv_args;

// 0 on success, else a negative code; `message` receives the reason.
FV_EXPORT int32_t fv_forward(const fv_args* args, char* message, int64_t message_size);
FV_EXPORT int32_t fv_backward(const fv_args* args, char* message, int64_t message_size);
// 1 if this build and this CPU can run the instruction set.
FV_EXPORT int32_t fv_isa_available(int32_t isa);
FV_EXPORT int64_t fv_sizeof_args(void);
