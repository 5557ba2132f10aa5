/* policy.c: see policy.h; of the same, policy_learn.c and policy_wire.c. */
#include "chooser.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "ucx/carrier.h"

#define MARGIN 0.05       /* a strategy must promise as much over direct */
#define NODE_COMM_AFTER 8 /* verdicts to relay: for a few, making communicators of the nodes' ranks is too much, */
#define NODE_COMM_PROMISING 1 /* unless by the model relaying is faster than direct, once they are there */

static void see_load(struct ry_chooser *c)
{
    c->beside = ry_cost_beside(c->config.map, c->loads);
    c->load = ry_load_kind_of(&c->beside);
}

/* For logs. */
static const char *beside_text(const struct ry_chooser *c, char text[96])
{
    uint64_t bytes = c->beside.out > c->beside.in ? c->beside.out : c->beside.in;
    text[0] = 0;
    if (bytes)
        snprintf(text, 96, ", beside %.2f MB of other communicators (a byte takes the NICs %.2f times as long)", (double)bytes / 1e6,
                 1 + ry_beside_more(&c->beside));
    return text;
}

/* Do all ranks have a communicator of their node's ranks, or could have one? Then estimates are made with it. */
static void see_node_comms(struct ry_chooser *c)
{
    c->config.model.node_comm = true;
    for (int r = 0; r < c->config.map->nranks; r++)
        c->config.model.node_comm &= c->sides[r].node_comm != RY_NODE_CANNOT;
    c->config.model.chunks = c->config.chunks ? c->config.chunks : RY_CHUNKS;
}

/* `own`: the exchange that SEEN came with, rather than the one that it tells of. *plain: NCCL carries that out on all ranks. */
static bool get_seen(struct ry_chooser *c, const void *const *extra, const size_t *bytes, bool own, bool *plain)
{
    *plain = true;
    for (int r = 0; r < c->config.map->nranks; r++) {
        struct ry_seen seen;
        if (bytes[r] != sizeof seen)
            return false;
        memcpy(&seen, extra[r], sizeof seen);
        c->sides[r] = seen.side;
        *plain &= seen.plain != 0;
        c->loads[r] = own ? seen.own : seen.side.load;
    }
    see_node_comms(c);
    see_load(c);
    return true;
}

/*
 * Exchanges that come with SEEN are timed, and how long they took is told with the next: what plain NCCL takes is known before anything
 * is agreed on, and with it how far the model is off. A guess may be off by so much that nothing ever seems worth finding out.
 */
static bool learn_of_plain(struct ry_chooser *c, uint64_t number, const void *const *extra, const size_t *bytes)
{
    bool plain;
    if (!get_seen(c, extra, bytes, true, &plain))
        return false;
    ry_chooser_learn(c);
    if (plain)
        ry_chooser_remember_plain(c, number);
    return true;
}

/* No more distinct rows than rows, and no fewer later on. */
static bool possible(const struct ry_repeats *r, uint64_t rows)
{
    bool good = r->distinct <= rows && r->row_bytes >> RY_PARTS_AT == 0 && (r->parts <= 2 || r->parts == RY_CHUNKS);
    for (int p = 0; good && p < ry_parts(r); p++)
        good = ry_part_distinct(r, p) <= ry_part_distinct(r, p + 1);
    return good;
}

/*
 * What rank `from` found, against its row of the matrix: there are no more distinct rows than rows. What it packs is
 * not taken from what it says of its load. False: it cannot be.
 */
static bool check_found(struct ry_chooser *c, int from, const uint64_t *cells)
{
    const struct ry_cluster *map = c->config.map;
    struct ry_repeats *found = c->repeats + (size_t)from * (size_t)map->nnodes;
    struct ry_load *load = &c->loads[from];
    uint64_t row_bytes = c->sides[from].row_bytes, *rows = c->need,
             *bytes = c->spare; /* as scratch: nnodes <= nranks */
    memset(rows, 0, (size_t)map->nnodes * sizeof *rows);
    memset(bytes, 0, (size_t)map->nnodes * sizeof *bytes);
    found[map->node[from]] = (struct ry_repeats){0};
    for (int to = 0; to < map->nranks; to++) {
        rows[map->node[to]] += row_bytes ? ry_rows_of(cells[to], row_bytes) : 0;
        bytes[map->node[to]] += cells[to];
    }
    load->packed_out = 0;
    for (int n = 0; n < map->nnodes; n++) {
        if (n == map->node[from])
            continue;
        if (!possible(&found[n], rows[n]))
            return false;
        uint64_t crosses = ry_packs(found[n], rows[n], bytes[n]) ? ry_packed_bytes(found[n], rows[n]) : bytes[n];
        load->packed_out += crosses;
        c->packed_in[n] += crosses;
    }
    return true;
}

