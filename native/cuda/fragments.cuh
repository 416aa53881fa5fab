/*
 * fragments.cuh - 16 rows x 32 columns of a weight as two tiles of mma.cuh, loaded directly from a panel into
 * registers.
 *
 * A product does not depend on the order of a tile's rows and columns as long as weights, inputs and results
 * agree. The order is chosen so that a warp reads whole lines of a panel (drawn in quant/layout.h and
 * quant/weight.h). Lane 4 g + t has
 *
 *     rows       2 g and 2 g + 1 of the panel, as rows g and g + 8 of the tile
 *     columns    16 s + 4 t .. 16 s + 4 t + 3 in step s = 0, 1: one word of codes for each row
 *
 * so inputs are stored in chunks of 32 columns in the order of fb_input_index. Codes become integers in f16,
 * which is exact; scales are applied after the product, in f32.
 */
#ifndef FABULA_CUDA_FRAGMENTS_CUH
#define FABULA_CUDA_FRAGMENTS_CUH

#include "mma.cuh"
#include "weights.cuh"

/* Index of column 0 .. 31 in a chunk of inputs: the 16 bytes that a lane loads at once are its columns of
 * both steps. */
FB_BOTH int fb_input_index(int column) {
    return column % 16 / 4 * 8 + column / 16 * 4 + column % 4;
}

/* One of the two f16 of a word, e.g. one per row of the lane. */
FB_DEVICE float fb_half_of(uint32_t word, int which) {
    return fb_float_of_f16((uint16_t)(word >> (16 * which)));
}

/* iq4_nl's values + 128 for four codes: bytes of two tables of 8, selected by the fourth bit. */
FB_DEVICE uint32_t fb_iq4_nl_values(uint32_t codes) {
    const uint32_t pairs = codes | (codes >> 4), which = fb_byte_perm(pairs, 0u, 0x4420u) & 0x7777u;
    const uint32_t low = fb_byte_perm(0x3F2D1801u, 0x766A5D4Fu, which);
    const uint32_t high = fb_byte_perm(0xA6998D81u, 0xF1D9C5B5u, which);
    const uint32_t is_high = ((codes >> 3) & 0x01010101u) * 0xFFu;
    return (low & ~is_high) | (high & is_high);
}

