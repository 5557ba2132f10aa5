/* redirect.c: see redirect.h. */
#include "redirect.h"

#include <stdlib.h>

#include "base/log.h"
#include "internal.h"
#include "rows_kernels.h"

#define ALIGN 256
#define PIECES 64

/*
 * The memory: a message, that is rows and behind them a list, and behind that the rows to be sent. First the message is
 * what the job has to send, then, when all of that was gathered, what comes.
 */
struct ry_redirect {
    struct ry_runner *runner;
    struct ry_event *used; /* after the latest use */
    char *memory;
    uint64_t held, most_bytes, most_rows;
};

static uint64_t round_up(uint64_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

static uint64_t message_room(uint64_t bytes, uint64_t rows)
{
    return round_up(round_up(bytes) + rows * sizeof(uint32_t));
}

int ry_redirect_hold(struct ry_redirect **out, struct ry_runner *r, uint64_t bytes, uint64_t rows, void *stream,
                     struct ry_err *err)
{
    struct ry_err lost;
    struct ry_redirect *d = *out;
    if (!r->rows)
        return ry_fail(err, "Railyard's kernels are not loaded");
    if (rows > RY_ROWS_MOST || bytes > UINT64_MAX / 4)
        return ry_fail(err, "more than %llu rows", (unsigned long long)RY_ROWS_MOST);
    if (!d) {
        if (!(d = calloc(1, sizeof *d)))
            return ry_fail(err, "out of memory");
        d->runner = r;
        if (r->device->event_create_untimed(&d->used, err)) {
            free(d);
            return -1;
        }
        *out = d;
    }
    if (bytes <= d->most_bytes && rows <= d->most_rows)
        return 0;
    bytes = bytes > d->most_bytes ? bytes : d->most_bytes;
    rows = rows > d->most_rows ? rows : d->most_rows;
    for (int room = 4; room >= 0; room -= 4) { /* counts differ a little from one layer to the next */
        void *memory;
        uint64_t b = bytes + (room ? bytes / 4 : 0), n = rows + (room ? rows / 4 : 0);
        uint64_t all = message_room(b, n) + round_up(b);
        if (!ry_run_staging_reserve(all - d->held)) {
            ry_fail(err, "%llu bytes of memory for rows on their way, beyond what is left: raise RAILYARD_STAGING",
                    (unsigned long long)all);
            continue;
        }
        if (r->device->alloc_async(&memory, all, stream, err)) {
            ry_run_staging_unreserve(all - d->held);
            continue;
        }
        if (d->memory && r->device->free_after(d->memory, d->used, &lost))
            ry_info("%llu bytes of memory are lost: %s", (unsigned long long)d->held, lost.msg);
        d->memory = memory;
        d->held = all, d->most_bytes = b, d->most_rows = n;
        return r->device->event_record(d->used, stream,
                                       err); /* the memory is there for others once `stream` got so far */
    }
    return -1;
}

void ry_redirect_free(struct ry_redirect *d)
{
    struct ry_err err;
    if (!d)
        return;
    if (d->memory && d->runner->device->free_after(d->memory, d->used, &err))
        ry_info("%llu bytes of memory are lost: %s", (unsigned long long)d->held, err.msg);
    ry_run_staging_unreserve(d->held);
    d->runner->device->event_destroy(d->used);
    free(d);
}

/* The segments are whole rows and `rows` of them in all. */
static int whole_rows(const uint64_t *bytes, int n, uint64_t row_bytes, uint64_t rows, struct ry_err *err)
{
    uint64_t all = 0;
    for (int p = 0; p < n; p++) {
        if (bytes[p] % row_bytes)
            return ry_fail(err, "%llu bytes for rank %d are no whole rows of %llu", (unsigned long long)bytes[p], p,
                           (unsigned long long)row_bytes);
        all += bytes[p] / row_bytes;
    }
    return all == rows ? 0
                       : ry_fail(err, "%llu rows instead of %llu", (unsigned long long)all, (unsigned long long)rows);
}

bool ry_redirect_holds(const struct ry_redirect *d, const struct ry_redirect_rows *rows)
{
    uint64_t row = rows->row_bytes;
    if (!d || !row)
        return false;
    uint64_t most = d->most_bytes / row < d->most_rows ? d->most_bytes / row : d->most_rows;
    return rows->has <= most && rows->takes <= most && rows->goes <= most && rows->comes <= most;
}

static int fits(const struct ry_redirect *d, const struct ry_redirect_rows *rows, const struct ry_buffers *job,
                struct ry_err *err)
{
    if (!ry_redirect_holds(d, rows))
        return ry_fail(err, "more rows than memory is held for");
    return whole_rows(job->send_bytes, job->nranks, rows->row_bytes, rows->has, err) ||
                   whole_rows(job->recv_bytes, job->nranks, rows->row_bytes, rows->takes, err)
               ? -1
               : 0;
}

int ry_redirect_gather(struct ry_redirect *d, const struct ry_redirect_rows *rows, const struct ry_buffers *job,
                       char **send, char **recv, struct ry_err *err)
{
    struct batch batch;
    uint64_t at = 0;
    if (fits(d, rows, job, err) || d->runner->device->stream_wait(job->stream, d->used, err))
        return -1;
    *send = d->memory + message_room(d->most_bytes, d->most_rows);
    *recv = d->memory;
    batch_start_copy(&batch, d->runner, job->stream);
    for (int p = 0; p < job->nranks; p++) {
        if (batch_add(&batch, d->memory + at, job->send[p], job->send_bytes[p], 0, err))
            return -1;
        at += job->send_bytes[p];
    }
    struct ry_rows_piece piece = {.message = d->memory,
                                  .row_bytes = rows->row_bytes,
                                  .distinct = rows->has,
                                  .bytes = rows->goes * rows->row_bytes,
                                  .to = *send};
    return batch_add(&batch, d->memory + ry_rows_list_at(rows->row_bytes, rows->has), rows->send_from,
                     rows->goes * sizeof *rows->send_from, 0, err) ||
                   batch_flush(&batch, err) || ry_rows_expand(d->runner->rows, &piece, 1, job->stream, err) ||
                   d->runner->device->event_record(d->used, job->stream, err)
               ? -1
               : 0;
}

int ry_redirect_scatter(struct ry_redirect *d, const struct ry_redirect_rows *rows, const struct ry_buffers *job,
                        struct ry_err *err)
{
    struct batch batch;
    struct ry_rows_piece pieces[PIECES];
    uint64_t skip = 0;
    int n = 0;
    batch_start_copy(&batch, d->runner, job->stream);
    if (batch_add(&batch, d->memory + ry_rows_list_at(rows->row_bytes, rows->comes), rows->recv_from,
                  rows->takes * sizeof *rows->recv_from, 0, err) ||
        batch_flush(&batch, err))
        return -1;
    for (int p = 0; p < job->nranks; p++) {
        char *to = job->recv[p];
        if (!job->recv_bytes[p])
            continue;
        if (n && (char *)pieces[n - 1].to + pieces[n - 1].bytes == to) { /* as frameworks lay them out */
            pieces[n - 1].bytes += job->recv_bytes[p];
        } else {
            if (n == PIECES && ry_rows_expand(d->runner->rows, pieces, n, job->stream, err))
                return -1;
            n = n == PIECES ? 0 : n;
            pieces[n++] = (struct ry_rows_piece){.message = d->memory,
                                                 .row_bytes = rows->row_bytes,
                                                 .distinct = rows->comes,
                                                 .skip = skip,
                                                 .bytes = job->recv_bytes[p],
                                                 .to = to};
        }
        skip += job->recv_bytes[p] / rows->row_bytes;
    }
    return ry_rows_expand(d->runner->rows, pieces, n, job->stream, err) ||
                   d->runner->device->event_record(d->used, job->stream, err)
               ? -1
               : 0;
}