static bool get_sides(struct ry_chooser *c, const struct ry_agreed *x)
{
    const struct ry_cluster *map = c->config.map;
    size_t nodes = (size_t)map->nnodes;
    c->all_pack = true;
    c->looked = false;
    for (int r = 0; r < map->nranks; r++) {
        struct ry_side *side = &c->sides[r];
        struct ry_load *load = &c->loads[r];
        if (ry_side_unpack(side, c->repeats + (size_t)r * nodes, map->nnodes, x->extra[r], x->extra_bytes[r]))
            return false;
        *load = side->load;
        load->packed_out = load->cross_out;
        load->scanned = !side->row_bytes ? 0 : load->scanned < load->cross_out ? load->scanned : load->cross_out;
        c->looked |= side->row_bytes > 0;
        c->all_pack &= !side->cannot_pack;
    }
    see_node_comms(c);
    c->looked &= c->all_pack;
    for (int r = 0; !c->all_pack && r < map->nranks; r++)
        c->loads[r].scanned = 0;
    memset(c->packed_in, 0, nodes * sizeof *c->packed_in);
    for (int r = 0; c->looked && r < map->nranks; r++)
        if (!check_found(c, r, x->matrix + (size_t)r * (size_t)map->nranks))
            return false;
    return true;
}

/* What each rank passes on for others, and what comes to it across nodes then, from the matrix. */
static void find_relayed(struct ry_chooser *c, const uint64_t *matrix)
{
    const struct ry_cluster *map = c->config.map;
    int n = map->nranks;
    memset(c->relayed, 0, (size_t)n * sizeof *c->relayed);
    memset(c->arriving, 0, (size_t)n * sizeof *c->arriving);
    for (int from = 0; from < n; from++)
        for (int to = 0; to < n; to++) {
            if (map->node[from] == map->node[to])
                continue;
            int relay = ry_relay(map, from, map->node[to]);
            c->arriving[relay] += matrix[(size_t)from * (size_t)n + (size_t)to];
            if (relay != to) /* what is for the relay itself is not passed on */
                c->relayed[relay] += matrix[(size_t)from * (size_t)n + (size_t)to];
        }
}

/* What is told with the verdict besides the order. */
static bool has_slice(int strategy)
{
    return strategy != RY_DIRECT && strategy != RY_SUM; /* for its sum a rank remembers the slice of what it answers */
}

/* Everything that telling the ranks will need: once a verdict is being sent nothing may fail. */
static bool prepare(struct ry_chooser *c, enum ry_strategy strategy, const uint64_t *matrix)
{
    ry_balance_free(c->balance);
    c->balance = strategy == RY_BALANCED ? ry_balance_of(c->config.map, matrix, NULL) : NULL;
    if (strategy == RY_BALANCED && !c->balance)
        return false;
    for (int r = 0; has_slice(strategy) && r < c->config.map->nranks; r++) {
        struct ry_slice *s = &c->slices[strategy][r];
        if (!s->rows && ry_slice_init(s, c->config.map, r, strategy, NULL))
            return false;
        size_t bytes = ry_order_bytes(s);
        if (bytes <= c->order_size)
            continue;
        char *p = realloc(c->order, bytes);
        if (!p)
            return false;
        c->order = p;
        c->order_size = bytes;
    }
    return true;
}

/* ---- what carries it across nodes ---- */

static bool all_cross(const struct ry_chooser *c)
{
    bool all = true;
    for (int r = 0; r < c->config.map->nranks; r++)
        all &= c->sides[r].cross == RY_CROSS_HAS;
    return all;
}

