/*
 * avx512.h - vectors of AVX-512 F + BW + VL + DQ for simd.h: 16 floats are one register. The compiler flags
 * of the including file select the instructions:
 *
 *     includes it      needs        products of 4 bytes          pairs of bf16      many tokens, quantized
 *     avx512.c         F BW VL DQ   VPMADDUBSW + VPMADDWD        widened to f32     blocks_dots.h
 *     avx512_vnni.c    and VNNI     VPDPBUSD                     widened to f32     blocks_dots.h
 *     avx512_bf16.c    and BF16     VPDPBUSD                     VDPBF16PS          blocks_dots.h
 *     avx512_amx.c     and AMX      VPDPBUSD                     VDPBF16PS          blocks_amx.h
 *
 * A tile of 12 tokens x 2 panels uses 24 of the 32 registers for sums, 2 for weights and 1 for the broadcast
 * input: 24 fused multiply-adds for 14 loads. One token takes one panel, as in avx2.h.
 */
#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

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
/* As round_bf16 of avx2.h. The BF16 extension's own conversion is not used: it flushes subnormals to zero. */
static inline void v16_store_bf16(uint16_t *out, v16 a) {
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    __m512i chosen = _mm512_mask_mov_epi32(rounded, is_nan, quiet);
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

/* ---- Bytes and integers ------------------------------------------------------------------------------------------ */

typedef __m512i v64;
typedef __m512i v16i;

static inline v64 v64_load(const uint8_t *x) {
    return _mm512_loadu_si512(x);
}
static inline void v64_store(uint8_t *out, v64 a) {
    _mm512_storeu_si512(out, a);
}
static inline v64 v64_and(v64 a, int byte) {
    return _mm512_and_si512(a, _mm512_set1_epi8((char)byte));
}
static inline v64 v64_minus(v64 a, int byte) {
    return _mm512_sub_epi8(a, _mm512_set1_epi8((char)byte));
}
static inline v64 v64_or(v64 a, v64 b) {
    return _mm512_or_si512(a, b);
}
static inline __attribute__((always_inline)) v64 v64_left(v64 a, unsigned n) {
    return _mm512_slli_epi16(a, n);
}
static inline __attribute__((always_inline)) v64 v64_right(v64 a, unsigned n) {
    return _mm512_srli_epi16(a, n);
}
static inline v64 v64_lookup(const uint8_t table[16], v64 a) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), a);
}
static inline v16 v16_first_of_pairs(v64 a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
}
static inline v16 v16_second_of_pairs(v64 a) {
    return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000)));
}
static inline v16i v16i_start(const int32_t *minus_sum, int shift) {
    if (!minus_sum) return _mm512_setzero_si512();
    return _mm512_sll_epi32(_mm512_set1_epi32(*minus_sum), _mm_cvtsi32_si128(shift));
}
static inline v16i v16i_add(v16i a, v16i b) {
    return _mm512_add_epi32(a, b);
}
static inline v16i v16i_load_u8(const uint8_t *x) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x));
}
static inline v16i v16i_load_s8(const uint8_t *x) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x));
}
static inline v16i v16i_and(v16i a, int mask) {
    return _mm512_and_si512(a, _mm512_set1_epi32(mask));
}
static inline __attribute__((always_inline)) v16i v16i_right(v16i a, unsigned n) {
    return _mm512_srli_epi32(a, n);
}
static inline v16 v16_from_v16i(v16i a) {
    return _mm512_cvtepi32_ps(a);
}
/* As load_e8m0_8 of avx2.h. */
static inline v16 v16_load_e8m0(const uint8_t *x) {
    const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x)), one = _mm512_set1_epi32(1);
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, one), 23);
    const __m512i subnormal = _mm512_slli_epi32(_mm512_add_epi32(e, one), 21);
    return _mm512_castsi512_ps(_mm512_max_epi32(normal, subnormal));
}
static inline int32_t v16_to_codes(v16 a, int8_t *out) {
    const __m512i codes = _mm512_cvtps_epi32(a);
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(codes));
    return _mm512_reduce_add_epi32(codes);
}
static inline uint32_t v16_top_magnitude(v16 a, v16 b) {
    const __m512i most = _mm512_set1_epi32(0x7fffffff);
    return (uint32_t)_mm512_reduce_max_epi32(_mm512_max_epi32(
        _mm512_and_si512(_mm512_castps_si512(a), most), _mm512_and_si512(_mm512_castps_si512(b), most)));
}

static inline __m512i four_of(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

#ifdef __AVX512BF16__
static inline v16 dot_pair(v16 sums, v64 line, const uint16_t *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(sums, (__m512bh)line, (__m512bh)_mm512_set1_epi32(pair));
}
#define FABULA_DOT_PAIR dot_pair
#endif

#ifdef __AVX512VNNI__
enum { DOT_KNOWS_ZERO = 0, DOT_CHAINS = 2 };
static inline v16i v16i_dot(v16i sums, v64 codes, const int8_t *x, bool is_wide) {
    (void)is_wide;
    return _mm512_dpbusd_epi32(sums, codes, four_of(x));
}
#else
/* Pairs of products are added in 16 bits, which 8-bit codes would overflow: those become signed and their
 * sign moves to the activation, so that a pair is at most 2 x 128 x 127. */
enum { DOT_KNOWS_ZERO = 1, DOT_CHAINS = 2 };
static inline v16i v16i_dot(v16i sums, v64 codes, const int8_t *x, bool is_wide) {
    __m512i four = four_of(x);
    if (is_wide) {
        codes = _mm512_xor_si512(codes, _mm512_set1_epi8((char)0x80));
        four = _mm512_mask_sub_epi8(four, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), four);
        codes = _mm512_abs_epi8(codes);
    }
    return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, four), _mm512_set1_epi16(1)));
}
#endif

/* A tile of 6 tokens uses 12 of the 32 registers (few tokens) or 24 (two panels) for dot products and sums,
 * the rest for lines, scales and one broadcast. Few tokens in tiles of 8 to 12 unpack codes once for all of them.
 * More than 24 tokens run in tiles of 5 or 6. */
#define MAX_FEW_TILES(bits) 2
enum { FEW_TOKENS = 12, BLOCK_TOKENS = 6, BLOCK_PANELS = 2, SCALE_REPEATS = 1 };
#define FEW_TILES(X)   X(12, 11) X(10, 9) X(8, 7) X(6, 5) X(4, 3) X(2, 2) X(1, 1)
#define BLOCK_TILES(X) X(5, 1) X(5, 2) X(6, 1) X(6, 2)

enum { SUMS = 24, MAX_TOKENS = 12, MAX_PANELS = 4 };
enum { STATE_BLOCKS = 4 };
#define TILE_PANELS(tokens) ((tokens) <= 3 ? 1 : 2)
/* clang-format off */
#define TILES(X) \
    X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(2, 1) X(2, 2) X(3, 1) X(3, 2) X(4, 1) X(4, 2) X(5, 1) X(5, 2) X(6, 1) X(6, 2) \
    X(7, 1) X(7, 2) X(8, 1) X(8, 2) X(9, 1) X(9, 2) X(10, 1) X(10, 2) X(11, 1) X(11, 2) X(12, 1) X(12, 2)
/* clang-format on */

#include "kernels/simd.h"
