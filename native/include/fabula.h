/*
 * fabula.h - the public C API of Fabula's native library.
 *
 * It holds packed weights, programs (a model as a flat list of operators), the pool of KV pages, the sampler, and
 * each operator on its own. It does not hold files, tokenizers, sessions or the scheduler; those are Python.
 *
 * Rules for every function:
 *   - A function that can fail returns enum fb_status; FB_OK is 0. On any other value nothing has changed, and
 *     fb_last_error() says why, in the calling thread, until that thread's next failure.
 *   - `_free(NULL)` is allowed, never fails, and never touches the last error.
 *   - The library never prints, exits or aborts, and never reads files or the environment. (OpenMP's runtime reads
 *     its own variables.)
 *   - Matrices are row-major; shapes read [rows, columns]. Memory sizes are size_t, counts are int32_t.
 *   - Results do not depend on the number of threads, the batch, the instruction set, or the caller's
 *     floating-point mode: each output is summed in one fixed order (src/kernels/kernels.h).
 *   - A process may fork; the child may use everything but handles that another thread was using at that moment.
 *
 * Everything between the two markers is plain C that cffi reads as it stands: no macros, includes or attributes.
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

#define FB_ABI_VERSION 13 /* raised whenever a declaration below changes; compared by the Python package at import */

enum fb_status {
    FB_OK = 0,
    FB_INVALID_ARGUMENT = 1, /* a value out of its range, a shape that does not fit, a null pointer */
    FB_OUT_OF_MEMORY = 2,    /* the system refused memory */
    FB_UNSUPPORTED = 3,      /* well-formed, but not offered here: e.g. an instruction set this CPU lacks */
    FB_NON_FINITE = 4,       /* logits, or numbers to quantize, hold NaN or infinity: damaged model or input */
    FB_DEVICE_FAILED = 5,    /* a device failed, or its driver is missing or too old; the text quotes the driver */
    FB_DEVICE_MEMORY = 6     /* a device is out of memory, or its budget is used up */
};

/* FB_ABI_VERSION of the header that the library was built from. */
uint32_t fb_abi_version(void);

/* Message of the calling thread's last failure, "" before the first. Valid until that thread fails again. */
const char *fb_last_error(void);

/* sizeof of the named public struct ("fb_op", "fb_batch", "fb_sequence", "fb_sampling", "fb_program_shape",
 * "fb_device_info"), 0 if unknown. The Python package compares it with its own at import and refuses a stale
 * library. */
size_t fb_sizeof(const char *struct_name);

/* Instruction sets with their own kernels. REFERENCE is plain C and exists on every machine. */
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

/* Whether this CPU and this build can run the kernels of `isa`:
 *     AVX2          AVX2, FMA, F16C                    NEON          what every AArch64 CPU has
 *     AVX_VNNI      and VNNI, without AVX-512          NEON_DOTPROD  and SDOT
 *     AVX512        F, BW, VL, DQ                      NEON_I8MM     and USDOT, SMMLA
 *     AVX512_VNNI   and VNNI
 *     AVX512_BF16   and BF16
 *     AVX512_AMX    and AMX-INT8
 * Linux enables AMX per process, on request. This function, and whatever takes an `isa`, requests it. */
bool fb_isa_available(enum fb_isa isa);

/* The best available instruction set: what AUTO stands for. AMX and I8MM are taken only after a small product has
 * given the reference's bits on this machine. */
enum fb_isa fb_isa_best(void);

/* Formats of weights: three plain ones, and GGUF's block formats (MXFP4 is OCP's). The values are this library's, not GGUF's. */
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
    FB_IQ4_NL = 13,
    FB_MXFP4 = 14
};

/* Elements in one block of `dtype` (1 for the plain formats), and its bytes. 0 for an unknown dtype. */
int32_t fb_dtype_block_size(enum fb_dtype dtype);
size_t fb_dtype_block_bytes(enum fb_dtype dtype);

/* Dequantizes `n_elements` numbers of `dtype` at `src` to f32 at `dst`. `src` needs no alignment; src_bytes is exactly
 * what the elements take; n_elements is a multiple of the block size. */
enum fb_status fb_dequantize(enum fb_dtype dtype, const void *src, size_t src_bytes, size_t n_elements, float *dst);

/* Quantizes a matrix f32 [n_rows, n_cols] to `dtype` at `dst`, row after row. `dst` needs no alignment; dst_bytes is
 * exactly what the blocks take; n_cols is a multiple of the block size; n_threads >= 1 and does not change the bytes.
 * Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 take the scale from each block's extreme; the others search the scale of the least
 * weighted error. FB_NON_FINITE, with row and column in the message, if a number is NaN, infinite or too large for the
 * format; the contents of `dst` are then undefined. */
enum fb_status fb_quantize(enum fb_dtype dtype, const float *src, int32_t n_rows, int32_t n_cols, int32_t n_threads,
    void *dst, size_t dst_bytes);

/* ---- Devices ----------------------------------------------------------------------------------------------------- */

/* A GPU that can hold weights, pages and programs. Every build has these functions; without CUDA they return
 * FB_UNSUPPORTED. Threads may share a handle. Results on a device differ from the CPU's by rounding; on one device they
 * have the same bits in every batch. */
typedef struct fb_device fb_device;

struct fb_device_info {
    uint32_t struct_size; /* sizeof(struct fb_device_info), filled by the library */
    int32_t compute_major, compute_minor, n_processors;
    bool is_emulated; /* the kernels run on the CPU: a build for tests */
    char name[128];
    size_t memory_bytes, free_bytes;
};

/* Counts devices. FB_UNSUPPORTED in a build without CUDA; FB_DEVICE_FAILED if the driver is missing, too old, or finds
 * no GPU. */
enum fb_status fb_device_count(int32_t *n_devices);
enum fb_status fb_device_describe(int32_t index, struct fb_device_info *out);

/* Opens device `index`. Everything on it may take `memory_budget` bytes together; 0 for what is free.
 * FB_INVALID_ARGUMENT if there are fewer devices; FB_DEVICE_FAILED if it failed, is too old, or this build has no code
 * for it. */
