/*
 * avx2.h - vectors of AVX2 + FMA + F16C (Haswell, Zen and later) for simd.h: 16 floats are two registers of
 * 8. With FABULA_DPBUSD_256 (avx_vnni.c) four products of bytes are one instruction.
 *
 * A tile of 6 tokens x 1 panel uses 12 of the 16 registers for sums, 2 for weights and 1 for the broadcast
 * input: 12 fused multiply-adds for 8 loads, which keeps both FMA units busy. One token takes one panel: its
 * two sums are dependency chains, but a core reads one stream from memory faster than several.
 *
 * A tile of quantized blocks also keeps a dot product per sum. So it is 3 tokens x 1 panel (6 sums, 6 dot
 * products, 2 lines, 1 input), or 6 tokens x half a panel, which prepares half as many lines per product.
 *
 *     includes it    defines            products of 4 bytes                     pairs of bf16
 *     avx2.c         -                  VPMADDUBSW, then VPMADDWD; codes of 6   widened to f32
 *                                       bits and less are added in between
 *     avx_vnni.c     FABULA_DPBUSD_256  VPDPBUSD                                widened to f32
 *
 * EACH makes a v16 of its two halves, BOTH a v64. The contract of v16_*, v64_* and v16i_* is in simd.h and
 * blocks_simd.h.
 */
#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    __m256 low, high;
} v16;

#define EACH(value_low, value_high) ((v16){value_low, value_high})

