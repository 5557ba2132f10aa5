/*
 * test_policy.c: what the yardmaster decides by (src/engine/policy.h), asked as the agreement asks it, in a small world
 * where each strategy takes as long as the test says.
 */
#include <check.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/policy.h"
#include "ucx/carrier.h"

enum { NODES = 2, GPUS = 4, RANKS = NODES * GPUS };

static struct ry_cluster *map;
static struct ry_chooser *chooser;
static struct ry_policy policy;
static _Atomic int forced;
static struct ry_side sides[RANKS];
static struct ry_repeats found[RANKS * NODES];
static double message_us = 2; /* across, where the NIC is slow */
static bool slow_nic;         /* and fast links in the nodes */
static int asked_chunks;      /* RAILYARD_CHUNKS */
static int asked_transport;   /* enum ry_transport */
static _Atomic int transport;
static double ucx_us;         /* bytes per microsecond over UCX, measured; 0: not measured */
static struct ry_pace *pace;  /* NULL: only estimates count */
static uint64_t matrix[RANKS * RANKS], number;
static double takes_us[RY_STRATEGIES]; /* the truth; balanced, where nothing is said of it: as hierarchical */
static int went[RY_STRATEGIES];
static bool last, verify, late; /* late: durations become known eight exchanges at a time */
static struct ry_took later[RANKS][RY_TOOK];
static struct ry_beside beside; /* what ran beside each exchange, as every rank tells */
static unsigned rest;

/* Made by what a test would change of it. */
static void begin(uint64_t verify_every, uint64_t staging_limit, double agreement_us)
{
    struct ry_seat seats[RANKS];
    struct ry_err err;
    memset(seats, 0, sizeof seats);
    for (int r = 0; r < RANKS; r++) {
        seats[r] = (struct ry_seat){.version = RY_SEAT_VERSION, .rank = r, .able = 1};
        snprintf(seats[r].node, sizeof seats[r].node, "node%d", r / GPUS);
    }
    map = ry_cluster_build(seats, RANKS, &err);
    ck_assert_ptr_nonnull(map);
    struct ry_policy_config config = {.map = map,
                                      .forced = &forced,
                                      .verify = verify_every,
                                      .staging_limit = staging_limit,
                                      .chunks = asked_chunks,
                                      .transport = &transport,
                                      .pace = pace,
                                      .name = "test"};
    atomic_store(&transport, asked_transport);
    ry_cost_guess(&config.model, map);
    config.model.agreement_us = agreement_us;
    if (slow_nic) {
        config.model.link[RY_LINK_NIC].bytes_per_us = config.model.nic_rank_bytes_per_us = 3e3;
        config.model.link[RY_LINK_LOCAL].bytes_per_us = 200e3;
        config.model.link[RY_LINK_NIC].message_us = message_us;
        config.model.measured = true;
        config.model.link[RY_LINK_NIC].measured = config.model.ucx.measured = ucx_us > 0;
        config.model.ucx = config.model.link[RY_LINK_NIC];
        config.model.ucx.bytes_per_us = config.model.ucx_rank_bytes_per_us = ucx_us;
    }
    chooser = ry_chooser_new(&config, &err);
    ck_assert_msg(chooser != NULL, "%s", err.msg);
    policy = ry_chooser_policy(chooser);
    atomic_store(&forced, -1);
    memset(sides, 0, sizeof sides);
    memset(found, 0, sizeof found);
    memset(went, 0, sizeof went);
    memset(later, 0, sizeof later);
    number = 0;
}

static void end(void)
{
    ry_chooser_free(chooser);
    ry_cluster_free(map);
}

/* Everybody sends everybody `bytes`. */
static void uniform(uint64_t bytes, uint64_t staging)
{
    uint64_t row[RANKS];
    for (int i = 0; i < RANKS; i++)
        row[i] = bytes;
    for (int i = 0; i < RANKS * RANKS; i++)
        matrix[i] = bytes;
    for (int r = 0; r < RANKS; r++) {
        ry_load_of(&sides[r].load, map, r, row, row, NULL);
        sides[r].staging = staging;
        sides[r].row_bytes = 0;
        for (int s = 0; s < RY_STRATEGIES; s++)
            sides[r].pack[s] = 0;
    }
}

/* In so many parts, among which distinct rows appear evenly. */
static void spread(struct ry_repeats *r, int parts)
{
    r->parts = (uint64_t)parts;
    for (int k = 1; k < parts; k++)
        r->early[k - 1] = ry_part_at(r->distinct, k, parts);
}

/* On top of uniform(): every rank looked, and of `copies` rows one is left. */
static void duplicates(uint64_t row_bytes, uint64_t copies)
{
    for (int r = 0; r < RANKS; r++) {
        for (int n = 0; n < NODES; n++) {
            found[r * NODES + n] = (struct ry_repeats){.row_bytes = row_bytes, .distinct = 0};
            for (int p = n * GPUS; p < (n + 1) * GPUS; p++)
                found[r * NODES + n].distinct += ry_rows_of(matrix[r * RANKS + p], row_bytes) / copies;
            spread(&found[r * NODES + n], 4);
        }
        sides[r].row_bytes = row_bytes;
        sides[r].parts = 4;
        ry_load_of(&sides[r].load, map, r, matrix + r * RANKS, matrix + r * RANKS, found + r * NODES);
    }
}

static struct ry_agreed agreed(const void **extra, size_t *bytes)
{
    static uint64_t room[RANKS][(sizeof(struct ry_side) + NODES * RY_CHUNKS * sizeof(uint32_t)) / sizeof(uint64_t)];
    for (int r = 0; r < RANKS; r++) {
        extra[r] = room[r];
        bytes[r] = ry_side_pack(room[r], &sides[r], NODES, found + r * NODES);
    }
    return (struct ry_agreed){
        .number = number, .nranks = RANKS, .matrix = matrix, .extra = extra, .extra_bytes = bytes};
}

static bool worth(void)
{
    static struct ry_seen seen[RANKS];
    const void *extra[RANKS];
    size_t bytes[RANKS];
    for (int r = 0; r < RANKS; r++) {
        seen[r] = (struct ry_seen){.side = sides[r], .own = sides[r].load, .plain = 1};
        extra[r] = &seen[r];
        bytes[r] = sizeof seen[r];
    }
    return policy.worth(policy.context, number, extra, bytes);
}

