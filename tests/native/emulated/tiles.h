/*
 * tiles.h - AMX's tile registers in plain C, in place of the instructions of kernels/amx.h: include it first. What the processor
 * refuses ends the test with a message: tiles that were not configured, shapes it does not have or that do not fit together.
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

/* Whether this thread has tiles that it did not release, and how many products it has had. */
bool emulated_tiles_held(void);
size_t emulated_tile_dots(void);

#endif
