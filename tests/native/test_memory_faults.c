/*
 * test_memory_faults.c - every public call with its 1st, 2nd, ... memory request refused, until none is
 * refused.
 *
 * The linker redirects the library's malloc, calloc, aligned_alloc, realloc, mmap, free and munmap to the
 * wrappers below (see CMakeLists.txt); libc's and OpenMP's own requests are not redirected. A refused call
 * returns FB_OUT_OF_MEMORY, leaves what its pointers point to unchanged, keeps no memory, and works when
 * called again.
 */
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/memory.h"
#include "check.h"
#include "fabula.h"
#include "fabula_bench.h"

/* ---- Wrappers ---------------------------------------------------------------------------------------------------- */

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void __real_free(void *memory);
void *__real_mmap(void *address, size_t size, int protection, int flags, int file, off_t offset);
int __real_munmap(void *address, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *memory, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
void __wrap_free(void *memory);
void *__wrap_mmap(void *address, size_t size, int protection, int flags, int file, off_t offset);
int __wrap_munmap(void *address, size_t size);

static atomic_long n_requests;         /* since `refuse_from` was set */
static long refuse_first, refuse_last; /* requests refused, counted from 1; none when first is 0 */
static atomic_long n_blocks, n_mapped_bytes;

static bool refused(void) {
    const long request = atomic_fetch_add(&n_requests, 1) + 1;
    if (refuse_first == 0 || request < refuse_first || request > refuse_last) return false;
    errno = ENOMEM;
    return true;
}

static void *counted(void *memory) {
    if (memory) atomic_fetch_add(&n_blocks, 1);
    return memory;
}

void *__wrap_malloc(size_t size) {
    return refused() ? NULL : counted(__real_malloc(size));
}

void *__wrap_calloc(size_t count, size_t size) {
    return refused() ? NULL : counted(__real_calloc(count, size));
}

void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    return refused() ? NULL : counted(__real_aligned_alloc(alignment, size));
}

void *__wrap_realloc(void *memory, size_t size) {
    if (refused()) return NULL;
    void *moved = __real_realloc(memory, size);
    return memory ? moved : counted(moved);
}

void __wrap_free(void *memory) {
    if (memory) atomic_fetch_sub(&n_blocks, 1);
    __real_free(memory);
}

void *__wrap_mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
    if (refused()) return MAP_FAILED;
    void *memory = __real_mmap(address, size, protection, flags, file, offset);
    if (memory != MAP_FAILED) atomic_fetch_add(&n_mapped_bytes, (long)size);
    return memory;
}

int __wrap_munmap(void *address, size_t size) {
    const int failed = __real_munmap(address, size);
    if (!failed) atomic_fetch_sub(&n_mapped_bytes, (long)size);
    return failed;
}

/* ---- The sweep --------------------------------------------------------------------------------------------------- */

enum { N_FLOATS = 1 << 19 };                           /* at least what the largest call writes */
static float output[N_FLOATS], first_output[N_FLOATS]; /* output of calls, and of the first that succeeded */

/* One public call with its inputs prepared. Frees what it allocated, and checks what a failure must leave
 * unchanged. */
typedef enum fb_status (*call_function)(void);
#define CALL(name, expression)                                                                                         \
    static enum fb_status name(void) {                                                                                 \
        return expression;                                                                                             \
    }

/* Makes the call with its requests first .. last refused. `*made`: its number of requests. */
static enum fb_status call_refusing(const char *name, call_function call, long first, long last, long *made) {
    const long blocks = n_blocks, mapped = n_mapped_bytes;
    refuse_first = first;
    refuse_last = last;
    n_requests = 0;
    const enum fb_status status = call();
    refuse_first = 0;
    *made = n_requests;
    CHECK_AT(n_blocks == blocks && n_mapped_bytes == mapped, "%s, request %ld: %ld blocks and %ld mapped bytes kept",
        name, first, n_blocks - blocks, n_mapped_bytes - mapped);
    return status;
}

