/*
 * kernels.h - the inner loops, as a table of function pointers with one contract each.
 *
 * reference.c fills the whole table with plain loops and is the specification; the fast tables (avx2.h,
 * avx512.h, neon.h) give the SAME BITS. That is possible because every sum has one fixed order, defined here:
 *
 *   products   an output of a matrix product starts at 0 (or at y, when accumulating) and adds its terms one
 *              by one in order of k, each with a fused multiply-add. Rows of a panel and tokens of a tile run
 *              in parallel in registers, but never share a sum.
 *   blocks     of quantized weights: activations are quantized to 8 bits in blocks of 32 with one scale. Dot
 *              products within a group of 16 or 32 columns are integers and so exact. An output adds them
 *              group by group:
 *                 y = fma(dot - zero * sum of codes, weight scale * activation scale, y)
 *                 y = fma(weight offset, activation scale * sum of codes, y)        formats with an offset
 *   pairs      products of bf16 weights and inputs rounded to bf16: as products, but of each pair of columns
 *              the second is added first. Numbers and sums below the smallest normal f32 may count as zero,
 *              as the CPU's instructions for it do. Where a CPU lacks those, bf16 weights are faster as
 *              `products` with inputs in f32, which gives other bits: a weight says which it takes.
 *   sums       a sum over n numbers runs in 16 lanes (number i in lane i % 16), which are then folded:
 *              lane j + lane j+8, then +4, +2, +1.
 *   exp        one polynomial, the same operations in the same order everywhere (see exp.h).
 *
 * So a token's result does not depend on its batch, on the number of threads or on the CPU's vector length.
 *
 * Kernels take pointers and sizes and compute numbers: no allocation, I/O, threads, globals or failure.
 * Pointers need only their element's alignment. Sizes may be any number, including 0.
 */
#ifndef FABULA_KERNELS_H
#define FABULA_KERNELS_H

#include "base/exported.h"
#include "fabula.h"
#include "quant/layout.h"

enum { FB_LANES = 16 }; /* rows of a panel, lanes of a sum */

/* The plain formats F32, F16 and BF16, which `narrow`, `widen` and `gemm` take. */
enum { FB_KERNEL_DTYPES = 3 };

/* Kinds of activations; numbers that one takes (xielu), at most. */
enum { FB_ACTIVATION_KINDS = FB_ACTIVATION_CLAMPED_SILU + 1, FB_ACTIVATION_NUMBERS = 4 };

/* Bytes per panel element of these formats, or of signed bytes, which use the number of Q8_0. */
static inline size_t fb_element_bytes(enum fb_dtype dtype) {
    return dtype == FB_F32 ? 4 : dtype == FB_Q8_0 ? 1 : 2;
}

/* Panels of a plain format. A line is one column of a panel (16 elements), in bf16 a pair of columns (32).
 * Panels of K and V are stored one after another (width 1). Panels of weights are interleaved in pairs (width
 * 2), so that two independent sums read one stream of memory.
 *
 *     width 1    panel 0: line 0, line 1, ...                            panel 1: line 0, line 1, ...
 *     width 2    panels 0 and 1: line 0 of both, line 1 of both, ...     panels 2 and 3: ... */
struct fb_panels {
    const void *first;
    size_t width;
    size_t stride; /* elements from panel to panel; width 2: half the elements from one pair to the next */
};

/* Index of a panel's first element. */
static inline size_t fb_panel_at(const struct fb_panels *panels, size_t line, size_t p) {
    return p / panels->width * panels->width * panels->stride + p % panels->width * line;
}

/* y[t][16 p + j] = (accumulate ? y : 0) + sum over k of panel_p[k][j] * x[t][k]
 *   panels   n_panels panels of [n_k][16] elements; of bf16 [(n_k + 1) / 2][16] pairs of columns
 *   x        [n_tokens][ldx], its first n_k columns used
 *   y        [n_tokens][ldy], its first 16 n_panels columns used
 *   next     prefetched meanwhile, in the same steps: panels of the same shape that are read next, or these
 *            themselves some bytes ahead; NULL for none. May go beyond the end of the weight */
typedef void (*fb_gemm_kernel)(struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx,
    size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next);

/* 32 neighboring activations of a token, one cache line: x is about scale * code. sums[0] is the whole block,
 * sums[1] and sums[2] its halves of 16. */
struct fb_activation {
    int8_t codes[FB_BLOCK_COLUMNS]; /* -127 .. 127 */
    float scale;                    /* largest magnitude / 127; NaN if a number was NaN or infinite */
    float sums[3];                  /* scale * (sum of codes) */
    int32_t minus_sums[3];          /* -(sum of codes) */
    int32_t unused;
};

