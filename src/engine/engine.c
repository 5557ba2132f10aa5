/*
 * engine.c: what happens with each communicator and each exchange that the preload saw.
 *
 * Owns: the hooks (plugin/hooks.h), one struct comm for every communicator of this process, and the order in which the
 * parts are started and stopped. Not: what the parts do: topo/ (what the node is), control/ (swapping seats with the
 * other ranks), record/ (the trace), sampler.c (durations), row_width.c.
 *
 * This version observes: an exchange is noted and passes. Its way: exchange_begin() numbers it and may start the clock;
 * NCCL does it; exchange_end() learns the row width and records it.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/settings.h"
#include "base/thread.h"
#include "cluster.h"
#include "control/rendezvous.h"
#include "device/device.h"
#include "hooks.h"
#include "record/record.h"
#include "row_width.h"
#include "sampler.h"
#include "topo.h"

#define TICKET_AT 64 /* where in a unique id our ticket lies: NCCL's own handle ends before */
_Static_assert(TICKET_AT + sizeof(struct ry_ticket) <= RY_NCCL_ID_BYTES, "a ticket fits into a unique id");

struct comm {
    struct comm *next;
    uint64_t key; /* the same on all ranks; its hexadecimal form is the id in traces */
    struct ry_comm_info info;
    struct ry_ticket ticket; /* where this communicator's ranks meet, and its children's */
    struct ry_seat seat;
    struct ry_row_width rows;
    _Atomic uint64_t exchanges;
    struct ry_record_comm *record;
};

static struct {
    struct ry_host host;
    struct ry_settings settings;
    uint32_t settings_hash;
    struct ry_record *record;
    struct ry_rendezvous *rendezvous;
    struct ry_rendezvous *local; /* host of INIT_ALL's communicators, on loopback where no other node would find it */
    struct ry_sampler *sampler;
    const struct ry_device *device; /* NULL: none could be opened */
    struct ry_topo *topo;           /* NULL until topology_known() has returned, and if it cannot be read */
    pthread_t topo_thread;
    pthread_mutex_t lock; /* guards `comms` and the starting of parts; no [job] function takes it */
    bool topo_running, device_tried;
    struct comm *comms;
    _Atomic bool closed;
    _Atomic int busy; /* hooks running now, so that closing can wait for them */
} engine = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* What exchange_begin leaves for exchange_end, on the same thread. */
static __thread struct {
    uint64_t number, wall_ns;
    struct ry_sample *sample;
    bool captured;
    /* the latest all-gather of 64-bit integers since the exchange before */
    char gather_comm[17];
    uint64_t gather_count;
} now;

/* Hooks come in here and leave again; after closing() none comes in. */
static bool enter(void)
{
    atomic_fetch_add(&engine.busy, 1);
    if (!atomic_load(&engine.closed))
        return true;
    atomic_fetch_sub(&engine.busy, 1);
    return false;
}

static void leave(void)
{
    atomic_fetch_sub(&engine.busy, 1);
}

/* ---- where this rank sits ---- */

/* The node's topology goes beside the trace, written by whichever of its processes comes first. */
static void save_topology(const struct ry_topo *topo)
{
    char node[64], path[4096];
    ry_node_identity(node);
    snprintf(path, sizeof path, "%s/topology-%016llx.xml", engine.settings.trace,
             (unsigned long long)XXH64(node, strlen(node), 0));
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0)
        return; /* there already; or a folder that recording complains of anyway */
    FILE *f = fdopen(fd, "w");
    struct ry_err err;
    if (!f || ry_topo_write(topo, RY_TOPO_XML, f, &err)) {
        ry_info("the node's topology was not saved to %s", path);
        unlink(path);
    }
    if (f)
        fclose(f);
    else
        close(fd);
}

/* Reading the topology takes a while on large machines: it is done while NCCL makes the first communicator. */
static void *read_topology(void *arg)
{
    struct ry_err err;
    struct ry_topo *topo = ry_topo_open_live(&err);
    if (!topo)
        ry_info("this node's topology is not known: %s", err.msg);
    else if (engine.record)
        save_topology(topo);
    engine.topo = topo;
    return NULL;
}