enum fb_status fb_device_open(int32_t index, size_t memory_budget, fb_device **out);

/* Makes programs created from now on compute products of 128 tokens and more with the vendor's library: cuBLASLt on
 * NVIDIA GPUs, from the file `path`, or libcublasLt.so.13 or .12 for NULL. Results then depend on the batch. Must not
 * run beside another call with the same handle. FB_UNSUPPORTED if the library is missing. */
enum fb_status fb_device_use_library(fb_device *device, const char *path);

/* Bytes allocated through this handle, and bytes that it may still allocate. */
enum fb_status fb_device_memory(const fb_device *device, size_t *used_bytes, size_t *free_bytes);

void fb_device_free(fb_device *device); /* weights, pools and programs on it stay valid until they are freed */

/* Joins 2 to FB_MOST_MEMBERS different devices into a group that computes one model (tensor parallelism). A group is a
 * device for page pools, which it splits over its members by KV heads, and for fb_program_join; weights and programs
 * are created on the members. It keeps their handles alive. CUDA links members by NCCL (libnccl.so.2):
 * FB_UNSUPPORTED if that is missing. Programs of a group run one at a time. After a member or a link failed, every
 * call on the group returns FB_DEVICE_FAILED. */
enum fb_status fb_device_join(fb_device *const *devices, int32_t n_devices, fb_device **out);

#define FB_MOST_MEMBERS 16

/* ---- Weights ----------------------------------------------------------------------------------------------------- */

/* A matrix [n_rows, n_cols], one output per row, packed into panels of 16 rows:
 *     panel p, column k, lane j  ->  element (16 p + j, k), lanes contiguous
 * Block formats keep every bit of their blocks (native/src/quant/layout.h draws their panels); their products
 * quantize the input to 8 bits in blocks of 32. Rows beyond n_rows in the last panel are zero. Immutable once
 * packed; threads and programs may share it. */
typedef struct fb_weight fb_weight;

/* Creates a zeroed matrix of `dtype`. n_rows and n_cols are 1 .. 2^30, n_cols a multiple of the block size. */
enum fb_status fb_weight_create(enum fb_dtype dtype, int32_t n_rows, int32_t n_cols, fb_weight **out);

/* Packs a row-major matrix [n_rows, n_cols] of any `src_dtype` into a weight, quantized as by fb_quantize where the
 * formats differ. Source row r becomes row
 *     first_row + (r / row_block) * row_block * row_step + r % row_block
 * so row_step 1 stacks matrices (q, k, v in one weight), and row_block 16 with row_step 2 interleaves two matrices
 * panel by panel (gate and up); rows between the last one and the next panel stay zero. n_threads >= 1. Two threads
 * must not pack the same weight at once. */
enum fb_status fb_weight_pack_rows(fb_weight *weight, int32_t first_row, int32_t row_block, int32_t row_step,
    enum fb_dtype src_dtype, const void *src, size_t src_bytes, int32_t n_rows, int32_t n_threads);

/* A matrix in a file, and its rows in a weight. */
struct fb_file_rows {
    fb_weight *weight;
    int32_t file; /* descriptor of an open file, which is read by position */
    enum fb_dtype src_dtype;
    int64_t offset; /* of the first row, in bytes; whole rows of the weight's n_cols follow each other */
    int32_t first_row, row_block, row_step, n_rows; /* as of fb_weight_pack_rows */
    int32_t error;        /* set: 0; the errno of a read that failed; -1 where the file ends too early */
    int64_t n_non_finite; /* set: as fb_weight_non_finite, of these rows alone */
};

/* Reads and packs many matrices at once, as fb_weight_pack_rows would. A thread packs the same share of each weight as
 * it multiplies in a step, so bound to the same CPU it first touches the memory that it then reads. It reads piece by piece: memory
 * beyond the weights is some 256 KiB a thread.
 *   parts:     first_row is a multiple of 16, and so is row_block unless row_step is 1; no two parts of a weight share
 *              a panel of 16 rows
 *   cpus:      [n_threads] that the threads are bound to, as by fb_program_pin; the caller, too. NULL: to none
 *   stop:      another thread sets it to end the call early; NULL for never
 *   n_read:    counts bytes while the call runs; NULL for none
 * FB_OK also if reading failed: then `error` of a part tells, and the weights' contents are undefined, as they are
 * after `stop`. */
enum fb_status fb_weights_pack_files(struct fb_file_rows *parts, int32_t n_parts, int32_t n_threads,
    const int32_t *cpus, const int32_t *stop, int64_t *n_read);

/* From now on spreads the memory that the calling thread, and threads that it starts, touch first over all nodes, page
 * by page. For weights that threads read from any node. FB_UNSUPPORTED where the system refuses. */
enum fb_status fb_thread_interleave(void);

/* The matrices of n_experts experts as one weight: each [n_rows, n_cols], 1 .. 1024 of them. The second function packs
 * rows of expert `expert`, as fb_weight_pack_rows. Only EXPERTS and HEAD_LINEAR (a matrix for each head) take such a
 * weight. */
enum fb_status fb_weight_create_experts(
    enum fb_dtype dtype, int32_t n_experts, int32_t n_rows, int32_t n_cols, fb_weight **out);
enum fb_status fb_weight_pack_expert(fb_weight *weight, int32_t expert, int32_t first_row, int32_t row_block,
    int32_t row_step, enum fb_dtype src_dtype, const void *src, size_t src_bytes, int32_t n_rows, int32_t n_threads);

/* Dequantizes row `row` to f32 [n_cols]. Rows of expert e begin at e n_rows. */
enum fb_status fb_weight_unpack_row(const fb_weight *weight, int32_t row, float *dst);

/* Counts the elements packed so far that are NaN or infinite in the weight's format: damaged input, or numbers beyond
 * f16's 65504. 0 for NULL. */
int64_t fb_weight_non_finite(const fb_weight *weight);

