/* check_batch.c - checks a batch before it runs: sizes, tokens, pages. See program.h. */
#include "program/program.h"

#include "base/status.h"

enum fb_status fb_check_pool(const struct fb_program *p, const fb_page_pool *pool) {
    FB_REQUIRE(pool->n_layers == p->shape.n_layers, "the page pool has %d layers, the program %d", pool->n_layers,
        p->shape.n_layers);
    for (int32_t i = 0; i < pool->n_layers; i++) {
        const struct fb_kv_layer *wanted = &p->kv_layers[i];
        const struct fb_kv_layout *has = &pool->layers[i];
        FB_REQUIRE(wanted->n_kv_heads == 0 || (has->n_kv_heads == wanted->n_kv_heads && has->k_dim == wanted->k_dim &&
                                                  has->v_dim == wanted->v_dim),
            "layer %d of the page pool has %d KV heads of %d and %d; the program has %d of %d and %d", i,
            has->n_kv_heads, has->k_dim, has->v_dim, wanted->n_kv_heads, wanted->k_dim, wanted->v_dim);
    }
    FB_REQUIRE(pool->device == p->device, "the page pool is not on the program's device");
    return FB_OK;
}

static enum fb_status check_sequence(
    const struct fb_program *p, const fb_page_pool *pool, const struct fb_sequence *s, int32_t index) {
    FB_REQUIRE(s->n_tokens >= 1 && s->n_past >= 0, "sequence %d: n_tokens %d must be 1 or more, n_past %d 0 or more",
        index, s->n_tokens, s->n_past);
    int64_t end = (int64_t)s->n_past + s->n_tokens;
    FB_REQUIRE(end <= INT32_MAX, "sequence %d: %lld positions are too many", index, (long long)end);
    FB_REQUIRE(p->n_positions == 0 || end <= p->n_positions, "sequence %d: %lld positions, the model has %d", index,
        (long long)end, p->n_positions);
    FB_REQUIRE(!p->attends_all || s->n_past == 0, "sequence %d: must be whole in its step, %d positions are past",
        index, s->n_past);
    int64_t needed = (end + FB_PAGE_POSITIONS - 1) / FB_PAGE_POSITIONS;
    FB_REQUIRE(s->pages && s->n_pages >= needed, "sequence %d: %d pages for %lld positions, %lld are needed", index,
        s->n_pages, (long long)end, (long long)needed);
    FB_REQUIRE(s->window >= 0 && s->n_sinks >= 0 && s->n_sinks <= (s->window ? FB_PAGE_POSITIONS : 0),
        "sequence %d: window %d must be 0 or more, n_sinks %d 0 .. %d", index, s->window, s->n_sinks,
        s->window ? FB_PAGE_POSITIONS : 0);
    const int32_t first_visible = fb_lowest_visible(s, (struct fb_mask){0}, s->n_past) / FB_PAGE_POSITIONS;
    for (int32_t i = 0; i < (int32_t)needed; i++) {
        const bool hidden = i < first_visible && !(i == 0 && s->n_sinks > 0);
        FB_REQUIRE((hidden && s->pages[i] == -1) || (s->pages[i] >= 0 && s->pages[i] < pool->n_pages),
            "sequence %d: page %d of a pool of %d", index, s->pages[i], pool->n_pages);
    }
    return FB_OK;
}

static enum fb_status check_states(const struct fb_program *p, const fb_state_pool *states) {
    const int32_t n_layers = p->shape.n_state_layers;
    if (n_layers == 0) return FB_OK;
    FB_REQUIRE(states, "the program has %d recurrent operators and needs a state pool; states is null", n_layers);
    FB_REQUIRE(
        states->n_layers == n_layers, "the state pool has %d layers, the program %d", states->n_layers, n_layers);
    for (int32_t i = 0; i < n_layers; i++)
        FB_REQUIRE(p->state_floats[i] == 0 || (int64_t)states->layers[i].n_floats == p->state_floats[i],
            "layer %d of the state pool has %zu numbers, the program's %lld", i, states->layers[i].n_floats,
            (long long)p->state_floats[i]);
    return FB_OK;
}

static enum fb_status check_slots(const fb_state_pool *states, const struct fb_sequence *s, int32_t index) {
    const int32_t n = states->n_slots;
    FB_REQUIRE(s->state_in >= -1 && s->state_in < n && (s->state_in >= 0 || s->n_past == 0),
        "sequence %d: state_in is slot %d of a pool of %d, after %d tokens", index, s->state_in, n, s->n_past);
    FB_REQUIRE(s->state_out >= 0 && s->state_out < n, "sequence %d: state_out is slot %d of a pool of %d", index,
        s->state_out, n);
    FB_REQUIRE(s->n_keeps >= 0 && (s->keeps || s->n_keeps == 0),
        "sequence %d: n_keeps is %d, must be 0 or more, and keeps not null", index, s->n_keeps);
    for (int32_t i = 0; i < s->n_keeps; i++) {
        const struct fb_state_keep *keep = &s->keeps[i];
        FB_REQUIRE(keep->slot >= 0 && keep->slot < n && keep->slot != s->state_in && keep->slot != s->state_out,
            "sequence %d: keeps its state in slot %d of a pool of %d, must not be state_in or state_out", index,
            keep->slot, n);
        FB_REQUIRE(keep->n_tokens > (i ? keep[-1].n_tokens : 0) && keep->n_tokens < s->n_tokens,
            "sequence %d: keeps its state after %d of %d tokens; keeps must ascend within 1 .. %d", index,
            keep->n_tokens, s->n_tokens, s->n_tokens - 1);
        for (int32_t j = 0; j < i; j++)
            FB_REQUIRE(s->keeps[j].slot != keep->slot, "sequence %d: keeps two states in slot %d", index, keep->slot);
    }
    return FB_OK;
}

