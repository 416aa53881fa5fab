/*
 * test_cuda_sample.cpp - tokens sampled by a GPU against those of the CPU's sampler from the same logits: the
 * same token, the same bits of its log-probability. Random settings, chains, histories and biases over logits
 * with ties, banned tokens and damage; `test_cuda_sample 2000` tries that many batches.
 */
#include "sample.cu"

#include "common.h"

#include <vector>

static uint32_t below(uint32_t n) {
    return (uint32_t)((double)(random_number(0.5f) + 0.5f) * n) % n;
}

static bool chance(uint32_t one_of) {
    return below(one_of) == 0;
}

/* One token to sample: its settings and inputs. */
struct sampling {
    fb_sampling settings;
    std::vector<int32_t> history, bias_ids, breakers;
    std::vector<float> bias;
    uint64_t position;
};

/* Kinds of logits, some of them hard: ties, almost all banned, equal, far apart, damaged. */
enum kind { NORMAL, COARSE, EQUAL, PEAKED, FLAT, FEW, HUGE_ONES, DAMAGED, NOTHING, KINDS };

static void make_logits(float *logits, int32_t n, int kind) {
    for (int32_t i = 0; i < n; i++) {
        const float sum = random_number(3.0f) + random_number(3.0f) + random_number(3.0f);
        logits[i] = kind == COARSE      ? roundf(sum)
                    : kind == EQUAL     ? -1.25f
                    : kind == FLAT      ? sum * 1e-4f
                    : kind == FEW       ? (chance(20) ? roundf(sum) : -INFINITY)
                    : kind == HUGE_ONES ? sum * 1e37f
                    : kind == NOTHING   ? -INFINITY
                                        : sum;
    }
    if (kind == PEAKED) logits[below((uint32_t)n)] = 40.0f;
    if (kind == FEW) logits[below((uint32_t)n)] = 2.0f;
    if (kind == DAMAGED) logits[below((uint32_t)n)] = chance(2) ? NAN : INFINITY;
}

static void shuffle_chain(fb_sampling *s) {
    for (int32_t i = s->n_chain - 1; i > 0; i--) {
        const uint32_t other = below((uint32_t)i + 1);
        const uint8_t step = s->chain[i];
        s->chain[i] = s->chain[other];
        s->chain[other] = step;
    }
    if (chance(3)) s->n_chain -= (int32_t)below((uint32_t)s->n_chain);
}

static sampling make_sampling(int32_t n) {
    static const float shares[] = {1e-9f, 0.1f, 0.5f, 0.9f, 0.99f, 0.9999999f};
    sampling d;
    fb_sampling *s = &d.settings;
    fb_sampling_default(s);
    s->seed = below(1u << 30);
    d.position = below(1u << 20);
    if (chance(2)) s->temperature = chance(4) ? 0.0f : chance(4) ? 1e-3f : 0.3f + 2.0f * (random_number(0.5f) + 0.5f);
    if (chance(3)) s->top_k = (int32_t)(chance(3) ? below((uint32_t)n + 2) : 1 + below(50));
    if (chance(3)) s->top_p = shares[below(6)];
    if (chance(4)) s->typical_p = shares[below(6)];
    if (chance(4)) s->min_p = chance(6) ? 1.0f : shares[below(5)];
    if (chance(4)) s->xtc_probability = chance(2) ? 1.0f : 0.5f;
    if (chance(4)) s->xtc_threshold = 1e-4f;
    if (chance(3)) s->repetition_penalty = 0.5f + (float)below(10) / 5.0f;
    if (chance(4)) s->frequency_penalty = random_number(1.0f);
    if (chance(4)) s->presence_penalty = random_number(1.0f);
    if (chance(3)) s->penalty_window = (int32_t)below(20);
    if (chance(3)) s->dry_multiplier = 0.8f;
    if (chance(3)) s->dry_window = (int32_t)below(60);
    if (chance(2)) shuffle_chain(s);
    for (uint32_t i = chance(3) ? 0 : below(80), most = 1 + below(12); i > 0; i--)
        d.history.push_back((int32_t)(below(most) % (uint32_t)n));
    for (uint32_t i = chance(2) ? 0 : below(chance(4) ? 2 * (uint32_t)n : 9); i > 0; i--) {
        d.bias_ids.push_back((int32_t)(below((uint32_t)n) % (chance(2) ? 8 : 1u << 30))); /* some twice, in no order */
        d.bias.push_back(chance(3) ? -INFINITY : random_number(4.0f));
    }
    if (chance(20))
        for (int32_t i = 0; i < n; i++) {
            d.bias_ids.push_back(i);
            d.bias.push_back(-INFINITY);
        }
    if (chance(3)) d.breakers.push_back((int32_t)below((uint32_t)n));
    return d;
}

