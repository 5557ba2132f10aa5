/*
 * reissue_replica.c: twin communicators whose ranks send the same bytes, in step or not.
 *
 * usage: reissue_replica CASE SHAPE TWINS [NUMBER [RANK]]
 * SHAPE as reissue_right's: which node each rank is on; a node's ranks are dealt out to the twins in turn. NUMBER: of
 * exchanges. RANK: to whom it happens.
 */
#include <dlfcn.h>

#include "reissue.h"

static int twins, twin, number = 20, victim = 1;
static const char *shape;
static ncclComm_t world;
static struct side *side;
static uint64_t tag = 7;


/* By its position on the node; ranks of a twin are in order of their ranks in the job. */
static int twin_of(int rank)
{
    int local = 0;
    for (int r = 0; r < rank; r++)
        local += shape[r] == shape[rank];
    return local % twins;
}

/* Each twin from an id of its own, as frameworks do it; the ids go round over the communicator of all. */
static ncclComm_t twin_comm(void)
{
    ncclComm_t comm;
    ncclUniqueId own, *ids = calloc((size_t)who.world, sizeof *ids);
    int *which = calloc((size_t)who.world, sizeof *which), n = 0, rank = -1, first = -1;
    CHECK(ids && which, "no memory");
    memset(&own, 0, sizeof own);
    NCCL(ncclAllGather(&twin, which, 1, ncclInt, world, NULL));
    for (int r = 0; r < who.world; r++) {
        if (which[r] != twin)
            continue;
        first = first < 0 ? r : first;
        rank = r == who.rank ? n : rank;
        n++;
    }
    if (first == who.rank)
        NCCL(ncclGetUniqueId(&own));
    NCCL(ncclAllGather(&own, ids, sizeof own, ncclUint8, world, NULL));
    NCCL(ncclCommInitRank(&comm, n, ids[first], rank));
    free(ids);
    free(which);
    return comm;
}

static bool all_of_world(bool mine)
{
    int v = mine;
    AT("the all-reduce of all after exchange %llu", (unsigned long long)side->number);
    NCCL(ncclAllReduce(&v, &v, 1, ncclInt, ncclMin, world, NULL));
    return v;
}

/* Three in a row by the engine, on all ranks of all twins; or not within `seconds`. */
static bool engage_twins(bool must, double seconds)
{
    uint64_t began = ry_now_ns();
    for (int row = 0; row < 3;) {
        bool late = seconds_since(began) > seconds * SLOW * (must ? 10 : 1);
        row = all_of_world(exchange(side, &usual)) ? row + 1 : 0;
        if (!all_of_world(!late)) {
            CHECK(!must, "the twins are not engaged after %llu exchanges", (unsigned long long)side->number);
            return false;
        }
        if (!row)
            usleep(500);
    }
    side->engaged_at = side->number;
    side->engaged_by = side->reissued;
    return true;
}

static void begin(void)
{
    world = world_comm();
    side = new_side(twin_comm(), tag);
    exchange(side,
             &usual); /* the cards are up: else some may see some of their twins twice before they see the others */
    barrier(world);
}

/* Each twin's ranks went the same ways, and all twins did, unless they may agree each for itself. */
static void end_each(bool alone)
{
    unsigned char *all = malloc((size_t)who.world * MOST_EXCHANGES);
    uint64_t most = side->number;
    NCCL(ncclAllReduce(&most, &most, 1, ncclUint64, ncclMax, world, NULL));
    CHECK(all && side->number == most, "%llu exchanges, elsewhere %llu", (unsigned long long)side->number,
          (unsigned long long)most);
    NCCL(ncclAllGather(side->way, all, MOST_EXCHANGES, ncclUint8, world, NULL));
    for (int r = 0; r < who.world; r++)
        for (uint64_t i = 0; i < most && (!alone || twin_of(r) == twin); i++)
            CHECK(all[(size_t)r * MOST_EXCHANGES + i] == side->way[i], "exchange %llu went %c here and %c on rank %d",
                  (unsigned long long)i, side->way[i], all[(size_t)r * MOST_EXCHANGES + i], r);
    free(all);
    if (who.rank == 0)
        print_result(side);
    end_side(side);
    NCCL(ncclCommDestroy(world));
}

