/* explain.c: ry_plan_explain(): one rank's plan in words. Owns the words; knows no strategy, only steps. */
#include <inttypes.h>
#include <string.h>

#include "plan.h"

#define SINGLY 8 /* so many steps of one kind get a line each; more are summed up */

struct text {
    char s[120];
};

/* Exact while short: people compare these with their counts. */
static struct text size(uint64_t bytes)
{
    static const char *const units[] = {"kB", "MB", "GB", "TB", "PB", "EB"};
    struct text t;
    double v = (double)bytes / 1000;
    int u = 0;
    if (bytes < 100000) {
        snprintf(t.s, sizeof t.s, "%" PRIu64 " B", bytes);
        return t;
    }
    for (; v >= 999.5; u++)
        v /= 1000;
    snprintf(t.s, sizeof t.s, "%.*f %s", v >= 99.95 ? 0 : v >= 9.995 ? 1 : 2, v, units[u]);
    return t;
}

enum link { ACROSS, IN_NODE, SELF };
static enum link link_of(const struct ry_plan *p, const struct ry_cluster *c, const struct ry_step *s)
{
    return !ry_is_transfer(s) || s->peer == p->rank ? SELF : c->node[s->peer] == c->node[p->rank] ? IN_NODE : ACROSS;
}

/* The step before `i` that wrote what lies at this offset of the staging memory; NULL: none. */
static const struct ry_step *origin(const struct ry_plan *p, int i, uint64_t offset)
{
    for (const struct ry_step *s = p->steps + i; s-- > p->steps;)
        if (s->kind != RY_STEP_SEND && s->to.place == RY_AT_STAGE && s->to.offset <= offset &&
            offset - s->to.offset < s->bytes)
            return s;
    return NULL;
}

/* Is what step `i` receives a packed message? Then it is written out later, or passed on to one that does. */
static bool is_packed(const struct ry_plan *p, int i)
{
    if (p->steps[i].repeats.row_bytes)
        return true;
    for (int k = i + 1; k < p->nsteps; k++)
        if (p->steps[k].kind == RY_STEP_EXPAND && p->steps[k].from.offset == p->steps[i].to.offset)
            return true;
    return false;
}

static struct text place(const struct ry_plan *p, int i, const struct ry_at *at)
{
    struct text t = {""};
    const struct ry_step *s = &p->steps[i], *from;
    if (p->strategy == RY_REPLICA) { /* all are shares of something */
        char offset[48] = "";
        if (at->offset)
            snprintf(offset, sizeof offset, "from byte %" PRIu64 " on", at->offset);
        if (at->place == RY_AT_RECV && at->peer != s->peer)
            snprintf(t.s, sizeof t.s, "%s%swhat rank %d sent", offset, *offset ? " of " : "", at->peer);
        else
            snprintf(t.s, sizeof t.s, "%s", offset);
        return t;
    }
    switch (at->place) {
    case RY_AT_SEND:
        if (p->strategy == RY_SUM && at->peer != s->peer)
            snprintf(t.s, sizeof t.s, "what goes to rank %d", at->peer);
        else if (at->offset || at->peer != s->peer)
            snprintf(t.s, sizeof t.s, "from the segment for rank %d on", at->peer);
        break;
    case RY_AT_RECV:
        if (at->offset || at->peer != s->peer)
            snprintf(t.s, sizeof t.s, "what rank %d sent", at->peer);
        break;
    case RY_AT_STAGE:
        from = s->kind == RY_STEP_SEND ? origin(p, i, at->offset) : NULL;
        if (s->kind == RY_STEP_RECV)
            snprintf(t.s, sizeof t.s, "%sinto staging at %" PRIu64,
                     !is_packed(p, i)        ? ""
                     : p->strategy == RY_SUM ? "sums, "
                                             : "packed, ",
                     at->offset);
        else if (from && from->kind == RY_STEP_SUM)
            snprintf(t.s, sizeof t.s, "sums from staging at %" PRIu64, at->offset);
        else if (from && from->kind == RY_STEP_PACK)
            snprintf(t.s, sizeof t.s, "%" PRIu64 " of %" PRIu64 " rows, packed in staging at %" PRIu64,
                     from->repeats.distinct, from->rows, at->offset);
        else if (from && (from->kind == RY_STEP_RECV || from->kind == RY_STEP_EXPAND))
            snprintf(t.s, sizeof t.s, "what rank %d sent, %sfrom staging at %" PRIu64, from->peer,
                     from->kind == RY_STEP_EXPAND           ? "written out, "
                     : is_packed(p, (int)(from - p->steps)) ? "packed, "
                                                            : "",
                     at->offset);
        else
            snprintf(t.s, sizeof t.s, "packed in staging at %" PRIu64, at->offset);
        break;
    }
    return t;
}