/* Moves a packed weight to a device, byte for byte, and frees its memory here. From then on only programs on that
 * device handle take it. On failure it stays where it is. */
enum fb_status fb_weight_move(fb_weight *weight, fb_device *device);

/* Makes products with a bf16 weight take inputs in f32. As created, they round inputs to bf16, so that one instruction
 * of AVX-512 BF16 adds two products; a CPU without it needs half the time with inputs in f32. The two give different
 * bits, each the same on every CPU. To be called before a program is created with the weight; a GPU rounds in its own
 * way in either case. FB_INVALID_ARGUMENT if the weight is not in bf16. */
enum fb_status fb_weight_use_f32_inputs(fb_weight *weight);

size_t fb_weight_bytes(const fb_weight *weight); /* bytes held; 0 for NULL */
void fb_weight_free(fb_weight *weight);          /* only after every program that uses it was freed */

/* ---- KV pages ---------------------------------------------------------------------------------------------------- */

/* A pool of KV pages. A page holds FB_PAGE_POSITIONS positions of K and V for all layers and KV heads:
 *     per layer and KV head:  K [2 blocks of 16 positions][k_dim][16]  then  V [v_dim / 16, rounded up][32][16]
 * K and V blocks are panels like those of weights, so attention runs on the kernels of matrix products. K and V are
 * each F32, F16, BF16 or Q8_0; Q8_0 holds signed bytes, followed by one f32 [32], the scale of each position's
 * head. The pool holds bytes; reference counts and page tables are the caller's. One engine thread at a time. */
typedef struct fb_page_pool fb_page_pool;

#define FB_PAGE_POSITIONS 32

/* What a page holds of one layer: KV heads, and the width of a head of K and of V, 1 .. 1024 each. v_dim 0: V is a part
 * of K (struct fb_heads) and not stored; on the CPU only. Layers that reuse another layer's K and V are not listed. */
struct fb_kv_layer {
    int32_t n_kv_heads, k_dim, v_dim;
};

/* Reserves address space for all pages; only touched pages take memory. `layers` [n_layers] is copied. */
enum fb_status fb_page_pool_create(enum fb_dtype k_dtype, enum fb_dtype v_dtype, int32_t n_pages,
    const struct fb_kv_layer *layers, int32_t n_layers, fb_page_pool **out);
/* The same on a device, where all memory is allocated at once and all layers are alike; NULL for the CPU. A page has
 * the same bytes everywhere. On a group each member holds n_kv_heads / n_members heads of every page; with more
 * members than heads, neighbors hold copies of one head. One number must divide the other. */
enum fb_status fb_page_pool_create_on(fb_device *device, enum fb_dtype k_dtype, enum fb_dtype v_dtype, int32_t n_pages,
    const struct fb_kv_layer *layers, int32_t n_layers, fb_page_pool **out);
void fb_page_pool_free(fb_page_pool *pool);
size_t fb_page_bytes(const fb_page_pool *pool); /* bytes of one page; 0 for NULL */

/* Copies page `src` over page `dst` (for copy-on-write), zeroes a page, or reads and writes its bytes. `n_bytes` must
 * equal fb_page_bytes. */
enum fb_status fb_page_copy(fb_page_pool *pool, int32_t dst, int32_t src);
enum fb_status fb_page_zero(fb_page_pool *pool, int32_t page);
enum fb_status fb_page_read(const fb_page_pool *pool, int32_t page, void *dst, size_t n_bytes);
enum fb_status fb_page_write(fb_page_pool *pool, int32_t page, const void *src, size_t n_bytes);
/* Returns the memory of some layers of a page to the system, as far as whole pages of the system lie in it. What it held
 * is undefined until it is written again. Nothing happens on a device, whose memory is allocated once. */
enum fb_status fb_page_discard(fb_page_pool *pool, int32_t page, int32_t first_layer, int32_t n_layers);

/* ---- Recurrent states -------------------------------------------------------------------------------------------- */

/* A pool of state slots. A slot holds what the recurrent operators of one sequence remember at one position: for each
 * layer of the pool, which is one operator, so many f32. The pool holds bytes; which slot belongs to whom is the
 * caller's. One engine thread at a time. */
typedef struct fb_state_pool fb_state_pool;

/* Reserves address space for all slots; only touched slots take memory. layer_floats [n_layers]: numbers of each layer
 * (struct fb_op), 1 or more. */
enum fb_status fb_state_pool_create(
    const int64_t *layer_floats, int32_t n_layers, int32_t n_slots, fb_state_pool **out);
void fb_state_pool_free(fb_state_pool *pool);
size_t fb_state_bytes(const fb_state_pool *pool); /* bytes of one slot; 0 for NULL */

/* Copies slot `src` over slot `dst`, zeroes a slot (the state before the first token), or reads and writes its bytes.
 * `n_bytes` must equal fb_state_bytes. */
enum fb_status fb_state_copy(fb_state_pool *pool, int32_t dst, int32_t src);
enum fb_status fb_state_zero(fb_state_pool *pool, int32_t slot);
enum fb_status fb_state_read(const fb_state_pool *pool, int32_t slot, void *dst, size_t n_bytes);
enum fb_status fb_state_write(fb_state_pool *pool, int32_t slot, const void *src, size_t n_bytes);
/* Returns a slot's memory to the system, as far as whole pages of the system lie in it. What it held is undefined until
 * it is written again. */
enum fb_status fb_state_discard(fb_state_pool *pool, int32_t slot);

/* ---- Programs ---------------------------------------------------------------------------------------------------- */

/* Operators read and write buffers, numbered 0 .. n_buffers-1. A buffer holds one f32 row of a fixed width per token of
 * the batch or, after GATHER_OUTPUTS, per wanted output. The program plans their memory: buffers that are never alive
 * together share it. */
