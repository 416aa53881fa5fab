/*
 * plan.c - assigns buffers to offsets in the arena.
 *
 * A buffer is alive from the operator that first writes it to the one that last uses it. In the order of
 * first writes each gets the lowest offset where it overlaps no buffer alive at the same time: first fit,
 * which for a chain of layers finds the few offsets that every layer reuses. Live buffers are sorted by
 * offset, so one walk over them finds the first gap; a program has few at a time, so planning costs little
 * more than sorting.
 */
#include "program/program.h"

#include "base/status.h"

#include <stdlib.h>
#include <string.h>

static int by_first_write(const void *a, const void *b) {
    const struct fb_buffer *x = *(struct fb_buffer *const *)a, *y = *(struct fb_buffer *const *)b;
    if (x->first_write != y->first_write) return x->first_write < y->first_write ? -1 : 1;
    return x < y ? -1 : x > y; /* ties by index */
}

/* Assigns an offset to a buffer; alive [n_alive] is sorted by offset. Returns the new number of
 * live buffers. */
static int32_t assign_offset(struct fb_buffer *buffer, struct fb_buffer **alive, int32_t n_alive, size_t rows) {
    const size_t size = buffer->stride * rows;
    int32_t n = 0;
    for (int32_t i = 0; i < n_alive; i++)
        if (alive[i]->last_use >= buffer->first_write) alive[n++] = alive[i];
    buffer->offset = 0;
    int32_t at = 0;
    while (at < n && buffer->offset + size > alive[at]->offset) {
        buffer->offset = alive[at]->offset + alive[at]->stride * rows;
        at++;
    }
    memmove(alive + at + 1, alive + at, (size_t)(n - at) * sizeof *alive);
    alive[at] = buffer;
    return n + 1;
}

enum fb_status fb_plan_buffers(struct fb_buffer *buffers, int32_t n_buffers, size_t rows, size_t *n_floats) {
    struct fb_buffer **order = calloc(2 * (size_t)n_buffers, sizeof *order), **alive = order + n_buffers;
    if (!order) return fb_fail(FB_OUT_OF_MEMORY, "no memory to plan %d buffers", n_buffers);
    int32_t n = 0, n_alive = 0;
    for (int32_t i = 0; i < n_buffers; i++)
        if (buffers[i].first_write >= 0) order[n++] = &buffers[i]; /* unused buffers get no offset */
    qsort(order, (size_t)n, sizeof *order, by_first_write);
    *n_floats = 0;
    for (int32_t i = 0; i < n; i++) {
        n_alive = assign_offset(order[i], alive, n_alive, rows);
        const size_t end = order[i]->offset + order[i]->stride * rows;
        if (end > *n_floats) *n_floats = end;
    }
    free(order);
    return FB_OK;
}
