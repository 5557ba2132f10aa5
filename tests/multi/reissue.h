/*
 * reissue.h: what the tests of the engaged engine share.
 *
 * Owns: exchanges whose every byte is known (and every byte around them), in all forms; a note of how each one was
 * carried out; engaging; a rank that says where it was when its time is up. Not: the cases.
 *
 * A side is one rank of one communicator; the tests have one thread for each. All ranks make the same exchange n of a
 * side: its matrix comes from (tag, n) alone.
 */
#ifndef RY_TESTS_REISSUE_H
#define RY_TESTS_REISSUE_H

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/wait.h>

#include "emu_common.h"
#include "meddle.h"
#include "streams.h"

#ifdef __SANITIZE_ADDRESS__
#define SLOW 3
#elif defined __SANITIZE_THREAD__
#define SLOW 4
#else
#define SLOW 1
#endif

/* ---- a hang is a failure that tells where ---- */

static char place[16][96]; /* of the threads that say where they are */
static _Atomic int places;
static _Thread_local char *my_place;

/** Where this thread is, for the case that it stays there. */
#define AT(...)                                                                                                        \
    do {                                                                                                               \
        if (!my_place)                                                                                                 \
            my_place = place[places++ % 16];                                                                           \
        snprintf(my_place, sizeof place[0], __VA_ARGS__);                                                              \
    } while (0)

static void time_is_up(int signal)
{
    for (int i = 0; i < places && i < 16; i++)
        dprintf(2, "rank %d hangs: thread %d at: %s\n", who.rank, i, place[i]);
    _exit(1);
}

static inline void start_reissue(int seconds)
{
    start_rank();
    signal(SIGALRM, time_is_up);
    alarm((unsigned)(seconds * SLOW * 5)); /* how long a machine may take that is slow, and busy */
}

/* Rank i gets its node from letter i of `shape` ("aabbb"): before the first NCCL call. */
static inline void take_shape(const char *shape)
{
    char node[64];
    if (!strcmp(shape, "-"))
        return;
    CHECK((int)strlen(shape) == who.world, "shape %s is not for %d ranks", shape, who.world);
    snprintf(node, sizeof node, "shape-%c", shape[who.rank]);
    setenv("NCCL_HOSTID", node, 1);
}

/* ---- numbers that all ranks know ---- */

static inline uint64_t mix(uint64_t x)
{
    x ^= x >> 31;
    x *= UINT64_C(0x7fb5d329728ea185);
    x ^= x >> 27;
    x *= UINT64_C(0x81dadef4bc2dd44d);
    return x ^ x >> 33;
}

static inline uint64_t next_random(uint64_t *state)
{
    return mix(*state += UINT64_C(0x9e3779b97f4a7c15));
}

static inline unsigned below(uint64_t *state, unsigned n)
{
    return (unsigned)(next_random(state) >> 33) % n;
}

/* ---- exchanges ---- */

#define MOST_EXCHANGES 4096
#define GUARD 0xEE

struct side {
    ncclComm_t comm;
    int n, rank;
    uint64_t tag;                      /* the communicator's, the same on all ranks */
    uint64_t number;                   /* exchanges made */
    unsigned char way[MOST_EXCHANGES]; /* 'p' passed on, 'e' by the engine */
    uint64_t reissued;
    uint64_t engaged_at, engaged_by; /* number and reissued when engage() was last done */
    cudaStream_t stream;
};

enum matrix { M_EQUAL, M_RANDOM, M_SKEWED, M_HOLES, M_ALL_TO_ONE, M_ONE_TO_ALL, M_ONE_PAIR, M_NOTHING, MATRICES, M_OF_TEST = MATRICES };
enum form { F_GROUP, F_SHUFFLED, F_SCATTERED, F_ONE_CALL, FORMS };

enum pairs {
    PAIRS_ALL,
    PAIRS_STAR,
    PAIRS_RING,
    PAIRS_EVEN,
    PAIRS_ODD,
    PAIRS_ONE
}; /* for which of them there are calls at all */

