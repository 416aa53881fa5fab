/*
 * common.h - buffers initialized with NaN, random numbers, and the two comparisons that the kernel tests use.
 *
 * Compiled by nvcc the same tests run on a GPU (tests/native/gpu.sh): buffers are then memory that both sides
 * can access, and launches must wait for their end, as with CUDA_LAUNCH_BLOCKING=1.
 */
#ifndef FABULA_TESTS_CUDA_COMMON_H
#define FABULA_TESTS_CUDA_COMMON_H

#include "access.h"
#include "check.h"
#include "quant/convert.h"
#include "views.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __CUDACC__

namespace emulate {
static bool backward; /* a GPU's threads have their own order */
}

static inline void *allocate_memory(size_t n_bytes) {
    void *memory = nullptr;
    const cudaError_t error = cudaMallocManaged(&memory, n_bytes);
    if (error == cudaSuccess) return memory;
    fprintf(stderr, "no memory for a test: %s\n", cudaGetErrorString(error));
    exit(1);
}

static inline void release_memory(void *memory) {
    cudaFree(memory);
}

#else

static inline void *allocate_memory(size_t n_bytes) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 16, n_bytes)) abort();
    return memory;
}

static inline void release_memory(void *memory) {
    free(memory);
}

#endif

/* Memory of exactly the requested size, aligned to 16 bytes as launches require; every byte is 0xFF, which
 * makes NaN. */
template <class T> struct buffer {
    T *data;
    size_t n;

    explicit buffer(size_t n_) : data(static_cast<T *>(allocate_memory(n_ * sizeof(T) + (n_ == 0)))), n(n_) {
        poison();
    }
    ~buffer() {
        release_memory(data);
    }
    buffer(const buffer &) = delete;
    buffer &operator=(const buffer &) = delete;

    void poison() {
        memset(static_cast<void *>(data), 0xFF, n * sizeof(T));
    }
    T &operator[](size_t i) {
        return data[i];
    }
    const T &operator[](size_t i) const {
        return data[i];
    }
    bool same_as(const buffer &other) const {
        return n == other.n && memcmp(data, other.data, n * sizeof(T)) == 0;
    }
};

static uint64_t random_state = 1;

/* Uniform over -size .. size. */
static inline float random_number(float size) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(random_state >> 32) / 2147483648.0f * size;
}

static inline void fill(buffer<float> &x, float size) {
    for (size_t i = 0; i < x.n; i++)
        x[i] = random_number(size);
}

/* |got - wanted|| / ||wanted||, accumulated number by number. NaN if some number is NaN. */
struct difference {
    double apart = 0.0, size = 0.0;

    void add(double got, double wanted) {
        apart += (got - wanted) * (got - wanted);
        size += wanted * wanted;
    }
    double relative() const {
        return size > 0.0 ? sqrt(apart / size) : sqrt(apart);
    }
};

static const fb_dtype every_dtype[] = {FB_F32, FB_F16, FB_BF16, FB_Q4_0, FB_Q4_1, FB_Q5_0, FB_Q5_1, FB_Q8_0, FB_Q4_K,
    FB_Q5_K, FB_Q6_K, FB_Q2_K, FB_Q3_K, FB_IQ4_NL};

/* A weight of random numbers; with `n_interleaved` > 0 two matrices of that many rows are interleaved for
 * SwiGLU. */
static inline fb_weight *random_weight(fb_dtype dtype, int32_t n_rows, int32_t n_cols, int32_t n_interleaved = 0) {
    fb_weight *weight = nullptr;
    const int32_t rows = n_interleaved ? n_interleaved : n_rows;
    CHECK(fb_weight_create(dtype, n_rows, n_cols, &weight) == FB_OK);
    for (int32_t half = 0; half < (n_interleaved ? 2 : 1); half++) {
        buffer<float> x((size_t)rows * (size_t)n_cols);
        fill(x, 1.0f);
        CHECK_AT(fb_weight_pack_rows(weight, 16 * half, 16, n_interleaved ? 2 : 1, FB_F32, x.data, x.n * sizeof(float),
                     rows, 1) == FB_OK,
            "%s", fb_last_error());
    }
    return weight;
}

/* A copy of a view's panels with nothing after them, so that reads past the end are detected. */
struct device_weight {
    fb_cuda_weight view;
    buffer<char> panels;

    explicit device_weight(const fb_weight *weight) : panels(fb_weight_bytes(weight)) {
        fb_cuda_weight_view(weight, &view);
        memcpy(panels.data, view.panels, panels.n);
        view.panels = panels.data;
    }
};

#endif
