/* test_cuda_emulation.cpp - that the emulation notices what it promises to: a test that cannot fail proves nothing. */
#include "device.h"

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

static void hasty_kernel(int *sum) { /* wants a barrier */
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
    }
    return check_result();
}
