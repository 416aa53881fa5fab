/*
 * fabula_bench.h - the C API of libfabula_bench.so: the machine's limits, and the operators as plain serial loops.
 *
 * `fabula bench` alone loads it; serving never does. It calls libfabula.so, which has to be of the same build
 * (fb_bench_abi_version), and follows the rules of fabula.h: statuses, fb_last_error, shapes and sizes.
 */
#ifndef FABULA_BENCH_H
#define FABULA_BENCH_H

#include "fabula.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* cffi: begin */

/* FB_ABI_VERSION of the build; the Python package compares it with that of libfabula.so. */
uint32_t fb_bench_abi_version(void);

/* ---- Machine ----------------------------------------------------------------------------------------------------- */

/* Bytes/s of reading `n_bytes` of memory `n_repeats` times. The median of 3 .. 1000 repeats, as below. */
enum fb_status fb_measure_read(size_t n_bytes, int32_t n_repeats, int32_t n_threads, double *bytes_per_s);

/* Operations/s of the matrix kernels on data in L1, where a multiply and an add count as two: for weights in f32, in
 * bf16, and in Q8_0 (products of bytes, their scales included). */
enum fb_status fb_measure_fma(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *flops_per_s);
enum fb_status fb_measure_pairs(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *flops_per_s);
enum fb_status fb_measure_dot(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *ops_per_s);

/* Bytes/s of copying `n_bytes` from one place of a device's memory to another, reads and writes both counted: the
 * fastest of `n_repeats` copies after a first one. Allocates twice n_bytes meanwhile. */
enum fb_status fb_measure_copy(fb_device *device, size_t n_bytes, int32_t n_repeats, double *bytes_per_s);

/* ---- Serial loops ------------------------------------------------------------------------------------------------ */

/* The operators as a reader would first write them: what `fabula bench ops` compares with. Shapes as in fabula.h;
 * matmul_transb: out [m, n] = a [m, k] b [n, k]^T. No argument checks beyond null pointers. */
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
