/* sharing.c - finds sequences that share key blocks. See sharing.h. */
#include "ops/sharing.h"

enum { BLOCK_PAGES = FB_KEY_BLOCK / FB_PAGE_POSITIONS };

/* Key blocks entirely before this step's token; the last block may be written in this step. */
static int32_t full_blocks(const struct fb_sequence *s) {
    return s->n_tokens == 1 && s->window == 0 ? s->n_past / FB_KEY_BLOCK : 0;
}

static int32_t common_blocks(const struct fb_sequence *a, const struct fb_sequence *b) {
    const int32_t most = full_blocks(a) < full_blocks(b) ? full_blocks(a) : full_blocks(b);
    for (int32_t i = 0; i < most * BLOCK_PAGES; i++)
        if (a->pages[i] != b->pages[i]) return i / BLOCK_PAGES;
    return most;
}

bool fb_find_sharing(
    const struct fb_sequence *sequences, int32_t n_sequences, int32_t most_members, struct fb_sharing *out) {
    bool any = false;
    for (int32_t s = 0; s < n_sequences; s++) {
        out[s] = (struct fb_sharing){s, 0};
        if (full_blocks(&sequences[s]) == 0) continue;
        for (int32_t leader = 0; leader < s; leader++) {
            if (out[leader].leader != leader) continue;
            const int32_t n_blocks = common_blocks(&sequences[leader], &sequences[s]);
            if (n_blocks <= out[s].n_blocks) continue;
            int32_t n_members = 1;
            for (int32_t other = leader + 1; other < s; other++)
                n_members += out[other].leader == leader;
            if (n_members >= most_members) continue;
            out[s] = (struct fb_sharing){leader, n_blocks};
            any = true;
        }
    }
    return any;
}
