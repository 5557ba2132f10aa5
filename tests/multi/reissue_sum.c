/*
 * reissue_sum.c: dispatch and combine, the latter summed where it may be (RAILYARD_COMBINE): every element right.
 *
 * usage: reissue_sum CASE SHAPE [LAYERS [K [ROW]]]   SHAPE: a letter per rank, its node
 *
 * Tokens go to K experts each, two experts a rank; every expert sends a row of its own back. What comes back must be
 * either what was sent, everywhere and to the bit, or summed wherever dispatch was packed: the sum, added in fp32 in
 * order of rank and position and rounded once, in the place of a token's first row of a node, zeros in the others; and
 * on all ranks the same of the two, where all look for equal rows. The driver (reissue_test.py) reads how many were
 * summed, and what crossed nodes.
 */
#include <math.h>

#include "plan/plan.h"
#include "reissue.h"

#define EXPERTS 2 /* of a rank */
#define MOST_TOKENS 64
#define MOST_COPIES 8

static int layers = 20, copies = 3;
static unsigned row = 96; /* elements */
static const char *shape;
static bool forced =
    true; /* to dedup: then every rank looks for equal rows; else those who do not get theirs unsummed */

enum odd { NOTHING_ODD, TWINS, MANY_TWINS, ZERO_ROW, DROPS, UNEQUAL_K, EQUAL_SPLITS, IDLE_RANK };

struct layer {
    uint64_t seed;
    int k;
    enum odd odd;
    ncclDataType_t there, back; /* types */
    int tokens[64];             /* of each rank */
};

/* One row: token t of rank s, expert e. Rows from s to a rank are in order of expert, then token. */
struct entry {
    int t, e;
};
struct segment {
    int n;
    struct entry of[EXPERTS * MOST_TOKENS];
};

static struct {
    uint64_t made, engine, summed, plain, sent;
} seen;

static struct layer make_layer(const struct side *s, uint64_t seed, enum odd odd, ncclDataType_t type)
{
    struct layer l = {.seed = mix(seed * 77 + s->tag), .k = copies, .odd = odd, .there = type, .back = type};
    for (int r = 0; r < s->n; r++)
        l.tokens[r] =
            odd == EQUAL_SPLITS ? 2 * EXPERTS * s->n : 20 + (int)(mix(l.seed + (uint64_t)r) % (MOST_TOKENS - 20));
    if (odd == IDLE_RANK)
        l.tokens[s->n - 1] = 0;
    return l;
}

static int copies_of(const struct layer *l, int s)
{
    return l->odd == UNEQUAL_K && s == 0 ? l->k + 1 : l->k;
}

/* The experts of token t of rank s; -1: dropped. */
static void experts_of(const struct side *side, const struct layer *l, int s, int t, int *out)
{
    int n = EXPERTS * side->n, all[EXPERTS * 64], k = copies_of(l, s);
    uint64_t random = mix(l->seed + (uint64_t)s * 1009 + (uint64_t)t);
    for (int i = 0; i < n; i++)
        all[i] = i;
    for (int i = 0; i < k; i++) {
        int j = i + (int)below(&random, (unsigned)(n - i)), x = all[i];
        all[i] = all[j];
        all[j] = x;
        out[i] = l->odd == EQUAL_SPLITS ? (t + i * (n / k)) % n : all[i];
    }
    if (l->odd == DROPS && s == 1 && t == 3)
        out[0] = -1;
}

static void segment_of(const struct side *side, const struct layer *l, int from, int to, struct segment *out)
{
    out->n = 0;
    for (int e = to * EXPERTS; e < (to + 1) * EXPERTS; e++)
        for (int t = 0; t < l->tokens[from]; t++) {
            int experts[MOST_COPIES + 1];
            experts_of(side, l, from, t, experts);
            for (int i = 0; i < copies_of(l, from); i++)
                if (experts[i] == e)
                    out->of[out->n++] = (struct entry){t, e};
        }
}

/* ---- values ---- */

static void put(ncclDataType_t type, void *to, size_t k, float v)
{
    uint32_t bits;
    memcpy(&bits, &v, 4);
    if (type == ncclFloat32)
        ((float *)to)[k] = v;
    else if (type == ncclFloat16)
        ((_Float16 *)to)[k] = (_Float16)v;
    else if (type == ncclBfloat16)
        ((uint16_t *)to)[k] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest, ties to even */
    else
        ((int8_t *)to)[k] = (int8_t)(v * 32);
}

