/*
 * neon.h - vectors of AArch64's Advanced SIMD for simd.h: 16 floats are four registers of 4. Every AArch64
 * CPU converts f16.
 *
 *     includes it       defines               products of 4 bytes      many tokens, quantized
 *     neon.c            -                     SMULL + SADALP           blocks_dots.h
 *     neon_dotprod.c    FABULA_NEON_DOTPROD   SDOT                     blocks_dots.h
 *     neon_i8mm.c       FABULA_NEON_I8MM      USDOT                    blocks_mmla.h (SMMLA, 8 bytes)
 *
 * The 32 registers hold as many bytes as AVX2's 16, so tiles are the same: 6 tokens x 1 panel use 24
 * registers for sums, 4 for weights and 1 for the input, which is multiplied by lane: 24 fused multiply-adds
 * for 10 loads. Operands cannot come from memory, so 2 tokens take 2 panels (16 + 8 + 1) and 3 take one (12 +
 * 4 + 1). One token takes one panel, as in avx2.h; its four sums are independent.
 *
 * OF_1, OF_2 and OF_3 apply a 4-lane intrinsic `f` to each quarter of one, two or three vectors; ALL repeats
 * a quarter.
 */
#include <arm_neon.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float32x4_t a, b, c, d;
} v16;

#define OF_1(type, f, x)       ((type){f((x).a), f((x).b), f((x).c), f((x).d)})
#define OF_2(type, f, x, y)    ((type){f((x).a, (y).a), f((x).b, (y).b), f((x).c, (y).c), f((x).d, (y).d)})
#define OF_3(type, f, x, y, z) ((type){f(x.a, y.a, z.a), f(x.b, y.b, z.b), f(x.c, y.c, z.c), f(x.d, y.d, z.d)})
#define ALL(type, value)       ((type){value, value, value, value})

static inline v16 v16_set1(float x) {
    return ALL(v16, vdupq_n_f32(x));
}
static inline v16 v16_zero(void) {
    return v16_set1(0.0f);
}
static inline v16 v16_load(const float *x) {
    return (v16){vld1q_f32(x), vld1q_f32(x + 4), vld1q_f32(x + 8), vld1q_f32(x + 12)};
}
static inline void v16_store(float *out, v16 x) {
    vst1q_f32(out, x.a);
    vst1q_f32(out + 4, x.b);
    vst1q_f32(out + 8, x.c);
    vst1q_f32(out + 12, x.d);
}
static inline v16 v16_add(v16 x, v16 y) {
    return OF_2(v16, vaddq_f32, x, y);
}
static inline v16 v16_mul(v16 x, v16 y) {
    return OF_2(v16, vmulq_f32, x, y);
}
static inline v16 v16_div(v16 x, v16 y) {
    return OF_2(v16, vdivq_f32, x, y);
}
static inline v16 v16_fma(v16 x, v16 y, v16 z) {
    return OF_3(v16, vfmaq_f32, z, x, y);
}
static inline v16 v16_negate_fma(v16 x, v16 y, v16 z) {
    return OF_3(v16, vfmsq_f32, z, x, y);
}
/* Not FMIN and FMAX: they return NaN if either operand is NaN, and order zeros by sign. */
static inline float32x4_t min_4(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcltq_f32(x, y), x, y);
}
static inline v16 v16_min(v16 x, v16 y) {
    return OF_2(v16, min_4, x, y);
}
static inline float32x4_t max_4(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcgtq_f32(x, y), x, y);
}
static inline v16 v16_max(v16 x, v16 y) {
    return OF_2(v16, max_4, x, y);
}
static inline v16 v16_round(v16 x) {
    return OF_1(v16, vrndnq_f32, x);
}
static inline float32x4_t power_of_2(float32x4_t n) {
    const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
}
static inline v16 v16_power_of_2(v16 n) {
    return OF_1(v16, power_of_2, n);
}
static inline float32x4_t keep_at_least(float32x4_t x, float32x4_t y, float32x4_t limit) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(y, limit)));
}
static inline v16 v16_keep_at_least(v16 x, v16 y, v16 limit) {
    return OF_3(v16, keep_at_least, x, y, limit);
}
static inline v16 v16_load_f16(const uint16_t *x) {
    const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(x)), high = vreinterpretq_f16_u16(vld1q_u16(x + 8));
    return (v16){vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
        vcvt_high_f32_f16(high)};
}
static inline void v16_store_f16(uint16_t *out, v16 x) {
    vst1q_u16(out, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
    vst1q_u16(out + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
}
static inline v16 v16_load_bf16(const uint16_t *x) {
    const uint16x8_t low = vld1q_u16(x), high = vld1q_u16(x + 8);
    return (v16){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(low), 16)),
        vreinterpretq_f32_u32(vshll_high_n_u16(low, 16)), vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(high), 16)),
        vreinterpretq_f32_u32(vshll_high_n_u16(high, 16))};
}
/* As round_bf16 of avx2.h; the result is in the upper halves. */
static inline uint16x8_t round_bf16(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vreinterpretq_u16_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet));
}
static inline void v16_store_bf16(uint16_t *out, v16 x) {
    vst1q_u16(out, vuzp2q_u16(round_bf16(x.a), round_bf16(x.b)));
    vst1q_u16(out + 8, vuzp2q_u16(round_bf16(x.c), round_bf16(x.d)));
}

