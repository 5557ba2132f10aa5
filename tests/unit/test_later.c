/*
 * test_later.c: giving exchanges away (engine/later.c), on a device whose streams run by themselves.
 *
 * The device here has hardware queues, as a GPU has: each stream belongs to one, each queue does one thing after the
 * other whatever stream it is of, and a wait at its head keeps everything behind it. An exchange is a number that is
 * written on its stream.
 */
#include <check.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/thread.h"
#include "engine/engine.h"

/* ---- the device ---- */

struct ry_event {
    _Atomic uint64_t recorded, happened; /* the latest, and the latest that has come to pass */
};

struct op {
    struct op *next;
    enum { RECORD, WAIT, WAIT_VALUE, WRITE_VALUE } kind;
    struct ry_event *event;
    uint64_t version;
    uint32_t *word, value;
};

enum { MOST_QUEUES = 8 };
static struct hardware {
    pthread_mutex_t lock;
    struct op *first, **last;
    pthread_t thread;
} hardware[MOST_QUEUES];
static int queues; /* in use */
static _Atomic int streams_made;
static _Atomic bool device_ends;

struct stream {
    int queue;
};

/* Never freed, since whatever runs may still look at it; known until the end, since leaks are looked for. */
static void *_Atomic kept_all;
static void *keep(size_t bytes)
{
    void **p = calloc(1, sizeof *p + 8 + bytes);
    *p = atomic_load(&kept_all);
    while (!atomic_compare_exchange_weak(&kept_all, p, (void *)p)) {
    }
    return (char *)p + 16;
}

static bool is_over(const struct op *o)
{
    switch (o->kind) {
    case WAIT:
        return atomic_load(&o->event->happened) >= o->version;
    case WAIT_VALUE:
        return (int32_t)(__atomic_load_n(o->word, __ATOMIC_ACQUIRE) - o->value) >= 0;
    case RECORD:
        atomic_store(&o->event->happened, o->version);
        return true;
    default:
        __atomic_store_n(o->word, o->value, __ATOMIC_RELEASE);
        return true;
    }
}

static void *run_queue(void *arg)
{
    struct hardware *h = arg;
    while (!atomic_load(&device_ends)) {
        pthread_mutex_lock(&h->lock);
        struct op *o = h->first;
        pthread_mutex_unlock(&h->lock);
        if (!o || !is_over(o)) {
            usleep(50);
            continue;
        }
        pthread_mutex_lock(&h->lock);
        if (!(h->first = o->next))
            h->last = &h->first;
        pthread_mutex_unlock(&h->lock);
        free(o);
    }
    return NULL;
}

static int enqueue(void *stream, struct op o)
{
    const struct stream *s = stream;
    struct hardware *h = &hardware[s->queue];
    struct op *p = malloc(sizeof *p);
    *p = o;
    p->next = NULL;
    pthread_mutex_lock(&h->lock);
    *h->last = p;
    h->last = &p->next;
    pthread_mutex_unlock(&h->lock);
    return 0;
}

static int make_stream(void **stream, struct ry_err *err)
{
    struct stream *s = keep(sizeof *s);
    s->queue = atomic_fetch_add(&streams_made, 1) % queues;
    *stream = s;
    return 0;
}

static int destroy_stream(void *stream, struct ry_err *err)
{
    return 0; /* what is on it still runs */
}

static int make_event(struct ry_event **ev, struct ry_err *err)
{
    *ev = keep(sizeof **ev);
    return 0;
}

static void destroy_event(struct ry_event *ev)
{
}

static int record(struct ry_event *ev, void *stream, struct ry_err *err)
{
    return enqueue(stream, (struct op){.kind = RECORD, .event = ev, .version = atomic_fetch_add(&ev->recorded, 1) + 1});
}

static int event_done(struct ry_event *ev, bool *done, struct ry_err *err)
{
    *done = atomic_load(&ev->happened) >= atomic_load(&ev->recorded);
    return 0;
}

