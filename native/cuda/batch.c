/* batch.c - the description of a batch on the GPU, and whether its attention is split. See program.h. */
#include "program.h"
#include "program/operators.h"

#include <string.h>

enum { MOST_PARTIAL_FLOATS = 1 << 23 }; /* of a split attention: 32 MiB */

static int32_t pages_of(const struct fb_sequence *sequence) {
    return (sequence->n_past + sequence->n_tokens - 1) / FB_PAGE_POSITIONS + 1;
}

static size_t add_array(struct fb_cuda_description *d, size_t count, size_t size) {
    const size_t at = d->n_bytes;
    d->n_bytes += fb_cuda_aligned(count * size);
    return at;
}

/* ---- Attention --------------------------------------------------------------------------------------------------- */

int32_t fb_cuda_parts_within(const struct fb_cuda_description *d, int32_t window) {
    if (window == 0 || d->n_parts == 0) return d->n_parts;
    /* A tile's queries have at most tile_rows positions. What they see begins and ends anywhere in a key
     * block, and sinks are one more part. */
    const int64_t seen = (int64_t)window + d->tile_rows;
    const int64_t most = (seen + FB_CUDA_KEY_BLOCK - 2) / FB_CUDA_KEY_BLOCK + 2;
    return most < d->n_parts ? (int32_t)most : d->n_parts;
}

/* In a padded step every row is a sequence, including the padding. */
static int32_t tiles_of(const struct fb_cuda_extent *rows, int32_t n_found, int32_t group, int32_t tile_rows) {
    return rows->is_padded ? rows->n_tokens * ((group + tile_rows - 1) / tile_rows) : n_found;
}

/* Key blocks get blocks of threads of their own if tiles alone leave most of the GPU idle, some tile has
 * several, and their parts fit the limit. Results depend neither on that nor on the number of parts that
 * memory is reserved for. */
static enum fb_status choose_tiles(struct fb_cuda_program *p, const struct fb_cuda_sequence *sequences,
    int32_t n_sequences, struct fb_cuda_description *d) {
    const struct fb_program *program = p->program;
    const struct fb_heads *h = fb_cuda_heads_of(program);
    const int32_t group = h->n_heads / h->n_kv_heads, head_dim = h->k_dim;
    struct fb_cuda_attention of = {.tile_rows = fb_cuda_tile_rows(head_dim, true)};
    int32_t n_found = 0, n_parts;
    of.pages.head_dim = head_dim;
    of.pages.n_kv_heads = h->n_kv_heads;
    for (int32_t i = 0; i < program->n_ops; i++) {
        if (fb_operator_of(program->ops[i].kind)->stage != FB_STAGE_ATTENTION) continue;
        n_found = fb_cuda_tiles(sequences, n_sequences, group, of.tile_rows, program->ops[i].window, NULL, &n_parts);
        if (n_parts > of.n_parts) of.n_parts = n_parts;
    }
    if (d->rows.is_padded) of.n_parts = fb_cuda_round_up(of.n_parts);
    of.n_tiles = tiles_of(&d->rows, n_found, group, of.tile_rows);
    const size_t n_floats = fb_cuda_partial_floats(&of);
    const bool is_split = of.n_parts > 1 && n_floats <= MOST_PARTIAL_FLOATS &&
                          (int64_t)of.n_tiles * of.pages.n_kv_heads < 2 * (int64_t)p->n_processors;
    d->n_parts = is_split ? of.n_parts : 0;
    d->tile_rows = fb_cuda_tile_rows(head_dim, is_split);
    return is_split ? fb_cuda_grow(p, &p->partials, n_floats * sizeof(float), false) : FB_OK;
}

/* Fills the list of tiles, padded with tiles of a sequence without tokens. */
static void list_tiles(const struct fb_program *program, const struct fb_cuda_sequence *sequences, int32_t n_sequences,
    struct fb_cuda_description *d, struct fb_cuda_tile *tiles) {
    const struct fb_heads *h = fb_cuda_heads_of(program);
    const int32_t group = h->n_heads / h->n_kv_heads;
    int32_t n_parts;
    const int32_t n_found = fb_cuda_tiles(sequences, n_sequences, group, d->tile_rows, 0, tiles, &n_parts);
    d->n_tiles = tiles_of(&d->rows, n_found, group, d->tile_rows);
    for (int32_t i = n_found; i < d->n_tiles; i++)
        tiles[i] = (struct fb_cuda_tile){.sequence = n_sequences};
}

/* ---- Description ------------------------------------------------------------------------------------------------- */

/* Pages come last: their number changes from step to step, and everything else must stay at the
 * same address. */