static void single(const struct ry_plan *p, const struct ry_cluster *c, int i, FILE *f)
{
    const struct ry_step *s = &p->steps[i];
    if (s->kind == RY_STEP_COPY) {
        static const char *const what[] = {"of what goes to rank", "of what came from rank", "of staging"};
        fprintf(f, "    copy %s %s", size(s->bytes).s, what[s->from.place]);
        if (s->from.peer >= 0)
            fprintf(f, " %d%s", s->from.peer, s->from.offset ? "," : "");
        if (s->from.offset || s->from.peer < 0)
            fprintf(f, " at %" PRIu64, s->from.offset);
        if (s->to.place == RY_AT_STAGE)
            fprintf(f, " into staging at %" PRIu64 "\n", s->to.offset);
        else
            fprintf(f, " into the segment from rank %d at %" PRIu64 "\n", s->to.peer, s->to.offset);
        return;
    }
    if (s->kind == RY_STEP_PACK) {
        fprintf(f, "    pack %" PRIu64 " of %" PRIu64 " rows of %s for node %d, %s, into staging at %" PRIu64 "\n",
                s->repeats.distinct, s->rows, size(s->repeats.row_bytes).s, s->peer, size(s->bytes).s, s->to.offset);
        return;
    }
    if (s->kind == RY_STEP_EXPAND) {
        fprintf(f, "    write out %" PRIu64 " of %" PRIu64 " rows that rank %d %s, %s, from staging at %" PRIu64,
                ry_rows_of(s->bytes, s->repeats.row_bytes), s->rows, s->peer,
                p->strategy == RY_SUM ? "added up" : "packed", size(s->bytes).s, s->from.offset);
        if (s->to.place == RY_AT_STAGE)
            fprintf(f, " into staging at %" PRIu64 "\n", s->to.offset);
        else if (s->to.peer != s->peer)
            fprintf(f, " into place of what rank %d sent\n", s->to.peer);
        else
            fputs(" into place\n", f);
        return;
    }
    if (s->kind == RY_STEP_SUM) {
        fprintf(f, "    add up %" PRIu64 " rows of %s for rank %d%s to %" PRIu64 ", %s, into staging at %" PRIu64 "\n",
                s->rows, size(s->repeats.row_bytes).s, s->peer,
                s->from.place == RY_AT_SEND ? ", all of them its own," : "", s->repeats.distinct, size(s->bytes).s,
                s->to.offset);
        return;
    }
    bool sends = s->kind == RY_STEP_SEND;
    fprintf(f, "    %s %s %s ", sends ? "send" : "receive", size(s->bytes).s, sends ? "to" : "from");
    switch (link_of(p, c, s)) {
    case SELF:
        fputs("itself", f);
        break;
    case IN_NODE:
        fprintf(f, "rank %d in the node", s->peer);
        break;
    case ACROSS:
        fprintf(f, "rank %d (node %d, rail %d)", s->peer, c->node[s->peer], c->local[s->peer]);
    }
    struct text where = place(p, i, sends ? &s->from : &s->to);
    fprintf(f, "%s%s\n", *where.s ? ": " : "", where.s);
}

/* Those steps among [from, to) that are of the same kind, link and place as step `first`. */
static bool like(const struct ry_plan *p, const struct ry_cluster *c, int first, int i)
{
    const struct ry_step *a = &p->steps[first], *b = &p->steps[i];
    return a->kind == b->kind && link_of(p, c, a) == link_of(p, c, b) &&
           (a->kind == RY_STEP_SEND || a->to.place == b->to.place) &&
           (a->kind == RY_STEP_RECV || a->from.place == b->from.place);
}

