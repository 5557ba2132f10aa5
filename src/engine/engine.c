/*
 * engine.c: what happens with each communicator that the preload saw.
 *
 * Owns: the hooks (plugin/hooks.h), one struct comm for every communicator of this process, and the order in which the
 * parts are started and stopped. Not: the way of an exchange (exchange.c), what makes a communicator one whose exchanges can be
 * reissued (reissue.c), nor what the parts do: topo/ (what the node is), control/ (talking with the other ranks), plan/, run/,
 * record/ (the trace), sampler.c (durations), row_width.c.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/clock.h"
#include "base/thread.h"
#include "engine.h"
#include "measure/seat.h"

#define TICKET_AT 64 /* where in a unique id our ticket lies: NCCL's own handle ends before */
_Static_assert(TICKET_AT + sizeof(struct ry_ticket) <= RY_NCCL_ID_BYTES, "a ticket fits into a unique id");

struct engine ry_engine = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- where this rank sits ---- */

/* The node's topology goes beside the trace, written by whichever of its processes comes first. */
static void save_topology(const struct ry_topo *topo)
{
    char node[64], path[4096];
    ry_node_identity(node);
    snprintf(path, sizeof path, "%s/topology-%016llx.xml", ry_engine.settings.trace,
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
    else if (ry_engine.record)
        save_topology(topo);
    ry_engine.topo = topo;
    return NULL;
}

static void topology_known(void)
{
    pthread_mutex_lock(&ry_engine.lock);
    if (ry_engine.topo_running)
        pthread_join(ry_engine.topo_thread, NULL);
    ry_engine.topo_running = false;
    pthread_mutex_unlock(&ry_engine.lock);
}

/* For the emulated cluster's jobs, which have no CUDA to wait for a stream with. */
static int sync_host_stream(void *stream)
{
    return ry_device_host()->stream_sync(stream, NULL);
}

/* At the first communicator: a process that only makes ids for others needs no device and nobody to talk to. */
static void start_parts(void)
{
    struct ry_err err;
    bool emulated = ry_engine.host.find("railyard_emu_version") != NULL;
    ry_engine.device = emulated ? ry_device_host() : ry_device_cuda(&err);
    if (emulated) {
        void *capturing = ry_engine.host.find("railyard_emu_capturing");
        bool (*f)(void *);
        memcpy(&f, &capturing, sizeof f);
        ry_device_host_captures(f);
        void *streams = ry_engine.host.find("railyard_emu_streams");
        void (*tell)(int (*)(void *));
        memcpy(&tell, &streams, sizeof tell);
        if (tell)
            tell(sync_host_stream);
    }
    if (!ry_engine.device) {
        ry_info("exchanges are neither timed nor reissued: %s", err.msg);
        return;
    }
    if ((ry_engine.record || !ry_engine.observe) && ry_engine.settings.sample &&
        !(ry_engine.sampler = ry_sampler_start(ry_engine.device, &err)))
        ry_warn("exchanges are not timed: %s", err.msg);
    if (ry_engine.sampler)
        ry_engine.contention = ry_contention_new();
    if (ry_engine.observe)
        return;
    if (ry_nccl_find(&ry_engine.nccl, ry_engine.host.find, &err) || !(ry_engine.control = ry_control_start(&err)))
        ry_warn("exchanges are not reissued: %s", err.msg);
    int ordinal = ry_engine.device->current ? ry_engine.device->current() : -1;
    bool direct = !strcmp(ry_engine.settings.transport, "ucx") && ordinal >= 0;
    if (ry_engine.control && atomic_load(&ry_engine.transport) != RY_BY_NCCL &&
        !(ry_engine.hub = ry_hub_start(ry_engine.device, ordinal, direct, &err)))
        ry_warn("NCCL carries everything: %s", err.msg);
}

static void parts_known(void)
{
    pthread_mutex_lock(&ry_engine.lock);
    if (!ry_engine.parts_tried)
        start_parts();
    ry_engine.parts_tried = true;
    pthread_mutex_unlock(&ry_engine.lock);
}

/* ---- communicators ---- */

/* A number that all ranks of the communicator arrive at alike, and no other communicator of the job has. */
static uint64_t communicator_key(const struct ry_comm_info *info, const struct comm *parent)
{
    if (info->key)
        return info->key;
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

/* Every rank but those of the same version and settings keeps exchanges on plain NCCL: say so once. */
static void look_for_others(const struct comm *c, const struct ry_cluster *map)
{
    for (int r = 0; r < map->nranks; r++) {
        const struct ry_seat *s = &map->seats[r];
        if (!strcmp(s->railyard, c->seat.railyard) && s->settings_hash == c->seat.settings_hash)
            continue;
        ry_warn("communicator %s: rank %d on %s runs Railyard %s with %s settings than rank %d (%s)", c->id, r, s->host,
                s->railyard, s->settings_hash == c->seat.settings_hash ? "the same" : "other", c->info.rank,
                c->seat.railyard);
        break;
    }
}

/* The rendezvous is over: runs on its thread. */
static void seats_swapped(void *context, const void *all, const void *address, size_t address_size, const char *why)
{
    struct comm *c = context;
    struct ry_err err;
    struct ry_cluster *map = all ? ry_cluster_build(all, c->info.nranks, &err) : NULL;
    if (all && !map)
        why = err.msg;
    if (map) {
        ry_info("communicator %s: %d ranks on %d nodes, this is rank %d (node %d, local %d, %s)", c->id, map->nranks,
                map->nnodes, c->info.rank, map->node[c->info.rank], map->local[c->info.rank],
                *c->seat.gpu_pci ? c->seat.gpu_pci : "host memory");
        look_for_others(c, map);
    } else {
        ry_info("communicator %s: no cluster map: %s", c->id, why);
    }
    if (c->record)
        ry_record_map(ry_engine.record, c->record, map, why);
    if (!map || !ry_reissue_open(c, map, address, address_size))
        ry_cluster_free(map);
}

static const char *birth_name(enum ry_birth birth)
{
    static const char *const names[] = {"init", "init_all", "split", "shrink", "seen"};
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
    memcpy(info.id, c->id, sizeof info.id);
    if (parent)
        memcpy(info.parent, parent->id, sizeof info.parent);
    return ry_record_comm(ry_engine.record, &info);
}

static void meet(struct comm *c, const struct comm *parent)
{
    struct ry_err err = {""};
    size_t address_size;
    const void *address = ry_reissue_address(c, &address_size);
    if (c->info.birth == RY_BIRTH_SEEN) {
        ry_fail(&err, "NCCL's profiler interface does not let ranks meet");
    } else if (c->info.birth == RY_BIRTH_INIT_ALL) {
        struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        pthread_mutex_lock(&ry_engine.lock);
        if (!ry_engine.local)
            ry_engine.local = ry_rendezvous_start(&err);
        pthread_mutex_unlock(&ry_engine.lock);
        if (ry_engine.local)
            ry_rendezvous_host(ry_engine.local, (struct sockaddr *)&here, &c->ticket, &err);
    } else if (c->info.unique_id) {
        memcpy(&c->ticket, c->info.unique_id + TICKET_AT, sizeof c->ticket);
    } else if (parent) {
        c->ticket = parent->ticket;
    }
    if (!*err.msg && !ry_rendezvous_attend(ry_engine.rendezvous, &c->ticket, c->key, c->info.nranks, c->info.rank, &c->seat,
                                           sizeof c->seat, address, address_size, ry_engine.settings.patience, seats_swapped, c, &err))
        return;
    seats_swapped(c, NULL, NULL, 0, err.msg);
}

static void *comm_created(const struct ry_comm_info *info)
{
    struct comm *parent = info->parent, *c = NULL;
    if (!ry_engine_enter())
        return NULL;
    if (!info->key && !info->unique_id && info->birth != RY_BIRTH_INIT_ALL && !parent) {
        ry_info("a communicator of %d ranks is not followed: its parent is not known", info->nranks);
        goto out;
    }
    topology_known();
    parts_known();
    if (!(c = calloc(1, sizeof *c)) || ry_row_width_init(&c->rows, info->nranks, ry_engine.settings.row_bytes)) {
        ry_warn_once("out of memory: a communicator of %d ranks is not followed", info->nranks);
        free(c);
        c = NULL;
        goto out;
    }
    c->info = *info;
    c->seat_beside = -1;
    if (info->device == RY_DEVICE_CURRENT)
        c->info.device = ry_engine.device && ry_engine.device->current ? ry_engine.device->current() : -1;
    c->key = communicator_key(info, parent);
    snprintf(c->id, sizeof c->id, "%016llx", (unsigned long long)c->key);
    ry_seat_take(&c->seat, ry_engine.device, ry_engine.topo, info->rank, c->info.device, ry_engine.settings_hash);
    c->seat.able = ry_reissue_able(info);
    if (ry_engine.record)
        c->record = begin_recording(c, parent);
    atomic_store(&c->face.wants, c->record != NULL);
    pthread_mutex_lock(&ry_engine.lock);
    c->next = ry_engine.comms;
    ry_engine.comms = c;
    pthread_mutex_unlock(&ry_engine.lock);
    meet(c, parent);
    /* these were the caller's */
    c->info.name = NULL;
    c->info.unique_id = NULL;
    c->info.parent = NULL;
out:
    ry_engine_leave();
    return c;
}

/* Close the communicator's part of the trace. */
static void end_recording(struct comm *c, const char *how, const struct ry_comm_counts *counts)
{
    static const char *const names[RY_CALLS] = {"send", "recv", "alltoall", "allgather", "allreduce", "broadcast",
                                                "reduce", "reducescatter", "gather", "scatter", "onesided"};
    struct ry_record_counter list[2 * RY_CALLS + 9 + RY_STRATEGIES];
    char text[2 * RY_CALLS][32], strategy[RY_STRATEGIES][32];
    int n = 0;
    list[n++] = (struct ry_record_counter){"exchanges", counts->exchanges};
    list[n++] = (struct ry_record_counter){"plain_groups", counts->plain_groups};
    for (int i = 0; i < RY_CALLS; i++) {
        snprintf(text[2 * i], sizeof text[0], "calls.%s", names[i]);
        snprintf(text[2 * i + 1], sizeof text[0], "bytes.%s", names[i]);
        list[n++] = (struct ry_record_counter){text[2 * i], counts->calls[i]};
        list[n++] = (struct ry_record_counter){text[2 * i + 1], counts->bytes[i]};
    }
    if (atomic_load(&c->clocked_us) > 0) {
        list[n++] = (struct ry_record_counter){"clocked_us", (uint64_t)atomic_load(&c->clocked_us)};
        list[n++] = (struct ry_record_counter){"beside_us", (uint64_t)atomic_load(&c->met_us)};
    }
    if (c->counts.agreed) {
        list[n++] = (struct ry_record_counter){"agreed", c->counts.agreed};
        list[n++] = (struct ry_record_counter){"verified", c->counts.verified};
        list[n++] = (struct ry_record_counter){"verify_differs", c->counts.verify_differs};
        list[n++] = (struct ry_record_counter){"short_of_staging", c->counts.short_of_staging};
        list[n++] = (struct ry_record_counter){"over_ucx", c->counts.over_ucx};
        for (int i = 0; i < RY_STRATEGIES; i++) {
            snprintf(strategy[i], sizeof strategy[i], "agreed.%s", ry_strategy_name((enum ry_strategy)i));
            list[n++] = (struct ry_record_counter){strategy[i], c->counts.by_strategy[i]};
        }
    }
    ry_record_comm_end(ry_engine.record, c->record, how, list, n);
    c->record = NULL;
}

void ry_comm_end(struct comm *c, enum ry_death how, const struct ry_comm_counts *counts)
{
    static const char *const names[] = {"destroy", "abort", "revoke", "exit"};
    pthread_mutex_lock(&ry_engine.lock);
    for (struct comm **p = &ry_engine.comms; *p; p = &(*p)->next) {
        if (*p != c)
            continue;
        *p = c->next;
        break;
    }
    pthread_mutex_unlock(&ry_engine.lock);
    ry_rendezvous_cancel(ry_engine.rendezvous, c);
    if (ry_engine.sampler)
        ry_sampler_forget(ry_engine.sampler, c);
    ry_contention_leave(ry_engine.contention, c->seat_beside);
    ry_reissue_close(c, how == RY_DEATH_ABORT);
    ry_later_end(c);
    if (c->record)
        end_recording(c, names[how], counts);
    ry_row_width_free(&c->rows);
    free(c);
}

static void comm_ended(void *handle, enum ry_death how, const struct ry_comm_counts *counts)
{
    struct comm *c = handle;
    if (!ry_engine_enter())
        return; /* closing() sees to it */
    if (!ry_later_ends(c, how, counts)) /* else the last of what was given away does it */
        ry_comm_end(c, how, counts);
    ry_engine_leave();
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
    if (getenv("NCCL_COMM_ID") || !ry_engine_enter())
        return;
    memcpy(&at, id + 8, sizeof(struct sockaddr_in6));
    if (at.ss_family != AF_INET && at.ss_family != AF_INET6)
        ry_info("no cluster maps: the unique id of this NCCL does not hold an address");
    else if (ry_rendezvous_host(ry_engine.rendezvous, (struct sockaddr *)&at, &ticket, &err))
        ry_info("no cluster maps: %s", err.msg);
    else
        memcpy(id + TICKET_AT, &ticket, sizeof ticket);
    ry_engine_leave();
}

static void closing(void (*counts)(void *nccl, struct ry_comm_counts *out))
{
    ry_later_close();
    atomic_store(&ry_engine.closed, true);
    pthread_mutex_lock(&ry_engine.lock);
    for (struct comm *c = ry_engine.comms; c; c = c->next) {
        struct reissue *r = atomic_load(&c->reissue);
        if (r)
            atomic_store(&r->aborted, true); /* a thread that waits for the device must not hold up the end */
        if (r)
            ry_twins_leave(r->twins, false);
        if (r && r->talk)
            ry_talk_leave(r->talk);
    }
    pthread_mutex_unlock(&ry_engine.lock);
    for (int i = 0; i < 1000 && atomic_load(&ry_engine.busy); i++)
        usleep(1000);
    if (atomic_load(&ry_engine.busy))
        return; /* a thread hangs in a hook (a file system that does not answer?): what is on disk must do */
    topology_known();
    if (ry_engine.rendezvous)
        ry_rendezvous_stop(ry_engine.rendezvous);
    if (ry_engine.local)
        ry_rendezvous_stop(ry_engine.local);
    if (ry_engine.sampler)
        ry_sampler_stop(ry_engine.sampler);
    ry_node_comm_settle();
    ry_hub_abandon(ry_engine.hub);
    for (struct comm *c = ry_engine.comms; c; c = c->next)
        ry_reissue_close(c, true); /* the driver may be gone by now */
    if (ry_engine.control)
        ry_control_abandon(ry_engine.control);
    if (!ry_engine.record)
        return;
    for (struct comm *c = ry_engine.comms; c; c = c->next) {
        struct ry_comm_counts n;
        counts(c->info.nccl, &n);
        if (c->record)
            end_recording(c, "exit", &n);
    }
    ry_record_close(ry_engine.record);
}

/* Of those settings that must be the same on all ranks before exchanges are reissued. */
static uint32_t hash_settings(const struct ry_settings *s)
{
    struct {
        uint64_t row_bytes, staging, verify, node_comm, sum, copies, strategy, transport;
        double patience;
    } shared = {s->row_bytes, s->staging, s->verify, s->node_comm, ry_engine.combine.sum, ry_engine.combine.copies,
                XXH64(s->strategy, strlen(s->strategy), 0), XXH64(s->transport, strlen(s->transport), 0), s->patience};
    return (uint32_t)XXH64(&shared, sizeof shared, 0);
}

/* auto is no strategy itself. */
static int set_strategy(const char *name, struct ry_err *err)
{
    enum ry_strategy forced = RY_DIRECT;
    bool choose = !strcmp(name, "auto");
    if (!choose && ry_strategy_parse(name, &forced, err))
        return -1;
    atomic_store(&ry_engine.forced, choose ? -1 : (int)forced);
    return 0;
}

/* "hierarchical/ucx": by UCX, if RAILYARD_TRANSPORT is not nccl, to compare ways within one job; "hierarchical/nccl"; without, as
   RAILYARD_TRANSPORT says. */
static int strategy(const char *name)
{
    char own[32] = "";
    size_t length = strcspn(name, "/");
    bool ucx = !strcmp(name + length, "/ucx"), known = ucx || !name[length] || !strcmp(name + length, "/nccl");
    if (ry_engine.observe || !known || length >= sizeof own || set_strategy(memcpy(own, name, length), NULL))
        return -1;
    atomic_store(&ry_engine.transport, !name[length] ? (int)ry_engine.transport_asked : ucx ? RY_BY_UCX : RY_BY_NCCL);
    return 0;
}

static void read_strategy(void)
{
    struct ry_err err;
    atomic_store(&ry_engine.forced, -1);
    ry_engine.observe = ry_engine.host.observe_only || !strcmp(ry_engine.settings.strategy, "observe");
    if (!ry_engine.observe && set_strategy(ry_engine.settings.strategy, &err))
        ry_warn("RAILYARD_STRATEGY: %s; also known: auto, observe. Taken as auto", err.msg);
}

static void read_combine(void)
{
    struct ry_err err;
    if (ry_combine_parse(ry_engine.settings.combine, &ry_engine.combine, &err))
        ry_log(RY_LOG_ERROR, "RAILYARD_COMBINE: %s. Taken as exact: nothing is summed", err.msg);
}

static void read_chunks(void)
{
    uint64_t chunks = ry_engine.settings.chunks;
    bool known = chunks <= 2 || chunks == RY_CHUNKS;
    if (!known)
        ry_warn("RAILYARD_CHUNKS: %llu is none of 0 (by the cost model), 1, 2 and %d. Taken as 0",
                (unsigned long long)chunks, RY_CHUNKS);
    ry_engine.chunks = known ? (int)chunks : 0;
}

/* What the job's thread loads while its stream waits must not keep ours from launching. */
static void read_hold(void)
{
    const char *loading = getenv("CUDA_MODULE_LOADING");
    if (ry_engine.settings.hold || ry_engine.observe)
        return;
    if (!loading || strcasecmp(loading, "EAGER"))
        ry_warn("RAILYARD_HOLD=no needs CUDA_MODULE_LOADING=EAGER, which is %s: the calling thread is held", loading ? loading : "not set");
    else
        ry_later_start();
}

static void open_record(void)
{
    struct ry_record_config config = {.dir = ry_engine.settings.trace,
                                      .max_bytes = ry_engine.settings.trace_max,
                                      .buffer_bytes = ry_engine.settings.trace_buffer,
                                      .matrix_seconds = ry_engine.settings.trace_matrix,
                                      .nccl_path = ry_engine.host.nccl_path,
                                      .nccl_version = ry_engine.host.nccl_version};
    struct ry_err err;
    ry_engine.record = ry_record_open(&config, &err);
    if (!ry_engine.record)
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
    static _Atomic bool opened;
    if (atomic_exchange(&opened, true))
        return snprintf(why, why_size, ry_engine.host.observe_only ? "Railyard as NCCL's profiler plugin observes this process already"
                                                                   : "librailyard.so, preloaded, watches this process already"), -1;
    ry_engine.host = *host;
    if (ry_settings_parse(&ry_engine.settings, environ, problems, sizeof problems))
        ry_warn("%s", problems);
    ry_log_set_level(ry_engine.settings.log);
    read_strategy();
    read_combine();
    read_chunks();
    ry_engine.transport_asked = ry_transport_read(ry_engine.settings.transport, &ry_engine.staged);
    atomic_store(&ry_engine.transport, ry_engine.transport_asked);
    ry_run_staging_limit(ry_engine.settings.staging);
    read_hold();
    ry_engine.settings_hash = hash_settings(&ry_engine.settings);
    ry_engine.rendezvous = ry_rendezvous_start(&err);
    if (!ry_engine.rendezvous)
        return snprintf(why, why_size, "%s", err.msg), -1;
    if (*ry_engine.settings.trace)
        open_record();
    ry_engine.topo_running = !ry_thread_start(&ry_engine.topo_thread, read_topology, NULL);
    ry_info("Railyard %s watches NCCL %d at %s%s%s", RAILYARD_VERSION, host->nccl_version, host->nccl_path,
            ry_engine.record ? ", recording to " : "", ry_engine.record ? ry_engine.settings.trace : "");
    *hooks = (struct ry_hooks){
        .version = RY_HOOKS_VERSION,
        .size = sizeof *hooks,
        .unique_id = unique_id,
        .comm_created = comm_created,
        .comm_ended = comm_ended,
        .closing = closing,
    };
    if (ry_engine.record || !ry_engine.observe) { /* otherwise nothing is asked of the job's threads */
        hooks->exchange_begin = ry_exchange_begin;
        hooks->exchange_take = ry_exchange_take;
        hooks->exchange_end = ry_exchange_end;
        hooks->stray = ry_exchange_stray;
        hooks->comm_aborting = ry_exchange_aborting;
        hooks->strategy = strategy;
        hooks->redirect_ready = ry_redirect_ready;
        hooks->redirect = ry_redirect_next;
        hooks->redirect_done = ry_redirect_done;
        if (ry_later_on()) {
            hooks->settle = ry_later_settle;
            hooks->freeing = ry_later_freeing;
            hooks->freed = ry_later_freed;
        }
    }
    if (ry_engine.record) {
        hooks->int64_allgather = ry_exchange_int64_allgather;
        hooks->exchange_clock = ry_exchange_clock;
        hooks->exchange_seen = ry_exchange_seen;
    }
    return 0;
}
