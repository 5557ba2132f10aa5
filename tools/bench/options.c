/* options.c: see options.h. */
#include "options.h"

#include <argp.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *const ry_bench_check_names[] = {"every", "first", "none", NULL};

/* The masks clear the top bit of the exponent: any other bits are then a finite number, of magnitude below 2. */
static const struct ry_bench_type types[] = {
    {"bf16", ncclBfloat16, 2, UINT64_C(0x4000400040004000)},
    {"fp16", ncclFloat16, 2, UINT64_C(0x4000400040004000)},
    {"fp32", ncclFloat32, 4, UINT64_C(0x4000000040000000)},
    {"fp64", ncclFloat64, 8, UINT64_C(0x4000000000000000)},
    {"int8", ncclInt8, 1, 0},
    {"uint8", ncclUint8, 1, 0},
    {"int32", ncclInt32, 4, 0},
    {"int64", ncclInt64, 8, 0},
};

enum {
    OPT_LAYERS = 256,
    OPT_WARMUP,
    OPT_PROBS_TYPE,
    OPT_PAD,
    OPT_CHECK,
    OPT_DIGEST,
    OPT_BARRIER,
    OPT_JSON,
    OPT_MATRIX,
    OPT_CORRUPT,
    OPT_SEED,
};

static const struct argp_option options[] = {
    {0, 0, 0, 0, "The model:", 1},
    {"experts", 'e', "N", 0, "Experts of one layer, a multiple of the ranks (default: 4 per rank)", 0},
    {"top-k", 'k', "N", 0, "Experts that each token is sent to (default: 2)", 0},
    {"tokens", 't', "N", 0, "Tokens per rank and iteration (default: 256)", 0},
    {"hidden", 'H', "N", 0, "Elements of one row (default: 512)", 0},
    {"layers", OPT_LAYERS, "N", 0, "MoE layers (default: 2, or all that the trace has)", 0},
    {"type", 'T', "TYPE", 0, "Element type of rows: bf16 (default), fp16, fp32, fp64, int8, uint8, int32, int64", 0},
    {"probs-type", OPT_PROBS_TYPE, "TYPE", 0, "Element type of the probabilities (default: fp32)", 0},
    {0, 0, 0, 0, "The routing:", 2},
    {"routing", 'r', "HOW", 0,
     "uniform (default); zipf:S, experts with popularity 1/rank^S; trace:DIR, recorded routing (meta.json, counts.npy, "
     "choices.npy), which also sets --experts and --top-k",
     0},
    {"pad", OPT_PAD, "FACTOR", 0,
     "Give every expert ceil(FACTOR * tokens * top-k / experts) rows from each rank, padded with zero rows, what is "
     "over "
     "dropped, and use ncclAlltoAll: DeepSpeed's way. Without it counts are exact and swapped first: Megatron's way",
     0},
    {"seed", OPT_SEED, "N", 0, "Everything drawn depends on this only (default: 1)", 0},
    {0, 0, 0, 0, "The run:", 3},
    {"iterations", 'i', "N", 0, "Iterations that are timed (default: 4)", 0},
    {"warmup", OPT_WARMUP, "N", 0, "Iterations before them (default: 1); they are checked and counted like the others",
     0},
    {"check", OPT_CHECK, "WHEN", 0, "Check each received byte in every iteration (default), the first one, or none", 0},
    {"barrier", OPT_BARRIER, 0, 0,
     "Let all ranks meet before each exchange, so that times hold no waiting for late ranks", 0},
    {"corrupt", OPT_CORRUPT, "X", 0,
     "Flip one received byte after exchange number X on the last rank, to see the check fail", 0},
    {0, 0, 0, 0, "What comes out:", 4},
    {"json", OPT_JSON, "FILE", 0, "Write the result as JSON (rank 0)", 0},
    {"matrix", OPT_MATRIX, "FILE", 0,
     "Write the bytes sent from each rank (row) to each rank (column), uint64 .npy (rank 0)", 0},
    {"digest", OPT_DIGEST, 0, 0,
     "Print one digest of all bytes that all ranks received: equal for equal options, whatever the timing, so that two "
     "runs "
     "can be compared bit for bit",
     0},
    {0},
};

static int number(struct argp_state *state, const char *name, const char *arg, int low, int high, int *out)
{
    char *end;
    errno = 0;
    long v = strtol(arg, &end, 10);
    if (errno || end == arg || *end || v < low || v > high) {
        argp_error(state, "--%s=%s: expected a whole number from %d to %d", name, arg, low, high);
        return EINVAL;
    }
    *out = (int)v;
    return 0;
}

static int number64(struct argp_state *state, const char *name, const char *arg, uint64_t *out)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(arg, &end, 10);
    if (errno || *arg < '0' || *arg > '9' || *end) {
        argp_error(state, "--%s=%s: expected a whole number from 0 to %llu", name, arg, ULLONG_MAX);
        return EINVAL;
    }
    *out = v;
    return 0;
}

