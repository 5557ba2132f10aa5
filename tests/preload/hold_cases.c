/*
 * hold_cases.c: groups that are held back, seen from below (what NCCL gets, in which order) and from behind (what the
 * engine is told), by spy.h. Every byte received is checked. One case per run, named by the argument; run by
 * hold_check.sh.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/wait.h>

#include "emu_common.h"
#include "hooks.h"
#include "nccl_abi.h"
#include "railyard.h"
#include "spy.h"

#define ALL SPY_RANKS

static void hold(ncclComm_t comm, bool on)
{
    CHECK(spy_hold, "the test engine is not there");
    spy_hold(comm, on);
}

/* This thread's line must be this. */
static void seen(int line, const char *fmt, ...)
{
    char want[4096];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(want, sizeof want, fmt, ap);
    va_end(ap);
    const char *got = spy_line();
    CHECK(!strcmp(want, got), "line %d: '%s' instead of '%s'", line, got, want);
}
#define SEEN(...) seen(__LINE__, __VA_ARGS__)

/* The calls of one exchange, in an order of this rank's own, and how they look below. */
struct traffic {
    int *out[ALL], *in[ALL];
    char words[512];
};
static size_t elements(int from, int to, int salt)
{
    return (size_t)((from * 5 + to * 3 + salt) % 4) * 7;
}
static int value(int from, int to, size_t i, int salt)
{
    return from * 1000000 + to * 10000 + salt * 100 + (int)i;
}
static struct traffic issue(ncclComm_t comm, int salt, const char *mark)
{
    struct traffic t;
    size_t w = 0;
    for (int i = 0; i < who.world; i++) {
        int r = (who.rank + salt + i) % who.world;
        size_t no = elements(who.rank, r, salt), ni = elements(r, who.rank, salt);
        t.out[r] = malloc((no + 1) * sizeof(int));
        t.in[r] = malloc((ni + 1) * sizeof(int));
        for (size_t k = 0; k < no; k++)
            t.out[r][k] = value(who.rank, r, k, salt);
        memset(t.in[r], 0xee, (ni + 1) * sizeof(int));
        if (i % 2)
            NCCL(ncclRecv(t.in[r], ni, ncclInt32, r, comm, NULL));
        NCCL(ncclSend(t.out[r], no, ncclInt32, r, comm, NULL));
        if (!(i % 2))
            NCCL(ncclRecv(t.in[r], ni, ncclInt32, r, comm, NULL));
        w += (size_t)snprintf(t.words + w, sizeof t.words - w, i % 2 ? "%sr%d%s s%d%s" : "%ss%d%s r%d%s", i ? " " : "",
                              r, mark, r, mark);
    }
    return t;
}
static void finish(struct traffic *t, int salt, bool arrived)
{
    for (int r = 0; r < who.world; r++) {
        size_t ni = elements(r, who.rank, salt);
        for (size_t k = 0; k < ni && arrived; k++)
            CHECK(t->in[r][k] == value(r, who.rank, k, salt), "element %zu from %d is %d", k, r, t->in[r][k]);
        CHECK(t->in[r][ni] == (int)0xeeeeeeee, "written past the end");
        free(t->out[r]);
        free(t->in[r]);
    }
}
static ncclResult_t exchange(ncclComm_t comm, int salt, char words[512])
{
    NCCL(ncclGroupStart());
    struct traffic t = issue(comm, salt, "");
    ncclResult_t r = ncclGroupEnd();
    finish(&t, salt, r == ncclSuccess);
    if (words)
        strcpy(words, t.words);
    return r;
}
static void told(bool held, bool one_call, uint64_t ordinal, int salt)
{
    const struct spy_exchange *s = &spy_latest;
    CHECK(s->nranks == who.world && s->rank == who.rank, "%d of %d", s->rank, s->nranks);
    CHECK(s->held == held && s->one_call == one_call, "held %d, one call %d", s->held, s->one_call);
    CHECK(s->ordinal == ordinal, "%lu instead of %lu", s->ordinal, ordinal);
    for (int r = 0; r < who.world && !one_call; r++)
        CHECK(s->send_count[r] == elements(who.rank, r, salt) && s->recv_count[r] == elements(r, who.rank, salt),
              "peer %d", r);
}

