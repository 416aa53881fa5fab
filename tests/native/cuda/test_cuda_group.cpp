/*
 * test_cuda_group.cpp - GPUs that compute one model together, on the emulation: the sums over them bit by
 * bit, a small joined program against the undivided one on the CPU, and each call of the runtime and of NCCL
 * failing once.
 */
#include "common.h"
#include "cuda_runtime_api.h"
#include "emulate.h"
#include "kernels.h"

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <thread>

static long *nccl_fails_at, *nccl_n_held, *nccl_n_in_group;
static void (**nccl_group)(int is_open);

/* ---- Kernels ----------------------------------------------------------------------------------------------------- */

static void test_sum(int32_t n_parts, int32_t n_rows, int32_t n_cols, bool has_residual) {
    const int64_t ld = n_cols + 3, ld_out = n_cols + 5, part_floats = n_rows * ld + 7;
    buffer<float> parts((size_t)(n_parts * part_floats)), out((size_t)(n_rows * ld_out)), wanted(out.n);
    for (int64_t part = 0; part < n_parts; part++)
        for (int64_t row = 0; row < n_rows; row++)
            for (int64_t i = 0; i < n_cols; i++)
                parts[(size_t)(part * part_floats + row * ld + i)] = random_number(1.0f);
    for (int64_t row = 0; row < n_rows; row++)
        for (int64_t i = 0; i < n_cols; i++) {
            float sum = parts[(size_t)(row * ld + i)];
            for (int64_t part = 1; part < n_parts; part++)
                sum += parts[(size_t)(part * part_floats + row * ld + i)];
            const float before = random_number(1.0f);
            if (has_residual) out[(size_t)(row * ld_out + i)] = before;
            wanted[(size_t)(row * ld_out + i)] = has_residual ? sum + before : sum;
        }
    const fb_cuda_parts view = {parts.data, part_floats, ld, n_parts};
    CHECK(
        fb_cuda_sum(&view, n_rows, n_cols, has_residual ? out.data : nullptr, ld_out, out.data, ld_out, nullptr) == 0);
    CHECK_AT(out.same_as(wanted), "%d parts of %d x %d", n_parts, n_rows, n_cols);
}

static void test_concatenate(int32_t n_parts, int32_t n_rows, int32_t n_cols) {
    const int32_t share = (n_cols + n_parts - 1) / n_parts;
    const int64_t part_floats = (int64_t)n_rows * share;
    buffer<float> parts((size_t)(n_parts * part_floats)), out((size_t)(n_rows * n_cols)), wanted(out.n);
    int32_t flag = 0;
    fill(wanted, 1.0f);
    for (int32_t part = 0; part < n_parts; part++) {
        const int32_t first = part * share < n_cols - share ? part * share : n_cols - share;
        for (int32_t row = 0; row < n_rows; row++)
            memcpy(&parts[(size_t)(part * part_floats + (int64_t)row * share)], &wanted[(size_t)row * n_cols + first],
                (size_t)share * sizeof(float));
    }
    const fb_cuda_parts view = {parts.data, part_floats, share, n_parts};
    CHECK(fb_cuda_concatenate(&view, n_rows, n_cols, out.data, &flag, nullptr) == 0);
    CHECK_AT(out.same_as(wanted) && flag == 0, "%d parts of %d x %d", n_parts, n_rows, n_cols);
    parts[0] = INFINITY;
    CHECK(fb_cuda_concatenate(&view, n_rows, n_cols, out.data, &flag, nullptr) == 0 && flag == 1);
}

/* ---- A joined program -------------------------------------------------------------------------------------------- */

/* x = embed(token); x += second(first(x)); logits = head(x): a device has its share of the rows of `first`,
 * of the columns of `second`, and of the rows of the head, where the shares of three devices overlap. */
enum { WIDTH = 20, INNER = 24, VOCABULARY = 22, TOKENS = 16, HEADS = 12 };
enum { X, IN, PART, ENDS };

struct matrices {
    buffer<float> embedding{VOCABULARY * WIDTH}, first{INNER * WIDTH}, second{WIDTH * INNER};

