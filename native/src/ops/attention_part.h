/*
 * attention_part.h - the work of one item of attention: partial results of a tile of queries over key blocks, and merging
 * them. attention.h says how they are cut and why; attention.c deals them out.
 */
#ifndef FABULA_OPS_ATTENTION_PART_H
#define FABULA_OPS_ATTENTION_PART_H

#include "ops/attention.h"

enum {
    FB_TILE_ROWS =
        48 /* queries in a tile, heads x tokens: with FB_KEY_BLOCK scores each 48 KiB, beside two pages in L2 */
};

/* Shape of a tile, the same in every layer of a program. */
struct fb_tile_layout {
    size_t head_dim, padded; /* padded to whole panels */
    size_t group;            /* query heads per KV head */
    size_t tile_tokens, tile_rows;
};

struct fb_tile_layout fb_tile_layout_of(int32_t n_heads, int32_t n_kv_heads, int32_t head_dim);

/* Partial results of some queries: m, l and o. */
struct fb_partial {
    float *max, *length, *values; /* [rows], [rows], [rows][padded] */
};

static inline size_t fb_partial_floats(const struct fb_tile_layout *l, size_t rows) {
    return rows * (l->padded + 2);
}

static inline struct fb_partial fb_partial_at(float *memory, size_t rows) {
    return (struct fb_partial){.max = memory, .length = memory + rows, .values = memory + 2 * rows};
}

/* What a thread works in. */
struct fb_tile_work {
    float *q;          /* [tile_rows][head_dim] */
    uint16_t *q_pairs; /* [tile_rows][head_dim, rounded up to whole panels]: for K in bf16 */
    float *scores;     /* [tile_rows][FB_KEY_BLOCK] */
    struct fb_partial sum, part;
};

struct fb_tile_work fb_tile_work_of(const struct fb_attention *a, const struct fb_tile_layout *l, int thread);

/* Which queries a tile holds, and which key blocks any of them sees. */
struct fb_tile {
    const struct fb_sequence *sequence;
    int32_t kv_head;
    int32_t first_token, n_tokens; /* within the sequence's share of the batch */
    int32_t first_row;             /* of its first token in the batch */
    int32_t first_block, end_block;
    bool sinks; /* some query sees the sinks outside its window */
};

struct fb_tile fb_tile_of(
    const struct fb_attention *a, const struct fb_tile_layout *l, int32_t sequence, int32_t kv_head, int32_t index);

/* How many partial results each query of a tile has; the sinks come first. */
static inline int32_t fb_tile_parts(const struct fb_tile *t) {
    return t->end_block - t->first_block + (t->sinks ? 1 : 0);
}

/* One of them, of every query of the tile. The last one finishes and writes K and V of raw heads. */
void fb_attend_part(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t,
    int32_t index, const struct fb_tile_work *w, struct fb_partial out);

/* Those of single queries of several sequences over a block that lies in the same pages for all and that each sees whole:
 * into w->part, member by member. */
void fb_attend_together(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *members,
    size_t n_members, int32_t block, const struct fb_tile_work *w);

/* sum = sum merged with part, row by row. A part in which a query saw nothing changes nothing. */
void fb_merge_partial(const struct fb_attention *a, const struct fb_tile_layout *l, size_t rows, struct fb_partial sum,
    struct fb_partial part);

/* out = o / l for every query of the tile. */
void fb_store_attended(
    const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t, struct fb_partial sum);

#endif
