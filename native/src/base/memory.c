/*
 * memory.c - aligned memory. See memory.h.
 *
 * Large blocks come straight from mmap: a fresh mapping is zero, so it need not be touched (the thread that packs a
 * weight touches it first), and MADV_HUGEPAGE saves the TLB misses that 4 KiB pages cost a stream of weights.
 */
#include "base/memory.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { LINE = 64 };
static const size_t PAGE = 65536, HUGE_PAGE = (size_t)2 << 20;

static size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

void *fb_memory_take(size_t n_bytes) {
    if (n_bytes > SIZE_MAX / 2) return NULL;
    if (n_bytes < HUGE_PAGE) {
        size_t size = round_up(n_bytes ? n_bytes : 1, LINE);
        void *memory = aligned_alloc(LINE, size);
        if (memory) memset(memory, 0, size);
        return memory;
    }
    /* Map one huge page more than needed, then cut the ends off so that the rest starts on a 2 MiB border. The end is
     * not rounded up to one: a hundred matrices would waste a hundred megabytes. */
    size_t size = round_up(n_bytes, PAGE);
    char *raw = mmap(
        NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    char *memory = (char *)round_up((uintptr_t)raw, HUGE_PAGE);
    size_t before = (size_t)(memory - raw);
    if (before) munmap(raw, before);
    if (before < HUGE_PAGE) munmap(memory + size, HUGE_PAGE - before);
    madvise(memory, size, MADV_HUGEPAGE); /* a wish: refusal costs speed only */
    return memory;
}

void fb_memory_release(void *memory, size_t n_bytes) {
    if (!memory) return;
    if (n_bytes < HUGE_PAGE)
        free(memory);
    else
        munmap(memory, round_up(n_bytes, PAGE));
}