/* *ncells: 64-bit words behind the order. */
static struct ry_order order_of(int strategy, int rank, const uint64_t **cells, size_t *ncells)
{
    const void *extra[RANKS];
    size_t bytes[RANKS], size;
    struct ry_agreed x = agreed(extra, bytes);
    struct ry_order order = {0};
    const char *p = policy.slice(policy.context, &x, strategy, rank, &size);
    *ncells = 0;
    if (!p)
        return order;
    ck_assert_uint_ge(size, sizeof order);
    memcpy(&order, p, sizeof order);
    *cells = (const uint64_t *)(p + sizeof order);
    *ncells = (size - sizeof order) / sizeof **cells;
    return order;
}

/* One engaged exchange: chosen, carried out, and its duration told by all ranks. Rank 0 was early and waited. */
static int exchange(void)
{
    const void *extra[RANKS];
    size_t bytes[RANKS], ncells;
    const uint64_t *cells;
    struct ry_agreed x = agreed(extra, bytes);
    verify = false;
    int s = policy.choose(policy.context, &x, &verify, &rest);
    last = rest > 0;
    ck_assert_int_ge(s, 0);
    ck_assert_int_lt(s, RY_STRATEGIES);
    went[s]++;
    bool timed = order_of(s, 0, &cells, &ncells).timed;
    for (int r = 0; r < RANKS; r++) {
        struct ry_took took = {number + 1, matrix[r] * RANKS, takes_us[s == RY_BALANCED && !takes_us[s] ? RY_HIERARCHICAL : s] * (r ? 1 : 3), beside};
        bool known = timed || number % 8 == 0;
        later[r][number % RY_TOOK] = known ? took : (struct ry_took){0};
        memset(sides[r].took, 0, sizeof sides[r].took); /* told */
        if (!late || number % RY_TOOK == RY_TOOK - 1) {
            memcpy(sides[r].took, later[r], sizeof later[r]);
            memset(later[r], 0, sizeof later[r]);
        }
    }
    number++;
    return s;
}

START_TEST(forced_is_obeyed)
{
    begin(0, 1 << 30, 50);
    uniform(1000, 1 << 20);
    for (int s = 0; s < RY_SUM; s++) {
        atomic_store(&forced, s);
        ck_assert(worth());
        for (int i = 0; i < 300; i++) {
            ck_assert_int_eq(exchange(), s);
            ck_assert(!last); /* whatever it costs */
        }
    }
    end();
}
END_TEST

/* All ranks offer to sum what comes now as the return of exchange `of`. */
static void offer(uint64_t of, uint64_t copies, uint64_t stage)
{
    for (int r = 0; r < RANKS; r++) {
        sides[r].row_bytes = 0;
        sides[r].answers = of + 1;
        sides[r].copies = copies;
        sides[r].pack[RY_SUM] = stage;
        ry_load_of(&sides[r].load, map, r, matrix + r * RANKS, matrix + r * RANKS, NULL);
    }
}

/* One exchange by dedup, and what comes back. */
static int there_and_back(uint64_t copies, uint64_t stage)
{
    uniform(65536, 1 << 30);
    matrix[1] += 64; /* not its own transpose */
    offer(UINT64_MAX, 0, 0);
    duplicates(64, 4);
    ck_assert_int_eq(exchange(), RY_DEDUP);
    offer(number - 1, copies, stage);
    return exchange();
}

START_TEST(sums)
{
    const uint64_t *cells;
    size_t n;
    begin(0, 1 << 30, 50);
    for (int f = 0; f < RY_SUM; f++) { /* nobody asked for a sum but dedup may be followed by one */
        atomic_store(&forced, RY_DEDUP);
        (void)there_and_back(4, 1000);
        atomic_store(&forced, f);
        offer(number - 2, 4, 1000);
        ck_assert_int_eq(exchange(), f == RY_DEDUP ? RY_SUM : f);
    }
    atomic_store(&forced, RY_DEDUP);
    ck_assert_int_eq(there_and_back(4, 1000), RY_SUM);
    order_of(RY_SUM, 3, &cells, &n);
    ck_assert_uint_eq(n, 0); /* no cells */
    ck_assert_int_ne(there_and_back(0, 1000), RY_SUM);
    offer(number, 4, 1000); /* itself */
    ck_assert_int_ne(exchange(), RY_SUM);
    offer(number - 3, 4, 1000);
    sides[5].copies = 2;
    ck_assert_int_ne(exchange(), RY_SUM);
    offer(number - 4, 4, 1000);
    sides[5].answers = 0;
    ck_assert_int_ne(exchange(), RY_SUM);
    offer(number - 5, 4, 1000);
    matrix[1] -= 64; /* equal splits */
    ck_assert_int_ne(exchange(), RY_SUM);
    /* more staging is asked for where it takes more */
    ck_assert_int_eq(there_and_back(4, (1 << 30) - 1), RY_SUM);
    for (int r = 0; r < RANKS; r++)
        sides[r].staging = 5000;
    offer(number - 2, 4, 8000);
    ck_assert_int_eq(exchange(), RY_DIRECT);
    ck_assert_uint_eq(order_of(RY_DIRECT, 2, &cells, &n).staging_wanted, 8000);
    end();
    /* by itself: where it pays */
    slow_nic = true;
    begin(2, 1 << 30, 1000);
    takes_us[RY_DIRECT] = takes_us[RY_HIERARCHICAL] = 20000;
    takes_us[RY_DEDUP] = 6500;
    uniform(65536, 1 << 30);
    duplicates(64, 4);
    for (int i = 0; i < 20; i++)
        exchange();
    for (int i = 0; i < 20; i++) {
        ck_assert_int_eq(there_and_back(4, 1000), RY_SUM);
        ck_assert(!verify); /* meant to differ */
    }
    end();
    slow_nic = false;
}
END_TEST