    matrices() {
        fill(embedding, 1.0f);
        fill(first, 1.0f);
        fill(second, 1.0f);
    }
};

struct model {
    fb_weight *weights[4] = {};
    fb_program *program = nullptr;

    ~model() {
        fb_program_free(program);
        for (fb_weight *weight : weights)
            fb_weight_free(weight);
    }
};

static fb_status pack(const buffer<float> &from, int32_t n_columns, int32_t first_row, int32_t n_rows,
    int32_t first_column, int32_t width, fb_device *device, fb_weight **out) {
    buffer<float> rows((size_t)n_rows * (size_t)width);
    for (int32_t row = 0; row < n_rows; row++)
        memcpy(&rows[(size_t)row * (size_t)width], &from[(size_t)(first_row + row) * n_columns + first_column],
            (size_t)width * sizeof(float));
    CHECK(fb_weight_create(FB_F32, n_rows, width, out) == FB_OK);
    CHECK(fb_weight_pack_rows(*out, 0, 1, 1, FB_F32, rows.data, rows.n * sizeof(float), n_rows, 1) == FB_OK);
    return device ? fb_weight_move(*out, device) : FB_OK;
}

const fb_kv_layer kv_layer = {HEADS, 2, 2};

/* Part `i` of n; the undivided program on the CPU if n is 1. */
static fb_status make(const matrices &numbers, fb_device *device, int32_t i, int32_t n, model *m) {
    const int32_t inner = INNER / n, share = (VOCABULARY + n - 1) / n;
    const int32_t first = i * share < VOCABULARY - share ? i * share : VOCABULARY - share;
    fb_status status = pack(numbers.embedding, WIDTH, 0, VOCABULARY, 0, WIDTH, device, &m->weights[0]);
    if (status == FB_OK) status = pack(numbers.first, WIDTH, i * inner, inner, 0, WIDTH, device, &m->weights[1]);
    if (status == FB_OK) status = pack(numbers.second, INNER, 0, WIDTH, i * inner, inner, device, &m->weights[2]);
    if (status == FB_OK) status = pack(numbers.embedding, WIDTH, first, share, 0, WIDTH, device, &m->weights[3]);
    if (status != FB_OK) return status;
    fb_op ops[6] = {};
    int32_t n_ops = 0;
    const auto add = [&](fb_op_kind kind, int32_t in, int32_t out, const fb_weight *weight, int32_t residual) {
        fb_op *op = &ops[n_ops++];
        op->kind = kind, op->in = in, op->out = out, op->residual = residual, op->weight = weight, op->scale = 1.0f;
    };
    add(FB_OP_EMBED, -1, X, m->weights[0], -1);
    add(FB_OP_LINEAR, X, IN, m->weights[1], -1);
    add(FB_OP_LINEAR, IN, n == 1 ? X : PART, m->weights[2], n == 1 ? X : -1);
    if (n > 1) add(FB_OP_SUM, PART, X, nullptr, X);
    add(FB_OP_GATHER_OUTPUTS, X, ENDS, nullptr, -1);
    add(FB_OP_LOGITS, ENDS, -1, m->weights[3], -1);
    const int32_t widths[] = {WIDTH, inner, WIDTH, WIDTH};
    const float frequency = 1.0f;
    const fb_heads heads = {HEADS / n, HEADS / n, 2, 2, 0, 0};
    const fb_rope_table rope = {&frequency, 1, 1.0f};
    const fb_program_shape shape = {sizeof shape, 1, VOCABULARY, TOKENS, 4, 1, &heads, 1, &rope, 0};
    return fb_program_create_on(device, &shape, widths, ops, n_ops, 1, FB_ISA_AUTO, &m->program);
}

struct joined {
    fb_device *devices[FB_MOST_MEMBERS] = {}, *group = nullptr;
    model parts[FB_MOST_MEMBERS];
    fb_program *program = nullptr;
    fb_page_pool *pool = nullptr;

