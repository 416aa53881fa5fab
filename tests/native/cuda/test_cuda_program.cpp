/*
 * test_cuda_program.cpp - a whole small model as a GPU program, on the emulation and a runtime on the host's
 * heap: its logits match the CPU's and have the same bits in every batch; and whatever call fails, nothing
 * leaks and the next run works.
 */
#include "check.h"
#include "cublasLt.h"
#include "cuda_runtime_api.h"
#include "emulate.h"
#include "model.h"

#include <math.h>

/* Every call of a step that samples fails once; fewer bytes than the logits are copied from the device. */
static void test_failures_of_decoding(const model *m) {
    int32_t wanted, token;
    float wanted_logprob, logprob;
    for (long at = 0;; at++) {
        fake_fails_at = at;
        const fb_status status = model_decode(m, &token, &logprob);
        const bool is_through = fake_fails_at >= 0;
        fake_fails_at = -1;
        CHECK_AT(is_through == (status == FB_OK), "call %ld of a step: %d", at, status);
        if (at == 0) CHECK(model_decode(m, &wanted, &wanted_logprob) == FB_OK && wanted >= 0);
        fake_bytes_from_device = 0;
        CHECK(model_decode(m, &token, &logprob) == FB_OK && token == wanted && logprob == wanted_logprob);
        CHECK(fake_bytes_from_device > 0 && fake_bytes_from_device < MODEL_VOCABULARY * sizeof(float));
        if (status == FB_OK) break;
    }
}

/* Every call of opening a device and creating a model, then every call of a step, fails once. */
static void test_failures() {
    float wanted[MODEL_VOCABULARY], logits[MODEL_VOCABULARY];
    fb_device *device = nullptr;
    model *m = nullptr;
    const long before = fake_n_held;
    for (long at = 0;; at++) {
        fake_fails_at = at;
        const fb_status status = fb_device_open(0, 0, &device);
        m = status == FB_OK ? model_create(device) : nullptr;
        const bool is_through = fake_fails_at >= 0;
        fake_fails_at = -1;
        CHECK_AT(is_through == (m != nullptr), "call %ld: %d", at, status);
        if (m) break;
        CHECK_AT(status == FB_OK || status == FB_DEVICE_FAILED, "call %ld: %d", at, status);
        CHECK_AT(fake_n_held == before, "call %ld leaves %ld", at, fake_n_held - before);
        fb_device_free(device);
        device = nullptr;
    }
    fb_device_free(device); /* the model keeps it alive */
    for (long at = 0, held = fake_n_held;; at++) {
        fake_fails_at = at;
        const fb_status status = model_step(m, logits);
        const bool is_through = fake_fails_at >= 0;
        fake_fails_at = -1;
        CHECK_AT(is_through == (status == FB_OK), "call %ld of a step: %d", at, status);
        if (at == 0) { /* the batch's memory is allocated by now */
            CHECK(fake_n_held == held);
            CHECK(model_step(m, wanted) == FB_OK);
        }
        CHECK(model_step(m, logits) == FB_OK && memcmp(logits, wanted, sizeof logits) == 0);
        if (status == FB_OK) break;
    }
    test_failures_of_decoding(m);
    model_free(m);
    CHECK(fake_n_held == before);
}

/* In a first step every allocation is refused once. */
static void test_refusals(fb_device *device) {
    float wanted[MODEL_VOCABULARY], logits[MODEL_VOCABULARY];
    for (long at = 0;; at++) {
        model *m = model_create(device);
        fake_fails_at = at;
        const fb_status status = model_step(m, logits);
        fake_fails_at = -1;
        CHECK(model_step(m, at == 0 ? wanted : logits) == FB_OK);
        CHECK(at == 0 || memcmp(logits, wanted, sizeof logits) == 0);
        model_free(m);
        CHECK(fake_n_held == 0);
        if (status == FB_OK) break;
    }
}

