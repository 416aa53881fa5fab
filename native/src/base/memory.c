/*
 * memory.c - aligned memory. See memory.h.
 *
 * Large blocks are mapped directly. A fresh mapping is zero, so the allocator does not touch it (the thread
 * that packs a weight touches it first). MADV_HUGEPAGE avoids what 4 KiB pages cost a stream of weights: TLB
 * misses, and a hardware prefetcher that stops at each page boundary. The matrices of a small model are
 * smaller than a huge page, so medium blocks share mappings, one after another; a mapping is unmapped when
 * its last block is released.
 */
#include "base/memory.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
enum { SHARES_MAPPINGS = 0 }; /* one mapping per block, so that ASan reports reads past its end */
#else
enum { SHARES_MAPPINGS = 1 };
#endif

enum { LINE = 64 };
static const size_t PAGE = 65536, HUGE_PAGE = (size_t)2 << 20;
static const size_t SHARED_FROM = 65536, SHARED_BYTES = (size_t)32 << 20;

static size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

static void *map(size_t size) {
    /* Maps one huge page more than needed and unmaps both ends, so that the block starts on a 2 MiB boundary.
     * The size is not rounded up to 2 MiB: a hundred matrices would waste a hundred megabytes. */
    char *raw = mmap(
        NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    char *memory = (char *)round_up((uintptr_t)raw, HUGE_PAGE);
    size_t before = (size_t)(memory - raw);
    if (before) munmap(raw, before);
    if (before < HUGE_PAGE) munmap(memory + size, HUGE_PAGE - before);
#ifdef MADV_HUGEPAGE
    madvise(memory, size, MADV_HUGEPAGE); /* a hint: refusal costs speed only */
#endif
    return memory;
}

/* ---- Shared mappings --------------------------------------------------------------------------------------------- */

struct shared {
    struct shared *next;
    char *memory; /* [SHARED_BYTES] */
    size_t used;
    int64_t n_blocks; /* not yet released */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct shared *all; /* new blocks come from the first; the others are full */

static void *allocate_shared(size_t n_bytes) {
    const size_t size = round_up(n_bytes, LINE);
    void *memory = NULL;
    pthread_mutex_lock(&lock);
    if (!all || all->used + size > SHARED_BYTES) {
        struct shared *fresh = calloc(1, sizeof *fresh);
        if (fresh) fresh->memory = map(SHARED_BYTES);
        if (!fresh || !fresh->memory) {
            free(fresh);
            goto done;
        }
        fresh->next = all;
        all = fresh;
    }
    memory = all->memory + all->used;
    all->used += size;
    all->n_blocks++;
done:
    pthread_mutex_unlock(&lock);
    return memory;
}

static void release_shared(const char *block) {
    pthread_mutex_lock(&lock);
    for (struct shared **at = &all; *at; at = &(*at)->next) {
        struct shared *mapping = *at;
        if (block < mapping->memory || block >= mapping->memory + SHARED_BYTES) continue;
        if (--mapping->n_blocks == 0) {
            *at = mapping->next;
            munmap(mapping->memory, SHARED_BYTES);
            free(mapping);
        }
        break;
    }
    pthread_mutex_unlock(&lock);
}

static bool is_shared(size_t n_bytes) {
    return SHARES_MAPPINGS && n_bytes >= SHARED_FROM && n_bytes < HUGE_PAGE;
}

/* ---- Blocks ------------------------------------------------------------------------------------------------------ */

void *fb_memory_allocate(size_t n_bytes) {
    if (n_bytes > SIZE_MAX / 2) return NULL;
    if (is_shared(n_bytes)) return allocate_shared(n_bytes);
    if (n_bytes >= HUGE_PAGE) return map(round_up(n_bytes, PAGE));
    size_t size = round_up(n_bytes ? n_bytes : 1, LINE);
    void *memory = aligned_alloc(LINE, size);
    if (memory) memset(memory, 0, size);
    return memory;
}

void fb_memory_release(void *memory, size_t n_bytes) {
    if (!memory) return;
    if (is_shared(n_bytes))
        release_shared(memory);
    else if (n_bytes >= HUGE_PAGE)
        munmap(memory, round_up(n_bytes, PAGE));
    else
        free(memory);
}

void fb_memory_discard(void *memory, size_t n_bytes) {
    const long unit = sysconf(_SC_PAGESIZE);
    if (unit <= 0) return;
    const uintptr_t at = (uintptr_t)memory, end = (at + n_bytes) / (size_t)unit * (size_t)unit;
    const uintptr_t first = round_up(at, (size_t)unit);
    if (first >= end) return;
    /* A hint: if it is refused, the memory stays in use and keeps its contents. */
    madvise((char *)memory + (first - at), end - first, MADV_DONTNEED);
}
