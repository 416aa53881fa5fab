/*
 * test_cuda_rows.cpp - operators that work row by row: embedding, norms, rope, pages, outputs. Rows of
 * weights and bytes of pages are compared with the CPU's bit by bit, the rest with loops in double.
 */
#include "rows.cu"

#include "common.h"

/* ---- Rows -------------------------------------------------------------------------------------------------------- */

static void test_embed() {
    for (fb_dtype dtype : every_dtype)
        for (int32_t n_cols : {33, 256, 4608}) {
            if (n_cols % fb_dtype_block_size(dtype)) continue;
            const int32_t n_rows = n_cols > 1000 ? 3 : 35, n = 4;
            const size_t ld = (size_t)n_cols + 2;
            fb_weight *weight = random_weight(dtype, n_rows, n_cols);
            const device_weight on_device(weight);
            buffer<int32_t> tokens(n);
            buffer<float> out(n * ld), row((size_t)n_cols);
            for (size_t i = 0; i < n; i++)
                tokens[i] = (int32_t)(i * 17 % (size_t)n_rows);
            for (float scale : {1.0f, 3.5f}) {
                out.poison();
                CHECK(fb_cuda_embed(&on_device.view, tokens.data, n, scale, out.data, (int64_t)ld, nullptr) == 0);
                for (size_t i = 0; i < n; i++) {
                    CHECK(fb_weight_unpack_row(weight, tokens[i], row.data) == FB_OK);
                    for (size_t c = 0; c < ld; c++)
                        CHECK_AT(c < row.n ? out[i * ld + c] == row[c] * scale : isnan(out[i * ld + c]),
                            "dtype %d, %d columns, row %zu, column %zu", dtype, n_cols, i, c);
                }
            }
            fb_weight_free(weight);
        }
}

static void test_norms() {
    for (int32_t n_cols : {1, 31, 256, 1000}) {
        const int32_t n_rows = 3;
        const size_t ld = (size_t)n_cols + 1, n = (size_t)n_cols;
        buffer<float> in(n_rows * ld), weight(n), out(n_rows * ld), alone(ld);
        fill(in, 2.0f);
        fill(weight, 1.0f);
        CHECK(fb_cuda_rms_norm(
                  in.data, (int64_t)ld, weight.data, n_rows, n_cols, 1e-5f, out.data, (int64_t)ld, nullptr) == 0);
        difference d;
        for (size_t r = 0; r < n_rows; r++) {
            double sum = 0.0;
            for (size_t c = 0; c < n; c++)
                sum += (double)in[r * ld + c] * (double)in[r * ld + c];
            for (size_t c = 0; c < n; c++)
                d.add(
                    (double)out[r * ld + c], (double)in[r * ld + c] / sqrt(sum / (double)n + 1e-5) * (double)weight[c]);
            CHECK(isnan(out[r * ld + n]));
        }
        CHECK_AT(d.relative() <= 1e-6, "%d columns: %g", n_cols, d.relative());
        emulate::backward = true;
        CHECK(fb_cuda_rms_norm(
                  in.data + ld, (int64_t)ld, weight.data, 1, n_cols, 1e-5f, alone.data, (int64_t)ld, nullptr) == 0);
        emulate::backward = false;
        CHECK(memcmp(alone.data, out.data + ld, n * sizeof(float)) == 0);
        CHECK(fb_cuda_rms_norm(
                  in.data, (int64_t)ld, weight.data, n_rows, n_cols, 1e-5f, in.data, (int64_t)ld, nullptr) == 0);
        for (size_t r = 0; r < n_rows; r++)
            CHECK(memcmp(in.data + r * ld, out.data + r * ld, n * sizeof(float)) == 0);
    }
}

static void test_head_norm() {
    for (int32_t head_dim : {2, 33, 80}) {
        const int32_t n_heads = 7, n_kv_heads = 3, n_rows = 2;
        const size_t dim = (size_t)head_dim, ld = (n_heads + 2 * n_kv_heads) * dim + 5;
        buffer<float> x(n_rows * ld), before(n_rows * ld), q(dim), k(dim);
        fill(x, 1.0f);
        fill(q, 1.0f);
        fill(k, 1.0f);
        memcpy(before.data, x.data, x.n * sizeof(float));
        CHECK(fb_cuda_head_norm(
                  x.data, (int64_t)ld, n_rows, n_heads, n_kv_heads, head_dim, q.data, k.data, 1e-6f, nullptr) == 0);
        difference d;
        for (size_t r = 0; r < n_rows; r++)
            for (size_t c = 0; c < ld; c++) {
                const size_t head = c / dim;
                double wanted = (double)before[r * ld + c];
                if (head >= n_heads + n_kv_heads) {
                    CHECK(x[r * ld + c] == before[r * ld + c]);
                    continue;
                }
                double sum = 0.0;
                for (size_t i = 0; i < dim; i++)
                    sum += pow((double)before[r * ld + head * dim + i], 2.0);
                wanted *= (double)(head < n_heads ? q : k)[c % dim] / sqrt(sum / (double)dim + 1e-6);
                d.add((double)x[r * ld + c], wanted);
            }
        CHECK_AT(d.relative() <= 1e-6, "head_dim %d: %g", head_dim, d.relative());
    }
}

