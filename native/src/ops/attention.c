/* attention.c - divides a batch's attention into work items. See attention.h. */
#include "ops/attention_part.h"

#include <string.h>

static struct fb_tile_layout layout_for(const struct fb_attention *a) {
    return fb_tile_layout_of(a->n_heads, a->pool->n_kv_heads, a->pool->head_dim);
}

static int32_t tiles_in(const struct fb_tile_layout *l, const struct fb_sequence *sequence) {
    return (sequence->n_tokens + (int32_t)l->tile_tokens - 1) / (int32_t)l->tile_tokens;
}

/* Key blocks become work items if sequences share some of them, or if tiles alone leave threads idle and a
 * tile has several blocks. */
size_t fb_attention_partials(const struct fb_attention *a, int n_threads) {
    const struct fb_tile_layout l = layout_for(a);
    /* With a window, a block that one token sees whole may be only partly visible to another. */
    const bool shares = a->sharing && a->window == 0;
    int64_t tiles = 0, parts = 0;
    size_t floats = 0;
    for (int32_t s = 0; s < a->n_sequences; s++) {
        tiles += (int64_t)tiles_in(&l, &a->sequences[s]) * a->pool->n_kv_heads;
        if (tiles > (int64_t)4 * n_threads && !shares) return 0;
        if (tiles_in(&l, &a->sequences[s]) > 1) return 0;
        struct fb_tile t = fb_tile_of(a, &l, s, 0, 0);
        const int64_t count = (int64_t)fb_tile_parts(&t) * a->pool->n_kv_heads;
        parts += count;
        floats += (size_t)count * fb_partial_floats(&l, (size_t)t.n_tokens * l.group);
        if (floats > FB_MOST_PARTIALS) return 0;
    }
    return shares || (n_threads > 1 && parts > tiles) ? floats : 0;
}

int32_t fb_attention_most_members(int32_t n_heads, int32_t n_kv_heads) {
    return (int32_t)fb_tile_layout_of(n_heads, n_kv_heads, 1).tile_tokens;
}

int64_t fb_attention_items(struct fb_attention *a, int n_threads) {
    const struct fb_tile_layout l = layout_for(a);
    const size_t n_partials = fb_attention_partials(a, n_threads);
    if (a->window > 0) a->sharing = NULL;
    a->split = n_partials > 0 && n_partials <= a->n_partials;
    a->offsets[0] = a->partial_offsets[0] = 0;
    for (int32_t s = 0; s < a->n_sequences; s++) {
        int64_t count = tiles_in(&l, &a->sequences[s]), floats = 0;
        if (a->split) {
            const struct fb_tile t = fb_tile_of(a, &l, s, 0, 0);
            count = fb_tile_parts(&t);
            floats = count * a->pool->n_kv_heads * (int64_t)fb_partial_floats(&l, (size_t)t.n_tokens * l.group);
            if (a->sharing) count -= a->sharing[s].n_blocks;
        }
        a->offsets[s + 1] = a->offsets[s] + count * a->pool->n_kv_heads;
        a->partial_offsets[s + 1] = a->partial_offsets[s] + floats;
    }
    return a->offsets[a->n_sequences];
}

