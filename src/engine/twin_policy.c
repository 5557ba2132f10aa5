/* twin_policy.c: see twin_policy.h. */
#include "twin_policy.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "fit.h"
#include "plan/cost_replica.h"
#include "ucx/carrier.h"

#define MARGIN 0.05        /* that it must promise */
#define CHEAP 0.05         /* agreeing that costs no more than this share of an exchange is worth it just to find out */
#define CLOSE 1.5          /* where each does better for itself than plain NCCL, replica is found out about only if it comes so close to that */
#define TRIES 6            /* exchanges measured each way before what was measured decides */
#define AGAIN 256          /* the way that is not chosen is tried again after so many */
#define UNEQUAL 8          /* exchanges in a row whose bytes differ, after which nobody is asked any more for a while */
#define UNPAID 16          /* the same for exchanges that did not pay */
#define MOST_SKIPS 6       /* proposals not made after that: up to 2^6 */
#define MOST_MAKING 100000 /* exchanges that the communicators may take to come about */
#define RECENT 64
#define CLASSES 64
#define FORGETS 1.02 /* by so much a measured ratio may rise with each new one */
#define PROMISE 32   /* exchanges measured each for itself in which no twin went as is best for it, after which none is expected to */

enum way { APART, TOGETHER, WAYS };

struct ry_twin_chooser {
    struct ry_twin_config config;
    char name[24];
    int n, each;
    struct ry_twin_side *sides; /* [n], of the exchange at hand */
    struct ry_load *loads;      /* [n] */
    struct ry_twin_order order;
    bool cross; /* UCX carries what crosses nodes */
    bool make, asked, never; /* communicators: to be made now; were; cannot */
    uint64_t making;
    int unequal, unpaid; /* in a row */
    int skips, skip;     /* times that it was given up; proposals not to be made */
    uint64_t together;   /* exchanges, for verify */
    struct size { /* of exchanges */
        struct { /* what they took over what the model says: RY_REPLICA, or as each twin went for itself */
            double ratio;
            uint64_t samples;
        } known[RY_STRATEGIES];
        uint64_t tried[WAYS], since[WAYS];
        uint64_t others[RY_STRATEGIES]; /* measured each for itself since one went so */
    } size[CLASSES];
    struct ry_fit fit;
    struct recent {
        uint64_t number;
        int class, way, reported;
        uint64_t as; /* enum ry_strategy; RY_STRATEGIES: ranks went different ways */
        double us[RY_STRATEGIES], least, slope; /* slope: ry_cost_nic_slope() */
        uint64_t busiest;
    } recent[RECENT];
};

static bool forced(const struct ry_twin_chooser *c)
{
    return atomic_load(c->config.forced) == RY_REPLICA;
}

static bool forbidden(const struct ry_twin_chooser *c)
{
    return atomic_load(c->config.forced) >= 0 && !forced(c);
}

static bool get_sides(struct ry_twin_chooser *c, const void *const *extra, const size_t *bytes)
{
    for (int r = 0; r < c->n; r++) {
        if (bytes[r] != sizeof *c->sides)
            return false;
        memcpy(&c->sides[r], extra[r], sizeof *c->sides);
        c->loads[r] = c->sides[r].load;
        if (c->sides[r].packed && c->sides[r].packed < c->loads[r].cross_out) {
            c->loads[r].packed_out = c->sides[r].packed;
            c->loads[r].scanned = c->loads[r].cross_out;
        }
    }
    return true;
}

/* Is what all twins' ranks at each position send the same? NULL, or who says otherwise. */
static const char *differ(const struct ry_twin_chooser *c, const uint64_t *matrix, char *text, size_t size)
{
    for (int r = 0; r < c->n; r++) {
        const struct ry_twin_side *mine = &c->sides[r], *its = &c->sides[r % c->each];
        if (!mine->digested || mine->digested != c->sides[0].digested)
            return "not all know what they send";
        const char *what = memcmp(&mine->digest, &its->digest, sizeof mine->digest) ? "other bytes" : NULL;
        if (matrix && memcmp(matrix + (size_t)r * (size_t)c->n + (size_t)(r / c->each * c->each),
                             matrix + (size_t)(r % c->each) * (size_t)c->n, (size_t)c->each * sizeof *matrix))
            what = "other counts";
        else if (!matrix && memcmp(&mine->load, &its->load, sizeof mine->load))
            what = "other counts";
        if (what)
            return snprintf(text, size, "rank %d of twin %d sends %s than that of twin 0", r % c->each, r / c->each,
                            what),
                   text;
    }
    return NULL;
}

