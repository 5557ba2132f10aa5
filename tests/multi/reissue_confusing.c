/*
 * reissue_confusing.c: programs whose traffic is no exchange, or looks like one on some ranks only, or comes in another
 * order on each rank, while the engine is engaged: right bytes, no rank on another way than the others, no wait without
 * end.
 *
 * usage: reissue_confusing CASE SHAPE   as reissue_right. Sizes are equal everywhere, so that a mix-up would not show
 * but by content.
 */
#include "reissue.h"

static const struct exchange same = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclFloat, .most = 16};

static struct exchange with(enum pairs pairs)
{
    struct exchange x = same;
    x.pairs = pairs;
    return x;
}

/* Two in one group: of two communicators, or of one. */
static void two_at_once(struct side *a, const struct exchange *x, struct side *b, const struct exchange *y)
{
    struct buffers p, q;
    make_buffers(a, x, &p);
    make_buffers(b, y, &q);
    AT("two at once: %llu of communicator %llu and %llu of %llu", (unsigned long long)p.number,
       (unsigned long long)a->tag, (unsigned long long)q.number, (unsigned long long)b->tag);
    watch_way(a);
    meddle_watch(b->comm);
    NCCL(ncclGroupStart());
    NCCL(issue(a, x, &p));
    NCCL(issue(b, y, &q));
    NCCL(ncclGroupEnd());
    note_way(a, &p, ncclSuccess);
    note_way(b, &q, ncclSuccess);
    check_buffers(a, x, &p);
    check_buffers(b, y, &q);
    free_buffers(&p);
    free_buffers(&q);
}

/* A collective in the group; nested groups. */
static void odd_group(struct side *s, bool collective)
{
    struct buffers b;
    int one = 1, sum = 0;
    make_buffers(s, &same, &b);
    AT("odd group %llu", (unsigned long long)b.number);
    watch_way(s);
    NCCL(ncclGroupStart());
    if (collective)
        NCCL(ncclAllReduce(&one, &sum, 1, ncclInt, ncclSum, s->comm, s->stream));
    NCCL(ncclGroupStart());
    NCCL(issue(s, &same, &b));
    NCCL(ncclGroupEnd());
    NCCL(ncclGroupEnd());
    note_way(s, &b, ncclSuccess);
    CHECK(!collective || sum == s->n, "the all-reduce gave %d", sum);
    check_buffers(s, &same, &b);
    free_buffers(&b);
}

/* Sends and receives without a group: from each rank to the next, one after the other. */
static void pipeline(struct side *s)
{
    struct exchange x = with(PAIRS_RING);
    struct buffers b;
    make_buffers(s, &x, &b);
    AT("pipeline %llu", (unsigned long long)b.number);
    watch_way(s);
    int next = (s->rank + 1) % s->n, last = (s->rank + s->n - 1) % s->n;
    for (int turn = 0; turn < 2; turn++) {
        if (turn == (s->rank > 0))
            NCCL(ncclSend(b.send + b.send_at[next], b.to[next], x.type, next, s->comm, s->stream));
        else
            NCCL(ncclRecv(b.recv + b.recv_at[last], b.from[last], x.type, last, s->comm, s->stream));
    }
    note_way(s, &b, ncclSuccess);
    check_buffers(s, &x, &b);
    free_buffers(&b);
}

static void one_thing(struct side *a, struct side *b, unsigned what)
{
    struct exchange star = with(PAIRS_STAR), ring = with(PAIRS_RING), even = with(PAIRS_EVEN), odd = with(PAIRS_ODD),
                    one = with(PAIRS_ONE);
    switch (what) {
    case 0:
        return pipeline(a);
    case 1:
        return (void)exchange(a, &ring);
    case 2:
        return (void)exchange(a, &star);
    case 3:
        return two_at_once(a, &same, b, &same);
    case 4:
        return two_at_once(a, &same, a, &one); /* an exchange on all ranks but two */
    case 5:
        return odd_group(a, true);
    case 6:
        exchange(a, &even);
        return (void)exchange(a, &odd);
    case 7:
        return odd_group(a, false); /* which is an exchange */
    case 8:
        return two_at_once(a, &same, a, &same);
    default:
        return (void)exchange(what & 1 ? a : b, &same);
    }
}

static void result(struct side *s)
{
    compare_ways(s);
    if (s->rank == 0)
        print_result(s);
}

/* All of it at random, on two communicators; with new ones now and then, as those that do not fit are given up. */
static void strays(void)
{
    ncclComm_t world = world_comm(), first, second;
    uint64_t random = 7;
    for (int round = 0; round < 4; round++) {
        NCCL(ncclCommSplit(world, 0, who.rank, &first, NULL));
        NCCL(ncclCommSplit(world, 0, -who.rank, &second, NULL));
        struct side *a = new_side(first, 2 * (uint64_t)round), *b = new_side(second, 2 * (uint64_t)round + 1);
        engage(a, true, 4);
        engage(b, true, 4);
        for (int i = 0; i < 100; i++)
            one_thing(a, b, below(&random, 80));
        result(a);
        result(b);
        end_side(b);
        end_side(a);
    }
    NCCL(ncclCommDestroy(world));
}