uint64_t ry_cross_need(const struct ry_cluster *map, int rank, enum ry_strategy strategy, const uint64_t *matrix)
{
    int n = map->nranks, node = map->node[rank], size = map->node_size[node];
    uint64_t bytes = 0, messages = 2 * (unsigned)n;
    for (int from = 0; from < n; from++)
        for (int to = 0; to < n; to++) {
            if (map->node[from] == map->node[to])
                continue;
            if (strategy == RY_BALANCED ? map->node[from] == node || map->node[to] == node
                                        : from == rank || (map->node[to] == node && ry_relay(map, from, node) == rank))
                bytes += matrix[(size_t)from * (size_t)n + (size_t)to];
        }
    if (strategy == RY_BALANCED) { /* shares of what the node's ranks have together, evened out but for a little */
        bytes = bytes / (unsigned)size + bytes / 16;
        messages *= 4;
    }
    return ry_carrier_need(bytes, messages);
}

/*
 * Shall UCX carry what crosses nodes? Where it is to be the faster one, as measured: by some strategy, than NCCL by any but
 * direct, and by the margin if it is not so already. `matrix` may be NULL.
 */
static bool wants_ucx(struct ry_chooser *c, const struct ry_cost_matrix *matrix)
{
    const struct ry_cluster *map = c->config.map;
    struct ry_cost_model m = c->config.model;
    double best[2] = {INFINITY, INFINITY};
    int transport = c->config.transport ? atomic_load(c->config.transport) : RY_BY_NCCL;
    bool all = transport != RY_BY_NCCL;
    for (int r = 0; r < map->nranks; r++)
        all &= c->sides[r].cross != RY_CROSS_CANNOT;
    if (!all || transport == RY_BY_UCX)
        return all;
    if (!m.ucx.measured || !m.link[RY_LINK_NIC].measured)
        return false;
    for (int ucx = 0; ucx < 2; ucx++) {
        m.by_ucx = ucx;
        for (int s = RY_HIERARCHICAL; s < RY_SUM; s++)
            best[ucx] = fmin(best[ucx], ry_cost_estimate(&m, map, c->loads, matrix, (enum ry_strategy)s));
    }
    return best[1] < best[0] * (c->config.model.by_ucx ? 1 : 1 - MARGIN);
}

/* From the first exchange on that UCX carries, the same is true as when communicators of the nodes' ranks are first used. */
static void forget_plans(struct ry_chooser *c)
{
    if (c->config.pace)
        ry_pace_changed(c->config.pace);
    for (int s = RY_HIERARCHICAL; s < RY_STRATEGIES; s++) {
        for (int load = 0; load < RY_LOAD_KINDS; load++) {
            ry_cost_forget(&c->learned[load], (enum ry_strategy)s);
            memset(c->tried[load][s], 0, sizeof c->tried[load][s]);
        }
    }
    for (int i = 0; i < RY_CHOOSER_RECENT; i++)
        if (c->recent[i].strategy != RY_DIRECT) /* these will be told of, yet */
            c->recent[i] = (struct ry_recent){.number = UINT64_MAX};
}

/* Do all ranks hold the memory for it? */
static void order_cross(struct ry_chooser *c, const struct ry_choice *choice, const uint64_t *matrix)
{
    int n = c->config.map->nranks;
    enum ry_strategy s = choice->strategy;
    c->cross = false;
    memset(c->cross_need, 0, (size_t)n * sizeof *c->cross_need);
    if (!c->config.model.by_ucx || (s != RY_HIERARCHICAL && s != RY_BALANCED && s != RY_DEDUP) || !all_cross(c))
        return;
    c->cross = true;
    for (int r = 0; r < n; r++) {
        uint64_t need = c->sides[r].cross_held == UINT64_MAX ? 0 : ry_cross_need(c->config.map, r, s, matrix);
        if (need <= c->sides[r].cross_held)
            continue;
        c->cross = false;
        c->cross_need[r] = need <= c->config.staging_limit ? need : 0;
    }
    if (c->cross && !c->crossed) {
        c->crossed = true;
        forget_plans(c);
    }
}

/* ---- what the agreement asks ---- */