template <fb_dtype D> struct fb_fragments {
    static constexpr fb_cuda_layout layout = fb_cuda_layout_of(D);
    static constexpr bool is_scaled = true, has_offset = fb_chunk<D>::has_offset;
    static constexpr int n_groups = layout.scales == FB_CUDA_K16 || layout.scales == FB_CUDA_K16_M ? 2
                                                                                                   : 1; /* of columns */
    static constexpr int n_words = layout.bits == 4 ? 1 : layout.bits == 6 || layout.bits == 3 ? 3 : 2;
    fb_words2 raw[n_words]; /* of both rows */
    uint32_t wide[2];       /* f16 of both rows: d and m, or D and M */
    uint32_t narrow[2];     /* bytes of both rows: s and m, or s of each group */

    __device__ void load(const char *panel, int32_t n_cols, int32_t chunk, int lane) {
        constexpr int block_bytes = layout.bits * 64 + layout.scale_bytes;
        (void)n_cols;
        const int rows = lane / 4, t = lane % 4;
        const char *supers = panel + (int64_t)(chunk / 8) * (layout.super_bytes + 8 * block_bytes);
        const char *lines = supers + layout.super_bytes + chunk % 8 * block_bytes;
        const fb_words2 *line = reinterpret_cast<const fb_words2 *>(lines) + rows; /* 8 of them are a line */
        if constexpr (layout.bits == 8) {
            raw[0] = line[8 * t];
            raw[1] = line[8 * (4 + t)];
        } else if constexpr (layout.bits >= 4) {
            raw[0] = line[8 * t];
#pragma unroll
            for (int i = 1; i < n_words; i++)
                raw[i] = line[8 * (3 + i)];
        } else {
#pragma unroll
            for (int i = 0; i < n_words; i++)
                raw[i] = line[8 * i];
        }
        const char *scales = lines + 64 * layout.bits;
        const uint32_t *halfs = reinterpret_cast<const uint32_t *>(layout.super_bytes ? supers : scales);
        wide[0] = halfs[rows];
        if constexpr (has_offset) wide[1] = halfs[8 + rows];
        if constexpr (layout.super_bytes != 0) {
            const uint16_t *bytes = reinterpret_cast<const uint16_t *>(scales);
            narrow[0] = bytes[rows];
            narrow[1] = bytes[8 + rows];
        }
    }

    /* Codes of columns 4 t .. 4 t + 3 of step s, of one of the lane's rows. */
    __device__ uint32_t codes(int s, int row, int t) const {
        uint32_t four = raw[layout.bits == 8 || layout.bits < 4 ? s : 0].word[row];
        if constexpr (layout.bits < 4) four = (four >> (2 * t)) & 0x03030303u;
        if constexpr (layout.bits >= 4 && layout.bits < 8) four = (four >> (4 * s)) & 0x0F0F0F0Fu;
        if constexpr (layout.bits == 6) four |= ((raw[1 + s].word[row] >> (2 * t)) & 0x03030303u) << 4;
        if constexpr (layout.bits == 5) four |= ((raw[1].word[row] >> (4 * s + t)) & 0x01010101u) << 4;
        if constexpr (layout.bits == 3) four |= ((raw[2].word[row] >> (4 * s + t)) & 0x01010101u) << 2;
        return D == FB_IQ4_NL ? fb_iq4_nl_values(four) : four;
    }

    /* Unpacks step s. A byte after 0x64 is the f16 number 1024 + byte. */
    __device__ void unpack(int s, int lane, uint32_t a[4]) const {
        constexpr uint32_t zero = (uint32_t)(0x6400 + layout.zero) * 0x10001u;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const uint32_t four = codes(s, row, lane % 4);
            a[row] = fb_half2_sub(fb_byte_perm(four, 0x64646464u, 0x4140u), zero);
            a[2 + row] = fb_half2_sub(fb_byte_perm(four, 0x64646464u, 0x4342u), zero);
        }
    }

    __device__ float scale(int group, int row) const {
        const float d = fb_half_of(wide[0], row);
        if constexpr (layout.super_bytes == 0) {
            return d;
        } else {
            const uint32_t byte = (narrow[n_groups == 2 ? group : 0] >> (8 * row)) & 0xFFu;
            return d * (layout.scales == FB_CUDA_K16    ? (float)(int8_t)byte
                           : layout.scales == FB_CUDA_K ? (float)byte
                                                        : (float)(byte & 0xFu));
        }
    }

    __device__ float offset(int group, int row) const {
        const float m = fb_half_of(wide[1], row);
        if constexpr (layout.super_bytes == 0) {
            return m;
        } else {
            const uint32_t byte = (narrow[n_groups == 2 ? group : 1] >> (8 * row)) & 0xFFu;
            return -(m * (float)(layout.scales == FB_CUDA_K ? byte : byte >> 4));
        }
    }
};

/* Columns past the last are 0. */
template <> struct fb_fragments<FB_F16> {
    static constexpr int n_groups = 1;
    static constexpr bool is_scaled = false, has_offset = false;
    uint32_t raw[8]; /* of 4 columns of each step, both rows */

    __device__ void load(const char *panel, int32_t n_cols, int32_t chunk, int lane) {
        const int32_t first = chunk * FB_CHUNK + lane % 4 * 4;
        const uint32_t *rows = reinterpret_cast<const uint32_t *>(panel) +
                               lane / 4; /* 16 of them are a column of two panels */
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int32_t column = first + i / 4 * 16 + i % 4;
            raw[i] = column < n_cols ? rows[(int64_t)column * 16] : 0u;
        }
    }

    __device__ void unpack(int s, int, uint32_t a[4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t left = raw[4 * s + 2 * i], right = raw[4 * s + 2 * i + 1];
            a[2 * i] = fb_byte_perm(left, right, 0x5410u);
            a[2 * i + 1] = fb_byte_perm(left, right, 0x7632u);
        }
    }
};

template <> struct fb_fragments<FB_BF16> {
    static constexpr int n_groups = 1;
    static constexpr bool is_scaled = false, has_offset = false;
    fb_words2 raw[4]; /* two pairs of columns of each step, both rows */

    __device__ void load(const char *panel, int32_t n_cols, int32_t chunk, int lane) {
        const int32_t first = chunk * FB_CHUNK + lane % 4 * 4;
        const fb_words2 *rows = reinterpret_cast<const fb_words2 *>(panel) +
                                lane / 4; /* 16 of them are a pair of columns of two panels */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t column = first + i / 2 * 16 + i % 2 * 2;
            raw[i] = column < n_cols ? rows[(int64_t)(column / 2) * 16] : fb_words2{{0u, 0u}};
        }
    }

    __device__ void unpack(int s, int, uint32_t a[4]) const {
        a[0] = raw[2 * s].word[0];
        a[1] = raw[2 * s].word[1];
        a[2] = raw[2 * s + 1].word[0];
        a[3] = raw[2 * s + 1].word[1];
    }
};

#endif