/* ---- A batch of three sequences ---------------------------------------------------------------------------------- */

enum { TOKENS = 12, PAGES = 9 };

struct small_batch {
    buffer<int32_t> positions{TOKENS}, owners{TOKENS}, pages{PAGES};
    buffer<fb_cuda_sequence> sequences{3};
    fb_cuda_batch view;

    small_batch() {
        static const fb_cuda_sequence all[3] = {
            {0, 30, 5, 0, 0, 0}, {2, 0, 1, 0, 0, 5}, {3, 60, 6, 20, 4, 6}}; /* 2, 1 and 3 pages */
        static const int32_t list[PAGES] = {4, 2, 7, 5, -1, 0, 0, 0, 0};
        memcpy(sequences.data, all, sizeof all);
        memcpy(pages.data, list, sizeof list);
        pages[4] = 1;
        pages[5] = 3;
        size_t row = 0;
        for (int32_t s = 0; s < 3; s++)
            for (int32_t i = 0; i < all[s].n_tokens; i++, row++) {
                positions[row] = all[s].n_past + i;
                owners[row] = s;
            }
        CHECK(row == TOKENS);
        view = {TOKENS, 3, nullptr, positions.data, owners.data, sequences.data, pages.data};
    }
};

static void test_rope() {
    const small_batch batch;
    for (int32_t rotary_dim : {0, 2, 34, 40}) {
        const int32_t head_dim = 40, n_heads = 5;
        const size_t half = (size_t)rotary_dim / 2, ld = (n_heads + 1) * (size_t)head_dim;
        buffer<float> frequencies(half), table(TOKENS * 2 * half), turns(TOKENS * 2 * half), x(TOKENS * ld),
            before(TOKENS * ld);
        for (size_t i = 0; i < half; i++)
            frequencies[i] = powf(10000.0f, -(float)i / (float)half);
        fill(x, 1.0f);
        memcpy(before.data, x.data, x.n * sizeof(float));
        CHECK(fb_cuda_angles(&batch.view, frequencies.data, rotary_dim, 1.25f, table.data, turns.data, nullptr) == 0);
        CHECK(fb_cuda_rope(x.data, (int64_t)ld, TOKENS, n_heads, head_dim, rotary_dim, table.data, nullptr) == 0);
        difference d;
        for (size_t t = 0; t < TOKENS; t++) {
            const int32_t position = batch.positions[t];
            const bool sees_sinks = batch.owners[t] == 2 && position >= 24;
            for (size_t i = 0; i < half; i++) {
                const float angle = (float)position * frequencies[i], seen = 23.0f * frequencies[i];
                CHECK(table[t * 2 * half + i] == (float)cos((double)angle) * 1.25f);
                CHECK(table[t * 2 * half + half + i] == (float)sin((double)angle) * 1.25f);
                const float c = turns[t * 2 * half + i], s = turns[t * 2 * half + half + i];
                CHECK(sees_sinks ? c == (float)cos((double)seen - (double)angle) : isnan(c));
                CHECK(sees_sinks ? s == (float)sin((double)seen - (double)angle) : isnan(s));
            }
            for (size_t c = 0; c < ld; c++) {
                const size_t head = c / (size_t)head_dim, i = c % (size_t)head_dim;
                const float *from = &before[t * ld + head * (size_t)head_dim];
                if (head >= n_heads || i >= 2 * half) {
                    CHECK(x[t * ld + c] == before[t * ld + c]);
                    continue;
                }
                const double angle = (double)((float)position * frequencies[i % half]);
                d.add((double)x[t * ld + c],
                    1.25 * ((double)from[i] * cos(angle) +
                               (i < half ? -(double)from[i + half] : (double)from[i - half]) * sin(angle)));
            }
        }
        CHECK_AT(d.relative() <= 1e-6, "rotary_dim %d: %g", rotary_dim, d.relative());
    }
}

