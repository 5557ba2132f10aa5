/*
 * watch.c: see watch.h.
 *
 * Both kinds of tie, made by us and made to us, go through the same few states. Descriptors are known to a table of the
 * whole process, so that fork() can close them in the child.
 */
#include "control/watch.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"

#define MAX_CARD (16u << 10)
#define MAX_PLACES 16
#define ATTEMPT_NS 1000000000ull /* one place of several: then the next is tried */
#define HELLO_NS 10000000000ull  /* whoever has not said hello by then is not one of us */
#define DEAF_NS 200000000ull     /* no descriptor to be had: look again then */

struct place {
    uint8_t family; /* 4 or 6 */
    uint8_t spare[3];
    uint32_t scope;
    uint8_t bytes[16];
};
struct address {
    char magic[8];
    uint64_t uid, host; /* host: equal where 127.0.0.1 is the same place */
    uint8_t cookie[16];
    uint16_t port; /* network order */
    uint16_t places;
    uint32_t spare;
    struct place place[MAX_PLACES];
};
_Static_assert(sizeof(struct address) <= RY_WATCH_ADDRESS_MAX, "address too large");
#define ADDRESS_BYTES(n) (offsetof(struct address, place) + (n) * sizeof(struct place))

struct hello {
    uint8_t cookie[16];
    uint64_t uid;
    uint32_t number, card_size;
};
struct answer {
    uint64_t uid;
    uint32_t number, full; /* full: no room for one more */
};

enum state { CONNECTING, AWAITING, HEARING, TIED };
struct ry_tie {
    struct ry_tie *next, **prev;
    int fd; /* -1: waits to be connected anew */
    enum state state;
    bool dead; /* freed after the events of this round */
    uint32_t mine;
    uint64_t deadline;
    struct address to; /* of those made by us */
    unsigned at;       /* the place that is being tried */
    union {
        struct hello hello;
        struct answer answer;
    } in;
    char *card;
    size_t got;
};

struct ry_watch {
    struct ry_watch_hooks hooks;
    int epoll, listener;
    struct address self;
    const void *card;
    size_t card_size;
    struct ry_tie *ties, *dead;
    size_t n, timed; /* ties; those with a deadline */
    uint64_t deaf_until;
    bool deaf;
};

/* ---- fork: a child must not keep a connection alive that tells whether its parent lives ---- */

static struct {
    pthread_mutex_t lock;
    pthread_once_t once;
    int *fds;
    size_t n, capacity;
} held = {.lock = PTHREAD_MUTEX_INITIALIZER, .once = PTHREAD_ONCE_INIT};

static void before_fork(void)
{
    pthread_mutex_lock(&held.lock);
}

static void in_parent(void)
{
    pthread_mutex_unlock(&held.lock);
}

static void in_child(void)
{
    for (size_t i = 0; i < held.n; i++)
        close(held.fds[i]);
    held.n = 0;
    pthread_mutex_unlock(&held.lock);
}

static void watch_forks(void)
{
    pthread_atfork(before_fork, in_parent, in_child);
}

/* The number of a new descriptor is noted under the lock under which it came to be, or a fork could slip in between. */
static int hold(int fd)
{
    if (fd < 0)
        return fd;
    if (held.n == held.capacity) {
        int *more = realloc(held.fds, (held.capacity + 32) * 2 * sizeof *more);
        if (!more) {
            close(fd);
            errno = ENOMEM;
            return -1;
        }
        held.fds = more;
        held.capacity = (held.capacity + 32) * 2;
    }
    return held.fds[held.n++] = fd;
}

static int held_socket(int family)
{
    pthread_mutex_lock(&held.lock);
    int fd = hold(socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    pthread_mutex_unlock(&held.lock);
    return fd;
}

static int held_accept(int listener)
{
    pthread_mutex_lock(&held.lock);
    int fd = hold(accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC));
    pthread_mutex_unlock(&held.lock);
    return fd;
}

static void held_close(int fd)
{
    pthread_mutex_lock(&held.lock);
    for (size_t i = 0; i < held.n; i++) {
        if (held.fds[i] == fd) {
            held.fds[i] = held.fds[--held.n];
            break;
        }
    }
    close(fd);
    pthread_mutex_unlock(&held.lock);
}

/* ---- where we are ---- */

