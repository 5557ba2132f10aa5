/*
 * writer.c: the one thread that writes the trace of this process.
 *
 * Owns: the order of lines (a communicator's birth before its exchanges, its end after all that were handed over
 * before), flushing, the periodic matrices, the size limit, and what happens when writing fails.
 *
 * It works in rounds: take what callers left under the lock, empty every ring, write. After a round with work it sleeps
 * a quarter of a second (a half-full ring or the close wakes it earlier); after one without, until it is woken.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/npy.h"
#include "internal.h"

#define FLUSH_MS 250
#define FLUSH_BYTES (256u << 10)
#define END_BYTES 512u /* kept back for the end line */

/* Space kept for the lines that are no exchanges: births, maps, ends. */
static uint64_t reserve(const struct ry_record *rec)
{
    uint64_t r = rec->max_bytes / 16;
    return r < 4096 ? 4096 : r > (1 << 20) ? 1 << 20 : r;
}

static void stop(struct ry_record *rec, const char *why)
{
    if (rec->stopped[0] && !rec->full)
        return;
    snprintf(rec->stopped, sizeof rec->stopped, "%s", why);
    rec->full = false;
    int open = OPEN;
    atomic_compare_exchange_strong(&rec->state, &open, STOPPED);
    ry_warn("recording has stopped: %s/%s: %s; the job goes on, and what was written before stays readable", rec->dir,
            rec->name, why);
}

static bool failed(const struct ry_record *rec)
{
    return rec->stopped[0] && !rec->full;
}

/* Write all of the text out: 0 or the errno. What a failed write leaves of the last line is cut off again. */
static int write_out(struct ry_record *rec, off_t end)
{
    for (size_t done = 0; done < rec->text.len;) {
        ssize_t w = write(rec->fd, rec->text.at + done, rec->text.len - done);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0) {
            int why = errno;
            const char *line = done ? memrchr(rec->text.at, '\n', done) : NULL;
            if (ftruncate(rec->fd, end + (line ? line - rec->text.at + 1 : 0)) == 0)
                lseek(rec->fd, 0, SEEK_END);
            return why;
        }
        done += (size_t)w;
    }
    return 0;
}

/* NULL, or why our descriptor is no longer our file. */
static const char *lost_file(struct ry_record *rec, struct stat *now)
{
    if (fstat(rec->fd, now) || now->st_ino != rec->file.st_ino || now->st_dev != rec->file.st_dev)
        return "the job closed the file";
    return now->st_nlink ? NULL : "the file was removed";
}

static void flush(struct ry_record *rec)
{
    struct stat now;
    const char *why = NULL;
    if (rec->text.failed) {
        rec->text.failed = false;
        rec->text.len = 0;
        stop(rec, "out of memory");
    }
    if (rec->text.len && !failed(rec) && !(why = lost_file(rec, &now))) {
        int error = write_out(rec, now.st_size);
        why = error ? strerror(error) : NULL;
    }
    rec->text.len = 0;
    if (why)
        stop(rec, why);
}

/* Count what was appended since `before`, or take it back when the limit says so. */
static bool keep(struct ry_record *rec, size_t before, uint64_t spare)
{
    uint64_t n = rec->text.len - before;
    if (rec->text.failed || failed(rec))
        return false;
    if (rec->line_bytes + rec->matrix_bytes + n + spare > rec->max_bytes) {
        rec->text.len = before;
        return false;
    }
    rec->line_bytes += n;
    if (rec->text.len >= FLUSH_BYTES)
        flush(rec);
    return true;
}

/* Once and for all: lines of exchanges and durations stop, sums go on. */
static void limit_reached(struct ry_record *rec)
{
    if (rec->full)
        return;
    rec->full = true;
    snprintf(rec->stopped, sizeof rec->stopped, "limit");
    ry_warn("%s/%s: the limit of %llu bytes is reached: exchanges are no longer written one by one, only summed; raise "
            "RAILYARD_TRACE_MAX to keep more",
            rec->dir, rec->name, (unsigned long long)rec->max_bytes);
}

