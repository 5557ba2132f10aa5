/* rendezvous.c: see rendezvous.h. */
#include "rendezvous.h"

#include <errno.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"

struct request {
    uint64_t magic, bytes;
    uint32_t round, rank;
};
#define MAGIC UINT64_C(0x73757a6576646e72)

static int number(const char *name, int *out, struct ry_err *err)
{
    const char *s = getenv(name);
    char *end;
    if (!s)
        return ry_fail(err, "%s is not set: start the program with torchrun or `railyard emu`", name);
    errno = 0;
    long v = strtol(s, &end, 10);
    if (errno || end == s || *end || v < 0 || v > INT_MAX)
        return ry_fail(err, "%s is '%s', not a number", name, s);
    *out = (int)v;
    return 0;
}

int ry_ranks_from_env(struct ry_ranks *out, struct ry_err *err)
{
    if (number("RANK", &out->rank, err) || number("WORLD_SIZE", &out->world, err) ||
        number("LOCAL_RANK", &out->local_rank, err) || number("LOCAL_WORLD_SIZE", &out->local_world, err) ||
        number("GROUP_RANK", &out->node, err))
        return -1;
    if (out->rank >= out->world)
        return ry_fail(err, "RANK=%d is not below WORLD_SIZE=%d", out->rank, out->world);
    return 0;
}

static int all(int fd, char *buf, size_t n, int (*step)(int, char *, size_t))
{
    while (n) {
        int k = step(fd, buf, n > 1 << 20 ? 1 << 20 : n);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return -1;
        buf += k;
        n -= (size_t)k;
    }
    return 0;
}
static int put(int fd, char *buf, size_t n)
{
    return (int)send(fd, buf, n, MSG_NOSIGNAL);
}
static int get(int fd, char *buf, size_t n)
{
    return (int)recv(fd, buf, n, 0);
}

static void patience(int fd)
{
    struct timeval t = {5, 0};
    int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static int serve(int fd, const struct ry_ranks *who, uint32_t round, void *data, size_t bytes, uint64_t deadline,
                 struct ry_err *err)
{
    char *served = calloc((size_t)who->world, 1);
    int left = who->world - 1;
    while (served && left) {
        uint64_t now = ry_now_ns();
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (now >= deadline || poll(&p, 1, (int)((deadline - now) / 1000000u) + 1) == 0)
            break;
        int c = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
        if (c < 0)
            continue;
        struct request r;
        patience(c);
        /* one of the next round may be early: it is turned away and comes again */
        if (!all(c, (char *)&r, sizeof r, get) && r.magic == MAGIC && r.round == round && r.bytes == bytes &&
            r.rank < (uint32_t)who->world && !all(c, (char *)&r, sizeof r, put) && !all(c, data, bytes, put) &&
            !served[r.rank]) {
            served[r.rank] = 1;
            left--;
        }
        close(c);
    }
    free(served);
    return left ? ry_fail(err, "rank 0: %d of %d ranks did not come to MASTER_PORT in time", left, who->world) : 0;
}

int ry_rendezvous(const struct ry_ranks *who, void *data, size_t bytes, double timeout_s, struct ry_err *err)
{
    static uint32_t rounds;
    uint32_t round = rounds++;
    uint64_t deadline = ry_now_ns() + (uint64_t)(timeout_s * 1e9);
    const char *host = getenv("MASTER_ADDR"), *port = getenv("MASTER_PORT");
    if (who->world == 1)
        return 0;
    if (!host || !port)
        return ry_fail(err, "%s is not set: start the program with torchrun or `railyard emu`",
                       host ? "MASTER_PORT" : "MASTER_ADDR");
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *to;
    int e = getaddrinfo(host, port, &hints, &to);
    if (e)
        return ry_fail(err, "MASTER_ADDR=%s MASTER_PORT=%s: %s", host, port, gai_strerror(e));
    int rc = -1;
    if (who->rank == 0) {
        int fd = socket(to->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
        if (fd >= 0)
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (fd < 0 || bind(fd, to->ai_addr, to->ai_addrlen) || listen(fd, 1024))
            ry_fail(err, "rank 0 cannot listen at %s:%s: %s", host, port, strerror(errno));
        else
            rc = serve(fd, who, round, data, bytes, deadline, err);
        if (fd >= 0)
            close(fd);
    } else {
        do {
            struct request r = {MAGIC, bytes, round, (uint32_t)who->rank};
            int fd = socket(to->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (fd < 0)
                break;
            patience(fd);
            bool met = !connect(fd, to->ai_addr, to->ai_addrlen) && !all(fd, (char *)&r, sizeof r, put) &&
                       !all(fd, (char *)&r, sizeof r, get) && r.magic == MAGIC && !all(fd, data, bytes, get);
            close(fd);
            rc = met ? 0 : -1;
            if (!met)
                usleep(20000);
        } while (rc && ry_now_ns() < deadline);
        if (rc)
            ry_fail(err, "rank %d: rank 0 did not answer at %s:%s within %g s", who->rank, host, port, timeout_s);
    }
    freeaddrinfo(to);
    return rc;
}

void ry_rendezvous_beside_torchrun(void)
{
    const char *agent = getenv("TORCHELASTIC_USE_AGENT_STORE"), *port = getenv("MASTER_PORT");
    char next[16];
    if (!agent || strcmp(agent, "True") || !port)
        return;
    snprintf(next, sizeof next, "%d", atoi(port) % 65535 + 1);
    setenv("MASTER_PORT", next, 1);
}