static inline v16 v16_zero(void) {
    return EACH(_mm256_setzero_ps(), _mm256_setzero_ps());
}
static inline v16 v16_set1(float x) {
    __m256 all = _mm256_set1_ps(x);
    return EACH(all, all);
}
static inline v16 v16_load(const float *x) {
    return EACH(_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8));
}
static inline void v16_store(float *out, v16 a) {
    _mm256_storeu_ps(out, a.low);
    _mm256_storeu_ps(out + 8, a.high);
}
static inline void v16_store_low(float *out, v16 a) {
    _mm256_storeu_ps(out, a.low);
}
static inline void v16_store_high(float *out, v16 a) {
    _mm256_storeu_ps(out + 8, a.high);
}
static inline v16 v16_add(v16 a, v16 b) {
    return EACH(_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high));
}
static inline v16 v16_mul(v16 a, v16 b) {
    return EACH(_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high));
}
static inline v16 v16_div(v16 a, v16 b) {
    return EACH(_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high));
}
static inline v16 v16_fma(v16 a, v16 b, v16 c) {
    return EACH(_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high));
}
static inline v16 v16_negate_fma(v16 a, v16 b, v16 c) {
    return EACH(_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high));
}
static inline v16 v16_min(v16 a, v16 b) {
    return EACH(_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high));
}
static inline v16 v16_max(v16 a, v16 b) {
    return EACH(_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high));
}
static inline v16 v16_round(v16 a) {
    return EACH(_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
        _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline __m256 power_of_2(__m256 n) {
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
static inline v16 v16_power_of_2(v16 n) {
    return EACH(power_of_2(n.low), power_of_2(n.high));
}
static inline v16 v16_keep_at_least(v16 a, v16 x, v16 limit) {
    return EACH(_mm256_and_ps(a.low, _mm256_cmp_ps(x.low, limit.low, _CMP_NLT_UQ)),
        _mm256_and_ps(a.high, _mm256_cmp_ps(x.high, limit.high, _CMP_NLT_UQ)));
}
static inline v16 v16_load_f16(const uint16_t *x) {
    return EACH(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)),
        _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + 8))));
}
static inline void v16_store_f16(uint16_t *out, v16 a) {
    _mm_storeu_si128((__m128i *)out, _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(out + 8), _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline __m256 widen_bf16_8(const uint16_t *x) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline v16 v16_load_bf16(const uint16_t *x) {
    return EACH(widen_bf16_8(x), widen_bf16_8(x + 8));
}
/* Rounds to nearest even on the bits: adds 0x7fff plus the lowest bit kept; NaN becomes quiet instead. */
static inline __m256i round_bf16(__m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}
static inline void v16_store_bf16(uint16_t *out, v16 a) {
    __m256i packed = _mm256_packus_epi32(round_bf16(a.low), round_bf16(a.high));
    _mm256_storeu_si256((__m256i *)out, _mm256_permute4x64_epi64(packed, 0xd8));
}

/* ---- Bytes and integers ------------------------------------------------------------------------------------------ */

typedef struct {
    __m256i low, high;
} v64;
typedef v64 v16i;

#define BOTH(value_low, value_high) ((v64){value_low, value_high})

static inline v64 v64_load(const uint8_t *x) {
    return BOTH(_mm256_loadu_si256((const __m256i *)x), _mm256_loadu_si256((const __m256i *)(x + 32)));
}
static inline void v64_store(uint8_t *out, v64 a) {
    _mm256_storeu_si256((__m256i *)out, a.low);
    _mm256_storeu_si256((__m256i *)(out + 32), a.high);
}
static inline v64 v64_and(v64 a, int byte) {
    const __m256i mask = _mm256_set1_epi8((char)byte);
    return BOTH(_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask));
}
static inline v64 v64_or(v64 a, v64 b) {
    return BOTH(_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high));
}
static inline __attribute__((always_inline)) v64 v64_left(v64 a, int n) {
    return BOTH(_mm256_slli_epi16(a.low, n), _mm256_slli_epi16(a.high, n));
}
static inline __attribute__((always_inline)) v64 v64_right(v64 a, int n) {
    return BOTH(_mm256_srli_epi16(a.low, n), _mm256_srli_epi16(a.high, n));
}
static inline v64 v64_lookup(const uint8_t table[16], v64 a) {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return BOTH(_mm256_shuffle_epi8(all, a.low), _mm256_shuffle_epi8(all, a.high));
}
static inline v16 v16_first_of_pairs(v64 a) {
    return EACH(_mm256_castsi256_ps(_mm256_slli_epi32(a.low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.high, 16)));
}
static inline v16 v16_second_of_pairs(v64 a) {
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    return EACH(
        _mm256_castsi256_ps(_mm256_and_si256(a.low, mask)), _mm256_castsi256_ps(_mm256_and_si256(a.high, mask)));
}
static inline v16i v16i_start(const int32_t *minus_sum, int shift) {
    __m256i all = _mm256_setzero_si256();
    if (minus_sum) all = _mm256_sll_epi32(_mm256_set1_epi32(*minus_sum), _mm_cvtsi32_si128(shift));
    return BOTH(all, all);
}
static inline v16i v16i_add(v16i a, v16i b) {
    return BOTH(_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high));
}
static inline v16i v16i_load_u8(const uint8_t *x) {
    return BOTH(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)x)),
        _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(x + 8))));
}
static inline v16i v16i_load_s8(const uint8_t *x) {
    return BOTH(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)),
        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(x + 8))));
}
static inline v16i v16i_and(v16i a, int mask) {
    const __m256i all = _mm256_set1_epi32(mask);
    return BOTH(_mm256_and_si256(a.low, all), _mm256_and_si256(a.high, all));
}
static inline __attribute__((always_inline)) v16i v16i_right(v16i a, int n) {
    return BOTH(_mm256_srli_epi32(a.low, n), _mm256_srli_epi32(a.high, n));
}
static inline v16 v16_from_v16i(v16i a) {
    return EACH(_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high));
}
/* The larger of the bits of a normal and of a subnormal number is the right one, for every byte. */
static inline __m256 load_e8m0_8(const uint8_t *x) {
    const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)x)), one = _mm256_set1_epi32(1);
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, one), 23);
    const __m256i subnormal = _mm256_slli_epi32(_mm256_add_epi32(e, one), 21);
    return _mm256_castsi256_ps(_mm256_max_epi32(normal, subnormal));
}
static inline v16 v16_load_e8m0(const uint8_t *x) {
    return EACH(load_e8m0_8(x), load_e8m0_8(x + 8));
}
static inline int32_t v16_to_codes(v16 a, int8_t *out) {
    const __m256i low = _mm256_cvtps_epi32(a.low), high = _mm256_cvtps_epi32(a.high);
    const __m256i halfs = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    const __m128i codes = _mm_packs_epi16(_mm256_castsi256_si128(halfs), _mm256_extracti128_si256(halfs, 1));
    _mm_storeu_si128((__m128i *)out, codes);
    const __m256i pairs = _mm256_madd_epi16(halfs, _mm256_set1_epi16(1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}
static inline uint32_t v16_top_magnitude(v16 a, v16 b) {
    const __m256i most = _mm256_set1_epi32(0x7fffffff);
    const __m256i first = _mm256_max_epi32(
        _mm256_and_si256(_mm256_castps_si256(a.low), most), _mm256_and_si256(_mm256_castps_si256(a.high), most));
    const __m256i second = _mm256_max_epi32(
        _mm256_and_si256(_mm256_castps_si256(b.low), most), _mm256_and_si256(_mm256_castps_si256(b.high), most));
    const __m256i all = _mm256_max_epi32(first, second);
    __m128i top = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1)));
}

