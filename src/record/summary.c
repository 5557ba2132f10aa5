/* summary.c: see summary.h. */
#include "summary.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct ry_peak peak(const uint64_t *values, int n)
{
    struct ry_peak p = {.who = -1};
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += (double)values[i];
        if (values[i] > p.value) {
            p.value = values[i];
            p.who = i;
        }
    }
    p.over_mean = sum > 0 ? (double)p.value * n / sum : 0;
    return p;
}

static void sum_bytes(struct ry_summary *s)
{
    const struct ry_trace_comm *c = s->comm;
    for (int i = 0; i < c->nranks; i++) {
        for (int j = 0; j < c->nranks; j++) {
            uint64_t b = ry_trace_bytes(c, i, j);
            int from = c->node[i], to = c->node[j];
            s->bytes += b;
            if (s->nodes && from >= 0 && to >= 0)
                s->nodes[from * c->nnodes + to] += b;
            if (i == j) {
                s->self += b;
                continue;
            }
            s->sent[i] += b;
            s->received[j] += b;
            if (from < 0 || to < 0)
                s->unknown += b;
            else if (from == to)
                s->in_node += b;
            else
                s->cross_node += b;
        }
    }
    s->peak_sent = peak(s->sent, c->nranks);
    s->peak_received = peak(s->received, c->nranks);
}

static int sum_nodes(struct ry_summary *s)
{
    int n = s->comm->nnodes;
    s->node_out.who = s->node_in.who = -1;
    if (!s->nodes || n < 2)
        return 0;
    uint64_t *out = calloc(2 * (size_t)n, sizeof *out), *in = out ? out + n : NULL;
    if (!out)
        return -1;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            if (i != j) {
                out[i] += s->nodes[i * n + j];
                in[j] += s->nodes[i * n + j];
            }
    s->node_out = peak(out, n);
    s->node_in = peak(in, n);
    free(out);
    return 0;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int sum_times(struct ry_summary *s)
{
    const struct ry_trace_comm *c = s->comm;
    double *medians = malloc((size_t)c->nranks * sizeof *medians), gbs = 0;
    int matched = 0;
    if (!medians)
        return -1;
    s->longest = s->shortest = -1;
    for (int i = 0; i < c->nranks; i++) {
        const struct ry_trace_rank *r = c->ranks[i];
        if (!r || !r->times.n)
            continue;
        double m = ry_trace_quantile(&r->times, 0.5), p95 = ry_trace_quantile(&r->times, 0.95);
        medians[s->timed_ranks++] = m;
        if (s->longest < 0 || m > s->median_longest) {
            s->longest = i;
            s->median_longest = m;
        }
        if (s->shortest < 0 || m < s->median_shortest) {
            s->shortest = i;
            s->median_shortest = m;
        }
        s->p95 = p95 > s->p95 ? p95 : s->p95;
        if (r->times.matched_us > 0) {
            gbs += (double)r->times.cross_bytes / r->times.matched_us / 1e3;
            matched++;
        }
    }
    if (s->timed_ranks) {
        qsort(medians, (size_t)s->timed_ranks, sizeof *medians, by_value);
        s->median = medians[s->timed_ranks / 2];
    }
    s->cross_gbs = matched ? gbs / matched : 0;
    free(medians);
    return 0;
}

static void check_sides(struct ry_summary *s)
{
    const struct ry_trace_comm *c = s->comm;
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < c->nranks; i++) {
        const struct ry_trace_rank *r = c->ranks[i];
        if (!r)
            continue;
        s->exchanges = r->exchanges > s->exchanges ? r->exchanges : s->exchanges;
        least = r->exchanges < least ? r->exchanges : least;
        s->dropped += r->dropped;
        s->dropped_durations += r->dropped_durations;
    }
    s->same_exchanges = least == s->exchanges;
    s->differ_from = s->differ_to = -1;
    for (int i = 0; i < c->nranks; i++)
        for (int j = 0; j < c->nranks; j++) {
            if (!c->ranks[i] || !c->ranks[j])
                continue;
            s->pairs_checked++;
            uint64_t out = c->ranks[i]->sent[j], in = c->ranks[j]->received[i];
            if (out != in && !s->pairs_differ++) {
                s->differ_from = i;
                s->differ_to = j;
                s->differ_sent = out;
                s->differ_received = in;
            }
        }
}

static uint64_t counter(const struct ry_trace_comm *c, const char *name)
{
    json_int_t v = json_integer_value(json_object_get(c->counters, name));
    return v > 0 ? (uint64_t)v : 0;
}

