/*
 * test_program.c - a whole small model, on every instruction set of this CPU: the logits of a text that is
 * computed at once and in chunks, with one thread and with several, have the bits of the reference kernels.
 *
 * The Python tests check the same with real models; this one also runs without Python, under emulation.
 * Hashes of the logits are recorded, which proves that x86-64 and AArch64 agree. Changing them changes every
 * reply that a seed has ever produced.
 */
#include "check.h"
#include "fabula.h"

#include <fenv.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = 256, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 64, INNER = 256, VOCABULARY = 96, LAYERS = 2, TOKENS = 40 };
enum { QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM, PAGES = 2, MOST_OPS = 1 + 10 * LAYERS + 2 };
enum { STREAM, NORMED, HEADS_IN, HEADS_OUT, MLP, ENDS, N_BUFFERS };

/* Rope angles depend on the last bits of the C library. */
#ifdef __GLIBC__
enum { KNOWN_LIBRARY = 1 };
#else
enum { KNOWN_LIBRARY = 0 };
#endif

/* Formats of the matrices of both layers: every kind of product occurs. */
static const enum fb_dtype formats[LAYERS][4] = {
    {FB_Q4_K, FB_Q8_0, FB_Q6_K, FB_F16}, {FB_IQ4_NL, FB_BF16, FB_Q2_K, FB_F32}};

static uint64_t state = 1;

static void fill(float *x, size_t n, float size) {
    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(int32_t)(state >> 32) / 2147483648.0f * size;
    }
}

static fb_weight *matrix(enum fb_dtype dtype, int32_t n_rows) {
    static float rows[QKV * WIDTH];
    fb_weight *weight = NULL;
    fill(rows, (size_t)n_rows * WIDTH, 0.1f);
    CHECK(fb_weight_create(dtype, n_rows, WIDTH, &weight) == FB_OK);
    CHECK(
        fb_weight_pack_rows(weight, 0, 1, 1, FB_F32, rows, (size_t)n_rows * WIDTH * sizeof *rows, n_rows, 1) == FB_OK);
    return weight;
}

struct model {
    fb_weight *embedding, *output, *matrices[LAYERS][4];
    float norm[WIDTH], head_norm[HEAD_DIM], frequencies[HEAD_DIM / 2];
    struct fb_op ops[MOST_OPS];
    int32_t n_ops;
};

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

static void build(struct model *m) {
    memset(m, 0, sizeof *m);
    fill(m->norm, WIDTH, 1.0f);
    fill(m->head_norm, HEAD_DIM, 1.0f);
    for (int i = 0; i < HEAD_DIM / 2; i++)
        m->frequencies[i] = 1.0f / (float)(1 + i * i);
    m->embedding = matrix(FB_F16, VOCABULARY);
    m->output = matrix(FB_Q5_0, VOCABULARY);
    add(m, FB_OP_EMBED, -1, STREAM, m->embedding);
    for (int layer = 0; layer < LAYERS; layer++) {
        fb_weight **w = m->matrices[layer];
        w[0] = matrix(formats[layer][0], QKV);
        w[1] = matrix(formats[layer][1], WIDTH);
        w[2] = matrix(formats[layer][2], 2 * INNER);
        w[3] = matrix(formats[layer][3], WIDTH);
        add(m, FB_OP_RMS_NORM, STREAM, NORMED, NULL);
        add(m, FB_OP_LINEAR, NORMED, HEADS_IN, w[0]);
        struct fb_op *norm = add(m, FB_OP_HEAD_NORM, HEADS_IN, -1, NULL);
        norm->vector = norm->vector2 = m->head_norm;
        norm->vector_length = norm->vector2_length = HEAD_DIM;
        add(m, FB_OP_ROPE, HEADS_IN, -1, NULL);
        add(m, FB_OP_KV_WRITE, HEADS_IN, -1, NULL)->layer = layer;
        struct fb_op *attention = add(m, FB_OP_ATTENTION, HEADS_IN, HEADS_OUT, NULL);
        attention->layer = layer;
        attention->scale = 0.125f;
        add(m, FB_OP_LINEAR, HEADS_OUT, STREAM, w[1])->residual = STREAM;
        add(m, FB_OP_RMS_NORM, STREAM, NORMED, NULL);
        add(m, FB_OP_LINEAR_GATED, NORMED, MLP, w[2])->activation = FB_ACTIVATION_SILU;
        add(m, FB_OP_LINEAR, MLP, STREAM, w[3])->residual = STREAM;
    }
    add(m, FB_OP_GATHER_OUTPUTS, STREAM, ENDS, NULL);
    add(m, FB_OP_LOGITS, ENDS, -1, m->output);
}

