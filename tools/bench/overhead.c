/*
 * overhead.c: railyard-overhead: what a call costs that Railyard intercepts and passes on.
 *
 * Owns: the measurement. The same few calls are made in two ways in one process: publicly (ncclX, as any program calls
 * it: through the preload where there is one) and directly (pncclX of the real library, which the preload calls too),
 * in short blocks that alternate, so that both see the same machine. What is reported is the median of the paired
 * differences; run without a preload, it shows the error of the method. `--callgrind N` makes N public calls in
 * ry_overhead_calls() and nothing else of interest, so that instructions can be counted there. Not: how long exchanges
 * take (railyard-bench), nor start-up.
 */
#include <argp.h>
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>
#include <nccl.h>

#include "base/clock.h"
#include "device/device.h"

/* The calls in question, resolved in one of the two ways. */
struct way {
    ncclResult_t (*group_start)(void);
    ncclResult_t (*group_end)(void);
    ncclResult_t (*send)(const void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
    ncclResult_t (*recv)(void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
    ncclResult_t (*all_gather)(const void *, void *, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
};

static ncclComm_t comm;
static void *stream, *buffer;

static ncclResult_t op_group(const struct way *w)
{
    ncclResult_t r = w->group_start();
    return r ? r : w->group_end();
}

static ncclResult_t op_pairs(const struct way *w, int pairs)
{
    ncclResult_t r = w->group_start();
    for (int i = 0; i < pairs; i++) {
        r = r ? r : w->send(buffer, 0, ncclInt8, 0, comm, stream);
        r = r ? r : w->recv(buffer, 0, ncclInt8, 0, comm, stream);
    }
    ncclResult_t end = w->group_end();
    return r ? r : end;
}

static ncclResult_t op_exchange(const struct way *w)
{
    return op_pairs(w, 1);
}

static ncclResult_t op_plain(const struct way *w)
{
    return op_pairs(w, 2);
}

static ncclResult_t op_collective(const struct way *w)
{
    return w->all_gather(buffer, buffer, 0, ncclInt8, comm, stream);
}

static const struct op {
    const char *name, *help;
    int calls; /* of NCCL, per operation */
    ncclResult_t (*run)(const struct way *w);
} ops[] = {
    {"group", "a group that holds nothing", 2, op_group},
    {"exchange", "a group with one send and one receive of 0 bytes on a communicator of one rank: an exchange", 4,
     op_exchange},
    {"plain", "the same with two of each: a group that is no exchange", 6, op_plain},
    {"collective", "an all-gather of 0 bytes", 1, op_collective},
};
#define OPS (sizeof ops / sizeof *ops)

struct options {
    int rounds;
    uint64_t callgrind;
    bool counting;       /* --callgrind given */
    const struct op *op; /* NULL: all */
    const char *json;
    double limit; /* ns per call; 0: none */
};

static const struct argp_option option_list[] = {
    {"rounds", 'r', "N", 0, "Pairs of blocks to time for each operation (default: 400)", 0},
    {"case", 'c', "NAME", 0, "Only this operation: group, exchange, plain or collective", 0},
    {"json", 'j', "FILE", 0, "Write the result as JSON", 0},
    {"limit", 'l', "NS", 0, "Exit with 1 if a call costs more than this many nanoseconds over the direct one (median)",
     0},
    {"callgrind", 'g', "N", 0,
     "Time nothing: do the --case (default: group) N times in the public way, for counting instructions: "
     "valgrind --tool=callgrind --toggle-collect=ry_overhead_calls railyard-overhead --callgrind 10000, "
     "with LD_PRELOAD and without",
     0},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct options *o = state->input;
    char *end;
    switch (key) {
    case 'r':
    case 'g':
        errno = 0;
        unsigned long long v = strtoull(arg, &end, 10);
        if (errno || *arg < '0' || *arg > '9' || *end || (key == 'r' && (v < 3 || v > 1000000))) {
            argp_error(state, "'%s' is no usable number%s", arg, key == 'r' ? " (3 to 1000000)" : "");
            return EINVAL;
        }
        if (key == 'r') {
            o->rounds = (int)v;
        } else {
            o->callgrind = v;
            o->counting = true;
        }
        return 0;
    case 'c':
        for (size_t i = 0; i < OPS; i++)
            if (!strcmp(arg, ops[i].name)) {
                o->op = &ops[i];
                return 0;
            }
        argp_error(state, "--case=%s: expected group, exchange, plain or collective", arg);
        return EINVAL;
    case 'j':
        o->json = arg;
        return 0;
    case 'l':
        o->limit = strtod(arg, &end);
        if (end == arg || *end || !isfinite(o->limit) || o->limit <= 0) {
            argp_error(state, "--limit=%s: expected nanoseconds above 0", arg);
            return EINVAL;
        }
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument '%s'", arg);
        return EINVAL;
    }
    return ARGP_ERR_UNKNOWN;
}

static _Noreturn void die(const char *what, const char *why)
{
    fprintf(stderr, "railyard-overhead: %s: %s\n", what, why);
    exit(1);
}

static void must(ncclResult_t r, const char *what)
{
    if (r)
        die(what, ncclGetErrorString(r));
}

/* The real library's own twin of a public function. */
static void *direct(void *nccl, const char *name)
{
    void *f = dlsym(nccl, name);
    if (!f)
        die("libnccl.so.2 lacks a function to compare with", name);
    return f;
}

static void open_ways(struct way *public, struct way *straight, bool *preloaded)
{
    /* By soname: the library that the job uses, whatever else defines the same symbols. */
    void *nccl = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_NOLOAD);
    if (!nccl)
        die("libnccl.so.2 is not loaded", dlerror());
    *public = (struct way){ncclGroupStart, ncclGroupEnd, ncclSend, ncclRecv, ncclAllGather};
    *straight = (struct way){direct(nccl, "pncclGroupStart"), direct(nccl, "pncclGroupEnd"), direct(nccl, "pncclSend"),
                             direct(nccl, "pncclRecv"), direct(nccl, "pncclAllGather")};
    *preloaded = dlsym(RTLD_DEFAULT, "ncclGroupEnd") != direct(nccl, "ncclGroupEnd");
}

static void open_communicator(const struct ry_device *device)
{
    struct ry_err err = {""};
    ncclUniqueId id;
    if (device->use(0, &err) || device->stream_create(&stream, &err) || device->alloc(&buffer, 256, &err))
        die("device", err.msg);
    must(ncclGetUniqueId(&id), "ncclGetUniqueId");
    must(ncclCommInitRank(&comm, 1, id, 0), "ncclCommInitRank");
}

static void settle(const struct ry_device *device)
{
    struct ry_err err = {""};
    if (device->stream_sync(stream, &err))
        die("device", err.msg);
}

/* Nanoseconds per operation over a block of `n`. */
static double block(const struct ry_device *device, const struct op *op, const struct way *w, uint64_t n)
{
    uint64_t start = ry_now_ns();
    for (uint64_t i = 0; i < n; i++) {
        ncclResult_t r = op->run(w);
        if (r)
            must(r, op->name);
    }
    double ns = (double)(ry_now_ns() - start) / (double)n;
    settle(device); /* what a GPU still has to do must not slow down the other way's block */
    return ns;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double at(const double *sorted, int n, double share)
{
    double i = share * (n - 1);
    return sorted[i < 0 ? 0 : i > n - 1 ? n - 1 : (int)lround(i)];
}

struct result {
    double public[3], direct[3],
        difference[3]; /* low, median, high: 10 % and 90 %; of the difference 95 % confidence */
    uint64_t block;
};

static void measure(const struct ry_device *device, const struct op *op, const struct way *public,
                    const struct way *straight, int rounds, struct result *out)
{
    double *v[3];
    for (int i = 0; i < 3; i++)
        if (!(v[i] = calloc((size_t)rounds, sizeof **v)))
            die("memory", strerror(ENOMEM));
    /* Blocks of about 100 us: long against the clock, short against what else happens on the machine. */
    block(device, op, public, 200);
    double one = fmin(block(device, op, public, 200), block(device, op, straight, 200));
    out->block = (uint64_t)fmin(fmax(100e3 / one, 1), 5000);
    for (int i = 0; i < rounds; i++) {
        bool public_first = i % 2;
        if (public_first)
            v[0][i] = block(device, op, public, out->block);
        v[1][i] = block(device, op, straight, out->block);
        if (!public_first)
            v[0][i] = block(device, op, public, out->block);
        v[2][i] = v[0][i] - v[1][i];
    }
    double half = 0.98 / sqrt(rounds); /* half the confidence interval of a median, as a share of the sorted values */
    for (int i = 0; i < 3; i++) {
        double *to = i == 0 ? out->public : i == 1 ? out->direct : out->difference;
        qsort(v[i], (size_t)rounds, sizeof **v, by_value);
        to[0] = at(v[i], rounds, i < 2 ? 0.1 : 0.5 - half);
        to[1] = at(v[i], rounds, 0.5);
        to[2] = at(v[i], rounds, i < 2 ? 0.9 : 0.5 + half);
        free(v[i]);
    }
}

static json_t *triple(const double v[3], const char *low, const char *high)
{
    return json_pack("{sf sf sf}", "median", v[1], low, v[0], high, v[2]);
}

/* Its own function, never inlined: callgrind is told to count from its entry to its return. */
__attribute__((noinline)) void ry_overhead_calls(const struct op *op, const struct way *w, uint64_t n);
void ry_overhead_calls(const struct op *op, const struct way *w, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        must(op->run(w), op->name);
}

int main(int argc, char **argv)
{
    static const struct argp argp = {
        option_list,
        parse,
        0,
        "Measure what an intercepted NCCL call that is passed on costs over the call itself.\v"
        "One process, one rank. Run it with LD_PRELOAD=.../librailyard.so for the cost, and "
        "without for the error of the method.",
        0,
        0,
        0};
    struct options o = {.rounds = 400};
    struct ry_err err = {""};
    argp_err_exit_status = 2;
    if (argp_parse(&argp, argc, argv, 0, 0, &o))
        return 2;
    bool emulated = dlsym(RTLD_DEFAULT, "railyard_emu_version") != NULL, preloaded;
    const struct ry_device *device = emulated ? ry_device_host() : ry_device_cuda(&err);
    if (!device)
        die("device", err.msg);
    struct way public, straight;
    open_ways(&public, &straight, &preloaded);
    open_communicator(device);

    int status = 0, version = 0;
    must(ncclGetVersion(&version), "ncclGetVersion");
    json_t *cases = json_object();
    if (o.counting) {
        ry_overhead_calls(o.op ? o.op : &ops[0], &public, o.callgrind);
    } else {
        printf("NCCL %d%s, %s\n", version, emulated ? " (emulated)" : "",
               preloaded ? "public calls go through a preloaded library"
                         : "no preload: differences are the method's error");
        printf("%-11s %6s %12s %12s %12s %22s %10s\n", "operation", "calls", "public ns", "direct ns", "difference",
               "95 % confidence", "per call");
    }
    for (size_t i = 0; i < OPS && !o.counting; i++) {
        const struct op *op = &ops[i];
        struct result r;
        if (o.op && o.op != op)
            continue;
        measure(device, op, &public, &straight, o.rounds, &r);
        double per_call = r.difference[1] / op->calls;
        printf("%-11s %6d %12.1f %12.1f %12.1f %10.1f ..%10.1f %10.1f\n", op->name, op->calls, r.public[1], r.direct[1],
               r.difference[1], r.difference[0], r.difference[2], per_call);
        json_object_set_new(cases, op->name,
                            json_pack("{ss si si sI so so so sf}", "what", op->help, "calls", op->calls, "rounds",
                                      o.rounds, "block", (json_int_t)r.block, "public_ns",
                                      triple(r.public, "p10", "p90"), "direct_ns", triple(r.direct, "p10", "p90"),
                                      "difference_ns", triple(r.difference, "low95", "high95"),
                                      "difference_per_call_ns", per_call));
        if (o.limit > 0 && per_call > o.limit) {
            fprintf(stderr, "railyard-overhead: %s: %.1f ns per call is above the limit of %.1f\n", op->name, per_call,
                    o.limit);
            status = 1;
        }
    }
    if (o.json) {
        json_t *all = json_pack("{ss sb si sb so}", "program", "railyard-overhead", "preloaded", (int)preloaded, "nccl",
                                version, "emulated", (int)emulated, "cases", cases);
        if (!all || json_dump_file(all, o.json, JSON_INDENT(1)))
            die("cannot write", o.json);
        json_decref(all);
    } else {
        json_decref(cases);
    }
    must(ncclCommDestroy(comm), "ncclCommDestroy");
    if (device->release(buffer, &err) || device->stream_destroy(stream, &err))
        die("device", err.msg);
    return status;
}
