/*
 * program.h - a model as a flat list of operators, checked and planned.
 *
 *     operators.c    the table of operator kinds, and the check of one operator against it
 *     create.c       checks the whole program, copies its vectors, allocates memory
 *     stages.c       cuts the list into stages
 *     plan.c         assigns buffers to memory
 *     check_batch.c  checks a batch
 *     run.c          runs the stages over a checked batch in one parallel region
 *     rows.c         the operators that work row by row
 *     experts.c      the grouped products of mixtures of experts
 *     heads.c        products with a matrix for each head
 *     states.c       the recurrent operators, with recurrences.c
 *     decode.c       runs several decode steps, sampling tokens between them
 *     join.c         joins the programs of a group's devices into one
 *
 * A stage is what happens between two barriers. Consecutive operators that work token by token (norms, rope,
 * writing KV) are one stage: the thread that takes a token runs all of them on it. Products that read the
 * same buffer and write the same one are a stage. Attention is a stage of its own, and so is each
 * recurrent operator.
 *
 * A stage of products may start with a norm, and with converting its input to what its weights take (bf16, or
 * quantized to 8 bits). For a few rows every thread does that for itself, in memory of its own, which takes
 * less time than a barrier; for more rows they are divided among the threads, followed by a barrier. When
 * every sequence has one token, attention itself does what lies between the products and it (head norms,
 * rope, writing K and V).
 *
 * A program for a device is checked and planned the same way, but allocates no memory for a run: the device
 * runs it. A program for a group has no operators of its own, only its parts.
 */
#ifndef FABULA_PROGRAM_H
#define FABULA_PROGRAM_H

#include "base/device.h"
#include "kernels/kernels.h"
#include "kv/pages.h"
#include "kv/states.h"
#include "ops/attention.h"
#include "ops/experts.h"
#include "ops/head_linear.h"
#include "ops/linear.h"
#include "base/team.h"

/* With at most so many rows every thread prepares a stage's inputs for itself. */
enum { FB_OWN_ROWS = 4 };

/* Nor if several rows have more numbers than this together: a norm and a conversion take 0.3 ns a number, so that is
 * 5 us of every thread, as long as a barrier of many. */
enum { FB_OWN_NUMBERS = 16384 };

/* Products per stage at most; q, k and v are three. */
enum { FB_MOST_PRODUCTS = 8 };

/* Threads that sample tokens of a step at most: each needs scratch of 28 bytes per token of the
 * vocabulary. */
enum { FB_SAMPLING_THREADS = 8 };

struct fb_buffer {
    int32_t width;   /* numbers per token */
    size_t stride;   /* floats from token to token: width rounded up to 16 */
    bool per_output; /* rows are wanted outputs, not tokens */
    /* While operators are checked: columns 0 .. filled-1 are written, and those from `tail` on. Where both meet, `filled`
     * is the width. */
    int32_t filled, tail;
    int32_t first_write, last_use; /* operators; -1 when unused. fb_cut_stages extends them to whole stages */
    float *data;                   /* set by the plan */
    size_t offset;                 /* in floats, from the start of the arena */
};

enum fb_stage_kind {
    FB_STAGE_ROWS,
    FB_STAGE_LINEAR,
    FB_STAGE_ATTENTION,
    FB_STAGE_EXPERTS,
    FB_STAGE_HEADS,
    FB_STAGE_STATES
};

struct fb_stage {
    enum fb_stage_kind kind;
    int32_t first_op, n_ops;
    int32_t norm;      /* LINEAR: index of the norm that belongs to it, -1 for none */
    bool is_quantized; /* LINEAR: some weight takes activations quantized to 8 bits */
    bool is_paired;    /* LINEAR: some weight takes activations rounded to bf16 */
    bool per_output;
    bool is_of_heads; /* ROWS: attention does this where every sequence has one token; see fb_raw_heads */
    bool is_router;   /* ROWS: a router, which for few rows every thread runs for itself in the EXPERTS stages */
    int32_t router;   /* EXPERTS: the index of that router, -1 for none */
};

/* Whether the operator multiplies by a weight (FB_STAGE_LINEAR). */
bool fb_is_product(const struct fb_op *op);

/* A block of scratch memory. */
struct fb_scratch {
    void *memory;
    size_t n_bytes;
};

enum { FB_MOST_ROPES = 16, FB_MOST_SCRATCH = 24 + FB_MOST_ROPES };

struct fb_program {
    struct fb_program_shape shape; /* with copies of `heads` and `ropes` */
    const struct fb_kernels *kernels;
    int32_t n_threads;
    struct fb_op *ops;
    int32_t n_ops;
    struct fb_buffer *buffers;
    struct fb_stage *stages;
    int32_t n_stages;
    float *vectors; /* copies of every op's vectors, and of the rope tables */
    size_t n_vector_floats;
    struct fb_kv_layer *kv_layers; /* [n_layers]: what the operators say of them; zeros for a layer nobody writes */
    int64_t *state_floats;         /* [n_state_layers]: numbers of each layer of the state pool; 0: nobody's */
    struct fb_angles *angles;      /* [n_ropes] */
    struct fb_heads most;          /* the largest of each size over the geometries */
    int32_t n_positions;           /* that learned positions have rows for; 0: no limit */
    bool attends_all;              /* some attention is not causal */
    int32_t most_members;          /* sequences that may share key blocks in every geometry */
    int32_t n_results;             /* rows of the last op, summed over the parts */
    fb_device *device;             /* NULL: the CPU */
    void *on_device;               /* the device's part of the program */
    bool is_part;                  /* holds a SUM, so only a joined program runs it */
    fb_program *parts[FB_MOST_MEMBERS]; /* of a joined program, one per member of `device`; borrowed */