#ifdef __CUDACC__
static const float LOGPROB_ERROR = 1e-6f; /* CUDA's logarithm is not the C library's */
#else
static const float LOGPROB_ERROR = 0.0f;
#endif

static int n_sampled = 0, n_refused = 0;

/* A batch that samples from some rows of logits, and not from others. */
static void compare(int32_t n, size_t n_rows) {
    const size_t ld = (size_t)n + below(3), row_bytes = fb_cuda_sample_bytes(n),
                 n_at_once = 1 + below((uint32_t)n_rows);
    std::vector<sampling> rows;
    buffer<fb_sample_plan> plans(n_rows);
    fb_sample_changes changes = {nullptr, 0, 0};
    buffer<char> work(fb_sample_work_bytes(n)), scratch(n_at_once * row_bytes);
    buffer<float> logits(2 * n_rows * ld), logprobs(n_rows);
    buffer<int32_t> tokens(n_rows);
    for (size_t i = 0; i < n_rows; i++) {
        const int kind = chance(3) ? NORMAL : (int)below(KINDS);
        make_logits(&logits[2 * i * ld], n, kind);
        rows.push_back(make_sampling(n));
        const sampling &d = rows[i];
        CHECK_AT(access_plan(n, &d.settings, d.position, d.history.data(), (int32_t)d.history.size(), d.bias_ids.data(),
                     d.bias.data(), (int32_t)d.bias_ids.size(), d.breakers.data(), (int32_t)d.breakers.size(),
                     work.data, &changes, &plans[i]) == FB_OK,
            "%s", fb_last_error());
        plans[i].row = (int32_t)(2 * i);
    }
    buffer<fb_sample_change> there((size_t)changes.n);
    if (changes.n) memcpy(there.data, changes.all, there.n * sizeof *changes.all);
    const fb_cuda_sampling all = {logits.data, (int64_t)ld, plans.data, there.data, (int32_t)n_rows, n, tokens.data,
        logprobs.data, scratch.data, (int32_t)n_at_once};
    emulate::backward = chance(2);
    CHECK(fb_cuda_sample(&all, nullptr) == 0);
    emulate::backward = false;
    for (size_t i = 0; i < n_rows; i++) {
        const sampling &d = rows[i];
        int32_t token = -1;
        float logprob = 0.0f;
        const fb_status status = fb_sample(&logits[2 * i * ld], n, &d.settings, d.position, d.history.data(),
            (int32_t)d.history.size(), d.bias_ids.data(), d.bias.data(), (int32_t)d.bias_ids.size(), d.breakers.data(),
            (int32_t)d.breakers.size(), work.data, &token, &logprob);
        const fb_sampling &s = d.settings;
        CHECK_AT((status == FB_OK) == (tokens[i] >= 0) && (status != FB_OK || tokens[i] == token),
            "row %zu of %d: %d, not %d (%s); temperature %g, top_k %d, top_p %g, typical_p %g, min_p %g, xtc %g %g", i,
            n, tokens[i], token, status == FB_OK ? "" : fb_last_error(), (double)s.temperature, s.top_k,
            (double)s.top_p, (double)s.typical_p, (double)s.min_p, (double)s.xtc_probability, (double)s.xtc_threshold);
        n_sampled += status == FB_OK;
        n_refused += status != FB_OK;
        if (status != FB_OK || tokens[i] != token) continue;
        CHECK_AT(fabsf(logprobs[i] - logprob) <= LOGPROB_ERROR * fabsf(logprob), "row %zu of %d: %.9g, not %.9g", i, n,
            (double)logprobs[i], (double)logprob);
    }
    free(changes.all);
}

int main(int argc, char **argv) {
    static const int32_t sizes[] = {1, 2, 31, 256, 257, 300, 511, 512, 513, 1025, 3000, 5003};
    const int n_batches = argc > 1 ? atoi(argv[1]) : 60;
    for (int i = 0; i < n_batches; i++)
        compare(sizes[(size_t)i % (sizeof sizes / sizeof *sizes)], 1 + below(5));
    if (argc > 1) {
        compare(151936, 3);
        printf("%d sampled, %d refused\n", n_sampled, n_refused);
    }
    return check_result();
}
