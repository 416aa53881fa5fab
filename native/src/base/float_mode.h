/*
 * float_mode.h - the floating-point mode that every sum assumes: round to nearest, keep subnormals, no traps.
 *
 * The mode is a register of each thread. The caller may have changed it (flush-to-zero is common in audio and
 * physics code), and a new thread inherits its creator's. Without this, results would depend on the caller
 * and on the number of threads. Each parallel region enters the mode first and restores the caller's at the
 * end.
 */
#ifndef FABULA_BASE_FLOAT_MODE_H
#define FABULA_BASE_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__)
typedef uint32_t fb_float_mode; /* MXCSR; Intel SDM, volume 1, 10.2.3 */

static inline fb_float_mode fb_float_mode_enter(void) {
    const uint32_t before = __builtin_ia32_stmxcsr();
    const uint32_t usual = 0x1F80; /* after reset: all exceptions masked, round to nearest, no FTZ, no DAZ */
    if ((before & ~0x3Fu) != usual) __builtin_ia32_ldmxcsr(usual); /* bits 0-5 are sticky exception flags */
    return before;
}

static inline void fb_float_mode_leave(fb_float_mode before) {
    if ((before & ~0x3Fu) != 0x1F80) __builtin_ia32_ldmxcsr(before);
}
#elif defined(__aarch64__)
typedef uint64_t fb_float_mode; /* FPCR; Arm ARM, C5.2.8 */

static inline fb_float_mode fb_float_mode_enter(void) {
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    if (before != 0) __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return before;
}

static inline void fb_float_mode_leave(fb_float_mode before) {
    if (before != 0) __asm__ volatile("msr fpcr, %0" : : "r"(before));
}
#else
typedef int fb_float_mode;

static inline fb_float_mode fb_float_mode_enter(void) {
    return 0;
}

static inline void fb_float_mode_leave(fb_float_mode before) {
    (void)before;
}
#endif

#endif
