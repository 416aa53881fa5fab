/* avx512_amx.c - the AMX kernels with emulated tiles, for CPUs that have everything else they need. */
#include "emulated/tiles.h"

#define KERNEL_TABLE fb_kernels_avx512_amx_emulated
#define MATRIX_TILES "kernels/blocks_amx.h"
#include "kernels/kernels.h"
extern const struct fb_kernels fb_kernels_avx512_amx_emulated;
#include "kernels/avx512.h"
