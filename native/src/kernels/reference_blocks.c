/* reference_blocks.c - products with quantized weights as plain loops: the specification of blocks_simd.h. */
#include "kernels/kernels.h"
#include "quant/convert.h"

#include <math.h>
#include <string.h>

void fb_reference_quantize(const float *x, size_t n_blocks, struct fb_activation *out) {
    for (; n_blocks > 0; n_blocks--, x += FB_BLOCK_COLUMNS, out++) {
        uint32_t bits = 0; /* of the largest magnitude; as integers NaN > infinity > the rest */
        for (int i = 0; i < FB_BLOCK_COLUMNS; i++) {
            const uint32_t magnitude = fb_f32_bits(x[i]) & 0x7fffffffu;
            bits = magnitude > bits ? magnitude : bits;
        }
        const float top = fb_f32_from_bits(bits);
        memset(out, 0, sizeof *out);
        if (!(top < INFINITY)) {
            out->scale = out->sums[0] = out->sums[1] = out->sums[2] = NAN;
            continue;
        }
        if (top < 1e-30f) continue;
        const float inverse = 127.0f / top;
        int32_t sums[3] = {0};
        for (int i = 0; i < FB_BLOCK_COLUMNS; i++) {
            out->codes[i] = (int8_t)nearbyintf(x[i] * inverse);
            sums[1 + i / 16] += out->codes[i];
        }
        sums[0] = sums[1] + sums[2];
        out->scale = top / 127.0f;
        for (int s = 0; s < 3; s++) {
            out->sums[s] = out->scale * (float)sums[s];
            out->minus_sums[s] = -sums[s];
        }
    }
}

void fb_reference_gemm_blocks(enum fb_dtype dtype, const char *panels, size_t n_panels, size_t n_cols,
    const struct fb_activation *x, size_t ldx, size_t n_tokens, float *y, size_t ldy) {
    const size_t n_groups = fb_groups(dtype), per_group = FB_BLOCK_COLUMNS / n_groups;
    const int zero = fb_layout_of(dtype).zero_shift ? 1 << fb_layout_of(dtype).zero_shift : 0;
    for (size_t p = 0; p < n_panels; p++) {
        const char *panel = panels + p * fb_panel_bytes(dtype, n_cols);
        for (size_t t = 0; t < n_tokens; t++)
            memset(y + t * ldy + p * FB_LANES, 0, FB_LANES * sizeof *y);
        for (size_t b = 0; b < n_cols / FB_BLOCK_COLUMNS; b++) {
            struct fb_unpacked_block block;
            fb_unpack_block(dtype, panel, b, &block);
            for (size_t t = 0; t < n_tokens; t++)
                for (size_t j = 0; j < FB_LANES; j++)
                    for (size_t g = 0; g < n_groups; g++) {
                        const struct fb_activation *in = &x[t * ldx + b];
                        float *out = &y[t * ldy + p * FB_LANES + j];
                        int32_t dot = 0;
                        for (size_t k = g * per_group; k < (g + 1) * per_group; k++)
                            dot += (block.codes[k / 4 * FB_LINE + 4 * j + k % 4] - zero) * in->codes[k];
                        *out = fmaf((float)dot, block.scale[g][j] * in->scale, *out);
                        if (fb_has_offset(dtype))
                            *out = fmaf(block.offset[g][j], in->sums[n_groups == 1 ? 0 : 1 + g], *out);
                    }
        }
    }
}
