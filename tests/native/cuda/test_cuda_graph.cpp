/*
 * test_cuda_graph.cpp - steps that are recorded and replayed, compared with the same steps launched operator
 * by operator: the same bits of logits and of every page, whatever the padding; graphs are dropped when
 * memory moves; a failure costs the graph only; other threads may copy pages while a step is recorded.
 */
#include "check.h"
#include "cuda_runtime_api.h"
#include "emulate.h"
#include "model.h"

#include <thread>
#include <vector>

enum { MOST = 12, LONG_PAST = 540 }; /* past a boundary of key blocks, which a layer's window crosses */

/* A model and its pages. */
struct place {
    model *m;
    fb_page_pool *pool;

    place(fb_device *device, bool has_graphs) : m(model_create(device)), pool(model_pool(m, MODEL_PAGES)) {
        CHECK(fb_program_set_graphs(model_program(m), has_graphs) == FB_OK);
    }
    ~place() {
        fb_page_pool_free(pool);
        model_free(m);
    }
    place(const place &) = delete;
    place &operator=(const place &) = delete;

    fb_graph_info info() const {
        fb_graph_info info = {};
        CHECK(fb_program_graph_info(model_program(m), &info) == FB_OK && info.struct_size == sizeof info);
        return info;
    }
    std::vector<char> pages() const {
        const size_t n_bytes = fb_page_bytes(pool);
        std::vector<char> all(MODEL_PAGES * n_bytes);
        for (int32_t i = 0; i < MODEL_PAGES; i++)
            CHECK(fb_page_read(pool, i, &all[(size_t)i * n_bytes], n_bytes) == FB_OK);
        return all;
    }

    /* A step of n sequences of one token, with logits of the last rows. The first may have a long past; the
     * others have two pages, the second of them their own. All tokens and positions depend on `at`. */
    fb_status run(int32_t n, int32_t n_outputs, int32_t at, bool is_long, std::vector<float> &logits) const {
        int32_t pages[MOST][LONG_PAST / FB_PAGE_POSITIONS + 1], tokens[MOST], outputs[MOST];
        fb_sequence sequences[MOST];
        for (int32_t i = 0; i < n; i++) {
            pages[i][0] = MODEL_PAGES - 1;
            pages[i][1] = MODEL_PAGES - 2 - i;
            if (is_long && i == 0)
                for (int32_t page = 0; page <= LONG_PAST / FB_PAGE_POSITIONS; page++)
                    pages[0][page] = page;
            const int32_t n_past = is_long && i == 0 ? LONG_PAST - 40 + at % 40 : 32 + (at + 3 * i) % 32;
            sequences[i] = {pages[i], n_past / FB_PAGE_POSITIONS + 1, n_past, 1, i % 3 == 2 ? 20 : 0,
                i % 3 == 2 ? 4 : 0, 0, 0, nullptr, 0};
            tokens[i] = (7 * at + 11 * i) % MODEL_VOCABULARY;
        }
        for (int32_t i = 0; i < n_outputs; i++)
            outputs[i] = n - n_outputs + i;
        const fb_batch batch = {sizeof batch, n, tokens, sequences, n, outputs, n_outputs, nullptr};
        logits.assign((size_t)n_outputs * MODEL_VOCABULARY, 0.0f);
        return fb_program_run(model_program(m), pool, &batch, logits.data(), logits.size());
    }
    std::vector<float> step(int32_t n, int32_t n_outputs, int32_t at, bool is_long) const {
        std::vector<float> logits;
        CHECK_AT(run(n, n_outputs, at, is_long, logits) == FB_OK, "%d sequences at %d: %s", n, at, fb_last_error());
        return logits;
    }

    /* Many tokens of one sequence, which grows the memory of a step. */
    void grow() const {
        enum { most = 2 * FB_PAGE_POSITIONS };
        const int32_t pages[] = {10, 11};
        int32_t tokens[most], outputs[most];
        for (int32_t t = 0; t < most; t++)
            tokens[t] = outputs[t] = t;
        const fb_sequence sequence = {pages, 2, 0, most, 0, 0, 0, 0, nullptr, 0};
        const fb_batch batch = {sizeof batch, most, tokens, &sequence, 1, outputs, most, nullptr};
        std::vector<float> logits(most * MODEL_VOCABULARY);
        CHECK_AT(fb_program_run(model_program(m), pool, &batch, logits.data(), logits.size()) == FB_OK, "%s",
            fb_last_error());
    }
};

