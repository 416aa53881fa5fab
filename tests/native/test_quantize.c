/*
 * test_quantize.c - quantization: bounds on the error of every format, rows that break naive code (zeros,
 * denormals, huge, constant, one outlier), the same bytes for every number of threads, and every refusal.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fabula.h"

enum { N_DTYPES = 15, ROWS = 7, COLS = 768, N = ROWS * COLS };

static const char *names[N_DTYPES] = {"f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k",
    "q6_k", "q2_k", "q3_k", "iq4_nl", "mxfp4"};

/* Relative RMS error of the format on normally distributed numbers, measured, plus a tenth. */
static const double most_error[N_DTYPES] = {
    0.0, 3e-4, 2.2e-3, 0.095, 0.087, 0.047, 0.042, 0.0059, 0.078, 0.039, 0.0195, 0.31, 0.17, 0.084, 0.123};

static uint64_t random_state;

static double uniform(void) { /* 0 .. 1, xorshift64 */
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return ((double)(random_state >> 11) + 0.5) * 0x1p-53;
}

static float normal(void) {
    const double radius = sqrt(-2.0 * log(uniform()));
    return (float)(radius * cos(6.283185307179586 * uniform()));
}

static size_t bytes_of(int dtype, size_t n) {
    return n / (size_t)fb_dtype_block_size((enum fb_dtype)dtype) * fb_dtype_block_bytes((enum fb_dtype)dtype);
}

/* Quantizes and dequantizes; the source may have any address, the target is at an odd one with a guard after
 * it. */
static void round_trip(int dtype, const float *x, float *y) {
    const size_t n_bytes = bytes_of(dtype, N);
    uint8_t *raw = malloc(n_bytes + 2);
    raw[0] = raw[n_bytes + 1] = 0xA5;
    CHECK_AT(fb_quantize((enum fb_dtype)dtype, x, ROWS, COLS, 1, raw + 1, n_bytes) == FB_OK, "%s: %s", names[dtype],
        fb_last_error());
    CHECK_AT(raw[0] == 0xA5 && raw[n_bytes + 1] == 0xA5, "%s", names[dtype]);
    CHECK_AT(fb_dequantize((enum fb_dtype)dtype, raw + 1, n_bytes, N, y) == FB_OK, "%s", names[dtype]);
    free(raw);
}

static double relative_error(const float *x, const float *y) {
    double missed = 0.0, all = 0.0;
    for (int i = 0; i < N; i++) {
        missed += ((double)y[i] - x[i]) * ((double)y[i] - x[i]);
        all += (double)x[i] * x[i];
    }
    return all > 0.0 ? sqrt(missed / all) : sqrt(missed);
}

static void test_errors(float *x, float *y) {
    for (int dtype = 0; dtype < N_DTYPES; dtype++) {
        random_state = 7;
        for (int i = 0; i < N; i++)
            x[i] = normal();
        round_trip(dtype, x, y);
        const double error = relative_error(x, y);
        CHECK_AT(error <= most_error[dtype], "%s: %g", names[dtype], error);
        /* Scaling the input by a power of two scales the output: no format prefers a magnitude. */
        for (int i = 0; i < N; i++)
            x[i] *= 0x1p-3f;
        float *scaled = malloc(N * sizeof(float));
        round_trip(dtype, x, scaled);
        if (dtype < FB_Q4_0 || dtype > FB_Q8_0) {
            const double again = relative_error(x, scaled);
            CHECK_AT(fabs(again - error) <= 0.01 * error, "%s: %g and %g", names[dtype], error, again);
        }
        free(scaled);
    }
}

static void test_hostile_rows(float *x, float *y) {
    for (int dtype = 0; dtype < N_DTYPES; dtype++) {
        for (int i = 0; i < N; i++)
            x[i] = i % 2 ? -0.0f : 0.0f;
        round_trip(dtype, x, y);
        for (int i = 0; i < N; i++)
            CHECK_AT(y[i] == 0.0f, "%s zeros at %d: %g", names[dtype], i, (double)y[i]);

        for (int i = 0; i < N; i++)
            x[i] = (float)(i % 5 - 2) * 0x1p-149f; /* with f16 scales all of them become zero */
        round_trip(dtype, x, y);
        for (int i = 0; i < N; i++)
            CHECK_AT(fabsf(y[i]) <= 0x1p-130f, "%s denormals at %d: %g", names[dtype], i, (double)y[i]);

        for (int sign = -1; sign <= 1; sign += 2) {
            for (int i = 0; i < N; i++)
                x[i] = (float)sign * 0.75f;
            round_trip(dtype, x, y);
            CHECK_AT(relative_error(x, y) < 2e-3, "%s constant: %g", names[dtype], relative_error(x, y));
        }

        for (int i = 0; i < N; i++)
            x[i] = i % 256 == 77 ? (i % 512 == 77 ? 1000.0f : -1000.0f) : 1e-3f * (float)(i % 3 - 1);
        round_trip(dtype, x, y);
        const float step = dtype == FB_MXFP4 ? 24.0f : 4.0f; /* 1000 lies between 768 and 1024 */
        for (int i = 77; i < N; i += 256)
            CHECK_AT(fabsf(y[i] - x[i]) <= step, "%s outlier at %d: %g", names[dtype], i, (double)y[i]);

        random_state = 11;
        for (int i = 0; i < N; i++) /* magnitudes from 2^-60 to 2^15 in one row */
            x[i] = (float)ldexp(uniform() - 0.5, (int)(75.0 * uniform()) - 60);
        round_trip(dtype, x, y);
        for (int i = 0; i < N; i++)
            CHECK_AT(isfinite(y[i]), "%s mixed at %d", names[dtype], i);
        CHECK_AT(relative_error(x, y) <= 0.4, "%s mixed: %g", names[dtype], relative_error(x, y));
    }
}