/* Budgets, the device's own memory, and objects on another device. */
static void test_memory() {
    float logits[MODEL_VOCABULARY];
    fb_device *device = nullptr, *small = nullptr;
    size_t used, left, used_then;
    CHECK(
        fb_device_open(4, 0, &device) == FB_INVALID_ARGUMENT && fb_device_open(-1, 0, &device) == FB_INVALID_ARGUMENT);
    CHECK_AT(strstr(fb_last_error(), "this machine has 4"), "%s", fb_last_error());
    for (size_t budget : {size_t(1), size_t(100) << 10}) {
        CHECK(fb_device_open(0, budget, &device) == FB_OK);
        CHECK(!model_create(device));
        CHECK_AT(strstr(fb_last_error(), "are free of its budget"), "%s", fb_last_error());
        CHECK(fb_device_memory(device, &used, &left) == FB_OK && used == 0 && left == budget);
        fb_device_free(device);
    }
    CHECK(fb_device_open(0, 0, &device) == FB_OK && fb_device_open(1, 0, &small) == FB_OK);
    model *m = model_create(device);
    CHECK(m && fb_device_memory(device, &used, &left) == FB_OK && used > 0);
    fb_page_pool *pool = nullptr;
    const fb_kv_layer layers[2] = {{2, 64, 64}, {2, 64, 64}};
    CHECK(fb_page_pool_create_on(device, FB_F32, FB_F32, 10000, layers, 2, &pool) == FB_DEVICE_MEMORY);
    CHECK_AT(strstr(fb_last_error(), "for KV pages: it needs 625.0 MiB"), "%s", fb_last_error());
    CHECK(fb_page_pool_create_on(small, FB_F32, FB_F32, 20, layers, 2, &pool) == FB_DEVICE_MEMORY);
    CHECK(fb_device_memory(device, &used_then, &left) == FB_OK && used == used_then && !pool);
    CHECK(model_step(m, logits) == FB_OK);
    model_free(m);
    fb_device_free(device);
    fb_device_free(small);
    CHECK(fake_n_held == 0);
}

/* A GPU without code in this build is distinguished from no GPU; the error message stays. */
static void test_strangers() {
    fb_device *device = nullptr;
    fb_device_info info;
    fake_major = 6;
    CHECK(fb_device_open(0, 0, &device) == FB_DEVICE_FAILED);
    CHECK_AT(
        strstr(fb_last_error(), "is too old: it has compute capability 6.0, Fabula needs 7.5"), "%s", fb_last_error());
    fake_major = 9;
    emulate::has_code = false;
    CHECK(fb_device_open(0, 0, &device) == FB_DEVICE_FAILED && !device);
    CHECK_AT(strstr(fb_last_error(), "no code for emulated GPU (compute capability 9.0)"), "%s", fb_last_error());
    CHECK(fb_device_describe(0, &info) == FB_OK && info.compute_major == 9);
    fake_major = 8;
    emulate::has_code = true;
}

/* The CPU refuses what was moved, and the device what was not. */
static void test_places(fb_device *device) {
    const float row[32] = {1.0f};
    float out[32];
    fb_weight *weight = nullptr;
    CHECK(fb_weight_create(FB_F32, 16, 32, &weight) == FB_OK);
    CHECK(fb_weight_move(weight, nullptr) == FB_INVALID_ARGUMENT && fb_weight_move(weight, device) == FB_OK);
    CHECK(fb_weight_move(weight, device) == FB_INVALID_ARGUMENT);
    CHECK(fb_weight_pack_rows(weight, 0, 1, 1, FB_F32, row, sizeof row, 1, 1) == FB_INVALID_ARGUMENT);
    CHECK(fb_weight_unpack_row(weight, 0, out) == FB_INVALID_ARGUMENT);
    CHECK(fb_linear(weight, row, 1, nullptr, nullptr, 1, FB_ISA_AUTO, out) == FB_INVALID_ARGUMENT);
    fb_weight_free(weight);
    CHECK(fake_n_held == 0);
}

