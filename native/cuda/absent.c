/* absent.c - the GPUs of a build without CUDA: none. */
#include "base/device.h"

const struct fb_device_kind *fb_device_kind_of_build(void) {
    return NULL;
}
