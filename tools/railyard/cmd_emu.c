/*
 * cmd_emu.c: `railyard emu`: starts a program's ranks on the emulated cluster and ends all of them together.
 *
 * Owns: the ranks' environment (torchrun's variables, NCCL_HOSTID, where libnccl.so.2 is found, UCX's defaults), the
 * segment of the virtual links, and the ranks' lives. Not: how the links are shaped (tools/emu/links.h).
 *
 * Nothing is left behind whatever happens: the segment is a memfd that ranks open through /proc, and the kernel ends
 * the ranks when the launcher is killed.
 */
#include <argp.h>
#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../emu/links.h"
#include "base/clock.h"
#include "command.h"
#include "where.h"

#define GRACE_NS 3000000000u /* between SIGTERM and SIGKILL */

static struct {
    int nodes, gpus;
    double nic_gbit, nic_us, nvlink_gbit, nvlink_us;
    bool preload, old;
    char **program;
} opt;

enum { OPT_NIC = 256, OPT_NIC_US, OPT_NVLINK, OPT_NVLINK_US, OPT_PRELOAD, OPT_OLD };

static const struct argp_option options[] = {
    {"nodes", 'n', "N", 0, "Virtual nodes (1)", 0},
    {"gpus", 'g', "N", 0, "Ranks on each node (1)", 0},
    {"nic", OPT_NIC, "GBIT", 0, "Bandwidth of each node's NIC, shared by its ranks, each way, in Gbit/s (not limited)",
     0},
    {"nic-us", OPT_NIC_US, "US", 0, "Latency between nodes in microseconds (0)", 0},
    {"nvlink", OPT_NVLINK, "GBIT", 0, "Bandwidth of each rank inside its node, each way, in Gbit/s (not limited)", 0},
    {"nvlink-us", OPT_NVLINK_US, "US", 0, "Latency inside a node in microseconds (0)", 0},
    {"preload", OPT_PRELOAD, 0, 0, "Preload librailyard.so into the ranks", 0},
    {"old", OPT_OLD, 0, 0, "Offer only what NCCL 2.18 did: no ncclAlltoAll, ncclCommShrink and the like", 0},
    {0}};

static int number(struct argp_state *state, const char *arg, const char *what)
{
    char *end;
    errno = 0;
    long v = strtol(arg, &end, 10);
    if (errno || end == arg || *end || v < 1 || v > 4096)
        argp_error(state, "%s must be a number from 1 to 4096, but is '%s'", what, arg);
    return (int)v;
}

static double quantity(struct argp_state *state, const char *arg, const char *what)
{
    char *end;
    double v = strtod(arg, &end);
    if (end == arg || *end || !isfinite(v) || v < 0 || v > 1e6)
        argp_error(state, "%s must be a number from 0 (not limited) to 1000000, but is '%s'", what, arg);
    return v;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    switch (key) {
    case 'n':
        opt.nodes = number(state, arg, "--nodes");
        return 0;
    case 'g':
        opt.gpus = number(state, arg, "--gpus");
        return 0;
    case OPT_NIC:
        opt.nic_gbit = quantity(state, arg, "--nic");
        return 0;
    case OPT_NIC_US:
        opt.nic_us = quantity(state, arg, "--nic-us");
        return 0;
    case OPT_NVLINK:
        opt.nvlink_gbit = quantity(state, arg, "--nvlink");
        return 0;
    case OPT_NVLINK_US:
        opt.nvlink_us = quantity(state, arg, "--nvlink-us");
        return 0;
    case OPT_PRELOAD:
        opt.preload = true;
        return 0;
    case OPT_OLD:
        opt.old = true;
        return 0;
    case ARGP_KEY_ARGS:
        opt.program = state->argv + state->next;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "which program? Write it after --");
    }
    return key == ARGP_KEY_NO_ARGS ? EINVAL : ARGP_ERR_UNKNOWN;
}

/* ---- the ranks' environment ---- */

static void set(const char *name, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void set(const char *name, const char *fmt, ...)
{
    char *value;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&value, fmt, ap) < 0)
        abort();
    va_end(ap);
    setenv(name, value, 1);
    free(value);
}

/* NAME=first, or first:old in front of what it was. */
static void prepend(const char *name, const char *first)
{
    const char *old = getenv(name);
    set(name, "%s%s%s", first, old && *old ? ":" : "", old ? old : "");
}

