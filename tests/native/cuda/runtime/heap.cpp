/* heap.cpp - see cuda_runtime_api.h. */
#include "cuda_runtime_api.h"

#include <stdlib.h>
#include <string.h>

#include <map>
#include <mutex>

long fake_fails_at = -1, fake_n_held = 0;
int fake_n_processors = 4, fake_major = 8;

namespace {

struct block {
    int device;
    size_t n_bytes;
};

const size_t memory_bytes[FAKE_DEVICES] = {256 << 20, 1 << 20};

std::mutex lock; /* of all below, and of the counters above */
std::map<void *, block> blocks;
size_t used[FAKE_DEVICES];
thread_local int current;

bool fails() {
    const std::lock_guard<std::mutex> guard(lock);
    return fake_fails_at >= 0 && fake_fails_at-- == 0;
}

cudaError_t unless_it_fails() {
    return fails() ? cudaErrorUnknown : cudaSuccess;
}

} // namespace

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return unless_it_fails();
}

cudaError_t cudaGetDeviceCount(int *n) {
    *n = FAKE_DEVICES;
    return unless_it_fails();
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= FAKE_DEVICES) abort();
    current = device;
    return cudaSuccess; /* it is called before freeing too, where nobody could tell */
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int) {
    *out = {};
    strcpy(out->name, "emulated GPU");
    out->major = fake_major;
    out->multiProcessorCount = fake_n_processors;
    return unless_it_fails();
}

cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? fake_n_processors : fake_major;
    return unless_it_fails();
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *n_bytes) {
    const std::lock_guard<std::mutex> guard(lock);
    *n_bytes = memory_bytes[current];
    *free_bytes = memory_bytes[current] - used[current];
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t n_bytes) {
    if (fails()) return cudaErrorMemoryAllocation;
    const std::lock_guard<std::mutex> guard(lock);
    if (n_bytes > memory_bytes[current] - used[current] || posix_memalign(out, 256, n_bytes))
        return cudaErrorMemoryAllocation;
    memset(*out, 0xFF, n_bytes);
    blocks[*out] = {current, n_bytes};
    used[current] += n_bytes;
    fake_n_held++;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = blocks.find(memory);
    if (found == blocks.end()) abort();
    used[found->second.device] -= found->second.n_bytes;
    blocks.erase(found);
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

cudaError_t cudaMemcpy(void *to, const void *from, size_t n_bytes, cudaMemcpyKind) {
    if (fails()) return cudaErrorUnknown;
    memcpy(to, from, n_bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, n_bytes, kind);
}

cudaError_t cudaMemset(void *to, int value, size_t n_bytes) {
    if (fails()) return cudaErrorUnknown;
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
    return unless_it_fails();
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return cudaFree(stream);
}

cudaError_t cudaDeviceSynchronize() {
    return unless_it_fails();
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t) {
    return "as the test wanted";
}
