/*
 * test_cuda_tensor.cpp - products on tensor cores: rounded inputs, and every format but f32 against loops in
 * double.
 *
 * Tolerances: two parts of f16 lose up to 2^-22 of an input, less than sums in f32 do; two of bf16 up to
 * 2^-17. Weights are exact.
 */
#include "inputs.cu"
#include "rows.cu"
#include "tensor.cu"

#include "products.h"

/* Compute capability of the GPU. */
static int major_of_gpu() {
#ifdef __CUDACC__
    int major = 0;
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess);
    return major;
#else
    return FB_TILE_COLUMNS == 8 ? 7 : 8;
#endif
}

static int multiply_rounded(const fb_cuda_linear &a) {
    fb_cuda_inputs in;
    const enum fb_dtype dtype = fb_cuda_inputs_dtype(a.weight.dtype, 8);
    buffer<char> memory(fb_cuda_inputs_view(dtype, a.n_tokens, a.weight.n_cols, nullptr, &in));
    CHECK(fb_cuda_inputs_view(dtype, a.n_tokens, a.weight.n_cols, memory.data, &in) == memory.n);
    CHECK(fb_cuda_round(a.x, a.ldx, a.n_tokens, a.weight.n_cols, &in, nullptr) == 0);
    fb_cuda_linear without = a;
    without.x = nullptr;
    return fb_cuda_multiply_inputs(&without, &in, nullptr);
}

/* Rows of every magnitude in f32, and how they are rounded. The smallest are subnormal. */
static void test_inputs() {
    enum { TOKENS = 5, COLUMNS = 77 };
    static const float sizes[TOKENS] = {1.0f, 3e38f, 1e-30f, 1e-41f, 0.0f};
    buffer<float> x(TOKENS * 80);
    for (int32_t t = 0; t < TOKENS; t++)
        for (int32_t c = 0; c < COLUMNS; c++)
            x[(size_t)(t * 80 + c)] = random_number(sizes[t]);
    for (fb_dtype dtype : {FB_F16, FB_BF16}) {
        fb_cuda_inputs in;
        buffer<char> memory(fb_cuda_inputs_view(dtype, TOKENS, COLUMNS, nullptr, &in));
        fb_cuda_inputs_view(dtype, TOKENS, COLUMNS, memory.data, &in);
        CHECK(in.n_rows == 8 && in.n_chunks == 3);
        CHECK(fb_cuda_round(x.data, 80, TOKENS, COLUMNS, &in, nullptr) == 0);
        for (int32_t t = 0; t < in.n_rows; t++)
            for (int32_t c = 0; c < 96; c++) {
                const size_t part = (size_t)(in.n_chunks * in.n_rows * 32);
                const size_t at = (size_t)((c / 32 * in.n_rows + t) * 32 + fb_input_index(c % 32));
                const bool is_there = t < TOKENS && c < COLUMNS;
                const double wanted = is_there ? (double)x[(size_t)(t * 80 + c)] : 0.0;
                const uint16_t high = in.halfs[at], low = in.halfs[at + part];
                const double got = dtype == FB_F16 ? ((double)fb_f16_to_f32(high) + (double)fb_f16_to_f32(low)) *
                                                         (double)in.scales[t]
                                                   : (double)fb_bf16_to_f32(high) + (double)fb_bf16_to_f32(low);
                const double lost = dtype == FB_F16 ? 0x1p-21 : 0x1p-16, size = t < TOKENS ? (double)sizes[t] : 0.0;
                CHECK_AT(fabs(got - wanted) <= lost * fabs(wanted) + 1e-9 * size + 0x1p-134, "%d, token %d: %g for %g",
                    (int)dtype, t, got, wanted);
            }
        if (dtype == FB_BF16) continue;
        for (int32_t t = 0; t < TOKENS; t++)
            for (int32_t chunk = 0; chunk < in.n_chunks; chunk++) {
                double wanted[3] = {0.0, 0.0, 0.0};
                for (int32_t c = 0; c < 32; c++)
                    for (int32_t part = 0; part < 2; part++) {
                        const int32_t row = (part * in.n_chunks + chunk) * in.n_rows + t;
                        wanted[c / 16] += (double)fb_f16_to_f32(in.halfs[row * 32 + fb_input_index(c)]);
                    }
                wanted[2] = wanted[0] + wanted[1];
                for (int32_t i = 0; i < 3; i++)
                    CHECK(fabs((double)in.sums[(chunk * 3 + i) * in.n_rows + t] - wanted[i]) <= 0.1);
            }
    }
}

