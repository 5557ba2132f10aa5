/*
 * wire.c: the UCX worker of this process, the thread that drives it, endpoints to other processes, and timers.
 *
 * Owns: all calls of UCX. Not: what the messages mean (transfer.c).
 *
 * The thread sleeps in epoll on UCX's event descriptor, a timerfd and nothing else. Whoever holds the lock may drive
 * the worker too (a caller does after posting, which saves a switch); each leaves it armed, so that an event that comes
 * later wakes the thread.
 */
#include "emu.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <ucp/api/ucp.h>

#include "base/clock.h"

pthread_mutex_t ry_emu_lock = PTHREAD_MUTEX_INITIALIZER;

struct ry_emu_proc {
    struct ry_emu_proc *next;
    uint64_t uid;
    ucp_ep_h ep;
    bool self, closing;
    const char *dead;
};

static struct {
    bool started;
    atomic_bool forked; /* this is a forked child of a process that had started: it has no thread, and shares sockets */
    ucp_context_h context;
    ucp_worker_h worker;
    int epoll, timer;
    struct ry_emu_proc *procs;
    struct ry_emu_address address;
    ncclResult_t result;
    bool driving, close_some;
    bool over; /* the process is exiting: UCX is gone or about to go */
} wire;

/* ---- timers: a binary heap, and one timerfd set to its first ---- */

static struct {
    struct ry_emu_timer **heap; /* from 1 */
    size_t n, room;
    uint64_t set; /* what the timerfd is set to, 0 not set */
} timers;

static void place(struct ry_emu_timer *t, size_t i)
{
    timers.heap[i] = t;
    t->place = i;
}

static void sift(size_t i)
{
    struct ry_emu_timer *t = timers.heap[i];
    while (i > 1 && timers.heap[i / 2]->when > t->when) {
        place(timers.heap[i / 2], i);
        i /= 2;
    }
    for (size_t c; (c = 2 * i) <= timers.n; i = c) {
        if (c < timers.n && timers.heap[c + 1]->when < timers.heap[c]->when)
            c++;
        if (timers.heap[c]->when >= t->when)
            break;
        place(timers.heap[c], i);
    }
    place(t, i);
}

void ry_emu_timer_stop(struct ry_emu_timer *timer)
{
    size_t i = timer->place;
    if (!i)
        return;
    timer->place = 0;
    struct ry_emu_timer *last = timers.heap[timers.n--];
    if (last != timer) {
        place(last, i);
        sift(i);
    }
}

void ry_emu_timer_set(struct ry_emu_timer *timer, uint64_t when)
{
    timer->when = when;
    if (!timer->place) {
        if (timers.n + 1 >= timers.room) {
            size_t room = timers.room ? 2 * timers.room : 64;
            struct ry_emu_timer **heap = realloc(timers.heap, room * sizeof *heap);
            if (!heap)
                abort(); /* nothing sensible is left to do: the process has no memory for a pointer */
            timers.heap = heap;
            timers.room = room;
        }
        place(timer, ++timers.n);
    }
    sift(timer->place);
}

static bool fire_timers(void)
{
    bool any = false;
    while (timers.n && timers.heap[1]->when <= ry_now_ns()) {
        struct ry_emu_timer *t = timers.heap[1];
        ry_emu_timer_stop(t);
        t->fire(t);
        any = true;
    }
    return any;
}

static void arm_timer(void)
{
    uint64_t when = timers.n ? timers.heap[1]->when : 0;
    if (when == timers.set)
        return;
    struct itimerspec at = {.it_value = {(time_t)(when / 1000000000u), (long)(when % 1000000000u)}};
    timerfd_settime(wire.timer, TFD_TIMER_ABSTIME, &at, NULL);
    timers.set = when;
}

/* ---- driving ---- */

static void close_dead(void);

void ry_emu_wire_drive(void)
{
    if (wire.driving || wire.over) /* called from a callback: the outer one goes on */
        return;
    wire.driving = true;
    ucs_status_t armed;
    do {
        bool moved;
        do {
            moved = ucp_worker_progress(wire.worker) != 0;
            moved |= fire_timers();
            if (wire.close_some)
                close_dead();
        } while (moved);
        armed = ucp_worker_arm(wire.worker);
    } while (armed == UCS_ERR_BUSY);
    arm_timer();
    wire.driving = false;
}