static bool worth(void *context, uint64_t number, const void *const *seen, const size_t *bytes)
{
    struct ry_chooser *c = context;
    if (atomic_load(c->config.forced) >= 0)
        /* direct, too: that is how the agreement's own price is measured. Replica is agreed on elsewhere: twins.h */
        return atomic_load(c->config.forced) != RY_REPLICA;
    bool plain_now;
    if (!learn_of_plain(c, number, seen, bytes) || !get_seen(c, seen, bytes, false, &plain_now))
        return false;
    struct ry_choice choice;
    c->config.model.by_ucx = wants_ucx(c, NULL);
    struct ry_cost_learned learned = c->learned[c->load]; /* asking is not choosing: nothing may be remembered of it */
    ry_cost_choose(&choice, &c->config.model, &learned, c->config.map, c->loads, NULL, MARGIN);
    double plain = choice.us[RY_DIRECT] - c->config.model.agreement_us;
    bool yes = choice.strategy != RY_DIRECT && choice.us[choice.strategy] < plain * (1 - MARGIN);
    bool ask = !yes && ry_chooser_to_find_out(c, &choice, ry_chooser_class(c)) >= 0, skip = yes && c->skip > 0;
    unsigned rest;
    c->skip -= skip;
    c->accounted_us = plain;
    c->saved_us = plain - choice.us[choice.strategy];
    if (yes && !skip && !ry_chooser_keeps_pace(c, number, false, &rest)) {
        ry_chooser_did_it_pay(c, false);
        skip = true;
    }
    ry_chooser_open_account(c, RY_CHOOSER_FIRST); /* nothing is engaged */
    char text[96];
    ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": %s (%s; plain NCCL %.0f us)%s", c->name, number,
           skip  ? "not worth agreeing on, since it did not pay lately"
           : yes ? "worth agreeing on"
           : ask ? "worth finding out"
                 : "not worth agreeing on",
           choice.why, plain, beside_text(c, text));
    return (yes && !skip) || ask;
}

/*
 * Staging memory: what each rank still needs for the strategy goes to c->need, nothing where that would be too much for
 * one of them: *never. True if nobody needs any more.
 */
static bool enough_staging(struct ry_chooser *c, enum ry_strategy strategy, const uint64_t *matrix,
                           struct ry_choice *choice, bool *never)
{
    int n = c->config.map->nranks;
    bool enough = true;
    *never = false;
    memset(c->need, 0, (size_t)n * sizeof *c->need);
    if (strategy == RY_DIRECT)
        return true;
    if (ry_plan_stage_all(c->config.map, strategy, matrix, c->looked ? c->repeats : NULL, c->need, c->spare, NULL)) {
        memset(c->need, 0, (size_t)n * sizeof *c->need);
        return snprintf(choice->why, sizeof choice->why, "out of memory for the verdict"), false;
    }
    for (int r = 0; r < n && !*never; r++) {
        uint64_t need = c->need[r] + c->sides[r].pack[strategy];
        *never = need > c->config.staging_limit || need < c->need[r];
        c->need[r] = need > c->sides[r].staging ? need : 0;
        enough &= !c->need[r];
        if (*never)
            snprintf(choice->why, sizeof choice->why,
                     "%s would need %" PRIu64 " bytes of staging memory on rank %d: more than RAILYARD_STAGING",
                     ry_strategy_name(strategy), need, r);
    }
    if (*never)
        memset(c->need, 0, (size_t)n * sizeof *c->need);
    else if (!enough)
        snprintf(choice->why, sizeof choice->why, "%s, once the ranks hold enough staging memory",
                 ry_strategy_name(strategy));
    return enough && !*never;
}

/* The choice that the ranks' staging memory allows; dedup and balanced take more than hierarchical, which may be next. */
static void fit_staging(struct ry_chooser *c, struct ry_choice *choice, const uint64_t *matrix, bool forced)
{
    bool never;
    if (enough_staging(c, choice->strategy, matrix, choice, &never))
        return;
    c->counts.short_of_staging++;
    bool next = never && !forced && (choice->strategy == RY_DEDUP || choice->strategy == RY_BALANCED) &&
                choice->us[RY_HIERARCHICAL] < choice->us[RY_DIRECT] * (1 - MARGIN) &&
                enough_staging(c, RY_HIERARCHICAL, matrix, choice, &never);
    choice->strategy = next ? RY_HIERARCHICAL : RY_DIRECT;
}

