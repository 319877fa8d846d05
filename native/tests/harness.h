/*
 * A harness of one screen.  A program is a list of tests; it prints TAP, which meson reads.
 * A failed check ends the program there and then: what follows would stand on sand.
 * With arguments only the tests named run.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct test {
    const char *name;
    void (*run)(void);
};

#define TEST(function) {#function, function}

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            check_failed(__FILE__, __LINE__, #condition, 0, 0);                                    \
    } while (0)

#define CHECK_EQ(got, want)                                                                        \
    do {                                                                                           \
        long long got_ = (long long)(got), want_ = (long long)(want);                              \
        if (got_ != want_)                                                                         \
            check_failed(__FILE__, __LINE__, #got " == " #want, got_, want_);                      \
    } while (0)

static const char *running_test;

static inline _Noreturn void check_failed(const char *file, int line, const char *what,
                                          long long got, long long want)
{
    printf("# %s:%d: %s (got %lld, want %lld)\n", file, line, what, got, want);
    printf("not ok - %s\nBail out! %s failed\n", running_test, running_test);
    fflush(stdout);
    _Exit(1);
}

static inline int is_wanted(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], name) == 0)
            return 1;
    }
    return argc < 2;
}

static inline int run_tests(const struct test *tests, size_t n, int argc, char **argv)
{
    int done = 0;

    for (size_t i = 0; i < n; i++) {
        if (!is_wanted(tests[i].name, argc, argv))
            continue;
        running_test = tests[i].name;
        tests[i].run();
        printf("ok %d - %s\n", ++done, tests[i].name);
        fflush(stdout);
    }
    printf("1..%d\n", done);
    return done ? 0 : 1;
}

#define MAIN(tests)                                                                                \
    int main(int argc, char **argv)                                                                \
    {                                                                                              \
        return run_tests(tests, sizeof(tests) / sizeof((tests)[0]), argc, argv);                   \
    }

#endif