static void topology_known(void)
{
    pthread_mutex_lock(&engine.lock);
    if (engine.topo_running)
        pthread_join(engine.topo_thread, NULL);
    engine.topo_running = false;
    pthread_mutex_unlock(&engine.lock);
}

/* At the first communicator: a process that only makes ids for others needs no device. */
static void device_known(void)
{
    struct ry_err err;
    pthread_mutex_lock(&engine.lock);
    if (!engine.device_tried) {
        engine.device_tried = true;
        engine.device = engine.host.find("railyard_emu_version") ? ry_device_host() : ry_device_cuda(&err);
        if (!engine.device)
            ry_info("exchanges are not timed: %s", err.msg);
        else if (engine.record && engine.settings.sample && !(engine.sampler = ry_sampler_start(engine.device, &err)))
            ry_warn("exchanges are not timed: %s", err.msg);
    }
    pthread_mutex_unlock(&engine.lock);
}

static void take_seat(struct ry_seat *seat, int rank, int ordinal)
{
    *seat = (struct ry_seat){.version = RY_SEAT_VERSION,
                             .settings_hash = engine.settings_hash,
                             .rank = rank,
                             .pid = (int32_t)getpid(),
                             .railyard = RAILYARD_VERSION};
    ry_node_identity(seat->node);
    gethostname(seat->host, sizeof seat->host - 1);
    struct ry_device_id id;
    if (!engine.device || ordinal < 0 || engine.device->identify(ordinal, &id, NULL))
        return;
    memcpy(seat->gpu_name, id.name, sizeof seat->gpu_name);
    memcpy(seat->gpu_pci, id.pci, sizeof seat->gpu_pci);
    memcpy(seat->gpu_uuid, id.uuid, sizeof seat->gpu_uuid);
    const struct ry_topo_gpu *gpu = engine.topo && *id.pci ? ry_topo_gpu_by_pci(engine.topo, id.pci) : NULL;
    if (!gpu)
        return;
    seat->nvlink_gbs = gpu->nvlink_gbs;
    if (gpu->nearest_nic >= 0) {
        const struct ry_topo_nic *nic = ry_topo_nic(engine.topo, gpu->nearest_nic);
        memcpy(seat->nic, nic->name, sizeof seat->nic);
        seat->nic_gbs = nic->gbs;
    }
}

/* ---- communicators ---- */

static void id_text(uint64_t key, char out[17])
{
    snprintf(out, 17, "%016llx", (unsigned long long)key);
}

/* A number that all ranks of the communicator arrive at alike, and no other communicator of the job has. */
static uint64_t communicator_key(const struct ry_comm_info *info, const struct comm *parent)
{
    if (info->unique_id)
        return XXH64(info->unique_id, RY_NCCL_ID_BYTES, 0);
    struct {
        uint64_t parent;
        uint32_t birth, ordinal;
        int32_t color, pid;
        char node[64];
    } k = {.parent = parent ? parent->key : 0, .birth = info->birth, .ordinal = info->ordinal, .color = info->color};
    if (info->birth == RY_BIRTH_INIT_ALL) { /* all its ranks are in this process */
        k.pid = (int32_t)getpid();
        ry_node_identity(k.node);
        k.parent = ry_now_ns() / 1000000000u / 86400; /* pids come round */
    }
    return XXH64(&k, sizeof k, 0);
}

/* The rendezvous is over: runs on its thread. */
static void seats_swapped(void *context, const void *all, const void *extra, size_t extra_size, const char *why)
{
    struct comm *c = context;
    char id[17];
    struct ry_err err;
    id_text(c->key, id);
    struct ry_cluster *map = all ? ry_cluster_build(all, c->info.nranks, &err) : NULL;
    if (all && !map)
        why = err.msg;
    if (map) {
        ry_info("communicator %s: %d ranks on %d nodes, this is rank %d (node %d, local %d, %s)", id, map->nranks,
                map->nnodes, c->info.rank, map->node[c->info.rank], map->local[c->info.rank],
                *c->seat.gpu_pci ? c->seat.gpu_pci : "host memory");
        for (int r = 0; r < map->nranks; r++) {
            if (!strcmp(map->seats[r].railyard, c->seat.railyard) && map->seats[r].settings_hash == c->seat.settings_hash)
                continue;
            ry_warn("communicator %s: rank %d on %s runs Railyard %s with %s settings than rank %d (%s)", id, r,
                    map->seats[r].host, map->seats[r].railyard,
                    map->seats[r].settings_hash == c->seat.settings_hash ? "the same" : "other", c->info.rank,
                    c->seat.railyard);
            break;
        }
    } else {
        ry_info("communicator %s: no cluster map: %s", id, why);
    }
    if (c->record)
        ry_record_map(engine.record, c->record, map, why);
    ry_cluster_free(map);
}

