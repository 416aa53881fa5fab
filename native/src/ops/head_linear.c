/* head_linear.c - products with a matrix for each head. See head_linear.h. */
#include "ops/head_linear.h"

#include "ops/linear.h"

#include <string.h>

enum {
    TOKEN_BLOCK = 32, /* tokens per work item: their input, 512 numbers each as 8-bit blocks, is 32 KiB */
    MAX_PANELS = 4,   /* multiplied at once */
    ITEMS_PER_THREAD = 4
};

static size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

/* Bytes of one converted input; 0 if the weight takes f32. */
static size_t input_bytes(const struct fb_weight *weight) {
    const size_t n_cols = (size_t)weight->n_cols;
    if (fb_is_quantized(weight->dtype)) return n_cols / FB_BLOCK_COLUMNS * sizeof(struct fb_activation);
    return fb_takes_pairs(weight) ? ceil_div(n_cols, 32) * 32 * sizeof(uint16_t) : 0;
}

size_t fb_head_linear_bytes(const struct fb_weight *weight) {
    return TOKEN_BLOCK * input_bytes(weight);
}

static size_t pieces_of(const struct fb_head_linear *p) {
    return ceil_div((size_t)p->weight->n_panels, p->item_panels);
}

int64_t fb_head_linear_items(struct fb_head_linear *p, int n_threads) {
    const size_t n = (size_t)p->weight->n_experts * ceil_div(p->n_tokens, TOKEN_BLOCK);
    p->item_panels = ceil_div((size_t)p->weight->n_panels, MAX_PANELS) * MAX_PANELS;
    while (p->item_panels > MAX_PANELS && n * pieces_of(p) < (size_t)n_threads * ITEMS_PER_THREAD)
        p->item_panels = ceil_div(p->item_panels / 2, MAX_PANELS) * MAX_PANELS;
    return (int64_t)(n * pieces_of(p));
}

/* Sets the inputs of a product to n_tokens heads at `x`, converted to what its weight takes. */
static void convert(const struct fb_head_linear *p, const float *x, size_t n_tokens, struct fb_linear *product) {
    const size_t n_cols = (size_t)p->weight->n_cols, n_bytes = input_bytes(p->weight);
    product->x = x;
    product->ldx = p->ldx;
    product->pairs = (const uint16_t *)(void *)p->scratch;
    product->ld_pairs = n_bytes / sizeof(uint16_t);
    product->activations = (const struct fb_activation *)(void *)p->scratch;
    product->ld_activations = n_bytes / sizeof(struct fb_activation);
    for (size_t t = 0; n_bytes && t < n_tokens; t++) {
        void *to = p->scratch + t * n_bytes;
        if (fb_is_quantized(p->weight->dtype))
            p->kernels->quantize(x + t * p->ldx, n_cols / FB_BLOCK_COLUMNS, to);
        else
            p->kernels->narrow_pairs(x + t * p->ldx, n_cols, to);
    }
}

void fb_head_linear_item(const struct fb_head_linear *p, int64_t index) {
    const struct fb_weight *weight = p->weight;
    const size_t n_cols = (size_t)weight->n_cols, n_rows = (size_t)weight->n_rows, copied = p->in_head - n_cols;
    const size_t blocks = ceil_div(p->n_tokens, TOKEN_BLOCK), pieces = pieces_of(p);
    const size_t first = (size_t)index % blocks * TOKEN_BLOCK, piece = (size_t)index / blocks % pieces;
    const size_t head = (size_t)index / blocks / pieces, rest = p->n_tokens - first;
    const size_t n_tokens = rest < TOKEN_BLOCK ? rest : TOKEN_BLOCK;
    const float *x = p->x + first * p->ldx + head * p->in_head;
    float *out = p->out + first * p->ld_out + head * (copied + n_rows);
    for (size_t t = 0; piece == 0 && copied && t < n_tokens; t++)
        memcpy(out + t * p->ld_out, x + t * p->ldx, copied * sizeof *out);

    struct fb_linear product = {.kernels = p->kernels, .weight = weight};
    convert(p, x + copied, n_tokens, &product);
    const size_t end = (piece + 1) * p->item_panels, n_panels = (size_t)weight->n_panels;
    float tile[TOKEN_BLOCK * MAX_PANELS * FB_LANES];
    for (size_t panel = piece * p->item_panels; panel < end && panel < n_panels; panel += MAX_PANELS) {
        const size_t n = n_panels - panel < MAX_PANELS ? n_panels - panel : MAX_PANELS, column = panel * FB_LANES;
        const size_t count = n_rows - column < n * FB_LANES ? n_rows - column : n * FB_LANES;
        fb_linear_multiply(
            &product, head * (size_t)weight->expert_panels + panel, n, 0, n_tokens, NULL, tile, n * FB_LANES);
        for (size_t t = 0; t < n_tokens; t++)
            memcpy(out + t * p->ld_out + copied + column, tile + t * n * FB_LANES, count * sizeof *out);
    }
}