bool ry_watch_wants(const char *interface)
{
    const char *spec = getenv("NCCL_SOCKET_IFNAME");
    if (!spec || !*spec)
        spec = "^docker,virbr,veth,br-,cni,flannel,podman";
    bool except = *spec == '^', exact, hit = false;
    spec += except;
    exact = *spec == '=';
    spec += exact;
    while (*spec && !hit) {
        size_t n = strcspn(spec, ",");
        hit = n && !strncmp(interface, spec, n) && (!exact || strlen(interface) == n);
        spec += n + (spec[n] == ',');
    }
    return hit != except;
}

static void find_places(struct address *a)
{
    struct ifaddrs *list = NULL;
    if (getifaddrs(&list))
        return;
    for (int family = AF_INET; family; family = family == AF_INET ? AF_INET6 : 0) {
        for (const struct ifaddrs *i = list; i && a->places < MAX_PLACES; i = i->ifa_next) {
            unsigned need = IFF_UP | IFF_RUNNING;
            if (!i->ifa_addr || i->ifa_addr->sa_family != family || (i->ifa_flags & need) != need ||
                i->ifa_flags & IFF_LOOPBACK || !ry_watch_wants(i->ifa_name))
                continue;
            struct place *p = &a->place[a->places];
            if (family == AF_INET) {
                p->family = 4;
                memcpy(p->bytes, &((struct sockaddr_in *)i->ifa_addr)->sin_addr, 4);
            } else {
                const struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)i->ifa_addr;
                if (IN6_IS_ADDR_LINKLOCAL(&in6->sin6_addr))
                    continue; /* its scope would mean nothing elsewhere */
                p->family = 6;
                memcpy(p->bytes, &in6->sin6_addr, 16);
            }
            a->places++;
        }
    }
    freeifaddrs(list);
}

/* One kernel and one network namespace: 127.0.0.1 is the same place for all who have this number. */
static uint64_t host_number(void)
{
    char id[64] = "";
    struct stat ns = {0};
    uint64_t hash = 1469598103934665603u;
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, id, sizeof id - 1) <= 0 || stat("/proc/self/ns/net", &ns))
        getrandom(&hash, sizeof hash, 0); /* nobody's: the other addresses must do */
    if (fd >= 0)
        close(fd);
    for (const char *c = id; *c; c++)
        hash = (hash ^ (uint8_t)*c) * 1099511628211u;
    return (hash ^ ns.st_ino) * 1099511628211u;
}

size_t ry_watch_address(const struct ry_watch *w, void *into)
{
    size_t size = ADDRESS_BYTES(w->self.places);
    memcpy(into, &w->self, size);
    return size;
}

static bool address_valid(const void *bytes, size_t size, struct address *a)
{
    if (size < ADDRESS_BYTES(0) || size > sizeof *a)
        return false;
    memset(a, 0, sizeof *a);
    memcpy(a, bytes, size);
    return !memcmp(a->magic, "RYWATCH1", 8) && a->places <= MAX_PLACES && size == ADDRESS_BYTES(a->places) && a->uid &&
           a->port;
}

uint64_t ry_watch_uid(const void *bytes, size_t size)
{
    struct address a;
    return address_valid(bytes, size, &a) ? a.uid : 0;
}

/* ---- ties ---- */

static struct ry_tie *tie_new(struct ry_watch *w, int fd, enum state state)
{
    struct ry_tie *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->fd = fd, t->state = state, t->deadline = UINT64_MAX;
    t->next = w->ties, t->prev = &w->ties;
    if (t->next)
        t->next->prev = &t->next;
    w->ties = t;
    w->n++;
    return t;
}

static void set_deadline(struct ry_watch *w, struct ry_tie *t, uint64_t ns)
{
    w->timed -= t->deadline < UINT64_MAX;
    w->timed += ns < UINT64_MAX;
    t->deadline = ns;
}

static void tie_shut(struct ry_watch *w, struct ry_tie *t)
{
    if (t->fd < 0)
        return;
    epoll_ctl(w->epoll, EPOLL_CTL_DEL, t->fd, NULL); /* closing does not, while a child has a copy */
    held_close(t->fd);
    t->fd = -1;
}

/* Events of this round may still name it: freed at the end of the round. */
void ry_watch_untie(struct ry_watch *w, struct ry_tie *t)
{
    if (t->dead)
        return;
    tie_shut(w, t);
    set_deadline(w, t, UINT64_MAX);
    *t->prev = t->next;
    if (t->next)
        t->next->prev = t->prev;
    w->n--;
    t->dead = true;
    t->next = w->dead;
    w->dead = t;
}

