/*
 * device.h - memory and programs that are not this process's own: a GPU's.
 *
 * A device is a number and a table of functions. What lies on one carries its handle (fb_weight, fb_page_pool, fb_program), and
 * the public functions that touch its memory go through the table; a NULL handle is the CPU. Every allocation holds the handle, so
 * it may be freed in any order. Which kind of device a build has is decided by what it is linked with: see fb_device_kind_of_build.
 */
#ifndef FABULA_BASE_DEVICE_H
#define FABULA_BASE_DEVICE_H

#include "fabula.h"

#include <stdatomic.h>

struct fb_sample_plan; /* ops/sample_plan.h */
struct fb_sample_change;

/* Results of a batch: rows of logits, or of some rows only the token that a plan draws from them. */
struct fb_results {
    float *logits;                          /* [n_outputs][rows of the last op] */
    const bool *is_drawn;                   /* [n_outputs] rows whose logits are not wanted; NULL for none */
    const struct fb_sample_plan *plans;     /* [n_plans] one for each of those, in order */
    const struct fb_sample_change *changes; /* [n_changes] of all plans */
    int32_t n_plans, n_changes;
    int32_t *tokens; /* [n_outputs] of those: what was drawn; -1 if every token was banned */
    float *logprobs; /* [n_outputs] and its log-probability, as fb_sample tells them */
};

enum fb_way { FB_TO_DEVICE, FB_FROM_DEVICE, FB_ON_DEVICE };

/* Every function may be called by any thread and returns when its work is done; those of a group by one thread at a time. */
struct fb_device_kind {
    enum fb_status (*count)(int32_t *out);
    enum fb_status (*describe)(int32_t index, struct fb_device_info *out);
    enum fb_status (*check)(int32_t index); /* FB_DEVICE_FAILED, and why, if it is one that this build cannot use */
    enum fb_status (*take)(int32_t index, size_t n_bytes, void **out); /* FB_DEVICE_MEMORY if there is none */
    void (*release)(int32_t index, void *memory);
    enum fb_status (*copy)(int32_t index, enum fb_way way, void *to, const void *from, size_t n_bytes);
    enum fb_status (*clear)(int32_t index, void *memory, size_t n_bytes);

    /* A vendor's library of products, from `path` or where the system finds it; what comes out is freed by free(). */
    enum fb_status (*load_products)(int32_t index, const char *path, void **out);

    /* Whether programs may hold operators of this kind. */
    bool (*runs)(enum fb_op_kind kind);

    /* What a program that was checked and planned needs on its device. The program outlives it. */
    enum fb_status (*program_create)(const fb_program *program, void **out);
    void (*program_free)(void *on_device);
    /* The batch was checked. */
    enum fb_status (*program_run)(
        void *on_device, const fb_page_pool *pool, const struct fb_batch *batch, const struct fb_results *results);
    /* See fb_program_set_graphs; not while the program runs. */
    void (*program_set_graphs)(void *on_device, bool is_on);
    void (*program_graph_info)(const void *on_device, struct fb_graph_info *out);

    /* Links between devices, and a batch over programs and pools of each of them; n_results: rows of the last op in all. */
    enum fb_status (*group_open)(const int32_t *indices, int32_t n, void **out);
    void (*group_close)(void *links);
    enum fb_status (*group_run)(void *links, fb_program *const *parts, fb_page_pool *const *pools, int32_t n_results,
        const struct fb_batch *batch, const struct fb_results *results);
};

struct fb_device {
    const struct fb_device_kind *kind;
    int32_t index;
    size_t budget;
    void *products; /* of load_products, NULL: the kind's own */
    atomic_size_t used;
    atomic_int n_holders;                /* the handle, each allocation, and groups */
    fb_device *members[FB_MOST_MEMBERS]; /* of a group, on which itself nothing lies */
    int32_t n_members;
    void *links; /* of a group: the kind's */
};

/* The GPUs of this build, NULL without CUDA: native/cuda/absent.c or native/cuda/devices.c. */
const struct fb_device_kind *fb_device_kind_of_build(void);

/* One holder more, for what is no allocation, and one less. */
void fb_device_hold(fb_device *device);
void fb_device_let_go(fb_device *device);

/* Memory of a device, counted. `what` it is for completes "no memory for ..."; NULL for no bytes. */
enum fb_status fb_device_take(fb_device *device, const char *what, size_t n_bytes, void **out);
void fb_device_release(fb_device *device, void *memory, size_t n_bytes);

#endif
