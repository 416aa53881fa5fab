/* attention.c - causal attention over pages. See attention.h. */
#include "ops/attention.h"

#include <math.h>
#include <string.h>

enum {
    TILE_ROWS = 48 /* queries in a tile, heads x tokens: with FB_KEY_BLOCK scores each 48 KiB, beside two pages in L2 */
};

/* Shape of a tile, the same in every layer of a program. */
struct layout {
    size_t head_dim, padded; /* padded to whole panels */
    size_t group;            /* query heads per KV head */
    size_t tile_tokens, tile_rows;
};

static struct layout layout_of(int32_t n_heads, int32_t n_kv_heads, int32_t head_dim) {
    struct layout l = {.head_dim = (size_t)head_dim, .padded = (size_t)(head_dim + 15) / 16 * 16};
    l.group = (size_t)(n_heads / n_kv_heads);
    l.tile_tokens = l.group >= TILE_ROWS ? 1 : TILE_ROWS / l.group;
    l.tile_rows = l.tile_tokens * l.group;
    return l;
}

/* What a thread works in. `sum` and `part` hold m and l per row and o per row and dimension. */
struct partial {
    float *max, *length, *values; /* [rows], [rows], [rows][padded] */
};

struct workspace {
    float *q;          /* [tile_rows][head_dim] */
    uint16_t *q_pairs; /* [tile_rows][head_dim, rounded up to whole panels]: for K in bf16 */
    float *scores;     /* [tile_rows][FB_KEY_BLOCK] */
    struct partial sum, part;
};

static size_t partial_floats(const struct layout *l, size_t rows) {
    return rows * (l->padded + 2);
}

static struct partial partial_at(const struct layout *l, float *memory, size_t rows) {
    (void)l;
    return (struct partial){.max = memory, .length = memory + rows, .values = memory + 2 * rows};
}

size_t fb_attention_scratch_bytes(int32_t n_heads, int32_t n_kv_heads, int32_t head_dim) {
    struct layout l = layout_of(n_heads, n_kv_heads, head_dim);
    size_t floats = l.tile_rows * (l.head_dim + l.padded / 2 + FB_KEY_BLOCK) + 2 * partial_floats(&l, l.tile_rows);
    return (floats * sizeof(float) + 63) / 64 * 64;
}

static struct workspace workspace_of(const struct fb_attention *a, const struct layout *l, int thread) {
    float *memory = (float *)(void *)(a->scratch + (size_t)thread * a->scratch_bytes);
    struct workspace w = {.q = memory, .q_pairs = (uint16_t *)(void *)(memory + l->tile_rows * l->head_dim)};
    w.scores = memory + l->tile_rows * (l->head_dim + l->padded / 2);
    float *rest = w.scores + l->tile_rows * FB_KEY_BLOCK;
    w.sum = partial_at(l, rest, l->tile_rows);
    w.part = partial_at(l, rest + partial_floats(l, l->tile_rows), l->tile_rows);
    return w;
}

static struct layout layout_for(const struct fb_attention *a) {
    return layout_of(a->n_heads, a->pool->n_kv_heads, a->pool->head_dim);
}

/* A tile: which queries, and which key blocks any of them sees. */
struct tile {
    const struct fb_sequence *sequence;
    int32_t kv_head;
    int32_t first_token, n_tokens; /* within the sequence's share of the batch */
    int32_t first_row;             /* of its first token in the batch */
    int32_t first_block, end_block;
    bool sinks; /* some query sees the sinks outside its window */
};

