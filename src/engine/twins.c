/* twins.c: see twins.h. */
#include "twins.h"

#include <inttypes.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xxhash.h>

#include "base/clock.h"
#include "control/agree_wire.h"
#include "engine.h"
#include "twin_find.h"
#include "twin_policy.h"

#define MOST_RANKS 1024      /* of all twins: the yardmaster holds a matrix of them */
#define HOLD_BIT 2u          /* of the communicator's `hold`; its own agreement has the lowest */
#define PATIENCE_SHARE 8     /* how much less patience there is with twins than with ranks of one's own, */
#define MOST_PATIENCE 5.0    /* and never more seconds */
#define MOST_DIGEST_WAIT 1.0 /* seconds */
#define MOST_DIGEST_US 50 /* more is not the digest */
#define SPIN_NS 2000000u
#define GROUPS 16 /* that are made, at most */
#define WINDOW 4  /* looks for which a group has the same line */

/* The twins as they were found, all ranks numbered through. */
struct group {
    int twins, twin, each, rank;
    struct ry_cluster *map;
    struct ry_talk *talk;
    struct ry_twin_chooser *chooser; /* on the yardmaster: rank 0 of the first twin */
    struct ry_node_comm *comm;       /* of the ranks at this position */
    uint64_t *send, *recv;           /* [ranks of all], bytes */
    uint32_t *sent, *received;
    struct ry_nccl_id id;
    bool has_id;
};

struct ry_twins {
    struct comm *c;
    struct reissue *r;
    char *address;
    size_t address_size;
    struct ry_twin_card *card;
    struct ry_twin_found *found,
        *next; /* whom it is known to be one of; who were there at the latest look, if others */
    bool off;
    pthread_mutex_t lock; /* guards `group` against ry_twins_leave() */
    struct group *group;  /* NULL: no twin is known */
    int made;
    uint64_t window;                      /* of the latest */
    uint64_t look_at;                     /* exchange at which it is looked who is there */
    bool engaged;                         /* it has been: so it has on all of its ranks */
    struct ry_node_comm *retired[GROUPS]; /* of groups before: what was enqueued on them may not be over yet */
    int nretired;
    struct ry_digest digest; /* the latest that is known, */
    uint64_t digested;       /* of exchange digested - 1 */
    uint64_t digesting;      /* the same of the one under way; 0: none */
    uint64_t packed;         /* of the exchange at hand, if equal rows went once */
    struct ry_waits messages, digests;
    _Atomic uint64_t asked[64]; /* 1 + numbers of exchanges whose duration the yardmaster may want */
    _Atomic uint64_t went[64];  /* the latest not carried out together: number * 16 + how it was (enum ry_strategy) */
    _Atomic double us[64];      /* what those that were asked about took; 0: not known, or told */
    _Atomic double plain_us;
};

/* ---- the group ---- */

static void trouble(void *context, int peer, const char *why)
{
    const struct ry_twins *t = context;
    if (why != ry_line_left)
        ry_info("communicator %s: rank %d of it and its twins: %s: what they send is not shared from here", t->c->id,
                peer, why);
}

/* All but its communicator, which is the caller's to keep. */
static void free_group(struct group *g)
{
    if (!g)
        return;
    if (g->talk)
        ry_talk_close(g->talk);
    ry_twin_chooser_free(g->chooser);
    ry_cluster_free(g->map);
    free(g->send);
    free(g->recv);
    free(g->sent);
    free(g->received);
    free(g);
}

static void drop_group(struct ry_twins *t)
{
    pthread_mutex_lock(&t->lock);
    struct group *g = t->group;
    t->group = NULL;
    if (g && g->comm)
        t->retired[t->nretired++] = g->comm; /* there are no more groups than there is room */
    pthread_mutex_unlock(&t->lock);
    free_group(g);
}

/* The map of all twins: this communicator's, so many times over. What differs between twins, their GPUs, is of no
 * interest. */
static struct ry_cluster *map_of_all(const struct ry_cluster *map, int twins, struct ry_err *err)
{
    size_t each = (size_t)map->nranks, all = each * (size_t)twins;
    struct ry_seat *seats = malloc(all * sizeof *seats);
    if (!seats)
        return ry_fail(err, "out of memory"), NULL;
    for (size_t i = 0; i < all; i++) {
        seats[i] = map->seats[i % each];
        seats[i].rank = (int32_t)i;
    }
    struct ry_cluster *m = ry_cluster_build(seats, (int)all, err);
    free(seats);
    return m;
}

