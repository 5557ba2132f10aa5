/*
 * record.c: see record.h. The side of the job's threads: lanes, records, drops; opening and closing.
 *
 * A [job] function enters its thread's lane by setting `busy` and then looking at the state; the close sets the state
 * and then waits until no lane is busy. Both orders are sequentially consistent, so after that wait no thread of the
 * job can be at a ring or a communicator, and what they hold is freed. The same pairing of a store and a load wakes a
 * sleeping writer: the producer publishes, then looks at `sleeping`; the writer sets `sleeping`, then looks at the
 * rings.
 *
 * The sums of the matrices are made by the writer from the records; what is dropped is added to `lost` by the thread
 * that drops it. Their sum is exact, and a thread of the job pays only for a copy in the usual case.
 */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "internal.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t leave_key; /* tells when a thread with a lane ends */
static bool have_key;
static _Atomic unsigned forks; /* grows in every child: a record belongs to the process that opened it */
static _Atomic(struct ry_record *) ever;
static __thread struct lane *mine;

static void thread_ends(void *lane)
{
    mine = NULL; /* a later destructor of the thread may still record: it takes another lane then */
    atomic_store_explicit(&((struct lane *)lane)->vacant, true, memory_order_release);
}

static void forked(void)
{
    atomic_fetch_add(&forks, 1);
}

static void prepare(void)
{
    have_key = !pthread_key_create(&leave_key, thread_ends);
    pthread_atfork(NULL, NULL, forked);
}

static bool ours(const struct ry_record *rec)
{
    return rec && rec->forks == atomic_load_explicit(&forks, memory_order_relaxed);
}

void ry_record_wake(struct ry_record *rec)
{
    ssize_t done = write(rec->wake, &(uint64_t){1}, sizeof(uint64_t));
    (void)done; /* EAGAIN: it is awake enough */
}

/* A thread's first call: a lane left by a thread that ended, or a new one. */
static struct lane *take_lane(struct ry_record *rec)
{
    if (mine) /* of a record that was closed */
        thread_ends(mine);
    struct lane *lane = atomic_load(&rec->lanes);
    while (lane && !atomic_exchange(&lane->vacant, false))
        lane = lane->next;
    if (!lane) {
        lane = aligned_alloc(64, (sizeof *lane + 63) & ~(size_t)63);
        if (!lane)
            return NULL;
        memset(lane, 0, sizeof *lane);
        lane->rec = rec;
        atomic_store(&lane->busy, true); /* before it is seen, so that the close cannot miss us */
        lane->next = atomic_load(&rec->lanes);
        while (!atomic_compare_exchange_weak(&rec->lanes, &lane->next, lane))
            ;
    }
    if (have_key)
        pthread_setspecific(leave_key, lane);
    return mine = lane;
}

static void leave(struct lane *lane)
{
    atomic_store_explicit(&lane->busy, false, memory_order_release);
}

/* The thread's lane, entered; NULL when nothing is to be recorded. */
static struct lane *enter(struct ry_record *rec)
{
    if (!ours(rec) || atomic_load_explicit(&rec->state, memory_order_relaxed) != OPEN)
        return NULL;
    struct lane *lane = mine;
    if (__builtin_expect(!lane || lane->rec != rec, 0) && !(lane = take_lane(rec)))
        return NULL;
    atomic_store(&lane->busy, true);
    if (atomic_load(&rec->state) != OPEN) {
        leave(lane);
        return NULL;
    }
    if (__builtin_expect(!lane->ring.data && !lane->failed, 0)) {
        uint64_t least = 8 * atomic_load(&rec->biggest); /* a few records of the largest communicator fit in any case */
        lane->failed = !ry_ring_init(&lane->ring, least > rec->buffer_bytes ? least : rec->buffer_bytes);
    }
    return lane;
}

static void publish(struct ry_record *rec, struct lane *lane)
{
    ry_ring_commit(&lane->ring);
    if (atomic_load(&rec->sleeping)) {
        if (atomic_exchange(&rec->sleeping, false))
            ry_record_wake(rec);
    } else if (ry_ring_used(&lane->ring) > lane->ring.size / 2 &&
               !atomic_exchange_explicit(&lane->poked, true, memory_order_relaxed)) {
        ry_record_wake(rec);
    }
}

