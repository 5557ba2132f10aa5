/* later.c: see later.h. One lock for all of it: it is taken a few times per exchange, and never held while anything
 * waits. */
#include "later.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/thread.h"
#include "engine.h"
#include "later_stream.h"

#define KEPT 64         /* exchanges that are kept for the sake of the node's communicator */
#define ABORT_MS 200    /* as long as the preload waits for calls that are held */
#define CLOSE_S 2.0     /* for what is pending when the process exits */
#define TICK_MS 100     /* of the watch */
#define PATIENCES 2     /* how many an exchange may take to be enqueued, waiting for other ranks included, */
#define PATIENCE_MORE 5 /* and seconds besides */
enum { NCCL_IN_PROGRESS = 7 };

struct ry_later_queue {
    struct ry_later_queue *next;
    pthread_cond_t pushed;
    struct ry_later_task *first, **last;
    _Atomic int length; /* with the one that is being carried out */
    bool over;          /* the job's thread has ended */
    const struct comm
        *now; /* whose exchange is being carried out, for the watch; NULL: none, or nobody may be blamed */
    uint64_t number;
    unsigned ticks;
    uint32_t trial; /* its ticket, which the host gives back: nobody need die for it. 0: it is none */
};

static struct {
    bool on;
    pthread_mutex_t lock;
    pthread_cond_t done;
    pthread_once_t once;
    pthread_key_t key;
    bool ready; /* thread key and watch are there */
    _Atomic bool closing, closed;
    struct ry_later_queue *queues;
    struct comm *comms;
    int pending, gate; /* of all queues; threads that are freeing something */
} later = {.lock = PTHREAD_MUTEX_INITIALIZER, .done = PTHREAD_COND_INITIALIZER, .once = PTHREAD_ONCE_INIT};

static __thread struct ry_later_queue *own;
static __thread bool ours; /* a thread of Railyard's: waits for nobody here */

void ry_later_start(void)
{
    later.on = true;
}

bool ry_later_on(void)
{
    return later.on;
}

void ry_later_nap(unsigned us)
{
    nanosleep(&(struct timespec){.tv_sec = us / 1000000, .tv_nsec = (long)(us % 1000000) * 1000}, NULL);
}

bool ry_later_is_aborted(const struct comm *c)
{
    const struct reissue *r = atomic_load(&c->reissue);
    return !r || atomic_load(&r->aborted);
}

/* Nothing on the device may ever get there: the host lets the stream go. */
void ry_later_let_go(const struct comm *c, int word, uint32_t ticket)
{
    __atomic_store_n(&c->later.word[word], ticket, __ATOMIC_RELEASE);
}

static uint32_t read_word(const struct comm *c, int word)
{
    return __atomic_load_n(&c->later.word[word], __ATOMIC_ACQUIRE);
}

/* ---- what cannot be mended ---- */

static __attribute__((noreturn)) void end_process(void)
{
    abort(); /* other ranks go on, and the job's stream would read what has not arrived */
}

/* The call has returned success long ago. What broke may be another rank: then the job, which sees that, may abort the
   communicator. */
static void failed(struct ry_later_task *t, int result)
{
    struct comm *c = t->c;
    if (ry_later_is_aborted(c) || atomic_load(&later.closing)) /* then others may have gone already */
        return;
    ry_log(RY_LOG_ERROR,
           "communicator %s, exchange %" PRIu64
           " fails on rank %d after its call has returned: %s. Unless the job aborts the "
           "communicator, this process ends in %g s; with RAILYARD_HOLD=yes the call itself returns such errors",
           c->id, t->way.number, c->info.rank, ry_engine.nccl.error_string(result), ry_engine.settings.patience);
    pthread_mutex_lock(&later.lock);
    own->now = NULL; /* not for the watch to judge */
    pthread_mutex_unlock(&later.lock);
    uint64_t begun = ry_now_ns();
    while (!ry_later_is_aborted(c) && !atomic_load(&later.closed) &&
           (double)(ry_now_ns() - begun) < ry_engine.settings.patience * 1e9)
        ry_later_nap(10000);
    if (!ry_later_is_aborted(c) && !atomic_load(&later.closed))
        end_process();
}

