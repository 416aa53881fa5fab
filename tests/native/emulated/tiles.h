/*
 * tiles.h - AMX tile registers in plain C, in place of the instructions of kernels/amx.h: include it first.
 * What a processor refuses ends the test with a message: unconfigured tiles, shapes that it does not have or
 * that do not match.
 */
#ifndef FABULA_TESTS_EMULATED_TILES_H
#define FABULA_TESTS_EMULATED_TILES_H

#define FABULA_EMULATE_TILES
#include "kernels/amx.h"

#include <stdbool.h>
#include <stddef.h>

void fb_tile_configure(const struct fb_tile_shapes *shapes);
void fb_tile_release(void);
void fb_tile_zero(int tile);
void fb_tile_load(int tile, const void *from, size_t stride);
void fb_tile_store(int tile, void *to, size_t stride);
void fb_tile_dot(int sums, int a, int b);

/* Whether this thread holds tiles that it did not release, and how many products it has computed. */
bool emulated_tiles_held(void);
size_t emulated_tile_dots(void);

#endif
