/*
 * test_cuda_attention.cpp - attention over pages against a loop in double that follows the definition in
 * fabula.h. Unwritten memory is NaN, invisible pages are -1. A token gets the same bits in a prompt and
 * alone, in every batch, split or not.
 */
#include "attention.cu"

#include "common.h"

#include <vector>

struct sequence_case {
    int32_t n_past, n_tokens, window, n_sinks;
};

struct attention_case {
    fb_dtype k, v;
    int32_t head_dim, n_kv_heads, group, rotary_dim, window;
    std::vector<sequence_case> sequences;
};

enum { LAYERS = 2, LAYER = 1 };

/* The values of a head after storing it in pages of a format. */
static void round_head(fb_dtype dtype, const float *x, size_t n, double *out) {
    float top = 0.0f;
    for (size_t i = 0; i < n; i++)
        top = fmaxf(top, fabsf(x[i]));
    for (size_t i = 0; i < n; i++)
        out[i] = dtype == FB_F32    ? (double)x[i]
                 : dtype == FB_F16  ? (double)fb_f16_to_f32(fb_f32_to_f16(x[i]))
                 : dtype == FB_BF16 ? (double)fb_bf16_to_f32(fb_f32_to_bf16(x[i]))
                                    : (double)(rintf(x[i] * (127.0f / top)) * (top / 127.0f));
}

/* A case: all its inputs, and the wanted results. */
struct setting {
    const attention_case &c;
    size_t dim, n_heads, ldq, ld_out, n_rows = 0;
    fb_page_pool *pool = nullptr;
    fb_cuda_pages view;
    size_t n_page_bytes; /* of all pages */
    buffer<float> frequencies;
    std::vector<std::vector<int32_t>> pages; /* per sequence */
    std::vector<size_t> first_row;
    std::vector<float> q, turns, wanted; /* rows of all sequences */

    explicit setting(const attention_case &c_)
        : c(c_), dim((size_t)c_.head_dim), n_heads((size_t)(c_.n_kv_heads * c_.group)), ldq((n_heads + 1) * dim + 1),
          ld_out(n_heads * dim + 3), frequencies((size_t)c_.rotary_dim / 2) {
        int32_t n_pages = 1;
        for (const sequence_case &s : c.sequences)
            n_pages += (s.n_past + s.n_tokens + 31) / 32;
        CHECK(access_pool(nullptr, c.k, c.v, n_pages, LAYERS, c.n_kv_heads, c.head_dim, &pool) == FB_OK);
        fb_cuda_pages_view(pool, &view);
        n_page_bytes = (size_t)n_pages * fb_page_bytes(pool);
        memset(view.memory, 0xFF, n_page_bytes);
        for (size_t i = 0; i < frequencies.n; i++)
            frequencies[i] = powf(1000.0f, -(float)i / (float)frequencies.n);
        int32_t next = n_pages - 1; /* descending, so that no page follows the one before in memory */
        for (const sequence_case &s : c.sequences)
            add(s, &next);
    }
    ~setting() {
        fb_page_pool_free(pool);
    }
    setting(const setting &) = delete;
    setting &operator=(const setting &) = delete;