/* Refuses each request of the call in turn, alone and together with all that follow. The call makes
 * `expected` requests; -1: one or more. */
static void sweep(const char *name, call_function call, long expected) {
    long total, made;
    CHECK_AT(call_refusing(name, call, 0, 0, &total) == FB_OK, "%s: %s", name, fb_last_error());
    memcpy(first_output, output, sizeof output);
    CHECK_AT(expected < 0 ? total > 0 : total == expected, "%s: %ld requests for memory", name, total);
    for (long first = 1; first <= total; first++)
        for (int all = 0; all < 2; all++) {
            enum fb_status status = call_refusing(name, call, first, all ? INT32_MAX : first, &made);
            CHECK_AT(status == FB_OUT_OF_MEMORY, "%s, request %ld of %ld: status %d", name, first, total, (int)status);
            CHECK_AT(strstr(fb_last_error(), "memory"), "%s, request %ld: \"%s\"", name, first, fb_last_error());
            status = call_refusing(name, call, 0, 0, &made);
            CHECK_AT(!memcmp(output, first_output, sizeof output), "%s after request %ld: other results", name, first);
            CHECK_AT(status == FB_OK && made == total, "%s after request %ld: status %d", name, first, (int)status);
        }
}

/* ---- Inputs of the calls ----------------------------------------------------------------------------------------- */

enum {
    WIDTH = 32,
    N_HEADS = 2,
    HEAD_DIM = 16,
    QKV = (N_HEADS + 2) * HEAD_DIM, /* one KV head */
    N_VOCAB = 40,
    N_TOKENS = 40, /* two pages */
    LONG = 4096    /* tokens whose scratch is above 2 MiB and so comes from mmap */
};

static char nothing; /* value of an out pointer before a call */
static float input[N_FLOATS];
static int32_t positions[LONG];                               /* and token ids */
static fb_weight *square, *to_qkv, *interleaved, *vocabulary; /* with WIDTH columns */
static double flops_per_s;
static fb_page_pool *pool;
static fb_program *program;

static fb_weight *packed(int32_t n_rows, int32_t n_cols) {
    fb_weight *weight = NULL;
    CHECK(fb_weight_create(FB_F32, n_rows, n_cols, &weight) == FB_OK);
    CHECK(fb_weight_pack_rows(
              weight, 0, 16, 1, FB_F32, input, (size_t)n_rows * (size_t)n_cols * sizeof(float), n_rows, 1) == FB_OK);
    return weight;
}

/* Fills `output` with a value that no operator writes; `check_output` checks n numbers of it against the
 * status. */
static void mark_output(size_t n) {
    memset(output, 0xA5, n * sizeof *output);
}

static enum fb_status check_output(enum fb_status status, size_t n) {
    static const unsigned char mark[4] = {0xA5, 0xA5, 0xA5, 0xA5};
    size_t n_marked = 0;
    for (size_t i = 0; i < n; i++)
        n_marked += !memcmp(&output[i], mark, sizeof mark);
    CHECK_AT(
        n_marked == (status == FB_OK ? 0 : n), "status %d: %zu of %zu numbers untouched", (int)status, n_marked, n);
    return status;
}

/* ---- Calls that create ------------------------------------------------------------------------------------------- */

static enum fb_status create_weight(enum fb_dtype dtype, int32_t n_rows, int32_t n_cols) {
    fb_weight *weight = (fb_weight *)&nothing;
    const enum fb_status status = fb_weight_create(dtype, n_rows, n_cols, &weight);
    CHECK((weight == (fb_weight *)&nothing) == (status != FB_OK));
    if (status == FB_OK) fb_weight_free(weight);
    return status;
}

CALL(create_small_weight, create_weight(FB_F16, 3, 5))
CALL(create_large_weight, create_weight(FB_F32, 1000, 1000))

static const struct fb_kv_layer kv_layers[2] = {{1, HEAD_DIM, HEAD_DIM}, {1, HEAD_DIM, HEAD_DIM}};