static void alltoall(ncclComm_t comm, bool grouped)
{
    enum { N = 3 };
    int out[ALL * N], in[ALL * N];
    for (int i = 0; i < who.world * N; i++)
        out[i] = who.rank * 100 + i;
    memset(in, 0xee, sizeof in);
    if (grouped)
        NCCL(ncclGroupStart());
    NCCL(ncclAlltoAll(out, in, N, ncclInt32, comm, NULL));
    if (grouped)
        NCCL(ncclGroupEnd());
    for (int r = 0; r < who.world; r++)
        for (int i = 0; i < N; i++)
            CHECK(in[r * N + i] == r * 100 + who.rank * N + i, "all-to-all from %d", r);
}

static void mixed_types(ncclComm_t comm)
{
    double out[ALL], in[ALL] = {0};
    NCCL(ncclGroupStart());
    for (int r = 0; r < who.world; r++) {
        ncclDataType_t type = (who.rank + r) % 2 ? ncclFloat64 : ncclInt32;
        out[r] = who.rank * 1.5 + r;
        NCCL(ncclSend(&out[r], 1, type, r, comm, NULL));
        NCCL(ncclRecv(&in[r], 1, type, r, comm, NULL));
    }
    NCCL(ncclGroupEnd());
    for (int r = 0; r < who.world; r++) {
        double want = r * 1.5 + who.rank;
        CHECK(!memcmp(&want, &in[r], (who.rank + r) % 2 ? 8 : 4), "from %d", r);
        CHECK(spy_latest.send_count[r] == ((who.rank + r) % 2 ? 8 : 4), "%lu bytes", spy_latest.send_count[r]);
    }
    CHECK(spy_latest.type == ncclUint8, "type %d", spy_latest.type);
}

static void exchanges(void)
{
    ncclComm_t comm = world_comm();
    static const int hows[] = {SPY_DECLINE, SPY_REVERSED, SPY_TWO, SPY_DECLINE};
    uint64_t x = 0;
    char words[512];
    spy_line();
    for (int round = 0; round < 8; round++) {
        bool on = round % 2, takes = on && hows[round / 2] != SPY_DECLINE;
        hold(comm, on);
        spy_how = hows[round / 2];
        spy_delay_us = round > 5 ? 20000 : 0;
        for (int k = 0; k < 5; k++) {
            NCCL(exchange(comm, k, words));
            if (takes)
                SEEN("( ) begin take end0");
            else if (on)
                SEEN("( ) begin take ( %s ) end0", words);
            else
                SEEN("( %s begin take ) end0", words);
            told(on, false, x++, k);
        }
        alltoall(comm, false);
        SEEN(takes ? "begin take end0" : "begin take A end0");
        told(on, true, x++, 0);
        alltoall(comm, true);
        SEEN(takes ? "( ) begin take end0" : on ? "( ) begin take ( A ) end0" : "( A begin take ) end0");
        told(on, true, x++, 0);
        mixed_types(comm);
        x++;
        spy_line();
        NCCL(ncclGroupStart());
        NCCL(ncclGroupStart());
        struct traffic t = issue(comm, 2, "");
        NCCL(ncclGroupEnd());
        NCCL(ncclGroupEnd());
        finish(&t, 2, true);
        if (takes)
            SEEN("( ( ) ) begin take end0");
        else if (on)
            SEEN("( ( ) ) begin take ( %s ) end0", t.words);
        else
            SEEN("( ( %s ) begin take ) end0", t.words);
        told(on, false, x++, 2);
        CHECK(!spy_latest.counted, "p2p was counted where there was none but in exchanges");
        NCCL(ncclGroupStart()); /* of nothing */
        NCCL(ncclGroupEnd());
        SEEN("( )");
    }
    /* what the engine says is what the job gets; the number is not used up */
    hold(comm, true);
    spy_how = SPY_FAIL;
    EXPECT(ncclSystemError, exchange(comm, 1, NULL));
    SEEN("( ) begin take end%d", ncclSystemError);
    told(true, false, x, 1);
    spy_how = SPY_TWO;
    NCCL(exchange(comm, 2, NULL));
    told(true, false, x, 2);
    /* let go of in the middle of a group: what was begun held ends held */
    NCCL(ncclGroupStart());
    struct traffic t = issue(comm, 3, "");
    hold(comm, false);
    NCCL(ncclGroupEnd());
    finish(&t, 3, true);
    told(true, false, x + 1, 3);
    NCCL(ncclGroupStart()); /* and the other way round */
    t = issue(comm, 3, "");
    hold(comm, true);
    NCCL(ncclGroupEnd());
    finish(&t, 3, true);
    told(false, false, x + 2, 3);
    NCCL(ncclCommDestroy(comm));

    /* one that does not block is never held */
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclResult_t st = ncclCommInitRankConfig(&comm, who.world, shared_id(), who.rank, &config);
    for (st = ncclInProgress; st == ncclInProgress; usleep(1000))
        NCCL(ncclCommGetAsyncError(comm, &st));
    spy_line();
    NCCL(exchange(comm, 0, words)); /* its ranks are known from here on */
    hold(comm, true);
    spy_line();
    NCCL(exchange(comm, 1, words));
    SEEN("( %s begin take ) end0", words);
    told(false, false, 1, 1);
    NCCL(ncclCommDestroy(comm));
}

