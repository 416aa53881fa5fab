/*
 * amx.h - the tile registers of x86-64 (AMX-TILE, AMX-INT8), as blocks_amx.h uses them. Tests replace this header by an emulation
 * of the same names (tests/native/emulated/tiles.h).
 *
 * Eight registers of up to 16 rows x 64 bytes. Their shapes are set for all at once, and what a tile is not given by a load is
 * zero. A thread that has released them saves nothing more when the system switches to another.
 *
 * Tiles are named by literals, which are part of an instruction, hence macros. GCC's intrinsics up to 13 tell the compiler
 * neither that a tile is loaded from memory nor that a configuration has more than 8 bytes; so each access tells it here.
 */
#ifndef FABULA_KERNELS_AMX_H
#define FABULA_KERNELS_AMX_H

#include <stdint.h>

/* The 64 bytes of LDTILECFG. */
struct fb_tile_shapes {
    uint8_t palette; /* 1: eight tiles of 16 x 64 bytes at most */
    uint8_t start_row, reserved[14];
    uint16_t row_bytes[16]; /* of tile i; tiles from 8 on do not exist and stay 0 */
    uint8_t n_rows[16];
};
_Static_assert(sizeof(struct fb_tile_shapes) == 64, "as the processor reads it");

#ifndef FABULA_EMULATE_TILES

#include <immintrin.h>

/* What lies at an address is used by instructions that do not say so, and they may have changed it. */
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

/* int32 sums += signed bytes x signed bytes, in fours: sums[m][n] += a[m][4 k + i] * b[k][4 n + i] over all k and i. */
#define fb_tile_dot(sums, a, b) _tile_dpbssd(sums, a, b)

#endif

#endif