static bool all_node_comms(const struct ry_chooser *c, enum ry_node_state state)
{
    bool all = true;
    for (int r = 0; r < c->config.map->nranks; r++)
        all &= c->sides[r].node_comm == state;
    return all;
}

/* From the first exchange on that uses them, what strategies that relay took without them tells nothing any more. */
static void start_node_comms(struct ry_chooser *c)
{
    if (c->node_comm.used || !c->node_comm.asked || !all_node_comms(c, RY_NODE_HAS))
        return;
    c->node_comm.used = true;
    forget_plans(c);
}

/* Communicators of the nodes' ranks: asked for once, when all ranks could make one; used when all have one. */
static void order_node_comms(struct ry_chooser *c, const struct ry_choice *choice, bool last)
{
    const struct ry_cluster *map = c->config.map;
    double relaying = INFINITY;
    c->node_comm.order = RY_NODE_NOTHING;
    if (choice->strategy == RY_DIRECT || map->nnodes < 2 || map->nnodes == map->nranks)
        return;
    for (int s = RY_HIERARCHICAL; s < RY_STRATEGIES; s++)
        relaying = choice->model_us[s] < relaying ? choice->model_us[s] : relaying;
    bool promising = relaying < choice->model_us[RY_DIRECT] * (1 - MARGIN);
    if (c->node_comm.asked && all_node_comms(c, RY_NODE_HAS)) {
        c->node_comm.order = RY_NODE_USE;
    } else if (!c->node_comm.asked && all_node_comms(c, RY_NODE_COULD) &&
               ++c->node_comm.relayed > (promising ? NODE_COMM_PROMISING : NODE_COMM_AFTER) && !last) {
        c->node_comm.order = RY_NODE_MAKE;
        c->node_comm.asked = true;
    }
}

/*
 * A plan is in as many chunks as the messages have parts, which was decided before they were looked for. Once they were
 * to be in several they stay so: it costs little, and exchanges of a layer differ.
 */
static void order_chunks(struct ry_chooser *c, const struct ry_choice *choice)
{
    bool dedup = choice->strategy == RY_DEDUP;
    uint64_t parts = 0;
    if (c->config.chunks)
        c->parts = c->config.chunks;
    else if (dedup && c->node_comm.order == RY_NODE_USE && choice->chunks > c->parts)
        c->parts = choice->chunks;
    for (int r = 0; r < c->config.map->nranks; r++)
        if (c->sides[r].row_bytes)
            parts = !parts || parts == c->sides[r].parts ? c->sides[r].parts : 1;
    c->chunks = !dedup ? 0 : c->config.chunks || c->node_comm.order == RY_NODE_USE ? (int)parts : 1;
}

/*
 * May the exchange be summed, and is that the fastest? It is not tried to find out, nor learned of: the estimate is
 * that of the exchange it answers, which is. Under RAILYARD_STRATEGY=dedup it need not pay.
 */
static bool choose_sum(struct ry_chooser *c, const struct ry_agreed *x, struct ry_choice *choice, int forced)
{
    double us;
    const char *why =
        forced >= 0 && forced != RY_DEDUP ? "" : ry_returns_ask(&c->sums, c->sides, x->matrix, x->nranks, &us);
    if (why) {
        if (*why)
            ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": not summed: %s", c->name, x->number, why);
        return false;
    }
    us = ry_returns_estimate(&c->config.model, c->config.map, c->loads, us);
    for (int s = 0; s < RY_SUM; s++)
        if (forced < 0 && !(us < choice->us[s] * (s == RY_DIRECT ? 1 - MARGIN : 1)))
            return false;
    choice->us[RY_SUM] = us;
    choice->strategy = RY_SUM;
    choice->trial = false;
    snprintf(choice->why, sizeof choice->why,
             "sum %.0f us, direct %.0f us: rows of one token are added up in their node", us, choice->us[RY_DIRECT]);
    return true;
}

/* What its return would take if that is summed. */
static void note_dedup(struct ry_chooser *c, uint64_t number, const struct ry_choice *choice)
{
    ry_returns_went(&c->sums, number, choice->us[RY_DEDUP] - choice->search_us - c->config.model.agreement_us);
}

