/* model.c - see model.h. */
#include "model.h"

#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = 256, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 64, INNER = 250, LAYERS = 2 };
enum { QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM, MOST_OPS = 1 + 12 * LAYERS + 3 };
enum { STREAM, NORMED, HEADS_IN, HEADS_OUT, MLP, ENDS, ENDS_NORMED, N_BUFFERS };

static const struct fb_kv_layer kv_layers[LAYERS] = {{KV_HEADS, HEAD_DIM, HEAD_DIM}, {KV_HEADS, HEAD_DIM, HEAD_DIM}};

struct model {
    fb_weight *weights[2 + 6 * LAYERS];
    int32_t n_weights, n_ops;
    float norm[WIDTH], bias[QKV], head_norm[HEAD_DIM], frequencies[HEAD_DIM / 2];
    struct fb_op ops[MOST_OPS];
    fb_program *program;
    fb_device *device;
};

static uint64_t state = 1;

static void fill(float *x, size_t n, float size) {
    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(int32_t)(state >> 32) / 2147483648.0f * size;
    }
}

enum { MOST_MATRICES = 2 * (2 + 6 * LAYERS) };

/* Random numbers in a format, created once: some formats are slow to quantize, and tests create
 * many models. */
static const void *random_rows(int32_t number, enum fb_dtype dtype, int32_t n_rows, int32_t n_cols, size_t *n_bytes) {
    static void *made[MOST_MATRICES];
    const size_t n = (size_t)n_rows * (size_t)n_cols;
    *n_bytes = n / (size_t)fb_dtype_block_size(dtype) * fb_dtype_block_bytes(dtype);
    if (made[number]) return made[number];
    float *rows = malloc(n * sizeof *rows);
    fill(rows, n, 0.1f);
    made[number] = malloc(*n_bytes);
    CHECK(fb_quantize(dtype, rows, n_rows, n_cols, 1, made[number], *n_bytes) == FB_OK);
    free(rows);
    return made[number];
}

/* [n_rows, n_cols], or with `interleaved` two of n_rows rows for SwiGLU. */
static fb_weight *matrix(struct model *m, enum fb_dtype dtype, int32_t n_rows, int32_t n_cols, bool interleaved) {
    fb_weight *weight = NULL;
    CHECK(fb_weight_create(dtype, interleaved ? (n_rows + 15) / 16 * 32 : n_rows, n_cols, &weight) == FB_OK);
    for (int32_t half = 0; half < (interleaved ? 2 : 1); half++) {
        size_t n_bytes;
        const void *rows = random_rows(2 * m->n_weights + half, dtype, n_rows, n_cols, &n_bytes);
        CHECK(
            fb_weight_pack_rows(weight, 16 * half, 16, interleaved ? 2 : 1, dtype, rows, n_bytes, n_rows, 1) == FB_OK);
    }
    return m->weights[m->n_weights++] = weight;
}

static struct fb_op *add(struct model *m, enum fb_op_kind kind, int32_t in, int32_t out, const fb_weight *weight) {
    struct fb_op *op = &m->ops[m->n_ops++];
    *op = (struct fb_op){
        .kind = kind, .in = in, .out = out, .residual = -1, .weight = weight, .eps = 1e-5f, .scale = 1};
    if (kind == FB_OP_RMS_NORM) {
        op->vector = m->norm;
        op->vector_length = WIDTH;
    }
    return op;
}

/* q and k in one matrix with a bias and v in another, head norms, a window in the second layer, embedding and
 * output tied. */
