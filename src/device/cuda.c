/*
 * cuda.c: the CUDA backend, on the driver API opened at run time.
 *
 * Owns: finding libcuda.so.1 and the driver calls, and which context each call runs in. Not: memory in stream order and
 * kernels (cuda_order.c), NCCL.
 *
 * Contexts: only primary contexts are used, the ones the CUDA runtime of the job uses as well, so that pointers and
 * streams are common property. A call about a stream runs in that stream's context, a call about an event in the
 * event's, a call about memory in the memory's; `use` and a thread's own current context decide the rest, and a thread
 * that has neither gets device 0, as with the CUDA runtime. Primary contexts, once retained, are kept until the process
 * ends: releasing them could tear down what the job still uses.
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

#include "cuda_driver.h"

struct ry_cuda_driver ry_cuda_driver;

static CUcontext primary[RY_DEVICES];
static pthread_mutex_t primary_lock = PTHREAD_MUTEX_INITIALIZER;

int ry_cuda_fail(struct ry_err *err, const char *call, CUresult r)
{
    const char *name = NULL, *text = NULL;
    if (cu.error_name(r, &name) || !name)
        name = "unknown error";
    if (cu.error_text(r, &text) || !text)
        text = "no description";
    return ry_fail(err, "%s: %s (%d), %s", call, name, (int)r, text);
}

/* Capture errors say that somebody captures somewhere: not ours to touch. 900 … 908 in every CUDA so far. */
static bool is_capture_error(CUresult r)
{
    return r >= CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED && r <= CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
}

int ry_cuda_primary(int ordinal, CUcontext *out, struct ry_err *err)
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
            rc = ry_cuda_fail(err, symbol_device_get, r);
        else if ((r = cu.primary_retain(&ctx, device)))
            rc = ry_cuda_fail(err, symbol_primary_retain, r);
        else
            primary[ordinal] = ctx;
    }
    *out = primary[ordinal];
    pthread_mutex_unlock(&primary_lock);
    return rc;
}

/* The thread's own context; device 0's where it has none, as the CUDA runtime would choose. */
int ry_cuda_own(CUcontext *out, struct ry_err *err)
{
    TRY(err, ctx_get, out);
    return *out ? 0 : ry_cuda_primary(0, out, err);
}

/* NULL, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD exist in every context and mean the thread's. */
static bool is_special(void *stream)
{
    return (uintptr_t)stream <= (uintptr_t)CU_STREAM_PER_THREAD;
}

int ry_cuda_context_of(void *stream, CUcontext *out, struct ry_err *err)
{
    if (is_special(stream))
        return ry_cuda_own(out, err);
    TRY(err, stream_ctx, stream, out);
    return 0;
}

/* The context that owns device memory at `p`; NULL for host memory that CUDA does not know. */
static CUcontext memory_context(const void *p)
{
    CUcontext ctx = NULL;
    return cu.pointer_attribute(&ctx, CU_POINTER_ATTRIBUTE_CONTEXT, (CUdeviceptr)(uintptr_t)p) ? NULL : ctx;
}

int ry_cuda_enter(CUcontext ctx, struct ry_err *err)
{
    TRY(err, ctx_push, ctx);
    return 0;
}

void ry_cuda_leave(void)
{
    CUcontext ignored;
    cu.ctx_pop(&ignored);
}

static int cuda_current(void)
{
    CUdevice device; /* the ordinal, as all drivers so far have it */
    return cu.ctx_device(&device) ? -1 : (int)device;
}

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
    if (ry_cuda_primary(ordinal, &ctx, err))
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
    if (ry_cuda_own(&ctx, err) || IN_CONTEXT(err, ctx, mem_alloc, &p, bytes))
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
    if (ry_cuda_context_of(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, mem_copy, (CUdeviceptr)(uintptr_t)dst, (CUdeviceptr)(uintptr_t)src, bytes, stream);
}

