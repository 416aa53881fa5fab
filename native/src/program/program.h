/*
 * program.h - a model as a flat list of operators, checked and planned.
 *
 *     operators.c  the table of operator kinds, and the check of one operator against it
 *     create.c     checks the whole program, copies its vectors, takes memory
 *     stages.c     cuts the list into stages
 *     plan.c       decides where buffers lie
 *     run.c        executes the stages over a batch, which check_batch.c has checked, in one parallel region; rows.c has the
 *                  operators that work row by row
 *     draw.c       runs one step after the other, sampling tokens between them
 *     join.c       makes one of the programs of a group's devices
 *
 * A stage is what happens between two barriers. Operators that work token by token (norms, rope, writing KV) follow
 * each other in one stage: the thread that holds a token carries it through all of them. Products that read the same
 * buffer and write into the same one are a stage, attention is one of its own.
 *
 * A stage of products may begin with a norm, and with rounding its input to what its weights take (bf16, 8 bits). For a few rows
 * every thread does that for itself, in memory of its own, which takes less time than a barrier; for many the rows are
 * shared out, and a barrier follows. What happens to heads between products and attention is done by attention, where
 * every sequence has one token.
 *
 * A program for a device is checked and planned like any other, but takes no memory for a run: the device's kind runs it. One for a
 * group has no operators of its own but only those of its parts.
 */
#ifndef FABULA_PROGRAM_H
#define FABULA_PROGRAM_H

#include "base/device.h"
#include "kernels/kernels.h"
#include "kv/pages.h"
#include "ops/attention.h"
#include "ops/linear.h"
#include "base/team.h"

/* Rows up to which every thread makes a stage's inputs for itself. */
enum { FB_OWN_ROWS = 4 };

/* Products of a stage at most; q, k and v are three. */
enum { FB_MOST_BESIDE = 8 };

/* Threads that draw tokens of a step at most: each needs scratch of 28 bytes a token of the vocabulary. */
enum { FB_DRAWING_THREADS = 8 };

struct fb_buffer {
    int32_t width;                 /* numbers per token */
    size_t stride;                 /* floats from token to token: width rounded up to 16 */
    bool per_output;               /* rows are wanted outputs, not tokens */
    int32_t filled;                /* columns written since the first; while operators are checked */
    int32_t first_write, last_use; /* operators; -1 when unused */
    float *data;                   /* set by the plan */
    size_t offset;                 /* floats into the arena */
};

enum fb_stage_kind { FB_STAGE_ROWS, FB_STAGE_LINEAR, FB_STAGE_ATTENTION };

struct fb_stage {
    enum fb_stage_kind kind;
    int32_t first_op, n_ops;
    int32_t norm;      /* LINEAR: the RMS_NORM that belongs to it, -1 for none */
    bool is_quantized; /* LINEAR: some weight takes activations rounded to 8 bits */
    bool is_paired;    /* LINEAR: some weight takes activations rounded to bf16 */
    bool per_output;
    bool is_of_heads; /* ROWS: in steps of one token a sequence, the attention behind it does this; see fb_raw_heads */
};

/* Whether the operator multiplies by a weight: those of FB_STAGE_LINEAR. */
bool fb_is_product(const struct fb_op *op);

/* A block of scratch memory. */
struct fb_scratch {
    void *memory;
    size_t n_bytes;
};

enum { FB_MOST_SCRATCH = 24 };

struct fb_program {
    struct fb_program_shape shape;
    const struct fb_kernels *kernels;
    int32_t n_threads;
    struct fb_op *ops;
    int32_t n_ops;
    struct fb_buffer *buffers;
    struct fb_stage *stages;
    int32_t n_stages;
    float *vectors; /* every op's vectors, copied */
    size_t n_vector_floats;
    float *inv_freq;                    /* [rotary_dim / 2] */
    int32_t n_results;                  /* rows of the last op, of all parts */
    fb_device *device;                  /* NULL: the CPU */
    void *on_device;                    /* of the device's kind */
    bool is_part;                       /* holds a SUM: only a joined program runs it */
    fb_program *parts[FB_MOST_MEMBERS]; /* of a joined program, on the members of `device`; borrowed */

    /* Memory of a run, taken once. */
    float *arena; /* all buffers */
    size_t arena_floats;
    float *cos_sin;     /* [max_tokens][rotary_dim]: cos of each pair, then sin */
    float *sink_turns;  /* likewise: what turns a query from its own position to where sinks see it; see attention.h */
    int32_t *positions; /* [max_tokens] */
    int32_t *owners;    /* [max_tokens]: sequence of each token */
    int32_t *first_row; /* [max_tokens] */
    int64_t *offsets;   /* [n_threads][2][max_tokens + 1]: offsets and places of attention */
    struct fb_sharing *sharing;        /* [max_tokens]: of the batch's sequences */
    bool shares;                       /* some have key blocks in common */
    bool is_single;                    /* each has one token */
    atomic_int *parts_left;            /* [max_tokens][n_kv_heads], see attention.h */
    struct fb_scratch partials;        /* of attention; grown when a step is worth splitting, see lay_out */
    struct fb_activation *activations; /* [max_tokens][activation_blocks] */
    size_t activation_blocks;          /* of the widest input of a quantized weight */
    uint16_t *pairs;                   /* [max_tokens][pair_stride]: inputs rounded to bf16 */
    size_t pair_stride;                /* width of the widest input of a bf16 weight, rounded up to 32 */
    char *own_inputs;                  /* [n_threads][own_input_bytes]: inputs that a thread makes for itself */
    size_t own_input_bytes;
    char *attention_scratch;
    size_t attention_scratch_bytes; /* of one thread */
    char *draw_work;                /* [min(n_threads, FB_DRAWING_THREADS)][draw_work_bytes] */
    size_t draw_work_bytes;
    struct fb_team team;         /* of steps of few tokens, which meet at a barrier every some microseconds */
    struct fb_counter *counters; /* [n_stages][2][n_threads], for as many threads as a run has */
    struct fb_scratch scratch[FB_MOST_SCRATCH]; /* all of the above but `partials`: freed by a loop */
    int32_t n_scratch;
};

/* How many of the operators, from the first on, finish heads of one buffer in the order of their head_step; 0 if K and V are not
 * written by the last of them. */
int32_t fb_ops_of_heads(const struct fb_op *ops, int32_t n_ops);

/* Cuts checked operators into p->stages. */
void fb_cut_stages(struct fb_program *p);

/* Fills offset of every buffer so that two alive at once do not overlap, and tells the floats needed for `rows` rows each.
 * FB_OUT_OF_MEMORY if there is no memory to sort them. */
enum fb_status fb_plan_buffers(struct fb_buffer *buffers, int32_t n_buffers, size_t rows, size_t *n_floats);

/* Takes what sampling needs of this process's memory. */
enum fb_status fb_take_draw_work(struct fb_program *p);

/* Whether a pool has the program's shape and lies where it runs, and whether a batch is whole: counts that agree, ids of the vocabulary, pages of the
 * pool, none of which two sequences write. A pool's memory is not looked at. */
enum fb_status fb_check_pool(const struct fb_program *p, const fb_page_pool *pool);
enum fb_status fb_check_batch(
    const struct fb_program *p, const fb_page_pool *pool, const struct fb_batch *batch, size_t n_logits);

/* As fb_program_run, for a program of a device. */
enum fb_status fb_program_run_on_device(struct fb_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    const struct fb_results *results, size_t n_logits);

#endif
