/*
 * reference.c - every kernel as a plain loop: the specification that the fast ones are compared with, bit for
 * bit.
 *
 * Written to be read, not to be fast (fmaf may be a call on a CPU without the instruction). Contracts are in
 * kernels.h.
 */
#include "kernels/exp.h"
#include "kernels/kernels.h"
#include "quant/convert.h"

#include <math.h>
#include <string.h>

/* Columns of a line. */
static size_t columns_of(enum fb_dtype dtype) {
    return dtype == FB_BF16 ? 2 : 1;
}

/* Column k of lane j of the panel that begins at element `panel`. */
static float element(enum fb_dtype dtype, const struct fb_panels *panels, size_t panel, size_t j, size_t k) {
    const size_t columns = columns_of(dtype);
    const size_t index = panel + (k / columns * panels->width * FB_LANES + j) * columns + k % columns;
    if (dtype == FB_F32) return ((const float *)panels->first)[index];
    if (dtype == FB_Q8_0) return (float)((const int8_t *)panels->first)[index];
    const uint16_t half = ((const uint16_t *)panels->first)[index];
    return dtype == FB_BF16 ? fb_bf16_to_f32(half) : fb_f16_to_f32(half);
}

static void gemm(enum fb_dtype dtype, struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx,
    size_t n_tokens, float *y, size_t ldy, bool accumulate) {
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t p = 0; p < n_panels; p++)
            for (size_t j = 0; j < FB_LANES; j++) {
                float *out = &y[t * ldy + p * FB_LANES + j];
                float sum = accumulate ? *out : 0.0f;
                const size_t panel = fb_panel_at(&panels, FB_LANES * columns_of(dtype), p);
                for (size_t k = 0; k < n_k; k++)
                    sum = fmaf(element(dtype, &panels, panel, j, k), x[t * ldx + k], sum);
                *out = sum;
            }
}

static void gemm_f32(struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx, size_t n_tokens,
    float *y, size_t ldy, bool accumulate, const void *next) {
    (void)next;
    gemm(FB_F32, panels, n_panels, n_k, x, ldx, n_tokens, y, ldy, accumulate);
}

static void gemm_f16(struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx, size_t n_tokens,
    float *y, size_t ldy, bool accumulate, const void *next) {
    (void)next;
    gemm(FB_F16, panels, n_panels, n_k, x, ldx, n_tokens, y, ldy, accumulate);
}

static void gemm_bf16(struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx, size_t n_tokens,
    float *y, size_t ldy, bool accumulate, const void *next) {
    (void)next;
    gemm(FB_BF16, panels, n_panels, n_k, x, ldx, n_tokens, y, ldy, accumulate);
}

static void gemm_bytes(struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx,
    size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next) {
    (void)next;
    gemm(FB_Q8_0, panels, n_panels, n_k, x, ldx, n_tokens, y, ldy, accumulate);
}

static void gemm_pairs(struct fb_panels panels, size_t n_panels, size_t n_cols, const uint16_t *x, size_t ldx,
    size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next) {
    (void)next;
    const size_t n_pairs = (n_cols + 1) / 2;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t r = 0; r < n_panels * FB_LANES; r++) {
            const uint16_t *row = (const uint16_t *)panels.first + fb_panel_at(&panels, 2 * FB_LANES, r / FB_LANES) +
                                  r % FB_LANES * 2;
            float sum = accumulate ? y[t * ldy + r] : 0.0f;
            for (size_t k = 0; k < n_pairs; k++, row += panels.width * 2 * FB_LANES) {
                sum = fmaf(fb_bf16_to_f32(row[1]), fb_bf16_to_f32(x[t * ldx + 2 * k + 1]), sum);
                sum = fmaf(fb_bf16_to_f32(row[0]), fb_bf16_to_f32(x[t * ldx + 2 * k]), sum);
            }
            y[t * ldy + r] = sum;
        }
}

