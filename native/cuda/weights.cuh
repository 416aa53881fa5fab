/*
 * weights.cuh - 32 columns of one row of a weight, unpacked in registers. Panels are drawn in quant/layout.h
 * and quant/weight.h.
 *
 * The 16 lanes of a panel are 16 neighboring threads, so together each read below is one line of 64 bytes, or
 * half of one.
 *
 *   template            fb_chunk<D>, for D of every fb_dtype
 *   load(panel, n_cols, chunk, lane)   columns 32 chunk .. of row `lane`
 *   quad(q, w)          columns 4 q .. 4 q + 3 of the chunk as f32
 *   tested              test_cuda_rows: every format against fb_weight_unpack_row
 */
#ifndef FABULA_CUDA_WEIGHTS_CUH
#define FABULA_CUDA_WEIGHTS_CUH

#include "device.h"
#include "kernels.h"

enum { FB_CHUNK = 32, FB_MOST_SEGMENTS = 16 };

/* How the scales of a block are stored; see fb_scale_kind of quant/layout.h. */
enum fb_cuda_scales { FB_CUDA_D, FB_CUDA_D_M, FB_CUDA_K, FB_CUDA_K16, FB_CUDA_K16_M };

struct fb_cuda_layout {
    int bits, zero;
    enum fb_cuda_scales scales;
    int scale_bytes, super_bytes;
};

/* The numbers of fb_layout_of; a test compares them. */
static constexpr fb_cuda_layout fb_cuda_layout_of(fb_dtype dtype) {
    return dtype == FB_Q8_0     ? fb_cuda_layout{8, 128, FB_CUDA_D, 32, 0}
           : dtype == FB_IQ4_NL ? fb_cuda_layout{4, 128, FB_CUDA_D, 32, 0}
           : dtype == FB_Q4_0   ? fb_cuda_layout{4, 8, FB_CUDA_D, 32, 0}
           : dtype == FB_Q5_0   ? fb_cuda_layout{5, 16, FB_CUDA_D, 32, 0}
           : dtype == FB_Q4_1   ? fb_cuda_layout{4, 0, FB_CUDA_D_M, 64, 0}
           : dtype == FB_Q5_1   ? fb_cuda_layout{5, 0, FB_CUDA_D_M, 64, 0}
           : dtype == FB_Q4_K   ? fb_cuda_layout{4, 0, FB_CUDA_K, 32, 64}
           : dtype == FB_Q5_K   ? fb_cuda_layout{5, 0, FB_CUDA_K, 32, 64}
           : dtype == FB_Q6_K   ? fb_cuda_layout{6, 32, FB_CUDA_K16, 32, 32}
           : dtype == FB_Q3_K   ? fb_cuda_layout{3, 4, FB_CUDA_K16, 32, 32}
           : dtype == FB_Q2_K   ? fb_cuda_layout{2, 0, FB_CUDA_K16_M, 32, 64}
                                : fb_cuda_layout{0, 0, FB_CUDA_D, 0, 0};
}

/* Value `code` of iq4_nl's table (quant/blocks.h), from two words that hold it. */
FB_DEVICE int fb_iq4_nl_value(uint32_t code) {
    const uint64_t low = 0xF6EADDCFBFAD9881u, high = 0x7159453526190D01u;
    return (int8_t)((code < 8 ? low : high) >> (8 * (code & 7u)));
}

template <fb_dtype D> struct fb_chunk {
    static constexpr bool is_plain = false;
    static constexpr fb_cuda_layout layout = fb_cuda_layout_of(D);
    static constexpr bool has_offset = layout.scales == FB_CUDA_D_M || layout.scales == FB_CUDA_K ||
                                       layout.scales == FB_CUDA_K16_M;
    uint32_t raw[layout.bits];
    float scale[2], offset[2]; /* of columns 0 .. 15 and 16 .. 31 */

    __device__ void load(const char *panel, int32_t n_cols, int32_t chunk, int lane) {
        constexpr int block_bytes = layout.bits * 64 + layout.scale_bytes;
        (void)n_cols;
        const char *supers = panel + (int64_t)(chunk / 8) * (layout.super_bytes + 8 * block_bytes);
        const char *lines = supers + layout.super_bytes + chunk % 8 * block_bytes;
        const uint32_t *words = reinterpret_cast<const uint32_t *>(lines) + lane;
#pragma unroll
        for (int l = 0; l < layout.bits; l++)
            raw[l] = words[16 * l];
        const char *scales = lines + 64 * layout.bits;
        const uint16_t *halfs = reinterpret_cast<const uint16_t *>(scales);
        const uint16_t *wide = reinterpret_cast<const uint16_t *>(supers);
        const uint8_t *bytes = reinterpret_cast<const uint8_t *>(scales);
        offset[0] = offset[1] = 0.0f;
        if constexpr (layout.scales == FB_CUDA_D || layout.scales == FB_CUDA_D_M) {
            scale[0] = scale[1] = fb_float_of_f16(halfs[lane]);
            if constexpr (layout.scales == FB_CUDA_D_M) offset[0] = offset[1] = fb_float_of_f16(halfs[16 + lane]);
        } else if constexpr (layout.scales == FB_CUDA_K) {
            scale[0] = scale[1] = fb_float_of_f16(wide[lane]) * (float)bytes[lane];
            offset[0] = offset[1] = -(fb_float_of_f16(wide[16 + lane]) * (float)bytes[16 + lane]);
        } else {
#pragma unroll
            for (int g = 0; g < 2; g++) {
                const uint8_t both = bytes[16 * g + lane];
                if constexpr (layout.scales == FB_CUDA_K16) {
                    scale[g] = fb_float_of_f16(wide[lane]) * (float)(int8_t)both;
                } else {
                    scale[g] = fb_float_of_f16(wide[lane]) * (float)(both & 0xF);
                    offset[g] = -(fb_float_of_f16(wide[16 + lane]) * (float)(both >> 4));
                }
            }
        }
    }

    /* Columns 4 q .. 4 q + 3, with the bits of fb_unpack_row. q is a constant once loops are unrolled. */
    __device__ void quad(int q, float w[4]) const {
        uint32_t codes;
        if constexpr (layout.bits == 8)
            codes = raw[q];
        else if constexpr (layout.bits >= 4)
            codes = (raw[q % 4] >> (4 * (q / 4))) & 0x0F0F0F0Fu;
        else
            codes = (raw[q / 4] >> (2 * (q % 4))) & 0x03030303u;
        if constexpr (layout.bits == 6) codes |= ((raw[4 + q / 4] >> (2 * (q % 4))) & 0x03030303u) << 4;
        if constexpr (layout.bits == 5) codes |= ((raw[4] >> q) & 0x01010101u) << 4;
        if constexpr (layout.bits == 3) codes |= ((raw[2] >> q) & 0x01010101u) << 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t code = (codes >> (8 * i)) & 0xFFu;
            const int value = D == FB_IQ4_NL ? fb_iq4_nl_value(code) : (int)code - layout.zero;
            const float product = scale[q / 4] * (float)value;
            w[i] = has_offset ? product + offset[q / 4] : product;
        }
    }
};

