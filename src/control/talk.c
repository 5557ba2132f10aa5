/* talk.c: see talk.h. */
#include "talk.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

/* How long a waiting thread drives the network by itself before it sleeps: a verdict usually comes in less, and being woken
   twice (the progress thread, then this one) costs more than most verdicts take. Where a process has few CPUs the thread would
   only keep them from those it waits for. */
#define SPIN_NS 2000000u
#define SPIN_NS_FEW_CPUS 20000u
#define FEW_CPUS 4

/* The first byte of every message: whom it is for, since rank 0 is both a rank and the yardmaster. */
enum { FOR_YARDMASTER = 'y', FOR_RANK = 'r' };

struct ry_talk {
    struct ry_talk_config config;
    pthread_mutex_t lock; /* guards the machines */
    pthread_cond_t decided;
    struct ry_agree *agree;
    struct ry_yard *yard; /* on rank 0 */
    struct ry_line *line;
    uint64_t spin_ns;
    void *address; /* the yardmaster's, a copy: a rank connects when it has something to say */
    bool leaving; /* what becomes of the others is of no interest any more: they may be gone before they hear of it */
    char *out; /* a message with its first byte */
    size_t out_size;
};

static int open_line(struct ry_talk *t, struct ry_err *err);

static void send_to(struct ry_talk *t, char whom, int to, const void *bytes, size_t size)
{
    if (size + 1 > t->out_size) {
        char *p = realloc(t->out, 2 * size + 256);
        if (!p)
            return; /* as if lost: the yardmaster's patience ends the wait */
        t->out = p;
        t->out_size = 2 * size + 256;
    }
    t->out[0] = whom;
    memcpy(t->out + 1, bytes, size);
    if (t->line || (!t->leaving && !open_line(t, NULL)))
        ry_line_send(t->line, to, t->out, size + 1);
}

static void rank_sends(void *context, int to, const void *bytes, size_t size)
{
    send_to(context, FOR_YARDMASTER, to, bytes, size);
}

static void yardmaster_sends(void *context, int to, const void *bytes, size_t size)
{
    send_to(context, FOR_RANK, to, bytes, size);
}

static void mirror(const struct ry_talk *t, bool hold)
{
    uint32_t bit = t->config.hold_bit ? t->config.hold_bit : 1, now = atomic_load_explicit(t->config.hold, memory_order_relaxed);
    if (hold && !(now & bit))
        atomic_fetch_or_explicit(t->config.hold, bit, memory_order_release);
    else if (!hold && (now & bit))
        atomic_fetch_and_explicit(t->config.hold, ~bit, memory_order_release);
}

/* After every call on a machine: what others look at. */
static void settle(struct ry_talk *t)
{
    if (t->yard)
        ry_line_wake_at(t->line, ry_yard_tick(t->yard, ry_now_ns()));
    mirror(t, ry_agree_hold(t->agree));
    pthread_cond_signal(&t->decided);
}

/* ---- what the line tells ---- */

static void message(void *context, int from, const void *bytes, size_t size)
{
    struct ry_talk *t = context;
    const char *p = bytes;
    struct ry_err err;
    int r = 0;
    pthread_mutex_lock(&t->lock);
    if (size && p[0] == FOR_YARDMASTER && t->yard)
        r = ry_yard_message(t->yard, ry_now_ns(), from, p + 1, size - 1, &err);
    else if (size && p[0] == FOR_RANK && from == 0)
        r = ry_agree_message(t->agree, p + 1, size - 1, &err);
    else
        r = ry_fail(&err, "a message of %zu bytes for nobody here", size);
    if (r && t->yard)
        ry_yard_lost(t->yard, ry_now_ns(), from);
    if (r) /* whatever it meant to say will not be said again */
        ry_agree_leave(t->agree);
    settle(t);
    pthread_mutex_unlock(&t->lock);
    if (r)
        t->config.trouble(t->config.context, from, err.msg);
}

static void lost(void *context, int peer, const char *why)
{
    struct ry_talk *t = context;
    pthread_mutex_lock(&t->lock);
    bool engaged = ry_agree_hold(t->agree); /* else nothing changes, and a process may well end before this one does */
    if (t->yard)
        ry_yard_lost(t->yard, ry_now_ns(), peer);
    else
        ry_agree_fail(t->agree, "the connection to the yardmaster is lost");
    settle(t);
    bool tell = engaged && !t->leaving;
    pthread_mutex_unlock(&t->lock);
    if (tell)
        t->config.trouble(t->config.context, peer, why);
}

static void timer(void *context, uint64_t now_ns)
{
    struct ry_talk *t = context;
    (void)now_ns;
    pthread_mutex_lock(&t->lock);
    settle(t);
    pthread_mutex_unlock(&t->lock);
}

/* ---- coming and going ---- */