enum fb_op_kind {
    FB_OP_EMBED = 1,          /* out[t] = scale * row tokens[t] of `weight`; row 0 if a later table has no such row */
    FB_OP_RMS_NORM = 2,       /* out = (residual +) in / sqrt(mean(in^2) + eps) * vector */
    FB_OP_LINEAR = 3,         /* out from `column` on = (residual +) scale * activation(in weight^T + vector) */
    FB_OP_LINEAR_GATED = 4,   /* weight and bias interleave gate and up by 16 rows; out = activation(gate) * up */
    FB_OP_HEAD_NORM = 5,      /* in place on `in`: norm of each q head by `vector` and k head by `vector2` */
    FB_OP_ROPE = 6,           /* in place on `in`: rotates q and k heads by their position */
    FB_OP_KV_WRITE = 7,       /* writes K and V of `in` to the sequence's pages, layer `layer` */
    FB_OP_ATTENTION = 8,      /* q of `in` over the pages of layer `layer`; see the masks of struct fb_op */
    FB_OP_GATHER_OUTPUTS = 9, /* out[i] = in[row of the i-th wanted output]; later ops see only those rows */
    FB_OP_LOGITS = 10,        /* scale (in weight^T + vector), capped, to the caller's logits [n_outputs, n_rows] */
    FB_OP_SUM = 11,           /* out = (residual +) sum of `in` over the joined programs in their order; devices only */
    FB_OP_LAYER_NORM = 12,    /* out = (residual +) (in - mean(in)) / sqrt(variance(in) + eps) * vector + vector2 */
    FB_OP_EMBED_POSITION = 13, /* out[t] = row `position of t` of `weight`; positions must be below its rows */
    FB_OP_SCALE = 14,          /* out = scale * in; out may be in */
    FB_OP_MULTIPLY = 15,       /* out = in * columns column .. column + width - 1 of `residual`; out may be in */
    FB_OP_ADD = 16,            /* out = scale * (in + columns of `residual`, as MULTIPLY); out may be in */
    FB_OP_MIX = 17,            /* of streams side by side: out_i = (residual_i +) sum over j of factor[i][j] in_j */
    FB_OP_MATCH_RMS = 18,      /* out = in * rms(columns of `residual`) / max(rms(in), sqrt(eps)); out may be in */
    FB_OP_SPARSIFY = 19,       /* out = activation(max(in - mean(in) - scale * deviation(in), 0)); out may be in */
    FB_OP_ROUTER = 20,         /* out = the n_chosen experts of a row and their weights, by `in`, a logit of each */
    FB_OP_EXPERTS = 21,        /* products with the matrices of the experts that a router chose; see below */
    FB_OP_SHORT_CONV = 22,     /* causal convolution of each column over the last tokens; see below */
    FB_OP_DELTA_RULE = 23,     /* gated delta rule; see below */
    FB_OP_SSM = 24,            /* state space model with one decay a head (Mamba-2); see below */
    FB_OP_GATED_NORM = 25,     /* RMS norm of groups of columns, and a gate: columns of `residual`; see below */
    /* A product for each head of `in`, by the matrix of `weight` that has its number: of the head's last n_cols numbers.
     * Those before them are copied: a head of `out` is the copy, then the result [n_rows]. Fills columns 0 and up. */
    FB_OP_HEAD_LINEAR = 26
};

/* Mixtures of experts. ROUTER gives each expert a score: the softmax over all logits, their sigmoids, or the logits
 * themselves. The n_chosen experts with the largest score + vector [n_experts] (or score alone, without `vector`) are a
 * row's, best first; of equal ones the lower index goes first. `out` [2 n_chosen] holds their indices, then their
 * weights: `scale` times their scores, divided by `eps` + the sum of all chosen if they are renormalized. With groups of
 * n_experts / n_groups neighbors, only experts of the best n_top_groups groups are chosen. `vector2` [n_experts] holds a
 * factor on the weights of each expert. Sigmoids without a correction and without groups rank as their logits do, which
 * stay apart where sigmoids round to 1.
 *
 * With FB_ROUTE_MIXER the experts are chosen one after the other, by their logits l. The weight of expert b is
 * scale / sum of e^(l_i - l_b) over the experts i not chosen before with (l_b - l_i) / max(|l_i|, l_b) <= limit.
 *
 * EXPERTS multiplies a row by the matrix of each of its experts: `in` [n_cols], which all of them read, or
 * [n_chosen n_cols], a part for each. Router's result is buffer `factors`, `vector` a bias [n_experts n_rows].
 *     plain      out [n_chosen n_rows]: the results side by side, best expert first
 *     gated      out [n_chosen width], each as LINEAR_GATED
 *     sums       out = (residual +) scale * sum over the experts, best first, of weight * result */

/* Recurrent operators. Each has a layer of the state pool, used by no other, and computes the tokens of a sequence in
 * their order, so that results have the same bits however a sequence is cut into steps. Gates are columns of buffer
 * `factors`, from `column` on.
 *
 * SHORT_CONV, with w = `width` and K = vector_length / w taps, 2 .. 64. Its state [K - 1][w] is the last inputs, oldest
 * first.
 *     out[t][c] = activation(vector2[c] + sum over i, ascending, of vector[i][c] x[t - K + 1 + i][c])
 * x are the columns column .. column + w - 1 of `in`. With FB_CONV_GATED these columns and the 2 w behind them are b, c
 * and u (LFM2): x = b u, and the result is multiplied by c.
 *
 * DELTA_RULE (Yang et al. 2024, "Gated Delta Networks"). `in` holds n_groups q heads [k_dim], as many k heads, n_heads v
 * heads [v_dim]; `factors` n_heads numbers b, then n_heads numbers a. Head h takes q and k of head
 * h / (n_heads / n_groups), with FB_HEADS_TILED of head h % n_groups. Its state S is [k_dim][v_dim]:
 *     q = scale q / sqrt(sum(q^2) + eps), k = k / sqrt(sum(k^2) + eps)
 *     S = e^(vector[h] softplus(a + vector2[h])) S;  d = sigmoid(b) (v - S^T k);  S = S + k d^T;  out = S^T q
 * With FB_DELTA_NEGATIVE the sigmoid is doubled. `limit` is 0.
 *
 * SSM (Dao & Gu 2024, "Transformers are SSMs"). `in` holds n_heads heads x [v_dim], then n_groups rows B [k_dim], then as
 * many rows C; `factors` n_heads numbers dt. Head h takes B and C of group h / (n_heads / n_groups). `vector` holds A
 * [n_heads], then D [n_heads]; vector2 the biases of dt. The state S of a head is [k_dim][v_dim]:
 *     dt = min(max(softplus(dt + vector2[h]), low), limit);  S = e^(A dt) S + (dt B) x^T;  out = S^T C + D x
 * with low = `eps`; limit 0: none.
 *
 * The state of DELTA_RULE and SSM is stored as [n_heads][v_dim / 16, rounded up][k_dim][16], with zeros behind v_dim.
 *
 * GATED_NORM norms n_groups groups of columns each; `vector` holds weights of all columns or of a group; the gate is
 * activation(columns of `residual` from `column` on):
 *     out = rms_norm(in) * gate, or rms_norm(in * gate) with FB_GATE_FIRST, or in * gate without `vector` */

