/*
 * reissue_right.c: exchanges of all kinds while the engine is engaged: every byte right, all ranks the same way each
 * time.
 *
 * usage: reissue_right CASE SHAPE [NUMBER [SECONDS]]   SHAPE: a letter per rank, its node ("aabbb"), or - for the
 * launcher's The driver (reissue_test.py) says which settings apply, and reads what is printed: how many exchanges the
 * engine did.
 */
#include "capture.h"
#include <dlfcn.h>

#include "reissue.h"

static int wanted = 150;
static double seconds = 0.2;

static void random_ones(struct side *s, int n)
{
    for (int i = 0; i < n; i++) {
        struct exchange x = random_exchange(s);
        exchange(s, &x);
    }
}

static void result(struct side *s)
{
    compare_ways(s);
    if (s->rank == 0)
        print_result(s);
}

/* Engaged from the beginning, then all kinds at random, no rank waiting for another but by the exchanges themselves. */
static void mix_of_all(void)
{
    struct side *s = new_side(world_comm(), 1);
    engage(s, true, 6);
    random_ones(s, wanted);
    result(s);
    end_side(s);
}

/* As it comes: whether anything is reissued is the settings' business. */
static void plain(void)
{
    struct side *s = new_side(world_comm(), 1);
    engage(s, false, seconds / SLOW);
    random_ones(s, wanted);
    result(s);
    end_side(s);
}

/* Ways told by name, between exchanges, what carries them across nodes included. */
static void switching(void)
{
    static const char *const ways[] = {"hierarchical/ucx", "hierarchical/nccl", "balanced/ucx", "hierarchical", "direct", "balanced/nccl"};
    void *found = dlsym(RTLD_DEFAULT, "railyard_strategy");
    int (*strategy)(const char *);
    memcpy(&strategy, &found, sizeof strategy);
    struct side *s = new_side(world_comm(), 1);
    engage(s, true, seconds / SLOW);
    CHECK(strategy("hierarchical/pigeon") == -1 && strategy("pigeon/ucx") == -1 && strategy("/ucx") == -1, "such ways are known");
    for (int i = 0; i < wanted; i++) {
        CHECK(!strategy(ways[i % 6]), "%s is not known", ways[i % 6]);
        random_ones(s, 1);
    }
    result(s);
    end_side(s);
}

/* What one rank keeps for itself is received where it was: "not me", the others go on. */
static void in_place(void)
{
    struct side *s = new_side(world_comm(), 1);
    struct exchange odd = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclFloat, .most = 50};
    engage(s, true, 6);
    for (int i = 0; i < 40; i++) {
        odd.in_place = who.rank == i % (who.world + 1);
        bool mine = exchange(s, &odd), all_plain = i % (who.world + 1) < who.world;
        CHECK(mine == !all_plain, "exchange %d: %s", i,
              mine ? "reissued although a rank cannot" : "direct although all can");
    }
    result(s);
    end_side(s);
}

/* Ranks that call the same bytes by different names. */
static void types(void)
{
    struct side *s = new_side(world_comm(), 1);
    struct exchange x = usual;
    engage(s, true, 6);
    for (int i = 0; i < 30; i++) {
        x.type = s->rank % 2 ? ncclFloat16 : ncclBfloat16;
        exchange(s, &x);
        exchange(s, &usual);
    }
    result(s);
    end_side(s);
}

/* A CUDA graph: one rank captures while the others do the same at once; then all capture and launch several times. */
static void captured(void)
{
    static char stream;
    struct side *s = new_side(world_comm(), 1);
    struct buffers b;
    engage(s, true, 6);
    for (int capturing = 0; capturing < 3; capturing++) { /* rank 0, rank 1, all */
        bool mine = capturing == 2 || s->rank == capturing;
        barrier(s->comm);
        s->stream = mine ? (cudaStream_t)&stream : NULL;
        if (!mine) {
            usleep(1500000);
            CHECK(!exchange(s, &usual), "reissued although rank %d captures", capturing);
        } else {
            CHECK(!railyard_emu_capture_begin(&stream), "cannot capture");
            uint64_t t = ry_now_ns();
            NCCL(try_exchange(s, &usual, &b));
            double took = seconds_since(t);
            struct railyard_emu_graph *graph = railyard_emu_capture_end(&stream);
            CHECK(took < 1, "capturing waited for %.3f s", took);
            CHECK(graph && s->way[b.number] == 'p', "not captured");
            for (int i = 0; i < (capturing == 2 ? 3 : 1); i++) {
                AT("launch %d of exchange %llu", i, (unsigned long long)b.number);
                CHECK(b.recv[0] == GUARD, "it was run before its launch");
                NCCL(railyard_emu_graph_launch(graph));
                check_buffers(s, &usual, &b);
            }
            railyard_emu_graph_free(graph);
            free_buffers(&b);
        }
        s->stream = NULL;
        CHECK(exchange(s, &usual), "no longer engaged after capturing %d", capturing);
    }
    result(s);
    end_side(s);
}

static void *one_thread(void *arg)
{
    struct side *s = arg;
    engage(s, true, 12);
    random_ones(s, wanted);
    compare_ways(s);
    return NULL;
}

static void in_threads(struct side **sides, int n)
{
    pthread_t threads[8];
    for (int i = 0; i < n; i++)
        CHECK(!pthread_create(&threads[i], NULL, one_thread, sides[i]), "no thread");
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < n; i++) {
        print_result(sides[i]);
        end_side(sides[i]);
    }
}

/* Several communicators engaged at once, a thread for each: the world, copies of it, and halves across the nodes. */
static void threads(void)
{
    struct side *sides[3] = {new_side(world_comm(), 1)};
    ncclComm_t copy, part;
    NCCL(ncclCommSplit(sides[0]->comm, 0, who.rank, &copy, NULL));
    NCCL(ncclCommSplit(sides[0]->comm, who.rank % 2, -who.rank, &part, NULL)); /* in reverse order */
    sides[1] = new_side(copy, 2);
    sides[2] = new_side(part, 3 + (uint64_t)who.rank % 2);
    in_threads(sides, 3);
}

/* All ranks in one process. */
static void init_all(void)
{
    ncclComm_t comms[4];
    struct side *sides[4];
    NCCL(ncclCommInitAll(comms, 4, NULL));
    for (int i = 0; i < 4; i++)
        sides[i] = new_side(comms[i], 1);
    in_threads(sides, 4);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"mix", mix_of_all}, {"plain", plain},     {"switching", switching}, {"in_place", in_place}, {"captured", captured},
                 {"types", types},    {"threads", threads}, {"init_all", init_all}};
    start_reissue(15);
    CHECK(argc >= 3, "which case, which shape?");
    take_shape(argv[2]);
    if (argc > 3)
        wanted = atoi(argv[3]);
    if (argc > 4)
        seconds = atof(argv[4]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(argv[1], cases[i].name))
            return cases[i].run(), 0;
    CHECK(0, "no case %s", argv[1]);
}