static struct tile tile_of(
    const struct fb_attention *a, const struct layout *l, int32_t sequence, int32_t kv_head, int32_t index) {
    struct tile t = {.sequence = &a->sequences[sequence], .kv_head = kv_head};
    t.first_token = index * (int32_t)l->tile_tokens;
    int32_t rest = t.sequence->n_tokens - t.first_token;
    t.n_tokens = rest < (int32_t)l->tile_tokens ? rest : (int32_t)l->tile_tokens;
    t.first_row = a->first_row[sequence] + t.first_token;
    int32_t first_position = t.sequence->n_past + t.first_token;
    const int32_t last_position = first_position + t.n_tokens - 1;
    t.first_block = fb_lowest_visible(t.sequence, a->window, first_position) / FB_KEY_BLOCK;
    t.end_block = last_position / FB_KEY_BLOCK + 1;
    t.sinks = fb_sees_sinks(t.sequence, a->window, last_position);
    return t;
}

/* K in bf16 takes queries rounded to it. */
static void round_queries(
    const struct fb_attention *a, const struct layout *l, const struct workspace *w, size_t first_row, size_t rows) {
    if (a->pool->k.dtype != FB_BF16) return;
    for (size_t r = first_row; r < first_row + rows; r++)
        a->kernels->round_pairs(w->q + r * l->head_dim, l->head_dim, w->q_pairs + r * l->padded);
}

/* Gathers the tile's queries, from a row on, so that they lie head_dim apart: row = token x group + head of the group. */
static void gather_queries(const struct fb_attention *a, const struct layout *l, const struct tile *t,
    const struct workspace *w, size_t first_row) {
    for (int32_t i = 0; i < t->n_tokens; i++)
        memcpy(w->q + (first_row + (size_t)i * l->group) * l->head_dim,
            a->q + (size_t)(t->first_row + i) * a->ldq + (size_t)t->kv_head * l->group * l->head_dim,
            l->group * l->head_dim * sizeof *w->q);
    round_queries(a, l, w, first_row, (size_t)t->n_tokens * l->group);
}

/* Softmax without its division over columns from .. to-1 of a row's scores; columns first .. end-1 around them become
 * 0. A row that sees nothing gets length 0. */
static void weigh_scores(const struct fb_attention *a, float *scores, int32_t first, int32_t end, int32_t from,
    int32_t to, const struct partial *out, size_t row) {
    if (from >= to) {
        memset(scores + first, 0, (size_t)(end - first) * sizeof *scores);
        out->max[row] = -INFINITY;
        out->length[row] = 0.0f;
        return;
    }
    const size_t n = (size_t)(to - from);
    out->max[row] = a->kernels->max(scores + from, n) * a->scale;
    out->length[row] = a->kernels->exp_sum(scores + from, n, a->scale, out->max[row], scores + from);
    memset(scores + first, 0, (size_t)(from - first) * sizeof *scores);
    memset(scores + to, 0, (size_t)(end - to) * sizeof *scores);
}

/* Scores [rows][FB_KEY_BLOCK] of the first `panels` blocks of 16 keys of a slab. */
static void score_keys(const struct fb_attention *a, const struct layout *l, char *slab, size_t panels,
    const struct workspace *w, size_t rows, float *scores) {
    const struct fb_kv_part *k = &a->pool->k;
    if (k->dtype == FB_BF16) {
        a->kernels->gemm_pairs((const uint16_t *)(const void *)slab, fb_k_dimensions(FB_BF16, l->head_dim) * 16, panels,
            l->head_dim, w->q_pairs, l->padded, rows, scores, FB_KEY_BLOCK, false);
        return;
    }
    fb_part_gemm(k, a->kernels)(
        slab, l->head_dim * 16, panels, l->head_dim, w->q, l->head_dim, rows, scores, FB_KEY_BLOCK, false);
    const float *scales = fb_part_scales(k, slab);
    for (size_t r = 0; scales && r < rows; r++)
        a->kernels->multiply(scores + r * FB_KEY_BLOCK, scales, panels * 16);
}

/* values [rows][padded] = (accumulate ? values : 0) + weights times V of the first n positions of a slab. The weights are
 * used up. */
