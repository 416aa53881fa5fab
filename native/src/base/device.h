/*
 * device.h - memory and programs on a GPU.
 *
 * A device is an index and a table of functions. Objects that can live on one (fb_weight, fb_page_pool,
 * fb_program) carry its handle, and the public functions that touch its memory go through the table; a NULL
 * handle is the CPU. Every allocation holds a reference to the handle, so handle and allocations may be freed
 * in any order. The build decides which kind of device there is: see fb_device_kind_of_build.
 */
#ifndef FABULA_BASE_DEVICE_H
#define FABULA_BASE_DEVICE_H

#include "base/exported.h"
#include "fabula.h"

#include <stdatomic.h>

struct fb_sample_plan; /* ops/sample_plan.h */
struct fb_sample_change;

/* Results of a batch: for each output row its logits, or the token that a sampling plan selects from them. */
struct fb_results {
    float *logits;                          /* [n_outputs][rows of the last op] */
    const bool *is_sampled;                 /* [n_outputs] true: sampled, its logits are not copied; NULL: no row is */
    const struct fb_sample_plan *plans;     /* [n_plans] one for each sampled row, in order */
    const struct fb_sample_change *changes; /* [n_changes] logit changes of all plans */
    int32_t n_plans, n_changes;
    int32_t *tokens; /* [n_outputs] of sampled rows: the token; -1 if every token was banned */
    float *logprobs; /* [n_outputs] of sampled rows: its log-probability, as in fb_sample */
};

enum fb_direction { FB_TO_DEVICE, FB_FROM_DEVICE, FB_ON_DEVICE };

/* Functions are thread-safe and return when their work is done. Those of a group must be called by one thread
 * at a time. */
struct fb_device_kind {
    enum fb_status (*count)(int32_t *out);
    enum fb_status (*describe)(int32_t index, struct fb_device_info *out);
    enum fb_status (*check)(int32_t index); /* FB_DEVICE_FAILED, with the reason: this build cannot use the device */
    enum fb_status (*allocate)(int32_t index, size_t n_bytes, void **out); /* or FB_DEVICE_MEMORY */
    void (*release)(int32_t index, void *memory);
    enum fb_status (*copy)(int32_t index, enum fb_direction direction, void *to, const void *from, size_t n_bytes);
    enum fb_status (*clear)(int32_t index, void *memory, size_t n_bytes);

    /* Loads a vendor's matrix-product library from `path`, or from the system's search path if that is NULL.
     * `out` is freed with free(). */
    enum fb_status (*load_products)(int32_t index, const char *path, void **out);

    /* What the device lacks to run an operator: NULL for nothing, "" for the kind, or what the kind would need. */
    const char *(*lacks)(const fb_program *program, const struct fb_op *op);

    /* Creates the device's part of a checked and planned program, which must outlive it. */
    enum fb_status (*program_create)(const fb_program *program, void **out);
    void (*program_free)(void *on_device);
    /* Runs a checked batch. */
    enum fb_status (*program_run)(
        void *on_device, const fb_page_pool *pool, const struct fb_batch *batch, const struct fb_results *results);
    /* See fb_program_set_graphs. Must not be called while the program runs. */
    void (*program_set_graphs)(void *on_device, bool is_on);
    void (*program_graph_info)(const void *on_device, struct fb_graph_info *out);

    /* Links between devices, and a batch over one program and one pool per member; n_results: rows of the
     * last op over all members. */
    enum fb_status (*group_open)(const int32_t *indices, int32_t n, void **out);
    void (*group_close)(void *links);
    enum fb_status (*group_run)(void *links, fb_program *const *parts, fb_page_pool *const *pools, int32_t n_results,
        const struct fb_batch *batch, const struct fb_results *results);
};

struct fb_device {
    const struct fb_device_kind *kind;
    int32_t index;
    size_t budget;
    void *products; /* from load_products; NULL: the kind's own kernels */
    atomic_size_t used;
    atomic_int n_references;             /* the public handle, each allocation, each group */
    fb_device *members[FB_MOST_MEMBERS]; /* of a group, which holds no memory itself */
    int32_t n_members;
    void *links; /* of a group: from group_open */
};

/* The GPUs of this build, NULL without CUDA. Defined by native/cuda/devices.c or native/cuda/absent.c. */
const struct fb_device_kind *fb_device_kind_of_build(void);

/* Adds and removes a reference other than an allocation's. */
void fb_device_retain(fb_device *device);
void fb_device_drop(fb_device *device);

/* Allocates device memory within the budget. The error message is "device ... has no memory for `what`".
 * n_bytes 0 returns NULL. */
FB_EXPORTED enum fb_status fb_device_allocate(fb_device *device, const char *what, size_t n_bytes, void **out);
FB_EXPORTED void fb_device_release(fb_device *device, void *memory, size_t n_bytes);

#endif
