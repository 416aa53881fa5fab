/* linear.c - matrix products with fused operations. See linear.h. */
#include "ops/linear.h"

#include <string.h>

enum {
    MAX_PANELS = 4,    /* panels per work item; even, for gate and up */
    FEW_TOKENS = 4,    /* up to so many memory is the limit, and an item of two panels takes about a microsecond */
    READ_AHEAD = 8192, /* bytes that few tokens prefetch: 128 lines in flight outlast the latency of memory */
    TOKEN_BLOCK = 96,  /* tokens per work item: 96 KiB per 256 columns stay in L2; 96 = 16 x 6 = 8 x 12 */
    ITEMS_PER_THREAD = 8
};

int64_t fb_linear_items(struct fb_linear *linear, int n_threads) {
    const size_t n_panels = (size_t)linear->weight->n_panels;
    const size_t blocks = (linear->n_tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
    size_t item_panels = MAX_PANELS;
    if (linear->n_tokens <= FEW_TOKENS) item_panels = 2;
    while (item_panels > 2 && n_panels / item_panels * blocks < (size_t)n_threads * ITEMS_PER_THREAD)
        item_panels /= 2;
    linear->item_panels = item_panels;
    return (int64_t)((n_panels + item_panels - 1) / item_panels * blocks);
}

static bool all_finite(const float *x, size_t n) {
    /* Infinity and NaN have all exponent bits set. Integers, so that the loop vectorizes. */
    const uint32_t exponent = 0x7F800000;
    uint32_t found = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        found |= (bits & exponent) == exponent;
    }
    return found == 0;
}

/* FB_ACTIVATION_CLAMPED_SILU; NaN stays NaN. 1.702 is the factor with which x sigmoid(1.702 x) comes nearest to GELU
 * (Hendrycks and Gimpel 2016). */
static void clamped_silu(const struct fb_kernels *kernels, float limit, float *gate, float *up) {
    static const float alpha = 1.702f;
    for (size_t j = 0; j < FB_LANES; j++) {
        const float g = gate[j] > limit ? limit : gate[j];
        const float low = up[j] < -limit ? -limit : up[j];
        gate[j] = g * alpha;
        up[j] = (low > limit ? limit : low) + 1.0f;
    }
    kernels->swiglu(gate, up, FB_LANES, gate);
    kernels->scale(gate, FB_LANES, 1.0f / alpha);
}

void fb_linear_gate(const struct fb_linear *linear, float *gate, float *out) {
    const struct fb_kernels *kernels = linear->kernels;
    float *up = gate + FB_LANES;
    if (linear->activation == FB_ACTIVATION_SILU) {
        kernels->swiglu(gate, up, FB_LANES, out);
        return;
    }
    if (linear->activation == FB_ACTIVATION_CLAMPED_SILU) {
        clamped_silu(kernels, linear->numbers[0], gate, up);
    } else {
        kernels->activate[linear->activation](gate, FB_LANES, linear->numbers);
        kernels->multiply(gate, up, FB_LANES);
    }
    if (out != gate) memcpy(out, gate, FB_LANES * sizeof *out);
}

void fb_linear_multiply(const struct fb_linear *linear, size_t panel, size_t n_panels, size_t row, size_t n_rows,
    const char *next, float *tile, size_t ld) {
    const struct fb_weight *weight = linear->weight;
    const size_t n_cols = (size_t)weight->n_cols;
    const bool is_few = n_rows <= FEW_TOKENS;
    if (is_few) next = fb_weight_panel(weight, panel) + READ_AHEAD;
    if (fb_is_quantized(weight->dtype))
        linear->kernels->gemm_blocks(weight->dtype, fb_weight_panel(weight, panel), n_panels, n_cols,
            linear->activations + row * linear->ld_activations, linear->ld_activations, n_rows, tile, ld);
    else if (fb_takes_pairs(weight))
        linear->kernels->gemm_pairs(fb_weight_plain(weight, panel), n_panels, n_cols,
            linear->pairs + row * linear->ld_pairs, linear->ld_pairs, n_rows, tile, ld, false, is_few ? next : NULL);
    else
        linear->kernels->gemm[weight->dtype](fb_weight_plain(weight, panel), n_panels, n_cols,
            linear->x + row * linear->ldx, linear->ldx, n_rows, tile, ld, false, next);
}

void fb_linear_item(const struct fb_linear *linear, int64_t index) {
    const size_t blocks = (linear->n_tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK, item_panels = linear->item_panels;
    const size_t first_panel = (size_t)index / blocks * item_panels, first_token = (size_t)index % blocks * TOKEN_BLOCK;
    const size_t rest_panels = (size_t)linear->weight->n_panels - first_panel;
    const size_t rest_tokens = linear->n_tokens - first_token;
    const size_t n_panels = rest_panels < item_panels ? rest_panels : item_panels;
    const size_t n_tokens = rest_tokens < TOKEN_BLOCK ? rest_tokens : TOKEN_BLOCK;

    float tile[TOKEN_BLOCK * MAX_PANELS * FB_LANES];
    const size_t ld = n_panels * FB_LANES;
    const struct fb_weight *weight = linear->weight;
    const bool has_next = first_panel + n_panels < (size_t)weight->n_panels;
    const char *next = has_next ? fb_weight_panel(weight, first_panel + n_panels) : NULL;
    fb_linear_multiply(linear, first_panel, n_panels, first_token, n_tokens, next, tile, ld);

    const size_t outputs = linear->is_gated ? ld / 2 : ld; /* per token */
    const size_t column = linear->is_gated ? first_panel / 2 * FB_LANES : first_panel * FB_LANES;
    if (column >= linear->width) return;
    const size_t count = linear->width - column < outputs ? linear->width - column : outputs;
    const size_t n_biased = (size_t)linear->weight->n_rows - first_panel * FB_LANES < ld
                                ? (size_t)linear->weight->n_rows - first_panel * FB_LANES
                                : ld;
    for (size_t t = 0; t < n_tokens; t++) {
        float *result = tile + t * ld;
        if (linear->bias) linear->kernels->add(result, linear->bias + first_panel * FB_LANES, n_biased);
        if (linear->is_gated)
            for (size_t p = 0; p + 1 < n_panels; p += 2)
                fb_linear_gate(linear, result + p * FB_LANES, result + p / 2 * FB_LANES);
        else if (linear->activation)
            linear->kernels->activate[linear->activation](result, count, linear->numbers);
        if (linear->scale != 1.0f && linear->soft_cap == 0.0f) linear->kernels->scale(result, count, linear->scale);
        if (linear->residual)
            linear->kernels->add(result, linear->residual + (first_token + t) * linear->ld_residual + column, count);
        if (linear->non_finite && !all_finite(result, count))
            atomic_store_explicit(linear->non_finite, 1, memory_order_relaxed);
        if (linear->soft_cap > 0.0f) linear->kernels->soft_cap(result, count, linear->scale, linear->soft_cap);
        memcpy(linear->out + (first_token + t) * linear->ld_out + column, result, count * sizeof *result);
    }
}
