/*
 * cmd_explain.c: `railyard explain`: the plans of one exchange in words and as a picture: what each rank sends, when,
 * and what a strategy changes in messages and bytes on each kind of link. Nothing is shown that the verifier did not
 * accept.
 */
#include <argp.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/npy.h"
#include "command.h"
#include "explain.h"
#include "plan/verify.h"
#include "record/trace.h"
#include "report.h"

#define MAX_RANKS 4096
#define MAX_ROWS (1 << 26)

static struct {
    const char *input, *svg, *comm;
    enum { FROM_INPUT, UNIFORM, ZIPF } matrix;
    uint64_t bytes; /* of UNIFORM, ZIPF: what each rank sends */
    uint64_t row_bytes;
    double distinct; /* share of the rows for each node */
    int chunks;
    int nodes, gpus, nsizes, sizes[MAX_RANKS];
    bool dealt, apart, all;
    int rank;
    enum ry_strategy strategy;
} args;

struct job {
    struct ry_cluster *cluster;
    uint64_t *matrix;
    uintptr_t **send_at, **recv_at; /* NULL: apart */
    struct ry_plan **plans[RY_STRATEGIES];
    int strategies; /* all, or without dedup where nothing is known of rows */
    struct ry_row_map *maps;
    struct ry_repeats *repeats; /* [nranks * nnodes] each */
};

/* "12", "64K", "1.5M": 1024 to the K. */
static bool parse_bytes(const char *s, uint64_t *out)
{
    char *end;
    double v = strtod(s, &end);
    const char *units = "KMGT", *unit = *end ? strchr(units, *end & ~32) : NULL;
    if (end == s || (*end && (!unit || end[1])) || !(v >= 0) || (unit && v > 1e6) || v > 1e15)
        return false;
    *out = (uint64_t)(v * (double)(UINT64_C(1) << (unit ? 10 * (unit - units + 1) : 0)));
    return true;
}

