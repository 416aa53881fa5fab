/*
 * fabula.h - the public C API of Fabula's native library.
 *
 * What it holds: packed weights, programs (a model as a flat list of operators), a pool of KV pages, the sampler, and
 * each operator on its own. What it does not hold: files, tokenizers, sessions, schedulers; those live in Python.
 *
 * Rules that every function keeps:
 *   - A fallible function returns enum fb_status; FB_OK is 0. On any other value nothing was changed, and
 *     fb_last_error() tells what was wrong, in the calling thread, until that thread's next failure.
 *   - `_free(NULL)` is allowed, never fails and never touches the last error.
 *   - The library never prints, exits or aborts, and never reads files or the environment (OpenMP's runtime reads its
 * own).
 *   - Matrices are row-major; shapes stand as [rows, columns]. Sizes of memory are size_t, counts are int32_t.
 *   - Results do not depend on the number of threads, on the batch a token came in, or on the instruction set chosen:
 * each
 *     output is summed in one fixed order (see src/kernels/kernels.h).
 *
 * Everything between the two markers is plain C that cffi reads as it stands: no macro, no include, no attribute.
 */
#ifndef FABULA_H
#define FABULA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* cffi: begin */

/* ---- Status and library ------------------------------------------------------------------------------------------ */

#define FB_ABI_VERSION 9 /* raised whenever a declaration below changes; compared by the Python package at import */

enum fb_status {
    FB_OK = 0,
    FB_INVALID_ARGUMENT = 1, /* a value out of its range, a shape that does not fit, a null pointer */
    FB_OUT_OF_MEMORY = 2,    /* the system refused memory */
    FB_UNSUPPORTED = 3,      /* well-formed, but not offered here: e.g. an instruction set this CPU lacks */
    FB_NON_FINITE = 4,       /* logits, or numbers to quantise, hold NaN or infinity: damaged model or input */
    FB_DEVICE_FAILED = 5,    /* a device failed, or its driver is missing or too old; the text holds the driver's own */
    FB_DEVICE_MEMORY = 6     /* a device has not the memory, or its budget is used up */
};

/* Number of the interface this library was built with; equals FB_ABI_VERSION of its header. */
uint32_t fb_abi_version(void);

/* Text of the calling thread's last failure, "" before the first. Valid until that thread fails again. */
const char *fb_last_error(void);

/* sizeof of the named public struct ("fb_op", "fb_batch", "fb_sequence", "fb_sampling", "fb_program_shape",
 * "fb_device_info"), 0 if unknown. The Python package compares it with its own view at import, so that a stale library
 * cannot be called by accident. */
size_t fb_sizeof(const char *struct_name);

/* Instruction sets with kernels of their own. REFERENCE is plain C and exists on every machine. */
enum fb_isa {
    FB_ISA_AUTO = 0,
    FB_ISA_REFERENCE = 1,
    FB_ISA_AVX2 = 2,
    FB_ISA_AVX512 = 3,
    FB_ISA_AVX512_VNNI = 4,
    FB_ISA_AVX_VNNI = 5,
    FB_ISA_AVX512_BF16 = 6,
    FB_ISA_NEON = 7,
    FB_ISA_NEON_DOTPROD = 8,
    FB_ISA_NEON_I8MM = 9,
    FB_ISA_AVX512_AMX = 10
};

/* Whether this CPU and this build can run the kernels of `isa` (AVX2 stands for AVX2 + FMA + F16C,
 * AVX512 for F + BW + VL + DQ, AVX512_VNNI for these and VNNI, AVX512_BF16 for these and BF16, AVX512_AMX for these and
 * AMX-INT8, AVX_VNNI for AVX2 and the VNNI of CPUs without AVX-512; NEON for what every AArch64 CPU has, NEON_DOTPROD for
 * SDOT besides, NEON_I8MM for USDOT and SMMLA too). Linux lends AMX to a process that asks: where the CPU has it, this
 * function, and whatever takes an `isa`, asks for it. */
bool fb_isa_available(enum fb_isa isa);

/* The best available instruction set: what AUTO stands for. */
enum fb_isa fb_isa_best(void);