static struct group *make_group(struct ry_twins *t, uint64_t key, struct ry_err *err)
{
    const struct ry_twin_found *f = t->found;
    const struct reissue *r = t->r;
    struct group *g = calloc(1, sizeof *g);
    if (!g)
        return ry_fail(err, "out of memory"), NULL;
    g->twins = f->n;
    g->each = r->map->nranks;
    while (f->key[g->twin] != t->c->key)
        g->twin++;
    g->rank = g->twin * g->each + t->c->info.rank;
    size_t all = (size_t)(g->twins * g->each);
    if (!(g->map = map_of_all(r->map, g->twins, err)))
        goto failed;
    if (!(g->send = calloc(all, sizeof *g->send)) || !(g->recv = calloc(all, sizeof *g->recv)) ||
        !(g->sent = calloc(all, sizeof *g->sent)) || !(g->received = calloc(all, sizeof *g->received))) {
        ry_fail(err, "out of memory");
        goto failed;
    }
    g->comm = ry_node_comm_of_twins(&ry_engine.nccl, ry_engine.device, t->c->info.device, g->twins, g->twin, t->c->id);
    struct ry_policy policy = {0};
    if (g->rank == 0) {
        struct ry_twin_config config = {.map = g->map,
                                        .twins = g->twins,
                                        .forced = &ry_engine.forced,
                                        .verify = ry_engine.settings.verify,
                                        .chunks = ry_engine.chunks,
                                        .transport = &ry_engine.transport,
                                        .name = t->c->id};
        ry_reissue_model(&config.model, g->map);
        config.model.node_comm = true;
        if (!(g->chooser = ry_twin_chooser_new(&config, err)))
            goto failed;
        policy = ry_twin_chooser_policy(g->chooser);
    }
    double patience = ry_engine.settings.patience / PATIENCE_SHARE;
    struct ry_talk_config talk = {.control = ry_engine.control,
                                  .key = key,
                                  .nranks = (int)all,
                                  .rank = g->rank,
                                  .address = f->first,
                                  .address_size = f->first_size,
                                  .patience = patience < MOST_PATIENCE ? patience : MOST_PATIENCE,
                                  .policy = &policy,
                                  .hold = &t->c->face.hold,
                                  .hold_bit = HOLD_BIT,
                                  .trouble = trouble,
                                  .context = t};
    if (!(g->talk = ry_talk_open(&talk, err)))
        goto failed;
    return g;
failed:
    ry_node_comm_end(g->comm, false);
    free_group(g);
    return NULL;
}

static bool same(const struct ry_twin_found *a, const struct ry_twin_found *b)
{
    return a->n == b->n && !memcmp(a->key, b->key, (size_t)a->n * sizeof *a->key);
}

static void make(struct ry_twins *t, uint64_t window, bool others)
{
    const struct ry_twin_found *f = t->found;
    struct ry_err err;
    if (f->n < 2 || t->made == GROUPS)
        return;
    drop_group(t);
    t->made++;
    t->window = window;
    t->engaged = false;
    if (f->n > MOST_RANKS / t->r->map->nranks) {
        ry_info("communicator %s has %d twins: too many ranks to agree on anything", t->c->id, f->n - 1);
        return;
    }
    struct group *g = make_group(t, XXH64(f->key, (size_t)f->n * sizeof *f->key, window + 1), &err);
    if (g && others)
        ry_info("communicator %s is one of %d twins", t->c->id, g->twins);
    else if (!g)
        ry_info("communicator %s: nothing is shared with its twins: %s", t->c->id, err.msg);
    pthread_mutex_lock(&t->lock);
    t->group = g;
    pthread_mutex_unlock(&t->lock);
    if (g && atomic_load(&t->r->aborted))
        ry_talk_leave(g->talk);
}

/* How many looks come before that at exchange `number`. */
static uint64_t looks_before(uint64_t number)
{
    uint64_t looks = 0;
    for (uint64_t n = 0; n < number; looks++)
        n = ry_agree_next_seen(0, n + 1);
    return looks;
}