static void end(void)
{
    end_each(false);
}

/* Nodes of this twin's ranks. */
static void nodes_of(char *node)
{
    char own[64], all[64][64];
    snprintf(own, sizeof own, "%s", getenv("NCCL_HOSTID"));
    NCCL(ncclAllGather(own, all, sizeof own, ncclUint8, side->comm, NULL));
    for (int p = 0; p < side->n; p++)
        node[p] = !strcmp(all[p], own);
}

/* Bytes that crossed, of those that would have by plain NCCL, and how long that took. */
static void loop(void)
{
    char near[64] = {0};
    unsigned long long whole = 0, left = 0;
    int done = 0;
    begin();
    engage_twins(true, 4);
    nodes_of(near);
    double took = 0;
    for (int i = 0; i < number; i++) {
        struct exchange x = {.matrix = i % 3 == 0   ? M_EQUAL
                                       : i % 3 == 1 ? M_RANDOM
                                                    : M_HOLES,
                             .form = (enum form)(i % 4),
                             .type = ncclUint8,
                             .most = i % 5 == 4 ? 37 : 65536};
        struct buffers b;
        uint64_t t = ry_now_ns();
        NCCL(try_exchange(side, &x, &b));
        took += seconds_since(t);
        for (int p = 0; p < side->n && side->way[b.number] == 'e'; p++)
            if (!near[p]) {
                whole += b.send_n[p];
                left += meddle_counts.sent[p];
            }
        done += side->way[b.number] == 'e';
        check_buffers(side, &x, &b);
        free_buffers(&b);
    }
    unsigned long long sums[2] = {whole, left};
    NCCL(ncclAllReduce(sums, sums, 2, ncclUint64, ncclSum, world, NULL));
    if (who.rank == 0)
        printf("go: %d of %d by the engine, %llu bytes crossed as %llu, %.1f ms each\n", done, number, sums[0], sums[1],
               took / number * 1e3);
    end();
}

static void some(int n, const struct exchange *x, char way, const char *what)
{
    for (int i = 0; i < n; i++)
        CHECK((exchange(side, x) ? 'e' : 'p') == way, "exchange %llu (%s) went %c",
              (unsigned long long)side->number - 1, what, side->way[side->number - 1]);
}

/* Equal, not, and equal again, each in the very exchange in which it changes. */
static void changing(void)
{
    static const struct exchange equal = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclFloat, .most = 500},
                                 uneven = {.matrix = M_RANDOM, .form = F_GROUP, .type = ncclFloat, .most = 500};
    begin();
    engage_twins(true, 4);
    for (int round = 0; round < number; round++) {
        some(3, round & 1 ? &equal : &uneven, 'e', "all equal");
        side->tag = tag + (twin == round % twins); /* the counts too, where those depend on it */
        some(1 + round % 4, round & 2 ? &equal : &uneven, 'p', "one differs");
        side->tag = tag;
    }
    some(3, &equal, 'e', "equal again");
    end();
}

/* Nothing is equal. */
static void unlike(void)
{
    begin();
    side->tag = tag + (uint64_t)twin;
    for (int i = 0; i < number; i++)
        exchange(side, &usual);
    engage_twins(false, 0.3);
    CHECK(side->reissued == 0, "%llu were carried out together", (unsigned long long)side->reissued);
    end();
}

/* By itself. */
static void by_itself(void)
{
    static const struct exchange large = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclUint8, .most = 200000};
    begin();
    for (int i = 0; i < number; i++)
        exchange(side, &large);
    end();
}

static void alone(void)
{
    begin();
    for (int i = 0; i < number; i++) {
        exchange(side, &usual);
        CHECK(!meddle_counts.engine && !meddle_made, "the engine did something");
    }
    end();
}