/* Number formats of weights: three plain ones, and GGUF's block formats. Values are this library's own, not GGUF's. */
enum fb_dtype {
    FB_F32 = 0,
    FB_F16 = 1,
    FB_BF16 = 2,
    FB_Q4_0 = 3,
    FB_Q4_1 = 4,
    FB_Q5_0 = 5,
    FB_Q5_1 = 6,
    FB_Q8_0 = 7,
    FB_Q4_K = 8,
    FB_Q5_K = 9,
    FB_Q6_K = 10,
    FB_Q2_K = 11,
    FB_Q3_K = 12,
    FB_IQ4_NL = 13
};

/* Elements in one block of `dtype` (1 for the plain formats), and its bytes. 0 for an unknown dtype. */
int32_t fb_dtype_block_size(enum fb_dtype dtype);
size_t fb_dtype_block_bytes(enum fb_dtype dtype);

/* Turns `n_elements` numbers of `dtype` at `src` (src_bytes long, no alignment needed) into f32 at `dst`.
 * n_elements must be a multiple of the block size and src_bytes exactly what they take. */
enum fb_status fb_dequantize(enum fb_dtype dtype, const void *src, size_t src_bytes, size_t n_elements, float *dst);

/* Turns a matrix f32 [n_rows, n_cols] into `dtype` at `dst` (no alignment needed), row after row. n_cols must be a
 * multiple of the block size and dst_bytes exactly what the blocks take. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 round to the
 * scale of each block's extreme; the others search the scale of least weighted error. The bytes do not depend on
 * n_threads >= 1. FB_NON_FINITE, with row and column in the text, if a number is NaN, infinite or too large for the
 * format; `dst` then holds nothing of use. */
enum fb_status fb_quantize(enum fb_dtype dtype, const float *src, int32_t n_rows, int32_t n_cols, int32_t n_threads,
    void *dst, size_t dst_bytes);

/* ---- Devices ----------------------------------------------------------------------------------------------------- */

/* A GPU that weights, pages and programs may lie on. Every build has these functions; one without CUDA answers
 * FB_UNSUPPORTED. A handle may be shared by threads. Numbers on a device differ from the CPU's by rounding; on one device
 * they are the same bits in every batch. */
typedef struct fb_device fb_device;

struct fb_device_info {
    uint32_t struct_size; /* sizeof(struct fb_device_info), filled by the library */
    int32_t compute_major, compute_minor, n_processors;
    bool is_emulated; /* the kernels run on the CPU: a build for tests */
    char name[128];
    size_t memory_bytes, free_bytes;
};

/* How many devices there are. FB_UNSUPPORTED in a build without CUDA; FB_DEVICE_FAILED where the driver is missing, too old or finds
 * no GPU. */
enum fb_status fb_device_count(int32_t *n_devices);
enum fb_status fb_device_describe(int32_t index, struct fb_device_info *out);

/* Opens device `index`. What lies on it may take `memory_budget` bytes in all, 0 for what is free. FB_INVALID_ARGUMENT if
 * there are fewer devices; FB_DEVICE_FAILED for one that failed, that is too old, or that this build has no code for. */
enum fb_status fb_device_open(int32_t index, size_t memory_budget, fb_device **out);

/* Lets programs made from now on compute products of many tokens (128 and more) with the vendor's library: on NVIDIA GPUs cuBLASLt, from
 * the file `path`, or libcublasLt.so.13 or .12 where NULL. Results are then no longer the same bits in every batch. Not beside another
 * call that has the handle. FB_UNSUPPORTED if the library is not there. */
enum fb_status fb_device_use_library(fb_device *device, const char *path);

/* Bytes taken through this handle, and those that may still be taken. */
enum fb_status fb_device_memory(const fb_device *device, size_t *used_bytes, size_t *free_bytes);

void fb_device_free(fb_device *device); /* what lies on the device stays until it is freed itself */

/* Devices that compute one model together, at most FB_MOST_MEMBERS, each once: a device for pools, whose pages it spreads over its
 * members by KV heads, and for fb_program_join. Weights and programs lie on the members. It holds their handles, and links
 * between them, for which CUDA needs the library NCCL (libnccl.so.2): FB_UNSUPPORTED where that is missing. Programs of one group
 * run one at a time. When a member or a link fails, the group is of no use any more: FB_DEVICE_FAILED. */