static void drop_exchange(struct ry_record_comm *comm, const struct ry_record_exchange *x)
{
    size_t n = (size_t)comm->nranks;
    for (size_t r = 0; r < n; r++) {
        if (x->send_count[r]) {
            atomic_fetch_add_explicit(&comm->lost[ROW_BYTES_SENT * n + r], x->send_count[r] * x->type_bytes,
                                      memory_order_relaxed);
            atomic_fetch_add_explicit(&comm->lost[ROW_SENDS * n + r], 1, memory_order_relaxed);
        }
        if (x->recv_count[r]) {
            atomic_fetch_add_explicit(&comm->lost[ROW_BYTES_RECEIVED * n + r], x->recv_count[r] * x->type_bytes,
                                      memory_order_relaxed);
            atomic_fetch_add_explicit(&comm->lost[ROW_RECEIVES * n + r], 1, memory_order_relaxed);
        }
    }
    atomic_fetch_add_explicit(&comm->lost_exchanges, 1, memory_order_release);
}

void ry_record_exchange(struct ry_record *rec, struct ry_record_comm *comm, const struct ry_record_exchange *x)
{
    struct lane *lane = comm ? enter(rec) : NULL;
    if (!lane)
        return;
    size_t n = (size_t)comm->nranks;
    struct record *r = lane->failed ? NULL : ry_ring_reserve(&lane->ring, sizeof *r + 2 * n * sizeof r->counts[0]);
    if (r) {
        r->kind = RECORD_EXCHANGE;
        r->comm = comm;
        r->exchange = *x;
        memcpy(r->counts, x->send_count, n * sizeof r->counts[0]);
        memcpy(r->counts + n, x->recv_count, n * sizeof r->counts[0]);
        publish(rec, lane);
    } else {
        drop_exchange(comm, x);
    }
    leave(lane);
}

/* A record without counts: where there is no room it is dropped, and counted. */
static void put_small(struct ry_record *rec, struct ry_record_comm *comm, const struct record *small)
{
    struct lane *lane = comm ? enter(rec) : NULL;
    if (!lane)
        return;
    struct record *r = lane->failed ? NULL : ry_ring_reserve(&lane->ring, sizeof *r);
    if (r) {
        *r = *small;
        publish(rec, lane);
    } else {
        atomic_fetch_add_explicit(&comm->lost_durations, 1, memory_order_relaxed);
    }
    leave(lane);
}

void ry_record_duration(struct ry_record *rec, struct ry_record_comm *comm, uint64_t number, double us)
{
    struct record r = {.kind = RECORD_DURATION, .comm = comm, .duration = {number, us}};
    if (isfinite(us))
        put_small(rec, comm, &r);
}

void ry_record_rows(struct ry_record *rec, struct ry_record_comm *comm, const struct ry_record_rows *rows)
{
    struct record r = {.kind = RECORD_ROWS, .comm = comm, .rows = *rows};
    put_small(rec, comm, &r);
}

void ry_record_comm_free(struct ry_record_comm *comm)
{
    free(comm->name);
    free(comm->lost);
    free(comm->sums);
    free(comm->birth.at);
    free(comm->map.at);
    json_decref(comm->counters);
    free(comm);
}