static void *drive(void *arg)
{
    for (;;) {
        struct epoll_event e[2];
        int n = epoll_wait(wire.epoll, e, 2, -1);
        if (n < 0 && errno != EINTR)
            return NULL;
        pthread_mutex_lock(&ry_emu_lock);
        for (int i = 0; i < n; i++) {
            uint64_t expirations;
            if (e[i].data.fd == wire.timer && read(wire.timer, &expirations, sizeof expirations) > 0)
                timers.set = 0;
        }
        ry_emu_wire_drive();
        pthread_mutex_unlock(&ry_emu_lock);
    }
}

/* ---- starting ---- */

static ucs_status_t on_am(void *arg, const void *header, size_t header_length, void *data, size_t length,
                          const ucp_am_recv_param_t *param)
{
    switch ((enum ry_emu_am)(uintptr_t)arg) {
    case RY_EMU_AM_CTS:
        ry_emu_on_cts(header, header_length);
        return UCS_OK;
    case RY_EMU_AM_REFUSE:
        ry_emu_on_refuse(header, header_length);
        return UCS_OK;
    case RY_EMU_AM_DATA:
        break;
    }
    bool rndv = param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV;
    return ry_emu_on_data(header, header_length, data, length, rndv) ? UCS_INPROGRESS : UCS_OK;
}

static ncclResult_t failed(const char *what, ucs_status_t st)
{
    return ry_emu_error(ncclSystemError, "UCX: %s: %s", what, ucs_status_string(st));
}

static ncclResult_t start_locked(void)
{
    ucp_config_t *config;
    ucs_status_t st = ucp_config_read(NULL, NULL, &config);
    if (st != UCS_OK)
        return failed("ucp_config_read", st);
    /* Peer failure is only told by tcp in this version, and needs no device in a container. */
    if (!getenv("UCX_TLS"))
        ucp_config_modify(config, "TLS", "tcp,self");
    if (!getenv("UCX_NET_DEVICES") && !getenv("NCCL_SOCKET_IFNAME"))
        ucp_config_modify(config, "NET_DEVICES", "lo");
    if (!getenv("UCX_KEEPALIVE_INTERVAL"))
        ucp_config_modify(config, "KEEPALIVE_INTERVAL", "1s");
    ucp_params_t cp = {.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME,
                       .features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP,
                       .name = "ryemu"};
    st = ucp_init(&cp, config, &wire.context);
    ucp_config_release(config);
    if (st != UCS_OK)
        return failed("ucp_init", st);
    ucp_worker_params_t wp = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                              .thread_mode = UCS_THREAD_MODE_SERIALIZED};
    st = ucp_worker_create(wire.context, &wp, &wire.worker);
    if (st != UCS_OK)
        return failed("ucp_worker_create", st);
    for (unsigned id = RY_EMU_AM_CTS; id <= RY_EMU_AM_REFUSE; id++) {
        ucp_am_handler_param_t hp = {.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                                                   UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG,
                                     .id = id,
                                     .flags = UCP_AM_FLAG_WHOLE_MSG,
                                     .cb = on_am,
                                     .arg = (void *)(uintptr_t)id};
        st = ucp_worker_set_am_recv_handler(wire.worker, &hp);
        if (st != UCS_OK)
            return failed("ucp_worker_set_am_recv_handler", st);
    }
    int efd;
    st = ucp_worker_get_efd(wire.worker, &efd);
    if (st != UCS_OK)
        return failed("ucp_worker_get_efd", st);
    wire.epoll = epoll_create1(EPOLL_CLOEXEC);
    wire.timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = efd}, t = {.events = EPOLLIN, .data.fd = wire.timer};
    if (wire.epoll < 0 || wire.timer < 0 || epoll_ctl(wire.epoll, EPOLL_CTL_ADD, efd, &e) ||
        epoll_ctl(wire.epoll, EPOLL_CTL_ADD, wire.timer, &t))
        return ry_emu_error(ncclSystemError, "cannot set up epoll: %m");
    ucp_address_t *address;
    size_t len;
    st = ucp_worker_get_address(wire.worker, &address, &len);
    if (st != UCS_OK)
        return failed("ucp_worker_get_address", st);
    wire.address.worker = address;
    wire.address.len = (uint32_t)len;
    while (!wire.address.proc)
        if (getrandom(&wire.address.proc, sizeof wire.address.proc, 0) < 0 && errno != EINTR)
            return ry_emu_error(ncclSystemError, "getrandom: %m");
    ry_emu_wire_drive(); /* arm before the thread sleeps */
    pthread_t thread;
    int err = pthread_create(&thread, NULL, drive, NULL);
    if (err)
        return ry_emu_error(ncclSystemError, "cannot start the progress thread: %s", strerror(err));
    pthread_detach(thread);
    return ncclSuccess;
}

