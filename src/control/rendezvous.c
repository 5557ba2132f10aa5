/*
 * rendezvous.c: see rendezvous.h.
 *
 * One thread, one poll(): it accepts those who come to meetings that we host (struct visitor, gathered by struct meeting),
 * and attends meetings elsewhere on behalf of our own ranks (struct guest). All sockets are non-blocking. `lock` guards
 * everything; the thread gives it up while it polls and while it runs a callback.
 */
#include "rendezvous.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/thread.h"

#define MAX_BYTES (64u << 10)     /* one rank's record */
#define MAX_ALL (256u << 20)      /* all ranks' */
#define HELLO_NS 10000000000ull   /* a visitor that has not said hello by then is not one of us */
#define DEAF_NS 200000000ull   /* no descriptor or memory to be had for a visitor: look again then */
#define GRACE_NS 5000000000ull    /* a guest waits longer than its host, so as to hear who is missing */

/* What travels. Both ends are of one machine type (as NCCL demands), so numbers go as they are. */
struct hello {
    uint8_t cookie[16];
    uint64_t key;
    uint32_t nranks, rank, size, patience_ms;
    uint32_t extra, spare; /* bytes after the record: rank 0's only */
};
struct answer {
    uint32_t failed; /* 0: the records of all ranks follow, else a text */
    uint32_t size;   /* of what follows first */
    uint32_t extra;  /* of rank 0's, which follows that */
    uint32_t spare;
};

struct payload { /* an answer on its way to many */
    int users;
    size_t size;
    char bytes[];
};

struct meeting {
    struct meeting *next;
    uint64_t key, deadline;
    uint32_t nranks, size, arrived;
    bool *present;
    char *all;
    char *extra; /* rank 0's, once it is here */
    uint32_t extra_size;
    struct payload *answer; /* made when the meeting is over; the meeting stays until its visitors have it */
};

struct visitor {
    struct visitor *next;
    int fd;
    uint64_t deadline;
    struct hello hello;
    size_t got; /* bytes of hello, then of the record */
    char *record;
    struct meeting *meeting;
    struct payload *out;
    size_t sent;
    bool gone;
};

struct guest {
    struct guest *next;
    int fd;
    uint64_t deadline;
    struct payload *out;
    size_t sent;
    struct answer answer;
    size_t got, expected, extra_at;
    char *in; /* all, then from extra_at on rank 0's extra */
    ry_rendezvous_done done;
    void *context;
    bool over;
    char why[256];
};

struct ry_rendezvous {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t idle; /* no callback is running */
    bool stop;
    void *running; /* the context whose callback runs now */
    int wake, listener;
    struct ry_ticket ticket;
    struct meeting *meetings;
    struct visitor *visitors;
    struct guest *guests;
    size_t sockets;      /* of visitors and guests */
    uint64_t deaf_until; /* nobody is let in before */
};

bool ry_ticket_valid(const struct ry_ticket *t)
{
    return !memcmp(t->magic, "RAILYARD", 8) && t->version == RY_TICKET_VERSION && (t->family == 4 || t->family == 6) &&
           t->port;
}

/* Descriptors belong to the job: half of what the process may open is the most that we take, for a while. */
static bool crowded(const struct ry_rendezvous *rv)
{
    struct rlimit limit;
    return !getrlimit(RLIMIT_NOFILE, &limit) && rv->sockets >= limit.rlim_cur / 2;
}

static void payload_drop(struct payload *p)
{
    if (p && !--p->users)
        free(p);
}

/* ---- hosting ---- */

static void append(char *text, size_t size, const char *more)
{
    size_t used = strlen(text);
    snprintf(text + used, size - used, "%s", more);
}

/* "rank 3", "ranks 1, 4-7": who is not there, shortened where it is many. */
static void missing_text(const struct meeting *m, char *text, size_t size)
{
    char item[48];
    int items = 0;
    snprintf(text, size, "no word from rank%s ", m->nranks - m->arrived > 1 ? "s" : "");
    for (uint32_t r = 0; r < m->nranks; r++) {
        if (m->present[r])
            continue;
        uint32_t first = r;
        while (r + 1 < m->nranks && !m->present[r + 1])
            r++;
        if (++items > 8) {
            append(text, size, ", …");
            break;
        }
        if (first == r)
            snprintf(item, sizeof item, "%s%u", items > 1 ? ", " : "", first);
        else
            snprintf(item, sizeof item, "%s%u-%u", items > 1 ? ", " : "", first, r);
        append(text, size, item);
    }
    snprintf(item, sizeof item, " of %u: is Railyard preloaded there?", m->nranks);
    append(text, size, item);
}