    /* Memory of a run, allocated once. */
    float *arena; /* all buffers */
    size_t arena_floats;
    int32_t *positions;                /* [max_tokens] */
    int32_t *owners;                   /* [max_tokens]: sequence of each token */
    int32_t *first_row;                /* [max_tokens] */
    int64_t *offsets;                  /* [n_threads][2][max_tokens + 1]: of work items, see attention.h */
    struct fb_sharing *sharing;        /* [max_tokens]: of the batch's sequences */
    bool shares;                       /* some sequences share key blocks */
    bool is_single;                    /* every sequence has one token */
    atomic_int *parts_done;            /* [max_tokens][most.n_kv_heads], see attention.h */
    struct fb_scratch partials;        /* of attention; grown when a step is worth splitting */
    struct fb_activation *activations; /* [max_tokens][activation_blocks] */
    size_t activation_blocks;          /* of the widest input of a quantized weight */
    uint16_t *pairs;                   /* [max_tokens][pair_stride]: inputs rounded to bf16 */
    size_t pair_stride;                /* width of the widest input of a bf16 weight, rounded up to 32 */
    char *own_inputs;                  /* [n_threads][own_input_bytes]: inputs of few rows, for each thread */
    size_t own_input_bytes;
    char *expert_inputs;                    /* of a grouped product: rows by place, see routes.h */
    struct fb_expert_layout *expert_layout; /* NULL: no grouped products */
    char *expert_memory;                    /* [n_threads][expert_layout->n_bytes] */
    char *head_inputs; /* [n_threads][head_input_bytes]: inputs of a HEAD_LINEAR, in the format that its weight takes */
    size_t head_input_bytes;
    char *attention_scratch;
    size_t attention_scratch_bytes; /* per thread */
    float *state_scratch;           /* [n_threads][state_scratch_floats], of recurrent operators */
    size_t state_scratch_floats;
    char *sample_work; /* [min(n_threads, FB_SAMPLING_THREADS)][sample_work_bytes] */
    size_t sample_work_bytes;
    struct fb_team team;               /* size of the team in steps of few tokens, with a barrier every few us */
    struct fb_counter *counters;       /* [n_stages][2][n_threads], n_threads of the run */
    struct fb_meeting *barrier_groups; /* [fb_barrier_groups(n_threads)]; NULL if there are none */
    struct fb_scratch scratch[FB_MOST_SCRATCH]; /* all of the above but `partials`, freed by a loop */
    int32_t n_scratch;
    int32_t *cpus;     /* [n_threads] that threads are bound to; NULL: to none */
    uintptr_t *pinned; /* [n_threads]: the system's thread that was bound as this one */
};

/* How many of the operators, from the first on, finish heads of one buffer in the order of their head_step. */
int32_t fb_ops_of_heads(const struct fb_op *ops, int32_t n_ops);

/* Numbers of q heads, and of q, k and v heads together, in a row of heads. */
static inline int32_t fb_q_width(const struct fb_heads *h) {
    return h->n_heads * h->k_dim;
}

static inline int32_t fb_heads_width(const struct fb_heads *h) {
    return fb_q_width(h) + h->n_kv_heads * (h->k_dim + (h->v_in_k ? 0 : h->v_dim));
}

/* Where a thread's memory for grouped products holds what. Offsets in bytes. */
struct fb_expert_layout {
    size_t pairs, places, groups, chosen, inputs, scratch, n_bytes;
    size_t n_input_bytes; /* of all rows of a step */
};

/* The memory that the grouped products of a program need. False: it has none. */
bool fb_lay_out_experts(const struct fb_program *p, struct fb_expert_layout *layout);

/* Cuts checked operators into p->stages. */
void fb_cut_stages(struct fb_program *p);

/* Sets the offset of every buffer so that no two live ones overlap. *n_floats: size of the arena for `rows`
 * rows. FB_OUT_OF_MEMORY if there is no memory to sort them. */
enum fb_status fb_plan_buffers(struct fb_buffer *buffers, int32_t n_buffers, size_t rows, size_t *n_floats);

/* Allocates the host memory for sampling. */
enum fb_status fb_allocate_sample_work(struct fb_program *p);

/* fb_check_pool: the pool has the program's shape and is on its device. fb_check_batch: counts agree, tokens are in the
 * vocabulary, the state pool has the program's shape if it needs one, pages and slots are in their pools, and no two
 * sequences write the same ones. Neither reads the pools' memory. */
enum fb_status fb_check_pool(const struct fb_program *p, const fb_page_pool *pool);
enum fb_status fb_check_batch(
    const struct fb_program *p, const fb_page_pool *pool, const struct fb_batch *batch, size_t n_logits);

/* As fb_program_run, for a program on a device. */
enum fb_status fb_program_run_on_device(struct fb_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    const struct fb_results *results, size_t n_logits);

#endif
