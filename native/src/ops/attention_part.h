/*
 * attention_part.h - one work item of attention: partial results of a tile of queries over key blocks, and
 * merging them. attention.h describes the tiles; attention.c assigns them to work items.
 */
#ifndef FABULA_OPS_ATTENTION_PART_H
#define FABULA_OPS_ATTENTION_PART_H

#include "ops/attention.h"

enum {
    FB_TILE_ROWS =
        48 /* queries per tile, heads x tokens: with FB_KEY_BLOCK scores each 48 KiB, next to two pages in L2 */
};

/* Shape of a tile, by the geometry of its heads. */
struct fb_tile_layout {
    size_t k_dim, v_dim, k_padded, v_padded; /* padded: rounded up to whole panels */
    size_t group;                            /* query heads per KV head */
    size_t tile_tokens, tile_rows;
};

struct fb_tile_layout fb_tile_layout_of(const struct fb_heads *heads);

/* Partial results of some queries: m, l and o of attention.h. */
struct fb_partial {
    float *max, *length, *values; /* [rows], [rows], [rows][v_padded] */
};

static inline size_t fb_partial_floats(const struct fb_tile_layout *l, size_t rows) {
    return rows * (l->v_padded + 2);
}

static inline struct fb_partial fb_partial_at(float *memory, size_t rows) {
    return (struct fb_partial){.max = memory, .length = memory + rows, .values = memory + 2 * rows};
}

/* A thread's scratch. */
struct fb_tile_work {
    float *q;          /* [tile_rows][k_dim] */
    uint16_t *q_pairs; /* [tile_rows][k_padded]: for K in bf16 */
    float *row;        /* [n_heads k_dim]: all q or k heads of a token, for a norm over them together */
    float *scores;     /* [tile_rows][FB_KEY_BLOCK] */
    struct fb_partial sum, part;
    char *values; /* fb_values_bytes: V of a page, where it is a part of K */
};

struct fb_tile_work fb_tile_work_of(const struct fb_attention *a, const struct fb_tile_layout *l, int thread);

/* The queries of a tile, and the key blocks that any of them sees. */
struct fb_tile {
    const struct fb_sequence *sequence;
    int32_t kv_head;
    int32_t first_token, n_tokens; /* within the sequence's share of the batch */
    int32_t first_row;             /* row of its first token in the batch */
    int32_t first_block, end_block;
    bool sinks; /* some query sees sinks outside its window */
};

struct fb_tile fb_tile_of(
    const struct fb_attention *a, const struct fb_tile_layout *l, int32_t sequence, int32_t kv_head, int32_t index);

/* Number of partial results per query of a tile; the sinks come first. */
static inline int32_t fb_tile_parts(const struct fb_tile *t) {
    return t->end_block - t->first_block + (t->sinks ? 1 : 0);
}

/* Computes part `index` for every query of the tile. With raw heads the last part first finishes and writes K
 * and V. */
void fb_attend_part(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t,
    int32_t index, const struct fb_tile_work *w, struct fb_partial out);

/* Computes, into w->part member by member, single queries of several sequences over a block that is in the
 * same pages for all and fully visible to each. */
void fb_attend_together(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *members,
    size_t n_members, int32_t block, const struct fb_tile_work *w);

/* sum = sum merged with part, row by row. A part with length 0 changes nothing. */
void fb_merge_partial(const struct fb_attention *a, const struct fb_tile_layout *l, size_t rows, struct fb_partial sum,
    struct fb_partial part);

/* out = o / l for every query of the tile. */
void fb_store_attended(
    const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t, struct fb_partial sum);

#endif
