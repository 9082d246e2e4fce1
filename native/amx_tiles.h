// AMX: eight registers of 16 rows x 64 bytes, and C[16][16] += A[16][32] B[32][16] on bfloat16, B as rows of pairs.
//
// Every product here is written as a list of chunks of 32 along the sum. A block of C is 16 x 32 (two registers) or
// 16 x 16. Blocks take turns in two pairs of registers and each is stored only after the next has been multiplied: a
// store that waits for its product would hold up everything behind it.
#pragma once

#define FV_INLINE_MEMBER inline __attribute__((always_inline))

// The address sanitizer does not see what these instructions read and write: the 16 rows are shown to it.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void* __asan_region_is_poisoned(void* from, size_t bytes);
static void look_at_rows(const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    if (void* bad = __asan_region_is_poisoned((char*)p + r * stride, 64)) (void)*(volatile const char*)bad;
}
#define FV_LOOK(p, stride) look_at_rows(p, stride)
#else
#define FV_LOOK(p, stride) (void)0
#endif

// Registers: C 0, 1 (turn 0) and 2, 3 (turn 1), A 4, B 6 and 7. Stride in bytes.
#define FV_TILE_LOAD(r, p, stride)                                                                      \
  do {                                                                                                  \
    FV_LOOK(p, stride);                                                                                 \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #r : : "r"(p), "r"((int64_t)(stride)));               \
  } while (0)
#define FV_TILE_STORE(r, p, stride)                                                                     \
  do {                                                                                                  \
    FV_LOOK(p, stride);                                                                                 \
    __asm__ volatile("tilestored %%tmm" #r ", (%0,%1,1)" : : "r"(p), "r"((int64_t)(stride)) : "memory"); \
  } while (0)
#define FV_TILE_ZERO(r) __asm__ volatile("tilezero %tmm" #r)
#define FV_TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #c)
#define FV_FENCE() __asm__ volatile("" : : : "memory")  // the compiler does not see what tile loads read

// Takes the tile registers for the length of one call from the dispatcher, whatever others left in them. Denormal weights
// are set to zero meanwhile: the exponential would take a hundred times as long for each.
struct Registers {
  uint32_t control;
  Registers() {
    alignas(64) struct {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int r = 0; r < 8; ++r) config.row_bytes[r] = 64, config.rows[r] = 16;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
    control = _mm_getcsr();
    _mm_setcsr(control | 0x8000);
  }
  ~Registers() {
    _mm_setcsr(control);
    __asm__ volatile("tilerelease");
  }
};

struct Chunk {
  const char* a;  // 16 rows of 32 values
  const char* b;  // 16 rows of pairs
};

// One block of C: where it is added to (or put, with FRESH) and which columns of B it takes.
struct Block16 {
  char* c;
  int64_t a, b;  // bytes added to the chunks' addresses
  int columns;   // registers of C: 1 or 2
};

// Multiplies block after block; `stride_*` in bytes. Call flush at the end.
template <bool FRESH>
struct Multiplier {
  int64_t stride_a, stride_b, stride_c;
  char* waiting = nullptr;
  int columns = 0, turn = 0;

  Multiplier(int64_t a, int64_t b, int64_t c) : stride_a(a), stride_b(b), stride_c(c) { FV_FENCE(); }

#define FV_BLOCK(c0, c1, w0, w1)                                                      \
  {                                                                                   \
    if (FRESH) {                                                                      \
      FV_TILE_ZERO(c0);                                                               \
      if (x.columns > 1) FV_TILE_ZERO(c1);                                            \
    } else {                                                                          \
      FV_TILE_LOAD(c0, x.c, stride_c);                                                \
      if (x.columns > 1) FV_TILE_LOAD(c1, x.c + 64, stride_c);                        \
    }                                                                                 \
    if (x.columns > 1)                                                                \
      for (int n = 0; n < count; ++n) {                                               \
        FV_TILE_LOAD(4, chunks[n].a + x.a, stride_a);                                 \
        FV_TILE_LOAD(6, chunks[n].b + x.b, stride_b);                                 \
        FV_TILE_LOAD(7, chunks[n].b + x.b + 64, stride_b);                            \
        FV_TILE_DOT(c0, 4, 6);                                                        \
        FV_TILE_DOT(c1, 4, 7);                                                        \
      }                                                                               \
    else                                                                              \
      for (int n = 0; n < count; ++n) {                                               \
        FV_TILE_LOAD(4, chunks[n].a + x.a, stride_a);                                 \
        FV_TILE_LOAD(6, chunks[n].b + x.b, stride_b);                                 \
        FV_TILE_DOT(c0, 4, 6);                                                        \
      }                                                                               \
    if (columns) FV_TILE_STORE(w0, waiting, stride_c);                                \
    if (columns > 1) FV_TILE_STORE(w1, waiting + 64, stride_c);                       \
  }
  FV_INLINE_MEMBER void block(const Chunk* chunks, int count, const Block16& x) {
    if (turn == 0)
      FV_BLOCK(0, 1, 2, 3)
    else
      FV_BLOCK(2, 3, 0, 1)
    waiting = x.c;
    columns = x.columns;
    turn ^= 1;
  }
#undef FV_BLOCK

  FV_INLINE_MEMBER void flush() {
    if (turn == 1) {
      if (columns) FV_TILE_STORE(0, waiting, stride_c);
      if (columns > 1) FV_TILE_STORE(1, waiting + 64, stride_c);
    } else {
      if (columns) FV_TILE_STORE(2, waiting, stride_c);
      if (columns > 1) FV_TILE_STORE(3, waiting + 64, stride_c);
    }
    columns = 0;
    FV_FENCE();
  }
};

// ---------------------------------------------------------------------------------------------- copies and transposes
// 16 rows of 16 dwords turned over.
FV_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
  FV_UNROLL for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  FV_UNROLL for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  FV_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  FV_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// 32 values of one row, zeros beyond `left` of them or where there is no row.
FV_INLINE __m512i load_row(const bf16* row, bool there, int64_t left) {
  const __mmask32 mask = !there || left <= 0 ? 0 : left >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;
  return _mm512_maskz_loadu_epi16(mask, row);
}

// Rows as they are, 64 of up(dim, 32) values, zeros beyond.
static void copy_rows(const bf16* from, int64_t stride, int rows, int64_t dim, bf16* to) {
  const int64_t wide = up(dim, 32);
  for (int r = 0; r < T; ++r)
    for (int64_t d = 0; d < dim; d += 32)
      _mm512_storeu_si512(to + r * wide + d, load_row(from + r * stride + d, r < rows, dim - d));
}

// B of a sum over dim: [up(dim, 32) / 2][64 rows] of pairs, each pair with its signs turned by `flip`.
static void pack_dims(const bf16* from, int64_t stride, int rows, int64_t dim, uint32_t flip, uint32_t* to) {
  const __m512i sign = _mm512_set1_epi32((int)flip);
  for (int64_t d = 0; d < dim; d += 32)
    for (int r = 0; r < T; r += 16) {
      __m512i x[16];
      FV_UNROLL for (int i = 0; i < 16; ++i) x[i] = load_row(from + (r + i) * stride + d, r + i < rows, dim - d);
      transpose16(x);
      FV_UNROLL for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (d / 2 + i) * T + r, _mm512_xor_si512(x[i], sign));
    }
}