struct exchange {
    enum matrix matrix;
    enum form form;
    enum pairs pairs;
    ncclDataType_t type;
    unsigned most; /* elements of a segment */
    bool in_place; /* what it keeps for itself is sent from where it is received */
    bool back;     /* the matrix is transposed */
    /* Elements of a row: segments are so many of them times longer. Each rank has `tokens` different rows, and of 100 rows
       `zeros` are all zero bytes. 0: no two bytes have to do with each other. */
    unsigned row, tokens, zeros;
    uint64_t like; /* 1 + the number of the exchange whose matrix this one has; 0: its own */
};

static inline unsigned type_bytes(ncclDataType_t type)
{
    static const unsigned char bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return bytes[type];
}

#define TYPES 12 /* of NCCL 2.28 */

/* Does rank i send to rank j at all? */
static inline bool has_pair(const struct side *s, const struct exchange *x, int i, int j)
{
    switch (x->pairs) {
    case PAIRS_ALL:
        return true;
    case PAIRS_STAR: /* around the last rank: there it looks like an exchange */
        return i == s->n - 1 || j == s->n - 1;
    case PAIRS_RING:
        return j == (i + 1) % s->n;
    case PAIRS_ONE:
        return i == 0 && j == s->n - 1;
    default:
        return ((i + j) & 1) == (x->pairs == PAIRS_ODD);
    }
}

/* M_OF_TEST. */
static unsigned (*cell_of_test)(const struct side *s, uint64_t number, int i, int j);

/* From i to j: elements, or rows. */
static inline unsigned cell(const struct side *s, const struct exchange *x, uint64_t number, int i, int j)
{
    uint64_t r = mix(s->tag * 1000003 + number), chosen = r % (uint64_t)s->n;
    uint64_t own = mix(r + (uint64_t)i * 257 + (uint64_t)j);
    unsigned most = x->most ? x->most : 1, some = (unsigned)(own % (most + 1));
    if (!has_pair(s, x, i, j))
        return 0;
    switch (x->form == F_ONE_CALL ? M_EQUAL : x->matrix) {
    case M_EQUAL:
        return x->most;
    case M_RANDOM:
        return some;
    case M_SKEWED: /* most of it to few */
        return own % 7 ? some / 64 : some;
    case M_HOLES: /* a zero row, a zero column and more */
        return (uint64_t)i == chosen || (uint64_t)j == (chosen * 7 + 1) % (uint64_t)s->n || own % 3 == 0 ? 0 : some;
    case M_ALL_TO_ONE:
        return (uint64_t)j == chosen ? some : 0;
    case M_ONE_TO_ALL:
        return (uint64_t)i == chosen ? some : 0;
    case M_ONE_PAIR:
        return (uint64_t)i == chosen && (uint64_t)j == (chosen + 1) % (uint64_t)s->n ? most : 0;
    case M_OF_TEST:
        return cell_of_test(s, number, i, j);
    default:
        return 0;
    }
}

/* The same in elements, whatever rows are and which way it goes. */
static inline size_t elements(const struct side *s, const struct exchange *x, uint64_t number, int i, int j)
{
    size_t rows = cell(s, x, x->like ? x->like - 1 : number, x->back ? j : i, x->back ? i : j);
    return x->row ? rows * x->row : rows;
}

/* Byte k of what has this key. */
static inline unsigned char content(uint64_t key, size_t k)
{
    return (unsigned char)((key + k * UINT64_C(0x9e3779b97f4a7c15)) >> 53);
}

static inline uint64_t key_of(const struct side *s, uint64_t number, int i, int j)
{
    return mix(mix(s->tag * 131 + number) + (uint64_t)i * 65537 + (uint64_t)j);
}

/* All of what i sends to j. */
static inline void fill_segment(const struct side *s, const struct exchange *x, uint64_t number, int i, int j,
                                unsigned char *to, size_t bytes)
{
    uint64_t key = key_of(s, number, i, j);
    size_t row = x->row ? x->row * (size_t)type_bytes(x->type) : bytes;
    for (size_t at = 0, r = 0; at < bytes; at += row, r++) {
        if (x->row) {
            uint64_t random = mix(key_of(s, number, i, j) + r);
            key = random % 100 < x->zeros ? 0 : mix(key_of(s, number, i, s->n) + random / 100 % x->tokens) | 1;
        }
        for (size_t k = 0; k < row && at + k < bytes; k++)
            to[at + k] = key ? content(key, k) : 0;
    }
}

