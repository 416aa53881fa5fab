/* test_cuda_emulation.cpp - checks that the emulation detects what it promises to: a test that cannot fail
 * proves nothing. */
#include "mma.cuh"

#include "check.h"

#include <type_traits>

static int results[96];

static void exchange_kernel(int n) {
    FB_SHARED(int, numbers, 64);
    const int i = (int)threadIdx.x;
    numbers[i] = i * n;
    __syncthreads();
    const int other = numbers[(i + 33) % 64];
    results[i] = __shfl_xor_sync(0xFFFFFFFFu, other, 1) + 1000 * __shfl_sync(0xFFFFFFFFu, i, 5);
}

static void hasty_kernel(int *sum) { /* a barrier is missing */
    FB_SHARED(float, numbers, 64);
    numbers[threadIdx.x] = 1.0f;
    if (threadIdx.x == 63) *sum = numbers[0] == 1.0f;
}

static void leaving_kernel(int who) {
    if ((int)threadIdx.x == who) return;
    __syncthreads();
}

static void lonely_kernel(int who) {
    if ((int)threadIdx.x != who) __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
}

static void partial_kernel(int) {
    __shfl_xor_sync(0xFFFFu, 1, 1);
}

static void mixed_kernel(int who) {
    __shfl_xor_sync(0xFFFFFFFFu, 1, (int)threadIdx.x == who ? 2 : 1);
}

static void apart_kernel(int who) {
    if ((int)threadIdx.x < who)
        __syncthreads();
    else
        __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
}

/* ---- Tiles and copies -------------------------------------------------------------------------------------------- */

static float tile_rows[16][16], tile_tokens[8][16], tile_results[16][8];

static uint32_t pair_of(const float *two, bool is_bf16) {
    const uint32_t low = is_bf16 ? fb_bf16_of_float(two[0]) : fb_f16_of_float(two[0]);
    return low | (uint32_t)(is_bf16 ? fb_bf16_of_float(two[1]) : fb_f16_of_float(two[1])) << 16;
}

/* mode 0: f16, 1: bf16, 2: f16 in tiles of 8 columns. The formulas for rows and columns of each lane's parts
 * are copied from the PTX manual. */
static void tile_kernel(int way) {
    const int lane = (int)threadIdx.x, group = lane >> 2, in_group = lane % 4;
    uint32_t a[4], b[2];
    for (int i = 0; i < 8; i += 2) { /* a0 .. a7 */
        const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
        const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a[i / 2] = pair_of(&tile_rows[row][column], way == 1);
    }
    for (int i = 0; i < 4; i += 2) /* b0 .. b3 */
        b[i / 2] = pair_of(&tile_tokens[group][in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)], way == 1);
    float c[4];
    for (int i = 0; i < 4; i++)
        c[i] = (float)(100 * (group + (i < 2 ? 0 : 8)) + in_group * 2 + (i & 1));
    if (way == 2) {
        fb_mma_f16_8(c, a[0], a[1], b[0]);
        fb_mma_f16_8(c, a[2], a[3], b[1]);
    } else if (way == 1) {
        fb_mma_bf16_16(c, a, b);
    } else {
        fb_mma_f16_16(c, a, b);
    }
    for (int i = 0; i < 4; i++)
        tile_results[group + (i < 2 ? 0 : 8)][in_group * 2 + (i & 1)] = c[i];
}

static void test_tiles() {
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++) {
            tile_rows[row][k] = (float)((row * 7 + k * 3) % 11 - 5);
            tile_tokens[row % 8][k] = (float)((row % 8 * 5 + k * 13) % 17 - 8);
        }
    for (int way = 0; way < 3; way++) {
        CHECK(fb_launch(tile_kernel, dim3(1), 32, 0, nullptr, way) == 0);
        for (int row = 0; row < 16; row++)
            for (int token = 0; token < 8; token++) {
                float sum = (float)(100 * row + token);
                for (int k = 0; k < 16; k++)
                    sum += tile_rows[row][k] * tile_tokens[token][k];
                CHECK_AT(tile_results[row][token] == sum, "way %d, %d, %d", way, row, token);
            }
    }
}

static void lonely_tile_kernel(int who) {
    float c[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if ((int)threadIdx.x != who) fb_mma_f16_16(c, a, b);
}

/* Copies in two groups; `n` of them may still be pending when the first is read. */
static void copy_kernel(const fb_words4 *from, int n) {
    FB_SHARED(fb_words4, to, 2);
    for (int i = 0; i < 2 && threadIdx.x == 0; i++) {
        fb_copy_async(to + i, from + i);
        fb_copy_commit();
    }
    if (n == 0) fb_copy_wait<0>();
    if (n == 1) fb_copy_wait<1>();
    if (threadIdx.x == 0)
        for (int i = 0; i < 2; i++)
            results[i] = (int)to[i].word[3];
}

static void test_copies() {
    const fb_words4 from[2] = {{{1, 2, 3, 4}}, {{5, 6, 7, 8}}};
    for (int n = 0; n < 3; n++) {
        CHECK(fb_launch(copy_kernel, dim3(1), 32, 0, nullptr, from, n) == 0);
        CHECK(results[0] == (n < 2 || emulate::backward ? 4 : -1));
        CHECK(results[1] == (n < 1 || emulate::backward ? 8 : -1));
    }
}

int main() {
    for (int order = 0; order < 2; order++) {
        emulate::backward = order == 1;
        CHECK(fb_launch(exchange_kernel, dim3(2), 64, 0, nullptr, 3) == 0);
        for (int i = 0; i < 64; i++)
            CHECK(results[i] == ((i ^ 1) + 33) % 64 * 3 + 1000 * (i < 32 ? 5 : 37));
        int seen = -1;
        CHECK(fb_launch(hasty_kernel, dim3(1), 64, 0, nullptr, &seen) == 0);
        CHECK(seen == 1 - order);
        CHECK(fb_launch(leaving_kernel, dim3(1), 64, 0, nullptr, 7) == 1);
        CHECK(fb_launch(lonely_kernel, dim3(1), 64, 0, nullptr, 40) == 1);
        CHECK(fb_launch(partial_kernel, dim3(1), 32, 0, nullptr, 0) == 1);
        CHECK(fb_launch(mixed_kernel, dim3(1), 32, 0, nullptr, 3) == 1);
        CHECK(fb_launch(apart_kernel, dim3(1), 32, 0, nullptr, 3) == 1);
        CHECK(fb_launch(leaving_kernel, dim3(1), 64, 0, nullptr, -1) == 0);
        test_tiles();
        test_copies();
        CHECK(fb_launch(lonely_tile_kernel, dim3(1), 32, 0, nullptr, 3) == 1);
    }
    return check_result();
}
