/* runtime.c - see runtime.h. */
#include "runtime.h"

enum fb_status fb_cuda_check(int error, const char *what) {
    if (error == cudaSuccess) return FB_OK;
    cudaGetLastError(); /* or the next call would report it again */
    return fb_fail(error == cudaErrorMemoryAllocation ? FB_OUT_OF_MEMORY : FB_UNSUPPORTED, "%s: CUDA error %d, %s",
        what, error, cudaGetErrorString((cudaError_t)error));
}

enum fb_status fb_cuda_take(size_t n_bytes, const char *what, void **out) {
    void *memory = NULL;
    if (n_bytes > 0) FB_TRY(fb_cuda_check(cudaMalloc(&memory, n_bytes), what));
    *out = memory;
    return FB_OK;
}