static struct payload *make_answer(bool failed, const void *bytes, size_t size, const void *extra, uint32_t extra_size)
{
    struct payload *p = malloc(sizeof *p + sizeof(struct answer) + size + extra_size);
    if (!p)
        return NULL;
    struct answer a = {.failed = failed, .size = (uint32_t)size, .extra = extra_size};
    p->users = 0;
    p->size = sizeof a + size + extra_size;
    memcpy(p->bytes, &a, sizeof a);
    memcpy(p->bytes + sizeof a, bytes, size);
    if (extra_size)
        memcpy(p->bytes + sizeof a + size, extra, extra_size);
    return p;
}

static void refuse(struct visitor *v, const char *why)
{
    v->out = make_answer(true, why, strlen(why), NULL, 0);
    if (v->out)
        v->out->users = 1;
    else
        v->gone = true;
}

static void meeting_free(struct meeting *m)
{
    free(m->all);
    free(m->present);
    free(m->extra);
    free(m);
}

/* Everybody is there, or time is up: answer all who wait. */
static void conclude(struct ry_rendezvous *rv, struct meeting *m)
{
    char text[256];
    if (m->arrived == m->nranks) {
        m->answer = make_answer(false, m->all, (size_t)m->nranks * m->size, m->extra, m->extra_size);
    } else {
        missing_text(m, text, sizeof text);
        m->answer = make_answer(true, text, strlen(text), NULL, 0);
    }
    for (struct visitor *v = rv->visitors; v; v = v->next) {
        if (v->meeting != m || v->out)
            continue;
        v->meeting = NULL;
        v->out = m->answer;
        if (v->out)
            v->out->users++;
        else
            v->gone = true;
    }
    if (m->answer && !m->answer->users)
        free(m->answer);
    for (struct meeting **p = &rv->meetings; *p; p = &(*p)->next) {
        if (*p != m)
            continue;
        *p = m->next;
        break;
    }
    meeting_free(m);
}

static struct meeting *find_meeting(struct ry_rendezvous *rv, const struct hello *h)
{
    for (struct meeting *m = rv->meetings; m; m = m->next)
        if (m->key == h->key)
            return m;
    struct meeting *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->key = h->key, m->nranks = h->nranks, m->size = h->size;
    m->deadline = ry_now_ns() + (uint64_t)h->patience_ms * 1000000u;
    m->all = calloc(h->nranks, h->size);
    m->present = calloc(h->nranks, sizeof *m->present);
    if (!m->all || !m->present) {
        meeting_free(m);
        return NULL;
    }
    m->next = rv->meetings;
    return rv->meetings = m;
}

/* A visitor has handed over its record. */
static void seat_visitor(struct ry_rendezvous *rv, struct visitor *v)
{
    struct meeting *m = find_meeting(rv, &v->hello);
    if (!m)
        return refuse(v, "the host is out of memory");
    if (m->nranks != v->hello.nranks || m->size != v->hello.size)
        return refuse(v, "ranks disagree on the size of the communicator, or run different versions of Railyard");
    if (m->present[v->hello.rank])
        return refuse(v, "two ranks with one number");
    m->present[v->hello.rank] = true;
    memcpy(m->all + (size_t)v->hello.rank * m->size, v->record, m->size);
    if (v->hello.extra) { /* rank 0: what comes after its record is for all */
        memmove(v->record, v->record + m->size, v->hello.extra);
        m->extra = v->record;
        m->extra_size = v->hello.extra;
    } else {
        free(v->record);
    }
    v->record = NULL;
    v->meeting = m;
    if (++m->arrived == m->nranks)
        conclude(rv, m);
}