/* ---- groups that are no exchanges ---- */

static ncclComm_t a, b;
static int next, last, four[4], got[ALL + 4];

static void ring(void)
{
    NCCL(ncclGroupStart());
    NCCL(ncclSend(four, 4, ncclInt32, next, a, NULL));
    NCCL(ncclRecv(got, 4, ncclInt32, last, a, NULL));
    NCCL(ncclGroupEnd());
    CHECK(got[3] == last * 10 + 3, "%d", got[3]);
}
static void star(void)
{
    NCCL(ncclGroupStart());
    for (int r = 0; r < who.world && who.rank == 0; r++)
        NCCL(ncclRecv(&got[r], 1, ncclInt32, r, a, NULL));
    NCCL(ncclSend(four, 1, ncclInt32, 0, a, NULL));
    NCCL(ncclGroupEnd());
    for (int r = 0; r < who.world && who.rank == 0; r++)
        CHECK(got[r] == r * 10, "%d from %d", got[r], r);
}
/* On rank 0 this looks like an exchange up to its last call; on the others like a ring of two. */
static void nearly_on_one(void)
{
    NCCL(ncclGroupStart());
    for (int r = 0; r < who.world && who.rank == 0; r++) {
        NCCL(ncclSend(four, 1, ncclInt32, r, a, NULL));
        if (r < who.world - 1)
            NCCL(ncclRecv(&got[r], 1, ncclInt32, r, a, NULL));
    }
    if (who.rank)
        NCCL(ncclRecv(got, 1, ncclInt32, 0, a, NULL));
    if (who.rank && who.rank < who.world - 1)
        NCCL(ncclSend(four, 1, ncclInt32, 0, a, NULL));
    NCCL(ncclGroupEnd());
    CHECK(got[0] == 0, "%d", got[0]);
}
static void all_but_self(void)
{
    NCCL(ncclGroupStart());
    for (int r = 0; r < who.world; r++) {
        if (r == who.rank)
            continue;
        NCCL(ncclSend(four, 1, ncclInt32, r, a, NULL));
        NCCL(ncclRecv(&got[r], 1, ncclInt32, r, a, NULL));
    }
    NCCL(ncclGroupEnd());
    CHECK(got[next] == next * 10, "%d", got[next]);
}
static void peer_twice(void)
{
    NCCL(ncclGroupStart());
    for (int i = 0; i < who.world; i++) {
        NCCL(ncclSend(&four[i % 4], 1, ncclInt32, next, a, NULL));
        NCCL(ncclRecv(&got[i], 1, ncclInt32, last, a, NULL));
    }
    NCCL(ncclGroupEnd());
    for (int i = 0; i < who.world; i++)
        CHECK(got[i] == last * 10 + i % 4, "%d: %d", i, got[i]);
}
static void one_more(void)
{
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 3, "");
    NCCL(ncclSend(four, 1, ncclInt32, next, a, NULL));
    NCCL(ncclRecv(got, 1, ncclInt32, last, a, NULL));
    NCCL(ncclGroupEnd());
    finish(&t, 3, true);
    CHECK(got[0] == last * 10, "%d", got[0]);
}
static void collective_after(void)
{
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 1, "");
    NCCL(ncclAllReduce(&four[1], got, 1, ncclInt32, ncclMin, a, NULL));
    NCCL(ncclGroupEnd());
    finish(&t, 1, true);
    CHECK(got[0] == 1, "%d", got[0]);
}
static void collective_before(void)
{
    NCCL(ncclGroupStart());
    NCCL(ncclBroadcast(&four[2], got, 1, ncclInt32, 1, a, NULL));
    struct traffic t = issue(a, 1, "");
    NCCL(ncclGroupEnd());
    finish(&t, 1, true);
    CHECK(got[0] == 12, "%d", got[0]);
}
static void collective_of_the_other(void)
{
    int64_t mine = who.rank, all[ALL];
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 2, "");
    NCCL(ncclAllGather(&mine, all, 1, ncclInt64, b, NULL));
    NCCL(ncclGroupEnd());
    finish(&t, 2, true);
    CHECK(all[next] == next, "%ld", all[next]);
}
static void nested_collective(void)
{
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 1, "");
    NCCL(ncclGroupStart());
    NCCL(ncclAllReduce(&four[1], got, 1, ncclInt32, ncclMin, a, NULL));
    NCCL(ncclGroupEnd());
    NCCL(ncclGroupEnd());
    finish(&t, 1, true);
    CHECK(got[0] == 1, "%d", got[0]);
}
static void two_communicators(void)
{
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 1, ""), u = issue(b, 2, "'");
    NCCL(ncclGroupEnd());
    finish(&t, 1, true);
    finish(&u, 2, true);
}
static void interleaved(void)
{
    int in[2][ALL];
    NCCL(ncclGroupStart());
    for (int r = 0; r < who.world; r++) {
        NCCL(ncclSend(&four[0], 1, ncclInt32, r, a, NULL));
        NCCL(ncclSend(&four[1], 1, ncclInt32, r, b, NULL));
        NCCL(ncclRecv(&in[1][r], 1, ncclInt32, r, b, NULL));
        NCCL(ncclRecv(&in[0][r], 1, ncclInt32, r, a, NULL));
    }
    NCCL(ncclGroupEnd());
    for (int r = 0; r < who.world; r++)
        CHECK(in[0][r] == r * 10 && in[1][r] == r * 10 + 1, "from %d", r);
}
static void two_streams(void)
{
    int in[ALL];
    NCCL(ncclGroupStart());
    for (int r = 0; r < who.world; r++) {
        cudaStream_t stream = (cudaStream_t)(uintptr_t)(r == who.world - 1 ? 0x20 : 0x10);
        NCCL(ncclSend(&four[0], 1, ncclInt32, r, a, stream));
        NCCL(ncclRecv(&in[r], 1, ncclInt32, r, a, stream));
    }
    NCCL(ncclGroupEnd());
    for (int r = 0; r < who.world; r++)
        CHECK(in[r] == r * 10, "from %d", r);
}
static void alltoall_twice(void)
{
    int out[ALL], in[2][ALL];
    for (int r = 0; r < who.world; r++)
        out[r] = who.rank * 100 + r;
    NCCL(ncclGroupStart());
    NCCL(ncclAlltoAll(out, in[0], 1, ncclInt32, a, NULL));
    NCCL(ncclAlltoAll(out, in[1], 1, ncclInt32, a, NULL));
    NCCL(ncclGroupEnd());
    CHECK(in[0][next] == next * 100 + who.rank && in[1][last] == last * 100 + who.rank, "wrong");
}
static void alltoall_and_p2p(void)
{
    int out[ALL], in[ALL];
    for (int r = 0; r < who.world; r++)
        out[r] = who.rank * 100 + r;
    for (int before = 0; before < 2; before++) {
        NCCL(ncclGroupStart());
        if (before)
            NCCL(ncclSend(four, 1, ncclInt32, next, a, NULL));
        NCCL(ncclAlltoAll(out, in, 1, ncclInt32, a, NULL));
        if (!before)
            NCCL(ncclSend(four, 1, ncclInt32, next, a, NULL));
        NCCL(ncclRecv(got, 1, ncclInt32, last, a, NULL));
        NCCL(ncclGroupEnd());
        CHECK(in[next] == next * 100 + who.rank, "wrong");
    }
}
static void alltoall_of_the_other(void)
{
    int out[ALL], in[ALL];
    for (int r = 0; r < who.world; r++)
        out[r] = who.rank * 100 + r;
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 1, "");
    NCCL(ncclAlltoAll(out, in, 1, ncclInt32, b, NULL));
    NCCL(ncclGroupEnd());
    finish(&t, 1, true);
    CHECK(in[next] == next * 100 + who.rank, "wrong");
}
static void one_sided(void)
{
    __typeof__(&ncclPutSignal) put = (__typeof__(&ncclPutSignal))dlsym(RTLD_DEFAULT, "ncclPutSignal");
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 1, "");
    NCCL(put(NULL, 0, ncclInt8, 0, NULL, 0, 0, 0, 0, a, NULL));
    NCCL(ncclGroupEnd());
    finish(&t, 1, true);
}
static void communicator_made(void)
{
    ncclComm_t c;
    ncclUniqueId id = shared_id();
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 1, "");
    NCCL(ncclCommInitRank(&c, who.world, id, who.rank));
    NCCL(ncclGroupEnd());
    finish(&t, 1, true);
    NCCL(ncclCommDestroy(c));
}
static void simulated(void)
{
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 1, "");
    NCCL(ncclGroupSimulateEnd(NULL));
    finish(&t, 1, false);
}
static void alone(void)
{
    if (who.world % 2)
        return;
    for (int k = 0; k < 2; k++) {
        if ((who.rank & 1) == k)
            NCCL(ncclSend(four, 1, ncclInt32, who.rank ^ 1, a, NULL));
        else
            NCCL(ncclRecv(got, 1, ncclInt32, who.rank ^ 1, a, NULL));
    }
    CHECK(got[0] == (who.rank ^ 1) * 10, "%d", got[0]);
}

