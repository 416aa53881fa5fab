/*
 * test_sharing.c - which sequences of a batch share key blocks. test_attention.py checks that attention over
 * them gives the same bits.
 */
#include "check.h"
#include "ops/sharing.h"

enum { PAGES = 32, BLOCK = FB_KEY_BLOCK / FB_PAGE_POSITIONS };

static int32_t pages[8][PAGES];

/* A sequence with the first `common` pages of sequence `of`, then others. */
static struct fb_sequence sequence(int s, int of, int common, int32_t n_past) {
    for (int i = 0; i < PAGES; i++)
        pages[s][i] = i < common ? pages[of][i] : 1000 * (s + 1) + i;
    return (struct fb_sequence){.pages = pages[s], .n_pages = PAGES, .n_past = n_past, .n_tokens = 1};
}

static bool is(struct fb_sharing found, int32_t leader, int32_t n_blocks) {
    return found.leader == leader && found.n_blocks == n_blocks;
}

int main(void) {
    struct fb_sharing out[8];
    struct fb_sequence batch[8] = {sequence(0, 0, 0, 1000), sequence(1, 0, 2 * BLOCK + 3, 900), sequence(2, 2, 0, 1000),
        sequence(3, 0, 3 * BLOCK, 770), sequence(4, 2, BLOCK, 300), sequence(5, 0, BLOCK, 255),
        sequence(6, 1, 3 * BLOCK, 800), sequence(7, 0, 3 * BLOCK, 1000)};
    CHECK(fb_find_sharing(batch, 8, 16, out));
    CHECK(is(out[0], 0, 0) && is(out[1], 0, 2) && is(out[2], 2, 0) && is(out[3], 0, 3) && is(out[4], 2, 1));
    CHECK(is(out[5], 5, 0)); /* its past does not cover the first block */
    CHECK(is(out[6], 0, 2)); /* sequence 1, with which it shares three blocks, is not a leader */
    CHECK(is(out[7], 0, 3));

    CHECK(fb_find_sharing(batch, 8, 2, out)); /* at most two together */
    CHECK(is(out[1], 0, 2) && is(out[3], 3, 0) && is(out[4], 2, 1) && is(out[6], 3, 2) && is(out[7], 7, 0));

    for (int s = 0; s < 8; s++)
        batch[s].window = 100, batch[s].n_sinks = 4;
    CHECK(!fb_find_sharing(batch, 8, 16, out)); /* with a sliding window not all positions are visible */
    for (int s = 0; s < 8; s++)
        batch[s].window = 0, batch[s].n_sinks = 0, batch[s].n_tokens = 2;
    CHECK(!fb_find_sharing(batch, 8, 16, out));
    CHECK(!fb_find_sharing(batch, 0, 16, out));
    return check_result();
}