enum fb_status fb_device_join(fb_device *const *devices, int32_t n_devices, fb_device **out);

#define FB_MOST_MEMBERS 16

/* ---- Weights ----------------------------------------------------------------------------------------------------- */

/* A matrix [n_rows, n_cols], one output per row, packed into panels of 16 rows:
 *     panel p, column k, lane j  ->  element (16 p + j, k), lanes contiguous.
 * Block formats keep every bit of their blocks (native/src/quant/layout.h draws their panels); products with them round
 * their input to 8 bits in blocks of 32. Rows beyond n_rows in the last panel are zero. Immutable once packed; may be shared
 * by threads and programs. */
typedef struct fb_weight fb_weight;

/* A zeroed matrix of `dtype` on 2 MiB-aligned memory. n_rows and n_cols: 1 .. 2^30, n_cols a multiple of its block size. */
enum fb_status fb_weight_create(enum fb_dtype dtype, int32_t n_rows, int32_t n_cols, fb_weight **out);

/* Fills rows first_row + row_step * i, i = 0 .. n_rows-1, from a row-major matrix [n_rows, n_cols] of any `src_dtype`,
 * rounded to the weight's format as fb_quantize does where that is another.
 * `row_step` 1 stacks matrices on top of each other (q, k, v in one); with `row_block` 16 and row_step 2 two matrices
 * are woven panel by panel (gate and up), so that row r goes to first_row + (r / row_block) * row_block * row_step +
 * r % row_block. Rows between the last of a woven matrix and the next panel stay zero. n_threads >= 1. Not to be
 * called on one weight by two threads at once. */
enum fb_status fb_weight_pack_rows(fb_weight *weight, int32_t first_row, int32_t row_block, int32_t row_step,
    enum fb_dtype src_dtype, const void *src, size_t src_bytes, int32_t n_rows, int32_t n_threads);

/* Row `row` as f32 [n_cols]. */
enum fb_status fb_weight_unpack_row(const fb_weight *weight, int32_t row, float *dst);

/* Elements packed so far that are NaN or infinite in the weight's format: damaged input, or numbers beyond f16's
 * 65504. 0 for NULL. */
int64_t fb_weight_non_finite(const fb_weight *weight);

/* Moves a packed weight to a device, byte for byte, and frees the memory it had. From then on only programs of that device
 * handle take it. On failure it stays where it is. */
enum fb_status fb_weight_move(fb_weight *weight, fb_device *device);

size_t fb_weight_bytes(const fb_weight *weight); /* bytes held; 0 for NULL */
void fb_weight_free(fb_weight *weight);          /* only after every program that uses it was freed */

/* ---- KV pages ---------------------------------------------------------------------------------------------------- */

/* A pool of pages. A page holds FB_PAGE_POSITIONS positions of K and V for all layers and KV heads:
 *     per layer, per KV head:  K [2 blocks of 16 positions][head_dim][16]   then   V [head_dim / 16, rounded up][32][16]
 * K blocks and V blocks are panels like those of weights, so attention runs on the kernels of matrix products. Each of K and
 * V may be F32, F16, BF16 or Q8_0: then it holds signed bytes, and behind them one f32 [32], the scale of each position's
 * head. Who owns which page is the caller's business; the pool only holds bytes. One engine thread at a time. */
typedef struct fb_page_pool fb_page_pool;

#define FB_PAGE_POSITIONS 32

/* Memory is reserved at once, but only touched pages take room. head_dim: 1 .. 1024. */
enum fb_status fb_page_pool_create(enum fb_dtype k_dtype, enum fb_dtype v_dtype, int32_t n_pages, int32_t n_layers,
    int32_t n_kv_heads, int32_t head_dim, fb_page_pool **out);
/* The same in memory of a device, all of it taken at once; NULL for the CPU. A page's bytes are the same everywhere. On a group each
 * member holds n_kv_heads / (members) heads of every page, or, where members are more than heads, one that it shares with its
 * neighbours: one number must divide the other. */
enum fb_status fb_page_pool_create_on(fb_device *device, enum fb_dtype k_dtype, enum fb_dtype v_dtype, int32_t n_pages,
    int32_t n_layers, int32_t n_kv_heads, int32_t head_dim, fb_page_pool **out);
