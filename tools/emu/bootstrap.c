/*
 * bootstrap.c: how ranks that share nothing but a unique id first meet.
 *
 * Owns: the id and one round of "everybody's record to everybody". The process that makes an id serves it from a thread
 * of its own, over TCP on the address that NCCL_SOCKET_IFNAME names, or loopback. As in NCCL's own handle, the id
 * begins with a random number and the listener's socket address at byte 8; bytes 64 to 127 are zero and never looked at
 * here.
 *
 * Nothing waits for ever: a rank that connects and dies, or does not come within RYEMU_TIMEOUT seconds (120) of the
 * first, fails the meeting for all, and the text says which.
 */
#include "emu.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"

#define VERSION 1
#define MAX_RECORD 8192u
#define MAX_RANKS 65536u
#define LINGER_NS 10000000000u

struct handle {
    uint64_t magic;
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } address;
};
_Static_assert(sizeof(struct handle) <= 64, "the tail of the id is not ours");
_Static_assert(offsetof(struct handle, address) == 8, "where NCCL has it");

struct hello {
    uint64_t magic;
    uint32_t version, nranks, rank, bytes;
};

struct answer {
    uint32_t failed, bytes; /* failed: a ncclResult_t, and the bytes are its text */
};

static double timeout_s(void)
{
    const char *s = getenv("RYEMU_TIMEOUT");
    double v = s ? atof(s) : 0;
    return v > 0 ? v : 120;
}

uint64_t ry_emu_bootstrap_uid(const ncclUniqueId *id)
{
    struct handle h;
    memcpy(&h, id, sizeof h);
    return h.magic;
}

/* ---- sockets ---- */

static bool wanted(const char *name, const char *spec)
{
    bool except = *spec == '^', exact;
    spec += except;
    exact = *spec == '=';
    spec += exact;
    bool hit = false;
    while (*spec && !hit) {
        size_t n = strcspn(spec, ",");
        hit = n && (exact ? strlen(name) == n && !strncmp(name, spec, n) : !strncmp(name, spec, n));
        spec += n + (spec[n] == ',');
    }
    return hit != except;
}

static bool own_address(struct handle *h, char *why, size_t n)
{
    const char *spec = getenv("NCCL_SOCKET_IFNAME");
    struct ifaddrs *list = NULL;
    if (!spec || !*spec) {
        h->address.v4 = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        return true;
    }
    if (getifaddrs(&list)) {
        snprintf(why, n, "getifaddrs: %m");
        return false;
    }
    bool found = false;
    for (int family = AF_INET; !found; family = AF_INET6) {
        for (struct ifaddrs *i = list; i && !found; i = i->ifa_next) {
            if (!i->ifa_addr || i->ifa_addr->sa_family != family || !(i->ifa_flags & IFF_UP) ||
                !wanted(i->ifa_name, spec))
                continue;
            if (*spec == '^' && i->ifa_flags & IFF_LOOPBACK)
                continue;
            memcpy(&h->address, i->ifa_addr, family == AF_INET ? sizeof h->address.v4 : sizeof h->address.v6);
            found = true;
        }
        if (family == AF_INET6)
            break;
    }
    freeifaddrs(list);
    if (!found)
        snprintf(why, n, "NCCL_SOCKET_IFNAME=%s names no interface that is up and has an address", spec);
    return found;
}

static socklen_t address_bytes(const struct handle *h)
{
    return h->address.any.sa_family == AF_INET6 ? sizeof h->address.v6 : sizeof h->address.v4;
}

static bool write_all(int fd, const void *buf, size_t n)
{
    while (n) {
        ssize_t k = send(fd, buf, n, MSG_NOSIGNAL);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        buf = (const char *)buf + k;
        n -= (size_t)k;
    }
    return true;
}

static bool read_all(int fd, void *buf, size_t n)
{
    while (n) {
        ssize_t k = recv(fd, buf, n, 0);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        buf = (char *)buf + k;
        n -= (size_t)k;
    }
    return true;
}

/* ---- the serving side ---- */

struct root {
    int fd;
    uint64_t magic;
};

struct guest {
    int fd; /* -1: not here */
    uint32_t bytes;
    char *record;
};

struct meeting {
    struct guest *guests;
    uint32_t nranks, here;
    ncclResult_t failed;
    char why[256];
};

/* Who has gone by now need not know. */
static void answer(int fd, const struct answer *a, const char *bytes)
{
    if (write_all(fd, a, sizeof *a))
        write_all(fd, bytes, a->bytes);
}