struct buffers {
    uint64_t number;
    unsigned char *send, *recv;
    size_t send_bytes, recv_bytes, send_at[64], recv_at[64], send_n[64], recv_n[64]; /* bytes */
    size_t to[64], from[64];                                                         /* elements */
};

/* Where segments lie: packed in rank order as frameworks do it, or in another order with gaps. */
static inline size_t lay_out(const struct side *s, const struct exchange *x, uint64_t *random, const size_t *bytes,
                             size_t *at)
{
    int order[64];
    size_t end = 0, size = type_bytes(x->type);
    for (int i = 0; i < s->n; i++)
        order[i] = i;
    for (int i = s->n - 1; x->form == F_SCATTERED && i > 0; i--) {
        int j = (int)below(random, (unsigned)i + 1), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (int i = 0; i < s->n; i++) {
        at[order[i]] = end;
        end += bytes[order[i]] + (x->form == F_SCATTERED ? below(random, 5) * size : 0);
    }
    return end;
}

/** The next exchange of this side: what it sends, and room for what it receives. */
static inline void make_buffers(struct side *s, const struct exchange *x, struct buffers *b)
{
    b->number = s->number++;
    uint64_t random = mix(s->tag + b->number * 31) + (uint64_t)s->rank;
    for (int p = 0; p < s->n; p++) {
        b->to[p] = elements(s, x, b->number, s->rank, p);
        b->from[p] = elements(s, x, b->number, p, s->rank);
        b->send_n[p] = b->to[p] * type_bytes(x->type);
        b->recv_n[p] = b->from[p] * type_bytes(x->type);
    }
    b->send_bytes = lay_out(s, x, &random, b->send_n, b->send_at);
    b->recv_bytes = lay_out(s, x, &random, b->recv_n, b->recv_at);
    b->send = malloc(b->send_bytes + 8);
    b->recv = malloc(b->recv_bytes + 8);
    CHECK(b->send && b->recv, "no memory");
    memset(b->send, 0x11, b->send_bytes + 8);
    memset(b->recv, GUARD, b->recv_bytes + 8);
    for (int p = 0; p < s->n; p++) {
        unsigned char *to = b->send + b->send_at[p];
        if (x->in_place && p == s->rank)
            to = b->recv + b->recv_at[p];
        fill_segment(s, x, b->number, s->rank, p, to, b->send_n[p]);
    }
}

/** Every byte of the receive buffer, and what lies between and behind. */
static inline void check_buffers(struct side *s, const struct exchange *x, struct buffers *b)
{
    unsigned long long number = b->number, tag = s->tag;
    size_t most = 0;
    for (int p = 0; p < s->n; p++)
        most = b->recv_n[p] > most ? b->recv_n[p] : most;
    unsigned char *wanted = malloc(most + 1);
    CHECK(wanted, "no memory");
    for (int p = 0; p < s->n; p++) {
        unsigned char *from = b->recv + b->recv_at[p];
        fill_segment(s, x, number, p, s->rank, wanted, b->recv_n[p]);
        for (size_t k = 0; k < b->recv_n[p] && memcmp(from, wanted, b->recv_n[p]); k++)
            CHECK(from[k] == wanted[k],
                  "exchange %llu (%c) of communicator %llu, matrix %d, form %d, type %d: byte %zu of %zu from rank %d "
                  "is %02x, not %02x",
                  number, s->way[number], tag, (int)x->matrix, (int)x->form, (int)x->type, k, b->recv_n[p], p, from[k],
                  wanted[k]);
        memset(from, GUARD, b->recv_n[p]);
    }
    free(wanted);
    for (size_t k = 0; k < b->recv_bytes + 8; k++)
        CHECK(b->recv[k] == GUARD, "exchange %llu of communicator %llu: byte %zu, of no segment, was written", number,
              tag, k);
}

static inline void free_buffers(struct buffers *b)
{
    free(b->send);
    free(b->recv);
}

/** The calls of one exchange, without the group around them. */
static inline ncclResult_t issue(const struct side *s, const struct exchange *x, const struct buffers *b)
{
    uint64_t random = mix(s->tag + b->number * 77) + (uint64_t)s->rank;
    int calls[128], n = 0;
    if (x->form == F_ONE_CALL)
        return ncclAlltoAll(b->send, b->recv, x->most, x->type, s->comm, s->stream);
    for (int p = 0; p < s->n; p++) {
        if (has_pair(s, x, s->rank, p))
            calls[n++] = 2 * p;
        if (has_pair(s, x, p, s->rank))
            calls[n++] = 2 * p + 1;
    }
    for (int i = n - 1; x->form != F_GROUP && i > 0; i--) {
        int j = (int)below(&random, (unsigned)i + 1), t = calls[i];
        calls[i] = calls[j];
        calls[j] = t;
    }
    for (int i = 0; i < n; i++) {
        int p = calls[i] / 2;
        const unsigned char *from = x->in_place && p == s->rank ? b->recv + b->recv_at[p] : b->send + b->send_at[p];
        ncclResult_t r = calls[i] & 1 ? ncclRecv(b->recv + b->recv_at[p], b->from[p], x->type, p, s->comm, s->stream)
                                      : ncclSend(from, b->to[p], x->type, p, s->comm, s->stream);
        if (r != ncclSuccess)
            return r;
    }
    return ncclSuccess;
}

static inline void watch_way(const struct side *s)
{
    meddle_watch(s->comm);
    memset(&meddle_counts, 0, sizeof meddle_counts);
}

/** How it went since watch_way(). A rank that has nothing to send or receive may do nothing at all in a reissued
 * exchange. */
static inline void note_way(struct side *s, const struct buffers *b, ncclResult_t r)
{
    railyard_emu_synchronize(s->stream); /* with RAILYARD_HOLD=no the call has returned before it is done */
    CHECK(b->number < MOST_EXCHANGES, "more exchanges than can be remembered");
    CHECK(!meddle_counts.engine || !meddle_counts.job || r != ncclSuccess, "exchange %llu was carried out twice",
          (unsigned long long)b->number);
    s->way[b->number] = meddle_counts.job ? 'p' : 'e';
    s->reissued += !meddle_counts.job;
    AT("after exchange %llu of communicator %llu", (unsigned long long)b->number, (unsigned long long)s->tag);
}

/** An exchange and whatever came of it; the buffers are the caller's to check and free. */
static inline ncclResult_t try_exchange(struct side *s, const struct exchange *x, struct buffers *b)
{
    make_buffers(s, x, b);
    AT("exchange %llu of communicator %llu (matrix %d, form %d, pairs %d)", (unsigned long long)b->number,
       (unsigned long long)s->tag, (int)x->matrix, (int)x->form, (int)x->pairs);
    watch_way(s);
    ncclResult_t r;
    if (x->form == F_ONE_CALL) {
        r = issue(s, x, b);
    } else {
        NCCL(ncclGroupStart());
        r = issue(s, x, b);
        ncclResult_t end = ncclGroupEnd();
        if (r == ncclSuccess)
            r = end;
    }
    note_way(s, b, r);
    return r;
}

/** Goes on in a child, which ends by `expected_signal`, or else this rank fails: the launcher ends all ranks when one was killed,
 *  so not the one that it sees is. */
static inline void watch_over(int expected_signal)
{
    pid_t child = fork();
    int status;
    CHECK(child >= 0, "cannot fork");
    if (!child)
        return;
    waitpid(child, &status, 0);
    _exit(WIFSIGNALED(status) && WTERMSIG(status) == expected_signal ? 0 : 1);
}

/** One exchange, checked; true if the engine carried it out here. */
static inline bool exchange(struct side *s, const struct exchange *x)
{
    struct buffers b;
    ncclResult_t r = try_exchange(s, x, &b);
    CHECK(r == ncclSuccess, "exchange %llu gave %d: %s", (unsigned long long)b.number, (int)r, ncclGetLastError(NULL));
    check_buffers(s, x, &b);
    free_buffers(&b);
    return s->way[b.number] == 'e';
}

/** One at random, the same on all ranks. Few large ones, so that thousands can be made. */
static inline struct exchange random_exchange(const struct side *s)
{
    uint64_t random = mix(s->tag * 7 + s->number * 1299709);
    struct exchange x = {
        .matrix = below(&random, MATRICES), .form = below(&random, FORMS), .type = below(&random, TYPES)};
    unsigned kind = below(&random, 20);
    x.most = kind == 0 ? 40000 / SLOW : kind < 4 ? 3000 : kind < 12 ? 200 : below(&random, 17);
    return x;
}

static const struct exchange usual = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclBfloat16, .most = 100};