/* The lock may have been held by a thread that the child does not have. */
static void in_child(void)
{
    pthread_mutex_init(&ry_emu_lock, NULL);
    wire.forked = wire.started;
    wire.over = wire.started;
}

ncclResult_t ry_emu_wire_usable(void)
{
    if (atomic_load_explicit(&wire.forked, memory_order_relaxed))
        return ry_emu_error(ncclInvalidUsage,
                            "a forked child cannot communicate with its parent's transport: exec first");
    return ncclSuccess;
}

ncclResult_t ry_emu_wire_start(struct ry_emu_address *mine)
{
    ncclResult_t usable = ry_emu_wire_usable();
    if (usable != ncclSuccess)
        return usable;
    pthread_mutex_lock(&ry_emu_lock);
    if (!wire.started) {
        wire.started = true;
        pthread_atfork(NULL, NULL, in_child);
        wire.result = start_locked();
    }
    if (mine)
        *mine = wire.address;
    ncclResult_t result = wire.result;
    pthread_mutex_unlock(&ry_emu_lock);
    return result;
}

/* ---- processes ---- */

static void on_ep_error(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    ry_emu_proc_kill(arg, ucs_status_string(status));
}

void ry_emu_proc_kill(struct ry_emu_proc *proc, const char *why)
{
    if (proc->dead || proc->self)
        return;
    proc->dead = why;
    proc->closing = wire.close_some = true; /* not from inside UCX's own callback */
    ry_emu_proc_lost(proc, why);
}

static void close_dead(void)
{
    wire.close_some = false;
    for (struct ry_emu_proc *p = wire.procs; p; p = p->next) {
        if (!p->closing)
            continue;
        p->closing = false;
        ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS, .flags = UCP_EP_CLOSE_FLAG_FORCE};
        void *request = ucp_ep_close_nbx(p->ep, &param);
        p->ep = NULL;
        if (UCS_PTR_IS_PTR(request))
            ucp_request_free(request); /* goes on by itself */
    }
}

struct ry_emu_proc *ry_emu_wire_proc(const struct ry_emu_address *address)
{
    for (struct ry_emu_proc *p = wire.procs; p; p = p->next)
        if (p->uid == address->proc)
            return p;
    struct ry_emu_proc *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->uid = address->proc;
    p->self = address->proc == wire.address.proc;
    if (!p->self) {
        ucp_ep_params_t ep = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLER,
                              .address = address->worker,
                              .err_mode = UCP_ERR_HANDLING_MODE_PEER,
                              .err_handler = {on_ep_error, p}};
        ucs_status_t st = ucp_ep_create(wire.worker, &ep, &p->ep);
        if (st != UCS_OK) {
            failed("ucp_ep_create", st);
            free(p);
            return NULL;
        }
    }
    p->next = wire.procs;
    wire.procs = p;
    return p;
}

bool ry_emu_proc_is_self(const struct ry_emu_proc *proc)
{
    return proc->self;
}

const char *ry_emu_proc_dead(const struct ry_emu_proc *proc)
{
    return proc->dead;
}

/* ---- messages ---- */

