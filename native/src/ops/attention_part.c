/* attention_part.c - partial results of attention, and merging them. See attention_part.h. */
#include "ops/attention_part.h"

#include "quant/convert.h"

#include <math.h>
#include <string.h>

struct fb_tile_layout fb_tile_layout_of(const struct fb_heads *heads) {
    struct fb_tile_layout l = {.k_dim = (size_t)heads->k_dim,
        .v_dim = (size_t)heads->v_dim,
        .k_padded = (size_t)(heads->k_dim + 15) / 16 * 16,
        .v_padded = (size_t)(heads->v_dim + 15) / 16 * 16};
    l.group = (size_t)(heads->n_heads / heads->n_kv_heads);
    l.tile_tokens = l.group >= FB_TILE_ROWS ? 1 : FB_TILE_ROWS / l.group;
    l.tile_rows = l.tile_tokens * l.group;
    return l;
}

static size_t value_floats(const struct fb_heads *heads) {
    return heads->v_in_k ? fb_values_bytes((size_t)heads->v_dim) / sizeof(float) : 0;
}

static size_t row_floats(const struct fb_heads *heads) {
    return ((size_t)heads->n_heads * (size_t)heads->k_dim + 15) / 16 * 16;
}

size_t fb_attention_scratch_bytes(const struct fb_heads *heads) {
    struct fb_tile_layout l = fb_tile_layout_of(heads);
    size_t floats = l.tile_rows * (l.k_dim + l.k_padded / 2 + FB_KEY_BLOCK) + 2 * fb_partial_floats(&l, l.tile_rows);
    return ((floats + row_floats(heads) + value_floats(heads)) * sizeof(float) + 63) / 64 * 64;
}

struct fb_tile_work fb_tile_work_of(const struct fb_attention *a, const struct fb_tile_layout *l, int thread) {
    float *memory = (float *)(void *)(a->scratch + (size_t)thread * a->scratch_bytes);
    struct fb_tile_work w = {.q = memory, .q_pairs = (uint16_t *)(void *)(memory + l->tile_rows * l->k_dim)};
    w.scores = memory + l->tile_rows * (l->k_dim + l->k_padded / 2);
    float *rest = w.scores + l->tile_rows * FB_KEY_BLOCK;
    w.sum = fb_partial_at(rest, l->tile_rows);
    rest += fb_partial_floats(l, l->tile_rows);
    w.part = fb_partial_at(rest, l->tile_rows);
    w.row = rest + fb_partial_floats(l, l->tile_rows);
    w.values = (char *)(w.row + row_floats(a->heads));
    return w;
}

struct fb_tile fb_tile_of(
    const struct fb_attention *a, const struct fb_tile_layout *l, int32_t sequence, int32_t kv_head, int32_t index) {
    struct fb_tile t = {.sequence = &a->sequences[sequence], .kv_head = kv_head};
    t.first_token = index * (int32_t)l->tile_tokens;
    int32_t rest = t.sequence->n_tokens - t.first_token;
    t.n_tokens = rest < (int32_t)l->tile_tokens ? rest : (int32_t)l->tile_tokens;
    t.first_row = a->first_row[sequence] + t.first_token;
    int32_t first_position = t.sequence->n_past + t.first_token;
    const int32_t last_position = first_position + t.n_tokens - 1;
    t.first_block = fb_lowest_visible(t.sequence, a->mask, first_position) / FB_KEY_BLOCK;
    t.end_block = fb_highest_visible(t.sequence, a->mask, last_position) / FB_KEY_BLOCK + 1;
    t.sinks = fb_sees_sinks(t.sequence, a->mask, last_position);
    return t;
}

static const struct fb_kv_layout *layout_of(const struct fb_attention *a) {
    return &a->pool->layers[a->layer];
}

/* Where a slab has its values: behind K, or in it. */
static char *slab_values(const struct fb_attention *a, char *slab) {
    return a->heads->v_in_k ? slab : fb_slab_v(layout_of(a), slab);
}

