/*
 * reissue_redirect.c: exchanges whose rows go elsewhere than the calls say (railyard_redirect()): samples of an MoE
 * layer that change ranks in combine, and their gradients on the mirrored way, every byte right.
 *
 * usage: reissue_redirect CASE SHAPE [LAYERS [K [ROW]]]   SHAPE: a letter per rank, its node
 *
 * A rank has SAMPLES samples of TOKENS tokens, position by position (token = position * SAMPLES + sample), each of
 * which goes to K experts, EXPERTS to a rank. Rows between two ranks are in order of expert, then token, as
 * Megatron-core has them. What is asked for is made by sorting tokens, as the adapter does; what is expected is worked
 * out from the routing alone: the r-th row (by expert) of a token that moved is where the r-th row of the token was
 * whose place it takes.
 */
#include "railyard.h"
#include "reissue.h"

#define SAMPLES 3
#define TOKENS 5
#define EXPERTS 2
#define ALL (SAMPLES * TOKENS) /* tokens of a rank */
#define MOST_K 6
#define MOST_RANKS 8
#define MOST_ROWS (ALL * MOST_K * MOST_RANKS)

static int layers = 40, copies = 3;
static unsigned row = 96; /* bytes */
static bool copied;       /* gradients as a sum's are; else of each row its own, so that any mistake shows */

/* Of one layer: known to all ranks. */
static struct {
    uint64_t seed;
    int n;                                /* ranks */
    int experts[MOST_RANKS][ALL][MOST_K]; /* ascending */
    int from[MOST_RANKS * SAMPLES];       /* the slot where the sample of each slot was */
    int to[MOST_RANKS * SAMPLES];
} layer;

static struct {
    uint64_t made, moved;
} seen;

/* A row of a combine: token t of rank a, from expert e of rank e / EXPERTS; `r`: its token's r-th. */
struct entry {
    int a, t, e, r;
};
struct list {
    int n;
    struct entry of[MOST_ROWS];
};

enum kind { DISPATCH, RESULT, GRADIENT, DISPATCH_GRADIENT };
enum moves { NOBODY, ANYWHERE, WITHIN_RANKS };

static void make_layer(struct side *s, uint64_t number, enum moves moves)
{
    uint64_t random = mix(number * 7919 + s->tag);
    layer.seed = random;
    layer.n = s->n;
    for (int a = 0; a < s->n; a++)
        for (int t = 0; t < ALL; t++) {
            bool used[EXPERTS * MOST_RANKS] = {false};
            /* samples prefer some ranks, and sometimes nobody goes somewhere */
            int base = (int)(mix(layer.seed + (uint64_t)(a * SAMPLES + t % SAMPLES)) % (unsigned)s->n) * EXPERTS;
            for (int k = 0; k < copies; k++) {
                int e;
                do
                    e = (base + (below(&random, 3) ? (int)below(&random, (unsigned)copies + 1)
                                                   : (int)below(&random, (unsigned)(EXPERTS * s->n)))) %
                        (EXPERTS * s->n);
                while (used[e]);
                used[e] = true;
            }
            for (int e = 0, k = 0; e < EXPERTS * s->n; e++)
                if (used[e])
                    layer.experts[a][t][k++] = e;
        }
    int slots = s->n * SAMPLES;
    for (int i = 0; i < slots; i++)
        layer.from[i] = i;
    for (int i = slots - 1; i > 0 && moves != NOBODY; i--) {
        int low = moves == WITHIN_RANKS ? i / SAMPLES * SAMPLES : 0,
            j = low + (int)below(&random, (unsigned)(i - low + 1)), x = layer.from[i];
        layer.from[i] = layer.from[j];
        layer.from[j] = x;
    }
    for (int i = 0; i < slots; i++)
        layer.to[layer.from[i]] = i;
}

static int slot_of(int a, int t)
{
    return a * SAMPLES + t % SAMPLES;
}

/* Rows between expert rank e and rank a, appended. */
static void rows_between(int e, int a, struct list *l)
{
    for (int x = e * EXPERTS; x < (e + 1) * EXPERTS; x++)
        for (int t = 0; t < ALL; t++)
            for (int r = 0; r < copies; r++)
                if (layer.experts[a][t][r] == x)
                    l->of[l->n++] = (struct entry){a, t, x, r};
}