/* Batches of every size, alternating, with and without a long past, whose attention is split if processors
 * idle. Returns the logits of a last step. */
static std::vector<float> test_bits(fb_device *device) {
    const place with(device, true), without(device, false);
    int32_t at = 0;
    for (int32_t round = 0; round < 3; round++)
        for (int32_t n : {1, 5, 3, 11, 8})
            for (bool is_long : {false, true}) {
                at++;
                CHECK_AT(with.step(n, n, at, is_long) == without.step(n, n, at, is_long), "%d, round %d", n, round);
            }
    CHECK(with.step(5, 2, 99, true) == without.step(5, 2, 99, true));
    CHECK(with.step(5, 0, 98, true) == without.step(5, 0, 98, true));
    CHECK(with.pages() == without.pages());
    const fb_graph_info info = with.info(), none = without.info();
    CHECK_AT(info.n_replayed >= 8 && info.n_graphs <= info.n_recorded, "%d replayed", (int)info.n_replayed);
    CHECK_AT(info.status == FB_OK, "%s", info.reason);
    CHECK(none.n_recorded == 0 && none.n_replayed == 0 && none.n_launched == 32 && !none.is_on);
    return with.step(5, 5, 12, true);
}

/* Sizes that round to the same number share a graph. The first step is launched, the second recorded, the
 * third replayed. */
static void test_table(fb_device *device) {
    const place here(device, true);
    for (int32_t n : {5, 6, 5})
        here.step(n, n, n, false);
    fb_graph_info info = here.info();
    CHECK(info.n_recorded == 1 && info.n_replayed == 2 && info.n_launched == 1 && info.n_graphs == 1);
    const std::vector<float> wanted = here.step(6, 6, 7, false);

    /* Growing memory drops the graphs that refer to the old memory. */
    here.grow();
    CHECK(here.step(6, 6, 7, false) == wanted && here.info().n_graphs == 0);
    for (int32_t i = 0; i < 2; i++)
        CHECK(here.step(6, 6, 7, false) == wanted && here.info().n_graphs == 1);
    info = here.info();
    CHECK(info.n_recorded == 2 && info.n_replayed == 5 && info.n_launched == 3);

    /* Different pages need a different graph. */
    fb_page_pool *other = model_pool(here.m, 2);
    const int32_t page = 1, token = 3, output = 0;
    const fb_sequence sequence = {&page, 1, 0, 1, 0, 0, 0, 0, nullptr, 0};
    const fb_batch batch = {sizeof batch, 1, &token, &sequence, 1, &output, 1, nullptr};
    float logits[2][MODEL_VOCABULARY];
    for (int32_t i = 0; i < 6; i++)
        CHECK(fb_program_run(
                  model_program(here.m), i % 2 ? other : here.pool, &batch, logits[i % 2], MODEL_VOCABULARY) == FB_OK);
    CHECK(memcmp(logits[0], logits[1], sizeof logits[0]) == 0 && here.info().n_graphs == 3);
    const size_t n_bytes = fb_page_bytes(other);
    std::vector<char> mine(n_bytes), theirs(n_bytes);
    CHECK(fb_page_read(here.pool, 1, mine.data(), n_bytes) == FB_OK);
    CHECK(fb_page_read(other, 1, theirs.data(), n_bytes) == FB_OK && mine == theirs);
    fb_page_pool_free(other);

    CHECK(fb_program_set_graphs(model_program(here.m), false) == FB_OK && here.info().n_graphs == 0);
    CHECK(here.step(6, 6, 7, false) == wanted);
}