    void add(const sequence_case &s, int32_t *next) {
        const int32_t end = s.n_past + s.n_tokens, n_kv = c.n_kv_heads;
        const fb_sequence as_public = {nullptr, 0, s.n_past, s.n_tokens, s.window, s.n_sinks, 0, 0, nullptr, 0};
        const int32_t first_visible = access_lowest_visible(&as_public, 0, s.n_past) / 32;
        std::vector<int32_t> own;
        for (int32_t i = 0; i * 32 < end; i++)
            own.push_back(i < first_visible && !(i == 0 && s.n_sinks > 0) ? -1 : (*next)--);
        std::vector<double> keys((size_t)(end * n_kv) * dim), values(keys.size());
        std::vector<float> k(dim), v(dim);
        for (int32_t p = 0; p < end; p++)
            for (int32_t h = 0; h < n_kv; h++) {
                for (size_t d = 0; d < dim; d++)
                    k[d] = random_number(1.0f), v[d] = random_number(2.0f);
                round_head(c.k, k.data(), dim, &keys[(size_t)(p * n_kv + h) * dim]);
                round_head(c.v, v.data(), dim, &values[(size_t)(p * n_kv + h) * dim]);
                if (own[(size_t)(p / 32)] >= 0)
                    access_slab_write(pool, own[(size_t)(p / 32)], LAYER, h, p % 32, true, k.data(), v.data());
            }
        pages.push_back(own);
        first_row.push_back(n_rows);
        for (int32_t p = s.n_past; p < end; p++, n_rows++) {
            for (size_t i = 0; i < ldq; i++)
                q.push_back(i < n_heads * dim ? random_number(3.0f) : NAN);
            const size_t half = frequencies.n;
            for (size_t i = 0; i < 2 * half; i++) {
                const double turned = (double)(s.n_sinks + s.window - 1 - p) * (double)frequencies[i % half];
                turns.push_back(!s.window || p < s.n_sinks + s.window ? NAN
                                : i < half                            ? (float)cos(turned)
                                                                      : (float)sin(turned));
            }
            for (size_t h = 0; h < n_heads; h++)
                attend_one(s, p, &q[n_rows * ldq + h * dim], (int32_t)h / c.group, keys, values);
        }
    }

    /* Appends the wanted result of one query to `wanted`. */
    void attend_one(const sequence_case &s, int32_t p, const float *query, int32_t kv_head,
        const std::vector<double> &keys, const std::vector<double> &values) {
        const size_t half = frequencies.n;
        const bool slides = s.window > 0 && p >= s.n_sinks + s.window;
        std::vector<double> scores, out(dim);
        std::vector<int32_t> seen;
        double top = -INFINITY, sum = 0.0;
        for (int32_t j = 0; j <= p; j++) {
            const bool is_sink = slides && j < s.n_sinks;
            if (slides && !is_sink && j <= p - s.window) continue;
            /* Of a sink the distance of the farthest one, so all are hidden or none. */
            const int32_t reach = is_sink ? s.n_sinks + s.window : p - j + 1;
            if (c.window > 0 && reach > c.window) continue;
            double dot = 0.0;
            const double *key = &keys[(size_t)(j * c.n_kv_heads + kv_head) * dim];
            for (size_t d = 0; d < dim; d++) {
                double x = (double)query[d];
                if (is_sink && d < 2 * half) {
                    const double turned = (double)(s.n_sinks + s.window - 1 - p) * (double)frequencies[d % half];
                    x = d < half ? x * cos(turned) - (double)query[d + half] * sin(turned)
                                 : x * cos(turned) + (double)query[d - half] * sin(turned);
                }
                dot += x * key[d];
            }
            seen.push_back(j);
            scores.push_back(dot * (double)scale());
            top = fmax(top, scores.back());
        }
        for (size_t i = 0; i < seen.size(); i++) {
            const double weight = exp(scores[i] - top);
            sum += weight;
            for (size_t d = 0; d < dim; d++)
                out[d] += weight * values[(size_t)(seen[i] * c.n_kv_heads + kv_head) * dim + d];
        }
        for (size_t d = 0; d < dim; d++)
            wanted.push_back((float)(out[d] / sum));
    }

    float scale() const {
        return 1.0f / sqrtf((float)dim);
    }

