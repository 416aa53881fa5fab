/* team.c - barrier and single-stage regions. See team.h. */
#include "base/team.h"

#include <omp.h>
#include <sched.h>

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

void fb_barrier_wait(struct fb_barrier *barrier, int n_threads) {
    if (n_threads == 1) return;
    unsigned generation = atomic_load_explicit(&barrier->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == n_threads - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->generation, generation + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&barrier->generation, memory_order_acquire) == generation; spins++) {
        if (spins < SPINS)
            spin_pause();
        else
            sched_yield();
    }
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
        const int thread = omp_get_thread_num();
        struct fb_items items = fb_items_of(counters, n_items, thread % n_shares, n_shares);
        for (int64_t index; (index = fb_next_item(&items)) >= 0;)
            item(context, index, thread);
    }
}
