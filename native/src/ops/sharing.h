/*
 * sharing.h - which sequences of a batch share key blocks.
 *
 * Sequences with a common prefix have the same pages at their start. Attention over those is one work item
 * for all of them: K and V are read, and widened, once. A query's result has the same bits, since rows of a
 * product never share a sum.
 */
#ifndef FABULA_OPS_SHARING_H
#define FABULA_OPS_SHARING_H

#include "fabula.h"

enum { FB_KEY_BLOCK = 256 }; /* positions that attention takes at a time: 8 pages. One row of scores is 1 KiB */

/* Of a sequence: its first n_blocks key blocks are in the same pages as those of sequence `leader`, whose
 * work items compute them for both. A leader is its own leader, with 0 blocks. */
struct fb_sharing {
    int32_t leader, n_blocks;
};

/* Fills `out` [n_sequences]. Only sequences with one token in the step and without a window take part, and at
 * most `most_members` have the same leader, itself included. True if any blocks are shared. */
bool fb_find_sharing(
    const struct fb_sequence *sequences, int32_t n_sequences, int32_t most_members, struct fb_sharing *out);

#endif
