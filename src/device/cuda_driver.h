/*
 * cuda_driver.h: what the two files of the CUDA backend share: the driver calls, and entering contexts. cuda.c says
 * which context is whose, and defines all of this.
 */
#ifndef RY_DEVICE_CUDA_DRIVER_H
#define RY_DEVICE_CUDA_DRIVER_H

#include <cuda.h>

#include "device.h"

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

/* Drivers may lack these; NULL then. */
#define OPTIONAL_CALLS(CALL)                                                                                           \
    CALL(wait_value, "cuStreamWaitValue32_v2", (CUstream, CUdeviceptr, cuuint32_t, unsigned))                          \
    CALL(write_value, "cuStreamWriteValue32_v2", (CUstream, CUdeviceptr, cuuint32_t, unsigned))

struct ry_cuda_driver {
#define MEMBER(field, symbol, args) CUresult(CUDAAPI *field) args;
    DRIVER_CALLS(MEMBER)
    OPTIONAL_CALLS(MEMBER)
#undef MEMBER
};
extern struct ry_cuda_driver ry_cuda_driver;
#define cu ry_cuda_driver

struct ry_event {
    CUevent event; /* NULL until it is first recorded, if it was created on a thread without a context */
    CUcontext ctx; /* in which `event` was made */
    unsigned flags;
};

/** -1, with the text that names `call` and what the driver says of `r`. */
int ry_cuda_fail(struct ry_err *err, const char *call, CUresult r);
/** The primary context of a device; kept until the process ends. */
int ry_cuda_primary(int ordinal, CUcontext *out, struct ry_err *err);
/** The thread's own context; device 0's where it has none, as the CUDA runtime would choose. */
int ry_cuda_own(CUcontext *out, struct ry_err *err);
/** The context of a stream. */
int ry_cuda_context_of(void *stream, CUcontext *out, struct ry_err *err);
/** Make a context current, and leave it again. */
int ry_cuda_enter(CUcontext ctx, struct ry_err *err);
void ry_cuda_leave(void);

/* Call the driver; on failure return through ry_cuda_fail() with the call's own name. */
#define TRY(err, field, ...)                                                                                           \
    do {                                                                                                               \
        CUresult r_ = cu.field(__VA_ARGS__);                                                                           \
        if (r_)                                                                                                        \
            return ry_cuda_fail(err, symbol_##field, r_);                                                              \
    } while (0)
#define NAME(field, symbol, args) __attribute__((unused)) static const char symbol_##field[] = symbol;
DRIVER_CALLS(NAME)
OPTIONAL_CALLS(NAME)
#undef NAME

/* Enter, call, leave: the result of the driver call becomes -1 with its name. */
#define IN_CONTEXT(err, ctx, field, ...)                                                                               \
    ({                                                                                                                 \
        int rc_ = ry_cuda_enter(ctx, err);                                                                             \
        if (!rc_) {                                                                                                    \
            CUresult r_ = cu.field(__VA_ARGS__);                                                                       \
            ry_cuda_leave();                                                                                           \
            if (r_)                                                                                                    \
                rc_ = ry_cuda_fail(err, symbol_##field, r_);                                                           \
        }                                                                                                              \
        rc_;                                                                                                           \
    })

/* ---- cuda_order.c: these members of struct ry_device ---- */

int ry_cuda_alloc_async(void **out, size_t bytes, void *stream, struct ry_err *err);
int ry_cuda_free_async(void *p, void *stream, struct ry_err *err);
int ry_cuda_free_after(void *p, struct ry_event *ev, struct ry_err *err);
int ry_cuda_pinned_alloc(void **out, size_t bytes, struct ry_err *err);
int ry_cuda_pinned_free(void *p, struct ry_err *err);
int ry_cuda_prepare(int ordinal, const struct ry_kernels *kernels, struct ry_err *err);
int ry_cuda_launch(struct ry_kernel *kernel, unsigned grid, unsigned block, const void *param, void *stream,
                   struct ry_err *err);

#endif