/* For K in bf16: rounds queries to bf16 pairs. */
static void narrow_queries(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile_work *w,
    size_t first_row, size_t rows) {
    if (layout_of(a)->k.dtype != FB_BF16) return;
    for (size_t r = first_row; r < first_row + rows; r++)
        a->kernels->narrow_pairs(w->q + r * l->k_dim, l->k_dim, w->q_pairs + r * l->k_padded);
}

/* Copies n q or k heads of a token, from head `first` of the `n_all` at `heads` on, and finishes them: norm and rope,
 * see struct fb_raw_heads. */
static void finish_heads(const struct fb_attention *a, const struct fb_tile_work *w, bool is_k, int32_t row,
    const float *heads, int32_t n_all, int32_t first, int32_t n, float *out) {
    const struct fb_raw_heads *raw = a->raw;
    const size_t dim = (size_t)a->heads->k_dim;
    const struct fb_op *norm = raw->norm;
    const float *vector = !norm ? NULL : is_k ? norm->vector2 : norm->vector;
    const bool is_whole = norm && norm->flags & FB_HEADS_WHOLE;
    if (is_whole) {
        a->kernels->rms_norm(heads, vector, (size_t)n_all * dim, norm->eps, w->row);
        heads = w->row;
    }
    memcpy(out, heads + (size_t)first * dim, (size_t)n * dim * sizeof *out);
    const bool is_latent = norm && norm->flags & FB_HEADS_LATENT;
    for (int32_t i = 0; i < n; i++) {
        float *head = out + (size_t)i * dim;
        if (is_latent && is_k)
            fb_norm_latent(a->kernels, norm, head, a->heads);
        else if (norm && !is_whole && !is_latent)
            fb_norm_head(a->kernels, norm, vector, is_k ? norm->vector2_length : norm->vector_length, first + i, head,
                a->heads->k_dim);
        if (raw->angles) fb_rotate_head(a->kernels, head, raw->angles->cos_sin, (size_t)row, raw->angles->n_pairs);
    }
}

/* The factor of a query at `position`; see struct fb_op. */
static float temperature_at(const struct fb_op *op, int32_t position) {
    const double steps = floor(((double)position + op->temperature_offset) / op->temperature_length);
    return (float)(1.0 + (double)op->temperature * log(1.0 + steps));
}

/* Gathers the tile's queries from row first_row on, k_dim apart: row = token x group + head of
 * the group. */
static void gather_queries(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t,
    const struct fb_tile_work *w, size_t first_row) {
    const int32_t group = (int32_t)l->group, first_head = t->kv_head * group;
    for (int32_t i = 0; i < t->n_tokens; i++) {
        const float *heads = a->q + (size_t)(t->first_row + i) * a->ldq;
        float *to = w->q + (first_row + (size_t)i * l->group) * l->k_dim;
        if (a->raw)
            finish_heads(a, w, false, t->first_row + i, heads, a->heads->n_heads, first_head, group, to);
        else
            memcpy(to, heads + (size_t)first_head * l->k_dim, l->group * l->k_dim * sizeof *to);
        if (a->op && a->op->temperature != 0.0f)
            a->kernels->scale(to, l->group * l->k_dim, temperature_at(a->op, t->sequence->n_past + t->first_token + i));
    }
    narrow_queries(a, l, w, first_row, (size_t)t->n_tokens * l->group);
}

/* Writes K and V of a tile's one token, whose heads are raw. */
static void write_raw(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t,
    const struct fb_tile_work *w) {
    const int32_t position = t->sequence->n_past, n_kv_heads = a->heads->n_kv_heads;
    const float *k_heads = a->q + (size_t)t->first_row * a->ldq + (size_t)a->heads->n_heads * l->k_dim;
    const float *v = k_heads + (size_t)n_kv_heads * l->k_dim + (size_t)t->kv_head * l->v_dim;
    float *k = w->scores, *normed = k + l->k_padded; /* not in use yet, and longer than two heads */
    finish_heads(a, w, true, t->first_row, k_heads, n_kv_heads, t->kv_head, 1, k);
    if (a->raw->norm && a->raw->norm->flags & FB_HEADS_VALUES) {
        memcpy(normed, v, l->v_dim * sizeof *normed);
        fb_norm_value(a->kernels, a->raw->norm, normed, (int32_t)l->v_dim);
        v = normed;
    }
    fb_slab_write(layout_of(a), a->kernels,
        fb_slab(a->pool, t->sequence->pages[position / FB_PAGE_POSITIONS], a->layer, t->kv_head),
        position % FB_PAGE_POSITIONS, true, k, v);
}