static const char *birth_name(enum ry_birth birth)
{
    static const char *const names[] = {"init", "init_all", "split", "shrink"};
    return names[birth];
}

static struct ry_record_comm *begin_recording(const struct comm *c, const struct comm *parent)
{
    struct ry_record_comm_info info = {.name = c->info.name,
                                       .birth = birth_name(c->info.birth),
                                       .nranks = c->info.nranks,
                                       .rank = c->info.rank,
                                       .device = c->info.device,
                                       .seat = c->seat};
    id_text(c->key, info.id);
    if (parent)
        id_text(parent->key, info.parent);
    return ry_record_comm(engine.record, &info);
}

static void meet(struct comm *c, const struct comm *parent)
{
    struct ry_err err = {""};
    if (c->info.birth == RY_BIRTH_INIT_ALL) {
        struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        pthread_mutex_lock(&engine.lock);
        if (!engine.local)
            engine.local = ry_rendezvous_start(&err);
        pthread_mutex_unlock(&engine.lock);
        if (engine.local)
            ry_rendezvous_host(engine.local, (struct sockaddr *)&here, &c->ticket, &err);
    } else if (c->info.unique_id) {
        memcpy(&c->ticket, c->info.unique_id + TICKET_AT, sizeof c->ticket);
    } else if (parent) {
        c->ticket = parent->ticket;
    }
    if (!*err.msg && !ry_rendezvous_attend(engine.rendezvous, &c->ticket, c->key, c->info.nranks, c->info.rank, &c->seat,
                                           sizeof c->seat, NULL, 0, engine.settings.patience, seats_swapped, c, &err))
        return;
    seats_swapped(c, NULL, NULL, 0, err.msg);
}

static void *comm_created(const struct ry_comm_info *info)
{
    struct comm *parent = info->parent, *c = NULL;
    if (!enter())
        return NULL;
    if (!info->unique_id && info->birth != RY_BIRTH_INIT_ALL && !parent) {
        ry_info("a communicator of %d ranks is not followed: its parent is not known", info->nranks);
        goto out;
    }
    topology_known();
    device_known();
    if (!(c = calloc(1, sizeof *c)) || ry_row_width_init(&c->rows, info->nranks, engine.settings.row_bytes)) {
        ry_warn_once("out of memory: a communicator of %d ranks is not followed", info->nranks);
        free(c);
        c = NULL;
        goto out;
    }
    c->info = *info;
    c->key = communicator_key(info, parent);
    take_seat(&c->seat, info->rank, info->device);
    if (engine.record)
        c->record = begin_recording(c, parent);
    pthread_mutex_lock(&engine.lock);
    c->next = engine.comms;
    engine.comms = c;
    pthread_mutex_unlock(&engine.lock);
    meet(c, parent);
    /* these were the caller's */
    c->info.name = NULL;
    c->info.unique_id = NULL;
    c->info.parent = NULL;
out:
    leave();
    return c;
}

/* Close the communicator's part of the trace. */
static void end_recording(struct comm *c, const char *how, const struct ry_comm_counts *counts)
{
    static const char *const names[RY_CALLS] = {"send", "recv", "alltoall", "allgather", "allreduce", "broadcast",
                                                "reduce", "reducescatter", "gather", "scatter", "onesided"};
    struct ry_record_counter list[2 * RY_CALLS + 2];
    char text[2 * RY_CALLS][32];
    int n = 0;
    list[n++] = (struct ry_record_counter){"exchanges", counts->exchanges};
    list[n++] = (struct ry_record_counter){"plain_groups", counts->plain_groups};
    for (int i = 0; i < RY_CALLS; i++) {
        snprintf(text[2 * i], sizeof text[0], "calls.%s", names[i]);
        snprintf(text[2 * i + 1], sizeof text[0], "bytes.%s", names[i]);
        list[n++] = (struct ry_record_counter){text[2 * i], counts->calls[i]};
        list[n++] = (struct ry_record_counter){text[2 * i + 1], counts->bytes[i]};
    }
    ry_record_comm_end(engine.record, c->record, how, list, n);
    c->record = NULL;
}