void fb_page_pool_free(fb_page_pool *pool);
size_t fb_page_bytes(const fb_page_pool *pool); /* bytes of one page; 0 for NULL */

/* Copies page `src` over page `dst` (copy-on-write), writes zeros, or moves a page's bytes out of or into the pool.
 * `n_bytes` must equal fb_page_bytes. */
enum fb_status fb_page_copy(fb_page_pool *pool, int32_t dst, int32_t src);
enum fb_status fb_page_zero(fb_page_pool *pool, int32_t page);
enum fb_status fb_page_read(const fb_page_pool *pool, int32_t page, void *dst, size_t n_bytes);
enum fb_status fb_page_write(fb_page_pool *pool, int32_t page, const void *src, size_t n_bytes);

/* ---- Programs ---------------------------------------------------------------------------------------------------- */

/* An operator of a program reads and writes buffers, numbered 0 .. n_buffers-1. A buffer holds one f32 row of a fixed
 * width per token of the batch (or, after GATHER_OUTPUTS, per wanted output). The program plans where buffers lie:
 * two that are never alive together share memory. */
enum fb_op_kind {
    FB_OP_EMBED = 1,         /* out[t] = scale * row tokens[t] of `weight` */
    FB_OP_RMS_NORM = 2,      /* out = in / sqrt(mean(in^2) + eps) * vector */
    FB_OP_LINEAR = 3,        /* out from `column` on = in weight^T (+ vector as bias) (+ buffer `residual`, which may be
                                 `out`) */
    FB_OP_LINEAR_SWIGLU = 4, /* weight (and bias) hold gate and up woven by 16 rows; out = silu(gate) * up */
    FB_OP_HEAD_NORM = 5,     /* in place on `in`: RMS norm of each q head by `vector` and k head by `vector2` */
    FB_OP_ROPE = 6,          /* in place on `in` = [q heads, k heads, v heads]: rotate q and k by their position */
    FB_OP_KV_WRITE = 7,      /* K and V of `in` into the sequence's pages, layer `layer` */
    FB_OP_ATTENTION = 8,     /* q of `in` over the pages of layer `layer`, causal; `window` limits how far back */
    FB_OP_GATHER_OUTPUTS = 9, /* out[i] = in[row of the i-th wanted output]; later ops see only those rows */
    FB_OP_LOGITS = 10,        /* LINEAR whose result goes to the caller's logits [n_outputs, n_rows]; the last op */
    FB_OP_SUM = 11 /* out = residual (if any) + the sum of `in` of all programs that were joined, in their order;
                                 on devices only */
};

struct fb_op {
    enum fb_op_kind kind;
    int32_t in;       /* buffer read; -1 for EMBED */
    int32_t out;      /* buffer written; -1 where the op works in place or writes the caller's logits */
    int32_t residual; /* LINEAR, SUM: buffer added to the result, -1 for none */
    int32_t layer;    /* KV_WRITE, ATTENTION: 0 .. n_layers-1 */
    int32_t column;   /* LINEAR: first column of `out` that the product fills; columns before are filled already */
    int32_t window;   /* ATTENTION: a token sees itself and window-1 before it; 0 for all */
    const fb_weight *weight; /* EMBED, LINEAR*, LOGITS; borrowed: it must outlive the program */
    const float *vector;     /* norm weights [width], bias [n_rows], or q-head norm [head_dim]; copied */
    const float *vector2;    /* HEAD_NORM: k-head norm [head_dim]; copied */
    int32_t vector_length;   /* of `vector`; 0 when NULL */
    int32_t vector2_length;
    float eps;   /* norms */
    float scale; /* EMBED: factor on the row; ATTENTION: factor on q.k, usually 1/sqrt(head_dim) */
};

/* What all operators of a program share. */
struct fb_program_shape {
    uint32_t struct_size; /* sizeof(struct fb_program_shape) */
    int32_t n_layers;
    int32_t n_heads;
    int32_t n_kv_heads; /* divides n_heads */
    int32_t head_dim;   /* 1 .. 1024, even where ROPE is used */
    int32_t rotary_dim; /* leading part of a head that is rotated, even, <= head_dim */
    int32_t vocab_size; /* token ids are below it */
    int32_t max_tokens; /* tokens in one batch at most: 1 .. 65536 */
    int32_t n_buffers;
    float rope_scale; /* factor on cos and sin (YaRN's attention factor); 1 usually */
};