static enum fb_status lay_out(struct fb_cuda_program *p, const struct fb_batch *batch, struct fb_cuda_extent rows,
    struct fb_cuda_description *d) {
    const struct fb_heads *h = fb_cuda_heads_of(p->program);
    const size_t n_tokens = (size_t)rows.n_tokens, group = (size_t)(h->n_heads / h->n_kv_heads);
    const size_t n_sequences = rows.is_padded ? n_tokens : (size_t)batch->n_sequences;
    size_t n_pages = 0;
    for (int32_t i = 0; i < batch->n_sequences; i++)
        n_pages += (size_t)pages_of(&batch->sequences[i]);
    FB_REQUIRE(n_pages <= INT32_MAX, "%zu pages are too many for one batch", n_pages);
    FB_REQUIRE(
        n_tokens * group <= INT32_MAX / 2, "%zu tokens of %zu heads are too many for one batch", n_tokens, group);
    *d = (struct fb_cuda_description){.rows = rows};
    d->sequences = add_array(d, n_sequences, sizeof(struct fb_cuda_sequence));
    d->tokens = add_array(d, n_tokens, sizeof(int32_t));
    d->positions = add_array(d, n_tokens, sizeof(int32_t));
    d->owners = add_array(d, n_tokens, sizeof(int32_t));
    d->outputs = add_array(d, (size_t)rows.n_outputs, sizeof(int32_t));
    /* A tile holds at least one row of a token's group, so this is the most there can be. */
    const size_t least_rows = (size_t)fb_cuda_tile_rows(h->k_dim, true);
    d->tiles = add_array(d, n_tokens * group / least_rows + n_sequences, sizeof(struct fb_cuda_tile));
    d->pages = add_array(d, n_pages, sizeof(int32_t));
    return fb_cuda_grow(p, &p->inputs, d->n_bytes, true);
}

/* Fills the padding: token 0 at position 0 of a sequence without tokens, and the first output again. */
static void fill_up(const struct fb_batch *batch, const struct fb_cuda_description *d, char *host) {
    int32_t *tokens = (int32_t *)(void *)(host + d->tokens), *outputs = (int32_t *)(void *)(host + d->outputs);
    int32_t *positions = (int32_t *)(void *)(host + d->positions), *owners = (int32_t *)(void *)(host + d->owners);
    if (batch->n_tokens < d->rows.n_tokens)
        ((struct fb_cuda_sequence *)(void *)(host + d->sequences))[batch->n_sequences] = (struct fb_cuda_sequence){
            .first_row = batch->n_tokens};
    for (int32_t row = batch->n_tokens; row < d->rows.n_tokens; row++) {
        tokens[row] = positions[row] = 0;
        owners[row] = batch->n_sequences;
    }
    for (int32_t i = batch->n_outputs; i < d->rows.n_outputs; i++)
        outputs[i] = outputs[0];
}

static void write_batch(const struct fb_batch *batch, const struct fb_cuda_description *d, char *host) {
    struct fb_cuda_sequence *sequences = (struct fb_cuda_sequence *)(void *)(host + d->sequences);
    int32_t *positions = (int32_t *)(void *)(host + d->positions), *owners = (int32_t *)(void *)(host + d->owners);
    int32_t *pages = (int32_t *)(void *)(host + d->pages), row = 0, page = 0;
    for (int32_t i = 0; i < batch->n_sequences; i++) {
        const struct fb_sequence *s = &batch->sequences[i];
        sequences[i] = (struct fb_cuda_sequence){.first_page = page,
            .n_past = s->n_past,
            .n_tokens = s->n_tokens,
            .window = s->window,
            .n_sinks = s->n_sinks,
            .first_row = row};
        memcpy(pages + page, s->pages, (size_t)pages_of(s) * sizeof *pages);
        page += pages_of(s);
        for (int32_t t = 0; t < s->n_tokens; t++, row++) {
            positions[row] = s->n_past + t;
            owners[row] = i;
        }
    }
    memcpy(host + d->tokens, batch->tokens, (size_t)batch->n_tokens * sizeof(int32_t));
    if (batch->n_outputs) memcpy(host + d->outputs, batch->outputs, (size_t)batch->n_outputs * sizeof(int32_t));
    fill_up(batch, d, host);
}

enum fb_status fb_cuda_describe(struct fb_cuda_program *p, const struct fb_batch *batch, struct fb_cuda_extent rows,
    struct fb_cuda_description *d) {
    FB_TRY(lay_out(p, batch, rows, d));
    char *host = p->inputs.host, *device = p->inputs.device;
    const struct fb_cuda_sequence *sequences = (const struct fb_cuda_sequence *)(const void *)(host + d->sequences);
    write_batch(batch, d, host);
    FB_TRY(choose_tiles(p, sequences, batch->n_sequences, d));
    list_tiles(p->program, sequences, batch->n_sequences, d, (struct fb_cuda_tile *)(void *)(host + d->tiles));
    d->batch = (struct fb_cuda_batch){.n_tokens = rows.n_tokens,
        .n_sequences = batch->n_sequences,
        .tokens = (const int32_t *)(void *)(device + d->tokens),
        .positions = (const int32_t *)(void *)(device + d->positions),
        .owners = (const int32_t *)(void *)(device + d->owners),
        .sequences = (const struct fb_cuda_sequence *)(void *)(device + d->sequences),
        .pages = (const int32_t *)(void *)(device + d->pages)};
    d->device_tiles = (const struct fb_cuda_tile *)(void *)(device + d->tiles);
    d->device_outputs = (const int32_t *)(void *)(device + d->outputs);
    return fb_cuda_check(
        cudaMemcpyAsync(device, host, d->n_bytes, cudaMemcpyHostToDevice, p->stream), "copying a batch to the GPU");
}