static enum fb_status create_pool(int32_t n_pages) {
    fb_page_pool *made = (fb_page_pool *)&nothing;
    const enum fb_status status = fb_page_pool_create(FB_F16, FB_F16, n_pages, kv_layers, 2, &made);
    CHECK((made == (fb_page_pool *)&nothing) == (status != FB_OK));
    if (status == FB_OK) fb_page_pool_free(made);
    return status;
}

static enum fb_status create_states(int32_t n_slots) {
    static const int64_t layer_floats[] = {100, 3000};
    fb_state_pool *made = (fb_state_pool *)&nothing;
    const enum fb_status status = fb_state_pool_create(layer_floats, 2, n_slots, &made);
    CHECK((made == (fb_state_pool *)&nothing) == (status != FB_OK));
    if (status == FB_OK) fb_state_pool_free(made);
    return status;
}

CALL(create_small_states, create_states(1))
CALL(create_large_states, create_states(LONG))
CALL(create_small_pool, create_pool(3))
CALL(create_large_pool, create_pool(LONG))

/* One layer of a model. */
static enum fb_status make_program(int32_t max_tokens, fb_program **out) {
    enum { X, NORMED, HEADS, ATTENDED, HIDDEN, WANTED, N_BUFFERS };
    const int32_t widths[N_BUFFERS] = {WIDTH, WIDTH, QKV, WIDTH, WIDTH, WIDTH};
    const struct fb_op ops[] = {
        {.kind = FB_OP_EMBED, .in = -1, .out = X, .residual = -1, .weight = vocabulary, .scale = 1},
        {.kind = FB_OP_RMS_NORM, .in = X, .out = NORMED, .residual = -1, .vector = input, .vector_length = WIDTH},
        {.kind = FB_OP_LINEAR, .in = NORMED, .out = HEADS, .residual = -1, .weight = to_qkv, .scale = 1},
        {.kind = FB_OP_ROPE, .in = HEADS, .out = -1, .residual = -1},
        {.kind = FB_OP_KV_WRITE, .in = HEADS, .out = -1, .residual = -1},
        {.kind = FB_OP_ATTENTION, .in = HEADS, .out = ATTENDED, .residual = -1, .scale = 0.25f},
        {.kind = FB_OP_LINEAR, .in = ATTENDED, .out = X, .residual = X, .weight = square, .scale = 1},
        {.kind = FB_OP_LINEAR_GATED,
            .in = X,
            .out = HIDDEN,
            .residual = -1,
            .weight = interleaved,
            .activation = FB_ACTIVATION_SILU,
            .scale = 1},
        {.kind = FB_OP_GATHER_OUTPUTS, .in = HIDDEN, .out = WANTED, .residual = -1},
        {.kind = FB_OP_LOGITS, .in = WANTED, .out = -1, .residual = -1, .weight = vocabulary, .scale = 1},
    };
    const struct fb_heads heads = {N_HEADS, 1, HEAD_DIM, HEAD_DIM, 0, 0};
    const struct fb_rope_table rope = {input, HEAD_DIM / 2, 1};
    const struct fb_program_shape shape = {.struct_size = sizeof shape,
        .n_layers = 1,
        .vocab_size = N_VOCAB,
        .max_tokens = max_tokens,
        .n_buffers = N_BUFFERS,
        .n_geometries = 1,
        .heads = &heads,
        .n_ropes = 1,
        .ropes = &rope};
    return fb_program_create(&shape, widths, ops, (int32_t)(sizeof ops / sizeof *ops), 2, FB_ISA_AUTO, out);
}

static enum fb_status create_program(int32_t max_tokens) {
    fb_program *made = (fb_program *)&nothing;
    const enum fb_status status = make_program(max_tokens, &made);
    CHECK((made == (fb_program *)&nothing) == (status != FB_OK));
    if (status == FB_OK) fb_program_free(made);
    return status;
}

CALL(create_small_program, create_program(N_TOKENS))
CALL(create_large_program, create_program(LONG))

/* ---- Operators that allocate scratch memory ---------------------------------------------------------------------- */

