/*
 * reissue_beside.c: two communicators of the same ranks, one with long exchanges and one with short ones, at the same time on two
 * threads, or one after the other. Every byte is checked; printed is how long the short ones took, each waited for.
 *
 * usage: reissue_beside CASE SHAPE [SECONDS [KIB [DIFFERENT]]]
 *   together, apart: as said; long: only those; SECONDS: how long either goes on; KIB: of a segment of the long ones, in rows
 *   of 1 KiB, of which each rank has so many different ones (8)
 */

#include "reissue.h"

static double seconds = 2;
static unsigned long_kib = 512, different = 8;
static _Atomic bool long_is_over;

static struct exchange long_one, short_one = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclFloat, .most = 256};

#define MOST_TIMED 100000
static double took_us[MOST_TIMED];
static int timed;

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void *make_long_ones(void *arg)
{
    struct side *s = arg;
    uint64_t began = ry_now_ns();
    do
        exchange(s, &long_one);
    while (all_agree(s, seconds_since(began) < seconds || s->number < 24));
    compare_ways(s);
    long_is_over = true;
    return NULL;
}

/* Until the others are over on all ranks. */
static void make_short_ones(struct side *s, bool together)
{
    uint64_t began = ry_now_ns();
    bool goes_on = true;
    for (int i = 0; goes_on; i++) {
        struct buffers b;
        make_buffers(s, &short_one, &b);
        AT("short exchange %llu", (unsigned long long)b.number);
        watch_way(s);
        uint64_t t = ry_now_ns();
        NCCL(ncclGroupStart());
        NCCL(issue(s, &short_one, &b));
        NCCL(ncclGroupEnd());
        railyard_emu_synchronize(s->stream);
        double us = seconds_since(t) * 1e6;
        note_way(s, &b, ncclSuccess);
        check_buffers(s, &short_one, &b);
        free_buffers(&b);
        if (timed < MOST_TIMED)
            took_us[timed++] = us;
        if (i % 8 == 7) /* while there is something beside them: what comes after is not what is asked about */
            goes_on = all_agree(s, s->number < MOST_EXCHANGES - 16 && (together ? !long_is_over : seconds_since(began) < seconds));
    }
    compare_ways(s);
}

static void both(bool together)
{
    struct side *large = new_side(world_comm(), 1), *small;
    pthread_t thread;
    ncclComm_t copy;
    NCCL(ncclCommSplit(large->comm, 0, who.rank, &copy, NULL));
    small = new_side(copy, 2);
    CHECK(!pthread_create(&thread, NULL, make_long_ones, large), "no thread");
    if (!together)
        pthread_join(thread, NULL);
    make_short_ones(small, together);
    if (together)
        pthread_join(thread, NULL);
    qsort(took_us, (size_t)timed, sizeof *took_us, by_value);
    if (who.rank == 0)
        printf("short exchanges: %d, half took %.0f us at most, 90 %% %.0f us; long ones: %llu\n", timed, took_us[timed / 2],
               took_us[timed * 9 / 10], (unsigned long long)large->number);
    end_side(small);
    end_side(large);
}

int main(int argc, char **argv)
{
    start_reissue(30);
    CHECK(argc >= 3, "which case, which shape?");
    take_shape(argv[2]);
    if (argc > 3)
        seconds = atof(argv[3]);
    if (argc > 4)
        long_kib = (unsigned)atoi(argv[4]);
    if (argc > 5)
        different = (unsigned)atoi(argv[5]);
    long_one = short_one;
    long_one.most = long_kib;
    long_one.row = 256;
    long_one.tokens = different;
    if (strcmp(argv[1], "long"))
        return both(!strcmp(argv[1], "together")), 0;
    struct side *s = new_side(world_comm(), 1);
    make_long_ones(s);
    end_side(s);
    return 0;
}
