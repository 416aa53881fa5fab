/* weight.c - packs rows into panels and unpacks them. See weight.h. */
#include "quant/weight.h"

#include "base/float_mode.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/team.h"
#include "kernels/kernels.h"
#include "quant/convert.h"
#include "quant/dequantize.h"
#include "quant/quantize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_DIMENSION = 1 << 30,
    MAX_EXPERTS = 1024,
    CHUNK = 256 /* columns converted at a time: 16 rows of them stay in L1, and every block size divides it */
};

static bool is_plain(enum fb_dtype dtype) {
    return dtype == FB_F32 || dtype == FB_F16 || dtype == FB_BF16;
}

enum fb_status fb_weight_create(enum fb_dtype dtype, int32_t n_rows, int32_t n_cols, fb_weight **out) {
    return fb_weight_create_experts(dtype, 1, n_rows, n_cols, out);
}

enum fb_status fb_weight_create_experts(
    enum fb_dtype dtype, int32_t n_experts, int32_t n_rows, int32_t n_cols, fb_weight **out) {
    FB_REQUIRE(out, "out is null");
    FB_REQUIRE(n_experts >= 1 && n_experts <= MAX_EXPERTS, "n_experts is %d, must be 1 .. %d", n_experts, MAX_EXPERTS);
    const int32_t block_size = fb_dtype_block_size(dtype);
    FB_REQUIRE(block_size > 0, "dtype is %d, must be one of enum fb_dtype", (int)dtype);
    FB_REQUIRE(n_rows >= 1 && n_rows <= MAX_DIMENSION, "n_rows is %d, must be 1 .. 2^30", n_rows);
    FB_REQUIRE(n_cols >= 1 && n_cols <= MAX_DIMENSION, "n_cols is %d, must be 1 .. 2^30", n_cols);
    FB_REQUIRE(n_cols % block_size == 0, "rows of %d elements are not whole blocks of %d", n_cols, block_size);
    int32_t n_panels = (n_rows + 15) / 16;
    const size_t n_stored = is_plain(dtype) ? ((size_t)n_panels + 1) / 2 * 2 : (size_t)n_panels;
    const size_t n_held = dtype == FB_BF16 ? ((size_t)n_cols + 1) / 2 * 2 : (size_t)n_cols;
    const size_t panel_bytes = is_plain(dtype) ? n_held * 16 * fb_dtype_block_bytes(dtype)
                                               : fb_panel_bytes(dtype, (size_t)n_cols);
    size_t n_bytes;
    if (!fb_size_multiply(n_stored, panel_bytes, &n_bytes) || !fb_size_multiply(n_bytes, (size_t)n_experts, &n_bytes))
        return fb_fail(FB_OUT_OF_MEMORY, "a weight of %d x %d x %d does not fit memory", n_experts, n_rows, n_cols);
    struct fb_weight *weight = calloc(1, sizeof *weight);
    char *panels = weight ? fb_memory_allocate(n_bytes) : NULL;
    if (!panels) {
        free(weight);
        return fb_fail(
            FB_OUT_OF_MEMORY, "no memory for a weight of %d x %d x %d (%zu bytes)", n_experts, n_rows, n_cols, n_bytes);
    }
    weight->dtype = dtype;
    weight->n_experts = n_experts;
    weight->expert_panels = (int32_t)n_stored;
    weight->n_rows = n_rows;
    weight->n_cols = n_cols;
    weight->n_panels = n_panels;
    weight->panel_bytes = panel_bytes;
    weight->n_bytes = n_bytes;
    weight->panels = panels;
    *out = weight;
    return FB_OK;
}

enum fb_status fb_weight_use_f32_inputs(fb_weight *weight) {
    FB_REQUIRE(weight, "weight is null");
    FB_REQUIRE(weight->dtype == FB_BF16,
        "only products with bf16 weights have a choice of inputs, the weight is in dtype %d", (int)weight->dtype);
    weight->takes_f32 = true;
    return FB_OK;
}

struct packing {
    struct fb_weight *weight;
    const struct fb_kernels *kernels;
    const char *src;
    enum fb_dtype src_dtype;
    size_t row_bytes, block_bytes;
    int32_t block_size, first_row, row_block, row_step, n_rows;
    int64_t first_panel; /* of the expert */
};

