/*
 * policy_learn.c: what the yardmaster learns from how long exchanges took, what it tries to find out, and its account of whether agreeing pays:
 * see policy.h, chooser.h.
 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/log.h"
#include "chooser.h"

/* Agreeing must pay all in all. Asked after RY_CHOOSER_FIRST engaged exchanges (a layer has up to 8), and, once it paid, so many. */
#define ACCOUNT 64
#define MOST_UNPAID 6     /* accounts in a row after which proposals do not become rarer any more */
#define SURE 0.3          /* of plain NCCL's time: with so much saved by all estimates, the pace need not be asked */
/* Agreeing that costs no more than this share of an exchange is worth it just to find out; less where rows are equal, */
#define CHEAP 0.1
#define CHEAP_EQUAL 0.02 /* since there every exchange that goes another way loses much */
#define TRIES 6           /* exchanges measured to find out about a strategy, of twice as many made */
#define CLOSE 1.5 /* where rows are equal, only what is estimated to come so close to the best is found out about */

/* ---- learning ---- */

/* Links that nobody measured: plain NCCL's time says how fast the NIC is. What was learned by the model before is of no use then. */
static bool fit_nic(struct ry_chooser *c, const struct ry_recent *k)
{
    if (k->load != RY_ALONE || ry_load_kind_of(&k->beside) != RY_ALONE ||
        !ry_fit_note(&c->fit, &c->config.model, k->busiest, k->slope, k->us, k->least))
        return false;
    ry_log(RY_LOG_PLAN, "communicator %s: links are guessed; by plain NCCL's exchanges of %llu KiB and up NICs have %.2f GB/s", c->name,
           (1ull << (c->fit.fitted - 1)) >> 10, c->config.model.link[RY_LINK_NIC].bytes_per_us / 1e3);
    for (int load = 0; load < RY_LOAD_KINDS; load++)
        for (int s = 0; s < RY_STRATEGIES; s++) {
            ry_cost_forget(&c->learned[load], (enum ry_strategy)s);
            memset(c->tried[load][s], 0, sizeof c->tried[load][s]);
        }
    for (int i = 0; i < RY_CHOOSER_RECENT; i++) /* estimated by the model as it was */
        c->recent[i].number = UINT64_MAX;
    return true;
}

/* Of an exchange that will not be told of any more. Not if it ran under another load than was thought (cost.h). */
static void learn_of(struct ry_chooser *c, const struct ry_recent *k)
{
    if (fit_nic(c, k))
        return;
    if (ry_load_kind_of(&k->beside) == k->load)
        ry_cost_learn(&c->learned[k->load], k->strategy, k->busiest, k->us, k->least);
    else
        c->counts.dropped++;
}

static void add_beside(struct ry_beside *sum, const struct ry_beside *b)
{
    sum->out += b->out;
    sum->in += b->in;
    sum->own_out += b->own_out;
    sum->own_in += b->own_in;
    sum->share = b->share > sum->share ? b->share : sum->share;
}

/*
 * How long exchanges took, as the ranks tell with later manifests. A rank that was early measures its waiting, too:
 * what counts is the least among those with much to do (cost.h).
 */
void ry_chooser_learn(struct ry_chooser *c)
{
    int n = c->config.map->nranks;
    double agreement = 0;
    for (int r = 0; r < n; r++) {
        const struct ry_side *s = &c->sides[r];
        if (s->messages_us > agreement)
            agreement = s->messages_us;
        for (int i = 0; i < RY_TOOK; i++) {
            const struct ry_took *took = &s->took[i];
            struct ry_recent *k = &c->recent[(took->number - 1) % RY_CHOOSER_RECENT];
            if (!took->number || k->number != took->number - 1)
                continue;
            k->reported++;
            add_beside(&k->beside, &took->beside);
            if (took->us > 0 && took->us < k->least && 2 * took->bytes >= k->busiest)
                k->least = took->us;
            if (k->reported == n)
                learn_of(c, k);
        }
    }
    if (agreement > 0)
        c->config.model.agreement_us = agreement;
}

void ry_chooser_remember(struct ry_chooser *c, uint64_t number, const struct ry_choice *choice)
{
    struct ry_recent *k = &c->recent[number % RY_CHOOSER_RECENT];
    if (k->reported < c->config.map->nranks && 2 * k->reported > c->config.map->nranks) /* the others never will */
        learn_of(c, k);
    *k =
        (struct ry_recent){.number = number,
                        .busiest = ry_cost_busiest(c->config.map, c->loads),
                        .strategy = choice->strategy,
                        .us = choice->model_us[choice->strategy] - c->config.model.agreement_us -
                              (choice->strategy == RY_DEDUP ? choice->search_us : 0), /* over before the clock starts */
                        .load = c->load,
                        .least = INFINITY};
}

void ry_chooser_remember_plain(struct ry_chooser *c, uint64_t number)
{
    const struct ry_cost_model *m = &c->config.model;
    struct ry_choice plain = {.strategy = RY_DIRECT};
    plain.model_us[RY_DIRECT] = ry_cost_estimate(m, c->config.map, c->loads, NULL, RY_DIRECT);
    ry_chooser_remember(c, number, &plain);
    struct ry_recent *k = &c->recent[number % RY_CHOOSER_RECENT];
    if (!m->measured)
        k->slope = ry_cost_nic_slope(m, c->config.map, c->loads);
}

/* ---- finding out ---- */

/*
 * The model knows bytes and messages, not how flows get along on a link. Where agreeing costs little, each
 * strategy is therefore tried a few times in every size class, once, and measured: what that may take longer is little,
 * and soon over; what it may find is there for the whole job. Where rows are equal much is at
 * stake, and what is far from the best is left out, but for a few of direct: that the model says so must not be all
 * there is against it.
 */
