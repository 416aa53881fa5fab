/*
 * random.c - counter-based random numbers: Philox 4x32-10 of Salmon, Moraes, Dror, Shaw, "Parallel random
 * numbers: as easy as 1, 2, 3", SC'11. A number is a pure function of (seed, position, stream). There is no
 * state, so a rollback restores nothing and sessions cannot disturb each other.
 *
 *     key = (seed low, seed high)     counter = (position low, position high, stream, 0)
 */
#include "ops/sample.h"

/* Multipliers, and the Weyl constants added to the key: golden ratio and sqrt(3) - 1 (Salmon et al., table
 * 2). */
#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u

enum { PHILOX_ROUNDS = 10 };

void fb_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t x0 = counter[0], x1 = counter[1], x2 = counter[2], x3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        const uint64_t a = (uint64_t)PHILOX_M0 * x0, b = (uint64_t)PHILOX_M1 * x2;
        x0 = (uint32_t)(b >> 32) ^ x1 ^ k0;
        x1 = (uint32_t)b;
        x2 = (uint32_t)(a >> 32) ^ x3 ^ k1;
        x3 = (uint32_t)a;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
    out[0] = x0;
    out[1] = x1;
    out[2] = x2;
    out[3] = x3;
}

void fb_random(uint64_t seed, uint64_t position, uint32_t stream, uint32_t out[4]) {
    const uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), stream, 0};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    fb_philox(counter, key, out);
}

double fb_uniform(uint64_t seed, uint64_t position, uint32_t stream) {
    uint32_t words[4];
    fb_random(seed, position, stream, words);
    const uint64_t bits = ((uint64_t)words[0] << 32 | words[1]) >> 11;
    return (double)bits * 0x1p-53;
}
