/* cpu.c - which instruction sets the CPU, its operating system and this build support together.
 *
 * x86-64: the compiler's CPUID helper, which also checks that the system saves the registers. AArch64: the
 * operating system's feature flags. AMX: CPUID, and permission from Linux. */
#include "fabula.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13) /* absent from kernel headers before 5.10 */
#endif

static bool has_dotprod(void) {
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}

static bool has_i8mm(void) {
    return (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
}
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static bool has_feature(const char *name) {
    int value = 0;
    size_t n_bytes = sizeof value;
    return sysctlbyname(name, &value, &n_bytes, NULL, 0) == 0 && value != 0;
}

static bool has_dotprod(void) {
    return has_feature("hw.optional.arm.FEAT_DotProd");
}

static bool has_i8mm(void) {
    return has_feature("hw.optional.arm.FEAT_I8MM");
}
#elif defined(__aarch64__)
static bool has_dotprod(void) {
    return false;
}

static bool has_i8mm(void) {
    return false;
}
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(FABULA_AMX)
#include <cpuid.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Requests permission to use AMX tiles. Tile data is 8 KiB per thread, and Linux (5.16 and later) saves it
 * only for processes that have requested it; older kernels never do. The request fails if a thread's signal
 * stack is too small to hold the tiles. */
static bool request_amx(void) {
    enum {
        REQUEST_PERMISSION = 0x1023,       /* ARCH_REQ_XCOMP_PERM of asm/prctl.h */
        TILE_DATA = 18,                    /* XSAVE component for which permission is requested */
        SAVES_TILES = 3 << 17,             /* in XCR0: tile configuration and tile data */
        TILE_AND_INT8 = 1 << 24 | 1 << 25, /* CPUID 7, EDX */
        OSXSAVE = 1 << 27                  /* CPUID 1, ECX: XGETBV may be executed */
    };
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILE_AND_INT8) != TILE_AND_INT8) return false;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & SAVES_TILES) == SAVES_TILES && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* Cached: CPUID takes microseconds in a virtual machine, and every sampled token looks up the best
 * instruction set. */
static bool has_amx(void) {
    enum { UNKNOWN, NO, YES };
    static atomic_int known = UNKNOWN;
    int has = atomic_load_explicit(&known, memory_order_relaxed);
    if (has == UNKNOWN) {
        has = request_amx() ? YES : NO;
        atomic_store_explicit(&known, has, memory_order_relaxed);
    }
    return has == YES;
}
#elif defined(__x86_64__)
static bool has_amx(void) {
    return false;
}
#endif

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
    case FB_ISA_AVX512_AMX:
        return fb_isa_available(FB_ISA_AVX512_BF16) && has_amx();
#elif defined(__aarch64__)
    case FB_ISA_NEON:
        return true;
    case FB_ISA_NEON_DOTPROD:
        return has_dotprod();
    case FB_ISA_NEON_I8MM:
        return has_dotprod() && has_i8mm();
#endif
    default:
        return false;
    }
}
