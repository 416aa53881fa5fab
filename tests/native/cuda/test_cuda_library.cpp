/*
 * test_cuda_library.cpp - products with cuBLASLt, replaced by a library of plain loops: loading it or
 * reporting that it is missing, rows, leading dimensions and transposes in every format, and every failing
 * call being reported without leaks.
 */
#include "dequantized.cu"

#include "cublasLt.h"
#include "library.h"
#include "products.h"

static fb_cuda_functions *functions;
static fb_cuda_library *library;
static int32_t piece_panels;

/* As native/cuda/product.c does it, in pieces of `piece_panels`. */
static int multiply_dequantized(const fb_cuda_linear &a) {
    const int32_t width = (a.weight.n_cols + 7) / 8 * 8, n_panels = (a.weight.n_rows + 15) / 16;
    const enum fb_dtype dtype = a.weight.dtype == FB_BF16 ? FB_BF16 : FB_F16;
    const size_t n_rows = (size_t)piece_panels * 16, n_tokens = (size_t)a.n_tokens;
    buffer<uint16_t> weights(n_rows * (size_t)width), inputs(n_tokens * (size_t)width);
    buffer<float> weight_scales(n_rows), input_scales(n_tokens), sums(n_tokens * n_rows);
    buffer<char> workspace(FB_CUDA_WORKSPACE_BYTES);
    const fb_cuda_rows of_weight = {dtype, width, weights.data, weight_scales.data};
    const fb_cuda_rows of_inputs = {dtype, width, inputs.data, input_scales.data};
    int error = fb_cuda_round_rows(a.x, a.ldx, a.n_tokens, a.weight.n_cols, &of_inputs, nullptr);
    for (int32_t panel = 0; panel < n_panels && !error; panel += piece_panels) {
        const int32_t n = n_panels - panel < piece_panels ? n_panels - panel : piece_panels;
        fb_cuda_matrices m = {};
        m.dtype = dtype;
        m.n_rows = n * 16;
        m.n_tokens = a.n_tokens;
        m.n_cols = width;
        m.weights = weights.data;
        m.inputs = inputs.data;
        m.out = sums.data;
        m.workspace = workspace.data;
        error = fb_cuda_dequantize_rows(&a.weight, panel, n, &of_weight, nullptr);
        CHECK_AT(fb_cuda_library_multiply(library, &m, nullptr) == FB_OK, "%s", fb_last_error());
        error = error ? error : fb_cuda_finish(&a, &of_weight, &of_inputs, panel, m.n_rows, sums.data, nullptr);
    }
    return error;
}

static void test_loading() {
    CHECK(fb_cuda_functions_load("/nowhere/libcublasLt.so.13", &functions) == FB_UNSUPPORTED);
    CHECK_AT(strstr(fb_last_error(), "cuBLASLt") && strstr(fb_last_error(), "/nowhere/"), "%s", fb_last_error());
    CHECK(fb_cuda_functions_load("libm.so.6", &functions) == FB_UNSUPPORTED); /* a library, but not this one */
    CHECK_AT(strstr(fb_last_error(), "has no function cublasLtCreate"), "%s", fb_last_error());
    CHECK_AT(fb_cuda_functions_load(PRODUCTS_LIBRARY, &functions) == FB_OK, "%s", fb_last_error());
    fake_library_fails_at(0);
    CHECK(fb_cuda_library_create(functions, &library) == FB_DEVICE_MEMORY && !library);
    CHECK(fb_cuda_library_create(functions, &library) == FB_OK);
}

/* Sixteen rows of eight columns times some tokens, all zeros. */
struct zeros {
    buffer<uint16_t> weights{16 * 8}, inputs;
    buffer<float> out;
    buffer<char> workspace{FB_CUDA_WORKSPACE_BYTES};
    fb_cuda_matrices m;

    explicit zeros(int32_t n_tokens) : inputs((size_t)n_tokens * 8), out((size_t)n_tokens * 16) {
        memset(weights.data, 0, weights.n * sizeof(uint16_t));
        memset(inputs.data, 0, inputs.n * sizeof(uint16_t));
        m = {FB_F16, 16, n_tokens, 8, weights.data, inputs.data, out.data, workspace.data};
    }
};

static void test_failures() {
    zeros product(3);
    const long held = fake_library_n_held();
    long n_calls = 0;
    for (;; n_calls++) {
        fake_library_fails_at(n_calls);
        const fb_status status = fb_cuda_library_multiply(library, &product.m, nullptr);
        fake_library_fails_at(-1);
        CHECK(fake_library_n_held() == held);
        if (status == FB_OK) break;
        CHECK(status == FB_DEVICE_FAILED || status == FB_DEVICE_MEMORY);
        CHECK_AT(strstr(fb_last_error(), "cuBLASLt error"), "%s", fb_last_error());
    }
    CHECK_AT(n_calls == 9, "%ld calls failed", n_calls);
    for (size_t i = 0; i < product.out.n; i++)
        CHECK(product.out[i] == 0.0f);
}

/* The algorithm is selected once per product size, and again after many other sizes have replaced it. */
static void test_choices() {
    zeros product(100);
    fb_cuda_matrices &m = product.m;
    const long before = fake_n_choices();
    for (int round = 0; round < 3; round++)
        for (m.n_tokens = 60; m.n_tokens < 64; m.n_tokens++)
            CHECK(fb_cuda_library_multiply(library, &m, nullptr) == FB_OK);
    CHECK_AT(fake_n_choices() - before == 4, "%ld choices", fake_n_choices() - before);
    m.dtype = FB_BF16;
    m.n_tokens = 60;
    CHECK(fb_cuda_library_multiply(library, &m, nullptr) == FB_OK && fake_n_choices() - before == 5);
    for (m.n_tokens = 1; m.n_tokens <= 100; m.n_tokens++)
        CHECK(fb_cuda_library_multiply(library, &m, nullptr) == FB_OK);
    const long many = fake_n_choices();
    m.n_tokens = 1;
    CHECK(fb_cuda_library_multiply(library, &m, nullptr) == FB_OK && fake_n_choices() == many + 1);
}

int main() {
    static const std::vector<shape> plain = {{37, 31, false, true, true}, {21, 70, true, true, false}};
    static const std::vector<shape> blocks = {{52, 256, false, true, true}, {21, 512, true, true, true}};
    test_loading();
    for (fb_dtype dtype : every_dtype) {
        if (dtype == FB_F32) continue;
        piece_panels = dtype == FB_Q4_K ? 4 : 2; /* one piece, or several */
        const product p = {multiply_dequantized, dtype == FB_BF16 ? 6e-3 : 1e-3};
        test_non_finite(p, dtype);
        for (const shape &s : fb_dtype_block_size(dtype) == 1 ? plain : blocks)
            test_shape(p, dtype, s, {41, 8, 1});
    }
    test_failures();
    test_choices();
    fb_cuda_library_free(library);
    fb_cuda_library_free(nullptr);
    free(functions);
    CHECK(fake_library_n_held() == 0 && fake_n_products() > 0);
    const fb_cuda_weight unknown = {FB_F32, 16, 16, 1024, nullptr};
    const fb_cuda_rows nowhere = {};
    CHECK(fb_cuda_dequantize_rows(&unknown, 0, 1, &nowhere, nullptr) == -1);
    return check_result();
}
