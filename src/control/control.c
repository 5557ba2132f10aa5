/*
 * control.c: see control.h, and internal.h for how it is made. Owns: the progress thread, starting and stopping.
 */
#include "control/control.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/thread.h"
#include "control/internal.h"

#define NAP_NS 500000ull /* between looks while others poll, or UCX cannot sleep */

bool ry_control_poll(struct ry_control *c)
{
    atomic_store_explicit(&c->polled_at, ry_now_ns(), memory_order_relaxed);
    if (pthread_mutex_trylock(&c->lock))
        return false;
    bool any = ucp_worker_progress(c->ucx.worker) != 0;
    any |= ry_lines_dispatch(c);
    pthread_mutex_unlock(&c->lock);
    return any;
}

void ry_control_rest(struct ry_control *c)
{
    atomic_store_explicit(&c->polled_at, 0, memory_order_relaxed);
    pthread_mutex_lock(&c->lock);
    if (c->napping)
        eventfd_write(c->wake, 1);
    pthread_mutex_unlock(&c->lock);
}

/* ---- the thread ---- */

static void *progress(void *arg)
{
    struct ry_control *c = arg;
    struct pollfd fds[] = {{.fd = c->wake, .events = POLLIN},
                           {.fd = ry_watch_fd(c->watch), .events = POLLIN},
                           {.fd = c->ucx.efd, .events = POLLIN}};
    unsigned busy = 0; /* times in a row that UCX would not sleep though it had nothing to do */
    pthread_mutex_lock(&c->lock);
    while (!c->stop) {
        bool moved = false;
        for (int i = 0; i < 64 && ucp_worker_progress(c->ucx.worker); i++)
            moved = true;
        uint64_t now = ry_now_ns();
        if (fds[1].revents || ry_watch_deadline(c->watch) <= now)
            ry_watch_drive(c->watch, now);
        fds[1].revents = 0;
        uint64_t until = ry_lines_look_at_clock(c, now);
        if (ry_lines_dispatch(c) || moved) {
            busy = 0;
            continue;
        }
        /* Whoever polls does our work: do not let UCX wake us for each message. */
        c->napping = now - atomic_load_explicit(&c->polled_at, memory_order_relaxed) < NAP_NS;
        if (!c->napping) {
            ucs_status_t st = ucp_worker_arm(c->ucx.worker);
            if (st == UCS_ERR_BUSY && ++busy < 100)
                continue;
            c->napping = st != UCS_OK; /* something cannot be sent now, to a process that was stopped maybe */
        }
        if (c->napping && now + NAP_NS < until)
            until = now + NAP_NS;
        c->asleep_until = until;
        pthread_mutex_unlock(&c->lock);
        now = ry_now_ns();
        uint64_t ns = until > now ? until - now : 0;
        struct timespec timeout = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
        fds[2].fd = c->napping ? -1 : c->ucx.efd;
        ppoll(fds, 3, until == UINT64_MAX ? NULL : &timeout, NULL);
        pthread_mutex_lock(&c->lock);
        c->asleep_until = 0;
        c->napping = false;
        if (fds[0].revents) {
            eventfd_t ignored;
            eventfd_read(c->wake, &ignored);
        }
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

/* ---- starting and stopping ---- */

static int make_address(struct ry_control *c)
{
    char watch[RY_WATCH_ADDRESS_MAX];
    struct address_head head = {.magic = "RYCTRL01", .ucx_size = (uint32_t)c->ucx.address_size};
    head.watch_size = (uint32_t)ry_watch_address(c->watch, watch);
    c->address_size = sizeof head + head.watch_size + head.ucx_size;
    if (!(c->address = malloc(c->address_size)))
        return -1;
    memcpy(c->address, &head, sizeof head);
    memcpy(c->address + sizeof head, watch, head.watch_size);
    memcpy(c->address + sizeof head + head.watch_size, c->ucx.address, c->ucx.address_size);
    return 0;
}

static void control_free(struct ry_control *c)
{
    if (c->watch)
        ry_watch_stop(c->watch);
    for (uint32_t i = 0; i < c->npeers; i++) {
        free(c->peers[i]->address);
        free(c->peers[i]);
    }
    for (struct item *i; (i = ry_list_take(&c->unclaimed));)
        free(i);
    if (c->ucx.address)
        ucp_worker_release_address(c->ucx.worker, c->ucx.address);
    if (c->ucx.worker)
        ucp_worker_destroy(c->ucx.worker);
    if (c->ucx.context)
        ucp_cleanup(c->ucx.context);
    if (c->wake >= 0)
        close(c->wake);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->changed);
    free(c->peers);
    free(c->address);
    free(c);
}

struct ry_control *ry_control_start(struct ry_err *err)
{
    struct ry_control *c = calloc(1, sizeof *c);
    if (!c) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, &attr);
    pthread_condattr_destroy(&attr);
    ry_list_init(&c->unclaimed);
    c->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->wake < 0 || getrandom(&c->uid, sizeof c->uid, 0) != (ssize_t)sizeof c->uid) {
        ry_fail(err, "cannot start the control plane: %s", strerror(errno));
        goto fail;
    }
    c->uid |= 1; /* 0 is nobody */
    /* UCX starts a thread, too: the job's signals are not for it. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = ry_peers_start(c, err);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status)
        goto fail;
    struct ry_watch_hooks hooks = {c, ry_peers_arrived, ry_peers_tied, ry_peers_gone};
    c->watch = ry_watch_start(&hooks, c->uid, c->ucx.address, c->ucx.address_size, err);
    if (!c->watch)
        goto fail;
    if (make_address(c)) {
        ry_fail(err, "out of memory");
        goto fail;
    }
    int e = ry_thread_start(&c->thread, progress, c);
    if (e) {
        ry_fail(err, "cannot start the control thread: %s", strerror(e));
        goto fail;
    }
    pthread_setname_np(c->thread, "ry-control");
    return c;
fail:
    control_free(c);
    return NULL;
}

const void *ry_control_address(const struct ry_control *control, size_t *size)
{
    *size = control->address_size;
    return control->address;
}

static void drive_until(struct ry_control *c, void **request, uint64_t until)
{
    while (UCS_PTR_IS_PTR(*request) && ucp_request_check_status(*request) == UCS_INPROGRESS && ry_now_ns() < until)
        if (!ucp_worker_progress(c->ucx.worker))
            usleep(100);
    if (UCS_PTR_IS_PTR(*request))
        ucp_request_free(*request);
}

static void end_thread(struct ry_control *c)
{
    pthread_mutex_lock(&c->lock);
    c->stop = true;
    eventfd_write(c->wake, 1);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->thread, NULL);
}

void ry_control_abandon(struct ry_control *c)
{
    static struct ry_control *volatile abandoned; /* for leak checkers */
    abandoned = c;
    end_thread(abandoned);
}

void ry_control_stop(struct ry_control *c)
{
    end_thread(c);
    pthread_mutex_lock(&c->lock); /* for the checkers of locks: nobody else is here */
    ucp_request_param_t none = {0};
    void *flush = ucp_worker_flush_nbx(c->ucx.worker, &none);
    drive_until(c, &flush, ry_now_ns() + RY_FLUSH_NS);
    for (uint32_t i = 0; i < c->npeers; i++)
        ry_peer_gone(c->peers[i], "stopped");
    ry_peers_close_broken(c);
    for (uint64_t until = ry_now_ns() + RY_FLUSH_NS; ry_now_ns() < until;) {
        unsigned flying = 0;
        for (uint32_t i = 0; i < c->npeers; i++)
            flying += c->peers[i]->flying;
        if (!ucp_worker_progress(c->ucx.worker) && !flying)
            break;
    }
    pthread_mutex_unlock(&c->lock);
    control_free(c);
}