static void visitor_reads(struct ry_rendezvous *rv, struct visitor *v)
{
    for (;;) {
        bool head = v->got < sizeof v->hello;
        size_t body = v->got - sizeof v->hello; /* only used when !head */
        char sink[64];
        void *to = head ? (char *)&v->hello + v->got : v->record ? v->record + body : sink;
        size_t want = head ? sizeof v->hello - v->got : v->record ? v->hello.size + v->hello.extra - body : sizeof sink;
        ssize_t n = recv(v->fd, to, want, 0);
        if (n <= 0) {
            if (n == 0 || (errno != EAGAIN && errno != EINTR))
                v->gone = true;
            return;
        }
        if (!head && !v->record) { /* nothing more was to come */
            v->gone = true;
            return;
        }
        v->got += (size_t)n;
        if (v->got == sizeof v->hello) {
            const struct hello *h = &v->hello;
            if (memcmp(h->cookie, rv->ticket.cookie, sizeof h->cookie) || !h->nranks || h->rank >= h->nranks ||
                !h->size || h->size > MAX_BYTES || (uint64_t)h->nranks * h->size > MAX_ALL ||
                h->extra > (h->rank ? 0 : RY_RENDEZVOUS_EXTRA_MAX) || !(v->record = malloc(h->size + h->extra))) {
                v->gone = true;
                return;
            }
        }
        if (v->got == sizeof v->hello + v->hello.size + v->hello.extra) {
            v->deadline = UINT64_MAX; /* the meeting's counts from now on */
            seat_visitor(rv, v);
            return;
        }
    }
}

static void visitor_writes(struct visitor *v)
{
    while (v->sent < v->out->size) {
        ssize_t n = send(v->fd, v->out->bytes + v->sent, v->out->size - v->sent, MSG_NOSIGNAL);
        if (n < 0) {
            v->gone = errno != EAGAIN && errno != EINTR;
            return;
        }
        v->sent += (size_t)n;
    }
    v->gone = true;
}

static void visitor_free(struct visitor *v)
{
    close(v->fd); /* if its meeting is not over its record stays there: it just will not hear the outcome */
    payload_drop(v->out);
    free(v->record);
    free(v);
}

static void accept_visitors(struct ry_rendezvous *rv)
{
    while (!crowded(rv)) { /* whoever is not let in yet waits in the listener's queue */
        int fd = accept4(rv->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
                rv->deaf_until = ry_now_ns() + DEAF_NS;
            return;
        }
        struct visitor *v = calloc(1, sizeof *v);
        if (!v) {
            close(fd);
            return;
        }
        rv->sockets++;
        v->fd = fd;
        v->deadline = ry_now_ns() + HELLO_NS;
        v->next = rv->visitors;
        rv->visitors = v;
    }
}

int ry_rendezvous_host(struct ry_rendezvous *rv, const struct sockaddr *address, struct ry_ticket *ticket,
                       struct ry_err *err)
{
    pthread_mutex_lock(&rv->lock);
    int status = 0;
    if (rv->listener >= 0)
        goto out;
    struct sockaddr_storage at = {0};
    socklen_t len = address->sa_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    memcpy(&at, address, len);
    if (at.ss_family == AF_INET)
        ((struct sockaddr_in *)&at)->sin_port = 0;
    else
        ((struct sockaddr_in6 *)&at)->sin6_port = 0;
    int fd = socket(at.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, len) || listen(fd, SOMAXCONN) ||
        getsockname(fd, (struct sockaddr *)&at, &len)) {
        status = ry_fail(err, "cannot listen for the other ranks: %s", strerror(errno));
        if (fd >= 0)
            close(fd);
        goto out;
    }
    struct ry_ticket *t = &rv->ticket;
    memcpy(t->magic, "RAILYARD", 8);
    t->version = RY_TICKET_VERSION;
    if (at.ss_family == AF_INET) {
        const struct sockaddr_in *in = (struct sockaddr_in *)&at;
        t->family = 4, t->port = in->sin_port;
        memcpy(t->address, &in->sin_addr, 4);
    } else {
        const struct sockaddr_in6 *in = (struct sockaddr_in6 *)&at;
        t->family = 6, t->port = in->sin6_port, t->scope = in->sin6_scope_id;
        memcpy(t->address, &in->sin6_addr, 16);
    }
    if (getrandom(t->cookie, sizeof t->cookie, 0) != (ssize_t)sizeof t->cookie) {
        status = ry_fail(err, "no random numbers to be had: %s", strerror(errno));
        close(fd);
        goto out;
    }
    rv->listener = fd;
    eventfd_write(rv->wake, 1);
out:
    if (!status)
        *ticket = rv->ticket;
    pthread_mutex_unlock(&rv->lock);
    return status;
}

/* ---- attending ---- */