    /* The handles are freed immediately: the objects on them keep them alive. */
    fb_status open(const matrices &numbers, int32_t n, size_t budget = 0) {
        fb_status status = FB_OK;
        fb_program *programs[FB_MOST_MEMBERS];
        for (int32_t i = 0; i < n && status == FB_OK; i++)
            status = fb_device_open((4 - i) % 4, budget, &devices[i]);
        if (status == FB_OK) status = fb_device_join(devices, n, &group);
        for (int32_t i = 0; i < n && status == FB_OK; i++) {
            status = make(numbers, devices[i], i, n, &parts[i]);
            programs[i] = parts[i].program;
        }
        if (status == FB_OK) status = fb_program_join(group, programs, n, HEADS, VOCABULARY, &program);
        if (status == FB_OK) status = fb_page_pool_create_on(group, FB_F32, FB_F32, 4, &kv_layer, 1, &pool);
        for (int32_t i = 0; i < n; i++)
            fb_device_free(devices[i]);
        fb_device_free(group);
        return status;
    }
    ~joined() {
        fb_program_free(program);
        fb_page_pool_free(pool);
    }
};

/* Logits of the tokens 0 .. n - 1 at two of every three rows. */
static fb_status step(fb_program *program, fb_page_pool *pool, int32_t n, buffer<float> *logits) {
    int32_t tokens[TOKENS], outputs[TOKENS], n_outputs = 0;
    for (int32_t i = 0; i < n; i++) {
        tokens[i] = i;
        if (i % 3 != 1) outputs[n_outputs++] = i;
    }
    const int32_t page = 1;
    const fb_sequence sequence = {&page, 1, 0, n, 0, 0, 0, 0, nullptr, 0};
    const fb_batch batch = {sizeof batch, n, tokens, &sequence, 1, outputs, n_outputs, nullptr};
    logits->poison();
    return fb_program_run(program, pool, &batch, logits->data, (size_t)n_outputs * VOCABULARY);
}

static void test_numbers(const matrices &numbers, const model &whole, fb_page_pool *pool) {
    buffer<float> wanted(11 * VOCABULARY), got(11 * VOCABULARY), again(VOCABULARY);
    CHECK_AT(step(whole.program, pool, TOKENS, &wanted) == FB_OK, "%s", fb_last_error());
    for (int32_t n : {2, 3, 4}) {
        joined group;
        CHECK_AT(group.open(numbers, n) == FB_OK, "%s", fb_last_error());
        CHECK_AT(step(group.program, group.pool, TOKENS, &got) == FB_OK, "%s", fb_last_error());
        difference found;
        for (size_t i = 0; i < wanted.n; i++)
            found.add(got[i], wanted[i]);
        CHECK_AT(found.relative() < 1e-6, "%d parts: off by %g", n, found.relative());
        CHECK(step(group.program, group.pool, 1, &again) == FB_OK);
        CHECK(memcmp(again.data, got.data, VOCABULARY * sizeof(float)) == 0);
        CHECK(step(group.parts[0].program, nullptr, 1, &again) == FB_INVALID_ARGUMENT);
    }
    CHECK(fake_n_held == 0 && *nccl_n_held == 0);
}

/* Only call `at` fails, of the runtime or of NCCL; returns true if there are fewer calls. After refused
 * memory the group works as before; other failures may have ended it. */
static bool survive(const matrices &numbers, long *counter, long at, bool in_step, const buffer<float> &wanted) {
    buffer<float> got(2 * VOCABULARY);
    {
        joined group;
        fb_status status;
        if (in_step) CHECK_AT(group.open(numbers, 2) == FB_OK, "%s", fb_last_error());
        *counter = at;
        status = in_step ? step(group.program, group.pool, 3, &got) : group.open(numbers, 2);
        const bool is_through = *counter >= 0;
        *counter = -1;
        CHECK_AT(is_through == (status == FB_OK), "call %ld: %d", at, status);
        CHECK_AT(
            status == FB_OK || status == FB_DEVICE_FAILED || status == FB_DEVICE_MEMORY, "call %ld: %d", at, status);
        if (in_step || is_through) {
            const fb_status after = step(group.program, group.pool, 3, &got);
            CHECK_AT(after == FB_OK || (in_step && status == FB_DEVICE_FAILED), "call %ld: %s", at, fb_last_error());
            CHECK_AT(after != FB_OK ? strstr(fb_last_error(), "load the model again") != nullptr : got.same_as(wanted),
                "call %ld: %s", at, fb_last_error());
        }
        if (is_through) return true;
    }
    CHECK_AT(fake_n_held == 0 && *nccl_n_held == 0, "call %ld leaves %ld and %ld", at, fake_n_held, *nccl_n_held);
    return false;
}

