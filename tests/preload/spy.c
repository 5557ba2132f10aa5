/* spy.c: see spy.h. */
#include "spy.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nccl_abi.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT void *_Atomic spy_other;
EXPORT _Atomic int spy_how, spy_delay_us;
EXPORT _Atomic bool spy_waiting;
EXPORT _Thread_local struct spy_exchange spy_latest;
EXPORT void (*_Atomic spy_hold)(void *nccl, bool on);

static _Thread_local struct {
    char now[4096], told[4096];
    size_t n;
} line;

EXPORT void spy_note(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    if (line.n)
        line.n += (size_t)snprintf(line.now + line.n, sizeof line.now - line.n, " ");
    line.n += (size_t)vsnprintf(line.now + line.n, sizeof line.now - line.n, fmt, ap);
    va_end(ap);
    if (line.n >= sizeof line.now - 64) /* a test that never looks */
        line.n = 0;
}

EXPORT const char *spy_line(void)
{
    memcpy(line.told, line.now, sizeof line.told);
    line.told[line.n] = 0;
    line.n = 0;
    line.now[0] = 0;
    return line.told;
}

static const char *of(ncclComm_t comm)
{
    return comm && comm == spy_other ? "'" : "";
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
#define SPY(name, params, args, ...)                                                                                   \
    EXPORT ncclResult_t p##name params;                                                                                \
    EXPORT ncclResult_t p##name params                                                                                 \
    {                                                                                                                  \
        spy_note(__VA_ARGS__);                                                                                         \
        return NEXT(name) args;                                                                                        \
    }

SPY(ncclGroupStart, (void), (), "(")
SPY(ncclGroupEnd, (void), (), ")")
SPY(ncclGroupSimulateEnd, (ncclSimInfo_t * info), (info), "~")
SPY(ncclSend, (const void *b, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s),
    (b, n, t, peer, c, s), "s%d%s", peer, of(c))
SPY(ncclRecv, (void *b, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s), (b, n, t, peer, c, s),
    "r%d%s", peer, of(c))
SPY(ncclAlltoAll, (const void *b, void *r, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s),
    (b, r, n, t, c, s), "A%s", of(c))
SPY(ncclAllReduce, (const void *b, void *r, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c, cudaStream_t s),
    (b, r, n, t, op, c, s), "R%s", of(c))
SPY(ncclBroadcast, (const void *b, void *r, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s),
    (b, r, n, t, root, c, s), "B%s", of(c))
SPY(ncclAllGather, (const void *b, void *r, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s),
    (b, r, n, t, c, s), "G%s", of(c))
SPY(ncclCommInitRank, (ncclComm_t * c, int n, ncclUniqueId id, int rank), (c, n, id, rank), "I")

/* One-sided calls are newer than the emulated NCCL; this one only shows where in the order it came. */
EXPORT ncclResult_t pncclPutSignal(const void *b, size_t n, ncclDataType_t t, int peer, ncclWindow_t w, size_t at,
                                   int sig, int ctx, unsigned int flags, ncclComm_t c, cudaStream_t s);
EXPORT ncclResult_t pncclPutSignal(const void *b, size_t n, ncclDataType_t t, int peer, ncclWindow_t w, size_t at,
                                   int sig, int ctx, unsigned int flags, ncclComm_t c, cudaStream_t s)
{
    spy_note("P%s", of(c));
    return ncclSuccess;
}