static void keep_exchange(struct ry_record *rec, size_t before)
{
    if (rec->full) {
        rec->text.len = before;
        rec->not_written++;
    } else if (!keep(rec, before, reserve(rec))) {
        rec->not_written++;
        if (!failed(rec) && !rec->text.failed)
            limit_reached(rec);
    }
}

static void add_line(struct ry_record *rec, json_t *object)
{
    size_t before = rec->text.len;
    ry_text_line(&rec->text, object);
    keep(rec, before, END_BYTES);
}

/* The lines that callers prepared. They are moved out under the lock and appended after it. */
static void take_lines(struct ry_record *rec, struct ry_record_comm *comm)
{
    pthread_mutex_lock(&rec->lock);
    struct ry_text birth = comm->birth, map = comm->map;
    comm->birth = comm->map = (struct ry_text){0};
    pthread_mutex_unlock(&rec->lock);
    if (birth.at) {
        uint64_t n = ry_npy_file_bytes(RY_NPY_U64, 2, (size_t[]){ROWS, (size_t)comm->nranks});
        comm->no_room = rec->line_bytes + rec->matrix_bytes + n + END_BYTES > rec->max_bytes;
        if (comm->no_room)
            limit_reached(rec);
        else
            rec->matrix_bytes += n;
    }
    struct ry_text *lines[] = {&birth, &map};
    for (int i = 0; i < 2; i++) {
        size_t before = rec->text.len;
        if (lines[i]->at && !lines[i]->failed) {
            ry_text_add(&rec->text, lines[i]->at, lines[i]->len);
            keep(rec, before, END_BYTES);
        }
        free(lines[i]->at);
    }
}

static void write_exchange(struct ry_record *rec, struct record *r)
{
    struct ry_record_comm *comm = r->comm;
    struct ry_record_exchange *x = &r->exchange;
    size_t n = (size_t)comm->nranks;
    x->send_count = r->counts;
    x->recv_count = r->counts + n;
    for (size_t i = 0; i < n; i++) {
        comm->sums[ROW_BYTES_SENT * n + i] += x->send_count[i] * x->type_bytes;
        comm->sums[ROW_BYTES_RECEIVED * n + i] += x->recv_count[i] * x->type_bytes;
        comm->sums[ROW_SENDS * n + i] += x->send_count[i] != 0;
        comm->sums[ROW_RECEIVES * n + i] += x->recv_count[i] != 0;
    }
    comm->exchanges++;
    rec->exchanges++;
    if (rec->full) {
        rec->not_written++;
        return;
    }
    size_t before = rec->text.len;
    ry_line_exchange(&rec->text, comm->id, comm->rank, comm->nranks, comm->name, x);
    keep_exchange(rec, before);
}

static void write_small(struct ry_record *rec, const struct record *r)
{
    if (rec->full)
        return;
    size_t before = rec->text.len;
    if (r->kind == RECORD_ROWS)
        ry_line_rows(&rec->text, r->comm->id, r->comm->rank, &r->rows);
    else
        ry_line_duration(&rec->text, r->comm->id, r->comm->rank, r->duration.number, r->duration.us);
    keep(rec, before, reserve(rec));
}

/* Empty every ring. Returns whether there was anything. */
static bool drain(struct ry_record *rec)
{
    bool any = false;
    for (struct lane *lane = atomic_load(&rec->lanes); lane; lane = lane->next) {
        struct record *r;
        /* A ring is made by its thread before the first commit, and head_seen makes the making visible. */
        if (!atomic_load(&lane->ring.head))
            continue;
        atomic_store_explicit(&lane->poked, false, memory_order_relaxed);
        while (!failed(rec) && (r = ry_ring_peek(&lane->ring))) {
            any = true;
            if (!r->comm->born) {
                r->comm->born = true;
                take_lines(rec, r->comm);
            }
            if (r->kind == RECORD_EXCHANGE)
                write_exchange(rec, r);
            else
                write_small(rec, r);
            ry_ring_pop(&lane->ring);
        }
    }
    return any;
}