/* ---- what it takes ---- */

struct estimate {
    int class, chunks;
    enum ry_strategy apart;         /* the best that a twin can do for itself */
    double us[WAYS];                /* all in all, corrected */
    double model_us[RY_STRATEGIES]; /* as the model says, what is over when the clock starts left out */
};

/* How wrong the model is about a strategy: as measured, or else as about plain NCCL, or replica: what is wrong with links is wrong for
   all. */
static double ratio_of(const struct size *k, enum ry_strategy s)
{
    const enum ry_strategy asked[] = {s, RY_DIRECT, RY_REPLICA};
    for (int i = 0; i < 3; i++)
        if (k->known[asked[i]].samples >= RY_COST_ENOUGH)
            return k->known[asked[i]].ratio;
    return 1;
}

/*
 * Apart, each twin does what is best for it; all at once, over the same NICs. It is known to do what it was measured to do; what is best
 * by the estimate it has yet to come to, on its own yardmaster's advice, and gets some time for; if it does not, it will not.
 */
static void estimate(struct ry_twin_chooser *c, struct estimate *e)
{
    struct ry_cost_model *m = &c->config.model;
    const struct ry_cluster *map = c->config.map;
    struct ry_choice all;
    ry_cost_choose(&all, m, NULL, map, c->loads, NULL, MARGIN);
    uint64_t busiest = ry_cost_busiest(map, c->loads);
    e->class = busiest ? 63 - __builtin_clzll(busiest) : 0;
    const struct size *k = &c->size[e->class];
    for (int s = 0; s < RY_STRATEGIES; s++)
        e->model_us[s] = all.model_us[s] - m->agreement_us - (s == RY_DEDUP ? all.search_us : 0);
    e->model_us[RY_REPLICA] = ry_cost_replica(m, map, c->config.twins, c->loads, &e->chunks) - m->agreement_us;
    e->us[TOGETHER] = e->model_us[RY_REPLICA] * ratio_of(k, RY_REPLICA) + m->agreement_us;
    e->apart = RY_DIRECT;
    e->us[APART] = e->model_us[RY_DIRECT] * ratio_of(k, RY_DIRECT);
    for (int s = RY_HIERARCHICAL; s < RY_SUM; s++) {
        bool relays = c->each > map->nnodes; /* several ranks of a twin on a node */
        if (!isfinite(e->model_us[s]) || (s != RY_DEDUP && !relays) || k->others[s] >= PROMISE)
            continue;
        double us = e->model_us[s] * ratio_of(k, (enum ry_strategy)s) + m->agreement_us + (s == RY_DEDUP ? all.search_us : 0);
        if (us < e->us[APART] * (1 - MARGIN))
            e->us[APART] = us, e->apart = (enum ry_strategy)s;
    }
    if (c->config.chunks)
        e->chunks = c->config.chunks;
}

static void note(struct ry_twin_chooser *c, const struct recent *k)
{
    if (k->as == RY_DIRECT && ry_fit_note(&c->fit, &c->config.model, k->busiest, k->slope, k->us[RY_DIRECT], k->least)) {
        memset(c->size, 0, sizeof c->size); /* that was by another model */
        for (int i = 0; i < RECENT; i++)
            c->recent[i].number = UINT64_MAX;
        return;
    }
    struct size *z = &c->size[k->class];
    for (int s = 0; s < RY_STRATEGIES && k->way == APART; s++)
        z->others[s] = s == (int)k->as ? 0 : z->others[s] + 1;
    if (k->as >= RY_STRATEGIES) /* each its own way: how long it took says nothing of any */
        return;
    double ratio = k->least / k->us[k->as];
    if (!(ratio > 0) || !isfinite(ratio))
        return;
    z->known[k->as].ratio = z->known[k->as].samples++ ? fmin(z->known[k->as].ratio * FORGETS, ratio) : ratio;
}

