/* views.c - weights and page pools in the form that kernels take. See views.h. */
#include "views.h"

#include "kv/pages.h"
#include "quant/weight.h"

void fb_cuda_weight_view(const fb_weight *weight, struct fb_cuda_weight *out) {
    *out = (struct fb_cuda_weight){.dtype = weight->dtype,
        .n_rows = weight->n_rows,
        .n_cols = weight->n_cols,
        .panel_bytes = weight->panel_bytes,
        .panels = weight->panels};
}

static struct fb_cuda_part part_view(const struct fb_kv_part *part) {
    return (struct fb_cuda_part){part->dtype, (int64_t)part->elements, (int64_t)part->bytes};
}

void fb_cuda_pages_view(const fb_page_pool *pool, struct fb_cuda_pages *out) {
    const struct fb_kv_layout *layer = &pool->layers[0]; /* all are alike */
    *out = (struct fb_cuda_pages){.k = part_view(&layer->k),
        .v = part_view(&layer->v),
        .n_kv_heads = layer->n_kv_heads,
        .head_dim = layer->k_dim,
        .page_bytes = (int64_t)pool->page_bytes,
        .memory = pool->memory};
}
