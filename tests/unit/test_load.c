/*
 * test_load.c: UCX comes into a process that knows nothing of it, and leaves code, signals and environment as they are.
 * Not linked with UCX, which would have done its deeds before main().
 */
#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "control/load.h"

#if !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
#define SANITIZED 0
#else
#define SANITIZED 1 /* does not bear what UCX does to libc */
#endif

#define FUNCTIONS 8

static void look(unsigned char code[FUNCTIONS][16], struct sigaction *actions, stack_t *stack)
{
    static const char *const names[FUNCTIONS] = {"mmap",    "munmap", "brk",   "sbrk",
                                                 "madvise", "mremap", "shmat", "shmdt"};
    for (int i = 0; i < FUNCTIONS; i++)
        memcpy(code[i], dlsym(RTLD_DEFAULT, names[i]), 16);
    for (int s = 1; s < NSIG; s++)
        if (sigaction(s, NULL, &actions[s]))
            memset(&actions[s], 0, sizeof actions[s]);
    sigaltstack(NULL, stack);
}

/* Was anything changed? Bits: code, signals, stack. */
static int load_and_compare(void *(*load)(const char *path, int flags))
{
    unsigned char before[FUNCTIONS][16], after[FUNCTIONS][16];
    struct sigaction was[NSIG], is[NSIG];
    stack_t stack[2];
    look(before, was, &stack[0]);
    void *ucs = load("libucs.so.0", RTLD_NOW | RTLD_LOCAL);
    ck_assert_msg(ucs != NULL, "%s", dlerror());
    look(after, is, &stack[1]);
    int changed = memcmp(before, after, sizeof before) ? 1 : 0;
    for (int s = 1; s < NSIG; s++)
        changed |= was[s].sa_handler != is[s].sa_handler ? 2 : 0;
    return changed | (stack[0].ss_sp != stack[1].ss_sp ? 4 : 0);
}

START_TEST(nothing_is_changed)
{
    char **before = environ;
    ck_assert_int_eq(load_and_compare(ry_load_quietly), 0);
    ck_assert_ptr_eq(environ, before);
    ck_assert_ptr_null(getenv("UCX_MEM_EVENTS"));
}
END_TEST

/* What is left to the user stays the user's. */
START_TEST(the_users_word_counts)
{
    setenv("UCX_HANDLE_ERRORS", "bt", 1);
    ck_assert_int_eq(load_and_compare(ry_load_quietly) & 2, 2);
    ck_assert_str_eq(getenv("UCX_HANDLE_ERRORS"), "bt");
}
END_TEST

/* If this fails, UCX has learned manners and load.h may go. */
START_TEST(it_is_needed)
{
    ck_assert_int_ne(load_and_compare(dlopen), 0);
}
END_TEST

int main(void)
{
    unsetenv("UCX_HANDLE_ERRORS"), unsetenv("UCX_MEM_EVENTS"), unsetenv("UCX_DEBUG_SIGNO");
    Suite *suite = suite_create("load");
    TCase *t = tcase_create("load");
    tcase_add_test(t, nothing_is_changed);
    if (!SANITIZED) {
        tcase_add_test(t, the_users_word_counts);
        tcase_add_test(t, it_is_needed);
    }
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
