/*
 * fork.c - makes fork() safe after a parallel region, in the parent and in the child.
 *
 * The child has only the thread that forked. OpenMP would still believe in that thread's team, and the next
 * parallel region would wait for it forever. So the team is dissolved before each fork; the next region in
 * parent or child makes a new one. Teams of other threads do no harm: the threads that own them are not in
 * the child.
 */
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <stddef.h>

/* OpenMP 5.0; weak, for runtimes that lack it. Not taken from omp.h, which cannot tell: GCC's runtime had the
 * function for years before it claimed the version. */
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
