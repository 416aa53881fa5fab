/* library.cpp - see cublasLt.h. */
#include "cublasLt.h"

#include "quant/convert.h"

#include <string.h>

struct fake_handle {
    int unused;
};
struct fake_operation {
    cublasOperation_t of_a; /* of A; B is not transposed, the manual's default */
};
struct fake_layout {
    cudaDataType type;
    uint64_t n_rows, n_cols;
    int64_t stride;
};
struct fake_preference {
    size_t workspace_bytes;
};

namespace {

long n_products = 0, n_choices = 0, fails_at = -1, n_held = 0;

bool fails() {
    return fails_at >= 0 && fails_at-- == 0;
}

template <class T> cublasStatus_t make(T **out, const T &value) {
    if (fails()) return CUBLAS_STATUS_ALLOC_FAILED;
    *out = new T(value);
    n_held++;
    return CUBLAS_STATUS_SUCCESS;
}

template <class T> cublasStatus_t destroy(T *made) {
    delete made;
    n_held--;
    return CUBLAS_STATUS_SUCCESS;
}

/* Column-major. */
double number_at(const void *matrix, const fake_layout *of, uint64_t row, uint64_t column) {
    const uint16_t half = static_cast<const uint16_t *>(matrix)[row + column * (uint64_t)of->stride];
    return of->type == CUDA_R_16F ? (double)fb_f16_to_f32(half) : (double)fb_f32_from_bits((uint32_t)half << 16);
}

bool fits(const fake_operation *operation, const fake_layout *a, const fake_layout *b, const fake_layout *d) {
    return operation->of_a == CUBLAS_OP_T && a->type == b->type && a->type != CUDA_R_32F && d->type == CUDA_R_32F &&
           a->n_rows == b->n_rows && a->n_cols == d->n_rows && b->n_cols == d->n_cols && a->stride % 8 == 0 &&
           b->stride % 8 == 0;
}

} // namespace

long fake_n_products() {
    return n_products;
}

long fake_n_choices() {
    return n_choices;
}

void fake_library_fails_at(long call) {
    fails_at = call;
}

long fake_library_n_held() {
    return n_held;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *out) {
    return make(out, fake_handle{});
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    return destroy(handle);
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute, cudaDataType scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_INVALID_VALUE;
    return make(out, fake_operation{CUBLAS_OP_N});
}

cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t what, const void *value, size_t n_bytes) {
    if (fails()) return CUBLAS_STATUS_INTERNAL_ERROR;
    int32_t number;
    if (what != CUBLASLT_MATMUL_DESC_TRANSA || n_bytes != sizeof number) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&number, value, sizeof number);
    operation->of_a = static_cast<cublasOperation_t>(number);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation) {
    return destroy(operation);
}

cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t *out, cudaDataType type, uint64_t n_rows, uint64_t n_cols, int64_t stride) {
    if (stride < (int64_t)n_rows) return CUBLAS_STATUS_INVALID_VALUE;
    return make(out, fake_layout{type, n_rows, n_cols, stride});
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return destroy(layout);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
    return make(out, fake_preference{0});
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
    cublasLtMatmulPreferenceAttributes_t what, const void *value, size_t n_bytes) {
    if (fails()) return CUBLAS_STATUS_INTERNAL_ERROR;
    if (what != CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES || n_bytes != sizeof preference->workspace_bytes)
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&preference->workspace_bytes, value, n_bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return destroy(preference);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t operation,
    cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int n_wanted, cublasLtMatmulHeuristicResult_t *out, int *n_found) {
    if (fails()) return CUBLAS_STATUS_INTERNAL_ERROR;
    if (!fits(operation, a, b, d) || n_wanted != 1) return CUBLAS_STATUS_INVALID_VALUE;
    n_choices++;
    *out = {};
    out->algo.data[0] = preference->workspace_bytes;
    *n_found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t operation, const void *alpha, const void *a,
    cublasLtMatrixLayout_t of_a, const void *b, cublasLtMatrixLayout_t of_b, const void *beta, const void *,
    cublasLtMatrixLayout_t, void *d, cublasLtMatrixLayout_t of_d, const cublasLtMatmulAlgo_t *algorithm,
    void *workspace, size_t workspace_bytes, cudaStream_t) {
    if (fails()) return CUBLAS_STATUS_INTERNAL_ERROR;
    const float one = *static_cast<const float *>(alpha), zero = *static_cast<const float *>(beta);
    if (!fits(operation, of_a, of_b, of_d) || one != 1.0f || zero != 0.0f || algorithm->data[0] != workspace_bytes)
        return CUBLAS_STATUS_INVALID_VALUE;
    memset(workspace, 0xFF, workspace_bytes);
    for (uint64_t column = 0; column < of_d->n_cols; column++)
        for (uint64_t row = 0; row < of_d->n_rows; row++) {
            double sum = 0.0;
            for (uint64_t k = 0; k < of_a->n_rows; k++)
                sum += number_at(a, of_a, k, row) * number_at(b, of_b, k, column);
            static_cast<float *>(d)[row + column * (uint64_t)of_d->stride] = (float)sum;
        }
    n_products++;
    return CUBLAS_STATUS_SUCCESS;
}