/* ---- Bytes and integers ------------------------------------------------------------------------------------------ */

typedef struct {
    uint8x16_t a, b, c, d; /* rows 0 .. 3, 4 .. 7, ... of a panel, 4 columns each */
} v64;
typedef struct {
    int32x4_t a, b, c, d;
} v16i;

static inline v64 v64_load(const uint8_t *x) {
    return (v64){vld1q_u8(x), vld1q_u8(x + 16), vld1q_u8(x + 32), vld1q_u8(x + 48)};
}
static inline void v64_store(uint8_t *out, v64 x) {
    vst1q_u8(out, x.a);
    vst1q_u8(out + 16, x.b);
    vst1q_u8(out + 32, x.c);
    vst1q_u8(out + 48, x.d);
}
static inline v64 v64_and(v64 x, int byte) {
    const v64 mask = ALL(v64, vdupq_n_u8((uint8_t)byte));
    return OF_2(v64, vandq_u8, x, mask);
}
static inline v64 v64_minus(v64 x, int byte) {
    const v64 all = ALL(v64, vdupq_n_u8((uint8_t)byte));
    return OF_2(v64, vsubq_u8, x, all);
}
static inline v64 v64_or(v64 x, v64 y) {
    return OF_2(v64, vorrq_u8, x, y);
}
/* Operators where the intrinsics require a literal; with a constant they compile to the same instruction. */
static inline __attribute__((always_inline)) uint8x16_t left(uint8x16_t x, int n) {
    return vreinterpretq_u8_u16(vreinterpretq_u16_u8(x) << vdupq_n_u16((uint16_t)n));
}
static inline __attribute__((always_inline)) v64 v64_left(v64 x, int n) {
    return (v64){left(x.a, n), left(x.b, n), left(x.c, n), left(x.d, n)};
}
static inline __attribute__((always_inline)) uint8x16_t right(uint8x16_t x, int n) {
    return vreinterpretq_u8_u16(vreinterpretq_u16_u8(x) >> vdupq_n_u16((uint16_t)n));
}
static inline __attribute__((always_inline)) v64 v64_right(v64 x, int n) {
    return (v64){right(x.a, n), right(x.b, n), right(x.c, n), right(x.d, n)};
}
static inline v64 v64_lookup(const uint8_t table[16], v64 x) {
    const uint8x16_t all = vld1q_u8(table);
    return (v64){vqtbl1q_u8(all, x.a), vqtbl1q_u8(all, x.b), vqtbl1q_u8(all, x.c), vqtbl1q_u8(all, x.d)};
}
static inline float32x4_t first_of_pairs(uint8x16_t x) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(x), 16));
}
static inline float32x4_t second_of_pairs(uint8x16_t x) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(x), vdupq_n_u32(0xffff0000)));
}
static inline v16 v16_first_of_pairs(v64 x) {
    return OF_1(v16, first_of_pairs, x);
}
static inline v16 v16_second_of_pairs(v64 x) {
    return OF_1(v16, second_of_pairs, x);
}
static inline v16i v16i_start(const int32_t *minus_sum, int shift) {
    if (!minus_sum) return ALL(v16i, vdupq_n_s32(0));
    return ALL(v16i, vshlq_s32(vld1q_dup_s32(minus_sum), vdupq_n_s32(shift)));
}
static inline v16i v16i_add(v16i x, v16i y) {
    return OF_2(v16i, vaddq_s32, x, y);
}
static inline v16i widen_s16(int16x8_t low, int16x8_t high) {
    return (v16i){
        vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
static inline v16i v16i_load_u8(const uint8_t *x) {
    const uint8x16_t bytes = vld1q_u8(x);
    return widen_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes))), vreinterpretq_s16_u16(vmovl_high_u8(bytes)));
}
static inline v16i v16i_load_s8(const uint8_t *x) {
    const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(x));
    return widen_s16(vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
}
static inline v16i v16i_and(v16i x, int mask) {
    const v16i all = ALL(v16i, vdupq_n_s32(mask));
    return OF_2(v16i, vandq_s32, x, all);
}
static inline __attribute__((always_inline)) int32x4_t right_4(int32x4_t x, int n) {
    return vreinterpretq_s32_u32(vreinterpretq_u32_s32(x) >> vdupq_n_u32((uint32_t)n));
}
static inline __attribute__((always_inline)) v16i v16i_right(v16i x, int n) {
    return (v16i){right_4(x.a, n), right_4(x.b, n), right_4(x.c, n), right_4(x.d, n)};
}
static inline v16 v16_from_v16i(v16i x) {
    return OF_1(v16, vcvtq_f32_s32, x);
}
/* As load_e8m0_8 of avx2.h. */
static inline float32x4_t e8m0_4(int32x4_t e) {
    const int32x4_t one = vdupq_n_s32(1);
    const int32x4_t normal = vshlq_n_s32(vsubq_s32(e, one), 23), subnormal = vshlq_n_s32(vaddq_s32(e, one), 21);
    return vreinterpretq_f32_s32(vmaxq_s32(normal, subnormal));
}
static inline v16 v16_load_e8m0(const uint8_t *x) {
    const v16i e = v16i_load_u8(x);
    return OF_1(v16, e8m0_4, e);
}
static inline int32_t v16_to_codes(v16 x, int8_t *out) {
    const v16i whole = OF_1(v16i, vcvtnq_s32_f32, x);
    const int16x8_t low = vmovn_high_s32(vmovn_s32(whole.a), whole.b);
    const int16x8_t high = vmovn_high_s32(vmovn_s32(whole.c), whole.d);
    vst1q_s8(out, vmovn_high_s16(vmovn_s16(low), high));
    return vaddvq_s16(vaddq_s16(low, high)); /* at most 16 x 127 */
}
static inline uint32x4_t magnitude(float32x4_t x) {
    return vreinterpretq_u32_f32(vabsq_f32(x));
}
static inline uint32_t v16_top_magnitude(v16 x, v16 y) {
    const uint32x4_t first = vmaxq_u32(
        vmaxq_u32(magnitude(x.a), magnitude(x.b)), vmaxq_u32(magnitude(x.c), magnitude(x.d)));
    const uint32x4_t second = vmaxq_u32(
        vmaxq_u32(magnitude(y.a), magnitude(y.b)), vmaxq_u32(magnitude(y.c), magnitude(y.d)));
    return vmaxvq_u32(vmaxq_u32(first, second));
}