/* Every n-th reissued exchange, but for those that are meant to differ from plain NCCL. */
static bool verified(struct ry_chooser *c, enum ry_strategy strategy)
{
    if (strategy == RY_DIRECT || !c->config.verify || c->reissued++ % c->config.verify)
        return false;
    if (strategy == RY_SUM && !c->said_unverified)
        ry_info(
            "communicator %s: exchanges that are summed differ from plain NCCL, as RAILYARD_COMBINE allows: they are "
            "not verified",
            c->name);
    c->said_unverified |= strategy == RY_SUM;
    return strategy != RY_SUM;
}

static int choose(void *context, const struct ry_agreed *x, bool *verify, unsigned *rest)
{
    struct ry_chooser *c = context;
    struct ry_choice choice;
    if (!get_sides(c, x)) {
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": a manifest contradicts itself: direct, and no more",
               c->name, x->number);
        memset(c->need, 0, (size_t)c->config.map->nranks * sizeof *c->need);
        memset(c->cross_need, 0, (size_t)c->config.map->nranks * sizeof *c->cross_need);
        c->timed = c->cross = false;
        c->node_comm.order = RY_NODE_NOTHING;
        *rest = 1;
        return RY_DIRECT;
    }
    ry_chooser_learn(c);
    see_load(c);
    c->counts.beside += c->load == RY_BESIDE;
    start_node_comms(c);
    find_relayed(c, x->matrix);
    struct ry_cost_matrix matrix = {.relayed = c->relayed, .arriving = c->arriving, .packed_in = c->looked ? c->packed_in : NULL};
    c->config.model.by_ucx = wants_ucx(c, &matrix);
    ry_cost_choose(&choice, &c->config.model, &c->learned[c->load], c->config.map, c->loads, &matrix, MARGIN);
    int forced = atomic_load(c->config.forced);
    forced = forced == RY_REPLICA ? RY_DIRECT : forced; /* here nobody can do that alone */
    bool sum = choose_sum(c, x, &choice, forced), trial = !sum && forced < 0 && ry_chooser_find_out(c, &choice);
    c->timed = trial || choice.trial;
    if (forced >= 0 && !sum) {
        snprintf(choice.why, sizeof choice.why, "forced by RAILYARD_STRATEGY");
        /* a rank that looked would pack, whatever the others are told */
        choice.strategy = forced == RY_DEDUP && !c->all_pack ? RY_HIERARCHICAL : (enum ry_strategy)forced;
    }
    fit_staging(c, &choice, x->matrix, forced >= 0);
    if (!prepare(c, choice.strategy, x->matrix)) {
        snprintf(choice.why, sizeof choice.why, "out of memory for the verdict");
        choice.strategy = RY_DIRECT;
    }
    ry_chooser_remember(c, x->number, &choice);
    c->plain_us = choice.us[RY_DIRECT] - c->config.model.agreement_us;
    c->counts.chosen[choice.strategy]++;
    if (choice.strategy == RY_DEDUP)
        note_dedup(c, x->number, &choice);
    *rest = forced < 0 && !trial ? ry_chooser_rest_after(c, x->number, &choice) : 0;
    order_node_comms(c, &choice, *rest > 0);
    order_chunks(c, &choice);
    order_cross(c, &choice, x->matrix);
    *verify = verified(c, choice.strategy);
    char text[96];
    ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": %s%s%s (%s)%s%s%s", c->name, x->number,
           ry_strategy_name(choice.strategy), c->cross ? " over UCX" : "",
           c->chunks > 2   ? " in 4 chunks"
           : c->chunks > 1 ? " in 2 chunks"
                           : "",
           choice.why, beside_text(c, text), *verify ? ", verified" : "", *rest ? "; the next are not agreed on" : "");
    return (int)choice.strategy;
}

