/* model.h - a small model in many formats, run on the CPU and on a device, whichever kind that is. */
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

/* Pages of the model's shape in f32, where the model lies, holding random numbers: the same each time. */
fb_page_pool *model_pool(const struct model *model, int32_t n_pages);

/* Runs the same batches on both: a prompt, then tokens of several sequences, some of which slide. Logits may differ by
 * `tolerance` of their size, and must be the same bits in each of the ways to cut the prompt. Returns the number of failures. */
int model_compare(
    const struct model *model, const struct model *on_device, enum fb_dtype k, enum fb_dtype v, double tolerance);

/* One step over a pool of its own: FB_OK, or what failed. */
enum fb_status model_step(const struct model *model, float logits[MODEL_VOCABULARY]);

/* The same, drawing a token. */
enum fb_status model_draw(const struct model *model, int32_t *token, float *logprob);

/* Logits behind a prompt, over a pool of its own. */
enum fb_status model_prompt(const struct model *model, int32_t n_tokens, float logits[MODEL_VOCABULARY]);

#ifdef __cplusplus
}
#endif
#endif