/* As the job has them: those that a combine sends from this rank, or gives to it. count[p]: of each peer. */
static void rows_of(int rank, bool sends, struct list *l, uint64_t *count)
{
    l->n = 0;
    for (int p = 0; p < layer.n; p++) {
        int before = l->n;
        rows_between(sends ? rank : p, sends ? p : rank, l);
        count[p] = (uint64_t)(l->n - before);
    }
}

/* The token, at its new home, of what was token t of rank a; *c: there. */
static int moved_to(int a, int t, int *c)
{
    int slot = layer.to[slot_of(a, t)];
    *c = slot / SAMPLES;
    return t / SAMPLES * SAMPLES + slot % SAMPLES;
}

static int moved_from(int c, int t, int *a)
{
    int slot = layer.from[slot_of(c, t)];
    *a = slot / SAMPLES;
    return t / SAMPLES * SAMPLES + slot % SAMPLES;
}

/* ---- bytes ---- */

static void fill(enum kind kind, struct entry x, unsigned char *to)
{
    bool copy = kind == DISPATCH || (kind == GRADIENT && copied); /* a token's rows are equal */
    uint64_t key = mix(layer.seed * 5 + kind) + mix((uint64_t)(x.a * 1000 + x.t) * 64 + (uint64_t)(copy ? 63 : x.e));
    for (unsigned k = 0; k < row; k++)
        to[k] = content(key, k);
}

/* What is sent, or room. */
static unsigned char *buffer(const struct list *l, enum kind kind, bool filled)
{
    unsigned char *b = malloc((size_t)l->n * row + 1);
    CHECK(b, "no memory");
    memset(b, GUARD, (size_t)l->n * row + 1);
    for (int i = 0; filled && i < l->n; i++)
        fill(kind, l->of[i], b + (size_t)i * row);
    return b;
}

static void check_row(const char *what, enum kind kind, int i, struct entry at, struct entry wanted,
                      const unsigned char *b)
{
    unsigned char is[4096];
    fill(kind, wanted, is);
    CHECK(!memcmp(b + (size_t)i * row, is, row),
          "layer %llu, %s: row %d (rank %d, token %d, expert %d) is not that of rank %d, token %d, expert %d",
          (unsigned long long)seen.made, what, i, at.a, at.t, at.e, wanted.a, wanted.t, wanted.e);
}

static ncclResult_t go(struct side *s, const unsigned char *send, const uint64_t *sends, unsigned char *recv,
                       const uint64_t *receives)
{
    static unsigned char out[4 * MOST_ROWS * 1100], in[4 * MOST_ROWS * 1100];
    size_t gap = seen.made % 3 == 1 ? 6 : 0, at = 0, to = 0; /* or segment behind segment, as frameworks do */
    AT("layer %llu", (unsigned long long)seen.made);
    NCCL(ncclGroupStart());
    for (int p = 0; p < s->n; p++) {
        size_t bytes = sends[p] * row, room = receives[p] * row;
        CHECK(at + bytes + gap < sizeof out && to + room + gap < sizeof in, "too much");
        memcpy(out + at, send, bytes);
        memset(in + to, GUARD, room + gap + 1);
        NCCL(ncclSend(out + at, bytes / 2, ncclFloat16, p, s->comm, s->stream));
        NCCL(ncclRecv(in + to, room / 2, ncclFloat16, p, s->comm, s->stream));
        send += bytes, at += bytes + gap, to += room + gap;
    }
    ncclResult_t r = ncclGroupEnd();
    railyard_emu_synchronize(s->stream); /* with RAILYARD_HOLD=no the call has returned before it is done */
    s->number++;
    to = 0;
    for (int p = 0; p < s->n; p++) {
        size_t room = receives[p] * row;
        memcpy(recv, in + to, room);
        for (size_t k = 0; k < gap; k++)
            CHECK(in[to + room + k] == GUARD, "written behind segment %d", p);
        recv += room, to += room + gap;
    }
    CHECK(in[to] == GUARD, "written behind the buffer");
    return r;
}

/* ---- what is asked for ---- */

