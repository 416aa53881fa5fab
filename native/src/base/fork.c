/*
 * fork.c - a process that computed may fork, and the child may compute.
 *
 * A child has only the thread that forked. OpenMP's team of that thread would be missing there, and its next parallel region would
 * wait for it for ever. So the team is dissolved before each fork; it comes back with the next region, in the parent as in the
 * child. Teams of other threads do no harm: who made them is not in the child either.
 */
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <stddef.h>

/* OpenMP 5.0; weak, for runtimes that lack it. Not from omp.h, which cannot say whether it has it: GCC's runtime had the function
 * for years before it claimed the version. */
extern int omp_pause_resource_all(int kind) __attribute__((weak));

static void dissolve_team(void) {
    enum { PAUSE_HARD = 2 }; /* omp_pause_hard */
    if (omp_pause_resource_all) omp_pause_resource_all(PAUSE_HARD);
}

__attribute__((constructor)) static void register_fork(void) {
    pthread_atfork(dissolve_team, NULL, NULL);
}
#else
typedef int fb_no_fork_here; /* a translation unit must not be empty */
#endif