typedef struct fb_program fb_program;

/* Checks the operators (kinds, widths, aliasing, order), plans the buffers and takes the scratch memory.
 * inv_freq: f32 [rotary_dim / 2], the angle per position of each rotated pair (pair i is elements i and i +
 * rotary_dim / 2). buffer_widths: int32 [n_buffers]. Vectors and shapes are copied, weights borrowed. n_threads >= 1.
 * */
enum fb_status fb_program_create(const struct fb_program_shape *shape, const int32_t *buffer_widths,
    const float *inv_freq, const struct fb_op *ops, int32_t n_ops, int32_t n_threads, enum fb_isa isa,
    fb_program **out);
/* The same for a device, where all its weights must lie; NULL for the CPU. It runs over pools of that device handle. */
enum fb_status fb_program_create_on(fb_device *device, const struct fb_program_shape *shape,
    const int32_t *buffer_widths, const float *inv_freq, const struct fb_op *ops, int32_t n_ops, int32_t n_threads,
    enum fb_isa isa, fb_program **out);

/* One model in parts, one for each member of `group` in its order: programs that were made on the members, each with its share of heads,
 * of the columns between products, and of the rows of the last op, and a SUM wherever a product has only part of its columns. The
 * joined program runs over pools of the group. Member i has KV heads as a pool of the group does, and of the n_results rows that the last
 * op has in all, with c = n_results / (members), rounded up, the c rows from the smaller of i c and n_results - c on.
 * Parts are borrowed, and cannot run by themselves if they hold a SUM. */
enum fb_status fb_program_join(fb_device *group, fb_program *const *parts, int32_t n_parts, int32_t n_kv_heads,
    int32_t n_results, fb_program **out);
void fb_program_free(fb_program *program);
size_t fb_program_scratch_bytes(const fb_program *program);

/* One sequence's share of a batch: its tokens are appended behind the n_past positions already in its pages.
 *
 * With a window W and S sinks (Xiao et al. 2023, "attention sinks") the token at position p >= S + W sees the first S
 * positions and the last W, itself included; before that it sees all. It sees the sinks as if they lay right before the
 * window: sink j at distance S + W - 1 - j, so no distance grows beyond what the model was trained on. What a token
 * sees depends on its position only, not on the batch it came in. An operator's own window, if it is shorter than S + W,
 * hides the sinks. */
struct fb_sequence {
    const int32_t
        *pages; /* page of positions 32 i .. 32 i + 31; as many as n_past + n_tokens need. -1 where no token of
                             the batch sees anything: between the sinks' page and the first visible position's */
    int32_t n_pages;
    int32_t n_past;
    int32_t n_tokens; /* >= 1 */
    int32_t window;   /* W: 0 for everything, else >= 1 */
    int32_t n_sinks;  /* S: 0 .. FB_PAGE_POSITIONS; 0 without a window */
};

struct fb_batch {
    uint32_t struct_size;  /* sizeof(struct fb_batch) */
    int32_t n_tokens;      /* sum over the sequences; <= max_tokens */
    const int32_t *tokens; /* [n_tokens], sequence after sequence */
    const struct fb_sequence *sequences;
    int32_t n_sequences;
    const int32_t *outputs; /* [n_outputs] rows of the batch whose logits are wanted, ascending, no row twice */
    int32_t n_outputs;
};

/* Runs the program over a batch in one parallel region. Writes the batch's positions of the pages and `logits`
 * [n_outputs, rows of the last op's weight], nothing else. Two sequences of a batch must not write the same page. On any error pages and
 * logits are as they were, except FB_NON_FINITE and FB_DEVICE_FAILED: the batch's positions hold what was computed and count for
 * nothing. */
enum fb_status fb_program_run(
    fb_program *program, fb_page_pool *pool, const struct fb_batch *batch, float *logits, size_t n_logits);

/* A device's program records a step in which every sequence has one token when its size, rounded up, comes for the second time, and
 * from then on launches it as a whole. That changes how long a step takes, never a bit of it. */
