/* weight.c - packing rows into panels, and reading one back. See weight.h. */
#include "quant/weight.h"

#include "base/memory.h"
#include "base/status.h"
#include "base/team.h"
#include "kernels/kernels.h"
#include "quant/convert.h"
#include "quant/dequantize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_DIMENSION = 1 << 30,
    CHUNK = 256 /* columns converted at a time: 16 rows x 256 floats stay in L1, and every block format divides it */
};

static bool is_plain(enum fb_dtype dtype) {
    return dtype == FB_F32 || dtype == FB_F16 || dtype == FB_BF16;
}

enum fb_status fb_weight_create(enum fb_dtype dtype, int32_t n_rows, int32_t n_cols, fb_weight **out) {
    FB_REQUIRE(out, "out is null");
    FB_REQUIRE(is_plain(dtype), "weights are held in f32, f16 or bf16, not in dtype %d", (int)dtype);
    FB_REQUIRE(n_rows >= 1 && n_rows <= MAX_DIMENSION, "n_rows is %d, must be 1 .. 2^30", n_rows);
    FB_REQUIRE(n_cols >= 1 && n_cols <= MAX_DIMENSION, "n_cols is %d, must be 1 .. 2^30", n_cols);
    int32_t n_panels = (n_rows + 15) / 16;
    size_t element_bytes = fb_dtype_block_bytes(dtype), n_bytes;
    if (!fb_size_multiply((size_t)n_panels * 16 * element_bytes, (size_t)n_cols, &n_bytes))
        return fb_fail(FB_OUT_OF_MEMORY, "a weight of %d x %d does not fit memory", n_rows, n_cols);
    struct fb_weight *weight = calloc(1, sizeof *weight);
    char *panels = weight ? fb_memory_take(n_bytes) : NULL;
    if (!panels) {
        free(weight);
        return fb_fail(FB_OUT_OF_MEMORY, "no memory for a weight of %d x %d (%zu bytes)", n_rows, n_cols, n_bytes);
    }
    weight->dtype = dtype;
    weight->n_rows = n_rows;
    weight->n_cols = n_cols;
    weight->n_panels = n_panels;
    weight->element_bytes = element_bytes;
    weight->n_bytes = n_bytes;
    weight->panels = panels;
    *out = weight;
    return FB_OK;
}

struct packing {
    struct fb_weight *weight;
    const struct fb_kernels *kernels;
    const char *src;
    enum fb_dtype src_dtype;
    size_t row_bytes, block_bytes;
    int32_t block_size, first_row, row_block, row_step, n_rows;
};

/* Where source row i goes. */
static int32_t target_row(const struct packing *job, int32_t i) {
    return job->first_row + i / job->row_block * job->row_block * job->row_step + i % job->row_block;
}

/* Counts NaN and infinity, which alone have all exponent bits set. */
static int64_t count_non_finite(const float *x, size_t n) {
    int64_t count = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        count += (bits & 0x7f800000u) == 0x7f800000u;
    }
    return count;
}

/* Packs source rows 16 index .. 16 index + 15: chunk by chunk they become f32, then the weight's format, then
 * columns. */
static void pack_sixteen(void *context, int64_t index, int thread) {
    (void)thread;
    const struct packing *job = context;
    struct fb_weight *weight = job->weight;
    const int32_t first = (int32_t)index * 16, count = job->n_rows - first < 16 ? job->n_rows - first : 16;
    const int32_t n_cols = weight->n_cols;
    char *target[16]; /* first element of each row inside its panel */
    for (int32_t j = 0; j < count; j++) {
        int32_t row = target_row(job, first + j);
        size_t element = (size_t)(row / 16) * fb_weight_panel_stride(weight) + (size_t)(row % 16);
        target[j] = weight->panels + element * weight->element_bytes;
    }
    int64_t non_finite = 0;
    float wide[CHUNK];
    uint32_t narrow[CHUNK]; /* room for any plain format */
    for (int32_t k = 0; k < n_cols; k += CHUNK) {
        const size_t length = n_cols - k < CHUNK ? (size_t)(n_cols - k) : CHUNK;
        for (int32_t j = 0; j < count; j++) {
            const char *src = job->src + (size_t)(first + j) * job->row_bytes +
                              (size_t)(k / job->block_size) * job->block_bytes;
            fb_dequantize_row(job->src_dtype, src, length, wide);
            job->kernels->narrow[weight->dtype](wide, length, narrow);
            if (weight->dtype != FB_F32) job->kernels->widen[weight->dtype](narrow, length, wide);
            non_finite += count_non_finite(wide, length);
            if (weight->element_bytes == 4) {
                uint32_t *out = (uint32_t *)target[j] + (size_t)k * 16;
                for (size_t i = 0; i < length; i++)
                    out[i * 16] = narrow[i];
            } else {
                const uint16_t *halfs = (const uint16_t *)narrow;
                uint16_t *out = (uint16_t *)target[j] + (size_t)k * 16;
                for (size_t i = 0; i < length; i++)
                    out[i * 16] = halfs[i];
            }
        }
    }
    if (non_finite) atomic_fetch_add(&weight->non_finite, non_finite);
}

enum fb_status fb_weight_pack_rows(fb_weight *weight, int32_t first_row, int32_t row_block, int32_t row_step,
    enum fb_dtype src_dtype, const void *src, size_t src_bytes, int32_t n_rows, int32_t n_threads) {
    FB_REQUIRE(weight && src, "weight or src is null");
    int32_t block_size = fb_dtype_block_size(src_dtype);
    FB_REQUIRE(block_size > 0, "src_dtype %d is unknown", (int)src_dtype);
    FB_REQUIRE(n_rows >= 1 && first_row >= 0 && row_block >= 1 && row_step >= 1,
        "n_rows %d, first_row %d, row_block %d, row_step %d: the second from 0, the others from 1", n_rows, first_row,
        row_block, row_step);
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
        .n_rows = n_rows};
    fb_team_run(pack_sixteen, &job, (n_rows + 15) / 16, n_threads);
    return FB_OK;
}

void fb_weight_gather_row(const struct fb_weight *weight, int32_t row, float *dst) {
    const char *panel = fb_weight_panel(weight, (size_t)(row / 16));
    const size_t lane = (size_t)(row % 16), n = (size_t)weight->n_cols;
    if (weight->dtype == FB_F32) {
        for (size_t k = 0; k < n; k++)
            dst[k] = ((const float *)panel)[k * 16 + lane];
    } else if (weight->dtype == FB_F16) {
        for (size_t k = 0; k < n; k++)
            dst[k] = fb_f16_to_f32(((const uint16_t *)panel)[k * 16 + lane]);
    } else {
        for (size_t k = 0; k < n; k++)
            dst[k] = fb_bf16_to_f32(((const uint16_t *)panel)[k * 16 + lane]);
    }
}

enum fb_status fb_weight_unpack_row(const fb_weight *weight, int32_t row, float *dst) {
    FB_REQUIRE(weight && dst, "weight or dst is null");
    FB_REQUIRE(row >= 0 && row < weight->n_rows, "row is %d, must be 0 .. %d", row, weight->n_rows - 1);
    fb_weight_gather_row(weight, row, dst);
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
    fb_memory_release(weight->panels, weight->n_bytes);
    free(weight);
}