static void add_layer(struct model *m, int32_t layer) {
    static const enum fb_dtype formats[LAYERS][5] = {
        {FB_Q4_K, FB_Q8_0, FB_F32, FB_Q6_K, FB_F16}, {FB_IQ4_NL, FB_BF16, FB_Q5_1, FB_Q2_K, FB_F32}};
    const enum fb_dtype *of = formats[layer];
    const int32_t qk = (HEADS + KV_HEADS) * HEAD_DIM;
    add(m, FB_OP_RMS_NORM, STREAM, NORMED, NULL);
    struct fb_op *op = add(m, FB_OP_LINEAR, NORMED, HEADS_IN, matrix(m, of[0], qk, WIDTH, false));
    op->vector = m->bias;
    op->vector_length = qk;
    add(m, FB_OP_LINEAR, NORMED, HEADS_IN, matrix(m, of[1], KV_HEADS * HEAD_DIM, WIDTH, false))->column = qk;
    op = add(m, FB_OP_HEAD_NORM, HEADS_IN, -1, NULL);
    op->vector = op->vector2 = m->head_norm;
    op->vector_length = op->vector2_length = HEAD_DIM;
    add(m, FB_OP_ROPE, HEADS_IN, -1, NULL);
    add(m, FB_OP_KV_WRITE, HEADS_IN, -1, NULL)->layer = layer;
    op = add(m, FB_OP_ATTENTION, HEADS_IN, HEADS_OUT, NULL);
    op->layer = layer;
    op->scale = 0.125f;
    op->window = layer ? 40 : 0;
    add(m, FB_OP_LINEAR, HEADS_OUT, STREAM, matrix(m, of[2], WIDTH, WIDTH, false))->residual = STREAM;
    add(m, FB_OP_RMS_NORM, STREAM, NORMED, NULL);
    add(m, FB_OP_LINEAR_GATED, NORMED, MLP, matrix(m, of[3], INNER, WIDTH, true))->activation = FB_ACTIVATION_SILU;
    add(m, FB_OP_LINEAR, MLP, STREAM, matrix(m, layer ? FB_F32 : FB_F16, WIDTH, INNER, false))->residual = STREAM;
}

struct model *model_create(fb_device *device) {
    static const int32_t widths[N_BUFFERS] = {WIDTH, WIDTH, QKV, WIDTH, INNER, WIDTH, WIDTH};
    static const struct fb_heads heads = {HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, 0, 0};
    struct model *m = calloc(1, sizeof *m);
    const struct fb_rope_table rope = {m->frequencies, HEAD_DIM / 2, 1.0f};
    const struct fb_program_shape shape = {
        sizeof shape, LAYERS, MODEL_VOCABULARY, MODEL_TOKENS, N_BUFFERS, 1, &heads, 1, &rope, 0};
    m->device = device;
    state = 1;
    fill(m->norm, WIDTH, 1.0f);
    fill(m->bias, QKV, 0.5f);
    fill(m->head_norm, HEAD_DIM, 1.0f);
    for (int i = 0; i < HEAD_DIM / 2; i++)
        m->frequencies[i] = 1.0f / (float)(1 + i * i);
    const fb_weight *embedding = matrix(m, FB_F16, MODEL_VOCABULARY, WIDTH, false);
    add(m, FB_OP_EMBED, -1, STREAM, embedding)->scale = 2.0f;
    for (int32_t layer = 0; layer < LAYERS; layer++)
        add_layer(m, layer);
    add(m, FB_OP_GATHER_OUTPUTS, STREAM, ENDS, NULL);
    add(m, FB_OP_RMS_NORM, ENDS, ENDS_NORMED, NULL);
    add(m, FB_OP_LOGITS, ENDS_NORMED, -1, embedding);
    enum fb_status status = FB_OK;
    for (int32_t i = 0; device && status == FB_OK && i < m->n_weights; i++)
        status = fb_weight_move(m->weights[i], device);
    if (status == FB_OK)
        status = fb_program_create_on(device, &shape, widths, m->ops, m->n_ops, 1, FB_ISA_AUTO, &m->program);
    if (status == FB_OK) return m;
    CHECK_AT(status == FB_DEVICE_FAILED || status == FB_DEVICE_MEMORY, "%d, %s", status, fb_last_error());
    model_free(m);
    return NULL;
}