/* A rank that was early measures its waiting, too: the least of them counts. */
static void learn(struct ry_twin_chooser *c)
{
    double agreement = 0;
    for (int r = 0; r < c->n; r++) {
        const struct ry_twin_side *s = &c->sides[r];
        agreement = fmax(agreement, s->messages_us);
        for (int i = 0; i < RY_TOOK; i++) {
            const struct ry_twin_took *t = &s->took[i];
            struct recent *k = &c->recent[(t->number - 1) % RECENT];
            if (!t->number || k->number != t->number - 1 || !(t->us > 0))
                continue;
            uint64_t as = k->way == TOGETHER ? RY_REPLICA : t->as;
            k->least = fmin(k->least, t->us);
            k->as = !k->reported || k->as == as ? as : RY_STRATEGIES;
            if (++k->reported == c->n)
                note(c, k);
        }
    }
    if (agreement > 0)
        c->config.model.agreement_us = agreement;
}

static void remember(struct ry_twin_chooser *c, uint64_t number, const struct estimate *e, enum way way)
{
    struct recent *k = &c->recent[number % RECENT];
    *k = (struct recent){.number = number, .class = e->class, .way = way, .least = INFINITY};
    memcpy(k->us, e->model_us, sizeof k->us);
    k->busiest = ry_cost_busiest(c->config.map, c->loads);
    k->slope = way == APART && !c->config.model.measured ? ry_cost_nic_slope(&c->config.model, c->config.map, c->loads) : 0;
}

static void count(struct ry_twin_chooser *c, const struct estimate *e, enum way way)
{
    c->size[e->class].tried[way]++;
    c->size[e->class].since[way] = 0;
    c->size[e->class].since[!way]++;
}

/* Is it worth a try? Every exchange that goes by it where it is much slower loses much; once a few were measured that is known, and no guess. */
static bool promising(const struct ry_twin_chooser *c, const struct estimate *e)
{
    bool guess = e->apart == RY_DIRECT && c->size[e->class].known[RY_REPLICA].samples < RY_COST_ENOUGH;
    return isfinite(e->us[TOGETHER]) && (guess || e->us[TOGETHER] <= CLOSE * e->us[APART]);
}

/* The faster one; or, to find out, the one that is not known, or was not looked at for long. *trial: that is why. */
static enum way choose_way(struct ry_twin_chooser *c, const struct estimate *e, bool *trial)
{
    const struct size *k = &c->size[e->class];
    enum way best = e->us[TOGETHER] < e->us[APART] * (1 - MARGIN) ? TOGETHER : APART, other = best ? APART : TOGETHER;
    uint64_t samples[WAYS] = {[TOGETHER] = k->known[RY_REPLICA].samples, [APART] = k->known[e->apart].samples};
    bool comes_to_it = best == APART && (samples[APART] < TRIES || k->others[e->apart] > 0); /* unless the promise is broken */
    samples[APART] = samples[APART] > k->known[RY_DIRECT].samples ? samples[APART] : k->known[RY_DIRECT].samples;
    *trial = true;
    if (!isfinite(e->us[TOGETHER]))
        return *trial = false, APART;
    for (int w = 0; w < WAYS; w++)
        if (samples[w] < TRIES && k->tried[w] < 2 * TRIES && k->tried[w] <= k->tried[!w] && (w == APART || promising(c, e)))
            return (enum way)w;
    /* Some twins have come to it and some have not yet, or none: what may be best is not left before it was measured. */
    if (e->apart != RY_DIRECT && k->known[e->apart].samples < TRIES && k->tried[APART] < 2 * TRIES + PROMISE &&
        e->us[APART] <= CLOSE * e->us[TOGETHER])
        return APART;
    if (k->since[other] >= AGAIN && (other == APART || promising(c, e)))
        return other;
    *trial = best == TOGETHER ? samples[TOGETHER] < TRIES : comes_to_it && k->tried[APART] < 2 * TRIES + 2 * PROMISE;
    return best;
}

/* ---- what the agreement asks ---- */

/* Before anything was measured the model may be a guess: where agreeing is cheap it is tried. */
static bool to_find_out(const struct ry_twin_chooser *c, const struct estimate *e)
{
    double plain = INFINITY;
    for (int r = 0; r < c->n; r++)
        plain = fmin(plain, c->sides[r].plain_us);
    return promising(c, e) && c->config.model.agreement_us <= CHEAP * plain &&
           c->size[e->class].tried[TOGETHER] < TRIES;
}

