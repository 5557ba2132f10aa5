/*
 * tame.c: see tame.h.
 */
#include "control/tame.h"

#include <dirent.h>
#include <dlfcn.h>
#include <ifaddrs.h>
#include <link.h>
#include <net/if.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucs/debug/debug.h>
#include <ucs/debug/log_def.h>

#include "base/log.h"
#include "control/watch.h"

/* Not in every release's public headers; done without where they are missing. */
extern __typeof__(ucs_debug_disable_signal) ucs_debug_disable_signal __attribute__((weak));
extern __typeof__(ucs_log_push_handler) ucs_log_push_handler __attribute__((weak));

static bool inside(const struct dl_phdr_info *info, const void *at)
{
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        uintptr_t base = info->dlpi_addr + p->p_vaddr;
        if (p->p_type == PT_LOAD && (uintptr_t)at >= base && (uintptr_t)at - base < p->p_memsz)
            return true;
    }
    return false;
}

struct order {
    const void *ucs;
    int seen; /* 1: us, 2: UCX, whichever comes first */
};

static int who_is_first(struct dl_phdr_info *info, size_t size, void *arg)
{
    struct order *o = arg;
    o->seen = inside(info, (void *)ry_tame_ucx) ? 1 : inside(info, o->ucs) ? 2 : 0;
    return o->seen;
}

/* Objects are listed in the order in which they were loaded: what comes after us was loaded for us. */
static bool ucx_came_with_us(void)
{
    struct order o = {.ucs = (void *)ucs_status_string};
    dl_iterate_phdr(who_is_first, &o);
    return o.seen == 1;
}

static ucs_log_func_rc_t to_our_log(const char *file, unsigned line, const char *function, ucs_log_level_t level,
                                    const ucs_log_component_config_t *component, const char *message, va_list ap)
{
    char text[400];
    if (level <= UCS_LOG_LEVEL_WARN || ry_log_enabled(RY_LOG_DEBUG)) {
        vsnprintf(text, sizeof text, message, ap);
        ry_log(level == UCS_LOG_LEVEL_FATAL ? RY_LOG_ERROR : RY_LOG_DEBUG, "UCX: %s", text);
    }
    return UCS_LOG_FUNC_RC_STOP;
}

static void return_signals(void)
{
    Dl_info ucs, at;
    if (!ucs_debug_disable_signal || !dladdr((void *)ucs_status_string, &ucs))
        return;
    for (int s = 1; s < NSIG; s++) {
        struct sigaction now;
        if (!sigaction(s, NULL, &now) && now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN &&
            dladdr((void *)now.sa_sigaction, &at) && at.dli_fbase == ucs.dli_fbase)
            ucs_debug_disable_signal(s);
    }
}

static void tame_library(void)
{
    if (!ucx_came_with_us())
        return;
    if (!getenv("UCX_HANDLE_ERRORS"))
        return_signals();
    if (ucs_log_push_handler && !getenv("UCX_LOG_LEVEL"))
        ucs_log_push_handler(to_our_log);
}

static void add(char *list, size_t size, const char *name, const char *port)
{
    size_t used = strlen(list);
    snprintf(list + used, size - used, "%s%s%s%s", used ? "," : "", name, port ? ":" : "", port ? port : "");
}

/* Interfaces that NCCL would use and loopback (UCX takes it within a host only); all ports of RDMA devices. Only what
   is there: UCX warns of others. Returns whether there is RDMA. */