/*
 * Take the words that are no NCCL calls out of a line; how many of them were `stray`. Within the outermost group what
 * is held may come after the start of an inner one, which is nothing to NCCL: those go to the line's end.
 */
static int without_hooks(char *line)
{
    char out[4096] = "", inner[64] = "", *save;
    int n = 0, depth = 0;
    for (char *w = strtok_r(line, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
        n += !strcmp(w, "stray");
        CHECK(strcmp(w, "begin") && strcmp(w, "take"), "taken for an exchange: %s", line);
        bool in = (*w == '(' && depth++) || (*w == ')' && --depth);
        if (strcmp(w, "stray") && strcmp(w, "ended")) {
            strcat(in ? inner : out, w);
            strcat(in ? inner : out, " ");
        }
    }
    strcat(out, inner);
    strcpy(line, out);
    return n;
}

/* What one side counted as sent, the other must have counted as received. */
static void ordinals_agree(uint64_t ordinal)
{
    uint32_t mine[2][ALL], all[ALL][2][ALL];
    NCCL(exchange(a, 0, NULL));
    told(spy_latest.held, false, ordinal, 0);
    memcpy(mine[0], spy_latest.sent, sizeof mine[0]);
    memcpy(mine[1], spy_latest.received, sizeof mine[1]);
    NCCL(ncclAllGather(mine, all, 2 * ALL, ncclUint32, b, NULL));
    for (int i = 0; i < who.world; i++)
        for (int k = 0; k < who.world; k++)
            CHECK(all[i][0][k] == all[k][1][i], "%d sent %u to %d, who received %u", i, all[i][0][k], k, all[k][1][i]);
}

static void confusing(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
        int strays,
            other; /* of a, with those of b; -1: at least one. other: p2p to the next rank that is counted, -1: any */
    } cases[] = {{"ring", ring, 1, 1},
                 {"star", star, 1, -1},
                 {"nearly an exchange on one rank", nearly_on_one, 1, -1},
                 {"all but self", all_but_self, 1, 1},
                 {"a peer twice", peer_twice, 1, -2},
                 {"an exchange and one more", one_more, 1, 2},
                 {"a collective after", collective_after, 1, 1},
                 {"a collective before", collective_before, 1, 1},
                 {"a collective of the other", collective_of_the_other, 1, 1},
                 {"a nested collective", nested_collective, 1, 1},
                 {"two communicators", two_communicators, 2, 1},
                 {"interleaved", interleaved, -1, 1},
                 {"two streams", two_streams, 1, 1},
                 {"all-to-all twice", alltoall_twice, 1, 2},
                 {"all-to-all and p2p", alltoall_and_p2p, 2, 4},
                 {"all-to-all of the other", alltoall_of_the_other, 2, 1},
                 {"one-sided", one_sided, 1, 1},
                 {"a communicator made", communicator_made, 1, 1},
                 {"simulated", simulated, 0, 0},
                 {"alone", alone, -1, -1}};
    a = world_comm(), b = world_comm();
    spy_other = b;
    spy_how = SPY_MANY;
    next = (who.rank + 1) % who.world, last = (who.rank + who.world - 1) % who.world;
    for (int i = 0; i < 4; i++)
        four[i] = who.rank * 10 + i;
    uint64_t x = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char line[2][4096];
        uint32_t before[2] = {0};
        for (int on = 0; on < 2; on++) {
            hold(a, on), hold(b, on);
            ordinals_agree(x++);
            before[0] = spy_latest.sent[next];
            spy_line();
            cases[i].run();
            strcpy(line[on], spy_line());
            if (on && cases[i].run == collective_before) /* told before NCCL gets it */
                CHECK(!strncmp(line[1], "( B stray s", 11), "'%s'", line[1]);
            int strays = without_hooks(line[on]), want = on ? cases[i].strays : 0;
            if (!on || *line[on]) /* `alone` does nothing with an odd number of ranks */
                CHECK(want < 0 ? strays > 0 : strays == want, "%s, hold %d: %d strays", cases[i].name, on, strays);
            ordinals_agree(x++);
            uint32_t counted = spy_latest.sent[next] - before[0], other = (uint32_t)cases[i].other;
            if (cases[i].other == -2)
                other = (uint32_t)who.world;
            CHECK(cases[i].other == -1 || counted == other, "%s, hold %d: %u sends counted", cases[i].name, on,
                  counted);
        }
        CHECK(!strcmp(line[0], line[1]), "%s: NCCL gets '%s' when held, else '%s'", cases[i].name, line[1], line[0]);
    }
    NCCL(ncclCommDestroy(b));
    NCCL(ncclCommDestroy(a));
}

