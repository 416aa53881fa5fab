/*
 * avx512.c - kernels for AVX-512 F + BW + VL + DQ: a vector of 16 floats is one register.
 *
 * Of the 32 registers a tile of 12 tokens x 2 panels takes 24 for sums, 2 for weights and 1 for the broadcast input: 24
 * fused multiply-adds for 14 loads. One token takes 4 panels at once, as in avx2.c.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

typedef __m512 v16;

static inline v16 v16_zero(void) {
    return _mm512_setzero_ps();
}
static inline v16 v16_set1(float x) {
    return _mm512_set1_ps(x);
}
static inline v16 v16_load(const float *x) {
    return _mm512_loadu_ps(x);
}
static inline void v16_store(float *out, v16 a) {
    _mm512_storeu_ps(out, a);
}
static inline v16 v16_add(v16 a, v16 b) {
    return _mm512_add_ps(a, b);
}
static inline v16 v16_mul(v16 a, v16 b) {
    return _mm512_mul_ps(a, b);
}
static inline v16 v16_div(v16 a, v16 b) {
    return _mm512_div_ps(a, b);
}
static inline v16 v16_fma(v16 a, v16 b, v16 c) {
    return _mm512_fmadd_ps(a, b, c);
}
static inline v16 v16_negate_fma(v16 a, v16 b, v16 c) {
    return _mm512_fnmadd_ps(a, b, c);
}
static inline v16 v16_min(v16 a, v16 b) {
    return _mm512_min_ps(a, b);
}
static inline v16 v16_max(v16 a, v16 b) {
    return _mm512_max_ps(a, b);
}
static inline v16 v16_round(v16 a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline v16 v16_power_of_2(v16 n) {
    __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
static inline v16 v16_keep_at_least(v16 a, v16 x, v16 limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), a);
}
static inline v16 v16_load_f16(const uint16_t *x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
}
static inline void v16_store_f16(uint16_t *out, v16 a) {
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline v16 v16_load_bf16(const uint16_t *x) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
/* As round_bf16 of avx2.c. The BF16 extension's own conversion is not used: it flushes subnormals to zero. */
static inline void v16_store_bf16(uint16_t *out, v16 a) {
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    __m512i chosen = _mm512_mask_mov_epi32(rounded, is_nan, quiet);
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

enum { SUMS = 24, MAX_TOKENS = 12, MAX_PANELS = 4 };
#define TILE_PANELS(tokens) ((tokens) == 1 ? 4 : 2)
/* clang-format off */
#define TILES(X) \
    X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(2, 1) X(2, 2) X(3, 1) X(3, 2) X(4, 1) X(4, 2) X(5, 1) X(5, 2) X(6, 1) X(6, 2) \
    X(7, 1) X(7, 2) X(8, 1) X(8, 2) X(9, 1) X(9, 2) X(10, 1) X(10, 2) X(11, 1) X(11, 2) X(12, 1) X(12, 2)
/* clang-format on */
#define KERNEL_TABLE fb_kernels_avx512

#include "kernels/simd.h"
#else
typedef int fb_no_avx512_here; /* a translation unit must not be empty */
#endif
