/*
 * later_stream.c: Railyard's stream and words of a communicator, and whether a stream of the job's can wait for them.
 *
 * Streams share hardware queues (CUDA_DEVICE_MAX_CONNECTIONS): a wait at the head of one keeps everything behind it
 * from running, whatever stream that belongs to. If that is R, or a stream that NCCL has made for itself (each of its
 * launches waits for one), nothing ever lets S go. This cannot be known, so it is tried, on the job's thread while S
 * waits for a word that only the host writes. First this rank sends a word to itself, on R and by all communicators that
 * an exchange may use: if that does not end, it is this rank's own queues, and no other rank is kept waiting for it.
 * Then the exchange is carried out. When it has ended, or has not in time, the host lets S go; S waits for the
 * exchange's end besides, so that nothing is wrong either way.
 */
#include "later_stream.h"

#include <inttypes.h>
#include <string.h>

#include "base/clock.h"
#include "base/thread.h"

#define PAGE 4096 /* bytes of words for all communicators of the process */
#define PLACES (PAGE / sizeof(uint32_t) / RY_LATER_WORDS)
#define TRIALS 3 /* that may fail before a stream is left alone */
enum { NCCL_SYSTEM_ERROR = 2 };

/* Never given back: freeing them would wait for the device. */
static struct {
    pthread_mutex_t lock;
    uint32_t *page;
    size_t used, spares;
    uint32_t *spare[PLACES];
} words = {.lock = PTHREAD_MUTEX_INITIALIZER};

static bool take_words(struct ry_later *l)
{
    pthread_mutex_lock(&words.lock);
    void *page = NULL;
    if (!words.page && !ry_engine.device->pinned_alloc(&page, PAGE, NULL)) {
        memset(page, 0, PAGE);
        words.page = page;
    }
    if (words.spares)
        l->word = words.spare[--words.spares];
    else if (words.page && words.used < PLACES)
        l->word = words.page + RY_LATER_WORDS * words.used++;
    if (l->word) {
        l->ticket = l->word[RY_LATER_OVER]; /* nobody else writes it now */
        l->trial = l->word[RY_LATER_TRIED];
    }
    pthread_mutex_unlock(&words.lock);
    return l->word;
}

struct make {
    const struct comm *c;
    void *stream;
};

/* On a thread of its own: whose device may be set. */
static void *make_stream(void *arg)
{
    struct make *m = arg;
    ry_engine.device->relax_thread();
    if (ry_engine.device->use(m->c->info.device, NULL) || ry_engine.device->stream_create(&m->stream, NULL))
        m->stream = NULL;
    return NULL;
}

/* What comes on `to` comes after all that is on `from`. */
static int chain(void *from, void *to)
{
    struct ry_event *ev;
    if (ry_engine.device->event_create_untimed(&ev, NULL))
        return -1;
    int rc = ry_engine.device->event_record(ev, from, NULL) || ry_engine.device->stream_wait(to, ev, NULL) ? -1 : 0;
    ry_engine.device->event_destroy(ev);
    return rc;
}

/* A new R behind the one that was tried and did not do. What that was good for is to be tried anew. */
static bool renew(struct comm *c)
{
    const struct ry_device *device = ry_engine.device;
    struct ry_later *l = &c->later;
    struct make m = {.c = c};
    pthread_t thread;
    if ((!l->word && !take_words(l)) || ry_thread_start(&thread, make_stream, &m))
        return false;
    pthread_join(thread, NULL);
    if (m.stream && l->stream && chain(l->stream, m.stream)) {
        device->stream_destroy(m.stream, NULL);
        m.stream = NULL;
    }
    if (!m.stream)
        return false;
    if (l->stream)
        device->stream_destroy(l->stream, NULL); /* when all on it is done */
    l->stream = m.stream;
    for (int i = 0; i < l->ntried; i++)
        l->tried[i].good = false;
    ry_later_watch(c, true);
    return true;
}

/* Is all of R over before S is let go? */
static bool over_first(struct comm *c, struct ry_event *before, struct ry_event *after)
{
    double patience = ry_engine.settings.patience / 4, most = patience < 1 ? patience : 1;
    uint64_t begun = ry_now_ns(), there = 0;
    bool done = false, came = false;
    while (!ry_engine.device->event_done(after, &done, NULL) && !done && !ry_later_is_aborted(c)) {
        uint64_t now = ry_now_ns();
        if (!there && !ry_engine.device->event_done(before, &came, NULL) && came)
            there = now;
        if (there ? (double)(now - there) > most * 1e9 : (double)(now - begun) > patience * 1e9)
            break;
        ry_later_nap(20);
    }
    return done;
}