/* A port that nothing listens on, below the range that outgoing connections take theirs from. */
static int free_port(void)
{
    for (int tries = 0; tries < 1000; tries++) {
        uint16_t r = 0;
        if (getrandom(&r, sizeof r, 0) != sizeof r)
            return -1;
        struct sockaddr_in a = {.sin_family = AF_INET,
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                .sin_port = htons((uint16_t)(20000 + r % 12000))};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        int bad = fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a);
        if (fd >= 0)
            close(fd);
        if (!bad)
            return ntohs(a.sin_port);
    }
    return -1;
}

static int make_links(struct ry_err *err)
{
    int fd = memfd_create("railyard-links", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, sizeof(struct ry_emu_links)))
        return ry_fail(err, "cannot make the memory of the virtual links: %s", strerror(errno));
    struct ry_emu_links *seg = mmap(NULL, sizeof *seg, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (seg == MAP_FAILED)
        return ry_fail(err, "cannot map the memory of the virtual links: %s", strerror(errno));
    ry_emu_links_init(seg, opt.nic_gbit, opt.nic_us, opt.nvlink_gbit, opt.nvlink_us);
    munmap(seg, sizeof *seg);
    set(RY_EMU_LINKS_ENV, "/proc/%d/fd/%d", (int)getpid(), fd);
    return 0;
}

static int common_environment(struct ry_err *err)
{
    char path[4096];
    /* What UCX does by default is right for a long job on real NICs; here it would print and catch signals. */
    static const char *const ucx[][2] = {
        {"UCX_TLS", "tcp,self"},          {"UCX_NET_DEVICES", "lo"}, {"UCX_LOG_LEVEL", "fatal"},
        {"UCX_HANDLE_ERRORS", "none"},    {"UCX_MEM_EVENTS", "no"},  {"UCX_WARN_UNUSED_ENV_VARS", "n"},
        {"UCX_KEEPALIVE_INTERVAL", "1s"}, {"UCX_VFS_ENABLE", "n"},
    };
    int port = free_port();
    if (port < 0)
        return ry_fail(err, "no free TCP port for MASTER_PORT on 127.0.0.1");
    for (size_t i = 0; i < sizeof ucx / sizeof *ucx; i++)
        setenv(ucx[i][0], ucx[i][1], 0);
    set("MASTER_ADDR", "127.0.0.1");
    set("MASTER_PORT", "%d", port);
    set("WORLD_SIZE", "%d", opt.nodes * opt.gpus);
    set("LOCAL_WORLD_SIZE", "%d", opt.gpus);
    set("GROUP_WORLD_SIZE", "%d", opt.nodes);
    if (ry_where(RY_WHERE_EMU_DIR, path, err))
        return -1;
    if (opt.old)
        strncat(path, "/old", sizeof path - strlen(path) - 1);
    prepend("LD_LIBRARY_PATH", path);
    if (ry_where(RY_WHERE_TOOL_DIR, path, err))
        return -1;
    prepend("PATH", path); /* so that the ranks' `railyard` is this one, in a build folder too */
    if (opt.preload) {
        if (ry_where(RY_WHERE_PRELOAD, path, err))
            return -1;
        const char *old = getenv("LD_PRELOAD"); /* a sanitizer's runtime must stay first */
        set("LD_PRELOAD", "%s%s%s", old ? old : "", old && *old ? ":" : "", path);
    }
    return make_links(err);
}

/* ---- the ranks ---- */

static pid_t start(int rank, const sigset_t *mask, pid_t launcher)
{
    pid_t pid = fork();
    if (pid > 0)
        setpgid(pid, pid); /* also here: a signal may be passed on before the child comes to it */
    if (pid)
        return pid;
    setpgid(0, 0); /* what the rank starts belongs to it and ends with it */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != launcher) /* it died before that took effect */
        _exit(127);
    sigprocmask(SIG_SETMASK, mask, NULL);
    int node = rank / opt.gpus;
    set("RANK", "%d", rank);
    set("LOCAL_RANK", "%d", rank % opt.gpus);
    set("GROUP_RANK", "%d", node);
    set("NODE_RANK", "%d", node);
    set("NCCL_HOSTID", "emu-node%d-%d", node, (int)launcher);
    execvp(opt.program[0], opt.program);
    dprintf(STDERR_FILENO, "railyard emu: cannot run %s: %s\n", opt.program[0], strerror(errno));
    _exit(errno == ENOENT ? 127 : 126);
}

/* To the ranks that still run, and to what they started. */
static void signal_all(const pid_t *pids, int n, int sig)
{
    for (int i = 0; i < n; i++)
        if (pids[i] > 0)
            kill(-pids[i], sig);
}

