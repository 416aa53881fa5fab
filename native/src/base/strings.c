/* strings.c - joins the strings of a file header. A vocabulary has 100,000, too many for a loop in Python. */
#include "base/status.h"

#include <string.h>

static uint64_t length_at(const uint8_t *bytes) {
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | bytes[i];
    return length;
}

enum fb_status fb_join_strings(const void *bytes, size_t n_bytes, size_t most, size_t max_length, char *out,
    size_t *n_strings, size_t *n_read, size_t *n_written) {
    FB_REQUIRE((bytes && out) || n_bytes == 0, "bytes or out is null");
    FB_REQUIRE(n_strings && n_read && n_written, "n_strings, n_read or n_written is null");
    const uint8_t *from = bytes;
    size_t count = 0, read = 0, written = 0;
    while (count < most && n_bytes - read >= 8) {
        const uint64_t length = length_at(from + read);
        if (length > n_bytes - read - 8 || length > max_length) break;
        if (memchr(from + read + 8, 0, (size_t)length)) break;
        memcpy(out + written, from + read + 8, (size_t)length);
        out[written + length] = 0;
        written += (size_t)length + 1;
        read += 8 + (size_t)length;
        count++;
    }
    *n_strings = count;
    *n_read = read;
    *n_written = written;
    return FB_OK;
}
