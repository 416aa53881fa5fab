/*
 * attention.h - causal attention of a batch over paged K and V, as work items for the threads.
 *
 * Keys are divided into blocks of FB_KEY_BLOCK positions at fixed boundaries. For each block a query gets a
 * partial result: the largest score, the sum of exponentials, and the weighted sum of V. Partial results are
 * merged in block order:
 *
 *     m = max(m1, m2)   l = l1 e^(m1-m) + l2 e^(m2-m)   o = o1 e^(m1-m) + o2 e^(m2-m)
 *
 * (Milakov & Gimelshein 2018).
 *
 * The boundaries and the order of merging depend on positions only, never on threads or on the batch. So the
 * bits are the same whether one thread computes all blocks or each thread computes some and the last merges
 * them.
 *
 * A work item is a tile of queries: the heads of a group (those that share a KV head) times a few tokens. All
 * of them read the same pages, which are panels, so both products run on the matrix kernel.
 *
 * With a sliding window (struct fb_sequence) sinks are one more part, merged before the first block. Their
 * keys stay as they were written; instead the query is rotated from its position p to S + W - 1, where the
 * distance to sink j is S + W - 1 - j. So pages never change and can be shared by tokens at any position.
 */
#ifndef FABULA_OPS_ATTENTION_H
#define FABULA_OPS_ATTENTION_H

#include "kernels/kernels.h"
#include "kv/pages.h"
#include "ops/heads.h"
#include "ops/sharing.h"

#include <stdatomic.h>

/*
 * If every sequence of a step has one token, attention can take heads as the products wrote them. A work item
 * then norms and rotates its own queries, and the item of the last key block of a KV head writes the token's
 * K and V, which no other item reads. That is a few hundred nanoseconds of work and saves a stage and its
 * barrier. A norm over all heads together is computed by every item.
 */
struct fb_raw_heads {
    const struct fb_op *norm;       /* HEAD_NORM, or NULL */
    const struct fb_angles *angles; /* NULL: not rotated */
    bool writes;                    /* K and V; else `q` holds q heads only */
};

/* Which positions an operator's tokens see: causal, by an own window or by chunks, or all. */
struct fb_mask {
    int32_t window;  /* 0: none */
    bool is_chunked; /* `window` is the length of chunks */
    bool sees_all;
};

struct fb_attention {
    const struct fb_kernels *kernels;
    const struct fb_page_pool *pool;
    const struct fb_sequence *sequences;
    int32_t n_sequences;
    const int32_t *first_row; /* [n_sequences]: row of a sequence's first token in the batch */
    const struct fb_heads *heads;
    int32_t layer;
    struct fb_mask mask;
    float scale, soft_cap;          /* scores: scale q.k, then soft_cap tanh(score / soft_cap); 0: no cap */
    const float *sink_logits;       /* [n_heads] or NULL: one more score of each head, without a value */
    const float *slopes;            /* [n_heads] or NULL: of ALiBi, see struct fb_op */
    bool rounds_biases;             /* FB_ALIBI_BF16 */
    const struct fb_op *op;         /* for the temperature of queries; NULL: none */
    const struct fb_angles *angles; /* for sinks of sequences; NULL: positions are not encoded */
    const float *q;                 /* [n_tokens][ldq], heads concatenated; raw heads: followed by those of K and V */
    float *out;                     /* [n_tokens][ld_out] */
    size_t ldq, ld_out;
    char *scratch; /* n_threads x fb_attention_scratch_bytes */
    size_t scratch_bytes;
    float *partials; /* [n_partials] memory for partial results; see fb_attention_partials */
    size_t n_partials;
    atomic_int *parts_done;           /* [n_sequences][KV heads]: parts finished so far; 0 outside a run */
    const struct fb_raw_heads *raw;   /* NULL: heads are finished, K and V are in their pages */
    const struct fb_sharing *sharing; /* [n_sequences], or NULL if nothing is shared; see sharing.h */
    int64_t *offsets;                 /* [n_sequences + 1]: first work item of each sequence */
    int64_t *partial_offsets;         /* [n_sequences + 1]: where each one's partial results start, in floats */
    bool split;                       /* key blocks are work items; set by fb_attention_items if n_partials suffices */
};

/* The lowest position in the window or chunk of a token at `position`. */
static inline int32_t fb_lowest_visible(const struct fb_sequence *sequence, struct fb_mask mask, int32_t position) {
    int32_t low = 0;
    if (mask.window > 0 && mask.is_chunked)
        low = position / mask.window * mask.window;
    else if (mask.window > 0 && position >= mask.window)
        low = position - mask.window + 1;
    if (sequence->window > 0 && position - sequence->window >= sequence->n_sinks && position - sequence->window >= low)
        low = position - sequence->window + 1;
    return low;
}

/* The highest position that a token at `position` sees. */
static inline int32_t fb_highest_visible(const struct fb_sequence *sequence, struct fb_mask mask, int32_t position) {
    return mask.sees_all ? sequence->n_past + sequence->n_tokens - 1 : position;
}

/* Whether a token at `position` sees sinks outside its window. */
static inline bool fb_sees_sinks(const struct fb_sequence *sequence, struct fb_mask mask, int32_t position) {
    const int64_t reach = (int64_t)sequence->n_sinks + sequence->window;
    return sequence->n_sinks > 0 && position >= reach &&
           (mask.window == 0 || (!mask.is_chunked && mask.window >= reach));
}

/* Floats of partial results per step at most: 256 MiB. 16 sequences of 32,000 positions of an 8B model need
 * 34 million, one of 128,000 positions of a 70B model 4 million. Memory is allocated as needed. */
enum { FB_MOST_PARTIALS = 1 << 26 };

/* Bytes of scratch per thread. */
size_t fb_attention_scratch_bytes(const struct fb_heads *heads);

/* How many sequences may share a block. */
int32_t fb_attention_most_members(const struct fb_heads *heads);

/* Floats of partial results needed to make key blocks work items; 0 if tiles alone are as good. Does not
 * depend on `n_partials`. */
size_t fb_attention_partials(const struct fb_attention *attention, int n_threads);

/* Number of work items; decides whether to split, and fills `offsets` and `partial_offsets`. */
int64_t fb_attention_items(struct fb_attention *attention, int n_threads);
void fb_attention_item(const struct fb_attention *attention, int64_t index, int thread);

#endif
