/*
 * team.h - how the threads of one parallel region share work and wait for each other.
 *
 * Work is a list of stages, each with a number of work items. A thread takes the items of its own share in
 * order, which are contiguous in memory, and then from the shares of the others: a core that is slowed by
 * another process simply takes fewer. Each stage ends in a barrier. The barrier spins for a while, since the
 * next stage is microseconds away, then yields its core.
 *
 * On a machine that runs other processes too, one preempted thread makes all others wait. Where that costs
 * more than the thread is worth, the team becomes smaller for a while (struct fb_team).
 */
#ifndef FABULA_BASE_TEAM_H
#define FABULA_BASE_TEAM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Counters and barrier words have a cache line each, so that taking an item does not disturb
 * waiting threads. */
struct fb_counter {
    _Alignas(64) atomic_llong next;
};

/* The items of a stage as one thread sees them: `counters` [n_threads], one per share. */
struct fb_items {
    struct fb_counter *counters;
    int64_t n_items;
    int thread, n_threads;
    int n_done; /* shares that this thread found empty: its own, then those after it */
};

static inline struct fb_items fb_items_of(struct fb_counter *counters, int64_t n_items, int thread, int n_threads) {
    return (struct fb_items){counters, n_items, thread, n_threads, 0};
}

/* Returns the next item of one share, -1 when it is empty. */
static inline int64_t fb_next_of_share(const struct fb_items *items, int share) {
    const int64_t first = items->n_items * share / items->n_threads;
    const int64_t end = items->n_items * (share + 1) / items->n_threads;
    /* Other threads' shares are mostly empty by then, and a load is cheaper than an add, which takes the
     * cache line from its owner. */
    if (first + atomic_load_explicit(&items->counters[share].next, memory_order_relaxed) >= end) return -1;
    const int64_t index = first + atomic_fetch_add_explicit(&items->counters[share].next, 1, memory_order_relaxed);
    return index < end ? index : -1;
}

/* Returns the next item for this thread, -1 when none is left. */
static inline int64_t fb_next_item(struct fb_items *items) {
    for (; items->n_done < items->n_threads; items->n_done++) {
        const int64_t index = fb_next_of_share(items, (items->thread + items->n_done) % items->n_threads);
        if (index >= 0) return index;
    }
    return -1;
}

/* Threads of a group of a barrier. An add to a line that another core has takes some 50 to 100 ns, and those to one
 * line follow each other: 16 of them take as long as one more level of a tree. */
enum { FB_BARRIER_GROUP = 16 };

/* Where some threads meet. Zeroed before its first use; each wait leaves it ready for the next. */
struct fb_meeting {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint generation; /* a line of its own: waiting threads read it, arriving ones do not write it */
};

/* Up to FB_BARRIER_GROUP threads meet at the root. More do so in groups, whose last threads meet at the root, so that
 * no line is written by more than 16 threads, nor read by more while they wait. */
struct fb_barrier {
    struct fb_meeting root;
    _Alignas(64) atomic_llong lost_ns; /* total time that threads waited here after spinning */
    struct fb_meeting *groups;         /* [fb_barrier_groups]; NULL if there are none */
};

/* Number of groups that a barrier of so many threads has; 0 if they all meet at the root. */
static inline int fb_barrier_groups(int n_threads) {
    return n_threads <= FB_BARRIER_GROUP ? 0 : (n_threads + FB_BARRIER_GROUP - 1) / FB_BARRIER_GROUP;
}

/* Waits until `n_threads` threads have arrived, each with its number in 0 .. n_threads-1. What they wrote before is
 * visible to all after. */
void fb_barrier_wait(struct fb_barrier *barrier, int thread, int n_threads);

/* Adapts the number of threads to the time they lose by waiting for each other. Zero-initialized, it is the
 * full team. */
struct fb_team {
    int size;                /* 0: the full team */
    int64_t run_ns, lost_ns; /* since the last decision; lost: summed over the threads that waited */
    int64_t rest_ns;         /* how long the smaller team runs before the full one is tried again */
    int64_t rest_until_ns;
};

int64_t fb_now_ns(void); /* monotonic clock */

/* Number of threads for a run that begins at `now_ns`: the smaller team's, or `full` when it is time to try
 * that again. */
int fb_team_size(const struct fb_team *team, int full, int64_t now_ns);

/* Records a run of `used` out of `full` threads that took run_ns, of which waiting threads lost lost_ns. */
void fb_team_learn(struct fb_team *team, int full, int used, int64_t now_ns, int64_t run_ns, int64_t lost_ns);

/* Runs one stage of `n_items` in a parallel region of its own, for standalone operators: calls item(context,
 * index, thread) for each index, thread in 0 .. n_threads-1. */
typedef void (*fb_item_function)(void *context, int64_t index, int thread);
void fb_team_run(fb_item_function item, void *context, int64_t n_items, int n_threads);

#endif