static void sum_values(const struct fb_attention *a, const struct layout *l, char *slab, size_t n, float *weights,
    size_t rows, float *values, bool accumulate) {
    const struct fb_kv_part *v = &a->pool->v;
    char *at = fb_slab_v(a->pool, slab);
    if (v->dtype == FB_BF16) {
        uint16_t rounded[TILE_ROWS * FB_PAGE_POSITIONS];
        for (size_t first = 0; first < rows; first += TILE_ROWS) {
            const size_t count = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
            for (size_t r = 0; r < count; r++)
                a->kernels->round_pairs(weights + (first + r) * FB_KEY_BLOCK, n, rounded + r * FB_PAGE_POSITIONS);
            a->kernels->gemm_pairs((const uint16_t *)(const void *)at, (size_t)FB_PAGE_POSITIONS * 16, l->padded / 16,
                n, rounded, FB_PAGE_POSITIONS, count, values + first * l->padded, l->padded, accumulate);
        }
        return;
    }
    const float *scales = fb_part_scales(v, at);
    for (size_t r = 0; scales && r < rows; r++)
        a->kernels->multiply(weights + r * FB_KEY_BLOCK, scales, n);
    fb_part_gemm(v, a->kernels)(at, (size_t)FB_PAGE_POSITIONS * 16, l->padded / 16, n, weights, FB_KEY_BLOCK, rows,
        values, l->padded, accumulate);
}

/* The partial result of every query of the tile over the sinks outside its window. Turns the queries in `w`. */
static void attend_sinks(const struct fb_attention *a, const struct layout *l, const struct tile *t,
    const struct workspace *w, struct partial out) {
    const size_t rows = (size_t)t->n_tokens * l->group, half = (size_t)a->rotary_dim / 2;
    const int32_t n_sinks = t->sequence->n_sinks;
    const int32_t first_position = t->sequence->n_past + t->first_token;
    for (size_t r = 0; r < rows; r++) {
        const int32_t token = (int32_t)(r / l->group);
        if (!fb_sees_sinks(t->sequence, a->window, first_position + token)) continue;
        const float *cosines = a->sink_turns + (size_t)(t->first_row + token) * 2 * half;
        float *q = w->q + r * l->head_dim;
        a->kernels->rotate(q, q + half, cosines, cosines + half, half);
    }
    round_queries(a, l, w, 0, rows);
    char *slab = fb_slab(a->pool, t->sequence->pages[0], a->layer, t->kv_head);
    const size_t panels = (size_t)(n_sinks - 1) / 16 + 1;
    score_keys(a, l, slab, panels, w, rows, w->scores);
    for (size_t r = 0; r < rows; r++) {
        const bool sees = fb_sees_sinks(t->sequence, a->window, first_position + (int32_t)(r / l->group));
        weigh_scores(a, w->scores + r * FB_KEY_BLOCK, 0, n_sinks, 0, sees ? n_sinks : 0, &out, r);
    }
    sum_values(a, l, slab, (size_t)n_sinks, w->scores, rows, out.values, false);
}