/* ---- errors ---- */

static void errors(void)
{
    const size_t huge = SIZE_MAX / 8;
    char words[512];
    a = world_comm();
    next = (who.rank + 1) % who.world;
    hold(a, true);
    spy_line();
    /* a bad count is noticed when NCCL sees it: by the call that spoils the exchange, which is not passed on then … */
    NCCL(ncclGroupStart());
    NCCL(ncclSend(four, huge, ncclInt32, next, a, NULL));
    NCCL(ncclRecv(got, 1, ncclInt32, next, a, NULL));
    EXPECT(ncclInvalidArgument, ncclSend(four, 1, ncclInt32, next, a, NULL));
    EXPECT(ncclInvalidArgument, ncclGroupEnd());
    SEEN("( stray s%d )", next);
    /* … whatever that is … */
    NCCL(ncclGroupStart());
    NCCL(ncclSend(four, huge, ncclInt32, next, a, NULL));
    EXPECT(ncclInvalidArgument, ncclAllReduce(four, got, 1, ncclInt32, ncclSum, a, NULL));
    EXPECT(ncclInvalidArgument, ncclGroupEnd());
    SEEN("( stray s%d )", next);
    NCCL(ncclGroupStart());
    NCCL(ncclSend(four, huge, ncclInt32, next, a, NULL));
    ncclComm_t none = NULL;
    EXPECT(ncclInvalidArgument, ncclCommSplit(a, 0, 0, &none, NULL));
    EXPECT(ncclInvalidArgument, ncclGroupEnd());
    CHECK(!none, "a communicator was made");
    SEEN("( stray s%d )", next);
    /* … or by the end, be it an exchange or not, or simulated */
    NCCL(ncclGroupStart());
    NCCL(ncclSend(four, huge, ncclInt32, next, a, NULL));
    EXPECT(ncclInvalidArgument, ncclGroupEnd());
    SEEN("( stray s%d )", next);
    NCCL(ncclGroupStart());
    NCCL(ncclSend(four, huge, ncclInt32, next, a, NULL));
    EXPECT(ncclInvalidArgument, ncclGroupSimulateEnd(NULL));
    SEEN("( s%d ~", next);
    NCCL(ncclGroupStart());
    for (int r = 0; r < who.world; r++) {
        NCCL(ncclSend(four, r ? 1 : huge, ncclInt32, r, a, NULL));
        NCCL(ncclRecv(&got[r], 1, ncclInt32, r, a, NULL));
    }
    EXPECT(ncclInvalidArgument, ncclGroupEnd());
    SEEN("( ) begin take ( s0 ) end%d", ncclInvalidArgument);
    EXPECT(ncclInvalidArgument, ncclAlltoAll(four, got, huge, ncclInt32, a, NULL));
    SEEN("begin take A end%d", ncclInvalidArgument);
    /* what cannot be right by itself is passed on at once, and so refused at once */
    static const struct {
        int type, peer;
    } bad[] = {{99, 0}, {ncclInt32, -1}, {ncclInt32, ALL + 1}};
    for (int i = 0; i < 3; i++)
        for (int first = 0; first < 2; first++) {
            NCCL(ncclGroupStart());
            if (!first)
                NCCL(ncclSend(four, 1, ncclInt32, 0, a, NULL));
            EXPECT(ncclInvalidArgument, ncclSend(four, 1, (ncclDataType_t)bad[i].type, bad[i].peer, a, NULL));
            EXPECT(ncclInvalidArgument, ncclGroupEnd());
            SEEN("( stray %ss%d )", first ? "" : "s0 ", bad[i].peer);
        }
    NCCL(ncclGroupStart());
    NCCL(ncclSend(four, 1, ncclInt32, next, a, NULL));
    EXPECT(ncclInvalidArgument, ncclSend(four, 1, ncclInt32, next, NULL, NULL));
    EXPECT(ncclInvalidArgument, ncclGroupEnd());
    SEEN("( stray s%d s%d )", next, next);
    EXPECT(ncclInvalidArgument, ncclAlltoAll(four, got, 1, (ncclDataType_t)99, a, NULL));
    SEEN("stray A");
    EXPECT(ncclInvalidUsage, ncclGroupEnd());
    SEEN(")");
    /* and nothing of it lasts */
    NCCL(exchange(a, 1, words));
    SEEN("( ) begin take ( %s ) end0", words);
    spy_how = SPY_TWO;
    NCCL(exchange(a, 2, NULL));
    alltoall(a, false);
    NCCL(ncclCommDestroy(a));
}

