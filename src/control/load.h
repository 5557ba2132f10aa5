/*
 * load.h: opening a library that brings UCX along, inside somebody else's process.
 *
 * Owns: the environment that UCX's constructors see. As soon as libucs is loaded (1.13.1) it overwrites the code of
 * libc's mmap, munmap, brk, madvise and others with jumps into its own, which it says itself must not happen while
 * other threads run; takes over SIGSEGV, SIGBUS, SIGILL, SIGFPE and SIGHUP; and replaces the loading thread's alternate
 * signal stack. There is no call to prevent that, only variables. They are set for the duration of dlopen() and only
 * where the user has not set them, in a copy of the environment that `environ` points to meanwhile: unlike setenv(),
 * which may move what another thread is reading. A UCX that the job has loaded before is not affected.
 */
#ifndef RY_CONTROL_LOAD_H
#define RY_CONTROL_LOAD_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What `environ` was, and what it was made. */
struct ry_quiet {
    char **before, **copy;
};

/** UCX's constructors keep their hands still until ry_quiet_end(). The copy is not freed: other threads may be reading it. For a
 *  few calls in a process. */
static inline struct ry_quiet ry_quiet_begin(void)
{
    static char *const quiet[] = {"UCX_MEM_EVENTS=n", "UCX_HANDLE_ERRORS=none", "UCX_DEBUG_SIGNO=0",
                                  "UCX_VFS_ENABLE=n"};
    enum { QUIET = sizeof quiet / sizeof *quiet };
    static char **volatile kept; /* for leak checkers */
    char **before = environ, **copy;
    size_t n = 0, used;
    while (before && before[n])
        n++;
    if (!(copy = malloc((n + QUIET + 1) * sizeof *copy)))
        return (struct ry_quiet){before, before};
    if (n)
        memcpy(copy, before, n * sizeof *copy);
    used = n;
    for (int i = 0; i < QUIET; i++) {
        size_t name = strcspn(quiet[i], "=") + 1;
        bool set = false;
        for (size_t k = 0; k < n && !set; k++)
            set = !strncmp(before[k], quiet[i], name);
        if (!set)
            copy[used++] = quiet[i];
    }
    if (used == n) { /* quiet already */
        free(copy);
        return (struct ry_quiet){before, before};
    }
    copy[used] = NULL;
    kept = copy;
    __atomic_store_n(&environ, kept, __ATOMIC_RELEASE);
    return (struct ry_quiet){before, copy};
}

static inline void ry_quiet_end(struct ry_quiet q)
{
    /* Left as it is where somebody called setenv() meanwhile: that made an environment of its own. */
    __atomic_compare_exchange_n(&environ, &q.copy, q.before, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/** dlopen() that keeps UCX's hands still. */
static inline void *ry_load_quietly(const char *path, int flags)
{
    struct ry_quiet q = ry_quiet_begin();
    void *library = dlopen(path, flags);
    ry_quiet_end(q);
    return library;
}

#endif
