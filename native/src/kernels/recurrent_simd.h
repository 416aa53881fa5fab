/*
 * recurrent_simd.h - the kernels of recurrent operators, over the vectors of simd.h, which includes this. Lanes are
 * columns of a state, so every sum runs over its terms one by one, in the order of reference.c.
 */

/* 16 columns, or the last n < 16 of them. */
INLINE v16 load_columns(const float *x, size_t n) {
    return n >= FB_LANES ? v16_load(x) : load_tail(x, n);
}

INLINE void store_columns(float *out, v16 value, size_t n) {
    if (n >= FB_LANES)
        v16_store(out, value);
    else
        store_tail(out, value, n);
}

static void short_conv(const float *x, size_t ldx, const float *weights, size_t ld_weights, const float *bias,
    size_t n_taps, size_t n, float *out) {
    for (size_t c = 0; c < n; c += FB_LANES) {
        const size_t rest = n - c;
        v16 sum = bias ? load_columns(bias + c, rest) : v16_zero();
        for (size_t i = 0; i < n_taps; i++)
            sum = v16_fma(load_columns(weights + i * ld_weights + c, rest), load_columns(x + i * ldx + c, rest), sum);
        store_columns(out + c, sum, rest);
    }
}

/* n_blocks blocks of columns, from column `first` on. The sums of a block are chains of fused multiply-adds, each some
 * 4 cycles behind the one before it: blocks side by side fill that time. A token's update and output, and the next
 * one's decay and sum, are one walk over the state. */
INLINE void delta_blocks(const size_t n_blocks, const struct fb_delta_rule *r, size_t first) {
    const size_t block = r->k_dim * FB_LANES, at = first / FB_LANES * block;
    const float *from = r->from + at;
    float *to = r->to + at;
    v16 sums[STATE_BLOCKS], d[STATE_BLOCKS], out[STATE_BLOCKS];
    v16 decay = v16_set1(r->decay[0]);
    UNROLL
    for (size_t b = 0; b < n_blocks; b++)
        sums[b] = v16_zero();
    for (size_t i = 0; i < r->k_dim; i++) {
        const v16 k = v16_set1(r->k[i]);
        UNROLL
        for (size_t b = 0; b < n_blocks; b++) {
            const v16 s = v16_mul(v16_load(from + b * block + i * FB_LANES), decay);
            v16_store(to + b * block + i * FB_LANES, s);
            sums[b] = v16_fma(s, k, sums[b]);
        }
    }
    for (size_t t = 0; t < r->n_tokens; t++) {
        const float *q = r->q + t * r->k_dim, *k = r->k + t * r->k_dim, *next = k + r->k_dim;
        const v16 one = v16_set1(1.0f), beta = v16_set1(r->beta[t]);
        UNROLL
        for (size_t b = 0; b < n_blocks; b++) {
            const size_t column = first + b * FB_LANES;
            const v16 v = load_columns(r->v + t * r->ldv + column, r->n_cols - column);
            d[b] = v16_mul(v16_negate_fma(sums[b], one, v), beta);
            out[b] = sums[b] = v16_zero();
        }
        if (t + 1 < r->n_tokens) {
            decay = v16_set1(r->decay[t + 1]);
            for (size_t i = 0; i < r->k_dim; i++) {
                const v16 key = v16_set1(k[i]), query = v16_set1(q[i]), next_key = v16_set1(next[i]);
                UNROLL
                for (size_t b = 0; b < n_blocks; b++) {
                    float *at_row = to + b * block + i * FB_LANES;
                    v16 s = v16_fma(key, d[b], v16_load(at_row));
                    out[b] = v16_fma(s, query, out[b]);
                    s = v16_mul(s, decay);
                    v16_store(at_row, s);
                    sums[b] = v16_fma(s, next_key, sums[b]);
                }
            }
        } else {
            for (size_t i = 0; i < r->k_dim; i++) {
                const v16 key = v16_set1(k[i]), query = v16_set1(q[i]);
                UNROLL
                for (size_t b = 0; b < n_blocks; b++) {
                    float *at_row = to + b * block + i * FB_LANES;
                    const v16 s = v16_fma(key, d[b], v16_load(at_row));
                    v16_store(at_row, s);
                    out[b] = v16_fma(s, query, out[b]);
                }
            }
        }
        UNROLL
        for (size_t b = 0; b < n_blocks; b++) {
            const size_t column = first + b * FB_LANES;
            store_columns(r->out + t * r->ld_out + column, out[b], r->n_cols - column);
        }
    }
}

static void delta_rule(const struct fb_delta_rule *r) {
    if (r->n_tokens == 0) return;
    size_t c = 0;
    for (; c + STATE_BLOCKS * FB_LANES <= r->n_cols; c += STATE_BLOCKS * FB_LANES)
        delta_blocks(STATE_BLOCKS, r, c);
    for (; c < r->n_cols; c += FB_LANES)
        delta_blocks(1, r, c);
}

INLINE void ssm_blocks(const size_t n_blocks, const struct fb_ssm *r, size_t first) {
    const size_t block = r->k_dim * FB_LANES, at = first / FB_LANES * block;
    const float *from = r->from + at;
    float *to = r->to + at;
    const v16 skip = v16_set1(r->skip);
    for (size_t t = 0; t < r->n_tokens; t++, from = to) {
        const float *rows = r->b + t * r->k_dim, *readout = r->c + t * r->ldc;
        const v16 decay = v16_set1(r->decay[t]);
        v16 x[STATE_BLOCKS], out[STATE_BLOCKS];
        UNROLL
        for (size_t b = 0; b < n_blocks; b++) {
            const size_t column = first + b * FB_LANES;
            x[b] = load_columns(r->x + t * r->ldx + column, r->n_cols - column);
            out[b] = v16_zero();
        }
        for (size_t i = 0; i < r->k_dim; i++) {
            const v16 row = v16_set1(rows[i]), c = v16_set1(readout[i]);
            UNROLL
            for (size_t b = 0; b < n_blocks; b++) {
                const v16 s = v16_fma(row, x[b], v16_mul(v16_load(from + b * block + i * FB_LANES), decay));
                v16_store(to + b * block + i * FB_LANES, s);
                out[b] = v16_fma(s, c, out[b]);
            }
        }
        UNROLL
        for (size_t b = 0; b < n_blocks; b++) {
            const size_t column = first + b * FB_LANES;
            store_columns(r->out + t * r->ld_out + column, v16_fma(x[b], skip, out[b]), r->n_cols - column);
        }
    }
}

static void ssm(const struct fb_ssm *r) {
    size_t c = 0;
    for (; c + STATE_BLOCKS * FB_LANES <= r->n_cols; c += STATE_BLOCKS * FB_LANES)
        ssm_blocks(STATE_BLOCKS, r, c);
    for (; c < r->n_cols; c += FB_LANES)
        ssm_blocks(1, r, c);
}
