/*
 * test_cuda_linear.cpp - products with every weight format against loops in double over the rows read back by the CPU; the same
 * token gets the same bits in batches of every size.
 */
#include "linear.cu"

#include "common.h"

static void test_layouts() {
    for (fb_dtype dtype : every_dtype) {
        const fb_cuda_layout layout = fb_cuda_layout_of(dtype);
        int32_t wanted[5];
        access_layout(dtype, wanted);
        CHECK_AT(layout.bits == wanted[0] && layout.zero == wanted[1] && (int)layout.scales == wanted[2] &&
                     layout.scale_bytes == wanted[3] && layout.super_bytes == wanted[4],
            "dtype %d", dtype);
    }
}

struct shape {
    int32_t n_rows, n_cols; /* of SwiGLU: rows of each half */
    bool swiglu, bias, residual;
};

static void test_shape(fb_dtype dtype, const shape &s) {
    const int32_t n_rows = s.swiglu ? (s.n_rows + 15) / 16 * 32 : s.n_rows, most = 41;
    const size_t ldx = ((size_t)s.n_cols + 3) / 4 * 4 + 4, ld = (size_t)s.n_rows + 3;
    fb_weight *weight = random_weight(dtype, n_rows, s.n_cols, s.swiglu ? s.n_rows : 0);
    const device_weight on_device(weight);
    buffer<float> x(most * ldx), bias((size_t)n_rows), residual(most * ld), first(most * ld);
    fill(bias, 1.0f);
    fill(residual, 1.0f);
    for (size_t i = 0; i < x.n; i++)
        if (i % ldx < (size_t)s.n_cols) x[i] = random_number(s.swiglu ? 0.1f : 1.0f);

    /* What a loop over dequantised rows gives. */
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

    static const int32_t counts[] = {41, 33, 9, 8, 5, 2, 1};
    for (int32_t n : counts)
        for (int order = 0; order < (n == 33 || n == 5 ? 2 : 1); order++) {
            emulate::backward = order == 1;
            /* The last n tokens, so that each has another place in every batch. */
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
            CHECK(fb_cuda_multiply(&a, nullptr) == 0);
            CHECK(non_finite[0] == 0);
            difference d;
            for (size_t t = 0; t < (size_t)n; t++)
                for (size_t c = 0; c < ld; c++) {
                    const float got = out[t * ld + c];
                    float *known = &first[(begin + t) * ld + c];
                    if (c >= (size_t)s.n_rows) { /* no column behind the last is touched */
                        const bool is_copy = s.residual && n % 2;
                        CHECK(is_copy ? got == residual[(begin + t) * ld + c] : isnan(got));
                        continue;
                    }
                    d.add((double)got, wanted[(begin + t) * (size_t)s.n_rows + c]);
                    if (n == most && order == 0) *known = got;
                    CHECK_AT(memcmp(&got, known, sizeof got) == 0, "dtype %d, %d x %d, %d tokens: %a is not %a", dtype,
                        n_rows, s.n_cols, n, (double)got, (double)*known);
                }
            CHECK_AT(d.relative() <= 2e-6, "dtype %d, %d x %d, %d tokens: off by %g", dtype, n_rows, s.n_cols, n,
                d.relative());
        }
    emulate::backward = false;
    fb_weight_free(weight);
}

static void test_non_finite() {
    fb_weight *weight = random_weight(FB_F32, 20, 8);
    const device_weight on_device(weight);
    for (int32_t n : {2, 12}) {
        buffer<float> x((size_t)n * 8), out((size_t)n * 20);
        fill(x, 1.0f);
        x[9] = INFINITY;
        buffer<int32_t> non_finite(1);
        non_finite[0] = 0;
        fb_cuda_linear a = {};
        a.weight = on_device.view;
        a.x = x.data;
        a.ldx = 8;
        a.out = out.data;
        a.ld_out = a.width = 20;
        a.n_tokens = n;
        a.non_finite = non_finite.data;
        CHECK(fb_cuda_multiply(&a, nullptr) == 0);
        CHECK(non_finite[0] == 1);
    }
    fb_weight_free(weight);
}

int main() {
    /* Tails of panels, tiles and chunks; numbers of chunks that make 1, 3, 12 and 16 segments. */
    static const shape plain[] = {{1, 1, false, false, false}, {37, 31, false, true, true},
        {131, 100, false, true, false}, {21, 70, true, true, false}, {5, 1057, true, false, false}};
    static const shape blocks[] = {{37, 256, false, true, true}, {21, 768, true, true, false}};
    static const shape of_32[] = {{3, 32, false, false, false}, {20, 544, false, true, true}};
    static const shape long_rows = {140, 4352, false, false, true};
    test_layouts();
    test_non_finite();
    for (fb_dtype dtype : every_dtype) {
        if (fb_dtype_block_size(dtype) == 1)
            for (const shape &s : plain)
                test_shape(dtype, s);
        else
            for (const shape &s : blocks)
                test_shape(dtype, s);
        if (fb_dtype_block_size(dtype) == 32)
            for (const shape &s : of_32)
                test_shape(dtype, s);
    }
    test_shape(FB_Q6_K, long_rows);
    fb_cuda_linear unknown = {};
    unknown.weight.dtype = (fb_dtype)15;
    CHECK(fb_cuda_multiply(&unknown, nullptr) == -1);
    return check_result();
}