/* A row of scores: its head, the position of column 0, and the one at which the keys see the query. */
struct score_row {
    size_t head;
    int32_t start, query;
};

static float rounded(float x) {
    return fb_bf16_to_f32(fb_f32_to_bf16(x));
}

/* Adds ALiBi's biases to columns from .. to-1 of a row's scores, scaled already. */
static void add_biases(
    const struct fb_attention *a, float *scores, int32_t from, int32_t to, const struct score_row *row) {
    const float slope = a->slopes[row->head];
    if (!a->rounds_biases) {
        for (int32_t k = from; k < to; k++)
            scores[k] += slope * (float)(row->start + k - row->query);
        return;
    }
    const float coarse = rounded(slope), at_query = rounded(coarse * rounded((float)row->query));
    for (int32_t k = from; k < to; k++)
        scores[k] += a->scale * (rounded(coarse * rounded((float)(row->start + k))) - at_query);
}

/* Softmax without its division over columns from .. to-1 of a row's scores; the other columns of first ..
 * end-1 become 0. A row that sees nothing gets length 0. */
static void weigh_scores(const struct fb_attention *a, float *scores, int32_t first, int32_t end, int32_t from,
    int32_t to, struct score_row about, const struct fb_partial *out, size_t row) {
    if (from >= to) {
        memset(scores + first, 0, (size_t)(end - first) * sizeof *scores);
        out->max[row] = -INFINITY;
        out->length[row] = 0.0f;
        return;
    }
    const size_t n = (size_t)(to - from);
    float scale = a->scale;
    if (a->soft_cap > 0.0f) {
        a->kernels->soft_cap(scores + from, n, scale, a->soft_cap);
        scale = 1.0f;
    }
    if (a->slopes) {
        a->kernels->scale(scores + from, n, scale);
        add_biases(a, scores, from, to, &about);
        scale = 1.0f;
    }
    out->max[row] = a->kernels->max(scores + from, n) * scale;
    out->length[row] = a->kernels->exp_sum(scores + from, n, scale, out->max[row], scores + from);
    memset(scores + first, 0, (size_t)(from - first) * sizeof *scores);
    memset(scores + to, 0, (size_t)(end - to) * sizeof *scores);
}

/* Scores [rows][FB_KEY_BLOCK] of the first `panels` blocks of 16 keys of a slab. `next`: K or V to
 * prefetch. */
static void score_keys(const struct fb_attention *a, const struct fb_tile_layout *l, char *slab, size_t panels,
    const struct fb_tile_work *w, size_t rows, float *scores, const char *next) {
    const struct fb_kv_part *k = &layout_of(a)->k;
    if (k->dtype == FB_BF16) {
        a->kernels->gemm_pairs((struct fb_panels){slab, 1, fb_k_dimensions(FB_BF16, l->k_dim) * 16}, panels, l->k_dim,
            w->q_pairs, l->k_padded, rows, scores, FB_KEY_BLOCK, false, next);
        return;
    }
    fb_part_gemm(k, a->kernels)((struct fb_panels){slab, 1, l->k_dim * 16}, panels, l->k_dim, w->q, l->k_dim, rows,
        scores, FB_KEY_BLOCK, false, next);
    const float *scales = fb_part_scales(k, slab);
    for (size_t r = 0; scales && r < rows; r++)
        a->kernels->multiply(scores + r * FB_KEY_BLOCK, scales, panels * 16);
}

/* values [rows][v_padded] = (accumulate ? values : 0) + weights times the first n positions of a slab's V, or of a slab
 * whose K has them. Overwrites the weights. `next`: V or K to prefetch. */
