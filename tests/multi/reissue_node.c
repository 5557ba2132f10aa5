/*
 * reissue_node.c: communicators of the nodes' ranks that the engine makes itself: made once, used by all or nobody,
 * ended with the job's, in the way of no abort.
 *
 * usage: reissue_node CASE SHAPE [RANK]   as reissue_right; RANK: to whom it happens
 */

#include "reissue.h"

static int victim = 1;
static const struct exchange large = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclFloat, .most = 300};
static const char *shape;

static int of_my_node(void)
{
    int n = 0;
    for (int r = 0; r < who.world; r++)
        n += shape[r] == shape[who.rank];
    return n;
}

/* `n` exchanges by the engine; in how many of them this rank had to do with a communicator of the engine's. */
static int over_node(struct side *s, int n)
{
    int inside = 0;
    for (int i = 0; i < n; i++) {
        CHECK(exchange(s, &large), "exchange %llu was not reissued", (unsigned long long)s->number - 1);
        inside += meddle_counts.inside > 0;
    }
    return inside;
}

static void ends_with_it(struct side *s, int made)
{
    compare_ways(s);
    if (s->rank == 0)
        print_result(s);
    end_side(s);
    CHECK(meddle_made == made && meddle_ended == made, "%d made, %d ended, not %d", (int)meddle_made, (int)meddle_ended,
          made);
}

/* Three communicators one after the other, and two at once. */
static void used(void)
{
    int each = of_my_node() > 1;
    for (int i = 0; i < 3; i++) {
        struct side *s = new_side(world_comm(), (uint64_t)i + 1);
        engage(s, true, 4);
        over_node(s, 12);
        int inside = over_node(s, 10);
        CHECK(inside == 10 * each, "%d of 10 exchanges inside the node", inside);
        ends_with_it(s, each * (i + 1));
    }
}

/* Made on no rank, or failed on one. */
static void unused_by(int how)
{
    struct side *s = new_side(world_comm(), 1);
    if (s->rank == victim)
        meddle_fail = how;
    engage(s, true, 4);
    CHECK(over_node(s, 40) == 0, "used although rank %d has none", victim);
    CHECK(s->rank != victim || !meddle_fail, "nothing was asked for");
    ends_with_it(s, how && s->rank != victim && of_my_node() > 1);
}

static void refused(void)
{
    unused_by(MEDDLE_SPLIT);
}

static void off(void)
{
    unused_by(MEDDLE_NONE);
}

/* ---- a thread that goes on until it cannot ---- */

static struct {
    struct side *side;
    pthread_t thread;
    _Atomic bool over;
    ncclResult_t result;
    uint64_t ended;
} going;

static void *go_on(void *arg)
{
    struct buffers b;
    (void)arg;
    do {
        going.result = try_exchange(going.side, &large, &b);
        if (going.result == ncclSuccess)
            check_buffers(going.side, &large, &b);
        free_buffers(&b);
    } while (going.result == ncclSuccess && going.side->number < going.side->engaged_at + 60);
    going.ended = ry_now_ns();
    atomic_store(&going.over, true);
    return NULL;
}

/* The victim never comes to the split that all others are in: it is killed, or stays away while they abort. */
static void splitting(bool dies)
{
    if (dies && who.rank == victim) {
        watch_over(SIGKILL);
        alarm(100 * SLOW);
    }
    struct side *s = new_side(world_comm(), 1);
    atomic_store(&meddle_hold, s->rank == victim);
    engage(s, true, 4);
    going.side = s;
    CHECK(!pthread_create(&going.thread, NULL, go_on, NULL), "no thread");
    AT("waiting for the split");
    uint64_t t = ry_now_ns();
    while (!meddle_splitting && seconds_since(t) < 40)
        usleep(1000);
    CHECK(meddle_splitting, "nothing is made");
    usleep(300000);
    if (s->rank == victim) {
        if (dies)
            raise(SIGKILL);
        sleep(4);
        fflush(stdout);
        _exit(0); /* there is no way back for the thread */
    }
    t = ry_now_ns();
    if (!dies) {
        AT("aborting");
        EXPECT(ncclSuccess, ncclCommAbort(s->comm));
    }
    while (!going.over && seconds_since(t) < 40)
        usleep(1000);
    CHECK(going.over, "the thread is still there");
    pthread_join(going.thread, NULL);
    CHECK(going.result != ncclSuccess, "went on without rank %d", victim);
    if (!dies && going.ended > t)
        CHECK((double)(going.ended - t) * 1e-9 < 3, "it took %.3f s", (double)(going.ended - t) * 1e-9);
    if (dies)
        NCCL(ncclCommAbort(s->comm));
    CHECK(meddle_made == meddle_ended, "%d made, %d ended", (int)meddle_made, (int)meddle_ended);
}

static void aborted_splitting(void)
{
    splitting(false);
}

static void killed_splitting(void)
{
    splitting(true);
}

/* In use, and a rank stays away: whoever waits for it aborts, and both communicators end. */
static void aborted(void)
{
    struct side *s = new_side(world_comm(), 1);
    engage(s, true, 4);
    over_node(s, 15);
    CHECK(over_node(s, 3) == 3, "not used");
    barrier(s->comm);
    uint64_t t = ry_now_ns();
    if (s->rank != victim) {
        going.side = s;
        CHECK(!pthread_create(&going.thread, NULL, go_on, NULL), "no thread");
        usleep(300000);
    }
    EXPECT(ncclSuccess, ncclCommAbort(s->comm));
    if (s->rank != victim) {
        while (!going.over && seconds_since(t) < 40)
            usleep(1000);
        CHECK(going.over, "the thread is still there");
        pthread_join(going.thread, NULL);
        CHECK(going.result != ncclSuccess, "went on without rank %d", victim);
    }
    while (meddle_ended < meddle_made && seconds_since(t) < 40)
        usleep(1000);
    CHECK(meddle_made == 1 && meddle_ended == 1, "%d made, %d ended", (int)meddle_made, (int)meddle_ended);
    free(s);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"used", used},
                 {"refused", refused},
                 {"off", off},
                 {"aborted", aborted},
                 {"aborted_splitting", aborted_splitting},
                 {"killed_splitting", killed_splitting}};
    start_reissue(20);
    CHECK(argc >= 3, "which case, which shape?");
    take_shape(shape = argv[2]);
    if (argc > 3)
        victim = atoi(argv[3]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(argv[1], cases[i].name))
            return cases[i].run(), 0;
    CHECK(0, "no case %s", argv[1]);
}
