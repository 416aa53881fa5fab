/* runtime.h - checked calls of the CUDA runtime: errors become a status and message of this library. */
#ifndef FABULA_CUDA_RUNTIME_H
#define FABULA_CUDA_RUNTIME_H

#include "base/status.h"

#include <cuda_runtime_api.h>

/* FB_OK; FB_DEVICE_MEMORY if memory ran out; FB_DEVICE_FAILED for any other error. */
enum fb_status fb_cuda_check(int error, const char *what);

/* Makes a GPU current for this thread. */
enum fb_status fb_cuda_enter(int32_t index);

/* A lock around everything that allocates or frees device memory or pinned host memory, and around the launch
 * of a group of exchanges (group.c). Allocating or freeing may wait for everything that runs on a GPU, while
 * the driver blocks all other calls. A group is launched on one GPU after another, and the first one's work
 * waits for the last: an allocation in between would deadlock. Not recursive; holders take no other lock. */
void fb_cuda_lock_memory(void);
void fb_cuda_unlock_memory(void);

#endif