static void sum_values(const struct fb_attention *a, const struct fb_tile_layout *l, char *at, size_t n,
    const struct fb_tile_work *w, float *weights, size_t rows, float *values, bool accumulate, const char *next) {
    const struct fb_kv_part *v = &layout_of(a)->v;
    const struct fb_kv_part of_k = {v->dtype, (size_t)FB_PAGE_POSITIONS * l->v_padded, 0};
    if (a->heads->v_in_k) {
        fb_slab_values(layout_of(a), at, l->v_dim, n, w->values);
        v = &of_k;
        at = w->values;
    }
    if (v->dtype == FB_BF16) {
        uint16_t rounded[FB_TILE_ROWS * FB_PAGE_POSITIONS];
        for (size_t first = 0; first < rows; first += FB_TILE_ROWS) {
            const size_t count = rows - first < FB_TILE_ROWS ? rows - first : FB_TILE_ROWS;
            for (size_t r = 0; r < count; r++)
                a->kernels->narrow_pairs(weights + (first + r) * FB_KEY_BLOCK, n, rounded + r * FB_PAGE_POSITIONS);
            a->kernels->gemm_pairs((struct fb_panels){at, 1, (size_t)FB_PAGE_POSITIONS * 16}, l->v_padded / 16, n,
                rounded, FB_PAGE_POSITIONS, count, values + first * l->v_padded, l->v_padded, accumulate, next);
        }
        return;
    }
    const float *scales = fb_part_scales(v, at);
    for (size_t r = 0; scales && r < rows; r++)
        a->kernels->multiply(weights + r * FB_KEY_BLOCK, scales, n);
    fb_part_gemm(v, a->kernels)((struct fb_panels){at, 1, (size_t)FB_PAGE_POSITIONS * 16}, l->v_padded / 16, n, weights,
        FB_KEY_BLOCK, rows, values, l->v_padded, accumulate, next);
}

/* The partial result of every query of the tile over the sinks outside its window. Rotates the queries in
 * `w`. */
static void attend_sinks(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t,
    const struct fb_tile_work *w, struct fb_partial out) {
    const size_t rows = (size_t)t->n_tokens * l->group;
    const int32_t n_sinks = t->sequence->n_sinks;
    const int32_t first_position = t->sequence->n_past + t->first_token;
    for (size_t r = 0; a->angles && r < rows; r++) {
        const int32_t token = (int32_t)(r / l->group);
        if (!fb_sees_sinks(t->sequence, a->mask, first_position + token)) continue;
        fb_rotate_head(a->kernels, w->q + r * l->k_dim, a->angles->sink_rotations, (size_t)(t->first_row + token),
            a->angles->n_pairs);
    }
    narrow_queries(a, l, w, 0, rows);
    char *slab = fb_slab(a->pool, t->sequence->pages[0], a->layer, t->kv_head);
    const size_t panels = (size_t)(n_sinks - 1) / 16 + 1;
    score_keys(a, l, slab, panels, w, rows, w->scores, NULL);
    for (size_t r = 0; r < rows; r++) {
        const bool sees = fb_sees_sinks(t->sequence, a->mask, first_position + (int32_t)(r / l->group));
        const struct score_row about = {t->kv_head * l->group + r % l->group, 0, n_sinks + t->sequence->window - 1};
        weigh_scores(a, w->scores + r * FB_KEY_BLOCK, 0, n_sinks, 0, sees ? n_sinks : 0, about, &out, r);
    }
    sum_values(a, l, slab_values(a, slab), (size_t)n_sinks, w, w->scores, rows, out.values, false, NULL);
}

/* The pages of a key block, consecutive in a sequence's page table. */
struct block_pages {
    const int32_t *pages; /* the first page of the block */
    int32_t n_pages;      /* in the block */
    int32_t n_written;    /* pages from the first one to the sequence's last */
    int32_t kv_head;
};

/* The i-th read of a block: K of its pages, then V of them, then K of the pages after them; NULL past the
 * end. */