START_TEST(staging_comes_first)
{
    begin(0, 1 << 30, 50);
    atomic_store(&forced, RY_HIERARCHICAL);
    uniform(1000, 0);
    const uint64_t *cells;
    size_t n;
    ck_assert_int_eq(exchange(), RY_DIRECT);
    for (int r = 0; r < RANKS; r++) {
        uint64_t wanted = order_of(RY_DIRECT, r, &cells, &n).staging_wanted;
        ck_assert_uint_eq(wanted, ry_plan_stage_relay(map, r, RY_HIERARCHICAL, matrix, NULL));
        ck_assert_uint_gt(wanted, 0);
        ck_assert_uint_eq(n, 0);
        sides[r].staging = wanted;
    }
    ck_assert_int_eq(exchange(), RY_HIERARCHICAL);
    sides[5].pack[RY_HIERARCHICAL] = 1; /* it must pack besides */
    ck_assert_int_eq(exchange(), RY_DIRECT);
    ck_assert_uint_eq(order_of(RY_DIRECT, 5, &cells, &n).staging_wanted, sides[5].staging + 1);
    ck_assert_uint_eq(order_of(RY_DIRECT, 4, &cells, &n).staging_wanted, 0);
    struct ry_chooser_counts counts;
    ry_chooser_counts(chooser, &counts);
    ck_assert_uint_eq(counts.short_of_staging, 2);
    ck_assert_uint_eq(counts.chosen[RY_HIERARCHICAL], 1);
    end();
    /* never asked for more than a rank may hold */
    begin(0, 100, 50);
    atomic_store(&forced, RY_HIERARCHICAL);
    uniform(1000, 0);
    ck_assert_int_eq(exchange(), RY_DIRECT);
    for (int r = 0; r < RANKS; r++)
        ck_assert_uint_eq(order_of(RY_DIRECT, r, &cells, &n).staging_wanted, 0);
    end();
}
END_TEST

/* Dedup takes more than hierarchical: where that is too much, hierarchical is next if it is worth anything. */
START_TEST(staging_for_the_next_best)
{
    uint64_t most[RY_STRATEGIES] = {0}, relay[RANKS], pack[RANKS];
    slow_nic = true;
    message_us = 50;
    for (int limit = RY_DEDUP; limit >= RY_DIRECT; limit--) {
        if (limit == RY_BALANCED)
            continue; /* nothing to even out here */
        begin(0, most[limit] ? most[limit] : 1 << 30, 100);
        uniform(65536, 1 << 30);
        duplicates(64, 4);
        for (int s = RY_HIERARCHICAL; limit == RY_DEDUP && s < RY_STRATEGIES; s++) {
            ck_assert(!ry_plan_stage_all(map, (enum ry_strategy)s, matrix, found, relay, pack, NULL));
            for (int r = 0; r < RANKS; r++)
                most[s] = relay[r] > most[s] ? relay[r] : most[s];
        }
        most[RY_DIRECT] = 1;
        ck_assert_uint_gt(most[RY_DEDUP], most[RY_HIERARCHICAL]);
        ck_assert_int_eq(exchange(), limit);
        struct ry_chooser_counts counts;
        ry_chooser_counts(chooser, &counts);
        ck_assert_uint_eq(counts.short_of_staging, limit != RY_DEDUP);
        end();
    }
    message_us = 2;
    slow_nic = false;
}
END_TEST

START_TEST(slices_are_the_ranks_own)
{
    for (int i = 0; i < 4; i++) { /* hierarchical, dedup, dedup where nobody looked, and balanced */
        enum ry_strategy strategy = i == 3 ? RY_BALANCED : i ? RY_DEDUP : RY_HIERARCHICAL;
        begin(0, 1 << 30, 50);
        atomic_store(&forced, (int)strategy);
        uniform(1000, 1 << 20);
        for (int k = 0; k < RANKS * RANKS; k++)
            matrix[k] = 100 + (uint64_t)k;
        for (int r = 0; i < 2 && r < RANKS; r += 2) { /* each second one looked */
            sides[r].row_bytes = 8 + (uint64_t)r;
            sides[r].parts = 4;
            for (int n = 0; n < NODES; n++) {
                found[r * NODES + n] =
                    (struct ry_repeats){.row_bytes = sides[r].row_bytes, .distinct = (uint64_t)(r + n)};
                spread(&found[r * NODES + n], 4);
            }
        }
        ck_assert_int_eq(exchange(), strategy);
        for (int r = 0; r < RANKS; r++) {
            const uint64_t *words;
            size_t n;
            struct ry_slice s, got;
            struct ry_err err = {""};
            order_of(strategy, r, &words, &n);
            ck_assert_int_eq(ry_slice_init(&s, map, r, strategy, NULL), 0);
            ck_assert_int_eq(ry_slice_init(&got, map, r, strategy, NULL), 0);
            ry_slice_fill(&s, map, matrix, found);
            size_t cells = (size_t)s.nrows * (size_t)s.ncols, bytes = sizeof(struct ry_order) + n * sizeof *words;
            ck_assert_uint_gt(cells, 0);
            ck_assert_uint_eq(n, cells + s.nwords + (s.repeats ? (1 + RY_CHUNKS / 2) * (size_t)s.nrows : 0));
            const void *extra = (const char *)words - sizeof(struct ry_order);
            ck_assert_msg(!ry_order_unpack(&got, extra, bytes, &err), "%s", err.msg);
            ck_assert_mem_eq(got.cells, s.cells, cells * sizeof *s.cells);
            ck_assert(!s.repeats == (strategy != RY_DEDUP) && !s.nwords == (strategy != RY_BALANCED));
            if (s.nwords)
                ck_assert_mem_eq(got.words, s.words, s.nwords * sizeof *s.words);
            if (s.repeats)
                ck_assert_mem_eq(got.repeats, s.repeats, (size_t)s.nrows * sizeof *s.repeats);
            ck_assert_int_eq(ry_order_unpack(&got, extra, bytes - 8, &err), -1);
            ck_assert_int_eq(ry_order_unpack(&got, extra, bytes + 8, &err), -1);
            ck_assert_int_eq(ry_order_unpack(&got, extra, 0, &err), -1);
            ry_slice_free(&s);
            ry_slice_free(&got);
        }
        end();
    }
}
END_TEST

START_TEST(every_nth_is_verified)
{
    begin(5, 1 << 30, 50);
    atomic_store(&forced, RY_HIERARCHICAL);
    uniform(1000, 1 << 20);
    int verified = 0;
    for (int i = 0; i < 50; i++) {
        exchange();
        verified += verify;
    }
    ck_assert_int_eq(verified, 10);
    atomic_store(&forced, RY_DIRECT);
    for (int i = 0; i < 50; i++) {
        exchange();
        ck_assert(!verify); /* there is nothing to compare */
    }
    end();
}
END_TEST