void model_free(struct model *m) {
    if (!m) return;
    fb_program_free(m->program);
    for (int32_t i = 0; i < m->n_weights; i++)
        fb_weight_free(m->weights[i]);
    free(m);
}

fb_program *model_program(const struct model *m) {
    return m->program;
}

fb_page_pool *model_pool(const struct model *m, int32_t n_pages) {
    fb_page_pool *pool = NULL;
    CHECK_AT(fb_page_pool_create_on(m->device, FB_F32, FB_F32, n_pages, kv_layers, LAYERS, &pool) == FB_OK, "%s",
        fb_last_error());
    const size_t n_bytes = fb_page_bytes(pool);
    float *page = malloc(n_bytes);
    state = 3;
    for (int32_t i = 0; i < n_pages; i++) {
        fill(page, n_bytes / sizeof *page, 1.0f);
        CHECK(fb_page_write(pool, i, page, n_bytes) == FB_OK);
    }
    free(page);
    return pool;
}

/* Runs a batch on the device and, unless `pool` is NULL, on the CPU. Logits go to `got` and `wanted`. */
static void run_both(const struct model *m, fb_page_pool *pool, const struct model *on_device, fb_page_pool *pool_there,
    const struct fb_batch *batch, float *wanted, float *got) {
    const size_t n = (size_t)batch->n_outputs * MODEL_VOCABULARY;
    if (pool) CHECK_AT(fb_program_run(m->program, pool, batch, wanted, n) == FB_OK, "%s", fb_last_error());
    CHECK_AT(fb_program_run(on_device->program, pool_there, batch, got, n) == FB_OK, "%s", fb_last_error());
}

static double difference(const float *got, const float *wanted, size_t n) {
    double apart = 0.0, size = 0.0;
    for (size_t i = 0; i < n; i++) {
        apart += pow((double)got[i] - (double)wanted[i], 2.0);
        size += pow((double)wanted[i], 2.0);
    }
    return sqrt(apart / size);
}

enum { LENGTH = 44 };

/* Logits of all positions of a sequence that is prefilled in chunks of `piece` tokens, starting as `sequence`
 * says. */
static void run_text(const struct model *m, fb_page_pool *pool, const struct model *on_device, fb_page_pool *pool_there,
    struct fb_sequence sequence, int32_t piece, float *wanted, float *got) {
    int32_t tokens[LENGTH], outputs[LENGTH];
    for (int32_t t = 0; t < LENGTH; t++) {
        tokens[t] = (t * t + 3 * t) % MODEL_VOCABULARY;
        outputs[t] = t;
    }
    for (int32_t past = 0; past < LENGTH; past += piece) {
        const int32_t n = LENGTH - past < piece ? LENGTH - past : piece;
        sequence.n_past = past;
        sequence.n_tokens = n;
        const struct fb_batch batch = {sizeof batch, n, tokens + past, &sequence, 1, outputs, n, NULL};
        run_both(
            m, pool, on_device, pool_there, &batch, wanted + past * MODEL_VOCABULARY, got + past * MODEL_VOCABULARY);
    }
}

/* Sampling settings; all kinds together use every step of the chain. */
static struct fb_sampling settings_of(int32_t kind) {
    struct fb_sampling s;
    fb_sampling_default(&s);
    s.seed = 11;
    s.temperature = kind == 0 ? 0.0f : 1.5f;
    s.repetition_penalty = kind == 1 ? 1.0f : 1.3f;
    s.top_k = kind == 2 ? 20 : 0;
    s.top_p = kind == 2 ? 0.8f : 1.0f;
    return s;
}

/* Sequences that continue from the same pages, some with several tokens first, and one prefill chunk: what
 * the device samples in one call must equal what fb_sample returns for the logits of one run after
 * another. */
