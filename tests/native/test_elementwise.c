/*
 * test_elementwise.c - activations, softplus, soft cap and layer norm: the reference against exact functions in double, and every
 * table of this CPU against the reference, bit for bit, for sizes with and without a rest, and for NaN and infinity.
 */
#include "check.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

enum { MOST = 67 };

static const float numbers[FB_ACTIVATION_KINDS][FB_ACTIVATION_NUMBERS] = {
    [FB_ACTIVATION_CLAMP] = {1.5f}, [FB_ACTIVATION_XIELU] = {0.8f, 0.5f, 1.3f, -1e-6f}};

static double exact(enum fb_activation_kind kind, double x) {
    const float *n = numbers[kind];
    switch (kind) {
    case FB_ACTIVATION_SILU:
        return x / (1.0 + exp(-x));
    case FB_ACTIVATION_GELU_TANH:
        return x / 2.0 * (1.0 + tanh(sqrt(2.0 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case FB_ACTIVATION_GELU:
        return x / 2.0 * (1.0 + erf(x / sqrt(2.0)));
    case FB_ACTIVATION_RELU:
        return x > 0.0 ? x : 0.0;
    case FB_ACTIVATION_RELU2:
        return x > 0.0 ? x * x : 0.0;
    case FB_ACTIVATION_CLAMP:
        return fmin(fmax(x, -(double)n[0]), (double)n[0]);
    case FB_ACTIVATION_XIELU:
        return x > 0.0 ? (double)n[0] * x * x + (double)n[1] * x
                       : (double)n[2] * (expm1(fmin(x, (double)n[3])) - x) + (double)n[1] * x;
    case FB_ACTIVATION_SIGMOID:
        return 1.0 / (1.0 + exp(-x));
    default:
        return tanh(x);
    }
}

/* Errors of exp and erf (elementwise.h) are relative to results of about the input's size. */
static double bound(double x, double result) {
    return 4e-7 * (fabs(x) > 1.0 ? fabs(x) : 1.0) + 1e-6 * fabs(result);
}

static void fill(float *x, size_t n, float size, int shift) {
    for (size_t i = 0; i < n; i++)
        x[i] = size * sinf((float)(i * i) + (float)shift * 0.37f);
}

static void check_values(void) {
    const struct fb_kernels *kernels = fb_kernels_of(FB_ISA_REFERENCE);
    for (int kind = FB_ACTIVATION_SILU; kind <= FB_ACTIVATION_TANH; kind++)
        for (int step = -4000; step <= 4000; step++) {
            const float x = (float)step / 200.0f;
            float y = x;
            kernels->activate[kind](&y, 1, numbers[kind]);
            const double wanted = exact(kind, (double)x);
            CHECK_AT(fabs((double)y - wanted) <= bound((double)x, wanted), "kind %d, x %g: %g, not %g", kind, (double)x,
                (double)y, wanted);
        }
    for (int step = -4000; step <= 4000; step++) {
        const float x = (float)step / 20.0f;
        float y = x;
        kernels->soft_cap(&y, 1, 0.25f, 30.0f);
        const double wanted = 30.0 * tanh((double)x * 0.25 / 30.0);
        CHECK_AT(fabs((double)y - wanted) <= 1e-6 * fabs(wanted), "soft cap of %g: %g, not %g", (double)x, (double)y,
            wanted);
    }
    for (int step = -4000; step <= 4000; step++) {
        const float x = (float)step / 40.0f;
        float y = x;
        kernels->softplus(&y, 1);
        const double wanted = x > 0.0f ? (double)x + log1p(exp(-(double)x)) : log1p(exp((double)x));
        CHECK_AT(fabs((double)y - wanted) <= 1e-6 * wanted || (x < -87.0f && y == 0.0f), "softplus of %g: %g, not %g",
            (double)x, (double)y, wanted);
    }
    float x[MOST], weight[MOST], bias[MOST], out[MOST];
    fill(x, MOST, 3.0f, 1);
    fill(weight, MOST, 1.0f, 2);
    fill(bias, MOST, 1.0f, 3);
    for (size_t n = 1; n <= MOST; n++) {
        double mean = 0.0, variance = 0.0, square = 0.0;
        for (size_t i = 0; i < n; i++)
            mean += (double)x[i] / (double)n;
        for (size_t i = 0; i < n; i++)
            variance += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)n;
        for (size_t i = 0; i < n; i++)
            square += (double)x[i] * (double)x[i] / (double)n;
        const double found = (double)kernels->mean_square(x, n);
        CHECK_AT(fabs(found - square) <= 1e-6 * square, "mean square of %zu: %g, not %g", n, found, square);
        kernels->layer_norm(x, weight, bias, n, 1e-5f, out);
        for (size_t i = 0; i < n; i++) {
            const double wanted = ((double)x[i] - mean) / sqrt(variance + 1e-5) * (double)weight[i] + (double)bias[i];
            CHECK_AT(fabs((double)out[i] - wanted) <= 2e-5, "layer norm of %zu: %g, not %g", n, (double)out[i], wanted);
        }
    }
}

static bool same(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0 && !(isnan(a[i]) && isnan(b[i]))) return false;
    return true;
}

static void check_table(enum fb_isa isa) {
    static const float special[] = {
        0.0f, -0.0f, 1e-40f, 3.4e38f, -3.4e38f, INFINITY, -INFINITY, NAN, 0.625f, -87.5f, 89.0f};
    const struct fb_kernels *kernels = fb_kernels_of(isa), *reference = fb_kernels_of(FB_ISA_REFERENCE);
    float x[MOST], got[MOST], wanted[MOST], weight[MOST], bias[MOST];
    fill(weight, MOST, 1.0f, 5);
    fill(bias, MOST, 1.0f, 6);
    for (size_t n = 0; n <= MOST; n++) {
        fill(x, n, 12.0f, (int)n);
        for (size_t i = 0; i < n; i += 5)
            if (n % 2) x[i] = special[(i + n) % (sizeof special / sizeof *special)];
        for (int kind = FB_ACTIVATION_SILU; kind <= FB_ACTIVATION_TANH; kind++) {
            memcpy(got, x, sizeof got);
            memcpy(wanted, x, sizeof wanted);
            kernels->activate[kind](got, n, numbers[kind]);
            reference->activate[kind](wanted, n, numbers[kind]);
            CHECK_AT(same(got, wanted, n), "isa %d, activation %d of %zu", (int)isa, kind, n);
            for (size_t i = 0; i < n; i++)
                CHECK_AT(!isnan(x[i]) || isnan(got[i]), "isa %d, activation %d loses NaN", (int)isa, kind);
        }
        memcpy(got, x, sizeof got);
        memcpy(wanted, x, sizeof wanted);
        kernels->soft_cap(got, n, 0.3f, 20.0f);
        reference->soft_cap(wanted, n, 0.3f, 20.0f);
        CHECK_AT(same(got, wanted, n), "isa %d, soft cap of %zu", (int)isa, n);
        memcpy(got, x, sizeof got);
        memcpy(wanted, x, sizeof wanted);
        kernels->softplus(got, n);
        reference->softplus(wanted, n);
        CHECK_AT(same(got, wanted, n), "isa %d, softplus of %zu", (int)isa, n);
        for (size_t i = 0; i < n; i++)
            CHECK_AT(!isnan(x[i]) || isnan(got[i]), "isa %d, softplus loses NaN", (int)isa);
        kernels->layer_norm(x, weight, bias, n, 1e-6f, got);
        reference->layer_norm(x, weight, bias, n, 1e-6f, wanted);
        CHECK_AT(same(got, wanted, n), "isa %d, layer norm of %zu", (int)isa, n);
        kernels->sparsify(x, n, 0.8f, got);
        reference->sparsify(x, n, 0.8f, wanted);
        CHECK_AT(same(got, wanted, n), "isa %d, sparsify of %zu", (int)isa, n);
        got[0] = kernels->mean_square(x, n);
        wanted[0] = reference->mean_square(x, n);
        CHECK_AT(same(got, wanted, 1), "isa %d, mean square of %zu", (int)isa, n);
    }
}

int main(void) {
    check_values();
    for (int isa = FB_ISA_AVX2; isa <= FB_ISA_AVX512_AMX; isa++)
        if (fb_isa_available(isa)) check_table(isa);
    return check_result();
}