/* Small exchanges, agreeing costs more than it could bring: not worth it, and never asked to find out. */
START_TEST(declines_where_agreeing_costs_more)
{
    begin(0, 1 << 30, 500);
    uniform(256, 1 << 20);
    ck_assert(!worth());
    /* engaged all the same, as after larger exchanges: it ends by itself */
    takes_us[RY_DIRECT] = takes_us[RY_HIERARCHICAL] = 100;
    int i = 0;
    for (last = false; !last && i < 1000; i++)
        exchange();
    ck_assert_int_le(i, 12); /* soon */
    end();
}
END_TEST

/* Long exchanges, of which the model is wrong: each strategy is tried, timed, and the better one stays; the worse is
 * left after. */
/* Exchanges that pass are timed, too: what plain NCCL takes is known before anything was agreed on. */
START_TEST(knows_plain)
{
    const double real = 3000;
    begin(0, 1 << 30, 60);
    uniform(64 << 10, 1 << 20);
    duplicates(1 << 10, 4);
    for (int r = 0; r < RANKS; r++) /* as far as is known before anybody waits for a search */
        sides[r].load.scanned = sides[r].load.cross_out, sides[r].load.packed_out = sides[r].load.cross_out / 4, sides[r].row_bytes = 0;
    bool first = worth();
    ck_assert(!first); /* by the guess, which takes the NIC for thirty times as fast, there is nothing to gain */
    int asked = 0;
    for (; asked < 12 && !worth(); asked++, number += 3)
        for (int r = 0; r < RANKS; r++)
            sides[r].took[0] = (struct ry_took){number + 1, matrix[r] * RANKS, real * (r ? 1 : 3), {0}};
    ck_assert_int_lt(asked, 6);
    /* Durations of exchanges that were not seen, or nothing at all: nothing is learned. */
    end();
    begin(0, 1 << 30, 60);
    uniform(64 << 10, 1 << 20);
    for (int r = 0; r < RANKS; r++)
        sides[r].load.scanned = sides[r].load.cross_out, sides[r].load.packed_out = sides[r].load.cross_out / 4;
    for (int i = 0; i < 12; i++, number += 3) {
        ck_assert(!worth());
        for (int r = 0; r < RANKS; r++)
            sides[r].took[0] = (struct ry_took){number + 2, matrix[r] * RANKS, real, {0}};
    }
    end();
}
END_TEST

START_TEST(finds_out)
{
    for (int i = 0; i < 4; i++) {
        int better = i % 2;
        late = i / 2;
        begin(0, 1 << 30, 50);
        uniform(64 << 20, 1 << 30);
        takes_us[RY_DIRECT] = takes_us[RY_HIERARCHICAL] = 100000;
        takes_us[better] = 80000;
        ck_assert(worth());
        bool ended = false;
        for (int k = 0; k < 64 && !ended; k++) {
            exchange();
            ended = last;
        }
        ck_assert_int_ge(went[RY_DIRECT], 6);
        ck_assert_int_ge(went[RY_HIERARCHICAL], 6);
        int before = went[better];
        for (int k = 0; k < 60 && !ended; k++) {
            exchange();
            ended = last;
        }
        if (better == RY_HIERARCHICAL) {
            ck_assert(!ended);
            ck_assert_int_ge(went[better] - before, 55);
        } else { /* plain NCCL does that, too, without agreeing */
            ck_assert(ended);
            ck_assert_int_le((int)number, 12 + (late ? 8 : 4) + 12); /* durations come some exchanges late */
            ck_assert(!worth());                        /* and that is known now */
        }
        end();
    }
    late = false;
}
END_TEST

/* The next `n` exchanges follow each other so fast, agreed on or not. */
static void follow(enum ry_pace_way way, int n, double us)
{
    for (int i = 0; i < n; i++, number += way == RY_PACE_PLAIN)
        if (ry_pace_wants(pace, way)) {
            ry_pace_began(pace, number, way, 64 << 20, 64 << 20, false);
            ry_pace_took(pace, number, us);
        }
}

/* By its duration hierarchical is a fifth faster; but what counts is how fast exchanges follow each other. */
START_TEST(keeps_pace)
{
    for (int gains = 0; gains < 2; gains++) {
        pace = ry_pace_new();
        begin(0, 1 << 30, 50);
        uniform(64 << 20, 1 << 30);
        takes_us[RY_DIRECT] = 100000;
        takes_us[RY_HIERARCHICAL] = 80000;
        ck_assert(worth());
        for (rest = 0; !rest && number < 100;) {
            exchange();
            follow(RY_PACE_ENGAGED, 1, gains ? 85000 : 105000);
        }
        ck_assert_uint_eq(rest, 16);
        ck_assert_uint_le(number, 2 * (6 + 6) + 12 + 1);
        follow(RY_PACE_PLAIN, (int)rest, 100000);
        ck_assert_int_eq(worth(), gains);
        number += 5; /* nor is it asked about again at once */
        ck_assert_int_eq(worth(), gains);
        for (int i = 0; gains && i < 200; i++) {
            exchange();
            follow(RY_PACE_ENGAGED, 1, 85000);
            ck_assert_uint_eq(rest, 0);
        }
        if (gains) { /* plain NCCL has become faster, as it turns out when it is watched again */
            for (rest = 0; !rest && number < 3000;) {
                exchange();
                follow(RY_PACE_ENGAGED, 1, 85000);
            }
            ck_assert_uint_eq(rest, 16);
            follow(RY_PACE_PLAIN, (int)rest, 80000);
            ck_assert(!worth());
        }
        end();
        ry_pace_free(pace);
    }
    pace = NULL;
}
END_TEST

/* Where much is saved nothing passes by for the sake of knowing it better. */
START_TEST(sure_of_much)
{
    pace = ry_pace_new();
    slow_nic = true;
    begin(0, 1 << 30, 50);
    uniform(4 << 20, 1 << 30);
    takes_us[RY_DIRECT] = takes_us[RY_HIERARCHICAL] = 22000;
    takes_us[RY_DEDUP] = 6500;
    duplicates(4096, 4);
    for (int i = 0; i < 300; i++) {
        exchange();
        follow(RY_PACE_ENGAGED, 1, 30000);
        ck_assert_uint_eq(rest, 0);
    }
    ck_assert(!ry_pace_wants(pace, RY_PACE_PLAIN));
    end();
    slow_nic = false;
    ry_pace_free(pace);
    pace = NULL;
}
END_TEST

