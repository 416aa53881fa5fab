/* cpu.c - instruction sets, asked of the compiler's CPUID helper (which also checks that the system saves the
 * registers). */
#include "base/cpu.h"

#include "base/status.h"

bool fb_isa_available(enum fb_isa isa) {
    switch (isa) {
    case FB_ISA_AUTO:
    case FB_ISA_REFERENCE:
        return true;
#if defined(__x86_64__)
    case FB_ISA_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case FB_ISA_AVX_VNNI:
        return fb_isa_available(FB_ISA_AVX2) && __builtin_cpu_supports("avxvnni");
    case FB_ISA_AVX512:
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case FB_ISA_AVX512_VNNI:
        return fb_isa_available(FB_ISA_AVX512) && __builtin_cpu_supports("avx512vnni");
    case FB_ISA_AVX512_BF16:
        return fb_isa_available(FB_ISA_AVX512_VNNI) && __builtin_cpu_supports("avx512bf16");
#endif
    default:
        return false;
    }
}

enum fb_isa fb_isa_best(void) {
    if (fb_isa_available(FB_ISA_AVX512_BF16)) return FB_ISA_AVX512_BF16;
    if (fb_isa_available(FB_ISA_AVX512_VNNI)) return FB_ISA_AVX512_VNNI;
    if (fb_isa_available(FB_ISA_AVX512)) return FB_ISA_AVX512;
    if (fb_isa_available(FB_ISA_AVX_VNNI)) return FB_ISA_AVX_VNNI;
    if (fb_isa_available(FB_ISA_AVX2)) return FB_ISA_AVX2;
    return FB_ISA_REFERENCE;
}

enum fb_status fb_isa_resolve(enum fb_isa wanted, enum fb_isa *out) {
    FB_REQUIRE(wanted >= FB_ISA_AUTO && wanted <= FB_ISA_AVX512_BF16, "isa is %d, must be 0 .. %d", (int)wanted,
        (int)FB_ISA_AVX512_BF16);
    if (!fb_isa_available(wanted)) return fb_fail(FB_UNSUPPORTED, "this CPU lacks instruction set %d", (int)wanted);
    *out = wanted == FB_ISA_AUTO ? fb_isa_best() : wanted;
    return FB_OK;
}
