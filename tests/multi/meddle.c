/* meddle.c: see meddle.h. */
#include "meddle.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nccl_abi.h"

#define EXPORT __attribute__((visibility("default")))
#define RECEIVES 256 /* that are remembered of one group */

EXPORT _Thread_local struct meddle_counts meddle_counts;
EXPORT _Atomic(unsigned char *) meddle_flip;
EXPORT _Atomic int meddle_fail;
EXPORT _Atomic int meddle_block;
EXPORT _Atomic int meddle_hold, meddle_made, meddle_ended, meddle_splitting;
static _Atomic(ncclComm_t) made[64]; /* of the engine; NULL: ended */
static _Atomic(ncclComm_t) made_of[64];
static struct {
    _Atomic(ncclComm_t) comm;
    struct meddle_counts *_Atomic counts;
} watched[64];

EXPORT void meddle_watch(ncclComm_t comm)
{
    for (int i = 0; i < 64; i++) {
        ncclComm_t free = NULL;
        if (atomic_load(&watched[i].comm) == comm || atomic_compare_exchange_strong(&watched[i].comm, &free, comm)) {
            atomic_store(&watched[i].counts, &meddle_counts);
            return;
        }
    }
}

/* Whose counts: of the thread that watches the communicator, or of the one from which the engine made it; else of this one. */
static struct meddle_counts *counts_of(ncclComm_t comm)
{
    for (int i = 0; comm && i < 64; i++)
        if (atomic_load(&made[i]) == comm)
            comm = atomic_load(&made_of[i]);
    for (int i = 0; comm && i < 64; i++)
        if (atomic_load(&watched[i].comm) == comm && atomic_load(&watched[i].counts))
            return atomic_load(&watched[i].counts);
    return &meddle_counts;
}

static _Thread_local struct {
    int n;
    struct {
        unsigned char *at;
        size_t bytes;
    } receive[RECEIVES];
} group; /* of the engine */

static bool from_engine(void *return_address)
{
    static _Thread_local void *last;
    static _Thread_local bool answer;
    Dl_info info;
    if (return_address != last) {
        answer = dladdr(return_address, &info) && info.dli_fname && strstr(info.dli_fname, "librailyard-engine");
        last = return_address;
    }
    return answer;
}

static bool fails(enum meddle_failure kind)
{
    int wanted = kind;
    return atomic_load(&meddle_fail) == (int)kind && atomic_compare_exchange_strong(&meddle_fail, &wanted, MEDDLE_NONE);
}

static bool is_made(ncclComm_t c)
{
    for (int i = 0; i < 64; i++)
        if (c && atomic_load(&made[i]) == c)
            return true;
    return false;
}

static void note_end(ncclComm_t c)
{
    for (int i = 0; i < 64; i++) {
        ncclComm_t was = c;
        if (c && atomic_compare_exchange_strong(&made[i], &was, NULL))
            atomic_fetch_add(&meddle_ended, 1);
    }
}

static void flip(void)
{
    unsigned char *at = atomic_load(&meddle_flip);
    for (int i = 0; at && i < group.n; i++)
        if (at >= group.receive[i].at && at < group.receive[i].at + group.receive[i].bytes &&
            atomic_compare_exchange_strong(&meddle_flip, &at, NULL)) {
            *at ^= 1;
            return;
        }
}