/* Activations of LINEAR and LINEAR_GATED. XIELU, with vector2 = a, b, c, e:
 *     x > 0: a x^2 + b x      else: c (e^min(x, e) - 1 - x) + b x */
enum fb_activation_kind {
    FB_ACTIVATION_NONE = 0,
    FB_ACTIVATION_SILU = 1,      /* x / (1 + e^-x) */
    FB_ACTIVATION_GELU_TANH = 2, /* x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) */
    FB_ACTIVATION_GELU = 3,      /* x / 2 (1 + erf(x / sqrt(2))) */
    FB_ACTIVATION_RELU = 4,
    FB_ACTIVATION_RELU2 = 5,   /* max(x, 0)^2 */
    FB_ACTIVATION_CLAMP = 6,   /* x in -limit .. limit */
    FB_ACTIVATION_XIELU = 7,   /* Huang & Schlag 2024, with the numbers of `vector2`; see above */
    FB_ACTIVATION_SIGMOID = 8, /* 1 / (1 + e^-x) */
    FB_ACTIVATION_TANH = 9,
    /* Of gates alone, gpt-oss: with g = min(gate, limit), u = up in -limit .. limit:  g / (1 + e^(-1.702 g)) (u + 1) */
    FB_ACTIVATION_CLAMPED_SILU = 10
};

/* Geometry of attention heads. A buffer of heads holds n_heads q heads [k_dim], then n_kv_heads k heads [k_dim] and v
 * heads [v_dim]; or q heads alone, in a layer that reuses another layer's K and V. */
struct fb_heads {
    int32_t n_heads;
    int32_t n_kv_heads; /* divides n_heads */
    int32_t k_dim;      /* width of a q and a k head, 1 .. 1024 */
    int32_t v_dim;      /* width of a v head, and of a head of attention's result, 1 .. 1024 */
    int32_t rope;       /* rope table of ROPE, and of the rotation that sinks need; -1: positions are not encoded */
    /* 1: a v head is the last v_dim numbers of its k head, rotation included. Buffers and pages do not hold it a second
     * time. For latent attention (DeepSeek-AI 2024, arXiv:2405.04434), whose latent is both. */
    int32_t v_in_k;
};

/* Angles of rotation. Pair i of a head, elements i and i + n_pairs, is rotated by position * inv_freq[i]; cos and sin
 * are multiplied by `scale` (YaRN's attention factor; 1 usually). Elements from 2 n_pairs on stay. */
struct fb_rope_table {
    const float *inv_freq; /* [n_pairs] */
    int32_t n_pairs;
    float scale;
};

/* Flags of struct fb_op. */
enum fb_op_flag {
    FB_HEADS_LAYER_NORM = 1, /* HEAD_NORM: layer norms without bias instead of RMS norms */
    FB_HEADS_WHOLE = 2,      /* HEAD_NORM: one RMS norm over all q heads together, one over all k heads */
    FB_HEADS_VALUES = 4,     /* HEAD_NORM: also an RMS norm without weight of each v head */
    FB_ATTEND_ALL = 8,       /* ATTENTION: to later tokens too. A sequence must be whole in its step */
    FB_ATTEND_CHUNK = 16,    /* ATTENTION: positions are cut into chunks of `window`; a token sees those of its own */
    FB_HEADS_BIASED = 32,    /* HEAD_NORM: both vectors hold weights, then as many biases; layer norms only */
    FB_ALIBI_BF16 = 64,      /* ATTENTION: biases are rounded as Falcon's; see `vector2` */
    FB_ROUTE_SIGMOID = 128,  /* ROUTER: scores are sigmoids */
    FB_ROUTE_CHOSEN = 256,   /* ROUTER: scores are logits; weights are the softmax over those chosen */
    FB_ROUTE_NORM = 512,     /* ROUTER: weights are divided by their sum */
    FB_ROUTE_TOP = 1024,     /* ROUTER: a group is as good as its best expert; else as the sum of its best two */
    FB_ROUTE_MIXER = 262144, /* ROUTER: SparseMixer; see above */
    FB_EXPERTS_GATED = 2048, /* EXPERTS: weight and bias interleave gate and up by 16 rows */
    FB_EXPERTS_SUM = 4096,   /* EXPERTS: results are summed */
    /* EXPERTS: products are multiplied by the expert's weight before bias and activation; with FB_EXPERTS_SUM that was
     * done, and results are summed as they are. */
    FB_EXPERTS_WEIGH = 8192,
    FB_CONV_GATED = 16384,     /* SHORT_CONV: `in` holds b, c and u */
    FB_HEADS_TILED = 32768,    /* DELTA_RULE: head h has q and k of head h % n_groups */
    FB_DELTA_NEGATIVE = 65536, /* DELTA_RULE: the factor of updates is 0 .. 2, so eigenvalues may be negative */
    FB_GATE_FIRST = 131072,    /* GATED_NORM: the gate comes before the norm */
    FB_HEADS_LATENT = 524288   /* HEAD_NORM: only an RMS norm of the last v_dim numbers of each k head, by `vector2` */
};

