/* runtime.c - checked calls of the CUDA runtime. See runtime.h. */
#include "runtime.h"

#include <pthread.h>

static pthread_mutex_t memory = PTHREAD_MUTEX_INITIALIZER;

enum fb_status fb_cuda_check(int error, const char *what) {
    if (error == cudaSuccess) return FB_OK;
    cudaGetLastError(); /* or the next call would report it again */
    return fb_fail(error == cudaErrorMemoryAllocation ? FB_DEVICE_MEMORY : FB_DEVICE_FAILED, "%s: CUDA error %d, %s",
        what, error, cudaGetErrorString((cudaError_t)error));
}

enum fb_status fb_cuda_enter(int32_t index) {
    return fb_cuda_check(cudaSetDevice(index), "choosing a GPU");
}

void fb_cuda_lock_memory(void) {
    pthread_mutex_lock(&memory);
}

void fb_cuda_unlock_memory(void) {
    pthread_mutex_unlock(&memory);
}
