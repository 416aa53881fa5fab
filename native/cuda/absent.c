/* absent.c - a build without CUDA has no GPUs. */
#include "base/device.h"

const struct fb_device_kind *fb_device_kind_of_build(void) {
    return NULL;
}
