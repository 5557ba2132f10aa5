/* watched.c: see watched.h. */
#include "watched.h"

#include <stdatomic.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"

/* ---- names ---- */

/* NCCL tells types by name, and has none for ncclUint8 before 2.29: "Unknown". */
static const struct ry_prof_kind types[] = {{"ncclBfloat16", 9, 2},   {"ncclFloat32", 7, 4}, {"ncclFloat16", 6, 2},
                                            {"ncclInt64", 4, 8},      {"ncclInt8", 0, 1},    {"ncclUint8", 1, 1},
                                            {"ncclInt32", 2, 4},      {"ncclUint32", 3, 4},  {"ncclUint64", 5, 8},
                                            {"ncclFloat64", 8, 8},    {"Unknown", 1, 1},     {"ncclFloat8e4m3", 10, 1},
                                            {"ncclFloat8e5m2", 11, 1}};
#define TYPE_UINT8 1

const struct ry_prof_kind *ry_prof_type_of(const char *name)
{
    static const struct ry_prof_kind unknown = {"", TYPE_UINT8, 1};
    for (size_t i = 0; name && i < sizeof types / sizeof *types; i++)
        if (!strcmp(name, types[i].name))
            return &types[i];
    ry_warn_once("NCCL's profiler interface names a type that is not known here, %s: its elements are counted as bytes",
                 name ? name : "(none)");
    return &unknown;
}

static unsigned bytes_of(int type)
{
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (types[i].type == type)
            return types[i].bytes;
    return 1;
}

void ry_watched_count(struct ry_watched *w, const char *func, size_t count, const char *type)
{
    static const struct {
        const char *name;
        enum ry_call call;
    } calls[] = {{"Send", RY_CALL_SEND},           {"Recv", RY_CALL_RECV},
                 {"AlltoAll", RY_CALL_ALLTOALL},   {"AllGather", RY_CALL_ALLGATHER},
                 {"AllReduce", RY_CALL_ALLREDUCE}, {"Broadcast", RY_CALL_BROADCAST},
                 {"Reduce", RY_CALL_REDUCE},       {"Gather", RY_CALL_GATHER},
                 {"Scatter", RY_CALL_SCATTER},     {"ReduceScatter", RY_CALL_REDUCESCATTER}};
    for (size_t i = 0; func && i < sizeof calls / sizeof *calls; i++) {
        if (strcmp(func, calls[i].name))
            continue;
        w->counts.calls[calls[i].call]++;
        w->counts.bytes[calls[i].call] += count * ry_prof_type_of(type)->bytes;
        return;
    }
}

/* ---- what a group comes to; the communicator's lock is held ---- */

void ry_watched_drop_clock(struct ry_watched *w)
{
    if (w->clock)
        w->hooks->exchange_seen(w->engine, NULL, w->clock, 0, false);
    w->clock = NULL;
}

/* One send to and one receive from every rank; in place, those to oneself are not told of. */
bool ry_watched_is_exchange(struct ry_watched *w, bool without_self)
{
    uint64_t n = (uint64_t)w->nranks;
    if (w->no_exchange || w->calls[RY_SEND] != n || w->calls[RY_RECV] != n || w->told[RY_SEND] != w->told[RY_RECV])
        return false;
    if (w->told[RY_SEND] == n)
        return true;
    if (!without_self || w->told[RY_SEND] != n - 1 || w->seen[w->rank] ||
        w->called_bytes[RY_SEND] - w->told_bytes[RY_SEND] != w->called_bytes[RY_RECV] - w->told_bytes[RY_RECV])
        return false;
    for (int d = RY_SEND; d <= RY_RECV; d++)
        w->count[d][w->rank] = w->called_bytes[d] - w->told_bytes[d];
    return true;
}

void ry_watched_leave(struct ry_watched *w)
{
    ry_watched_drop_clock(w);
    if (w->group && (w->calls[RY_SEND] || w->calls[RY_RECV])) {
        w->counts.plain_groups++;
        w->likely = false;
    }
    w->group = 0;
}

void ry_watched_enter(struct ry_watched *w, uint64_t number)
{
    ry_watched_leave(w);
    w->group = number;
    for (int d = RY_SEND; d <= RY_RECV; d++) {
        w->calls[d] = w->told[d] = w->called_bytes[d] = w->told_bytes[d] = 0;
        memset(w->count[d], 0, (size_t)w->nranks * sizeof *w->count[d]);
    }
    memset(w->seen, 0, (size_t)w->nranks);
    w->stopped = w->no_exchange = w->mixed = w->one_call = false;
    w->type = -1;
    w->stream = NULL;
    w->wall_ns = ry_wall_ns();
}

void ry_watched_hand_over(struct ry_watched *w, bool in_time)
{
    struct ry_exchange x = {.nranks = w->nranks,
                            .rank = w->rank,
                            .type = w->mixed ? TYPE_UINT8 : w->type,
                            .type_bytes = w->mixed ? 1 : bytes_of(w->type),
                            .one_call = w->one_call,
                            .send_count = w->count[RY_SEND],
                            .recv_count = w->count[RY_RECV],
                            .stream = w->stream,
                            .ordinal = w->counts.exchanges++};
    for (int d = RY_SEND; d <= RY_RECV; d++)
        for (int p = 0; p < w->nranks; p++)
            w->count[d][p] /= x.type_bytes;
    if (!in_time)
        ry_watched_drop_clock(w);
    w->hooks->exchange_seen(w->engine, &x, w->clock, w->wall_ns, true);
    w->clock = NULL;
    w->likely = true;
    w->group = 0;
}

void ry_watched_type(struct ry_watched *w, const struct ry_prof_kind *t)
{
    if (w->type >= 0 && w->type != t->type)
        w->mixed = true;
    w->type = t->type;
}

/* A call and its peer. */
void ry_watched_peer(struct ry_watched *w, int direction, int peer, uint64_t bytes)
{
    if (peer < 0 || peer >= w->nranks || w->seen[peer] & 1u << direction) {
        w->no_exchange = true;
        return;
    }
    w->seen[peer] |= (uint8_t)(1u << direction);
    w->count[direction][peer] = bytes;
    w->told[direction]++;
    w->told_bytes[direction] += bytes;
}

int ry_prof_direction(const char *func)
{
    return !func ? -1 : !strcmp(func, "Send") ? RY_SEND : !strcmp(func, "Recv") ? RY_RECV : -1;
}
