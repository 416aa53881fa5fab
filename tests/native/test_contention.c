/*
 * test_contention.c - how often the threads of a large team write the same cache line. Counted, not timed: such a
 * write takes 50 to 100 ns on a machine of many cores, which is not here.
 *
 * team.c is compiled once more, with atomic adds that count themselves by line.
 */
#include <stdatomic.h>
#include <stdint.h>

enum { LINES = 4096 };

static struct {
    atomic_uintptr_t line;
    atomic_int n;
} counted[LINES];

static void count_add(uintptr_t address) {
    const uintptr_t line = address / 64;
    for (uintptr_t i = line % LINES;; i = (i + 1) % LINES) {
        uintptr_t found = 0;
        if (atomic_compare_exchange_strong(&counted[i].line, &found, line) || found == line) {
            atomic_fetch_add(&counted[i].n, 1);
            return;
        }
    }
}

#undef atomic_fetch_add_explicit
#define atomic_fetch_add_explicit(object, operand, order)                                                              \
    (count_add((uintptr_t)(object)), __atomic_fetch_add(object, operand, order))

#define fb_now_ns       counted_now_ns
#define fb_barrier_wait counted_barrier_wait
#define fb_team_size    counted_team_size
#define fb_team_learn   counted_team_learn
#define fb_team_run     counted_team_run
#include "base/team.c"

#include "check.h"

#include <string.h>

static int most_on_a_line(const void *except) {
    int most = 0;
    for (int i = 0; i < LINES; i++)
        if (counted[i].line != (uintptr_t)except / 64 && counted[i].n > most) most = counted[i].n;
    return most;
}

static int64_t adds(void) {
    int64_t sum = 0;
    for (int i = 0; i < LINES; i++)
        sum += counted[i].n;
    return sum;
}

static struct fb_meeting groups[64];

/* A barrier: every thread sees what the others wrote before, whatever its group; no line gets more than 16 adds. */
static void test_barrier(int n_threads, int most) {
    struct fb_barrier barrier = {.groups = groups};
    static atomic_int turn[128];
    atomic_int n_wrong = 0, n_team = 0;
    enum { ROUNDS = 5 };
    for (int i = 0; i < 128; i++)
        turn[i] = 0;
    memset(counted, 0, sizeof counted);
#pragma omp parallel num_threads(n_threads)
    {
        const int thread = omp_get_thread_num(), n = omp_get_num_threads();
        n_team = n;
        for (int round = 1; round <= ROUNDS; round++) {
            atomic_store_explicit(&turn[thread], round, memory_order_relaxed);
            fb_barrier_wait(&barrier, thread, n);
            for (int other = 0; other < n; other++)
                if (atomic_load_explicit(&turn[other], memory_order_relaxed) < round) n_wrong++;
            fb_barrier_wait(&barrier, thread, n);
        }
    }
    CHECK_AT(n_wrong == 0, "%d of %d threads", n_wrong, n_threads);
    if (n_team != n_threads) return; /* the system gave fewer */
    const int found = most_on_a_line(&barrier.lost_ns);
    CHECK_AT(
        found <= 2 * ROUNDS * most, "%d adds on a line in %d barriers of %d threads", found, 2 * ROUNDS, n_threads);
    CHECK(barrier.root.arrived == 0);
    for (int i = 0; i < 64; i++)
        CHECK(groups[i].arrived == 0);
}

/* Items: one add for each, all by the owner of the share as long as it is at work; nobody adds to an empty share. */
static void test_items(int n_threads, int64_t n_items) {
    static struct fb_counter counters[128];
    memset(counters, 0, sizeof counters);
    memset(counted, 0, sizeof counted);
    static atomic_int taken[4096];
    for (int64_t i = 0; i < n_items; i++)
        taken[i] = 0;
    for (int thread = 0; thread < n_threads; thread++) { /* each finds what those before it left: nothing, at last */
        struct fb_items items = fb_items_of(counters, n_items, thread, n_threads);
        int64_t index;
        for (int k = 0; k < n_items / n_threads && (index = fb_next_item(&items)) >= 0; k++)
            taken[index]++;
    }
    for (int thread = 0; thread < n_threads; thread++) {
        struct fb_items items = fb_items_of(counters, n_items, thread, n_threads);
        for (int64_t index; (index = fb_next_item(&items)) >= 0;)
            taken[index]++;
    }
    for (int64_t i = 0; i < n_items; i++)
        CHECK_AT(taken[i] == 1, "item %lld: %d times", (long long)i, (int)taken[i]);
    CHECK_AT(adds() == n_items, "%lld adds for %lld items", (long long)adds(), (long long)n_items);
}

int main(void) {
    test_barrier(2, 2);
    test_barrier(16, 16);
    test_barrier(17, 16);
    test_barrier(40, 16);
    test_barrier(64, 16);
    test_barrier(128, 16);
    test_items(64, 64);
    test_items(64, 1000);
    test_items(128, 4000);
    test_items(7, 3);
    return check_result();
}