static void admit(struct meeting *m, const struct root *root, int fd)
{
    struct timeval patience = {5, 0};
    struct hello h;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (!read_all(fd, &h, sizeof h) || h.magic != root->magic || h.version != VERSION || !h.nranks ||
        h.nranks > MAX_RANKS || h.rank >= h.nranks || h.bytes > MAX_RECORD) {
        close(fd); /* none of ours */
        return;
    }
    char *record = malloc(h.bytes + 1);
    if (!record || !read_all(fd, record, h.bytes)) {
        snprintf(m->why, sizeof m->why, "rank %u was lost while the ranks met", h.rank);
        m->failed = ncclRemoteError;
        free(record);
        close(fd);
        return;
    }
    if (!m->guests) {
        m->nranks = h.nranks;
        m->guests = calloc(h.nranks, sizeof *m->guests);
        if (!m->guests)
            abort();
        for (uint32_t i = 0; i < h.nranks; i++)
            m->guests[i].fd = -1;
    }
    const char *wrong = h.nranks != m->nranks       ? "says there are another number of ranks than the first to come"
                        : m->guests[h.rank].fd >= 0 ? "came twice"
                                                    : NULL;
    if (wrong) {
        snprintf(m->why, sizeof m->why, "rank %u of %u %s (%u)", h.rank, h.nranks, wrong, m->nranks);
        m->failed = ncclInvalidArgument;
        struct answer a = {ncclInvalidArgument, (uint32_t)strlen(m->why)};
        answer(fd, &a, m->why);
        free(record);
        close(fd);
        return;
    }
    m->guests[h.rank] = (struct guest){fd, h.bytes, record};
    m->here++;
}

static void watch(struct meeting *m, const struct root *root, uint64_t deadline)
{
    struct pollfd *p = calloc(m->nranks + 1, sizeof *p);
    if (!p)
        abort();
    p[0] = (struct pollfd){.fd = root->fd, .events = POLLIN};
    for (uint32_t i = 0; i < m->nranks; i++)
        p[i + 1] = (struct pollfd){.fd = m->guests[i].fd, .events = POLLIN | POLLRDHUP};
    uint64_t now = ry_now_ns();
    int ms = !deadline ? -1 : deadline <= now ? 0 : (int)((deadline - now) / 1000000u) + 1;
    int n = poll(p, m->nranks + 1, ms);
    for (uint32_t i = 0; n > 0 && i < m->nranks; i++)
        if (p[i + 1].revents && m->failed == ncclSuccess) {
            m->failed = ncclRemoteError;
            snprintf(m->why, sizeof m->why, "rank %u ended while the ranks met", i);
        }
    if (n == 0) {
        int at = snprintf(m->why, sizeof m->why, "after %g s only %u of %u ranks have come; missing:", timeout_s(),
                          m->here, m->nranks);
        for (uint32_t i = 0; i < m->nranks && at < (int)sizeof m->why - 16; i++)
            if (m->guests[i].fd < 0)
                at += snprintf(m->why + at, sizeof m->why - (size_t)at, " %u", i);
        m->failed = ncclRemoteError;
    }
    if (n > 0 && p[0].revents && m->failed == ncclSuccess) {
        int fd = accept4(root->fd, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0)
            admit(m, root, fd);
    }
    free(p);
}

