/*
 * test_attention_items.c - how attention is divided into work items for models of real sizes: whether threads
 * get enough of them, and whether a shared prefix is shared. Items are counted, nothing is computed.
 */
#include "check.h"
#include "ops/attention.h"

#include <stdlib.h>

enum { BLOCK_PAGES = FB_KEY_BLOCK / FB_PAGE_POSITIONS, MOST = 64 };

/* Query heads, KV heads and head_dim. */
struct shape {
    const char *name;
    int32_t n_heads, n_kv_heads, head_dim;
};

static const struct shape shapes[] = {
    {"135M", 9, 3, 64}, {"1B", 32, 8, 64}, {"8B", 32, 8, 128}, {"70B", 64, 8, 128}, {"multi-head 7B", 32, 32, 128}};

static struct fb_heads heads_of(const struct shape *s) {
    return (struct fb_heads){s->n_heads, s->n_kv_heads, s->head_dim, s->head_dim, -1, 0};
}

struct counted {
    int64_t n_items;
    bool split;
    size_t n_partials;
};

/* Work items of sequences that all have n_past positions, the first n_shared of them in the same pages;
 * `room`: whether partial results get the memory they need. */
static struct counted count(const struct shape *s, int32_t n_sequences, int32_t n_past, int32_t n_shared,
    int32_t window, int n_threads, bool room) {
    const int32_t n_pages = n_past / FB_PAGE_POSITIONS + 1;
    int32_t *pages = calloc((size_t)n_sequences * (size_t)n_pages, sizeof *pages), first_row[MOST];
    struct fb_sequence sequences[MOST];
    struct fb_sharing sharing[MOST];
    int64_t offsets[MOST + 1], partial_offsets[MOST + 1];
    const struct fb_heads heads = heads_of(s);
    for (int32_t i = 0; i < n_sequences; i++) {
        int32_t *own = pages + (size_t)i * (size_t)n_pages;
        for (int32_t p = 0; p < n_pages; p++)
            own[p] = p < n_shared / FB_PAGE_POSITIONS ? p : (i + 1) * n_pages + p;
        sequences[i] = (struct fb_sequence){.pages = own, .n_pages = n_pages, .n_past = n_past, .n_tokens = 1};
        first_row[i] = i;
    }
    struct fb_attention a = {.sequences = sequences,
        .n_sequences = n_sequences,
        .first_row = first_row,
        .heads = &heads,
        .mask = {.window = window},
        .offsets = offsets,
        .partial_offsets = partial_offsets};
    const int32_t most = fb_attention_most_members(&heads);
    if (fb_find_sharing(sequences, n_sequences, most, sharing)) a.sharing = sharing;
    struct counted found = {.n_partials = fb_attention_partials(&a, n_threads)};
    a.n_partials = room ? found.n_partials : 0;
    found.n_items = fb_attention_items(&a, n_threads);
    found.split = a.split;
    free(pages);
    return found;
}

int main(void) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct shape *s = &shapes[i];
        /* One long sequence: every thread of a large machine gets work, for any model size. */
        struct counted c = count(s, 1, 70000, 0, 0, 64, true);
        CHECK_AT(c.split && c.n_items == (int64_t)(70000 / FB_KEY_BLOCK + 1) * s->n_kv_heads, "%s: %lld items", s->name,
            (long long)c.n_items);
        CHECK_AT(count(s, 1, 1 << 20, 0, 0, 16, true).split, "%s: a million positions", s->name);

        /* Up to sixteen sequences with a common prompt: each of its blocks is one work item for all that fit
         * a tile. */
        const struct fb_heads heads = heads_of(s);
        const int32_t most = fb_attention_most_members(&heads);
        const int32_t n = most < 16 ? most : 16;
        c = count(s, n, 4000, 3840, 0, 2, true);
        const int64_t shared = 3840 / FB_KEY_BLOCK, own = 4000 / FB_KEY_BLOCK + 1 - shared;
        CHECK_AT(c.split, "%s: not shared", s->name);
        CHECK_AT(c.n_items == ((own + shared) + (n - 1) * own) * s->n_kv_heads, "%s: %lld items of %d sequences",
            s->name, (long long)c.n_items, n);

        /* Without memory for partial results nothing is split: slower, the same bits. */
        c = count(s, 1, 70000, 0, 0, 64, false);
        CHECK_AT(!c.split && c.n_items == s->n_kv_heads && c.n_partials > 0, "%s", s->name);

        /* One thread, or many independent sequences, need no splitting and no memory; a window leaves few
         * blocks. */
        CHECK_AT(count(s, 1, 70000, 0, 0, 1, true).n_partials == 0, "%s", s->name);
        CHECK_AT(count(s, MOST, 2000, 0, 0, 2, true).n_partials == 0, "%s", s->name);
        c = count(s, 1, 70000, 0, 1024, 64, true);
        CHECK_AT(c.split && c.n_items <= 6 * (int64_t)s->n_kv_heads, "%s: %lld items", s->name, (long long)c.n_items);
    }
    CHECK(count(&shapes[2], 16, 4000, 3840, 0, 2, true).split);       /* 8B: 1.1 million floats */
    CHECK(!count(&shapes[3], MOST, 100000, 99840, 0, 2, true).split); /* over the limit of a step */
    return check_result();
}