/* The sequence that work item `index` belongs to. */
static int32_t sequence_of(const struct fb_attention *a, int64_t index) {
    int32_t low = 0, high = a->n_sequences - 1;
    while (low < high) {
        int32_t middle = (low + high + 1) / 2;
        if (a->offsets[middle] <= index)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* Memory of the partial result (sequence, KV head, index). All parts of a sequence have the same size. */
static struct fb_partial part_at(
    const struct fb_attention *a, const struct fb_tile_layout *l, int32_t sequence, int32_t kv_head, int32_t index) {
    const size_t rows = (size_t)a->sequences[sequence].n_tokens * l->group;
    const size_t floats = (size_t)(a->partial_offsets[sequence + 1] - a->partial_offsets[sequence]);
    const size_t parts = floats / (fb_partial_floats(l, rows) * (size_t)a->pool->n_kv_heads);
    const size_t before = ((size_t)kv_head * parts + (size_t)index) * fb_partial_floats(l, rows);
    return fb_partial_at(a->partials + (size_t)a->partial_offsets[sequence] + before, rows);
}

/* Marks a part of (sequence, KV head) as done. The thread that finishes the last one sees the results of all
 * others and merges them. */
static void finish_part(
    const struct fb_attention *a, const struct fb_tile_layout *l, int32_t sequence, int32_t kv_head) {
    const struct fb_tile t = fb_tile_of(a, l, sequence, kv_head, 0);
    const int32_t n_parts = fb_tile_parts(&t);
    atomic_int *left = &a->parts_done[(size_t)sequence * (size_t)a->pool->n_kv_heads + (size_t)kv_head];
    if (atomic_fetch_add_explicit(left, 1, memory_order_acq_rel) + 1 < n_parts) return;
    atomic_store_explicit(left, 0, memory_order_relaxed);
    const struct fb_partial sum = part_at(a, l, sequence, kv_head, 0);
    for (int32_t part = 1; part < n_parts; part++)
        fb_merge_partial(a, l, (size_t)t.n_tokens * l->group, sum, part_at(a, l, sequence, kv_head, part));
    fb_store_attended(a, l, &t, sum);
}

/* Computes block `block` for the queries of a leader and of the sequences that share it, and stores each
 * query's partial result where its own item would have. */
static void attend_shared(const struct fb_attention *a, const struct fb_tile_layout *l, int32_t leader, int32_t kv_head,
    int32_t block, const struct fb_tile_work *w) {
    int32_t members[FB_TILE_ROWS];
    struct fb_tile tiles[FB_TILE_ROWS];
    size_t n_members = 0;
    for (int32_t s = leader; s < a->n_sequences; s++)
        if (s == leader || (a->sharing[s].leader == leader && a->sharing[s].n_blocks > block)) {
            tiles[n_members] = fb_tile_of(a, l, s, kv_head, 0);
            members[n_members++] = s;
        }
    fb_attend_together(a, l, tiles, n_members, block, w);
    for (size_t m = 0; m < n_members; m++) {
        const struct fb_partial to = part_at(a, l, members[m], kv_head, block);
        memcpy(to.max, w->part.max + m * l->group, l->group * sizeof *to.max);
        memcpy(to.length, w->part.length + m * l->group, l->group * sizeof *to.length);
        memcpy(to.values, w->part.values + m * l->group * l->padded, l->group * l->padded * sizeof *to.values);
        finish_part(a, l, members[m], kv_head);
    }
}

/* Whether other sequences share this block of `sequence`, which leads them. */
static bool leads(const struct fb_attention *a, int32_t sequence, int32_t block) {
    if (!a->sharing || a->sharing[sequence].leader != sequence) return false;
    for (int32_t s = sequence + 1; s < a->n_sequences; s++)
        if (a->sharing[s].leader == sequence && a->sharing[s].n_blocks > block) return true;
    return false;
}

void fb_attention_item(const struct fb_attention *a, int64_t index, int thread) {
    const struct fb_tile_layout l = layout_for(a);
    const struct fb_tile_work w = fb_tile_work_of(a, &l, thread);
    const int32_t sequence = sequence_of(a, index), n_kv_heads = a->pool->n_kv_heads;
    const int32_t within = (int32_t)(index - a->offsets[sequence]);
    if (a->split) {
        const int32_t parts = (int32_t)(a->offsets[sequence + 1] - a->offsets[sequence]) / n_kv_heads;
        const int32_t kv_head = within / parts;
        const int32_t part = within % parts + (a->sharing ? a->sharing[sequence].n_blocks : 0);
        if (leads(a, sequence, part)) {
            attend_shared(a, &l, sequence, kv_head, part, &w);
            return;
        }
        const struct fb_tile t = fb_tile_of(a, &l, sequence, kv_head, 0);
        fb_attend_part(a, &l, &t, part, &w, part_at(a, &l, sequence, kv_head, part));
        finish_part(a, &l, sequence, kv_head);
        return;
    }
    /* Long tiles (late positions) first, so that no thread is left with one at the end. */
    const int32_t tiles = tiles_in(&l, &a->sequences[sequence]);
    const struct fb_tile t = fb_tile_of(a, &l, sequence, within % n_kv_heads, tiles - 1 - within / n_kv_heads);
    fb_attend_part(a, &l, &t, 0, &w, w.sum);
    for (int32_t part = 1; part < fb_tile_parts(&t); part++) {
        fb_attend_part(a, &l, &t, part, &w, w.part);
        fb_merge_partial(a, &l, (size_t)t.n_tokens * l.group, w.sum, w.part);
    }
    fb_store_attended(a, &l, &t, w.sum);
}