/* The partial result of every query of the tile over one key block. */
static void attend_block(const struct fb_attention *a, const struct layout *l, const struct tile *t, int32_t block,
    const struct workspace *w, struct partial out) {
    const size_t rows = (size_t)t->n_tokens * l->group;
    const int32_t start = block * FB_KEY_BLOCK;
    const int32_t first_position = t->sequence->n_past + t->first_token;
    const int32_t last_position = first_position + t->n_tokens - 1;
    /* Pages of the block that hold a key somebody of the tile sees. */
    const int32_t visible = fb_lowest_visible(t->sequence, a->window, first_position);
    const int32_t low = visible > start ? visible : start;
    const int32_t high = last_position < start + FB_KEY_BLOCK - 1 ? last_position : start + FB_KEY_BLOCK - 1;
    const int32_t first_page = low / FB_PAGE_POSITIONS, last_page = high / FB_PAGE_POSITIONS;

    for (int32_t page = first_page; page <= last_page; page++) {
        char *slab = fb_slab(a->pool, t->sequence->pages[page], a->layer, t->kv_head);
        const size_t panels = (size_t)(high - page * FB_PAGE_POSITIONS) / 16 + 1;
        score_keys(a, l, slab, panels < 2 ? panels : 2, w, rows, w->scores + (page * FB_PAGE_POSITIONS - start));
    }

    /* Softmax without its division, over what each query sees; the rest of its row becomes 0. */
    const int32_t first_column = first_page * FB_PAGE_POSITIONS - start, end_column = high - start + 1;
    for (size_t r = 0; r < rows; r++) {
        float *scores = w->scores + r * FB_KEY_BLOCK;
        const int32_t position = first_position + (int32_t)(r / l->group);
        int32_t from = fb_lowest_visible(t->sequence, a->window, position) - start, to = position - start + 1;
        if (from < first_column) from = first_column;
        if (to > end_column) to = end_column;
        weigh_scores(a, scores, first_column, end_column, from, to, &out, r);
    }

    for (int32_t page = first_page; page <= last_page; page++) {
        char *slab = fb_slab(a->pool, t->sequence->pages[page], a->layer, t->kv_head);
        const int32_t positions = high - page * FB_PAGE_POSITIONS + 1; /* written ones; behind them may lie anything */
        sum_values(a, l, slab, (size_t)(positions < FB_PAGE_POSITIONS ? positions : FB_PAGE_POSITIONS),
            w->scores + (page * FB_PAGE_POSITIONS - start), rows, out.values, page > first_page);
    }
}

/* Number of partial results of each query of the tile, and one of them: the sinks come first. */
static int32_t parts_of(const struct tile *t) {
    return t->end_block - t->first_block + (t->sinks ? 1 : 0);
}

static void attend_part(const struct fb_attention *a, const struct layout *l, const struct tile *t, int32_t index,
    const struct workspace *w, struct partial out) {
    if (t->sinks && index == 0) {
        gather_queries(a, l, t, w, 0);
        attend_sinks(a, l, t, w, out);
        return;
    }
    if (index == (t->sinks ? 1 : 0) || a->split) gather_queries(a, l, t, w, 0);
    attend_block(a, l, t, t->first_block + index - (t->sinks ? 1 : 0), w, out);
}

/* sum = sum merged with part, row by row. A part in which a query saw nothing changes nothing. */
static void merge_partial(
    const struct fb_attention *a, const struct layout *l, size_t rows, struct partial sum, struct partial part) {
    for (size_t r = 0; r < rows; r++) {
        if (part.length[r] == 0.0f) continue;
        float *values = sum.values + r * l->padded;
        const float *more = part.values + r * l->padded;
        if (sum.length[r] == 0.0f) {
            memcpy(values, more, l->padded * sizeof *values);
            sum.length[r] = part.length[r];
            sum.max[r] = part.max[r];
            continue;
        }
        const float top = sum.max[r] > part.max[r] ? sum.max[r] : part.max[r];
        const float distance[2] = {sum.max[r] - top, part.max[r] - top};
        float factors[2];
        a->kernels->exp_sum(distance, 2, 1.0f, 0.0f, factors);
        a->kernels->merge(values, factors[0], more, factors[1], l->padded);
        sum.length[r] = fmaf(part.length[r], factors[1], sum.length[r] * factors[0]);
        sum.max[r] = top;
    }
}

/* out = o / l for every query of the tile. */
static void store_result(
    const struct fb_attention *a, const struct layout *l, const struct tile *t, struct partial sum) {
    for (int32_t i = 0; i < t->n_tokens; i++)
        for (size_t g = 0; g < l->group; g++) {
            size_t r = (size_t)i * l->group + g;
            float *values = sum.values + r * l->padded;
            a->kernels->scale(values, l->head_dim, 1.0f / sum.length[r]);
            memcpy(a->out + (size_t)(t->first_row + i) * a->ld_out + ((size_t)t->kv_head * l->group + g) * l->head_dim,
                values, l->head_dim * sizeof *values);
        }
}