/* A twin's communicator ends: the others find that they are fewer now, and share what is left. */
static void fewer(void)
{
    begin();
    engage_twins(true, 4);
    barrier(world);
    uint64_t before = side->number;
    int row = 0;
    if (twin == twins - 1)
        NCCL(ncclCommDestroy(side->comm));
    while (row < 3 && side->number < before + 2000) {
        bool mine = twin == twins - 1 || exchange(side, &usual);
        side->number += twin == twins - 1;
        row = all_of_world(mine) ? row + 1 : 0;
    }
    CHECK(row == 3, "the others are not engaged after %llu exchanges", (unsigned long long)(side->number - before));
    if (who.rank == 0)
        printf("%d twins instead of %d after %llu exchanges\n", twins - 1, twins,
               (unsigned long long)(side->number - before));
    if (twin != twins - 1)
        end_side(side);
    NCCL(ncclCommDestroy(world));
}

/* Anything at all, equal at times: whatever each communicator does by itself, and together with the others. */
static void mixed(void)
{
    begin();
    for (int i = 0; i < number; i++) {
        struct exchange x = random_exchange(side);
        bool equal = i / 40 % 2 == 0 || i % 7;
        x.most = x.most > 3000 ? 3000 : x.most;
        side->tag = tag + (equal ? 0 : (uint64_t)twin);
        exchange(side, i % 3 ? &x : &usual);
        side->tag = tag;
        if (i < 60)
            usleep(500); /* so that they do not run away from each other before they are engaged */
    }
    compare_ways(side); /* of the shapes some have communicators that are no twins of the others */
    if (who.rank == 0)
        print_result(side);
    end_side(side);
    NCCL(ncclCommDestroy(world));
}

/* Strategies that a communicator carries out by itself, and together with its twins, in turns: both agreements are held
 * then. */
static void switching(void)
{
    int (*strategy)(const char *);
    void *found = dlsym(RTLD_DEFAULT, "railyard_strategy");
    uint64_t done[2] = {0};
    memcpy(&strategy, &found, sizeof found);
    CHECK(strategy, "no railyard_strategy()");
    begin();
    engage_twins(true, 4);
    for (int i = 0; i < 900; i++) {
        int part = i >= 300;
        if (i == 0 || i == 300) {
            barrier(world);
            CHECK(!strategy(part ? "replica" : "hierarchical"), "refused");
            barrier(world);
        }
        done[part] += exchange(side, &usual);
        if (i % 4 == 0)
            usleep(1000);
    }
    for (int k = 0; k < 2; k++)
        CHECK(done[k] > 10, "part %d: %llu reissued", k, (unsigned long long)done[k]);
    /* Its own agreement has lived on beside that. */
    CHECK(!strategy("hierarchical"), "refused");
    barrier(world);
    uint64_t since = side->reissued;
    for (int i = 0; i < 20; i++)
        exchange(side, &usual);
    CHECK(side->reissued - since >= 18, "%llu of 20 reissued", (unsigned long long)(side->reissued - since));
    end_each(true);
}

/* The victim's twin comes no more; the others do not need it. */
static void stops(void)
{
    begin();
    engage_twins(true, 4);
    barrier(world);
    uint64_t t = ry_now_ns();
    if (twin != victim) {
        for (int i = 0; i < number; i++)
            exchange(side, &usual);
        CHECK(seconds_since(t) < 8 * SLOW, "it took %.1f s", seconds_since(t));
        compare_ways(side);
        for (uint64_t i = side->engaged_at; i < side->number; i++)
            CHECK(side->way[i] == 'p', "exchange %llu without twin %d", (unsigned long long)i, victim);
    }
    barrier(world);
    if (who.rank == 0)
        printf("went on in %.2f s\n", seconds_since(t));
    end_side(side);
    NCCL(ncclCommDestroy(world));
}