#if defined(FABULA_NEON_I8MM) || defined(FABULA_NEON_DOTPROD)
/* Four activations in the lane that the multiplication uses: a load costs no arithmetic unit, unlike a
 * broadcast. */
typedef int8x8_t activations;
static inline activations load_activations(const int8_t *x) {
    uint32_t bits;
    memcpy(&bits, x, sizeof bits);
    return vcreate_s8(bits);
}
#else
typedef int8x16_t activations;
static inline activations load_activations(const int8_t *x) {
    int32_t bits;
    memcpy(&bits, x, sizeof bits);
    return vreinterpretq_s8_s32(vdupq_n_s32(bits));
}
#endif

#if defined(FABULA_NEON_I8MM)
enum { DOT_KNOWS_ZERO = 0, DOT_CHAINS = 2 };
static inline int32x4_t dot_4(int32x4_t sums, uint8x16_t codes, activations four, bool is_wide) {
    (void)is_wide;
    return vusdotq_lane_s32(sums, codes, four, 0);
}
#else
/* Codes are multiplied as signed bytes: 8-bit ones after subtracting 128, the others are small enough. */
enum { DOT_KNOWS_ZERO = 1, DOT_CHAINS = 2 };
static inline int32x4_t dot_4(int32x4_t sums, uint8x16_t codes, activations four, bool is_wide) {
    if (is_wide) codes = veorq_u8(codes, vdupq_n_u8(0x80));
    const int8x16_t with_sign = vreinterpretq_s8_u8(codes);
#if defined(FABULA_NEON_DOTPROD)
    return vdotq_lane_s32(sums, with_sign, four, 0);
#else
    /* Pairs of products are added in 16 bits: at most 2 x 128 x 127. */
    const int16x8_t low = vmull_s8(vget_low_s8(with_sign), vget_low_s8(four));
    const int16x8_t high = vmull_high_s8(with_sign, four);
    return vpadalq_s16(sums, vpaddq_s16(low, high));
#endif
}
#endif

