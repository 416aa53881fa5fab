/*
 * elementwise.h - activations, soft caps, means and layer norm. reference.c and simd.h include it behind vocabulary.h, so one
 * source is compiled for every instruction set, and gives the same bits: lanes are independent and nothing is fused.
 *
 * Errors, against exact functions of the f32 input: exp and tanh about 2e-7 of the result, erf 1.5e-7 in all. NaN stays
 * NaN, so damaged weights are found in the logits.
 *
 * Defines activate_*, soft_cap, softplus, layer_norm, sparsify and mean_square (contracts in kernels.h), and ELEMENTWISE_KERNELS, their entries in the
 * table. Tested by test_kernels for every table.
 */
/* Vectors are passed by pointer: by value, a function's ABI would depend on the registers that it is compiled for. */

static inline void select_16(const u16x *mask, const f16x *yes, f16x *no) {
    *no = (f16x)(((u16x)*yes & *mask) | ((u16x)*no & ~*mask));
}

/* exp by exp.h, over the whole range; 0 below FB_EXP_LOW. */
static inline void exp_16(f16x *x) {
    const f16x zero = {0}, low = FB_EXP_LOW - zero, high = FB_EXP_HIGH - zero;
    const u16x is_high = (u16x)(*x > high), is_low = (u16x)(*x < low);
    select_16(&is_high, &high, x);
    select_16(&is_low, &low, x);
    const f16x shifted = *x * FB_EXP_LOG2E + FB_EXP_ROUND, n = shifted - FB_EXP_ROUND;
    const f16x r = (*x - n * FB_EXP_LN2_HI) - n * FB_EXP_LN2_LO, rr = r * r;
    const f16x p = ((FB_EXP_P0 * r + FB_EXP_P1) * rr + (FB_EXP_P2 * r + FB_EXP_P3)) * rr + (FB_EXP_P4 * r + FB_EXP_P5);
    const f16x e = p * rr + (r + 1.0f);
    *x = e * (f16x)(((u16x)shifted + 127) << 23);
    select_16(&is_low, &zero, x);
}

/* tanh: Cephes' polynomial below 0.625, else by exp (Moshier, netlib cephes/single/tanhf.c). */
static inline void tanh_16(f16x *x) {
    const u16x sign = (u16x)*x & 0x80000000u;
    const f16x z = (f16x)((u16x)*x ^ sign), s = z * z;
    f16x p = -5.70498872745e-3f * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    f16x small = p * s * z + z, large = z + z;
    exp_16(&large);
    large = 1.0f - 2.0f / (large + 1.0f);
    const u16x is_large = (u16x)(z >= 0.625f);
    select_16(&is_large, &large, &small);
    *x = (f16x)((u16x)small | sign);
}

/* erf, by Abramowitz & Stegun 7.1.26. */
static inline void erf_16(f16x *x) {
    const u16x sign = (u16x)*x & 0x80000000u;
    const f16x z = (f16x)((u16x)*x ^ sign), t = 1.0f / (1.0f + 0.3275911f * z);
    f16x p = 1.061405429f * t - 1.453152027f, e = -(z * z);
    exp_16(&e);
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    *x = (f16x)((u16x)(1.0f - p * t * e) | sign);
}

/* x / (1 + e^-u) */
static inline void weigh_16(f16x *x, const f16x *u) {
    f16x e = -*u;
    exp_16(&e);
    *x = *x / (1.0f + e);
}

static inline void sigmoid_16(f16x *x, const float *numbers) {
    (void)numbers;
    const f16x u = *x;
    *x = 1.0f - (f16x){0};
    weigh_16(x, &u);
}

static inline void silu_16(f16x *x, const float *numbers) {
    (void)numbers;
    const f16x u = *x;
    weigh_16(x, &u);
}

/* x / 2 (1 + tanh(u)) = x / (1 + e^-2u),  u = sqrt(2 / pi) (x + 0.044715 x^3) */
static inline void gelu_tanh_16(f16x *x, const float *numbers) {
    (void)numbers;
    const f16x u = 1.595769121605731f * (*x + 0.044715f * (*x * *x * *x));
    weigh_16(x, &u);
}

static inline void gelu_16(f16x *x, const float *numbers) {
    (void)numbers;
    f16x e = *x * 0.707106781186548f;
    erf_16(&e);
    *x = 0.5f * *x * (1.0f + e);
}

static inline void relu_16(f16x *x, const float *numbers) {
    (void)numbers;
    *x = (f16x)((u16x)*x & ~(u16x)(*x <= 0.0f)); /* NaN stays */
}

static inline void relu2_16(f16x *x, const float *numbers) {
    relu_16(x, numbers);
    *x = *x * *x;
}

static inline void clamp_16(f16x *x, const float *numbers) {
    const f16x high = numbers[0] - (f16x){0}, low = -high;
    const u16x is_high = (u16x)(*x > high), is_low = (u16x)(*x < low);
    select_16(&is_high, &high, x);
    select_16(&is_low, &low, x);
}

static inline void xielu_16(f16x *x, const float *numbers) {
    const float a = numbers[0], b = numbers[1], c = numbers[2];
    const f16x most = numbers[3] - (f16x){0}, positive = a * *x * *x;
    f16x e = *x;
    const u16x is_high = (u16x)(*x > most), is_positive = (u16x)(*x > 0.0f);
    select_16(&is_high, &most, &e);
    exp_16(&e);
    e = (e - 1.0f - *x) * c;
    select_16(&is_positive, &positive, &e);
    *x = e + b * *x;
}

static inline void plain_tanh_16(f16x *x, const float *numbers) {
    (void)numbers;
    tanh_16(x);
}

/* log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|. The logarithm is 2 atanh(s) = 2 (s + s^3 / 3 + ...), s = y / (2 + y):
 * s is at most 1/3, so the terms left out are below 1e-9 of the sum. */
