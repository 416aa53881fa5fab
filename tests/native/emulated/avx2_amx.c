/* avx2_amx.c - the AMX kernels on a CPU that has only AVX2: see avx512.c and tiles.h. */
#include "emulated/tiles.h"

#define KERNEL_TABLE fb_kernels_amx_emulated
#define MATRIX_TILES "kernels/blocks_amx.h"
#include "avx512.c"