static void check_decoding(const struct model *m, fb_page_pool *pool, const struct fb_sequence *from) {
    enum { N = 4, STEPS = 5, SAMPLED = 3, MOST = 4 };
    static const int32_t pages[N][3] = {{20, 21, 22}, {23, 24, 25}, {26, 27, 28}, {17, 18, 19}};
    static const int32_t bias_ids[2] = {9, 4};
    static const float bias[2] = {-INFINITY, 1.0f};
    static float scratch[N * MODEL_VOCABULARY];
    static double work[64 * MODEL_VOCABULARY];
    CHECK(sizeof work >= fb_sample_work_bytes(MODEL_VOCABULARY));
    struct fb_sampling settings[N];
    int32_t history[N][LENGTH + MOST + STEPS], again[LENGTH + MOST + STEPS];
    float logprobs[N][STEPS];
    struct fb_decode_request requests[N];
    for (int32_t i = 0; i < N; i++) {
        settings[i] = settings_of(i);
        for (int32_t t = 0; t < LENGTH + MOST; t++)
            history[i][t] = (7 * t + i) % 30;
        for (int32_t page = 0; page < 2; page++)
            CHECK(fb_page_copy(pool, pages[i][page], from->pages[page]) == FB_OK);
        requests[i] = (struct fb_decode_request){.sequence = {pages[i], 3, LENGTH, 1 + i, 0, 0, 0, 0, NULL, 0},
            .n_steps = i < SAMPLED ? STEPS : 0,
            .history = history[i],
            .n_history = LENGTH + 1 + i,
            .logprobs = i < SAMPLED ? logprobs[i] : NULL,
            .settings = &settings[i],
            .bias_ids = bias_ids,
            .bias_values = bias,
            .n_bias = i == 2 ? 2 : 0};
    }
    for (size_t i = 0; i < N * MODEL_VOCABULARY; i++)
        scratch[i] = NAN;
    double seconds[STEPS];
    int32_t n_done = 0;
    CHECK_AT(fb_program_decode(m->program, pool, NULL, requests, N, STEPS, NULL, scratch, N * MODEL_VOCABULARY, seconds,
                 &n_done) == FB_OK,
        "%s", fb_last_error());
    CHECK(n_done == STEPS && requests[SAMPLED].n_sampled == 0);
    for (size_t i = 0; i < N * MODEL_VOCABULARY; i++)
        CHECK(isnan(scratch[i])); /* no logits were copied */
    for (int32_t i = 0; i < SAMPLED; i++) {
        CHECK(requests[i].n_sampled == STEPS);
        for (int32_t page = 0; page < 2; page++)
            CHECK(fb_page_copy(pool, pages[i][page], from->pages[page]) == FB_OK);
        memcpy(again, history[i], sizeof again);
        for (int32_t step = 0; step < STEPS; step++) {
            const int32_t n = requests[i].n_history + step, n_tokens = step ? 1 : 1 + i, output = n_tokens - 1;
            const struct fb_sequence sequence = {pages[i], 3, n - n_tokens, n_tokens, 0, 0, 0, 0, NULL, 0};
            const struct fb_batch batch = {
                sizeof batch, n_tokens, again + n - n_tokens, &sequence, 1, &output, 1, NULL};
            float logprob;
            CHECK(fb_program_run(m->program, pool, &batch, scratch, MODEL_VOCABULARY) == FB_OK);
            CHECK(fb_sample(scratch, MODEL_VOCABULARY, &settings[i], (uint64_t)n, again, n, bias_ids, bias,
                      requests[i].n_bias, NULL, 0, work, &again[n], &logprob) == FB_OK);
            CHECK_AT(again[n] == history[i][n], "text %d, step %d: %d, not %d", i, step, history[i][n], again[n]);
            CHECK_AT(fabsf(logprob - logprobs[i][step]) <= 1e-6f * fabsf(logprob), "text %d, step %d: %g, not %g", i,
                step, (double)logprobs[i][step], (double)logprob);
        }
    }
}

