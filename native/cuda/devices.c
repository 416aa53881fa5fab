/* devices.c - the GPUs of this machine and their memory: the fb_device_kind of base/device.h. */
#include "base/device.h"

#include "library.h"
#include "program.h"
#include "runtime.h"

#include <string.h>

#ifndef FABULA_CUDA_EMULATED
#define FABULA_CUDA_EMULATED 0
#endif

enum { OLDEST = 75 }; /* Turing: tensor cores for f16, with tiles of 8 columns */

static enum fb_status count(int32_t *out) {
    int driver = 0, n = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        cudaGetLastError();
        return fb_fail(FB_DEVICE_FAILED, "no NVIDIA driver is installed (libcuda is missing)");
    }
    const int error = cudaGetDeviceCount(&n);
    if (error == cudaErrorInsufficientDriver) {
        cudaGetLastError();
        return fb_fail(FB_DEVICE_FAILED, "the NVIDIA driver is too old: it knows CUDA %d.%d, this build needs %d.%d",
            driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    if (error == cudaErrorNoDevice) {
        cudaGetLastError();
        return fb_fail(FB_DEVICE_FAILED, "the NVIDIA driver finds no GPU");
    }
    FB_TRY(fb_cuda_check(error, "counting GPUs"));
    *out = n;
    return FB_OK;
}

static enum fb_status describe(int32_t index, struct fb_device_info *out) {
    struct cudaDeviceProp properties;
    size_t n_free, n_bytes;
    FB_TRY(fb_cuda_enter(index));
    FB_TRY(fb_cuda_check(cudaGetDeviceProperties(&properties, index), "reading the GPU's properties"));
    FB_TRY(fb_cuda_check(cudaMemGetInfo(&n_free, &n_bytes), "reading the GPU's memory size"));
    out->compute_major = properties.major;
    out->compute_minor = properties.minor;
    out->n_processors = properties.multiProcessorCount;
    out->is_emulated = FABULA_CUDA_EMULATED;
    out->memory_bytes = n_bytes;
    out->free_bytes = n_free;
    memcpy(out->name, properties.name, strnlen(properties.name, sizeof out->name - 1));
    return FB_OK;
}

/* Whether this build's kernels run on the GPU. Checking one kernel is enough, as all are compiled for the
 * same architectures. */
static enum fb_status check(int32_t index) {
    struct fb_device_info info = {0};
    FB_TRY(describe(index, &info)); /* a GPU that has failed reports it here */
    const int32_t capability = 10 * info.compute_major + info.compute_minor;
    if (capability < OLDEST)
        return fb_fail(FB_DEVICE_FAILED, "%s is too old: it has compute capability %d.%d, Fabula needs %d.%d",
            info.name, info.compute_major, info.compute_minor, OLDEST / 10, OLDEST % 10);
    const int error = fb_cuda_find_code();
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
        error == cudaErrorUnsupportedPtxVersion) {
        cudaGetLastError();
        return fb_fail(FB_DEVICE_FAILED,
            "this build of Fabula has no code for %s (compute capability %d.%d): it was built with other "
            "FABULA_CUDA_ARCHITECTURES",
            info.name, info.compute_major, info.compute_minor);
    }
    return fb_cuda_check(error, "looking for kernels");
}

static enum fb_status allocate(int32_t index, size_t n_bytes, void **out) {
    FB_TRY(fb_cuda_enter(index));
    fb_cuda_lock_memory();
    const int error = cudaMalloc(out, n_bytes);
    fb_cuda_unlock_memory();
    return fb_cuda_check(error, "allocating memory");
}

static void release(int32_t index, void *memory) {
    cudaSetDevice(index);
    fb_cuda_lock_memory();
    cudaFree(memory);
    fb_cuda_unlock_memory();
}

/* Copies and clears use this thread's own stream and wait only for that. Waiting for the whole GPU or the
 * default stream fails while any thread records a graph, and breaks the recording. Programs have finished
 * their work when they return, so there is nothing to wait for on their streams. */
static enum fb_status finish(int error, const char *what) {
    FB_TRY(fb_cuda_check(error, what));
    return fb_cuda_check(cudaStreamSynchronize(cudaStreamPerThread), what);
}

static enum fb_status copy(int32_t index, enum fb_direction direction, void *to, const void *from, size_t n_bytes) {
    static const enum cudaMemcpyKind kinds[] = {
        [FB_TO_DEVICE] = cudaMemcpyHostToDevice,
        [FB_FROM_DEVICE] = cudaMemcpyDeviceToHost,
        [FB_ON_DEVICE] = cudaMemcpyDeviceToDevice,
    };
    if (to == from) return FB_OK;
    FB_TRY(fb_cuda_enter(index));
    return finish(cudaMemcpyAsync(to, from, n_bytes, kinds[direction], cudaStreamPerThread), "copying memory");
}

static enum fb_status clear(int32_t index, void *memory, size_t n_bytes) {
    FB_TRY(fb_cuda_enter(index));
    return finish(cudaMemsetAsync(memory, 0, n_bytes, cudaStreamPerThread), "clearing memory");
}

static enum fb_status load_products(int32_t index, const char *path, void **out) {
    struct fb_cuda_functions *functions;
    (void)index;
    FB_TRY(fb_cuda_functions_load(path, &functions));
    *out = functions;
    return FB_OK;
}

const struct fb_device_kind *fb_device_kind_of_build(void) {
    static const struct fb_device_kind kind = {.count = count,
        .describe = describe,
        .check = check,
        .allocate = allocate,
        .release = release,
        .copy = copy,
        .clear = clear,
        .load_products = load_products,
        .lacks = fb_cuda_lacks,
        .program_create = fb_cuda_program_create,
        .program_free = fb_cuda_program_free,
        .program_run = fb_cuda_program_run,
        .program_set_graphs = fb_cuda_set_graphs,
        .program_graph_info = fb_cuda_graph_info,
        .group_open = fb_cuda_group_open,
        .group_close = fb_cuda_group_close,
        .group_run = fb_cuda_group_run};
    return &kind;
}