static int wait_event(void *stream, struct ry_event *ev, struct ry_err *err)
{
    return enqueue(stream, (struct op){.kind = WAIT, .event = ev, .version = atomic_load(&ev->recorded)});
}

static _Atomic bool no_values;
static int wait_value(void *stream, const uint32_t *word, uint32_t value, struct ry_err *err)
{
    if (atomic_load(&no_values))
        return ry_fail(err, "not on this device");
    return enqueue(stream, (struct op){.kind = WAIT_VALUE, .word = (uint32_t *)(uintptr_t)word, .value = value});
}

static int write_value(void *stream, uint32_t *word, uint32_t value, struct ry_err *err)
{
    return enqueue(stream, (struct op){.kind = WRITE_VALUE, .word = word, .value = value});
}

static int capturing(void *stream, bool *is, struct ry_err *err)
{
    *is = false;
    return 0;
}

static int pinned(void **out, size_t bytes, struct ry_err *err)
{
    *out = keep(bytes);
    return 0;
}

static int use(int ordinal, struct ry_err *err)
{
    return 0;
}

static void relax(void)
{
}

static const struct ry_device device = {.name = "host",
                                        .use = use,
                                        .pinned_alloc = pinned,
                                        .stream_create = make_stream,
                                        .stream_destroy = destroy_stream,
                                        .stream_capturing = capturing,
                                        .stream_wait = wait_event,
                                        .stream_wait_value = wait_value,
                                        .stream_write_value = write_value,
                                        .event_create_untimed = make_event,
                                        .event_record = record,
                                        .event_done = event_done,
                                        .event_destroy = destroy_event,
                                        .relax_thread = relax};

static void synchronize(void *stream)
{
    struct ry_event *ev;
    bool done = false;
    make_event(&ev, NULL);
    record(ev, stream, NULL);
    for (int i = 0; i < 200000 && !done; i++) {
        usleep(50);
        event_done(ev, &done, NULL);
    }
    ck_assert_msg(done, "the stream does not end");
}

/* ---- the engine around it ---- */

struct engine ry_engine;

enum { COMMS = 4, NUMBERS = 10000 };
static struct one {
    struct comm comm;
    struct reissue reissue;
    void *_Atomic stream; /* the job's */
    void *nccl;           /* a stream that NCCL made for itself, or NULL */
    uint32_t at[NUMBERS]; /* what exchanges leave */
    _Atomic int allowed;  /* exchanges that the other ranks have made; -1: all */
    _Atomic int carried;
    pthread_t by[NUMBERS];
    uint32_t gate; /* where it is used: exchanges that the device has got on with */
    bool gated;
    int result, refuses; /* what NCCL says to exchanges, and to what a rank sends itself */
} one[COMMS];
static _Atomic int in_carry;

static struct one *of(const struct comm *c)
{
    for (int i = 0; i < COMMS; i++)
        if (&one[i].comm == c)
            return &one[i];
    abort();
}

int ry_exchange_carry(struct comm *c, const struct ry_exchange *x, const struct way *way)
{
    struct one *o = of(c);
    uint64_t n = way->number;
    atomic_fetch_add(&in_carry, 1);
    while (atomic_load(&o->allowed) >= 0 && (int)n >= atomic_load(&o->allowed) && !atomic_load(&o->reissue.aborted))
        usleep(100);
    ck_assert_int_eq(x->nranks, 2);
    ck_assert_uint_eq(x->send_count[1], n + 1);
    ck_assert_uint_eq(x->recv_count[0], n + 2);
    ck_assert_ptr_ne(x->stream, o->stream);
    if (o->nccl) { /* as NCCL does: its own stream before and after */
        struct ry_event *before;
        make_event(&before, NULL);
        record(before, o->nccl, NULL);
        wait_event(x->stream, before, NULL);
    }
    if (o->gated)
        wait_value(x->stream, &o->gate, (uint32_t)n + 1, NULL);
    write_value(x->stream, &o->at[n], (uint32_t)n + 1, NULL);
    o->by[n] = pthread_self();
    atomic_fetch_add(&o->carried, 1);
    atomic_fetch_sub(&in_carry, 1);
    return atomic_load(&o->reissue.aborted) ? 2 : o->result;
}