/* Long prompts use cuBLASLt, short ones do not; after refusals and failures the model still works. */
static void test_library(const model *on_cpu) {
    enum { LONG = 140, SHORT = 12 };
    float wanted[MODEL_VOCABULARY], logits[MODEL_VOCABULARY], short_logits[MODEL_VOCABULARY];
    fb_device *device = nullptr;
    CHECK(fb_device_use_library(nullptr, nullptr) == FB_INVALID_ARGUMENT);
    CHECK(fb_device_open(0, size_t(24) << 20, &device) == FB_OK);
    CHECK(fb_device_use_library(device, "/nowhere") == FB_UNSUPPORTED);
    CHECK_AT(fb_device_use_library(device, PRODUCTS_LIBRARY) == FB_OK, "%s", fb_last_error());
    CHECK(fb_device_use_library(device, PRODUCTS_LIBRARY) == FB_INVALID_ARGUMENT);
    fake_library_fails_at(0);
    CHECK(!model_create(device));
    model *m = model_create(device);
    fb_device_free(device); /* the model keeps it alive */
    CHECK(m && model_prompt(m, SHORT, short_logits) == FB_OK && fake_n_products() == 0);
    CHECK(model_prompt(m, LONG, logits) == FB_DEVICE_MEMORY); /* of its budget: the workspace alone is larger */
    CHECK(model_prompt(m, SHORT, logits) == FB_OK && memcmp(logits, short_logits, sizeof logits) == 0);
    model_free(m);
    CHECK(fake_n_held == 0 && fake_library_n_held() == 0);

    CHECK(fb_device_open(0, 0, &device) == FB_OK && fb_device_use_library(device, PRODUCTS_LIBRARY) == FB_OK);
    m = model_create(device);
    fb_device_free(device);
    for (long at : {0, 4, 20}) {
        fake_library_fails_at(at);
        const fb_status status = model_prompt(m, LONG, logits);
        CHECK(status == FB_DEVICE_FAILED || status == FB_DEVICE_MEMORY);
    }
    const long before = fake_n_products();
    CHECK(model_prompt(m, LONG, logits) == FB_OK && model_prompt(on_cpu, LONG, wanted) == FB_OK);
    CHECK_AT(fake_n_products() == before + 8, "%ld products", fake_n_products() - before);
    double apart = 0.0, size = 0.0;
    for (int i = 0; i < MODEL_VOCABULARY; i++) {
        apart += (double)(logits[i] - wanted[i]) * (double)(logits[i] - wanted[i]);
        size += (double)wanted[i] * (double)wanted[i];
    }
    CHECK_AT(apart <= 9e-4 * size, "off by %g", sqrt(apart / size));
    CHECK(model_prompt(m, SHORT, logits) == FB_OK && memcmp(logits, short_logits, sizeof logits) == 0);
    model_free(m);
    CHECK(fake_n_held == 0 && fake_library_n_held() == 0);
}

int main() {
    model *m = model_create(nullptr);
    fb_device *device = nullptr;
    CHECK(fb_device_open(0, 0, &device) == FB_OK);
    test_failures();
    test_refusals(device);
    test_memory();
    test_strangers();
    test_places(device);
    test_library(m);
    int n_failures = 0;
    for (int n_processors : {1, 100}) { /* tiles alone fill one processor, not 100; and bf16 on ordinary cores */
        fake_n_processors = n_processors;
        fake_major = n_processors == 1 ? 7 : 8;
        emulate::backward = n_processors == 1;
        model *on_device = model_create(device);
        CHECK_AT(on_device, "%s", fb_last_error());
        n_failures += n_processors == 1 ? model_compare(m, on_device, FB_F16, FB_F16, 2e-2)
                                        : model_compare(m, on_device, FB_Q8_0, FB_BF16, 2e-2);
        model_free(on_device);
    }
    model_free(m);
    fb_device_free(device);
    fb_device_free(nullptr);
    CHECK(fake_n_held == 0);
    return check_result() || n_failures;
}
