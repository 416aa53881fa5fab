/* graph.c - records and replays steps as CUDA graphs. See graph.h. */
#include "graph.h"

#include "program.h"

#include <stdio.h>
#include <string.h>

int32_t fb_cuda_round_up(int32_t n) {
    if (n <= 2) return n;
    int64_t size = 4;
    while (size < n)
        size *= 2;
    return (int32_t)(n <= size / 4 * 3 ? size / 4 * 3 : size);
}

struct fb_cuda_extent fb_cuda_extent_of(const struct fb_cuda_program *p, const struct fb_batch *batch) {
    struct fb_cuda_extent rows = {batch->n_tokens, batch->n_outputs, false};
    if (!p->graphs.info.is_on || batch->n_tokens != batch->n_sequences || batch->n_tokens > FB_CUDA_GRAPH_TOKENS)
        return rows;
    const int32_t most = p->program->shape.max_tokens; /* rows of the buffers */
    rows.n_tokens = fb_cuda_round_up(rows.n_tokens);
    rows.n_outputs = fb_cuda_round_up(rows.n_outputs);
    if (rows.n_tokens > most) rows.n_tokens = most;
    if (rows.n_outputs > most) rows.n_outputs = most;
    rows.is_padded = true;
    return rows;
}

/* ---- Graphs by key ----------------------------------------------------------------------------------------------- */

static bool same_memory(const struct fb_cuda_graph_key *a, const struct fb_cuda_graph_key *b) {
    return a->inputs == b->inputs && a->outputs == b->outputs && a->partials == b->partials &&
           a->dequantized == b->dequantized;
}

static bool same_key(const struct fb_cuda_graph_key *a, const struct fb_cuda_graph_key *b) {
    return same_memory(a, b) && a->n_tokens == b->n_tokens && a->n_outputs == b->n_outputs &&
           a->n_parts == b->n_parts && a->pages.memory == b->pages.memory && a->pages.k.dtype == b->pages.k.dtype &&
           a->pages.v.dtype == b->pages.v.dtype; /* the shape of pages is the program's */
}

static void drop(struct fb_cuda_graphs *graphs, int32_t number) {
    if (graphs->all[number].launchable) {
        fb_cuda_lock_memory();
        cudaGraphExecDestroy(graphs->all[number].launchable);
        fb_cuda_unlock_memory();
        graphs->info.n_graphs--;
    }
    graphs->all[number] = graphs->all[--graphs->n];
}

void fb_cuda_drop_graphs(struct fb_cuda_graphs *graphs) {
    while (graphs->n > 0)
        drop(graphs, graphs->n - 1);
}

/* Returns the entry of a key; *is_new: it was just added. Drops entries that refer to released memory, and
 * the least recently used one if the table is full. */
static struct fb_cuda_graph *look_up(struct fb_cuda_graphs *graphs, const struct fb_cuda_graph_key *key, bool *is_new) {
    int32_t oldest = 0;
    for (int32_t i = graphs->n - 1; i >= 0; i--)
        if (!same_memory(&graphs->all[i].key, key)) drop(graphs, i);
    for (int32_t i = 0; i < graphs->n; i++) {
        struct fb_cuda_graph *graph = &graphs->all[i];
        if (same_key(&graph->key, key)) {
            *is_new = false;
            return graph;
        }
        if (graph->last_used < graphs->all[oldest].last_used) oldest = i;
    }
    if (graphs->n == FB_CUDA_MOST_GRAPHS) drop(graphs, oldest);
    *is_new = true;
    graphs->all[graphs->n] = (struct fb_cuda_graph){.key = *key};
    return &graphs->all[graphs->n++];
}

/* ---- Recording and replaying ------------------------------------------------------------------------------------- */

/* The step itself runs without a graph, so this is not an error of the call: the reason is kept for
 * fb_program_graph_info. */