static void comm_ended(void *handle, enum ry_death how, const struct ry_comm_counts *counts)
{
    static const char *const names[] = {"destroy", "abort", "revoke", "exit"};
    struct comm *c = handle;
    if (!enter())
        return; /* closing() sees to it */
    pthread_mutex_lock(&engine.lock);
    for (struct comm **p = &engine.comms; *p; p = &(*p)->next) {
        if (*p != c)
            continue;
        *p = c->next;
        break;
    }
    pthread_mutex_unlock(&engine.lock);
    ry_rendezvous_cancel(engine.rendezvous, c);
    if (engine.sampler)
        ry_sampler_forget(engine.sampler, c);
    if (c->record)
        end_recording(c, names[how], counts);
    ry_row_width_free(&c->rows);
    free(c);
    leave();
}

/* ---- exchanges ---- */

static void *exchange_begin(void *handle, const struct ry_exchange *x)
{
    struct comm *c = handle;
    if (!enter())
        return NULL;
    now.number = atomic_fetch_add_explicit(&c->exchanges, 1, memory_order_relaxed);
    now.wall_ns = ry_wall_ns();
    now.captured = false;
    now.sample = NULL;
    if (engine.device)
        engine.device->stream_capturing(x->stream, &now.captured, NULL);
    if (engine.sampler && !now.captured && now.number % engine.settings.sample == 0)
        now.sample = ry_sampler_begin(engine.sampler, c->info.device, x->stream);
    leave();
    return c;
}

static void exchange_took(void *context, uint64_t number, double us)
{
    struct comm *c = context;
    ry_record_duration(engine.record, c->record, number, us);
}

static void exchange_end(void *handle, const struct ry_exchange *x, void *cookie, int result)
{
    struct comm *c = handle;
    bool ok = result == 0 || result == 7; /* ncclSuccess, ncclInProgress */
    if (!cookie || !enter())
        return;
    if (ok && c->record) {
        struct ry_record_exchange r = {.number = now.number,
                                       .wall_ns = now.wall_ns,
                                       .type = x->type,
                                       .type_bytes = x->type_bytes,
                                       .one_call = x->one_call,
                                       .captured = now.captured,
                                       .send_count = x->send_count,
                                       .recv_count = x->recv_count,
                                       .gather_count = now.gather_count};
        r.row_elems = ry_row_width_see(&c->rows, x->send_count, x->recv_count, x->type_bytes, &r.row_source);
        memcpy(r.gather_comm, now.gather_comm, sizeof r.gather_comm);
        ry_record_exchange(engine.record, c->record, &r);
        now.gather_count = 0;
    }
    /* After the record: a duration must not come before its exchange. While NCCL still works on a group in the background
       (ncclInProgress) its kernels are not on the stream yet, and the end cannot be marked. */
    if (now.sample)
        ry_sampler_end(engine.sampler, now.sample, x->stream, result == 0 && c->record, exchange_took, c, now.number);
    leave();
}

static void int64_allgather(void *handle, uint64_t count)
{
    const struct comm *c = handle;
    id_text(c->key, now.gather_comm);
    now.gather_count = count;
}

/* ---- starting and stopping ---- */

/* NCCL's handle begins with a 64-bit magic number and the address of its own bootstrap: be the host there, too. */
static void unique_id(uint8_t id[RY_NCCL_ID_BYTES])
{
    struct ry_ticket ticket;
    struct sockaddr_storage at = {0};
    struct ry_err err;
    for (size_t i = TICKET_AT; i < RY_NCCL_ID_BYTES; i++)
        if (id[i])
            return; /* not as we know it: leave it alone */
    /* With NCCL_COMM_ID every rank makes the id by itself, and they must all be equal. */
    if (getenv("NCCL_COMM_ID") || !enter())
        return;
    memcpy(&at, id + 8, sizeof(struct sockaddr_in6));
    if (at.ss_family != AF_INET && at.ss_family != AF_INET6)
        ry_info("no cluster maps: the unique id of this NCCL does not hold an address");
    else if (ry_rendezvous_host(engine.rendezvous, (struct sockaddr *)&at, &ticket, &err))
        ry_info("no cluster maps: %s", err.msg);
    else
        memcpy(id + TICKET_AT, &ticket, sizeof ticket);
    leave();
}

