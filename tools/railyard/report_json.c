/* report_json.c: the report as JSON; its schema is in docs/trace-format.md, and additions keep the version. */
#include "record/lines.h"
#include "report.h"

static json_t *number(uint64_t v)
{
    return json_integer(v > INT64_MAX ? INT64_MAX : (json_int_t)v);
}

static json_t *text(const char *s)
{
    return ry_json_text(s, SIZE_MAX);
}

static json_t *peak(const struct ry_peak *p)
{
    if (p->who < 0)
        return json_null();
    return json_pack("{s:i,s:o,s:f}", "who", p->who, "bytes", number(p->value), "over_mean", p->over_mean);
}

static json_t *numbers(const uint64_t *v, int n)
{
    json_t *list = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(list, number(v[i]));
    return list;
}

static json_t *rank_matrix(const struct ry_trace_comm *c)
{
    json_t *rows = json_array();
    for (int i = 0; i < c->nranks; i++) {
        json_t *row = json_array();
        for (int j = 0; j < c->nranks; j++)
            json_array_append_new(row, number(ry_trace_bytes(c, i, j)));
        json_array_append_new(rows, row);
    }
    return rows;
}

static json_t *node_matrix(const struct ry_summary *s)
{
    json_t *rows = json_array();
    for (int i = 0; s->nodes && i < s->comm->nnodes; i++)
        json_array_append_new(rows, numbers(s->nodes + i * s->comm->nnodes, s->comm->nnodes));
    return rows;
}

static json_t *times(const struct ry_trace_times *t)
{
    if (!t->n)
        return json_null();
    return json_pack("{s:o,s:f,s:f,s:f,s:f,s:f}", "samples", number(t->n), "min_us", t->min_us, "median_us",
                     ry_trace_quantile(t, 0.5), "p95_us", ry_trace_quantile(t, 0.95), "max_us", t->max_us, "mean_us",
                     t->sum_us / (double)t->n);
}

static json_t *ranks(const struct ry_trace *t, const struct ry_trace_comm *c)
{
    json_t *list = json_array();
    for (int i = 0; i < c->nranks; i++) {
        const struct ry_trace_rank *r = c->ranks[i];
        if (!r) {
            json_array_append_new(list, json_pack("{s:i,s:i,s:b}", "rank", i, "node", c->node[i], "present", 0));
            continue;
        }
        json_array_append_new(list,
                              json_pack("{s:i,s:i,s:b,s:s,s:i,s:i,s:s,s:s,s:f,s:f,s:o,s:o,s:s,s:o}", "rank", i, "node",
                                        c->node[i], "present", 1, "host", r->host, "pid", t->processes[r->process].pid,
                                        "device", r->device, "gpu", r->gpu, "nic", r->nic, "nvlink_gbs", r->nvlink_gbs,
                                        "nic_gbs", r->nic_gbs, "exchanges", number(r->exchanges), "dropped",
                                        number(r->dropped), "end", r->how, "time", times(&r->times)));
    }
    return list;
}

static json_t *rows(const struct ry_trace_comm *c)
{
    json_t *list = json_array();
    for (int i = 0; i < c->nrows; i++)
        json_array_append_new(list, json_pack("{s:o,s:s,s:o}", "bytes", number(c->rows[i].bytes), "source",
                                              c->rows[i].source, "exchanges", number(c->rows[i].exchanges)));
    return list;
}

static json_t *types(const struct ry_trace_comm *c)
{
    json_t *map = json_object();
    for (int i = 0; i < c->ntypes; i++)
        json_object_set_new(map, c->types[i].name, number(c->types[i].exchanges));
    return map;
}

static json_t *hosts(const struct ry_trace_comm *c)
{
    json_t *list = json_array();
    for (int i = 0; i < c->nnodes; i++)
        json_array_append_new(list, json_string(c->hosts[i]));
    return list;
}

static json_t *time_of(const struct ry_summary *s)
{
    if (!s->timed_ranks)
        return json_null();
    return json_pack("{s:i,s:f,s:f,s:{s:i,s:f},s:{s:i,s:f},s:f}", "ranks", s->timed_ranks, "median_us", s->median,
                     "p95_us", s->p95, "longest", "rank", s->longest, "median_us", s->median_longest, "shortest",
                     "rank", s->shortest, "median_us", s->median_shortest, "cross_node_gbs", s->cross_gbs);
}