/* The source row that becomes row `row` of the weight, -1 for none. */
static int32_t source_row(const struct packing *job, int64_t row) {
    const int64_t offset = row - job->first_row, period = (int64_t)job->row_block * job->row_step;
    if (offset < 0 || offset % period >= job->row_block) return -1;
    const int64_t source = offset / period * job->row_block + offset % period;
    return source < job->n_rows ? (int32_t)source : -1;
}

/* Counts NaN and infinity: the numbers whose exponent bits are all set. */
static int64_t count_non_finite(const float *x, size_t n) {
    int64_t count = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        count += (bits & 0x7f800000u) == 0x7f800000u;
    }
    return count;
}

static const char *source_at(const struct packing *job, int32_t row, int32_t column) {
    return job->src + (size_t)row * job->row_bytes + (size_t)(column / job->block_size) * job->block_bytes;
}

/* Elements from a row's column to its next in two panels side by side; bf16: from a pair of columns to the
 * next. */
enum { STEP = 2 * FB_LANES, PAIR_STEP = 4 * FB_LANES };

/* Address of column 0 of a row of a plain format; rows are counted through all panels. */
static void *plain_row(const struct fb_weight *weight, int64_t row) {
    const size_t panel = (size_t)row / FB_LANES, lane = (size_t)row % FB_LANES;
    const size_t line = weight->dtype == FB_BF16 ? 2 * FB_LANES : FB_LANES;
    const size_t element = panel % 2 * line + lane * line / FB_LANES;
    return fb_weight_panel(weight, panel / 2 * 2) + element * fb_dtype_block_bytes(weight->dtype);
}

/* Plain formats: in chunks of columns, rows are dequantized to f32, narrowed to the weight's format and
 * transposed. */
static int64_t pack_plain(const struct packing *job, const int32_t source[16], int64_t first_row) {
    const struct fb_weight *weight = job->weight;
    const int32_t n_cols = weight->n_cols;
    int64_t non_finite = 0;
    float wide[CHUNK];
    uint32_t narrow[CHUNK]; /* fits any plain format */
    for (int32_t k = 0; k < n_cols; k += CHUNK) {
        const size_t length = n_cols - k < CHUNK ? (size_t)(n_cols - k) : CHUNK;
        for (int32_t j = 0; j < 16; j++) {
            if (source[j] < 0) continue;
            fb_dequantize_row(job->src_dtype, source_at(job, source[j], k), length, wide);
            job->kernels->narrow[weight->dtype](wide, length, narrow);
            if (weight->dtype != FB_F32) job->kernels->widen[weight->dtype](narrow, length, wide);
            non_finite += count_non_finite(wide, length);
            void *row = plain_row(weight, first_row + j);
            if (weight->dtype == FB_F32) {
                uint32_t *out = (uint32_t *)row + (size_t)k * STEP;
                for (size_t i = 0; i < length; i++)
                    out[i * STEP] = narrow[i];
            } else if (weight->dtype == FB_BF16) {
                const uint16_t *halfs = (const uint16_t *)narrow;
                uint16_t *out = (uint16_t *)row + (size_t)k / 2 * PAIR_STEP; /* CHUNK is even */
                for (size_t i = 0; i < length; i++)
                    out[i / 2 * PAIR_STEP + i % 2] = halfs[i];
            } else {
                const uint16_t *halfs = (const uint16_t *)narrow;
                uint16_t *out = (uint16_t *)row + (size_t)k * STEP;
                for (size_t i = 0; i < length; i++)
                    out[i * STEP] = halfs[i];
            }
        }
    }
    return non_finite;
}

/* Quantizes f32 to the weight's format. Numbers that it cannot hold become blocks of NaN, which the
 * non-finite count then reports. */
static void quantize_chunk(enum fb_dtype dtype, const float *wide, size_t length, char *out) {
    const size_t n_blocks = length / (size_t)fb_dtype_block_size(dtype), block_bytes = fb_dtype_block_bytes(dtype);
    if (count_non_finite(wide, length) || fb_quantize_blocks(dtype, wide, n_blocks, out) < n_blocks)
        memset(out, 0xff, n_blocks * block_bytes);
}

