/*
 * check.h - the framework of the C tests: CHECK counts failures and continues, main returns check_result().
 * Each test program is one file and prints only what failed.
 */
#ifndef FABULA_TESTS_CHECK_H
#define FABULA_TESTS_CHECK_H

#include <stdio.h>

static int check_failures = 0;

/* Prints the failing expression and its location to stderr; the first 20 failures only, so that a broken loop
 * over all 65,536 halfs stays readable. */
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition) && check_failures++ < 20) {                                                                   \
            fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition);                              \
        }                                                                                                              \
    } while (0)

/* As CHECK, with the tested value (printf format). */
#define CHECK_AT(condition, ...)                                                                                       \
    do {                                                                                                               \
        if (!(condition) && check_failures++ < 20) {                                                                   \
            fprintf(stderr, "%s:%d: CHECK(%s) failed at ", __FILE__, __LINE__, #condition);                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
        }                                                                                                              \
    } while (0)

/* Exit status of the test program: 0 if every check held. */
static int check_result(void) {
    if (check_failures > 0) fprintf(stderr, "%d checks failed\n", check_failures);
    return check_failures > 0;
}

#endif