/* Pages hold the same bytes that the CPU writes. */
static void test_kv_write() {
    static const fb_dtype formats[][2] = {{FB_F32, FB_Q8_0}, {FB_F16, FB_BF16}, {FB_BF16, FB_F16}, {FB_Q8_0, FB_F32}};
    const small_batch batch;
    for (const auto &format : formats)
        for (int32_t head_dim : {1, 24, 33, 128}) {
            const int32_t n_heads = 4, n_kv_heads = 2, n_layers = 2, layer = 1;
            const size_t dim = (size_t)head_dim, ld = (n_heads + 2 * n_kv_heads) * dim + 3;
            fb_page_pool *pool = nullptr;
            CHECK(access_pool(nullptr, format[0], format[1], PAGES, n_layers, n_kv_heads, head_dim, &pool) == FB_OK);
            const size_t n_bytes = PAGES * fb_page_bytes(pool);
            buffer<float> x(TOKENS * ld);
            buffer<char> memory(n_bytes);
            memset(memory.data, 0, n_bytes);
            fill(x, 3.0f);
            memset(x.data + n_heads * dim, 0, dim * sizeof(float)); /* K is zero */
            x[ld + n_heads * dim] = INFINITY;                       /* K is not finite */
            fb_cuda_pages wanted, pages;
            fb_cuda_pages_view(pool, &wanted);
            pages = wanted;
            pages.memory = memory.data;
            CHECK(fb_cuda_kv_write(x.data, (int64_t)ld, &batch.view, n_heads, &pages, layer, nullptr) == 0);
            for (size_t t = 0; t < TOKENS; t++) {
                const fb_cuda_sequence &s = batch.sequences[(size_t)batch.owners[t]];
                const int32_t position = batch.positions[t], page = batch.pages[(size_t)(s.first_page + position / 32)];
                for (int32_t h = 0; h < n_kv_heads; h++) {
                    const float *k = &x[t * ld + (size_t)(n_heads + h) * dim];
                    access_slab_write(pool, page, layer, h, position % 32, position == s.n_past + s.n_tokens - 1, k,
                        k + n_kv_heads * dim);
                }
            }
            CHECK_AT(memcmp(memory.data, wanted.memory, n_bytes) == 0, "K %d, V %d, head_dim %d", format[0], format[1],
                head_dim);
            fb_page_pool_free(pool);
        }
}

/* Fused norms, rope and KV write against one launch for each. */
static void test_fused_heads() {
    const small_batch batch;
    for (int32_t head_dim : {24, 40})
        for (int32_t case_number = 0; case_number < 4; case_number++) {
            const bool has_norm = case_number % 2 == 0, has_rope = case_number < 2;
            const int32_t n_kv_heads = 2, n_heads = n_kv_heads * (case_number % 3 == 0 ? 5 : 1), n_layers = 2;
            const size_t dim = (size_t)head_dim, ld = (size_t)(n_heads + 2 * n_kv_heads) * dim + 3;
            const int32_t rotary_dim = head_dim - 4;
            fb_page_pool *pool = nullptr;
            CHECK(access_pool(nullptr, FB_F16, FB_Q8_0, PAGES, n_layers, n_kv_heads, head_dim, &pool) == FB_OK);
            const size_t n_bytes = PAGES * fb_page_bytes(pool);
            buffer<char> apart(n_bytes), together(n_bytes);
            memset(apart.data, 0, n_bytes);
            memset(together.data, 0, n_bytes);
            buffer<float> x(TOKENS * ld), copy(TOKENS * ld), q(dim), k(dim), angles((size_t)(TOKENS * rotary_dim));
            fill(x, 2.0f);
            fill(q, 1.0f);
            fill(k, 1.0f);
            fill(angles, 1.0f);
            memcpy(copy.data, x.data, x.n * sizeof(float));
            fb_cuda_pages pages;
            fb_cuda_pages_view(pool, &pages);
            pages.memory = apart.data;
            if (has_norm)
                CHECK(fb_cuda_head_norm(x.data, (int64_t)ld, TOKENS, n_heads, n_kv_heads, head_dim, q.data, k.data,
                          1e-5f, nullptr) == 0);
            if (has_rope)
                CHECK(fb_cuda_rope(x.data, (int64_t)ld, TOKENS, n_heads + n_kv_heads, head_dim, rotary_dim, angles.data,
                          nullptr) == 0);
            CHECK(fb_cuda_kv_write(x.data, (int64_t)ld, &batch.view, n_heads, &pages, 1, nullptr) == 0);
            fb_cuda_heads heads = {};
            if (has_norm) heads.q_weight = q.data, heads.k_weight = k.data, heads.eps = 1e-5f;
            if (has_rope) heads.cos_sin = angles.data;
            heads.n_heads = n_heads;
            heads.rotary_dim = rotary_dim;
            heads.layer = 1;
            pages.memory = together.data;
            CHECK(fb_cuda_fused_heads(copy.data, (int64_t)ld, &heads, &batch.view, &pages, nullptr) == 0);
            CHECK_AT(copy.same_as(x) && together.same_as(apart), "head_dim %d, case %d", head_dim, case_number);
            fb_page_pool_free(pool);
        }
}

/* ---- Outputs ----------------------------------------------------------------------------------------------------- */

static void test_gather() {
    buffer<float> in(5 * 300), out(3 * 310);
    buffer<int32_t> rows(3);
    fill(in, 1.0f);
    rows[0] = 0, rows[1] = 3, rows[2] = 4;
    CHECK(fb_cuda_gather(in.data, 300, rows.data, 3, 290, out.data, 310, nullptr) == 0);
    for (size_t i = 0; i < 3; i++)
        for (size_t c = 0; c < 310; c++)
            CHECK(c < 290 ? out[i * 310 + c] == in[(size_t)rows[i] * 300 + c] : isnan(out[i * 310 + c]));
}

int main() {
    test_embed();
    test_norms();
    test_head_norm();
    test_rope();
    test_kv_write();
    test_fused_heads();
    test_gather();
    return check_result();
}