static unsigned most_ticks(void)
{
    return (unsigned)((PATIENCES * ry_engine.settings.patience + PATIENCE_MORE) * 1000 / TICK_MS);
}

static void judge(struct ry_later_queue *q)
{
    if (!q->now || ++q->ticks <= most_ticks() || atomic_load(&later.closed) || ry_later_is_aborted(q->now))
        return;
    if (q->trial) {
        ry_later_let_go(q->now, RY_LATER_TRIED, q->trial);
        q->now = NULL;
        return;
    }
    ry_log(RY_LOG_ERROR,
           "communicator %s, exchange %" PRIu64
           " could not be enqueued for %u s while the job's stream waits for it: some call keeps "
           "the CUDA driver from launching, or NCCL does not return. This process ends; RAILYARD_HOLD=yes holds the "
           "calling "
           "thread instead, and cannot come to this",
           q->now->id, q->number, q->ticks * TICK_MS / 1000);
    end_process();
}

/* Enqueued it may take as long as other ranks do: nobody can tell whose fault that is. */
static void look_at(struct comm *c)
{
    struct ry_later *l = &c->later;
    uint32_t came = read_word(c, RY_LATER_CAME);
    if ((int32_t)(came - read_word(c, RY_LATER_OVER)) <= 0 || came != l->late || atomic_load(&l->pending) ||
        ry_later_is_aborted(c)) {
        l->late = came;
        l->late_ticks = 0;
        return;
    }
    if (++l->late_ticks <= most_ticks() || l->late_said)
        return;
    l->late_said = true;
    ry_warn("communicator %s: the job's stream has waited %u s for an exchange that is enqueued. If all ranks are "
            "well, streams share "
            "a hardware queue with one that waits: RAILYARD_HOLD=yes, or a larger CUDA_DEVICE_MAX_CONNECTIONS",
            c->id, l->late_ticks * TICK_MS / 1000);
}

/* Counts its own naps instead of time: a process that was stopped is not to blame for it. No call into the driver. */
static void *watch(void *arg)
{
    for (;;) {
        ry_later_nap(TICK_MS * 1000);
        pthread_mutex_lock(&later.lock);
        for (struct ry_later_queue *q = later.queues; q; q = q->next)
            judge(q);
        for (struct comm *c = later.comms; c; c = c->later.next)
            look_at(c);
        pthread_mutex_unlock(&later.lock);
    }
    return NULL;
}

/* ---- queues ---- */

static void thread_ends(void *arg)
{
    struct ry_later_queue *q = arg;
    pthread_mutex_lock(&later.lock);
    q->over = true;
    pthread_cond_signal(&q->pushed);
    pthread_mutex_unlock(&later.lock);
}

static void begin_once(void)
{
    pthread_t thread;
    if (pthread_key_create(&later.key, thread_ends) || ry_thread_start(&thread, watch, NULL))
        return;
    pthread_detach(thread);
    later.ready = true;
}

void ry_later_task_free(struct ry_later_task *t)
{
    if (t && t->before)
        ry_engine.device->event_destroy(t->before);
    free(t);
}

/* The exchange on R, and S let go behind it. */
static int carry(struct ry_later_task *t)
{
    struct comm *c = t->c;
    const struct ry_device *device = ry_engine.device;
    struct ry_exchange x = t->x;
    struct ry_err err;
    x.stream = c->later.stream;
    if (device->stream_wait(x.stream, t->before, &err) ||
        device->stream_write_value(x.stream, &c->later.word[RY_LATER_CAME], t->ticket, &err)) {
        ry_log(RY_LOG_ERROR, "communicator %s: %s", c->id, err.msg);
        return 1;
    }
    int result = ry_exchange_carry(c, &x, &t->way);
    if (result && result != NCCL_IN_PROGRESS)
        return result;
    if (device->stream_write_value(x.stream, &c->later.word[RY_LATER_OVER], t->ticket, &err)) {
        ry_log(RY_LOG_ERROR, "communicator %s: %s", c->id, err.msg);
        return 1;
    }
    return 0;
}