/* One operator. `vector` is, by kind:
 *     norms        weights [width], or those of one of several groups of columns [width / n]
 *     products     bias [n_rows]
 *     HEAD_NORM    weights of q heads, [k_dim] for all or [n_heads k_dim]; NULL with FB_HEADS_LATENT
 *     ROUTER, EXPERTS   corrections [n_experts], biases [n_experts n_rows]
 *     MULTIPLY, ADD, MATCH_RMS   the second input [width], where `residual` is -1
 *     MIX          the factors [n][m], where `factors` is -1
 *     SHORT_CONV   weights [K][width];  DELTA_RULE: factors of the decay [n_heads];  SSM: A and D [2 n_heads]
 *     ATTENTION    a logit of each head [n_heads], which takes its share of the softmax (Xiao et al. 2023; gpt-oss)
 * `vector2` of ATTENTION holds a slope for each head [n_heads]: slope * (position of the key - that of the query) is
 * added to its scores (ALiBi, Press et al. 2022). With FB_ALIBI_BF16 that is scale * (b(key) - b(query)) with
 * b(p) = slope * p, where slope, p and b are rounded to bf16.
 * LOGITS and the scores of ATTENTION have a soft cap where `limit` is not 0: limit tanh(x / limit). */
struct fb_op {
    enum fb_op_kind kind;
    int32_t in;       /* buffer read; -1 for EMBED and EMBED_POSITION */
    int32_t out;      /* buffer written; -1 where the op works in place or writes the caller's logits */
    int32_t residual; /* buffer added to the result, -1 for none. A norm with a residual destroys `in` */
    /* MIX: buffer [n m] of the factors of m streams of `in` in n streams of `out`; -1: `vector`. EXPERTS: buffer of the
     * router's result. DELTA_RULE, SSM: buffer of the gates. */
    int32_t factors;
    int32_t width; /* MIX: of a stream; SHORT_CONV: columns */
    int32_t layer; /* KV_WRITE, ATTENTION: 0 .. n_layers-1 of the page pool; recurrent operators: of the state pool */
    /* LINEAR: first column of `out`, those before are filled; second inputs: of `residual`; SHORT_CONV: of `in`; gates:
     * of `factors` */
    int32_t column;
    int32_t window; /* ATTENTION: a token sees itself and window-1 before it; 0 for all */
    int32_t heads;  /* HEAD_NORM, ROPE, KV_WRITE, ATTENTION: index of the geometry */
    enum fb_activation_kind activation;
    uint32_t flags;          /* enum fb_op_flag */
    const fb_weight *weight; /* EMBED*, LINEAR*, LOGITS, EXPERTS; borrowed: it must outlive the program */
    const float *vector;     /* weights of a norm, bias, or sink logits; see above. Copied */
    /* HEAD_NORM: k-head norm; LAYER_NORM, SHORT_CONV: bias; XIELU: its numbers; ATTENTION: slopes; DELTA_RULE, SSM: biases
     * of gates; ROUTER: factors. Copied */
    const float *vector2;
    int32_t vector_length; /* of `vector`; 0 when NULL */
    int32_t vector2_length;
    float eps; /* norms, MATCH_RMS, ROUTER, DELTA_RULE; SSM: the smallest dt */
    /* EMBED, LINEAR, LOGITS, SCALE, ADD, ROUTER, EXPERTS: factor; ATTENTION: factor on q.k, usually 1/sqrt(k_dim);
     * DELTA_RULE: factor on q */
    float scale;
    /* LOGITS, ATTENTION: soft cap of logits or scores, limit tanh(x / limit), 0 for none; CLAMP; SSM: the largest dt;
     * ROUTER */
    float limit;
    /* ATTENTION: a query at position p is multiplied by 1 + temperature ln(1 + floor((p + offset) / length)); 0: not */
    float temperature;
    int32_t temperature_offset, temperature_length;
    int32_t n_chosen;               /* ROUTER, EXPERTS: experts of a row */
    int32_t n_groups, n_top_groups; /* ROUTER; 0: no groups. n_groups of DELTA_RULE, SSM, GATED_NORM: see above */
    int32_t n_heads, k_dim, v_dim;  /* DELTA_RULE, SSM; k_dim, v_dim 1 .. 1024 */
};

/* What the operators of a program have in common. */
struct fb_program_shape {
    uint32_t struct_size; /* sizeof(struct fb_program_shape) */
    int32_t n_layers;     /* of the page pool */
    int32_t vocab_size;   /* token ids are below it */
    int32_t max_tokens;   /* tokens in one batch at most: 1 .. 65536 */
    int32_t n_buffers;
    int32_t n_geometries;
    const struct fb_heads *heads; /* [n_geometries] */
    int32_t n_ropes;
    const struct fb_rope_table *ropes; /* [n_ropes] */
    int32_t n_state_layers;            /* of the state pool; 0 without recurrent operators, which then need none */
};

typedef struct fb_program fb_program;

/* Checks the operators (kinds, widths, aliasing, order), plans the buffers and allocates scratch memory.
 * buffer_widths: int32 [n_buffers]. Vectors, shapes and angles are copied, weights borrowed. n_threads >= 1.
 * FB_UNSUPPORTED names the first operator that the CPU or the device cannot run. */
enum fb_status fb_program_create(const struct fb_program_shape *shape, const int32_t *buffer_widths,
    const struct fb_op *ops, int32_t n_ops, int32_t n_threads, enum fb_isa isa, fb_program **out);
/* The same on a device, which must hold all its weights; NULL for the CPU. It runs over pools of that device handle. */
enum fb_status fb_program_create_on(fb_device *device, const struct fb_program_shape *shape,
    const int32_t *buffer_widths, const struct fb_op *ops, int32_t n_ops, int32_t n_threads, enum fb_isa isa,
    fb_program **out);

/* Binds the threads of all later runs: thread i to cpus[i], numbers 0 .. 1023. Thread 0 is the one that calls
 * fb_program_run or fb_program_decode. A thread stays where it is until another program binds it; one that the system
 * refuses to bind runs anywhere. n_cpus is the program's n_threads. FB_UNSUPPORTED for a program on a device. */
