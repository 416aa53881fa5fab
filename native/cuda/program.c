/* program.c - creates the GPU part of a program: its vectors, its buffers, a stream. See program.h. */
#include "program.h"

#include "base/status.h"
#include "views.h"

#include <stdlib.h>

enum { ALIGNMENT = 256 }; /* in bytes, of the parts of an allocation */

size_t fb_cuda_aligned(size_t n_bytes) {
    return (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static enum fb_status allocate_pinned(size_t n_bytes, const char *what, void **out) {
    fb_cuda_lock_memory();
    const int error = cudaMallocHost(out, n_bytes);
    fb_cuda_unlock_memory();
    return fb_cuda_check(error, what);
}

static void release_pinned(void *memory) {
    if (!memory) return;
    fb_cuda_lock_memory();
    cudaFreeHost(memory);
    fb_cuda_unlock_memory();
}

static void release(struct fb_cuda_program *p, struct fb_cuda_growing *memory) {
    fb_device_release(p->device, memory->device, memory->n_bytes);
    release_pinned(memory->host);
}

enum fb_status fb_cuda_grow(struct fb_cuda_program *p, struct fb_cuda_growing *memory, size_t n_bytes, bool has_host) {
    if (n_bytes <= memory->n_bytes) return FB_OK;
    n_bytes = fb_cuda_aligned(n_bytes + n_bytes / 4);
    void *device, *host = NULL;
    FB_TRY(fb_device_allocate(p->device, "a batch", n_bytes, &device));
    if (has_host) {
        const enum fb_status status = allocate_pinned(n_bytes, "no pinned memory for a batch", &host);
        if (status != FB_OK) {
            fb_device_release(p->device, device, n_bytes);
            return status;
        }
    }
    release(p, memory);
    *memory = (struct fb_cuda_growing){device, host, n_bytes};
    return FB_OK;
}

/* Address of a part of the fixed memory; before that is allocated only the size counts. */
static void *part(struct fb_cuda_program *p, size_t *at, size_t n_bytes) {
    void *here = p->fixed ? p->fixed + *at : NULL;
    *at += fb_cuda_aligned(n_bytes);
    return here;
}

static size_t lay_out(struct fb_cuda_program *p) {
    const struct fb_program *program = p->program;
    const size_t rotary = (size_t)fb_cuda_rotary_dim(program);
    const size_t angles = (size_t)program->shape.max_tokens * rotary * sizeof(float);
    size_t at = 0;
    p->vectors = part(p, &at, program->n_vector_floats * sizeof(float));
    p->inv_freq = part(p, &at, rotary / 2 * sizeof(float));
    p->arena = part(p, &at, program->arena_floats * sizeof(float));
    p->cos_sin = part(p, &at, angles);
    p->sink_rotations = part(p, &at, angles);
    p->rounded = part(p, &at, fb_cuda_rounded_bytes(p));
    p->non_finite = part(p, &at, sizeof(int32_t));
    return at;
}

static enum fb_status upload(struct fb_cuda_program *p, void *to, const float *from, size_t n_floats) {
    if (n_floats == 0) return FB_OK;
    return p->device->kind->copy(p->device->index, FB_TO_DEVICE, to, from, n_floats * sizeof *from);
}

static enum fb_status build(struct fb_cuda_program *p) {
    const struct fb_program *program = p->program;
    int n_processors, major;
    FB_TRY(fb_cuda_enter(p->device->index));
    FB_TRY(fb_cuda_check(cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, p->device->index),
        "reading the GPU's properties"));
    FB_TRY(fb_cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, p->device->index),
        "reading the GPU's properties"));
    p->n_processors = n_processors;
    p->compute_major = major;
    FB_TRY(fb_cuda_check(cudaStreamCreateWithFlags(&p->stream, cudaStreamNonBlocking), "creating a stream"));
    void *flag;
    FB_TRY(allocate_pinned(sizeof(int32_t), "no pinned memory", &flag));
    p->host_non_finite = flag;
    p->weights = calloc((size_t)program->n_ops, sizeof *p->weights);
    if (!p->weights) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program");
    for (int32_t i = 0; i < program->n_ops; i++)
        if (program->ops[i].weight) fb_cuda_weight_view(program->ops[i].weight, &p->weights[i]);
    if (p->device->products) FB_TRY(fb_cuda_library_create(p->device->products, &p->library));
    void *fixed;
    p->n_fixed_bytes = lay_out(p);
    FB_TRY(fb_device_allocate(p->device, "a program's buffers", p->n_fixed_bytes, &fixed));
    p->fixed = fixed;
    lay_out(p);
    FB_TRY(upload(p, p->vectors, program->vectors, program->n_vector_floats));
    return upload(p, p->inv_freq, program->angles[0].inv_freq, program->angles[0].n_pairs);
}

enum fb_status fb_cuda_program_create(const fb_program *program, void **out) {
    struct fb_cuda_program *p = calloc(1, sizeof *p);
    if (!p) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program");
    p->program = program;
    p->device = program->device;
    p->graphs.info.is_on = true;
    const enum fb_status status = build(p);
    if (status != FB_OK) {
        fb_cuda_program_free(p);
        return status;
    }
    *out = p;
    return FB_OK;
}

void fb_cuda_program_free(void *on_device) {
    struct fb_cuda_program *p = on_device;
    cudaSetDevice(p->device->index);
    if (p->stream) cudaStreamSynchronize(p->stream);
    fb_cuda_drop_graphs(&p->graphs);
    release(p, &p->inputs);
    release(p, &p->outputs);
    release(p, &p->partials);
    release(p, &p->plans);
    release(p, &p->sampled);
    release(p, &p->gathered);
    release(p, &p->scratch);
    release(p, &p->dequantized);
    fb_cuda_library_free(p->library);
    release_pinned(p->host_non_finite);
    if (p->stream) cudaStreamDestroy(p->stream);
    free(p->weights);
    /* Last: it may hold the last reference to the device handle. */
    fb_device_release(p->device, p->fixed, p->n_fixed_bytes);
    free(p);
}
