/* heads.c - norms of attention heads. See heads.h. */
#include "ops/heads.h"

/* 1024 ones and zeros, as many as the widest head has numbers: norms without weight or bias. */
#define ONE_16 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1
#define ONE_256                                                                                                        \
    ONE_16, ONE_16, ONE_16, ONE_16, ONE_16, ONE_16, ONE_16, ONE_16, ONE_16, ONE_16, ONE_16, ONE_16, ONE_16, ONE_16,    \
        ONE_16, ONE_16
static const float ones[1024] = {ONE_256, ONE_256, ONE_256, ONE_256};
static const float zeros[1024];

void fb_norm_head(const struct fb_kernels *kernels, const struct fb_op *op, const float *vector, int32_t length,
    int32_t index, float *head, int32_t dim) {
    const bool is_biased = op->flags & FB_HEADS_BIASED;
    const int32_t n_weights = is_biased ? length / 2 : length;
    const float *weight = n_weights == dim ? vector : vector + (size_t)index * (size_t)dim;
    if (op->flags & FB_HEADS_LAYER_NORM)
        kernels->layer_norm(head, weight, is_biased ? weight + n_weights : zeros, (size_t)dim, op->eps, head);
    else
        kernels->rms_norm(head, weight, (size_t)dim, op->eps, head);
}

void fb_norm_heads(const struct fb_kernels *kernels, const struct fb_op *op, const float *vector, int32_t length,
    float *heads, int32_t n, int32_t dim) {
    if (op->flags & FB_HEADS_WHOLE) {
        kernels->rms_norm(heads, vector, (size_t)n * (size_t)dim, op->eps, heads);
        return;
    }
    for (int32_t i = 0; i < n; i++)
        fb_norm_head(kernels, op, vector, length, i, heads + (size_t)i * (size_t)dim, dim);
}

void fb_norm_value(const struct fb_kernels *kernels, const struct fb_op *op, float *head, int32_t dim) {
    kernels->rms_norm(head, ones, (size_t)dim, op->eps, head);
}

void fb_norm_latent(
    const struct fb_kernels *kernels, const struct fb_op *op, float *head, const struct fb_heads *geometry) {
    float *latent = head + geometry->k_dim - geometry->v_dim;
    kernels->rms_norm(latent, op->vector2, (size_t)geometry->v_dim, op->eps, latent);
}
