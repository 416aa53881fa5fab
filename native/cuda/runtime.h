/* runtime.h - calls of the CUDA runtime, checked: what went wrong becomes a status of this library and its text. */
#ifndef FABULA_CUDA_RUNTIME_H
#define FABULA_CUDA_RUNTIME_H

#include "base/status.h"

#include <cuda_runtime_api.h>

/* FB_OK, FB_OUT_OF_MEMORY, or FB_UNSUPPORTED for all else: no GPU, a driver too old, a GPU that failed. */
enum fb_status fb_cuda_check(int error, const char *what);

/* Memory of the GPU, freed by cudaFree; NULL for no bytes. *out stays as it is on failure. */
enum fb_status fb_cuda_take(size_t n_bytes, const char *what, void **out);

#endif