struct way {
    uint64_t goes[MOST_RANKS], comes[MOST_RANKS];
    uint32_t send_from[MOST_ROWS], recv_from[MOST_ROWS]; /* combine */
    uint32_t back_from[MOST_ROWS], back_to[MOST_ROWS];   /* its gradient */
};

/* Rows 0 … n - 1 in order of their keys, equal ones as they were. */
static void sort_by(const int *key, int n, int keys, uint32_t *out)
{
    for (int k = 0, at = 0; k < keys; k++)
        for (int i = 0; i < n; i++)
            if (key[i] == k)
                out[at++] = (uint32_t)i;
}

/* This rank's lists, as the adapter makes them: by tokens alone, that of each row sent being told to who gets it. */
static void make_way(int rank, const struct list *mine, const struct list *got, struct way *w)
{
    static int key[MOST_ROWS], token[MOST_ROWS];
    static uint32_t arrived[MOST_ROWS], position[MOST_ROWS];
    memset(w, 0, sizeof *w);
    for (int i = 0; i < mine->n; i++) {
        moved_to(mine->of[i].a, mine->of[i].t, &key[i]);
        w->goes[key[i]]++;
    }
    sort_by(key, mine->n, layer.n, w->send_from);
    /* what comes: from each e the rows that it sends here, in its order */
    int n = 0;
    for (int e = 0; e < layer.n; e++) {
        static struct list theirs;
        theirs.n = 0;
        for (int a = 0; a < layer.n; a++)
            rows_between(e, a, &theirs);
        for (int i = 0; i < theirs.n; i++) {
            int c, t = moved_to(theirs.of[i].a, theirs.of[i].t, &c);
            if (c == rank)
                token[n++] = t, w->comes[e]++;
        }
    }
    CHECK(n == got->n, "%d rows come instead of %d", n, got->n);
    sort_by(token, n, ALL, arrived);
    for (int i = 0; i < n; i++)
        key[i] = got->of[i].t;
    sort_by(key, n, ALL, position);
    for (int i = 0; i < n; i++)
        w->recv_from[position[i]] = arrived[i];
    for (int i = 0; i < n; i++)
        w->back_from[w->recv_from[i]] = (uint32_t)i;
    for (int i = 0; i < mine->n; i++)
        w->back_to[w->send_from[i]] = (uint32_t)i;
}

static int ask(struct side *s, const uint64_t *sends, const uint64_t *receives, const uint64_t *goes,
               const uint64_t *comes, const uint32_t *send_from, const uint32_t *recv_from)
{
    struct railyard_redirect how = {.size = sizeof how,
                                    .nranks = s->n,
                                    .row_bytes = row,
                                    .sends = sends,
                                    .receives = receives,
                                    .goes = goes,
                                    .comes = comes,
                                    .send_from = send_from,
                                    .recv_from = recv_from};
    return railyard_redirect(s->comm, &how);
}

static int ready(const struct side *s, const struct list *a, const struct list *b)
{
    uint64_t rows = (uint64_t)(a->n > b->n ? a->n : b->n);
    return railyard_redirect_ready(s->comm, rows * row, rows, s->stream);
}

/* ---- a layer ---- */