static uint64_t seen_exchanges(const struct ry_record_comm *comm)
{
    return comm->exchanges + atomic_load_explicit(&comm->lost_exchanges, memory_order_acquire);
}

static void tell_drops(struct ry_record *rec, struct ry_record_comm *comm)
{
    uint64_t x = atomic_load(&comm->lost_exchanges), d = atomic_load(&comm->lost_durations);
    if (x == comm->told_exchanges && d == comm->told_durations)
        return;
    add_line(rec, json_pack("{s:s,s:s,s:i,s:I,s:I,s:I}", "t", "drop", "comm", comm->id, "rank", comm->rank, "wall_ns",
                            (json_int_t)ry_wall_ns(), "exchanges", (json_int_t)(x - comm->told_exchanges), "durations",
                            (json_int_t)(d - comm->told_durations)));
    comm->told_exchanges = x;
    comm->told_durations = d;
}

static void save_matrix(struct ry_record *rec, struct ry_record_comm *comm)
{
    uint64_t n = seen_exchanges(comm);
    if (failed(rec) || comm->no_room || (comm->saved && n == comm->saved_exchanges) || !n)
        return;
    size_t shape[] = {ROWS, (size_t)comm->nranks}, cells = shape[0] * shape[1];
    uint64_t *total = malloc(cells * sizeof *total);
    if (!total)
        return stop(rec, "out of memory");
    for (size_t i = 0; i < cells; i++)
        total[i] = comm->sums[i] + atomic_load_explicit(&comm->lost[i], memory_order_relaxed);
    struct ry_err err;
    flush(rec); /* so that a matrix is never ahead of the lines by more than what was dropped */
    if (!failed(rec) && ry_npy_save(rec->dirfd, comm->file, RY_NPY_U64, 2, shape, total, &err)) {
        stop(rec, err.msg);
    } else if (!failed(rec)) {
        comm->saved = true;
        comm->saved_exchanges = n;
        add_line(rec, json_pack("{s:s,s:s,s:i,s:I,s:I}", "t", "matrix", "comm", comm->id, "rank", comm->rank, "wall_ns",
                                (json_int_t)ry_wall_ns(), "exchanges", (json_int_t)n));
    }
    free(total);
}

static void end_comm(struct ry_record *rec, struct ry_record_comm *comm, const char *how)
{
    save_matrix(rec, comm);
    rec->dropped += atomic_load(&comm->lost_exchanges);
    add_line(rec,
             json_pack("{s:s,s:s,s:i,s:s,s:I,s:I,s:I,s:I,s:O?}", "t", "comm_end", "comm", comm->id, "rank", comm->rank,
                       "how", how, "wall_ns", (json_int_t)ry_wall_ns(), "exchanges", (json_int_t)seen_exchanges(comm),
                       "dropped_exchanges", (json_int_t)atomic_load(&comm->lost_exchanges), "dropped_durations",
                       (json_int_t)atomic_load(&comm->lost_durations), "counters", comm->counters));
}

static void unlink_comm(struct ry_record *rec, struct ry_record_comm *comm)
{
    pthread_mutex_lock(&rec->lock);
    for (struct ry_record_comm **p = &rec->comms; *p; p = &(*p)->next)
        if (*p == comm) {
            *p = comm->next;
            break;
        }
    pthread_mutex_unlock(&rec->lock);
}