static void bury(struct ry_watch *w)
{
    for (struct ry_tie *t = w->dead, *next; t; t = next) {
        next = t->next;
        free(t->card);
        free(t);
    }
    w->dead = NULL;
}

static void tie_gone(struct ry_watch *w, struct ry_tie *t, const char *why)
{
    bool known = t->state != HEARING; /* strangers come and go */
    uint32_t mine = t->mine;
    ry_watch_untie(w, t);
    if (known)
        w->hooks.gone(w->hooks.context, mine, why);
}

static int mind(struct ry_watch *w, struct ry_tie *t, uint32_t events, int op)
{
    struct epoll_event e = {.events = events, .data.ptr = t};
    return epoll_ctl(w->epoll, op, t->fd, &e);
}

/* What was written in the last few seconds is not what tells life from death on an idle connection. */
static void tune(int fd)
{
    int yes = 1, idle = 15, interval = 5, count = 3; /* a node without power is noticed after half a minute */
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
}

/* Try the next place; false when there is none left. */
static bool try_next(struct ry_watch *w, struct ry_tie *t, uint64_t now)
{
    tie_shut(w, t);
    bool same = t->to.host == w->self.host;
    while (t->at < (same ? 1u : t->to.places)) {
        const struct place *p = &t->to.place[t->at++];
        struct sockaddr_storage at = {0};
        socklen_t len;
        if (same || p->family == 4) {
            struct sockaddr_in *in = (struct sockaddr_in *)&at;
            in->sin_family = AF_INET, in->sin_port = t->to.port, len = sizeof *in;
            if (same)
                in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
            else
                memcpy(&in->sin_addr, p->bytes, 4);
        } else {
            struct sockaddr_in6 *in = (struct sockaddr_in6 *)&at;
            in->sin6_family = AF_INET6, in->sin6_port = t->to.port, len = sizeof *in;
            memcpy(&in->sin6_addr, p->bytes, 16);
        }
        t->fd = held_socket(at.ss_family);
        if (t->fd < 0)
            continue;
        tune(t->fd);
        if ((!connect(t->fd, (struct sockaddr *)&at, len) || errno == EINPROGRESS) &&
            !mind(w, t, EPOLLOUT, EPOLL_CTL_ADD)) {
            t->state = CONNECTING;
            set_deadline(w, t, now + ATTEMPT_NS);
            return true;
        }
        tie_shut(w, t);
    }
    return false;
}

struct ry_tie *ry_watch_tie(struct ry_watch *w, const void *bytes, size_t size, uint32_t mine, struct ry_err *err)
{
    struct address to;
    if (!address_valid(bytes, size, &to)) {
        ry_fail(err, "no address of a yardmaster: do all ranks run the same version of Railyard?");
        return NULL;
    }
    struct ry_tie *t = tie_new(w, -1, CONNECTING);
    if (!t) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    t->to = to;
    t->mine = mine;
    if (!try_next(w, t, ry_now_ns())) {
        ry_fail(err, "cannot connect to the yardmaster's process: %s",
                to.places ? strerror(errno) : "it has no network address");
        ry_watch_untie(w, t);
        bury(w);
        return NULL;
    }
    return t;
}

static void greet(struct ry_watch *w, struct ry_tie *t, uint64_t now)
{
    int e = 0;
    socklen_t len = sizeof e;
    getsockopt(t->fd, SOL_SOCKET, SO_ERROR, &e, &len);
    struct hello h = {.uid = w->self.uid, .number = t->mine, .card_size = (uint32_t)w->card_size};
    memcpy(h.cookie, t->to.cookie, sizeof h.cookie);
    struct iovec parts[] = {{&h, sizeof h}, {(void *)w->card, w->card_size}};
    struct msghdr m = {.msg_iov = parts, .msg_iovlen = 2};
    /* A fresh socket's buffer takes this in one go, whatever the system's settings. */
    if (!e && sendmsg(t->fd, &m, MSG_NOSIGNAL) == (ssize_t)(sizeof h + w->card_size) &&
        !mind(w, t, EPOLLIN | EPOLLRDHUP, EPOLL_CTL_MOD)) {
        t->state = AWAITING;
        t->got = 0;
        set_deadline(w, t, now + HELLO_NS);
        return;
    }
    if (!try_next(w, t, now)) {
        char text[RY_WATCH_REASON];
        snprintf(text, sizeof text, "cannot connect to its process: %s", strerror(e ? e : EIO));
        tie_gone(w, t, text);
    }
}