static int cuda_fill(void *dst, unsigned char value, size_t bytes, void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (!bytes)
        return 0;
    if (ry_cuda_context_of(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, mem_set, (CUdeviceptr)(uintptr_t)dst, value, bytes, stream);
}

static int cuda_stream_create(void **stream, struct ry_err *err)
{
    CUcontext ctx;
    CUstream s;
    *stream = NULL;
    /* non-blocking: must not wait for what the job puts on the legacy default stream */
    if (ry_cuda_own(&ctx, err) || IN_CONTEXT(err, ctx, stream_create, &s, CU_STREAM_NON_BLOCKING))
        return -1;
    *stream = s;
    return 0;
}

static int cuda_stream_destroy(void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (is_special(stream))
        return ry_fail(err, "the default stream cannot be destroyed");
    if (ry_cuda_context_of(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, stream_destroy, stream);
}

static int cuda_stream_sync(void *stream, struct ry_err *err)
{
    CUcontext ctx;
    if (ry_cuda_context_of(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, stream_sync, stream);
}

static int cuda_stream_capturing(void *stream, bool *capturing, struct ry_err *err)
{
    CUcontext ctx;
    CUstreamCaptureStatus status;
    *capturing = true; /* whatever cannot be found out is treated as captured */
    if (ry_cuda_context_of(stream, &ctx, err) || ry_cuda_enter(ctx, err))
        return -1;
    CUresult r = cu.stream_capturing(stream, &status);
    ry_cuda_leave();
    if (r)
        return is_capture_error(r) ? 0 : ry_cuda_fail(err, symbol_stream_capturing, r);
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
    if (ry_cuda_context_of(stream, &ctx, err))
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
    if (ry_cuda_enter(ev->ctx, err))
        return -1;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    cu.capture_mode(&mode);
    CUresult r = cu.event_query(ev->event);
    cu.capture_mode(&mode);
    ry_cuda_leave();
    if (r && r != CUDA_ERROR_NOT_READY)
        return ry_cuda_fail(err, symbol_event_query, r);
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
    if (ry_cuda_context_of(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, stream_wait, stream, ev->event, 0);
}

static int cuda_stream_wait_value(void *stream, const uint32_t *word, uint32_t value, struct ry_err *err)
{
    CUcontext ctx;
    if (!cu.wait_value || !cu.write_value)
        return ry_fail(err, "libcuda.so.1 has no %s: CUDA 11.7 or newer is needed", symbol_wait_value);
    if (ry_cuda_context_of(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, wait_value, stream, (CUdeviceptr)(uintptr_t)word, value, CU_STREAM_WAIT_VALUE_GEQ);
}

static int cuda_stream_write_value(void *stream, uint32_t *word, uint32_t value, struct ry_err *err)
{
    CUcontext ctx;
    if (!cu.write_value)
        return ry_fail(err, "libcuda.so.1 has no %s: CUDA 11.7 or newer is needed", symbol_write_value);
    if (ry_cuda_context_of(stream, &ctx, err))
        return -1;
    return IN_CONTEXT(err, ctx, write_value, stream, (CUdeviceptr)(uintptr_t)word, value, CU_STREAM_WRITE_VALUE_DEFAULT);
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
        bool optional;
    } calls[] = {
#define ROW(field, symbol, args) {symbol, offsetof(struct ry_cuda_driver, field), false},
        DRIVER_CALLS(ROW)
#undef ROW
#define ROW(field, symbol, args) {symbol, offsetof(struct ry_cuda_driver, field), true},
        OPTIONAL_CALLS(ROW)
#undef ROW
    };
    void *lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return ry_fail(err, "no CUDA driver: %s", dlerror());
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        void *f = dlsym(lib, calls[i].symbol);
        if (!f && !calls[i].optional) {
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
        .current = cuda_current,
        .alloc = cuda_alloc,
        .release = cuda_release,
        .copy = cuda_copy,
        .fill = cuda_fill,
        .alloc_async = ry_cuda_alloc_async,
        .free_async = ry_cuda_free_async,
        .free_after = ry_cuda_free_after,
        .pinned_alloc = ry_cuda_pinned_alloc,
        .pinned_free = ry_cuda_pinned_free,
        .prepare = ry_cuda_prepare,
        .launch = ry_cuda_launch,
        .stream_create = cuda_stream_create,
        .stream_destroy = cuda_stream_destroy,
        .stream_sync = cuda_stream_sync,
        .stream_capturing = cuda_stream_capturing,
        .stream_wait = cuda_stream_wait,
        .stream_wait_value = cuda_stream_wait_value,
        .stream_write_value = cuda_stream_write_value,
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