/* Enqueued, or never to be: with the lock held. */
static bool ended(struct ry_later_task *t)
{
    bool last = atomic_fetch_sub(&t->c->later.pending, 1) == 1;
    later.pending--;
    pthread_cond_broadcast(&later.done);
    return last && t->c->later.ended;
}

static void do_task(struct ry_later_queue *q, struct ry_later_task *t)
{
    struct comm *c = t->c;
    bool open = ry_engine_enter(), end = false;
    if (open) {
        pthread_mutex_lock(&later.lock);
        q->now = c, q->number = t->way.number, q->ticks = 0, q->trial = 0;
        pthread_mutex_unlock(&later.lock);
        int result = ry_later_is_aborted(c) ? 0 : carry(t);
        if (result)
            failed(t, result);
    }
    if (!open || ry_later_is_aborted(c))
        ry_later_let_go(c, RY_LATER_OVER, t->ticket);
    pthread_mutex_lock(&later.lock);
    q->now = NULL;
    atomic_fetch_sub(&q->length, 1);
    end = ended(t);
    pthread_mutex_unlock(&later.lock);
    if (open && end) {
        struct ry_comm_counts *counts = c->later.counts;
        ry_comm_end(c, c->later.how, counts);
        free(counts);
    }
    if (open)
        ry_engine_leave();
    ry_later_task_free(t);
}

static void forget_queue(struct ry_later_queue *q)
{
    for (struct ry_later_queue **p = &later.queues; *p; p = &(*p)->next)
        if (*p == q) {
            *p = q->next;
            break;
        }
}

static void *work(void *arg)
{
    struct ry_later_queue *q = own = arg;
    int device = -1;
    ours = true;
    ry_engine.host.own_thread();
    ry_engine.device->relax_thread();
    for (;;) {
        pthread_mutex_lock(&later.lock);
        while (!q->first && !q->over)
            pthread_cond_wait(&q->pushed, &later.lock);
        struct ry_later_task *t = q->first;
        if (t && !(q->first = t->next))
            q->last = &q->first;
        if (!t)
            forget_queue(q);
        pthread_mutex_unlock(&later.lock);
        if (!t)
            break;
        if (device != t->c->info.device)
            ry_engine.device->use(device = t->c->info.device, NULL);
        do_task(q, t);
    }
    pthread_cond_destroy(&q->pushed);
    free(q);
    return NULL;
}

/* This thread's; NULL: there can be none. */
static struct ry_later_queue *own_queue(void)
{
    pthread_t thread;
    pthread_once(&later.once, begin_once);
    if (own || !later.ready)
        return own;
    struct ry_later_queue *q = calloc(1, sizeof *q);
    if (!q)
        return NULL;
    pthread_cond_init(&q->pushed, NULL);
    q->last = &q->first;
    if (pthread_setspecific(later.key, q) || ry_thread_start(&thread, work, q)) {
        pthread_setspecific(later.key, NULL);
        free(q);
        return NULL;
    }
    pthread_detach(thread);
    pthread_setname_np(thread, "ry-later");
    pthread_mutex_lock(&later.lock);
    q->next = later.queues;
    later.queues = q;
    pthread_mutex_unlock(&later.lock);
    return own = q;
}

/* ---- may it be given away? ---- */

/* The communicator of the node's ranks is made, and connected at its first use, while nothing waits. Until then nothing
   is given away, so nobody else changes what is asked here. */
static bool wait_for_node(struct comm *c, const struct reissue *r)
{
    if (c->later.settled)
        return false;
    enum ry_node_state state = ry_node_comm_state(r->node);
    c->later.settled = state == RY_NODE_CANNOT || r->over_node || ++c->later.kept > KEPT;
    c->later.no_split = c->later.settled && state == RY_NODE_COULD;
    return !c->later.settled;
}