/*
 * Who is there now? Others are another group, with an agreement of its own, once they are the same at two looks in a
 * row: while communicators come and go, some see one already and some do not yet. Who sees them sooner or later must
 * all the same come to talk on one line, on which nobody has talked before: so a line is for a group and a few looks,
 * by their numbers; if it has not brought all together by then, everybody goes on to the next one, at the same
 * exchange.
 */
static void look(struct ry_twins *t, uint64_t number)
{
    struct ry_err err = {""};
    struct ry_twin_found *now = calloc(1, sizeof *now);
    uint64_t window = looks_before(number) / WINDOW;
    if (!t->card &&
        !(t->card = ry_twin_card_new(t->r->map, t->c->info.rank, t->c->key, t->address, t->address_size, &err))) {
        ry_info("communicator %s: twins of it are not looked for: %s", t->c->id, err.msg);
        t->off = true;
    }
    if (now && !t->off) {
        ry_twin_look(t->card, now);
        if (same(now, t->found)) {
            t->next->n = 0;
            if (!t->engaged && window != t->window)
                make(t, window, false);
        } else if (!same(now, t->next)) {
            *t->next = *now;
        } else {
            drop_group(t);
            *t->found = *now;
            t->next->n = 0;
            make(t, window, true);
        }
    }
    free(now);
}

/* ---- digests ---- */

static bool begin_digest(struct ry_twins *t, const struct ry_buffers *b, uint64_t number)
{
    struct ry_err err;
    bool captured = true; /* a digest answers once, a graph runs many times */
    t->digesting = 0;
    if (ry_engine.device->stream_capturing(b->stream, &captured, NULL) || captured)
        return false;
    if (ry_run_digest(t->r->runner, t->r->map, b, &err)) {
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": no digest: %s", t->c->id, number, err.msg);
        return false;
    }
    t->digesting = number + 1;
    return true;
}

/* True: nothing is under way any more. */
static bool pick_up_digest(struct ry_twins *t)
{
    bool failed;
    if (!t->digesting)
        return true;
    if (ry_run_digest_over(t->r->runner, &t->digest, &failed))
        t->digested = t->digesting;
    else if (!failed)
        return false;
    t->digesting = 0;
    return true;
}

/* What the job enqueued before may wait for other ranks: not for long, then (look.c says more). */
static bool wait_for_digest(struct ry_twins *t)
{
    double most = ry_engine.settings.patience / PATIENCE_SHARE / 2;
    uint64_t began = ry_now_ns(), limit = (uint64_t)((most < MOST_DIGEST_WAIT ? most : MOST_DIGEST_WAIT) * 1e9),
             waited = 0;
    while (!pick_up_digest(t) && !atomic_load(&t->r->aborted) && waited <= limit) {
        waited = ry_now_ns() - began;
        if (waited < SPIN_NS)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = 10000}, NULL);
    }
    return !t->digesting;
}

/* ---- an exchange ---- */

/* Another strategy was named. What counts is what the yardmaster says; this only spares the work. */
static bool forbidden(void)
{
    int forced = atomic_load(&ry_engine.forced);
    return forced >= 0 && forced != RY_REPLICA;
}

/* What a digest takes by itself. Most of a wait for one is, as a rule, for what the stream has before it, which the exchange would have
   waited for as well. */
static double digest_us(const struct ry_twins *t)
{
    return fmin(ry_waits_quantile(&t->digests, 0.1), MOST_DIGEST_US);
}

_Static_assert(RY_STRATEGIES <= 16, "of ry_twins.went");
static uint64_t how_it_went(struct ry_twins *t, uint64_t number)
{
    uint64_t went = atomic_load(&t->went[number % 64]);
    return went / 16 == number ? went % 16 : RY_REPLICA;
}

/* What became known since the last manifest: some at a time, since nobody looks for it at every exchange. */
static void tell_durations(struct ry_twins *t, struct ry_twin_took took[RY_TOOK])
{
    for (int i = 0, n = 0; i < 64 && n < RY_TOOK; i++) {
        double us = atomic_load(&t->us[i]);
        uint64_t number = atomic_load(&t->asked[i]);
        if (!(us > 0) || !number)
            continue;
        took[n++] = (struct ry_twin_took){number, how_it_went(t, number - 1), us};
        atomic_store(&t->us[i], 0);
    }
}

/* The yardmaster wants to know how long exchange `number` takes. */
static void expect(struct ry_twins *t, uint64_t number)
{
    atomic_store(&t->us[number % 64], 0);
    atomic_store(&t->asked[number % 64], number + 1);
}

