/*
 * test_cuda_program.cpp - a whole small model as a program of the GPU, on the emulation and a runtime of the host's heap: its logits
 * are those of the CPU, the same bits in every batch; and whatever call fails, nothing is lost and the next run works.
 */
#include "attention.cu"
#include "linear.cu"
#include "rows.cu"

#include "check.h"
#include "cuda_runtime_api.h"
#include "model.h"

long fake_fails_at = -1, fake_n_held = 0;
int fake_n_processors = 4;

static bool fails() {
    return fake_fails_at >= 0 && fake_fails_at-- == 0;
}

cudaError_t cudaMalloc(void **out, size_t n_bytes) {
    if (fails() || posix_memalign(out, 256, n_bytes)) return cudaErrorMemoryAllocation;
    memset(*out, 0xFF, n_bytes);
    fake_n_held++;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    free(memory);
    fake_n_held--;
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **out, size_t n_bytes) {
    return cudaMalloc(out, n_bytes);
}

cudaError_t cudaFreeHost(void *memory) {
    return cudaFree(memory);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n_bytes, int) {
    if (fails()) return cudaErrorNoDevice;
    memcpy(to, from, n_bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, int kind, cudaStream_t) {
    return cudaMemcpy(to, from, n_bytes, kind);
}

cudaError_t cudaMemset(void *to, int value, size_t n_bytes) {
    if (fails()) return cudaErrorNoDevice;
    memset(to, value, n_bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t n_bytes, cudaStream_t) {
    return cudaMemset(to, value, n_bytes);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
    void *memory;
    if (cudaMalloc(&memory, 16) != cudaSuccess) return cudaErrorMemoryAllocation;
    *out = static_cast<cudaStream_t>(memory);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return fails() ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return cudaFree(stream);
}

cudaError_t cudaDeviceSynchronize() {
    return fails() ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return fails() ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, int, int) {
    *value = fake_n_processors;
    return fails() ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t) {
    return "as the test wanted";
}

/* Every call of creating, then every call of a step, fails once. */
static void test_failures(const model *m) {
    float wanted[MODEL_VOCABULARY], logits[MODEL_VOCABULARY];
    fb_cuda_program *device = nullptr;
    const long before = fake_n_held;
    for (long at = 0;; at++) {
        fake_fails_at = at;
        const fb_status status = fb_cuda_program_create(model_program(m), &device);
        const bool is_through = fake_fails_at >= 0;
        fake_fails_at = -1;
        CHECK_AT(is_through == (status == FB_OK), "call %ld: %d", at, status);
        if (status == FB_OK) break;
        CHECK_AT(status == FB_OUT_OF_MEMORY || status == FB_UNSUPPORTED, "call %ld: %d", at, status);
        CHECK_AT(!device && fake_n_held == before, "call %ld leaves %ld", at, fake_n_held - before);
    }
    for (long at = 0, held = fake_n_held;; at++) {
        fake_fails_at = at;
        const fb_status status = model_step(device, logits);
        const bool is_through = fake_fails_at >= 0;
        fake_fails_at = -1;
        CHECK_AT(is_through == (status == FB_OK), "call %ld of a step: %d", at, status);
        if (at == 0) { /* now memory for the batch is there */
            CHECK(fake_n_held == held);
            CHECK(model_step(device, wanted) == FB_OK);
        }
        CHECK(model_step(device, logits) == FB_OK && memcmp(logits, wanted, sizeof logits) == 0);
        if (status == FB_OK) break;
    }
    fb_cuda_program_free(device);
    CHECK(fake_n_held == before);
}

/* A first step that is refused memory at any place. */
static void test_refusals(const model *m) {
    float wanted[MODEL_VOCABULARY], logits[MODEL_VOCABULARY];
    for (long at = 0;; at++) {
        fb_cuda_program *device = nullptr;
        CHECK(fb_cuda_program_create(model_program(m), &device) == FB_OK);
        fake_fails_at = at;
        const fb_status status = model_step(device, logits);
        fake_fails_at = -1;
        CHECK(model_step(device, at == 0 ? wanted : logits) == FB_OK);
        CHECK(at == 0 || memcmp(logits, wanted, sizeof logits) == 0);
        fb_cuda_program_free(device);
        CHECK(fake_n_held == 0);
        if (status == FB_OK) break;
    }
}

int main() {
    model *m = model_create();
    fb_cuda_program *device = nullptr;
    CHECK(fb_cuda_program_create(nullptr, &device) == FB_INVALID_ARGUMENT);
    test_failures(m);
    test_refusals(m);
    int n_failures = 0;
    for (int n_processors : {1, 100}) { /* few are kept busy by tiles alone, many are not */
        fake_n_processors = n_processors;
        emulate::backward = n_processors == 1;
        CHECK_AT(fb_cuda_program_create(model_program(m), &device) == FB_OK, "%s", fb_last_error());
        n_failures += n_processors == 1 ? model_compare(m, device, FB_F16, FB_F16, 2e-2)
                                        : model_compare(m, device, FB_Q8_0, FB_BF16, 2e-2);
        fb_cuda_program_free(device);
    }
    fb_cuda_program_free(nullptr);
    fb_cuda_pool_free(nullptr);
    model_free(m);
    CHECK(fake_n_held == 0);
    return check_result() || n_failures;
}
