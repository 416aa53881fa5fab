/*
 * avx512.c - the AVX-512 kernels on a CPU that has only AVX2, so that their arithmetic is tested on every
 * machine.
 *
 * SIMDe implements most intrinsics with pairs of 256-bit ones; the few that its stable release lacks follow
 * here, as two halves.
 */
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtph_ps       emulated_cvtph_ps
#define _mm512_cvtps_ph(a, r) emulated_cvtps_ph(a)
#define _mm512_cvtps_epi32    emulated_cvtps_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16

static simde__m512 emulated_cvtph_ps(__m256i halfs) {
    simde__m512_private out;
    out.m256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halfs));
    out.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halfs, 1));
    return simde__m512_from_private(out);
}

static __m256i emulated_cvtps_ph(simde__m512 a) {
    simde__m512_private in = simde__m512_to_private(a);
    return _mm256_set_m128i(_mm256_cvtps_ph(in.m256[1], 0), _mm256_cvtps_ph(in.m256[0], 0));
}

static simde__m512i emulated_cvtps_epi32(simde__m512 a) {
    simde__m512_private in = simde__m512_to_private(a);
    simde__m512i_private out;
    out.m256i[0] = _mm256_cvtps_epi32(in.m256[0]);
    out.m256i[1] = _mm256_cvtps_epi32(in.m256[1]);
    return simde__m512i_from_private(out);
}

static simde__m512i emulated_cvtepu16_epi32(__m256i a) {
    simde__m512i_private out;
    out.m256i[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a));
    out.m256i[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1));
    return simde__m512i_from_private(out);
}

static __m256i emulated_cvtepi32_epi16(simde__m512i a) {
    simde__m512i_private in = simde__m512i_to_private(a);
    const __m256i low_halves = _mm256_set1_epi32(0xffff);
    __m256i packed = _mm256_packus_epi32(
        _mm256_and_si256(in.m256i[0], low_halves), _mm256_and_si256(in.m256i[1], low_halves));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}

#undef _mm512_madd_epi16
#undef _mm512_maddubs_epi16
#define _mm512_madd_epi16    emulated_madd_epi16
#define _mm512_maddubs_epi16 emulated_maddubs_epi16

static simde__m512i emulated_madd_epi16(simde__m512i a, simde__m512i b) {
    simde__m512i_private x = simde__m512i_to_private(a), y = simde__m512i_to_private(b), out;
    out.m256i[0] = _mm256_madd_epi16(x.m256i[0], y.m256i[0]);
    out.m256i[1] = _mm256_madd_epi16(x.m256i[1], y.m256i[1]);
    return simde__m512i_from_private(out);
}

static simde__m512i emulated_maddubs_epi16(simde__m512i a, simde__m512i b) {
    simde__m512i_private x = simde__m512i_to_private(a), y = simde__m512i_to_private(b), out;
    out.m256i[0] = _mm256_maddubs_epi16(x.m256i[0], y.m256i[0]);
    out.m256i[1] = _mm256_maddubs_epi16(x.m256i[1], y.m256i[1]);
    return simde__m512i_from_private(out);
}

#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi32_epi8
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_max_epi32
#define _mm512_cvtepu8_epi32    emulated_cvtepu8_epi32
#define _mm512_cvtepi8_epi32    emulated_cvtepi8_epi32
#define _mm512_cvtepi32_ps      emulated_cvtepi32_ps
#define _mm512_cvtepi32_epi8    emulated_cvtepi32_epi8
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#define _mm512_reduce_max_epi32 emulated_reduce_max_epi32

static simde__m512i emulated_cvtepu8_epi32(__m128i a) {
    simde__m512i_private out;
    out.m256i[0] = _mm256_cvtepu8_epi32(a);
    out.m256i[1] = _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8));
    return simde__m512i_from_private(out);
}

static simde__m512i emulated_cvtepi8_epi32(__m128i a) {
    simde__m512i_private out;
    out.m256i[0] = _mm256_cvtepi8_epi32(a);
    out.m256i[1] = _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8));
    return simde__m512i_from_private(out);
}

static simde__m512 emulated_cvtepi32_ps(simde__m512i a) {
    simde__m512i_private in = simde__m512i_to_private(a);
    simde__m512_private out;
    out.m256[0] = _mm256_cvtepi32_ps(in.m256i[0]);
    out.m256[1] = _mm256_cvtepi32_ps(in.m256i[1]);
    return simde__m512_from_private(out);
}

static __m128i emulated_cvtepi32_epi8(simde__m512i a) {
    simde__m512i_private in = simde__m512i_to_private(a);
    signed char out[16];
    for (int j = 0; j < 16; j++)
        out[j] = (signed char)in.i32[j];
    return _mm_loadu_si128((const __m128i *)out);
}

static int emulated_reduce_add_epi32(simde__m512i a) {
    simde__m512i_private in = simde__m512i_to_private(a);
    int sum = 0;
    for (int j = 0; j < 16; j++)
        sum += in.i32[j];
    return sum;
}

static int emulated_reduce_max_epi32(simde__m512i a) {
    simde__m512i_private in = simde__m512i_to_private(a);
    int most = in.i32[0];
    for (int j = 1; j < 16; j++)
        most = in.i32[j] > most ? in.i32[j] : most;
    return most;
}

#ifndef KERNEL_TABLE
#define KERNEL_TABLE fb_kernels_avx512_emulated
#endif
#include "kernels/kernels.h"
extern const struct fb_kernels KERNEL_TABLE;
#include "kernels/avx512.h"