static bool worth(void *context, uint64_t number, const void *const *seen, const size_t *bytes)
{
    struct ry_twin_chooser *c = context;
    char text[120];
    struct estimate e;
    if (c->never || forbidden(c) || !get_sides(c, seen, bytes))
        return false;
    if (forced(c))
        return true;
    learn(c);
    estimate(c, &e);
    remember(c, number, &e, APART); /* it passes, and is timed */
    const char *why = differ(c, NULL, text, sizeof text);
    if (!why) {
        bool faster = e.us[TOGETHER] < e.us[APART] * (1 - MARGIN);
        why = c->skip > 0 ? "it did not pay lately" : !faster && !to_find_out(c, &e) ? "it would not be faster" : NULL;
        c->skip -= c->skip > 0;
    }
    ry_log(RY_LOG_PLAN, "twins %s, exchange %" PRIu64 ": %s", c->name, number, why ? why : "worth agreeing on");
    return !why;
}

/* The communicators of the positions: have all ranks one? NULL; else why not. */
static const char *look_at_comms(struct ry_twin_chooser *c, bool *last)
{
    int n[RY_NODE_MAKING + 1] = {0};
    for (int r = 0; r < c->n; r++)
        n[c->sides[r].node_comm <= RY_NODE_MAKING ? c->sides[r].node_comm : RY_NODE_CANNOT]++;
    if (n[RY_NODE_HAS] == c->n)
        return NULL;
    c->make = n[RY_NODE_COULD] == c->n && !c->asked;
    if (c->make)
        return c->asked = true, "their ranks make communicators first";
    if (n[RY_NODE_CANNOT] || n[RY_NODE_COULD] || ++c->making > MOST_MAKING)
        return c->never = *last = true, "not all ranks have a communicator with their twins";
    return "not all ranks have their communicator yet";
}

static void give_up(struct ry_twin_chooser *c, bool *last)
{
    if (forced(c))
        return;
    *last = true;
    c->skip = 1 << c->skips;
    c->skips += c->skips < MOST_SKIPS;
    c->unequal = c->unpaid = 0;
}

uint64_t ry_twin_cross_need(const struct ry_load *l, int twins)
{
    uint64_t messages = (uint64_t)(l->cross_sends + l->cross_recvs) * RY_CHUNKS;
    return ry_carrier_need((l->cross_out + l->cross_in) / (unsigned)twins + 64 * messages, messages);
}

static uint64_t cross_need(const struct ry_twin_chooser *c, int r)
{
    return ry_twin_cross_need(&c->sides[r].load, c->config.twins);
}

/* Shall, and can, UCX carry what crosses nodes? */
static void order_cross(struct ry_twin_chooser *c)
{
    bool all = c->config.model.by_ucx;
    for (int r = 0; r < c->n; r++)
        all &= c->sides[r].cross == RY_CROSS_HAS;
    c->cross = all;
    for (int r = 0; all && r < c->n; r++)
        c->cross &= cross_need(c, r) <= c->sides[r].cross_held;
    c->order.cross = c->cross;
}

static bool wants_ucx(const struct ry_twin_chooser *c)
{
    const struct ry_cluster *map = c->config.map;
    struct ry_cost_model m = c->config.model;
    double us[2];
    int transport = c->config.transport ? atomic_load(c->config.transport) : RY_BY_NCCL;
    bool all = transport != RY_BY_NCCL;
    int chunks;
    for (int r = 0; r < c->n; r++)
        all &= c->sides[r].cross != RY_CROSS_CANNOT;
    if (!all || transport == RY_BY_UCX)
        return all;
    for (int ucx = 0; ucx < 2; ucx++) {
        m.by_ucx = ucx;
        us[ucx] = ry_cost_replica(&m, map, c->config.twins, c->loads, &chunks);
    }
    return m.ucx.measured && m.link[RY_LINK_NIC].measured && us[1] < us[0] * (c->config.model.by_ucx ? 1 : 1 - MARGIN);
}