static int32_t tiles_in(const struct layout *l, const struct fb_sequence *sequence) {
    return (sequence->n_tokens + (int32_t)l->tile_tokens - 1) / (int32_t)l->tile_tokens;
}

/* Whether key blocks become items: when some of them are shared, or tiles alone leave threads idle and some tile has
 * several blocks; and if the parts fit. */
static bool should_split(const struct fb_attention *a, const struct layout *l, int n_threads) {
    int64_t tiles = 0, parts = 0;
    size_t floats = 0;
    for (int32_t s = 0; s < a->n_sequences; s++) {
        tiles += (int64_t)tiles_in(l, &a->sequences[s]) * a->pool->n_kv_heads;
        if (tiles > (int64_t)4 * n_threads && !a->sharing) return false;
        if (tiles_in(l, &a->sequences[s]) > 1) return false;
        struct tile t = tile_of(a, l, s, 0, 0);
        const int64_t count = (int64_t)parts_of(&t) * a->pool->n_kv_heads;
        parts += count;
        floats += (size_t)count * partial_floats(l, (size_t)t.n_tokens * l->group);
        if (floats > FB_PARTIAL_FLOATS) return false;
    }
    return a->sharing || (n_threads > 1 && parts > tiles);
}

int32_t fb_attention_most_members(int32_t n_heads, int32_t n_kv_heads) {
    return (int32_t)layout_of(n_heads, n_kv_heads, 1).tile_tokens;
}

int64_t fb_attention_items(struct fb_attention *a, int n_threads) {
    const struct layout l = layout_for(a);
    if (a->window > 0) a->sharing = NULL; /* blocks that one token sees whole another may not */
    a->split = should_split(a, &l, n_threads);
    a->offsets[0] = a->places[0] = 0;
    for (int32_t s = 0; s < a->n_sequences; s++) {
        int64_t count = tiles_in(&l, &a->sequences[s]), floats = 0;
        if (a->split) {
            const struct tile t = tile_of(a, &l, s, 0, 0);
            count = parts_of(&t);
            floats = count * a->pool->n_kv_heads * (int64_t)partial_floats(&l, (size_t)t.n_tokens * l.group);
            if (a->sharing) count -= a->sharing[s].n_blocks;
        }
        a->offsets[s + 1] = a->offsets[s] + count * a->pool->n_kv_heads;
        a->places[s + 1] = a->places[s] + floats;
    }
    return a->offsets[a->n_sequences];
}

/* The sequence whose items hold `index`. */
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

/* Where the part (sequence, KV head, index) lies: parts of one sequence have one size. */
static struct partial part_at(
    const struct fb_attention *a, const struct layout *l, int32_t sequence, int32_t kv_head, int32_t index) {
    const size_t rows = (size_t)a->sequences[sequence].n_tokens * l->group;
    const size_t floats = (size_t)(a->places[sequence + 1] - a->places[sequence]);
    const size_t parts = floats / (partial_floats(l, rows) * (size_t)a->pool->n_kv_heads);
    const size_t before = ((size_t)kv_head * parts + (size_t)index) * partial_floats(l, rows);
    return partial_at(l, a->partials + (size_t)a->places[sequence] + before, rows);
}

/* The partial results of the queries of a leader and those who share block `block` with it, all of which see it whole.
 * Goes where each would have put its own. */