int model_compare(
    const struct model *m, const struct model *on_device, enum fb_dtype k, enum fb_dtype v, double tolerance) {
    static float wanted[LENGTH * MODEL_VOCABULARY], got[LENGTH * MODEL_VOCABULARY], other[LENGTH * MODEL_VOCABULARY];
    static const int32_t pages[5][3] = {{5, 3, 4}, {9, 8, 7}, {2, 0, 1}, {12, 11, 10}, {14, 15, 16}};
    fb_page_pool *pool = NULL;
    fb_page_pool *pool_there = NULL;
    CHECK(fb_page_pool_create(k, v, MODEL_PAGES, kv_layers, LAYERS, &pool) == FB_OK);
    CHECK_AT(fb_page_pool_create_on(on_device->device, k, v, MODEL_PAGES, kv_layers, LAYERS, &pool_there) == FB_OK,
        "%s", fb_last_error());
    const struct fb_sequence whole = {pages[0], 3, 0, 0, 0, 0, 0, 0, NULL, 0},
                             again = {pages[1], 3, 0, 0, 0, 0, 0, 0, NULL, 0};
    const struct fb_sequence slides = {pages[2], 3, 0, 0, 30, 4, 0, 0, NULL, 0},
                             slides_too = {pages[3], 3, 0, 0, 30, 4, 0, 0, NULL, 0};
    for (int32_t kind = 0; kind < 2; kind++) {
        run_text(m, pool, on_device, pool_there, kind ? slides : whole, 30, wanted, got);
        const double apart = difference(got, wanted, LENGTH * MODEL_VOCABULARY);
        CHECK_AT(apart <= tolerance, "K %d, V %d, kind %d: off by %g", (int)k, (int)v, kind, apart);
        run_text(m, NULL, on_device, pool_there, kind ? slides_too : again, kind ? 4 : 7, wanted, other);
        CHECK_AT(memcmp(got, other, sizeof got) == 0, "K %d, V %d, kind %d: in pieces", (int)k, (int)v, kind);
    }

    /* Two sequences in one batch, with a fork of one of them that has a copy of its last page. */
    const int32_t forked[3] = {pages[0][0], pages[4][1], pages[0][2]};
    CHECK(fb_page_copy(pool, pages[4][1], pages[0][1]) == FB_OK);
    CHECK(fb_page_copy(pool_there, pages[4][1], pages[0][1]) == FB_OK);
    const struct fb_sequence both[3] = {{pages[0], 3, LENGTH, 1, 0, 0, 0, 0, NULL, 0},
        {forked, 3, LENGTH, 2, 0, 0, 0, 0, NULL, 0}, {pages[2], 3, LENGTH, 3, 30, 4, 0, 0, NULL, 0}};
    const int32_t tokens[6] = {7, 8, 9, 10, 11, 12}, outputs[3] = {0, 2, 5};
    const struct fb_batch batch = {sizeof batch, 6, tokens, both, 3, outputs, 3, NULL};
    run_both(m, pool, on_device, pool_there, &batch, wanted, got);
    const double apart = difference(got, wanted, 3 * MODEL_VOCABULARY);
    CHECK_AT(apart <= tolerance, "K %d, V %d: side by side off by %g", (int)k, (int)v, apart);
    const struct fb_batch silent = {sizeof silent, 6, tokens, both, 3, NULL, 0, NULL};
    CHECK(fb_program_run(on_device->program, pool_there, &silent, NULL, 0) == FB_OK);
    CHECK(fb_program_run(on_device->program, pool_there, &batch, other, 5) == FB_INVALID_ARGUMENT);
    CHECK(fb_program_run(on_device->program, pool_there, &batch, other, 3 * MODEL_VOCABULARY) == FB_OK);
    CHECK(memcmp(got, other, 3 * MODEL_VOCABULARY * sizeof *got) == 0);

    check_decoding(on_device, pool_there, &both[0]);

    /* Pages copied to the host and back. */
    const size_t n_bytes = fb_page_bytes(pool);
    char *page = malloc(n_bytes), *back = malloc(n_bytes);
    CHECK(fb_page_bytes(pool_there) == n_bytes);
    CHECK(fb_page_read(pool, pages[0][0], page, n_bytes) == FB_OK);
    CHECK(fb_page_write(pool_there, 30, page, n_bytes) == FB_OK && fb_page_copy(pool_there, 31, 30) == FB_OK);
    CHECK(fb_page_read(pool_there, 31, back, n_bytes) == FB_OK && memcmp(page, back, n_bytes) == 0);
    memset(page, 0, n_bytes);
    CHECK(fb_page_zero(pool_there, 31) == FB_OK && fb_page_read(pool_there, 31, back, n_bytes) == FB_OK);
    CHECK(memcmp(page, back, n_bytes) == 0);
    CHECK(fb_page_zero(pool_there, MODEL_PAGES) == FB_INVALID_ARGUMENT);
    CHECK(fb_page_read(pool_there, 0, back, n_bytes - 1) == FB_INVALID_ARGUMENT);
    free(page);
    free(back);
    fb_page_pool_free(pool);
    fb_page_pool_free(pool_there);
    return check_result();
}

