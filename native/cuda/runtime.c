/* runtime.c - see runtime.h. */
#include "runtime.h"

enum fb_status fb_cuda_check(int error, const char *what) {
    if (error == cudaSuccess) return FB_OK;
    cudaGetLastError(); /* or the next call would report it again */
    return fb_fail(error == cudaErrorMemoryAllocation ? FB_DEVICE_MEMORY : FB_DEVICE_FAILED, "%s: CUDA error %d, %s",
        what, error, cudaGetErrorString((cudaError_t)error));
}

enum fb_status fb_cuda_enter(int32_t index) {
    return fb_cuda_check(cudaSetDevice(index), "choosing a GPU");
}
