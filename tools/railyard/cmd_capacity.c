/*
 * cmd_capacity.c: `railyard capacity`: how many tokens an expert must have room for, by LocMoE's bounds and in recorded
 * routing.
 *
 * Owns: options, checking shapes, wording. Not: arithmetic (place/capacity.h).
 */
#include <argp.h>
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/npy.h"
#include "command.h"
#include "place/capacity.h"

static struct {
    const char *gates, *tokens, *routing, *json;
    int grap, batch;
} args;

enum { KEY_GRAP = 256 };

static int number(struct argp_state *state, const char *option, const char *text, long most)
{
    char *end;
    errno = 0;
    long v = strtol(text, &end, 10);
    if (errno || end == text || *end || v < 1 || v > most)
        argp_error(state, "--%s takes a whole number from 1 to %ld, not '%s'", option, most, text);
    return (int)v;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    switch (key) {
    case 'w':
        args.gates = arg;
        return 0;
    case KEY_GRAP:
        args.grap = number(state, "grap", arg, RY_ROUTING_EXPERTS);
        return 0;
    case 't':
        args.tokens = arg;
        return 0;
    case 'r':
        args.routing = arg;
        return 0;
    case 'b':
        args.batch = number(state, "batch", arg, 1 << 20);
        return 0;
    case 'j':
        args.json = arg;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "'%s': files are named by options", arg);
        return 0;
    case ARGP_KEY_END:
        if (args.gates && args.grap)
            argp_error(state, "--gates and --grap are two kinds of gates: take one");
        if (!args.tokens != !(args.gates || args.grap))
            argp_error(state, "the bounds need both gates (--gates or --grap) and --tokens");
        if (!args.tokens && !args.routing)
            argp_error(state, "nothing to do: --gates and --tokens for the bounds, --routing for what was used");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option options[] = {
    {"gates", 'w', "FILE", 0,
     "gate weights, .npy of float32 or float64, [experts][hidden] or [layers][experts][hidden]", 0},
    {"grap", KEY_GRAP, "EXPERTS", 0, "instead: LocMoE's grouped average pooling with so many experts", 0},
    {"tokens", 't', "FILE", 0,
     "what the router sees of some tokens, .npy, [tokens][hidden] or [layers][tokens][hidden]", 0},
    {"routing", 'r', "DIR", 0, "recorded routing: what experts were really given (see routing-format.md)", 0},
    {"batch", 'b', "SAMPLES", 0,
     "samples that share the experts' room, such as a micro-batch of all ranks that share "
     "experts (default 8)",
     0},
    {"json", 'j', "FILE", 0, "write it as JSON, too; with - only that, to stdout", 0},
    {0}};

static const struct argp parser = {options,
                                   parse,
                                   NULL,
                                   "How much room experts need: LocMoE's lower bounds on expert capacity, from gate "
                                   "weights and tokens, with what they assume "
                                   "checked on these; and the capacity that recorded routing took. Capacities are "
                                   "factors: 1 is room for an even share of the "
                                   "tokens.\v"
                                   "PyTorch: numpy.save(\"gates.npy\", router.weight.detach().float().cpu().numpy()), "
                                   "and the router's input likewise for tokens.",
                                   NULL,
                                   NULL,
                                   NULL};

/* ---- the bounds ---- */

static bool is_real(const struct ry_npy *a)
{
    return a->type == RY_NPY_F32 || a->type == RY_NPY_F64;
}

/* Layers of an array of two or three dimensions, rows and columns. */
struct shape {
    size_t layers, rows, columns;
};

static int open_array(struct ry_npy *a, struct shape *s, const char *path, const char *rows, struct ry_err *err)
{
    if (ry_npy_open(a, path, err))
        return -1;
    if (!is_real(a))
        return ry_fail(err, "%s: holds %s; save it as float32", path, ry_npy_type_name(a->type));
    if (a->ndim != 2 && a->ndim != 3)
        return ry_fail(err, "%s: has %d dimensions; needs [%s][hidden] or [layers][%s][hidden]", path, a->ndim, rows,
                       rows);
    *s = (struct shape){a->ndim == 3 ? a->shape[0] : 1, a->shape[a->ndim - 2], a->shape[a->ndim - 1]};
    if (!s->layers || !s->rows || s->columns < 2 || s->columns > 1 << 24 ||
        (*rows == 'e' && s->rows > RY_ROUTING_EXPERTS))
        return ry_fail(err, "%s: %zu layers of %zu x %zu numbers are no %s", path, s->layers, s->rows, s->columns,
                       rows);
    return 0;
}

/* One of the assumptions: what was measured, what it should be, whether that is too far off, and what follows. */
struct assumption {
    const char *name, *what, *then;
    double measured, assumed;
    bool violated;
};
#define ASSUMPTIONS 6

/* Thresholds are coarse on purpose: real routers are far off or near. */
static int assumptions(struct assumption *out, const struct ry_affinity *a)
{
    double chance = sqrt(2 * log(fmax(2, (double)a->experts)) / a->hidden), even = 1 / sqrt((double)a->tokens);
    out[0] = (struct assumption){"gates_orthogonal",
                                 "gates at right angles: greatest |cos| of two",
                                 "experts share what they prefer",
                                 a->gate_cos_max,
                                 0,
                                 a->gate_cos_max > fmax(0.1, 3 * chance)};
    out[1] = (struct assumption){"gates_alike",
                                 "gates of one length: longest over shortest",
                                 "long gates win tokens by their length, not their direction",
                                 a->gate_norm_max / a->gate_norm_min,
                                 1,
                                 a->gate_norm_max > 1.5 * a->gate_norm_min};
    out[2] = (struct assumption){"tokens_centred",
                                 "tokens all around: length of their mean direction",
                                 "tokens have a direction in common, which some gates are nearer to",
                                 a->drift,
                                 even,
                                 a->drift > 0.1 + 3 * even};
    out[3] = (struct assumption){"tokens_even",
                                 "tokens in all dimensions: dimensions they fill",
                                 "d in the bounds is too large",
                                 a->dimensions,
                                 a->hidden,
                                 a->dimensions < a->hidden / 2.0};
    out[4] = (struct assumption){"affinity_scale",
                                 "cos(token, gate) times sqrt(d): standard deviation",
                                 "affinities spread more, or less, than chance makes them",
                                 a->cos_sd,
                                 1,
                                 a->cos_sd > 1.25 || a->cos_sd < 0.8};
    out[5] = (struct assumption){"affinity_shape",
                                 "its distribution: greatest distance from the sphere's",
                                 "affinities are not those of an even sphere",
                                 a->ks,
                                 0,
                                 a->ks > 0.05};
    return ASSUMPTIONS;
}

static void print_factor(const char *name, double log_factor, int experts)
{
    if (log_factor >= log(experts))
        printf("    %-8s %9s  says nothing: e^%.1f is room for more tokens than there are\n", name, "-", log_factor);
    else
        printf("    %-8s %9.4g  %.4g %% of a batch's tokens per expert\n", name, exp(log_factor),
               100 * exp(log_factor) / experts);
}

static json_t *factor(double log_factor)
{
    json_t *f = json_pack("{s:o}", "log", isfinite(log_factor) ? json_real(log_factor) : json_null());
    double v = exp(log_factor);
    json_object_set_new(f, "factor", isfinite(v) ? json_real(v) : json_null());
    return f;
}

static json_t *one_layer(int layer, const struct ry_affinity *a, bool print)
{
    struct ry_capacity_bounds max = ry_capacity_bounds(fmin(a->delta, 1), a->hidden),
                              typical = ry_capacity_bounds(fmin(fmax(a->best[0], 0), 1), a->hidden);
    struct assumption list[ASSUMPTIONS];
    int n = assumptions(list, a), violated = 0;
    for (int i = 0; i < n; i++)
        violated += list[i].violated;
    if (print) {
        printf("  layer %d: %d experts, %d numbers, %zu tokens%s\n", layer, a->experts, a->hidden, a->tokens,
               a->zero_tokens ? " (zeros left out)" : "");
        printf("    affinity of tokens for their best expert: median %.4f, 90 %% %.4f, 99 %% %.4f, greatest (delta) "
               "%.4f\n",
               a->best[0], a->best[1], a->best[2], a->delta);
        printf("    lower bound on the capacity factor, from the greatest affinity\n");
        print_factor("sphere", max.sphere, a->experts);
        print_factor("erfc", max.erfc, a->experts);
        print_factor("exp", max.exp, a->experts);
        printf("    from the median: sphere %.4g, erfc %.4g, exp %.4g\n", exp(typical.sphere), exp(typical.erfc),
               exp(typical.exp));
        printf("    assumed %53s %10s\n", "measured", "assumed");
        for (int i = 0; i < n; i++)
            printf("      %-48s %10.4g %10.4g%s%s\n", list[i].what, list[i].measured, list[i].assumed,
                   list[i].violated ? "  does not hold: " : "", list[i].violated ? list[i].then : "");
        if (violated)
            printf("    look at  %d of %d assumptions do not hold here: the bounds are not bounds for these tokens\n",
                   violated, n);
    }
    json_t *checks = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(checks,
                              json_pack("{s:s, s:f, s:f, s:b}", "name", list[i].name, "measured", list[i].measured,
                                        "assumed", list[i].assumed, "violated", list[i].violated));
    return json_pack("{s:i, s:i, s:i, s:I, s:I, s:f, s:[f,f,f], s:o, s:o, s:o, s:o}", "layer", layer, "experts",
                     a->experts, "hidden", a->hidden, "tokens", (json_int_t)a->tokens, "zero_tokens",
                     (json_int_t)a->zero_tokens, "delta", a->delta, "best_affinity", a->best[0], a->best[1], a->best[2],
                     "sphere", factor(max.sphere), "erfc", factor(max.erfc), "exp", factor(max.exp), "assumptions",
                     checks);
}

static int bounds(json_t *out, bool print, struct ry_err *err)
{
    struct ry_npy gates = {0}, tokens = {0};
    struct shape g = {0}, t;
    float *grap = NULL;
    json_t *list = json_array();
    json_object_set_new(out, "bounds", list);
    int rc = -1;
    if (open_array(&tokens, &t, args.tokens, "tokens", err))
        goto out;
    if (args.grap) {
        g = (struct shape){1, (size_t)args.grap, t.columns};
        if (g.rows > g.columns || !(grap = malloc(g.rows * g.columns * sizeof *grap))) {
            ry_fail(err, "%s: %zu numbers cannot be grouped for %d experts", args.tokens, t.columns, args.grap);
            goto out;
        }
        ry_capacity_grap(grap, args.grap, (int)t.columns);
    } else if (open_array(&gates, &g, args.gates, "experts", err)) {
        goto out;
    }
    if (g.columns != t.columns || (g.layers != t.layers && g.layers != 1)) {
        ry_fail(err, "%s has %zu layers of %zu numbers a token, %s %zu of %zu", args.tokens, t.layers, t.columns,
                args.gates ? args.gates : "the gates", g.layers, g.columns);
        goto out;
    }
    if (print)
        printf("LocMoE's lower bounds, %s%s, tokens of %s\n", args.grap ? "grouped average pooling" : "gates of ",
               args.grap ? "" : args.gates, args.tokens);
    for (size_t l = 0; l < t.layers; l++) {
        struct ry_affinity a;
        size_t gb = args.grap ? sizeof(float) : ry_npy_type_bytes(gates.type), tb = ry_npy_type_bytes(tokens.type);
        size_t gl = g.layers == 1 ? 0 : l;
        const char *gate_at = args.grap ? (const char *)grap : (const char *)gates.data + gl * g.rows * g.columns * gb;
        if (ry_affinity_measure(&a, gate_at, gb, (int)g.rows, (const char *)tokens.data + l * t.rows * t.columns * tb,
                                tb, t.rows, (int)t.columns, err)) {
            struct ry_err why = *err;
            ry_fail(err, "%s, %s, layer %zu: %.300s", args.grap ? "grouped average pooling" : args.gates, args.tokens,
                    l, why.msg);
            goto out;
        }
        json_array_append_new(list, one_layer((int)l, &a, print));
    }
    rc = 0;
out:
    free(grap);
    ry_npy_close(&gates);
    ry_npy_close(&tokens);
    return rc;
}

/* ---- what was used ---- */

static int used(json_t *out, bool print, struct ry_err *err)
{
    struct ry_routing *r = ry_routing_open(args.routing, err);
    if (!r)
        return -1;
    json_t *list = json_array();
    json_object_set_new(out, "used",
                        json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:o}", "routing", args.routing, "batch", args.batch,
                                  "experts", r->experts, "topk", r->topk, "tokens_per_sample", r->tokens_per_sample,
                                  "samples", r->samples, "layers", list));
    int rc = 0;
    double most = 0, usual = 0;
    for (int l = 0; l < r->layers && !rc; l++) {
        struct ry_capacity_used u;
        if ((rc = ry_capacity_used(&u, r, l, args.batch, err)))
            break;
        double at_one = ry_capacity_dropped(r, l, args.batch, 1), at_more = ry_capacity_dropped(r, l, args.batch, 1.25);
        if (print && !l) {
            printf("capacity that routing took: %s, %d experts, top-%d, batches of %d samples x %d tokens: %.6g rows "
                   "are an even share\n",
                   args.routing, r->experts, r->topk, args.batch, r->tokens_per_sample, u.mean_tokens);
            printf("  factors of the even share         busiest expert of a batch                any expert          "
                   "lost with room for\n");
            printf("  layer   mean  median    95 %%    99 %%    most      5 %%  median    95 %%       1       1.25\n");
        }
        if (print) {
            printf("  %5d %6.2f %7.2f %7.2f %7.2f %7.2f  %7.2f %7.2f %7.2f  %5.1f %%   %5.1f %%", l, u.busiest_mean,
                   u.busiest[0], u.busiest[1], u.busiest[2], u.most, u.load[0], u.load[2], u.load[4], 100 * at_one,
                   100 * at_more);
            printf(u.missing > 1e-9 ? "  %.2g %% were dropped already\n" : "\n", 100 * u.missing);
        }
        most = fmax(most, u.most);
        usual = fmax(usual, u.busiest[1]);
        json_array_append_new(list,
                              json_pack("{s:i, s:i, s:f, s:f, s:[f,f,f], s:f, s:[f,f,f,f,f], s:f, s:f, s:f}", "layer",
                                        l, "batches", u.batches, "even_rows", u.mean_tokens, "busiest_mean",
                                        u.busiest_mean, "busiest", u.busiest[0], u.busiest[1], u.busiest[2], "most",
                                        u.most, "load", u.load[0], u.load[1], u.load[2], u.load[3], u.load[4],
                                        "missing", u.missing, "dropped_at_1", at_one, "dropped_at_1.25", at_more));
    }
    if (!rc && print)
        printf("  room for nothing to be dropped: %.2f; in 19 of 20 batches of every layer: %.2f\n", most, usual);
    if (!rc) {
        json_object_set_new(json_object_get(out, "used"), "most", json_real(most));
        json_object_set_new(json_object_get(out, "used"), "usual", json_real(usual));
    }
    ry_routing_close(r);
    return rc;
}

int cmd_capacity(int argc, char **argv)
{
    struct ry_err err;
    args.batch = 8;
    argp_parse(&parser, argc, argv, 0, NULL, NULL);
    bool print = !args.json || strcmp(args.json, "-");
    json_t *out = json_pack("{s:s, s:i}", "schema", "railyard-capacity", "version", 1);
    int status = 0;
    if ((args.tokens && bounds(out, print, &err)) || (args.routing && used(out, print, &err)))
        status = command_fail(argv[0], "%s", err.msg);
    else if (args.json && (print ? json_dump_file(out, args.json, JSON_INDENT(1) | JSON_REAL_PRECISION(8))
                                 : json_dumpf(out, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(8)) || puts("") < 0))
        status = command_fail(argv[0], "%s: cannot be written: %s", args.json, strerror(errno));
    json_decref(out);
    return status;
}