static void together(const struct ry_plan *p, const struct ry_cluster *c, int first, int to, int count, FILE *f)
{
    static const char *const links[] = {"in other nodes", "in the node", ""};
    const struct ry_step *s = &p->steps[first];
    enum link link = link_of(p, c, s);
    uint64_t total = 0, least = UINT64_MAX, most = 0;
    for (int i = first; i < to; i++)
        if (like(p, c, first, i)) {
            uint64_t bytes = p->steps[i].bytes;
            total += bytes;
            least = bytes < least ? bytes : least;
            most = bytes > most ? bytes : most;
        }
    if (s->kind == RY_STEP_COPY) {
        fprintf(f, "    copy %s in %d pieces%s%s", size(total).s, count,
                s->from.place == RY_AT_SEND ? " of the send buffer" : "",
                s->to.place == RY_AT_STAGE ? " into staging" : "");
    } else if (s->kind == RY_STEP_PACK) {
        fprintf(f, "    pack %s in %d messages for other nodes", size(total).s, count);
    } else if (s->kind == RY_STEP_EXPAND) {
        fprintf(f,
                p->strategy == RY_SUM ? "    write out %s in %d pieces of sums %s"
                                      : "    write out %s of %d packed messages %s",
                size(total).s, count, s->to.place == RY_AT_STAGE ? "into staging" : "into place");
    } else if (s->kind == RY_STEP_SUM) {
        fprintf(f, "    add up rows to %s in %d messages for ranks in other nodes", size(total).s, count);
    } else {
        bool sends = s->kind == RY_STEP_SEND;
        const struct ry_at *at = sends ? &s->from : &s->to;
        fprintf(f, "    %s %s in %d messages %s ", sends ? "send" : "receive", size(total).s, count,
                sends ? "to" : "from");
        if (link == SELF)
            fputs("itself", f);
        else
            fprintf(f, "ranks %s", links[link]);
        if (at->place == RY_AT_STAGE)
            fprintf(f, ", %s staging", sends ? "from" : "into");
    }
    if (least == most)
        fprintf(f, ", %s each", size(least).s);
    else
        fprintf(f, ", %s to %s each", size(least).s, size(most).s);
    /* Whom: each one once, the first few; some come several times. */
    int shown[SINGLY], n = 0;
    for (int i = first; link != SELF && i < to; i++) {
        int k = 0, peer = p->steps[i].peer;
        while (k < n && shown[k] != peer)
            k++;
        if (k < n || !like(p, c, first, i))
            continue;
        if (n == SINGLY) {
            fputs(", …", f);
            break;
        }
        fprintf(f, "%s%d", n ? ", " : ": ", peer);
        shown[n++] = peer;
    }
    fputc('\n', f);
}

/* Steps [from, to): no transfers, or one group, in which order means nothing. */
static void part(const struct ry_plan *p, const struct ry_cluster *c, int from, int to, FILE *f)
{
    for (int first = from; first < to; first++) {
        bool fresh = true;
        int count = 0;
        for (int i = from; i < first && fresh; i++)
            fresh = !like(p, c, i, first);
        for (int i = first; i < to && fresh; i++)
            count += like(p, c, first, i);
        if (fresh && count > SINGLY)
            together(p, c, first, to, count, f);
        for (int i = first; i < to && fresh && count <= SINGLY; i++)
            if (like(p, c, first, i))
                single(p, c, i, f);
    }
}

void ry_plan_explain(const struct ry_plan *p, const struct ry_cluster *c, FILE *f)
{
    int steps[RY_STEP_KINDS] = {0}, groups = 0;
    char rows[64] = "";
    for (int i = 0; i < p->nsteps; i++)
        steps[p->steps[i].kind]++;
    if (p->strategy == RY_SUM)
        snprintf(rows, sizeof rows, ", %d messages of sums, %d pieces written out", steps[RY_STEP_SUM],
                 steps[RY_STEP_EXPAND]);
    else if (steps[RY_STEP_PACK] || steps[RY_STEP_EXPAND])
        snprintf(rows, sizeof rows, ", %d messages packed, %d pieces written out", steps[RY_STEP_PACK],
                 steps[RY_STEP_EXPAND]);
    fprintf(f,
            "rank %d of %d (node %d, rail %d): %s, %d copies%s and %d transfers in %d group%s, %s of staging memory\n",
            p->rank, p->nranks, c->node[p->rank], c->local[p->rank], ry_strategy_name(p->strategy), steps[RY_STEP_COPY],
            rows, steps[RY_STEP_SEND] + steps[RY_STEP_RECV], p->ngroups, p->ngroups == 1 ? "" : "s",
            size(p->stage_bytes).s);
    for (int i = 0, end; i < p->nsteps; i = end) {
        bool transfer = ry_is_transfer(&p->steps[i]);
        for (end = i;
             end < p->nsteps && ry_is_transfer(&p->steps[end]) == transfer &&
             p->steps[end].group == p->steps[i].group &&
             (!p->beside || transfer || end == i || (end != ry_second(p) && p->steps[end].after == p->steps[i].after));)
            end++;
        for (; transfer && groups < p->steps[i].group; groups++)
            fprintf(f, "  group %d: nothing\n", groups);
        if (p->beside && i == ry_second(p))
            fprintf(f, "beside that, where the nodes have communicators of their own:\n");
        if (!transfer && p->beside && i >= ry_second(p) &&
            (i == ry_second(p) || p->steps[i - 1].after < p->steps[i].after))
            fprintf(f, "  after group %d:\n", p->steps[i].after);
        else if (!transfer)
            fprintf(f, "  %s:\n", groups ? "then" : "first");
        else
            fprintf(f, "  group %d%s:\n", groups, ry_inside(p->inside, groups) ? ", inside the node" : ""), groups++;
        part(p, c, i, end, f);
    }
    for (; groups < p->ngroups; groups++)
        fprintf(f, "  group %d: nothing\n", groups);
}
