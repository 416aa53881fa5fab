/* team.c - barrier, size of the team, and single-stage regions. See team.h. */
#include "base/team.h"

#include "base/float_mode.h"

#include <omp.h>
#include <sched.h>
#include <time.h>

/* Spins before a waiting thread yields: about 50 us on a 3-4 GHz core, longer than any wait on a quiet machine and far
 * shorter than the time slice that a busy neighbour would otherwise lose. */
enum { SPINS = 1500 };

static inline void spin_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int64_t fb_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void fb_barrier_wait(struct fb_barrier *barrier, int n_threads) {
    if (n_threads == 1) return;
    unsigned generation = atomic_load_explicit(&barrier->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == n_threads - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->generation, generation + 1, memory_order_release);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (atomic_load_explicit(&barrier->generation, memory_order_acquire) != generation) return;
        spin_pause();
    }
    const int64_t start = fb_now_ns();
    while (atomic_load_explicit(&barrier->generation, memory_order_acquire) == generation)
        sched_yield();
    atomic_fetch_add_explicit(&barrier->lost_ns, fb_now_ns() - start, memory_order_relaxed);
}

/* A team of n that stands still for more than this share of its time is slower than one of n - 1: it would be at 1 / n if
 * n threads did n times as much, which memory does not let them. Times are those in which the system puts threads aside
 * for each other, some milliseconds, what waking a thread never takes, and how long a neighbour may be gone unnoticed. */
static const double LOST_OF_A_THREAD = 0.6;
enum {
    WINDOW_NS = 20000000,
    TRIAL_NS = 6000000,
    CERTAIN_NS = 1000000,
    FIRST_REST_NS = 30000000,
    LONGEST_REST_NS = 1000000000
};

int fb_crew_size(const struct fb_crew *crew, int full, int64_t now_ns) {
    return crew->size == 0 || crew->size >= full || now_ns >= crew->rest_until_ns ? full : crew->size;
}

void fb_crew_learn(struct fb_crew *crew, int full, int used, int64_t now_ns, int64_t run_ns, int64_t lost_ns) {
    if (used <= 1) return; /* one thread waits for nobody */
    const bool is_trial = crew->size != 0 && used == full;
    crew->run_ns += run_ns;
    crew->lost_ns += lost_ns;
    const bool is_slow = (double)crew->lost_ns * used > LOST_OF_A_THREAD * (double)crew->run_ns;
    const bool is_plain = is_trial && is_slow && crew->lost_ns > CERTAIN_NS; /* a trial that fails is over at once */
    if (crew->run_ns < (is_trial ? TRIAL_NS : WINDOW_NS) && !is_plain) return;
    crew->run_ns = crew->lost_ns = 0;
    if (!is_slow) {
        if (is_trial) *crew = (struct fb_crew){0};
        return;
    }
    if (is_trial) {
        crew->rest_ns = crew->rest_ns < LONGEST_REST_NS / 2 ? 2 * crew->rest_ns : LONGEST_REST_NS;
    } else {
        crew->size = used - (used >= 8 ? used / 4 : 1);
        crew->rest_ns = FIRST_REST_NS;
    }
    crew->rest_until_ns = now_ns + crew->rest_ns;
}

void fb_team_run(fb_item_function item, void *context, int64_t n_items, int n_threads) {
    enum { MOST_SHARES = 64 }; /* more threads take from the same shares */
    if (n_threads > n_items) n_threads = n_items < 1 ? 1 : (int)n_items;
    const int n_shares = n_threads < MOST_SHARES ? n_threads : MOST_SHARES;
    struct fb_counter counters[MOST_SHARES];
    for (int i = 0; i < n_shares; i++)
        atomic_init(&counters[i].next, 0);
#pragma omp parallel num_threads(n_threads)
    {
        const fb_float_mode mode = fb_float_mode_enter();
        const int thread = omp_get_thread_num();
        struct fb_items items = fb_items_of(counters, n_items, thread % n_shares, n_shares);
        for (int64_t index; (index = fb_next_item(&items)) >= 0;)
            item(context, index, thread);
        fb_float_mode_leave(mode);
    }
}
