/* batch.c - what describes a batch on the GPU, and whether its attention is split. See program.h. */
#include "program.h"

#include <string.h>

enum { MOST_PARTIAL_FLOATS = 1 << 22 }; /* of a split attention: 16 MiB */

static int32_t pages_of(const struct fb_sequence *sequence) {
    return (sequence->n_past + sequence->n_tokens - 1) / FB_PAGE_POSITIONS + 1;
}

static size_t place(struct fb_cuda_description *d, size_t count, size_t size) {
    const size_t at = d->n_bytes;
    d->n_bytes += fb_cuda_aligned(count * size);
    return at;
}

size_t fb_cuda_partials_of(const struct fb_program *program, const struct fb_cuda_sequence *sequences,
    int32_t n_sequences, int32_t window, int32_t tile_rows, struct fb_cuda_attention *out) {
    const struct fb_program_shape *s = &program->shape;
    *out = (struct fb_cuda_attention){.tile_rows = tile_rows, .window = window};
    out->pages.head_dim = s->head_dim;
    out->pages.n_kv_heads = s->n_kv_heads;
    out->n_tiles = fb_cuda_tiles(
        sequences, n_sequences, s->n_heads / s->n_kv_heads, tile_rows, window, NULL, &out->n_parts);
    return fb_cuda_partial_floats(out);
}

/* Key blocks get threads of their own when tiles alone leave most of the GPU idle and some tile has several; if parts fit. The result
 * does not depend on it. */
static enum fb_status choose_tiles(struct fb_cuda_program *p, const struct fb_cuda_sequence *sequences,
    int32_t n_sequences, struct fb_cuda_description *d) {
    const struct fb_program *program = p->program;
    const int32_t rows = fb_cuda_tile_rows(program->shape.head_dim, true);
    struct fb_cuda_attention of;
    size_t most = 0;
    int32_t n_parts = 0, n_tiles = 0;
    for (int32_t i = 0; i < program->n_ops; i++) {
        if (program->ops[i].kind != FB_OP_ATTENTION) continue;
        const size_t floats = fb_cuda_partials_of(program, sequences, n_sequences, program->ops[i].window, rows, &of);
        if (floats > most) most = floats;
        if (of.n_parts > n_parts) n_parts = of.n_parts;
        n_tiles = of.n_tiles;
    }
    d->is_split = n_parts > 1 && most <= MOST_PARTIAL_FLOATS &&
                  (int64_t)n_tiles * program->shape.n_kv_heads < 2 * (int64_t)p->n_processors;
    d->tile_rows = fb_cuda_tile_rows(program->shape.head_dim, d->is_split);
    fb_cuda_partials_of(program, sequences, n_sequences, 0, d->tile_rows, &of);
    d->n_tiles = of.n_tiles;
    return d->is_split ? fb_cuda_grow(p, &p->partials, most * sizeof(float), false) : FB_OK;
}

enum fb_status fb_cuda_describe(
    struct fb_cuda_program *p, const struct fb_batch *batch, struct fb_cuda_description *d) {
    const struct fb_program *program = p->program;
    const size_t n_tokens = (size_t)batch->n_tokens, n_sequences = (size_t)batch->n_sequences;
    size_t n_pages = 0;
    for (size_t i = 0; i < n_sequences; i++)
        n_pages += (size_t)pages_of(&batch->sequences[i]);
    const size_t group = (size_t)(program->shape.n_heads / program->shape.n_kv_heads);
    FB_REQUIRE(n_pages <= INT32_MAX, "%zu pages are too many for one batch", n_pages);
    FB_REQUIRE(
        n_tokens * group <= INT32_MAX / 2, "%zu tokens of %zu heads are too many for one batch", n_tokens, group);
    *d = (struct fb_cuda_description){.n_bytes = 0};
    d->sequences = place(d, n_sequences, sizeof(struct fb_cuda_sequence));
    d->tokens = place(d, n_tokens, sizeof(int32_t));
    d->positions = place(d, n_tokens, sizeof(int32_t));
    d->owners = place(d, n_tokens, sizeof(int32_t));
    d->outputs = place(d, (size_t)batch->n_outputs, sizeof(int32_t));
    d->pages = place(d, n_pages, sizeof(int32_t));
    /* Tiles hold at least one row of a token's group: room for the most there can be. */
    const size_t least_rows = (size_t)fb_cuda_tile_rows(program->shape.head_dim, true);
    d->tiles = place(d, n_tokens * group / least_rows + n_sequences, sizeof(struct fb_cuda_tile));
    FB_TRY(fb_cuda_grow(p, &p->inputs, d->n_bytes, true));

    char *host = p->inputs.host, *device = p->inputs.device;
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
    memcpy(host + d->tokens, batch->tokens, n_tokens * sizeof(int32_t));
    if (batch->n_outputs) memcpy(host + d->outputs, batch->outputs, (size_t)batch->n_outputs * sizeof(int32_t));
    FB_TRY(choose_tiles(p, sequences, batch->n_sequences, d));
    int32_t n_parts;
    fb_cuda_tiles(sequences, batch->n_sequences, (int32_t)group, d->tile_rows, 0,
        (struct fb_cuda_tile *)(void *)(host + d->tiles), &n_parts);

    d->batch = (struct fb_cuda_batch){.n_tokens = batch->n_tokens,
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