    /* Runs tokens `begin` .. `begin` + `count` - 1 of each sequence in [first, end) into their rows of out
     * [rows][n_heads x dim]. */
    void run(size_t first, size_t end, int32_t begin, int32_t count, bool is_split, std::vector<float> &out) const {
        std::vector<fb_cuda_sequence> sequences;
        std::vector<int32_t> list, positions, owners;
        std::vector<size_t> rows;
        for (size_t i = first; i < end; i++) {
            const sequence_case &s = c.sequences[i];
            const int32_t from = begin < s.n_tokens ? begin : s.n_tokens - 1;
            const int32_t n = count < s.n_tokens - from ? count : s.n_tokens - from;
            sequences.push_back({(int32_t)list.size(), s.n_past + from, n, s.window, s.n_sinks, (int32_t)rows.size()});
            for (int32_t t = 0; t < n; t++)
                rows.push_back(first_row[i] + (size_t)(from + t));
            const size_t n_pages = (size_t)(s.n_past + from + n + 31) / 32;
            list.insert(list.end(), pages[i].begin(), pages[i].begin() + (ptrdiff_t)n_pages);
        }
        buffer<int32_t> of_pages(list.size());
        memcpy(of_pages.data, list.data(), list.size() * sizeof(int32_t));
        buffer<char> memory(n_page_bytes);
        memcpy(memory.data, view.memory, n_page_bytes);
        buffer<fb_cuda_sequence> of_sequences(sequences.size());
        memcpy(of_sequences.data, sequences.data(), sequences.size() * sizeof(fb_cuda_sequence));
        buffer<float> queries(rows.size() * ldq), result(rows.size() * ld_out), turned(rows.size() * 2 * frequencies.n);
        for (size_t i = 0; i < rows.size(); i++) {
            memcpy(queries.data + i * ldq, &q[rows[i] * ldq], ldq * sizeof(float));
            if (frequencies.n)
                memcpy(turned.data + i * 2 * frequencies.n, &turns[rows[i] * 2 * frequencies.n],
                    2 * frequencies.n * sizeof(float));
        }
        fb_cuda_attention a = {};
        a.batch.n_tokens = (int32_t)rows.size();
        a.batch.n_sequences = (int32_t)sequences.size();
        a.batch.sequences = of_sequences.data;
        a.batch.pages = of_pages.data;
        a.pages = view;
        a.pages.memory = memory.data;
        a.layer = LAYER;
        a.window = c.window;
        a.n_heads = (int32_t)n_heads;
        a.scale = scale();
        a.sink_rotations = turned.data;
        a.rotary_dim = c.rotary_dim;
        a.q = queries.data;
        a.ldq = (int64_t)ldq;
        a.out = result.data;
        a.ld_out = (int64_t)ld_out;
        a.tile_rows = fb_cuda_tile_rows(c.head_dim, is_split);
        int32_t n_parts;
        a.n_tiles = fb_cuda_tiles(
            sequences.data(), a.batch.n_sequences, c.group, a.tile_rows, c.window, nullptr, &n_parts);
        buffer<fb_cuda_tile> tiles((size_t)a.n_tiles);
        CHECK(fb_cuda_tiles(sequences.data(), a.batch.n_sequences, c.group, a.tile_rows, c.window, tiles.data,
                  &n_parts) == a.n_tiles);
        a.tiles = tiles.data;
        a.n_parts = is_split ? n_parts : 0;
        buffer<float> partials(fb_cuda_partial_floats(&a));
        a.partials = partials.data;
        CHECK(fb_cuda_attend(&a, nullptr) == 0);
        for (size_t i = 0; i < rows.size(); i++) {
            memcpy(&out[rows[i] * n_heads * dim], result.data + i * ld_out, n_heads * dim * sizeof(float));
            for (size_t d = n_heads * dim; d < ld_out; d++)
                CHECK(isnan(result[i * ld_out + d]));
        }
    }
};

