/*
 * start.c: what happens at the first NCCL call of a process, and at its first communicator.
 *
 * Owns: finding out whether to watch at all, opening the engine, and taking leave of it when the process exits or forks. Not: finding
 * NCCL (real.c).
 */
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "base/log.h"
#include "control/load.h"
#include "preload.h"

_Atomic int ry_preload_state = RY_UNBORN;
struct ry_hooks ry_preload_hooks;

/*
 * The one thing that is done before anybody calls NCCL: where exchanges may be carried out while the job's stream waits for
 * them, kernels must be loaded when their module is, and streams should not share hardware queues. CUDA reads both once, when it
 * starts. Under MPS all clients have one pool of queues: who takes many may keep others from starting.
 */
static __attribute__((constructor)) void prepare_cuda(void)
{
    const char *hold = getenv("RAILYARD_HOLD");
    if (!hold || (strcmp(hold, "0") && strcasecmp(hold, "no") && strcasecmp(hold, "off") && strcasecmp(hold, "false")))
        return;
    setenv("CUDA_MODULE_LOADING", "EAGER", 0);
    if (!getenv("CUDA_MPS_PIPE_DIRECTORY") && access("/tmp/nvidia-mps/control", F_OK))
        setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
}

static bool disabled(void)
{
    const char *v = getenv("RAILYARD_DISABLE");
    return v && (!strcmp(v, "1") || !strcasecmp(v, "yes") || !strcasecmp(v, "on") || !strcasecmp(v, "true"));
}

bool ry_preload_start(void)
{
    if (!ry_real_load())
        return false;
    int unborn = RY_UNBORN;
    atomic_compare_exchange_strong(&ry_preload_state, &unborn, disabled() ? RY_PASSIVE : RY_WATCHING);
    return true;
}

/* ---- the engine ---- */

static void comm_gone(struct ry_comm *c)
{
    if (!c->engine || !ry_preload_hooks.comm_ended || atomic_load(&ry_preload_state) != RY_WATCHING)
        return;
    struct ry_comm_counts counts;
    ry_comms_counts(c, &counts);
    ry_preload_hooks.comm_ended(c->engine, c->aborted ? RY_DEATH_ABORT : c->revoked ? RY_DEATH_REVOKE : RY_DEATH_DESTROY, &counts);
    c->engine = NULL;
}

static void counts_of(void *nccl, struct ry_comm_counts *out)
{
    const struct ry_comm *c = ry_comms_find(nccl);
    memset(out, 0, sizeof *out);
    if (c)
        ry_comms_counts(c, out);
}

static void at_exit(void)
{
    if (atomic_exchange(&ry_preload_state, RY_PASSIVE) == RY_WATCHING && ry_preload_hooks.closing)
        ry_preload_hooks.closing(counts_of);
}

/* A forked child (a data worker) has none of the engine's threads, and must not write its parent's trace. */
static void in_child(void)
{
    atomic_store(&ry_preload_state, RY_PASSIVE);
}

static bool load_engine(char *why, size_t size)
{
    Dl_info self;
    char path[PATH_MAX];
    if (!dladdr((void *)load_engine, &self) || !self.dli_fname)
        return snprintf(why, size, "cannot tell where librailyard.so lies"), false;
    const char *slash = strrchr(self.dli_fname, '/');
    int dir = slash ? (int)(slash - self.dli_fname + 1) : 0;
    snprintf(path, sizeof path, "%.*slibrailyard-engine.so", dir, self.dli_fname);
    void *engine = ry_load_quietly(path, RTLD_NOW | RTLD_LOCAL); /* it brings UCX along */
    if (!engine)
        return snprintf(why, size, "%s", dlerror()), false;
    ry_engine_open_fn open_engine = (ry_engine_open_fn)dlsym(engine, RY_ENGINE_ENTRY);
    if (!open_engine)
        return snprintf(why, size, "%s has no " RY_ENGINE_ENTRY ": not Railyard's engine", path), false;
    static struct ry_host host = {.version = RY_HOOKS_VERSION, .size = sizeof host, .find = ry_real_find,
                                  .own_thread = ry_preload_own_thread, .plain = ry_preload_plain};
    host.nccl_path = ry_real_path();
    if (ry_real.ncclGetVersion)
        ry_real.ncclGetVersion(&host.nccl_version);
    return open_engine(&host, &ry_preload_hooks, why, size) == 0;
}

static void open_engine_once(void)
{
    char why[512] = "";
    ry_comms_last = comm_gone;
    ry_group.inside++;
    bool ok = load_engine(why, sizeof why);
    ry_group.inside--;
    if (ok) {
        if (ry_preload_hooks.freeing)
            ry_preload_watch_frees();
        pthread_atfork(NULL, NULL, in_child);
        atexit(at_exit);
        return;
    }
    memset(&ry_preload_hooks, 0, sizeof ry_preload_hooks);
    atomic_store(&ry_preload_state, RY_PASSIVE);
    ry_warn("the engine did not start (%s): the job runs on plain NCCL", why);
}

void ry_preload_open_engine(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_engine_once);
}