/* Logits [TOKENS, VOCABULARY] of a text that is computed in chunks of up to `piece` tokens. */
static void run(const struct model *m, enum fb_isa isa, int32_t n_threads, enum fb_dtype k, enum fb_dtype v,
    int32_t piece, float *logits) {
    static const int32_t widths[N_BUFFERS] = {WIDTH, WIDTH, QKV, WIDTH, INNER, WIDTH}, pages[PAGES] = {1, 0};
    const struct fb_heads heads = {HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, 0, 0};
    const struct fb_rope_table rope = {m->frequencies, HEAD_DIM / 2, 1.0f};
    const struct fb_kv_layer layer = {KV_HEADS, HEAD_DIM, HEAD_DIM}, layers[LAYERS] = {layer, layer};
    const struct fb_program_shape shape = {sizeof shape, LAYERS, VOCABULARY, TOKENS, N_BUFFERS, 1, &heads, 1, &rope, 0};
    fb_program *program = NULL;
    fb_page_pool *pool = NULL;
    CHECK_AT(
        fb_program_create(&shape, widths, m->ops, m->n_ops, n_threads, isa, &program) == FB_OK, "%s", fb_last_error());
    CHECK(fb_page_pool_create(k, v, PAGES, layers, LAYERS, &pool) == FB_OK);
    int32_t tokens[TOKENS], outputs[TOKENS];
    for (int32_t t = 0; t < TOKENS; t++) {
        tokens[t] = t * t % VOCABULARY;
        outputs[t] = t;
    }
    for (int32_t past = 0; past < TOKENS; past += piece) {
        const int32_t n = TOKENS - past < piece ? TOKENS - past : piece;
        const struct fb_sequence sequence = {pages, PAGES, past, n, 0, 0, 0, 0, NULL, 0};
        const struct fb_batch batch = {sizeof batch, n, tokens + past, &sequence, 1, outputs, n, NULL};
        CHECK_AT(fb_program_run(program, pool, &batch, logits + past * VOCABULARY, (size_t)n * VOCABULARY) == FB_OK,
            "%s", fb_last_error());
    }
    fb_program_free(program);
    fb_page_pool_free(pool);
}

static uint64_t hash_of(const void *bytes, size_t n) { /* FNV-1a */
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ ((const unsigned char *)bytes)[i]) * 1099511628211u;
    return hash;
}

int main(void) {
    static struct model model;
    static float wanted[TOKENS * VOCABULARY], got[TOKENS * VOCABULARY];
    static const struct {
        enum fb_dtype k, v;
        uint64_t hash;
    } caches[] = {{FB_F16, FB_F16, 0x290322a185127bca}, {FB_Q8_0, FB_BF16, 0xe0969020b7c4e20f},
        {FB_F32, FB_Q8_0, 0xf445312448b1553d}};
    static const int32_t pieces[] = {TOKENS, 17, 1}, threads[] = {2, 1, 2};
    build(&model);
    CHECK(fb_isa_available(fb_isa_best()));
    for (size_t i = 0; i < sizeof caches / sizeof *caches; i++) {
        run(&model, FB_ISA_REFERENCE, 1, caches[i].k, caches[i].v, TOKENS, wanted);
        const uint64_t hash = hash_of(wanted, sizeof wanted);
        CHECK_AT(!KNOWN_LIBRARY || hash == caches[i].hash, "cache %zu: 0x%016llx", i, (unsigned long long)hash);
        for (int isa = FB_ISA_REFERENCE; isa <= FB_ISA_AVX512_AMX; isa++)
            for (int p = isa == FB_ISA_REFERENCE; p < (isa == FB_ISA_REFERENCE ? 2 : 3); p++) {
                if (!fb_isa_available((enum fb_isa)isa)) continue;
                memset(got, 0, sizeof got);
                run(&model, (enum fb_isa)isa, threads[p], caches[i].k, caches[i].v, pieces[p], got);
                CHECK_AT(memcmp(got, wanted, sizeof got) == 0, "isa %d, cache %zu, %d threads, pieces of %d", isa, i,
                    threads[p], pieces[p]);
            }
    }
    /* The caller's rounding mode does not affect the results, and is restored. */
    CHECK(fesetround(FE_TOWARDZERO) == 0);
    for (int32_t n_threads = 1; n_threads <= 2; n_threads++) {
        memset(got, 0, sizeof got);
        run(&model, FB_ISA_AUTO, n_threads, FB_F32, FB_Q8_0, 17, got);
        CHECK_AT(memcmp(got, wanted, sizeof got) == 0, "rounding mode, %d threads", n_threads);
        CHECK(fegetround() == FE_TOWARDZERO);
    }
    fesetround(FE_TONEAREST);
    for (int layer = 0; layer < LAYERS; layer++)
        for (int w = 0; w < 4; w++)
            fb_weight_free(model.matrices[layer][w]);
    fb_weight_free(model.embedding);
    fb_weight_free(model.output);
    return check_result();
}