static enum fb_status attend(int32_t n_tokens, int32_t n_heads, int32_t n_kv_heads, int32_t head_dim) {
    const size_t n = (size_t)n_tokens * (size_t)n_heads * (size_t)head_dim;
    mark_output(n);
    return check_output(fb_self_attention(input, input, input, n_tokens, n_heads, n_kv_heads, head_dim, 0, 0.25f,
                            FB_F32, FB_F32, 2, FB_ISA_AUTO, output),
        n);
}

CALL(attend_small, attend(N_TOKENS, N_HEADS, 1, HEAD_DIM))
CALL(attend_large, attend(64, 64, 64, 64)) /* K and V of 2 MiB */

static enum fb_status attend_serially(void) {
    const size_t n = N_TOKENS * N_HEADS * HEAD_DIM;
    mark_output(n);
    return check_output(
        fb_serial_self_attention(input, input, input, N_TOKENS, N_HEADS, 1, HEAD_DIM, 0, 0.25f, output), n);
}

/* Rope works in place: after a failure `output` is still the input, after success always the same. */
static enum fb_status rotate(int32_t n_rows, int32_t head_dim) {
    const size_t n = (size_t)n_rows * (size_t)head_dim;
    memcpy(output, input, n * sizeof *output);
    const enum fb_status status = fb_rope(
        output, positions, n_rows, 1, head_dim, head_dim, input, 1.0f, 2, FB_ISA_AUTO);
    CHECK((memcmp(output, input, n * sizeof *output) == 0) == (status != FB_OK));
    return status;
}

CALL(rotate_small, rotate(N_TOKENS, HEAD_DIM))
CALL(rotate_large, rotate(LONG, 128))

static enum fb_status measure_read(size_t n_bytes) {
    double bytes_per_s = -1;
    const enum fb_status status = fb_measure_read(n_bytes, 3, 2, &bytes_per_s);
    CHECK((bytes_per_s == -1) == (status != FB_OK));
    return status;
}

CALL(measure_small_read, measure_read(1 << 14))
CALL(measure_large_read, measure_read(4 << 20))

/* Blocks of medium size share mappings: if no new one can be mapped, the existing ones are used up and stay
 * intact. */
static void check_shared_mappings(void) {
    enum { MOST = 100, BYTES = 1 << 20 };
    const long before = atomic_load(&n_mapped_bytes), blocks = atomic_load(&n_blocks);
    char *taken[MOST];
    int n = 0;
    taken[n++] = fb_memory_allocate(BYTES);
    CHECK(taken[0]);
    atomic_store(&n_requests, 0);
    refuse_first = 1, refuse_last = LONG_MAX;
    while (n < MOST && (taken[n] = fb_memory_allocate(BYTES)))
        n++;
    CHECK(n < MOST);
    refuse_first = 0;
    while (n < MOST && (taken[n] = fb_memory_allocate(BYTES)))
        n++;
    CHECK(n == MOST);
    for (int i = 0; i < n; i++) {
        CHECK((uintptr_t)taken[i] % 64 == 0 && taken[i][0] == 0 && taken[i][BYTES - 1] == 0);
        memset(taken[i], i + 1, BYTES);
    }
    for (int i = 0; i < n; i++) {
        CHECK(taken[i][0] == i + 1 && taken[i][BYTES - 1] == i + 1);
        fb_memory_release(taken[i], BYTES);
    }
    CHECK(atomic_load(&n_mapped_bytes) == before && atomic_load(&n_blocks) == blocks);
}

