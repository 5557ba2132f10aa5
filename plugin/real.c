/* real.c: see real.h. */
#include "base/log.h"
#include "older.h"
#include "real.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ry_real ry_real;
_Atomic bool ry_real_found;

static void *library; /* NULL: RTLD_NEXT finds it */
static char library_path[PATH_MAX];
static pthread_mutex_t load_lock = PTHREAD_MUTEX_INITIALIZER;

/* Is `p` a function of ours? RTLD_NEXT skips us, but a handle that names the preload by mistake would not. */
static bool ours(void *p)
{
    Dl_info them, us;
    return dladdr(p, &them) && dladdr((void *)ry_real_load, &us) && them.dli_fbase == us.dli_fbase;
}

void *ry_real_find(const char *name)
{
    void *p = dlsym(library ? library : RTLD_NEXT, name);
    __asm__ volatile("" : "+r"(p)); /* no tail call: RTLD_NEXT counts from the object that dlsym returns to */
    return p;
}

/* pncclX where there is one, else ncclX. */
static void *find_call(const char *name)
{
    char twin[64];
    snprintf(twin, sizeof twin, "p%s", name);
    void *p = ry_real_find(twin);
    if (!p)
        p = ry_real_find(name);
    return p && !ours(p) ? p : NULL;
}

static bool has_nccl(void *handle)
{
    void *p = dlsym(handle ? handle : RTLD_NEXT, "ncclCommInitRank");
    return p && !ours(p);
}

/* The file of a mapped libnccl.so*, whatever its soname; by /proc/self/maps. */
static bool mapped_path(char out[PATH_MAX])
{
    FILE *f = fopen("/proc/self/maps", "re");
    char *line = NULL;
    size_t cap = 0;
    bool found = false;
    while (f && !found && getline(&line, &cap, f) > 0) {
        char *path = strchr(line, '/'), *base = path ? strrchr(path, '/') : NULL;
        if (!base || strncmp(base, "/libnccl.so", 11))
            continue;
        path[strcspn(path, "\n")] = 0;
        found = strlen(path) < PATH_MAX;
        if (found)
            strcpy(out, path);
    }
    free(line);
    if (f)
        fclose(f);
    return found;
}

static bool open_library(void)
{
    const char *set = getenv("RAILYARD_NCCL");
    char path[PATH_MAX];
    if (set && *set) {
        library = dlopen(set, RTLD_LAZY | RTLD_LOCAL);
        if (library && has_nccl(library))
            return true;
        ry_warn("RAILYARD_NCCL=%s: %s; looking for NCCL in the usual ways", set,
               library ? "has no ncclCommInitRank" : dlerror());
        library = NULL;
    }
    if (has_nccl(NULL))
        return true;
    library = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_NOLOAD);
    if (library && has_nccl(library))
        return true;
    library = mapped_path(path) ? dlopen(path, RTLD_LAZY | RTLD_LOCAL) : NULL;
    if (library && has_nccl(library))
        return true;
    library = NULL;
    return false;
}

bool ry_real_load(void)
{
    if (atomic_load_explicit(&ry_real_found, memory_order_acquire))
        return true;
    pthread_mutex_lock(&load_lock);
    bool ok = atomic_load_explicit(&ry_real_found, memory_order_relaxed) || open_library();
    if (ok && !atomic_load_explicit(&ry_real_found, memory_order_relaxed)) {
#define F(name) ry_real.name = (__typeof__(ry_real.name))find_call(#name);
        RY_NCCL_FUNCTIONS(F)
        F(ncclCommCount) F(ncclCommUserRank) F(ncclCommCuDevice) F(ncclGetVersion)
#undef F
        ry_older_fill();
        Dl_info where;
        if (dladdr((void *)ry_real.ncclCommInitRank, &where) && where.dli_fname)
            snprintf(library_path, sizeof library_path, "%s", where.dli_fname);
        atomic_store_explicit(&ry_real_found, true, memory_order_release);
    } else if (!ok) {
        static bool said;
        if (!said)
            ry_log(RY_LOG_ERROR, "an NCCL function was called, but no libnccl.so.2 is loaded in this process: set "
                            "RAILYARD_NCCL to its path, or do not preload librailyard.so here");
        said = true;
    }
    pthread_mutex_unlock(&load_lock);
    return ok;
}

const char *ry_real_path(void)
{
    return library_path;
}

ncclResult_t ry_real_missing(const char *name)
{
    static _Atomic bool said;
    if (!atomic_load(&ry_real_found))
        return ncclSystemError;
    if (!atomic_exchange(&said, true))
        ry_warn("%s was called, but %s has no such function (without Railyard the call could not be linked)",
               name, library_path);
    return ncclInvalidUsage;
}
