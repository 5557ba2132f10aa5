/*
 * fake_cuda.c: a libcuda.so.1 of two devices on host memory, for testing the CUDA backend where there is no GPU.
 *
 * Owns: what the backend may get wrong without a GPU noticing soon: which context is current in each call. It is
 * stricter than the real driver: memory, streams and events belong to a context, and a call outside of that context
 * fails. Not: asynchronous work; everything is done when the call returns.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda.h>

#include "base/clock.h"

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
    uint64_t ns;
};
struct block {
    CUcontext ctx;
    uint64_t magic;
};
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
    *(struct block *)p = (struct block){current(), MAGIC};
    *out = (CUdeviceptr)(uintptr_t)p + HEADER;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemFree_v2(CUdeviceptr p)
{
    struct block *b = block_of(p);
    if (!b || b->ctx != current())
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
    if (a->ctx != current() || b->ctx != current() || !a->ns || !b->ns)
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