/* Rows are equal: dedup is what is chosen, and stays, whatever is tried besides. */
static void dedup_pays(double agreement_us)
{
    slow_nic = true;
    begin(0, 1 << 30, agreement_us);
    uniform(4 << 20, 1 << 30);
    takes_us[RY_DIRECT] = takes_us[RY_HIERARCHICAL] = 22000;
    takes_us[RY_DEDUP] = 6500;
    duplicates(4096, 4);
    ck_assert(worth()); /* expected of earlier exchanges of its kind */
    for (int i = 0; i < 300; i++) {
        exchange();
        ck_assert(!last);
    }
    ck_assert_int_eq(exchange(), RY_DEDUP);
}

START_TEST(equal_rows)
{
    dedup_pays(1000); /* too much to find out */
    ck_assert_int_ge(went[RY_DEDUP], 300);
    end();
    dedup_pays(50);
    ck_assert_int_ge(went[RY_DIRECT], 3); /* that the model says so is not all */
    ck_assert_int_le(went[RY_DIRECT], 6);
    ck_assert_int_eq(went[RY_HIERARCHICAL], 0); /* far from it */
    end();
    /* What the model says is wrong: it is left again. */
    begin(0, 1 << 30, 50);
    uniform(4 << 20, 1 << 30);
    duplicates(4096, 4);
    takes_us[RY_DIRECT] = takes_us[RY_HIERARCHICAL] = 22000;
    takes_us[RY_DEDUP] = 40000;
    bool ended = false;
    for (int i = 0; i < 100 && !ended; i++) {
        exchange();
        ended = last;
    }
    ck_assert(ended);
    ck_assert(!worth());
    ck_assert_int_le(went[RY_DEDUP], 20);
    end();
    slow_nic = false;
}
END_TEST

/* Dispatch and combine take turns: rows of the one are equal, those of the other are not, and were looked at or not. */
START_TEST(kinds_take_turns)
{
    slow_nic = true;
    for (int looked = 0; looked < 2; looked++) {
        begin(0, 1 << 30, 1000);
        takes_us[RY_DIRECT] = takes_us[RY_HIERARCHICAL] = 22000;
        takes_us[RY_DEDUP] = 6500;
        for (int i = 0; i < 400; i++) {
            uniform(4 << 20, 1 << 30);
            if (i % 2 == 0 || looked)
                duplicates(4096, i % 2 ? 1 : 4);
            int s = exchange();
            ck_assert(!last); /* one pays for both */
            ck_assert_int_eq(s == RY_DEDUP, i % 2 == 0);
        }
        /* no more equal rows, but the ranks go on looking: that is not for nothing, and soon over: after what is still
         * tried, and an account */
        for (int i = 0; i < 100 && !last; i++) {
            uniform(4 << 20, 1 << 30);
            duplicates(4096, 1);
            exchange();
        }
        ck_assert(last);
        end();
    }
    slow_nic = false;
}
END_TEST

/* Looks as if it paid whenever it is asked about, and never does: proposals become rare. */
START_TEST(does_not_flap)
{
    slow_nic = true;
    begin(0, 1 << 30, 2000);
    takes_us[RY_DIRECT] = takes_us[RY_HIERARCHICAL] = takes_us[RY_DEDUP] = 150; /* as estimated, about */
    int engaged = 0, asked = 0;
    for (; asked < 200; asked++) {
        uniform(4 << 20, 1 << 30);
        duplicates(4096, 4);
        if (!worth())
            continue;
        uniform(1 << 10, 1 << 30);
        last = false;
        for (int i = 0; i < 64 && !last; i++) {
            exchange();
            engaged++;
        }
        ck_assert(last);
    }
    ck_assert_int_le(engaged, 12 * 9);
    /* now it does */
    int declined = 0;
    takes_us[RY_DIRECT] = takes_us[RY_HIERARCHICAL] = 22000;
    takes_us[RY_DEDUP] = 6500;
    for (uniform(4 << 20, 1 << 30), duplicates(4096, 4); !worth(); declined++)
        ;
    ck_assert_int_le(declined, 62);
    for (int i = 0; i < 12; i++) {
        exchange();
        ck_assert(!last);
    }
    ck_assert(worth()); /* and so it does the next time */
    end();
    slow_nic = false;
}
END_TEST

/* Nobody ever tells how long it took: that is not waited for. */
START_TEST(durations_never_come)
{
    begin(0, 1 << 30, 50);
    uniform(64 << 20, 1 << 30);
    ck_assert(worth());
    for (last = false; !last && number < 100;) {
        exchange();
        for (int r = 0; r < RANKS; r++)
            memset(sides[r].took, 0, sizeof sides[r].took);
    }
    ck_assert_int_le((int)number, 2 * 12 + 12);
    ck_assert(!worth());
    end();
}
END_TEST

/* What early ranks measure is their waiting; what idle ones measure is nothing. */
START_TEST(learns_from_the_busy)
{
    begin(0, 1 << 30, 50);
    uniform(64 << 20, 1 << 30);
    takes_us[RY_DIRECT] = 100000; /* which the model does not expect */
    takes_us[RY_HIERARCHICAL] = 80000;
    for (int i = 0; i < 40; i++) {
        exchange();
        for (int k = 0; k < RY_TOOK; k++) { /* it had next to nothing to do */
            sides[7].took[k].us = 1;
            sides[7].took[k].bytes = 1000;
        }
    }
    went[RY_HIERARCHICAL] = 0;
    for (int i = 0; i < 20; i++)
        exchange();
    ck_assert_int_ge(went[RY_HIERARCHICAL], 18);
    end();
}
END_TEST

/* All ranks expect others beside the next exchanges, or that these do meet some; `part` of the NICs' bytes theirs. */
static struct ry_beside others(double part)
{
    return (struct ry_beside){(uint64_t)(part * 1e6), (uint64_t)(part * 1e6), 1000000, 1000000, part > 0 ? 1 : 0};
}

static void expect_others(double part)
{
    for (int r = 0; r < RANKS; r++)
        sides[r].load.beside = others(part);
}