static inline v16i v16i_dot(v16i sums, v64 codes, const int8_t *x, bool is_wide) {
    const activations four = load_activations(x);
    return (v16i){dot_4(sums.a, codes.a, four, is_wide), dot_4(sums.b, codes.b, four, is_wide),
        dot_4(sums.c, codes.c, four, is_wide), dot_4(sums.d, codes.d, four, is_wide)};
}

/* A tile of 3 tokens uses 12 registers each for dot products and sums, 4 for a line and 1 for activations;
 * the rest are for unpacking lines. */
#define FEW_TILES(X) X(3, 3) X(2, 2) X(1, 1)
#if defined(FABULA_NEON_I8MM)
/* Few tokens use USDOT, which takes a line as it is stored. A block for 7 tokens takes about 400 vector
 * instructions either way; from then on SMMLA wins, which takes 70 for each further pair of tokens. */
#define MATRIX_TILES        "kernels/blocks_mmla.h"
#define MAX_FEW_TILES(bits) 2
enum { FEW_TOKENS = 3, BLOCK_PANELS = 1, SCALE_REPEATS = 2 };
#else
#define MAX_FEW_TILES(bits) 4
enum { FEW_TOKENS = 3, BLOCK_TOKENS = 3, BLOCK_PANELS = 1, SCALE_REPEATS = 1 };
#define BLOCK_TILES(X)      X(2, 1) X(3, 1)
#endif

enum { SUMS = 6, MAX_TOKENS = 6, MAX_PANELS = 2 };
enum { STATE_BLOCKS = 2 };
#define TILE_PANELS(tokens) ((tokens) == 2 ? 2 : 1)
#define TILES(X)            X(1, 1) X(1, 2) X(2, 1) X(2, 2) X(3, 1) X(3, 2) X(4, 1) X(5, 1) X(6, 1)

#include "kernels/simd.h"
