/* library.c - products with cuBLASLt. See library.h. Types and constants are those of cublasLt.h; a build
 * without that header works without the library. */
#include "library.h"

#include "base/status.h"
#include "runtime.h"

#if __has_include(<cublasLt.h>)

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

struct fb_cuda_functions {
    cublasStatus_t (*create)(cublasLtHandle_t *);
    cublasStatus_t (*destroy)(cublasLtHandle_t);
    cublasStatus_t (*operation_create)(cublasLtMatmulDesc_t *, cublasComputeType_t, cudaDataType);
    cublasStatus_t (*operation_set)(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void *, size_t);
    cublasStatus_t (*operation_destroy)(cublasLtMatmulDesc_t);
    cublasStatus_t (*layout_create)(cublasLtMatrixLayout_t *, cudaDataType, uint64_t, uint64_t, int64_t);
    cublasStatus_t (*layout_destroy)(cublasLtMatrixLayout_t);
    cublasStatus_t (*preference_create)(cublasLtMatmulPreference_t *);
    cublasStatus_t (*preference_set)(
        cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void *, size_t);
    cublasStatus_t (*preference_destroy)(cublasLtMatmulPreference_t);
    cublasStatus_t (*choose)(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
        cublasLtMatmulHeuristicResult_t *, int *);
    cublasStatus_t (*multiply)(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *,
        cublasLtMatrixLayout_t, const void *, cublasLtMatrixLayout_t, const void *, const void *,
        cublasLtMatrixLayout_t, void *, cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *, void *, size_t,
        cudaStream_t);
};

/* The algorithm chosen for a product of these sizes. */
struct choice {
    enum fb_dtype dtype;
    int32_t n_rows, n_tokens, n_cols; /* n_rows 0: unused */
    cublasLtMatmulAlgo_t algorithm;
};

enum { N_CHOICES = 64 }; /* a step has few sizes, and prefill ends with steps of any size */

struct fb_cuda_library {
    const struct fb_cuda_functions *functions;
    cublasLtHandle_t handle;
    struct choice choices[N_CHOICES];
    size_t n_made; /* the next choice replaces the oldest */
};

/* The descriptors of one product. */
struct description {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t weights, inputs, out;
    cublasLtMatmulPreference_t preference;
};

static enum fb_status check(cublasStatus_t status, const char *what) {
    if (status == CUBLAS_STATUS_SUCCESS) return FB_OK;
    return fb_fail(status == CUBLAS_STATUS_ALLOC_FAILED ? FB_DEVICE_MEMORY : FB_DEVICE_FAILED, "%s: cuBLASLt error %d",
        what, (int)status);
}

/* ---- Loading ----------------------------------------------------------------------------------------------------- */

static void *open_library(const char *path) {
    if (path) return dlopen(path, RTLD_NOW | RTLD_LOCAL);
    int driver = 0; /* a CUDA 12 driver loads the library of CUDA 13 but cannot start it */
    if (cudaDriverGetVersion(&driver) != cudaSuccess) (void)cudaGetLastError();
    void *const library = driver >= 13000 ? dlopen("libcublasLt.so.13", RTLD_NOW | RTLD_LOCAL) : NULL;
    return library ? library : dlopen("libcublasLt.so.12", RTLD_NOW | RTLD_LOCAL);
}

static enum fb_status find_functions(void *library, struct fb_cuda_functions *out) {
    const struct {
        const char *name;
        void *function;
    } wanted[] = {{"cublasLtCreate", &out->create}, {"cublasLtDestroy", &out->destroy},
        {"cublasLtMatmulDescCreate", &out->operation_create}, {"cublasLtMatmulDescSetAttribute", &out->operation_set},
        {"cublasLtMatmulDescDestroy", &out->operation_destroy}, {"cublasLtMatrixLayoutCreate", &out->layout_create},
        {"cublasLtMatrixLayoutDestroy", &out->layout_destroy},
        {"cublasLtMatmulPreferenceCreate", &out->preference_create},
        {"cublasLtMatmulPreferenceSetAttribute", &out->preference_set},
        {"cublasLtMatmulPreferenceDestroy", &out->preference_destroy}, {"cublasLtMatmulAlgoGetHeuristic", &out->choose},
        {"cublasLtMatmul", &out->multiply}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *const found = dlsym(library, wanted[i].name);
        if (!found) return fb_fail(FB_UNSUPPORTED, "cuBLASLt has no function %s", wanted[i].name);
        memcpy(wanted[i].function, &found, sizeof found); /* C has no cast from object to function pointers */
    }
    return FB_OK;
}

enum fb_status fb_cuda_functions_load(const char *path, struct fb_cuda_functions **out) {
    void *const library = open_library(path); /* never closed: CUDA may use it until the process ends */
    if (!library) {
        const char *const why = dlerror();
        return fb_fail(FB_UNSUPPORTED, "cuBLASLt (libcublasLt.so.13 or .12) cannot be loaded: %s", why ? why : "");
    }
    struct fb_cuda_functions *const functions = calloc(1, sizeof *functions);
    if (!functions) return fb_fail(FB_OUT_OF_MEMORY, "no memory for cuBLASLt's functions");
    const enum fb_status status = find_functions(library, functions);
    if (status != FB_OK) {
        free(functions);
        return status;
    }
    *out = functions;
    return FB_OK;
}

