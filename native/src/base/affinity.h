/* affinity.h - CPUs of threads, and nodes of memory, for machines with many of them. */
#ifndef FABULA_BASE_AFFINITY_H
#define FABULA_BASE_AFFINITY_H

#include <stdbool.h>
#include <stdint.h>

/* CPUs that have numbers here; the kernel's masks are as long on all common builds. */
enum { FB_MOST_CPUS = 1024 };

/* Binds the calling thread to a CPU; false if the system cannot or will not. */
bool fb_thread_pin(int32_t cpu);

#endif