// A of a sum over rows: [up(dim, 32)][64 rows].
static void transpose_rows(const bf16* from, int64_t stride, int rows, int64_t dim, bf16* to) {
  for (int64_t d = 0; d < dim; d += 32)
    for (int r = 0; r < T; r += 32) {
      __m512i even[16], odd[16];  // words of two rows in turn: columns 8 n + 0..3 and 8 n + 4..7
      FV_UNROLL for (int i = 0; i < 16; ++i) {
        const int row = r + 2 * i;
        const __m512i x = load_row(from + row * stride + d, row < rows, dim - d);
        const __m512i y = load_row(from + (row + 1) * stride + d, row + 1 < rows, dim - d);
        even[i] = _mm512_unpacklo_epi16(x, y);
        odd[i] = _mm512_unpackhi_epi16(x, y);
      }
      transpose16(even);
      transpose16(odd);
      FV_UNROLL for (int i = 0; i < 16; ++i) {
        bf16* row = to + (d + i / 4 * 8 + i % 4) * T + r;
        _mm512_storeu_si512(row, even[i]);
        _mm512_storeu_si512(row + 4 * T, odd[i]);
      }
    }
}

// ------------------------------------------------------------------------------------------------------------ weights
// 2^x = 2^floor(x) p(x - floor(x)): degree 4, minimax relative error 2.7e-6. -inf gives 0, NaN stays NaN.
FV_INLINE __m512 exp2_fine(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 9);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.013534167781472206f), f, _mm512_set1_ps(0.052011460065841675f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2414427548646927f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6930038332939148f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026226043701f));
  return _mm512_scalef_ps(p, x);
}

// Degree 3, 7.5e-5: for weights that only meet bfloat16 products.
FV_INLINE __m512 exp2_coarse(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 9);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.07802452147006989f), f, _mm512_set1_ps(0.22606715559959412f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6958335638046265f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999251961708069f));
  return _mm512_scalef_ps(p, x);
}

// Rounded to bfloat16, halves away from zero: the conversion instruction takes four times as long.
FV_INLINE __m512i half_up(__m512 x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); }

// Two rounded vectors as one of pairs, the first in the low halves.
FV_INLINE __m512i join_halves(__m512i low, __m512i high) {
  const __m512i bytes = _mm512_set4_epi32(0x0f0e, 0x0b0a, 0x0706, 0x0302);
  return _mm512_mask_shuffle_epi8(high, 0x3333333333333333ull, low, bytes);
}
