/* model.h - a small model in many formats, run on the CPU and on a device of any kind. */
#ifndef FABULA_TESTS_CUDA_MODEL_H
#define FABULA_TESTS_CUDA_MODEL_H

#include "fabula.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MODEL_VOCABULARY = 96, MODEL_TOKENS = 160, MODEL_PAGES = 40 };

struct model;
struct model *model_create(fb_device *device); /* the same numbers each time; NULL if the device refuses */
void model_free(struct model *model);
fb_program *model_program(const struct model *model);

/* f32 pages of the model's shape, on the model's device, filled with random numbers: the same each time. */
fb_page_pool *model_pool(const struct model *model, int32_t n_pages);

/* Runs the same batches on both: a prompt, then tokens of several sequences, some with sliding windows.
 * Logits may differ by `tolerance` of their size, and must have the same bits for every division of the
 * prompt into chunks. Returns the number of failures. */
int model_compare(
    const struct model *model, const struct model *on_device, enum fb_dtype k, enum fb_dtype v, double tolerance);

/* One step over a pool of its own. Returns its status. */
enum fb_status model_step(const struct model *model, float logits[MODEL_VOCABULARY]);

/* The same, sampling a token. */
enum fb_status model_decode(const struct model *model, int32_t *token, float *logprob);

/* Logits after a prompt, over a pool of its own. */
enum fb_status model_prompt(const struct model *model, int32_t n_tokens, float logits[MODEL_VOCABULARY]);

#ifdef __cplusplus
}
#endif
#endif
