/*
 * status.h - errors: a status code plus one line of text for the calling thread.
 *
 * The text is thread-local. OpenMP workers never fail: everything that can go wrong is checked before a
 * parallel region, so the text always belongs to the thread that called the API.
 */
#ifndef FABULA_BASE_STATUS_H
#define FABULA_BASE_STATUS_H

#include "base/exported.h"
#include "fabula.h"

/* Records the text (printf format, truncated to 511 bytes) and returns `status`, so that a failure is one
 * line:
 *     return fb_fail(FB_INVALID_ARGUMENT, "n_rows is %d, must be 1 or more", n_rows); */
FB_EXPORTED enum fb_status fb_fail(enum fb_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Returns from the current function if the call failed; the text is already recorded. */
#define FB_TRY(call)                                                                                                   \
    do {                                                                                                               \
        enum fb_status fb_try_status = (call);                                                                         \
        if (fb_try_status != FB_OK) return fb_try_status;                                                              \
    } while (0)

/* Returns FB_INVALID_ARGUMENT with the text unless the condition holds. */
#define FB_REQUIRE(condition, ...)                                                                                     \
    do {                                                                                                               \
        if (!(condition)) return fb_fail(FB_INVALID_ARGUMENT, __VA_ARGS__);                                            \
    } while (0)

#endif