/* What this rank sends itself goes the same way through its own queues, and asks nothing of other ranks. */
static _Atomic int to_itself;
int ry_run_to_itself(struct ry_runner *r, struct ry_run_node *node, int rank, const void *from, void *to, uint64_t bytes,
                     void *stream, int *result, struct ry_err *err)
{
    struct one *o = (void *)r;
    struct ry_event *ev;
    atomic_fetch_add(&to_itself, 1);
    ck_assert_uint_eq(bytes, sizeof(uint32_t));
    if (o->nccl) {
        make_event(&ev, NULL);
        record(ev, o->nccl, NULL);
        wait_event(stream, ev, NULL);
    }
    write_value(stream, to, *(const uint32_t *)from, NULL);
    *result = o->refuses;
    return 0;
}

enum ry_node_state ry_node_comm_state(const struct ry_node_comm *node)
{
    return RY_NODE_CANNOT;
}

struct ry_run_node *ry_node_comm_face(struct ry_node_comm *node)
{
    ck_abort_msg("there is none");
}

static _Atomic int comms_ended;
void ry_comm_end(struct comm *c, enum ry_death how, const struct ry_comm_counts *counts)
{
    ck_assert_int_eq(how, RY_DEATH_DESTROY);
    ck_assert_uint_eq(counts->exchanges, 77);
    ry_later_end(c);
    atomic_fetch_add(&comms_ended, 1);
}

static void own_thread(void)
{
}

static const char *error_string(int result)
{
    return "some error";
}

static void setup_with(int n)
{
    queues = n;
    for (int i = 0; i < MOST_QUEUES; i++) {
        hardware[i].last = &hardware[i].first;
        pthread_mutex_init(&hardware[i].lock, NULL);
        ry_thread_start(&hardware[i].thread, run_queue, &hardware[i]);
    }
    ry_engine.device = &device;
    ry_engine.host.own_thread = own_thread;
    ry_engine.nccl.error_string = error_string;
    ry_engine.settings.patience = 2; /* a quarter of it for a trial, on a busy machine */
    ry_later_start();
    for (int i = 0; i < COMMS; i++) {
        struct one *o = &one[i];
        o->reissue.talk = (void *)o; /* only asked whether it is there */
        o->reissue.runner = (void *)o;
        atomic_store(&o->comm.reissue, &o->reissue);
        snprintf(o->comm.id, sizeof o->comm.id, "%d", i);
        atomic_store(&o->allowed, -1);
    }
}

/* Streams get queues in turn: with all of the job's first, the engine's come in others. */
static void job_streams(int n)
{
    for (int i = 0; i < n; i++) {
        void *made;
        make_stream(&made, NULL);
        one[i].stream = made;
    }
}

/* True: given away. */
static bool issue(struct one *o, uint64_t n)
{
    uint64_t send[2] = {n, n + 1}, recv[2] = {n + 2, n + 3};
    const void *from[2] = {send, send};
    void *to[2] = {recv, recv};
    struct ry_exchange x = {.nranks = 2,
                            .held = true,
                            .stream = o->stream,
                            .send_count = send,
                            .recv_count = recv,
                            .send_buf = from,
                            .recv_buf = to,
                            .ordinal = n};
    struct way way = {.number = n};
    int result = -1;
    bool taken = ry_later_take(&o->comm, &x, &way, &result);
    memset(send, 0xee, sizeof send);
    memset(recv, 0xee, sizeof recv);
    if (taken)
        ck_assert_int_eq(result, 0);
    else
        write_value(o->stream, &o->at[n], (uint32_t)n + 1, NULL);
    return taken;
}

