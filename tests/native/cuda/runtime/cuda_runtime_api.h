/*
 * cuda_runtime_api.h - the few functions of the CUDA runtime that native/cuda calls, on the host's heap, for
 * tests without a GPU. Everything happens immediately, or when its graph is launched; allocated memory is
 * filled with 0xFF. There are four devices of 256 MiB; the second has 1 MiB. Only call number `fake_fails_at`
 * fails, with an error of its kind. While a thread records a stream, its calls that wait, allocate or free
 * fail and break the recording. While any thread records on a device, calls of all threads that wait for the
 * whole device or use its default stream fail and break every recording there.
 */
#ifndef FABULA_TESTS_CUDA_RUNTIME_API_H
#define FABULA_TESTS_CUDA_RUNTIME_API_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CUDART_VERSION 13000
enum { FAKE_DEVICES = 4 };

typedef enum {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorNotReady = 600,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorUnknown = 999
} cudaError_t;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaStreamNonBlocking = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
typedef struct fake_stream *cudaStream_t;
typedef struct fake_graph *cudaGraph_t;
typedef struct fake_launchable *cudaGraphExec_t;
extern const cudaStream_t cudaStreamPerThread; /* everything happens immediately, so one serves all */

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
};

extern long fake_fails_at;            /* counts down; -1: none */
extern size_t fake_bytes_from_device; /* copied to the host */
extern size_t fake_bytes_to_pageable; /* of those, to memory that is not pinned: such a copy waits for the stream */
extern long fake_n_held;              /* allocations, streams and graphs that were not freed */
extern int fake_n_processors;         /* of the GPU */
extern int fake_major;                /* its compute capability */
extern long fake_n_in_group;          /* allocations and releases by any thread while a group of exchanges was open */
extern void (*fake_while_recording)(void); /* called before a recording ends; NULL: nothing */

void fake_open_group(int is_open); /* called by the emulated NCCL if a test allows it */

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
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out);
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t launchable, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t launchable);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaGetLastError(void);
const char *cudaGetErrorString(cudaError_t error);

#ifdef __cplusplus
}
#endif
#endif
