/*
 * exchange.h - the few functions of NVIDIA's NCCL that move results between GPUs. The library is loaded when
 * a group is opened, so that nobody else needs it. Signatures and constants are those of its manual
 * (docs.nvidia.com/deeplearning/nccl); exchange.c compares them with nccl.h if the build has it.
 */
#ifndef FABULA_CUDA_EXCHANGE_H
#define FABULA_CUDA_EXCHANGE_H

#include "runtime.h"

enum { FB_NCCL_SUCCESS = 0, FB_NCCL_IN_PROGRESS = 7, FB_NCCL_FLOAT32 = 7 }; /* ncclResult_t, ncclDataType_t */

typedef struct ncclComm *fb_nccl_comm;

struct fb_nccl {
    int (*comm_init_all)(fb_nccl_comm *comms, int n, const int *devices);
    int (*comm_destroy)(fb_nccl_comm comm);
    int (*comm_abort)(fb_nccl_comm comm);
    int (*comm_get_async_error)(fb_nccl_comm comm, int *error);
    int (*group_start)(void);
    int (*group_end)(void);
    int (*all_gather)(const void *from, void *to, size_t count, int data_type, fb_nccl_comm comm, cudaStream_t stream);
    const char *(*get_error_string)(int error);
};

/* Loads the library, which stays loaded. FB_UNSUPPORTED, with the loader's message, if libnccl.so.2 is
 * missing or lacks a function. */
enum fb_status fb_nccl_load(struct fb_nccl *out);

#endif