static void attend_shared(const struct fb_attention *a, const struct layout *l, int32_t leader, int32_t kv_head,
    int32_t block, const struct workspace *w) {
    int32_t members[TILE_ROWS];
    size_t n_members = 0;
    for (int32_t s = leader; s < a->n_sequences; s++)
        if (s == leader || (a->sharing[s].leader == leader && a->sharing[s].n_blocks > block)) members[n_members++] = s;
    const size_t rows = n_members * l->group;
    for (size_t m = 0; m < n_members; m++) {
        const struct tile t = tile_of(a, l, members[m], kv_head, 0);
        gather_queries(a, l, &t, w, m * l->group);
    }
    const int32_t *pages = a->sequences[leader].pages + block * (FB_KEY_BLOCK / FB_PAGE_POSITIONS);
    for (int32_t i = 0; i < FB_KEY_BLOCK / FB_PAGE_POSITIONS; i++)
        score_keys(a, l, fb_slab(a->pool, pages[i], a->layer, kv_head), 2, w, rows, w->scores + i * FB_PAGE_POSITIONS);
    for (size_t r = 0; r < rows; r++)
        weigh_scores(a, w->scores + r * FB_KEY_BLOCK, 0, FB_KEY_BLOCK, 0, FB_KEY_BLOCK, &w->part, r);
    for (int32_t i = 0; i < FB_KEY_BLOCK / FB_PAGE_POSITIONS; i++)
        sum_values(a, l, fb_slab(a->pool, pages[i], a->layer, kv_head), FB_PAGE_POSITIONS,
            w->scores + i * FB_PAGE_POSITIONS, rows, w->part.values, i > 0);
    for (size_t m = 0; m < n_members; m++) {
        const struct partial to = part_at(a, l, members[m], kv_head, block);
        memcpy(to.max, w->part.max + m * l->group, l->group * sizeof *to.max);
        memcpy(to.length, w->part.length + m * l->group, l->group * sizeof *to.length);
        memcpy(to.values, w->part.values + m * l->group * l->padded, l->group * l->padded * sizeof *to.values);
    }
}

/* Whether others share this block of a sequence with it. */
static bool leads(const struct fb_attention *a, int32_t sequence, int32_t block) {
    if (!a->sharing || a->sharing[sequence].leader != sequence) return false;
    for (int32_t s = sequence + 1; s < a->n_sequences; s++)
        if (a->sharing[s].leader == sequence && a->sharing[s].n_blocks > block) return true;
    return false;
}

void fb_attention_item(const struct fb_attention *a, int64_t index, int thread) {
    const struct layout l = layout_for(a);
    const struct workspace w = workspace_of(a, &l, thread);
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
        const struct tile t = tile_of(a, &l, sequence, kv_head, 0);
        attend_part(a, &l, &t, part, &w, part_at(a, &l, sequence, kv_head, part));
        return;
    }
    /* Long tiles (late positions) first, so that no thread is left with one at the end. */
    const int32_t tiles = tiles_in(&l, &a->sequences[sequence]);
    const struct tile t = tile_of(a, &l, sequence, within % n_kv_heads, tiles - 1 - within / n_kv_heads);
    attend_part(a, &l, &t, 0, &w, w.sum);
    for (int32_t part = 1; part < parts_of(&t); part++) {
        attend_part(a, &l, &t, part, &w, w.part);
        merge_partial(a, &l, (size_t)t.n_tokens * l.group, w.sum, w.part);
    }
    store_result(a, &l, &t, w.sum);
}

int64_t fb_attention_merge_items(const struct fb_attention *a) {
    return a->split ? (int64_t)a->n_sequences * a->pool->n_kv_heads : 0;
}

void fb_attention_merge_item(const struct fb_attention *a, int64_t index) {
    const struct layout l = layout_for(a);
    const int32_t sequence = (int32_t)(index / a->pool->n_kv_heads);
    const int32_t kv_head = (int32_t)(index % a->pool->n_kv_heads);
    const struct tile t = tile_of(a, &l, sequence, kv_head, 0);
    struct partial sum = part_at(a, &l, sequence, kv_head, 0);
    for (int32_t part = 1; part < parts_of(&t); part++)
        merge_partial(a, &l, (size_t)t.n_tokens * l.group, sum, part_at(a, &l, sequence, kv_head, part));
    store_result(a, &l, &t, sum);
}
