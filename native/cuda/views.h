/* views.h - weights and page pools, whose headers C++ cannot include, in the form that kernels take. Pointers
 * are the host's. */
#ifndef FABULA_CUDA_VIEWS_H
#define FABULA_CUDA_VIEWS_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

void fb_cuda_weight_view(const fb_weight *weight, struct fb_cuda_weight *out);
void fb_cuda_pages_view(const fb_page_pool *pool, struct fb_cuda_pages *out);

#ifdef __cplusplus
}
#endif
#endif
