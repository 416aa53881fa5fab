/* finish.cuh - what becomes of a product's sum: bias, SwiGLU, residual, and whether it is finite. All kernels of products end here. */
#ifndef FABULA_CUDA_FINISH_CUH
#define FABULA_CUDA_FINISH_CUH

#include "device.h"
#include "kernels.h"

enum { FB_LANES = 16 }; /* rows of a panel */

/* Puts a sum where it belongs. `panel` and `lane` name its row; with SwiGLU that of the gate, and `up` is the other sum. */
FB_DEVICE void fb_finish(const fb_cuda_linear &a, int64_t token, int32_t panel, int lane, float sum, float up) {
    const int32_t row = panel * FB_LANES + lane, column = a.swiglu ? panel / 2 * FB_LANES + lane : row;
    if (column >= a.width) return;
    if (a.bias) sum += a.bias[row];
    if (a.swiglu) {
        if (a.bias) up += a.bias[row + FB_LANES];
        sum = sum / (1.0f + fb_exp(-sum)) * up;
    }
    if (a.residual) sum += a.residual[token * a.ld_residual + column];
    if (a.non_finite && !fb_is_finite(sum)) *a.non_finite = 1;
    a.out[token * a.ld_out + column] = sum;
}

#endif