static void test_failures(const matrices &numbers) {
    buffer<float> wanted(2 * VOCABULARY);
    {
        joined group;
        CHECK(group.open(numbers, 2) == FB_OK && step(group.program, group.pool, 3, &wanted) == FB_OK);
    }
    for (long *counter : {&fake_fails_at, nccl_fails_at})
        for (bool in_step : {false, true})
            for (long at = 0; !survive(numbers, counter, at, in_step, wanted); at++)
                continue;
    for (size_t budget : {size_t(1) << 10, size_t(4) << 10, size_t(12) << 10}) {
        joined group;
        CHECK_AT(group.open(numbers, 2, budget) == FB_DEVICE_MEMORY, "%zu: %s", budget, fb_last_error());
        CHECK_AT(strstr(fb_last_error(), "are free of its budget"), "%s", fb_last_error());
    }
    CHECK(fake_n_held == 0 && *nccl_n_held == 0);
}

/* A link that fails in a batch is detected before anything waits for the GPUs: no logits are copied. */
static void test_lost_link(const matrices &numbers) {
    buffer<float> got(2 * VOCABULARY);
    int n_lost = 0;
    for (long at = 0;; at++) {
        joined group;
        CHECK(group.open(numbers, 2) == FB_OK);
        fake_bytes_to_pageable = 0;
        *nccl_fails_at = at;
        const fb_status status = step(group.program, group.pool, 3, &got);
        const bool is_through = *nccl_fails_at >= 0;
        *nccl_fails_at = -1;
        CHECK(fake_bytes_to_pageable == (is_through ? got.n * sizeof(float) : 0) && is_through == (status == FB_OK));
        if (is_through) break;
        if (strstr(fb_last_error(), "checking a link")) n_lost++;
    }
    CHECK_AT(n_lost == 2, "%d links were lost", n_lost); /* each of them once */
    CHECK(fake_n_held == 0 && *nccl_n_held == 0);
}

/* While one thread runs batches, another creates and frees the same model: memory and links are never
 * allocated or freed between the launches of a group. */
static void test_two_threads(const matrices &numbers) {
    buffer<float> wanted(2 * VOCABULARY), got(2 * VOCABULARY);
    std::atomic<bool> is_done{false};
    std::atomic<long> n_made{0};
    {
        joined group;
        CHECK(group.open(numbers, 2) == FB_OK && step(group.program, group.pool, 3, &wanted) == FB_OK);
        *nccl_group = fake_open_group;
        std::thread other([&] {
            do {
                joined another;
                CHECK_AT(another.open(numbers, 2) == FB_OK, "%s", fb_last_error());
                n_made++;
            } while (!is_done);
        });
        for (int32_t i = 0; i < 100 || n_made < 10; i++) {
            CHECK(step(group.program, group.pool, 3, &got) == FB_OK && got.same_as(wanted));
            std::this_thread::sleep_for(std::chrono::microseconds(300)); /* or the other thread would hardly run */
        }
        is_done = true;
        other.join();
        *nccl_group = nullptr;
    }
    CHECK_AT(fake_n_in_group == 0 && *nccl_n_in_group == 0, "%ld and %ld", fake_n_in_group, *nccl_n_in_group);
    CHECK(fake_n_held == 0 && *nccl_n_held == 0);
}