static void narrow_pairs(const float *x, size_t n, uint16_t *out) {
    for (size_t i = 0; i < n; i++)
        out[i] = fb_f32_to_bf16(x[i]);
    if (n % 2) out[n] = 0;
}

static void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out) {
    float lanes[FB_LANES] = {0};
    for (size_t i = 0; i < n; i++)
        lanes[i % FB_LANES] = fmaf(x[i], x[i], lanes[i % FB_LANES]);
    float factor = 1.0f / sqrtf(fb_fold(lanes) / (float)n + eps);
    for (size_t i = 0; i < n; i++)
        out[i] = x[i] * factor * weight[i];
}

static float max(const float *x, size_t n) {
    float best = -INFINITY;
    for (size_t i = 0; i < n; i++)
        best = x[i] > best ? x[i] : best;
    return best;
}

static float exp_f32(float x) {
    bool vanishes = x < FB_EXP_LOW;
    x = x > FB_EXP_HIGH ? FB_EXP_HIGH : x;
    x = vanishes ? FB_EXP_LOW : x;
    float n = nearbyintf(x * FB_EXP_LOG2E);
    float r = fmaf(n, -FB_EXP_LN2_HI, x);
    r = fmaf(n, -FB_EXP_LN2_LO, r);
    float p = FB_EXP_P0;
    p = fmaf(p, r, FB_EXP_P1);
    p = fmaf(p, r, FB_EXP_P2);
    p = fmaf(p, r, FB_EXP_P3);
    p = fmaf(p, r, FB_EXP_P4);
    p = fmaf(p, r, FB_EXP_P5);
    p = fmaf(p, r * r, r) + 1.0f;
    if (vanishes) return 0.0f;
    if (isnan(x)) return x;
    uint32_t power = (uint32_t)((int32_t)n + 127) << 23; /* 2^n */
    float factor;
    memcpy(&factor, &power, sizeof factor);
    return p * factor;
}

static float exp_sum(const float *x, size_t n, float scale, float shift, float *out) {
    float lanes[FB_LANES] = {0};
    for (size_t i = 0; i < n; i++) {
        out[i] = exp_f32(fmaf(x[i], scale, -shift));
        lanes[i % FB_LANES] += out[i];
    }
    return fb_fold(lanes);
}

static void scale(float *x, size_t n, float factor) {
    for (size_t i = 0; i < n; i++)
        x[i] *= factor;
}

static void merge(float *a, float a_factor, const float *b, float b_factor, size_t n) {
    for (size_t i = 0; i < n; i++)
        a[i] = fmaf(b[i], b_factor, a[i] * a_factor);
}

static void multiply(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        y[i] = y[i] * x[i];
}

static void add(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

static void swiglu(const float *gate, const float *up, size_t n, float *out) {
    for (size_t i = 0; i < n; i++)
        out[i] = gate[i] / (1.0f + exp_f32(-gate[i])) * up[i];
}

static void rotate(float *a, float *b, const float *cos, const float *sin, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float first = a[i], second = b[i];
        a[i] = fmaf(first, cos[i], -(second * sin[i]));
        b[i] = fmaf(second, cos[i], first * sin[i]);
    }
}

static void short_conv(const float *x, size_t ldx, const float *weights, size_t ld_weights, const float *bias,
    size_t n_taps, size_t n, float *out) {
    for (size_t c = 0; c < n; c++) {
        float sum = bias ? bias[c] : 0.0f;
        for (size_t i = 0; i < n_taps; i++)
            sum = fmaf(weights[i * ld_weights + c], x[i * ldx + c], sum);
        out[c] = sum;
    }
}

