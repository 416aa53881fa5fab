/*
 * mma.cuh - products of small tiles on tensor cores, and asynchronous copies into shared memory.
 *
 * A tile is 16 rows of weights x 16 columns, times 16 columns x 8 tokens. Its lanes hold what the PTX manual
 * shows for mma.m16n8k16; lane 4 g + t:
 *
 *     a[0]  row g,     k 2 t and 2 t + 1        b[0]  k 2 t and 2 t + 1, token g
 *     a[1]  row g + 8, the same k               b[1]  k 2 t + 8 and 2 t + 9, token g
 *     a[2]  row g,     k 2 t + 8 and 2 t + 9
 *     a[3]  row g + 8, the same k
 *     c[0], c[1]  row g, tokens 2 t and 2 t + 1
 *     c[2], c[3]  row g + 8, the same tokens
 *
 * Turing has f16 only, and tiles of 8 columns: a[0], a[1], b[0] are such a tile, and the other half is
 * another.
 */
#ifndef FABULA_CUDA_MMA_CUH
#define FABULA_CUDA_MMA_CUH

#include "device.h"

/* Units that a lane loads at once. */
struct alignas(16) fb_words4 {
    uint32_t word[4];
};
struct alignas(8) fb_words2 {
    uint32_t word[2];
};
struct alignas(8) fb_floats2 {
    float number[2];
};

#ifdef __CUDACC__

#include <cuda_pipeline_primitives.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FB_TILE_COLUMNS 8
#else
#define FB_TILE_COLUMNS 16
#endif

FB_DEVICE void fb_mma_f16_8(float c[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

FB_DEVICE void fb_mma_f16_16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FB_DEVICE void fb_mma_bf16_16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Copies 16 bytes from global to shared memory, asynchronously from Ampere on. Copies before a commit form a
 * group; a thread waits until all of its groups except the last N have arrived, then a barrier makes them
 * visible to the others. */
FB_DEVICE void fb_copy_async(fb_words4 *shared, const fb_words4 *global) {
    __pipeline_memcpy_async(shared, global, sizeof *shared);
}

FB_DEVICE void fb_copy_commit() {
    __pipeline_commit();
}

template <int N> FB_DEVICE void fb_copy_wait() {
    __pipeline_wait_prior(N);
}

/* Four bytes of `low` and `high`, selected by the nibbles of `which`. */
FB_DEVICE uint32_t fb_byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    return __byte_perm(low, high, which);
}

/* a - b of two pairs of f16. */
FB_DEVICE uint32_t fb_half2_sub(uint32_t a, uint32_t b) {
    const __half2 difference = __hsub2(*reinterpret_cast<const __half2 *>(&a), *reinterpret_cast<const __half2 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&difference);
}

#else
#include "emulate_mma.h"
#endif

/* c += a b, f16 */
FB_DEVICE void fb_mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if FB_TILE_COLUMNS == 16
    fb_mma_f16_16(c, a, b);
#else
    fb_mma_f16_8(c, a[0], a[1], b[0]);
    fb_mma_f16_8(c, a[2], a[3], b[1]);
#endif
}

/* The same in bf16, which Turing lacks: no kernel that calls it is launched there. */
FB_DEVICE void fb_mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if FB_TILE_COLUMNS == 16
    fb_mma_bf16_16(c, a, b);
#else
    (void)c, (void)a, (void)b;
#endif
}

#endif