static float get(ncclDataType_t type, const void *from, size_t k)
{
    if (type == ncclFloat32)
        return ((const float *)from)[k];
    if (type == ncclFloat16)
        return (float)((const _Float16 *)from)[k];
    if (type == ncclBfloat16) {
        uint32_t bits = (uint32_t)((const uint16_t *)from)[k] << 16;
        float v;
        memcpy(&v, &bits, 4);
        return v;
    }
    return ((const int8_t *)from)[k];
}

/* In (-2, 2), never 0. */
static float value(uint64_t key, size_t k)
{
    return ((float)(mix(key + k) >> 40) + 0.5f) / (float)(1 << 22) - 2;
}

/* Tokens of rank `s` with the same bytes: none of their rows is ever part of a sum. */
static bool is_twin(const struct layer *l, int s, int t)
{
    return (l->odd == TWINS || l->odd == MANY_TWINS) && s == 0 && (t == 5 || t == 7 || (l->odd == MANY_TWINS && t > 5));
}

static void token_row(const struct layer *l, int s, int t, unsigned char *to)
{
    if (is_twin(l, s, t))
        t = 5;
    for (unsigned k = 0; k < row; k++)
        put(l->there, to, k,
            l->odd == ZERO_ROW && s == 1 && t == 4 ? 0 : value(l->seed ^ mix((uint64_t)(s * 1000 + t)), k));
}

static void expert_row(const struct layer *l, int s, struct entry of, unsigned char *to)
{
    for (unsigned k = 0; k < row; k++)
        put(l->back, to, k, value(l->seed ^ mix((uint64_t)(s * 1000 + of.t) * 4099 + (uint64_t)of.e + 1), k));
}

/* ---- exchanges ---- */

struct transfer {
    unsigned char *send, *recv;
    size_t send_at[64], recv_at[64], to[64], from[64]; /* rows */
    bool engine;
    uint64_t plain, sent; /* bytes to other nodes: as they are, as they went */
};

/* The rows of `l`, `bytes` each, there or back. */
static void prepare(const struct side *s, const struct layer *l, bool back, size_t bytes, struct transfer *x)
{
    struct segment seg;
    size_t send = 0, recv = 0;
    *x = (struct transfer){0};
    for (int p = 0; p < s->n; p++) {
        segment_of(s, l, back ? p : s->rank, back ? s->rank : p, &seg);
        x->to[p] = (size_t)seg.n;
        segment_of(s, l, back ? s->rank : p, back ? p : s->rank, &seg);
        x->from[p] = (size_t)seg.n;
        x->send_at[p] = send;
        x->recv_at[p] = recv;
        send += x->to[p] * bytes;
        recv += x->from[p] * bytes;
    }
    x->send = malloc(send + 16);
    x->recv = malloc(recv + 16);
    CHECK(x->send && x->recv, "no memory");
    memset(x->recv, GUARD, recv + 16);
}

static void make(struct side *s, struct transfer *x, ncclDataType_t type, size_t elems)
{
    struct buffers b = {.number = s->number++};
    AT("exchange %llu of communicator %llu", (unsigned long long)b.number, (unsigned long long)s->tag);
    watch_way(s);
    NCCL(ncclGroupStart());
    for (int p = 0; p < s->n; p++) {
        NCCL(ncclSend(x->send + x->send_at[p], x->to[p] * elems, type, p, s->comm, s->stream));
        NCCL(ncclRecv(x->recv + x->recv_at[p], x->from[p] * elems, type, p, s->comm, s->stream));
    }
    NCCL(ncclGroupEnd());
    note_way(s, &b, ncclSuccess);
    x->engine = s->way[b.number] == 'e';
    for (int p = 0; p < s->n; p++)
        if (shape[p] != shape[s->rank]) {
            x->plain += x->to[p] * elems * type_bytes(type);
            x->sent += meddle_counts.sent[p];
        }
}

static void end(struct transfer *x)
{
    free(x->send);
    free(x->recv);
}