enum ry_node_state ry_later_node(const struct comm *c, enum ry_node_state state)
{
    return state == RY_NODE_COULD && c->later.no_split ? RY_NODE_CANNOT : state;
}

static bool fit(struct comm *c, const struct ry_exchange *x)
{
    const struct reissue *r = atomic_load(&c->reissue);
    bool captured = true;
    if (!x->held || !r || !r->talk || atomic_load(&r->aborted) || atomic_load(&later.closed))
        return false;
    if (c->info.device < 0 && strcmp(ry_engine.device->name, "host"))
        return false; /* nobody knows where NCCL would be called */
    return !ry_engine.device->stream_capturing(x->stream, &captured, NULL) && !captured && !wait_for_node(c, r);
}

struct ry_later_task *ry_later_task_new(struct comm *c, const struct ry_exchange *x, const struct way *way)
{
    size_t n = (size_t)x->nranks, most = n * (4 * sizeof(uint64_t) + 2 * sizeof(uint32_t));
    struct ry_later_task *t = malloc(sizeof *t + most);
    if (!t)
        return NULL;
    *t = (struct ry_later_task){.c = c, .x = *x, .way = *way};
    char *at = (char *)(t + 1);
#define KEEP(member)                                                                                                   \
    if (x->member) {                                                                                                   \
        memcpy(at, x->member, n * sizeof *x->member);                                                                  \
        t->x.member = (void *)at;                                                                                      \
        at += n * sizeof *x->member;                                                                                   \
    }
    KEEP(send_count)
    KEEP(recv_count)
    KEEP(send_buf)
    KEEP(recv_buf)
    KEEP(sent)
    KEEP(received)
#undef KEEP
    if (ry_engine.device->event_create_untimed(&t->before, NULL)) {
        free(t);
        return NULL;
    }
    return t;
}

/* Counted before anything waits on the device: whoever frees memory sees it, or we see him. With the lock held. */
static bool count(struct comm *c)
{
    if (later.gate || atomic_load(&later.closed))
        return false;
    later.pending++;
    atomic_fetch_add(&c->later.pending, 1);
    return true;
}

enum ry_later_begun ry_later_begin(struct ry_later_task *t, int word)
{
    struct ry_later_queue *q = own_queue();
    struct comm *c = t->c;
    if (!q)
        return RY_LATER_NOT_HERE;
    pthread_mutex_lock(&later.lock);
    while (atomic_load(&c->later.pending) && c->later.queue != q) /* as NCCL has it: one thread after the other */
        pthread_cond_wait(&later.done, &later.lock);
    bool counted = count(c);
    if (counted) {
        c->later.queue = q;
        t->ticket = word == RY_LATER_TRIED ? ++c->later.trial : ++c->later.ticket;
    }
    pthread_mutex_unlock(&later.lock);
    if (!counted)
        return RY_LATER_NOT_NOW;
    struct ry_err err;
    if (!ry_engine.device->event_record(t->before, t->x.stream, &err) &&
        !ry_engine.device->stream_wait_value(t->x.stream, &c->later.word[word], t->ticket, &err))
        return RY_LATER_BEGUN;
    ry_log(RY_LOG_PLAN, "communicator %s: %s", c->id, err.msg);
    ry_later_tried(t);
    return RY_LATER_NOT_HERE;
}

void ry_later_trying(const struct ry_later_task *t)
{
    pthread_mutex_lock(&later.lock);
    own->now = t->c, own->number = t->way.number, own->ticks = 0, own->trial = t->ticket;
    pthread_mutex_unlock(&later.lock);
    ours = true; /* as far as waiting for what is pending goes, which this is */
}

void ry_later_tried(struct ry_later_task *t)
{
    ours = false;
    pthread_mutex_lock(&later.lock);
    own->now = NULL;
    ended(t);
    pthread_mutex_unlock(&later.lock);
}

void ry_later_watch(struct comm *c, bool on)
{
    struct comm **p = &later.comms;
    pthread_mutex_lock(&later.lock);
    while (*p && *p != c)
        p = &(*p)->later.next;
    if (on && !*p)
        *p = c, c->later.next = NULL;
    else if (!on && *p)
        *p = c->later.next;
    pthread_mutex_unlock(&later.lock);
}

