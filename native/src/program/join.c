/* join.c - joins the programs of a group's members into one. See program.h. */
#include "base/memory.h"
#include "base/status.h"
#include "kv/split.h"
#include "ops/sample.h"
#include "program/operators.h"

#include <stdlib.h>
#include <string.h>

/* Whether a part has the operators of the first one. */
static enum fb_status check_alike(const fb_program *first, const fb_program *part, int32_t i) {
    const struct fb_program_shape *a = &first->shape, *b = &part->shape;
    FB_REQUIRE(a->n_layers == b->n_layers && memcmp(a->heads, b->heads, sizeof *a->heads) == 0 &&
                   a->vocab_size == b->vocab_size && a->max_tokens == b->max_tokens && first->n_ops == part->n_ops,
        "part %d has a different shape than part 0", i);
    for (int32_t o = 0; o < part->n_ops; o++) {
        const struct fb_op *x = &first->ops[o], *y = &part->ops[o];
        FB_REQUIRE(x->kind == y->kind, "part %d has a different operator %d than part 0", i, o);
        FB_REQUIRE(!fb_op_is(x, FB_SPANS_DEVICES) || first->buffers[x->in].width == part->buffers[y->in].width,
            "part %d sums %d numbers in operator %d, part 0 %d", i, part->buffers[y->in].width, o,
            first->buffers[x->in].width);
    }
    return FB_OK;
}

static enum fb_status check_part(
    const fb_device *group, fb_program *const *parts, int32_t i, int32_t n_kv_heads, int32_t n_results) {
    const fb_program *part = parts[i];
    const int32_t n_members = group->n_members;
    FB_REQUIRE(part, "part %d is null", i);
    FB_REQUIRE(part->device == group->members[i], "part %d is not on member %d of the group", i, i);
    int32_t first, n_heads;
    FB_TRY(fb_split_heads(n_kv_heads, n_members, i, &first, &n_heads));
    FB_REQUIRE(part->shape.heads[0].n_kv_heads == n_heads, "part %d has %d KV heads, its share of %d is %d", i,
        part->shape.heads[0].n_kv_heads, n_kv_heads, n_heads);
    const int32_t share = (int32_t)(((int64_t)n_results + n_members - 1) / n_members);
    FB_REQUIRE(part->n_results == share, "part %d ends with %d rows, its share of %d is %d", i, part->n_results,
        n_results, share);
    return check_alike(parts[0], part, i);
}

enum fb_status fb_program_join(fb_device *group, fb_program *const *parts, int32_t n_parts, int32_t n_kv_heads,
    int32_t n_results, fb_program **out) {
    FB_REQUIRE(group && parts && out, "group, parts or out is null");
    FB_REQUIRE(
        n_parts >= 2 && n_parts == group->n_members, "%d parts for a group of %d devices", n_parts, group->n_members);
    FB_REQUIRE(
        n_kv_heads >= 1 && n_results >= 1, "n_kv_heads is %d, n_results %d, must be 1 or more", n_kv_heads, n_results);
    for (int32_t i = 0; i < n_parts; i++)
        FB_TRY(check_part(group, parts, i, n_kv_heads, n_results));
    struct fb_program *p = calloc(1, sizeof *p);
    if (!p) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program");
    p->shape = parts[0]->shape;
    p->kv_layers = calloc((size_t)p->shape.n_layers, sizeof *p->kv_layers);
    if (!p->kv_layers) {
        free(p);
        return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program");
    }
    for (int32_t i = 0; i < p->shape.n_layers; i++) {
        p->kv_layers[i] = parts[0]->kv_layers[i];
        if (p->kv_layers[i].n_kv_heads) p->kv_layers[i].n_kv_heads = n_kv_heads;
    }
    p->n_threads = parts[0]->n_threads;
    p->n_results = n_results;
    p->device = group;
    fb_device_retain(group);
    for (int32_t i = 0; i < n_parts; i++)
        p->parts[i] = parts[i];
    const enum fb_status status = fb_allocate_sample_work(p);
    if (status != FB_OK) {
        fb_program_free(p);
        return status;
    }
    *out = p;
    return FB_OK;
}
