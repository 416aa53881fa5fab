/* heap.cpp - see cuda_runtime_api.h. */
#include "cuda_runtime_api.h"

#include "capture.h"

#include <stdlib.h>
#include <string.h>

#include <iterator>
#include <map>
#include <mutex>
#include <set>

long fake_fails_at = -1, fake_n_held = 0, fake_n_in_group = 0;
int fake_n_processors = 4, fake_major = 8;
size_t fake_bytes_from_device = 0, fake_bytes_to_pageable = 0;
void (*fake_while_recording)(void) = nullptr;

struct fake_stream : emulate::stream {
    int device = 0;
    bool is_broken = false; /* the recording */
};

static fake_stream per_thread;
const cudaStream_t cudaStreamPerThread = &per_thread;

struct fake_graph {
    emulate::steps steps;
};

struct fake_launchable {
    emulate::steps steps;
};

namespace {

struct block {
    int device;
    size_t n_bytes;
};

const size_t memory_bytes[FAKE_DEVICES] = {256 << 20, 1 << 20, 256 << 20, 256 << 20};

std::mutex lock; /* for everything below, and the counters above */
std::map<void *, block> blocks;
size_t used[FAKE_DEVICES];
thread_local int current;
thread_local fake_stream *recording; /* by this thread */
std::set<fake_stream *> recordings;  /* by all threads */
bool group_is_open = false;

bool fails() {
    const std::lock_guard<std::mutex> guard(lock);
    return fake_fails_at >= 0 && fake_fails_at-- == 0;
}

cudaError_t unless_it_fails() {
    return fails() ? cudaErrorUnknown : cudaSuccess;
}

/* Whether a call is not allowed now because this thread records. */
bool breaks_recording() {
    const std::lock_guard<std::mutex> guard(lock);
    if (recording) recording->is_broken = true;
    return recording != nullptr;
}

/* Whether a call that waits for the whole device is not allowed now because some thread records there. */
bool breaks_recordings() {
    const std::lock_guard<std::mutex> guard(lock);
    bool breaks = recording != nullptr;
    if (recording) recording->is_broken = true;
    for (fake_stream *stream : recordings)
        if (stream->device == current) breaks = stream->is_broken = true;
    return breaks;
}

/* A call that allocates or frees memory: on real GPUs it may wait for those on which a group was already
 * launched. */
void meet_group() {
    const std::lock_guard<std::mutex> guard(lock);
    fake_n_in_group += group_is_open;
}

/* Whether memory is from cudaMallocHost, or part of it; the lock is held. */
bool is_pinned(void *memory) {
    const auto behind = blocks.upper_bound(memory);
    if (behind == blocks.begin()) return false;
    const auto &[begin, found] = *std::prev(behind);
    return static_cast<char *>(memory) < static_cast<char *>(begin) + found.n_bytes;
}

/* Counts memory and handles. */
void hold(long change) {
    const std::lock_guard<std::mutex> guard(lock);
    fake_n_held += change;
}

} // namespace

void fake_open_group(int is_open) {
    const std::lock_guard<std::mutex> guard(lock);
    group_is_open = is_open;
}

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
    return cudaSuccess; /* also called before freeing, where an error could not be reported */
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int) {
    *out = {};
    strcpy(out->name, "emulated GPU");
    out->major = fake_major;
    out->minor = fake_major == 7 ? 5 : 0;
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
    meet_group();
    if (breaks_recording()) return cudaErrorStreamCaptureUnsupported;
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
    meet_group();
    if (breaks_recording()) return cudaErrorStreamCaptureUnsupported;
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = blocks.find(memory);
    if (found == blocks.end()) abort();
    used[found->second.device] -= found->second.n_bytes;
    memset(memory, 0xFF, found->second.n_bytes); /* for anyone who still reads it */
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

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    if (!stream && breaks_recordings()) return cudaErrorStreamCaptureUnsupported;
    if (fails()) return cudaErrorUnknown;
    if (kind == cudaMemcpyDeviceToHost) {
        const std::lock_guard<std::mutex> guard(lock);
        fake_bytes_from_device += n_bytes;
        if (!is_pinned(to)) fake_bytes_to_pageable += n_bytes;
    }
    emulate::put(stream, [=] {
        memcpy(to, from, n_bytes);
        return 0;
    });
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n_bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, n_bytes, kind, nullptr);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t n_bytes, cudaStream_t stream) {
    if (!stream && breaks_recordings()) return cudaErrorStreamCaptureUnsupported;
    if (fails()) return cudaErrorUnknown;
    emulate::put(stream, [=] {
        memset(to, value, n_bytes);
        return 0;
    });
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t n_bytes) {
    return cudaMemsetAsync(to, value, n_bytes, nullptr);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
    if (fails()) return cudaErrorMemoryAllocation;
    *out = new fake_stream;
    (*out)->device = current;
    hold(1);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t) {
    return unless_it_fails();
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return breaks_recording() ? cudaErrorStreamCaptureUnsupported : unless_it_fails();
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    hold(-1);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (recording || stream->is_recording) abort();
    if (fails()) return cudaErrorUnknown;
    stream->is_recording = true;
    stream->is_broken = false;
    stream->recorded.clear();
    recording = stream;
    const std::lock_guard<std::mutex> guard(lock);
    recordings.insert(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    if (recording != stream) abort();
    if (fake_while_recording) fake_while_recording();
    recording = nullptr;
    {
        const std::lock_guard<std::mutex> guard(lock);
        recordings.erase(stream);
    }
    stream->is_recording = false;
    *out = nullptr;
    if (stream->is_broken) return cudaErrorStreamCaptureInvalidated;
    if (fails()) return cudaErrorUnknown;
    *out = new fake_graph{stream->recorded};
    hold(1);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long) {
    meet_group();
    if (breaks_recording()) return cudaErrorStreamCaptureUnsupported;
    if (fails()) return cudaErrorMemoryAllocation;
    *out = new fake_launchable{graph->steps};
    hold(1);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t launchable, cudaStream_t) {
    if (fails()) return cudaErrorUnknown;
    for (const auto &step : launchable->steps)
        if (step() != 0) return cudaErrorUnknown;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t launchable) {
    meet_group();
    delete launchable;
    hold(-1);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    hold(-1);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    return breaks_recordings() ? cudaErrorStreamCaptureUnsupported : unless_it_fails();
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t) {
    return "as the test wanted";
}