/* Where the stream's trials are noted; -1: there are too many. */
static int trials_of(struct ry_later *l, void *stream)
{
    for (int i = 0; i < l->ntried; i++)
        if (l->tried[i].stream == stream)
            return i;
    if (l->ntried == RY_LATER_STREAMS)
        return -1;
    l->tried[l->ntried].stream = stream;
    return l->ntried++;
}

bool ry_later_stream_good(struct comm *c, void *stream)
{
    int at = trials_of(&c->later, stream);
    return at >= 0 && c->later.tried[at].good;
}

/* Do R and what NCCL does behind it run on this rank while S waits? */
static bool runs_here(struct ry_later_task *t, struct ry_event *after)
{
    const struct ry_device *device = ry_engine.device;
    struct comm *c = t->c;
    struct reissue *r = atomic_load(&c->reissue);
    struct ry_run_node *node = ry_node_comm_state(r->node) == RY_NODE_HAS ? ry_node_comm_face(r->node) : NULL;
    struct ry_err err;
    uint32_t *from = &c->later.word[RY_LATER_FROM], *to = &c->later.word[RY_LATER_TO];
    int result = 0;
    if (device->stream_wait(c->later.stream, t->before, &err) ||
        ry_run_to_itself(r->runner, node, c->info.rank, from, to, sizeof *from, c->later.stream, &result, &err) ||
        device->event_record(after, c->later.stream, &err)) {
        ry_log(RY_LOG_PLAN, "communicator %s: %s", c->id, err.msg);
        return false;
    }
    return !result && over_first(c, t->before, after);
}

/* The exchange on R, and its end before what S does next. */
static bool carry_beside(struct ry_later_task *t, struct ry_event *after, int *result)
{
    const struct ry_device *device = ry_engine.device;
    struct ry_exchange x = t->x;
    struct ry_err err;
    x.stream = t->c->later.stream;
    bool fine = !device->stream_wait(x.stream, t->before, &err);
    if (fine) {
        *result = ry_exchange_carry(t->c, &x, &t->way);
        fine = !device->event_record(after, x.stream, &err) && !device->stream_wait(t->x.stream, after, &err);
    }
    if (!fine) {
        ry_log(RY_LOG_ERROR, "communicator %s, exchange %" PRIu64 ": %s", t->c->id, t->way.number, err.msg);
        *result = NCCL_SYSTEM_ERROR; /* the call has not returned yet */
    }
    return !*result;
}

bool ry_later_try(struct comm *c, const struct ry_exchange *x, const struct way *way, int *result)
{
    const struct ry_device *device = ry_engine.device;
    struct ry_event *after = NULL;
    int at = trials_of(&c->later, x->stream);
    if (at < 0 || c->later.tried[at].good || c->later.tried[at].trials >= TRIALS)
        return false;
    int *trials = &c->later.tried[at].trials;
    if ((!c->later.stream || *trials) && !renew(c))
        return false;
    struct ry_later_task *t = ry_later_task_new(c, x, way);
    bool made = t && !device->event_create_untimed(&after, NULL);
    enum ry_later_begun begun = made ? ry_later_begin(t, RY_LATER_TRIED) : RY_LATER_NOT_HERE;
    if (begun == RY_LATER_BEGUN) {
        ry_later_trying(t);
        bool here = runs_here(t, after), good = false, failed = !here;
        if (here && carry_beside(t, after, result))
            failed = !(good = over_first(c, t->before, after));
        ry_later_let_go(c, RY_LATER_TRIED, t->ticket);
        c->later.tried[at].good = good;
        *trials += failed;
        if (failed)
            ry_info("communicator %s: %s did not end in time while the job's stream waited (trial %d of %d)%s", c->id,
                    here ? "an exchange" : "what this rank sends itself", *trials, TRIALS,
                    *trials < TRIALS ? ""
                                     : ": the calling thread is held. Streams share a hardware queue; a larger "
                                       "CUDA_DEVICE_MAX_CONNECTIONS gives more of them");
        ry_later_tried(t);
        if (!here)
            begun = RY_LATER_NOT_NOW;
    } else {
        *trials += begun == RY_LATER_NOT_HERE;
    }
    if (after)
        device->event_destroy(after);
    ry_later_task_free(t);
    return begun == RY_LATER_BEGUN;
}

void ry_later_end(struct comm *c)
{
    struct ry_later *l = &c->later;
    ry_later_watch(c, false);
    if (l->word && __atomic_load_n(&l->word[RY_LATER_OVER], __ATOMIC_ACQUIRE) ==
                       l->ticket) { /* else a stream may still write it */
        pthread_mutex_lock(&words.lock);
        words.spare[words.spares++] = l->word;
        pthread_mutex_unlock(&words.lock);
    }
    if (l->stream)
        ry_engine.device->stream_destroy(l->stream, NULL);
    l->stream = NULL;
    l->word = NULL;
}
