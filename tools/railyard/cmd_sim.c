/* cmd_sim.c: `railyard sim [DIR]`: what a job's MoE exchanges would take on another cluster, by placement and strategy.
 */
#include <argp.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "command.h"
#include "sim.h"

#define MOST_GPUS 4096
#define QUIET_S 2.0 /* before progress is told, and between two lines of it */

static struct {
    const char *dir, *json, *svg, *cost;
    const struct ry_fabric *preset;
    int nodes[SIM_SIZES], nsizes, gpus, nics, per_gpu, experts_per_gpu, steps;
    double local, nic, row_bytes, agreement_us;
    bool placings[RY_PLACINGS];
    enum ry_counting counting;
    struct ry_source source;
    bool made_up; /* an option of made-up routing was given */
    struct sim_skewed skewed;
} args;

enum {
    KEY_LOCAL = 256,
    KEY_NIC,
    KEY_NICS,
    KEY_COST,
    KEY_AGREEMENT,
    KEY_EXPERTS,
    KEY_LOCALITY,
    KEY_LAYERS,
    KEY_TOPK,
    KEY_TOKENS,
    KEY_GROUPS,
    KEY_ROW,
    KEY_STEPS,
    KEY_FIT,
    KEY_SEED,
    KEY_PLACEMENTS,
    KEY_COUNT,
    KEY_SVG,
    KEY_EXCHANGE,
    KEY_SKEW,
    KEY_INCAST,
};

static long number(struct argp_state *state, const char *option, const char *text, long least, long most)
{
    char *end;
    errno = 0;
    long v = strtol(text, &end, 10);
    if (errno || end == text || *end || v < least || v > most)
        argp_error(state, "--%s takes a whole number from %ld to %ld, not '%s'", option, least, most, text);
    return v;
}

static double real(struct argp_state *state, const char *option, const char *text, double least, double most)
{
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !(v >= least && v <= most))
        argp_error(state, "--%s takes a number from %g to %g, not '%s'", option, least, most, text);
    return v;
}

static void list(struct argp_state *state, const char *text, bool placements)
{
    char copy[512], *at = copy, *word;
    struct ry_err err;
    enum ry_placing p;
    if (snprintf(copy, sizeof copy, "%s", text) >= (int)sizeof copy)
        argp_error(state, "the list '%.40s...' is too long", text);
    if (placements)
        memset(args.placings, 0, sizeof args.placings);
    else
        args.nsizes = 0;
    while ((word = strsep(&at, ","))) {
        if (placements && ry_placing_parse(word, &p, &err))
            argp_error(state, "%s", err.msg);
        else if (placements)
            args.placings[p] = true;
        else if (args.nsizes == SIM_SIZES)
            argp_error(state, "--nodes takes up to %d sizes", SIM_SIZES);
        else
            args.nodes[args.nsizes++] = (int)number(state, "nodes", word, 1, MOST_GPUS);
    }
}

