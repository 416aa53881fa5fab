/*
 * capture.h - how the emulation records a stream. Launches (emulate.h) and copies (runtime/heap.cpp) on a
 * recording stream are stored as functions and called whenever the graph is launched. Calls that wait for the
 * GPU or allocate memory break the recording, as on a real GPU.
 */
#ifndef FABULA_TESTS_CAPTURE_H
#define FABULA_TESTS_CAPTURE_H

#include <functional>
#include <utility>
#include <vector>

namespace emulate {

using steps = std::vector<std::function<int()>>;

struct stream {
    bool is_recording = false;
    steps recorded;
};

/* Runs a step now, or records it. */
template <class F> int put(void *on, F step) {
    stream *s = static_cast<stream *>(on);
    if (!s || !s->is_recording) return step();
    s->recorded.push_back(std::move(step));
    return 0;
}

} // namespace emulate

#endif