static void sum_agreed(struct ry_summary *s)
{
    for (int i = 0; i < s->comm->nranks; i++) {
        const struct ry_trace_rank *r = s->comm->ranks[i];
        uint64_t all = 0;
        for (int k = 0; r && k < RY_TRACE_STRATEGIES; k++)
            all += r->by_strategy[k];
        if (all <= s->agreed)
            continue;
        s->agreed = all;
        s->verified = r->verified;
        memcpy(s->by_strategy, r->by_strategy, sizeof s->by_strategy);
    }
    s->verify_differs = counter(s->comm, "verify_differs");
    s->short_of_staging = counter(s->comm, "short_of_staging");
    s->over_ucx = counter(s->comm, "over_ucx");
    s->clocked_us = counter(s->comm, "clocked_us");
    s->beside_us = counter(s->comm, "beside_us");
}

/* Does another communicator with exchanges see its int64 all-gathers on this one? */
static const struct ry_trace_comm *counted_for(const struct ry_trace *t, const struct ry_trace_comm *c)
{
    for (int i = 0; i < t->ncomms; i++)
        if (t->comms[i] != c && t->comms[i]->gathers && !strcmp(t->comms[i]->gather_comm, c->id))
            return t->comms[i];
    return NULL;
}

static bool name_has(const struct ry_trace_comm *c, const char *word)
{
    return c->name && strcasestr(c->name, word);
}

static void infer(struct ry_summary *s, const struct ry_trace *t)
{
    const struct ry_trace_comm *c = s->comm, *other = NULL;
    uint64_t reduce = counter(c, "calls.allreduce"), scatter = counter(c, "calls.reducescatter"),
             gather = counter(c, "calls.allgather"), p2p = counter(c, "calls.send") + counter(c, "calls.recv"),
             bcast = counter(c, "calls.broadcast"),
             root = counter(c, "calls.reduce") + counter(c, "calls.gather") + counter(c, "calls.scatter"),
             plain = counter(c, "plain_groups");
#define SAY(k, ...) (snprintf(s->kind, sizeof s->kind, "%s", k), (void)snprintf(s->why, sizeof s->why, __VA_ARGS__))
    if (c->nranks == 1)
        SAY("single rank", "it has one rank");
    else if (s->exchanges && (c->gathers || name_has(c, "expert")))
        SAY("expert-parallel (all-to-all)", "%s",
            c->gathers ? "all-to-all after int64 all-gathers, as expert counts travel" : "all-to-all, and its name");
    else if (s->exchanges && reduce + scatter > 0)
        SAY("mixed (all-to-all and reductions)", "%llu reductions beside its all-to-all",
            (unsigned long long)(reduce + scatter));
    else if (s->exchanges)
        SAY("expert-parallel (all-to-all)", "all-to-all and no reductions");
    else if ((other = counted_for(t, c)) && reduce + scatter == 0)
        SAY("expert counts (int64 all-gather)", "its all-gathers come before the exchanges of %s", other->id);
    else if (!c->counted)
        SAY("unknown", "no rank wrote its counters: the job was killed or is still running");
    else if (scatter && scatter >= reduce)
        SAY(name_has(c, "tensor") ? "tensor-parallel (reduce-scatter)" : "sharded data-parallel (reduce-scatter)",
            "mostly reduce-scatter%s%s", gather ? " and all-gather" : "",
            other ? "; expert counts travel on it too" : "");
    else if (reduce && (reduce >= gather || other))
        SAY(name_has(c, "tensor") ? "tensor-parallel (all-reduce)" : "data-parallel (all-reduce)",
            "mostly all-reduce%s", other ? "; expert counts travel on it too" : "");
    else if (gather)
        SAY("all-gather", "mostly all-gather");
    else if (p2p)
        SAY("pipeline (point-to-point)", "sends and receives, %llu groups of them, none of all ranks",
            (unsigned long long)plain);
    else if (bcast || root)
        SAY(bcast >= root ? "broadcast" : "rooted collectives", "nothing but those");
    else
        SAY("unused", "no call was seen on it");
#undef SAY
}

int ry_summary_make(struct ry_summary *s, const struct ry_trace *trace, const struct ry_trace_comm *c,
                    struct ry_err *err)
{
    *s = (struct ry_summary){.comm = c};
    size_t n = (size_t)c->nranks;
    s->sent = calloc(n, sizeof *s->sent);
    s->received = calloc(n, sizeof *s->received);
    s->nodes = c->nnodes ? calloc((size_t)c->nnodes * (size_t)c->nnodes, sizeof *s->nodes) : NULL;
    if (!s->sent || !s->received || (c->nnodes && !s->nodes))
        goto no_memory;
    sum_bytes(s);
    if (sum_nodes(s) || sum_times(s))
        goto no_memory;
    check_sides(s);
    sum_agreed(s);
    infer(s, trace);
    return 0;
no_memory:
    ry_summary_free(s);
    return ry_fail(err, "no memory for the matrices of communicator %s (%d ranks)", c->id, c->nranks);
}

void ry_summary_free(struct ry_summary *s)
{
    free(s->sent);
    free(s->received);
    free(s->nodes);
    s->sent = s->received = s->nodes = NULL;
}