struct fb_graph_info {
    uint32_t struct_size; /* sizeof(struct fb_graph_info), filled by the library */
    bool is_on;
    int32_t n_graphs;                           /* recorded steps that are held */
    int64_t n_recorded, n_replayed, n_launched; /* since the program was made; the last: steps operator by operator */
    enum fb_status status;                      /* FB_OK, or why a step could not be recorded or launched as a whole: */
    char reason[192];                           /* it ran operator by operator, and its size does so from then on */
};

/* Whether steps are recorded, as they are from the start; what was recorded goes. Not while the program runs. Both:
 * FB_UNSUPPORTED for a program of the CPU. */
enum fb_status fb_program_set_graphs(fb_program *program, bool is_on);
enum fb_status fb_program_graph_info(const fb_program *program, struct fb_graph_info *out);

/* ---- Sampling ---------------------------------------------------------------------------------------------------- */

/* Steps of the sampling chain, run in the order of fb_sampling.chain. A step whose parameter is neutral does nothing.
 * */
enum fb_sampler {
    FB_SAMPLER_BIAS = 1,      /* logit_bias and banned tokens */
    FB_SAMPLER_PENALTIES = 2, /* repetition, frequency, presence */
    FB_SAMPLER_DRY = 3,
    FB_SAMPLER_TEMPERATURE = 4,
    FB_SAMPLER_TOP_K = 5,
    FB_SAMPLER_TYPICAL_P = 6,
    FB_SAMPLER_TOP_P = 7,
    FB_SAMPLER_MIN_P = 8,
    FB_SAMPLER_XTC = 9
};

#define FB_MAX_CHAIN 16

struct fb_sampling {
    uint32_t struct_size;       /* sizeof(struct fb_sampling) */
    float temperature;          /* >= 0; 0 takes the likeliest token (after bias, penalties and DRY) */
    int32_t top_k;              /* 0 off */
    float top_p;                /* (0, 1], 1 off */
    float min_p;                /* [0, 1], 0 off */
    float typical_p;            /* (0, 1], 1 off */
    float repetition_penalty;   /* > 0, 1 off */
    float frequency_penalty;    /* 0 off */
    float presence_penalty;     /* 0 off */
    int32_t penalty_window;     /* last tokens of the history the three penalties see; -1 all, 0 none */
    float dry_multiplier;       /* 0 off */
    float dry_base;             /* >= 1 */
    int32_t dry_allowed_length; /* >= 1 */
    int32_t dry_window;         /* last tokens of the history DRY sees; -1 all, 0 none */
    float xtc_probability;      /* [0, 1], 0 off */
    float xtc_threshold;        /* (0, 0.5] to have an effect */
    uint64_t seed;
    int32_t n_chain;
    uint8_t chain[16]; /* enum fb_sampler, each at most once */
};

/* Neutral settings (temperature 1, everything else off) and the default chain order. */
void fb_sampling_default(struct fb_sampling *out);

/* Draws one token.
 *   logits      f32 [vocab_size], left as they are
 *   position    of the drawn token in its sequence; with the seed it keys the random numbers (Philox 4x32-10)
 *   history     the tokens so far, oldest first (penalties, DRY)
 *   bias        ids [n_bias] with values [n_bias]; -INFINITY bans
 *   breakers    tokens at which DRY's matches end [n_breakers]
 *   work        scratch of fb_sample_work_bytes(vocab_size) bytes, 16-byte aligned
 *   token       the id drawn;  logprob  its natural log-probability under the plain softmax of `logits`
 * FB_NON_FINITE if logits hold NaN or +infinity or nothing finite; FB_INVALID_ARGUMENT if everything was banned. */
enum fb_status fb_sample(const float *logits, int32_t vocab_size, const struct fb_sampling *settings, uint64_t position,
    const int32_t *history, int32_t n_history, const int32_t *bias_ids, const float *bias_values, int32_t n_bias,
    const int32_t *breakers, int32_t n_breakers, void *work, int32_t *token, float *logprob);
size_t fb_sample_work_bytes(int32_t vocab_size);

/* The probabilities the chain leaves, f32 [vocab_size] (0 for what it cut), instead of a draw; XTC's coin is tossed
 * as in fb_sample. Same arguments. */
