/*
 * test_plan.c - the offsets of a program's buffers: no two that are alive together overlap, each is as low as
 * the earlier ones allow, and a program of thousands of buffers is planned quickly.
 */
#include "check.h"
#include "fabula.h"
#include "program/program.h"

#include <stdlib.h>

enum { MOST = 4096, ROWS = 3 };

static uint32_t state = 7;

static int32_t below(int32_t n) {
    state = state * 1664525u + 1013904223u;
    return (int32_t)(state >> 8) % n;
}

static bool alive_together(const struct fb_buffer *a, const struct fb_buffer *b) {
    return a->first_write <= b->last_use && b->first_write <= a->last_use;
}

static bool overlap(const struct fb_buffer *a, size_t offset, const struct fb_buffer *b) {
    return offset < b->offset + b->stride * ROWS && b->offset < offset + a->stride * ROWS;
}

/* Whether `a` was assigned before `b`: by first write, then by index. */
static bool comes_before(const struct fb_buffer *a, const struct fb_buffer *b) {
    return a->first_write < b->first_write || (a->first_write == b->first_write && a < b);
}

static void check_plan(const struct fb_buffer *buffers, int32_t n, size_t n_floats) {
    size_t end = 0;
    for (int32_t i = 0; i < n; i++) {
        const struct fb_buffer *a = &buffers[i];
        if (a->first_write < 0) continue;
        if (a->offset + a->stride * ROWS > end) end = a->offset + a->stride * ROWS;
        bool is_lowest = a->offset == 0;
        for (int32_t j = 0; j < n; j++) {
            const struct fb_buffer *b = &buffers[j];
            if (i == j || b->first_write < 0 || !alive_together(a, b)) continue;
            CHECK_AT(!overlap(a, a->offset, b), "buffers %d and %d", i, j);
            /* One line lower it would overlap an earlier buffer. */
            is_lowest = is_lowest || (comes_before(b, a) && b->offset + b->stride * ROWS == a->offset);
        }
        CHECK_AT(is_lowest, "buffer %d at %zu", i, a->offset);
    }
    CHECK_AT(end == n_floats, "%zu floats, %zu used", n_floats, end);
}

int main(void) {
    static struct fb_buffer buffers[MOST];
    for (int round = 0; round < 300; round++) {
        const int32_t n = 1 + below(40), n_ops = 1 + below(60);
        for (int32_t i = 0; i < n; i++) {
            const int32_t first = below(n_ops);
            buffers[i] = (struct fb_buffer){.stride = 16 * (size_t)(1 + below(8)),
                .first_write = below(8) ? first : -1,
                .last_use = first + below(12)};
        }
        size_t n_floats = 0;
        CHECK(fb_plan_buffers(buffers, n, ROWS, &n_floats) == FB_OK);
        check_plan(buffers, n, n_floats);
    }
    /* A chain: each buffer is read by the next operator only, so two offsets are enough. */
    for (int32_t i = 0; i < MOST; i++)
        buffers[i] = (struct fb_buffer){.stride = 64, .first_write = MOST - i, .last_use = MOST - i + 1};
    size_t n_floats = 0;
    CHECK(fb_plan_buffers(buffers, MOST, ROWS, &n_floats) == FB_OK);
    CHECK_AT(n_floats == 2 * 64 * (size_t)ROWS, "%zu floats", n_floats);
    return check_result();
}