static const void *slice(void *context, const struct ry_agreed *x, int strategy, int rank, size_t *size)
{
    struct ry_chooser *c = context;
    const struct ry_slice *s = &c->slices[strategy][rank]; /* prepare()d; empty for direct */
    struct ry_order order = {.staging_wanted = c->need[rank],
                             .timed = c->timed,
                             .node_comm = c->node_comm.order,
                             .plain_us = c->plain_us,
                             .cross_wanted = c->cross_need[rank],
                             .cross = c->cross,
                             .chunks = (uint32_t)c->chunks,
                             .parts = (uint32_t)c->parts};
    size_t nnodes = (size_t)c->config.map->nnodes, node = (size_t)c->config.map->node[rank];
    *size = 0;
    if (strategy == RY_DIRECT && !order.staging_wanted && !order.timed)
        return NULL;
    memcpy(c->order, &order, sizeof order);
    uint64_t *cell = (uint64_t *)(c->order + sizeof order);
    for (int i = 0; i < s->nrows; i++)
        for (int j = 0; j < s->ncols; j++)
            *cell++ = x->matrix[(size_t)s->rows[i] * (size_t)x->nranks + (size_t)s->cols[j]];
    if (s->nwords)
        ry_balance_words(c->balance, c->config.map, (int)node, cell);
    uint64_t *width = cell;
    for (int i = 0; s->repeats && i < s->nrows; i++) {
        const struct ry_repeats *its = c->looked ? &c->repeats[(size_t)s->rows[i] * nnodes + node] : NULL;
        width[i] = its ? its->row_bytes | its->parts << RY_PARTS_AT : 0;
        ry_counts_put((char *)(width + s->nrows), i, its);
    }
    *size = ry_order_bytes(s);
    return c->order;
}

/* ---- coming and going ---- */

struct ry_chooser *ry_chooser_new(const struct ry_policy_config *config, struct ry_err *err)
{
    struct ry_chooser *c = calloc(1, sizeof *c);
    size_t n = (size_t)config->map->nranks, nodes = (size_t)config->map->nnodes;
    if (c) {
        ry_chooser_open_account(c, RY_CHOOSER_FIRST);
        c->config = *config;
        c->parts = 1;
        for (int i = 0; i < RY_LOAD_KINDS; i++)
            c->learned[i].other = &c->learned[RY_LOAD_KINDS - 1 - i];
        snprintf(c->name, sizeof c->name, "%s", config->name);
        for (int i = 0; i < RY_CHOOSER_RECENT; i++)
            c->recent[i].number = UINT64_MAX;
    }
    if (!c || !(c->loads = calloc(n, sizeof *c->loads)) || !(c->sides = calloc(n, sizeof *c->sides)) ||
        !(c->relayed = calloc(n, sizeof *c->relayed)) || !(c->need = calloc(n, sizeof *c->need)) ||
        !(c->spare = calloc(n, sizeof *c->spare)) || !(c->cross_need = calloc(n, sizeof *c->cross_need)) ||
        !(c->arriving = calloc(n, sizeof *c->arriving)) || !(c->repeats = calloc(n * nodes, sizeof *c->repeats)) ||
        !(c->packed_in = calloc(nodes, sizeof *c->packed_in)) ||
        !(c->order = malloc(c->order_size = sizeof(struct ry_order))))
        goto no_memory;
    for (int i = 0; i < RY_STRATEGIES; i++)
        if (!(c->slices[i] = calloc(n, sizeof *c->slices[i])))
            goto no_memory;
    return c;
no_memory:
    ry_fail(err, "out of memory for the choices of %d ranks", config->map->nranks);
    ry_chooser_free(c);
    return NULL;
}

void ry_chooser_free(struct ry_chooser *c)
{
    if (!c)
        return;
    for (int i = 0; i < RY_STRATEGIES; i++) {
        for (int r = 0; c->slices[i] && r < c->config.map->nranks; r++)
            ry_slice_free(&c->slices[i][r]);
        free(c->slices[i]);
    }
    free(c->loads);
    free(c->relayed);
    free(c->arriving);
    free(c->need);
    free(c->spare);
    free(c->cross_need);
    free(c->sides);
    free(c->repeats);
    free(c->packed_in);
    free(c->order);
    ry_balance_free(c->balance);
    free(c);
}

struct ry_policy ry_chooser_policy(struct ry_chooser *c)
{
    return (struct ry_policy){.context = c, .worth = worth, .choose = choose, .slice = slice};
}

void ry_chooser_counts(const struct ry_chooser *c, struct ry_chooser_counts *out)
{
    *out = c->counts;
}