#ifdef FABULA_DPBUSD_256
enum { DOT_KNOWS_ZERO = 0, DOT_CHAINS = 2 };
static inline v16i v16i_dot(v16i sums, v64 codes, const int8_t *x, bool is_wide) {
    (void)is_wide;
    int32_t bits;
    memcpy(&bits, x, sizeof bits);
    const __m256i four = _mm256_set1_epi32(bits);
    return BOTH(FABULA_DPBUSD_256(sums.low, codes.low, four), FABULA_DPBUSD_256(sums.high, codes.high, four));
}
#else
/* Pairs of products are added in 16 bits, which 8-bit codes would overflow: those become signed and their
 * sign moves to the activation, so that a pair is at most 2 x 128 x 127. */
enum { DOT_KNOWS_ZERO = 1, DOT_CHAINS = 1 };
#define HAS_PAIR_SUMS
static inline v64 v64_signed(v64 a) {
    const __m256i sign = _mm256_set1_epi8((char)0x80);
    return BOTH(_mm256_xor_si256(a.low, sign), _mm256_xor_si256(a.high, sign));
}
static inline v64 v64_magnitudes(v64 a) {
    return BOTH(_mm256_abs_epi8(a.low), _mm256_abs_epi8(a.high));
}
static inline __m256i signed_dot_8(__m256i sums, __m256i magnitudes, __m256i codes, __m256i four) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(four, codes));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline v16i v16i_signed_dot(v16i sums, v64 magnitudes, v64 codes, const int8_t *x) {
    int32_t bits;
    memcpy(&bits, x, sizeof bits);
    const __m256i four = _mm256_set1_epi32(bits);
    return BOTH(signed_dot_8(sums.low, magnitudes.low, codes.low, four),
        signed_dot_8(sums.high, magnitudes.high, codes.high, four));
}

static inline v64 v64_pairs(v64 codes, const int8_t *x) {
    int32_t bits;
    memcpy(&bits, x, sizeof bits);
    const __m256i four = _mm256_set1_epi32(bits);
    return BOTH(_mm256_maddubs_epi16(codes.low, four), _mm256_maddubs_epi16(codes.high, four));
}
static inline v64 v64_add_pairs(v64 a, v64 b) {
    return BOTH(_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high));
}
static inline v16i v16i_from_pairs(v64 a) {
    const __m256i ones = _mm256_set1_epi16(1);
    return BOTH(_mm256_madd_epi16(a.low, ones), _mm256_madd_epi16(a.high, ones));
}
#endif

enum { FEW_TOKENS = 6, BLOCK_TOKENS = 3, BLOCK_PANELS = 1, SCALE_REPEATS = 1 };
#define MAX_FEW_TILES(bits) ((bits) == 6 || ((bits) == 8 && !DOT_KNOWS_ZERO) ? 2 : 3)
/* With VPDPBUSD codes of 8 bits take nothing to unpack or sign, and more tokens only more broadcasts. */
#define LARGEST_FEW_TILE(bits) ((bits) == 8 && !DOT_KNOWS_ZERO ? 3 : FEW_TOKENS)
#define FEW_TILES(X)           X(6, 6) X(4, 4) X(3, 3) X(2, 2) X(1, 1)
#define BLOCK_TILES(X)         X(2, 1) X(3, 1)
#define HALF_TILES(X)          X(4) X(5) X(6)
#define HAS_HALVES(tokens)     ((tokens) >= (DOT_KNOWS_ZERO ? 3 : 4))

enum { SUMS = 6, MAX_TOKENS = 6, MAX_PANELS = 4 };
enum { STATE_BLOCKS = 2 };
#define TILE_PANELS(tokens) ((tokens) == 1 ? 1 : (tokens) == 2 ? 3 : (tokens) == 3 ? 2 : 1)
#define TILES(X) X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(2, 1) X(2, 2) X(2, 3) X(3, 1) X(3, 2) X(4, 1) X(5, 1) X(6, 1)

#include "kernels/simd.h"
