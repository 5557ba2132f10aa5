/* redirect.c: see redirect.h. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "railyard.h"

enum { NCCL_OK = 0, NCCL_SYSTEM_ERROR = 2 };

static struct reissue *parts_of(struct comm *c)
{
    return atomic_load_explicit(&c->reissue, memory_order_acquire);
}

/* Room for what is told of each exchange. */
static int make_room(struct ry_redirected *d, size_t n, struct ry_err *err)
{
    if (d->sends)
        return 0;
    d->sends = calloc(4 * n, sizeof *d->sends);
    d->send_buf = calloc(2 * n, sizeof *d->send_buf);
    if (!d->sends || !d->send_buf) {
        free(d->sends);
        free(d->send_buf);
        d->sends = NULL, d->send_buf = NULL;
        return ry_fail(err, "out of memory for %zu ranks", n);
    }
    d->receives = d->sends + n;
    d->goes = d->receives + n;
    d->comes = d->goes + n;
    d->recv_buf = (void **)d->send_buf + n;
    return 0;
}

static const char *not_here(const struct reissue *r)
{
    return !r || !r->talk             ? "nothing is reissued between its ranks"
           : r->quit                  ? "Railyard keeps off it"
           : !ry_engine.settings.hold ? "RAILYARD_HOLD=no"
           : atomic_load(&r->aborted) ? "it is being aborted"
                                      : NULL;
}

int ry_redirect_ready(void *handle, uint64_t bytes, uint64_t rows, void *stream)
{
    struct comm *c = handle;
    struct ry_err err;
    bool captured = true;
    if (!ry_engine_enter())
        return 1;
    struct reissue *r = parts_of(c);
    const char *why = not_here(r);
    if (!why && (ry_engine.device->stream_capturing(stream, &captured, NULL) || captured))
        why = "a graph is being captured";
    if (!why && (make_room(&r->redirected, (size_t)r->map->nranks, &err) ||
                 ry_redirect_hold(&r->redirected.memory, r->runner, bytes, rows, stream, &err)))
        why = err.msg;
    if (why)
        ry_log(RY_LOG_PLAN, "communicator %s: its exchanges cannot be redirected: %s", c->id, why);
    ry_engine_leave();
    return why != NULL;
}

static uint64_t sum(const uint64_t *of, int n)
{
    uint64_t all = 0;
    for (int p = 0; p < n; p++)
        all += of[p];
    return all;
}

static int next(struct comm *c, const struct railyard_redirect *how)
{
    struct reissue *r = parts_of(c);
    struct ry_redirected *d = r ? &r->redirected : NULL;
    if (!d || !d->memory || how->size < sizeof *how || how->nranks != r->map->nranks)
        return -1;
    size_t n = (size_t)how->nranks;
    struct ry_redirect_rows rows = {.row_bytes = how->row_bytes,
                                    .has = sum(how->sends, how->nranks),
                                    .takes = sum(how->receives, how->nranks),
                                    .goes = sum(how->goes, how->nranks),
                                    .comes = sum(how->comes, how->nranks),
                                    .send_from = how->send_from,
                                    .recv_from = how->recv_from};
    if (!ry_redirect_holds(d->memory, &rows))
        return -1;
    memcpy(d->sends, how->sends, n * sizeof *d->sends);
    memcpy(d->receives, how->receives, n * sizeof *d->receives);
    memcpy(d->goes, how->goes, n * sizeof *d->goes);
    memcpy(d->comes, how->comes, n * sizeof *d->comes);
    d->rows = rows;
    d->done = false;
    atomic_store(&d->due, true);
    atomic_fetch_or(&c->face.hold, RY_HOLD_ALWAYS);
    return 0;
}

static int done(struct comm *c)
{
    struct reissue *r = parts_of(c);
    if (!r || !r->redirected.memory)
        return -1;
    bool pending = atomic_exchange(&r->redirected.due, false);
    atomic_fetch_and(&c->face.hold, ~RY_HOLD_ALWAYS);
    int result = r->redirected.done && !pending ? 0 : -1;
    r->redirected.done = false;
    return result;
}

int ry_redirect_next(void *handle, const struct railyard_redirect *how)
{
    int result = -1;
    if (!ry_engine_enter())
        return result;
    result = next(handle, how);
    ry_engine_leave();
    return result;
}

int ry_redirect_done(void *handle)
{
    int result = -1;
    if (!ry_engine_enter())
        return result;
    result = done(handle);
    ry_engine_leave();
    return result;
}

/* Is it the one that was meant? */
static const char *differs(const struct ry_redirected *d, const struct ry_exchange *x)
{
    bool captured = true;
    if (!x->held)
        return "NCCL has its calls already";
    if (d->rows.row_bytes % x->type_bytes)
        return "its rows are no whole number of elements";
    if (ry_engine.device->stream_capturing(x->stream, &captured, NULL) || captured)
        return "it is being captured into a graph";
    for (int p = 0; p < x->nranks; p++)
        if (x->send_count[p] * x->type_bytes != d->sends[p] * d->rows.row_bytes ||
            x->recv_count[p] * x->type_bytes != d->receives[p] * d->rows.row_bytes)
            return "it is of other counts than was said";
    return NULL;
}

static int fail(const struct comm *c, const struct ry_exchange *x, const char *why)
{
    ry_log(RY_LOG_ERROR,
           "communicator %s, exchange %" PRIu64 " fails on rank %d, while the other ranks go on: it was to be "
           "redirected: %s",
           c->id, x->ordinal, x->rank, why);
    return NCCL_SYSTEM_ERROR;
}

const struct ry_exchange *ry_redirect_begin(struct comm *c, struct reissue *r, const struct ry_exchange *x, int *result)
{
    struct ry_err err;
    if (!r || !atomic_load_explicit(&r->redirected.due, memory_order_relaxed))
        return x;
    struct ry_redirected *d = &r->redirected;
    atomic_store(&d->due, false);
    atomic_fetch_and(&c->face.hold, ~RY_HOLD_ALWAYS);
    const char *why = differs(d, x);
    char *send = NULL, *recv = NULL;
    struct ry_buffers job = ry_exchange_describe(r, x);
    if (!why && ry_redirect_gather(d->memory, &d->rows, &job, &send, &recv, &err))
        why = err.msg;
    if (why) {
        *result = fail(c, x, why);
        return NULL;
    }
    d->x = *x;
    d->x.one_call = false;
    for (int p = 0; p < x->nranks; p++) {
        d->send_buf[p] = send;
        d->recv_buf[p] = recv;
        send += d->goes[p] * d->rows.row_bytes;
        recv += d->comes[p] * d->rows.row_bytes;
        d->goes[p] *= d->rows.row_bytes / x->type_bytes;
        d->comes[p] *= d->rows.row_bytes / x->type_bytes;
    }
    d->x.send_count = d->goes, d->x.recv_count = d->comes;
    d->x.send_buf = d->send_buf, d->x.recv_buf = d->recv_buf;
    return &d->x;
}

void ry_redirect_end(const struct comm *c, struct reissue *r, const struct ry_exchange *x, int *result)
{
    struct ry_err err;
    struct ry_redirected *d = &r->redirected;
    struct ry_buffers job = ry_exchange_describe(r, x);
    if (*result)
        return;
    if (ry_redirect_scatter(d->memory, &d->rows, &job, &err))
        *result = fail(c, x, err.msg);
    d->done = !*result;
}

void ry_redirected_free(struct ry_redirected *d)
{
    ry_redirect_free(d->memory);
    free(d->sends);
    free(d->send_buf);
    *d = (struct ry_redirected){0};
}