/* y[t][16 p + j] = row 16 p + j of panels of quantized blocks (layout.h), times token t
 *   panels   n_panels panels of fb_panel_bytes(dtype, n_cols)
 *   x        [n_tokens][ldx] blocks, the first n_cols / 32 used
 *   y        [n_tokens][ldy], its first 16 n_panels columns used */
typedef void (*fb_gemm_blocks_kernel)(enum fb_dtype dtype, const char *panels, size_t n_panels, size_t n_cols,
    const struct fb_activation *x, size_t ldx, size_t n_tokens, float *y, size_t ldy);

/* y[t][16 p + j] = (accumulate ? y : 0) + row 16 p + j of panels of bf16, times token t
 *   panels   n_panels panels of [(n_cols + 1) / 2][16] pairs of columns; if n_cols is odd, the second column
 *            of the last pair may be any finite number
 *   x        [n_tokens][ldx], from narrow_pairs;   y  [n_tokens][ldy], its first 16 n_panels columns used
 *   next     as above */
typedef void (*fb_gemm_pairs_kernel)(struct fb_panels panels, size_t n_panels, size_t n_cols, const uint16_t *x,
    size_t ldx, size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next);

/* Quantizes 32 n_blocks numbers: codes are x / scale, rounded to even. Magnitudes below 1e-30 count
 * as zero. */
typedef void (*fb_quantize_kernel)(const float *x, size_t n_blocks, struct fb_activation *out);

/* Some tokens of a head with the gated delta rule, and some columns of its state S [k_dim][n_cols]. */
struct fb_delta_rule {
    const float *q, *k;        /* [n_tokens][k_dim], normed */
    const float *decay, *beta; /* [n_tokens] */
    const float *v;            /* [n_tokens][ldv] */
    float *out;                /* [n_tokens][ld_out] */
    const float *from;         /* [n_cols / 16, rounded up][k_dim][16]: S before the first token */
    float *to;                 /* and behind the last; may be `from` */
    size_t ldv, ld_out, n_tokens, k_dim, n_cols;
};

/* The same of a state space model: its rows are those of B and C. */
struct fb_ssm {
    const float *b;     /* [n_tokens][k_dim], multiplied by dt */
    const float *c;     /* [n_tokens][ldc] */
    const float *decay; /* [n_tokens] */
    const float *x;     /* [n_tokens][ldx] */
    float *out;         /* [n_tokens][ld_out] */
    const float *from;  /* as of struct fb_delta_rule */
    float *to;
    float skip; /* D */
    size_t ldc, ldx, ld_out, n_tokens, k_dim, n_cols;
};

struct fb_kernels {
    fb_gemm_kernel gemm[FB_KERNEL_DTYPES];
    fb_gemm_kernel gemm_bytes; /* panels of signed bytes, used as integers */
    fb_gemm_blocks_kernel gemm_blocks;
    fb_quantize_kernel quantize;
    fb_gemm_pairs_kernel gemm_pairs;
    void (*narrow_pairs)(const float *x, size_t n, uint16_t *out); /* to bf16; if n is odd, followed by a 0 */

    /* out = (x * (1 / sqrt(sum(x^2) / n + eps))) * weight; out may be x */
    void (*rms_norm)(const float *x, const float *weight, size_t n, float eps, float *out);

    /* largest of n >= 1 numbers; NaN is ignored unless all are NaN */
    float (*max)(const float *x, size_t n);

    /* out = exp(x * scale - shift); returns the sum of out; out may be x */
    float (*exp_sum)(const float *x, size_t n, float scale, float shift, float *out);

    /* x = x * factor */
    void (*scale)(float *x, size_t n, float factor);

    /* a = fma(b, b_factor, a * a_factor): merges two partial attention results */
    void (*merge)(float *a, float a_factor, const float *b, float b_factor, size_t n);

    /* y = y + x;  y = y x */
    void (*add)(float *y, const float *x, size_t n);
    void (*multiply)(float *y, const float *x, size_t n);

    /* out = gate / (1 + exp(-gate)) * up; out may be gate or up */
    void (*swiglu)(const float *gate, const float *up, size_t n, float *out);

    /* out[c] = bias[c] + sum over i of weights[i ld_weights + c] x[i ldx + c], for n columns: starts at the bias (NULL:
     * 0) and adds n_taps products, each with a fused multiply-add */
    void (*short_conv)(const float *x, size_t ldx, const float *weights, size_t ld_weights, const float *bias,
        size_t n_taps, size_t n, float *out);

    /* Token by token, each sum from 0 over i in order by fused multiply-adds:
     *     S[i] = S[i] decay;  sum = sum over i of S[i] k[i];  d = (v - sum) beta
     *     S[i] = fma(k[i], d, S[i]);  out = sum over i of S[i] q[i] */
    void (*delta_rule)(const struct fb_delta_rule *rule);

