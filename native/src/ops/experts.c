/* experts.c - the grouped product of mixtures of experts. See experts.h. */
#include "ops/experts.h"

#include <string.h>

enum {
    MAX_PANELS = 4, /* panels per work item; even, for gate and up */
    FEW_ROWS = 4,   /* of the step: up to so many memory is the limit */
    TILE_ROWS = 96, /* rows multiplied at once, as TOKEN_BLOCK of linear.c */
    ITEMS_PER_THREAD = 8
};

static size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

size_t fb_expert_scratch(size_t n_rows, size_t n_chosen) {
    const size_t rows = n_rows < FB_ROUTE_ROWS ? n_rows : FB_ROUTE_ROWS;
    return rows * n_chosen * MAX_PANELS * FB_LANES;
}

static int64_t count_items(struct fb_experts *e, size_t item_panels) {
    struct fb_routes *routes = &e->routes;
    const size_t pieces = ceil_div((size_t)e->product.weight->n_panels, item_panels);
    if (e->sums) return (int64_t)(pieces * fb_route_blocks(routes->n_rows));
    int64_t n_items = 0;
    for (size_t g = 0; g < routes->n_groups; g++) {
        n_items += (int64_t)(pieces * ceil_div((size_t)routes->groups[g].n_rows, TILE_ROWS));
        routes->groups[g].end_item = n_items;
    }
    return n_items;
}

int64_t fb_expert_items(struct fb_experts *e, int n_threads) {
    size_t item_panels = e->routes.n_rows <= FEW_ROWS ? 2 : MAX_PANELS;
    while (item_panels > 2 && count_items(e, item_panels) < (int64_t)n_threads * ITEMS_PER_THREAD)
        item_panels /= 2;
    e->product.item_panels = item_panels;
    return count_items(e, item_panels);
}

/* Rows place .. place + n_rows - 1 times some panels of an expert. */
static void multiply(const struct fb_experts *e, int32_t expert, size_t panel, size_t n_panels, size_t place,
    size_t n_rows, float *tile, size_t ld) {
    const size_t row = e->by_pair ? (size_t)e->routes.pairs[place] : place;
    const size_t first = (size_t)expert * (size_t)e->product.weight->expert_panels;
    fb_linear_multiply(&e->product, first + panel, n_panels, row, n_rows, NULL, tile, ld);
}

/* Biases of an expert from a panel on, NULL for none; *n: how many of `ld` rows there are. */
static const float *bias_at(const struct fb_experts *e, int32_t expert, size_t panel, size_t ld, size_t *n) {
    const size_t n_rows = (size_t)e->product.weight->n_rows, rest = n_rows - panel * FB_LANES;
    *n = rest < ld ? rest : ld;
    return e->product.bias ? e->product.bias + (size_t)expert * n_rows + panel * FB_LANES : NULL;
}

static size_t panels_from(const struct fb_experts *e, size_t panel) {
    const size_t rest = (size_t)e->product.weight->n_panels - panel;
    return rest < e->product.item_panels ? rest : e->product.item_panels;
}

static const struct fb_group *group_of(const struct fb_routes *routes, int64_t index) {
    size_t low = 0, high = routes->n_groups - 1;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (index < routes->groups[middle].end_item)
            high = middle;
        else
            low = middle + 1;
    }
    return &routes->groups[low];
}