static bool give_away(struct comm *c, const struct ry_exchange *x, const struct way *way)
{
    struct ry_later_queue *q = own_queue();
    struct ry_later_task *t = q ? ry_later_task_new(c, x, way) : NULL;
    if (!t || ry_later_begin(t, RY_LATER_OVER) != RY_LATER_BEGUN) {
        ry_later_task_free(t);
        return false;
    }
    pthread_mutex_lock(&later.lock);
    *q->last = t;
    q->last = &t->next;
    c->later.given++;
    atomic_fetch_add(&q->length, 1);
    pthread_cond_signal(&q->pushed);
    pthread_mutex_unlock(&later.lock);
    return true;
}

bool ry_later_take(struct comm *c, const struct ry_exchange *x, const struct way *way, int *result)
{
    if (!later.on || !ry_engine.device)
        return false;
    if (!fit(c, x)) {
        ry_later_settle(c);
        return false;
    }
    if (ry_later_stream_good(c, x->stream) && give_away(c, x, way)) {
        *result = 0;
        return true;
    }
    ry_later_settle(c);
    return ry_later_try(c, x, way, result);
}

/* ---- who waits on the host ---- */

void ry_later_settle(void *comm)
{
    struct comm *c = comm;
    struct ry_later_queue *q = own;
    if (ours || ((!q || !atomic_load(&q->length)) && (!c || !atomic_load(&c->later.pending))))
        return;
    pthread_mutex_lock(&later.lock);
    while ((q && atomic_load(&q->length)) || (c && atomic_load(&c->later.pending)))
        pthread_cond_wait(&later.done, &later.lock);
    pthread_mutex_unlock(&later.lock);
}

static void wait_until(const int *zero, double seconds)
{
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    uint64_t ns = (uint64_t)end.tv_nsec + (uint64_t)(seconds * 1e9);
    end.tv_sec += (time_t)(ns / 1000000000u);
    end.tv_nsec = (long)(ns % 1000000000u);
    while (*zero && !pthread_cond_timedwait(&later.done, &later.lock, &end)) {
    }
}

void ry_later_freeing(double most)
{
    if (ours)
        return;
    pthread_mutex_lock(&later.lock);
    later.gate++;
    if (most > 0)
        wait_until(&later.pending, most);
    while (most <= 0 && later.pending)
        pthread_cond_wait(&later.done, &later.lock);
    pthread_mutex_unlock(&later.lock);
}

void ry_later_freed(void)
{
    if (ours)
        return;
    pthread_mutex_lock(&later.lock);
    later.gate--;
    pthread_mutex_unlock(&later.lock);
}

/* ---- ends ---- */

void ry_later_aborting(struct comm *c)
{
    for (int i = 0; i < ABORT_MS && atomic_load(&c->later.pending); i++)
        ry_later_nap(1000);
    pthread_mutex_lock(&later.lock);
    if (atomic_load(&c->later.pending) && c->later.word) /* it sits in NCCL, which only the abort ends */
        ry_later_let_go(c, RY_LATER_OVER, c->later.ticket);
    pthread_mutex_unlock(&later.lock);
}

bool ry_later_ends(struct comm *c, enum ry_death how, const struct ry_comm_counts *counts)
{
    pthread_mutex_lock(&later.lock);
    bool wait = atomic_load(&c->later.pending) > 0;
    if (wait) {
        c->later.counts = malloc(sizeof *counts);
        if (c->later.counts)
            *c->later.counts = *counts;
        c->later.how = how;
        c->later.ended = c->later.counts != NULL; /* else it is lost */
    }
    pthread_mutex_unlock(&later.lock);
    return wait;
}

void ry_later_close(void)
{
    atomic_store(&later.closing, true);
    pthread_mutex_lock(&later.lock);
    wait_until(&later.pending, CLOSE_S);
    atomic_store(&later.closed, true);
    pthread_mutex_unlock(&later.lock);
}