    /* Likewise:  S[i] = fma(b[i], x, S[i] decay);  out = fma(x, skip, sum over i of S[i] c[i]) */
    void (*ssm)(const struct fb_ssm *ssm);

    /* (a, b) = (fma(a, cos, -(b sin)), fma(b, cos, a sin)) for n pairs */
    void (*rotate)(float *a, float *b, const float *cos, const float *sin, size_t n);

    /* Elementwise functions in place (elementwise.h), by enum fb_activation_kind; NULL for NONE. numbers: the limit of
     * clamp, the four numbers of xielu. soft_cap: x = cap tanh(x factor / cap). */
    void (*activate[FB_ACTIVATION_KINDS])(float *x, size_t n, const float *numbers);
    void (*soft_cap)(float *x, size_t n, float factor, float cap);

    /* x = log(1 + e^x) */
    void (*softplus)(float *x, size_t n);

    /* out = (x - mean) * (1 / sqrt(sum((x - mean)^2) / n + eps)) * weight + bias; out may be x. Both sums run in 16
     * lanes, without fused multiply-adds. */
    void (*layer_norm)(const float *x, const float *weight, const float *bias, size_t n, float eps, float *out);

    /* out = max(x - (mean + factor * sqrt(variance)), 0), means as above; out may be x */
    void (*sparsify)(const float *x, size_t n, float factor, float *out);

    /* sum(x^2) / n, likewise */
    float (*mean_square)(const float *x, size_t n);

    /* Loops over a vocabulary (vocabulary.h). top_logit: the largest of n logits; false if one is NaN or
     * +infinity. highest: the largest of n. */
    bool (*top_logit)(const float *logits, size_t n, float *top);
    double (*highest)(const double *x, size_t n);
    void (*to_double)(const float *x, size_t n, double *out);
    /* weight = exp(logit - top), for logits <= top; sum of weights, in 8 lanes;
     * log(sum(exp(logits - top))) */
    void (*exp_weights)(const double *logit, size_t n, double top, double *weight);
    double (*weight_sum)(const double *weight, size_t n);
    double (*log_sum_exp)(const float *logits, size_t n, float top);

    /* f32 to and from a weight format, rounding to nearest even */
    void (*narrow[FB_KERNEL_DTYPES])(const float *x, size_t n, void *out);
    void (*widen[FB_KERNEL_DTYPES])(const void *x, size_t n, float *out);
};

/* The table of an instruction set (resolve AUTO first). Never NULL. */
FB_EXPORTED const struct fb_kernels *fb_kernels_of(enum fb_isa isa);

/* Resolves AUTO to the best set. FB_INVALID_ARGUMENT for a value outside the enum, FB_UNSUPPORTED for a set
 * that this CPU lacks. */
FB_EXPORTED enum fb_status fb_isa_resolve(enum fb_isa wanted, enum fb_isa *out);

/* Whether a table's products of quantized weights equal the reference's bit for bit, on a small matrix of
 * each kind of layout. */
bool fb_kernels_agree(const struct fb_kernels *kernels);

extern const struct fb_kernels fb_kernels_reference;
#if defined(__x86_64__)
extern const struct fb_kernels fb_kernels_avx2;
extern const struct fb_kernels fb_kernels_avx_vnni;
extern const struct fb_kernels fb_kernels_avx512;
extern const struct fb_kernels fb_kernels_avx512_vnni;
extern const struct fb_kernels fb_kernels_avx512_bf16;
#ifdef FABULA_AMX /* the compiler knows the instructions */
extern const struct fb_kernels fb_kernels_avx512_amx;
#endif
#elif defined(__aarch64__)
extern const struct fb_kernels fb_kernels_neon;
extern const struct fb_kernels fb_kernels_neon_dotprod;
extern const struct fb_kernels fb_kernels_neon_i8mm;
#endif

/* Defined by reference_blocks.c for the table of reference.c. */
void fb_reference_gemm_blocks(enum fb_dtype dtype, const char *panels, size_t n_panels, size_t n_cols,
    const struct fb_activation *x, size_t ldx, size_t n_tokens, float *y, size_t ldy);
void fb_reference_quantize(const float *x, size_t n_blocks, struct fb_activation *out);

/* Folds 16 lanes into one sum, in the order defined above. */
static inline float fb_fold(const float lanes[FB_LANES]) {
    float s[8];
    for (int j = 0; j < 8; j++)
        s[j] = lanes[j] + lanes[j + 8];
    for (int step = 4; step >= 1; step /= 2)
        for (int j = 0; j < step; j++)
            s[j] += s[j + step];
    return s[0];
}

#endif
