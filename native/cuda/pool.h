/* pool.h - what a pool of pages on the GPU is made of. */
#ifndef FABULA_CUDA_POOL_H
#define FABULA_CUDA_POOL_H

#include "kv/pages.h"
#include "program.h"

struct fb_cuda_pool {
    struct fb_page_pool shape; /* its memory is the GPU's */
};

#endif