enum fb_status fb_cuda_library_create(const struct fb_cuda_functions *functions, struct fb_cuda_library **out) {
    struct fb_cuda_library *const library = calloc(1, sizeof *library);
    if (!library) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a cuBLASLt handle");
    library->functions = functions;
    fb_cuda_lock_memory(); /* it allocates memory */
    const cublasStatus_t created = functions->create(&library->handle);
    fb_cuda_unlock_memory();
    const enum fb_status status = check(created, "starting cuBLASLt");
    if (status != FB_OK) {
        free(library);
        return status;
    }
    *out = library;
    return FB_OK;
}

void fb_cuda_library_free(struct fb_cuda_library *library) {
    if (!library) return;
    fb_cuda_lock_memory();
    library->functions->destroy(library->handle);
    fb_cuda_unlock_memory();
    free(library);
}

/* ---- Products ---------------------------------------------------------------------------------------------------- */

/* cuBLASLt's matrices are column-major, so our rows are its columns: out^T = weights inputs^T, with the
 * weights transposed. */
static enum fb_status describe(
    const struct fb_cuda_functions *f, const struct fb_cuda_matrices *m, struct description *d) {
    const cudaDataType type = m->dtype == FB_BF16 ? CUDA_R_16BF : CUDA_R_16F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const uint64_t n_rows = (uint64_t)m->n_rows, n_tokens = (uint64_t)m->n_tokens, n_cols = (uint64_t)m->n_cols;
    const size_t workspace_bytes = FB_CUDA_WORKSPACE_BYTES;
    FB_TRY(check(f->operation_create(&d->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing a product"));
    FB_TRY(check(f->operation_set(d->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed),
        "describing a product"));
    FB_TRY(check(f->layout_create(&d->weights, type, n_cols, n_rows, m->n_cols), "describing weights"));
    FB_TRY(check(f->layout_create(&d->inputs, type, n_cols, n_tokens, m->n_cols), "describing inputs"));
    FB_TRY(check(f->layout_create(&d->out, CUDA_R_32F, n_rows, n_tokens, m->n_rows), "describing results"));
    FB_TRY(check(f->preference_create(&d->preference), "choosing a product"));
    return check(f->preference_set(
                     d->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof workspace_bytes),
        "choosing a product");
}

static void destroy(const struct fb_cuda_functions *f, const struct description *d) {
    if (d->preference) f->preference_destroy(d->preference);
    if (d->out) f->layout_destroy(d->out);
    if (d->inputs) f->layout_destroy(d->inputs);
    if (d->weights) f->layout_destroy(d->weights);
    if (d->operation) f->operation_destroy(d->operation);
}

static enum fb_status choose(struct fb_cuda_library *library, const struct fb_cuda_matrices *m,
    const struct description *d, const cublasLtMatmulAlgo_t **out) {
    const struct fb_cuda_functions *const f = library->functions;
    for (struct choice *c = library->choices; c < library->choices + N_CHOICES; c++)
        if (c->n_rows == m->n_rows && c->n_tokens == m->n_tokens && c->n_cols == m->n_cols && c->dtype == m->dtype) {
            *out = &c->algorithm;
            return FB_OK;
        }
    cublasLtMatmulHeuristicResult_t found;
    int n_found = 0;
    FB_TRY(check(f->choose(library->handle, d->operation, d->weights, d->inputs, d->out, d->out, d->preference, 1,
                     &found, &n_found),
        "choosing a product"));
    if (n_found == 0) return fb_fail(FB_DEVICE_FAILED, "cuBLASLt has no algorithm for this product");
    FB_TRY(check(found.state, "choosing a product"));
    struct choice *const c = &library->choices[library->n_made++ % N_CHOICES];
    *c = (struct choice){m->dtype, m->n_rows, m->n_tokens, m->n_cols, found.algo};
    *out = &c->algorithm;
    return FB_OK;
}

static enum fb_status multiply(struct fb_cuda_library *library, const struct fb_cuda_matrices *m,
    const struct description *d, fb_cuda_stream stream) {
    const struct fb_cuda_functions *const f = library->functions;
    const float one = 1.0f, zero = 0.0f;
    const cublasLtMatmulAlgo_t *algorithm = NULL;
    FB_TRY(choose(library, m, d, &algorithm));
    return check(
        f->multiply(library->handle, d->operation, &one, m->weights, d->weights, m->inputs, d->inputs, &zero, m->out,
            d->out, m->out, d->out, algorithm, m->workspace, FB_CUDA_WORKSPACE_BYTES, (cudaStream_t)stream),
        "a product with cuBLASLt");
}

enum fb_status fb_cuda_library_multiply(
    struct fb_cuda_library *library, const struct fb_cuda_matrices *matrices, fb_cuda_stream stream) {
    struct description d = {0};
    enum fb_status status = describe(library->functions, matrices, &d);
    if (status == FB_OK) status = multiply(library, matrices, &d, stream);
    destroy(library->functions, &d);
    return status;
}

#else

enum fb_status fb_cuda_functions_load(const char *path, struct fb_cuda_functions **out) {
    (void)path, (void)out;
    return fb_fail(FB_UNSUPPORTED, "this build of Fabula has no cuBLASLt: cublasLt.h was missing when it was built");
}

/* Never called without functions. */
enum fb_status fb_cuda_library_create(const struct fb_cuda_functions *functions, struct fb_cuda_library **out) {
    (void)functions, (void)out;
    return FB_UNSUPPORTED;
}

void fb_cuda_library_free(struct fb_cuda_library *library) {
    (void)library;
}

enum fb_status fb_cuda_library_multiply(
    struct fb_cuda_library *library, const struct fb_cuda_matrices *matrices, fb_cuda_stream stream) {
    (void)library, (void)matrices, (void)stream;
    return FB_UNSUPPORTED;
}

#endif