static int number(const char *s, struct argp_state *state, int least, int most)
{
    char *end;
    long v = strtol(s, &end, 10);
    if (end == s || *end || v < least || v > most)
        argp_error(state, "'%s' is no number from %d to %d", s, least, most);
    return (int)v;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct ry_err err;
    char *end;
    switch (key) {
    case 'u':
    case 'z':
        args.matrix = key == 'u' ? UNIFORM : ZIPF;
        if (!parse_bytes(arg, &args.bytes))
            argp_error(state, "'%s' is no number of bytes (64K, 1.5M, …)", arg);
        return 0;
    case 'n':
        args.nodes = number(arg, state, 1, MAX_RANKS);
        return 0;
    case 'g':
        args.gpus = number(arg, state, 1, MAX_RANKS);
        return 0;
    case 'N':
        for (char *part = strtok(arg, ","); part && args.nsizes < MAX_RANKS; part = strtok(NULL, ","))
            args.sizes[args.nsizes++] = number(part, state, 1, MAX_RANKS);
        return 0;
    case 'd':
        args.dealt = true;
        return 0;
    case 'p':
        args.apart = true;
        return 0;
    case 's':
        if (ry_strategy_parse(arg, &args.strategy, &err))
            argp_error(state, "%s", err.msg);
        return 0;
    case 'b':
        if (!parse_bytes(arg, &args.row_bytes) || !args.row_bytes)
            argp_error(state, "'%s' is no number of bytes of a row (14K, 7168, …)", arg);
        return 0;
    case 'D':
        args.distinct = strtod(arg, &end);
        if (end == arg || *end || !(args.distinct > 0 && args.distinct <= 1))
            argp_error(state, "'%s' is no share of rows above 0, up to 1", arg);
        return 0;
    case 'k':
        args.chunks = number(arg, state, 1, RY_CHUNKS);
        if (args.chunks == 3)
            argp_error(state, "messages are cut into 1, 2 or %d chunks", RY_CHUNKS);
        return 0;
    case 'r':
        args.rank = number(arg, state, 0, MAX_RANKS - 1);
        return 0;
    case 'a':
        args.all = true;
        return 0;
    case 'c':
        args.comm = arg;
        return 0;
    case 'v':
        args.svg = arg;
        return 0;
    case ARGP_KEY_ARG:
        if (args.input)
            argp_error(state, "takes one matrix or folder, but got '%s' too", arg);
        args.input = arg;
        return 0;
    case ARGP_KEY_END:
        if (!args.input == (args.matrix == FROM_INPUT))
            argp_error(state, "which matrix? Give either a file or folder, or one of --uniform and --zipf");
        if (args.nsizes && (args.nodes || args.gpus))
            argp_error(state, "give either --node-sizes, or --nodes and --gpus");
        if (args.strategy == RY_DEDUP && !args.row_bytes)
            argp_error(state, "dedup depends on which rows are equal: tell how long they are by --row-bytes");
        if (args.distinct > 0 && !args.row_bytes)
            argp_error(state, "--distinct is a share of rows: tell how long they are by --row-bytes");
        if (args.chunks > 1 && !args.row_bytes)
            argp_error(state, "only messages of rows are cut into chunks: tell how long rows are by --row-bytes");
        if (!args.nodes != !args.gpus)
            argp_error(state, "--nodes and --gpus go together");
        for (int i = 0; i < args.nodes && !args.nsizes; i++)
            args.sizes[i] = args.gpus;
        args.nsizes = args.nsizes ? args.nsizes : args.nodes;
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

/* A map in which rank r is on node[r]; it has no machines, only their numbers. */
static struct ry_cluster *map(const int *node, int n, struct ry_err *err)
{
    struct ry_seat *seats = calloc((size_t)n, sizeof *seats);
    if (!seats)
        return ry_fail(err, "out of memory"), NULL;
    for (int r = 0; r < n; r++) {
        seats[r].rank = r;
        snprintf(seats[r].node, sizeof seats[r].node, "%d", node[r]);
    }
    struct ry_cluster *c = ry_cluster_build(seats, n, err);
    free(seats);
    return c;
}

/* The cluster that --nodes, --gpus, --node-sizes and --dealt describe. */
static int open_cluster(struct job *job, struct ry_err *err)
{
    static int node[MAX_RANKS];
    int n = 0, total = 0, left[MAX_RANKS];
    for (int i = 0; i < args.nsizes; i++) {
        left[i] = args.sizes[i];
        total = args.sizes[i] > MAX_RANKS - total ? MAX_RANKS + 1 : total + args.sizes[i];
        if (total > MAX_RANKS)
            return ry_fail(err, "more than %d ranks", MAX_RANKS);
    }
    while (n < total) /* block after block, or one to each node in turn */
        for (int i = 0; i < args.nsizes; i++)
            for (int k = args.dealt ? left[i] > 0 : left[i]; k > 0; k--, left[i]--)
                node[n++] = i;
    job->cluster = map(node, n, err);
    return job->cluster ? 0 : -1;
}

static int open_npy(struct job *job, struct ry_err *err)
{
    struct ry_npy npy;
    if (ry_npy_open(&npy, args.input, err))
        return -1;
    size_t n = npy.ndim == 2 ? npy.shape[0] : 0;
    int rc = 0;
    if (!n || npy.shape[1] != n || npy.type == RY_NPY_F32 || npy.type == RY_NPY_F64)
        rc = ry_fail(
            err,
            "%s: holds no square matrix of integers (bytes from row to column): a folder of traces is given as a "
            "whole",
            args.input);
    else if (!args.nsizes)
        rc = ry_fail(err, "%s: %zu ranks, but on which nodes? Give --nodes and --gpus, or --node-sizes", args.input, n);
    else if (open_cluster(job, err))
        rc = -1;
    else if ((size_t)job->cluster->nranks != n)
        rc = ry_fail(err, "%s: is a matrix of %zu ranks, but the nodes have %d", args.input, n, job->cluster->nranks);
    else if (!(job->matrix = malloc(n * n * sizeof *job->matrix)))
        rc = ry_fail(err, "out of memory");
    for (size_t i = 0; !rc && i < n * n; i++)
        job->matrix[i] = ry_npy_get(&npy, i);
    ry_npy_close(&npy);
    return rc;
}

static uint64_t comm_bytes(const struct ry_trace_comm *c)
{
    uint64_t sum = 0;
    for (int i = 0; i < c->nranks; i++)
        for (int j = 0; j < c->nranks; j++)
            sum += ry_trace_bytes(c, i, j);
    return sum;
}

/* The average exchange of the communicator that moved most (or of --comm's). */
static int open_trace(struct job *job, struct ry_err *err)
{
    struct ry_trace *t = ry_trace_open(args.input, err);
    const struct ry_trace_comm *best = NULL;
    if (!t)
        return -1;
    for (int i = 0; i < t->ncomms; i++)
        if ((!args.comm || !strncmp(t->comms[i]->id, args.comm, strlen(args.comm))) &&
            (!best || comm_bytes(t->comms[i]) > comm_bytes(best)))
            best = t->comms[i];
    int rc = 0;
    uint64_t exchanges = 0;
    for (int r = 0; best && r < best->nranks; r++) {
        if (best->ranks[r] && best->ranks[r]->exchanges > exchanges)
            exchanges = best->ranks[r]->exchanges;
        if (best->node[r] < 0 && !rc)
            rc = ry_fail(err, "%s: communicator %s does not tell on which node rank %d is", args.input, best->id, r);
    }
    if (!best || !exchanges)
        rc = ry_fail(err, "%s: holds no communicator with exchanges%s%s", args.input,
                     args.comm ? " whose id begins with " : "", args.comm ? args.comm : "");
    if (!rc && args.nsizes)
        rc = ry_fail(err, "%s: tells the nodes itself; leave --nodes, --gpus and --node-sizes", args.input);
    if (!rc && !(job->cluster = map(best->node, best->nranks, err)))
        rc = -1;
    size_t n = best ? (size_t)best->nranks : 0;
    if (!rc && !(job->matrix = malloc(n * n * sizeof *job->matrix)))
        rc = ry_fail(err, "out of memory");
    for (size_t i = 0; !rc && i < n * n; i++)
        job->matrix[i] = ry_trace_bytes(best, (int)(i / n), (int)(i % n)) / exchanges;
    if (!rc)
        printf("%s: communicator %s, the average of %" PRIu64 " exchanges\n", args.input, best->id, exchanges);
    ry_trace_close(t);
    return rc;
}

static int generate(struct job *job, struct ry_err *err)
{
    if (!args.nsizes)
        return ry_fail(err, "on which nodes? Give --nodes and --gpus, or --node-sizes");
    if (open_cluster(job, err))
        return -1;
    size_t n = (size_t)job->cluster->nranks;
    double sum = 0;
    job->matrix = malloc(n * n * sizeof *job->matrix);
    if (!job->matrix)
        return ry_fail(err, "out of memory");
    for (size_t k = 0; k < n; k++)
        sum += 1 / (double)(k + 1);
    for (size_t i = 0; i < n * n; i++) {
        size_t place = i % n * 7919 % n; /* how popular the column is: not by node */
        job->matrix[i] =
            args.matrix == UNIFORM ? args.bytes / n : (uint64_t)((double)args.bytes / (double)(place + 1) / sum);
    }
    return 0;
}

/* As frameworks lay buffers out: segments follow each other in rank order. */
static int lay_out(struct job *job, struct ry_err *err)
{
    size_t n = (size_t)job->cluster->nranks;
    job->send_at = calloc(n, sizeof *job->send_at);
    job->recv_at = calloc(n, sizeof *job->recv_at);
    for (size_t r = 0; job->send_at && job->recv_at && r < n; r++) {
        job->send_at[r] = malloc(n * sizeof **job->send_at);
        job->recv_at[r] = malloc(n * sizeof **job->recv_at);
        if (!job->send_at[r] || !job->recv_at[r])
            return ry_fail(err, "out of memory");
        uintptr_t out = 0, in = (uintptr_t)1 << 63;
        for (size_t p = 0; p < n; p++) {
            job->send_at[r][p] = out;
            job->recv_at[r][p] = in;
            if (__builtin_add_overflow(out, job->matrix[r * n + p], &out) || out >> 63 ||
                __builtin_add_overflow(in, job->matrix[p * n + r], &in))
                return ry_fail(err, "what rank %zu exchanges adds up to more than 63 bits of bytes", r);
        }
    }
    return job->send_at && job->recv_at ? 0 : ry_fail(err, "out of memory");
}

/* How many of the rows differ from all before them in the first parts of the message that rank `from` sends to `node`.
 */
static int count_early(const struct job *job, size_t from, size_t node, const uint32_t *first, uint64_t rows,
                       struct ry_repeats *r)
{
    size_t n = (size_t)job->cluster->nranks;
    bool *known = calloc(rows + 1, sizeof *known);
    uint64_t distinct = 0;
    for (int p = 0; known && p + 1 < ry_parts(r); p++) {
        const uint32_t *of = first; /* a rank's rows */
        for (size_t to = 0; to < n; to++) {
            uint64_t bytes = (size_t)job->cluster->node[to] == node ? job->matrix[from * n + to] : 0,
                     all = ry_rows_of(bytes, r->row_bytes);
            for (uint64_t i = ry_part_at(all, p, ry_parts(r)); i < ry_part_at(all, p + 1, ry_parts(r)); i++) {
                distinct += !known[of[i]];
                known[of[i]] = true;
            }
            of += all;
        }
        r->early[p] = distinct;
    }
    free(known);
    return known ? 0 : -1;
}

/* Rows as --row-bytes and --distinct assume: for each node as many distinct ones, which then come again and again. */
static int assume_rows(struct job *job, struct ry_err *err)
{
    size_t n = (size_t)job->cluster->nranks, nnodes = (size_t)job->cluster->nnodes;
    uint64_t all = 0;
    for (size_t i = 0; i < n * n; i++)
        all = all > MAX_ROWS ? all : all + ry_rows_of(job->matrix[i], args.row_bytes);
    if (all > MAX_ROWS)
        return ry_fail(err,
                       "more than %d rows of %" PRIu64 " bytes are too many to prove plans: make --row-bytes larger",
                       MAX_ROWS, args.row_bytes);
    job->maps = calloc(n * nnodes, sizeof *job->maps);
    job->repeats = calloc(n * nnodes, sizeof *job->repeats);
    for (size_t k = 0; job->maps && job->repeats && k < n * nnodes; k++) {
        size_t from = k / nnodes, node = k % nnodes;
        uint64_t rows = 0, row = 0, distinct = 0, whole = 0;
        if ((size_t)job->cluster->node[from] == node)
            continue;
        for (size_t to = 0; to < n; to++)
            if ((size_t)job->cluster->node[to] == node)
                rows += ry_rows_of(job->matrix[from * n + to], args.row_bytes);
        uint64_t most = (uint64_t)((double)rows * args.distinct + 0.5), period = most ? most : 1;
        uint32_t *first = malloc((rows + period) * sizeof *first), *nth = first + rows; /* nth[]: the distinct ones */
        if (!first)
            return ry_fail(err, "out of memory");
        for (size_t to = 0; to < n; to++)
            for (uint64_t at = 0; (size_t)job->cluster->node[to] == node && at < job->matrix[from * n + to];
                 at += args.row_bytes, row++) {
                first[row] = (uint32_t)row; /* the rest of a segment is a row of its own */
                if (job->matrix[from * n + to] - at >= args.row_bytes && whole++ >= period)
                    first[row] = nth[(whole - 1) % period];
                else if (job->matrix[from * n + to] - at >= args.row_bytes)
                    nth[whole - 1] = (uint32_t)row;
                distinct += first[row] == row;
            }
        struct ry_repeats *found = &job->repeats[k];
        *found = (struct ry_repeats){.row_bytes = args.row_bytes, .distinct = distinct, .parts = (uint64_t)args.chunks};
        int rc = count_early(job, from, node, first, rows, found);
        job->maps[k] = (struct ry_row_map){*found, first};
        if (rc)
            return ry_fail(err, "out of memory");
    }
    return job->maps && job->repeats ? 0 : ry_fail(err, "out of memory");
}

/* Every rank's plan by a strategy, verified. */
static int build(struct job *job, enum ry_strategy strategy, struct ry_err *err)
{
    size_t n = (size_t)job->cluster->nranks;
    struct ry_plan **plans = job->plans[strategy] = calloc(n, sizeof(struct ry_plan *));
    uint64_t *column = malloc(n * sizeof *column);
    int rc = plans && column ? 0 : ry_fail(err, "out of memory");
    for (size_t r = 0; !rc && r < n; r++) {
        struct ry_slice slice;
        for (size_t i = 0; i < n; i++)
            column[i] = job->matrix[i * n + r];
        rc = ry_slice_init(&slice, job->cluster, (int)r, strategy, err);
        ry_slice_fill(&slice, job->cluster, job->matrix, job->repeats);
        struct ry_plan_input in = {.cluster = job->cluster,
                                   .rank = (int)r,
                                   .strategy = strategy,
                                   .send = job->matrix + r * n,
                                   .recv = column,
                                   .slice = &slice,
                                   .send_at = job->send_at ? job->send_at[r] : NULL,
                                   .recv_at = job->recv_at ? job->recv_at[r] : NULL,
                                   .repeats = job->repeats ? job->repeats + r * (size_t)job->cluster->nnodes : NULL,
                                   .chunks = args.chunks};
        if (!rc && !(plans[r] = ry_plan_build(&in, err)))
            rc = -1;
        ry_slice_free(&slice);
    }
    free(column);
    struct ry_err wrong = {""};
    if (!rc &&
        ry_plan_verify_rows_at(job->cluster, job->matrix, job->maps, plans, (const uintptr_t *const *)job->send_at,
                               (const uintptr_t *const *)job->recv_at, &wrong))
        rc = ry_fail(err, "the %s plan is WRONG, please report it with the matrix: %.380s", ry_strategy_name(strategy),
                     wrong.msg);
    return rc;
}

/* What a strategy does in all. */
struct totals {
    uint64_t messages[3], bytes[3]; /* to self, in the node, across */
    uint64_t copies, copied, packed[2], packs[2] /* PACK, EXPAND */, stage, stage_most, node_messages, node_bytes;
    int stage_rank, node; /* who has the most */
};

static struct totals add_up(const struct ry_cluster *c, struct ry_plan *const *plans)
{
    struct totals t = {0};
    for (int n = 0; n < c->nnodes; n++) {
        uint64_t bytes = 0, messages = 0;
        for (int r = 0; r < c->nranks; r++) {
            const struct ry_plan *p = plans[r];
            if (c->node[r] != n)
                continue;
            t.stage += p->stage_bytes;
            if (p->stage_bytes > t.stage_most) {
                t.stage_most = p->stage_bytes;
                t.stage_rank = r;
            }
            for (int i = 0; i < p->nsteps; i++) {
                const struct ry_step *s = &p->steps[i];
                int link = s->peer == r ? 0 : ry_is_transfer(s) && c->node[s->peer] != n ? 2 : 1;
                if (s->kind == RY_STEP_COPY) {
                    t.copies++;
                    t.copied += s->bytes;
                } else if (!ry_is_transfer(s)) {
                    t.packs[s->kind == RY_STEP_EXPAND]++;
                    t.packed[s->kind == RY_STEP_EXPAND] += s->bytes;
                } else if (s->kind == RY_STEP_SEND) {
                    t.messages[link]++;
                    t.bytes[link] += s->bytes;
                    messages += link == 2;
                    bytes += link == 2 ? s->bytes : 0;
                }
            }
        }
        if (bytes > t.node_bytes) {
            t.node_bytes = bytes;
            t.node_messages = messages;
            t.node = n;
        }
    }
    return t;
}

static void summary(const struct job *job)
{
    const struct ry_cluster *c = job->cluster;
    static const char *const links[] = {"to itself", "in the node", "across nodes"};
    struct totals t[RY_STRATEGIES];
    char b[16], cell[64];
    printf("\n  %-26s", "messages, bytes");
    for (int s = 0; s < job->strategies; s++) {
        t[s] = add_up(c, job->plans[s]);
        printf("  %24s", ry_strategy_name((enum ry_strategy)s));
    }
#define LINE(label, ...)                                                                                               \
    printf("\n  %-26s", label);                                                                                        \
    for (int s = 0; s < job->strategies; s++) {                                                                        \
        snprintf(cell, sizeof cell, __VA_ARGS__);                                                                      \
        printf("  %24s", cell);                                                                                        \
    }
    for (int k = 2; k >= 0; k--) {
        LINE(links[k], "%" PRIu64 ", %s", t[s].messages[k], ry_report_bytes((double)t[s].bytes[k], b))
    }
    LINE("busiest node sends across", "%" PRIu64 ", %s", t[s].node_messages,
         ry_report_bytes((double)t[s].node_bytes, b))
    LINE("packed by copies", "%" PRIu64 ", %s", t[s].copies, ry_report_bytes((double)t[s].copied, b))
    if (job->strategies > RY_DEDUP) {
        LINE("rows packed", "%" PRIu64 ", %s", t[s].packs[0], ry_report_bytes((double)t[s].packed[0], b))
        LINE("rows written out", "%" PRIu64 ", %s", t[s].packs[1], ry_report_bytes((double)t[s].packed[1], b))
    }
    LINE("groups", "%d", job->plans[s][0]->ngroups)
    LINE("staging, rank with most", "%s", ry_report_bytes((double)t[s].stage_most, b))
    LINE("staging, all ranks", "%s", ry_report_bytes((double)t[s].stage, b))
    puts("");
}

static int write_svg(const struct job *job, struct ry_err *err)
{
    struct ry_plan *const *sets[] = {job->plans[RY_DIRECT], job->plans[args.strategy]};
    FILE *f = fopen(args.svg, "we");
    if (!f)
        return ry_fail(err, "%s: cannot be written: %s", args.svg, strerror(errno));
    int bad = explain_svg(job->cluster, sets, args.strategy == RY_DIRECT ? 1 : 2, f) ? ENOMEM : 0;
    if (fflush(f) || ferror(f))
        bad = bad ? bad : errno;
    if (fclose(f))
        bad = bad ? bad : errno;
    return bad ? ry_fail(err, "%s: cannot be written: %s", args.svg, strerror(bad)) : 0;
}

static int explain(struct job *job, struct ry_err *err)
{
    struct stat st;
    int rc = args.matrix != FROM_INPUT                       ? generate(job, err)
             : !stat(args.input, &st) && S_ISDIR(st.st_mode) ? open_trace(job, err)
                                                             : open_npy(job, err);
    if (rc || (!args.apart && lay_out(job, err)))
        return -1;
    const struct ry_cluster *c = job->cluster;
    if (args.rank >= c->nranks)
        return ry_fail(err, "there is no rank %d: the last of %d is %d", args.rank, c->nranks, c->nranks - 1);
    if (args.row_bytes && assume_rows(job, err))
        return -1;
    job->strategies = args.row_bytes ? RY_SUM : RY_DEDUP;
    for (int s = 0; s < job->strategies; s++)
        if (build(job, (enum ry_strategy)s, err))
            return -1;
    printf("%d ranks on %d node%s; the plans of all ranks were verified\n", c->nranks, c->nnodes,
           c->nnodes == 1 ? "" : "s");
    for (int r = args.all ? 0 : args.rank; r <= (args.all ? c->nranks - 1 : args.rank); r++) {
        puts("");
        ry_plan_explain(job->plans[args.strategy][r], c, stdout);
    }
    summary(job);
    if (fflush(stdout))
        return ry_fail(err, "standard output: %s", strerror(errno));
    return args.svg ? write_svg(job, err) : 0;
}

int cmd_explain(int argc, char **argv)
{
    static const struct argp_option options[] = {
        {0, 0, 0, 0, "What is exchanged, unless a file or folder is given:", 1},
        {"uniform", 'u', "BYTES", 0, "Every rank sends BYTES in all, alike to all ranks (64K, 1.5M, …)", 1},
        {"zipf", 'z', "BYTES", 0,
         "Every rank sends BYTES in all, half as much to the second most popular rank as to the first, …", 1},
        {"comm", 'c', "ID", 0, "Of a trace: the communicator whose id begins with ID, not the one with the most bytes",
         1},
        {0, 0, 0, 0, "On which nodes (a trace knows):", 2},
        {"nodes", 'n', "N", 0, "Nodes, alike", 2},
        {"gpus", 'g', "N", 0, "Ranks of each node", 2},
        {"node-sizes", 'N', "N,N,…", 0, "Ranks of each node, where they differ", 2},
        {"dealt", 'd', 0, 0, "Ranks are dealt to the nodes in turn, instead of block by block", 2},
        {"apart", 'p', 0, 0, "Segments lie apart in memory, instead of one after the other in rank order", 2},
        {"row-bytes", 'b', "BYTES", 0,
         "What goes to other nodes are rows of BYTES, of which some are equal: shows what dedup makes of it", 2},
        {"distinct", 'D', "SHARE", 0, "So many of a rank's rows for a node differ from all before them (0.5)", 2},
        {"chunks", 'k', "N", 0,
         "Cut packed messages into N (1, 2 or 4): what one brought is passed on while the next crosses", 2},
        {0, 0, 0, 0, "What to show:", 3},
        {"strategy", 's', "NAME", 0, "direct, hierarchical (the default; with --row-bytes dedup is), balanced, or dedup", 3},
        {"rank", 'r', "RANK", 0, "Whose plan (0)", 3},
        {"all", 'a', 0, 0, "The plans of all ranks", 3},
        {"svg", 'v', "FILE", 0, "Write a picture too: who sends what in each group, beside direct", 3},
        {0}};
    static const struct argp argp = {
        options,
        parse,
        "[MATRIX.npy | DIR]",
        "Show the plan of an exchange in words, and what it changes in messages and "
        "bytes.\vMATRIX.npy is a square matrix of "
        "integers: bytes from rank (row) to rank (column). DIR is a folder that "
        "RAILYARD_TRACE named: its average exchange is "
        "taken. All plans are verified before any is shown: every byte of every receive "
        "buffer is written once, from the right "
        "source, and no rank waits for ever.\n\n"
        "Examples:\n"
        "  railyard explain --uniform 1M --nodes 4 --gpus 8 --svg plan.svg\n"
        "  railyard explain --zipf 64K --node-sizes 4,4,2 --all\n"
        "  railyard explain --zipf 64M --nodes 4 --gpus 8 --strategy balanced\n"
        "  railyard explain --uniform 64M --nodes 2 --gpus 8 --row-bytes 14K --distinct 0.3\n"
        "  railyard explain --uniform 64M --nodes 2 --gpus 8 --row-bytes 14K --chunks 4\n"
        "  railyard explain trace --rank 3",
        0,
        0,
        0};
    memset(&args, 0, sizeof args);
    args.strategy = RY_STRATEGIES;
    if (argp_parse(&argp, argc, argv, 0, 0, 0))
        return 2;
    if (args.strategy == RY_STRATEGIES)
        args.strategy = args.row_bytes ? RY_DEDUP : RY_HIERARCHICAL;
    args.distinct = args.distinct > 0 ? args.distinct : 0.5;
    args.chunks = args.chunks ? args.chunks : 1;
    struct job job = {0};
    struct ry_err err = {""};
    int rc = explain(&job, &err);
    int n = job.cluster ? job.cluster->nranks : 0;
    for (int r = 0; r < n; r++) {
        for (enum ry_strategy s = 0; s < RY_STRATEGIES; s++)
            if (job.plans[s])
                ry_plan_free(job.plans[s][r]);
        if (job.send_at)
            free(job.send_at[r]);
        if (job.recv_at)
            free(job.recv_at[r]);
        for (int k = 0; job.maps && k < job.cluster->nnodes; k++)
            free((void *)job.maps[r * job.cluster->nnodes + k].first);
    }
    free(job.maps);
    free(job.repeats);
    for (enum ry_strategy s = 0; s < RY_STRATEGIES; s++)
        free(job.plans[s]);
    free(job.send_at);
    free(job.recv_at);
    free(job.matrix);
    ry_cluster_free(job.cluster);
    return rc ? command_fail(argv[0], "%s", err.msg) : 0;
}