static void guest_fails(struct guest *g, const char *what)
{
    snprintf(g->why, sizeof g->why, "%s", what);
    g->over = true;
}

static void guest_writes(struct guest *g)
{
    while (g->sent < g->out->size) {
        ssize_t n = send(g->fd, g->out->bytes + g->sent, g->out->size - g->sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN && errno != EINTR && errno != ENOTCONN) {
                char text[128];
                snprintf(text, sizeof text, "cannot reach the process that made the communicator's id: %s", strerror(errno));
                guest_fails(g, text);
            }
            return;
        }
        g->sent += (size_t)n;
    }
}

/* Where the n-th byte after the answer's head goes; `room` is how many may be written there. */
static char *guest_place(const struct guest *g, size_t n, size_t *room)
{
    bool extra = n >= g->answer.size;
    *room = g->answer.size - n + (extra ? g->answer.extra : 0);
    return g->in + (extra ? g->extra_at + (n - g->answer.size) : n);
}

static bool guest_makes_room(struct guest *g)
{
    const struct answer *a = &g->answer;
    if (a->failed ? a->size >= sizeof g->why || a->extra : a->size != g->expected || a->extra > RY_RENDEZVOUS_EXTRA_MAX)
        return false;
    g->extra_at = ((size_t)a->size + 15) & ~(size_t)15;
    return (g->in = malloc(g->extra_at + a->extra + 1)) != NULL;
}

static void guest_reads(struct guest *g)
{
    for (;;) {
        bool head = g->got < sizeof g->answer;
        size_t room = sizeof g->answer - g->got;
        char *to = head ? (char *)&g->answer + g->got : guest_place(g, g->got - sizeof g->answer, &room);
        ssize_t n = recv(g->fd, to, room, 0);
        if (n == 0)
            return guest_fails(g, "the process that made the communicator's id went away");
        if (n < 0) {
            if (errno != EAGAIN && errno != EINTR)
                guest_fails(g, "the connection to the process that made the communicator's id broke");
            return;
        }
        g->got += (size_t)n;
        if (g->got == sizeof g->answer && !guest_makes_room(g))
            return guest_fails(g, "an answer of the wrong size: do all ranks run the same version of Railyard?");
        if (g->got == sizeof g->answer + g->answer.size + g->answer.extra) {
            g->over = true;
            if (g->answer.failed)
                snprintf(g->why, sizeof g->why, "%.*s", (int)g->answer.size, g->in);
            return;
        }
    }
}

static void guest_free(struct guest *g)
{
    close(g->fd);
    free(g->out);
    free(g->in);
    free(g);
}

