/*
 * host.c: the host-memory backend: the "device" of the emulated cluster.
 *
 * Owns: the mapping of the device interface onto plain memory. The emulator's NCCL has finished by the time a call
 * returns, so streams are only names and an event is the time at which it was recorded. The one thing that a stream can
 * have before it is a word in memory that is to be written first: whoever waits for the stream waits for that.
 * Not: a model of asynchronous work; nothing here ever runs later.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "device.h"

/* What CUDA's allocator guarantees: code that relies on it must not break, or pass by luck, here. */
#define ALIGNMENT 256

static bool (*_Atomic captured)(void *stream);

struct ry_event {
    _Atomic uint64_t ns;   /* 0: never recorded */
    _Atomic uint64_t upto; /* the latest of the waits that its stream had before it; 0: none */
    void *_Atomic stream;
};

/* ---- streams that wait for a word ---- */

struct wait {
    struct wait *next;
    uint64_t number;
    void *stream;
    const uint32_t *word;
    uint32_t value;
};
static struct {
    pthread_mutex_t lock;
    struct wait *first;
    _Atomic uint64_t number;
} waits = {.lock = PTHREAD_MUTEX_INITIALIZER};

static bool over(const struct wait *w)
{
    return (int32_t)(__atomic_load_n(w->word, __ATOMIC_ACQUIRE) - w->value) >= 0;
}

/* Does the stream still wait for one of those up to that number? */
static bool waiting(const void *stream, uint64_t upto)
{
    bool is = false;
    pthread_mutex_lock(&waits.lock);
    for (struct wait **p = &waits.first, *w; (w = *p);) {
        if (over(w)) {
            *p = w->next;
            free(w);
            continue;
        }
        is |= w->stream == stream && w->number <= upto;
        p = &w->next;
    }
    pthread_mutex_unlock(&waits.lock);
    return is;
}

static void wait_until(const void *stream, uint64_t upto)
{
    while (atomic_load(&waits.number) && waiting(stream, upto))
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
}

static int host_stream_wait_value(void *stream, const uint32_t *word, uint32_t value, struct ry_err *err)
{
    struct wait *w = malloc(sizeof *w);
    if (!w)
        return ry_fail(err, "out of memory for a wait");
    pthread_mutex_lock(&waits.lock);
    *w = (struct wait){waits.first, atomic_fetch_add(&waits.number, 1) + 1, stream, word, value};
    waits.first = w;
    pthread_mutex_unlock(&waits.lock);
    return 0;
}

static int host_stream_write_value(void *stream, uint32_t *word, uint32_t value, struct ry_err *err)
{
    wait_until(stream, atomic_load(&waits.number));
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    return 0;
}

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

/* Here it is the caller who does what the stream would do next, so the caller waits. */
static int host_stream_wait(void *stream, struct ry_event *ev, struct ry_err *err)
{
    if (ev->upto)
        wait_until(ev->stream, ev->upto);
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
    wait_until(stream, atomic_load(&waits.number));
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
    ev->stream = stream;
    ev->upto = atomic_load(&waits.number);
    return 0;
}

static int host_event_done(struct ry_event *ev, bool *done, struct ry_err *err)
{
    *done = !ev->upto || !waiting(ev->stream, ev->upto);
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
        .stream_wait_value = host_stream_wait_value,
        .stream_write_value = host_stream_write_value,
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
