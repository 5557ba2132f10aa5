/*
 * fake_cuda.c: a libcuda.so.1 of two devices on host memory, for testing the CUDA backend where there is no GPU.
 *
 * Owns: what the backend may get wrong without a GPU noticing soon: which context is current in each call. It is
 * stricter than the real driver: memory, streams, events and functions belong to a context, and a call outside of that
 * context fails. Kernels are run, too: emulate.cpp compiles their source for the host. Not: asynchronous work;
 * everything is done when the call returns.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda.h>

#include "base/clock.h"
#include "emulate.h"

#undef cuEventElapsedTime
#define EXPORT __attribute__((visibility("default"), used))
#define DEVICES 2
#define DEPTH 8

struct CUctx_st {
    int device;
};
struct CUstream_st {
    CUcontext ctx;
    CUresult capture_result;
    CUstreamCaptureStatus capture;
};
struct CUevent_st {
    CUcontext ctx;
    unsigned flags;
    uint64_t ns;
};
struct block {
    CUcontext ctx; /* NULL: pinned host memory */
    uint64_t magic;
    CUmemoryPool pool; /* NULL: not in stream order */
    size_t bytes;
};
struct CUmemPoolHandle_st {
    int device, internal_dependencies;
    cuuint64_t threshold;
    uint64_t bytes; /* allocated from it */
};
struct CUfunc_st {
    CUfunction next; /* of the module */
    CUcontext ctx;
    void (*run)(unsigned grid, unsigned block, const void *param);
    bool loaded; /* not only looked up: launching would load it, which may wait for other kernels */
};
static struct CUmod_st {
    CUmodule next;
    CUcontext ctx;
    CUfunction functions;
} * modules;
#define MAGIC UINT64_C(0xfa4ecbdafa4ecbda)
#define HEADER 256 /* keeps the alignment of what follows */

static struct CUctx_st contexts[DEVICES] = {{0}, {1}};
static bool initialized;
static _Thread_local CUcontext stack[DEPTH];
static _Thread_local int depth;
static _Thread_local CUstreamCaptureMode mode;

static CUcontext current(void)
{
    return depth ? stack[depth - 1] : NULL;
}

/* For tests: the thread's context stack, and what the capture query answers for a stream. */
EXPORT int fake_cuda_depth(void);
int fake_cuda_depth(void)
{
    return depth;
}
EXPORT int fake_cuda_device(void);
int fake_cuda_device(void)
{
    return current() ? current()->device : -1;
}
EXPORT int fake_cuda_mode(void);
int fake_cuda_mode(void)
{
    return (int)mode;
}
/* Some other thread captures a stream in the global mode: what may synchronize would spoil that, and is refused. */
static bool elsewhere;
EXPORT void fake_cuda_elsewhere(int captures);
void fake_cuda_elsewhere(int captures)
{
    elsewhere = captures;
}
/* The device's pool, as it was last set up: bytes in use, or -1 for none. */
static CUmemoryPool pools[DEVICES];
EXPORT int64_t fake_cuda_pool(int device, uint64_t *threshold, int *internal_dependencies);
int64_t fake_cuda_pool(int device, uint64_t *threshold, int *internal_dependencies)
{
    if (!pools[device])
        return -1;
    *threshold = pools[device]->threshold;
    *internal_dependencies = pools[device]->internal_dependencies;
    return (int64_t)pools[device]->bytes;
}
/* What waits for the device, or may: refused while a capture would be spoiled by it. */
static bool spoils(void)
{
    return elsewhere && mode != CU_STREAM_CAPTURE_MODE_RELAXED;
}
EXPORT void fake_cuda_capture(CUstream stream, CUresult result, CUstreamCaptureStatus status);
void fake_cuda_capture(CUstream stream, CUresult result, CUstreamCaptureStatus status)
{
    stream->capture_result = result;
    stream->capture = status;
}

