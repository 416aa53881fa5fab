/*
 * nccl.cpp - the few functions of NCCL that native/cuda calls, for GPUs whose memory is the host's and whose
 * streams do everything immediately: data is copied when the group of calls ends. Only call number
 * `fake_nccl_fails_at` fails, and any group in which not every GPU of a clique takes part, for which real
 * GPUs would wait forever. A test that sets `fake_nccl_group` is called when a group opens and ends, which
 * then takes a while; links that another thread creates or destroys meanwhile are counted.
 */
#include <string.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

namespace {

enum result { success = 0, unhandled_cuda_error = 1, invalid_usage = 5 };

struct comm {
    int rank, n;
};

struct transfer {
    const float *from;
    float *to;
    size_t count;
    comm *who;
};

std::vector<transfer> waiting;
std::atomic<bool> is_open{false}; /* a group */

} // namespace

extern "C" {

long fake_nccl_fails_at = -1, fake_nccl_n_held = 0, fake_nccl_n_in_group = 0;
void (*fake_nccl_group)(int is_open) = nullptr;

static int unless_it_fails() {
    return fake_nccl_fails_at >= 0 && fake_nccl_fails_at-- == 0 ? unhandled_cuda_error : success;
}

int ncclCommInitAll(comm **comms, int n, const int *) {
    fake_nccl_n_in_group += is_open;
    if (unless_it_fails() != success) return unhandled_cuda_error;
    for (int i = 0; i < n; i++)
        comms[i] = new comm{i, n};
    fake_nccl_n_held += n;
    return success;
}

int ncclCommDestroy(comm *which) {
    fake_nccl_n_in_group += is_open;
    delete which;
    fake_nccl_n_held--;
    return success;
}

int ncclCommAbort(comm *which) {
    return ncclCommDestroy(which);
}

int ncclCommGetAsyncError(comm *, int *error) {
    *error = success;
    return unless_it_fails();
}

int ncclGroupStart() {
    is_open = true;
    if (fake_nccl_group) fake_nccl_group(1);
    return unless_it_fails();
}

int ncclAllGather(const void *from, void *to, size_t count, int type, comm *who, void *) {
    if (type != 7) return invalid_usage;
    waiting.push_back({static_cast<const float *>(from), static_cast<float *>(to), count, who});
    return unless_it_fails();
}

static int end_group() {
    const std::vector<transfer> all = std::move(waiting);
    waiting.clear();
    if (unless_it_fails() != success) return unhandled_cuda_error;
    for (const transfer &one : all) {
        if (all.size() != (size_t)one.who->n || one.count != all[0].count) return invalid_usage;
        for (const transfer &other : all)
            if (other.to + one.who->rank * one.count != one.from)
                memcpy(other.to + one.who->rank * one.count, one.from, one.count * sizeof(float));
    }
    return success;
}

int ncclGroupEnd() {
    if (fake_nccl_group) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const int error = end_group();
    if (fake_nccl_group) fake_nccl_group(0);
    is_open = false;
    return error;
}

const char *ncclGetErrorString(int) {
    return "as the test wanted";
}
}