static void test_case(const attention_case &c, size_t number) {
    const setting s(c);
    const size_t n = s.n_rows * s.n_heads * s.dim, bytes = n * sizeof(float);
    std::vector<float> whole(n, NAN), other(n, NAN);
    s.run(0, c.sequences.size(), 0, INT32_MAX, false, whole);
    difference d;
    for (size_t i = 0; i < n; i++)
        d.add((double)whole[i], (double)s.wanted[i]);
    CHECK_AT(d.relative() <= 2e-6, "case %zu: off by %g", number, d.relative());

    emulate::backward = true;
    s.run(0, c.sequences.size(), 0, INT32_MAX, true, other);
    emulate::backward = false;
    CHECK_AT(memcmp(other.data(), whole.data(), bytes) == 0, "case %zu, split", number);

    /* Each sequence alone, in chunks of 3 tokens, and its last token as in decode. */
    other.assign(n, NAN);
    for (size_t i = 0; i < c.sequences.size(); i++)
        for (int32_t begin = 0; begin < c.sequences[i].n_tokens; begin += 3)
            s.run(i, i + 1, begin, 3, begin % 2 == 0, other);
    CHECK_AT(memcmp(other.data(), whole.data(), bytes) == 0, "case %zu, in pieces", number);
    s.run(0, c.sequences.size(), INT32_MAX, 1, true, other);
    CHECK_AT(memcmp(other.data(), whole.data(), bytes) == 0, "case %zu, last tokens", number);
}

static void test_visibility() {
    for (int32_t i = 0; i < 20000; i++) {
        const int32_t n_sinks = i % 5, window = i % 3 ? i % 37 + 1 : 0, own = i % 4 ? 0 : i % 41, position = i % 97;
        const fb_sequence s = {nullptr, 0, 0, 1, window, window ? n_sinks : 0, 0, 0, nullptr, 0};
        const fb_cuda_sequence on_device = {0, 0, 1, s.window, s.n_sinks, 0};
        CHECK(lowest_visible(on_device, own, position) == access_lowest_visible(&s, own, position));
        CHECK(sees_sinks(on_device, own, position) == access_sees_sinks(&s, own, position));
    }
}

int main() {
    const std::vector<sequence_case> decoding = {
        {0, 1, 0, 0}, {31, 1, 0, 0}, {32, 1, 0, 0}, {255, 1, 0, 0}, {256, 1, 0, 0}, {700, 1, 0, 0}};
    const std::vector<sequence_case> prompts = {{0, 35, 0, 0}, {250, 10, 0, 0}};
    const std::vector<sequence_case> sliding = {
        {600, 3, 100, 4}, {20, 18, 24, 8}, {900, 1, 300, 32}, {40, 2, 1, 1}, {70, 1, 30, 0}};
    const attention_case cases[] = {
        {FB_F32, FB_F32, 64, 2, 4, 64, 0, decoding},
        {FB_F16, FB_F16, 128, 1, 8, 128, 0, decoding},
        {FB_F16, FB_F16, 80, 2, 1, 32, 0, prompts},
        {FB_BF16, FB_F16, 33, 1, 3, 32, 0, prompts},
        {FB_Q8_0, FB_Q8_0, 64, 1, 5, 64, 0, prompts},
        {FB_Q8_0, FB_BF16, 96, 1, 2, 96, 0, decoding},
        {FB_F32, FB_Q8_0, 200, 1, 2, 200, 0, decoding},
        {FB_F16, FB_F32, 600, 1, 2, 64, 0, {{250, 9, 0, 0}}},
        {FB_F32, FB_F32, 1024, 1, 1, 0, 0, {{33, 2, 0, 0}}},
        {FB_F16, FB_F16, 16, 1, 7, 16, 0, prompts},
        {FB_F32, FB_F32, 1, 1, 2, 0, 0, prompts},
        {FB_F32, FB_F16, 64, 2, 6, 64, 0, sliding},
        {FB_Q8_0, FB_Q8_0, 24, 1, 4, 20, 0, sliding},
        {FB_F32, FB_F32, 32, 1, 2, 32, 50, decoding},
        {FB_F32, FB_F32, 32, 1, 2, 32, 9, prompts},
        {FB_F32, FB_F32, 32, 1, 2, 32, 1, prompts},
        {FB_F32, FB_F32, 32, 1, 2, 32, 50, sliding},
        {FB_F32, FB_F32, 32, 1, 2, 32, 332, sliding},
        {FB_F16, FB_F16, 64, 1, 24, 64, 0, {{300, 2, 0, 0}, {5, 1, 0, 0}}},
    };
    test_visibility();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        test_case(cases[i], i);
    return check_result();
}