/* Reap what has ended. Returns how many still run; the first failure goes to *status (0 as long as there is none). */
static int reap(pid_t *pids, int n, int *status, bool ending, const char *argv0)
{
    int running = 0;
    for (int i = 0; i < n; i++) {
        int st;
        if (pids[i] <= 0)
            continue;
        if (waitpid(pids[i], &st, WNOHANG) != pids[i]) {
            running++;
            continue;
        }
        if (ending)
            kill(-pids[i], SIGKILL); /* what it started and left behind */
        pids[i] = 0;
        int code = WIFSIGNALED(st) ? 128 + WTERMSIG(st) : WEXITSTATUS(st);
        if (!code || *status || ending)
            continue;
        *status = code;
        if (WIFSIGNALED(st))
            command_fail(argv0, "rank %d (node %d) was ended by signal %d (%s); ending the others", i, i / opt.gpus,
                         WTERMSIG(st), strsignal(WTERMSIG(st)));
        else
            command_fail(argv0, "rank %d (node %d) failed with status %d; ending the others", i, i / opt.gpus, code);
    }
    return running;
}

static int run_ranks(const char *argv0)
{
    int n = opt.nodes * opt.gpus, status = 0;
    pid_t *pids = calloc((size_t)n, sizeof *pids), self = getpid();
    sigset_t watched, before;
    sigemptyset(&watched);
    sigaddset(&watched, SIGCHLD);
    sigaddset(&watched, SIGINT);
    sigaddset(&watched, SIGTERM);
    sigaddset(&watched, SIGHUP);
    sigprocmask(SIG_BLOCK, &watched, &before);
    int fd = signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK);
    if (!pids || fd < 0)
        return command_fail(argv0, "cannot watch the ranks: %s", strerror(errno));
    bool ending = false;
    uint64_t kill_at = 0;
    for (int r = 0; r < n && !ending; r++) {
        pids[r] = start(r, &before, self);
        if (pids[r] < 0) {
            status = command_fail(argv0, "cannot start rank %d: %s", r, strerror(errno));
            ending = true;
        }
    }
    while (reap(pids, n, &status, ending, argv0)) {
        if (status && !kill_at) {
            ending = true;
            kill_at = ry_now_ns() + GRACE_NS;
            signal_all(pids, n, SIGTERM);
        }
        uint64_t now = ry_now_ns();
        if (kill_at && now >= kill_at) {
            signal_all(pids, n, SIGKILL);
            kill_at = now + GRACE_NS;
        }
        struct pollfd p = {.fd = fd, .events = POLLIN};
        poll(&p, 1, kill_at ? (int)((kill_at - now) / 1000000u) + 1 : -1);
        struct signalfd_siginfo s;
        while (read(fd, &s, sizeof s) == sizeof s) {
            if (s.ssi_signo == SIGCHLD)
                continue;
            /* passed on; who has not ended by then is killed */
            signal_all(pids, n, (int)s.ssi_signo);
            if (!status)
                status = 128 + (int)s.ssi_signo;
            ending = true;
            if (!kill_at)
                kill_at = ry_now_ns() + GRACE_NS;
        }
    }
    close(fd);
    free(pids);
    return status;
}

int cmd_emu(int argc, char **argv)
{
    static const struct argp argp = {
        options,
        parse,
        "-- PROGRAM [ARG...]",
        "Run PROGRAM on an emulated cluster: one process per rank, with torchrun's environment variables, and a "
        "libnccl.so.2 that works on host memory.\v"
        "The ranks' NCCL calls must be given host pointers. When one rank fails, all are ended, and the status is the "
        "failed rank's (128 + the signal that ended it).",
        0,
        0,
        0};
    opt.nodes = opt.gpus = 1;
    if (argp_parse(&argp, argc, argv, ARGP_IN_ORDER, 0, 0))
        return 2;
    struct ry_err err;
    if (opt.nodes * opt.gpus > RY_EMU_MAX_GPUS || opt.nodes > RY_EMU_MAX_NODES)
        return command_fail(argv[0], "%d nodes with %d ranks each are too many: at most %d nodes and %d ranks",
                            opt.nodes, opt.gpus, RY_EMU_MAX_NODES, RY_EMU_MAX_GPUS);
    if (common_environment(&err))
        return command_fail(argv[0], "%s", err.msg);
    return run_ranks(argv[0]);
}