static void delta_rule(const struct fb_delta_rule *r) {
    const size_t block = r->k_dim * FB_LANES;
    for (size_t c = 0; c < r->n_cols; c++) {
        const float *from = r->from + c / FB_LANES * block + c % FB_LANES;
        float *to = r->to + c / FB_LANES * block + c % FB_LANES;
        for (size_t t = 0; t < r->n_tokens; t++, from = to) {
            const float *q = r->q + t * r->k_dim, *k = r->k + t * r->k_dim;
            float sum = 0.0f, out = 0.0f;
            for (size_t i = 0; i < r->k_dim; i++) {
                to[i * FB_LANES] = from[i * FB_LANES] * r->decay[t];
                sum = fmaf(to[i * FB_LANES], k[i], sum);
            }
            const float d = (r->v[t * r->ldv + c] - sum) * r->beta[t];
            for (size_t i = 0; i < r->k_dim; i++) {
                to[i * FB_LANES] = fmaf(k[i], d, to[i * FB_LANES]);
                out = fmaf(to[i * FB_LANES], q[i], out);
            }
            r->out[t * r->ld_out + c] = out;
        }
    }
}

static void ssm(const struct fb_ssm *r) {
    const size_t block = r->k_dim * FB_LANES;
    for (size_t col = 0; col < r->n_cols; col++) {
        const float *from = r->from + col / FB_LANES * block + col % FB_LANES;
        float *to = r->to + col / FB_LANES * block + col % FB_LANES;
        for (size_t t = 0; t < r->n_tokens; t++, from = to) {
            const float *b = r->b + t * r->k_dim, *c = r->c + t * r->ldc;
            const float x = r->x[t * r->ldx + col];
            float out = 0.0f;
            for (size_t i = 0; i < r->k_dim; i++) {
                to[i * FB_LANES] = fmaf(b[i], x, from[i * FB_LANES] * r->decay[t]);
                out = fmaf(to[i * FB_LANES], c[i], out);
            }
            r->out[t * r->ld_out + col] = fmaf(x, r->skip, out);
        }
    }
}

static void narrow_f32(const float *x, size_t n, void *out) {
    memcpy(out, x, n * sizeof *x);
}

static void narrow_f16(const float *x, size_t n, void *out) {
    for (size_t i = 0; i < n; i++)
        ((uint16_t *)out)[i] = fb_f32_to_f16(x[i]);
}

static void narrow_bf16(const float *x, size_t n, void *out) {
    for (size_t i = 0; i < n; i++)
        ((uint16_t *)out)[i] = fb_f32_to_bf16(x[i]);
}

static void widen_f32(const void *x, size_t n, float *out) {
    memcpy(out, x, n * sizeof *out);
}

static void widen_f16(const void *x, size_t n, float *out) {
    for (size_t i = 0; i < n; i++)
        out[i] = fb_f16_to_f32(((const uint16_t *)x)[i]);
}

static void widen_bf16(const void *x, size_t n, float *out) {
    for (size_t i = 0; i < n; i++)
        out[i] = fb_bf16_to_f32(((const uint16_t *)x)[i]);
}

#include "kernels/vocabulary.h"

#include "kernels/elementwise.h"

const struct fb_kernels fb_kernels_reference = {
    .gemm = {gemm_f32, gemm_f16, gemm_bf16},
    .gemm_bytes = gemm_bytes,
    .gemm_blocks = fb_reference_gemm_blocks,
    .quantize = fb_reference_quantize,
    .gemm_pairs = gemm_pairs,
    .narrow_pairs = narrow_pairs,
    .rms_norm = rms_norm,
    .max = max,
    .exp_sum = exp_sum,
    .scale = scale,
    .merge = merge,
    .add = add,
    .multiply = multiply,
    .swiglu = swiglu,
    .rotate = rotate,
    .short_conv = short_conv,
    .delta_rule = delta_rule,
    .ssm = ssm,
    .narrow = {narrow_f32, narrow_f16, narrow_bf16},
    .widen = {widen_f32, widen_f16, widen_bf16},
    VOCABULARY_KERNELS,
    ELEMENTWISE_KERNELS,
};