/* ---- ends ---- */

static ncclResult_t waited;
static char waiter_line[4096], waiter_words[512];
static void *wait_in_exchange(void *one_call)
{
    if (one_call) {
        int out[ALL] = {0}, in[ALL];
        waited = ncclAlltoAll(out, in, 1, ncclInt32, a, NULL);
    } else {
        waited = exchange(a, 1, waiter_words);
    }
    strcpy(waiter_line, spy_line());
    return NULL;
}

static void ends(void)
{
    char want[1024];
    b = world_comm();
    for (int round = 0; round < 3; round++) {
        pthread_t t;
        a = world_comm();
        hold(a, true);
        spy_how = SPY_UNTIL_END;
        spy_waiting = false;
        CHECK(!pthread_create(&t, NULL, wait_in_exchange, round == 1 ? &round : NULL), "pthread_create");
        while (!spy_waiting)
            usleep(1000);
        barrier(b);
        uint64_t start = ry_now_ns();
        spy_line();
        if (round < 2) {
            NCCL(ncclCommAbort(a)); /* not before the other thread has let go of the handle: the engine takes 50 ms */
            CHECK(seconds_since(start) > 0.045, "the communicator was given up while it was in use");
        } else {
            ncclResult_t r = ncclCommRevoke(a, NCCL_REVOKE_DEFAULT);
            CHECK(r == ncclSuccess || r == ncclInProgress, "%d", r);
        }
        char *line = strdup(spy_line());
        CHECK(!strncmp(line, "aborting", 8), "'%s'", line);
        free(line);
        pthread_join(t, NULL);
        CHECK(seconds_since(start) < 20, "took %.1f s", seconds_since(start));
        CHECK(waited != ncclSuccess, "an exchange that was aborted went well");
        if (round < 2) { /* NCCL must not see a communicator that is gone */
            CHECK(waited == ncclInternalError, "%d", waited);
            snprintf(want, sizeof want, round ? "begin take end%d" : "( ) begin take ( ) end%d", waited);
            CHECK(!strncmp(waiter_line, want, strlen(want)), "'%s' instead of '%s'", waiter_line, want);
            CHECK(!waiter_line[strlen(want)] || !strcmp(waiter_line + strlen(want), " ended"), "'%s'", waiter_line);
        } else {
            CHECK(strstr(waiter_line, "( ) begin take ( s"), "'%s'", waiter_line);
            NCCL(ncclCommDestroy(a));
        }
        barrier(b);
    }
    spy_how = SPY_DECLINE;
    a = world_comm();
    hold(a, true);
    NCCL(exchange(a, 1, NULL));
    barrier(b);
    spy_line();
    NCCL(ncclCommAbort(a));
    SEEN("aborting ended");
    a = world_comm(); /* what is new is not aborted, wherever its entry lies */
    hold(a, true);
    NCCL(exchange(a, 1, NULL));
    NCCL(ncclCommDestroy(a));
    /* within a group: what was held comes before the end */
    a = world_comm();
    hold(a, true);
    NCCL(ncclGroupStart());
    NCCL(ncclSend(four, 0, ncclInt32, who.rank, a, NULL));
    NCCL(ncclRecv(got, 0, ncclInt32, who.rank, a, NULL));
    spy_line();
    NCCL(ncclCommFinalize(a));
    SEEN("stray s%d r%d", who.rank, who.rank);
    NCCL(ncclGroupEnd());
    NCCL(ncclCommDestroy(a));
    barrier(b); /* a rank that has left is a dead one to those who are still busy */
    NCCL(ncclCommDestroy(b));
}