/* Numbers near the smallest half: scales become subnormal, but not zero as long as sub-block scales can be
 * larger. */
static void test_small_numbers(float *x, float *y) {
    static const enum fb_dtype with_room[] = {FB_Q4_K, FB_Q5_K, FB_Q6_K};
    for (int k = 0; k < 3; k++) {
        random_state = 5;
        for (int i = 0; i < N; i++)
            x[i] = 1e-5f * normal();
        round_trip((int)with_room[k], x, y);
        CHECK_AT(relative_error(x, y) <= 0.1, "%s small numbers: %g", names[with_room[k]], relative_error(x, y));
    }
}

static void test_threads(void) {
    random_state = 13;
    enum { MANY = 64 };
    float *wide = malloc((size_t)MANY * COLS * sizeof(float));
    for (int i = 0; i < MANY * COLS; i++)
        wide[i] = normal() * 0.02f;
    for (int dtype = 0; dtype < N_DTYPES; dtype++) {
        const size_t n_bytes = bytes_of(dtype, (size_t)MANY * COLS);
        uint8_t *one = malloc(n_bytes), *many = malloc(n_bytes), *row = malloc(n_bytes / MANY);
        CHECK(fb_quantize((enum fb_dtype)dtype, wide, MANY, COLS, 1, one, n_bytes) == FB_OK);
        CHECK(fb_quantize((enum fb_dtype)dtype, wide, MANY, COLS, 5, many, n_bytes) == FB_OK);
        CHECK_AT(memcmp(one, many, n_bytes) == 0, "%s", names[dtype]);
        CHECK(fb_quantize((enum fb_dtype)dtype, wide + 41 * COLS, 1, COLS, 3, row, n_bytes / MANY) == FB_OK);
        CHECK_AT(memcmp(one + 41 * (n_bytes / MANY), row, n_bytes / MANY) == 0, "%s row", names[dtype]);
        free(one);
        free(many);
        free(row);
    }
    free(wide);
}

static void test_refusals(float *x) {
    uint8_t *raw = malloc(N * sizeof(float));
    for (int dtype = 0; dtype < N_DTYPES; dtype++) {
        const enum fb_dtype d = (enum fb_dtype)dtype;
        const size_t n_bytes = bytes_of(dtype, N);
        for (int i = 0; i < N; i++)
            x[i] = 0.5f;
        CHECK(fb_quantize(d, x, ROWS, COLS, 0, raw, n_bytes) == FB_INVALID_ARGUMENT);
        CHECK(fb_quantize(d, x, 0, COLS, 1, raw, n_bytes) == FB_INVALID_ARGUMENT);
        CHECK(fb_quantize(d, x, ROWS, 0, 1, raw, n_bytes) == FB_INVALID_ARGUMENT);
        CHECK(fb_quantize(d, NULL, ROWS, COLS, 1, raw, n_bytes) == FB_INVALID_ARGUMENT);
        CHECK(fb_quantize(d, x, ROWS, COLS, 1, NULL, n_bytes) == FB_INVALID_ARGUMENT);
        CHECK(fb_quantize(d, x, ROWS, COLS, 1, raw, n_bytes - 1) == FB_INVALID_ARGUMENT);
        CHECK(strstr(fb_last_error(), "dst_bytes") != NULL);
        if (fb_dtype_block_size(d) > 1) {
            CHECK(fb_quantize(d, x, ROWS, COLS - 1, 1, raw, n_bytes) == FB_INVALID_ARGUMENT);
            CHECK_AT(strstr(fb_last_error(), "whole blocks") != NULL, "%s", fb_last_error());
        }
        /* The first element in the matrix is reported, whichever thread finds which. */
        x[3 * COLS + 5] = NAN;
        x[6 * COLS + 700] = -INFINITY;
        CHECK(fb_quantize(d, x, ROWS, COLS, 4, raw, n_bytes) == FB_NON_FINITE);
        CHECK_AT(strstr(fb_last_error(), "row 3, column 5 holds NaN") != NULL, "%s: %s", names[dtype], fb_last_error());
        x[3 * COLS + 5] = 0.5f;
        CHECK(fb_quantize(d, x, ROWS, COLS, 4, raw, n_bytes) == FB_NON_FINITE);
        CHECK_AT(strstr(fb_last_error(), "row 6, column 700 holds infinity") != NULL, "%s: %s", names[dtype],
            fb_last_error());
        x[6 * COLS + 700] = 3.4e38f;
        if (d == FB_F32) {
            CHECK(fb_quantize(d, x, ROWS, COLS, 4, raw, n_bytes) == FB_OK);
            continue;
        }
        CHECK_AT(fb_quantize(d, x, ROWS, COLS, 4, raw, n_bytes) == FB_NON_FINITE, "%s", names[dtype]);
        CHECK_AT(strstr(fb_last_error(), "row 6, column") != NULL, "%s: %s", names[dtype], fb_last_error());
    }
    CHECK(fb_quantize((enum fb_dtype)N_DTYPES, x, ROWS, COLS, 1, raw, N) == FB_INVALID_ARGUMENT);
    CHECK(fb_quantize((enum fb_dtype) - 1, x, ROWS, COLS, 1, raw, N) == FB_INVALID_ARGUMENT);
    free(raw);
}

int main(void) {
    float *x = malloc(N * sizeof(float)), *y = malloc(N * sizeof(float));
    test_errors(x, y);
    test_hostile_rows(x, y);
    test_small_numbers(x, y);
    test_threads();
    test_refusals(x);
    free(x);
    free(y);
    return check_result();
}