static error_t parse_routing(int key, char *arg, struct argp_state *state)
{
    struct ry_source *s = &args.source;
    switch (key) {
    case KEY_LOCALITY:
        s->locality = real(state, "locality", arg, 0, 1);
        break;
    case KEY_LAYERS:
        s->layers = (int)number(state, "layers", arg, 1, 1000);
        break;
    case KEY_TOPK:
        s->topk = (int)number(state, "topk", arg, 1, RY_ROUTING_TOPK);
        break;
    case KEY_TOKENS:
        s->tokens = (int)number(state, "tokens", arg, 1, UINT16_MAX);
        break;
    case KEY_GROUPS:
        s->groups = (int)number(state, "groups", arg, 1, RY_MOST_EXPERTS);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    args.made_up = true;
    return 0;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct ry_err err;
    switch (key) {
    case 'j':
        args.json = arg;
        return 0;
    case KEY_SVG:
        args.svg = arg;
        return 0;
    case 'p':
        if (!(args.preset = ry_fabric_named(arg, &err)))
            argp_error(state, "%s", err.msg);
        return 0;
    case 'n':
        list(state, arg, false);
        return 0;
    case 'g':
        args.gpus = (int)number(state, "gpus", arg, 1, 1024);
        return 0;
    case KEY_LOCAL:
        args.local = real(state, "local", arg, 1e-3, 1e6);
        return 0;
    case KEY_NIC:
        args.nic = real(state, "nic", arg, 1e-3, 1e6);
        return 0;
    case KEY_AGREEMENT:
        args.agreement_us = real(state, "agreement", arg, 0, 1e9);
        return 0;
    case KEY_NICS:
        args.nics = (int)number(state, "nics", arg, 1, 1024);
        return 0;
    case KEY_COST:
        args.cost = arg;
        return 0;
    case 's':
        args.per_gpu = (int)number(state, "samples", arg, 1, 4096);
        return 0;
    case KEY_EXPERTS:
        args.experts_per_gpu = (int)number(state, "experts", arg, 1, RY_MOST_EXPERTS);
        return 0;
    case KEY_ROW:
        args.row_bytes = real(state, "row-bytes", arg, 1, 1 << 24);
        return 0;
    case KEY_STEPS:
        args.steps = (int)number(state, "steps", arg, 1, 10000);
        return 0;
    case KEY_FIT:
        args.source.fit = (int)number(state, "fit", arg, 0, 1 << 24);
        return 0;
    case KEY_SEED:
        args.source.seed = args.skewed.seed = (uint64_t)number(state, "seed", arg, 0, 1L << 30);
        return 0;
    case KEY_EXCHANGE:
        args.skewed.bytes = 1048576 * real(state, "exchange", arg, 1e-3, 1e6);
        return 0;
    case KEY_SKEW:
        args.skewed.exponent = real(state, "skew", arg, 0, 4);
        return 0;
    case KEY_INCAST:
        args.skewed.incast = real(state, "incast", arg, 0, 0.95);
        return 0;
    case KEY_PLACEMENTS:
        list(state, arg, true);
        return 0;
    case KEY_COUNT:
        if (strcmp(arg, "copies") && strcmp(arg, "distinct"))
            argp_error(state, "--count takes copies or distinct, not '%s'", arg);
        args.counting = *arg == 'd' ? RY_DISTINCT : RY_COPIES;
        return 0;
    case ARGP_KEY_ARG:
        if (args.dir)
            argp_error(state, "takes one folder, but got '%s' too", arg);
        args.dir = arg;
        return 0;
    case ARGP_KEY_END:
        if (args.skewed.bytes > 0 && (args.dir || args.made_up || args.json || args.svg))
            argp_error(state, "--exchange is one made-up exchange instead of a job, and a table only: leave out '%s'",
                       args.dir ? args.dir : args.json ? "--json" : args.svg ? "--svg" : "the options of routing");
        if (args.dir && args.made_up)
            argp_error(state,
                       "--locality, --layers, --topk, --tokens and --groups are for made-up routing: leave out "
                       "either them or '%s'",
                       args.dir);
        return 0;
    }
    return parse_routing(key, arg, state);
}

static const struct argp_option options[] = {
    {0, 0, 0, 0, "What comes out (default: a table):", 1},
    {"json", 'j', "FILE", 0, "write it as JSON, too; with - only that, to stdout", 0},
    {"svg", KEY_SVG, "FILE", 0,
     "draw it: bars for each placement and strategy; with several sizes, the time of a step over GPUs", 0},
    {0, 0, 0, 0, "The cluster:", 2},
    {"preset", 'p', "NAME", 0, "netmoe, h100-pod or ethernet (netmoe); what follows changes it", 0},
    {"nodes", 'n', "N,N,...", 0, "sizes to simulate, up to 4096 GPUs", 0},
    {"gpus", 'g', "N", 0, "GPUs in a node", 0},
    {"local", KEY_LOCAL, "GB/S", 0, "of a GPU to others of its node, each way", 0},
    {"nic", KEY_NIC, "GB/S", 0, "of a node, all its NICs together, each way", 0},
    {"nics", KEY_NICS, "N", 0, "NICs of a node; as many as GPUs: rails", 0},
    {"cost", KEY_COST, "FILE", 0, "link costs from a file that railyard calibrate wrote, on whichever cluster", 0},
    {"agreement", KEY_AGREEMENT, "US", 0,
     "what agreeing on an exchange takes where it is not hidden behind work queued before; all strategies but plain (0)", 0},
    {0, 0, 0, 0, "The job:", 3},
    {"samples", 's', "N", 0, "samples of a GPU and step (4)", 0},
    {"experts", KEY_EXPERTS, "N", 0, "experts of a GPU and layer (2; recorded: the least that fits and is no less)", 0},
    {"row-bytes", KEY_ROW, "N", 0, "of one token's vector (4096)", 0},
    {0, 0, 0, 0, "Made-up routing (without DIR):", 4},
    {"locality", KEY_LOCALITY, "P", 0,
     "0 to 1: probability that a token stays with its sample's group of experts (0.5)", 0},
    {"layers", KEY_LAYERS, "N", 0, "MoE layers (4)", 0},
    {"topk", KEY_TOPK, "N", 0, "experts of a token (2)", 0},
    {"tokens", KEY_TOKENS, "N", 0, "of a sample (512)", 0},
    {"groups", KEY_GROUPS, "N", 0, "groups of experts (one for every 8)", 0},
    {0, 0, 0, 0, "One skewed exchange instead of a job:", 6},
    {"exchange", KEY_EXCHANGE, "MIB", 0, "every GPU sends so much in all; direct, hierarchical and balanced by the steps of their plans, up to 1024 GPUs", 0},
    {"skew", KEY_SKEW, "S", 0, "Zipf's exponent: a GPU's k-th favourite gets 1 / k^S of what its first gets (0.8)", 0},
    {"incast", KEY_INCAST, "P", 0, "0 to 0.95: the share of its bandwidth that a NIC loses at most when many nodes send to it at once (0)", 0},
    {0, 0, 0, 0, "The protocol:", 5},
    {"placements", KEY_PLACEMENTS, "NAME,...", 0,
     "in-order, netmoe-gather, netmoe-predicted, netmoe-known, homes, coplaced, coplaced-tokens (all that can be)", 0},
    {"count", KEY_COUNT, "WHAT", 0, "what homes are chosen by: copies, or distinct (token, node) pairs (copies)", 0},
    {"fit", KEY_FIT, "N", 0, "samples to learn from (1024)", 0},
    {"steps", KEY_STEPS, "N", 0, "steps to simulate (as many as have 2048 samples, up to 16)", 0},
    {"seed", KEY_SEED, "N", 0, "of all that is drawn (1)", 0},
    {0}};

static const struct argp argp = {
    options,
    parse,
    "[DIR]",
    "Simulate a job's MoE exchanges on a cluster that need not be here: each placement of samples and experts with "
    "each "
    "strategy of exchanging.\v"
    "DIR holds recorded routing: meta.json and counts.npy (see routing-format.md); without it, routing is made up. A "
    "layer has four exchanges: dispatch, combine, and their gradients. Times are those of the cost model that jobs "
    "decide by, fed with data-sheet figures (of which NCCL reaches 3/4) or with measured ones (--cost).\n\n"
    "plain is NCCL as it is. hierarchical gathers what goes to a node into one message per rail. balanced evens out "
    "what rails carry, and crosses in stages. dedup sends a token "
    "that several experts of a node want there once; it does so where copies are equal, in dispatch and in the "
    "gradient "
    "of combine, and has no plan in this version: what it would take is put together from hierarchical's parts. sum, "
    "modelled the same way, adds up a token's rows before they cross on the way back, which changes rounding.\n\n"
    "Recorded experts and samples that are too few for the cluster stand for several each; the output says so.\n\n"
    "  railyard sim --preset netmoe traces/gpt\n"
    "  railyard sim --preset h100-pod --nodes 2,8,32,128,512 --locality 0.8 --svg growth.svg\n"
    "  railyard sim --preset h100-pod --nodes 4,16,64,128 --exchange 256 --skew 0.8",
    0,
    0,
    0};

/* ---- progress ---- */

struct watch {
    double begun, last; /* seconds */
    const char *size;
};

static double now_s(void)
{
    return (double)ry_now_ns() / 1e9;
}

static void progress(void *context, const char *what, double done)
{
    struct watch *w = context;
    double now = now_s();
    if (now - w->last < QUIET_S)
        return;
    w->last = now;
    fprintf(stderr, "railyard sim: %s: %s (%.0f %% after %.0f s)\n", w->size, what, 100 * done, now - w->begun);
}

/* ---- one size ---- */

static int experts_of(const struct ry_routing *r, int ranks, struct ry_err *err, int *out)
{
    long n = args.experts_per_gpu ? (long)args.experts_per_gpu * ranks : 2L * ranks;
    if (r && !args.experts_per_gpu) { /* the least multiple of both, and no less */
        long step = ranks;
        while (step % r->experts && step <= RY_MOST_EXPERTS)
            step += ranks;
        n = (n + step - 1) / step * step;
    }
    if (n > RY_MOST_EXPERTS)
        return ry_fail(err,
                       "%ld experts would be needed for %d GPUs: up to %d can be simulated; give fewer by "
                       "--experts",
                       n, ranks, RY_MOST_EXPERTS);
    if (r && n % r->experts)
        return ry_fail(err,
                       "%d experts were recorded, %d GPUs with %d each make %ld, which is no multiple of that: "
                       "leave out --experts or choose another",
                       r->experts, ranks, args.experts_per_gpu, n);
    *out = (int)n;
    return 0;
}

static void set_fabric(struct sim_point *p, int nodes)
{
    p->fabric = *args.preset;
    p->fabric.nodes = nodes;
    p->fabric.gpus = args.gpus ? args.gpus : p->fabric.gpus;
    p->fabric.local_gbs = args.local > 0 ? args.local : p->fabric.local_gbs;
    if (args.nics)
        p->fabric.nics = args.nics;
    else if (args.gpus) { /* rails stay rails, and a NIC as fast as it is */
        bool rails = args.preset->nics == args.preset->gpus;
        p->fabric.nics = rails ? args.gpus : p->fabric.nics < args.gpus ? p->fabric.nics : args.gpus;
        p->fabric.node_gbs *= (double)p->fabric.nics / args.preset->nics;
    }
    p->fabric.node_gbs = args.nic > 0 ? args.nic : p->fabric.node_gbs;
}

static int simulate(struct sim_point *p, const struct ry_routing *r, int nodes, struct ry_err *err)
{
    set_fabric(p, nodes);
    int ranks = nodes * p->fabric.gpus;
    if (ranks > MOST_GPUS)
        return ry_fail(err, "%d nodes of %d GPUs are more than the %d GPUs that can be simulated", nodes,
                       p->fabric.gpus, MOST_GPUS);
    struct ry_cluster *c = ry_fabric_cluster(&p->fabric, err);
    if (!c)
        return -1;
    char size[64];
    struct watch watch = {.begun = now_s(), .last = now_s(), .size = size};
    snprintf(size, sizeof size, "%d nodes x %d GPUs", nodes, p->fabric.gpus);
    p->sim = (struct ry_sim){.cluster = c,
                             .model = &p->model,
                             .rails = p->fabric.nics == p->fabric.gpus && p->fabric.gpus > 1,
                             .source = args.source,
                             .row_bytes = args.row_bytes,
                             .steps = args.steps,
                             .counting = args.counting,
                             .progress = progress,
                             .context = &watch};
    p->sim.source.routing = r;
    p->sim.source.samples = ranks * args.per_gpu;
    memcpy(p->sim.placings, args.placings, sizeof args.placings);
    if (!p->sim.steps)
        p->sim.steps = p->sim.source.samples >= 2048       ? 1
                       : 2048 / p->sim.source.samples < 16 ? 2048 / p->sim.source.samples
                                                           : 16;
    int failed = ry_fabric_model(&p->model, c, args.cost, err) || experts_of(r, ranks, err, &p->sim.source.experts);
    p->model.agreement_us = args.agreement_us;
    failed = failed || ry_sim_run(&p->sim, &p->result, err);
    ry_cluster_free(c);
    p->sim.cluster = NULL;
    p->seconds = now_s() - watch.begun;
    return failed ? -1 : 0;
}

static int simulate_exchange(struct sim_point *p, int nodes, struct ry_err *err)
{
    set_fabric(p, nodes);
    struct ry_cluster *c = ry_fabric_cluster(&p->fabric, err);
    int rc = c ? ry_fabric_model(&p->model, c, args.cost, err) : -1;
    p->model.agreement_us = args.agreement_us;
    ry_cluster_free(c);
    return rc;
}

/* ---- what comes out ---- */

static int write_json(const char *argv0, const struct sim_study *s)
{
    json_t *out = sim_json(s);
    int failed;
    if (!out)
        return command_fail(argv0, "out of memory for JSON");
    if (!strcmp(args.json, "-"))
        failed = json_dumpf(out, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) || puts("") < 0;
    else
        failed = json_dump_file(out, args.json, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
    json_decref(out);
    return failed ? command_fail(argv0, "%s: cannot be written: %s", args.json, strerror(errno)) : 0;
}

static int write_svg(const char *argv0, const struct sim_study *s)
{
    FILE *f = fopen(args.svg, "w");
    if (f)
        sim_svg(s, f);
    if (!f || fclose(f))
        return command_fail(argv0, "%s: cannot be written: %s", args.svg, strerror(errno));
    return 0;
}

int cmd_sim(int argc, char **argv)
{
    static struct sim_point points[SIM_SIZES];
    struct ry_err err;
    struct ry_routing *r = NULL;
    args.per_gpu = 4;
    args.row_bytes = 4096;
    args.preset = ry_fabric_at(0);
    args.source = (struct ry_source){.layers = 4, .topk = 2, .tokens = 512, .locality = 0.5, .fit = 1024, .seed = 1};
    args.skewed = (struct sim_skewed){.exponent = 0.8, .seed = 1};
    for (int p = 0; p < RY_PLACINGS; p++)
        args.placings[p] = true;
    if (argp_parse(&argp, argc, argv, 0, NULL, NULL))
        return 2;
    if (!args.nsizes)
        args.nodes[args.nsizes++] = args.preset->nodes;
    if (args.dir && !(r = ry_routing_open(args.dir, &err)))
        return command_fail(argv[0], "%s", err.msg);
    struct sim_study study = {.dir = args.dir, .cost = args.cost, .points = points};
    int failed = 0;
    for (int i = 0; i < args.nsizes && !failed; i++, study.npoints += !failed)
        failed = args.skewed.bytes > 0 ? simulate_exchange(&points[i], args.nodes[i], &err)
                                       : simulate(&points[i], r, args.nodes[i], &err);
    if (!failed && args.skewed.bytes > 0)
        return sim_skewed(&args.skewed, &study, &err) ? command_fail(argv[0], "%s", err.msg) : 0;
    ry_routing_close(r);
    if (failed)
        return command_fail(argv[0], "%s", err.msg);
    if (!args.json || strcmp(args.json, "-"))
        sim_print(&study);
    int status = args.json ? write_json(argv[0], &study) : 0;
    return args.svg && !status ? write_svg(argv[0], &study) : status;
}
