/* exchange.c - loads NCCL. See exchange.h. */
#include "exchange.h"

#include <dlfcn.h>
#include <string.h>

#ifdef FABULA_NCCL_HEADER
#include <nccl.h>
_Static_assert((int)ncclSuccess == FB_NCCL_SUCCESS && (int)ncclInProgress == FB_NCCL_IN_PROGRESS, "results of NCCL");
_Static_assert((int)ncclFloat32 == FB_NCCL_FLOAT32, "data types of NCCL");
_Static_assert(sizeof(ncclResult_t) == sizeof(int) && sizeof(ncclDataType_t) == sizeof(int), "enums of NCCL");
#define SAME_TYPE(function, type) _Static_assert(_Generic(&(function), type: 1, default: 0), #function)
SAME_TYPE(ncclCommInitAll, ncclResult_t (*)(ncclComm_t *, int, const int *));
SAME_TYPE(ncclCommDestroy, ncclResult_t (*)(ncclComm_t));
SAME_TYPE(ncclCommAbort, ncclResult_t (*)(ncclComm_t));
SAME_TYPE(ncclCommGetAsyncError, ncclResult_t (*)(ncclComm_t, ncclResult_t *));
SAME_TYPE(ncclGroupStart, ncclResult_t (*)(void));
SAME_TYPE(ncclGroupEnd, ncclResult_t (*)(void));
SAME_TYPE(ncclAllGather, ncclResult_t (*)(const void *, void *, size_t, ncclDataType_t, ncclComm_t, cudaStream_t));
SAME_TYPE(ncclGetErrorString, const char *(*)(ncclResult_t));
#endif

static const char *last_loader_error(void) {
    const char *error = dlerror();
    return error ? error : "libnccl.so.2 cannot be loaded";
}

/* Looks up a function and stores its address in the pointer at `function`. memcpy, because C has no cast
 * between object and function pointers. */
static bool find(void *library, const char *name, void *function) {
    void *const address = dlsym(library, name);
    memcpy(function, &address, sizeof address);
    return address;
}

enum fb_status fb_nccl_load(struct fb_nccl *out) {
    void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return fb_fail(FB_UNSUPPORTED, "several GPUs for one model need the library NCCL: %s", last_loader_error());
    const struct {
        const char *name;
        void *function;
    } functions[] = {
        {"ncclCommInitAll", &out->comm_init_all},
        {"ncclCommDestroy", &out->comm_destroy},
        {"ncclCommAbort", &out->comm_abort},
        {"ncclCommGetAsyncError", &out->comm_get_async_error},
        {"ncclGroupStart", &out->group_start},
        {"ncclGroupEnd", &out->group_end},
        {"ncclAllGather", &out->all_gather},
        {"ncclGetErrorString", &out->get_error_string},
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (!find(library, functions[i].name, functions[i].function))
            return fb_fail(FB_UNSUPPORTED, "the library NCCL is too old: %s", last_loader_error());
    return FB_OK;
}
