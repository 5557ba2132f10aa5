/*
 * cuda.c: the CUDA backend, on the driver API opened at run time.
 *
 * Owns: finding libcuda.so.1 and the driver calls, which context each call runs in, a memory pool for each device,
 * loading kernels. Not: NCCL, what kernels do.
 *
 * Contexts: only primary contexts are used, the ones the CUDA runtime of the job uses as well, so that pointers and
 * streams are common property. A call about a stream runs in that stream's context, a call about an event in the
 * event's, a call about memory in the memory's; `use` and a thread's own current context decide the rest, and a thread
 * that has neither gets device 0, as with the CUDA runtime. Primary contexts, once retained, are kept until the process
 * ends: releasing them could tear down what the job still uses.
 *
 * The pool of alloc_async is our own rather than the device's default one, which belongs to the job (PyTorch's
 * cudaMallocAsync backend sets its threshold and reads its statistics; its own caching allocator does not use it). Two
 * settings make it a good neighbour. Release threshold 0: what we gave back goes to the driver at the next
 * synchronization, where the job's allocator can have it; the few blocks that we keep, we keep allocated. No internal
 * dependencies: the driver may not make one stream wait for another to reuse memory, since the streams are those of
 * different communicators, and two ranks that tie them to each other in different order never end.
 */
#include "device.h"

#ifndef RY_HAVE_CUDA

const struct ry_device *ry_device_cuda(struct ry_err *err)
{
    ry_fail(err, "this Railyard was built without CUDA support: build it where cuda.h is, with -Dcuda=enabled");
    return NULL;
}

#else

#include <ctype.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda.h>

