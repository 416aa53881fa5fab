/*
 * cuda_runtime_api.h - the few calls of the CUDA runtime that native/cuda makes, on the host's heap, for tests without a GPU. Everything
 * happens at once; what is allocated is filled with 0xFF. There are two devices, of 256 MiB and of 1 MiB. Call number
 * `fake_fails_at` and no other fails, with an error of its kind.
 */
#ifndef FABULA_TESTS_CUDA_RUNTIME_API_H
#define FABULA_TESTS_CUDA_RUNTIME_API_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CUDART_VERSION 13000
enum { FAKE_DEVICES = 2 };

typedef enum {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorUnknown = 999
} cudaError_t;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaStreamNonBlocking = 1 };
typedef struct fake_stream *cudaStream_t;

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
};

extern long fake_fails_at;    /* counts down; -1 for never */
extern long fake_n_held;      /* allocations and streams not given back */
extern int fake_n_processors; /* of the GPU */
extern int fake_major;        /* its compute capability */

cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *n);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device);
cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int device);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *n_bytes);
cudaError_t cudaMalloc(void **out, size_t n_bytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaMallocHost(void **out, size_t n_bytes);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaMemcpy(void *to, const void *from, size_t n_bytes, enum cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, enum cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemset(void *to, int value, size_t n_bytes);
cudaError_t cudaMemsetAsync(void *to, int value, size_t n_bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaGetLastError(void);
const char *cudaGetErrorString(cudaError_t error);

#ifdef __cplusplus
}
#endif
#endif