static double plain_us(int strategy)
{
    const uint64_t *cells;
    size_t n;
    return order_of(strategy, 0, &cells, &n).plain_us;
}

/* While others are on the NICs everything takes twice as long: what is measured then is not held against a strategy afterwards, nor
 * what was measured before against the others. */
START_TEST(beside_others)
{
    begin(0, 1 << 30, 50);
    uniform(64 << 20, 1 << 30);
    for (int turn = 0; turn < 4; turn++) {
        double times = turn % 2 ? 2 : 1;
        expect_others(turn % 2);
        beside = others(turn % 2);
        takes_us[RY_DIRECT] = 100000 * times;
        takes_us[RY_HIERARCHICAL] = 80000 * times;
        if (turn > 1) { /* known from before, at once */
            ck_assert_int_eq(exchange(), RY_HIERARCHICAL);
            ck_assert_double_eq_tol(plain_us(RY_HIERARCHICAL), 100000 * times, 1000 * times);
        }
        for (int i = 0; i < 48; i++)
            exchange();
        ck_assert_int_eq(exchange(), RY_HIERARCHICAL);
        ck_assert_double_eq_tol(plain_us(RY_HIERARCHICAL), 100000 * times, 1000 * times);
    }
    struct ry_chooser_counts counts;
    ry_chooser_counts(chooser, &counts);
    ck_assert_uint_eq(counts.dropped, 0);
    ck_assert_uint_eq(counts.beside, 49 + 50);
    end();
}
END_TEST

/* Others come beside exchanges for which nobody expected them: those durations tell nothing. */
START_TEST(unexpected_others)
{
    begin(0, 1 << 30, 50);
    uniform(64 << 20, 1 << 30);
    takes_us[RY_DIRECT] = 100000;
    takes_us[RY_HIERARCHICAL] = 80000;
    for (int i = 0; i < 48; i++)
        exchange();
    ck_assert_int_eq(exchange(), RY_HIERARCHICAL);
    beside = others(1);
    takes_us[RY_HIERARCHICAL] = 160000;
    for (int i = 0; i < 400; i++)
        exchange();
    ck_assert_int_ge(went[RY_HIERARCHICAL], 380);
    struct ry_chooser_counts counts;
    ry_chooser_counts(chooser, &counts);
    ck_assert_uint_ge(counts.dropped, 40);
    ck_assert_uint_eq(counts.beside, 0);
    end();
    beside = others(0);
}
END_TEST

/* What all ranks are told of the nodes' communicators with the verdict just given. */
static enum ry_node_order node_order(int strategy)
{
    const uint64_t *cells;
    size_t n;
    uint64_t order = order_of(strategy, 0, &cells, &n).node_comm;
    for (int r = 1; r < RANKS; r++)
        ck_assert_uint_eq(order_of(strategy, r, &cells, &n).node_comm, order);
    return (enum ry_node_order)order;
}

static void all_say(enum ry_node_state state)
{
    for (int r = 0; r < RANKS; r++)
        sides[r].node_comm = state;
}

/* So many exchanges, with what order? */
static void node_orders(int exchanges, enum ry_node_order wanted)
{
    for (int i = 0; i < exchanges; i++)
        ck_assert_int_eq(node_order(exchange()), wanted);
}

/* Everybody's messages are in so many parts now; the plan that is told, and the parts asked for from then on. */
static void chunks_told(int parts, uint32_t chunks, uint32_t wanted)
{
    const uint64_t *cells;
    size_t n;
    for (int r = 0; parts && r < RANKS; r++) {
        sides[r].parts = (uint64_t)parts;
        for (int k = 0; k < NODES; k++)
            spread(&found[r * NODES + k], parts);
    }
    int strategy = exchange();
    for (int r = 0; r < RANKS; r++) {
        struct ry_order order = order_of(strategy, r, &cells, &n);
        ck_assert_msg(order.chunks == chunks && order.parts == wanted,
                      "exchange %d by %s: rank %d: %u chunks, %u parts wanted", (int)number, ry_strategy_name(strategy),
                      r, order.chunks, order.parts);
    }
}

/* In chunks where passing on inside the nodes takes long, over communicators of the nodes' ranks, as soon as messages
 * are in so many parts; and not before. */
START_TEST(chunks)
{
    slow_nic = true;
    begin(0, UINT64_C(1) << 34, 50);
    uniform(8 << 20, UINT64_C(1) << 33);
    duplicates(4096, 2);
    all_say(RY_NODE_COULD);
    atomic_store(&forced, RY_DEDUP);
    chunks_told(1, 1, 1);
    while (node_order(exchange()) != RY_NODE_MAKE)
        ck_assert_int_lt((int)number, 50);
    all_say(RY_NODE_HAS);
    chunks_told(1, 1, 4);
    chunks_told(4, 4, 4);
    chunks_told(2, 2, 4);
    chunks_told(4, 4, 4);
    sides[3].parts = 2; /* one that was not told yet */
    for (int k = 0; k < NODES; k++)
        spread(&found[3 * NODES + k], 2);
    chunks_told(0, 1, 4);
    atomic_store(&forced, RY_DIRECT);
    chunks_told(4, 0, 0); /* nothing is told */
    atomic_store(&forced, RY_DEDUP);
    sides[5].node_comm = RY_NODE_CANNOT;
    chunks_told(4, 1, 4);
    end();
    /* asked for by the user, whatever the model says */
    asked_chunks = 2;
    begin(0, UINT64_C(1) << 34, 50);
    uniform(64 << 10, UINT64_C(1) << 33);
    duplicates(4096, 2);
    atomic_store(&forced, RY_DEDUP);
    chunks_told(1, 1, 2);
    chunks_told(2, 2, 2);
    end();
    asked_chunks = 0;
    /* little to hide */
    begin(0, UINT64_C(1) << 34, 50);
    uniform(64 << 10, UINT64_C(1) << 33);
    duplicates(4096, 2);
    all_say(RY_NODE_COULD);
    atomic_store(&forced, RY_DEDUP);
    while (node_order(exchange()) != RY_NODE_MAKE)
        ck_assert_int_lt((int)number, 50);
    all_say(RY_NODE_HAS);
    for (int i = 0; i < 20; i++)
        chunks_told(1, 1, 1);
    end();
    slow_nic = false;
}
END_TEST

