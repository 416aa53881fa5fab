/* memory.h - aligned memory for weights, pages and scratch. */
#ifndef FABULA_BASE_MEMORY_H
#define FABULA_BASE_MEMORY_H

#include <stddef.h>

/* Zeroed memory, 64-byte aligned; from 64 KiB on it is anonymous and asks for huge pages, and only touched pages take
 * room. From 2 MiB on it is 2 MiB-aligned; smaller blocks share mappings, which go with the last of their blocks. NULL if the system refuses. n_bytes 0 gives one line. */
void *fb_memory_take(size_t n_bytes);

/* Gives back what fb_memory_take returned; the size must be the same. NULL is allowed. */
void fb_memory_release(void *memory, size_t n_bytes);

/* a * b into *out; false if it does not fit a size_t. */
static inline int fb_size_multiply(size_t a, size_t b, size_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}

#endif
