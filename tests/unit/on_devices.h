/*
 * on_devices.h: runs a set of Check tests on host memory and, where there is a GPU (or the fake driver), on CUDA; a
 * machine without one skips visibly.
 */
#ifndef RY_TESTS_ON_DEVICES_H
#define RY_TESTS_ON_DEVICES_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device/device.h"

static const struct ry_device *device; /* the one under test */
static struct ry_err err;

/* Check tells its parent of every assertion that it meets: only failures are worth that in loops. */
#define ok(call)                                                                                                       \
    do {                                                                                                               \
        if (call)                                                                                                      \
            ck_abort_msg("%s: %s", #call, err.msg);                                                                    \
    } while (0)

static bool on_cuda;

/* In the child that Check forks for each test: a driver opened before the fork would not work after it. */
static void choose_device(void)
{
    device = on_cuda ? ry_device_cuda(&err) : ry_device_host();
    ck_assert_msg(device, "%s", err.msg);
}

static int run_on(const char *what, bool cuda, void (*add_tests)(TCase *, bool cuda))
{
    char name[64];
    on_cuda = cuda;
    snprintf(name, sizeof name, "%s: %s", what, cuda ? "cuda" : "host");
    Suite *suite = suite_create(name);
    TCase *t = tcase_create(what);
    tcase_set_timeout(t, 100);
    tcase_add_checked_fixture(t, choose_device, NULL);
    add_tests(t, cuda);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed;
}

/* Asked in a child, for the same reason. */
static bool cuda_works(struct ry_err *why)
{
    int fd[2];
    if (pipe(fd))
        return false;
    pid_t pid = fork();
    if (!pid) {
        struct ry_err e = {""};
        ry_device_cuda(&e);
        ssize_t w = write(fd[1], &e, sizeof e);
        _exit(w != sizeof e);
    }
    close(fd[1]);
    ssize_t n = read(fd[0], why, sizeof *why);
    close(fd[0]);
    return n == sizeof *why && !why->msg[0];
}

/** main(): 0 if all passed. */
static int on_devices(const char *what, void (*add_tests)(TCase *, bool cuda))
{
    struct ry_err why = {"no answer from the child that asked"};
    int failed = run_on(what, false, add_tests);
    if (cuda_works(&why))
        failed += run_on(what, true, add_tests);
    else if (getenv("RY_FAKE_CUDA"))
        failed += printf("the fake driver does not work: %s\n", why.msg);
    else
        printf("SKIP cuda: %s\n", why.msg);
    return failed ? 1 : 0;
}

#endif