/* At most 32 graphs, the most recently used. */
static void test_limit(fb_device *device) {
    const place here(device, true);
    std::vector<fb_page_pool *> pools;
    const int32_t page = 1, token = 3, output = 0;
    const fb_sequence sequence = {&page, 1, 0, 1, 0, 0, 0, 0, nullptr, 0};
    float logits[MODEL_VOCABULARY];
    const auto step = [&](fb_page_pool *pool, int32_t n_outputs) {
        const fb_batch batch = {sizeof batch, 1, &token, &sequence, 1, &output, n_outputs, nullptr};
        CHECK(
            fb_program_run(model_program(here.m), pool, &batch, logits, (size_t)n_outputs * MODEL_VOCABULARY) == FB_OK);
    };
    step(here.pool, 1); /* allocates all memory of a step */
    for (int32_t i = 0; i < 17; i++) {
        pools.push_back(model_pool(here.m, 2));
        for (int32_t n_outputs : {0, 1}) {
            step(pools[i], n_outputs);
            step(pools[i], n_outputs);
        }
        step(pools[0], 0); /* stays in use */
    }
    fb_graph_info info = here.info();
    CHECK_AT(info.n_graphs == 32 && info.n_recorded == 34, "%d of %d", info.n_graphs, (int)info.n_recorded);
    step(pools[0], 0);
    CHECK(here.info().n_replayed == info.n_replayed + 1);
    step(pools[0], 1); /* the least recently used */
    CHECK(here.info().n_launched == info.n_launched + 1);
    for (fb_page_pool *pool : pools)
        fb_page_pool_free(pool);
}

/* Each call of a recorded step fails once: the step runs or returns an error, the next one works, and nothing
 * leaks. */
static void test_failures(fb_device *device) {
    const long before = fake_n_held;
    int n_refused = 0;
    for (long at = 0;; at++) {
        const place here(device, true);
        const std::vector<float> wanted = here.step(3, 3, 5, false);
        std::vector<float> logits;
        fake_fails_at = at;
        const fb_status status = here.run(3, 3, 5, false, logits);
        const bool is_through = fake_fails_at >= 0;
        fake_fails_at = -1;
        const fb_graph_info info = here.info();
        const bool is_refused = info.status != FB_OK;
        CHECK_AT(is_through == (status == FB_OK && !is_refused), "call %ld: %d", at, status);
        if (is_refused) {
            CHECK_AT(status == FB_OK && info.n_replayed == 0 && strstr(info.reason, "CUDA error"), "%s", info.reason);
            n_refused++;
        }
        for (int32_t i = 0; i < 2; i++)
            CHECK(here.step(3, 3, 5, false) == wanted);
        CHECK(is_refused == (here.info().n_replayed == 0));
        if (is_through) break;
    }
    /* Start, clearing a flag, end, instantiate, launch. */
    CHECK_AT(n_refused == 5, "%d calls cost a graph", n_refused);
    CHECK(fake_n_held == before);
}

static const place *seen; /* what other threads use while a step is recorded */
static int n_meanwhile, n_to_break;

/* Another thread reads, copies, clears and moves pages during every recording. */
static void copy_meanwhile() {
    std::thread([] {
        const size_t n_bytes = fb_page_bytes(seen->pool);
        std::vector<char> page(n_bytes), copied(n_bytes);
        n_meanwhile++;
        CHECK_AT(fb_page_read(seen->pool, 1, page.data(), n_bytes) == FB_OK, "%s", fb_last_error());
        CHECK_AT(fb_page_zero(seen->pool, 0) == FB_OK, "%s", fb_last_error());
        CHECK_AT(fb_page_copy(seen->pool, 0, 1) == FB_OK, "%s", fb_last_error());
        CHECK_AT(fb_page_read(seen->pool, 0, copied.data(), n_bytes) == FB_OK && copied == page, "%s", fb_last_error());
        CHECK_AT(fb_page_write(seen->pool, 0, page.data(), n_bytes) == FB_OK, "%s", fb_last_error());
    }).join();
}

static void test_copies_meanwhile(fb_device *device) {
    const place here(device, true), without(device, false);
    seen = &here;
    fake_while_recording = copy_meanwhile;
    n_meanwhile = 0;
    for (int32_t at = 0; at < 4; at++)
        for (int32_t n : {8, 3, 1}) /* the first allocates the memory for all */
            CHECK(here.step(n, n, at, false) == without.step(n, n, at, false));
    fake_while_recording = nullptr;
    const fb_graph_info info = here.info();
    CHECK_AT(info.status == FB_OK, "%s", info.reason);
    CHECK_AT(n_meanwhile == 3 && info.n_recorded == 3 && info.n_replayed == 9, "%d, %d, %d", n_meanwhile,
        (int)info.n_recorded, (int)info.n_replayed);
}

/* Another thread waits for the whole device, which breaks the first recordings. */
static void break_recording() {
    std::thread([] {
        CHECK(cudaSetDevice(0) == cudaSuccess);
        if (n_to_break-- > 0) CHECK(cudaDeviceSynchronize() == cudaErrorStreamCaptureUnsupported);
    }).join();
}