/*
 * The yardmaster must be there to be talked to; the others connect when they first have something to say: communicators that do
 * few exchanges, or none that could gain, make no connections, and have none to take down.
 */
static int open_line(struct ry_talk *t, struct ry_err *err)
{
    struct ry_line_handlers handlers = {t, message, lost, timer};
    const struct ry_talk_config *c = &t->config;
    t->line = ry_line_open(c->control, c->key, c->nranks, c->rank, t->address, c->address_size, &handlers, err);
    return t->line ? 0 : -1;
}

static void free_talk(struct ry_talk *t)
{
    free(t->address);
    ry_agree_free(t->agree);
    ry_yard_free(t->yard);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->decided);
    free(t->out);
    free(t);
}

struct ry_talk *ry_talk_open(const struct ry_talk_config *config, struct ry_err *err)
{
    struct ry_talk *t = calloc(1, sizeof *t);
    if (!t)
        return ry_fail(err, "out of memory"), NULL;
    cpu_set_t cpus;
    t->config = *config;
    if (config->address && config->address_size && (t->address = malloc(config->address_size)))
        memcpy(t->address, config->address, config->address_size);
    t->spin_ns = !sched_getaffinity(0, sizeof cpus, &cpus) && CPU_COUNT(&cpus) < FEW_CPUS ? SPIN_NS_FEW_CPUS : SPIN_NS;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->decided, NULL);
    t->agree = ry_agree_new(config->nranks, config->rank, 0, &(struct ry_agree_port){t, rank_sends});
    if (config->rank == 0)
        t->yard = ry_yard_new(&(struct ry_yard_config){.nranks = config->nranks,
                                                       .engage_after = 4,
                                                       .patience_ns = (uint64_t)(config->patience * 1e9)},
                              config->policy, &(struct ry_agree_port){t, yardmaster_sends});
    if (!t->agree || (config->rank == 0 && !t->yard)) {
        ry_fail(err, "out of memory");
        free_talk(t);
        return NULL;
    }
    pthread_mutex_lock(&t->lock); /* the first message may come before the line is known here */
    int failed = config->rank == 0 ? open_line(t, err) : 0;
    pthread_mutex_unlock(&t->lock);
    if (failed) {
        free_talk(t);
        return NULL;
    }
    return t;
}

void ry_talk_close(struct ry_talk *t)
{
    pthread_mutex_lock(&t->lock);
    t->leaving = true;
    ry_agree_leave(t->agree);
    if (t->yard) /* what the rank told it would come too late */
        ry_yard_lost(t->yard, ry_now_ns(), t->config.rank);
    mirror(t, false);
    pthread_mutex_unlock(&t->lock);
    if (t->line)
        ry_line_close_with_all(t->line);
    free_talk(t);
}

/* ---- exchanges ---- */

bool ry_talk_passes(struct ry_talk *t, uint64_t number)
{
    pthread_mutex_lock(&t->lock);
    bool passes = !ry_agree_hold(t->agree) && !ry_agree_wants_seen(t->agree, number);
    if (passes)
        ry_agree_exchange(t->agree, number, NULL, NULL, 0);
    pthread_mutex_unlock(&t->lock);
    return passes;
}

bool ry_talk_exchange(struct ry_talk *t, uint64_t number, const struct ry_manifest *m, const void *seen, size_t seen_bytes,
                      struct ry_verdict *verdict, double *waited_us)
{
    uint64_t began = ry_now_ns();
    pthread_mutex_lock(&t->lock);
    enum ry_way way = ry_agree_exchange(t->agree, number, m, seen, seen_bytes);
    settle(t);
    bool there = way == RY_WAIT_VERDICT && ry_agree_verdict(t->agree, verdict), driving = true;
    while (way == RY_WAIT_VERDICT && !there) {
        if (!driving) {
            pthread_cond_wait(&t->decided, &t->lock);
        } else {
            driving = ry_now_ns() - began < t->spin_ns;
            pthread_mutex_unlock(&t->lock);
            if (driving)
                ry_control_poll(t->config.control);
            else
                ry_control_rest(t->config.control);
            pthread_mutex_lock(&t->lock);
        }
        there = ry_agree_verdict(t->agree, verdict);
    }
    pthread_mutex_unlock(&t->lock);
    *waited_us = (double)(ry_now_ns() - began) / 1e3;
    return there;
}

void ry_talk_stray(struct ry_talk *t)
{
    pthread_mutex_lock(&t->lock);
    ry_agree_stray(t->agree);
    settle(t);
    pthread_mutex_unlock(&t->lock);
}

void ry_talk_leave(struct ry_talk *t)
{
    pthread_mutex_lock(&t->lock);
    t->leaving = true;
    ry_agree_leave(t->agree);
    settle(t);
    pthread_mutex_unlock(&t->lock);
}