/* A rank dies. Its own twin cannot go on, the others can. */
static void killed(void)
{
    if (who.rank == victim) {
        watch_over(SIGKILL);
        alarm(100 * SLOW);
    }
    begin();
    engage_twins(true, 4);
    barrier(world);
    usleep(300000 * SLOW); /* all have left the barrier */
    if (who.rank == victim)
        raise(SIGKILL);
    uint64_t t = ry_now_ns();
    int failed = 0, hit;
    struct buffers b;
    /* The victim's twin, by shape and number alone. */
    hit = victim % twins == twin; /* ranks of a node follow each other, in shapes for this case */
    for (int i = 0; i < number && !failed; i++) {
        failed = try_exchange(side, &usual, &b) != ncclSuccess;
        if (!failed)
            check_buffers(side, &usual, &b);
        free_buffers(&b);
    }
    CHECK(seconds_since(t) < 5 * SLOW, "it took %.2f s", seconds_since(t));
    CHECK(failed == hit, "%s", failed ? "failed with all its ranks" : "went on without a rank");
    printf("rank %d: %s after %.3f s\n", who.rank, failed ? "failed" : "went on", seconds_since(t));
    fflush(stdout);
    if (failed) {
        NCCL(ncclCommAbort(side->comm));
    } else {
        NCCL(ncclCommDestroy(side->comm));
    }
    NCCL(ncclCommAbort(world));
}

/* The victim aborts, while the others of its twin are in an exchange, which they abort in their turn. */
static struct {
    pthread_t thread;
    _Atomic bool over;
    ncclResult_t result;
} going;

static void *go_on(void *arg)
{
    struct buffers b;
    (void)arg;
    do {
        going.result = try_exchange(side, &usual, &b);
        free_buffers(&b);
    } while (going.result == ncclSuccess && side->number < MOST_EXCHANGES - 1);
    atomic_store(&going.over, true);
    return NULL;
}

static void aborted(void)
{
    begin();
    engage_twins(true, 4);
    barrier(world);
    uint64_t t = ry_now_ns();
    bool hit = victim % twins == twin; /* as in killed() */
    if (hit && who.rank != victim) {
        CHECK(!pthread_create(&going.thread, NULL, go_on, NULL), "no thread");
        usleep(300000);
    }
    for (int i = 0; i < 20 && !hit; i++) /* the others' twin is gone: each for itself */
        exchange(side, &usual);
    if (hit)
        EXPECT(ncclSuccess, ncclCommAbort(side->comm));
    else
        NCCL(ncclCommDestroy(side->comm));
    if (hit && who.rank != victim) {
        while (!going.over && seconds_since(t) < 40)
            usleep(1000);
        CHECK(going.over, "the thread is still there");
        pthread_join(going.thread, NULL);
        CHECK(going.result != ncclSuccess, "went on without rank %d", victim);
    }
    while (meddle_ended < meddle_made && seconds_since(t) < 40)
        usleep(1000);
    CHECK(meddle_made == 1 && meddle_ended == 1, "%d made, %d ended", (int)meddle_made, (int)meddle_ended);
    NCCL(ncclCommAbort(world));
}

/* One rank's communicator with its twins does not come about: nobody shares, nobody waits. */
static void making(void)
{
    begin();
    atomic_store(&meddle_hold, who.rank == victim);
    engage_twins(false, 0.5);
    CHECK(side->reissued == 0, "%llu were carried out together", (unsigned long long)side->reissued);
    atomic_store(&meddle_hold, 0);
    engage_twins(true, 4);
    end();
    CHECK(meddle_made == 1 && meddle_ended == 1, "%d made, %d ended", (int)meddle_made, (int)meddle_ended);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"loop", loop},     {"changing", changing}, {"unlike", unlike},       {"by_itself", by_itself},
                 {"alone", alone},   {"stops", stops},       {"killed", killed},       {"aborted", aborted},
                 {"making", making}, {"fewer", fewer},       {"switching", switching}, {"mixed", mixed}};
    start_reissue(20);
    CHECK(argc >= 4, "which case, which shape, how many twins?");
    take_shape(argv[2]);
    twins = atoi(argv[3]);
    shape = argv[2];
    twin = twin_of(who.rank);
    if (argc > 4)
        number = atoi(argv[4]);
    if (argc > 5)
        victim = atoi(argv[5]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(argv[1], cases[i].name))
            return cases[i].run(), 0;
    CHECK(0, "no case %s", argv[1]);
}
