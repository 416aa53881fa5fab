/* api.c - ABI version and struct sizes. Other public functions are defined in the files of their areas. */
#include "fabula.h"

#include <string.h>

uint32_t fb_abi_version(void) {
    return FB_ABI_VERSION;
}

size_t fb_sizeof(const char *struct_name) {
    static const struct {
        const char *name;
        size_t size;
    } sizes[] = {
        {"fb_op", sizeof(struct fb_op)},
        {"fb_program_shape", sizeof(struct fb_program_shape)},
        {"fb_sequence", sizeof(struct fb_sequence)},
        {"fb_batch", sizeof(struct fb_batch)},
        {"fb_sampling", sizeof(struct fb_sampling)},
        {"fb_device_info", sizeof(struct fb_device_info)},
        {"fb_graph_info", sizeof(struct fb_graph_info)},
    };
    for (size_t i = 0; struct_name && i < sizeof sizes / sizeof *sizes; i++)
        if (strcmp(struct_name, sizes[i].name) == 0) return sizes[i].size;
    return 0;
}