struct ry_record_comm *ry_record_comm(struct ry_record *rec, const struct ry_record_comm_info *info)
{
    if (!ours(rec) || info->nranks < 1 || info->rank < 0 || info->rank >= info->nranks)
        return NULL;
    struct ry_record_comm *comm = calloc(1, sizeof *comm);
    if (!comm)
        return NULL;
    comm->nranks = info->nranks;
    comm->rank = info->rank;
    memcpy(comm->id, info->id, sizeof comm->id - 1);
    size_t cells = ROWS * (size_t)info->nranks;
    comm->lost = calloc(cells, sizeof *comm->lost);
    comm->sums = calloc(cells, sizeof *comm->sums);
    snprintf(comm->file, sizeof comm->file, "matrix-%s-%s-%d.npy", rec->stem, comm->id, comm->rank);
    ry_text_line(&comm->birth, ry_line_comm(info, comm->file));
    json_t *name = info->name ? ry_json_text(info->name, SIZE_MAX) : NULL;
    if (name)
        comm->name = json_dumps(name, JSON_ENCODE_ANY | JSON_COMPACT);
    json_decref(name);
    if (!comm->lost || !comm->sums || comm->birth.failed || (info->name && !comm->name)) {
        ry_record_comm_free(comm);
        return NULL;
    }
    uint64_t bytes = sizeof(struct record) + 2 * (uint64_t)info->nranks * sizeof(uint64_t),
             seen = atomic_load(&rec->biggest);
    while (bytes > seen && !atomic_compare_exchange_weak(&rec->biggest, &seen, bytes))
        ;
    pthread_mutex_lock(&rec->lock);
    bool open = atomic_load(&rec->state) == OPEN;
    if (open) {
        comm->next = rec->comms;
        rec->comms = comm;
        ry_record_wake(rec); /* under the lock: the close, which ends `wake`, takes it too */
    }
    pthread_mutex_unlock(&rec->lock);
    if (!open) {
        ry_record_comm_free(comm);
        return NULL;
    }
    return comm;
}

void ry_record_map(struct ry_record *rec, struct ry_record_comm *comm, const struct ry_cluster *map, const char *why)
{
    if (!ours(rec) || !comm)
        return;
    pthread_mutex_lock(&rec->lock);
    if (atomic_load(&rec->state) == OPEN) {
        ry_text_line(&comm->map, ry_line_map(comm->id, comm->rank, map, why));
        ry_record_wake(rec);
    }
    pthread_mutex_unlock(&rec->lock);
}

void ry_record_comm_end(struct ry_record *rec, struct ry_record_comm *comm, const char *how,
                        const struct ry_record_counter *counters, int ncounters)
{
    if (!ours(rec) || !comm)
        return;
    /* `comm` may be gone already if the record was closed: nothing of it is read outside the lock */
    json_t *list = json_object();
    for (int i = 0; i < ncounters; i++)
        json_object_set_new(list, counters[i].name, json_integer((json_int_t)counters[i].value));
    pthread_mutex_lock(&rec->lock);
    if (atomic_load(&rec->state) != CLOSED) { /* else the close has freed it, or is about to */
        json_decref(comm->counters);
        comm->counters = list;
        snprintf(comm->how, sizeof comm->how, "%s", how ? how : "destroy");
        comm->ended = true;
        list = NULL;
        ry_record_wake(rec);
    }
    pthread_mutex_unlock(&rec->lock);
    json_decref(list);
}

