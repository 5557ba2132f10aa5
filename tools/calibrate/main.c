/*
 * main.c: railyard-calibrate: one rank of the program behind `railyard calibrate`.
 *
 * Owns: the command line, starting up, carrying patterns out through NCCL and timing them. Not: which patterns and the
 * fit (measure/calibrate.h), what it looks like (report.h).
 *
 * A measurement: all ranks meet (an all-reduce), then the pattern is issued a number of times in a row, between two
 * device events. The mean over the rounds is one rank's time, the greatest over the ranks counts. Rounds of an exchange
 * of messages cannot overtake each other, since no rank can begin the next before it got what it waits for; what is
 * left of the ranks' unequal starts is divided by their number.
 */
#include <argp.h>
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nccl.h>

#include "base/clock.h"
#include "device/device.h"
#include "measure/cost_file.h"
#include "measure/seat.h"
#include "plan/plan.h"
#include "over_ucx.h"
#include "rendezvous.h"
#include "report.h"

#define RENDEZVOUS_SECONDS 120

static struct {
    double seconds;
    const char *svg;
    bool keep, ucx;
} opt = {.seconds = 6, .keep = true, .ucx = true};

static struct {
    struct ry_ranks who;
    const struct ry_device *device;
    int ordinal;
    ncclComm_t comm, node_comm; /* node_comm: of the node's ranks, numbered by local index; NULL where NCCL has none */
    void *stream;
    struct ry_event *before, *after;
    struct ry_cluster *cluster;
    char *send, *recv; /* on the device */
    size_t send_bytes, recv_bytes;
    struct ry_cal_message *messages;
    size_t most_messages;
    double *number; /* on the device: [1 + world] */
} me;