enum fb_status fb_sample_probabilities(const float *logits, int32_t vocab_size, const struct fb_sampling *settings,
    uint64_t position, const int32_t *history, int32_t n_history, const int32_t *bias_ids, const float *bias_values,
    int32_t n_bias, const int32_t *breakers, int32_t n_breakers, void *work, float *probabilities);

/* Four random words for (seed, position, stream): Philox 4x32-10 of Salmon et al., SC'11. */
void fb_random(uint64_t seed, uint64_t position, uint32_t stream, uint32_t out[4]);

/* ---- Drawing several tokens in one call --------------------------------------------------------------------------- */

/* A sequence that draws. Sampling arguments as in fb_sample, which gets the position n_history + n_drawn. */
struct fb_draw {
    struct fb_sequence sequence; /* as the first step computes it; pages for all positions of n_steps */
    int32_t n_steps;             /* tokens to draw at most; 0 for a sequence that is only computed, in the first step */
    int32_t n_drawn;             /* result */
    int32_t *history;            /* [n_history + n_steps]: the tokens so far, the last sequence.n_tokens of them not
                                    computed yet; those that are drawn are written behind them */
    int32_t n_history;
    int32_t n_ends;
    const int32_t *ends; /* tokens after which it draws no more */
    float *logprobs;     /* [n_steps], results; NULL if that is 0 */
    const struct fb_sampling *settings;
    const int32_t *bias_ids;
    const float *bias_values;
    int32_t n_bias;
    int32_t n_breakers;
    const int32_t *breakers;
};

/* Up to n_steps steps over the sequences, each of which computes what is not computed yet of every one that still draws, and
 * draws its next token: those that fb_program_run and fb_sample would give. A device draws where the logits are, which are
 * not copied. Ends early when none draws any more, and after a step
 * behind which *stop, that another thread may set, is not 0. A sequence whose draw fails stops with fewer tokens and no
 * end token; fb_sample tells why. An error in the first step is returned, a later one ends the call: the next meets it.
 *   logits    scratch of at least n_draws x vocab_size
 *   seconds   [n_steps] since the call for each step;  n_done  how many steps there were */
enum fb_status fb_program_draw(fb_program *program, fb_page_pool *pool, struct fb_draw *draws, int32_t n_draws,
    int32_t n_steps, const int32_t *stop, float *logits, size_t n_logits, double *seconds, int32_t *n_done);

/* ---- Operators on their own -------------------------------------------------------------------------------------- */

/* The operators of programs, one at a time on the caller's arrays, on the same kernels. Arrays are f32, row-major, and
 * do not overlap unless told. n_threads >= 1. Each returns FB_INVALID_ARGUMENT for a null pointer or a bad size. */

/* out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight;  x, out [n_rows, n_cols], weight [n_cols] */
enum fb_status fb_rms_norm(const float *x, const float *weight, int32_t n_rows, int32_t n_cols, float eps,
    int32_t n_threads, enum fb_isa isa, float *out);

/* out[i] = table[ids[i]];  table [n_rows, n_cols], ids [n_ids] each in 0 .. n_rows-1, out [n_ids, n_cols] */
enum fb_status fb_gather(const float *table, int32_t n_rows, int32_t n_cols, const int32_t *ids, int32_t n_ids,
    int32_t n_threads, enum fb_isa isa, float *out);

/* Softmax over the first visible(r) columns of each row, the rest becomes 0. visible(r) = min(n_cols, first_visible +
 * r) when causal, else n_cols. `first_visible` >= 1. x, out [n_rows, n_cols]; out may be x. */
enum fb_status fb_masked_softmax(const float *x, int32_t n_rows, int32_t n_cols, bool causal, int32_t first_visible,
    int32_t n_threads, enum fb_isa isa, float *out);

/* out = silu(gate) * up, n numbers; out may be gate or up */
enum fb_status fb_swiglu(const float *gate, const float *up, size_t n, int32_t n_threads, enum fb_isa isa, float *out);

/* out = x weight^T (+ bias) (+ residual);  x [n_rows, weight columns], bias [weight rows] or NULL, residual and out
 * [n_rows, weight rows], residual NULL or equal to out or apart from it */
