/* cmd_report.c: `railyard report DIR`: what the ranks of a job recorded, merged, as text; and where JSON and SVG go. */
#include <argp.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "report.h"

#define TABLE_RANKS 16 /* larger matrices are left to --json and --svg */

static struct {
    const char *dir, *json, *svg, *comm;
} args;

static error_t parse(int key, char *arg, struct argp_state *state)
{
    switch (key) {
    case 'j':
        args.json = arg;
        return 0;
    case 's':
        args.svg = arg;
        return 0;
    case 'c':
        args.comm = arg;
        return 0;
    case ARGP_KEY_ARG:
        if (args.dir)
            argp_error(state, "takes one folder, but got '%s' too", arg);
        args.dir = arg;
        return 0;
    case ARGP_KEY_END:
        if (!args.dir)
            argp_error(state, "which folder? Give the one that RAILYARD_TRACE named");
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

const char *ry_report_bytes(double b, char out[16])
{
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
    int u = 0;
    while (b >= 999.5 && u < 6) {
        b /= 1000;
        u++;
    }
    snprintf(out, 16, "%.*f %s", u == 0 || b >= 99.95 ? 0 : b >= 9.995 ? 1 : 2, b, units[u]);
    return out;
}

static double percent(uint64_t part, uint64_t of)
{
    return of ? 100.0 * (double)part / (double)of : 0;
}

const char *ry_report_us(double us, char out[16])
{
    if (us < 999.5)
        snprintf(out, 16, "%.*f us", us < 9.995 ? 2 : us < 99.95 ? 1 : 0, us);
    else if (us < 999.5e3)
        snprintf(out, 16, "%.*f ms", us < 9.995e3 ? 2 : us < 99.95e3 ? 1 : 0, us / 1e3);
    else
        snprintf(out, 16, "%.2f s", us / 1e6);
    return out;
}

int ry_report_hints(const struct ry_summary *s, char hints[RY_HINTS][240])
{
    const struct ry_trace_comm *c = s->comm;
    int n = 0;
    char a[16], b[16];
#define HINT(...) ((void)(n < RY_HINTS && snprintf(hints[n++], sizeof hints[0], __VA_ARGS__)))
    if (s->pairs_differ && s->same_exchanges)
        HINT("the trace contradicts itself: in %" PRIu64 " of %" PRIu64
             " pairs the receiver counted other bytes than the sender "
             "(rank %d sent %s to rank %d, which counted %s)",
             s->pairs_differ, s->pairs_checked, s->differ_from, ry_report_bytes((double)s->differ_sent, a),
             s->differ_to, ry_report_bytes((double)s->differ_received, b));
    if (s->verify_differs)
        HINT("%s: verified exchanges differed from plain NCCL: a bug; set RAILYARD_DISABLE=1 and please report it",
             c->name ? c->name : c->id);
    if (s->agreed && s->short_of_staging > s->agreed / 10)
        HINT("%" PRIu64 " exchanges went direct for want of staging memory: raise RAILYARD_STAGING", s->short_of_staging);
    if (s->agreed && s->over_ucx)
        HINT("UCX carried what crosses nodes in %" PRIu64 " of the %" PRIu64 " exchanges that were agreed on", s->over_ucx, s->agreed);
    if (!s->exchanges || !s->bytes)
        return n;
    uint64_t moved = s->in_node + s->cross_node + s->unknown;
    if (c->nnodes > 1 && s->cross_node)
        HINT("%.0f %% of the bytes cross nodes%s", percent(s->cross_node, s->bytes),
             s->cross_node > moved / 2 ? ": most of what is sent takes the slow links" : "");
    else if (c->nnodes == 1 && !s->unknown)
        HINT("all ranks are on one node: no byte crosses nodes");
    if (s->peak_received.over_mean >= 1.2 && s->peak_received.over_mean >= s->peak_sent.over_mean)
        HINT("rank %d receives %.2f times the mean: likely its experts are popular ones", s->peak_received.who,
             s->peak_received.over_mean);
    else if (s->peak_sent.over_mean >= 1.2)
        HINT("rank %d sends %.2f times the mean", s->peak_sent.who, s->peak_sent.over_mean);
    const struct ry_peak *node = s->node_in.over_mean > s->node_out.over_mean ? &s->node_in : &s->node_out;
    if (node->over_mean >= 1.15)
        HINT("node %d %s %.2f times the mean of the nodes: its links decide how long an exchange takes", node->who,
             node == &s->node_in ? "receives" : "sends", node->over_mean);
    if (s->timed_ranks > 1 && s->median_longest > 1.2 * s->median_shortest)
        HINT("rank %d arrives last, as it waits least: half of its exchanges take under %s, on rank %d (the longest) "
             "under %s",
             s->shortest, ry_report_us(s->median_shortest, a), s->longest, ry_report_us(s->median_longest, b));
    if (s->beside_us > s->clocked_us / 10)
        HINT("%.0f %% of the time that its exchanges take, those of other communicators of the same processes run beside them: they "
             "share the links", percent(s->beside_us, s->clocked_us));
    if (!s->same_exchanges)
        HINT("the ranks counted different numbers of exchanges: some were killed early, or took part in groups that "
             "were no exchange");
    return n;
#undef HINT
}

/* `timed`: n ranks, whose times are put at the right. */
static void print_table(const char *title, const char *of, int n, uint64_t (*cell)(const struct ry_summary *, int, int),
                        const struct ry_summary *s, bool timed)
{
    char text[16];
    printf("  %s\n  %6s", title, of);
    for (int j = 0; j < n; j++)
        printf(" %7d", j);
    puts(timed ? "     median      p95" : "");
    for (int i = 0; i < n; i++) {
        printf("  %6d", i);
        for (int j = 0; j < n; j++) {
            uint64_t v = cell(s, i, j);
            printf(" %7s", v ? ry_report_bytes((double)v, text) : ".");
        }
        if (timed && s->comm->ranks[i] && s->comm->ranks[i]->times.n) {
            const struct ry_trace_times *t = &s->comm->ranks[i]->times;
            printf("   %8s", ry_report_us(ry_trace_quantile(t, 0.5), text));
            printf(" %8s", ry_report_us(ry_trace_quantile(t, 0.95), text));
        }
        putchar('\n');
    }
}

static uint64_t rank_cell(const struct ry_summary *s, int i, int j)
{
    return ry_trace_bytes(s->comm, i, j);
}

static uint64_t node_cell(const struct ry_summary *s, int i, int j)
{
    return s->nodes[i * s->comm->nnodes + j];
}

static void print_nodes(const struct ry_trace_comm *c)
{
    if (!c->nnodes) {
        printf("%d ranks, nodes unknown", c->nranks);
        return;
    }
    printf("%d ranks on %d node%s", c->nranks, c->nnodes, c->nnodes == 1 ? "" : "s");
    if (!c->mapped)
        printf(" (as far as seen)");
    if (c->present < c->nranks)
        printf(", %d of them read", c->present);
}

static void print_time(const struct ry_summary *s)
{
    char a[16], b[16], c[16], d[16];
    if (!s->timed_ranks)
        return;
    printf("  time       median %s, p95 %s", ry_report_us(s->median, a), ry_report_us(s->p95, b));
    if (s->timed_ranks > 1)
        printf("; longest rank %d (%s), shortest rank %d (%s)", s->longest, ry_report_us(s->median_longest, c), s->shortest,
               ry_report_us(s->median_shortest, d));
    if (s->cross_gbs > 0)
        printf("; %.2f GB/s across nodes per rank", s->cross_gbs);
    putchar('\n');
}

static void print_comm(const struct ry_summary *s)
{
    const struct ry_trace_comm *c = s->comm;
    char a[16], b[16], d[16], e[16], hints[RY_HINTS][240];
    printf("\n%s%s%s%s: %s, inferred: %s\n", c->id, c->name ? " \"" : "", c->name ? c->name : "", c->name ? "\"" : "",
           s->kind, s->why);
    printf("  who        ");
    print_nodes(c);
    if (!strcmp(c->birth, "seen"))
        puts("; seen through NCCL's profiler interface");
    else
        printf("; made by %s%s%s\n", c->birth, *c->parent ? " of " : "", c->parent);
    if (s->exchanges) {
        printf("  exchanges  %" PRIu64, s->exchanges);
        if (c->last_ns > c->first_ns)
            printf(" in %s", ry_report_us((double)(c->last_ns - c->first_ns) / 1e3, a));
        for (int i = 0; i < c->ntypes; i++)
            printf("%s %s", i ? "," : ";", c->types[i].name);
        for (int i = 0; i < c->nrows; i++)
            printf("%s %" PRIu64 " B (%s)", i ? "," : "; row", c->rows[i].bytes, c->rows[i].source);
        if (c->captured)
            printf("; some captured into CUDA graphs, counted once");
        printf("\n  bytes      %s: cross-node %s (%.0f %%), in-node %s (%.0f %%), to self %s (%.0f %%)",
               ry_report_bytes((double)s->bytes, a), ry_report_bytes((double)s->cross_node, b),
               percent(s->cross_node, s->bytes), ry_report_bytes((double)s->in_node, d), percent(s->in_node, s->bytes),
               ry_report_bytes((double)s->self, e), percent(s->self, s->bytes));
        if (s->unknown)
            printf(", nodes unknown %s", ry_report_bytes((double)s->unknown, b));
        if (s->bytes) {
            printf("\n  imbalance  (max/mean) sent %.2f, received %.2f", s->peak_sent.over_mean,
                   s->peak_received.over_mean);
            if (s->node_out.who >= 0 || s->node_in.who >= 0)
                printf("; a node's cross-node sent %.2f, received %.2f", s->node_out.over_mean, s->node_in.over_mean);
        }
        putchar('\n');
    }
    print_time(s);
    ry_report_agreed_text(s);
    ry_report_ways_text(s);
    ry_report_local_text(s);
    if (s->dropped || s->dropped_durations)
        printf("  dropped    %" PRIu64 " exchange lines and %" PRIu64
               " durations (the sums hold them; raise RAILYARD_TRACE_BUFFER)\n",
               s->dropped, s->dropped_durations);
    int n = ry_report_hints(s, hints);
    for (int i = 0; i < n; i++)
        printf("  %s %s\n", i ? "          " : "look at   ", hints[i]);
    if (s->bytes && c->nranks <= TABLE_RANKS)
        print_table("bytes from rank (row) to rank (column)", "rank", c->nranks, rank_cell, s, s->timed_ranks > 0);
    if (s->bytes && c->nnodes > 1 && c->nnodes <= TABLE_RANKS)
        print_table("bytes from node (row) to node (column)", "node", c->nnodes, node_cell, s, false);
}

static void print_report(const struct ry_trace *t, const struct ry_summary *s, int n)
{
    uint64_t exchanges = 0, bytes = 0, cross = 0;
    char a[16];
    for (int i = 0; i < n; i++) {
        exchanges += s[i].exchanges;
        bytes += s[i].bytes;
        cross += s[i].cross_node;
    }
    printf("%s: %d process%s, %d communicator%s, %" PRIu64 " exchange%s, %s, %.0f %% of it across nodes\n", t->dir,
           t->nprocesses, t->nprocesses == 1 ? "" : "es", n, n == 1 ? "" : "s", exchanges, exchanges == 1 ? "" : "s",
           ry_report_bytes((double)bytes, a), percent(cross, bytes));
    for (int i = 0; i < n; i++)
        print_comm(&s[i]);
    if (t->nnotes)
        printf("\nNotes\n");
    for (int i = 0; i < t->nnotes; i++)
        printf("  %s\n", t->notes[i]);
}

/* Most bytes first, then most ranks; then as they appeared (id keeps the order stable). */
static int by_size(const void *a, const void *b)
{
    const struct ry_summary *x = a, *y = b;
    if (x->bytes != y->bytes)
        return x->bytes < y->bytes ? 1 : -1;
    if (x->comm->nranks != y->comm->nranks)
        return x->comm->nranks < y->comm->nranks ? 1 : -1;
    return strcmp(x->comm->id, y->comm->id);
}

static int write_json(const char *argv0, const struct ry_trace *t, const struct ry_summary *s, int n)
{
    json_t *report = ry_report_json(t, s, n);
    FILE *f = !strcmp(args.json, "-") ? stdout : fopen(args.json, "we");
    int bad = !report || !f || json_dumpf(report, f, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) ||
              fputc('\n', f) == EOF || fflush(f);
    int saved = errno;
    if (f && f != stdout && fclose(f) && !bad) {
        bad = 1;
        saved = errno;
    }
    json_decref(report);
    return bad ? command_fail(argv0, "%s: cannot be written: %s", args.json, strerror(report ? saved : ENOMEM)) : 0;
}

static int write_svg(const char *argv0, const struct ry_summary *s, int n)
{
    if (!n)
        return command_fail(argv0, "%s: holds no communicator to draw", args.dir);
    FILE *f = fopen(args.svg, "we");
    if (f)
        ry_report_svg(&s[0], f);
    int bad = !f || fflush(f) || ferror(f), saved = errno;
    if (f && fclose(f) && !bad) {
        bad = 1;
        saved = errno;
    }
    return bad ? command_fail(argv0, "%s: cannot be written: %s", args.svg, strerror(saved)) : 0;
}

static int report(const char *argv0, struct ry_trace *t)
{
    struct ry_err err;
    int n = 0, rc = 0;
    struct ry_summary *s = calloc((size_t)t->ncomms + 1, sizeof *s);
    if (!s)
        return command_fail(argv0, "out of memory");
    for (int i = 0; i < t->ncomms && !rc; i++) {
        if (args.comm && strncmp(t->comms[i]->id, args.comm, strlen(args.comm)))
            continue;
        if (ry_summary_make(&s[n], t, t->comms[i], &err))
            rc = command_fail(argv0, "%s", err.msg);
        else
            n++;
    }
    if (!rc && args.comm && !n)
        rc = command_fail(argv0, "%s: has no communicator whose id begins with '%s'", args.dir, args.comm);
    qsort(s, (size_t)n, sizeof *s, by_size);
    if (!rc && !(args.json && !strcmp(args.json, "-")))
        print_report(t, s, n);
    if (!rc && args.json)
        rc = write_json(argv0, t, s, n);
    if (!rc && args.svg)
        rc = write_svg(argv0, s, n);
    for (int i = 0; i < n; i++)
        ry_summary_free(&s[i]);
    free(s);
    return rc;
}

int cmd_report(int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"json", 'j', "FILE", 0, "Write all of it as JSON too; '-': to the standard output, instead of the text", 0},
        {"svg", 's', "FILE", 0, "Write a picture of the communicator with the most bytes (or of --comm's)", 0},
        {"comm", 'c', "ID", 0, "Only the communicators whose id begins with ID", 0},
        {0}};
    static const struct argp argp = {
        options,
        parse,
        "DIR",
        "Report what a job recorded: every communicator, its exchanges, and who "
        "talked to whom.\vDIR is the folder that RAILYARD_TRACE named; all ranks' files in it are merged.",
        0,
        0,
        0};
    memset(&args, 0, sizeof args);
    if (argp_parse(&argp, argc, argv, 0, 0, 0))
        return 2;
    struct ry_err err;
    struct ry_trace *t = ry_trace_open(args.dir, &err);
    if (!t)
        return command_fail(argv[0], "%s", err.msg);
    int rc = report(argv[0], t);
    ry_trace_close(t);
    return rc;
}
