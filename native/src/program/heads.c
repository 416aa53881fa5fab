/* heads.c - products with a matrix for each head, as a stage. See run.h. */
#include "program/run.h"

void fb_run_heads(struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker, size_t n_rows) {
    const struct fb_program *p = run->program;
    const struct fb_op *op = &p->ops[stage->first_op];
    const struct fb_buffer *in = &p->buffers[op->in], *out = &p->buffers[op->out];
    struct fb_head_linear product = {.kernels = p->kernels,
        .weight = op->weight,
        .x = in->data,
        .ldx = in->stride,
        .out = out->data,
        .ld_out = out->stride,
        .n_tokens = n_rows,
        .in_head = (size_t)(in->width / op->weight->n_experts),
        .scratch = p->head_inputs + (size_t)worker->thread * p->head_input_bytes};
    struct fb_items items = fb_worker_items(worker, 0, fb_head_linear_items(&product, worker->n_threads));
    for (int64_t i; (i = fb_next_item(&items)) >= 0;)
        fb_head_linear_item(&product, i);
}
