/*
 * plan.c - where buffers lie in the arena.
 *
 * A buffer is alive from the operator that first writes it to the one that last touches it. In the order of first
 * writes each gets the lowest place where it overlaps no buffer alive at the same time: first fit, which for a chain
 * of layers finds the handful of places that every layer reuses.
 */
#include "program/program.h"

static bool alive_together(const struct fb_buffer *a, const struct fb_buffer *b) {
    return a->first_write <= b->last_use && b->first_write <= a->last_use;
}

size_t fb_plan_buffers(struct fb_buffer *buffers, int32_t n_buffers, size_t rows) {
    size_t arena = 0;
    for (int32_t order = 0; order < n_buffers; order++) {
        /* The next buffer by first write; ties by number. */
        struct fb_buffer *buffer = NULL;
        int32_t rank = 0;
        for (int32_t i = 0; i < n_buffers; i++) {
            rank = 0;
            for (int32_t j = 0; j < n_buffers; j++)
                rank += buffers[j].first_write < buffers[i].first_write ||
                        (buffers[j].first_write == buffers[i].first_write && j < i);
            if (rank == order) {
                buffer = &buffers[i];
                break;
            }
        }
        if (!buffer || buffer->first_write < 0) continue; /* never used: no place */
        const size_t size = buffer->stride * rows;
        size_t place = 0;
        for (bool moved = true; moved;) {
            moved = false;
            for (int32_t i = 0; i < n_buffers; i++) {
                const struct fb_buffer *other = &buffers[i];
                if (other == buffer || !other->data || !alive_together(buffer, other)) continue;
                if (place < other->offset + other->stride * rows && other->offset < place + size) {
                    place = other->offset + other->stride * rows;
                    moved = true;
                }
            }
        }
        buffer->offset = place;
        buffer->data = (float *)1; /* placed; the caller turns offsets into addresses */
        if (place + size > arena) arena = place + size;
    }
    return arena;
}