static void there(struct one *o, uint64_t upto)
{
    synchronize(o->stream);
    for (uint64_t n = 0; n < upto; n++)
        ck_assert_msg(__atomic_load_n(&o->at[n], __ATOMIC_ACQUIRE) == n + 1, "exchange %d is not there", (int)n);
}

/* ---- the cases ---- */

/* The first is tried on the thread itself; those after it return at once, and the stream waits. */
START_TEST(given_away)
{
    struct one *o = &one[0];
    setup_with(4);
    job_streams(1);
    ck_assert(issue(o, 0));
    ck_assert(pthread_equal(o->by[0], pthread_self()));
    there(o, 1);
    atomic_store(&o->allowed, 1);
    for (uint64_t n = 1; n < 20; n++)
        ck_assert(issue(o, n));
    usleep(50000);
    ck_assert_int_eq(o->carried, 1);
    ck_assert_uint_eq(o->comm.later.given, 19);
    atomic_store(&o->allowed, 20);
    there(o, 20);
    for (int n = 1; n < 20; n++)
        ck_assert(!pthread_equal(o->by[n], pthread_self()));
    ry_later_settle(&o->comm);
    ck_assert_int_eq(o->carried, 20);
}
END_TEST

/* What the job enqueued before comes before: an exchange sends what that writes. */
START_TEST(after_what_was_before)
{
    struct one *o = &one[0];
    uint32_t work = 0;
    setup_with(4);
    job_streams(1);
    issue(o, 0);
    there(o, 1);
    wait_value(o->stream, &work, 1, NULL);
    for (uint64_t n = 1; n < 5; n++)
        ck_assert(issue(o, n));
    ry_later_settle(&o->comm);
    usleep(20000);
    for (int n = 1; n < 5; n++)
        ck_assert_uint_eq(__atomic_load_n(&o->at[n], __ATOMIC_ACQUIRE), 0);
    __atomic_store_n(&work, 1, __ATOMIC_RELEASE);
    there(o, 5);
}
END_TEST

/* One hardware queue for everything: each trial ends by the host's hand, nothing hangs, and the thread is held from
 * there. No exchange is tried, whose other ranks would have to wait. */
START_TEST(shared_queue)
{
    struct one *o = &one[0];
    setup_with(1);
    job_streams(1);
    for (uint64_t n = 0; n < 10; n++) {
        ck_assert(!issue(o, n));
        there(o, n + 1);
    }
    ck_assert_uint_eq(o->comm.later.given, 0);
    ck_assert_int_eq(to_itself, 3);
    ck_assert_int_eq(o->carried, 0);
}
END_TEST

/* The engine's stream has a queue of its own, NCCL's has not. */
START_TEST(shared_by_nccl)
{
    struct one *o = &one[0];
    setup_with(4);
    job_streams(1);
    struct stream *nccl = keep(sizeof *nccl);
    nccl->queue = ((struct stream *)o->stream)->queue;
    o->nccl = nccl;
    for (uint64_t n = 0; n < 6; n++) {
        ck_assert(!issue(o, n));
        there(o, n + 1);
    }
    ck_assert_uint_eq(o->comm.later.given, 0);
    ck_assert_int_eq(to_itself, 3);
    ck_assert_int_eq(o->carried, 0);
}
END_TEST

/* Another rank has its trouble, whatever it be: its part does not come in time. */
START_TEST(others_late)
{
    struct one *o = &one[0];
    setup_with(4);
    job_streams(1);
    o->gated = true;
    ck_assert(issue(o, 0)); /* carried out, and not ended while the stream waited */
    for (uint64_t n = 1; n < 4; n++)
        ck_assert(!issue(o, n)); /* what the engine's stream does comes behind it */
    __atomic_store_n(&o->gate, 4, __ATOMIC_RELEASE);
    there(o, 4);
    ck_assert_int_eq(o->carried, 1);
    ck_assert_uint_eq(o->comm.later.given, 0);
}
END_TEST

