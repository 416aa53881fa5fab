/* avx512_amx.c - the AMX kernels on a CPU that has all they need but its tiles. */
#include "emulated/tiles.h"

#define KERNEL_TABLE fb_kernels_avx512_amx_emulated
#define MATRIX_TILES "kernels/blocks_amx.h"
#include "kernels/kernels.h"
extern const struct fb_kernels fb_kernels_avx512_amx_emulated;
#include "kernels/avx512.h"
