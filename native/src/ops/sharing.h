/*
 * sharing.h - which sequences of a batch have key blocks in common.
 *
 * Sequences that draw behind one prompt have the same pages at their beginning. Attention over those is one item for
 * all of them: K and V are read, and widened, once. A query's result is the same bits, since rows of a product never
 * share a sum.
 */
#ifndef FABULA_OPS_SHARING_H
#define FABULA_OPS_SHARING_H

#include "fabula.h"

enum { FB_KEY_BLOCK = 256 }; /* positions attention takes at a time: 8 pages. One row of scores is 1 KiB */

/* Of a sequence: its first n_blocks key blocks lie in the same pages as those of sequence `leader`, which takes them for
 * both. A leader is its own, with 0 blocks. */
struct fb_sharing {
    int32_t leader, n_blocks;
};

/* Fills `out` [n_sequences]. Only sequences that append one token and see all before it take part, and at most
 * `most_members` share a leader, itself included. True if any share something. */
bool fb_find_sharing(
    const struct fb_sequence *sequences, int32_t n_sequences, int32_t most_members, struct fb_sharing *out);

#endif