EXPORT CUresult CUDAAPI cuInit(unsigned flags)
{
    initialized = true;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDeviceGetCount(int *n)
{
    *n = DEVICES;
    return initialized ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

EXPORT CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return ordinal >= 0 && ordinal < DEVICES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult CUDAAPI cuDeviceGetName(char *name, int len, CUdevice device)
{
    snprintf(name, (size_t)len, "Fake GPU %d", device);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDeviceGetPCIBusId(char *name, int len, CUdevice device)
{
    return snprintf(name, (size_t)len, "0000:%02X:00.0", 0xa0 + device) < len ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult CUDAAPI cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device)
{
    for (int i = 0; i < 16; i++)
        uuid->bytes[i] = (char)(i * 17 + device);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *ctx, CUdevice device)
{
    *ctx = &contexts[device];
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxPushCurrent_v2(CUcontext ctx)
{
    if (!ctx || depth == DEPTH)
        return CUDA_ERROR_INVALID_CONTEXT;
    stack[depth++] = ctx;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxPopCurrent_v2(CUcontext *ctx)
{
    if (!depth)
        return CUDA_ERROR_INVALID_CONTEXT;
    *ctx = stack[--depth];
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxGetCurrent(CUcontext *ctx)
{
    *ctx = current();
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxSetCurrent(CUcontext ctx)
{
    if (depth)
        depth--;
    if (ctx)
        stack[depth++] = ctx;
    return CUDA_SUCCESS;
}

static struct block *block_of(CUdeviceptr p)
{
    /* Only asked about pointers that the tests allocated here, or about memory big enough to look in front of. */
    struct block *b = (struct block *)(uintptr_t)(p - HEADER);
    return b->magic == MAGIC ? b : NULL;
}

EXPORT CUresult CUDAAPI cuPointerGetAttribute(void *out, CUpointer_attribute what, CUdeviceptr p)
{
    struct block *b = p % HEADER ? NULL : block_of(p);
    if (what != CU_POINTER_ATTRIBUTE_CONTEXT || !b)
        return CUDA_ERROR_INVALID_VALUE;
    *(CUcontext *)out = b->ctx;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr *out, size_t bytes)
{
    void *p;
    if (!current())
        return CUDA_ERROR_INVALID_CONTEXT;
    if (!bytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (bytes > SIZE_MAX / 2 || posix_memalign(&p, HEADER, HEADER + bytes))
        return CUDA_ERROR_OUT_OF_MEMORY;
    *(struct block *)p = (struct block){.ctx = current(), .magic = MAGIC};
    *out = (CUdeviceptr)(uintptr_t)p + HEADER;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemFree_v2(CUdeviceptr p)
{
    struct block *b = block_of(p);
    if (!b || b->pool || !b->ctx || b->ctx != current())
        return CUDA_ERROR_INVALID_VALUE;
    b->magic = 0;
    free(b);
    return CUDA_SUCCESS;
}

static CUresult check_stream(CUstream stream)
{
    if (!current())
        return CUDA_ERROR_INVALID_CONTEXT;
    return (uintptr_t)stream <= 2 || stream->ctx == current() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

/* ---- in stream order ---- */

EXPORT CUresult CUDAAPI cuCtxGetDevice(CUdevice *device)
{
    if (!current())
        return CUDA_ERROR_INVALID_CONTEXT;
    *device = current()->device;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemPoolCreate(CUmemoryPool *pool, const CUmemPoolProps *props)
{
    if (spoils())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (props->allocType != CU_MEM_ALLOCATION_TYPE_PINNED || props->location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
        props->location.id < 0 || props->location.id >= DEVICES)
        return CUDA_ERROR_INVALID_VALUE;
    *pool = pools[props->location.id] = calloc(1, sizeof **pool);
    (*pool)->device = props->location.id;
    (*pool)->internal_dependencies = 1; /* as the real one begins */
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute what, void *value)
{
    if (what == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD)
        pool->threshold = *(cuuint64_t *)value;
    else if (what == CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES)
        pool->internal_dependencies = *(int *)value;
    else
        return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemPoolDestroy(CUmemoryPool pool)
{
    pools[pool->device] = NULL;
    free(pool);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemAllocFromPoolAsync(CUdeviceptr *out, size_t bytes, CUmemoryPool pool, CUstream stream)
{
    CUresult r = check_stream(stream);
    if (r)
        return r;
    if (pool->device != current()->device || !bytes)
        return CUDA_ERROR_INVALID_VALUE;
    r = cuMemAlloc_v2(out, bytes);
    if (!r) {
        block_of(*out)->pool = pool;
        pool->bytes += bytes;
        block_of(*out)->bytes = bytes;
    }
    return r;
}

EXPORT CUresult CUDAAPI cuMemFreeAsync(CUdeviceptr p, CUstream stream)
{
    CUresult r = check_stream(stream);
    struct block *b = block_of(p);
    if (r)
        return r;
    if (!b || !b->pool || b->ctx != current())
        return CUDA_ERROR_INVALID_VALUE;
    b->pool->bytes -= b->bytes;
    b->magic = 0;
    free(b);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemHostAlloc(void **out, size_t bytes, unsigned flags)
{
    if (!current())
        return CUDA_ERROR_INVALID_CONTEXT;
    if (spoils())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    CUdeviceptr p;
    CUresult r = cuMemAlloc_v2(&p, bytes);
    if (!r) {
        if (flags & CU_MEMHOSTALLOC_PORTABLE)
            block_of(p)->ctx = NULL;
        *out = (void *)(uintptr_t)p;
    }
    return r;
}

EXPORT CUresult CUDAAPI cuMemFreeHost(void *p)
{
    struct block *b = block_of((CUdeviceptr)(uintptr_t)p);
    if (!current())
        return CUDA_ERROR_INVALID_CONTEXT;
    if (!b || b->ctx)
        return CUDA_ERROR_INVALID_VALUE;
    free(b);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    return check_stream(stream); /* the event may be another context's */
}

/* ---- kernels ---- */

EXPORT CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image)
{
    if (!current())
        return CUDA_ERROR_INVALID_CONTEXT;
    if (spoils())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (*(const uint32_t *)image != 0xba55ed50) /* a fatbin begins so */
        return CUDA_ERROR_INVALID_IMAGE;
    *module = calloc(1, sizeof **module);
    (*module)->ctx = current();
    (*module)->next = modules;
    modules = *module;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuModuleUnload(CUmodule module)
{
    if (module->ctx != current())
        return CUDA_ERROR_INVALID_CONTEXT;
    CUmodule *at = &modules;
    while (*at != module)
        at = &(*at)->next;
    *at = module->next;
    for (CUfunction f = module->functions, next; f; f = next) {
        next = f->next;
        free(f);
    }
    free(module);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    if (module->ctx != current())
        return CUDA_ERROR_INVALID_CONTEXT;
    if (!emulated(name))
        return CUDA_ERROR_NOT_FOUND;
    *function = calloc(1, sizeof **function);
    **function = (struct CUfunc_st){.next = module->functions, .ctx = module->ctx, .run = emulated(name)};
    module->functions = *function;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction function)
{
    if (function->ctx != current())
        return CUDA_ERROR_INVALID_CONTEXT;
    function->loaded = true;
    *value = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                       unsigned by, unsigned bz, unsigned shared, CUstream stream, void **params,
                                       void **extra)
{
    CUresult r = check_stream(stream);
    if (r)
        return r;
    if (function->ctx != current() || !function->loaded)
        return CUDA_ERROR_INVALID_HANDLE;
    if (!gx || gy != 1 || gz != 1 || !bx || bx > 1024 || by != 1 || bz != 1 || shared || extra)
        return CUDA_ERROR_INVALID_VALUE;
    function->run(gx, bx, params[0]);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    CUresult r = check_stream(stream);
    if (!r)
        memmove((void *)(uintptr_t)to, (const void *)(uintptr_t)from, bytes);
    return r;
}

EXPORT CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream)
{
    CUresult r = check_stream(stream);
    if (!r)
        memset((void *)(uintptr_t)to, value, bytes);
    return r;
}

EXPORT CUresult CUDAAPI cuStreamCreate(CUstream *stream, unsigned flags)
{
    if (!current())
        return CUDA_ERROR_INVALID_CONTEXT;
    *stream = calloc(1, sizeof **stream);
    (*stream)->ctx = current();
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuStreamDestroy_v2(CUstream stream)
{
    CUresult r = check_stream(stream);
    if (!r)
        free(stream);
    return r;
}

EXPORT CUresult CUDAAPI cuStreamSynchronize(CUstream stream)
{
    return check_stream(stream);
}

EXPORT CUresult CUDAAPI cuStreamGetCtx(CUstream stream, CUcontext *ctx)
{
    *ctx = (uintptr_t)stream <= 2 ? current() : stream->ctx;
    return *ctx ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

EXPORT CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    CUresult r = check_stream(stream);
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    if (r || (uintptr_t)stream <= 2)
        return r;
    *status = stream->capture;
    return stream->capture_result;
}

EXPORT CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *with)
{
    CUstreamCaptureMode was = mode;
    mode = *with;
    *with = was;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned flags)
{
    if (!current())
        return CUDA_ERROR_INVALID_CONTEXT;
    *event = calloc(1, sizeof **event);
    (*event)->ctx = current();
    (*event)->flags = flags;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream)
{
    CUresult r = check_stream(stream);
    if (!r && event->ctx != current())
        r = CUDA_ERROR_INVALID_HANDLE;
    if (!r)
        event->ns = ry_now_ns();
    return r;
}

EXPORT CUresult CUDAAPI cuEventQuery(CUevent event)
{
    if (elsewhere && mode != CU_STREAM_CAPTURE_MODE_RELAXED)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return event->ctx == current() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult CUDAAPI cuEventElapsedTime(float *ms, CUevent a, CUevent b); /* cuda.h may only know the _v2 */
CUresult CUDAAPI cuEventElapsedTime(float *ms, CUevent a, CUevent b)
{
    if (elsewhere && mode != CU_STREAM_CAPTURE_MODE_RELAXED)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (a->ctx != current() || b->ctx != current() || !a->ns || !b->ns || a->flags || b->flags)
        return CUDA_ERROR_INVALID_HANDLE;
    *ms = (float)((double)b->ns - (double)a->ns) / 1e6f;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuEventDestroy_v2(CUevent event)
{
    if (event->ctx != current())
        return CUDA_ERROR_INVALID_HANDLE;
    free(event);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuGetErrorName(CUresult r, const char **name)
{
    *name = r == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuGetErrorString(CUresult r, const char **text)
{
    *text = "told by the fake driver";
    return CUDA_SUCCESS;
}