static inline void softplus_16(f16x *x, const float *numbers) {
    (void)numbers;
    const f16x zero = {0};
    f16x most = zero, y = (f16x)((u16x)*x | 0x80000000u);
    const u16x is_positive = (u16x)(*x > 0.0f);
    select_16(&is_positive, x, &most);
    exp_16(&y);
    const f16x s = y / (2.0f + y), z = s * s;
    f16x p = z * (1.0f / 15.0f) + 1.0f / 13.0f;
    p = p * z + 1.0f / 11.0f;
    p = p * z + 1.0f / 9.0f;
    p = p * z + 1.0f / 7.0f;
    p = p * z + 1.0f / 5.0f;
    p = p * z + 1.0f / 3.0f;
    *x = most + (s + s) * (p * z + 1.0f);
}

/* numbers: the factor of x, and the cap. */
static inline void cap_16(f16x *x, const float *numbers) {
    *x = *x * numbers[0];
    tanh_16(x);
    *x = *x * numbers[1];
}

/* Defines a kernel that applies a function of 16 numbers. */
#define ELEMENTWISE(name, function)                                                                                    \
    static void name(float *x, size_t n, const float *numbers) {                                                       \
        size_t i = 0;                                                                                                  \
        for (; i + FB_LANES <= n; i += FB_LANES) {                                                                     \
            f16x in;                                                                                                   \
            memcpy(&in, x + i, sizeof in);                                                                             \
            function(&in, numbers);                                                                                    \
            memcpy(x + i, &in, sizeof in);                                                                             \
        }                                                                                                              \
        if (i == n) return;                                                                                            \
        f16x rest = {0};                                                                                               \
        memcpy(&rest, x + i, (n - i) * sizeof *x);                                                                     \
        function(&rest, numbers);                                                                                      \
        memcpy(x + i, &rest, (n - i) * sizeof *x);                                                                     \
    }
ELEMENTWISE(activate_silu, silu_16)
ELEMENTWISE(activate_gelu_tanh, gelu_tanh_16)
ELEMENTWISE(activate_gelu, gelu_16)
ELEMENTWISE(activate_relu, relu_16)
ELEMENTWISE(activate_relu2, relu2_16)
ELEMENTWISE(activate_clamp, clamp_16)
ELEMENTWISE(activate_xielu, xielu_16)
ELEMENTWISE(activate_sigmoid, sigmoid_16)
ELEMENTWISE(activate_tanh, plain_tanh_16)
ELEMENTWISE(apply_cap, cap_16)
ELEMENTWISE(apply_softplus, softplus_16)
#undef ELEMENTWISE

static void soft_cap(float *x, size_t n, float factor, float cap) {
    const float numbers[2] = {factor / cap, cap};
    apply_cap(x, n, numbers);
}

static void softplus(float *x, size_t n) {
    apply_softplus(x, n, NULL);
}

static inline float fold_16(const f16x *lanes) {
    float all[FB_LANES];
    memcpy(all, lanes, sizeof all);
    return fb_fold(all);
}

/* Returns the variance. */
static inline float moments(const float *x, size_t n, float *mean_of) {
    f16x sum = {0}, squares = {0}, in;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        memcpy(&in, x + i, sizeof in);
        sum += in;
    }
    for (size_t k = i; k < n; k++)
        sum[k - i] += x[k];
    const float mean = fold_16(&sum) / (float)n;
    for (i = 0; i + 16 <= n; i += 16) {
        memcpy(&in, x + i, sizeof in);
        in -= mean;
        squares += in * in;
    }
    for (size_t k = i; k < n; k++)
        squares[k - i] += (x[k] - mean) * (x[k] - mean);
    *mean_of = mean;
    return fold_16(&squares) / (float)n;
}

static void layer_norm(const float *x, const float *weight, const float *bias, size_t n, float eps, float *out) {
    float mean;
    const float factor = 1.0f / sqrtf(moments(x, n, &mean) + eps);
    for (size_t k = 0; k < n; k++)
        out[k] = (x[k] - mean) * factor * weight[k] + bias[k];
}

static void sparsify(const float *x, size_t n, float factor, float *out) {
    float mean;
    const float deviation = sqrtf(moments(x, n, &mean)), least = mean + factor * deviation;
    for (size_t k = 0; k < n; k++)
        out[k] = x[k] <= least ? 0.0f : x[k] - least; /* NaN stays */
}

static float mean_square(const float *x, size_t n) {
    f16x squares = {0}, in;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        memcpy(&in, x + i, sizeof in);
        squares += in * in;
    }
    for (size_t k = i; k < n; k++)
        squares[k - i] += x[k] * x[k];
    return fold_16(&squares) / (float)n;
}

#define ELEMENTWISE_KERNELS                                                                                            \
    .activate = {[FB_ACTIVATION_SILU] = activate_silu,                                                                 \
        [FB_ACTIVATION_GELU_TANH] = activate_gelu_tanh,                                                                \
        [FB_ACTIVATION_GELU] = activate_gelu,                                                                          \
        [FB_ACTIVATION_RELU] = activate_relu,                                                                          \
        [FB_ACTIVATION_RELU2] = activate_relu2,                                                                        \
        [FB_ACTIVATION_CLAMP] = activate_clamp,                                                                        \
        [FB_ACTIVATION_XIELU] = activate_xielu,                                                                        \
        [FB_ACTIVATION_SIGMOID] = activate_sigmoid,                                                                    \
        [FB_ACTIVATION_TANH] = activate_tanh},                                                                         \
    .soft_cap = soft_cap, .softplus = softplus, .layer_norm = layer_norm, .sparsify = sparsify,                        \
    .mean_square = mean_square