static bool writes_slot(const struct fb_sequence *s, int32_t slot) {
    if (s->state_out == slot) return true;
    for (int32_t i = 0; i < s->n_keeps; i++)
        if (s->keeps[i].slot == slot) return true;
    return false;
}

/* No slot may be written by one sequence of the batch and used by another. */
static enum fb_status check_slot_writers(const struct fb_batch *batch) {
    for (int32_t a = 0; a < batch->n_sequences; a++) {
        const struct fb_sequence *other = &batch->sequences[a];
        for (int32_t b = 0; b < batch->n_sequences; b++) {
            const struct fb_sequence *writer = &batch->sequences[b];
            if (a == b) continue;
            int32_t shared = other->state_in >= 0 && writes_slot(writer, other->state_in) ? other->state_in : -1;
            if (writes_slot(writer, other->state_out)) shared = other->state_out;
            for (int32_t i = 0; i < other->n_keeps; i++)
                if (writes_slot(writer, other->keeps[i].slot)) shared = other->keeps[i].slot;
            FB_REQUIRE(shared < 0, "sequence %d writes state slot %d, which sequence %d uses", b, shared, a);
        }
    }
    return FB_OK;
}

/* No page may be written by two sequences of the batch. (One may read earlier positions of a page that
 * another writes.) Quadratic in the written pages, which are few: one per sequence in decode, the chunk's in
 * prefill. */
static enum fb_status check_writers(const struct fb_batch *batch) {
    for (int32_t a = 1; a < batch->n_sequences; a++) {
        const struct fb_sequence *writer = &batch->sequences[a];
        const int32_t first = writer->n_past / FB_PAGE_POSITIONS;
        const int32_t last = (writer->n_past + writer->n_tokens - 1) / FB_PAGE_POSITIONS;
        for (int32_t b = 0; b < a; b++) {
            const struct fb_sequence *other = &batch->sequences[b];
            const int32_t from = other->n_past / FB_PAGE_POSITIONS;
            const int32_t to = (other->n_past + other->n_tokens - 1) / FB_PAGE_POSITIONS;
            for (int32_t i = first; i <= last; i++)
                for (int32_t j = from; j <= to; j++)
                    FB_REQUIRE(writer->pages[i] != other->pages[j], "sequences %d and %d both write page %d", a, b,
                        writer->pages[i]);
        }
    }
    return FB_OK;
}

enum fb_status fb_check_batch(
    const struct fb_program *p, const fb_page_pool *pool, const struct fb_batch *batch, size_t n_logits) {
    FB_REQUIRE(
        batch->struct_size == sizeof *batch, "batch.struct_size is %u, must be %zu", batch->struct_size, sizeof *batch);
    FB_REQUIRE(batch->n_tokens >= 1 && batch->n_tokens <= p->shape.max_tokens, "n_tokens is %d, must be 1 .. %d",
        batch->n_tokens, p->shape.max_tokens);
    FB_TRY(check_states(p, batch->states));
    FB_REQUIRE(batch->tokens && batch->sequences && batch->n_sequences >= 1, "tokens or sequences are missing");
    FB_REQUIRE(batch->n_outputs >= 0 && batch->n_outputs <= batch->n_tokens && (batch->outputs || !batch->n_outputs),
        "n_outputs is %d, must be 0 .. %d", batch->n_outputs, batch->n_tokens);
    const int32_t n_rows = p->n_results;
    FB_REQUIRE(n_logits == (size_t)batch->n_outputs * (size_t)n_rows, "room for %zu logits, %d outputs x %d are needed",
        n_logits, batch->n_outputs, n_rows);
    for (int32_t i = 0; i < batch->n_tokens; i++)
        FB_REQUIRE(batch->tokens[i] >= 0 && batch->tokens[i] < p->shape.vocab_size,
            "token %d is id %d, the vocabulary has %d", i, batch->tokens[i], p->shape.vocab_size);
    int64_t n_tokens = 0;
    for (int32_t i = 0; i < batch->n_sequences; i++) {
        FB_TRY(check_sequence(p, pool, &batch->sequences[i], i));
        if (p->shape.n_state_layers) FB_TRY(check_slots(batch->states, &batch->sequences[i], i));
        n_tokens += batch->sequences[i].n_tokens;
    }
    FB_REQUIRE(n_tokens == batch->n_tokens, "the sequences hold %lld tokens, the batch %d", (long long)n_tokens,
        batch->n_tokens);
    for (int32_t i = 0; i < batch->n_outputs; i++)
        FB_REQUIRE(batch->outputs[i] >= 0 && batch->outputs[i] < batch->n_tokens &&
                       (i == 0 || batch->outputs[i] > batch->outputs[i - 1]),
            "outputs[%d] is row %d: rows must ascend within 0 .. %d", i, batch->outputs[i], batch->n_tokens - 1);
    if (p->shape.n_state_layers) FB_TRY(check_slot_writers(batch));
    return check_writers(batch);
}