static bool list_devices(char *list, size_t size)
{
    struct ifaddrs *all = NULL;
    bool rdma = false;
    *list = '\0';
    if (getifaddrs(&all))
        all = NULL;
    for (const struct ifaddrs *i = all; i; i = i->ifa_next) {
        unsigned need = IFF_UP | IFF_RUNNING;
        bool before = false;
        if (!i->ifa_addr || (i->ifa_addr->sa_family != AF_INET && i->ifa_addr->sa_family != AF_INET6) ||
            (i->ifa_flags & need) != need || (!(i->ifa_flags & IFF_LOOPBACK) && !ry_watch_wants(i->ifa_name)))
            continue;
        for (const struct ifaddrs *j = all; j != i; j = j->ifa_next)
            before |= !strcmp(j->ifa_name, i->ifa_name) && j->ifa_addr &&
                      (j->ifa_addr->sa_family == AF_INET || j->ifa_addr->sa_family == AF_INET6);
        if (!before)
            add(list, size, i->ifa_name, NULL);
    }
    freeifaddrs(all);
    DIR *devices = opendir("/sys/class/infiniband");
    for (struct dirent *d; devices && (d = readdir(devices));) {
        char path[512];
        snprintf(path, sizeof path, "/sys/class/infiniband/%s/ports", d->d_name);
        DIR *ports = *d->d_name == '.' ? NULL : opendir(path);
        for (struct dirent *p; ports && (p = readdir(ports));) {
            if (*p->d_name == '.')
                continue;
            add(list, size, d->d_name, p->d_name);
            rdma = true;
        }
        if (ports)
            closedir(ports);
    }
    if (devices)
        closedir(devices);
    return rdma;
}

/* Transports' own settings are known here by the name within their table, to the user by the variable's. */
static void prefer(ucp_config_t *config, const char *variable, const char *name, const char *value)
{
    if (!getenv(variable))
        ucp_config_modify(config, name, value);
}

void ry_tame_ucx(ucp_config_t *config)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    char devices[2048];
    pthread_once(&once, tame_library);
    bool rdma = list_devices(devices, sizeof devices);
    /* Nothing of CUDA or ROCm: messages are in host memory. No shared memory: its wake-ups are datagrams between abstract UNIX
       sockets, which do not pass from one network namespace to another (containers of one host), while UCX takes such processes
       for neighbours; a sleeping one would never hear of a message. Agreeing waits for other nodes anyway. */
    prefer(config, "UCX_TLS", "TLS", rdma ? "self,tcp,ib" : "self,tcp");
    if (*devices)
        prefer(config, "UCX_NET_DEVICES", "NET_DEVICES", devices);
    /* Without this shared memory is not used where errors are to be handled. That UCX is slow to notice a death there
       is what the watch is for; for the same reason there is no keepalive, which would wake every process now and then.
     */
    prefer(config, "UCX_POSIX_ERROR_HANDLING", "MM_ERROR_HANDLING", "y");
    prefer(config, "UCX_KEEPALIVE_INTERVAL", "KEEPALIVE_INTERVAL", "inf");
    /* No cache of registered memory, so no hooks in malloc and munmap: our messages are small and are copied. */
    if (rdma)
        prefer(config, "UCX_IB_REG_METHODS", "REG_METHODS", "direct");
    prefer(config, "UCX_MAX_EAGER_LANES", "MAX_EAGER_LANES",
           "1"); /* or fragments of one message could overtake another */
}

int ry_own_ucx_open(struct ry_own_ucx *u, const char *name, uint64_t features, const char *use,
                void (*more)(ucp_config_t *config, void *arg), void *arg, struct ry_err *err)
{
    ucp_config_t *config;
    const char *what = "ucp_config_read";
    *u = (struct ry_own_ucx){.efd = -1};
    ucs_status_t st = ucp_config_read(NULL, NULL, &config);
    if (st != UCS_OK)
        goto fail;
    ry_tame_ucx(config);
    if (more)
        more(config, arg);
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME,
                           .features = features | UCP_FEATURE_WAKEUP,
                           .name = name};
    what = "ucp_init";
    st = ucp_init(&params, config, &u->context);
    ucp_config_release(config);
    if (st != UCS_OK)
        goto fail;
    ucp_worker_params_t wp = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                              .thread_mode = UCS_THREAD_MODE_SERIALIZED};
    what = "ucp_worker_create";
    if ((st = ucp_worker_create(u->context, &wp, &u->worker)) != UCS_OK)
        goto fail;
    what = "ucp_worker_get_efd";
    if ((st = ucp_worker_get_efd(u->worker, &u->efd)) != UCS_OK)
        goto fail;
    what = "ucp_worker_get_address";
    if ((st = ucp_worker_get_address(u->worker, &u->address, &u->address_size)) != UCS_OK)
        goto fail;
    return 0;
fail:
    return ry_fail(err, "UCX cannot be used%s (%s: %s): see UCX_TLS and UCX_NET_DEVICES, or RAILYARD_LOG=debug", use, what,
                   ucs_status_string(st));
}
