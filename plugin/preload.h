/*
 * preload.h: what the files of librailyard.so that intercept calls share: preload.c (groups, exchanges and whatever else is
 * counted), births.c (communicators come and go) and start.c (the first call, the engine).
 *
 * Owns: how every intercepted function begins. Not for anybody else.
 */
#ifndef RY_PLUGIN_PRELOAD_H
#define RY_PLUGIN_PRELOAD_H

#include <stdatomic.h>
#include <stdbool.h>

#include "group.h"
#include "real.h"

/* ---- start.c ---- */

enum { RY_UNBORN, RY_WATCHING, RY_PASSIVE };
extern _Atomic int ry_preload_state;
extern struct ry_hooks ry_preload_hooks; /* of the engine; empty until it is open, and when it could not be opened */

/** The first NCCL call of the process: false if there is no NCCL to be found. */
bool ry_preload_start(void);
/** The first communicator, or the first id of one. */
void ry_preload_open_engine(void);

static inline bool started(void)
{
    return __builtin_expect(atomic_load_explicit(&ry_preload_state, memory_order_acquire) != RY_UNBORN, 1) || ry_preload_start();
}

static inline bool watching(const struct ry_group *g)
{
    return atomic_load_explicit(&ry_preload_state, memory_order_relaxed) == RY_WATCHING && !g->inside;
}

/* ---- preload.c ---- */

/** To NCCL with what is held, within the group that is open there. */
void ry_preload_pass_held(struct ry_group *g);
/** A failure that no call of the job has returned yet; ncclSuccess: none. */
ncclResult_t ry_preload_failure(struct ry_group *g);

/** What the engine may ask for (struct ry_host). */
void ry_preload_own_thread(void);
int ry_preload_plain(void *nccl, const struct ry_exchange *x);

/* The beginning of every intercepted function: only calls that the job itself makes, while we watch, go further. */
#define PASS_UNLESS_WATCHING(name, ...)                                                                                \
    struct ry_group *g = &ry_group;                                                                                    \
    if (!started() || !ry_real.name)                                                                                   \
        return ry_real_missing(#name);                                                                                 \
    if (!watching(g)) {                                                                                                \
        if (__builtin_expect(g->held, 0) && !g->inside)                                                                \
            ry_preload_pass_held(g);                                                                                           \
        return ry_real.name(__VA_ARGS__);                                                                              \
    }

/* Where a call was noted in a group: it is held back, or others were and NCCL refused one of them. */
#define RETURN_IF_KEPT(g)                                                                                              \
    do {                                                                                                               \
        if (__builtin_expect(g->held | (int)g->failed, 0))                                                             \
            return ry_preload_failure(g);                                                                                    \
    } while (0)

/* At the beginning of what cannot be part of an exchange. */
#define NO_EXCHANGE(g)                                                                                                 \
    do {                                                                                                               \
        if (g->depth) {                                                                                                \
            ry_group_other(g);                                                                                         \
            RETURN_IF_KEPT(g);                                                                                         \
        }                                                                                                              \
    } while (0)

/* The real function. What NCCL calls of its own public functions meanwhile is not the job's doing. */
#define REAL(name, ...)                                                                                                \
    ({                                                                                                                 \
        g->inside++;                                                                                                   \
        ncclResult_t result_ = ry_real.name(__VA_ARGS__);                                                              \
        g->inside--;                                                                                                   \
        result_;                                                                                                       \
    })

#define API __attribute__((visibility("default")))

/* ---- exchanges that the engine was given and has not enqueued (RAILYARD_HOLD=no) ---- */

/** A call of the job's on `comm` (NULL: none in particular) is about to reach NCCL: everything that must come before it has. */
void ry_preload_settle_slowly(ncclComm_t comm);
static inline void ry_preload_settle(ncclComm_t comm)
{
    if (__builtin_expect(ry_preload_hooks.settle != NULL, 0))
        ry_preload_settle_slowly(comm);
}

/* Around what frees memory, or may: all that is pending goes first, `most` seconds (0: no limit). */
#define FREEING(most)                                                                                                  \
    do {                                                                                                               \
        if (__builtin_expect(ry_preload_hooks.freeing != NULL, 0))                                                     \
            ry_preload_hooks.freeing(most);                                                                            \
    } while (0)
#define FREED()                                                                                                        \
    do {                                                                                                               \
        if (__builtin_expect(ry_preload_hooks.freed != NULL, 0))                                                       \
            ry_preload_hooks.freed();                                                                                  \
    } while (0)

/* frees.c: from here on calls of CUDA that free memory wait, too. */
void ry_preload_watch_frees(void);

/* ---- births.c ---- */

/** The group that made communicators has ended with `r`. */
void ry_births_adopt_all(struct ry_group *g, ncclResult_t r);
void ry_births_adopt_late(struct ry_group *g, ncclComm_t comm, ncclResult_t found);
void ry_births_settle_pending(struct ry_group *g, ncclComm_t comm);

/** A communicator is being used: see to it that we know it, if it was not ready when it was made. */
static inline void ry_births_settle(struct ry_group *g, ncclComm_t comm)
{
    if (comm == g->nccl)
        return;
    struct ry_comm *c = ry_comms_find(comm);
    if (__builtin_expect(!c && g->nbirths, 0))
        ry_births_adopt_late(g, comm, ncclSuccess);
    else if (c && __builtin_expect(atomic_load_explicit(&c->pending, memory_order_relaxed) != RY_SETTLED, 0))
        ry_births_settle_pending(g, comm);
}

#endif