/* After a failed meeting: who comes late is told why, for a while, rather than finding nobody. */
static void turn_away(const struct root *root, const struct answer *a, const char *why)
{
    uint64_t until = ry_now_ns() + LINGER_NS, now;
    while ((now = ry_now_ns()) < until) {
        struct pollfd p = {.fd = root->fd, .events = POLLIN};
        struct timeval patience = {1, 0};
        struct hello h;
        if (poll(&p, 1, (int)((until - now) / 1000000u) + 1) <= 0)
            continue;
        int fd = accept4(root->fd, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        char record[MAX_RECORD];
        bool ours = read_all(fd, &h, sizeof h) && h.magic == root->magic && h.bytes <= sizeof record &&
                    read_all(fd, record, h.bytes); /* unread bytes would reset the connection and lose the answer */
        if (ours)
            answer(fd, a, why);
        close(fd);
    }
}

static void *serve(void *arg)
{
    struct root root = *(struct root *)arg;
    free(arg);
    struct meeting m = {0};
    uint64_t deadline = 0;
    while (m.failed == ncclSuccess && (!m.guests || m.here < m.nranks)) {
        watch(&m, &root, deadline);
        if (m.here && !deadline)
            deadline = ry_now_ns() + (uint64_t)(timeout_s() * 1e9);
    }
    size_t bytes = 0;
    for (uint32_t i = 0; i < m.nranks; i++)
        bytes += (4 + m.guests[i].bytes + 7) / 8 * 8;
    char *all = calloc(1, bytes + 1);
    if (!all)
        abort();
    size_t at = 0;
    for (uint32_t i = 0; m.failed == ncclSuccess && i < m.nranks; i++) {
        memcpy(all + at, &m.guests[i].bytes, 4);
        memcpy(all + at + 4, m.guests[i].record, m.guests[i].bytes);
        at += (4 + m.guests[i].bytes + 7) / 8 * 8;
    }
    struct answer a = {m.failed, (uint32_t)(m.failed == ncclSuccess ? bytes : strlen(m.why))};
    for (uint32_t i = 0; i < m.nranks; i++) {
        if (m.guests[i].fd >= 0) {
            answer(m.guests[i].fd, &a, a.failed ? m.why : all);
            close(m.guests[i].fd);
        }
        free(m.guests[i].record);
    }
    free(m.guests);
    free(all);
    if (a.failed)
        turn_away(&root, &a, m.why);
    close(root.fd);
    return NULL;
}

ncclResult_t ry_emu_bootstrap_id(ncclUniqueId *id)
{
    struct handle h = {0};
    char why[256] = "";
    if (ry_emu_nccl_version >= 22300) /* as the real one: it clears what it does not need since 2.23 */
        memset(id, 0, sizeof *id);
    while (!h.magic)
        if (getrandom(&h.magic, sizeof h.magic, 0) < 0 && errno != EINTR)
            return ry_emu_error(ncclSystemError, "getrandom: %m");
    if (!own_address(&h, why, sizeof why))
        return ry_emu_error(ncclInvalidUsage, "%s", why);
    struct root *root = malloc(sizeof *root);
    socklen_t n = address_bytes(&h);
    int fd = socket(h.address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!root || fd < 0 || bind(fd, &h.address.any, n) || listen(fd, 1024) || getsockname(fd, &h.address.any, &n)) {
        ry_emu_error(ncclSystemError, "cannot listen for the other ranks: %m");
        free(root);
        if (fd >= 0)
            close(fd);
        return ncclSystemError;
    }
    *root = (struct root){fd, h.magic};
    pthread_t t;
    int err = pthread_create(&t, NULL, serve, root);
    if (err) {
        free(root);
        close(fd);
        return ry_emu_error(ncclSystemError, "cannot start the thread that serves a unique id: %s", strerror(err));
    }
    pthread_detach(t);
    memcpy(id, &h, sizeof h);
    return ncclSuccess;
}

/* ---- the coming side ---- */

/* Wait for `events`, looking at the abort flag ten times a second. 1 ready, 0 out of time, -1 aborted. */
static int wait_for(int fd, short events, uint64_t deadline, const atomic_bool *aborted)
{
    for (;;) {
        struct pollfd p = {.fd = fd, .events = events};
        if (atomic_load(aborted))
            return -1;
        if (poll(&p, 1, 100) > 0)
            return 1;
        if (ry_now_ns() > deadline)
            return 0;
    }
}

static int reach(const struct handle *h, uint64_t deadline, const atomic_bool *aborted)
{
    for (;;) {
        int fd = socket(h->address.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
        if (fd < 0)
            return -1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (connect(fd, &h->address.any, address_bytes(h)) == 0)
            return fd;
        int err = errno;
        close(fd);
        errno = err;
        if (atomic_load(aborted) || ry_now_ns() > deadline)
            return -1;
        usleep(50000);
    }
}

static bool read_some(int fd, char *buf, size_t n, uint64_t deadline, const atomic_bool *aborted, const char **why)
{
    while (n) {
        int w = wait_for(fd, POLLIN, deadline, aborted);
        ssize_t k = w > 0 ? recv(fd, buf, n, 0) : 0;
        if (w <= 0 || k <= 0) {
            *why = w < 0    ? "the communicator was aborted"
                   : w == 0 ? "no answer in time"
                            : "the process that made the unique id is gone";
            return false;
        }
        buf += k;
        n -= (size_t)k;
    }
    return true;
}

ncclResult_t ry_emu_bootstrap_swap(const ncclUniqueId *id, int rank, int nranks, const void *mine, uint32_t bytes,
                                   const atomic_bool *aborted, char **all)
{
    struct handle h;
    memcpy(&h, id, sizeof h);
    *all = NULL;
    if (h.address.any.sa_family != AF_INET && h.address.any.sa_family != AF_INET6)
        return ry_emu_error(ncclInvalidArgument, "this is no unique id of ncclGetUniqueId");
    int fd = reach(&h, ry_now_ns() + 1000000000u, aborted);
    if (fd < 0)
        return ry_emu_error(ncclSystemError, "rank %d cannot reach the process that made the unique id: %m", rank);
    struct hello hello = {h.magic, VERSION, (uint32_t)nranks, (uint32_t)rank, bytes};
    struct answer a;
    const char *why = "the process that made the unique id is gone";
    uint64_t deadline = ry_now_ns() + (uint64_t)((timeout_s() + 10) * 1e9);
    char *buf = NULL;
    bool ok = write_all(fd, &hello, sizeof hello) && write_all(fd, mine, bytes) &&
              read_some(fd, (char *)&a, sizeof a, deadline, aborted, &why) && (buf = malloc((size_t)a.bytes + 1)) &&
              read_some(fd, buf, a.bytes, deadline, aborted, &why);
    close(fd);
    if (!ok) {
        free(buf);
        return ry_emu_error(atomic_load(aborted) ? ncclInternalError : ncclRemoteError, "rank %d of %d: %s", rank,
                            nranks, why);
    }
    buf[a.bytes] = 0;
    if (a.failed) {
        ncclResult_t r = ry_emu_error((ncclResult_t)a.failed, "rank %d of %d: %s", rank, nranks, buf);
        free(buf);
        return r;
    }
    *all = buf;
    return ncclSuccess;
}
