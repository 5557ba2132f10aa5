/*
 * api.c: the exported functions, with their pnccl twins.
 *
 * Owns: argument checks and the error texts about them. As in NCCL the public name is weak and the p name strong, both
 * are the same code, and the library's own calls of ncclGetUniqueId, ncclGroupStart and ncclGroupEnd in ncclCommInitAll
 * go through the public name, where a preloaded library sees them.
 */
#include "emu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define API(ret, name, ...)                                                                                            \
    EXPORT __attribute__((alias(#name))) ret p##name(__VA_ARGS__);                                                     \
    EXPORT __attribute__((weak)) ret name(__VA_ARGS__)

EXPORT int railyard_emu_version(void);
int railyard_emu_version(void)
{
    return 1;
}

/* ---- errors ---- */

static _Thread_local char last_error[400];

ncclResult_t ry_emu_error(ncclResult_t result, const char *fmt, ...)
{
    char text[sizeof last_error]; /* fmt may take last_error itself */
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    memcpy(last_error, text, sizeof text);
    const char *debug = getenv("NCCL_DEBUG");
    if (debug && strcmp(debug, "NONE") && strcmp(debug, "VERSION"))
        fprintf(stderr, "emulated NCCL [%d] WARN %s\n", (int)getpid(), text);
    return result;
}

const char *ry_emu_last_error(void)
{
    return last_error;
}

/* A bad argument also spoils the group that it was given in. */
#define REFUSE(result, ...)                                                                                            \
    do {                                                                                                               \
        ry_emu_error(result, __VA_ARGS__);                                                                             \
        ry_emu_group_fail(result);                                                                                     \
        return result;                                                                                                 \
    } while (0)

static ncclResult_t check_comm(const struct ncclComm *comm, const char *call)
{
    if (!comm)
        REFUSE(ncclInvalidArgument, "%s: the communicator is NULL", call);
    if (comm->magic != RY_EMU_COMM_MAGIC)
        REFUSE(ncclInvalidArgument, "%s: this is no communicator, or one that was destroyed", call);
    return ncclSuccess;
}

static ncclResult_t check_ready(const struct ncclComm *comm, const char *call)
{
    ncclResult_t r = check_comm(comm, call);
    if (r != ncclSuccess)
        return r;
    pthread_mutex_lock(&ry_emu_lock);
    ncclResult_t state = comm->state;
    bool ready = comm->peers != NULL;
    pthread_mutex_unlock(&ry_emu_lock);
    if (!ready || state == ncclInProgress)
        REFUSE(state == ncclInProgress ? ncclInvalidArgument : state, "%s: the communicator is not ready: %s", call,
               state == ncclInProgress ? "ncclCommGetAsyncError still says ncclInProgress" : comm->error);
    return ncclSuccess;
}

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        ncclResult_t try_ = (call);                                                                                    \
        if (try_ != ncclSuccess)                                                                                       \
            return try_;                                                                                               \
    } while (0)

API(const char *, ncclGetErrorString, ncclResult_t result)
{
    static const char *const text[ncclNumResults] = {
        "no error",
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        "unhandled system error (run with NCCL_DEBUG=INFO for details)",
        "internal error - please report this issue to the NCCL developers",
        "invalid argument (run with NCCL_DEBUG=WARN for details)",
        "invalid usage (run with NCCL_DEBUG=WARN for details)",
        "remote process exited or there was a network error",
        "NCCL operation in progress",
    };
    return (unsigned)result < ncclNumResults ? text[result] : "unknown result code";
}

API(const char *, ncclGetLastError, ncclComm_t comm)
{
    bool has_one = false;
    if (comm && comm->magic == RY_EMU_COMM_MAGIC) {
        pthread_mutex_lock(&ry_emu_lock);
        has_one = comm->error[0]; /* written once */
        pthread_mutex_unlock(&ry_emu_lock);
    }
    return has_one ? comm->error : last_error;
}

API(ncclResult_t, ncclGetVersion, int *version)
{
    if (!version)
        REFUSE(ncclInvalidArgument, "ncclGetVersion: version is NULL");
    *version = ry_emu_nccl_version;
    return ncclSuccess;
}

/* ---- communicators ---- */

static int current_device(void)
{
    const char *local = getenv("LOCAL_RANK");
    return local ? atoi(local) : 0;
}

struct options {
    bool blocking;
    const char *name;
};

/* Programs may be built against another version of the header: only what lies within `size` is read. */
static ncclResult_t read_config(const ncclConfig_t *config, struct options *o, const char *call)
{
    const char *env = getenv("NCCL_COMM_BLOCKING"); /* wins over what the program says, as in NCCL */
    if (env && *env)
        o->blocking = atoi(env) != 0;
    if (!config)
        return ncclSuccess;
    if (config->magic != 0xcafebeefu)
        REFUSE(ncclInvalidArgument, "%s: the ncclConfig_t was not set to NCCL_CONFIG_INITIALIZER", call);
    if (config->size >= offsetof(ncclConfig_t, blocking) + sizeof config->blocking &&
        config->blocking != NCCL_CONFIG_UNDEF_INT) {
        if (config->blocking != 0 && config->blocking != 1)
            REFUSE(ncclInvalidArgument, "%s: config.blocking is %d, neither 0 nor 1", call, config->blocking);
        if (!env || !*env)
            o->blocking = config->blocking;
    }
    if (config->size >= offsetof(ncclConfig_t, commName) + sizeof config->commName && config->commName)
        o->name = config->commName;
    return ncclSuccess;
}

static ncclResult_t init_rank(ncclComm_t *out, int nranks, const ncclUniqueId *id, int rank, int device,
                              const ncclConfig_t *config, const char *call)
{
    struct options o = {.blocking = true};
    if (!out)
        REFUSE(ncclInvalidArgument, "%s: the communicator's place is NULL", call);
    *out = NULL;
    if (nranks < 1 || rank < 0 || rank >= nranks)
        REFUSE(ncclInvalidArgument, "%s: rank %d of %d ranks", call, rank, nranks);
    TRY(read_config(config, &o, call));
    struct ry_emu_job *job = calloc(1, sizeof *job);
    struct ncclComm *comm = ry_emu_comm_new(rank, nranks, device, o.blocking, o.name);
    if (!job || !comm) {
        free(job);
        free(comm);
        REFUSE(ncclSystemError, "%s: out of memory", call);
    }
    *job = (struct ry_emu_job){.run = ry_emu_job_init, .comm = comm, .out = out, .id = *id, .detached = !o.blocking};
    *out = comm;
    return ry_emu_submit_job(job);
}

API(ncclResult_t, ncclGetUniqueId, ncclUniqueId *id)
{
    if (!id)
        REFUSE(ncclInvalidArgument, "ncclGetUniqueId: the id's place is NULL");
    return ry_emu_bootstrap_id(id);
}

API(ncclResult_t, ncclCommInitRank, ncclComm_t *comm, int nranks, ncclUniqueId id, int rank)
{
    return init_rank(comm, nranks, &id, rank, current_device(), NULL, "ncclCommInitRank");
}

API(ncclResult_t, ncclCommInitRankConfig, ncclComm_t *comm, int nranks, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    return init_rank(comm, nranks, &id, rank, current_device(), config, "ncclCommInitRankConfig");
}

/* Any of the ids is good for a meeting: the first one's maker serves it alone, at the emulator's sizes. */
API(ncclResult_t, ncclCommInitRankScalable, ncclComm_t *comm, int nranks, int rank, int nids, ncclUniqueId *ids,
    ncclConfig_t *config)
{
    if (!ids || nids < 1 || nids > nranks)
        REFUSE(ncclInvalidArgument, "ncclCommInitRankScalable: %d unique ids for %d ranks", ids ? nids : 0, nranks);
    return init_rank(comm, nranks, &ids[0], rank, current_device(), config, "ncclCommInitRankScalable");
}

API(ncclResult_t, ncclCommInitAll, ncclComm_t *comms, int n, const int *devices)
{
    ncclUniqueId id;
    if (!comms || n < 1)
        REFUSE(ncclInvalidArgument, "ncclCommInitAll: %d devices, communicators at %p", n, (void *)comms);
    for (int i = 0; devices && i < n; i++)
        for (int k = 0; k < i; k++)
            if (devices[i] == devices[k])
                REFUSE(ncclInvalidUsage, "ncclCommInitAll: device %d is listed twice", devices[i]);
    TRY(ncclGetUniqueId(&id));
    TRY(ncclGroupStart());
    for (int i = 0; i < n; i++)
        init_rank(&comms[i], n, &id, i, devices ? devices[i] : i, NULL, "ncclCommInitAll"); /* the group has errors */
    return ncclGroupEnd();
}

static ncclResult_t make_child(struct ncclComm *parent, ncclComm_t *out, bool member, const ncclConfig_t *config,
                               const struct ry_emu_job *job, const char *call)
{
    struct options o = {.blocking = parent->blocking};
    TRY(read_config(config, &o, call));
    struct ry_emu_job *j = malloc(sizeof *j);
    struct ncclComm *child = member ? ry_emu_comm_new(0, 1, parent->device, o.blocking, o.name) : NULL;
    if (!j || (member && !child)) {
        free(j);
        free(child);
        free(job->exclude);
        REFUSE(ncclSystemError, "%s: out of memory", call);
    }
    *j = *job;
    j->parent = parent;
    j->comm = child;
    j->out = out;
    j->detached = !parent->blocking;
    *out = j->detached ? NULL : child; /* NCCL, too, writes a non-blocking child's handle only when it is made */
    pthread_mutex_lock(&ry_emu_lock);
    parent->users++;
    if (j->detached && parent->state == ncclSuccess)
        parent->state = ncclInProgress;
    pthread_mutex_unlock(&ry_emu_lock);
    return ry_emu_submit_job(j);
}

API(ncclResult_t, ncclCommSplit, ncclComm_t comm, int color, int key, ncclComm_t *out, ncclConfig_t *config)
{
    TRY(check_ready(comm, "ncclCommSplit"));
    if (!out)
        REFUSE(ncclInvalidArgument, "ncclCommSplit: the new communicator's place is NULL");
    *out = NULL;
    if (color < 0 && color != NCCL_SPLIT_NOCOLOR)
        REFUSE(ncclInvalidArgument, "ncclCommSplit: color %d is negative and not NCCL_SPLIT_NOCOLOR", color);
    struct ry_emu_job job = {.run = ry_emu_job_split, .color = color, .key = key};
    return make_child(comm, out, color != NCCL_SPLIT_NOCOLOR, config, &job, "ncclCommSplit");
}

API(ncclResult_t, ncclCommShrink, ncclComm_t comm, int *exclude, int n, ncclComm_t *out, ncclConfig_t *config,
    int flags)
{
    TRY(check_ready(comm, "ncclCommShrink"));
    if (!out || !exclude || n < 1 || n >= comm->nranks)
        REFUSE(ncclInvalidArgument, "ncclCommShrink: %d ranks to leave out of %d", exclude ? n : 0, comm->nranks);
    if (flags & ~NCCL_SHRINK_ABORT)
        REFUSE(ncclInvalidArgument, "ncclCommShrink: unknown flags 0x%x", flags);
    *out = NULL;
    for (int i = 0; i < n; i++)
        if (exclude[i] < 0 || exclude[i] >= comm->nranks || exclude[i] == comm->rank)
            REFUSE(ncclInvalidArgument, "ncclCommShrink: rank %d is %s", exclude[i],
                   exclude[i] == comm->rank ? "the caller, which a rank to leave out must not be"
                                            : "not in the communicator");
    struct ry_emu_job job = {.run = ry_emu_job_shrink, .flags = flags, .nexclude = n};
    job.exclude = malloc((size_t)n * sizeof *exclude);
    if (!job.exclude)
        REFUSE(ncclSystemError, "ncclCommShrink: out of memory");
    memcpy(job.exclude, exclude, (size_t)n * sizeof *exclude);
    return make_child(comm, out, true, config, &job, "ncclCommShrink");
}

API(ncclResult_t, ncclCommFinalize, ncclComm_t comm)
{
    TRY(check_comm(comm, "ncclCommFinalize"));
    pthread_mutex_lock(&ry_emu_lock);
    bool again = comm->finalized, revoked = comm->revoked;
    comm->finalized = true;
    ry_emu_wait_users(comm);
    pthread_mutex_unlock(&ry_emu_lock);
    if (again || revoked)
        REFUSE(ncclInvalidArgument, "ncclCommFinalize: the communicator was %s before",
               again ? "finalized" : "revoked");
    ry_emu_wire_flush();
    return ncclSuccess;
}

API(ncclResult_t, ncclCommDestroy, ncclComm_t comm)
{
    if (!comm)
        return ncclSuccess;
    TRY(check_comm(comm, "ncclCommDestroy"));
    ry_emu_comm_end(comm, false);
    ry_emu_wire_flush();
    return ncclSuccess;
}

API(ncclResult_t, ncclCommAbort, ncclComm_t comm)
{
    if (!comm)
        return ncclSuccess;
    TRY(check_comm(comm, "ncclCommAbort"));
    ry_emu_comm_end(comm, true);
    return ncclSuccess;
}

API(ncclResult_t, ncclCommRevoke, ncclComm_t comm, int flags)
{
    TRY(check_ready(comm, "ncclCommRevoke"));
    if (flags != NCCL_REVOKE_DEFAULT)
        REFUSE(ncclInvalidArgument, "ncclCommRevoke: unknown flags 0x%x", flags);
    ry_emu_comm_revoke(comm);
    return ncclSuccess;
}

API(ncclResult_t, ncclCommGetAsyncError, ncclComm_t comm, ncclResult_t *error)
{
    TRY(check_comm(comm, "ncclCommGetAsyncError"));
    if (!error)
        REFUSE(ncclInvalidArgument, "ncclCommGetAsyncError: the error's place is NULL");
    pthread_mutex_lock(&ry_emu_lock);
    *error = comm->state;
    pthread_mutex_unlock(&ry_emu_lock);
    return ncclSuccess;
}

#define GETTER(name, field)                                                                                            \
    API(ncclResult_t, name, const ncclComm_t comm, int *out)                                                           \
    {                                                                                                                  \
        TRY(check_ready(comm, #name));                                                                                 \
        if (!out)                                                                                                      \
            REFUSE(ncclInvalidArgument, #name ": the result's place is NULL");                                         \
        *out = comm->field;                                                                                            \
        return ncclSuccess;                                                                                            \
    }
GETTER(ncclCommCount, nranks)
GETTER(ncclCommCuDevice, device)
GETTER(ncclCommUserRank, rank)

/* ---- groups (the header declares these without a parameter list) ---- */

#pragma GCC diagnostic ignored "-Wmissing-prototypes"
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

API(ncclResult_t, ncclGroupStart, void)
{
    return ry_emu_group_start();
}

API(ncclResult_t, ncclGroupEnd, void)
{
    return ry_emu_group_end();
}

/* Ends the group without doing anything, as NCCL; no estimate is offered. */
API(ncclResult_t, ncclGroupSimulateEnd, ncclSimInfo_t *info)
{
    if (info && info->magic != 0x74685283u)
        REFUSE(ncclInvalidArgument, "ncclGroupSimulateEnd: the ncclSimInfo_t was not set to NCCL_SIM_INFO_INITIALIZER");
    if (ry_emu_group_drop() < 0)
        return ry_emu_error(ncclInvalidUsage, "ncclGroupSimulateEnd: no group was started in this thread");
    if (info)
        info->estimatedTime = NCCL_UNDEF_FLOAT;
    return ncclSuccess;
}

/* ---- operations ---- */

static ncclResult_t check_op(struct ry_emu_op *op, const char *call, bool has_root, bool reduces)
{
    TRY(check_ready(op->comm, call));
    size_t size = ry_emu_type_bytes(op->type);
    if (!size)
        REFUSE(ncclInvalidArgument, "%s: unknown data type %d", call, (int)op->type);
    if (has_root && (op->root < 0 || op->root >= op->comm->nranks))
        REFUSE(ncclInvalidArgument, "%s: %s %d is not in this communicator of %d ranks", call,
               op->kind <= RY_EMU_RECV ? "peer" : "root", op->root, op->comm->nranks);
    if (op->count > SIZE_MAX / size / (size_t)op->comm->nranks / 2)
        REFUSE(ncclInvalidArgument, "%s: %zu elements are more than memory holds", call, op->count);
    if (op->comm->finalized)
        REFUSE(ncclInvalidArgument, "%s: the communicator was finalized", call);
    bool root = op->comm->rank == op->root, sends = true, receives = true;
    switch (op->kind) {
    case RY_EMU_SEND:
        receives = false;
        break;
    case RY_EMU_RECV:
        sends = false;
        break;
    case RY_EMU_BROADCAST:
    case RY_EMU_SCATTER:
        sends = root;
        break;
    case RY_EMU_REDUCE:
    case RY_EMU_GATHER:
        receives = root;
        break;
    default:
        break;
    }
    if (op->count && ((sends && !op->send) || (receives && !op->recv)))
        REFUSE(ncclInvalidArgument, "%s: the %s buffer is NULL", call, sends && !op->send ? "send" : "receive");
    if (!reduces)
        return ncclSuccess;
    if ((int)op->redop < 0)
        REFUSE(ncclInvalidArgument, "%s: unknown reduction %d", call, (int)op->redop);
    if (op->redop >= ncclNumOps) {
        int i = (int)op->redop - ncclNumOps;
        if (i >= op->comm->nops || !op->comm->ops[i].used)
            REFUSE(ncclInvalidArgument, "%s: reduction %d was not made for this communicator", call, (int)op->redop);
        if (op->comm->ops[i].type != op->type)
            REFUSE(ncclInvalidArgument, "%s: reduction %d was made for another data type", call, (int)op->redop);
        op->scaled = true;
        op->scalar = op->comm->ops[i]; /* it may be destroyed before the group ends */
        op->redop = ncclSum;
    }
    return ncclSuccess;
}

API(ncclResult_t, ncclSend, const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
    cudaStream_t stream)
{
    struct ry_emu_op op = {.kind = RY_EMU_SEND,
                           .comm = comm,
                           .send = send,
                           .count = count,
                           .type = type,
                           .stream = stream,
                           .root = peer,
                           .channel = RY_EMU_P2P};
    TRY(check_op(&op, "ncclSend", true, false));
    return ry_emu_submit(&op);
}

API(ncclResult_t, ncclRecv, void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
    cudaStream_t stream)
{
    struct ry_emu_op op = {.kind = RY_EMU_RECV,
                           .comm = comm,
                           .recv = recv,
                           .count = count,
                           .type = type,
                           .stream = stream,
                           .root = peer,
                           .channel = RY_EMU_P2P};
    TRY(check_op(&op, "ncclRecv", true, false));
    return ry_emu_submit(&op);
}

static ncclResult_t collective(enum ry_emu_kind kind, const void *send, void *recv, size_t count, ncclDataType_t type,
                               ncclRedOp_t redop, bool reduces, int root, bool has_root, ncclComm_t comm,
                               cudaStream_t stream, const char *call)
{
    struct ry_emu_op op = {.kind = kind,
                           .comm = comm,
                           .send = send,
                           .recv = recv,
                           .count = count,
                           .type = type,
                           .stream = stream,
                           .redop = redop,
                           .root = root,
                           .channel = RY_EMU_COLLECTIVE};
    TRY(check_op(&op, call, has_root, reduces));
    return ry_emu_submit(&op);
}

API(ncclResult_t, ncclAlltoAll, const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
    cudaStream_t stream)
{
    if (send == recv && count && comm)
        REFUSE(ncclInvalidArgument, "ncclAlltoAll: the send buffer is the receive buffer");
    return collective(RY_EMU_ALLTOALL, send, recv, count, type, ncclSum, false, 0, false, comm, stream, "ncclAlltoAll");
}

API(ncclResult_t, ncclAllGather, const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
    cudaStream_t stream)
{
    return collective(RY_EMU_ALLGATHER, send, recv, count, type, ncclSum, false, 0, false, comm, stream, "ncclAllGather");
}

API(ncclResult_t, ncclAllReduce, const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
    ncclComm_t comm, cudaStream_t stream)
{
    return collective(RY_EMU_ALLREDUCE, send, recv, count, type, op, true, 0, false, comm, stream, "ncclAllReduce");
}

API(ncclResult_t, ncclReduceScatter, const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
    ncclComm_t comm, cudaStream_t stream)
{
    return collective(RY_EMU_REDUCESCATTER, send, recv, count, type, op, true, 0, false, comm, stream, "ncclReduceScatter");
}

API(ncclResult_t, ncclReduce, const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
    ncclComm_t comm, cudaStream_t stream)
{
    return collective(RY_EMU_REDUCE, send, recv, count, type, op, true, root, true, comm, stream, "ncclReduce");
}

API(ncclResult_t, ncclBroadcast, const void *send, void *recv, size_t count, ncclDataType_t type, int root,
    ncclComm_t comm, cudaStream_t stream)
{
    return collective(RY_EMU_BROADCAST, send, recv, count, type, ncclSum, false, root, true, comm, stream, "ncclBroadcast");
}

API(ncclResult_t, ncclBcast, void *buf, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
    cudaStream_t stream)
{
    return collective(RY_EMU_BROADCAST, buf, buf, count, type, ncclSum, false, root, true, comm, stream, "ncclBcast");
}

API(ncclResult_t, ncclGather, const void *send, void *recv, size_t count, ncclDataType_t type, int root,
    ncclComm_t comm, cudaStream_t stream)
{
    return collective(RY_EMU_GATHER, send, recv, count, type, ncclSum, false, root, true, comm, stream, "ncclGather");
}

API(ncclResult_t, ncclScatter, const void *send, void *recv, size_t count, ncclDataType_t type, int root,
    ncclComm_t comm, cudaStream_t stream)
{
    return collective(RY_EMU_SCATTER, send, recv, count, type, ncclSum, false, root, true, comm, stream, "ncclScatter");
}

API(ncclResult_t, ncclRedOpCreatePreMulSum, ncclRedOp_t *op, void *scalar, ncclDataType_t type,
    ncclScalarResidence_t residence, ncclComm_t comm)
{
    TRY(check_ready(comm, "ncclRedOpCreatePreMulSum"));
    size_t size = ry_emu_type_bytes(type);
    if (!op || !scalar || !size || (residence != ncclScalarDevice && residence != ncclScalarHostImmediate))
        REFUSE(ncclInvalidArgument, "ncclRedOpCreatePreMulSum: op %p, scalar %p, data type %d, residence %d",
               (void *)op, scalar, (int)type, (int)residence);
    int i = 0;
    while (i < comm->nops && comm->ops[i].used)
        i++;
    if (i == comm->nops) {
        struct ry_emu_redop *ops = realloc(comm->ops, (size_t)(i + 8) * sizeof *ops);
        if (!ops)
            REFUSE(ncclSystemError, "ncclRedOpCreatePreMulSum: out of memory");
        memset(ops + i, 0, 8 * sizeof *ops);
        comm->ops = ops;
        comm->nops = i + 8;
    }
    comm->ops[i] =
        (struct ry_emu_redop){.used = true, .on_device = residence == ncclScalarDevice, .type = type, .where = scalar};
    if (residence == ncclScalarHostImmediate)
        memcpy(&comm->ops[i].value, scalar, size);
    *op = (ncclRedOp_t)(ncclNumOps + i);
    return ncclSuccess;
}

API(ncclResult_t, ncclRedOpDestroy, ncclRedOp_t op, ncclComm_t comm)
{
    TRY(check_ready(comm, "ncclRedOpDestroy"));
    int i = (int)op - ncclNumOps;
    if (i < 0 || i >= comm->nops || !comm->ops[i].used)
        REFUSE(ncclInvalidArgument, "ncclRedOpDestroy: reduction %d was not made for this communicator", (int)op);
    comm->ops[i].used = false;
    return ncclSuccess;
}

/* ---- memory: all of it is the host's, registering gains nothing and only keeps the books ---- */

API(ncclResult_t, ncclMemAlloc, void **ptr, size_t size)
{
    if (!ptr)
        REFUSE(ncclInvalidArgument, "ncclMemAlloc: the pointer's place is NULL");
    if (posix_memalign(ptr, NCCL_WIN_REQUIRED_ALIGNMENT, size ? size : 1)) {
        *ptr = NULL;
        REFUSE(ncclSystemError, "ncclMemAlloc: no memory for %zu bytes", size);
    }
    return ncclSuccess;
}

API(ncclResult_t, ncclMemFree, void *ptr)
{
    free(ptr);
    return ncclSuccess;
}

struct ncclWindow_vidmem {
    uint64_t magic;
    struct ncclComm *comm;
};
#define REGISTRATION_MAGIC UINT64_C(0x6e6f6974617272)

static ncclResult_t enroll(struct ncclComm *comm, const void *buf, size_t size, void **out, const char *call)
{
    TRY(check_ready(comm, call));
    if (!buf || !size || !out)
        REFUSE(ncclInvalidArgument, "%s: %zu bytes at %p, handle's place %p", call, size, buf, (void *)out);
    struct ncclWindow_vidmem *w = malloc(sizeof *w);
    if (!w)
        REFUSE(ncclSystemError, "%s: out of memory", call);
    *w = (struct ncclWindow_vidmem){REGISTRATION_MAGIC, comm};
    *out = w;
    return ncclSuccess;
}

static ncclResult_t strike(struct ncclComm *comm, struct ncclWindow_vidmem *w, const char *call)
{
    TRY(check_comm(comm, call));
    if (!w)
        return ncclSuccess;
    if (w->magic != REGISTRATION_MAGIC || w->comm != comm)
        REFUSE(ncclInvalidArgument, "%s: the handle is not one of this communicator's", call);
    w->magic = 0;
    free(w);
    return ncclSuccess;
}

API(ncclResult_t, ncclCommRegister, const ncclComm_t comm, void *buf, size_t size, void **handle)
{
    return enroll(comm, buf, size, handle, "ncclCommRegister");
}

API(ncclResult_t, ncclCommDeregister, const ncclComm_t comm, void *handle)
{
    return strike(comm, handle, "ncclCommDeregister");
}

API(ncclResult_t, ncclCommWindowRegister, ncclComm_t comm, void *buf, size_t size, ncclWindow_t *window, int flags)
{
    if (flags & ~NCCL_WIN_COLL_SYMMETRIC)
        REFUSE(ncclInvalidArgument, "ncclCommWindowRegister: unknown flags 0x%x", flags);
    return enroll(comm, buf, size, (void **)window, "ncclCommWindowRegister");
}

API(ncclResult_t, ncclCommWindowDeregister, ncclComm_t comm, ncclWindow_t window)
{
    return strike(comm, window, "ncclCommWindowDeregister");
}

#undef ncclResetDebugInit /* macros in newer headers */
#undef pncclResetDebugInit
API(void, ncclResetDebugInit, void)
{
}