static int64_t pack_blocks(const struct packing *job, const int32_t source[16], char *panel) {
    const struct fb_weight *weight = job->weight;
    const size_t n_cols = (size_t)weight->n_cols;
    const char *rows[16] = {0};
    if (job->src_dtype == weight->dtype) {
        for (int32_t j = 0; j < 16; j++)
            if (source[j] >= 0) rows[j] = source_at(job, source[j], 0);
        return fb_pack_panel(weight->dtype, rows, 0, n_cols / FB_BLOCK_COLUMNS, panel);
    }
    int64_t non_finite = 0;
    float wide[CHUNK];
    char blocks[16][CHUNK * 2]; /* a format takes at most 272 bytes for 256 elements */
    for (size_t k = 0; k < n_cols; k += CHUNK) {
        const size_t length = n_cols - k < CHUNK ? n_cols - k : CHUNK;
        for (int32_t j = 0; j < 16; j++) {
            if (source[j] < 0) continue;
            fb_dequantize_row(job->src_dtype, source_at(job, source[j], (int32_t)k), length, wide);
            quantize_chunk(weight->dtype, wide, length, blocks[j]);
            rows[j] = blocks[j];
        }
        non_finite += fb_pack_panel(weight->dtype, rows, k / FB_BLOCK_COLUMNS, length / FB_BLOCK_COLUMNS, panel);
    }
    return non_finite;
}

/* Fills the rows of one panel that come from the source. */
static void pack_one_panel(void *context, int64_t index, int thread) {
    (void)thread;
    const struct packing *job = context;
    const int64_t number = job->first_row / 16 + index;
    int32_t source[16];
    for (int32_t j = 0; j < 16; j++)
        source[j] = source_row(job, 16 * number + j);
    const int64_t panel = job->first_panel + number;
    const int64_t non_finite = is_plain(job->weight->dtype)
                                   ? pack_plain(job, source, 16 * panel)
                                   : pack_blocks(job, source, fb_weight_panel(job->weight, (size_t)panel));
    if (non_finite) atomic_fetch_add(&job->weight->non_finite, non_finite);
}

enum fb_status fb_weight_pack_rows(fb_weight *weight, int32_t first_row, int32_t row_block, int32_t row_step,
    enum fb_dtype src_dtype, const void *src, size_t src_bytes, int32_t n_rows, int32_t n_threads) {
    return fb_weight_pack_expert(
        weight, 0, first_row, row_block, row_step, src_dtype, src, src_bytes, n_rows, n_threads);
}

enum fb_status fb_weight_pack_expert(fb_weight *weight, int32_t expert, int32_t first_row, int32_t row_block,
    int32_t row_step, enum fb_dtype src_dtype, const void *src, size_t src_bytes, int32_t n_rows, int32_t n_threads) {
    FB_REQUIRE(weight && src, "weight or src is null");
    FB_REQUIRE(expert >= 0 && expert < weight->n_experts, "expert %d of %d", expert, weight->n_experts);
    FB_REQUIRE(!weight->device, "the weight is on a device");
    int32_t block_size = fb_dtype_block_size(src_dtype);
    FB_REQUIRE(block_size > 0, "src_dtype %d is unknown", (int)src_dtype);
    FB_REQUIRE(n_rows >= 1 && first_row >= 0 && row_block >= 1 && row_step >= 1,
        "n_rows %d, first_row %d, row_block %d, row_step %d: first_row must be 0 or more, the others 1 or more", n_rows,
        first_row, row_block, row_step);
    FB_REQUIRE(n_threads >= 1, "n_threads is %d, must be 1 or more", n_threads);
    FB_REQUIRE(
        weight->n_cols % block_size == 0, "rows of %d elements are not whole blocks of %d", weight->n_cols, block_size);
    int64_t last = (int64_t)n_rows - 1;
    int64_t end = first_row + last / row_block * row_block * row_step + last % row_block;
    FB_REQUIRE(end < weight->n_rows, "the last row would be %lld, the weight has %d", (long long)end, weight->n_rows);
    size_t block_bytes = fb_dtype_block_bytes(src_dtype);
    size_t row_bytes = (size_t)(weight->n_cols / block_size) * block_bytes, wanted;
    FB_REQUIRE(fb_size_multiply(row_bytes, (size_t)n_rows, &wanted) && wanted == src_bytes,
        "src has %zu bytes, %d rows of %zu are needed", src_bytes, n_rows, row_bytes);
    struct packing job = {.weight = weight,
        .kernels = fb_kernels_of(fb_isa_best()),
        .src = src,
        .src_dtype = src_dtype,
        .row_bytes = row_bytes,
        .block_bytes = block_bytes,
        .block_size = block_size,
        .first_row = first_row,
        .row_block = row_block,
        .row_step = row_step,
        .n_rows = n_rows,
        .first_panel = (int64_t)expert * weight->expert_panels};
    fb_team_run(pack_one_panel, &job, end / 16 - first_row / 16 + 1, n_threads);
    return FB_OK;
}