START_TEST(node_comms)
{
    begin(0, 1 << 30, 50);
    uniform(1000, 1 << 20);
    all_say(RY_NODE_COULD);
    atomic_store(&forced, RY_DIRECT);
    node_orders(50, RY_NODE_NOTHING);
    atomic_store(&forced, RY_HIERARCHICAL);
    node_orders(5, RY_NODE_NOTHING);
    sides[3].staging = 0; /* direct, for want of it */
    node_orders(10, RY_NODE_NOTHING);
    sides[3].staging = 1 << 20;
    node_orders(3, RY_NODE_NOTHING);
    node_orders(1, RY_NODE_MAKE);
    node_orders(20, RY_NODE_NOTHING); /* once */
    for (int r = 0; r < RANKS; r++) {
        node_orders(1, RY_NODE_NOTHING);
        sides[r].node_comm = RY_NODE_HAS;
    }
    node_orders(20, RY_NODE_USE);
    atomic_store(&forced, RY_DIRECT);
    node_orders(1, RY_NODE_NOTHING);
    atomic_store(&forced, RY_DEDUP); /* with nothing packed */
    node_orders(1, RY_NODE_USE);
    sides[6].node_comm = RY_NODE_CANNOT;
    node_orders(20, RY_NODE_NOTHING);
    all_say(RY_NODE_COULD);
    node_orders(20, RY_NODE_NOTHING);
    end();
    /* One that never could: nobody is asked. One that failed: the others do not use theirs. */
    for (int failed = 0; failed < 2; failed++) {
        begin(0, 1 << 30, 50);
        uniform(1000, 1 << 20);
        atomic_store(&forced, RY_HIERARCHICAL);
        all_say(RY_NODE_COULD);
        if (failed) {
            node_orders(8, RY_NODE_NOTHING);
            node_orders(1, RY_NODE_MAKE);
            all_say(RY_NODE_HAS);
        }
        sides[5].node_comm = RY_NODE_CANNOT;
        node_orders(50, RY_NODE_NOTHING);
        end();
    }
}
END_TEST

/* What the orders of the next exchange, alike for all ranks but for memory, say of UCX. */
static bool by_ucx(uint64_t *wanted)
{
    const uint64_t *cells;
    size_t ncells;
    int s = exchange();
    bool is = order_of(s, 0, &cells, &ncells).cross;
    for (int r = 0; r < RANKS; r++) {
        struct ry_order order = order_of(s, r, &cells, &ncells);
        ck_assert_uint_eq(order.cross, is);
        ck_assert(s != RY_DIRECT || !order.cross);
        wanted[r] = order.cross_wanted;
    }
    return is;
}

static void none_wanted(const uint64_t *wanted)
{
    for (int r = 0; r < RANKS; r++)
        ck_assert_uint_eq(wanted[r], 0);
}

/* UCX carries it where all ranks can, hold the memory, and it is asked for; or, with auto, measured to be faster. */
START_TEST(over_ucx)
{
    uint64_t wanted[RANKS];
    asked_transport = RY_BY_UCX;
    begin(0, 1 << 30, 50);
    uniform(10000, 1 << 20);
    atomic_store(&forced, RY_HIERARCHICAL);
    ck_assert(!by_ucx(wanted)); /* nobody can */
    none_wanted(wanted);
    for (int r = 0; r < RANKS; r++) {
        sides[r].cross = RY_CROSS_COULD;
        sides[r].cross_held = UINT64_MAX;
    }
    ck_assert(!by_ucx(wanted)); /* not yet */
    for (int r = 0; r < RANKS; r++) {
        sides[r].cross = RY_CROSS_HAS;
        ck_assert_int_eq(by_ucx(wanted), r == RANKS - 1);
        none_wanted(wanted);
    }
    atomic_store(&forced, RY_DIRECT);
    ck_assert(!by_ucx(wanted));
    atomic_store(&forced, RY_BALANCED);
    ck_assert(by_ucx(wanted));
    sides[6].cross_held = 100; /* staged, that is */
    ck_assert(!by_ucx(wanted));
    for (int r = 0; r < RANKS; r++)
        ck_assert_uint_eq(wanted[r], r == 6 ? ry_cross_need(map, 6, RY_BALANCED, matrix) : 0);
    sides[6].cross_held = wanted[6];
    ck_assert(by_ucx(wanted));
    sides[2].cross = RY_CROSS_CANNOT;
    ck_assert(!by_ucx(wanted));
    sides[2].cross = RY_CROSS_HAS;
    atomic_store(&transport, RY_BY_NCCL); /* as railyard_strategy() may say */
    ck_assert(!by_ucx(wanted));
    end();
    begin(0, 700000, 50); /* more than RAILYARD_STAGING is never asked for */
    uniform(100000, 1 << 20);
    atomic_store(&forced, RY_HIERARCHICAL);
    for (int r = 0; r < RANKS; r++)
        sides[r].cross = RY_CROSS_HAS;
    ck_assert(!by_ucx(wanted));
    none_wanted(wanted);
    end();
    for (int faster = 0; faster < 2; faster++) {
        slow_nic = true;
        asked_transport = RY_BY_FASTER;
        ucx_us = faster ? 4e3 : 3.1e3;
        begin(0, 1 << 30, 50);
        uniform(100000, 1 << 30);
        atomic_store(&forced, RY_HIERARCHICAL);
        for (int r = 0; r < RANKS; r++) {
            sides[r].cross = RY_CROSS_HAS;
            sides[r].cross_held = UINT64_MAX;
        }
        ck_assert_int_eq(by_ucx(wanted), faster);
        end();
    }
    ucx_us = 0;
    begin(0, 1 << 30, 50); /* not measured */
    uniform(100000, 1 << 30);
    atomic_store(&forced, RY_HIERARCHICAL);
    for (int r = 0; r < RANKS; r++)
        sides[r].cross = RY_CROSS_HAS;
    ck_assert(!by_ucx(wanted));
    none_wanted(wanted);
    end();
    slow_nic = false;
    asked_transport = RY_BY_NCCL;
}
END_TEST

