/* finish.cuh - the end of every product kernel: bias, SwiGLU, residual, and the check for
 * non-finite results. */
#ifndef FABULA_CUDA_FINISH_CUH
#define FABULA_CUDA_FINISH_CUH

#include "device.h"
#include "kernels.h"

enum { FB_LANES = 16 }; /* rows of a panel */

/* Finishes and stores a sum. `panel` and `lane` give its row; with SwiGLU the gate's, and `up` is the other
 * sum. */
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
