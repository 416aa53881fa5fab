/*
 * emulate_mma.h - tensor cores and copies into shared memory as host code; see emulate.h and
 * native/cuda/mma.cuh.
 *
 * The lanes of a warp exchange their parts of a tile as the PTX manual shows for mma.m16n8k16 and
 * mma.m16n8k8. Products are summed in double and rounded once; a GPU may truncate bits on the way. A copy is
 * done when it is waited for, so tests detect reads that come too early; with `backward` set it is done when
 * it is requested, so they detect overwriting memory that is still read. FB_TILE_COLUMNS 8 builds kernels as
 * for Turing.
 */
#ifndef FABULA_TESTS_EMULATE_MMA_H
#define FABULA_TESTS_EMULATE_MMA_H

#include "emulate.h"

#ifndef FB_TILE_COLUMNS
#define FB_TILE_COLUMNS 16
#endif

namespace emulate {

enum { SHUFFLE_F16_16 = -2, SHUFFLE_BF16_16 = -3, SHUFFLE_F16_8 = -4 };

inline float number_of(uint64_t word, unsigned index, bool is_bf16) {
    const uint16_t half = (uint16_t)(word >> (16 * index));
    return is_bf16 ? fb_f32_from_bits((uint32_t)half << 16) : fb_f16_to_f32(half);
}

/* Results of all lanes from all their messages: words 0 and 1 are a[0 .. 3], word 2 is b[0 .. 1]; for tiles
 * of 8 columns a[0 .. 1] and b[0]. */
__attribute__((no_sanitize("address", "undefined"))) inline void multiply_tile(
    warp &w, unsigned slot, unsigned n_columns, bool is_bf16) {
    float a[16][16], b[8][16];
    for (unsigned lane = 0; lane < WARP; lane++) {
        const unsigned g = lane / 4, t = lane % 4;
        const message &m = w.messages[slot][lane];
        for (unsigned k = 0; k < n_columns / 4; k++) {
            const unsigned column = k / 2 * 8 + 2 * t + k % 2;
            a[g][column] = number_of(m.words[k / 2], k % 2, is_bf16);
            a[g + 8][column] = number_of(m.words[k / 2], 2 + k % 2, is_bf16);
            b[g][column] = number_of(m.words[2], k, is_bf16);
        }
    }
    for (unsigned lane = 0; lane < WARP; lane++)
        for (unsigned i = 0; i < 4; i++) {
            const float *row = a[lane / 4 + i / 2 * 8], *token = b[lane % 4 * 2 + i % 2];
            double sum = 0.0;
            for (unsigned k = 0; k < n_columns; k++)
                sum += (double)row[k] * (double)token[k];
            w.products[slot][lane][i] = sum;
        }
    w.is_multiplied[slot] = true;
}

inline void add_product(float c[4], const message &m, unsigned n_columns, int kind) {
    const unsigned slot = exchange(m, 0xFFFFFFFFu, kind);
    warp &w = warps[current / WARP];
    if (!w.is_multiplied[slot]) multiply_tile(w, slot, n_columns, kind == SHUFFLE_BF16_16);
    for (unsigned i = 0; i < 4; i++)
        c[i] = (float)((double)c[i] + w.products[slot][current % WARP][i]);
}

inline message tile_message(const uint32_t a[4], const uint32_t b[2]) {
    return {{a[0] | (uint64_t)a[1] << 32, a[2] | (uint64_t)a[3] << 32, b[0] | (uint64_t)b[1] << 32}};
}

} // namespace emulate

inline void fb_mma_f16_8(float c[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    emulate::add_product(c, {{a0 | (uint64_t)a1 << 32, 0, b0}}, 8, emulate::SHUFFLE_F16_8);
}

inline void fb_mma_f16_16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    emulate::add_product(c, emulate::tile_message(a, b), 16, emulate::SHUFFLE_F16_16);
}

inline void fb_mma_bf16_16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    emulate::add_product(c, emulate::tile_message(a, b), 16, emulate::SHUFFLE_BF16_16);
}

inline void fb_copy_async(fb_words4 *shared, const fb_words4 *global) {
    assert(reinterpret_cast<uintptr_t>(shared) % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0);
    emulate::fiber &self = emulate::fibers[emulate::current];
    if (emulate::backward)
        *shared = *global;
    else
        self.copies.push_back({shared, global, self.n_groups});
}

inline void fb_copy_commit() {
    emulate::fibers[emulate::current].n_groups++;
}

template <int N> void fb_copy_wait() {
    emulate::fiber &self = emulate::fibers[emulate::current];
    size_t n_left = 0;
    for (const emulate::copy &c : self.copies) {
        if (c.group + N < self.n_groups)
            memcpy(c.to, c.from, sizeof(fb_words4));
        else
            self.copies[n_left++] = c;
    }
    self.copies.resize(n_left);
}

inline uint32_t fb_byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t bytes = low | (uint64_t)high << 32;
    uint32_t out = 0;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned nibble = (which >> (4 * i)) & 0xFu;
        assert(nibble < 8); /* larger values would replicate a sign */
        out |= (uint32_t)((bytes >> (8 * nibble)) & 0xFFu) << (8 * i);
    }
    return out;
}

inline uint32_t fb_half2_sub(uint32_t a, uint32_t b) {
    const uint16_t low = fb_f32_to_f16(fb_f16_to_f32((uint16_t)a) - fb_f16_to_f32((uint16_t)b));
    const uint16_t high = fb_f32_to_f16(fb_f16_to_f32((uint16_t)(a >> 16)) - fb_f16_to_f32((uint16_t)(b >> 16)));
    return low | (uint32_t)high << 16;
}

#endif
