/*
 * cuda_order.c: the CUDA backend's memory in stream order, pinned memory, and kernels.
 *
 * Owns: a memory pool for each device, loading kernels. Not: contexts and everything else (cuda.c).
 *
 * The pool of alloc_async is our own rather than the device's default one, which belongs to the job (PyTorch's
 * cudaMallocAsync backend sets its threshold and reads its statistics; its own caching allocator does not use it). Two
 * settings make it a good neighbour. Release threshold 0: what we gave back goes to the driver at the next
 * synchronization, where the job's allocator can have it; the few blocks that we keep, we keep allocated. No internal
 * dependencies: the driver may not make one stream wait for another to reuse memory, since the streams are those of
 * different communicators, and two ranks that tie them to each other in different order never end.
 */
#ifdef RY_HAVE_CUDA

#include <pthread.h>
#include <stdbool.h>

#include "cuda_driver.h"

static struct pool {
    _Atomic(CUmemoryPool) memory; /* set last */
    CUstream freeing;             /* ours, for giving back behind an event */
} pools[RY_DEVICES];
static pthread_mutex_t prepare_lock = PTHREAD_MUTEX_INITIALIZER;

/* The device of the context that is current: inside ry_cuda_enter() and ry_cuda_leave(). */
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
        return ry_cuda_fail(err, symbol_pool_set, r);
    }
    if ((r = cu.stream_create(&pool->freeing, CU_STREAM_NON_BLOCKING))) {
        cu.pool_destroy(memory);
        return ry_cuda_fail(err, symbol_stream_create, r);
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
            return ry_cuda_fail(err, call, r);
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

int ry_cuda_prepare(int ordinal, const struct ry_kernels *kernels, struct ry_err *err)
{
    CUcontext ctx;
    if ((ordinal < 0 ? ry_cuda_own(&ctx, err) : ry_cuda_primary(ordinal, &ctx, err)) || ry_cuda_enter(ctx, err))
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
    ry_cuda_leave();
    return rc;
}

int ry_cuda_alloc_async(void **out, size_t bytes, void *stream, struct ry_err *err)
{
    CUcontext ctx;
    CUdeviceptr p;
    *out = NULL;
    if (!bytes)
        return 0;
    if (ry_cuda_context_of(stream, &ctx, err) || ry_cuda_enter(ctx, err))
        return -1;
    int device = current_device(err), rc = device < 0 ? -1 : 0;
    CUmemoryPool pool = rc ? NULL : pools[device].memory;
    if (!rc && !pool)
        rc = ry_fail(err, "CUDA device %d was not prepared", device);
    CUresult r = rc ? CUDA_SUCCESS : cu.mem_alloc_async(&p, bytes, pool, stream);
    ry_cuda_leave();
    if (rc || r)
        return rc ? rc : ry_cuda_fail(err, symbol_mem_alloc_async, r);
    *out = (void *)(uintptr_t)p;
    return 0;
}

int ry_cuda_free_async(void *p, void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (!p)
        return 0;
    if (ry_cuda_context_of(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, mem_free_async, (CUdeviceptr)(uintptr_t)p, stream);
}

/*
 * A stream of our own waits for the event, so that neither the host nor a stream of the job does. Should an event never
 * come to pass, what is freed behind it stays where it is, and so does what other communicators free after that: no
 * process lives on for long with kernels that never end.
 */
int ry_cuda_free_after(void *p, struct ry_event *ev, struct ry_err *err)
{
    if (!p)
        return 0;
    if (!ev->event)
        return ry_fail(err, "an event that was never recorded");
    if (ry_cuda_enter(ev->ctx, err))
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
    ry_cuda_leave();
    return r ? ry_cuda_fail(err, call, r) : rc;
}

int ry_cuda_pinned_alloc(void **out, size_t bytes, struct ry_err *err)
{
    CUcontext ctx;
    *out = NULL;
    if (!bytes)
        return 0;
    if (ry_cuda_own(&ctx, err))
        return -1;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    cu.capture_mode(&mode);
    int rc = IN_CONTEXT(err, ctx, host_alloc, out, bytes, CU_MEMHOSTALLOC_PORTABLE);
    cu.capture_mode(&mode);
    return rc;
}

int ry_cuda_pinned_free(void *p, struct ry_err *err)
{
    CUcontext ctx;
    if (!p)
        return 0;
    if (ry_cuda_own(&ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, host_free, p);
}

int ry_cuda_launch(struct ry_kernel *kernel, unsigned grid, unsigned block, const void *param, void *stream,
                   struct ry_err *err)
{
    CUcontext ctx;
    if (ry_cuda_context_of(stream, &ctx, err) || ry_cuda_enter(ctx, err))
        return -1;
    int device = current_device(err);
    CUfunction function = device < 0 ? NULL : kernel->loaded[device];
    void *params[] = {(void *)(uintptr_t)param};
    CUresult r = function ? cu.launch(function, grid, 1, 1, block, 1, 1, 0, stream, params, NULL) : CUDA_SUCCESS;
    ry_cuda_leave();
    if (function)
        return r ? ry_cuda_fail(err, symbol_launch, r) : 0;
    return device < 0 ? -1 : ry_fail(err, "kernel %s was not loaded on CUDA device %d", kernel->name, device);
}

#endif
