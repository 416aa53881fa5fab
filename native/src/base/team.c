/* team.c - barrier, team size, and single-stage parallel regions. See team.h. */
#include "base/team.h"

#include "base/float_mode.h"

#include <omp.h>
#include <sched.h>
#include <time.h>

/* Spins before a waiting thread yields: about 50 us on a 3-4 GHz core, longer than any wait on an idle
 * machine and far shorter than the time slice that a busy neighbor process would otherwise lose. */
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

/* Whether this thread is the last of n to arrive. The others wait for `generation` to change. */
static bool arrives_last(struct fb_meeting *meeting, int n, unsigned *generation) {
    *generation = atomic_load_explicit(&meeting->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&meeting->arrived, 1, memory_order_acq_rel) < n - 1) return false;
    atomic_store_explicit(&meeting->arrived, 0, memory_order_relaxed);
    return true;
}

static void release(struct fb_meeting *meeting, unsigned generation) {
    atomic_store_explicit(&meeting->generation, generation + 1, memory_order_release);
}

static void await(struct fb_barrier *barrier, const struct fb_meeting *meeting, unsigned generation) {
    for (int spins = 0; spins < SPINS; spins++) {
        if (atomic_load_explicit(&meeting->generation, memory_order_acquire) != generation) return;
        spin_pause();
    }
    const int64_t start = fb_now_ns();
    while (atomic_load_explicit(&meeting->generation, memory_order_acquire) == generation)
        sched_yield();
    atomic_fetch_add_explicit(&barrier->lost_ns, fb_now_ns() - start, memory_order_relaxed);
}

static void meet_at_root(struct fb_barrier *barrier, int n) {
    unsigned generation;
    if (arrives_last(&barrier->root, n, &generation))
        release(&barrier->root, generation);
    else
        await(barrier, &barrier->root, generation);
}

void fb_barrier_wait(struct fb_barrier *barrier, int thread, int n_threads) {
    if (n_threads == 1) return;
    const int n_groups = fb_barrier_groups(n_threads);
    if (n_groups == 0) {
        meet_at_root(barrier, n_threads);
        return;
    }
    const int group = thread / FB_BARRIER_GROUP, others = n_threads - group * FB_BARRIER_GROUP;
    struct fb_meeting *meeting = &barrier->groups[group];
    unsigned generation;
    if (!arrives_last(meeting, others < FB_BARRIER_GROUP ? others : FB_BARRIER_GROUP, &generation)) {
        await(barrier, meeting, generation);
        return;
    }
    meet_at_root(barrier, n_groups);
    release(meeting, generation);
}

/* A team of n threads that waits for more than LOST_OF_A_THREAD / n of its time is slower than a team of
 * n - 1. (The limit would be 1 / n if n threads did n times the work of one, but memory bandwidth prevents
 * that.)
 * WINDOW_NS         a decision covers this much run time: some milliseconds, the scale on which the system
 *                   preempts threads
 * TRIAL_NS          a trial of the full team covers this much
 * CERTAIN_NS        lost time that ends a trial at once; waking a thread never takes as long
 * FIRST_REST_NS     how long a smaller team runs before the first trial; doubles with each failed one
 * LONGEST_REST_NS   up to this: how long the end of the other load may go unnoticed */
static const double LOST_OF_A_THREAD = 0.6;
enum {
    WINDOW_NS = 20000000,
    TRIAL_NS = 6000000,
    CERTAIN_NS = 1000000,
    FIRST_REST_NS = 30000000,
    LONGEST_REST_NS = 1000000000
};

int fb_team_size(const struct fb_team *team, int full, int64_t now_ns) {
    return team->size == 0 || team->size >= full || now_ns >= team->rest_until_ns ? full : team->size;
}

void fb_team_learn(struct fb_team *team, int full, int used, int64_t now_ns, int64_t run_ns, int64_t lost_ns) {
    if (used <= 1) return; /* a single thread never waits */
    const bool is_trial = team->size != 0 && used == full;
    team->run_ns += run_ns;
    team->lost_ns += lost_ns;
    const bool is_slow = (double)team->lost_ns * used > LOST_OF_A_THREAD * (double)team->run_ns;
    const bool is_certain = is_trial && is_slow && team->lost_ns > CERTAIN_NS; /* ends a failing trial early */
    if (team->run_ns < (is_trial ? TRIAL_NS : WINDOW_NS) && !is_certain) return;
    team->run_ns = team->lost_ns = 0;
    if (!is_slow) {
        if (is_trial) *team = (struct fb_team){0};
        return;
    }
    if (is_trial) {
        team->rest_ns = team->rest_ns < LONGEST_REST_NS / 2 ? 2 * team->rest_ns : LONGEST_REST_NS;
    } else {
        team->size = used - (used >= 8 ? used / 4 : 1);
        team->rest_ns = FIRST_REST_NS;
    }
    team->rest_until_ns = now_ns + team->rest_ns;
}

void fb_team_run(fb_item_function item, void *context, int64_t n_items, int n_threads) {
    enum { MOST_SHARES = 64 }; /* more threads take items from the same 64 shares */
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