/* One thing that does not fit, in the middle of an engagement, on all ranks; then they engage again. */
static void again(void)
{
    static const unsigned things[] = {0, 1, 6, 5};
    struct side *s = new_side(world_comm(), 1);
    for (size_t i = 0; i < sizeof things / sizeof *things; i++) {
        engage(s, true, 4);
        one_thing(s, s, things[i]);
    }
    result(s);
    end_side(s);
}

/* A star in the middle: its centre counts one exchange more than the others from here. */
static void drift(void)
{
    struct side *s = new_side(world_comm(), 1);
    struct exchange star = with(PAIRS_STAR);
    engage(s, true, 6);
    exchange(s, &star);
    uint64_t began = ry_now_ns(), longest = 0;
    for (int i = 0; i < 600; i++) {
        uint64_t t = ry_now_ns();
        exchange(s, i % 7 == 6 && i < 100 ? &star : &same);
        longest = ry_now_ns() - t > longest ? ry_now_ns() - t : longest;
    }
    if (s->rank == 0)
        printf("600 exchanges in %.3f s, the longest %.3f s\n", seconds_since(began), (double)longest * 1e-9);
    result(s);
    end_side(s);
}

/* Two communicators, a thread each; even ranks come to the first one earlier, odd ranks to the second. */
static struct side *crossed_side[2];
static struct {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    int begun[2];
} turns = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, {0, 0}};

static void begin_in_turn(int me, int first, int round)
{
    AT("the turn of round %d", round);
    pthread_mutex_lock(&turns.lock);
    while (me != first && turns.begun[first] <= round)
        pthread_cond_wait(&turns.moved, &turns.lock);
    turns.begun[me] = round + 1;
    pthread_cond_broadcast(&turns.moved);
    pthread_mutex_unlock(&turns.lock);
    if (me != first)
        usleep(200); /* the other thread is in its call by now */
}

static void *crossed_thread(void *arg)
{
    int me = (int)(intptr_t)arg;
    struct side *s = crossed_side[me];
    engage(s, true, 8);
    for (int round = 0; round < 150; round++) {
        begin_in_turn(me, (who.rank + round / 10) % 2, round);
        exchange(s, &same);
    }
    result(s);
    return NULL;
}

static void crossed(void)
{
    pthread_t threads[2];
    ncclComm_t copy;
    crossed_side[0] = new_side(world_comm(), 1);
    NCCL(ncclCommSplit(crossed_side[0]->comm, 0, who.rank, &copy, NULL));
    crossed_side[1] = new_side(copy, 2);
    for (int i = 0; i < 2; i++)
        CHECK(!pthread_create(&threads[i], NULL, crossed_thread, (void *)(intptr_t)i), "no thread");
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    end_side(crossed_side[1]);
    end_side(crossed_side[0]);
}

/* Ranks that come just as the patience ends, a little before or after; on several communicators at once. */
#define HASTY 3
static void *hasty_thread(void *arg)
{
    struct side *s = arg;
    engage(s, true, 8);
    for (int i = 0; i < 40; i++) {
        uint64_t random = mix(s->tag * 77 + (uint64_t)i);
        bool late = below(&random, SLOW == 1 ? 5 : 10) == 0 && (int)below(&random, (unsigned)s->n) == s->rank,
             stray = mix(s->tag * 99 + (uint64_t)i) % 12 == 0;
        if (late)
            usleep((unsigned)(atof(getenv("RAILYARD_PATIENCE")) * 1e6) - 3000 + below(&random, 6000));
        if (stray)
            one_thing(s, s, (unsigned)i % 3);
        exchange(s, &same);
    }
    compare_ways(s);
    return NULL;
}

static void hasty(void)
{
    pthread_t threads[HASTY];
    struct side *sides[HASTY];
    ncclComm_t world = world_comm();
    for (int i = 0; i < HASTY; i++) {
        ncclComm_t copy;
        NCCL(ncclCommSplit(world, 0, who.rank, &copy, NULL));
        sides[i] = new_side(copy, (uint64_t)i + 1);
    }
    for (int i = 0; i < HASTY; i++)
        CHECK(!pthread_create(&threads[i], NULL, hasty_thread, sides[i]), "no thread");
    for (int i = 0; i < HASTY; i++) {
        pthread_join(threads[i], NULL);
        result(sides[i]);
        end_side(sides[i]);
    }
    NCCL(ncclCommDestroy(world));
}

/* Communicators of short life, each engaged; their ends are not synchronized. */
static void churn(void)
{
    ncclComm_t world = world_comm(), comm;
    for (int i = 0; i < 12; i++) {
        NCCL(ncclCommSplit(world, 0, i % 2 ? -who.rank : who.rank, &comm, NULL));
        struct side *s = new_side(comm, (uint64_t)i + 1);
        engage(s, true, 4);
        for (int k = 0; k < 5; k++)
            exchange(s, &same);
        result(s);
        end_side(s);
    }
    NCCL(ncclCommDestroy(world));
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"strays", strays},   {"again", again}, {"drift", drift},
                 {"crossed", crossed}, {"hasty", hasty}, {"churn", churn}};
    start_reissue(15);
    CHECK(argc == 3, "which case, which shape?");
    take_shape(argv[2]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(argv[1], cases[i].name))
            return cases[i].run(), 0;
    CHECK(0, "no case %s", argv[1]);
}