/* If launches block until they are done, exchanges would never end. */
static void test_blocking(const matrices &numbers) {
    for (const char *value : {"1", "2", "yes"}) {
        joined group;
        setenv("CUDA_LAUNCH_BLOCKING", value, 1);
        CHECK(group.open(numbers, 2) == FB_UNSUPPORTED);
        CHECK_AT(strstr(fb_last_error(), "unset it before"), "%s", fb_last_error());
    }
    for (const char *value : {"0", ""}) {
        joined group;
        setenv("CUDA_LAUNCH_BLOCKING", value, 1);
        CHECK_AT(group.open(numbers, 2) == FB_OK, "%s", fb_last_error());
    }
    unsetenv("CUDA_LAUNCH_BLOCKING");
    CHECK(fake_n_held == 0 && *nccl_n_held == 0);
}

/* Invalid parts are refused. */
static void test_refusals(const matrices &numbers) {
    joined group;
    CHECK(group.open(numbers, 2) == FB_OK);
    fb_program *parts[] = {group.parts[0].program, group.parts[1].program}, *twice[] = {parts[0], parts[0]};
    fb_program *out = nullptr;
    fb_device *one = nullptr;
    CHECK(fb_device_open(0, 0, &one) == FB_OK);
    CHECK(fb_program_join(group.group, twice, 2, HEADS, VOCABULARY, &out) == FB_INVALID_ARGUMENT);
    CHECK_AT(strstr(fb_last_error(), "part 1 is not on member 1"), "%s", fb_last_error());
    CHECK(fb_program_join(group.group, parts, 1, HEADS, VOCABULARY, &out) == FB_INVALID_ARGUMENT);
    CHECK(fb_program_join(one, parts, 2, HEADS, VOCABULARY, &out) == FB_INVALID_ARGUMENT);
    CHECK(fb_program_join(group.group, parts, 2, HEADS + 2, VOCABULARY, &out) == FB_INVALID_ARGUMENT);
    CHECK_AT(strstr(fb_last_error(), "part 0 has 6 KV heads, its share of 14 is 7"), "%s", fb_last_error());
    CHECK(fb_program_join(group.group, parts, 2, HEADS, VOCABULARY + 1, &out) == FB_INVALID_ARGUMENT);
    CHECK_AT(strstr(fb_last_error(), "part 0 ends with 11 rows, its share of 23 is 12"), "%s", fb_last_error());
    model m;
    CHECK(make(numbers, nullptr, 0, 2, &m) == FB_UNSUPPORTED);
    CHECK_AT(strstr(fb_last_error(), "the CPU has no operator sum"), "%s", fb_last_error());
    fb_device_free(one);
}

int main() {
    void *library = dlopen("libnccl.so.2", RTLD_NOW);
    nccl_fails_at = library ? static_cast<long *>(dlsym(library, "fake_nccl_fails_at")) : nullptr;
    nccl_n_held = library ? static_cast<long *>(dlsym(library, "fake_nccl_n_held")) : nullptr;
    nccl_n_in_group = library ? static_cast<long *>(dlsym(library, "fake_nccl_n_in_group")) : nullptr;
    nccl_group = library ? reinterpret_cast<void (**)(int)>(dlsym(library, "fake_nccl_group")) : nullptr;
    if (!nccl_fails_at || !nccl_n_held || !nccl_n_in_group || !nccl_group) {
        fprintf(stderr, "the emulated NCCL is not found: LD_LIBRARY_PATH must name its folder\n");
        return 1;
    }
    for (bool backward : {false, true}) {
        emulate::backward = backward;
        for (int32_t n_parts : {2, 3, 16})
            for (int32_t n_cols : {1, 255, 256, 700}) {
                test_sum(n_parts, 3, n_cols, backward);
                test_concatenate(n_parts, 3, n_cols);
            }
    }
    const matrices numbers;
    model whole;
    fb_page_pool *pool = nullptr;
    CHECK(make(numbers, nullptr, 0, 1, &whole) == FB_OK);
    CHECK(fb_page_pool_create(FB_F32, FB_F32, 4, &kv_layer, 1, &pool) == FB_OK);
    test_numbers(numbers, whole, pool);
    test_failures(numbers);
    test_lost_link(numbers);
    test_two_threads(numbers);
    test_blocking(numbers);
    test_refusals(numbers);
    fb_page_pool_free(pool);
    CHECK(fake_n_held == 0 && *nccl_n_held == 0);
    return check_result();
}