/* The function of the NCCL behind us; found once, at the first call. */
#define NEXT(name)                                                                                                     \
    ({                                                                                                                 \
        static __typeof__(&name) _Atomic next_;                                                                        \
        if (!next_)                                                                                                    \
            next_ = (__typeof__(&name))dlsym(RTLD_NEXT, "p" #name);                                                    \
        if (!next_)                                                                                                    \
            abort();                                                                                                   \
        next_;                                                                                                         \
    })

/* Under both of NCCL's names: who calls is known by the address it will return to. */
#define MEDDLE(name, counted, comm, params, args, for_engine)                                                                \
    EXPORT ncclResult_t p##name params;                                                                                \
    EXPORT ncclResult_t p##name params                                                                                 \
    {                                                                                                                  \
        if (!from_engine(__builtin_return_address(0))) {                                                               \
            counts_of(comm)->job += counted;                                                                              \
            return NEXT(name) args;                                                                                    \
        }                                                                                                              \
        counts_of(comm)->engine += counted;                                                                               \
        for_engine return NEXT(name) args;                                                                             \
    }                                                                                                                  \
    EXPORT ncclResult_t name params                                                                                    \
    {                                                                                                                  \
        if (!from_engine(__builtin_return_address(0)))                                                                 \
            return p##name args;                                                                                       \
        counts_of(comm)->engine += counted;                                                                               \
        for_engine return NEXT(name) args;                                                                             \
    }

MEDDLE(ncclGroupStart, 0, NULL, (void), (), {
    group.n = 0;
    while (atomic_load(&meddle_block))
        usleep(1000);
    if (fails(MEDDLE_START))
        return ncclSystemError;
})
MEDDLE(ncclGroupEnd, 0, NULL, (void), (), {
    bool failing = fails(MEDDLE_END);
    ncclResult_t r = NEXT(ncclGroupEnd)();
    if (r == ncclSuccess)
        flip();
    return failing ? ncclSystemError : r;
})
/* A word to itself is no part of an exchange but a trial of streams (engine/later_stream.c). */
static bool trial(size_t n, int peer, ncclComm_t c)
{
    int rank;
    return n == 4 && NEXT(ncclCommUserRank)(c, &rank) == ncclSuccess && rank == peer;
}

MEDDLE(ncclSend, 1, c, (const void *b, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s),
       (b, n, t, peer, c, s), {
           if (trial(n, peer, c)) {
               counts_of(c)->engine--;
               return NEXT(ncclSend)(b, n, t, peer, c, s);
           }
           if (fails(MEDDLE_SEND))
               return ncclSystemError;
           if (is_made(c)) {
               counts_of(c)->inside++;
               return NEXT(ncclSend)(b, n, t, peer, c, s); /* by other numbers */
           }
           counts_of(c)->sent[peer % MEDDLE_PEERS] += n * ry_nccl_type_bytes((int)t);
       })
MEDDLE(ncclRecv, 1, c, (void *b, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s),
       (b, n, t, peer, c, s), {
           if (trial(n, peer, c)) {
               counts_of(c)->engine--;
               return NEXT(ncclRecv)(b, n, t, peer, c, s);
           }
           counts_of(c)->inside += is_made(c);
           if (group.n < RECEIVES) {
               group.receive[group.n].at = b;
               group.receive[group.n].bytes = n * ry_nccl_type_bytes((int)t);
               group.n++;
           }
       })
MEDDLE(ncclAlltoAll, 1, c, (const void *b, void *r, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s),
       (b, r, n, t, c, s), {})
MEDDLE(ncclCommDestroy, 0, NULL, (ncclComm_t c), (c), note_end(c);)
MEDDLE(ncclCommAbort, 0, NULL, (ncclComm_t c), (c), note_end(c);)
MEDDLE(ncclCommInitRank, 0, NULL, (ncclComm_t *to, int n, ncclUniqueId id, int rank), (to, n, id, rank), {
    atomic_fetch_add(&meddle_splitting, 1);
    while (atomic_load(&meddle_hold))
        usleep(1000);
    ncclResult_t r = NEXT(ncclCommInitRank)(to, n, id, rank);
    atomic_fetch_sub(&meddle_splitting, 1);
    if (r == ncclSuccess)
        atomic_store(&made[atomic_fetch_add(&meddle_made, 1) % 64], *to);
    return r;
})
MEDDLE(ncclCommSplit, 0, NULL, (ncclComm_t c, int color, int key, ncclComm_t *to, ncclConfig_t *config),
       (c, color, key, to, config), {
           atomic_fetch_add(&meddle_splitting, 1);
           while (atomic_load(&meddle_hold))
               usleep(1000);
           ncclResult_t r = NEXT(ncclCommSplit)(c, color, key, to, config);
           atomic_fetch_sub(&meddle_splitting, 1);
           if (r != ncclSuccess)
               return r;
           if (fails(MEDDLE_SPLIT)) {
               if (*to)
                   NEXT(ncclCommAbort)(*to);
               *to = NULL;
               return ncclSystemError;
           }
           if (*to) {
               int at = atomic_fetch_add(&meddle_made, 1) % 64;
               atomic_store(&made_of[at], c);
               atomic_store(&made[at], *to);
           }
           return r;
       })