static void one_layer(struct side *s, enum moves moves, bool dispatched)
{
    static struct list mine, got; /* rows of this rank's experts; of this rank's tokens */
    static struct way w;
    uint64_t sends[MOST_RANKS], receives[MOST_RANKS];
    bool moved = moves != NOBODY;
    make_layer(s, seen.made, moves);
    rows_of(s->rank, true, &mine, sends);
    rows_of(s->rank, false, &got, receives);
    if (dispatched) {
        unsigned char *out = buffer(&got, DISPATCH, true), *in = buffer(&mine, DISPATCH, false);
        NCCL(go(s, out, receives, in, sends));
        for (int i = 0; i < mine.n; i++)
            check_row("dispatch", DISPATCH, i, mine.of[i], mine.of[i], in);
        const void *comm;
        int32_t nranks, rank;
        uint64_t number = railyard_latest_exchange(&comm, &nranks, &rank);
        CHECK(number == s->number && comm == s->comm && nranks == s->n && rank == s->rank,
              "the latest exchange, %llu, was another", (unsigned long long)number);
        free(out);
        free(in);
    }
    moved = moved && all_agree(s, !ready(s, &mine, &got)); /* not before the ranks have met */
    if (moved) {
        make_way(s->rank, &mine, &got, &w);
        CHECK(!ask(s, sends, receives, w.goes, w.comes, w.send_from, w.recv_from), "refused");
    }
    unsigned char *out = buffer(&mine, RESULT, true), *in = buffer(&got, RESULT, false);
    NCCL(go(s, out, sends, in, receives));
    CHECK(!railyard_redirect_done(s->comm) == moved, "combine was %s", moved ? "not redirected" : "redirected");
    for (int i = 0; i < got.n; i++) {
        struct entry x = got.of[i], from = x;
        from.t = moved_from(x.a, x.t, &from.a);
        from.e = layer.experts[from.a][from.t][x.r];
        check_row("combine", RESULT, i, x, moved ? from : x, in);
    }
    free(out);
    free(in);

    if (moved)
        CHECK(!ask(s, receives, sends, w.comes, w.goes, w.back_from, w.back_to), "refused");
    out = buffer(&got, GRADIENT, true), in = buffer(&mine, GRADIENT, false);
    NCCL(go(s, out, receives, in, sends));
    CHECK(!railyard_redirect_done(s->comm) == moved, "combine's gradient was %s",
          moved ? "not redirected" : "redirected");
    for (int i = 0; i < mine.n; i++) {
        struct entry x = mine.of[i], at = x;
        at.t = moved_to(x.a, x.t, &at.a);
        at.e = layer.experts[at.a][at.t][x.r];
        check_row("combine's gradient", GRADIENT, i, x, moved ? at : x, in);
    }
    free(out);
    free(in);
    if (dispatched) {
        out = buffer(&mine, DISPATCH_GRADIENT, true), in = buffer(&got, DISPATCH_GRADIENT, false);
        NCCL(go(s, out, sends, in, receives));
        for (int i = 0; i < got.n; i++)
            check_row("dispatch's gradient", DISPATCH_GRADIENT, i, got.of[i], got.of[i], in);
        free(out);
        free(in);
    }
    seen.made++;
    seen.moved += moved;
}

static void result(struct side *s)
{
    if (s->rank == 0)
        printf("%llu layers, %llu redirected\n", (unsigned long long)seen.made, (unsigned long long)seen.moved);
    end_side(s);
}

static enum moves any(const struct side *s)
{
    uint64_t random = mix(s->tag + seen.made * 31);
    unsigned one = below(&random, 5);
    return one == 0 ? NOBODY : one == 1 ? WITHIN_RANKS : ANYWHERE;
}

/* Layers at random. */
static void loop(bool engaged)
{
    struct side *s = new_side(world_comm(), 1);
    if (engaged)
        engage(s, true, 6);
    for (int i = 0; i < layers; i++)
        one_layer(s, any(s), i % 3 > 0);
    result(s);
}

static void engaged(void)
{
    loop(true);
}

/* From the first exchange on, agreed on or not. */
static void from_start(void)
{
    loop(false);
}

/* Only layers where somebody moves: nothing of them may be summed. */
static void only_moves(void)
{
    struct side *s = new_side(world_comm(), 1);
    engage(s, true, 6);
    for (int i = 0; i < layers; i++)
        copied = i % 4 < 3, one_layer(s, i % 2 ? WITHIN_RANKS : ANYWHERE, true);
    result(s);
}

/* Answers: no, where it cannot be. */
static void refused(void)
{
    static struct list mine, got;
    uint64_t sends[MOST_RANKS], receives[MOST_RANKS];
    struct side *s = new_side(world_comm(), 1);
    for (int i = 0; i < 20; i++)
        one_layer(s, NOBODY, true);
    rows_of(s->rank, true, &mine, sends);
    rows_of(s->rank, false, &got, receives);
    CHECK(ready(s, &mine, &got) == 1, "ready, although it cannot be");
    CHECK(ask(s, sends, receives, sends, receives, NULL, NULL) == -1, "accepted, although nobody was ready");
    CHECK(railyard_redirect_ready(NULL, 1, 1, NULL) == 1 && railyard_redirect_ready(s, 1, 1, NULL) == 1,
          "no communicator");
    one_layer(s, NOBODY, true);
    result(s);
}