/* HOST-PID, with only letters, digits, '.', '_' and '-' in it. */
static void make_stem(char *out, size_t size, const char *host)
{
    int n = snprintf(out, size, "%.64s-%d", host, (int)getpid());
    for (int i = 0; i < n; i++)
        if (!strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-", out[i]))
            out[i] = '_';
}

static int open_file(struct ry_record *rec, const char *host, struct ry_err *err)
{
    if (mkdir(rec->dir, 0777) && errno != EEXIST)
        return ry_fail(err, "the trace folder %s cannot be made: %s; make it, or set RAILYARD_TRACE to another",
                       rec->dir, strerror(errno));
    rec->dirfd = open(rec->dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (rec->dirfd < 0)
        return ry_fail(err, "the trace folder %s cannot be opened: %s; set RAILYARD_TRACE to a folder", rec->dir,
                       strerror(errno));
    char stem[96];
    make_stem(stem, sizeof stem, host);
    for (int again = 1; again < 1000; again++) { /* pids come again, in other containers or after a restart */
        if (again == 1)
            snprintf(rec->stem, sizeof rec->stem, "%s", stem);
        else
            snprintf(rec->stem, sizeof rec->stem, "%s-%d", stem, again);
        snprintf(rec->name, sizeof rec->name, "trace-%s.jsonl", rec->stem);
        rec->fd = openat(rec->dirfd, rec->name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (rec->fd >= 0 || errno != EEXIST)
            break;
    }
    if (rec->fd < 0 || fstat(rec->fd, &rec->file))
        return ry_fail(err, "%s/%s cannot be made: %s; set RAILYARD_TRACE to a folder that can be written", rec->dir,
                       rec->name, strerror(errno));
    return 0;
}

static int start_writer(struct ry_record *rec)
{
    sigset_t all, before;
    sigfillset(&all); /* the job's signals are for its own threads; and a file size limit must fail, not kill */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&rec->writer, NULL, ry_record_writer, rec);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed)
        pthread_setname_np(rec->writer, "railyard-record");
    return failed;
}

struct ry_record *ry_record_open(const struct ry_record_config *config, struct ry_err *err)
{
    pthread_once(&once, prepare);
    struct ry_record *rec = calloc(1, sizeof *rec);
    if (!rec) {
        ry_fail(err, "no memory for the trace");
        return NULL;
    }
    rec->fd = rec->dirfd = rec->wake = -1;
    rec->forks = atomic_load(&forks);
    rec->max_bytes = config->max_bytes ? config->max_bytes : UINT64_MAX;
    rec->buffer_bytes = config->buffer_bytes;
    rec->matrix_ns =
        config->matrix_seconds > 0 && config->matrix_seconds < 1e9 ? (uint64_t)(config->matrix_seconds * 1e9) : 0;
    pthread_mutex_init(&rec->lock, NULL);
    char host[256] = "unknown";
    gethostname(host, sizeof host - 1);
    int failed = -1;
    if (snprintf(rec->dir, sizeof rec->dir, "%s", config->dir) >= (int)sizeof rec->dir) {
        ry_fail(err, "the trace folder's name is too long: %.100s...", config->dir);
        goto out;
    }
    if (open_file(rec, host, err))
        goto out;
    ry_text_line(&rec->text, ry_line_head(config, host, (int)getpid()));
    rec->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (rec->wake < 0 || rec->text.failed || (failed = start_writer(rec))) {
        ry_fail(err, "cannot start recording: %s", strerror(failed > 0 ? failed : rec->wake < 0 ? errno : ENOMEM));
        unlinkat(rec->dirfd, rec->name, 0);
        goto out;
    }
    rec->next_ever = atomic_load(&ever);
    while (!atomic_compare_exchange_weak(&ever, &rec->next_ever, rec))
        ;
    return rec;
out:
    if (rec->fd >= 0)
        close(rec->fd);
    if (rec->dirfd >= 0)
        close(rec->dirfd);
    if (rec->wake >= 0)
        close(rec->wake);
    free(rec->text.at);
    free(rec);
    return NULL;
}

/* True when no thread is inside a [job] function any more. They never block, so this is short; but a thread may be
 * stopped by a debugger: after a second its buffer is rather left allocated than waited for. */
static bool wait_for_threads(struct ry_record *rec)
{
    for (int i = 0; i < 2000; i++) {
        struct lane *lane = atomic_load(&rec->lanes);
        while (lane && !atomic_load(&lane->busy))
            lane = lane->next;
        if (!lane)
            return true;
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    }
    return false;
}

void ry_record_close(struct ry_record *rec)
{
    if (!ours(rec))
        return;
    pthread_mutex_lock(&rec->lock);
    bool first = atomic_exchange(&rec->state, CLOSED) != CLOSED;
    pthread_mutex_unlock(&rec->lock);
    if (!first)
        return;
    bool quiet = wait_for_threads(rec);
    pthread_mutex_lock(&rec->lock);
    rec->closing = true;
    pthread_mutex_unlock(&rec->lock);
    ry_record_wake(rec);
    pthread_join(rec->writer, NULL);
    if (quiet) {
        for (struct lane *lane = atomic_load(&rec->lanes); lane; lane = lane->next) {
            free(lane->ring.data);
            lane->ring.data = NULL;
        }
        while (rec->comms) {
            struct ry_record_comm *next = rec->comms->next;
            ry_record_comm_free(rec->comms);
            rec->comms = next;
        }
    }
    free(rec->text.at);
    rec->text.at = NULL;
    close(rec->fd);
    close(rec->dirfd);
    if (quiet)
        close(rec->wake);
}