static char *block_read(const struct fb_attention *a, const struct block_pages *r, int32_t i) {
    const int32_t page = i < r->n_pages ? i : i - r->n_pages;
    if (page >= r->n_written) return NULL;
    char *slab = fb_slab(a->pool, r->pages[page], a->layer, r->kv_head);
    return i < r->n_pages || i >= 2 * r->n_pages ? slab : slab_values(a, slab);
}

enum { PREFETCH_DISTANCE = 2 }; /* reads ahead */

/* Scores of a block's first n_keys keys, into w->scores. */
static void score_block(const struct fb_attention *a, const struct fb_tile_layout *l, const struct block_pages *r,
    int32_t n_keys, const struct fb_tile_work *w, size_t rows) {
    for (int32_t i = 0; i < r->n_pages; i++) {
        const size_t panels = (size_t)(n_keys - i * FB_PAGE_POSITIONS - 1) / 16 + 1;
        score_keys(a, l, block_read(a, r, i), panels < 2 ? panels : 2, w, rows, w->scores + i * FB_PAGE_POSITIONS,
            block_read(a, r, i + PREFETCH_DISTANCE));
    }
}

/* Sums of the block's V, weighted by w->scores. Positions from n_keys on may hold anything. */
static void sum_block(const struct fb_attention *a, const struct fb_tile_layout *l, const struct block_pages *r,
    int32_t n_keys, const struct fb_tile_work *w, size_t rows, float *values) {
    for (int32_t i = 0; i < r->n_pages; i++) {
        const int32_t rest = n_keys - i * FB_PAGE_POSITIONS;
        sum_values(a, l, block_read(a, r, r->n_pages + i),
            (size_t)(rest < FB_PAGE_POSITIONS ? rest : FB_PAGE_POSITIONS), w, w->scores + i * FB_PAGE_POSITIONS, rows,
            values, i > 0, block_read(a, r, r->n_pages + i + PREFETCH_DISTANCE));
    }
}

/* The partial result of every query of the tile over one key block. */
static void attend_block(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t,
    int32_t block, const struct fb_tile_work *w, struct fb_partial out) {
    const size_t rows = (size_t)t->n_tokens * l->group;
    const int32_t first_position = t->sequence->n_past + t->first_token;
    const int32_t last_position = fb_highest_visible(t->sequence, a->mask, first_position + t->n_tokens - 1);
    /* Pages of the block that hold a key visible to some query of the tile. */
    const int32_t visible = fb_lowest_visible(t->sequence, a->mask, first_position);
    const int32_t low = visible > block * FB_KEY_BLOCK ? visible : block * FB_KEY_BLOCK;
    const int32_t end = block * FB_KEY_BLOCK + FB_KEY_BLOCK;
    const int32_t first_page = low / FB_PAGE_POSITIONS, start = first_page * FB_PAGE_POSITIONS;
    const int32_t n_keys = (last_position < end ? last_position + 1 : end) - start;
    const struct block_pages r = {.pages = t->sequence->pages + first_page,
        .n_pages = (n_keys - 1) / FB_PAGE_POSITIONS + 1,
        .n_written = last_position / FB_PAGE_POSITIONS + 1 - first_page,
        .kv_head = t->kv_head};
    score_block(a, l, &r, n_keys, w, rows);
    /* Softmax without its division, over what each query sees; the rest of its row becomes 0. */
    for (size_t row = 0; row < rows; row++) {
        const int32_t position = first_position + (int32_t)(row / l->group);
        const int32_t from = fb_lowest_visible(t->sequence, a->mask, position) - start;
        const int32_t to = fb_highest_visible(t->sequence, a->mask, position) - start + 1;
        const struct score_row about = {t->kv_head * l->group + row % l->group, start, position};
        weigh_scores(a, w->scores + row * FB_KEY_BLOCK, 0, n_keys, from > 0 ? from : 0, to < n_keys ? to : n_keys,
            about, &out, row);
    }
    sum_block(a, l, &r, n_keys, w, rows, out.values);
}