static void closing(void (*counts)(void *nccl, struct ry_comm_counts *out))
{
    atomic_store(&engine.closed, true);
    for (int i = 0; i < 1000 && atomic_load(&engine.busy); i++)
        usleep(1000);
    if (atomic_load(&engine.busy))
        return; /* a thread hangs in a hook (a file system that does not answer?): what is on disk must do */
    topology_known();
    if (engine.rendezvous)
        ry_rendezvous_stop(engine.rendezvous);
    if (engine.local)
        ry_rendezvous_stop(engine.local);
    if (engine.sampler)
        ry_sampler_stop(engine.sampler);
    if (!engine.record)
        return;
    for (struct comm *c = engine.comms; c; c = c->next) {
        struct ry_comm_counts n;
        counts(c->info.nccl, &n);
        if (c->record)
            end_recording(c, "exit", &n);
    }
    ry_record_close(engine.record);
}

/* Of those settings that must be the same on all ranks before exchanges are reissued. */
static uint32_t hash_settings(const struct ry_settings *s)
{
    struct {
        uint64_t row_bytes;
        double patience;
    } shared = {s->row_bytes, s->patience};
    return (uint32_t)XXH64(&shared, sizeof shared, 0);
}

static void open_record(void)
{
    struct ry_record_config config = {.dir = engine.settings.trace,
                                      .max_bytes = engine.settings.trace_max,
                                      .buffer_bytes = engine.settings.trace_buffer,
                                      .matrix_seconds = engine.settings.trace_matrix,
                                      .nccl_path = engine.host.nccl_path,
                                      .nccl_version = engine.host.nccl_version};
    struct ry_err err;
    engine.record = ry_record_open(&config, &err);
    if (!engine.record)
        ry_warn("nothing is recorded: %s", err.msg);
}

int railyard_engine_open(const struct ry_host *host, struct ry_hooks *hooks, char *why, size_t why_size);

__attribute__((visibility("default"))) int railyard_engine_open(const struct ry_host *host, struct ry_hooks *hooks,
                                                                char *why, size_t why_size)
{
    char problems[1024];
    struct ry_err err;
    if (host->version != RY_HOOKS_VERSION || host->size != sizeof *host)
        return snprintf(why, why_size, "librailyard.so speaks version %u of the hooks, the engine %u: they are of different "
                                       "installations", host->version, RY_HOOKS_VERSION), -1;
    engine.host = *host;
    if (ry_settings_parse(&engine.settings, environ, problems, sizeof problems))
        ry_warn("%s", problems);
    ry_log_set_level(engine.settings.log);
    engine.settings_hash = hash_settings(&engine.settings);
    engine.rendezvous = ry_rendezvous_start(&err);
    if (!engine.rendezvous)
        return snprintf(why, why_size, "%s", err.msg), -1;
    if (*engine.settings.trace)
        open_record();
    engine.topo_running = !ry_thread_start(&engine.topo_thread, read_topology, NULL);
    ry_info("Railyard %s watches NCCL %d at %s%s%s", RAILYARD_VERSION, host->nccl_version, host->nccl_path,
            engine.record ? ", recording to " : "", engine.record ? engine.settings.trace : "");
    *hooks = (struct ry_hooks){
        .version = RY_HOOKS_VERSION,
        .size = sizeof *hooks,
        .unique_id = unique_id,
        .comm_created = comm_created,
        .comm_ended = comm_ended,
        .closing = closing,
    };
    if (engine.record) { /* with nothing to record nothing is asked of the job's threads */
        hooks->exchange_begin = exchange_begin;
        hooks->exchange_end = exchange_end;
        hooks->int64_allgather = int64_allgather;
    }
    return 0;
}
