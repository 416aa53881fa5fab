/*
 * team.h - how the threads of one parallel region share work and wait for each other.
 *
 * Work is a list of stages, each with a number of items. A thread takes the items of its own share in order, which lie
 * one behind the other in memory, and then from the shares of the others: a core that is slowed by a neighbour simply
 * takes fewer. After a stage everybody meets at a barrier. The barrier
 * spins for a while, since the next stage is microseconds away, then gives its core up to whoever needs it.
 *
 * On a machine that others use, too, a thread that was put aside makes everybody wait. Where that costs more than the
 * thread is worth, the team becomes smaller for a while (struct fb_crew).
 */
#ifndef FABULA_BASE_TEAM_H
#define FABULA_BASE_TEAM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Counter and barrier words lie on cache lines of their own, else every take would disturb every wait. */
struct fb_counter {
    _Alignas(64) atomic_llong next;
};

/* The items of a stage as one thread sees them: `counters` [n_threads], one for each share. */
struct fb_items {
    struct fb_counter *counters;
    int64_t n_items;
    int thread, n_threads;
    int n_done; /* shares that this thread found empty: its own, then those after it */
};

static inline struct fb_items fb_items_of(struct fb_counter *counters, int64_t n_items, int thread, int n_threads) {
    return (struct fb_items){counters, n_items, thread, n_threads, 0};
}

/* The next item for this thread, -1 when there is none left. */
static inline int64_t fb_next_item(struct fb_items *items) {
    for (; items->n_done < items->n_threads; items->n_done++) {
        const int share = (items->thread + items->n_done) % items->n_threads;
        const int64_t first = items->n_items * share / items->n_threads;
        const int64_t end = items->n_items * (share + 1) / items->n_threads;
        /* Others' shares are mostly empty by then: looking costs less than counting, which takes the line from its owner. */
        if (first + atomic_load_explicit(&items->counters[share].next, memory_order_relaxed) >= end) continue;
        const int64_t index = first + atomic_fetch_add_explicit(&items->counters[share].next, 1, memory_order_relaxed);
        if (index < end) return index;
    }
    return -1;
}

struct fb_barrier {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint generation;
    _Alignas(64) atomic_llong lost_ns; /* that threads have waited here beyond their spinning, in all */
};

/* Waits until `n_threads` threads have come. What they wrote before is visible to all after. */
void fb_barrier_wait(struct fb_barrier *barrier, int n_threads);

/* How many threads of a team are worth having, learnt from what they lost by waiting for each other. Zeroed, it is the
 * full team. */
struct fb_crew {
    int size;                /* 0 for the full team */
    int64_t run_ns, lost_ns; /* since the last decision; lost: by a thread that waited */
    int64_t rest_ns;         /* how long the full team is not tried */
    int64_t rest_until_ns;
};

int64_t fb_now_ns(void); /* of a clock that only goes on */

/* Threads for a run that begins at `now_ns`: a smaller team, or the full one when it is time to try it again. */
int fb_crew_size(const struct fb_crew *crew, int full, int64_t now_ns);

/* Learns from a run of `used` threads out of `full` that took run_ns, of which those that waited lost lost_ns. */
void fb_crew_learn(struct fb_crew *crew, int full, int used, int64_t now_ns, int64_t run_ns, int64_t lost_ns);

/* One parallel region over one stage of `n_items`, for operators that run alone: calls item(context, index, thread)
 * for each index, thread in 0 .. n_threads-1. */
typedef void (*fb_item_function)(void *context, int64_t index, int thread);
void fb_team_run(fb_item_function item, void *context, int64_t n_items, int n_threads);

#endif