enum fb_status fb_program_pin(fb_program *program, const int32_t *cpus, int32_t n_cpus);

/* Joins the parts of one model, one program per member of `group` in its order. Each part has its share of the
 * heads, of the columns between products and of the rows of the last op, and a SUM where a product has only part of
 * its columns. The joined program runs over pools of the group. Member i has the KV heads that a pool of the group
 * gives it, and of the n_results rows of the last op, with c = n_results / n_members rounded up, the c rows from
 * min(i c, n_results - c) on. Parts are borrowed; those that hold a SUM cannot run alone. */
enum fb_status fb_program_join(fb_device *group, fb_program *const *parts, int32_t n_parts, int32_t n_kv_heads,
    int32_t n_results, fb_program **out);
void fb_program_free(fb_program *program);
size_t fb_program_scratch_bytes(const fb_program *program);

/* The state after the first n_tokens tokens of a step, 1 or more, is also written to `slot`. */
struct fb_state_keep {
    int32_t n_tokens, slot;
};

/* One sequence's share of a batch: its tokens follow the n_past positions already in its pages.
 *
 * With a window W and S sinks (Xiao et al. 2023, "attention sinks") the token at position p >= S + W attends to the
 * first S positions and the last W, itself included; before that, to all. Sinks appear to lie right before the
 * window: sink j at distance S + W - 1 - j, so no distance exceeds what the model was trained on. What a token
 * attends to depends on its position only, not on the batch. An operator's own window hides the sinks if it is
 * shorter than S + W. */
struct fb_sequence {
    /* Page table: pages[i] holds positions 32 i .. 32 i + 31, as many as n_past + n_tokens need. -1 where no token of
     * the batch attends: between the page of the sinks and that of the first visible position. */
    const int32_t *pages;
    int32_t n_pages;
    int32_t n_past;
    int32_t n_tokens; /* >= 1 */
    int32_t window;   /* W: 0 for everything, else >= 1 */
    int32_t n_sinks;  /* S: 0 .. FB_PAGE_POSITIONS; 0 without a window */
    /* Slots of the state pool, ignored by programs without recurrent operators. */
    int32_t state_in;                  /* read: the state after n_past tokens; -1: zeros, where n_past is 0 */
    int32_t state_out;                 /* written: the state after n_past + n_tokens; may be state_in, in place */
    const struct fb_state_keep *keeps; /* [n_keeps], n_tokens ascending and below the sequence's */
    int32_t n_keeps;
};

struct fb_batch {
    uint32_t struct_size;  /* sizeof(struct fb_batch) */
    int32_t n_tokens;      /* sum over the sequences; <= max_tokens */
    const int32_t *tokens; /* [n_tokens], sequence after sequence */
    const struct fb_sequence *sequences;
    int32_t n_sequences;
    const int32_t *outputs; /* [n_outputs] rows of the batch whose logits are wanted, ascending, no row twice */
    int32_t n_outputs;
    fb_state_pool *states; /* NULL for a program without recurrent operators */
};

/* Runs the program over a batch in one parallel region. Writes the batch's positions of the pages, the slots state_out
 * and those of `keeps`, and `logits` [n_outputs, rows of the last op's weight], nothing else. Two sequences of a batch
 * must not write the same page or slot, nor may one read a slot that another writes. On an error pages, slots and logits
 * are unchanged, except after FB_NON_FINITE and FB_DEVICE_FAILED: then the batch's positions and the slots that it
 * writes are undefined and must not be used. */
enum fb_status fb_program_run(
    fb_program *program, fb_page_pool *pool, const struct fb_batch *batch, float *logits, size_t n_logits);

/* A device's program records a decode step (one token per sequence) as a CUDA graph when its size, rounded up,
 * comes for the second time, and launches the graph from then on. That changes the time of a step, never its bits. */
struct fb_graph_info {
    uint32_t struct_size; /* sizeof(struct fb_graph_info), filled by the library */
    bool is_on;
    int32_t n_graphs;                           /* graphs held */
    int64_t n_recorded, n_replayed, n_launched; /* since creation; n_launched: steps run operator by operator */
    enum fb_status status;                      /* FB_OK, or why a step could not be recorded or launched as a graph; */
    char reason[192];                           /* steps of its size run operator by operator from then on */
};

/* Turns graphs on (as they are at first) or off and drops those held; not while the program runs. Both return
 * FB_UNSUPPORTED for a program on the CPU. */
enum fb_status fb_program_set_graphs(fb_program *program, bool is_on);
enum fb_status fb_program_graph_info(const fb_program *program, struct fb_graph_info *out);

/* ---- Sampling ---------------------------------------------------------------------------------------------------- */

/* Steps of the sampling chain, run in the order of fb_sampling.chain. A step with a neutral parameter does nothing. */
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
    float temperature;          /* >= 0; 0 is greedy: the likeliest token after bias, penalties and DRY */
    int32_t top_k;              /* 0 off */
    float top_p;                /* (0, 1], 1 off */
    float min_p;                /* [0, 1], 0 off */
    float typical_p;            /* (0, 1], 1 off */
    float repetition_penalty;   /* > 0, 1 off */
    float frequency_penalty;    /* 0 off */
    float presence_penalty;     /* 0 off */
    int32_t penalty_window;     /* last tokens of the history that the three penalties count; -1 all, 0 none */
    float dry_multiplier;       /* 0 off */
    float dry_base;             /* >= 1 */
    int32_t dry_allowed_length; /* >= 1 */
    int32_t dry_window;         /* last tokens of the history that DRY searches; -1 all, 0 none */
    float xtc_probability;      /* [0, 1], 0 off */
    float xtc_threshold;        /* (0, 0.5] to have an effect */
    uint64_t seed;
    int32_t n_chain;
    uint8_t chain[16]; /* enum fb_sampler, each at most once */
};

/* Neutral settings (temperature 1, everything else off) and the default chain order. */
void fb_sampling_default(struct fb_sampling *out);

