/*
 * amx.h - the AMX tile registers of x86-64 (AMX-TILE, AMX-INT8), as blocks_amx.h uses them. Tests replace
 * this header by an emulation with the same names (tests/native/emulated/tiles.h).
 *
 * There are eight registers of up to 16 rows x 64 bytes. One configuration sets the shapes of all. A load
 * zeroes the rest of its register. After a thread has released them, context switches no longer save them.
 *
 * Tiles are named by literals that become part of the instruction, hence the macros. GCC's intrinsics (up to
 * 13) do not tell the compiler that a load reads memory, nor that a configuration has more than 8 bytes;
 * fb_tile_memory does.
 */
#ifndef FABULA_KERNELS_AMX_H
#define FABULA_KERNELS_AMX_H

#include <stdint.h>

/* The 64-byte operand of LDTILECFG. */
struct fb_tile_shapes {
    uint8_t palette; /* 1: eight tiles of at most 16 x 64 bytes */
    uint8_t start_row, reserved[14];
    uint16_t row_bytes[16]; /* [i]: bytes per row of tile i; tiles 8 .. 15 do not exist and stay 0 */
    uint8_t n_rows[16];
};
_Static_assert(sizeof(struct fb_tile_shapes) == 64, "LDTILECFG reads 64 bytes");

#ifndef FABULA_EMULATE_TILES

#include <immintrin.h>

/* Compiler barrier: the memory at `at` is read or written by an instruction that does not say so. */
static inline void fb_tile_memory(const void *at) {
    __asm__ volatile("" ::"r"(at) : "memory");
}

static inline void fb_tile_configure(const struct fb_tile_shapes *shapes) {
    fb_tile_memory(shapes);
    _tile_loadconfig(shapes);
}

static inline void fb_tile_release(void) {
    _tile_release();
}

#define fb_tile_zero(tile) _tile_zero(tile)
#define fb_tile_load(tile, from, stride)                                                                               \
    do {                                                                                                               \
        fb_tile_memory(from);                                                                                          \
        _tile_loadd(tile, from, stride);                                                                               \
    } while (0)
#define fb_tile_store(tile, to, stride)                                                                                \
    do {                                                                                                               \
        _tile_stored(tile, to, stride);                                                                                \
        fb_tile_memory(to);                                                                                            \
    } while (0)

/* int32 sums += int8 x int8, four at a time: sums[m][n] += a[m][4 k + i] * b[k][4 n + i] over all k and i. */
#define fb_tile_dot(sums, a, b) _tile_dpbssd(sums, a, b)

#endif

#endif