/* Returns whether there was anything to do. `closing`: the last round. */
static bool round_of_work(struct ry_record *rec, bool closing, bool save)
{
    pthread_mutex_lock(&rec->lock);
    struct ry_record_comm *first = rec->comms;
    for (struct ry_record_comm *c = first; c; c = c->next)
        c->leaving = c->ended; /* what was recorded before the end is in the rings by now */
    pthread_mutex_unlock(&rec->lock);
    bool any = false;
    for (struct ry_record_comm *c = first; c; c = c->next) {
        c->born = true;
        take_lines(rec, c);
    }
    any |= drain(rec);
    any |= rec->text.len > 0;
    for (struct ry_record_comm *c = first, *next; c; c = next) {
        next = c->next;
        tell_drops(rec, c);
        if (save || closing)
            save_matrix(rec, c);
        if (c->leaving) {
            end_comm(rec, c, c->how);
            unlink_comm(rec, c);
            ry_record_comm_free(c);
            any = true;
        } else if (closing) {
            end_comm(rec, c, "open");
        }
    }
    flush(rec);
    return any;
}

/* The end line is tried even after a failure: the cut-off line may have left the room for it. */
static void finish(struct ry_record *rec)
{
    struct stat now;
    if (lost_file(rec, &now))
        return;
    rec->text.len = 0;
    ry_text_line(&rec->text, json_pack("{s:s,s:I,s:I,s:I,s:I,s:s?}", "t", "end", "wall_ns", (json_int_t)ry_wall_ns(),
                                       "exchanges", (json_int_t)(rec->exchanges + rec->dropped), "dropped",
                                       (json_int_t)rec->dropped, "not_written", (json_int_t)rec->not_written, "stopped",
                                       rec->stopped[0] ? rec->stopped : NULL));
    int error = rec->text.failed ? ENOMEM : write_out(rec, now.st_size);
    if (error && !failed(rec))
        stop(rec, strerror(error));
}

static bool unsaved(const struct ry_record *rec)
{
    for (const struct ry_record_comm *c = rec->comms; c; c = c->next)
        if (seen_exchanges(c) != c->saved_exchanges)
            return true;
    return false;
}

static bool waiting(struct ry_record *rec)
{
    for (struct lane *lane = atomic_load(&rec->lanes); lane; lane = lane->next)
        if (atomic_load(&lane->ring.head) != lane->ring.head_seen)
            return true;
    return false;
}

void *ry_record_writer(void *arg)
{
    struct ry_record *rec = arg;
    uint64_t due = rec->matrix_ns ? ry_now_ns() + rec->matrix_ns : UINT64_MAX;
    rec->line_bytes = rec->text.len; /* the head */
    for (bool closing = false;;) {
        pthread_mutex_lock(&rec->lock);
        closing = rec->closing;
        pthread_mutex_unlock(&rec->lock);
        uint64_t now = ry_now_ns();
        bool save = now >= due;
        if (save)
            due = now + rec->matrix_ns;
        bool any = round_of_work(rec, closing, save);
        if (closing)
            break;
        int wait_ms = FLUSH_MS;
        if (!any) {
            atomic_store(&rec->sleeping, true);
            if (!failed(rec) && waiting(rec)) {
                atomic_store(&rec->sleeping, false);
                continue;
            }
            pthread_mutex_lock(&rec->lock);
            bool timed = due != UINT64_MAX && !failed(rec) && unsaved(rec);
            pthread_mutex_unlock(&rec->lock);
            now = ry_now_ns();
            wait_ms = !timed                            ? -1
                      : due <= now                      ? 0
                      : (due - now) / 1000000 > 3600000 ? 3600000
                                                        : (int)((due - now) / 1000000) + 1;
        }
        poll(&(struct pollfd){.fd = rec->wake, .events = POLLIN}, 1, wait_ms);
        atomic_store(&rec->sleeping, false);
        ssize_t got = read(rec->wake, &(uint64_t){0}, sizeof(uint64_t));
        (void)got; /* EAGAIN when the time ran out */
    }
    finish(rec);
    return NULL;
}