/* Samples one token.
 *   logits      f32 [vocab_size], unchanged
 *   position    of the sampled token in its sequence; with the seed it keys the random numbers (Philox 4x32-10)
 *   history     the tokens so far, oldest first (penalties, DRY)
 *   bias        ids [n_bias] with values [n_bias]; -INFINITY bans
 *   breakers    tokens at which DRY's matches end [n_breakers]
 *   work        scratch of fb_sample_work_bytes(vocab_size) bytes, 16-byte aligned
 *   token       the sampled id;  logprob  its natural log-probability under the plain softmax of `logits`
 * FB_NON_FINITE if logits hold NaN or +infinity or nothing finite; FB_INVALID_ARGUMENT if every token is banned. */
enum fb_status fb_sample(const float *logits, int32_t vocab_size, const struct fb_sampling *settings, uint64_t position,
    const int32_t *history, int32_t n_history, const int32_t *bias_ids, const float *bias_values, int32_t n_bias,
    const int32_t *breakers, int32_t n_breakers, void *work, int32_t *token, float *logprob);
size_t fb_sample_work_bytes(int32_t vocab_size);

/* The probabilities that the chain leaves, f32 [vocab_size], 0 for what it removed; XTC's random number is the same
 * as in fb_sample. Same arguments. */
enum fb_status fb_sample_probabilities(const float *logits, int32_t vocab_size, const struct fb_sampling *settings,
    uint64_t position, const int32_t *history, int32_t n_history, const int32_t *bias_ids, const float *bias_values,
    int32_t n_bias, const int32_t *breakers, int32_t n_breakers, void *work, float *probabilities);

/* Four random words for (seed, position, stream): Philox 4x32-10 of Salmon et al., SC'11. */
void fb_random(uint64_t seed, uint64_t position, uint32_t stream, uint32_t out[4]);

/* ---- Decoding several tokens in one call ------------------------------------------------------------------------- */

/* A sequence that is decoded. Sampling arguments as in fb_sample, which gets the position n_history + n_sampled. */
struct fb_decode_request {
    struct fb_sequence sequence; /* as the first step computes it; pages for all positions of n_steps */
    int32_t n_steps;             /* tokens to sample at most; 0: a prefill chunk, computed in the first step only */
    int32_t n_sampled;           /* result: tokens sampled */
    /* [n_history + n_steps]: the tokens so far, the last sequence.n_tokens of them not computed yet; sampled tokens are
     * appended. */
    int32_t *history;
    int32_t n_history;
    int32_t n_ends;
    const int32_t *ends; /* end tokens: the sequence stops behind one */
    float *logprobs;     /* [n_steps], results; NULL if that is 0 */
    const struct fb_sampling *settings;
    const int32_t *bias_ids;
    const float *bias_values;
    int32_t n_bias;
    int32_t n_breakers;
    const int32_t *breakers;
    /* Result: tokens that the state in sequence.state_out has seen; -1 where a step failed and it is undefined. Only of
     * programs with recurrent operators. */
    int32_t state_position;
};

/* Runs up to n_steps decode steps. Each computes the tokens of every active sequence that are not computed yet and
 * samples its next token: those that fb_program_run and fb_sample would give. A device samples where the logits
 * are, and does not copy them. Ends early when no sequence is active, and after a step at which *stop, which
 * another thread may set, is not 0. A sequence whose sampling fails stops with fewer tokens and no end token;
 * fb_sample says why. An error in the first step is returned; a later one ends the call, and the next call meets
 * it.
 *   states    the state pool, NULL for a program without recurrent operators. The first step goes from state_in to
 *             state_out and writes `keeps`; later ones are in place
 *   logits    scratch of at least n_requests x vocab_size
 *   seconds   [n_steps] since the call for each step;  n_done  how many steps ran */
enum fb_status fb_program_decode(fb_program *program, fb_page_pool *pool, fb_state_pool *states,
    struct fb_decode_request *requests, int32_t n_requests, int32_t n_steps, const int32_t *stop, float *logits,
    size_t n_logits, double *seconds, int32_t *n_done);

/* ---- Operators on their own -------------------------------------------------------------------------------------- */

/* The operators of programs, one at a time on the caller's arrays, with the same kernels. Arrays are f32,
 * row-major, and do not overlap unless stated. n_threads >= 1. Each returns FB_INVALID_ARGUMENT for a null pointer or
 * a bad size. */

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

/* Rotates pairs (i, i + rotary_dim / 2) of each head in place;  x [n_rows, n_heads, head_dim], positions [n_rows]
 * >= 0 */
enum fb_status fb_rope(float *x, const int32_t *positions, int32_t n_rows, int32_t n_heads, int32_t head_dim,
    int32_t rotary_dim, const float *inv_freq, float rope_scale, int32_t n_threads, enum fb_isa isa);

/* Causal self-attention of one sequence: q [n_tokens, n_heads, head_dim], k and v [n_tokens, n_kv_heads, head_dim], out
 * like q. Packs K and V into pages of their dtypes first. window as in fb_op. */
enum fb_status fb_self_attention(const float *q, const float *k, const float *v, int32_t n_tokens, int32_t n_heads,
    int32_t n_kv_heads, int32_t head_dim, int32_t window, float scale, enum fb_dtype k_dtype, enum fb_dtype v_dtype,
    int32_t n_threads, enum fb_isa isa, float *out);

/* ---- Files ------------------------------------------------------------------------------------------------------- */

/* Copies strings as GGUF stores them (each a little-endian u64 length and so many bytes) from the start of `bytes` to
 * `out` [n_bytes], with a NUL after each. Stops at `most` strings, or before one that does not end within `bytes`, is
 * longer than max_length, or contains a NUL. Returns how many were copied, the bytes read, and the bytes written. */
enum fb_status fb_join_strings(const void *bytes, size_t n_bytes, size_t most, size_t max_length, char *out,
    size_t *n_strings, size_t *n_read, size_t *n_written);

/* cffi: end */

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