static void fill_side(struct ry_twins *t, struct group *g, const struct ry_buffers *b, struct ry_twin_side *s)
{
    memset(s, 0, sizeof *s); /* compared as it lies in memory */
    ry_load_of(&s->load, t->r->map, b->rank, b->send_bytes, b->recv_bytes, NULL);
    s->packed = t->packed;
    s->digest = t->digest;
    s->digested = t->digested;
    s->node_comm = ry_node_comm_state(g->comm);
    s->cross = ry_across_state(t->r->across);
    s->cross_held = ry_across_held(t->r->across);
    tell_durations(t, s->took);
    s->plain_us = atomic_load(&t->plain_us);
    s->messages_us = ry_waits_quantile(&t->messages, 0.5) + digest_us(t);
    if (g->twin == 0 && g->has_id)
        memcpy(s->id, g->id.bytes, sizeof s->id);
}

static bool ask(struct ry_twins *t, struct group *g, const struct ry_exchange *x, const struct ry_buffers *b,
                uint64_t number, struct ry_verdict *verdict, struct ry_twins_wait *wait)
{
    struct ry_twin_side side;
    uint64_t began = ry_now_ns();
    bool able = x->held && !t->r->quit && !forbidden() && ry_run_safe(b) && begin_digest(t, b, number) &&
                wait_for_digest(t) && t->digested == number + 1;
    if (able)
        ry_waits_add(&t->digests, (double)(ry_now_ns() - began) / 1e3);
    if (g->twin == 0 && !g->has_id && ry_node_comm_state(g->comm) == RY_NODE_COULD)
        g->has_id = !ry_engine.nccl.get_unique_id(&g->id);
    fill_side(t, g, b, &side);
    size_t at = (size_t)(g->twin * g->each), n = (size_t)g->each;
    memcpy(g->send + at, b->send_bytes, n * sizeof *g->send);
    memcpy(g->recv + at, b->recv_bytes, n * sizeof *g->recv);
    if (x->sent) {
        memcpy(g->sent + at, x->sent, n * sizeof *g->sent);
        memcpy(g->received + at, x->received, n * sizeof *g->received);
    }
    struct ry_manifest m = {.not_me = !able,
                            .one_call = x->one_call,
                            .type = x->type,
                            .send = g->send,
                            .recv = g->recv,
                            .ordinal = x->ordinal,
                            .sent = x->sent ? g->sent : NULL,
                            .received = x->sent ? g->received : NULL,
                            .extra = &side,
                            .extra_bytes = sizeof side};
    if (!ry_talk_exchange(g->talk, number, &m, &side, sizeof side, verdict, &wait->waited_us))
        return false;
    wait->asked = true;
    wait->late_us = (double)verdict->waited_ns / 1e3;
    if (!verdict->last)
        ry_waits_add(&t->messages, wait->waited_us - wait->late_us);
    return true;
}

/* Nobody waits: what was last found out is told, and something new is found out. */
static void tell(struct ry_twins *t, struct group *g, const struct ry_buffers *b, uint64_t number)
{
    struct ry_twin_side side;
    struct ry_verdict none;
    double waited;
    bool idle = pick_up_digest(t);
    fill_side(t, g, b, &side);
    ry_talk_exchange(g->talk, number, NULL, &side, sizeof side, &none, &waited);
    if (idle && !forbidden())
        begin_digest(t, b, number);
}

static void plan(const struct group *g, const struct ry_twin_order *order, struct ry_twins_verdict *v)
{
    struct ry_plan_input in = {.cluster = g->map,
                               .rank = g->rank,
                               .strategy = RY_REPLICA,
                               .send = g->send,
                               .recv = g->recv,
                               .chunks = (int)order->chunks,
                               .replicas = g->twins};
    v->plan = ry_plan_build(&in, &v->why);
    if (v->plan)
        ry_run_localize(v->plan, g->twins);
}

/* Dense at first, then one in a thousand. */
static bool look_due(struct ry_twins *t, uint64_t number)
{
    if (t->look_at < number)
        t->look_at = ry_agree_next_seen(0, number);
    return t->look_at == number && !forbidden();
}