/* Rows are counted through all panels. */
static void unpack(const struct fb_weight *weight, int64_t row, float *dst) {
    const size_t n = (size_t)weight->n_cols;
    if (!is_plain(weight->dtype)) {
        fb_unpack_row(weight->dtype, fb_weight_panel(weight, (size_t)(row / 16)), n, (size_t)(row % 16), dst);
        return;
    }
    const void *from = plain_row(weight, row);
    if (weight->dtype == FB_F32) {
        for (size_t k = 0; k < n; k++)
            dst[k] = ((const float *)from)[k * STEP];
    } else if (weight->dtype == FB_F16) {
        for (size_t k = 0; k < n; k++)
            dst[k] = fb_f16_to_f32(((const uint16_t *)from)[k * STEP]);
    } else {
        for (size_t k = 0; k < n; k++)
            dst[k] = fb_bf16_to_f32(((const uint16_t *)from)[k / 2 * PAIR_STEP + k % 2]);
    }
}

void fb_weight_gather_row(const struct fb_weight *weight, int32_t row, float *dst) {
    unpack(weight, row, dst);
}

enum fb_status fb_weight_unpack_row(const fb_weight *weight, int32_t row, float *dst) {
    FB_REQUIRE(weight && dst, "weight or dst is null");
    FB_REQUIRE(!weight->device, "the weight is on a device");
    const int64_t n_rows = (int64_t)weight->n_experts * weight->n_rows;
    FB_REQUIRE(row >= 0 && row < n_rows, "row is %d, must be 0 .. %lld", row, (long long)n_rows - 1);
    const int64_t first = (int64_t)row / weight->n_rows * weight->expert_panels * FB_LANES; /* of its expert */
    const fb_float_mode mode = fb_float_mode_enter();
    unpack(weight, first + row % weight->n_rows, dst);
    fb_float_mode_leave(mode);
    return FB_OK;
}

enum fb_status fb_weight_move(fb_weight *weight, fb_device *device) {
    FB_REQUIRE(weight && device, "weight or device is null");
    FB_REQUIRE(!weight->device, "the weight is already on a device");
    void *panels;
    FB_TRY(fb_device_allocate(device, "a weight", weight->n_bytes, &panels));
    const enum fb_status status = device->kind->copy(
        device->index, FB_TO_DEVICE, panels, weight->panels, weight->n_bytes);
    if (status != FB_OK) {
        fb_device_release(device, panels, weight->n_bytes);
        return status;
    }
    fb_memory_release(weight->panels, weight->n_bytes);
    weight->panels = panels;
    weight->device = device;
    return FB_OK;
}

int64_t fb_weight_non_finite(const fb_weight *weight) {
    return weight ? atomic_load(&weight->non_finite) : 0;
}

size_t fb_weight_bytes(const fb_weight *weight) {
    return weight ? weight->n_bytes : 0;
}

void fb_weight_free(fb_weight *weight) {
    if (!weight) return;
    if (weight->device)
        fb_device_release(weight->device, weight->panels, weight->n_bytes);
    else
        fb_memory_release(weight->panels, weight->n_bytes);
    free(weight);
}