/* Four tokens each of two sequences. */
static enum fb_status decode_tokens(void) {
    enum { STEPS = 4 };
    const int32_t pages[] = {0, 1};
    int32_t history[2][STEPS + 1] = {{1}, {2}}, n_done = -1;
    float logprobs[2][STEPS];
    double seconds[STEPS];
    struct fb_sampling settings;
    struct fb_decode_request requests[2];
    fb_sampling_default(&settings);
    for (int i = 0; i < 2; i++)
        requests[i] = (struct fb_decode_request){.sequence = {.pages = &pages[i], .n_pages = 1, .n_tokens = 1},
            .n_steps = STEPS,
            .history = history[i],
            .n_history = 1,
            .logprobs = logprobs[i],
            .settings = &settings};
    mark_output(2 * N_VOCAB);
    const enum fb_status status = fb_program_decode(
        program, pool, NULL, requests, 2, STEPS, NULL, output, 2 * N_VOCAB, seconds, &n_done);
    CHECK(status == FB_OK ? n_done == STEPS && requests[0].n_sampled == STEPS : n_done == -1 && history[0][1] == 0);
    return check_output(status, 2 * N_VOCAB);
}

/* ---- Calls that allocate nothing --------------------------------------------------------------------------------- */

static enum fb_status run_program(void) {
    const int32_t pages[] = {0, 1}, outputs[] = {0, N_TOKENS - 1};
    const struct fb_sequence sequence = {.pages = pages, .n_pages = 2, .n_tokens = N_TOKENS};
    const struct fb_batch batch = {.struct_size = sizeof batch,
        .n_tokens = N_TOKENS,
        .tokens = positions,
        .sequences = &sequence,
        .n_sequences = 1,
        .outputs = outputs,
        .n_outputs = 2};
    mark_output(2 * N_VOCAB);
    return check_output(fb_program_run(program, pool, &batch, output, 2 * N_VOCAB), 2 * N_VOCAB);
}

static enum fb_status move_pages(void) {
    const size_t n_bytes = fb_page_bytes(pool);
    enum fb_status status = fb_page_read(pool, 0, output, n_bytes);
    if (status == FB_OK) status = fb_page_copy(pool, 2, 0);
    if (status == FB_OK) status = fb_page_zero(pool, 2);
    return status == FB_OK ? fb_page_write(pool, 0, output, n_bytes) : status;
}

static enum fb_status pack_weight(void) {
    const enum fb_status status = fb_weight_pack_rows(
        square, 0, 16, 1, FB_F32, input, WIDTH * WIDTH * sizeof(float), WIDTH, 2);
    return status == FB_OK ? fb_weight_unpack_row(square, 3, output) : status;
}

static enum fb_status dequantize(void) {
    static const unsigned char block[18] = {0, 0x3C, 0x21}; /* scale 1 */
    mark_output(32);
    return check_output(fb_dequantize(FB_Q4_0, block, sizeof block, 32, output), 32);
}

CALL(normalize, fb_rms_norm(input, input, N_TOKENS, WIDTH, 1e-5f, 2, FB_ISA_AUTO, output))
CALL(gather, fb_gather(input, LONG, WIDTH, positions, N_TOKENS, 2, FB_ISA_AUTO, output))
CALL(soften, fb_masked_softmax(input, N_TOKENS, WIDTH, true, 1, 2, FB_ISA_AUTO, output))
CALL(gate, fb_swiglu(input, input, 10000, 2, FB_ISA_AUTO, output))
CALL(multiply, fb_linear(square, input, N_TOKENS, input, NULL, 2, FB_ISA_AUTO, output))
CALL(measure_fma, fb_measure_fma(3, 1, FB_ISA_REFERENCE, &flops_per_s))
CALL(measure_pairs, fb_measure_pairs(3, 1, FB_ISA_REFERENCE, &flops_per_s))
CALL(measure_dot, fb_measure_dot(3, 1, FB_ISA_REFERENCE, &flops_per_s))

static enum fb_status sample(void) {
    static _Alignas(16) char work[1 << 16]; /* fb_sample_work_bytes returns less */
    struct fb_sampling settings;
    fb_sampling_default(&settings);
    settings.top_k = 10;
    settings.top_p = 0.9f;
    settings.dry_multiplier = 1;
    settings.repetition_penalty = 1.1f;
    settings.penalty_window = settings.dry_window = -1;
    int32_t token;
    float logprob;
    const enum fb_status status = fb_sample(
        input, N_VOCAB, &settings, 0, positions, N_TOKENS, NULL, NULL, 0, NULL, 0, work, &token, &logprob);
    if (status != FB_OK) return status;
    return fb_sample_probabilities(
        input, N_VOCAB, &settings, 0, positions, N_TOKENS, NULL, NULL, 0, NULL, 0, work, output);
}