enum fb_status model_step(const struct model *m, float logits[MODEL_VOCABULARY]) {
    const int32_t page = 1, token = 3, output = 0;
    fb_page_pool *pool = NULL;
    enum fb_status status = fb_page_pool_create_on(m->device, FB_F16, FB_F16, 2, kv_layers, LAYERS, &pool);
    const struct fb_sequence sequence = {&page, 1, 0, 1, 0, 0, 0, 0, NULL, 0};
    const struct fb_batch batch = {sizeof batch, 1, &token, &sequence, 1, &output, 1, NULL};
    if (status == FB_OK) status = fb_program_run(m->program, pool, &batch, logits, MODEL_VOCABULARY);
    fb_page_pool_free(pool);
    return status;
}

enum fb_status model_decode(const struct model *m, int32_t *token, float *logprob) {
    const int32_t page = 1;
    int32_t history[] = {3, 4, 5, -1}, n_done;
    float scratch[MODEL_VOCABULARY];
    double seconds;
    fb_page_pool *pool = NULL;
    enum fb_status status = fb_page_pool_create_on(m->device, FB_F16, FB_F16, 2, kv_layers, LAYERS, &pool);
    const struct fb_sampling settings = settings_of(2);
    struct fb_decode_request request = {.sequence = {&page, 1, 0, 3, 0, 0, 0, 0, NULL, 0},
        .n_steps = 1,
        .history = history,
        .n_history = 3,
        .logprobs = logprob,
        .settings = &settings};
    if (status == FB_OK)
        status = fb_program_decode(
            m->program, pool, NULL, &request, 1, 1, NULL, scratch, MODEL_VOCABULARY, &seconds, &n_done);
    fb_page_pool_free(pool);
    *token = history[3];
    return status;
}

enum fb_status model_prompt(const struct model *m, int32_t n_tokens, float logits[MODEL_VOCABULARY]) {
    int32_t pages[MODEL_PAGES], tokens[MODEL_TOKENS];
    for (int32_t i = 0; i < MODEL_PAGES; i++)
        pages[i] = i;
    for (int32_t t = 0; t < n_tokens; t++)
        tokens[t] = (t * t + 5 * t) % MODEL_VOCABULARY;
    fb_page_pool *pool = NULL;
    enum fb_status status = fb_page_pool_create_on(m->device, FB_F16, FB_F16, MODEL_PAGES, kv_layers, LAYERS, &pool);
    const int32_t output = n_tokens - 1;
    const struct fb_sequence sequence = {
        pages, (n_tokens - 1) / FB_PAGE_POSITIONS + 1, 0, n_tokens, 0, 0, 0, 0, NULL, 0};
    const struct fb_batch batch = {sizeof batch, n_tokens, tokens, &sequence, 1, &output, 1, NULL};
    if (status == FB_OK) status = fb_program_run(m->program, pool, &batch, logits, MODEL_VOCABULARY);
    fb_page_pool_free(pool);
    return status;
}