/* ---- threads and children ---- */

struct job {
    pthread_t thread;
    ncclComm_t comm;
};
static void *one_thread(void *arg)
{
    struct job *j = arg;
    int up = (who.rank + 1) % who.world, down = (who.rank + who.world - 1) % who.world;
    for (int i = 0; i < 150; i++) {
        NCCL(exchange(j->comm, i % 17, NULL));
        if (i % 5 == 0) {
            int in = -1;
            NCCL(ncclGroupStart());
            NCCL(ncclSend(&who.rank, 1, ncclInt32, up, j->comm, NULL));
            NCCL(ncclRecv(&in, 1, ncclInt32, down, j->comm, NULL));
            NCCL(ncclGroupEnd());
            CHECK(in == down, "%d", in);
        }
        spy_line();
    }
    return NULL;
}

static _Atomic bool over;
static struct job jobs[5];
static void *toggler(void *arg)
{
    for (unsigned n = (unsigned)who.rank; !over; n = n * 1103515245 + 12345) {
        hold(jobs[n / 65536 % 5].comm, n >> 30 & 1); /* on each rank at other times: the paths fit each other */
        usleep(200);
    }
    return NULL;
}

static void threads(void)
{
    pthread_t t;
    for (int i = 0; i < 5; i++)
        jobs[i].comm = world_comm();
    spy_how = SPY_MANY;
    spy_delay_us = 300;
    CHECK(!pthread_create(&t, NULL, toggler, NULL), "pthread_create");
    for (int i = 0; i < 5; i++)
        CHECK(!pthread_create(&jobs[i].thread, NULL, one_thread, &jobs[i]), "pthread_create");
    for (int i = 0; i < 5; i++)
        pthread_join(jobs[i].thread, NULL);
    over = true;
    pthread_join(t, NULL);
    for (int i = 0; i < 5; i++)
        NCCL(ncclCommDestroy(jobs[i].comm));
}

