// Counter-based random numbers: which weights dropout keeps, the same for any tiling, thread count and direction.
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
// counter = (key / 4, query, batch * heads + head, 0), seed = (low, high); word key % 4 belongs to the pair.
#pragma once

enum { PHILOX_ROUNDS = 10 };

// keep[c] bit r: is the weight of key first_key + c and query first_query + r kept? first_key is a multiple of 64.
static __attribute__((noinline)) void keep_bits(uint64_t seed, uint32_t threshold, int64_t first_query, int64_t first_key,
                                                uint32_t head, uint64_t* keep) {
  for (int quad = 0; quad < T / 4; ++quad) {
    uint32_t x0[T], x1[T], x2[T], x3[T];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int r = 0; r < T; ++r) {
      x0[r] = (uint32_t)(first_key / 4) + (uint32_t)quad;
      x1[r] = (uint32_t)first_query + (uint32_t)r;
      x2[r] = head;
      x3[r] = 0;
    }
    for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      for (int r = 0; r < T; ++r) {
        const uint64_t a = (uint64_t)x0[r] * 0xD2511F53u, b = (uint64_t)x2[r] * 0xCD9E8D57u;
        x0[r] = (uint32_t)(b >> 32) ^ x1[r] ^ k0;
        x2[r] = (uint32_t)(a >> 32) ^ x3[r] ^ k1;
        x1[r] = (uint32_t)b;
        x3[r] = (uint32_t)a;
      }
    const uint32_t* words[4] = {x0, x1, x2, x3};
    for (int w = 0; w < 4; ++w) {
      uint64_t bits = 0;
      for (int r = 0; r < T; ++r) bits |= (uint64_t)(words[w][r] >= threshold) << r;
      keep[4 * quad + w] = bits;
    }
  }
}