/* NCCL will not: nothing was begun, the thread is held. */
START_TEST(not_to_itself)
{
    struct one *o = &one[0];
    setup_with(4);
    job_streams(1);
    o->refuses = 1;
    for (uint64_t n = 0; n < 6; n++) {
        ck_assert(!issue(o, n));
        there(o, n + 1);
    }
    ck_assert_int_eq(o->carried, 0);
    ck_assert_uint_eq(o->comm.later.given, 0);
}
END_TEST

/* Two queues: the engine's first stream shares the job's, the second one does not. */
START_TEST(another_stream)
{
    struct one *o = &one[0];
    setup_with(2);
    job_streams(2);
    for (uint64_t n = 0; n < 10; n++) {
        issue(o, n);
        there(o, n + 1);
    }
    ck_assert_uint_eq(o->comm.later.given, 8); /* the first trial fails, the second does not */
}
END_TEST

/* A trial that is given up must not let another stream go, which waits for an exchange that is on its way. */
START_TEST(trial_beside)
{
    struct one *o = &one[0];
    void *first, *second;
    struct ry_event *ev;
    bool done;
    setup_with(4);
    job_streams(2);
    first = o->stream, second = one[1].stream;
    issue(o, 0);
    synchronize(first);
    o->gated = true;
    __atomic_store_n(&o->gate, 1, __ATOMIC_RELEASE);
    ck_assert(issue(o, 1));
    o->stream = second;
    ck_assert(!issue(o, 2)); /* tried, in vain: what is before it on the engine's stream is not over */
    make_event(&ev, NULL);
    record(ev, first, NULL);
    usleep(20000);
    event_done(ev, &done, NULL);
    ck_assert(!done);
    ck_assert_uint_eq(__atomic_load_n(&o->at[1], __ATOMIC_ACQUIRE), 0);
    __atomic_store_n(&o->gate, 3, __ATOMIC_RELEASE);
    synchronize(first);
    synchronize(second);
    ck_assert_uint_eq(o->at[1], 2);
    ck_assert_uint_eq(o->at[2], 3);
}
END_TEST

START_TEST(no_such_call)
{
    struct one *o = &one[0];
    setup_with(4);
    job_streams(1);
    atomic_store(&no_values, true);
    for (uint64_t n = 0; n < 6; n++)
        ck_assert(!issue(o, n));
    there(o, 6);
    ck_assert_int_eq(o->carried, 0);
}
END_TEST

/* Threads with a communicator each, and all of them in turn on a third one; one that frees memory all the time: then
   nothing is pending, and nothing becomes so. */
static pthread_mutex_t third = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int threads_over;
static uint64_t numbers[COMMS];

static void *exchanges(void *arg)
{
    struct one *o = arg, *t = &one[3];
    for (uint64_t n = 0; n < 400; n++) {
        issue(o, numbers[o - one]++);
        if (n % 7 == 0) {
            pthread_mutex_lock(&third);
            issue(t, numbers[3]++);
            pthread_mutex_unlock(&third);
        }
        if (n % 50 == 0) {
            ry_later_settle(&o->comm);
            ck_assert_int_eq(atomic_load(&o->comm.later.pending), 0);
        }
        if (n % 90 == 89)
            synchronize(o->stream);
    }
    atomic_fetch_add(&threads_over, 1);
    return NULL;
}

static void threads_at_once(void)
{
    pthread_t t[3];
    atomic_store(&threads_over, 0);
    for (int i = 0; i < 3; i++)
        ck_assert(!pthread_create(&t[i], NULL, exchanges, &one[i]));
    while (atomic_load(&threads_over) < 3) {
        ry_later_freeing(0);
        for (int i = 0; i < 4; i++)
            ck_assert_int_eq(atomic_load(&one[i].comm.later.pending), 0);
        usleep(500);
        for (int i = 0; i < 4; i++)
            ck_assert_int_eq(atomic_load(&one[i].comm.later.pending), 0);
        ry_later_freed();
        usleep(2000);
    }
    for (int i = 0; i < 3; i++)
        pthread_join(t[i], NULL);
    for (int i = 0; i < 4; i++)
        there(&one[i], numbers[i]);
}