/* An exchange of other counts than was said: it fails, on all ranks alike here, and the next one is as ever. Paused:
 * no. */
static void wrong(void)
{
    static struct list mine, got;
    static struct way w;
    uint64_t sends[MOST_RANKS], receives[MOST_RANKS];
    struct side *s = new_side(world_comm(), 1);
    const void *comm;
    int32_t n, rank;
    CHECK(!railyard_latest_exchange(&comm, &n, &rank) && !comm, "an exchange before the first");
    engage(s, true, 6);
    for (int i = 0; i < 8; i++)
        one_layer(s, any(s), true);
    make_layer(s, seen.made, ANYWHERE);
    rows_of(s->rank, true, &mine, sends);
    rows_of(s->rank, false, &got, receives);
    make_way(s->rank, &mine, &got, &w);
    CHECK(!ready(s, &mine, &got), "not ready");
    CHECK(railyard_redirect_done(s->comm) == -1, "nothing was asked for");
    unsigned char *out = buffer(&mine, RESULT, true), *in = buffer(&got, RESULT, false);
    sends[s->rank]++, receives[s->rank]++;
    CHECK(!ask(s, sends, receives, w.goes, w.comes, w.send_from, w.recv_from), "refused");
    sends[s->rank]--, receives[s->rank]--;
    CHECK(go(s, out, sends, in, receives) == ncclSystemError, "it went all the same");
    CHECK(railyard_redirect_done(s->comm) == -1, "it was carried out");
    CHECK(in[0] == GUARD, "something was received");
    free(out);
    free(in);
    NCCL(ncclAllReduce(&s->number, &s->number, 1, ncclUint64, ncclMax, s->comm, s->stream));
    for (int i = 0; i < 8; i++)
        one_layer(s, any(s), true);
    railyard_pause(1);
    CHECK(ready(s, &mine, &got) == 1, "ready, although it is paused");
    railyard_pause(0);
    one_layer(s, ANYWHERE, true);
    result(s);
}

/* Asked for, and then the job pauses Railyard: what was promised is done. */
static void paused(void)
{
    struct side *s = new_side(world_comm(), 1);
    static struct list mine, got;
    static struct way w;
    uint64_t sends[MOST_RANKS], receives[MOST_RANKS];
    engage(s, true, 6);
    for (int i = 0; i < layers; i++) {
        make_layer(s, seen.made, ANYWHERE);
        rows_of(s->rank, true, &mine, sends);
        rows_of(s->rank, false, &got, receives);
        make_way(s->rank, &mine, &got, &w);
        CHECK(!ready(s, &mine, &got), "not ready");
        railyard_pause(1);
        CHECK(!ask(s, sends, receives, w.goes, w.comes, w.send_from, w.recv_from), "refused");
        unsigned char *out = buffer(&mine, RESULT, true), *in = buffer(&got, RESULT, false);
        NCCL(go(s, out, sends, in, receives));
        CHECK(!railyard_redirect_done(s->comm), "not redirected");
        railyard_pause(0);
        for (int k = 0; k < got.n; k++) {
            struct entry x = got.of[k], from = x;
            from.t = moved_from(x.a, x.t, &from.a);
            from.e = layer.experts[from.a][from.t][x.r];
            check_row("combine", RESULT, k, x, from, in);
        }
        free(out);
        free(in);
        seen.made++, seen.moved++;
    }
    result(s);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"engaged", engaged}, {"from_start", from_start}, {"only_moves", only_moves},
                 {"refused", refused}, {"wrong", wrong},           {"paused", paused}};
    start_reissue(15);
    CHECK(argc >= 3 && strlen(argv[2]) <= MOST_RANKS, "which case, which shape?");
    take_shape(argv[2]);
    if (argc > 3)
        layers = atoi(argv[3]);
    if (argc > 4)
        copies = atoi(argv[4]);
    if (argc > 5)
        row = (unsigned)atoi(argv[5]);
    CHECK(copies <= MOST_K && row <= 4096, "too much");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(argv[1], cases[i].name))
            return cases[i].run(), 0;
    CHECK(0, "no case %s", argv[1]);
}
