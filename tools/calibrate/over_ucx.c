/* over_ucx.c: see over_ucx.h. */
#include "over_ucx.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "run/run.h"
#include "ucx/carrier.h"

#define STAGING (UINT64_C(1) << 30)
#define WAIT_NS 10000000000ull
#define PATIENCE 30
#define MOST_CARD 16384

static struct {
    struct ry_hub *hub;
    struct ry_carrier *carrier;
    int rank;
} over;

struct card {
    uint32_t size;
    char bytes[MOST_CARD - 4];
};

static bool wait_until(bool (*there)(uint64_t), uint64_t value)
{
    uint64_t until = ry_now_ns() + WAIT_NS;
    while (!there(value) && ry_now_ns() < until)
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    return there(value);
}

static bool met(uint64_t unused)
{
    return ry_carrier_state(over.carrier) != RY_CROSS_COULD;
}

static bool holds(uint64_t bytes)
{
    return ry_carrier_held(over.carrier) >= bytes;
}

static int make(const struct ry_device *device, int ordinal, const struct ry_cluster *map, struct ry_err *err)
{
    bool *with = malloc((size_t)map->nranks * sizeof *with);
    if (!with)
        return ry_fail(err, "out of memory");
    for (int r = 0; r < map->nranks; r++)
        with[r] = map->node[r] != map->node[over.rank];
    struct ry_carrier_config config = {.hub = over.hub,
                                       .device = device,
                                       .ordinal = ordinal,
                                       .nranks = map->nranks,
                                       .rank = over.rank,
                                       .with = with,
                                       .staged = device != ry_device_host(),
                                       .patience = PATIENCE,
                                       .name = "calibrate"};
    over.carrier = ry_carrier_new(&config, err);
    free(with);
    return over.carrier ? 0 : -1;
}

/* Everybody's card, by an all-gather of NCCL's. A rank that has none sends an empty one, and nobody meets anybody. */
static int swap_cards(const struct ry_device *device, const struct ry_cluster *map, ncclComm_t comm, void *stream,
                      struct ry_err *err)
{
    struct card mine = {0}, *all = calloc((size_t)map->nranks, sizeof *all), *there = NULL;
    size_t size = 0;
    const void *card = over.carrier ? ry_carrier_card(over.carrier, &size) : NULL;
    int rc = 0;
    if (size <= sizeof mine.bytes && card) {
        mine.size = (uint32_t)size;
        memcpy(mine.bytes, card, size);
    }
    if (!all || device->alloc((void **)&there, (size_t)(1 + map->nranks) * sizeof mine, err) ||
        device->copy(there, &mine, sizeof mine, stream, err) ||
        ncclAllGather(there, there + 1, sizeof mine, ncclUint8, comm, stream) != ncclSuccess ||
        device->copy(all, there + 1, (size_t)map->nranks * sizeof mine, stream, err) ||
        device->stream_sync(stream, err))
        rc = -1;
    for (int r = 0; !rc && r < map->nranks; r++)
        if (!all[r].size)
            rc = ry_fail(err, "rank %d cannot", r);
    for (int r = 0; !rc && r < map->nranks; r++)
        rc = ry_carrier_meet(over.carrier, r, all[r].bytes, all[r].size, err);
    device->release(there, NULL);
    free(all);
    return rc;
}

bool ry_ucx_open(const struct ry_device *device, int ordinal, const struct ry_cluster *map, int rank, ncclComm_t comm,
                 void *stream, struct ry_err *err)
{
    struct ry_err why = {""}, *mine = err;
    over.rank = rank;
    ry_run_staging_limit(STAGING);
    over.hub = ry_hub_start(device, ordinal, false, mine);
    if (over.hub && !make(device, ordinal, map, mine))
        mine = &why; /* what others say is theirs */
    if (swap_cards(device, map, comm, stream, mine == err ? NULL : err))
        return false;
    if (wait_until(met, 0) && ry_carrier_state(over.carrier) == RY_CROSS_HAS)
        return true;
    ry_fail(err, "not all ranks of other nodes answer");
    return false;
}

int ry_ucx_prepare(uint64_t bytes, size_t messages, struct ry_err *err)
{
    uint64_t need = ry_carrier_need(bytes, messages);
    ry_carrier_want(over.carrier, need);
    return wait_until(holds, need)
               ? 0
               : ry_fail(err, "no %llu bytes of host memory to stage transfers in", (unsigned long long)need);
}

int ry_ucx_issue(const struct ry_cal_message *m, size_t n, char *send, char *recv, void *stream, struct ry_err *err)
{
    struct ry_cross *face = ry_carrier_face(over.carrier);
    struct ry_cross_transfer *list = malloc((n + 1) * sizeof *list);
    int count = 0;
    if (!list)
        return ry_fail(err, "out of memory for %zu messages", n);
    for (size_t i = 0; i < n; i++) {
        if (m[i].from == over.rank) {
            list[count++] = (struct ry_cross_transfer){true, m[i].to, send, m[i].bytes};
            send += m[i].bytes;
        } else {
            list[count++] = (struct ry_cross_transfer){false, m[i].from, recv, m[i].bytes};
            recv += m[i].bytes;
        }
    }
    int rc = face->begin(face, list, count, stream, err) || face->end(face, stream, err) ? -1 : 0;
    free(list);
    return rc;
}

void ry_ucx_close(void)
{
    ry_carrier_end(over.carrier, false);
    ry_hub_abandon(over.hub);
}