int ry_rendezvous_attend(struct ry_rendezvous *rv, const struct ry_ticket *ticket, uint64_t key, int nranks, int rank,
                         const void *bytes, size_t size, const void *extra, size_t extra_size, double seconds,
                         ry_rendezvous_done done, void *context, struct ry_err *err)
{
    if (rank)
        extra_size = 0;
    if (!ry_ticket_valid(ticket))
        return ry_fail(err, "nobody hosts: Railyard was not preloaded in the process that made the communicator's id");
    if (size > MAX_BYTES || (uint64_t)nranks * size > MAX_ALL)
        return ry_fail(err, "%d ranks with %zu bytes each are too many to swap", nranks, size);
    if (extra_size > RY_RENDEZVOUS_EXTRA_MAX)
        return ry_fail(err, "rank 0's address has %zu bytes, more than %u: name fewer devices in UCX_NET_DEVICES", extra_size,
                       RY_RENDEZVOUS_EXTRA_MAX);
    struct sockaddr_storage at = {0};
    socklen_t len;
    if (ticket->family == 4) {
        struct sockaddr_in *in = (struct sockaddr_in *)&at;
        in->sin_family = AF_INET, in->sin_port = ticket->port, len = sizeof *in;
        memcpy(&in->sin_addr, ticket->address, 4);
    } else {
        struct sockaddr_in6 *in = (struct sockaddr_in6 *)&at;
        in->sin6_family = AF_INET6, in->sin6_port = ticket->port, in->sin6_scope_id = ticket->scope, len = sizeof *in;
        memcpy(&in->sin6_addr, ticket->address, 16);
    }
    struct guest *g = calloc(1, sizeof *g);
    struct hello h = {.key = key, .nranks = (uint32_t)nranks, .rank = (uint32_t)rank, .size = (uint32_t)size, .extra = (uint32_t)extra_size,
                      .patience_ms = seconds < 4e6 ? (uint32_t)(seconds * 1000) : 4000000000u};
    struct payload *out = malloc(sizeof *out + sizeof h + size + extra_size);
    int fd = socket(at.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (!g || !out || fd < 0 || (connect(fd, (struct sockaddr *)&at, len) && errno != EINPROGRESS)) {
        ry_fail(err, "cannot reach the process that made the communicator's id: %s", strerror(errno));
        if (fd >= 0)
            close(fd);
        free(out);
        free(g);
        return -1;
    }
    memcpy(h.cookie, ticket->cookie, sizeof h.cookie);
    out->users = 1;
    out->size = sizeof h + size + extra_size;
    memcpy(out->bytes, &h, sizeof h);
    memcpy(out->bytes + sizeof h, bytes, size);
    if (extra_size)
        memcpy(out->bytes + sizeof h + size, extra, extra_size);
    g->fd = fd, g->out = out, g->done = done, g->context = context;
    g->expected = (size_t)nranks * size;
    g->deadline = ry_now_ns() + (uint64_t)h.patience_ms * 1000000u + GRACE_NS;
    pthread_mutex_lock(&rv->lock);
    if (crowded(rv)) {
        pthread_mutex_unlock(&rv->lock);
        guest_free(g);
        return ry_fail(err, "more meetings at once than the limit on open files allows");
    }
    rv->sockets++;
    g->next = rv->guests;
    rv->guests = g;
    eventfd_write(rv->wake, 1);
    pthread_mutex_unlock(&rv->lock);
    return 0;
}

void ry_rendezvous_cancel(struct ry_rendezvous *rv, void *context)
{
    pthread_mutex_lock(&rv->lock);
    for (struct guest *g = rv->guests; g; g = g->next)
        if (g->context == context)
            g->done = NULL, g->over = true;
    eventfd_write(rv->wake, 1);
    while (rv->running == context && !pthread_equal(pthread_self(), rv->thread))
        pthread_cond_wait(&rv->idle, &rv->lock);
    pthread_mutex_unlock(&rv->lock);
}

/* ---- the thread ---- */

/* Take finished guests out and tell their callers, without the lock. */
static void dismiss_guests(struct ry_rendezvous *rv)
{
    for (struct guest **p = &rv->guests; *p;) {
        struct guest *g = *p;
        if (!g->over) {
            p = &g->next;
            continue;
        }
        *p = g->next;
        if (g->done) {
            bool ok = !*g->why;
            rv->running = g->context;
            pthread_mutex_unlock(&rv->lock);
            g->done(g->context, ok ? g->in : NULL, ok && g->answer.extra ? g->in + g->extra_at : NULL, ok ? g->answer.extra : 0,
                    ok ? NULL : g->why);
            pthread_mutex_lock(&rv->lock);
            rv->running = NULL;
            pthread_cond_broadcast(&rv->idle);
            p = &rv->guests; /* the list may have changed */
        }
        guest_free(g);
        rv->sockets--;
    }
}

static void dismiss_visitors(struct ry_rendezvous *rv)
{
    for (struct visitor **p = &rv->visitors; *p;) {
        struct visitor *v = *p;
        if (!v->gone) {
            p = &v->next;
            continue;
        }
        *p = v->next;
        visitor_free(v);
        rv->sockets--;
    }
}

static void expire(struct ry_rendezvous *rv, uint64_t now)
{
    for (struct meeting *m = rv->meetings, *next; m; m = next) {
        next = m->next;
        if (now >= m->deadline)
            conclude(rv, m);
    }
    for (struct visitor *v = rv->visitors; v; v = v->next)
        v->gone |= now >= v->deadline;
    for (struct guest *g = rv->guests; g; g = g->next)
        if (!g->over && now >= g->deadline)
            guest_fails(g, "no answer from the process that made the communicator's id");
}

static uint64_t next_deadline(const struct ry_rendezvous *rv)
{
    uint64_t least = UINT64_MAX;
    for (const struct meeting *m = rv->meetings; m; m = m->next)
        least = m->deadline < least ? m->deadline : least;
    for (const struct visitor *v = rv->visitors; v; v = v->next)
        least = v->deadline < least ? v->deadline : least;
    for (const struct guest *g = rv->guests; g; g = g->next)
        least = g->deadline < least ? g->deadline : least;
    return least;
}

static void *attend_to_all(void *arg)
{
    struct ry_rendezvous *rv = arg;
    struct pollfd *fds = NULL;
    size_t capacity = 0;
    pthread_mutex_lock(&rv->lock);
    while (!rv->stop) {
        size_t n = 2;
        for (struct visitor *v = rv->visitors; v; v = v->next)
            n++;
        for (struct guest *g = rv->guests; g; g = g->next)
            n++;
        if (n > capacity) {
            struct pollfd *more = realloc(fds, 2 * n * sizeof *fds);
            if (!more)
                break; /* meetings end by their guests' deadlines; the job goes on */
            fds = more;
            capacity = 2 * n;
        }
        fds[0] = (struct pollfd){.fd = rv->wake, .events = POLLIN};
        uint64_t deadline = next_deadline(rv), now = ry_now_ns();
        bool open = now >= rv->deaf_until && !crowded(rv);
        if (now < rv->deaf_until && rv->deaf_until < deadline)
            deadline = rv->deaf_until;
        fds[1] = (struct pollfd){.fd = open ? rv->listener : -1, .events = POLLIN}; /* -1 is passed over */
        n = 2;
        for (struct visitor *v = rv->visitors; v; v = v->next)
            fds[n++] = (struct pollfd){.fd = v->fd, .events = v->out ? POLLOUT : POLLIN};
        struct visitor *visitors = rv->visitors; /* new ones are put in front of these */
        for (struct guest *g = rv->guests; g; g = g->next)
            fds[n++] = (struct pollfd){.fd = g->fd, .events = g->sent < g->out->size ? POLLOUT : POLLIN};
        struct guest *guests = rv->guests;
        int timeout = deadline == UINT64_MAX ? -1 : deadline <= now ? 0 : (int)((deadline - now) / 1000000u % 3600000u) + 1;
        pthread_mutex_unlock(&rv->lock);
        poll(fds, n, timeout);
        pthread_mutex_lock(&rv->lock);
        eventfd_t ignored;
        if (fds[0].revents)
            eventfd_read(rv->wake, &ignored);
        n = 2;
        for (struct visitor *v = visitors; v; v = v->next, n++) {
            if (!fds[n].revents)
                continue;
            if (v->out)
                visitor_writes(v);
            else
                visitor_reads(rv, v);
        }
        for (struct guest *g = guests; g; g = g->next, n++) {
            if (!fds[n].revents || g->over)
                continue;
            if (g->sent < g->out->size)
                guest_writes(g);
            else
                guest_reads(g);
        }
        if (fds[1].revents)
            accept_visitors(rv);
        expire(rv, ry_now_ns());
        dismiss_visitors(rv);
        dismiss_guests(rv);
    }
    pthread_mutex_unlock(&rv->lock);
    free(fds);
    return NULL;
}

struct ry_rendezvous *ry_rendezvous_start(struct ry_err *err)
{
    struct ry_rendezvous *rv = calloc(1, sizeof *rv);
    if (!rv || (rv->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) {
        ry_fail(err, "cannot start the rendezvous: %s", strerror(errno));
        free(rv);
        return NULL;
    }
    rv->listener = -1;
    pthread_mutex_init(&rv->lock, NULL);
    pthread_cond_init(&rv->idle, NULL);
    int e = ry_thread_start(&rv->thread, attend_to_all, rv);
    if (e) {
        ry_fail(err, "cannot start the rendezvous thread: %s", strerror(e));
        close(rv->wake);
        free(rv);
        return NULL;
    }
    pthread_setname_np(rv->thread, "ry-rendezvous");
    return rv;
}

void ry_rendezvous_stop(struct ry_rendezvous *rv)
{
    pthread_mutex_lock(&rv->lock);
    rv->stop = true;
    eventfd_write(rv->wake, 1);
    pthread_mutex_unlock(&rv->lock);
    pthread_join(rv->thread, NULL);
    for (struct visitor *v = rv->visitors, *next; v; v = next)
        next = v->next, visitor_free(v);
    for (struct guest *g = rv->guests, *next; g; g = next)
        next = g->next, guest_free(g);
    for (struct meeting *m = rv->meetings, *next; m; m = next) {
        next = m->next;
        meeting_free(m);
    }
    if (rv->listener >= 0)
        close(rv->listener);
    close(rv->wake);
    free(rv);
}