enum fb_status fb_linear(const fb_weight *weight, const float *x, int32_t n_rows, const float *bias,
    const float *residual, int32_t n_threads, enum fb_isa isa, float *out);

/* Rotates pairs (i, i + rotary_dim / 2) of each head in place;  x [n_rows, n_heads, head_dim], positions [n_rows] >=
 * 0 */
enum fb_status fb_rope(float *x, const int32_t *positions, int32_t n_rows, int32_t n_heads, int32_t head_dim,
    int32_t rotary_dim, const float *inv_freq, float rope_scale, int32_t n_threads, enum fb_isa isa);

/* Causal self-attention of one sequence whose K and V are all given: q [n_tokens, n_heads, head_dim], k and v
 * [n_tokens, n_kv_heads, head_dim], out like q. Packs K and V into pages of their dtypes first. window as in fb_op. */
enum fb_status fb_self_attention(const float *q, const float *k, const float *v, int32_t n_tokens, int32_t n_heads,
    int32_t n_kv_heads, int32_t head_dim, int32_t window, float scale, enum fb_dtype k_dtype, enum fb_dtype v_dtype,
    int32_t n_threads, enum fb_isa isa, float *out);

/* ---- Files ------------------------------------------------------------------------------------------------------- */

/* Strings as GGUF stores them, each a u64 length, little-endian, and so many bytes. Copies whole ones from the beginning of `bytes`
 * to `out` [n_bytes], a NUL behind each, until `most` are there or one does not end in `bytes`, is longer than max_length, or holds
 * a NUL itself. Tells how many they are, what they take of `bytes`, and what of `out`. */
enum fb_status fb_join_strings(const void *bytes, size_t n_bytes, size_t most, size_t max_length, char *out,
    size_t *n_strings, size_t *n_read, size_t *n_written);

/* ---- Machine ----------------------------------------------------------------------------------------------------- */

/* Measures, for benchmarks: bytes/s of reading `n_bytes` of memory `n_repeats` times, and f32 multiply-add
 * operations/s from registers (an add and a multiply count as two). Median over repeats of at least 3. */
enum fb_status fb_measure_read(size_t n_bytes, int32_t n_repeats, int32_t n_threads, double *bytes_per_s);
enum fb_status fb_measure_fma(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *flops_per_s);

/* As fb_measure_fma, of the kernel for bf16 weights. */
enum fb_status fb_measure_pairs(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *flops_per_s);

/* As fb_measure_fma, of the kernel for weights in Q8_0: products of bytes, their scales included. */
enum fb_status fb_measure_dot(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *ops_per_s);

/* Bytes/s that a device's memory moves when `n_bytes` are copied from one place there to another, those read and those written both
 * counted: the fastest of `n_repeats` copies behind a first one. Takes twice n_bytes meanwhile. */
enum fb_status fb_measure_copy(fb_device *device, size_t n_bytes, int32_t n_repeats, double *bytes_per_s);

/* The operators as plain serial loops, the way a reader would first write them: what `fabula bench ops` compares with.
 * Same shapes as above; matmul_transb: out [m, n] = a [m, k] b [n, k]^T. No argument checks beyond null pointers. */
enum fb_status fb_serial_rms_norm(
    const float *x, const float *weight, int32_t n_rows, int32_t n_cols, float eps, float *out);
enum fb_status fb_serial_gather(const float *table, int32_t n_cols, const int32_t *ids, int32_t n_ids, float *out);
enum fb_status fb_serial_masked_softmax(
    const float *x, int32_t n_rows, int32_t n_cols, bool causal, int32_t first_visible, float *out);
enum fb_status fb_serial_swiglu(const float *gate, const float *up, size_t n, float *out);
enum fb_status fb_serial_matmul_transb(const float *a, const float *b, int32_t m, int32_t n, int32_t k, float *out);
enum fb_status fb_serial_rope(float *x, const int32_t *positions, int32_t n_rows, int32_t n_heads, int32_t head_dim,
    int32_t rotary_dim, const float *inv_freq, float rope_scale);
enum fb_status fb_serial_self_attention(const float *q, const float *k, const float *v, int32_t n_tokens,
    int32_t n_heads, int32_t n_kv_heads, int32_t head_dim, int32_t window, float scale, float *out);

/* cffi: end */

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