void fb_attend_together(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *members,
    size_t n_members, int32_t block, const struct fb_tile_work *w) {
    enum { PAGES = FB_KEY_BLOCK / FB_PAGE_POSITIONS };
    const size_t rows = n_members * l->group;
    for (size_t m = 0; m < n_members; m++)
        gather_queries(a, l, &members[m], w, m * l->group);
    const struct block_pages r = {.pages = members[0].sequence->pages + block * PAGES,
        .n_pages = PAGES,
        .n_written = PAGES,
        .kv_head = members[0].kv_head};
    score_block(a, l, &r, FB_KEY_BLOCK, w, rows);
    for (size_t row = 0; row < rows; row++) {
        const struct fb_tile *t = &members[row / l->group];
        const struct score_row about = {
            t->kv_head * l->group + row % l->group, block * FB_KEY_BLOCK, t->sequence->n_past + t->first_token};
        weigh_scores(a, w->scores + row * FB_KEY_BLOCK, 0, FB_KEY_BLOCK, 0, FB_KEY_BLOCK, about, &w->part, row);
    }
    sum_block(a, l, &r, FB_KEY_BLOCK, w, rows, w->part.values);
}

void fb_attend_part(const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t,
    int32_t index, const struct fb_tile_work *w, struct fb_partial out) {
    if (a->raw && a->raw->writes && index == fb_tile_parts(t) - 1) write_raw(a, l, t, w);
    if (t->sinks && index == 0) {
        gather_queries(a, l, t, w, 0);
        attend_sinks(a, l, t, w, out);
        return;
    }
    if (index == (t->sinks ? 1 : 0) || a->split) gather_queries(a, l, t, w, 0);
    attend_block(a, l, t, t->first_block + index - (t->sinks ? 1 : 0), w, out);
}

void fb_merge_partial(const struct fb_attention *a, const struct fb_tile_layout *l, size_t rows, struct fb_partial sum,
    struct fb_partial part) {
    for (size_t r = 0; r < rows; r++) {
        if (part.length[r] == 0.0f) continue;
        float *values = sum.values + r * l->v_padded;
        const float *more = part.values + r * l->v_padded;
        if (sum.length[r] == 0.0f) {
            memcpy(values, more, l->v_padded * sizeof *values);
            sum.length[r] = part.length[r];
            sum.max[r] = part.max[r];
            continue;
        }
        const float top = sum.max[r] > part.max[r] ? sum.max[r] : part.max[r];
        const float distance[2] = {sum.max[r] - top, part.max[r] - top};
        float factors[2];
        a->kernels->exp_sum(distance, 2, 1.0f, 0.0f, factors);
        a->kernels->merge(values, factors[0], more, factors[1], l->v_padded);
        sum.length[r] = fmaf(part.length[r], factors[1], sum.length[r] * factors[0]);
        sum.max[r] = top;
    }
}

/* Adds a head's sink logit to the softmax of a row: a score without a value. */
static void add_sink_logit(
    const struct fb_attention *a, float logit, struct fb_partial sum, size_t row, float *values, size_t v_dim) {
    const float top = sum.max[row] > logit ? sum.max[row] : logit;
    const float distance[2] = {sum.max[row] - top, logit - top};
    float factors[2];
    a->kernels->exp_sum(distance, 2, 1.0f, 0.0f, factors);
    a->kernels->scale(values, v_dim, factors[0]);
    sum.length[row] = fmaf(sum.length[row], factors[0], factors[1]);
}

void fb_store_attended(
    const struct fb_attention *a, const struct fb_tile_layout *l, const struct fb_tile *t, struct fb_partial sum) {
    for (int32_t i = 0; i < t->n_tokens; i++)
        for (size_t g = 0; g < l->group; g++) {
            const size_t r = (size_t)i * l->group + g, head = (size_t)t->kv_head * l->group + g;
            float *values = sum.values + r * l->v_padded;
            if (a->sink_logits) add_sink_logit(a, a->sink_logits[head], sum, r, values, l->v_dim);
            a->kernels->scale(values, l->v_dim, 1.0f / sum.length[r]);
            memcpy(
                a->out + (size_t)(t->first_row + i) * a->ld_out + head * l->v_dim, values, l->v_dim * sizeof *values);
        }
}