/* ---- More than the address space --------------------------------------------------------------------------------- */

static void test_beyond_the_address_space(void) {
    CHECK(create_weight(FB_F32, 1 << 30, 1 << 30) == FB_OUT_OF_MEMORY);
    fb_page_pool *made = (fb_page_pool *)&nothing;
    const struct fb_kv_layer wide = {1 << 20, 1024, 1024};
    CHECK(fb_page_pool_create(FB_F32, FB_F32, INT32_MAX, &wide, 1, &made) == FB_OUT_OF_MEMORY);
    CHECK(fb_page_pool_create(FB_F32, FB_F32, 1 << 10, &wide, 1, &made) == FB_OUT_OF_MEMORY);
    CHECK(made == (fb_page_pool *)&nothing && n_mapped_bytes == 0);
}

int main(void) {
    check_shared_mappings();
    for (int32_t i = 0; i < N_FLOATS; i++)
        input[i] = 0.25f + (float)(i % 7) / 8.0f;
    for (int32_t i = 0; i < LONG; i++)
        positions[i] = 1 + i % (N_VOCAB - 1);
    test_beyond_the_address_space();

    sweep("fb_weight_create, small", create_small_weight, 2);
    sweep("fb_weight_create, large", create_large_weight, 2);
    sweep("fb_page_pool_create, small", create_small_pool, -1);
    sweep("fb_page_pool_create, large", create_large_pool, -1);
    sweep("fb_state_pool_create, small", create_small_states, -1);
    sweep("fb_state_pool_create, large", create_large_states, -1);

    square = packed(WIDTH, WIDTH);
    to_qkv = packed(QKV, WIDTH);
    interleaved = packed(2 * WIDTH, WIDTH);
    vocabulary = packed(N_VOCAB, WIDTH);
    CHECK(fb_page_pool_create(FB_F16, FB_F16, 3, kv_layers, 1, &pool) == FB_OK);
    sweep("fb_program_create, small", create_small_program, -1);
    sweep("fb_program_create, large", create_large_program, -1);
    CHECK(make_program(N_TOKENS, &program) == FB_OK);

    sweep("fb_self_attention, small", attend_small, -1);
    sweep("fb_self_attention, large", attend_large, -1);
    sweep("fb_serial_self_attention", attend_serially, 1);
    sweep("fb_rope, small", rotate_small, 1);
    sweep("fb_rope, large", rotate_large, 1);
    sweep("fb_measure_read, small", measure_small_read, 1);
    sweep("fb_measure_read, large", measure_large_read, 1);

    sweep("fb_program_run", run_program, 0);
    sweep("fb_program_decode", decode_tokens, -1);
    sweep("fb_page_*", move_pages, 0);
    sweep("fb_weight_pack_rows", pack_weight, 0);
    sweep("fb_dequantize", dequantize, 0);
    sweep("fb_rms_norm", normalize, 0);
    sweep("fb_gather", gather, 0);
    sweep("fb_masked_softmax", soften, 0);
    sweep("fb_swiglu", gate, 0);
    sweep("fb_linear", multiply, 0);
    sweep("fb_measure_fma", measure_fma, 0);
    sweep("fb_measure_pairs", measure_pairs, 0);
    sweep("fb_measure_dot", measure_dot, 0);
    sweep("fb_sample", sample, 0);

    fb_program_free(program);
    fb_page_pool_free(pool);
    fb_weight_free(square);
    fb_weight_free(to_qkv);
    fb_weight_free(interleaved);
    fb_weight_free(vocabulary);
    CHECK(n_blocks == 0 && n_mapped_bytes == 0);
    return check_result();
}
