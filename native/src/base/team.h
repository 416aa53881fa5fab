/*
 * team.h - how the threads of one parallel region share work and wait for each other.
 *
 * Work is a list of stages, each with a number of items. A thread takes the next item from the stage's counter, so a
 * core that is slowed by a neighbour simply takes fewer; after a stage everybody meets at a barrier. The barrier
 * spins for a while, since the next stage is microseconds away, then gives its core up to whoever needs it.
 */
#ifndef FABULA_BASE_TEAM_H
#define FABULA_BASE_TEAM_H

#include <stdatomic.h>
#include <stdint.h>

/* Counter and barrier words lie on cache lines of their own, else every take would disturb every wait. */
struct fb_counter {
    _Alignas(64) atomic_llong next;
};

struct fb_barrier {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint generation;
};

/* Waits until `n_threads` threads have come. What they wrote before is visible to all after. */
void fb_barrier_wait(struct fb_barrier *barrier, int n_threads);

/* One parallel region over one stage of `n_items`, for operators that run alone: calls item(context, index, thread)
 * for each index, thread in 0 .. n_threads-1. */
typedef void (*fb_item_function)(void *context, int64_t index, int thread);
void fb_team_run(fb_item_function item, void *context, int64_t n_items, int n_threads);

#endif