/* NULL: by replica. */
static const char *decide(struct ry_twin_chooser *c, const struct ry_agreed *x, struct estimate *e, bool *last,
                          char *text, size_t size)
{
    bool trial = false;
    if (forbidden(c))
        return *last = true, "RAILYARD_STRATEGY says otherwise";
    const char *why = differ(c, x->matrix, text, size);
    if (why) {
        if (++c->unequal >= UNEQUAL)
            give_up(c, last);
        return why;
    }
    c->unequal = 0;
    if ((why = look_at_comms(c, last)))
        return why;
    c->config.model.by_ucx = wants_ucx(c);
    estimate(c, e);
    enum way way = forced(c) ? TOGETHER : choose_way(c, e, &trial);
    remember(c, x->number, e, way);
    count(c, e, way);
    c->order.timed = trial;
    c->order.chunks = (uint32_t)e->chunks;
    c->order.plain_us = e->us[APART];
    if (way == TOGETHER) {
        order_cross(c);
        if (e->us[TOGETHER] < e->us[APART])
            c->unpaid = c->skips = 0;
        return NULL;
    }
    if (!trial && ++c->unpaid >= UNPAID)
        give_up(c, last);
    snprintf(text, size, "by replica %.0f us, each for itself %.0f us, by %s%s", e->us[TOGETHER], e->us[APART], ry_strategy_name(e->apart),
             trial ? ": to find out" : "");
    return text;
}

static int choose(void *context, const struct ry_agreed *x, bool *verify, unsigned *rest)
{
    struct ry_twin_chooser *c = context;
    struct estimate e = {0};
    char text[160];
    bool last = false;
    c->order = (struct ry_twin_order){.chunks = 1};
    c->make = c->cross = false;
    if (!get_sides(c, x->extra, x->extra_bytes)) {
        ry_log(RY_LOG_PLAN, "twins %s, exchange %" PRIu64 ": a manifest contradicts itself", c->name, x->number);
        return *rest = 1, RY_DIRECT;
    }
    learn(c);
    const char *why = decide(c, x, &e, &last, text, sizeof text);
    *rest = last;
    if (!why && c->config.verify)
        *verify = c->together++ % c->config.verify == 0;
    if (why)
        ry_log(RY_LOG_PLAN, "twins %s, exchange %" PRIu64 ": each for itself: %s%s", c->name, x->number, why,
               last ? "; not asked any more" : "");
    else
        ry_log(RY_LOG_PLAN, "twins %s, exchange %" PRIu64 ": replica%s in %u chunks (%.0f us, each for itself %.0f us, by %s)%s%s",
               c->name, x->number, c->cross ? " over UCX" : "", c->order.chunks, e.us[TOGETHER], e.us[APART], ry_strategy_name(e.apart), c->order.timed ? ": to find out" : "",
               *verify ? ", verified" : "");
    return why ? RY_DIRECT : RY_REPLICA;
}

static const void *slice(void *context, const struct ry_agreed *x, int strategy, int rank, size_t *size)
{
    struct ry_twin_chooser *c = context;
    (void)x, (void)strategy;
    c->order.make = c->make;
    c->order.cross_wanted = c->config.model.by_ucx && !c->cross ? cross_need(c, rank) : 0;
    memset(c->order.id, 0, sizeof c->order.id);
    if (c->make)
        memcpy(c->order.id, c->sides[rank % c->each].id, sizeof c->order.id);
    *size = sizeof c->order;
    return &c->order;
}

/* ---- coming and going ---- */

struct ry_twin_chooser *ry_twin_chooser_new(const struct ry_twin_config *config, struct ry_err *err)
{
    struct ry_twin_chooser *c = calloc(1, sizeof *c);
    size_t n = (size_t)config->map->nranks;
    if (!c || !(c->sides = calloc(n, sizeof *c->sides)) || !(c->loads = calloc(n, sizeof *c->loads))) {
        ry_twin_chooser_free(c);
        return ry_fail(err, "out of memory for the choices of %zu ranks", n), NULL;
    }
    c->config = *config;
    c->n = config->map->nranks;
    c->each = c->n / config->twins;
    snprintf(c->name, sizeof c->name, "%s", config->name);
    for (int i = 0; i < RECENT; i++)
        c->recent[i].number = UINT64_MAX;
    return c;
}

void ry_twin_chooser_free(struct ry_twin_chooser *c)
{
    if (!c)
        return;
    free(c->sides);
    free(c->loads);
    free(c);
}

struct ry_policy ry_twin_chooser_policy(struct ry_twin_chooser *c)
{
    return (struct ry_policy){.context = c, .worth = worth, .choose = choose, .slice = slice};
}
