/* weight.c - packs rows into panels and unpacks them. See weight.h. */
#include "quant/weight.h"

#include "base/affinity.h"
#include "base/float_mode.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/team.h"
#include "kernels/kernels.h"
#include "quant/convert.h"
#include "quant/dequantize.h"
#include "quant/quantize.h"

#include <errno.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
    int32_t src_row; /* the source's row at `src` */
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
    return job->src + (size_t)(row - job->src_row) * job->row_bytes +
           (size_t)(column / job->block_size) * job->block_bytes;
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

/* Fills the rows of one panel that come from the source; returns how many elements are not finite. */
static int64_t pack_panel(const struct packing *job, int64_t number) {
    int32_t source[16], n = 0;
    for (int32_t j = 0; j < 16; j++) {
        source[j] = source_row(job, 16 * number + j);
        n += source[j] >= 0;
    }
    if (n == 0) return 0;
    const int64_t panel = job->first_panel + number;
    return is_plain(job->weight->dtype) ? pack_plain(job, source, 16 * panel)
                                        : pack_blocks(job, source, fb_weight_panel(job->weight, (size_t)panel));
}

static void pack_one_panel(void *context, int64_t index, int thread) {
    (void)thread;
    const struct packing *job = context;
    const int64_t non_finite = pack_panel(job, job->first_row / 16 + index);
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

/* ---- From files -------------------------------------------------------------------------------------------------- */

enum { PIECE_BYTES = 256 << 10 }; /* read at a time: it is packed from L2, and a read costs little beside it */

/* One part of fb_weights_pack_files. Its items are groups of panels. */
struct file_job {
    struct packing job; /* `src` is set for each piece */
    struct fb_file_rows *part;
    int64_t first_panel, n_panels, item_panels, n_items;
};

struct file_jobs {
    struct file_job *all;
    int32_t n;
    struct fb_counter *counters; /* [n][n_threads] */
    char *pieces;                /* [n_threads][piece_bytes] */
    size_t piece_bytes;
    const int32_t *stop;
    int64_t *n_read;
    atomic_int failed;
};

static enum fb_status make_file_job(struct fb_file_rows *part, int32_t i, struct file_job *out, size_t *piece_bytes) {
    fb_weight *weight = part->weight;
    FB_REQUIRE(weight && !weight->device, "part %d: weight is null or on a device", i);
    FB_REQUIRE(weight->n_experts == 1, "part %d: weights of experts are packed one by one", i);
    const int32_t block_size = fb_dtype_block_size(part->src_dtype);
    FB_REQUIRE(block_size > 0 && weight->n_cols % block_size == 0,
        "part %d: rows of %d elements are not whole blocks of src_dtype %d", i, weight->n_cols, (int)part->src_dtype);
    FB_REQUIRE(part->file >= 0 && part->offset >= 0, "part %d: file %d, offset %lld must be 0 or more", i, part->file,
        (long long)part->offset);
    FB_REQUIRE(part->n_rows >= 1 && part->first_row >= 0 && part->row_block >= 1 && part->row_step >= 1 &&
                   part->first_row % 16 == 0 && (part->row_step == 1 || part->row_block % 16 == 0),
        "part %d: n_rows %d, first_row %d, row_block %d, row_step %d: parts must start at a panel of 16 rows", i,
        part->n_rows, part->first_row, part->row_block, part->row_step);
    const int64_t last = (int64_t)part->n_rows - 1, block = part->row_block;
    const int64_t end = part->first_row + last / block * block * part->row_step + last % block;
    FB_REQUIRE(end < weight->n_rows, "part %d: the last row would be %lld, the weight has %d", i, (long long)end,
        weight->n_rows);
    const size_t block_bytes = fb_dtype_block_bytes(part->src_dtype);
    const size_t row_bytes = (size_t)(weight->n_cols / block_size) * block_bytes;
    *out = (struct file_job){.job = {.weight = weight,
                                 .kernels = fb_kernels_of(fb_isa_best()),
                                 .src_dtype = part->src_dtype,
                                 .row_bytes = row_bytes,
                                 .block_bytes = block_bytes,
                                 .block_size = block_size,
                                 .first_row = part->first_row,
                                 .row_block = part->row_block,
                                 .row_step = part->row_step,
                                 .n_rows = part->n_rows},
        .part = part,
        .first_panel = part->first_row / 16,
        .n_panels = end / 16 - part->first_row / 16 + 1};
    /* An even number: two panels of a plain format share cache lines. */
    const int64_t pairs = (int64_t)(PIECE_BYTES / (32 * row_bytes));
    out->item_panels = pairs < 1 ? 2 : 2 * pairs;
    out->n_items = (out->n_panels + out->item_panels - 1) / out->item_panels;
    const size_t n_bytes = 16 * (size_t)out->item_panels * row_bytes;
    if (n_bytes > *piece_bytes) *piece_bytes = n_bytes;
    part->error = 0;
    part->n_non_finite = 0;
    return FB_OK;
}

/* Reads n_bytes at `offset`; 0, an errno, or -1 at the end of the file. */
static int32_t read_piece(int file, int64_t offset, size_t n_bytes, char *out) {
    for (size_t done = 0; done < n_bytes;) {
        const ssize_t n = pread(file, out + done, n_bytes - done, (off_t)(offset + (int64_t)done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errno;
        if (n == 0) return -1;
        done += (size_t)n;
    }
    return 0;
}

/* Reads and packs one item; false if reading failed. */
static bool pack_file_item(struct file_jobs *jobs, const struct file_job *from, int64_t index, char *piece) {
    struct packing job = from->job;
    const int64_t first = from->first_panel + index * from->item_panels, past = from->first_panel + from->n_panels;
    const int64_t end = first + from->item_panels < past ? first + from->item_panels : past;
    int32_t low = INT32_MAX, high = -1; /* source rows of these panels: they follow each other */
    for (int64_t row = 16 * first; row < 16 * end; row++) {
        const int32_t source = source_row(&job, row);
        if (source >= 0 && source < low) low = source;
        if (source > high) high = source;
    }
    if (high < 0) return true; /* all of them belong to another part */
    const size_t n_bytes = (size_t)(high - low + 1) * job.row_bytes;
    const int32_t error = read_piece(
        from->part->file, from->part->offset + (int64_t)((size_t)low * job.row_bytes), n_bytes, piece);
    if (error) {
        __atomic_store_n(&from->part->error, error, __ATOMIC_RELAXED);
        return false;
    }
    if (jobs->n_read) __atomic_fetch_add(jobs->n_read, (int64_t)n_bytes, __ATOMIC_RELAXED);
    job.src = piece;
    job.src_row = low;
    for (int64_t panel = first; panel < end; panel++) {
        const int64_t non_finite = pack_panel(&job, panel);
        if (!non_finite) continue;
        __atomic_fetch_add(&from->part->n_non_finite, non_finite, __ATOMIC_RELAXED);
        atomic_fetch_add(&job.weight->non_finite, non_finite);
    }
    return true;
}

/* First its own share of every part, then what others have left. */
static void pack_files(struct file_jobs *jobs, int thread, int n_threads) {
    char *piece = jobs->pieces + (size_t)thread * jobs->piece_bytes;
    for (int pass = 0; pass < 2; pass++)
        for (int32_t i = 0; i < jobs->n; i++) {
            const struct file_job *from = &jobs->all[i];
            struct fb_items items = fb_items_of(
                jobs->counters + (size_t)i * (size_t)n_threads, from->n_items, thread, n_threads);
            for (;;) {
                if (atomic_load_explicit(&jobs->failed, memory_order_relaxed)) return;
                if (jobs->stop && __atomic_load_n(jobs->stop, __ATOMIC_RELAXED)) return;
                const int64_t index = pass ? fb_next_item(&items) : fb_next_of_share(&items, thread);
                if (index < 0) break;
                if (!pack_file_item(jobs, from, index, piece)) atomic_store(&jobs->failed, 1);
            }
        }
}

enum fb_status fb_weights_pack_files(struct fb_file_rows *parts, int32_t n_parts, int32_t n_threads,
    const int32_t *cpus, const int32_t *stop, int64_t *n_read) {
    FB_REQUIRE(parts || n_parts == 0, "parts is null");
    FB_REQUIRE(n_parts >= 0, "n_parts is %d, must be 0 or more", n_parts);
    FB_REQUIRE(n_threads >= 1 && n_threads <= 1024, "n_threads is %d, must be 1 .. 1024", n_threads);
    for (int32_t i = 0; cpus && i < n_threads; i++)
        FB_REQUIRE(
            cpus[i] >= 0 && cpus[i] < FB_MOST_CPUS, "cpus[%d] is %d, must be 0 .. %d", i, cpus[i], FB_MOST_CPUS - 1);
    if (n_parts == 0) return FB_OK;
    struct file_jobs jobs = {.n = n_parts, .stop = stop, .n_read = n_read};
    const size_t n_counters = (size_t)n_parts * (size_t)n_threads;
    jobs.all = calloc((size_t)n_parts, sizeof *jobs.all);
    jobs.counters = fb_memory_allocate(n_counters * sizeof *jobs.counters);
    enum fb_status status = jobs.all ? FB_OK : FB_OUT_OF_MEMORY;
    for (int32_t i = 0; i < n_parts && status == FB_OK; i++)
        status = make_file_job(&parts[i], i, &jobs.all[i], &jobs.piece_bytes);
    if (status == FB_OK) jobs.pieces = fb_memory_allocate((size_t)n_threads * jobs.piece_bytes);
    if (status == FB_OUT_OF_MEMORY || (status == FB_OK && (!jobs.counters || !jobs.pieces)))
        status = fb_fail(FB_OUT_OF_MEMORY, "no memory to read %d matrices", n_parts);
    if (status == FB_OK) {
#pragma omp parallel num_threads(n_threads)
        {
            const fb_float_mode mode = fb_float_mode_enter();
            if (cpus) fb_thread_pin(cpus[omp_get_thread_num()]);
            pack_files(&jobs, omp_get_thread_num(), omp_get_num_threads());
            fb_float_mode_leave(mode);
        }
    }
    free(jobs.all);
    fb_memory_release(jobs.counters, n_counters * sizeof *jobs.counters);
    fb_memory_release(jobs.pieces, (size_t)n_threads * jobs.piece_bytes);
    return status;
}

/* ---- Rows -------------------------------------------------------------------------------------------------------- */

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