static void dispatch(struct side *s, const struct layer *l)
{
    struct transfer x;
    struct segment seg;
    size_t bytes = row * (size_t)type_bytes(l->there);
    unsigned char wanted[4 * 4096];
    prepare(s, l, false, bytes, &x);
    for (int p = 0; p < s->n; p++) {
        segment_of(s, l, s->rank, p, &seg);
        for (int i = 0; i < seg.n; i++)
            token_row(l, s->rank, seg.of[i].t, x.send + x.send_at[p] + (size_t)i * bytes);
    }
    make(s, &x, l->there, row);
    for (int p = 0; p < s->n; p++) {
        segment_of(s, l, p, s->rank, &seg);
        for (int i = 0; i < seg.n; i++) {
            token_row(l, p, seg.of[i].t, wanted);
            CHECK(!memcmp(x.recv + x.recv_at[p] + (size_t)i * bytes, wanted, bytes),
                  "exchange %llu: row %d from rank %d is wrong", (unsigned long long)s->number - 1, i, p);
        }
    }
    end(&x);
}

/* One number a row: what tells how wide the rows are. Or what goes with them, the other way, in the backward pass. */
static void probabilities(struct side *s, const struct layer *l, bool back)
{
    struct transfer x;
    prepare(s, l, back, 4, &x);
    for (int p = 0; p < s->n; p++)
        for (size_t i = 0; i < x.to[p]; i++)
            ((float *)(x.send + x.send_at[p]))[i] = value(l->seed + (uint64_t)(s->rank * 64 + p), i);
    make(s, &x, ncclFloat32, 1);
    for (int p = 0; p < s->n; p++)
        for (size_t i = 0; i < x.from[p]; i++)
            CHECK(((float *)(x.recv + x.recv_at[p]))[i] == value(l->seed + (uint64_t)(p * 64 + s->rank), i),
                  "exchange %llu: number %zu from rank %d is wrong", (unsigned long long)s->number - 1, i, p);
    end(&x);
}

/* ---- what came back ---- */

struct came {
    bool exact, summed; /* all of it could be */
};

/* The rows of one token, of which row i is the first: what their sum is to be. Whatever came in their place must add up
   to the same, but for the rounding of one value. */
static void add_token(const struct side *s, const struct layer *l, const struct entry *of,
                      const unsigned char *const *at, int i, int n, unsigned char *sum)
{
    float add[4096];
    unsigned char wanted[4 * 4096];
    double all = 0, size = 0, got = 0;
    for (int j = i; j < n; j++) {
        if (of[j].t != of[i].t)
            continue;
        expert_row(l, s->rank, of[j], wanted);
        for (unsigned k = 0; k < row; k++)
            add[k] = j == i ? get(l->back, wanted, k) : add[k] + get(l->back, wanted, k);
        all += get(l->back, wanted, 0);
        size += fabs(get(l->back, wanted, 0));
        got += get(l->back, at[j], 0);
    }
    for (unsigned k = 0; k < row; k++)
        put(l->back, sum, k, add[k]);
    CHECK(fabs(all - got) <= size * (l->back == ncclBfloat16 ? 1 / 256.0 : 1 / 2048.0),
          "exchange %llu: the rows of token %d add up to %g, not %g", (unsigned long long)s->number - 1, of[i].t, got,
          all);
}

