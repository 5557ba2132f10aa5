/*
 * reissue_dedup.c: exchanges whose rows repeat: every byte right, and fewer of them across nodes.
 *
 * usage: reissue_dedup CASE SHAPE [NUMBER [TOKENS [ROWS [ROW]]]]   SHAPE: a letter per rank, its node
 * The driver (reissue_test.py) says which settings apply and reads what is printed: how many exchanges the engine did, and
 * what crossed nodes in them, per direction.
 */
#include "capture.h"
#include "reissue.h"

static int wanted = 40;
static unsigned tokens = 16, rows = 64, row = 512; /* a rank's different rows; rows of a segment at most; elements */
static const char *shape;

enum { GO, BACK, PROBABILITIES, KINDS };
static struct {
    uint64_t exchanges, engine, plain, sent; /* bytes of those that the engine did: as they are, as they crossed */
} seen[KINDS];

/* One exchange, and what it sent to other nodes. */
static bool counted(struct side *s, const struct exchange *x, int kind)
{
    uint64_t number = s->number, plain = 0, sent = 0;
    bool engine = exchange(s, x);
    for (int p = 0; p < s->n; p++) {
        if (shape[p] == shape[s->rank])
            continue;
        plain += elements(s, x, number, s->rank, p) * type_bytes(x->type);
        sent += meddle_counts.sent[p];
    }
    seen[kind].exchanges++;
    if (engine) {
        seen[kind].engine++;
        seen[kind].plain += plain;
        seen[kind].sent += sent;
    }
    return engine;
}

/* As Megatron does it: tokens, their probabilities, and the outputs back; the splits are others in each layer. */
static void layer(struct side *s, enum matrix matrix, unsigned zeros)
{
    struct exchange x = {.matrix = matrix,
                         .form = F_GROUP,
                         .type = ncclBfloat16,
                         .most = rows,
                         .row = row,
                         .tokens = tokens,
                         .zeros = zeros,
                         .like = s->number + 1};
    counted(s, &x, GO);
    struct exchange p = x;
    p.row = 0;
    p.type = ncclFloat;
    counted(s, &p, PROBABILITIES);
    x.back = true;
    x.tokens = 1u << 30; /* what comes back is all different */
    x.zeros = 0;
    counted(s, &x, BACK);
}

static void result(struct side *s)
{
    static const char *const names[] = {"go", "return", "probabilities"};
    compare_ways(s);
    for (int k = 0; k < KINDS; k++) {
        unsigned long long mine[4] = {seen[k].exchanges, seen[k].engine, seen[k].plain, seen[k].sent}, all[4];
        NCCL(ncclAllReduce(mine, all, 4, ncclUint64, ncclSum, s->comm, s->stream));
        if (s->rank == 0 && all[0])
            printf("%s: %llu of %llu by the engine, %llu bytes crossed as %llu\n", names[k], all[1], all[0], all[2], all[3]);
    }
    if (s->rank == 0)
        print_result(s);
}

/* Engaged from the beginning. */
static void forced(struct side *s)
{
    engage(s, true, 6);
}

static void loop(void)
{
    struct side *s = new_side(world_comm(), 1);
    forced(s);
    for (int i = 0; i < wanted; i++)
        layer(s, M_RANDOM, 0);
    result(s);
    end_side(s);
}

/* As it comes: the engine is to find out by itself. */
static void by_itself(void)
{
    struct side *s = new_side(world_comm(), 1);
    for (int i = 0; i < wanted; i++)
        layer(s, M_RANDOM, 0);
    memset(seen, 0, sizeof seen); /* what was learned holds from here on */
    for (int i = 0; i < wanted; i++)
        layer(s, M_RANDOM, 0);
    result(s);
    end_side(s);
}