/* A fused norm and rounding of its result, against one launch for each. */
static void test_norm_and_inputs() {
    enum { TOKENS = 3 };
    for (int32_t n_cols : {77, 576, 2500})
        for (fb_dtype dtype : {FB_F16, FB_BF16}) {
            const size_t ld = (size_t)(n_cols + 3) / 4 * 4;
            buffer<float> x(TOKENS * ld), weight((size_t)n_cols), apart(TOKENS * ld), together(TOKENS * ld);
            fill(x, 2.0f);
            fill(weight, 1.0f);
            fb_cuda_inputs in;
            const size_t n_bytes = fb_cuda_inputs_view(dtype, TOKENS, n_cols, nullptr, &in);
            buffer<char> wanted(n_bytes), got(n_bytes);
            fb_cuda_inputs_view(dtype, TOKENS, n_cols, wanted.data, &in);
            CHECK(fb_cuda_rms_norm(
                      x.data, (int64_t)ld, weight.data, TOKENS, n_cols, 1e-5f, apart.data, (int64_t)ld, nullptr) == 0);
            CHECK(fb_cuda_round(apart.data, (int64_t)ld, TOKENS, n_cols, &in, nullptr) == 0);
            fb_cuda_inputs_view(dtype, TOKENS, n_cols, got.data, &in);
            CHECK(fb_cuda_norm_round(x.data, (int64_t)ld, weight.data, TOKENS, n_cols, 1e-5f, together.data,
                      (int64_t)ld, &in, nullptr) == 0);
            CHECK_AT(together.same_as(apart) && got.same_as(wanted), "%d columns, dtype %d", n_cols, (int)dtype);
        }
}

static bool has_inputs(const fb_dtype dtype, double *tolerance) {
    const enum fb_dtype inputs = fb_cuda_inputs_dtype(dtype, major_of_gpu());
    *tolerance = inputs == FB_BF16 ? 3e-5 : 2e-6;
    return inputs != FB_F32;
}

int main() {
    /* Remainders of panels, of pairs of them, tiles and chunks; numbers of chunks that make 1, 3, 6 and 8
     * segments. */
#ifdef __SANITIZE_ADDRESS__
    static const std::vector<shape> plain = {{37, 31, false, true, true}, {21, 70, true, true, false}};
    static const std::vector<shape> blocks = {{37, 256, false, true, true}}, of_32 = {{20, 96, true, true, true}};
    static const std::vector<int32_t> counts = {66, 10, 3};
#else
    static const std::vector<shape> plain = {{1, 1, false, false, false}, {37, 31, false, true, true},
        {131, 100, false, true, false}, {21, 70, true, true, false}, {5, 1057, true, false, false}};
    static const std::vector<shape> blocks = {{37, 256, false, true, true}, {21, 768, true, true, false}};
    static const std::vector<shape> of_32 = {{3, 32, false, false, false}, {20, 544, false, true, true}};
    static const std::vector<int32_t> counts = {130, 65, 64, 33, 16, 9, 8, 7, 2, 1};
#endif
    test_inputs();
    test_norm_and_inputs();
    for (fb_dtype dtype : every_dtype) {
        double tolerance;
        if (!has_inputs(dtype, &tolerance)) continue;
        const product p = {multiply_rounded, tolerance};
        test_non_finite(p, dtype);
        if (fb_dtype_block_size(dtype) == 1)
            for (const shape &s : plain)
                test_shape(p, dtype, s, counts);
        else
            for (const shape &s : blocks)
                test_shape(p, dtype, s, counts);
        if (fb_dtype_block_size(dtype) == 32)
            for (const shape &s : of_32)
                test_shape(p, dtype, s, counts);
    }
    CHECK(fb_cuda_inputs_dtype(FB_F32, 9) == FB_F32 && fb_cuda_inputs_dtype(FB_BF16, 7) == FB_F32);
    CHECK(fb_cuda_inputs_dtype(FB_Q4_K, 7) == FB_F16 && fb_cuda_inputs_dtype(FB_BF16, 9) == FB_BF16);
    fb_cuda_linear unknown = {};
    for (fb_dtype dtype : {(fb_dtype)15, FB_F32}) {
        unknown.weight.dtype = dtype;
        fb_cuda_inputs in = {};
        CHECK(fb_cuda_multiply_inputs(&unknown, &in, nullptr) == -1);
    }
    return check_result();
}