/* All rows that come from one node. */
static void check_node(const struct side *s, const struct layer *l, const struct transfer *x, char node,
                       struct came *came)
{
    enum { MOST = 64 * EXPERTS * MOST_TOKENS };
    static _Thread_local struct entry of[MOST];
    static _Thread_local const unsigned char *at[MOST];
    struct segment seg;
    size_t bytes = row * (size_t)type_bytes(l->back);
    unsigned char wanted[4 * 4096], sum[4 * 4096];
    bool exact = true, summed = true, other = node != shape[s->rank], seen_token[MOST_TOKENS] = {false};
    int n = 0, distinct = 0;
    for (int p = 0; p < s->n; p++) {
        if (shape[p] != node)
            continue;
        segment_of(s, l, s->rank, p, &seg);
        for (int i = 0; i < seg.n; i++) {
            at[n] = x->recv + x->recv_at[p] + (size_t)i * bytes;
            of[n++] = seg.of[i];
        }
    }
    for (int i = 0; i < n; i++) {
        expert_row(l, s->rank, of[i], wanted);
        exact &= !memcmp(at[i], wanted, bytes);
        bool first = !seen_token[of[i].t];
        seen_token[of[i].t] = true;
        if (is_twin(l, s->rank, of[i].t)) { /* as it was sent */
            memcpy(sum, wanted, bytes);
            distinct++;
        } else {
            distinct += first;
            memset(sum, 0, bytes);
            if (first)
                add_token(s, l, of, at, i, n, sum);
        }
        summed &= !memcmp(at[i], sum, bytes);
    }
    bool packs = other && ry_packs((struct ry_repeats){.row_bytes = bytes, .distinct = (uint64_t)distinct}, (uint64_t)n,
                                   (uint64_t)n * bytes);
    CHECK(exact || (packs && summed), "exchange %llu: %d rows from node %c are neither what was sent nor summed (%s)",
          (unsigned long long)s->number - 1, n, node, packs ? "packed" : "not packed");
    if (packs) {
        came->exact &= exact;
        came->summed &= summed;
    }
}

/* True: it was summed. */
static bool combine(struct side *s, const struct layer *l)
{
    struct transfer x;
    struct segment seg;
    struct came came = {true, true};
    size_t bytes = row * (size_t)type_bytes(l->back);
    prepare(s, l, true, bytes, &x);
    for (int p = 0; p < s->n; p++) {
        segment_of(s, l, p, s->rank, &seg);
        for (int i = 0; i < seg.n; i++)
            expert_row(l, p, seg.of[i], x.send + x.send_at[p] + (size_t)i * bytes);
    }
    make(s, &x, l->back, row);
    for (const char *node = shape; *node; node++)
        if (strchr(shape, *node) == node)
            check_node(s, l, &x, *node, &came);
    end(&x);
    CHECK(came.exact || came.summed, "exchange %llu is summed in part", (unsigned long long)s->number - 1);
    bool exact = all_agree(s, came.exact), summed = all_agree(s, came.summed);
    CHECK(exact || summed || !forced, "exchange %llu is summed on some ranks", (unsigned long long)s->number - 1);
    summed = !exact;
    seen.made++;
    seen.engine += x.engine;
    seen.summed += summed;
    seen.plain += x.plain;
    seen.sent += x.engine ? x.sent : x.plain;
    return summed;
}

static void result(struct side *s)
{
    unsigned long long mine[5] = {seen.made, seen.engine, seen.summed, seen.plain, seen.sent}, all[5];
    compare_ways(s);
    NCCL(ncclAllReduce(mine, all, 5, ncclUint64, ncclSum, s->comm, s->stream));
    if (s->rank == 0) {
        printf("back: %llu exchanges, %llu summed, %llu bytes crossed as %llu\n", mine[0], mine[2], all[3], all[4]);
        print_result(s);
    }
}

/* ---- cases ---- */

static struct side *begin(void)
{
    struct side *s = new_side(world_comm(), 1);
    engage(s, true, 6);
    return s;
}

static void finish(struct side *s)
{
    result(s);
    end_side(s);
}

static const ncclDataType_t types[] = {ncclBfloat16, ncclFloat32, ncclFloat16};

static void one(struct side *s, const struct layer *l)
{
    dispatch(s, l);
    probabilities(s, l, false);
    combine(s, l);
}

/* Forward and backward: gradients of combine go out equal, those of dispatch come back. */
static void loop(void)
{
    struct side *s = begin();
    for (int i = 0; i < layers; i++) {
        struct layer l = make_layer(s, (uint64_t)i, NOTHING_ODD, types[i % 3]), g = l;
        one(s, &l);
        g.seed ^= 1; /* other values, but as tokens are routed by the seed, other splits, too */
        dispatch(s, &g);
        probabilities(s, &g, true);
        combine(s, &g);
    }
    finish(s);
}

/* As it comes: the engine is to find out by itself. */
static void by_itself(void)
{
    struct side *s = new_side(world_comm(), 1);
    forced = false;
    for (int i = 0; i < 2 * layers; i++) {
        struct layer l = make_layer(s, (uint64_t)i, NOTHING_ODD, types[i % 3]);
        if (i == layers)
            memset(&seen, 0, sizeof seen); /* what was learned holds from here on */
        one(s, &l);
    }
    finish(s);
}