static void children(void)
{
    char words[512];
    a = world_comm();
    hold(a, true);
    NCCL(exchange(a, 0, words));
    spy_line();
    NCCL(ncclGroupStart());
    struct traffic t = issue(a, 1, "");
    fflush(NULL);
    pid_t pid = fork();
    if (!pid) {
        ncclGroupEnd(); /* gets what the parent's NCCL would have got; the emulated one refuses it in a child */
        char want[1024];
        snprintf(want, sizeof want, "( %s )", t.words);
        _exit(strcmp(spy_line(), want) ? 1 : 0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && !WEXITSTATUS(status), "child ended with %x", status);
    NCCL(ncclGroupEnd());
    finish(&t, 1, true);
    SEEN("( ) begin take ( %s ) end0", t.words);
    NCCL(ncclCommDestroy(a));
}

static void pauses(void)
{
    char words[512];
    CHECK(railyard_pause, "not exported");
    CHECK(railyard_pause(0) == 0, "paused from the start");
    a = world_comm();
    spy_line();
    NCCL(exchange(a, 0, words));
    SEEN("( %s begin take ) end0", words);
    CHECK(railyard_pause(1) == 0 && railyard_pause(5) == 1, "the state before");
    for (int i = 0; i < 3; i++) {
        NCCL(exchange(a, 1, words));
        SEEN("( %s )", words);
    }
    alltoall(a, false);
    SEEN("A");
    /* the other ranks wait for us: they are told, nothing is kept back */
    hold(a, true);
    NCCL(exchange(a, 2, words));
    SEEN("( %s begin take ) end0", words);
    told(false, false, 5, 2);
    for (int on = 1; on >= 0; on--) { /* let go of, and wanted again, in the middle of a group */
        hold(a, on);
        NCCL(ncclGroupStart());
        struct traffic t = issue(a, 1, "");
        hold(a, !on);
        NCCL(ncclGroupEnd());
        finish(&t, 1, true);
        SEEN(on ? "( %s )" : "( %s begin take ) end0", t.words);
    }
    hold(a, false);
    NCCL(exchange(a, 1, words));
    SEEN("( %s )", words);
    CHECK(railyard_pause(0) == 1 && railyard_pause(0) == 0, "the state before");
    NCCL(exchange(a, 3, words));
    SEEN("( %s begin take ) end0", words);
    told(false, false, 9, 3);
    NCCL(ncclCommDestroy(a));
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"exchanges", exchanges}, {"confusing", confusing}, {"errors", errors}, {"ends", ends},
                 {"threads", threads},     {"children", children},   {"pauses", pauses}};
    start_rank();
    CHECK(argc == 2 && who.world <= ALL, "usage: hold_cases CASE");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (strcmp(argv[1], cases[i].name))
            continue;
        cases[i].run();
        return 0;
    }
    CHECK(false, "no case '%s'", argv[1]);
}