static json_t *comm(const struct ry_trace *t, const struct ry_summary *s)
{
    const struct ry_trace_comm *c = s->comm;
    char hints[RY_HINTS][240];
    int nhints = ry_report_hints(s, hints);
    json_t *look = json_array();
    for (int i = 0; i < nhints; i++)
        json_array_append_new(look, text(hints[i]));
    json_t *o = json_pack("{s:s,s:s?,s:s,s:s,s:{s:s,s:s},s:i,s:i,s:i,s:b,s:o,s:o}", "id", c->id, "name", c->name,
                          "parent", c->parent, "birth", c->birth, "kind", "inferred", s->kind, "from", s->why, "nranks",
                          c->nranks, "ranks_read", c->present, "nnodes", c->nnodes, "mapped", c->mapped, "hosts",
                          hosts(c), "look_at", look);
    json_t *more = json_pack("{s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o}", "exchanges", number(s->exchanges),
                             "bytes_total", number(s->bytes), "bytes_self", number(s->self), "bytes_in_node",
                             number(s->in_node), "bytes_cross_node", number(s->cross_node), "bytes_unknown",
                             number(s->unknown), "dropped", number(s->dropped), "dropped_durations",
                             number(s->dropped_durations), "one_call", number(c->one_call), "captured",
                             number(c->captured), "types", types(c), "rows", rows(c), "time", time_of(s),
                             "beside", s->clocked_us ? json_real((double)s->beside_us / (double)s->clocked_us) : json_null());
    json_t *shape =
        json_pack("{s:{s:o,s:o,s:o,s:o},s:{s:o,s:o,s:b},s:o,s:o,s:o,s:o,s:o,s:o,s:O}", "imbalance", "sent", peak(&s->peak_sent),
                  "received", peak(&s->peak_received), "node_sent", peak(&s->node_out), "node_received",
                  peak(&s->node_in), "agreement", "pairs_checked", number(s->pairs_checked), "pairs_differ",
                  number(s->pairs_differ), "same_exchanges", s->same_exchanges, "agreed_on",
                  ry_report_agreed_json(s), "directions", ry_report_ways_json(s), "locality", ry_report_local_json(s), "ranks", ranks(t, c), "rank_matrix",
                  rank_matrix(c), "node_matrix", node_matrix(s), "counters", c->counters);
    if (!o || !more || !shape || json_object_update_new(o, more) || json_object_update_new(o, shape)) {
        json_decref(o);
        return NULL;
    }
    return o;
}

json_t *ry_report_json(const struct ry_trace *t, const struct ry_summary *s, int n)
{
    uint64_t exchanges = 0, bytes = 0, cross = 0, in_node = 0, self = 0;
    int nodes = 0, widest = 0;
    json_t *comms = json_array(), *notes = json_array();
    for (int i = 0; i < n; i++) {
        exchanges += s[i].exchanges;
        bytes += s[i].bytes;
        cross += s[i].cross_node;
        in_node += s[i].in_node;
        self += s[i].self;
        nodes = s[i].comm->nnodes > nodes ? s[i].comm->nnodes : nodes;
        widest = s[i].comm->nranks > widest ? s[i].comm->nranks : widest;
        if (json_array_append_new(comms, comm(t, &s[i]))) {
            json_decref(comms);
            json_decref(notes);
            return NULL;
        }
    }
    for (int i = 0; i < t->nnotes; i++)
        json_array_append_new(notes, text(t->notes[i]));
    return json_pack("{s:s,s:i,s:s,s:o,s:i,s:i,s:i,s:o,s:o,s:o,s:o,s:o,s:o,s:o}", "schema", RY_REPORT_SCHEMA, "version",
                     RY_REPORT_VERSION, "railyard", RAILYARD_VERSION, "dir", text(t->dir), "processes", t->nprocesses,
                     "nodes", nodes, "ranks", widest, "exchanges", number(exchanges), "bytes_total", number(bytes),
                     "bytes_cross_node", number(cross), "bytes_in_node", number(in_node), "bytes_self", number(self),
                     "communicators", comms, "notes", notes);
}
