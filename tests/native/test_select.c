/*
 * test_select.c - the choice of kernels: the best set is available and gives the reference's bits; a table
 * that does not is rejected.
 */
#include "check.h"
#include "kernels/kernels.h"

#include <string.h>

/* Correct except for one output. */
static void gemm_blocks_off(enum fb_dtype dtype, const char *panels, size_t n_panels, size_t n_cols,
    const struct fb_activation *x, size_t ldx, size_t n_tokens, float *y, size_t ldy) {
    fb_reference_gemm_blocks(dtype, panels, n_panels, n_cols, x, ldx, n_tokens, y, ldy);
    if (dtype == FB_Q6_K) y[(n_tokens - 1) * ldy + 16 * n_panels - 1] += 1.0f;
}

int main(void) {
    CHECK(fb_kernels_agree(&fb_kernels_reference));
    struct fb_kernels wrong = fb_kernels_reference;
    wrong.gemm_blocks = gemm_blocks_off;
    CHECK(!fb_kernels_agree(&wrong));
    for (int isa = FB_ISA_REFERENCE; isa <= FB_ISA_AVX512_AMX; isa++)
        if (fb_isa_available((enum fb_isa)isa))
            CHECK_AT(fb_kernels_agree(fb_kernels_of((enum fb_isa)isa)), "isa %d", isa);
    const enum fb_isa best = fb_isa_best();
    CHECK(fb_isa_available(best) && fb_kernels_agree(fb_kernels_of(best)));
    enum fb_isa resolved;
    CHECK(fb_isa_resolve(FB_ISA_AUTO, &resolved) == FB_OK && resolved == best);
    CHECK(fb_isa_resolve((enum fb_isa)99, &resolved) == FB_INVALID_ARGUMENT);
    return check_result();
}
