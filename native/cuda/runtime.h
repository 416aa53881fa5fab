/* runtime.h - calls of the CUDA runtime, checked: what went wrong becomes a status of this library and its text. */
#ifndef FABULA_CUDA_RUNTIME_H
#define FABULA_CUDA_RUNTIME_H

#include "base/status.h"

#include <cuda_runtime_api.h>

/* FB_OK; FB_DEVICE_MEMORY; FB_DEVICE_FAILED for all else, such as a GPU that failed. */
enum fb_status fb_cuda_check(int error, const char *what);

/* Calls of this thread go to a GPU. */
enum fb_status fb_cuda_enter(int32_t index);

/* Whatever takes or gives back memory, a GPU's or the host's pinned one, stands between these two, for one thread at a time; so does the
 * launch of a group of exchanges (group.c). What takes or frees memory may wait for all that runs on a GPU while the driver lets nobody
 * else in. A group is launched on one GPU after the other, and what runs on the first waits for the last: in between, neither would
 * ever go on. Nobody who holds this lock takes another one, or this one again. */
void fb_cuda_lock_memory(void);
void fb_cuda_unlock_memory(void);

#endif