/* Something is odd about one in `every` layers, at which nothing (TWINS: nothing of theirs) may be summed; the others go on as before. */
static void odd(enum odd what, int every)
{
    struct side *s = begin();
    for (int i = 0; i < layers; i++) {
        struct layer l = make_layer(s, (uint64_t)i, (i + 1) % every ? NOTHING_ODD : what, types[i / 2 % 3]);
        dispatch(s, &l);
        probabilities(s, &l, false);
        bool summed = combine(s, &l);
        CHECK(!summed || l.odd == NOTHING_ODD || l.odd == TWINS || l.odd == IDLE_RANK, "layer %d was summed", i);
    }
    finish(s);
}

static void twins(void)
{
    odd(TWINS, 2);
}

static void many_twins(void)
{
    odd(MANY_TWINS, 2);
}

static void zeros(void)
{
    odd(ZERO_ROW, 2);
}

static void drops(void)
{
    odd(DROPS, 2);
}

static void unequal(void)
{
    odd(UNEQUAL_K, 1);
}

static void equal_splits(void)
{
    odd(EQUAL_SPLITS, 2);
}

/* A rank sends nothing at all, but gets its rows to work on. */
static void idle(void)
{
    odd(IDLE_RANK, 2);
}

static void other_types(void)
{
    struct side *s = begin();
    for (int i = 0; i < layers; i++) {
        struct layer l = make_layer(s, (uint64_t)i, NOTHING_ODD, i % 2 ? ncclInt8 : ncclBfloat16);
        if (i % 4 == 2)
            l.back = ncclFloat16;
        bool may = i % 4 == 0;
        dispatch(s, &l);
        bool summed = combine(s, &l);
        CHECK(may || !summed, "layer %d was summed", i);
    }
    finish(s);
}

/* Two layers under way at a time: of other splits, or of the same, which nobody can tell apart; or of equal splits,
   where the second looks like the return of the first. */
static void nested(void)
{
    struct side *s = begin();
    for (int i = 0; i < layers; i++) {
        enum odd what = i % 4 == 3 ? EQUAL_SPLITS : NOTHING_ODD;
        struct layer a = make_layer(s, (uint64_t)(2 * i), what, types[i % 3]);
        struct layer b = i % 4 == 1 ? a : make_layer(s, (uint64_t)(2 * i + 1), what, types[i % 3]);
        dispatch(s, &a);
        dispatch(s, &b);
        if (i % 4 < 2) {
            combine(s, &b);
            combine(s, &a);
        } else {
            combine(s, &a);
            combine(s, &b);
        }
    }
    finish(s);
}

/* Most of what goes out is never answered. */
static void unanswered(void)
{
    struct side *s = begin();
    for (int i = 0; i < layers; i++) {
        struct layer first = make_layer(s, (uint64_t)(1000 * i), NOTHING_ODD, types[i % 3]);
        dispatch(s, &first);
        probabilities(s, &first, false);
        for (int k = 1; k < 1 + i % 12; k++) {
            struct layer l = make_layer(s, (uint64_t)(1000 * i + k), NOTHING_ODD, types[i % 3]);
            dispatch(s, &l);
        }
        bool summed = combine(s, &first);
        CHECK(!summed || i % 12 < 8, "layer %d with %d others before its return was summed", i, i % 12);
    }
    finish(s);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"loop", loop},         {"by_itself", by_itself}, {"twins", twins},          {"many_twins", many_twins}, {"zeros", zeros},
                 {"drops", drops},       {"unequal", unequal},     {"equal", equal_splits},   {"idle", idle},
                 {"types", other_types}, {"nested", nested},       {"unanswered", unanswered}};
    start_reissue(25);
    CHECK(argc >= 3, "which case, which shape?");
    take_shape(shape = argv[2]);
    if (argc > 3)
        layers = atoi(argv[3]);
    if (argc > 4)
        copies = atoi(argv[4]);
    if (argc > 5)
        row = (unsigned)atoi(argv[5]);
    CHECK(copies <= MOST_COPIES && row <= 4096, "too many");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(argv[1], cases[i].name))
            return cases[i].run(), 0;
    CHECK(0, "no case %s", argv[1]);
}
