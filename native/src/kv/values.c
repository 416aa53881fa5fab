/*
 * values.c - values that are a part of K, in the layout of V.
 *
 * K and V differ in which of the two, position or dimension, is contiguous in a panel. So a square of 16 dimensions
 * and 16 positions, 256 numbers one after another in both, is transposed. Latent attention stores its latent once that
 * way: half the memory, and half of what a decode step reads, for a transposition in L1 of what is multiplied by all
 * query heads.
 */
#include "kv/pages.h"

#include <string.h>

/* Transposes 16 x 16 numbers. One step sends row r and row r + 8, number by number in turn, to rows 2 r and 2 r + 1;
 * so the 8 bits of a number's row and column go around by one place, and after 4 steps they have changed places. */
#define DEFINE_TRANSPOSE(NAME, TYPE)                                                                                   \
    static void NAME(const char *from, char *to) {                                                                     \
        typedef TYPE line __attribute__((vector_size(16 * sizeof(TYPE))));                                             \
        line a[16], b[16];                                                                                             \
        memcpy(a, from, sizeof a);                                                                                     \
        for (int step = 0; step < 4; step++) {                                                                         \
            for (int r = 0; r < 8; r++) {                                                                              \
                b[2 * r] = __builtin_shufflevector(                                                                    \
                    a[r], a[r + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);                           \
                b[2 * r + 1] = __builtin_shufflevector(                                                                \
                    a[r], a[r + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);                     \
            }                                                                                                          \
            memcpy(a, b, sizeof a);                                                                                    \
        }                                                                                                              \
        memcpy(to, a, sizeof a);                                                                                       \
    }

DEFINE_TRANSPOSE(transpose_bytes, uint8_t)
DEFINE_TRANSPOSE(transpose_halves, uint16_t)
DEFINE_TRANSPOSE(transpose_words, uint32_t)

/* Where K has number d of position p, and V number d of position p, in elements; `held`: dimensions of K as stored. */
static size_t k_element(size_t held, bool is_paired, size_t d, size_t p) {
    const size_t block = p / 16 * 16 * held, lane = p % 16;
    return block + (is_paired ? d / 2 * 32 + lane * 2 + d % 2 : d * 16 + lane);
}

static size_t v_element(bool is_paired, size_t d, size_t p) {
    const size_t panel = d / 16 * FB_PAGE_POSITIONS * 16, lane = d % 16;
    return panel + (is_paired ? p / 2 * 32 + lane * 2 + p % 2 : p * 16 + lane);
}

/* Moves the numbers from dimension `from` on one by one: pairs, and what fills no square. */
static void move_each(const struct fb_kv_layout *layer, bool is_paired, const char *slab, size_t first, size_t from,
    size_t v_dim, size_t n, char *out) {
    const size_t size = fb_element_bytes(layer->k.dtype), held = fb_k_dimensions(layer->k.dtype, (size_t)layer->k_dim);
    const size_t padded = (v_dim + 15) / 16 * 16, positions = is_paired ? (n + 1) / 2 * 2 : n;
    for (size_t p = 0; p < positions; p++)
        for (size_t d = from; d < padded; d++) {
            char *to = out + v_element(is_paired, d, p) * size;
            if (d < v_dim && p < n)
                memcpy(to, slab + k_element(held, is_paired, first + d, p) * size, size);
            else
                memset(to, 0, size);
        }
}

void fb_slab_values(const struct fb_kv_layout *layer, const char *slab, size_t v_dim, size_t n, char *out) {
    const size_t size = fb_element_bytes(layer->k.dtype), first = (size_t)layer->k_dim - v_dim;
    const bool is_paired = layer->k.dtype == FB_BF16;
    const size_t whole = is_paired ? 0 : v_dim / 16 * 16;
    void (*const transpose)(const char *, char *) = size == 4   ? transpose_words
                                                    : size == 2 ? transpose_halves
                                                                : transpose_bytes;
    for (size_t d = 0; d < whole; d += 16)
        for (size_t p = 0; p < n; p += 16)
            transpose(slab + k_element((size_t)layer->k_dim, false, first + d, p) * size,
                out + v_element(false, d, p) * size);
    if (whole < v_dim) move_each(layer, is_paired, slab, first, whole, v_dim, n, out);
    if (layer->k.dtype == FB_Q8_0)
        memcpy(out + (v_dim + 15) / 16 * 16 * FB_PAGE_POSITIONS, slab + layer->k.elements,
            FB_PAGE_POSITIONS * sizeof(float));
}