/* Plain formats: columns past the last are 0. */
template <> struct fb_chunk<FB_F32> {
    static constexpr bool is_plain = true;
    static constexpr int line_bytes = 64;
    float values[FB_CHUNK];

    __device__ void load(const char *panel, int32_t n_cols, int32_t chunk, int lane) {
        const float *column = reinterpret_cast<const float *>(panel) + (int64_t)chunk * FB_CHUNK * 32 + lane;
        const int32_t rest = n_cols - chunk * FB_CHUNK;
#pragma unroll
        for (int k = 0; k < FB_CHUNK; k++)
            values[k] = k < rest ? column[32 * k] : 0.0f;
    }

    __device__ void quad(int q, float w[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = values[4 * q + i];
    }
};

template <> struct fb_chunk<FB_F16> {
    static constexpr bool is_plain = true;
    static constexpr int line_bytes = 32;
    uint16_t values[FB_CHUNK];

    __device__ void load(const char *panel, int32_t n_cols, int32_t chunk, int lane) {
        const uint16_t *column = reinterpret_cast<const uint16_t *>(panel) + (int64_t)chunk * FB_CHUNK * 32 + lane;
        const int32_t rest = n_cols - chunk * FB_CHUNK;
#pragma unroll
        for (int k = 0; k < FB_CHUNK; k++)
            values[k] = k < rest ? column[32 * k] : (uint16_t)0;
    }

    __device__ void quad(int q, float w[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = fb_float_of_f16(values[4 * q + i]);
    }
};

template <> struct fb_chunk<FB_BF16> {
    static constexpr bool is_plain = true;
    static constexpr int line_bytes = 64;
    uint32_t pairs[FB_CHUNK / 2];

    __device__ void load(const char *panel, int32_t n_cols, int32_t chunk, int lane) {
        const uint32_t *pair = reinterpret_cast<const uint32_t *>(panel) + (int64_t)chunk * FB_CHUNK / 2 * 32 + lane;
        const int32_t rest = n_cols - chunk * FB_CHUNK;
#pragma unroll
        for (int k = 0; k < FB_CHUNK / 2; k++)
            pairs[k] = 2 * k < rest ? pair[32 * k] : 0u;
    }

    __device__ void quad(int q, float w[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = fb_float_of_bf16(pairs[2 * q + i / 2] >> (16 * (i % 2)) & 0xFFFFu);
    }
};

/* Start of a panel. Two panels of the plain formats are interleaved line by line. */
template <fb_dtype D> FB_DEVICE const char *fb_panel_of(const fb_cuda_weight &weight, int32_t panel) {
    if constexpr (fb_chunk<D>::is_plain)
        return weight.panels + (size_t)(panel / 2 * 2) * weight.panel_bytes + panel % 2 * fb_chunk<D>::line_bytes;
    return weight.panels + (size_t)panel * weight.panel_bytes;
}

/* FB_FOR_DTYPE(dtype, what, ...): calls what<dtype>(...) for the format known at run time; -1 if it is
 * unknown. FB_FOR_DTYPE_BUT_F32: the same without f32, whose products run on ordinary cores. */
#define FB_FOR_DTYPE(dtype, what, ...)                                                                                 \
    (dtype) == FB_F32 ? what<FB_F32>(__VA_ARGS__) : FB_FOR_DTYPE_BUT_F32(dtype, what, __VA_ARGS__)

#define FB_FOR_DTYPE_BUT_F32(dtype, what, ...)                                                                         \
    (dtype) == FB_F16      ? what<FB_F16>(__VA_ARGS__)                                                                 \
    : (dtype) == FB_BF16   ? what<FB_BF16>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q4_0   ? what<FB_Q4_0>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q4_1   ? what<FB_Q4_1>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q5_0   ? what<FB_Q5_0>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q5_1   ? what<FB_Q5_1>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q8_0   ? what<FB_Q8_0>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q4_K   ? what<FB_Q4_K>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q5_K   ? what<FB_Q5_K>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q6_K   ? what<FB_Q6_K>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q2_K   ? what<FB_Q2_K>(__VA_ARGS__)                                                                \
    : (dtype) == FB_Q3_K   ? what<FB_Q3_K>(__VA_ARGS__)                                                                \
    : (dtype) == FB_IQ4_NL ? what<FB_IQ4_NL>(__VA_ARGS__)                                                              \
                           : -1

#endif
