/*
 * products.h - compares an implementation of products with loops in double over rows dequantized by the CPU,
 * and checks that a token gets the same bits in batches of every size.
 */
#ifndef FABULA_TESTS_CUDA_PRODUCTS_H
#define FABULA_TESTS_CUDA_PRODUCTS_H

#include "common.h"

#include <vector>

struct product {
    int (*multiply)(const fb_cuda_linear &);
    double tolerance; /* of a result's difference, relative to its size */
};

struct shape {
    int32_t n_rows, n_cols; /* with SwiGLU: rows of each half */
    bool swiglu, bias, residual;
};

/* `counts`, descending: how many of the last tokens a batch has. */
static inline void test_shape(const product &p, fb_dtype dtype, const shape &s, const std::vector<int32_t> &counts) {
    const int32_t n_rows = s.swiglu ? (s.n_rows + 15) / 16 * 32 : s.n_rows, most = counts[0];
    const size_t ldx = ((size_t)s.n_cols + 3) / 4 * 4 + 4, ld = (size_t)s.n_rows + 3;
    fb_weight *weight = random_weight(dtype, n_rows, s.n_cols, s.swiglu ? s.n_rows : 0);
    const device_weight on_device(weight);
    buffer<float> x((size_t)most * ldx), bias((size_t)n_rows), residual((size_t)most * ld), first((size_t)most * ld);
    fill(bias, 1.0f);
    fill(residual, 1.0f);
    for (size_t i = 0; i < x.n; i++)
        if (i % ldx < (size_t)s.n_cols) x[i] = random_number(s.swiglu ? 0.1f : 1.0f);

    /* The result of a loop over dequantized rows. */
    buffer<float> row((size_t)s.n_cols);
    buffer<double> sums((size_t)most * (size_t)n_rows), wanted((size_t)most * (size_t)s.n_rows);
    for (int32_t r = 0; r < n_rows; r++) {
        CHECK(fb_weight_unpack_row(weight, r, row.data) == FB_OK);
        for (size_t t = 0; t < (size_t)most; t++) {
            double sum = s.bias ? (double)bias[(size_t)r] : 0.0;
            for (size_t k = 0; k < (size_t)s.n_cols; k++)
                sum += (double)row[k] * (double)x[t * ldx + k];
            sums[t * (size_t)n_rows + (size_t)r] = sum;
        }
    }
    for (size_t t = 0; t < (size_t)most; t++)
        for (size_t c = 0; c < (size_t)s.n_rows; c++) {
            const double *of = sums.data + t * (size_t)n_rows;
            double result = of[c];
            if (s.swiglu) {
                const double gate = of[c / 16 * 32 + c % 16], up = of[c / 16 * 32 + 16 + c % 16];
                result = gate / (1.0 + exp(-gate)) * up;
            }
            wanted[t * (size_t)s.n_rows + c] = result + (s.residual ? (double)residual[t * ld + c] : 0.0);
        }

    for (int32_t n : counts)
        for (int order = 0; order < (n != most && n % 2 ? 2 : 1); order++) {
            emulate::backward = order == 1;
            /* The last n tokens, so that each has a different row in every batch. */
            const size_t begin = (size_t)(most - n);
            buffer<float> in((size_t)n * ldx), out((size_t)n * ld);
            memcpy(in.data, x.data + begin * ldx, in.n * sizeof(float));
            buffer<int32_t> non_finite(1);
            non_finite[0] = 0;
            fb_cuda_linear a = {};
            a.weight = on_device.view;
            a.x = in.data;
            a.ldx = (int64_t)ldx;
            a.bias = s.bias ? bias.data : nullptr;
            if (s.residual && n % 2) { /* in place */
                memcpy(out.data, residual.data + begin * ld, out.n * sizeof(float));
                a.residual = out.data;
            } else if (s.residual) {
                a.residual = residual.data + begin * ld;
            }
            a.ld_residual = a.ld_out = (int64_t)ld;
            a.out = out.data;
            a.n_tokens = n;
            a.width = s.n_rows;
            a.swiglu = s.swiglu;
            a.non_finite = non_finite.data;
            CHECK(p.multiply(a) == 0);
            CHECK(non_finite[0] == 0);
            difference d;
            for (size_t t = 0; t < (size_t)n; t++)
                for (size_t c = 0; c < ld; c++) {
                    const float got = out[t * ld + c];
                    float *known = &first[(begin + t) * ld + c];
                    if (c >= (size_t)s.n_rows) { /* no column after the last is written */
                        const bool is_copy = s.residual && n % 2;
                        CHECK(is_copy ? got == residual[(begin + t) * ld + c] : isnan(got));
                        continue;
                    }
                    d.add((double)got, wanted[(begin + t) * (size_t)s.n_rows + c]);
                    if (n == most && order == 0) *known = got;
                    CHECK_AT(memcmp(&got, known, sizeof got) == 0, "dtype %d, %d x %d, %d tokens: %a is not %a", dtype,
                        n_rows, s.n_cols, n, (double)got, (double)*known);
                }
            CHECK_AT(d.relative() <= p.tolerance, "dtype %d, %d x %d, %d tokens: off by %g", dtype, n_rows, s.n_cols, n,
                d.relative());
        }
    emulate::backward = false;
    fb_weight_free(weight);
}

/* NaN in one of several tokens is reported. */
static inline void test_non_finite(const product &p, fb_dtype dtype) {
    fb_weight *weight = random_weight(dtype, 20, 256);
    const device_weight on_device(weight);
    for (int32_t n : {2, 12, 70}) {
        buffer<float> x((size_t)n * 256), out((size_t)n * 20);
        fill(x, 1.0f);
        x[258] = INFINITY;
        buffer<int32_t> non_finite(1);
        non_finite[0] = 0;
        fb_cuda_linear a = {};
        a.weight = on_device.view;
        a.x = x.data;
        a.ldx = 256;
        a.out = out.data;
        a.ld_out = a.width = 20;
        a.n_tokens = n;
        a.non_finite = non_finite.data;
        CHECK(p.multiply(a) == 0);
        CHECK(non_finite[0] == 1);
    }
    fb_weight_free(weight);
}

#endif
