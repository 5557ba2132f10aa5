/* cmd_plan.c: `railyard plan DIR`: what placing samples would save on recorded routing, by which solver, and whether it
 * is worth while. */
#include <argp.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "measure/fabric.h"
#include "plan.h"

#define MAX_SIZES PLAN_SIZES
#define MAX_DIRS 16

static struct {
    const char *dir, *cost, *json;
    struct plan_files files;
    const char *dirs[MAX_DIRS]; /* the first is dir */
    int ndirs;
    int nodes[MAX_SIZES], nsizes, ranks, fit, batches, batch, history, max_moved;
    unsigned long seed, shuffle;
    double row_bytes, nvlink, nic, margin;
    enum ry_solver solver;
    enum ry_counting counting;
    bool ablate, speed, busiest, shuffled, compare, local;
} args;

enum {
    KEY_ABLATE = 256,
    KEY_SPEED,
    KEY_COMPARE,
    KEY_LOCAL,
    KEY_MAP,
    KEY_HOMES,
    KEY_UNMOVED,
    KEY_FIT,
    KEY_BATCHES,
    KEY_BATCH,
    KEY_SEED,
    KEY_SOLVER,
    KEY_BUSIEST,
    KEY_MOVED,
    KEY_COUNT,
    KEY_SHUFFLE,
    KEY_ROW,
    KEY_NVLINK,
    KEY_NIC,
    KEY_COST,
    KEY_MARGIN,
    KEY_HISTORY
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

static double real(struct argp_state *state, const char *option, const char *text)
{
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !(v > 0) || !isfinite(v))
        argp_error(state, "--%s takes a number above zero, not '%s'", option, text);
    return v;
}