static void hear_answer(struct ry_watch *w, struct ry_tie *t, uint64_t now)
{
    ssize_t n = recv(t->fd, (char *)&t->in.answer + t->got, sizeof t->in.answer - t->got, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    t->got += n > 0 ? (size_t)n : 0;
    if (n > 0 && t->got < sizeof t->in.answer)
        return;
    if (n > 0 && t->in.answer.uid == t->to.uid) {
        if (t->in.answer.full)
            return tie_gone(w, t,
                            "its process has no room for one more connection (see its limit on open files, ulimit -n)");
        t->state = TIED;
        set_deadline(w, t, UINT64_MAX);
        w->hooks.tied(w->hooks.context, t->mine, t->in.answer.number);
        return;
    }
    /* Somebody else lives at this place, or nobody any more. */
    if (!try_next(w, t, now))
        tie_gone(w, t, "its process went away");
}

/* Descriptors belong to the job: half of what the process may open is the most that we take, UCX's beside each of ours.
 */
static bool crowded(const struct ry_watch *w)
{
    struct rlimit limit;
    return !getrlimit(RLIMIT_NOFILE, &limit) && 2 * w->n >= limit.rlim_cur / 2;
}

static void hear_hello(struct ry_watch *w, struct ry_tie *t)
{
    for (;;) {
        bool head = t->got < sizeof t->in.hello;
        size_t all = sizeof t->in.hello + (head ? 0 : t->in.hello.card_size);
        char *to = head ? (char *)&t->in.hello + t->got : t->card + (t->got - sizeof t->in.hello);
        ssize_t n = recv(t->fd, to, all - t->got, 0);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n <= 0)
            return tie_gone(w, t, "");
        t->got += (size_t)n;
        const struct hello *h = &t->in.hello;
        if (t->got == sizeof *h) {
            if (memcmp(h->cookie, w->self.cookie, sizeof h->cookie) || !h->uid || !h->card_size ||
                h->card_size > MAX_CARD || !(t->card = malloc(h->card_size)))
                return tie_gone(w, t, "");
        }
        if (t->got > sizeof *h && t->got == sizeof *h + h->card_size)
            break;
    }
    struct answer a = {.uid = w->self.uid, .full = crowded(w)};
    int64_t mine = a.full ? -1
                          : w->hooks.arrived(w->hooks.context, t, t->in.hello.uid, t->in.hello.number, t->card,
                                             t->in.hello.card_size);
    a.number = (uint32_t)mine;
    a.full = mine < 0;
    ssize_t n = send(t->fd, &a, sizeof a, MSG_NOSIGNAL);
    if (mine < 0)
        return tie_gone(w, t, "");
    free(t->card);
    t->card = NULL;
    t->mine = (uint32_t)mine;
    t->state = TIED;
    set_deadline(w, t, UINT64_MAX);
    if (n != (ssize_t)sizeof a)
        tie_gone(w, t, "its process went away");
}

static void tied_event(struct ry_watch *w, struct ry_tie *t)
{
    char c;
    int e = 0;
    socklen_t len = sizeof e;
    getsockopt(t->fd, SOL_SOCKET, SO_ERROR, &e, &len);
    if (!e) {
        ssize_t n = recv(t->fd, &c, 1, 0);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        e = n < 0 ? errno : 0;
    }
    tie_gone(w, t, e == ETIMEDOUT || e == EHOSTUNREACH ? "its node does not answer any more" : "its process went away");
}

static void accept_ties(struct ry_watch *w, uint64_t now)
{
    for (;;) {
        int fd = held_accept(w->listener);
        if (fd < 0) {
            if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
                w->deaf_until = now + DEAF_NS;
                w->deaf = !epoll_ctl(w->epoll, EPOLL_CTL_DEL, w->listener, NULL);
            }
            return;
        }
        tune(fd);
        struct ry_tie *t = tie_new(w, fd, HEARING);
        if (!t) {
            held_close(fd);
            continue;
        }
        set_deadline(w, t, now + HELLO_NS);
        if (mind(w, t, EPOLLIN | EPOLLRDHUP, EPOLL_CTL_ADD))
            tie_gone(w, t, "");
    }
}