/* Two broken recordings are retried, after the third the size is refused. Steps run in every case. */
static void test_broken_recordings(fb_device *device) {
    const place without(device, false);
    fake_while_recording = break_recording;
    for (int32_t n_broken : {1, 2, 3}) {
        const place here(device, true);
        n_to_break = n_broken;
        for (int32_t at = 0; at < 6; at++)
            CHECK(here.step(3, 3, at, false) == without.step(3, 3, at, false));
        const fb_graph_info info = here.info();
        const bool is_given_up = n_broken == 3;
        CHECK_AT(info.n_launched == (is_given_up ? 6 : 1 + n_broken), "%d: %d", n_broken, (int)info.n_launched);
        CHECK(info.n_recorded == (is_given_up ? 0 : 1) && info.n_replayed == 6 - info.n_launched);
        CHECK_AT((info.status != FB_OK) == is_given_up, "%d: %s", n_broken, info.reason);
        if (is_given_up) CHECK_AT(strstr(info.reason, "CUDA error 901"), "%s", info.reason);
    }
    fake_while_recording = nullptr;
}

/* The emulated runtime refuses what a recording stream must not do. */
static void test_runtime() {
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t launchable = nullptr;
    char from[4] = "abc", to[4] = "";
    void *memory = nullptr;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    for (int32_t call = 0; call < 6; call++) {
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
        CHECK(cudaMemcpyAsync(to, from, 4, cudaMemcpyHostToDevice, stream) == cudaSuccess && to[0] == 0);
        if (call == 1) CHECK(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
        if (call == 2) CHECK(cudaMalloc(&memory, 4) == cudaErrorStreamCaptureUnsupported);
        if (call == 3) CHECK(cudaMemset(to, 0, 4) == cudaErrorStreamCaptureUnsupported);
        if (call > 3)
            std::thread([&] { /* recordings on another device do not affect a call */
                CHECK(cudaSetDevice(1) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
                CHECK(cudaSetDevice(0) == cudaSuccess);
                CHECK((call == 4 ? cudaMemcpy(to, from, 4, cudaMemcpyHostToDevice) : cudaDeviceSynchronize()) ==
                      cudaErrorStreamCaptureUnsupported);
            })
                .join();
        const cudaError_t error = cudaStreamEndCapture(stream, &graph);
        CHECK(error == (call == 0 ? cudaSuccess : cudaErrorStreamCaptureInvalidated) &&
              (graph != nullptr) == (call == 0));
        if (call > 0) continue;
        CHECK(cudaGraphInstantiateWithFlags(&launchable, graph, 0) == cudaSuccess);
        CHECK(cudaGraphDestroy(graph) == cudaSuccess && to[0] == 0);
        for (char letter : {'x', 'y'}) {
            from[0] = letter;
            CHECK(cudaGraphLaunch(launchable, stream) == cudaSuccess && to[0] == letter);
        }
        CHECK(cudaGraphExecDestroy(launchable) == cudaSuccess);
        to[0] = 0;
    }
    CHECK(cudaStreamDestroy(stream) == cudaSuccess);
}

int main() {
    fb_device *device = nullptr;
    CHECK(fb_device_open(0, 0, &device) == FB_OK);
    test_runtime();
    std::vector<std::vector<float>> logits;
    for (int n_processors : {1, 100}) { /* tiles alone fill one processor, but not 100 */
        fake_n_processors = n_processors;
        emulate::backward = n_processors == 1;
        logits.push_back(test_bits(device));
    }
    CHECK(logits[0] == logits[1]);
    test_table(device);
    test_limit(device);
    test_failures(device);
    test_copies_meanwhile(device);
    test_broken_recordings(device);
    model *on_cpu = model_create(nullptr);
    fb_graph_info info;
    CHECK(fb_program_set_graphs(model_program(on_cpu), true) == FB_UNSUPPORTED);
    CHECK(fb_program_graph_info(model_program(on_cpu), &info) == FB_UNSUPPORTED);
    CHECK(fb_program_graph_info(model_program(on_cpu), nullptr) == FB_INVALID_ARGUMENT);
    model_free(on_cpu);
    fb_device_free(device);
    CHECK(fake_n_held == 0);
    return check_result();
}