/* Driver calls: our name, the exported symbol (versioned: cuda.h's macros would pick by header, the file has both). */
#define DRIVER_CALLS(CALL)                                                                                             \
    CALL(init, "cuInit", (unsigned))                                                                                   \
    CALL(device_count, "cuDeviceGetCount", (int *))                                                                    \
    CALL(device_get, "cuDeviceGet", (CUdevice *, int))                                                                 \
    CALL(device_name, "cuDeviceGetName", (char *, int, CUdevice))                                                      \
    CALL(device_pci, "cuDeviceGetPCIBusId", (char *, int, CUdevice))                                                   \
    CALL(device_uuid, "cuDeviceGetUuid_v2", (CUuuid *, CUdevice))                                                      \
    CALL(primary_retain, "cuDevicePrimaryCtxRetain", (CUcontext *, CUdevice))                                          \
    CALL(ctx_push, "cuCtxPushCurrent_v2", (CUcontext))                                                                 \
    CALL(ctx_pop, "cuCtxPopCurrent_v2", (CUcontext *))                                                                 \
    CALL(ctx_get, "cuCtxGetCurrent", (CUcontext *))                                                                    \
    CALL(ctx_set, "cuCtxSetCurrent", (CUcontext))                                                                      \
    CALL(ctx_device, "cuCtxGetDevice", (CUdevice *))                                                                   \
    CALL(pointer_attribute, "cuPointerGetAttribute", (void *, CUpointer_attribute, CUdeviceptr))                       \
    CALL(mem_alloc, "cuMemAlloc_v2", (CUdeviceptr *, size_t))                                                          \
    CALL(mem_free, "cuMemFree_v2", (CUdeviceptr))                                                                      \
    CALL(pool_create, "cuMemPoolCreate", (CUmemoryPool *, const CUmemPoolProps *))                                     \
    CALL(pool_set, "cuMemPoolSetAttribute", (CUmemoryPool, CUmemPool_attribute, void *))                               \
    CALL(pool_destroy, "cuMemPoolDestroy", (CUmemoryPool))                                                             \
    CALL(mem_alloc_async, "cuMemAllocFromPoolAsync", (CUdeviceptr *, size_t, CUmemoryPool, CUstream))                  \
    CALL(mem_free_async, "cuMemFreeAsync", (CUdeviceptr, CUstream))                                                    \
    CALL(host_alloc, "cuMemHostAlloc", (void **, size_t, unsigned))                                                    \
    CALL(host_free, "cuMemFreeHost", (void *))                                                                         \
    CALL(module_load, "cuModuleLoadData", (CUmodule *, const void *))                                                  \
    CALL(module_unload, "cuModuleUnload", (CUmodule))                                                                  \
    CALL(module_function, "cuModuleGetFunction", (CUfunction *, CUmodule, const char *))                               \
    CALL(function_attribute, "cuFuncGetAttribute", (int *, CUfunction_attribute, CUfunction))                          \
    CALL(launch, "cuLaunchKernel",                                                                                     \
         (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **,         \
          void **))                                                                                                    \
    CALL(mem_copy, "cuMemcpyAsync", (CUdeviceptr, CUdeviceptr, size_t, CUstream))                                      \
    CALL(mem_set, "cuMemsetD8Async", (CUdeviceptr, unsigned char, size_t, CUstream))                                   \
    CALL(stream_create, "cuStreamCreate", (CUstream *, unsigned))                                                      \
    CALL(stream_destroy, "cuStreamDestroy_v2", (CUstream))                                                             \
    CALL(stream_sync, "cuStreamSynchronize", (CUstream))                                                               \
    CALL(stream_wait, "cuStreamWaitEvent", (CUstream, CUevent, unsigned))                                              \
    CALL(stream_ctx, "cuStreamGetCtx", (CUstream, CUcontext *))                                                        \
    CALL(stream_capturing, "cuStreamIsCapturing", (CUstream, CUstreamCaptureStatus *))                                 \
    CALL(capture_mode, "cuThreadExchangeStreamCaptureMode", (CUstreamCaptureMode *))                                   \
    CALL(event_create, "cuEventCreate", (CUevent *, unsigned))                                                         \
    CALL(event_record, "cuEventRecord", (CUevent, CUstream))                                                           \
    CALL(event_query, "cuEventQuery", (CUevent))                                                                       \
    CALL(event_elapsed, "cuEventElapsedTime", (float *, CUevent, CUevent))                                             \
    CALL(event_destroy, "cuEventDestroy_v2", (CUevent))                                                                \
    CALL(error_name, "cuGetErrorName", (CUresult, const char **))                                                      \
    CALL(error_text, "cuGetErrorString", (CUresult, const char **))

static struct driver {
#define MEMBER(field, symbol, args) CUresult(CUDAAPI *field) args;
    DRIVER_CALLS(MEMBER)
#undef MEMBER
} cu;

static CUcontext primary[RY_DEVICES];
static pthread_mutex_t primary_lock = PTHREAD_MUTEX_INITIALIZER;

static struct pool {
    _Atomic(CUmemoryPool) memory; /* set last */
    CUstream freeing;             /* ours, for giving back behind an event */
} pools[RY_DEVICES];
static pthread_mutex_t prepare_lock = PTHREAD_MUTEX_INITIALIZER;

struct ry_event {
    CUevent event; /* NULL until it is first recorded, if it was created on a thread without a context */
    CUcontext ctx; /* in which `event` was made */
    unsigned flags;
};

static int fail(struct ry_err *err, const char *call, CUresult r)
{
    const char *name = NULL, *text = NULL;
    if (cu.error_name(r, &name) || !name)
        name = "unknown error";
    if (cu.error_text(r, &text) || !text)
        text = "no description";
    return ry_fail(err, "%s: %s (%d), %s", call, name, (int)r, text);
}