int ry_chooser_class(const struct ry_chooser *c)
{
    uint64_t busiest = ry_cost_busiest(c->config.map, c->loads);
    return busiest ? 63 - __builtin_clzll(busiest) : 0;
}

static uint32_t wanted(const struct ry_chooser *c, const struct ry_choice *choice, int strategy)
{
    const struct ry_cluster *map = c->config.map;
    double best = INFINITY;
    for (int s = 0; s < RY_STRATEGIES; s++)
        best = choice->us[s] < best ? choice->us[s] : best;
    if (!isfinite(choice->us[strategy]) || ((strategy == RY_HIERARCHICAL || strategy == RY_BALANCED) && map->nnodes == map->nranks))
        return 0;
    if ((!isfinite(choice->us[RY_DEDUP]) && strategy != RY_BALANCED) || choice->us[strategy] <= CLOSE * best)
        return TRIES;
    return strategy == RY_DIRECT ? RY_COST_ENOUGH : 0;
}

/* The strategy to be tried next: the one made least often, then the one measured least; -1: all are known. */
int ry_chooser_to_find_out(const struct ry_chooser *c, const struct ry_choice *choice, int class)
{
    double plain = choice->us[RY_DIRECT] - c->config.model.agreement_us;
    bool equal = isfinite(choice->us[RY_DEDUP]), begun = false;
    double cheap = equal ? CHEAP_EQUAL : CHEAP;
    int make = -1, measure = -1, several = 0;
    for (int s = 0; s < RY_STRATEGIES && !equal; s++) /* what agreeing is said to cost changes while it is learned */
        begun |= c->tried[c->load][s][class] > 0;
    if (c->config.map->nnodes < 2 || !(begun || c->config.model.agreement_us <= cheap * plain))
        return -1;
    for (int s = 0; s < RY_STRATEGIES; s++) {
        uint32_t enough = wanted(c, choice, s), made = c->tried[c->load][s][class],
                 measured = c->learned[c->load].at[s][class].samples;
        several += enough > 0;
        if (measured >= enough)
            continue;
        if (made < enough && (make < 0 || made < c->tried[c->load][make][class]))
            make = s;
        if (made < 2 * enough && (measure < 0 || measured < c->learned[c->load].at[measure][class].samples))
            measure = s;
    }
    if (several < 2)
        return -1;
    return make >= 0 ? make : measure; /* durations come late: take turns, rather than wait for the last one's */
}

void ry_chooser_open_account(struct ry_chooser *c, int exchanges)
{
    c->saved_us = c->accounted_us = 0;
    c->accounted = 0;
    c->account = exchanges;
}

bool ry_chooser_find_out(struct ry_chooser *c, struct ry_choice *choice)
{
    int class = ry_chooser_class(c), strategy = ry_chooser_to_find_out(c, choice, class), all = 0;
    if (strategy < 0)
        return false;
    choice->strategy = (enum ry_strategy)strategy;
    c->tried[c->load][strategy][class]++;
    for (int s = 0; s < RY_STRATEGIES; s++)
        all += c->tried[c->load][s][class];
    snprintf(choice->why, sizeof choice->why, "to find out: try %d at exchanges of %llu KiB and up", all,
             (1ull << class) >> 10);
    ry_chooser_open_account(c, RY_CHOOSER_FIRST); /* what was estimated before is not what is known after */
    if (c->config.pace)
        ry_pace_changed(c->config.pace);
    return true;
}

/* What the model expects to be gained may be lost between exchanges (pace.h). False: it is; *rest: to be seen, after so many. */
bool ry_chooser_keeps_pace(struct ry_chooser *c, uint64_t number, bool engaged, unsigned *rest)
{
    double ratio;
    *rest = 0;
    if (!c->config.pace || c->saved_us > SURE * c->accounted_us)
        return true;
    enum ry_pace_advice advice = ry_pace_ask(c->config.pace, number, engaged, &ratio, rest);
    if (ratio > 0)
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": the time from one exchange to the next is %.1f %% of what it is "
               "without agreeing%s", c->name, number, 100 * ratio, advice == RY_PACE_LEAVE ? ": not enough is gained" : "");
    if (advice == RY_PACE_WATCH)
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": the next %u pass by, to see how fast plain NCCL goes", c->name,
               number, *rest);
    return advice != RY_PACE_LEAVE;
}

void ry_chooser_did_it_pay(struct ry_chooser *c, bool pays)
{
    c->unpaid = pays ? 0 : c->unpaid < MOST_UNPAID ? c->unpaid + 1 : c->unpaid;
    c->skip = pays ? 0 : (1 << c->unpaid) - 2;
}

/*
 * Does agreeing pay, all in all? Asked now and then, since exchanges of one layer differ; soon after it began, or after
 * something was found out. Where it did not pay again and again, proposals are made less and less often. Returns how many
 * exchanges are to pass by before it is asked again; 0: it pays.
 */
unsigned ry_chooser_rest_after(struct ry_chooser *c, uint64_t number, const struct ry_choice *choice)
{
    double plain = choice->us[RY_DIRECT] - c->config.model.agreement_us;
    c->accounted_us += plain;
    c->saved_us += plain - choice->us[choice->strategy];
    if (choice->strategy != RY_DEDUP)
        c->saved_us -= choice->search_us; /* looked for nothing */
    if (++c->accounted < c->account)
        return 0;
    unsigned watched = 0;
    bool pays = c->saved_us > 0 && ry_chooser_keeps_pace(c, number, true, &watched);
    ry_chooser_did_it_pay(c, pays);
    ry_chooser_open_account(c, ACCOUNT);
    return watched ? watched : !pays;
}