/* Capacity: equal splits, most of it zeros. */
static void padding(void)
{
    struct side *s = new_side(world_comm(), 1);
    forced(s);
    tokens = 1u << 30;
    for (int i = 0; i < wanted; i++)
        layer(s, M_EQUAL, 60);
    result(s);
    end_side(s);
}

/* Rows whose width changes all the time, of all types, to ranks that get nothing, from segments that lie anywhere. */
static void widths(void)
{
    struct side *s = new_side(world_comm(), 1);
    forced(s);
    for (int i = 0; i < wanted; i++) {
        uint64_t random = mix(s->number * 77 + 5);
        struct exchange x = {.matrix = below(&random, M_NOTHING + 1),
                             .form = below(&random, F_ONE_CALL),
                             .type = below(&random, TYPES),
                             .most = 1 + below(&random, 200),
                             .row = 1 + below(&random, i % 3 ? 60 : 1500),
                             .tokens = 1 + below(&random, 40),
                             .zeros = below(&random, 2) * 30};
        counted(s, &x, GO);
        if (below(&random, 2)) {
            x.like = s->number;
            x.back = true;
            counted(s, &x, BACK);
        }
    }
    result(s);
    end_side(s);
}

/* Rank 1 only ever has even numbers of rows: by its counts rows are twice as wide. */
static unsigned even_for_one(const struct side *s, uint64_t number, int i, int j)
{
    uint64_t r = mix(number * 31 + (uint64_t)i * 7 + (uint64_t)j);
    return (unsigned)(i == 1 || j == 1 ? 2 * (1 + r % 20) : 1 + r % 40) * (s->n > 0);
}

static void unlike(void)
{
    struct side *s = new_side(world_comm(), 1);
    forced(s);
    cell_of_test = even_for_one;
    for (int i = 0; i < wanted; i++) {
        struct exchange x = {.matrix = M_OF_TEST, .type = ncclFloat16, .most = 1, .row = row, .tokens = tokens};
        counted(s, &x, GO);
    }
    result(s);
    end_side(s);
}

/* Captured into a graph by one rank, then by all, between exchanges that go packed. */
static void captured(void)
{
    static char stream;
    struct side *s = new_side(world_comm(), 1);
    struct exchange x = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclBfloat16, .most = rows, .row = row, .tokens = tokens};
    struct buffers b;
    forced(s);
    for (int capturing = 0; capturing < 3; capturing++) { /* rank 0, rank 1, all */
        bool mine = capturing == 2 || s->rank == capturing;
        CHECK(counted(s, &x, GO), "not engaged");
        if (!mine) {
            CHECK(!exchange(s, &x), "reissued although rank %d captures", capturing);
            continue;
        }
        s->stream = (cudaStream_t)&stream;
        CHECK(!railyard_emu_capture_begin(&stream), "cannot capture");
        NCCL(try_exchange(s, &x, &b));
        struct railyard_emu_graph *graph = railyard_emu_capture_end(&stream);
        CHECK(graph && s->way[b.number] == 'p', "not captured");
        NCCL(railyard_emu_graph_launch(graph));
        check_buffers(s, &x, &b);
        railyard_emu_graph_free(graph);
        free_buffers(&b);
        s->stream = NULL;
    }
    CHECK(counted(s, &x, GO), "no longer engaged");
    result(s);
    end_side(s);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"loop", loop},     {"by_itself", by_itself}, {"padding", padding},
                 {"widths", widths}, {"unlike", unlike},       {"captured", captured}};
    start_reissue(25);
    CHECK(argc >= 3, "which case, which shape?");
    take_shape(shape = argv[2]);
    if (argc > 3)
        wanted = atoi(argv[3]);
    if (argc > 4)
        tokens = (unsigned)atoi(argv[4]);
    if (argc > 5)
        rows = (unsigned)atoi(argv[5]);
    if (argc > 6)
        row = (unsigned)atoi(argv[6]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(argv[1], cases[i].name))
            return cases[i].run(), 0;
    CHECK(0, "no case %s", argv[1]);
}
