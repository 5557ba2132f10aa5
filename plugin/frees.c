/*
 * frees.c: the calls of CUDA that keep every other thread from launching until the device is idle.
 *
 * Owns: standing in front of them where exchanges may be pending (RAILYARD_HOLD=no): they would wait for a stream that
 * waits for a launch that they prevent. So what is pending goes first, and nothing is given away while they last. Not:
 * what is pending (the engine). Otherwise each is one test and a jump. Signatures are the ABI's, so that no header of
 * CUDA is needed; a call that cannot be found (nothing of CUDA is loaded, yet a program that looked for the name found
 * ours) says that CUDA is not there.
 *
 * Who gets these functions by dlsym() on a library's own handle, or links CUDA statically, passes by.
 */
#include <dlfcn.h>
#include <link.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "preload.h"

enum { RUNTIME_MISSING = 3 /* cudaErrorInitializationError */, DRIVER_MISSING = 3 /* CUDA_ERROR_NOT_INITIALIZED */ };

static _Atomic bool watched;

void ry_preload_watch_frees(void)
{
    atomic_store_explicit(&watched, true, memory_order_release);
}

struct search {
    const char *library, *name;
    void *found;
};

/* Frameworks load CUDA in local scopes, under names with any version. */
static int look_into(struct dl_phdr_info *info, size_t size, void *arg)
{
    struct search *s = arg;
    const char *base = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
    base = base ? base + 1 : info->dlpi_name;
    if (!base || strncmp(base, s->library, strlen(s->library)))
        return 0;
    void *handle = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    s->found = handle ? dlsym(handle, s->name) : NULL;
    if (handle)
        dlclose(handle);
    return s->found != NULL;
}

static void *find(const char *library, const char *name)
{
    struct search s = {library, name, dlsym(RTLD_NEXT, name)};
    if (!s.found)
        dl_iterate_phdr(look_into, &s);
    return s.found;
}

static bool begin(void)
{
    bool waits = atomic_load_explicit(&watched, memory_order_acquire) && atomic_load(&ry_preload_state) == RY_WATCHING;
    if (waits)
        FREEING(0);
    return waits;
}

#define STAND_BEFORE(library, missing, name, params, args)                                                             \
    API int before_##name params __asm__(#name); /* a header that NCCL's brings along declares some of them, too */    \
    API int before_##name params                                                                                       \
    {                                                                                                                  \
        static void *_Atomic real;                                                                                     \
        void *f_ = atomic_load_explicit(&real, memory_order_acquire);                                                  \
        if (__builtin_expect(!f_, 0)) {                                                                                \
            if (!(f_ = find(library, #name)))                                                                          \
                return missing;                                                                                        \
            atomic_store_explicit(&real, f_, memory_order_release);                                                    \
        }                                                                                                              \
        bool waited = begin();                                                                                         \
        int r = ((int(*) params)f_)args;                                                                               \
        if (waited)                                                                                                    \
            FREED();                                                                                                   \
        return r;                                                                                                      \
    }
#define RUNTIME(name, params, args) STAND_BEFORE("libcudart.so", RUNTIME_MISSING, name, params, args)
#define DRIVER(name, params, args) STAND_BEFORE("libcuda.so", DRIVER_MISSING, name, params, args)

/* Memory goes, or its mapping changes. */
RUNTIME(cudaFree, (void *p), (p))
RUNTIME(cudaFreeHost, (void *p), (p))
RUNTIME(cudaFreeArray, (void *p), (p))
RUNTIME(cudaFreeMipmappedArray, (void *p), (p))
RUNTIME(cudaHostRegister, (void *p, size_t bytes, unsigned flags), (p, bytes, flags))
RUNTIME(cudaHostUnregister, (void *p), (p))
RUNTIME(cudaIpcCloseMemHandle, (void *p), (p))
RUNTIME(cudaMemPoolTrimTo, (void *pool, size_t least), (pool, least))
RUNTIME(cudaMemPoolDestroy, (void *pool), (pool))
RUNTIME(cudaDeviceEnablePeerAccess, (int peer, unsigned flags), (peer, flags))
RUNTIME(cudaDeviceDisablePeerAccess, (int peer), (peer))
RUNTIME(cudaDeviceSetLimit, (int limit, size_t value), (limit, value))
RUNTIME(cudaDeviceReset, (void), ())
DRIVER(cuMemFree_v2, (unsigned long long p), (p))
DRIVER(cuMemFreeHost, (void *p), (p))
DRIVER(cuMemHostRegister_v2, (void *p, size_t bytes, unsigned flags), (p, bytes, flags))
DRIVER(cuMemHostUnregister, (void *p), (p))
DRIVER(cuMemUnmap, (unsigned long long p, size_t bytes), (p, bytes))
DRIVER(cuIpcCloseMemHandle, (unsigned long long p), (p))
DRIVER(cuArrayDestroy, (void *array), (array))
DRIVER(cuMemPoolTrimTo, (void *pool, size_t least), (pool, least))
DRIVER(cuMemPoolDestroy, (void *pool), (pool))
DRIVER(cuCtxSetLimit, (int limit, size_t value), (limit, value))
DRIVER(cuCtxDestroy_v2, (void *context), (context))
DRIVER(cuDevicePrimaryCtxReset_v2, (int device), (device))

/* Code comes or goes. */
DRIVER(cuModuleLoad, (void **out, const char *file), (out, file))
DRIVER(cuModuleLoadData, (void **out, const void *image), (out, image))
DRIVER(cuModuleLoadDataEx, (void **out, const void *image, unsigned n, int *options, void **values),
       (out, image, n, options, values))
DRIVER(cuModuleLoadFatBinary, (void **out, const void *image), (out, image))
DRIVER(cuModuleUnload, (void *module), (module))
DRIVER(cuLibraryLoadData,
       (void **out, const void *code, int *jit, void **jit_values, unsigned njit, int *options, void **values,
        unsigned n),
       (out, code, jit, jit_values, njit, options, values, n))
DRIVER(cuLibraryUnload, (void *library), (library))