static inline bool all_agree(struct side *s, bool mine)
{
    int v = mine;
    AT("the all-reduce after exchange %llu of communicator %llu", (unsigned long long)s->number,
       (unsigned long long)s->tag);
    NCCL(ncclAllReduce(&v, &v, 1, ncclInt, ncclMin, s->comm, s->stream));
    return v;
}

/** Exchanges until all ranks have been engaged for three in a row; fails, or returns false if `must` is not set, after
 * a while. */
static inline bool engage(struct side *s, bool must, double seconds)
{
    uint64_t began = ry_now_ns();
    int row = 0;
    while (row < 3) {
        bool late = seconds_since(began) > seconds * SLOW * (must ? 10 : 1) || s->number > MOST_EXCHANGES - 500;
        row = all_agree(s, exchange(s, &usual)) ? row + 1 : 0;
        if (!all_agree(s, !late)) {
            CHECK(!must, "communicator %llu is not engaged after %llu exchanges in %.1f s", (unsigned long long)s->tag,
                  (unsigned long long)s->number, seconds_since(began));
            return false;
        }
        if (!row)
            usleep(500);
    }
    s->engaged_at = s->number;
    s->engaged_by = s->reissued;
    return true;
}

/** All ranks went the same way, each time. */
static inline void compare_ways(struct side *s)
{
    unsigned char *all = malloc((size_t)s->n * MOST_EXCHANGES);
    CHECK(all && s->number <= MOST_EXCHANGES, "too many exchanges to remember");
    AT("comparing ways of communicator %llu", (unsigned long long)s->tag);
    NCCL(ncclAllGather(s->way, all, MOST_EXCHANGES, ncclUint8, s->comm, s->stream));
    for (int p = 0; p < s->n; p++)
        for (uint64_t i = 0; i < s->number; i++)
            CHECK(all[(size_t)p * MOST_EXCHANGES + i] == s->way[i], "exchange %llu went %c here and %c on rank %d",
                  (unsigned long long)i, s->way[i], all[(size_t)p * MOST_EXCHANGES + i], p);
    free(all);
}

static struct side *kept[64]; /* for ranks that exit in the middle: no leaks */

/** What the driver looks for: what became of the exchanges since engage(). */
static inline void print_result(const struct side *s)
{
    printf("communicator %llu: %llu exchanges, %llu reissued\n", (unsigned long long)s->tag,
           (unsigned long long)(s->number - s->engaged_at), (unsigned long long)(s->reissued - s->engaged_by));
}

static inline struct side *new_side(ncclComm_t comm, uint64_t tag)
{
    static int n;
    struct side *s = calloc(1, sizeof *s);
    CHECK(s, "no memory");
    kept[n++ % 64] = s;
    s->comm = comm;
    s->tag = tag;
    s->stream = (cudaStream_t)s; /* one of its own, as two threads that do the same in another order must have */
    NCCL(ncclCommCount(comm, &s->n));
    NCCL(ncclCommUserRank(comm, &s->rank));
    return s;
}

static inline void end_side(struct side *s)
{
    AT("the end of communicator %llu", (unsigned long long)s->tag);
    NCCL(ncclCommDestroy(s->comm));
    free(s);
}

#endif