START_TEST(threads)
{
    setup_with(8);
    ry_engine.settings.patience = 20; /* trials shall not fail for want of a processor */
    job_streams(4);
    for (int round = 0; round < 20 && one[0].comm.later.given + one[1].comm.later.given <= 20; round++)
        threads_at_once(); /* on a busy machine all may be over before the first trial is */
    ck_assert_uint_gt(one[0].comm.later.given + one[1].comm.later.given, 20);
    for (int i = 0; i < 100 && atomic_load(&in_carry); i++)
        usleep(1000);
}
END_TEST

/* The communicator ends while something is pending there: it is ended when that has gone. */
START_TEST(ends_later)
{
    struct one *o = &one[0];
    struct ry_comm_counts counts = {.exchanges = 77};
    setup_with(4);
    job_streams(1);
    issue(o, 0);
    ck_assert(!ry_later_ends(&o->comm, RY_DEATH_DESTROY, &counts));
    atomic_store(&o->allowed, 1);
    ck_assert(issue(o, 1));
    ck_assert(ry_later_ends(&o->comm, RY_DEATH_DESTROY, &counts));
    usleep(20000);
    ck_assert_int_eq(comms_ended, 0);
    atomic_store(&o->allowed, -1);
    for (int i = 0; i < 2000 && !comms_ended; i++)
        usleep(1000);
    ck_assert_int_eq(comms_ended, 1);
    there(o, 2);
}
END_TEST

/* Aborted: the stream goes on at once, without what never came. */
START_TEST(aborted)
{
    struct one *o = &one[0];
    setup_with(4);
    job_streams(1);
    issue(o, 0);
    atomic_store(&o->allowed, 1);
    for (uint64_t n = 1; n < 4; n++)
        ck_assert(issue(o, n));
    usleep(20000);
    atomic_store(&o->reissue.aborted, true);
    ry_later_aborting(&o->comm);
    ck_assert_int_eq(atomic_load(&o->comm.later.pending), 0);
    synchronize(o->stream);
}
END_TEST

/* The process exits: what is pending is waited for, nothing more is given away. */
START_TEST(closing)
{
    struct one *o = &one[0];
    setup_with(4);
    job_streams(1);
    issue(o, 0);
    for (uint64_t n = 1; n < 30; n++)
        ck_assert(issue(o, n));
    ry_later_close();
    ck_assert_int_eq(atomic_load(&o->comm.later.pending), 0);
    there(o, 30);
    ck_assert(!issue(o, 30));
}
END_TEST

/* It cannot be enqueued, or fails: the process ends, the stream was not let go. */
START_TEST(stuck)
{
    struct one *o = &one[0];
    setup_with(4);
    job_streams(1);
    issue(o, 0);
    atomic_store(&o->allowed, 1);
    ck_assert(issue(o, 1));
    synchronize(o->stream);
    _exit(0);
}
END_TEST

START_TEST(fails)
{
    struct one *o = &one[0];
    setup_with(4);
    job_streams(1);
    issue(o, 0);
    synchronize(o->stream);
    o->result = 6;
    ck_assert(issue(o, 1));
    synchronize(o->stream);
    _exit(0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("later");
    TCase *t = tcase_create("later");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, given_away);
    tcase_add_test(t, after_what_was_before);
    tcase_add_test(t, shared_queue);
    tcase_add_test(t, shared_by_nccl);
    tcase_add_test(t, others_late);
    tcase_add_test(t, not_to_itself);
    tcase_add_test(t, another_stream);
    tcase_add_test(t, trial_beside);
    tcase_add_test(t, no_such_call);
    tcase_add_test(t, threads);
    tcase_add_test(t, ends_later);
    tcase_add_test(t, aborted);
    tcase_add_test(t, closing);
    tcase_add_test_raise_signal(t, stuck, SIGABRT);
    tcase_add_test_raise_signal(t, fails, SIGABRT);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
