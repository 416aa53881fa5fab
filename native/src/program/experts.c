/* experts.c - stages of grouped products: routes, inputs by place, and the work items of ops/experts.h. */
#include "program/run.h"

#include "program/operators.h"

#include <string.h>

/* With at most FB_OWN_ROWS rows each thread chooses the experts and prepares the inputs for itself, in memory of its
 * own; more rows are divided among the threads, with a barrier behind it. A single row needs no sorting of its inputs:
 * no expert has two rows then. */

static size_t aligned(size_t n_bytes) {
    return (n_bytes + 63) / 64 * 64;
}

/* Bytes of a row of inputs, in the format that the weight takes. */
static size_t input_bytes(const struct fb_weight *weight) {
    const size_t n_cols = (size_t)weight->n_cols;
    if (fb_is_quantized(weight->dtype)) return n_cols / FB_BLOCK_COLUMNS * sizeof(struct fb_activation);
    return aligned(fb_takes_pairs(weight) ? (n_cols + 1) / 2 * 2 * sizeof(uint16_t) : n_cols * sizeof(float));
}

bool fb_lay_out_experts(const struct fb_program *p, struct fb_expert_layout *l) {
    const size_t rows = (size_t)p->shape.max_tokens;
    size_t n_chosen = 0, n_experts = 0, n_inputs = 0; /* the most of all operators */
    for (int32_t i = 0; i < p->n_ops; i++) {
        const struct fb_op *op = &p->ops[i];
        if (!fb_op_is(op, FB_ROUTED)) continue;
        const size_t chosen = (size_t)op->n_chosen, experts = (size_t)op->weight->n_experts;
        const size_t inputs = chosen * input_bytes(op->weight);
        n_chosen = chosen > n_chosen ? chosen : n_chosen;
        n_experts = experts > n_experts ? experts : n_experts;
        n_inputs = inputs > n_inputs ? inputs : n_inputs;
    }
    if (n_chosen == 0) return false;
    *l = (struct fb_expert_layout){.n_input_bytes = rows * n_inputs};
    const size_t sizes[] = {rows * n_chosen * sizeof(int32_t), rows * n_chosen * sizeof(int32_t),
        fb_most_groups(rows, n_experts) * sizeof(struct fb_group), FB_OWN_ROWS * 2 * n_chosen * sizeof(float),
        FB_OWN_ROWS * n_inputs, fb_expert_scratch(rows, n_chosen) * sizeof(float)};
    size_t *const offsets[] = {&l->pairs, &l->places, &l->groups, &l->chosen, &l->inputs, &l->scratch};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        *offsets[i] = l->n_bytes;
        l->n_bytes += aligned(sizes[i]);
    }
    return true;
}

static struct fb_routes routes_of(
    const struct fb_run *run, const struct fb_stage *stage, const struct fb_op *op, char *memory, size_t n_rows) {
    const struct fb_program *p = run->program;
    const struct fb_expert_layout *l = p->expert_layout;
    struct fb_routes routes = {.chosen = p->buffers[op->factors].data,
        .ld = p->buffers[op->factors].stride,
        .n_rows = n_rows,
        .n_chosen = (size_t)op->n_chosen,
        .n_experts = (size_t)op->weight->n_experts,
        .pairs = (int32_t *)(memory + l->pairs),
        .places = (int32_t *)(memory + l->places),
        .groups = (struct fb_group *)(memory + l->groups)};
    if (stage->router >= 0 && n_rows <= FB_OWN_ROWS) {
        const struct fb_op *router = &p->ops[stage->router];
        float *chosen = (float *)(memory + l->chosen);
        routes.chosen = chosen;
        routes.ld = 2 * routes.n_chosen;
        for (size_t row = 0; row < n_rows; row++)
            fb_route_row(p->kernels, router, fb_row_of(p, router->in, row), (size_t)p->buffers[router->in].width,
                chosen + row * routes.ld);
    }
    fb_sort_routes(&routes);
    return routes;
}

/* One input in the format that the weight takes. */
static void convert(const struct fb_kernels *kernels, const struct fb_weight *weight, const float *x, char *out) {
    const size_t n_cols = (size_t)weight->n_cols;
    if (fb_is_quantized(weight->dtype))
        kernels->quantize(x, n_cols / FB_BLOCK_COLUMNS, (struct fb_activation *)out);
    else if (fb_takes_pairs(weight))
        kernels->narrow_pairs(x, n_cols, (uint16_t *)out);
    else
        memcpy(out, x, n_cols * sizeof *x);
}

