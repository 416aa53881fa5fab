/* status.c - the thread-local message of the last failure. See status.h. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[512];

enum fb_status fb_fail(enum fb_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

const char *fb_last_error(void) {
    return last_error;
}
