/* affinity.c - binds threads to CPUs and spreads memory over nodes. See affinity.h. */
#include "base/affinity.h"

#include "base/status.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

bool fb_thread_pin(int32_t cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    return sched_setaffinity(0, sizeof set, &set) == 0;
}

enum fb_status fb_thread_interleave(void) {
    enum { INTERLEAVE = 3, MEMS_ALLOWED = 4, MOST_NODES = 1024 }; /* of linux/mempolicy.h */
    unsigned long nodes[MOST_NODES / (8 * sizeof(unsigned long))] = {0};
    if (syscall(SYS_get_mempolicy, NULL, nodes, MOST_NODES, NULL, MEMS_ALLOWED) == 0 &&
        syscall(SYS_set_mempolicy, INTERLEAVE, nodes, MOST_NODES) == 0)
        return FB_OK;
    return fb_fail(FB_UNSUPPORTED, "the system does not let this process choose nodes of memory");
}
#else
bool fb_thread_pin(int32_t cpu) {
    (void)cpu;
    return false;
}

enum fb_status fb_thread_interleave(void) {
    return fb_fail(FB_UNSUPPORTED, "nodes of memory can be chosen on Linux only");
}
#endif
