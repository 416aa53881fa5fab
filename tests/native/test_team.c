/*
 * test_team.c - when a team becomes smaller and when the full one is tried again. The times are made up.
 */
#include "base/team.h"
#include "check.h"

#include <omp.h>

enum { MS = 1000000 };

/* Runs of 5 ms each that lose `lost` percent; returns the number of threads of the next. */
static int run_for(struct fb_team *team, int full, int64_t *now, int n_runs, int lost) {
    for (int i = 0; i < n_runs; i++) {
        const int used = fb_team_size(team, full, *now);
        *now += 5 * MS;
        fb_team_learn(team, full, used, *now, 5 * MS, used == full ? 5 * MS / 100 * lost : 0);
    }
    return fb_team_size(team, full, *now);
}

static void test_quiet(void) {
    struct fb_team team = {0};
    int64_t now = 1000 * (int64_t)MS;
    CHECK(run_for(&team, 2, &now, 1000, 5) == 2);
    CHECK(run_for(&team, 16, &now, 1000, 1) == 16);
}

static void test_neighbor(void) {
    struct fb_team team = {0};
    int64_t now = 1000 * (int64_t)MS;
    CHECK(run_for(&team, 2, &now, 4, 50) == 1);
    int64_t n_full = 0, n_small = 0;
    for (int i = 0; i < 2000; i++)
        *(run_for(&team, 2, &now, 1, 50) == 2 ? &n_full : &n_small) += 1;
    CHECK_AT(n_full > 10 && n_full * 20 < n_small, "%lld of 2000 with the full team", (long long)n_full);
    /* The other process is gone: the next trial restores the full team permanently. */
    run_for(&team, 2, &now, 200, 0);
    CHECK(team.size == 0 && run_for(&team, 2, &now, 100, 0) == 2);
}

static void test_many_threads(void) {
    struct fb_team team = {0};
    int64_t now = 1000 * (int64_t)MS;
    CHECK(run_for(&team, 16, &now, 4, 20) == 12);
    struct fb_team smaller = team;
    for (int i = 0; i < 4; i++) /* twelve lose as much: nine */
        fb_team_learn(&smaller, 16, 12, now, 5 * MS, 1 * MS);
    CHECK(smaller.size == 9);
    for (int i = 0; i < 100; i++) /* a single thread never waits, so nothing is learned */
        fb_team_learn(&team, 16, 1, now, 5 * MS, 0);
    CHECK(team.size == 12);
}

/* Waiting for threads that arrive late is counted; short waits are not. */
static void test_barrier_counts_long_waits(void) {
    struct fb_barrier barrier = {0};
    for (int round = 0; round < 2; round++) {
#pragma omp parallel num_threads(2)
        if (omp_get_num_threads() == 2) {
            const int64_t until = fb_now_ns() + (round ? 30 * MS : 0);
            while (omp_get_thread_num() == 1 && fb_now_ns() < until)
                ;
            fb_barrier_wait(&barrier, omp_get_thread_num(), 2);
        }
        if (round && omp_get_max_threads() > 1) CHECK(atomic_load(&barrier.lost_ns) > 5 * MS);
    }
}

int main(void) {
    test_quiet();
    test_neighbor();
    test_many_threads();
    test_barrier_counts_long_waits();
    return check_result();
}
