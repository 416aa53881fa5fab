/*
 * test_cuda_linear.cpp - products on ordinary cores; and the kernels' block formats against those of the
 * library.
 */
#include "linear.cu"

#include "products.h"

static void test_layouts() {
    for (fb_dtype dtype : every_dtype) {
        const fb_cuda_layout layout = fb_cuda_layout_of(dtype);
        int32_t wanted[5];
        access_layout(dtype, wanted);
        CHECK_AT(layout.bits == wanted[0] && layout.zero == wanted[1] && (int)layout.scales == wanted[2] &&
                     layout.scale_bytes == wanted[3] && layout.super_bytes == wanted[4],
            "dtype %d", dtype);
    }
}

int main() {
    static const product ordinary = {[](const fb_cuda_linear &a) { return fb_cuda_multiply(&a, nullptr); }, 2e-6};
    /* Remainders of panels, tiles and chunks; numbers of chunks that make 1, 3, 12 and 16 segments. */
    static const shape shapes[] = {{1, 1, false, false, false}, {37, 31, false, true, true},
        {131, 100, false, true, false}, {21, 70, true, true, false}, {5, 1057, true, false, false}};
    test_layouts();
    for (fb_dtype dtype : {FB_F32, FB_BF16}) {
        test_non_finite(ordinary, dtype);
        for (const shape &s : shapes)
            test_shape(ordinary, dtype, s, {41, 33, 9, 8, 5, 2, 1});
    }
    test_shape(ordinary, FB_BF16, {140, 4352, false, false, true}, {41, 33, 9, 8, 5, 2, 1});
    fb_cuda_linear unknown = {};
    unknown.weight.dtype = FB_Q8_0;
    CHECK(fb_cuda_multiply(&unknown, nullptr) == -1);
    return check_result();
}
