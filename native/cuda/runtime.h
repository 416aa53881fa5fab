/* runtime.h - calls of the CUDA runtime, checked: what went wrong becomes a status of this library and its text. */
#ifndef FABULA_CUDA_RUNTIME_H
#define FABULA_CUDA_RUNTIME_H

#include "base/status.h"

#include <cuda_runtime_api.h>

/* FB_OK; FB_DEVICE_MEMORY; FB_DEVICE_FAILED for all else, such as a GPU that failed. */
enum fb_status fb_cuda_check(int error, const char *what);

/* Calls of this thread go to a GPU. */
enum fb_status fb_cuda_enter(int32_t index);

#endif
