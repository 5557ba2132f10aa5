/*
 * host.c: the host-memory backend: the "device" of the emulated cluster.
 *
 * Owns: the mapping of the device interface onto plain memory. The emulator's NCCL has finished by the time a call
 * returns, so streams are only names (always idle) and an event is the time at which it was recorded.
 * Not: a model of asynchronous work; nothing here ever runs later.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "device.h"

/* What CUDA's allocator guarantees: code that relies on it must not break, or pass by luck, here. */
#define ALIGNMENT 256

static bool (*_Atomic captured)(void *stream);

struct ry_event {
    _Atomic uint64_t ns; /* 0: never recorded */
};

static int host_count(int *n, struct ry_err *err)
{
    *n = 1;
    return 0;
}

static int host_identify(int ordinal, struct ry_device_id *out, struct ry_err *err)
{
    *out = (struct ry_device_id){.name = "host memory"};
    return 0;
}

static int host_use(int ordinal, struct ry_err *err)
{
    return 0;
}

static int host_current(void)
{
    return 0;
}

static int host_alloc(void **out, size_t bytes, struct ry_err *err)
{
    *out = NULL;
    if (!bytes)
        return 0;
    int e = posix_memalign(out, ALIGNMENT, bytes);
    if (e) {
        *out = NULL;
        return ry_fail(err, "cannot allocate %zu bytes of host memory: %s", bytes, strerror(e));
    }
    return 0;
}

static int host_release(void *p, struct ry_err *err)
{
    free(p);
    return 0;
}

static int host_copy(void *dst, const void *src, size_t bytes, void *stream, struct ry_err *err)
{
    if (bytes)
        memmove(dst, src, bytes);
    return 0;
}

static int host_fill(void *dst, unsigned char value, size_t bytes, void *stream, struct ry_err *err)
{
    if (bytes)
        memset(dst, value, bytes);
    return 0;
}

/* ---- in stream order: at once ---- */

static int host_alloc_async(void **out, size_t bytes, void *stream, struct ry_err *err)
{
    return host_alloc(out, bytes, err);
}

static int host_free_async(void *p, void *stream, struct ry_err *err)
{
    return host_release(p, err);
}

static int host_free_after(void *p, struct ry_event *ev, struct ry_err *err)
{
    return host_release(p, err);
}

static int host_prepare(int ordinal, const struct ry_kernels *kernels, struct ry_err *err)
{
    return 0;
}

static int host_launch(struct ry_kernel *kernel, unsigned grid, unsigned block, const void *param, void *stream,
                       struct ry_err *err)
{
    kernel->host(param);
    return 0;
}

static int host_stream_wait(void *stream, struct ry_event *ev, struct ry_err *err)
{
    return 0;
}

/* A stream is one byte of memory: distinct streams have distinct handles, as callers that compare them expect. */
static int host_stream_create(void **stream, struct ry_err *err)
{
    *stream = malloc(1);
    return *stream ? 0 : ry_fail(err, "out of memory for a stream");
}

static int host_stream_destroy(void *stream, struct ry_err *err)
{
    free(stream);
    return 0;
}

static int host_stream_sync(void *stream, struct ry_err *err)
{
    return 0;
}

static int host_stream_capturing(void *stream, bool *capturing, struct ry_err *err)
{
    *capturing = captured && captured(stream);
    return 0;
}

void ry_device_host_captures(bool (*capturing)(void *stream))
{
    captured = capturing;
}

static int host_event_create(struct ry_event **ev, struct ry_err *err)
{
    *ev = calloc(1, sizeof **ev);
    return *ev ? 0 : ry_fail(err, "out of memory for an event");
}

static int host_event_record(struct ry_event *ev, void *stream, struct ry_err *err)
{
    ev->ns = ry_now_ns();
    return 0;
}

static int host_event_done(struct ry_event *ev, bool *done, struct ry_err *err)
{
    *done = true;
    return 0;
}

static int host_event_elapsed(struct ry_event *a, struct ry_event *b, double *us, struct ry_err *err)
{
    uint64_t from = a->ns, to = b->ns;
    if (!from || !to)
        return ry_fail(err, "elapsed time of an event that was never recorded");
    *us = ((double)to - (double)from) / 1e3;
    return 0;
}

static void host_event_destroy(struct ry_event *ev)
{
    free(ev);
}

static void host_relax_thread(void)
{
}

const struct ry_device *ry_device_host(void)
{
    static const struct ry_device host = {
        .name = "host",
        .count = host_count,
        .identify = host_identify,
        .use = host_use,
        .current = host_current,
        .alloc = host_alloc,
        .release = host_release,
        .copy = host_copy,
        .fill = host_fill,
        .alloc_async = host_alloc_async,
        .free_async = host_free_async,
        .free_after = host_free_after,
        .pinned_alloc = host_alloc,
        .pinned_free = host_release,
        .prepare = host_prepare,
        .launch = host_launch,
        .stream_create = host_stream_create,
        .stream_destroy = host_stream_destroy,
        .stream_sync = host_stream_sync,
        .stream_capturing = host_stream_capturing,
        .stream_wait = host_stream_wait,
        .event_create = host_event_create,
        .event_create_untimed = host_event_create,
        .event_record = host_event_record,
        .event_done = host_event_done,
        .event_elapsed = host_event_elapsed,
        .event_destroy = host_event_destroy,
        .relax_thread = host_relax_thread,
    };
    return &host;
}