static void keep_item(const struct fb_experts *e, int64_t index) {
    const struct fb_linear *product = &e->product;
    const struct fb_routes *routes = &e->routes;
    const struct fb_group *group = group_of(routes, index);
    const size_t item = (size_t)(index - (group == routes->groups ? 0 : group[-1].end_item));
    const size_t tiles = ceil_div((size_t)group->n_rows, TILE_ROWS);
    const size_t panel = item / tiles * product->item_panels, first = item % tiles * TILE_ROWS;
    const size_t n_panels = panels_from(e, panel), ld = n_panels * FB_LANES;
    const size_t rest = (size_t)group->n_rows - first, n_rows = rest < TILE_ROWS ? rest : TILE_ROWS;
    const size_t place = (size_t)group->first + first;
    const size_t results = product->is_gated ? ld / 2 : ld;
    const size_t column = product->is_gated ? panel / 2 * FB_LANES : panel * FB_LANES;
    if (column >= product->width) return;
    const size_t count = product->width - column < results ? product->width - column : results;

    float tile[TILE_ROWS * MAX_PANELS * FB_LANES];
    multiply(e, group->expert, panel, n_panels, place, n_rows, tile, ld);
    size_t n_biased;
    const float *bias = bias_at(e, group->expert, panel, ld, &n_biased);
    for (size_t i = 0; i < n_rows; i++) {
        const size_t pair = (size_t)routes->pairs[place + i];
        const size_t row = pair / routes->n_chosen, rank = pair % routes->n_chosen;
        float *result = tile + i * ld;
        if (e->weighs) product->kernels->scale(result, ld, fb_route_weight(routes, row, rank));
        if (bias) product->kernels->add(result, bias, n_biased);
        for (size_t p = 0; product->is_gated && p + 1 < n_panels; p += 2)
            fb_linear_gate(product, result + p * FB_LANES, result + p / 2 * FB_LANES);
        memcpy(product->out + row * product->ld_out + rank * product->width + column, result, count * sizeof *result);
    }
}

static void sum_item(const struct fb_experts *e, int64_t index) {
    const struct fb_linear *product = &e->product;
    const struct fb_routes *routes = &e->routes;
    const size_t blocks = fb_route_blocks(routes->n_rows), n_chosen = routes->n_chosen;
    const size_t panel = (size_t)index / blocks * product->item_panels;
    const size_t first_row = (size_t)index % blocks * FB_ROUTE_ROWS, first_place = first_row * n_chosen;
    const size_t rest = routes->n_rows - first_row, n_rows = rest < FB_ROUTE_ROWS ? rest : FB_ROUTE_ROWS;
    const size_t n_panels = panels_from(e, panel), ld = n_panels * FB_LANES, column = panel * FB_LANES;
    const size_t count = product->width - column < ld ? product->width - column : ld;

    for (size_t g = 0; g < routes->n_groups; g++) {
        const struct fb_group *group = &routes->groups[g];
        const size_t place = (size_t)group->first, n = (size_t)group->n_rows;
        if (place < first_place || place >= first_place + n_rows * n_chosen) continue;
        size_t n_biased;
        const float *bias = bias_at(e, group->expert, panel, ld, &n_biased);
        for (size_t i = 0; i < n; i += TILE_ROWS)
            multiply(e, group->expert, panel, n_panels, place + i, n - i < TILE_ROWS ? n - i : TILE_ROWS,
                e->scratch + (place + i - first_place) * ld, ld);
        for (size_t i = 0; bias && i < n; i++)
            product->kernels->add(e->scratch + (place + i - first_place) * ld, bias, n_biased);
    }
    for (size_t row = first_row; row < first_row + n_rows; row++) {
        float sum[MAX_PANELS * FB_LANES] = {0};
        for (size_t rank = 0; rank < n_chosen; rank++) {
            const size_t place = (size_t)routes->places[row * n_chosen + rank] - first_place;
            const float weight = e->weighs ? 1.0f : fb_route_weight(routes, row, rank);
            product->kernels->merge(sum, 1.0f, e->scratch + place * ld, weight, count);
        }
        if (product->scale != 1.0f) product->kernels->scale(sum, count, product->scale);
        if (product->residual)
            product->kernels->add(sum, product->residual + row * product->ld_residual + column, count);
        memcpy(product->out + row * product->ld_out + column, sum, count * sizeof *sum);
    }
}

void fb_expert_item(const struct fb_experts *e, int64_t index) {
    if (e->sums)
        sum_item(e, index);
    else
        keep_item(e, index);
}