/* Puts the inputs of a row's experts where their products read them. */
static void prepare_row(const struct fb_run *run, const struct fb_op *op, const struct fb_experts *experts, size_t row,
    char *inputs, size_t n_bytes) {
    const struct fb_program *p = run->program;
    const struct fb_routes *routes = &experts->routes;
    const size_t n_cols = (size_t)op->weight->n_cols;
    const bool is_shared = p->buffers[op->in].width == op->weight->n_cols;
    const float *x = fb_row_of(p, op->in, row);
    const char *first = NULL;
    for (size_t rank = 0; rank < routes->n_chosen; rank++) {
        const size_t pair = row * routes->n_chosen + rank;
        char *out = inputs + (experts->by_pair ? pair : (size_t)routes->places[pair]) * n_bytes;
        if (is_shared && first) {
            memcpy(out, first, n_bytes);
            continue;
        }
        convert(p->kernels, op->weight, is_shared ? x : x + rank * n_cols, out);
        first = out;
        if (is_shared && experts->by_pair) return; /* all of them read this one */
    }
}

static void set_inputs(struct fb_linear *product, char *inputs, size_t n_bytes) {
    product->x = (const float *)inputs;
    product->pairs = (const uint16_t *)inputs;
    product->activations = (const struct fb_activation *)inputs;
    product->ldx = n_bytes / sizeof(float);
    product->ld_pairs = n_bytes / sizeof(uint16_t);
    product->ld_activations = n_bytes / sizeof(struct fb_activation);
}

static void prepare_inputs(struct fb_run *run, const struct fb_op *op, struct fb_experts *experts,
    const struct fb_worker *worker, char *memory) {
    struct fb_program *p = run->program;
    const size_t n_rows = experts->routes.n_rows, n_bytes = input_bytes(op->weight);
    const bool is_own = n_rows <= FB_OWN_ROWS;
    char *inputs = is_own ? memory + p->expert_layout->inputs : p->expert_inputs;
    experts->by_pair = n_rows == 1;
    const bool is_one = experts->by_pair && p->buffers[op->in].width == op->weight->n_cols;
    set_inputs(&experts->product, inputs, is_one ? 0 : n_bytes);
    if (is_own) {
        for (size_t row = 0; row < n_rows; row++)
            prepare_row(run, op, experts, row, inputs, n_bytes);
        return;
    }
    struct fb_items items = fb_worker_items(worker, 1, (int64_t)n_rows);
    for (int64_t row; (row = fb_next_item(&items)) >= 0;)
        prepare_row(run, op, experts, (size_t)row, inputs, n_bytes);
    fb_barrier_wait(&run->barrier, worker->thread, worker->n_threads);
}

void fb_run_experts(struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker, size_t n_rows) {
    const struct fb_program *p = run->program;
    const struct fb_op *op = &p->ops[stage->first_op];
    const struct fb_buffer *out = &p->buffers[op->out];
    char *memory = p->expert_memory + (size_t)worker->thread * p->expert_layout->n_bytes;
    const bool sums = op->flags & FB_EXPERTS_SUM;
    struct fb_experts experts = {.product = {.kernels = p->kernels,
                                     .weight = op->weight,
                                     .bias = op->vector,
                                     .n_tokens = n_rows,
                                     .out = out->data,
                                     .ld_out = out->stride,
                                     .width = (size_t)out->width / (sums ? 1 : (size_t)op->n_chosen),
                                     .is_gated = op->flags & FB_EXPERTS_GATED,
                                     .activation = op->activation,
                                     .numbers = {op->limit},
                                     .scale = op->scale},
        .routes = routes_of(run, stage, op, memory, n_rows),
        .sums = sums,
        .weighs = op->flags & FB_EXPERTS_WEIGH,
        .scratch = (float *)(memory + p->expert_layout->scratch)};
    if (op->residual >= 0) {
        experts.product.residual = p->buffers[op->residual].data;
        experts.product.ld_residual = p->buffers[op->residual].stride;
    }
    prepare_inputs(run, op, &experts, worker, memory);
    struct fb_items items = fb_worker_items(worker, 0, fb_expert_items(&experts, worker->n_threads));
    for (int64_t i; (i = fb_next_item(&items)) >= 0;)
        fb_expert_item(&experts, i);
}
