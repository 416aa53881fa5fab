/* select.c - kernel tables by instruction set, and the best set that works on this machine. */
#include "kernels/kernels.h"

#include "base/status.h"

#include <stdatomic.h>
#include <string.h>

const struct fb_kernels *fb_kernels_of(enum fb_isa isa) {
    switch (isa) {
#if defined(__x86_64__)
    case FB_ISA_AVX2:
        return &fb_kernels_avx2;
    case FB_ISA_AVX_VNNI:
        return &fb_kernels_avx_vnni;
    case FB_ISA_AVX512:
        return &fb_kernels_avx512;
    case FB_ISA_AVX512_VNNI:
        return &fb_kernels_avx512_vnni;
    case FB_ISA_AVX512_BF16:
        return &fb_kernels_avx512_bf16;
#ifdef FABULA_AMX
    case FB_ISA_AVX512_AMX:
        return &fb_kernels_avx512_amx;
#endif
#elif defined(__aarch64__)
    case FB_ISA_NEON:
        return &fb_kernels_neon;
    case FB_ISA_NEON_DOTPROD:
        return &fb_kernels_neon_dotprod;
    case FB_ISA_NEON_I8MM:
        return &fb_kernels_neon_i8mm;
#endif
    default:
        return &fb_kernels_reference;
    }
}

/* ---- Best set ---------------------------------------------------------------------------------------------------- */

/* Enough tokens for full tiles and a remainder in every table. */
enum { TOKENS = 40, PANELS = 2, COLUMNS = 2 * FB_SUPER_COLUMNS };

bool fb_kernels_agree(const struct fb_kernels *kernels) {
    /* One format of each code width and each kind of scales. */
    static const enum fb_dtype formats[] = {FB_Q8_0, FB_Q5_1, FB_Q4_K, FB_Q6_K, FB_Q2_K, FB_MXFP4};
    enum { BLOCKS = COLUMNS / FB_BLOCK_COLUMNS };
    float inputs[COLUMNS], wanted[TOKENS * PANELS * FB_LANES], got[TOKENS * PANELS * FB_LANES];
    struct fb_activation activations[TOKENS * BLOCKS];
    _Alignas(FB_LINE) char panels[PANELS * 16 * COLUMNS * 2]; /* no format takes more than 2 bytes per number */
    uint32_t state = 1;
    for (size_t i = 0; i < sizeof panels; i++) {
        state = state * 1664525u + 1013904223u;
        panels[i] = (char)(state >> 24 & 0x3B); /* small finite numbers also when read as f16 or f32 */
    }
    for (size_t t = 0; t < TOKENS; t++) {
        for (size_t i = 0; i < COLUMNS; i++) {
            state = state * 1664525u + 1013904223u;
            inputs[i] = (float)(int32_t)state * 0x1p-31f;
        }
        fb_kernels_reference.quantize(inputs, BLOCKS, activations + t * BLOCKS);
    }
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
        fb_kernels_reference.gemm_blocks(
            formats[f], panels, PANELS, COLUMNS, activations, BLOCKS, TOKENS, wanted, PANELS * FB_LANES);
        kernels->gemm_blocks(formats[f], panels, PANELS, COLUMNS, activations, BLOCKS, TOKENS, got, PANELS * FB_LANES);
        if (memcmp(got, wanted, sizeof got) != 0) return false;
    }
    return true;
}

/* Matrix instructions for bytes are recent and depend on the operating system to save their state, so they
 * are used only after a comparison with the reference on this machine. The result is cached; threads that
 * race compute the same. */
static bool passes_self_check(enum fb_isa isa) {
    enum { UNKNOWN, NO, YES };
    static atomic_int known = UNKNOWN; /* for the one such table that a CPU has */
    int verdict = atomic_load_explicit(&known, memory_order_relaxed);
    if (verdict == UNKNOWN) {
        verdict = fb_kernels_agree(fb_kernels_of(isa)) ? YES : NO;
        atomic_store_explicit(&known, verdict, memory_order_relaxed);
    }
    return verdict == YES;
}

enum fb_isa fb_isa_best(void) {
    static const enum fb_isa order[] = {FB_ISA_AVX512_AMX, FB_ISA_AVX512_BF16, FB_ISA_AVX512_VNNI, FB_ISA_AVX512,
        FB_ISA_AVX_VNNI, FB_ISA_AVX2, FB_ISA_NEON_I8MM, FB_ISA_NEON_DOTPROD, FB_ISA_NEON};
    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
        if (!fb_isa_available(order[i])) continue;
        const bool needs_check = order[i] == FB_ISA_AVX512_AMX || order[i] == FB_ISA_NEON_I8MM;
        if (!needs_check || passes_self_check(order[i])) return order[i];
    }
    return FB_ISA_REFERENCE;
}

enum fb_status fb_isa_resolve(enum fb_isa wanted, enum fb_isa *out) {
    FB_REQUIRE(wanted >= FB_ISA_AUTO && wanted <= FB_ISA_AVX512_AMX, "isa is %d, must be 0 .. %d", (int)wanted,
        (int)FB_ISA_AVX512_AMX);
    if (!fb_isa_available(wanted)) return fb_fail(FB_UNSUPPORTED, "this CPU lacks instruction set %d", (int)wanted);
    *out = wanted == FB_ISA_AUTO ? fb_isa_best() : wanted;
    return FB_OK;
}