static bool refuse(struct fb_cuda_graphs *graphs, struct fb_cuda_graph *graph, const char *what, int error) {
    cudaGetLastError(); /* or the next call would report it again */
    graph->is_refused = true;
    graphs->info.status = error == cudaErrorMemoryAllocation ? FB_DEVICE_MEMORY : FB_DEVICE_FAILED;
    snprintf(graphs->info.reason, sizeof graphs->info.reason, "%s: CUDA error %d, %s", what, error,
        cudaGetErrorString((cudaError_t)error));
    return false;
}

/* Whether the recording was broken, which another thread can cause. */
static bool is_broken(int error) {
    return error == cudaErrorStreamCaptureInvalidated || error == cudaErrorStreamCaptureUnsupported;
}

/* Other threads may allocate and copy meanwhile: the capture mode concerns this thread alone, the stream does
 * not wait for the default one, and copies wait for streams of their own. */
static bool record(struct fb_cuda_program *p, struct fb_cuda_graph *graph, const struct fb_cuda_step *step) {
    struct fb_cuda_step launched = *step;
    cudaGraph_t recorded = NULL;
    int error = cudaStreamBeginCapture(p->stream, cudaStreamCaptureModeThreadLocal);
    if (error) return refuse(&p->graphs, graph, "starting to record", error);
    const enum fb_status status = fb_cuda_launch(p, &launched);
    /* Also after a failure, or the stream would keep recording. */
    error = cudaStreamEndCapture(p->stream, &recorded);
    if (!error && status != FB_OK) error = cudaErrorUnknown;
    if (!error) {
        fb_cuda_lock_memory(); /* it allocates memory */
        error = cudaGraphInstantiateWithFlags(&graph->launchable, recorded, 0);
        fb_cuda_unlock_memory();
    }
    if (recorded) cudaGraphDestroy(recorded);
    if (error) {
        graph->launchable = NULL;
        if (is_broken(error) && ++graph->n_broken < FB_CUDA_MOST_BROKEN) {
            cudaGetLastError(); /* or the next call would report it again */
            return false;
        }
        return refuse(&p->graphs, graph, "recording a step", error);
    }
    p->graphs.info.n_graphs++;
    p->graphs.info.n_recorded++;
    return true;
}

/* Launches the step as a graph; false if it could not. */
static bool replay(struct fb_cuda_program *p, const struct fb_cuda_step *step) {
    struct fb_cuda_graphs *graphs = &p->graphs;
    const struct fb_cuda_graph_key key = {.n_tokens = step->d.rows.n_tokens,
        .n_outputs = step->d.rows.n_outputs,
        .n_parts = step->d.n_parts,
        .pages = step->pages,
        .inputs = p->inputs.device,
        .outputs = p->outputs.device,
        .partials = p->partials.device,
        .dequantized = p->dequantized.device};
    bool is_new;
    struct fb_cuda_graph *graph = look_up(graphs, &key, &is_new);
    graph->last_used = ++graphs->n_steps;
    if (is_new || graph->is_refused || (!graph->launchable && !record(p, graph, step))) return false;
    const int error = cudaGraphLaunch(graph->launchable, p->stream);
    if (error) return refuse(graphs, graph, "launching a recorded step", error);
    graphs->info.n_replayed++;
    return true;
}

enum fb_status fb_cuda_run_step(struct fb_cuda_program *p, struct fb_cuda_step *step) {
    if (step->d.rows.is_padded && replay(p, step)) return FB_OK;
    p->graphs.info.n_launched++;
    return fb_cuda_launch(p, step);
}

/* ---- Public functions -------------------------------------------------------------------------------------------- */

void fb_cuda_set_graphs(void *program, bool is_on) {
    struct fb_cuda_program *p = program;
    cudaSetDevice(p->device->index);
    if (!is_on) fb_cuda_drop_graphs(&p->graphs);
    p->graphs.info.is_on = is_on;
}

void fb_cuda_graph_info(const void *program, struct fb_graph_info *out) {
    const struct fb_cuda_program *p = program;
    *out = p->graphs.info;
}
