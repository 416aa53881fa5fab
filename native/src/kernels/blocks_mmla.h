/*
 * blocks_mmla.h - quantized products of many tokens with NEON's matrix instruction: SMMLA adds to 2 x 2 sums
 * the products of two rows of eight signed bytes with two others. blocks_simd.h includes it and draws block,
 * line and slice.
 *
 *     operands   rows j, j + 1 of a panel, columns 8 i .. 8 i + 7, x the same columns of two tokens
 *     sums       [row j, token 0] [row j, token 1] [row j + 1, token 0] [row j + 1, token 1]
 *     unpacked   a block: for each 8 columns, for each two rows, the 16 bytes of one operand. So two lines of
 *                layout.h, which hold 4 columns of each row, are interleaved when they are unpacked
 *
 * Sums keep that form until a tile ends, and each scale is stored twice to match it. A tile is 16 rows x 2
 * tokens: 8 registers for sums, 8 for dot products, 2 for activations. A block of 32 columns takes 70 vector
 * instructions, 32 of them SMMLA and 24 for scales; with USDOT it took 100, 64 of them USDOT. Four tokens per
 * tile would halve the loads, but need more of the other instructions.
 *
 *     defines          unpack_block, store_scales, begin_tiles, end_tiles, block_tiles
 *     template over    struct tile_kind (1 or 2 groups, offset or not); 1 panel, 2 tokens
 *     tested           test_blocks under qemu (tests/native/aarch64.sh): every format, 1 .. 50 tokens
 */
INLINE void store_rows(uint8_t *out, uint8x16_t first, uint8x16_t second) {
    const uint32x4_t x = vreinterpretq_u32_u8(first), y = vreinterpretq_u32_u8(second);
    vst1q_u8(out, vreinterpretq_u8_u32(vzip1q_u32(x, y)));
    vst1q_u8(out + 16, vreinterpretq_u8_u32(vzip2q_u32(x, y)));
}

INLINE void unpack_block(const enum fb_dtype dtype, const uint8_t *codes, uint8_t *unpacked) {
    const int zero_shift = fb_layout_of(dtype).zero_shift;
    UNROLL
    for (int q = 0; q < FB_UNPACKED_LINES; q += 2) {
        v64 x = unpack_line(dtype, codes, q), y = unpack_line(dtype, codes, q + 1);
        if (zero_shift) {
            x = v64_minus(x, 1 << zero_shift);
            y = v64_minus(y, 1 << zero_shift);
        }
        uint8_t *out = unpacked + q * FB_LINE;
        store_rows(out, x.a, y.a);
        store_rows(out + 32, x.b, y.b);
        store_rows(out + 64, x.c, y.c);
        store_rows(out + 96, x.d, y.d);
    }
}

/* Stores each scale twice. */
INLINE void store_scales(float *out, v16 scales) {
    vst2q_f32(out, ((float32x4x2_t){{scales.a, scales.a}}));
    vst2q_f32(out + 8, ((float32x4x2_t){{scales.b, scales.b}}));
    vst2q_f32(out + 16, ((float32x4x2_t){{scales.c, scales.c}}));
    vst2q_f32(out + 24, ((float32x4x2_t){{scales.d, scales.d}}));
}

INLINE void begin_tiles(const int n_groups, size_t n_tokens) {
    (void)n_groups, (void)n_tokens;
}

INLINE void end_tiles(void) {}

/* One number per token, repeated for both rows. */
INLINE float32x4_t of_tokens(const float *first, const float *second) {
    const float32x2_t both = vld1_lane_f32(second, vld1_dup_f32(first), 1);
    return vcombine_f32(both, both);
}

/* 16 rows x 2 tokens over the blocks of a slice; both tokens may be the same one. */
INLINE void block_tile(const struct tile_kind kind, const struct slice *slice, bool prefetches,
    const struct fb_activation *first, const struct fb_activation *second, float *y_first, float *y_second,
    bool accumulate) {
    float32x4_t sums[8];
    UNROLL
    for (int r = 0; r < 4; r++) {
        const float32x4_t zero = vdupq_n_f32(0.0f);
        const float32x4_t x = accumulate ? vld1q_f32(y_first + 4 * r) : zero;
        const float32x4_t y = accumulate ? vld1q_f32(y_second + 4 * r) : zero;
        sums[2 * r] = vzip1q_f32(x, y);
        sums[2 * r + 1] = vzip2q_f32(x, y);
    }
    for (size_t b = 0; b < slice->n_blocks; b++) {
        if (prefetches) prefetch_next(slice, b, 1);
        const uint8_t *unpacked = slice->unpacked[0][b];
        UNROLL
        for (int g = 0; g < 2; g++) {
            if (g >= kind.n_groups) continue;
            const int whole_or_half = kind.n_groups == 1 ? 0 : 1 + g;
            int32x4_t dots[8];
            UNROLL
            for (int r = 0; r < 8; r++)
                dots[r] = vdupq_n_s32(0);
            UNROLL
            for (int h = 0; h < 2; h++) { /* halves of a block */
                if (kind.n_groups == 2 && h != g) continue;
                const int64x2_t x = vreinterpretq_s64_s8(vld1q_s8(first[b].codes + 16 * h));
                const int64x2_t y = vreinterpretq_s64_s8(vld1q_s8(second[b].codes + 16 * h));
                const int8x16_t inputs[2] = {
                    vreinterpretq_s8_s64(vzip1q_s64(x, y)), vreinterpretq_s8_s64(vzip2q_s64(x, y))};
                UNROLL
                for (int i = 0; i < 2; i++) {
                    UNROLL
                    for (int r = 0; r < 8; r++) {
                        const uint8x16_t rows = vld1q_u8(unpacked + (2 * h + i) * 128 + 16 * r);
                        dots[r] = vmmlaq_s32(dots[r], vreinterpretq_s8_u8(rows), inputs[i]);
                    }
                }
            }
            const float32x4_t scales = of_tokens(&first[b].scale, &second[b].scale);
            const float32x4_t code_sums = of_tokens(&first[b].sums[whole_or_half], &second[b].sums[whole_or_half]);
            UNROLL
            for (int r = 0; r < 8; r++) {
                const float32x4_t scale = vmulq_f32(vld1q_f32(slice->scales[0][b][g] + 4 * r), scales);
                sums[r] = vfmaq_f32(sums[r], vcvtq_f32_s32(dots[r]), scale);
                if (kind.has_offset)
                    sums[r] = vfmaq_f32(sums[r], vld1q_f32(slice->offsets[0][b][g] + 4 * r), code_sums);
            }
        }
    }
    UNROLL
    for (int r = 0; r < 4; r++) {
        vst1q_f32(y_first + 4 * r, vuzp1q_f32(sums[2 * r], sums[2 * r + 1]));
        vst1q_f32(y_second + 4 * r, vuzp2q_f32(sums[2 * r], sums[2 * r + 1]));
    }
}

/* The last of an odd number of tokens is paired with itself. */
INLINE void block_tiles(const struct tile_kind kind, const struct slice *slice, const struct fb_activation *x,
    size_t ldx, size_t n_tokens, float *y, size_t ldy, bool accumulate) {
    for (size_t t = 0; t < n_tokens; t += 2) {
        const size_t next = t + 1 < n_tokens ? t + 1 : t;
        block_tile(kind, slice, t == 0, x + t * ldx, x + next * ldx, y + t * ldy, y + next * ldy, accumulate);
    }
}