/* ---- the owner's side ---- */

int ry_watch_fd(const struct ry_watch *w)
{
    return w->epoll;
}

uint64_t ry_watch_deadline(const struct ry_watch *w)
{
    uint64_t least = w->deaf ? w->deaf_until : UINT64_MAX;
    for (const struct ry_tie *t = w->ties; w->timed && t; t = t->next)
        least = t->deadline < least ? t->deadline : least;
    return least;
}

static void expire(struct ry_watch *w, uint64_t now)
{
    for (struct ry_tie *t = w->ties, *next; t; t = next) {
        next = t->next;
        if (now < t->deadline)
            continue;
        if (t->state == HEARING || !try_next(w, t, now))
            tie_gone(w, t, "cannot connect to its process: no answer (see NCCL_SOCKET_IFNAME)");
    }
}

void ry_watch_drive(struct ry_watch *w, uint64_t now)
{
    struct epoll_event events[32];
    int n = epoll_wait(w->epoll, events, 32, 0);
    for (int i = 0; i < n; i++) {
        struct ry_tie *t = events[i].data.ptr;
        if (!t)
            accept_ties(w, now);
        else if (t->dead || t->fd < 0)
            continue;
        else if (t->state == CONNECTING)
            greet(w, t, now);
        else if (t->state == AWAITING)
            hear_answer(w, t, now);
        else if (t->state == HEARING)
            hear_hello(w, t);
        else
            tied_event(w, t);
    }
    if (ry_watch_deadline(w) <= now)
        expire(w, now);
    if (w->deaf && now >= w->deaf_until) {
        struct epoll_event e = {.events = EPOLLIN};
        w->deaf = epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->listener, &e) != 0;
        w->deaf_until = now + DEAF_NS;
    }
    bury(w);
}

static bool listen_at(struct ry_watch *w, int family)
{
    struct sockaddr_storage at = {.ss_family = (sa_family_t)family};
    socklen_t len = family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
    int no = 0;
    struct epoll_event e = {.events = EPOLLIN};
    w->listener = held_socket(family);
    if (w->listener < 0)
        return false;
    if ((family == AF_INET6 && setsockopt(w->listener, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no)) ||
        bind(w->listener, (struct sockaddr *)&at, len) || listen(w->listener, SOMAXCONN) ||
        getsockname(w->listener, (struct sockaddr *)&at, &len) || epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->listener, &e)) {
        int saved = errno;
        held_close(w->listener);
        w->listener = -1;
        errno = saved;
        return false;
    }
    w->self.port = family == AF_INET6 ? ((struct sockaddr_in6 *)&at)->sin6_port : ((struct sockaddr_in *)&at)->sin_port;
    return true;
}

struct ry_watch *ry_watch_start(const struct ry_watch_hooks *hooks, uint64_t uid, const void *card, size_t card_size,
                                struct ry_err *err)
{
    if (card_size > MAX_CARD) {
        ry_fail(err, "UCX's address of this process is too large (%zu bytes): name fewer devices in UCX_NET_DEVICES",
                card_size);
        return NULL;
    }
    pthread_once(&held.once, watch_forks);
    struct ry_watch *w = calloc(1, sizeof *w);
    if (!w) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    w->hooks = *hooks, w->card = card, w->card_size = card_size, w->listener = -1;
    memcpy(w->self.magic, "RYWATCH1", 8);
    w->self.uid = uid;
    w->self.host = host_number();
    find_places(&w->self);
    pthread_mutex_lock(&held.lock);
    w->epoll = hold(epoll_create1(EPOLL_CLOEXEC));
    pthread_mutex_unlock(&held.lock);
    if (w->epoll < 0 || (!listen_at(w, AF_INET6) && !listen_at(w, AF_INET)) ||
        getrandom(w->self.cookie, sizeof w->self.cookie, 0) != (ssize_t)sizeof w->self.cookie) {
        ry_fail(err, "cannot listen for other ranks: %s", strerror(errno));
        if (w->listener >= 0)
            held_close(w->listener);
        if (w->epoll >= 0)
            held_close(w->epoll);
        free(w);
        return NULL;
    }
    return w;
}

void ry_watch_stop(struct ry_watch *w)
{
    while (w->ties)
        ry_watch_untie(w, w->ties);
    bury(w);
    held_close(w->listener);
    held_close(w->epoll);
    free(w);
}