struct pending {
    void (*done)(void *arg, bool ok);
    void *arg;
    char header[64];
};

static void finish(struct pending *p, ucs_status_t status)
{
    if (p->done)
        p->done(p->arg, status == UCS_OK);
    free(p);
}

static void on_sent(void *request, ucs_status_t status, void *arg)
{
    ucp_request_free(request);
    finish(arg, status);
}

static void on_taken(void *request, ucs_status_t status, size_t length, void *arg)
{
    ucp_request_free(request);
    finish(arg, status);
}

static struct pending *pending_new(void (*done)(void *arg, bool ok), void *arg)
{
    struct pending *p = malloc(sizeof *p);
    if (!p)
        abort();
    p->done = done;
    p->arg = arg;
    return p;
}

void ry_emu_wire_send(struct ry_emu_proc *to, enum ry_emu_am id, const void *header, size_t header_bytes,
                      const void *payload, size_t bytes, void (*done)(void *arg, bool ok), void *arg)
{
    if (to->dead || !to->ep || wire.over) {
        if (done)
            done(arg, false);
        return;
    }
    struct pending *p = pending_new(done, arg);
    memcpy(p->header, header, header_bytes);
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA, .cb.send = on_sent, .user_data = p};
    void *request = ucp_am_send_nbx(to->ep, id, p->header, header_bytes, payload, bytes, &param);
    if (!UCS_PTR_IS_PTR(request))
        finish(p, UCS_PTR_STATUS(request));
}

void ry_emu_wire_take(void *handle, void *into, size_t bytes, void (*done)(void *arg, bool ok), void *arg)
{
    struct pending *p = pending_new(done, arg);
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
                                 .cb.recv_am = on_taken,
                                 .user_data = p};
    void *request = ucp_am_recv_data_nbx(wire.worker, handle, into, bytes, &param);
    if (!UCS_PTR_IS_PTR(request))
        finish(p, UCS_PTR_STATUS(request));
}

struct flush {
    pthread_cond_t cond;
    bool done, left; /* left: the waiter is gone, the callback frees */
};

static void on_flushed(void *request, ucs_status_t status, void *arg)
{
    struct flush *f = arg;
    ucp_request_free(request);
    f->done = true;
    if (f->left)
        free(f);
    else
        pthread_cond_signal(&f->cond);
}

void ry_emu_wire_flush(void)
{
    if (wire.forked)
        return;
    struct flush *f = calloc(1, sizeof *f);
    if (!f)
        return;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&f->cond, &monotonic);
    uint64_t deadline = ry_now_ns() + 2000000000u;
    struct timespec at = {(time_t)(deadline / 1000000000u), (long)(deadline % 1000000000u)};
    pthread_mutex_lock(&ry_emu_lock);
    if (wire.over || !wire.worker) {
        pthread_mutex_unlock(&ry_emu_lock);
        free(f);
        return;
    }
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
                                 .cb.send = on_flushed,
                                 .user_data = f};
    f->done = !UCS_PTR_IS_PTR(ucp_worker_flush_nbx(wire.worker, &param));
    ry_emu_wire_drive();
    while (!f->done && pthread_cond_timedwait(&f->cond, &ry_emu_lock, &at) == 0)
        ;
    f->left = !f->done;
    bool done = f->done;
    pthread_mutex_unlock(&ry_emu_lock);
    if (done)
        free(f);
}

/*
 * A program may exit without ending its communicators, even right after its last send: let the bytes out and say
 * goodbye. Then keep the thread away from UCX, whose own clean-up comes next.
 */
__attribute__((destructor)) static void at_exit(void)
{
    if (wire.forked)
        return;
    pthread_mutex_lock(&ry_emu_lock);
    for (struct ncclComm *c = ry_emu_comm_first(); c; c = c->next)
        ry_emu_say_goodbye(c);
    pthread_mutex_unlock(&ry_emu_lock);
    ry_emu_wire_flush();
    pthread_mutex_lock(&ry_emu_lock);
    wire.over = true;
    pthread_mutex_unlock(&ry_emu_lock);
}