bool ry_twins_agree(struct ry_twins *t, const struct ry_exchange *x, const struct ry_buffers *b, uint64_t number,
                    uint64_t packed, struct ry_twins_verdict *v, struct ry_twins_wait *wait)
{
    struct ry_twin_order order = {0};
    struct ry_verdict verdict;
    *wait = (struct ry_twins_wait){0};
    *v = (struct ry_twins_verdict){0};
    if (!t || t->off)
        return false;
    t->packed = packed;
    if (look_due(t, number))
        look(t, number);
    struct group *g = t->group;
    if (!g || ry_talk_passes(g->talk, number))
        return false;
    if (!(atomic_load_explicit(&t->c->face.hold, memory_order_acquire) & HOLD_BIT)) {
        tell(t, g, b, number);
        expect(t, number); /* it passes */
        wait->timed = true;
        return false;
    }
    if (!ask(t, g, x, b, number, &verdict, wait))
        return false;
    if (verdict.extra_bytes == sizeof order) { /* all had a say in it */
        memcpy(&order, verdict.extra, sizeof order);
        t->engaged = true;
    }
    wait->timed = order.timed;
    ry_across_want(t->r->across, order.cross_wanted);
    expect(t, number);
    if (order.make && g->comm) {
        struct ry_nccl_id id;
        memcpy(id.bytes, order.id, sizeof id.bytes);
        ry_node_comm_start(g->comm, &id);
    }
    if (verdict.strategy != RY_REPLICA)
        return false;
    v->verify = verdict.verify;
    v->cross = order.cross;
    v->plain_us = order.plain_us;
    v->node = ry_node_comm_face(g->comm);
    plan(g, &order, v);
    return true;
}

bool ry_twins_pass(struct ry_twins *t, uint64_t number)
{
    return !t || t->off || (!look_due(t, number) && (!t->group || ry_talk_passes(t->group->talk, number)));
}

void ry_twins_went(struct ry_twins *t, uint64_t number, int strategy)
{
    if (t)
        atomic_store(&t->went[number % 64], number * 16 + (uint64_t)strategy);
}

void ry_twins_took(struct ry_twins *t, uint64_t number, double us)
{
    if (!t)
        return;
    if (how_it_went(t, number) == RY_DIRECT)
        atomic_store(&t->plain_us, us);
    if (atomic_load(&t->asked[number % 64]) == number + 1)
        atomic_store(&t->us[number % 64], us);
}

/* ---- coming and going ---- */

struct ry_twins *ry_twins_open(struct comm *c, struct reissue *r, const void *address, size_t size)
{
    if (r->map->nnodes < 2 || ry_later_on() || !ry_engine.settings.node_comm || !ry_run_digests(r->runner) ||
        !ry_engine.nccl.comm_init_rank || getenv("NCCL_COMM_ID")) /* with that all ids that NCCL makes are the same */
        return NULL;
    struct ry_twins *t = calloc(1, sizeof *t);
    if (!t || !(t->found = calloc(1, sizeof *t->found)) || !(t->next = calloc(1, sizeof *t->next)) ||
        !(t->address = malloc(size + 1))) {
        if (t) {
            free(t->next);
            free(t->found);
        }
        free(t);
        return NULL;
    }
    t->c = c;
    t->r = r;
    t->found->n = 1;
    t->found->key[0] = c->key;
    memcpy(t->address, address, size);
    t->address_size = size;
    pthread_mutex_init(&t->lock, NULL);
    return t;
}

void ry_twins_leave(struct ry_twins *t, bool abort)
{
    if (!t)
        return;
    pthread_mutex_lock(&t->lock);
    if (t->group)
        ry_talk_leave(t->group->talk);
    if (t->group && abort)
        ry_node_comm_abort(t->group->comm);
    for (int i = 0; i < t->nretired && abort; i++)
        ry_node_comm_abort(t->retired[i]);
    pthread_mutex_unlock(&t->lock);
}

void ry_twins_stray(struct ry_twins *t)
{
    if (t && t->group)
        ry_talk_stray(t->group->talk);
}

void ry_twins_close(struct ry_twins *t, bool leak)
{
    if (!t)
        return;
    ry_twin_card_free(t->card);
    drop_group(t);
    for (int i = 0; i < t->nretired; i++)
        ry_node_comm_end(t->retired[i], leak);
    pthread_mutex_destroy(&t->lock);
    free(t->address);
    free(t->next);
    free(t->found);
    free(t);
}
