/* memory.h - aligned memory for weights, pages and scratch. */
#ifndef FABULA_BASE_MEMORY_H
#define FABULA_BASE_MEMORY_H

#include "base/exported.h"

#include <stddef.h>

/* Allocates zeroed, 64-byte aligned memory. Blocks of 64 KiB and more are anonymous mappings with huge pages
 * requested, of which only touched pages take memory. Blocks of 2 MiB and more are 2 MiB-aligned; smaller
 * ones share a mapping, which is unmapped with its last block. NULL if the system refuses. n_bytes 0
 * allocates one cache line. */
FB_EXPORTED void *fb_memory_allocate(size_t n_bytes);

/* Releases what fb_memory_allocate returned; n_bytes must be the same. NULL is allowed. */
FB_EXPORTED void fb_memory_release(void *memory, size_t n_bytes);

/* Returns the system's pages that lie whole in a part of such a block to the system, until it is written again. The
 * part's contents are undefined afterwards: what they were, or zero. */
void fb_memory_discard(void *memory, size_t n_bytes);

/* *out = a * b; false on overflow. */
static inline int fb_size_multiply(size_t a, size_t b, size_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}

#endif