/* One rank without the kernels for packed messages: nobody packs, whatever others found. */
START_TEST(one_that_cannot_pack)
{
    slow_nic = true;
    begin(0, 1ull << 32, 50);
    uniform(1 << 20, 1ull << 31);
    duplicates(4096, 8);
    atomic_store(&forced, RY_DEDUP);
    ck_assert_int_eq(exchange(), RY_DEDUP);
    sides[RANKS - 1].cannot_pack = 1;
    ck_assert_int_eq(exchange(), RY_HIERARCHICAL);
    atomic_store(&forced, -1);
    for (int i = 0; i < 40; i++)
        ck_assert_int_ne(exchange(), RY_DEDUP);
    sides[RANKS - 1].cannot_pack = 0;
    memset(went, 0, sizeof went);
    for (int i = 0; i < 40; i++)
        exchange();
    ck_assert_int_gt(went[RY_DEDUP], 20);
    slow_nic = false;
    end();
}
END_TEST

/* Relaying that is slower than direct without the nodes' communicators and faster with them must be found faster: they
   are asked for early where the model expects it, and what was measured without them is forgotten. */
START_TEST(node_comms_change_what_is_known)
{
    const uint64_t *cells;
    size_t n;
    slow_nic = true;
    message_us = 300;
    begin(0, 1ull << 32, 50);
    uniform(1 << 20, 1ull << 31);
    all_say(RY_NODE_COULD);
    takes_us[RY_DIRECT] = 20000;
    takes_us[RY_HIERARCHICAL] = takes_us[RY_BALANCED] = 30000;
    int made = -1;
    for (int i = 0; i < 60 && !last; i++) {
        int s = exchange();
        if (made < 0 && order_of(s, 0, &cells, &n).node_comm == RY_NODE_MAKE) {
            ck_assert_int_ne(s, RY_DIRECT);
            made = went[RY_HIERARCHICAL] + went[RY_BALANCED];
        }
    }
    ck_assert(last);
    ck_assert_int_eq(made, 2);
    ck_assert(!worth()); /* by all that was measured */
    all_say(RY_NODE_HAS);
    takes_us[RY_HIERARCHICAL] = 15000;
    atomic_store(&forced, RY_HIERARCHICAL);
    exchange(); /* the first that uses them, for whatever reason */
    atomic_store(&forced, -1);
    memset(went, 0, sizeof went);
    for (int i = 0; i < 100; i++)
        exchange();
    ck_assert_int_ge(went[RY_HIERARCHICAL], 90);
    ck_assert(!last && worth());
    slow_nic = false;
    message_us = 2;
    end();
}
END_TEST

START_TEST(nonsense_from_a_rank_ends_it)
{
    begin(0, 1 << 30, 50);
    uniform(1000, 1 << 20);
    const void *extra[RANKS];
    size_t bytes[RANKS];
    struct ry_agreed x = agreed(extra, bytes);
    bytes[3] = 5;
    verify = false, rest = 0;
    ck_assert_int_eq(policy.choose(policy.context, &x, &verify, &rest), RY_DIRECT);
    ck_assert_uint_eq(rest, 1);
    ck_assert(!policy.worth(policy.context, 0, extra, bytes));
    end();
    /* of what it found */
    for (int bad = 0; bad <= 9; bad++) {
        begin(0, 1 << 30, 50);
        uniform(10000, 1 << 20);
        duplicates(64, 3);
        if (bad == 1)
            found[3 * NODES + 1].distinct = 4 * 157 + 1; /* 157 rows to each of node 1's ranks */
        if (bad == 2)
            found[3 * NODES].distinct = UINT64_MAX; /* own node's: nobody reads it, nobody minds */
        if (bad == 3)
            found[3 * NODES + 1].distinct = 4 * 157, spread(&found[3 * NODES + 1], 4); /* all of them */
        if (bad == 4)
            sides[3].row_bytes = UINT64_MAX;
        if (bad == 8)
            found[3 * NODES + 1].early[1] = found[3 * NODES + 1].early[0] - 1; /* fewer, later */
        if (bad == 9)
            sides[3].parts = 3;
        found[4 * NODES].distinct = bad == 5 ? UINT64_MAX : found[4 * NODES].distinct;
        x = agreed(extra, bytes);
        if (bad == 6)
            bytes[3] -= sizeof(uint64_t);
        if (bad == 7)
            bytes[3] = sizeof(struct ry_side);
        verify = false, rest = 0;
        int s = policy.choose(policy.context, &x, &verify, &rest);
        bool refused = bad == 1 || bad >= 4;
        ck_assert_msg(rest == refused, "%d: %u", bad, rest);
        size_t size = 1;
        ck_assert(!refused || (s == RY_DIRECT && !policy.slice(policy.context, &x, s, 3, &size) && !size));
        end();
    }
    /* bytes beyond the side, though nothing was looked for */
    begin(0, 1 << 30, 50);
    uniform(10000, 1 << 20);
    x = agreed(extra, bytes);
    bytes[3] += NODES * sizeof(uint64_t);
    verify = false, rest = 0;
    ck_assert_int_eq(policy.choose(policy.context, &x, &verify, &rest), RY_DIRECT);
    ck_assert_uint_eq(rest, 1);
    end();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("policy");
    TCase *t = tcase_create("policy");
    tcase_add_test(t, forced_is_obeyed);
    tcase_add_test(t, sums);
    tcase_add_test(t, staging_comes_first);
    tcase_add_test(t, staging_for_the_next_best);
    tcase_add_test(t, slices_are_the_ranks_own);
    tcase_add_test(t, every_nth_is_verified);
    tcase_add_test(t, declines_where_agreeing_costs_more);
    tcase_add_test(t, knows_plain);
    tcase_add_test(t, finds_out);
    tcase_add_test(t, keeps_pace);
    tcase_add_test(t, sure_of_much);
    tcase_add_test(t, durations_never_come);
    tcase_add_test(t, equal_rows);
    tcase_add_test(t, kinds_take_turns);
    tcase_add_test(t, does_not_flap);
    tcase_add_test(t, learns_from_the_busy);
    tcase_add_test(t, beside_others);
    tcase_add_test(t, unexpected_others);
    tcase_add_test(t, node_comms);
    tcase_add_test(t, chunks);
    tcase_add_test(t, over_ucx);
    tcase_add_test(t, node_comms_change_what_is_known);
    tcase_add_test(t, one_that_cannot_pack);
    tcase_add_test(t, nonsense_from_a_rank_ends_it);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