/* Call the driver; on failure return through `fail` with the call's own name. */
#define TRY(err, field, ...)                                                                                           \
    do {                                                                                                               \
        CUresult r_ = cu.field(__VA_ARGS__);                                                                           \
        if (r_)                                                                                                        \
            return fail(err, symbol_##field, r_);                                                                      \
    } while (0)
#define NAME(field, symbol, args) __attribute__((unused)) static const char symbol_##field[] = symbol;
DRIVER_CALLS(NAME)
#undef NAME

/* Capture errors say that somebody captures somewhere: not ours to touch. 900 … 908 in every CUDA so far. */
static bool is_capture_error(CUresult r)
{
    return r >= CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED && r <= CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
}

static int primary_context(int ordinal, CUcontext *out, struct ry_err *err)
{
    if (ordinal < 0 || ordinal >= RY_DEVICES)
        return ry_fail(err, "no CUDA device %d", ordinal);
    pthread_mutex_lock(&primary_lock);
    int rc = 0;
    if (!primary[ordinal]) {
        CUdevice device;
        CUcontext ctx;
        CUresult r = cu.device_get(&device, ordinal);
        if (r)
            rc = fail(err, symbol_device_get, r);
        else if ((r = cu.primary_retain(&ctx, device)))
            rc = fail(err, symbol_primary_retain, r);
        else
            primary[ordinal] = ctx;
    }
    *out = primary[ordinal];
    pthread_mutex_unlock(&primary_lock);
    return rc;
}

/* The thread's own context; device 0's where it has none, as the CUDA runtime would choose. */
static int own_context(CUcontext *out, struct ry_err *err)
{
    TRY(err, ctx_get, out);
    return *out ? 0 : primary_context(0, out, err);
}

/* NULL, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD exist in every context and mean the thread's. */
static bool is_special(void *stream)
{
    return (uintptr_t)stream <= (uintptr_t)CU_STREAM_PER_THREAD;
}

static int stream_context(void *stream, CUcontext *out, struct ry_err *err)
{
    if (is_special(stream))
        return own_context(out, err);
    TRY(err, stream_ctx, stream, out);
    return 0;
}

/* The context that owns device memory at `p`; NULL for host memory that CUDA does not know. */
static CUcontext memory_context(const void *p)
{
    CUcontext ctx = NULL;
    return cu.pointer_attribute(&ctx, CU_POINTER_ATTRIBUTE_CONTEXT, (CUdeviceptr)(uintptr_t)p) ? NULL : ctx;
}

static int enter(CUcontext ctx, struct ry_err *err)
{
    TRY(err, ctx_push, ctx);
    return 0;
}

static void leave(void)
{
    CUcontext ignored;
    cu.ctx_pop(&ignored);
}

/* Enter, call, leave: the result of the driver call becomes -1 with its name. */
#define IN_CONTEXT(err, ctx, field, ...)                                                                               \
    ({                                                                                                                 \
        int rc_ = enter(ctx, err);                                                                                     \
        if (!rc_) {                                                                                                    \
            CUresult r_ = cu.field(__VA_ARGS__);                                                                       \
            leave();                                                                                                   \
            if (r_)                                                                                                    \
                rc_ = fail(err, symbol_##field, r_);                                                                   \
        }                                                                                                              \
        rc_;                                                                                                           \
    })

static int cuda_count(int *n, struct ry_err *err)
{
    TRY(err, device_count, n);
    return 0;
}

static int cuda_identify(int ordinal, struct ry_device_id *out, struct ry_err *err)
{
    *out = (struct ry_device_id){0};
    CUdevice device;
    CUuuid uuid;
    TRY(err, device_get, &device, ordinal);
    TRY(err, device_name, out->name, sizeof out->name, device);
    TRY(err, device_pci, out->pci, sizeof out->pci, device);
    TRY(err, device_uuid, &uuid, device);
    for (char *c = out->pci; *c; c++)
        *c = (char)tolower((unsigned char)*c);
    int n = snprintf(out->uuid, sizeof out->uuid, "GPU");
    for (int i = 0; i < 16; i++) /* groups of 4, 2, 2, 2 and 6 bytes, each after a dash */
        n += snprintf(out->uuid + n, sizeof out->uuid - (size_t)n, "%s%02x",
                      i == 0 || i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", (unsigned char)uuid.bytes[i]);
    return 0;
}

static int cuda_use(int ordinal, struct ry_err *err)
{
    CUcontext ctx;
    if (primary_context(ordinal, &ctx, err))
        return -1;
    TRY(err, ctx_set, ctx);
    return 0;
}

static int cuda_alloc(void **out, size_t bytes, struct ry_err *err)
{
    CUcontext ctx;
    CUdeviceptr p;
    *out = NULL;
    if (!bytes)
        return 0;
    if (own_context(&ctx, err) || IN_CONTEXT(err, ctx, mem_alloc, &p, bytes))
        return -1;
    *out = (void *)(uintptr_t)p;
    return 0;
}

static int cuda_release(void *p, struct ry_err *err)
{
    if (!p)
        return 0;
    CUcontext ctx = memory_context(p);
    if (!ctx)
        return ry_fail(err, "%p is not device memory", p);
    return IN_CONTEXT(err, ctx, mem_free, (CUdeviceptr)(uintptr_t)p);
}

static int cuda_copy(void *dst, const void *src, size_t bytes, void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (!bytes)
        return 0;
    if (stream_context(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, mem_copy, (CUdeviceptr)(uintptr_t)dst, (CUdeviceptr)(uintptr_t)src, bytes, stream);
}

static int cuda_fill(void *dst, unsigned char value, size_t bytes, void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (!bytes)
        return 0;
    if (stream_context(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, mem_set, (CUdeviceptr)(uintptr_t)dst, value, bytes, stream);
}

/* ---- in stream order ---- */

/* The device of the context that is current: inside enter() and leave(). */
static int current_device(struct ry_err *err)
{
    CUdevice device;
    TRY(err, ctx_device, &device);
    return device < RY_DEVICES ? device
                               : ry_fail(err, "CUDA device %d is beyond the %d that are served", device, RY_DEVICES);
}

static int make_pool(struct pool *pool, int device, struct ry_err *err)
{
    CUmemPoolProps props = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED,
                            .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device}};
    CUmemoryPool memory;
    cuuint64_t threshold = 0;
    int no = 0;
    TRY(err, pool_create, &memory, &props);
    CUresult r;
    if ((r = cu.pool_set(memory, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &threshold)) ||
        (r = cu.pool_set(memory, CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES, &no))) {
        cu.pool_destroy(memory);
        return fail(err, symbol_pool_set, r);
    }
    if ((r = cu.stream_create(&pool->freeing, CU_STREAM_NON_BLOCKING))) {
        cu.pool_destroy(memory);
        return fail(err, symbol_stream_create, r);
    }
    pool->memory = memory;
    return 0;
}

/*
 * With lazy loading (the default) a function is loaded when it is first asked for or launched, and that may wait for
 * kernels under way: NCCL's, which wait for other ranks. So all are asked for here, attributes included.
 */
static int load(const struct ry_kernels *kernels, int device, struct ry_err *err)
{
    CUmodule module;
    if (kernels->n > RY_KERNELS)
        return ry_fail(err, "%d kernels in one image, %d are served", kernels->n, RY_KERNELS);
    if (!kernels->image)
        return ry_fail(err, "this Railyard was built without nvcc: build it where the CUDA toolkit is");
    CUfunction function[RY_KERNELS];
    TRY(err, module_load, &module, kernels->image);
    for (int i = 0; i < kernels->n; i++) {
        int registers;
        const char *call = symbol_module_function;
        CUresult r = cu.module_function(&function[i], module, kernels->kernel[i]->name);
        if (!r) {
            call = symbol_function_attribute;
            r = cu.function_attribute(&registers, CU_FUNC_ATTRIBUTE_NUM_REGS, function[i]);
        }
        if (r) {
            cu.module_unload(module);
            return fail(err, call, r);
        }
    }
    for (int i = 0; i < kernels->n; i++)
        kernels->kernel[i]->loaded[device] = function[i];
    return 0;
}

static bool is_loaded(const struct ry_kernels *kernels, int device)
{
    for (int i = 0; i < kernels->n; i++)
        if (!kernels->kernel[i]->loaded[device])
            return false;
    return true;
}

static int cuda_prepare(int ordinal, const struct ry_kernels *kernels, struct ry_err *err)
{
    CUcontext ctx;
    if ((ordinal < 0 ? own_context(&ctx, err) : primary_context(ordinal, &ctx, err)) || enter(ctx, err))
        return -1;
    /* Another thread may be capturing a graph, which this need not spoil. */
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    cu.capture_mode(&mode);
    pthread_mutex_lock(&prepare_lock);
    int device = current_device(err), rc = device < 0 ? -1 : 0;
    if (!rc && !pools[device].memory)
        rc = make_pool(&pools[device], device, err);
    if (!rc && kernels && !is_loaded(kernels, device))
        rc = load(kernels, device, err);
    pthread_mutex_unlock(&prepare_lock);
    cu.capture_mode(&mode);
    leave();
    return rc;
}

static int cuda_alloc_async(void **out, size_t bytes, void *stream, struct ry_err *err)
{
    CUcontext ctx;
    CUdeviceptr p;
    *out = NULL;
    if (!bytes)
        return 0;
    if (stream_context(stream, &ctx, err) || enter(ctx, err))
        return -1;
    int device = current_device(err), rc = device < 0 ? -1 : 0;
    CUmemoryPool pool = rc ? NULL : pools[device].memory;
    if (!rc && !pool)
        rc = ry_fail(err, "CUDA device %d was not prepared", device);
    CUresult r = rc ? CUDA_SUCCESS : cu.mem_alloc_async(&p, bytes, pool, stream);
    leave();
    if (rc || r)
        return rc ? rc : fail(err, symbol_mem_alloc_async, r);
    *out = (void *)(uintptr_t)p;
    return 0;
}

static int cuda_free_async(void *p, void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (!p)
        return 0;
    if (stream_context(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, mem_free_async, (CUdeviceptr)(uintptr_t)p, stream);
}

/*
 * A stream of our own waits for the event, so that neither the host nor a stream of the job does. Should an event never
 * come to pass, what is freed behind it stays where it is, and so does what other communicators free after that: no
 * process lives on for long with kernels that never end.
 */
static int cuda_free_after(void *p, struct ry_event *ev, struct ry_err *err)
{
    if (!p)
        return 0;
    if (!ev->event)
        return ry_fail(err, "an event that was never recorded");
    if (enter(ev->ctx, err))
        return -1;
    int device = current_device(err);
    CUstream freeing = device >= 0 && pools[device].memory ? pools[device].freeing : NULL;
    const char *call = symbol_stream_wait;
    CUresult r = CUDA_SUCCESS;
    int rc = device < 0 ? -1 : freeing ? 0 : ry_fail(err, "CUDA device %d was not prepared", device);
    if (!rc && !(r = cu.stream_wait(freeing, ev->event, 0))) {
        call = symbol_mem_free_async;
        r = cu.mem_free_async((CUdeviceptr)(uintptr_t)p, freeing);
    }
    leave();
    return r ? fail(err, call, r) : rc;
}

static int cuda_pinned_alloc(void **out, size_t bytes, struct ry_err *err)
{
    CUcontext ctx;
    *out = NULL;
    if (!bytes)
        return 0;
    if (own_context(&ctx, err))
        return -1;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    cu.capture_mode(&mode);
    int rc = IN_CONTEXT(err, ctx, host_alloc, out, bytes, CU_MEMHOSTALLOC_PORTABLE);
    cu.capture_mode(&mode);
    return rc;
}

static int cuda_pinned_free(void *p, struct ry_err *err)
{
    CUcontext ctx;
    if (!p)
        return 0;
    if (own_context(&ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, host_free, p);
}

static int cuda_launch(struct ry_kernel *kernel, unsigned grid, unsigned block, const void *param, void *stream,
                       struct ry_err *err)
{
    CUcontext ctx;
    if (stream_context(stream, &ctx, err) || enter(ctx, err))
        return -1;
    int device = current_device(err);
    CUfunction function = device < 0 ? NULL : kernel->loaded[device];
    void *params[] = {(void *)(uintptr_t)param};
    CUresult r = function ? cu.launch(function, grid, 1, 1, block, 1, 1, 0, stream, params, NULL) : CUDA_SUCCESS;
    leave();
    if (function)
        return r ? fail(err, symbol_launch, r) : 0;
    return device < 0 ? -1 : ry_fail(err, "kernel %s was not loaded on CUDA device %d", kernel->name, device);
}

static int cuda_stream_create(void **stream, struct ry_err *err)
{
    CUcontext ctx;
    CUstream s;
    *stream = NULL;
    /* non-blocking: must not wait for what the job puts on the legacy default stream */
    if (own_context(&ctx, err) || IN_CONTEXT(err, ctx, stream_create, &s, CU_STREAM_NON_BLOCKING))
        return -1;
    *stream = s;
    return 0;
}

static int cuda_stream_destroy(void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (is_special(stream))
        return ry_fail(err, "the default stream cannot be destroyed");
    if (stream_context(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, stream_destroy, stream);
}

static int cuda_stream_sync(void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (stream_context(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, stream_sync, stream);
}

static int cuda_stream_capturing(void *stream, bool *capturing, struct ry_err *err)
{
    CUcontext ctx;
    CUstreamCaptureStatus status;
    *capturing = true; /* whatever cannot be found out is treated as captured */
    if (stream_context(stream, &ctx, err) || enter(ctx, err))
        return -1;
    CUresult r = cu.stream_capturing(stream, &status);
    leave();
    if (r)
        return is_capture_error(r) ? 0 : fail(err, symbol_stream_capturing, r);
    *capturing = status != CU_STREAM_CAPTURE_STATUS_NONE;
    return 0;
}

static int make_event(struct ry_event *ev, CUcontext ctx, struct ry_err *err)
{
    CUevent event;
    if (IN_CONTEXT(err, ctx, event_create, &event, ev->flags))
        return -1;
    if (ev->event)
        IN_CONTEXT(NULL, ev->ctx, event_destroy, ev->event);
    ev->event = event;
    ev->ctx = ctx;
    return 0;
}

static int new_event(struct ry_event **out, unsigned flags, struct ry_err *err)
{
    CUcontext ctx;
    *out = NULL;
    TRY(err, ctx_get, &ctx);
    struct ry_event *ev = calloc(1, sizeof *ev);
    if (!ev)
        return ry_fail(err, "out of memory for an event");
    ev->flags = flags;
    /* A thread without a context: the stream that it is recorded on will say which device. */
    if (ctx && make_event(ev, ctx, err)) {
        free(ev);
        return -1;
    }
    *out = ev;
    return 0;
}

static int cuda_event_create(struct ry_event **out, struct ry_err *err)
{
    return new_event(out, CU_EVENT_DEFAULT, err);
}

static int cuda_event_create_untimed(struct ry_event **out, struct ry_err *err)
{
    return new_event(out, CU_EVENT_DISABLE_TIMING, err);
}

static int cuda_event_record(struct ry_event *ev, void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (stream_context(stream, &ctx, err))
        return -1;
    /* An event belongs to one context, and so must the stream: move it where the stream is. */
    if (ev->ctx != ctx && make_event(ev, ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, event_record, ev->event, stream);
}

/*
 * Asking about events is among what CUDA refuses a thread while another one captures in the global mode, and the
 * refusal would spoil that capture. In the relaxed mode the thread may; the mode is exchanged for that, and back.
 */
static int cuda_event_done(struct ry_event *ev, bool *done, struct ry_err *err)
{
    *done = false;
    if (!ev->event) {
        *done = true; /* never recorded: nothing before it, as CUDA has it */
        return 0;
    }
    if (enter(ev->ctx, err))
        return -1;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    cu.capture_mode(&mode);
    CUresult r = cu.event_query(ev->event);
    cu.capture_mode(&mode);
    leave();
    if (r && r != CUDA_ERROR_NOT_READY)
        return fail(err, symbol_event_query, r);
    *done = r == CUDA_SUCCESS;
    return 0;
}

static int cuda_event_elapsed(struct ry_event *a, struct ry_event *b, double *us, struct ry_err *err)
{
    float ms;
    if (!a->event || !b->event)
        return ry_fail(err, "elapsed time of an event that was never recorded");
    if (a->flags || b->flags)
        return ry_fail(err, "elapsed time of an event without timing");
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    cu.capture_mode(&mode);
    int rc = IN_CONTEXT(err, a->ctx, event_elapsed, &ms, a->event, b->event);
    cu.capture_mode(&mode);
    if (rc)
        return -1;
    *us = (double)ms * 1e3;
    return 0;
}

static int cuda_stream_wait(void *stream, struct ry_event *ev, struct ry_err *err)
{
    CUcontext ctx;
    if (!ev->event)
        return 0;
    if (stream_context(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, stream_wait, stream, ev->event, 0);
}

static void cuda_event_destroy(struct ry_event *ev)
{
    if (ev && ev->event)
        IN_CONTEXT(NULL, ev->ctx, event_destroy, ev->event);
    free(ev);
}

static void cuda_relax_thread(void)
{
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    cu.capture_mode(&mode);
}

static int open_driver(struct ry_err *err)
{
    static const struct {
        const char *symbol;
        size_t offset;
    } calls[] = {
#define ROW(field, symbol, args) {symbol, offsetof(struct driver, field)},
        DRIVER_CALLS(ROW)
#undef ROW
    };
    void *lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return ry_fail(err, "no CUDA driver: %s", dlerror());
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        void *f = dlsym(lib, calls[i].symbol);
        if (!f) {
            dlclose(lib);
            return ry_fail(err, "libcuda.so.1 has no %s: CUDA 11.4 or newer is needed", calls[i].symbol);
        }
        memcpy((char *)&cu + calls[i].offset, &f, sizeof f);
    }
    int n = 0;
    TRY(err, init, 0);
    TRY(err, device_count, &n);
    return n > 0 ? 0 : ry_fail(err, "the CUDA driver sees no device: is CUDA_VISIBLE_DEVICES empty?");
}

const struct ry_device *ry_device_cuda(struct ry_err *err)
{
    static const struct ry_device cuda = {
        .name = "cuda",
        .count = cuda_count,
        .identify = cuda_identify,
        .use = cuda_use,
        .alloc = cuda_alloc,
        .release = cuda_release,
        .copy = cuda_copy,
        .fill = cuda_fill,
        .alloc_async = cuda_alloc_async,
        .free_async = cuda_free_async,
        .free_after = cuda_free_after,
        .pinned_alloc = cuda_pinned_alloc,
        .pinned_free = cuda_pinned_free,
        .prepare = cuda_prepare,
        .launch = cuda_launch,
        .stream_create = cuda_stream_create,
        .stream_destroy = cuda_stream_destroy,
        .stream_sync = cuda_stream_sync,
        .stream_capturing = cuda_stream_capturing,
        .stream_wait = cuda_stream_wait,
        .event_create = cuda_event_create,
        .event_create_untimed = cuda_event_create_untimed,
        .event_record = cuda_event_record,
        .event_done = cuda_event_done,
        .event_elapsed = cuda_event_elapsed,
        .event_destroy = cuda_event_destroy,
        .relax_thread = cuda_relax_thread,
    };
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static enum { UNTRIED, OPEN, FAILED } state;
    static struct ry_err why;
    pthread_mutex_lock(&lock);
    if (state == UNTRIED)
        state = open_driver(&why) ? FAILED : OPEN;
    bool open = state == OPEN;
    pthread_mutex_unlock(&lock);
    if (open)
        return &cuda;
    ry_fail(err, "%s", why.msg);
    return NULL;
}

#endif