_Noreturn static void die(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
_Noreturn static void die(const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    fprintf(stderr, "railyard-calibrate: rank %d: %s\n", me.who.rank, text);
    exit(1);
}

#define DEVICE(call, ...)                                                                                              \
    do {                                                                                                               \
        struct ry_err err_ = {""};                                                                                     \
        if (me.device->call(__VA_ARGS__, &err_))                                                                       \
            die("%s", err_.msg);                                                                                       \
    } while (0)
#define NCCL(call, ...)                                                                                                \
    do {                                                                                                               \
        ncclResult_t r_ = call(__VA_ARGS__);                                                                           \
        if (r_ != ncclSuccess)                                                                                         \
            die("%s: %s: %s", #call, ncclGetErrorString(r_), ncclGetLastError(me.comm));                               \
    } while (0)

/* ---- starting up ---- */

static void open_device(void)
{
    struct ry_err err = {""};
    int devices = 0;
    me.device = dlsym(RTLD_DEFAULT, "railyard_emu_version") ? ry_device_host() : ry_device_cuda(&err);
    if (!me.device)
        die("%s; without a GPU, try it on the emulated cluster: railyard emu -n 2 -g 4 -- railyard calibrate", err.msg);
    DEVICE(count, &devices);
    me.ordinal = me.who.local_rank % devices;
    DEVICE(use, me.ordinal);
    DEVICE(stream_create, &me.stream);
    DEVICE(event_create, &me.before);
    DEVICE(event_create, &me.after);
    DEVICE(alloc, (void **)&me.number, (size_t)(1 + me.who.world) * sizeof *me.number);
}

static void open_communicator(void)
{
    struct ry_err err = {""};
    ncclUniqueId id = {0};
    if (me.who.rank == 0)
        NCCL(ncclGetUniqueId, &id);
    ry_rendezvous_beside_torchrun();
    if (ry_rendezvous(&me.who, &id, sizeof id, RENDEZVOUS_SECONDS, &err))
        die("%s", err.msg);
    NCCL(ncclCommInitRank, &me.comm, me.who.world, id, me.who.rank);
}

/* Where everybody sits, as the engine finds it out, but through the communicator itself. */
static void find_cluster(void)
{
    struct ry_err err = {""};
    struct ry_topo *topo = ry_topo_open_live(NULL);
    struct ry_seat seat, *all = calloc((size_t)me.who.world, sizeof *all), *device;
    ry_seat_take(&seat, me.device, topo, me.who.rank, me.ordinal, 0);
    if (topo)
        ry_topo_close(topo);
    if (!all)
        die("out of memory for the seats of %d ranks", me.who.world);
    DEVICE(alloc, (void **)&device, (size_t)(1 + me.who.world) * sizeof seat);
    DEVICE(copy, device, &seat, sizeof seat, me.stream);
    NCCL(ncclAllGather, device, device + 1, sizeof seat, ncclUint8, me.comm, me.stream);
    DEVICE(copy, all, device + 1, (size_t)me.who.world * sizeof seat, me.stream);
    DEVICE(stream_sync, me.stream);
    DEVICE(release, device);
    me.cluster = ry_cluster_build(all, me.who.world, &err);
    free(all);
    if (!me.cluster)
        die("%s", err.msg);
}

/*
 * A communicator of each node's ranks alone, which NCCL can make since 2.18: looked for by name, so that this starts
 * with an older one, too. Where there is one node the job's own is just that.
 */
static bool open_node_communicators(void)
{
    ncclResult_t (*split)(ncclComm_t, int, int, ncclComm_t *, ncclConfig_t *);
    *(void **)&split = dlsym(RTLD_DEFAULT, "ncclCommSplit");
    if (!split || me.cluster->nnodes == 1 || me.cluster->nnodes == me.who.world)
        return false;
    NCCL(split, me.comm, me.cluster->node[me.who.rank], me.cluster->local[me.who.rank], &me.node_comm, NULL);
    return true;
}

static double greatest(double value);

/* If all ranks can, or nobody does. */
static bool open_ucx(void)
{
    struct ry_err err = {""};
    if (!opt.ucx || me.cluster->nnodes < 2)
        return false;
    bool can = ry_ucx_open(me.device, me.ordinal, me.cluster, me.who.rank, me.comm, me.stream, &err);
    bool all = greatest(!can) == 0;
    if (!can && *err.msg)
        fprintf(stderr, "railyard-calibrate: rank %d: UCX is not measured: %s\n", me.who.rank, err.msg);
    return all;
}

/* ---- timing ---- */

/* The greatest of all ranks' values; they meet here. */
static double greatest(double value)
{
    double out;
    DEVICE(copy, me.number, &value, sizeof value, me.stream);
    NCCL(ncclAllReduce, me.number, me.number, 1, ncclDouble, ncclMax, me.comm, me.stream);
    DEVICE(copy, &out, me.number, sizeof out, me.stream);
    DEVICE(stream_sync, me.stream);
    return out;
}

static void reserve(char **buffer, size_t *size, size_t need)
{
    if (need <= *size)
        return;
    DEVICE(release, *buffer);
    DEVICE(alloc, (void **)buffer, need);
    *size = need;
    DEVICE(fill, *buffer, 0x5a, need, me.stream); /* touched, so that no page fault is measured */
}

static bool by_ucx(const struct ry_cal_point *point)
{
    return point->kind == RY_CAL_UCX_ONE || point->kind == RY_CAL_UCX_ALL;
}

/* `node`: peers are of this rank's node, and it goes over the communicator of the node. */
static void issue(const struct ry_cal_message *m, size_t n, bool node)
{
    ncclComm_t comm = node ? me.node_comm : me.comm;
    const int *local = me.cluster->local;
    char *send = me.send, *recv = me.recv;
    NCCL(ncclGroupStart);
    for (size_t i = 0; i < n; i++) {
        if (m[i].from == me.who.rank) {
            NCCL(ncclSend, send, m[i].bytes, ncclUint8, node ? local[m[i].to] : m[i].to, comm, me.stream);
            send += m[i].bytes;
        }
        if (m[i].to == me.who.rank) {
            NCCL(ncclRecv, recv, m[i].bytes, ncclUint8, node ? local[m[i].from] : m[i].from, comm, me.stream);
            recv += m[i].bytes;
        }
    }
    NCCL(ncclGroupEnd);
}

static int run(void *context, const struct ry_cal_point *point, int rounds, double *us, struct ry_err *err)
{
    bool copy = point->kind == RY_CAL_COPY;
    size_t n = copy ? 0 : ry_cal_messages(me.cluster, point, me.who.rank, NULL, 0), out = 0, in = 0;
    double mine = 0;
    if (n > me.most_messages) {
        me.messages = realloc(me.messages, n * sizeof *me.messages);
        me.most_messages = n;
        if (!me.messages)
            die("out of memory for %zu messages", n);
    }
    ry_cal_messages(me.cluster, point, me.who.rank, me.messages, n);
    for (size_t i = 0; i < n; i++) {
        out += me.messages[i].from == me.who.rank ? me.messages[i].bytes : 0;
        in += me.messages[i].to == me.who.rank ? me.messages[i].bytes : 0;
    }
    reserve(&me.send, &me.send_bytes, copy ? point->bytes : out);
    reserve(&me.recv, &me.recv_bytes, copy ? point->bytes : in);
    if (by_ucx(point) && n && ry_ucx_prepare(out + in, n, err))
        die("%s", err->msg);
    greatest(0);
    DEVICE(event_record, me.before, me.stream);
    for (int i = 0; i < rounds && (copy || n); i++) {
        if (copy)
            DEVICE(copy, me.recv, me.send, point->bytes, me.stream);
        else if (by_ucx(point) && ry_ucx_issue(me.messages, n, me.send, me.recv, me.stream, err))
            die("%s", err->msg);
        else if (!by_ucx(point))
            issue(me.messages, n, point->kind == RY_CAL_NODE);
    }
    DEVICE(event_record, me.after, me.stream);
    DEVICE(stream_sync, me.stream);
    DEVICE(event_elapsed, me.before, me.after, &mine);
    *us = greatest(mine / rounds);
    return 0;
}

/* Building a plan for an even exchange, per rank: the least of a few, the slowest of all ranks. */
static double planning_us(void)
{
    int n = me.who.world;
    uint64_t *bytes = calloc((size_t)n, sizeof *bytes), best = UINT64_MAX;
    struct ry_slice slice;
    struct ry_err err = {""};
    if (!bytes || ry_slice_init(&slice, me.cluster, me.who.rank, RY_HIERARCHICAL, &err))
        die("out of memory for a plan");
    for (int r = 0; r < n; r++)
        bytes[r] = 4096;
    for (int i = 0; i < slice.nrows * slice.ncols; i++)
        slice.cells[i] = 4096;
    struct ry_plan_input in = {.cluster = me.cluster,
                               .rank = me.who.rank,
                               .strategy = RY_HIERARCHICAL,
                               .send = bytes,
                               .recv = bytes,
                               .slice = &slice};
    for (int i = 0; i < 20; i++) {
        uint64_t start = ry_now_ns();
        struct ry_plan *plan = ry_plan_build(&in, &err);
        uint64_t took = ry_now_ns() - start;
        if (!plan)
            die("%s", err.msg);
        ry_plan_free(plan);
        best = took < best ? took : best;
    }
    ry_slice_free(&slice);
    free(bytes);
    return greatest((double)best / 1000 / n);
}

/* ---- what comes out ---- */

/* One rank of each node writes, for nodes that do not share a home. */
static int keep(const struct ry_calibration *cal)
{
    struct ry_err err = {""};
    char path[4096];
    int bad = me.cluster->local[me.who.rank] == 0 && ry_cost_save(&cal->model, me.cluster, &err);
    if (bad)
        fprintf(stderr, "railyard-calibrate: rank %d: %s\n", me.who.rank, err.msg);
    bad = greatest(bad) > 0;
    if (!bad && me.who.rank == 0 && !ry_cost_path(ry_cluster_fingerprint(me.cluster), path, sizeof path, NULL))
        printf("\nKept in %s, on every node: jobs on a cluster like this one use it, and communicators\n"
               "of other ranks and nodes with the same GPUs and NICs.\n",
               path);
    return bad;
}

static int picture(const struct ry_calibration *cal)
{
    FILE *f = fopen(opt.svg, "w");
    if (!f) {
        fprintf(stderr, "railyard-calibrate: cannot write %s: %s\n", opt.svg, strerror(errno));
        return 1;
    }
    ry_calibrate_svg(cal, me.cluster, f);
    if (fclose(f)) {
        fprintf(stderr, "railyard-calibrate: cannot write %s: %s\n", opt.svg, strerror(errno));
        return 1;
    }
    printf("The picture is in %s.\n", opt.svg);
    return 0;
}

/* ---- the command line ---- */

enum { OPT_SVG = 256, OPT_NO_KEEP, OPT_NO_UCX };
static const struct argp_option options[] = {
    {"seconds", 's', "S", 0, "How long to measure, connecting not included (6)", 0},
    {"svg", OPT_SVG, "FILE", 0, "Draw what was measured and the model (rank 0)", 0},
    {"no-ucx", OPT_NO_UCX, 0, 0, "Do not measure what UCX makes of the links between nodes (RAILYARD_TRANSPORT=auto needs it)", 0},
    {"no-keep", OPT_NO_KEEP, 0, 0, "Print only; do not keep the result for jobs", 0},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    char *end;
    switch (key) {
    case 's':
        opt.seconds = strtod(arg, &end);
        if (end == arg || *end || !(opt.seconds >= 0.1 && opt.seconds <= 3600)) {
            argp_error(state, "--seconds=%s: expected a number from 0.1 to 3600", arg);
            return EINVAL;
        }
        return 0;
    case OPT_SVG:
        opt.svg = arg;
        return 0;
    case OPT_NO_UCX:
        opt.ucx = false;
        return 0;
    case OPT_NO_KEEP:
        opt.keep = false;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument '%s'", arg);
        return EINVAL;
    }
    return ARGP_ERR_UNKNOWN;
}

static const struct argp argp = {
    .options = options,
    .parser = parse,
    .doc =
        "Measure through NCCL what the links of this cluster cost, and keep it for jobs that run on it.\v"
        "Start one process per rank, in the same way as the jobs:\n\n"
        "  torchrun --nproc-per-node 8 --no-python railyard calibrate\n"
        "  railyard emu -n 2 -g 4 --nic 25 --nic-us 50 -- railyard calibrate    emulated cluster, no GPU\n\n"
        "The result goes to $XDG_CACHE_HOME/railyard (~/.cache/railyard), one file for each number and size "
        "of nodes, GPUs, NICs, and one for all communicators of other ranks and nodes with the same GPUs and NICs. Calibrate again when "
        "links have changed. Exit status: 0, all is well; 1, a failed call; "
        "2, wrong usage."};

/* 0: go on; otherwise *status. One voice is enough: rank 0 prints help and complaints, and others leave it time to. */
static int command_line(int argc, char **argv, int *status)
{
    struct ry_err err = {""};
    int job = ry_ranks_from_env(&me.who, &err);
    bool quiet = !job && me.who.rank > 0;
    argp_err_exit_status = *status = 2;
    for (int i = 1; quiet && i < argc; i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "--usage") || !strcmp(argv[i], "-?"))
            return *status = 0, 1;
    if (argp_parse(&argp, argc, argv, quiet ? ARGP_NO_ERRS | ARGP_NO_EXIT : 0, 0, NULL)) {
        sleep(quiet ? 2 : 0);
        return 1;
    }
    if (!getenv("RANK") && !getenv("WORLD_SIZE"))
        return fprintf(stderr,
                       "%s: this is one rank of a job, but RANK and WORLD_SIZE are not set. Start all ranks by one of\n"
                       "  torchrun --nproc-per-node 8 --no-python railyard calibrate\n"
                       "  railyard emu -n 2 -g 4 -- railyard calibrate\n",
                       argv[0]),
               1;
    if (job)
        return fprintf(stderr, "%s: %s\n", argv[0], err.msg), 1;
    return 0;
}

int main(int argc, char **argv)
{
    static struct ry_calibration cal;
    struct ry_err err = {""};
    int status;
    if (command_line(argc, argv, &status))
        return status;
    open_device();
    open_communicator();
    find_cluster();
    const struct ry_cal_runner runner = {.run = run, .node_comm = open_node_communicators(), .ucx = open_ucx()};
    if (ry_calibrate(&cal, me.cluster, &runner, opt.seconds, &err))
        die("%s", err.msg);
    cal.model.plan_us_per_rank = planning_us();
    status = 0;
    if (me.who.rank == 0)
        ry_calibrate_table(&cal, me.cluster, stdout);
    if (opt.keep)
        status = keep(&cal);
    if (me.who.rank == 0 && opt.svg)
        status |= picture(&cal);
    status = greatest(status) > 0; /* nobody leaves while others still print */
    ry_ucx_close();
    if (me.node_comm)
        NCCL(ncclCommDestroy, me.node_comm);
    NCCL(ncclCommDestroy, me.comm);
    me.comm = NULL;
    DEVICE(release, me.send);
    DEVICE(release, me.recv);
    DEVICE(release, me.number);
    me.device->event_destroy(me.before);
    me.device->event_destroy(me.after);
    DEVICE(stream_destroy, me.stream);
    ry_cluster_free(me.cluster);
    free(me.messages);
    return status;
}