static int type(struct argp_state *state, const char *name, const char *arg, const struct ry_bench_type **out)
{
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (!strcmp(arg, types[i].name)) {
            *out = &types[i];
            return 0;
        }
    argp_error(state, "--%s=%s: known types are bf16, fp16, fp32, fp64, int8, uint8, int32 and int64", name, arg);
    return EINVAL;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct ry_bench_options *o = state->input;
    char *end;
    switch (key) {
    case 'e':
        return number(state, "experts", arg, 1, 65535, &o->routing.experts);
    case 'k':
        return number(state, "top-k", arg, 1, 64, &o->routing.top_k);
    case 't':
        return number(state, "tokens", arg, 1, 1 << 24, &o->routing.tokens);
    case 'H':
        return number(state, "hidden", arg, 1, 1 << 24, &o->hidden);
    case OPT_LAYERS:
        return number(state, "layers", arg, 1, 10000, &o->routing.layers);
    case 'T':
        return type(state, "type", arg, &o->type);
    case OPT_PROBS_TYPE:
        return type(state, "probs-type", arg, &o->probs_type);
    case 'r':
        o->routing.how = arg;
        return 0;
    case OPT_PAD:
        errno = 0;
        o->pad = strtod(arg, &end);
        if (end == arg || *end || !isfinite(o->pad) || o->pad <= 0 || o->pad > 1e6) {
            argp_error(state, "--pad=%s: expected a capacity factor above 0, as in 1.25", arg);
            return EINVAL;
        }
        return 0;
    case OPT_SEED:
        return number64(state, "seed", arg, &o->routing.seed);
    case 'i':
        return number(state, "iterations", arg, 1, 100000000, &o->iterations);
    case OPT_WARMUP:
        return number(state, "warmup", arg, 0, 100000000, &o->warmup);
    case OPT_CHECK:
        for (int i = 0; ry_bench_check_names[i]; i++)
            if (!strcmp(arg, ry_bench_check_names[i])) {
                o->check = (enum ry_bench_check)i;
                return 0;
            }
        argp_error(state, "--check=%s: expected every, first or none", arg);
        return EINVAL;
    case OPT_BARRIER:
        o->barrier = true;
        return 0;
    case OPT_CORRUPT:
        if (number64(state, "corrupt", arg, &o->corrupt))
            return EINVAL;
        o->corrupt++;
        return 0;
    case OPT_JSON:
        o->json = arg;
        return 0;
    case OPT_MATRIX:
        o->matrix = arg;
        return 0;
    case OPT_DIGEST:
        o->digest = true;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument '%s'", arg);
        return EINVAL;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp argp = {
    options,
    parse,
    0,
    "Do the exchanges of mixture-of-experts layers through NCCL, check every byte that arrives, and time them.\v"
    "Start one process per rank, with the environment variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, "
    "LOCAL_WORLD_SIZE, GROUP_RANK, "
    "MASTER_ADDR, MASTER_PORT):\n\n"
    "  railyard emu -n 2 -g 4 -- railyard bench          emulated cluster, no GPU\n"
    "  torchrun --nproc-per-node 8 --no-python railyard bench\n\n"
    "For each layer: an all-gather of expert counts, then dispatch, probs and combine; and backward, in reverse order "
    "of "
    "the layers: combine-gradient, probs-gradient and dispatch-gradient. With --pad only those of rows, with equal "
    "counts. "
    "Exit status: 0, all is well; 1, wrong bytes or a failed call; 2, wrong usage.",
    0,
    0,
    0};

void ry_bench_let_rank_0_speak(void)
{
    sleep(2);
}

int ry_bench_options(int argc, char **argv, struct ry_bench_options *out, int *status)
{
    *out = (struct ry_bench_options){
        .routing = {.how = "uniform", .tokens = 256, .seed = 1},
        .hidden = 512,
        .iterations = 4,
        .warmup = 1,
        .type = &types[0],
        .probs_type = &types[2],
    };
    struct ry_err err = {""};
    int job = ry_ranks_from_env(&out->ranks, &err);
    bool quiet = !job && out->ranks.rank > 0;
    argp_err_exit_status = 2;
    if (quiet) {
        /* One voice is enough: rank 0 prints the same help or complaint. */
        for (int i = 1; i < argc; i++)
            if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "--usage") || !strcmp(argv[i], "-?"))
                return *status = 0, 1;
        if (argp_parse(&argp, argc, argv, ARGP_NO_ERRS | ARGP_NO_EXIT, 0, out)) {
            ry_bench_let_rank_0_speak();
            return *status = 2, 1;
        }
    } else if (argp_parse(&argp, argc, argv, 0, 0, out)) {
        return *status = 2, 1;
    }
    *status = 2;
    if (!getenv("RANK") && !getenv("WORLD_SIZE")) {
        fprintf(stderr,
                "%s: this is one rank of a job, but RANK and WORLD_SIZE are not set. Start all ranks by one of\n"
                "  railyard emu -n 2 -g 4 -- railyard bench ...\n"
                "  torchrun --nproc-per-node 8 --no-python railyard bench ...\n",
                argv[0]);
        return 1;
    }
    if (job) {
        fprintf(stderr, "%s: %s\n", argv[0], err.msg);
        return 1;
    }
    out->routing.ranks = out->ranks.world;
    return *status = 0, 0;
}
