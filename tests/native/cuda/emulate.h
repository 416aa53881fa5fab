/*
 * emulate.h - GPU kernels as host code: each thread of a block is a fiber, blocks run one after another.
 *
 * A fiber runs until it waits: at __syncthreads for all threads of its block, in a shuffle for the 32 of its
 * warp. Shared memory is allocated on the heap for each block and filled with NaN, so AddressSanitizer
 * detects accesses out of bounds and tests detect reads of unwritten memory. With `backward` set, blocks and
 * threads run in descending order: if results then differ, a barrier is missing.
 *
 * A launch fails, with a line on stderr, if no thread can continue: some have exited, or wait elsewhere,
 * while others wait for them; or if a shuffle does not name the whole warp, or meets another kind of shuffle.
 * Launches of several threads wait for each other. On a stream that records (capture.h) a launch is stored
 * with its present arguments, and fails when it is replayed.
 */
#ifndef FABULA_TESTS_EMULATE_H
#define FABULA_TESTS_EMULATE_H

#include "capture.h"
#include "quant/convert.h"

#include <assert.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define FB_SHARED(type, name, count)                                                                                   \
    static const char name##_place = 0;                                                                                \
    type *const name = static_cast<type *>(emulate::shared(&name##_place, sizeof(type) * (size_t)(count)))
#define FB_SHARED_FLOATS(name)                                                                                         \
    float *const name = static_cast<float *>(emulate::shared(nullptr, emulate::dynamic_bytes))

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

enum { WARP = 32, MOST_THREADS = 1024, STACK_BYTES = 256 << 10 };
enum class state { ready, waiting, done };

/* An asynchronous copy of 16 bytes into shared memory. */
struct copy {
    void *to;
    const void *from;
    unsigned group;
};

struct fiber {
    ucontext_t context;
    char *stack;
#ifdef __SANITIZE_ADDRESS__
    void *fake_stack; /* AddressSanitizer's */
#else
    jmp_buf left; /* where it continues: swapcontext would make a system call each time */
    bool has_left;
#endif
    state now;
    unsigned n_shuffles;
    std::vector<copy> copies; /* requested and not yet waited for; see emulate_mma.h */
    unsigned n_groups;
};

/* What a lane passes to the others of its warp in one exchange. */
struct message {
    uint64_t words[3];
};

struct warp {
    int arrived;
    message messages[2][WARP]; /* two, because a lane may be one shuffle ahead of others */
    int kinds[2][WARP];
    bool is_multiplied[2]; /* whether the messages of tiles were turned into `products`; see emulate_mma.h */
    double products[2][WARP][4];
};

struct piece {
    const void *place;
    void *memory;
};

inline std::mutex one_launch; /* only one launch at a time */
inline bool backward = false;
inline bool has_code = true; /* for the GPU */
inline long n_launches = 0;
inline size_t dynamic_bytes = 0;
inline std::vector<fiber> fibers;
inline std::vector<warp> warps;
inline std::vector<piece> pieces;
inline unsigned n_threads, current;
inline unsigned block_arrived;
inline const char *failure;
#ifdef __SANITIZE_ADDRESS__
inline ucontext_t scheduler;
inline void *scheduler_fake_stack;
inline const void *scheduler_stack;
inline size_t scheduler_stack_bytes;
#else
inline jmp_buf scheduler;
#endif
inline void (*body)(void *);
inline void *body_context;

/* ---- Fibers ------------------------------------------------------------------------------------------------------ */

#ifdef __SANITIZE_ADDRESS__

/* Switches to the scheduler. A fiber that is done does not return from here. */
inline void leave(bool is_done) {
    fiber &self = fibers[current];
    __sanitizer_start_switch_fiber(is_done ? nullptr : &self.fake_stack, scheduler_stack, scheduler_stack_bytes);
    swapcontext(&self.context, &scheduler);
    __sanitizer_finish_switch_fiber(fibers[current].fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

inline void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    body(body_context);
    fibers[current].now = state::done;
    leave(true);
}

inline void go_on(fiber &f) {
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack, STACK_BYTES);
    swapcontext(&scheduler, &f.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

inline bool is_reusable(const fiber &) {
    return false;
}

#else

/* Switches to the scheduler. A fiber that is done returns from here in another block. */
inline void leave(bool) {
    fiber &self = fibers[current];
    self.has_left = true;
    if (_setjmp(self.left) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
    for (;;) {
        body(body_context);
        fibers[current].now = state::done;
        leave(true);
    }
}

inline void go_on(fiber &f) {
    if (_setjmp(scheduler) != 0) return;
    if (f.has_left) _longjmp(f.left, 1);
    setcontext(&f.context);
}

/* False for a fiber that a failed launch left unfinished. */
inline bool is_reusable(const fiber &f) {
    return f.has_left && f.now == state::done;
}

#endif

inline void enter(unsigned index) {
    current = index;
    threadIdx = dim3(index, 0, 0);
    go_on(fibers[index]);
}

inline void wait_here() {
    fibers[current].now = state::waiting;
    leave(false);
}

inline void fail(const char *what) {
    failure = what;
    wait_here(); /* forever */
}

/* ---- Functions that kernels call --------------------------------------------------------------------------------- */

inline void sync_block() {
    if (++block_arrived < n_threads) {
        wait_here();
        return;
    }
    block_arrived = 0;
    for (unsigned i = 0; i < n_threads; i++)
        fibers[i].now = state::ready;
}

/* Gives every lane's message to the whole warp; returns the slot with the messages. `kind` tells shuffles
 * apart. */
inline unsigned exchange(const message &value, unsigned mask, int kind) {
    if (mask != 0xFFFFFFFFu) fail("a shuffle names not the whole warp");
    warp &w = warps[current / WARP];
    const unsigned slot = fibers[current].n_shuffles++ % 2, lane = current % WARP;
    w.messages[slot][lane] = value;
    w.kinds[slot][lane] = kind;
    w.is_multiplied[slot] = false;
    if (++w.arrived < WARP) {
        wait_here();
    } else {
        w.arrived = 0;
        for (unsigned i = 0; i < WARP; i++) {
            fibers[current / WARP * WARP + i].now = state::ready;
            if (w.kinds[slot][i] != kind) fail("lanes of a warp meet in different shuffles");
        }
    }
    return slot;
}

template <class T> T shuffle(T value, unsigned mask, unsigned source, int kind) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles take up to 8 bytes");
    message m = {};
    memcpy(m.words, &value, sizeof value);
    const unsigned slot = exchange(m, mask, kind);
    memcpy(&value, warps[current / WARP].messages[slot][source % WARP].words, sizeof value);
    return value;
}

/* The block's memory for one declaration, allocated by the first thread that reaches it. Bytes of 0xFF are
 * NaN. */
inline void *shared(const void *place, size_t n_bytes) {
    for (const piece &p : pieces)
        if (p.place == place) return p.memory;
    void *memory = aligned_alloc(16, (n_bytes + 15) / 16 * 16);
    if (!memory) abort();
    memset(memory, 0xFF, n_bytes);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(static_cast<char *>(memory) + n_bytes, (n_bytes + 15) / 16 * 16 - n_bytes);
#endif
    pieces.push_back({place, memory});
    return memory;
}

/* ---- Launch ------------------------------------------------------------------------------------------------------ */

inline void prepare(unsigned threads) {
    while (fibers.size() < threads) {
        void *stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) abort();
        fibers.push_back({});
        fibers.back().stack = static_cast<char *>(stack);
    }
    warps.assign((threads + WARP - 1) / WARP, warp{});
    block_arrived = 0;
    n_threads = threads;
    for (unsigned i = 0; i < threads; i++) {
        fiber &f = fibers[i];
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(f.stack, STACK_BYTES);
#endif
        const bool is_made = is_reusable(f);
        f.now = state::ready;
        f.n_shuffles = f.n_groups = 0;
        f.copies.clear();
        if (is_made) continue;
#ifndef __SANITIZE_ADDRESS__
        f.has_left = false;
#endif
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack;
        f.context.uc_stack.ss_size = STACK_BYTES;
        f.context.uc_link = nullptr;
        makecontext(&f.context, fiber_main, 0);
#ifdef __SANITIZE_ADDRESS__
        f.context.uc_stack.ss_size = 0; /* or each switch would clear the shadow of the whole stack: slow */
#endif
    }
}

inline bool run_block() {
    prepare(blockDim.x);
    for (bool went_on = true, is_done = false; !is_done;) {
        if (!went_on) {
            failure = "threads wait for others that have left or wait elsewhere";
            break;
        }
        went_on = false;
        is_done = true;
        for (unsigned i = 0; i < n_threads && !failure; i++) {
            const unsigned index = backward ? n_threads - 1 - i : i;
            if (fibers[index].now == state::ready) {
                enter(index);
                went_on = true;
            }
            is_done = is_done && fibers[index].now == state::done;
        }
        if (failure) break;
    }
    for (const piece &p : pieces) {
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(p.memory, 1);
#endif
        free(p.memory);
    }
    pieces.clear();
    if (failure) fprintf(stderr, "a launch failed: %s\n", failure);
    return !failure;
}

} // namespace emulate

namespace emulate {

/* Runs all blocks of a grid, one after another. */
template <class F> int run_grid(dim3 grid, unsigned n_block_threads, size_t shared_bytes, const F &call) {
    const std::lock_guard<std::mutex> guard(one_launch);
    n_launches++;
    failure = nullptr;
    body = [](void *context) { (*static_cast<const F *>(context))(); };
    body_context = const_cast<F *>(&call);
    dynamic_bytes = shared_bytes;
    gridDim = grid;
    blockDim = dim3(n_block_threads);
    const unsigned n_blocks = grid.x * grid.y * grid.z;
    for (unsigned b = 0; b < n_blocks; b++) {
        const unsigned index = backward ? n_blocks - 1 - b : b;
        blockIdx = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
        if (!run_block()) return 1;
    }
    return 0;
}

} // namespace emulate

template <class... P>
static int fb_launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared_bytes, void *stream,
    typename std::common_type<P>::type... arguments) {
    assert(threads >= 1 && threads <= emulate::MOST_THREADS && threads % emulate::WARP == 0);
    assert(grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.y <= 65535 && grid.z <= 65535);
    auto call = [=] { kernel(arguments...); };
    return emulate::put(stream, [=] { return emulate::run_grid(grid, threads, shared_bytes, call); });
}

template <class... P> static int fb_find_code(void (*)(P...)) {
    return emulate::has_code ? 0 : 209; /* cudaErrorNoKernelImageForDevice */
}

#define __syncthreads emulate::sync_block

template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return emulate::shuffle(value, mask, emulate::current % emulate::WARP ^ (unsigned)lanes, lanes);
}

template <class T> T __shfl_sync(unsigned mask, T value, int source) {
    return emulate::shuffle(value, mask, (unsigned)source, -1);
}

/* On shared memory. One fiber runs at a time, so it is atomic. */
inline unsigned long long atomicAdd(unsigned long long *to, unsigned long long value) {
    const unsigned long long before = *to;
    *to += value;
    return before;
}

inline float fb_float_of_f16(uint16_t half) {
    return fb_f16_to_f32(half);
}

inline uint16_t fb_f16_of_float(float value) {
    return fb_f32_to_f16(value);
}

inline float fb_float_of_bits(uint32_t bits) {
    return fb_f32_from_bits(bits);
}

inline uint32_t fb_bits_of_float(float value) {
    return fb_f32_bits(value);
}

inline double fb_double_of_bits(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint64_t fb_bits_of_double(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline void fb_load4(const float *from, float to[4]) {
    assert(reinterpret_cast<uintptr_t>(from) % 16 == 0);
    memcpy(to, from, 4 * sizeof *to);
}

#endif
