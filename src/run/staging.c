/*
 * staging.c: the memory in which a plan lays down what it passes on.
 *
 * Owns: each runner's one buffer, its growth, the order between the streams that use it, the limit of the process,
 * giving it back. Not: what lies in it.
 *
 * The streams are the job's, which may destroy one as soon as it likes: none is touched after the call that named it.
 * The order is kept by an event recorded after each use. Waiting for it ties the next exchange's stream to the last
 * one's, as NCCL itself does for two streams of one communicator; streams of different communicators are never tied to
 * each other, since two ranks that did so in different order would wait for each other for ever. (That is also why the
 * pool may not reuse memory across streams by making one wait for the other: see device/cuda.c.)
 */
#include "internal.h"

#include <stdatomic.h>

#include "base/log.h"

#define LEAST (UINT64_C(1) << 20)

static _Atomic uint64_t limit = UINT64_C(256) << 20; /* as settings.def's default */
static _Atomic uint64_t held;

void ry_run_staging_limit(uint64_t bytes)
{
    limit = bytes;
}

bool ry_run_staging_reserve(uint64_t bytes)
{
    uint64_t now = held, most = limit;
    do {
        if (now > most || bytes > most - now)
            return false;
    } while (!atomic_compare_exchange_weak(&held, &now, now + bytes));
    return true;
}

void ry_run_staging_unreserve(uint64_t bytes)
{
    held -= bytes;
}

uint64_t ry_run_staging(const struct ry_runner *runner)
{
    return runner->stage_bytes;
}

/* Room for more than what is asked for, since sizes of exchanges differ a little from one to the next. */
static uint64_t generous(uint64_t bytes)
{
    uint64_t n = LEAST, want = bytes + bytes / 4;
    while (n < want && n <= UINT64_MAX / 2)
        n *= 2;
    return n;
}

/* Memory of `bytes` against the limit, of which `had` will be given back. */
static void *take(struct ry_runner *r, uint64_t bytes, uint64_t had, void *stream, struct ry_err *err)
{
    void *stage;
    if (!ry_run_staging_reserve(bytes - had)) {
        ry_fail(err,
                "%llu bytes of staging memory are needed, but %llu of the process's %llu are in use: raise "
                "RAILYARD_STAGING",
                (unsigned long long)bytes, (unsigned long long)held, (unsigned long long)limit);
        return NULL;
    }
    if (!r->device->alloc_async(&stage, bytes, stream, err))
        return stage;
    ry_run_staging_unreserve(bytes - had);
    return NULL;
}

/* The new memory is taken before the old is given back, so that a failure changes nothing. */
int ry_run_staging_grow(struct ry_runner *r, uint64_t bytes, void *stream, struct ry_err *err)
{
    struct ry_err lost;
    if (bytes <= r->stage_bytes)
        return 0;
    uint64_t got = generous(bytes);
    void *stage = take(r, got, r->stage_bytes, stream, NULL);
    if (!stage)
        stage = take(r, got = bytes, r->stage_bytes, stream, err);
    if (!stage)
        return -1;
    if (r->stage && r->device->free_after(r->stage, r->stage_used, &lost))
        ry_info("%llu bytes of staging memory are lost: %s", (unsigned long long)r->stage_bytes, lost.msg);
    r->stage = stage;
    r->stage_bytes = got;
    /* The next exchange may come on another stream, and the memory is there for it only once this one got so far. */
    return r->device->event_record(r->stage_used, stream, err);
}

int staging_enter(struct ry_runner *r, void *stream, struct ry_err *err)
{
    /* Always, even on the stream of the last time: a handle may name a new stream by now. */
    return r->device->stream_wait(stream, r->stage_used, err);
}

int staging_leave(struct ry_runner *r, void *stream, struct ry_err *err)
{
    return r->device->event_record(r->stage_used, stream, err);
}

void staging_free(struct ry_runner *r)
{
    struct ry_err err;
    if (r->stage && r->device->free_after(r->stage, r->stage_used, &err))
        ry_info("%llu bytes of staging memory are lost: %s", (unsigned long long)r->stage_bytes, err.msg);
    ry_run_staging_unreserve(r->stage_bytes);
    r->stage = NULL;
    r->stage_bytes = 0;
    r->device->event_destroy(r->stage_used);
    r->stage_used = NULL;
}
