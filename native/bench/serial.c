/*
 * serial.c - the operators as plain serial loops, the obvious implementation.
 *
 * `fabula bench ops` compares the kernels with these. They are compiled like the rest (-O3, the
 * architecture's baseline instruction set) and share nothing with the kernels: their own order of sums, the C
 * library's expf, sinf and cosf.
 */
#include "fabula_bench.h"

#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum fb_status fb_serial_rms_norm(
    const float *x, const float *weight, int32_t n_rows, int32_t n_cols, float eps, float *out) {
    FB_REQUIRE(x && weight && out, "x, weight or out is null");
    const size_t n = (size_t)n_cols;
    for (size_t r = 0; r < (size_t)n_rows; r++) {
        float sum = 0.0f;
        for (size_t i = 0; i < n; i++)
            sum += x[r * n + i] * x[r * n + i];
        const float factor = 1.0f / sqrtf(sum / (float)n + eps);
        for (size_t i = 0; i < n; i++)
            out[r * n + i] = x[r * n + i] * factor * weight[i];
    }
    return FB_OK;
}

enum fb_status fb_serial_gather(const float *table, int32_t n_cols, const int32_t *ids, int32_t n_ids, float *out) {
    FB_REQUIRE(table && ids && out, "table, ids or out is null");
    const size_t n = (size_t)n_cols;
    for (size_t r = 0; r < (size_t)n_ids; r++)
        for (size_t i = 0; i < n; i++)
            out[r * n + i] = table[(size_t)ids[r] * n + i];
    return FB_OK;
}

static void softmax(const float *x, size_t n, float *out) {
    float top = x[0], sum = 0.0f;
    for (size_t i = 1; i < n; i++)
        if (x[i] > top) top = x[i];
    for (size_t i = 0; i < n; i++) {
        out[i] = expf(x[i] - top);
        sum += out[i];
    }
    for (size_t i = 0; i < n; i++)
        out[i] /= sum;
}

enum fb_status fb_serial_masked_softmax(
    const float *x, int32_t n_rows, int32_t n_cols, bool causal, int32_t first_visible, float *out) {
    FB_REQUIRE(x && out, "x or out is null");
    const size_t n = (size_t)n_cols;
    for (size_t r = 0; r < (size_t)n_rows; r++) {
        size_t visible = causal && (size_t)first_visible + r < n ? (size_t)first_visible + r : n;
        softmax(x + r * n, visible, out + r * n);
        for (size_t i = visible; i < n; i++)
            out[r * n + i] = 0.0f;
    }
    return FB_OK;
}

enum fb_status fb_serial_swiglu(const float *gate, const float *up, size_t n, float *out) {
    FB_REQUIRE(gate && up && out, "gate, up or out is null");
    for (size_t i = 0; i < n; i++)
        out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    return FB_OK;
}

enum fb_status fb_serial_matmul_transb(const float *a, const float *b, int32_t m, int32_t n, int32_t k, float *out) {
    FB_REQUIRE(a && b && out, "a, b or out is null");
    for (size_t i = 0; i < (size_t)m; i++)
        for (size_t j = 0; j < (size_t)n; j++) {
            float sum = 0.0f;
            for (size_t l = 0; l < (size_t)k; l++)
                sum += a[i * (size_t)k + l] * b[j * (size_t)k + l];
            out[i * (size_t)n + j] = sum;
        }
    return FB_OK;
}

enum fb_status fb_serial_rope(float *x, const int32_t *positions, int32_t n_rows, int32_t n_heads, int32_t head_dim,
    int32_t rotary_dim, const float *inv_freq, float rope_scale) {
    FB_REQUIRE(x && positions && inv_freq, "x, positions or inv_freq is null");
    const size_t half = (size_t)rotary_dim / 2;
    for (size_t r = 0; r < (size_t)n_rows; r++)
        for (size_t h = 0; h < (size_t)n_heads; h++) {
            float *head = x + (r * (size_t)n_heads + h) * (size_t)head_dim;
            for (size_t i = 0; i < half; i++) {
                const float angle = (float)positions[r] * inv_freq[i];
                const float c = cosf(angle) * rope_scale, s = sinf(angle) * rope_scale;
                const float first = head[i], second = head[i + half];
                head[i] = first * c - second * s;
                head[i + half] = second * c + first * s;
            }
        }
    return FB_OK;
}

enum fb_status fb_serial_self_attention(const float *q, const float *k, const float *v, int32_t n_tokens,
    int32_t n_heads, int32_t n_kv_heads, int32_t head_dim, int32_t window, float scale, float *out) {
    FB_REQUIRE(q && k && v && out, "q, k, v or out is null");
    const size_t n = (size_t)n_tokens, heads = (size_t)n_heads, kv_heads = (size_t)n_kv_heads, dim = (size_t)head_dim;
    float *scores = malloc(n * sizeof *scores);
    if (!scores) return fb_fail(FB_OUT_OF_MEMORY, "no memory for %d scores", n_tokens);
    for (size_t t = 0; t < n; t++)
        for (size_t h = 0; h < heads; h++) {
            const size_t first = window > 0 && t >= (size_t)window ? t - (size_t)window + 1 : 0;
            const size_t kv = h / (heads / kv_heads);
            const float *query = q + (t * heads + h) * dim;
            for (size_t s = first; s <= t; s++) {
                float sum = 0.0f;
                for (size_t d = 0; d < dim; d++)
                    sum += query[d] * k[(s * kv_heads + kv) * dim + d];
                scores[s] = sum * scale;
            }
            softmax(scores + first, t - first + 1, scores + first);
            float *result = out + (t * heads + h) * dim;
            memset(result, 0, dim * sizeof *result);
            for (size_t s = first; s <= t; s++)
                for (size_t d = 0; d < dim; d++)
                    result[d] += scores[s] * v[(s * kv_heads + kv) * dim + d];
        }
    free(scores);
    return FB_OK;
}