static void node_list(struct argp_state *state, const char *text)
{
    char copy[256], *at = copy, *word;
    args.nsizes = 0;
    snprintf(copy, sizeof copy, "%s", text);
    while ((word = strsep(&at, ","))) {
        if (args.nsizes == MAX_SIZES)
            argp_error(state, "--nodes takes up to %d sizes", MAX_SIZES);
        args.nodes[args.nsizes++] = (int)number(state, "nodes", word, 1, 1 << 16);
    }
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct ry_err err;
    switch (key) {
    case 'j':
        args.json = arg;
        return 0;
    case 'n':
        node_list(state, arg);
        return 0;
    case 'g':
        args.ranks = (int)number(state, "gpus", arg, 1, 1024);
        return 0;
    case KEY_ABLATE:
        args.ablate = true;
        return 0;
    case KEY_SPEED:
        args.speed = true;
        return 0;
    case KEY_COMPARE:
        args.compare = true;
        return 0;
    case KEY_LOCAL:
        args.local = true;
        return 0;
    case KEY_MAP:
        args.files.map = arg;
        return 0;
    case KEY_HOMES:
        args.files.homes = arg;
        return 0;
    case KEY_UNMOVED:
        args.files.unmoved = arg;
        return 0;
    case KEY_FIT:
        args.fit = (int)number(state, "fit", arg, 0, 1 << 28);
        return 0;
    case KEY_BATCHES:
        args.batches = (int)number(state, "batches", arg, 1, 1 << 20);
        return 0;
    case KEY_BATCH:
        args.batch = (int)number(state, "batch", arg, 1, 1 << 20);
        return 0;
    case KEY_SEED:
        args.seed = (unsigned long)number(state, "seed", arg, 0, 1L << 30);
        return 0;
    case KEY_SOLVER:
        if (ry_solver_parse(arg, &args.solver, &err))
            argp_error(state, "%s", err.msg);
        return 0;
    case KEY_BUSIEST:
        args.busiest = true;
        return 0;
    case KEY_MOVED:
        args.max_moved = (int)number(state, "max-moved", arg, 0, 1 << 28);
        return 0;
    case KEY_COUNT:
        if (strcmp(arg, "copies") && strcmp(arg, "distinct"))
            argp_error(state, "--count takes copies or distinct, not '%s'", arg);
        args.counting = *arg == 'd' ? RY_DISTINCT : RY_COPIES;
        return 0;
    case KEY_SHUFFLE:
        args.shuffle = (unsigned long)number(state, "shuffle", arg, 0, 1L << 30);
        args.shuffled = true;
        return 0;
    case KEY_ROW:
        args.row_bytes = real(state, "row-bytes", arg);
        return 0;
    case KEY_NVLINK:
        args.nvlink = real(state, "nvlink", arg);
        return 0;
    case KEY_NIC:
        args.nic = real(state, "nic", arg);
        return 0;
    case KEY_COST:
        args.cost = arg;
        return 0;
    case KEY_MARGIN:
        args.margin = real(state, "margin", arg) / 100;
        return 0;
    case KEY_HISTORY:
        args.history = (int)number(state, "history", arg, 1, 64);
        return 0;
    case ARGP_KEY_ARG:
        if (args.ndirs == MAX_DIRS)
            argp_error(state, "takes up to %d folders", MAX_DIRS);
        args.dirs[args.ndirs++] = arg;
        args.dir = args.dirs[0];
        return 0;
    case ARGP_KEY_END:
        if (args.ndirs > 1 && !args.compare)
            argp_error(state, "takes one folder, but got '%s' too", args.dirs[1]);
        if (args.local + args.compare + args.speed + args.ablate > 1)
            argp_error(state, "--locality, --compare, --speed and --ablate are one each");
        if ((args.files.map || args.files.homes || args.files.unmoved) &&
            (!args.compare || args.nsizes != 1 || args.ndirs != 1))
            argp_error(state, "--%s is what --compare learned from one folder for one number of --nodes",
                       args.files.map ? "map" : args.files.homes ? "homes" : "homes-unmoved");
        if (args.files.homes && !args.files.map)
            argp_error(state, "--homes are those under the map that --map writes; --homes-unmoved is without one");
        if (!args.dir && !args.speed)
            argp_error(state, "which folder? Give one that holds recorded routing: meta.json and counts.npy");
        if (args.busiest && args.max_moved >= 0)
            argp_error(state, "--busiest and --max-moved do not go together");
        if ((args.busiest || args.max_moved >= 0) && args.solver != RY_SOLVE_EXACT)
            argp_error(state, "--busiest and --max-moved need the exact solver");
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp_option options[] = {
    {0, 0, 0, 0, "What to show (default: what NetMoE's layer placement saves):", 1},
    {"ablate", KEY_ABLATE, 0, 0, "every solver, and dynamic placement removed: time, cross-node traffic, exchange time",
     0},
    {"speed", KEY_SPEED, 0, 0,
     "time the exact solver beside Kuhn-Munkres, and as the problem grows; DIR may be left out", 0},
    {"compare", KEY_COMPARE, 0, 0,
     "NetMoE, experts that share a node with homes told from tokens, and de-duplicated exchanges, side by side; takes "
     "several DIRs",
     0},
    {"locality", KEY_LOCAL, 0, 0, "what stays on its rank and node as recorded, layer by layer and over the recording, and how far "
                                "that is from all", 0},
    {"map", KEY_MAP, "FILE", 0, "with --compare: write the expert map, loads held, to FILE.json or FILE.npy", 0},
    {"homes", KEY_HOMES, "FILE", 0,
     "with --map: write what tells samples' homes from their tokens under that map, for RAILYARD_HOME_MODEL", 0},
    {"homes-unmoved", KEY_UNMOVED, "FILE", 0, "with --compare: the same for experts where they are", 0},
    {"json", 'j', "FILE", 0, "write it as JSON, too; with - only that, to stdout", 0},
    {0, 0, 0, 0, "The cluster:", 2},
    {"nodes", 'n', "N,N,...", 0, "sizes to plan for (2,4,8)", 0},
    {"gpus", 'g', "N", 0, "GPUs in a node (4)", 0},
    {"nvlink", KEY_NVLINK, "GB/S", 0, "of a GPU, each way (400)", 0},
    {"nic", KEY_NIC, "GB/S", 0, "of a node, each way (100)", 0},
    {"cost", KEY_COST, "FILE", 0, "link costs that railyard calibrate measured, in place of both (a guess from them)", 0},
    {"row-bytes", KEY_ROW, "N", 0, "of one token's vector (4096)", 0},
    {0, 0, 0, 0, "The protocol:", 3},
    {"fit", KEY_FIT, "N", 0, "learn from the first N samples (1024)", 0},
    {"batches", KEY_BATCHES, "N", 0, "draw N batches from the rest (16)", 0},
    {"batch", KEY_BATCH, "N", 0, "of N samples each (128)", 0},
    {"seed", KEY_SEED, "N", 0, "of all that is drawn (1)", 0},
    {"count", KEY_COUNT, "WHAT", 0,
     "copies: (token, expert), as in the papers; distinct: (token, node), what de-duplicated exchanges send (copies)",
     0},
    {"shuffle", KEY_SHUFFLE, "SEED", 0,
     "deal all tokens out anew to random samples first: what a trace without locality gives", 0},
    {0, 0, 0, 0, "The planner:", 4},
    {"solver", KEY_SOLVER, "NAME", 0, "none, random, greedy, heuristic, kuhn-munkres or exact (exact)", 0},
    {"busiest", KEY_BUSIEST, 0, 0, "make the busiest NIC least, rather than the sum", 0},
    {"max-moved", KEY_MOVED, "N", 0, "samples of a batch that may change nodes after a layer", 0},
    {"history", KEY_HISTORY, "N", 0, "layers that the next one's routing is predicted from (4)", 0},
    {"margin", KEY_MARGIN, "PERCENT", 0, "decline if a trial saves less (3)", 0},
    {0}};

static const struct argp argp = {
    options,
    parse,
    "[DIR...]",
    "Place samples where their tokens' experts are, on recorded routing, and tell what it saves.\v"
    "DIR holds meta.json and counts.npy: tokens of each sample routed to each expert of each layer. The planner learns "
    "from the first "
    "samples and is judged on batches drawn from the rest, against samples dealt out in order. Experts lie in "
    "contiguous blocks. "
    "A ratio of 0.9 means that 10 % fewer rows cross nodes, in dispatch and combine of all layers together.",
    0,
    0,
    0};

/* One line of a table. */
struct line {
    const char *name;
    struct ry_study_result result;
};

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 1;
}

static json_t *line_json(const struct line *line, const struct line *base, const struct ry_study *s)
{
    const struct ry_traffic *t = &line->result.traffic;
    double steps = s->batches, layers = steps * s->routing->layers;
    return json_pack("{ss sf sf sf sf sf sf sf sf sf sf sf}", "placement", line->name, "cross",
                     ratio((double)t->cross, (double)base->result.traffic.cross), "cross_rows",
                     (double)t->cross / steps, "in_node_rows", (double)t->in_node / steps, "rows",
                     (double)t->rows / steps, "cross_bytes", (double)t->cross / steps * s->row_bytes, "busiest_nic",
                     ratio((double)t->busiest_nic, (double)base->result.traffic.busiest_nic), "nic_imbalance",
                     ratio((double)t->busiest_nic, (double)t->even_nic), "moved",
                     (double)t->moved / (layers * s->batch), "us_per_layer", t->us / layers, "us_per_step",
                     t->us / steps, "solver_us", line->result.solver_us);
}

static void print_lines(const struct line *lines, int n, const struct line *in_order, const struct ry_study *s)
{
    printf("    %-34s %9s %9s %9s %9s %10s %9s\n", "", "cross", "busiest", "NIC", "moved", "exchange", "solver");
    printf("    %-34s %9s %9s %9s %9s %10s %9s\n", "", "", "NIC", "max/mean", "a layer", "a layer", "a layer");
    for (int i = 0; i < n; i++) {
        const struct ry_traffic *t = &lines[i].result.traffic, *base = &in_order->result.traffic;
        double layers = (double)s->batches * s->routing->layers;
        printf("    %-34s %9.3f %9.3f %9.2f %7.0f %% %7.0f us", lines[i].name,
               ratio((double)t->cross, (double)base->cross), ratio((double)t->busiest_nic, (double)base->busiest_nic),
               ratio((double)t->busiest_nic, (double)t->even_nic), 100 * (double)t->moved / (layers * s->batch),
               t->us / layers);
        if (lines[i].result.solver_us > 0)
            printf(" %6.1f us", lines[i].result.solver_us);
        putchar('\n');
    }
}

/* What is made for one size of cluster. */
struct size {
    struct ry_study study;
    struct ry_cluster *cluster;
    int *expert_rank;
    struct ry_predictor *predictor;
    struct ry_cost_model model;
};

static void size_free(struct size *z)
{
    ry_cluster_free(z->cluster);
    ry_predictor_free(z->predictor);
    free(z->expert_rank);
}

static int size_new(struct size *z, const struct ry_routing *r, int nodes, struct ry_err *err)
{
    *z = (struct size){0};
    z->cluster = ry_place_cluster(nodes, args.ranks, args.nvlink, args.nic, err);
    z->expert_rank = malloc((size_t)r->layers * (size_t)r->experts * sizeof *z->expert_rank);
    if (!z->cluster || !z->expert_rank) {
        size_free(z);
        return z->cluster ? ry_fail(err, "out of memory") : -1;
    }
    if (ry_fabric_model(&z->model, z->cluster, args.cost, err)) {
        size_free(z);
        return -1;
    }
    z->study = (struct ry_study){.routing = r,
                                 .cluster = z->cluster,
                                 .expert_rank = z->expert_rank,
                                 .fit = args.fit,
                                 .end = args.counting == RY_DISTINCT ? r->choice_samples : r->samples,
                                 .batches = args.batches,
                                 .batch = args.batch,
                                 .seed = args.seed,
                                 .counting = args.counting,
                                 .row_bytes = args.row_bytes,
                                 .model = &z->model};
    if (ry_experts_contiguous(z->expert_rank, r->layers, r->experts, z->cluster->nranks, err) ||
        ry_study_check(&z->study, err) || !(z->predictor = ry_study_predictor(&z->study, args.history, err))) {
        size_free(z);
        return -1;
    }
    return 0;
}

static struct ry_netmoe_options netmoe_options(const struct size *z, enum ry_scatter scatter, enum ry_solver solver)
{
    return (struct ry_netmoe_options){
        .scatter = scatter,
        .predictor = z->predictor,
        .homes = {.solver = solver, .max_moved = args.max_moved, .busiest = args.busiest, .seed = args.seed}};
}

/* Layer placement by what is known of the next layer. `decline`: the planner would not, and no sample moves. */
static int savings(const struct size *z, struct line *lines, int *n, struct ry_worth *worth, struct ry_err *err)
{
    static const char *const names[] = {"NetMoE, gather only", "NetMoE, next layer predicted",
                                        "NetMoE, next layer known"};
    struct ry_netmoe_options o = netmoe_options(z, RY_SCATTER_PREDICTED, args.solver);
    if (ry_study_worth(&z->study, &o, args.history, args.margin, worth, err))
        return -1;
    lines[(*n)++].name = "samples in order";
    if (ry_study_netmoe(&z->study, &o, RY_WHEN_NEVER, &lines[0].result, err))
        return -1;
    for (int k = RY_SCATTER_OFF; k <= RY_SCATTER_GIVEN; k++) {
        o.scatter = (enum ry_scatter)k;
        lines[*n].name = names[k];
        if (ry_study_netmoe(&z->study, &o, RY_WHEN_EACH_LAYER, &lines[(*n)++].result, err))
            return -1;
    }
    lines[*n].name = worth->worth ? "the planner's choice: place" : "the planner's choice: no moves";
    lines[*n].result = lines[worth->worth ? 2 : 0].result;
    (*n)++;
    return 0;
}

static int ablation(const struct size *z, struct line *lines, int *n, struct ry_err *err)
{
    static const struct {
        const char *name;
        enum ry_when when;
    } rest[] = {{"each layer", RY_WHEN_EACH_LAYER},
                {"once, after the first layer", RY_WHEN_ONCE},
                {"never: placement removed", RY_WHEN_NEVER}};
    static char names[RY_SOLVERS][32];
    for (int s = 0; s < RY_SOLVERS; s++) {
        struct ry_netmoe_options o = netmoe_options(z, RY_SCATTER_PREDICTED, (enum ry_solver)s);
        snprintf(names[s], sizeof names[s], "%s", ry_solver_name((enum ry_solver)s));
        lines[*n].name = names[s];
        if (ry_study_netmoe(&z->study, &o, s == RY_SOLVE_NONE ? RY_WHEN_NEVER : RY_WHEN_EACH_LAYER,
                            &lines[(*n)++].result, err))
            return -1;
    }
    struct ry_netmoe_options o = netmoe_options(z, RY_SCATTER_PREDICTED, RY_SOLVE_EXACT);
    for (size_t k = 0; k < sizeof rest / sizeof *rest; k++) {
        lines[*n].name = rest[k].name;
        if (ry_study_netmoe(&z->study, &o, rest[k].when, &lines[(*n)++].result, err))
            return -1;
    }
    lines[*n].name = "one home, all routing known";
    return ry_study_homes(&z->study, &o.homes, &lines[(*n)++].result, err);
}

static int plan_size(const struct ry_routing *r, int nodes, bool quiet, json_t *list, struct ry_err *err)
{
    struct size z;
    struct line lines[16] = {0};
    struct ry_worth worth = {0};
    int n = 0;
    if (size_new(&z, r, nodes, err))
        return -1;
    int failed = args.ablate ? ablation(&z, lines, &n, err) : savings(&z, lines, &n, &worth, err);
    if (!failed && !quiet) {
        printf("\n  %d nodes x %d GPUs\n", nodes, args.ranks);
        if (args.ablate) {
            puts("    NetMoE, next layer predicted, homes by");
            print_lines(lines, RY_SOLVERS, lines, &z.study);
            puts("    exact solver, homes chosen");
            print_lines(lines + RY_SOLVERS, n - RY_SOLVERS, lines, &z.study);
        } else {
            print_lines(lines, n, lines, &z.study);
            printf("    %s\n", worth.why);
        }
    }
    json_t *rows = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(rows, line_json(&lines[i], &lines[0], &z.study));
    json_t *one = json_pack("{si si so}", "nodes", nodes, "gpus", args.ranks, "rows", rows);
    if (!args.ablate)
        json_object_set_new(one, "worth",
                            json_pack("{sb sf sf ss}", "place", worth.worth, "dispersion", worth.dispersion,
                                      "trial_gain", worth.gain, "why", worth.why));
    json_array_append_new(list, one);
    size_free(&z);
    return failed;
}

static struct ry_routing *open_routing(const char *dir, struct ry_err *err)
{
    struct ry_routing *r = ry_routing_open(dir, err);
    if (!r || !args.shuffled)
        return r;
    struct ry_routing *shuffled = ry_routing_shuffled(r, args.shuffle, err);
    ry_routing_close(r);
    return shuffled;
}

static json_t *protocol_json(void)
{
    return json_pack("{si si si sI ss}", "fit", args.fit, "batches", args.batches, "batch", args.batch, "seed",
                     (json_int_t)args.seed, "count", ry_counting_name(args.counting));
}

/* All folders by --compare. */
static int compare_all(json_t *out, bool quiet, struct ry_err *err)
{
    json_t *traces = json_array();
    int failed = 0;
    json_object_set_new(out, "protocol", protocol_json());
    json_object_set_new(out, "traces", traces);
    if (!quiet)
        printf("%d samples to learn from, %d batches of %d from the rest, seed %lu; ratios: what crosses nodes to what "
               "(token, expert) copies cross with samples in order and experts in contiguous blocks\n",
               args.fit, args.batches, args.batch, args.seed);
    for (int i = 0; i < args.ndirs && !failed; i++) {
        struct ry_routing *r = open_routing(args.dirs[i], err);
        if (!r)
            return -1;
        struct ry_study study = {.routing = r,
                                 .fit = args.fit,
                                 .end = r->samples,
                                 .batches = args.batches,
                                 .batch = args.batch,
                                 .seed = args.seed,
                                 .counting = RY_COPIES,
                                 .row_bytes = args.row_bytes};
        if (!quiet)
            printf("\n%s\n", args.dirs[i]);
        json_t *one = plan_compare(&study, args.nodes, args.nsizes, args.ranks, &args.files, quiet, err);
        failed = one ? 0 : -1;
        if (one) {
            json_object_set_new(one, "dir", json_string(args.dirs[i]));
            json_array_append_new(traces, one);
        }
        ry_routing_close(r);
    }
    return failed;
}

static int write_json(const char *argv0, json_t *out)
{
    if (!args.json)
        return 0;
    if (!strcmp(args.json, "-"))
        return json_dumpf(out, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) || puts("") < 0;
    if (json_dump_file(out, args.json, JSON_INDENT(1) | JSON_REAL_PRECISION(6)))
        return command_fail(argv0, "%s: cannot be written: %s", args.json, strerror(errno));
    return 0;
}

int cmd_plan(int argc, char **argv)
{
    struct ry_err err;
    args.ranks = 4;
    args.fit = 1024;
    args.batches = 16;
    args.batch = 128;
    args.seed = 1;
    args.history = 4;
    args.max_moved = -1;
    args.row_bytes = 4096;
    args.nvlink = 400;
    args.nic = 100;
    args.margin = 0.03;
    args.solver = RY_SOLVE_EXACT;
    memcpy(args.nodes, (int[]){2, 4, 8}, 3 * sizeof(int));
    args.nsizes = 3;
    if (argp_parse(&argp, argc, argv, 0, NULL, NULL))
        return 2;
    bool quiet = args.json && !strcmp(args.json, "-");
    struct ry_routing *r = NULL;
    if (args.dir && !args.compare && !(r = open_routing(args.dir, &err)))
        return command_fail(argv[0], "%s", err.msg);
    json_t *out = json_pack("{ss si}", "schema", "railyard-plan", "version", 1), *list = json_array();
    int failed = 0;
    if (r) {
        json_object_set_new(out, "trace",
                            json_pack("{ss si si si si si sb}", "dir", args.dir, "samples", r->samples, "layers",
                                      r->layers, "experts", r->experts, "topk", r->topk, "tokens_per_sample",
                                      r->tokens_per_sample, "shuffled", args.shuffled));
        json_object_set_new(out, "protocol", protocol_json());
        if (!quiet)
            printf("%s%s: %d samples of %d tokens, %d layers of %d experts, top-%d\n", args.dir,
                   args.shuffled ? ", shuffled" : "", r->samples, r->tokens_per_sample, r->layers, r->experts, r->topk);
    }
    if (args.compare) {
        failed = compare_all(out, quiet, &err);
    } else if (args.local) {
        struct ry_study study = {.routing = r, .batch = args.batch};
        json_t *local = plan_local(&study, args.nodes, args.nsizes, args.ranks, quiet, &err);
        failed = local ? json_object_set_new(out, "locality", local) : -1;
    } else if (args.speed) {
        json_t *speed = plan_speed(r, args.seed, quiet, &err);
        failed = speed ? json_object_set_new(out, "speed", speed) : -1;
    } else {
        if (!quiet)
            printf(
                "%d to learn from, %d batches of %d from the rest, seed %lu; %s counted, ratios to samples in order\n",
                args.fit, args.batches, args.batch, args.seed,
                args.counting == RY_DISTINCT ? "distinct (token, node) pairs" : "(token, expert) copies");
        for (int i = 0; i < args.nsizes && !failed; i++)
            failed = plan_size(r, args.nodes[i], quiet, list, &err);
        json_object_set(out, "clusters", list);
    }
    int status = failed ? command_fail(argv[0], "%s", err.msg) : write_json(argv[0], out);
    json_decref(list);
    json_decref(out);
    ry_routing_close(r);
    return status;
}
