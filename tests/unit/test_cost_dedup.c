/*
 * test_cost_dedup.c: what de-duplication is estimated to take: by hand, against the steps of its plans, and chosen.
 */
#include "base/clock.h"
#include "cost_help.h"

static int plan_parts; /* of the messages of found() */

/* Each rank found, among what it sends to each node, that one row of `copies` is left. */
static struct ry_repeats *found(const struct ry_cluster *c, const uint64_t *m, uint64_t row_bytes, double copies)
{
    int n = c->nranks;
    struct ry_repeats *repeats = calloc((size_t)(n * c->nnodes), sizeof *repeats);
    for (int from = 0; from < n; from++) {
        struct ry_repeats *r = repeats + from * c->nnodes;
        for (int to = 0; to < n; to++)
            r[c->node[to]].distinct += c->node[to] != c->node[from] ? ry_rows_of(m[from * n + to], row_bytes) : 0;
        for (int node = 0; node < c->nnodes; node++) {
            r[node] = (struct ry_repeats){.row_bytes = row_bytes,
                                          .distinct = (uint64_t)ceil((double)r[node].distinct / copies)};
            r[node].parts = (uint64_t)plan_parts;
            for (int k = 1; k < plan_parts; k++)
                r[node].early[k - 1] =
                    (uint64_t)((double)r[node].distinct * (1 - pow(1 - (double)k / plan_parts, copies)));
        }
    }
    return repeats;
}

START_TEST(loads)
{
    static const int at[] = {0, 1, 0, 2, 1}; /* scattered */
    struct ry_cluster *c = cluster_of(at, 5, "n");
    const uint64_t send[] = {10, 1000, 30, 0, 505}, recv[] = {10, 0, 0, 7, 9};
    struct ry_repeats repeats[] = {
        {.row_bytes = 99, .distinct = 99}, {.row_bytes = 100, .distinct = 4}, {.row_bytes = 100}};
    struct ry_load l, same;
    ry_load_of(&l, c, 0, send, recv, repeats);
    ck_assert_uint_eq(l.scanned, 1505);
    ck_assert_uint_eq(l.packed_out, 400 + 4 * 16); /* 10 + 6 rows */
    repeats[1].distinct = 14;                      /* not worth packing, but looked at */
    ry_load_of(&l, c, 0, send, recv, repeats);
    ck_assert_uint_eq(l.packed_out, 1505);
    ck_assert_uint_eq(l.scanned, 1505);
    repeats[1].row_bytes = 0;
    ry_load_of(&l, c, 0, send, recv, repeats);
    ck_assert_uint_eq(l.scanned, 0);
    ry_load_of(&same, c, 0, send, recv, NULL);
    ck_assert_mem_eq(&l, &same, sizeof l);
    ry_cluster_free(c);
    /* more nodes than are summed at a time: every second one packs */
    enum { N = 1300 };
    int *many = calloc(N, sizeof *many);
    uint64_t *bytes = calloc(N, sizeof *bytes);
    struct ry_repeats *r = calloc(N, sizeof *r);
    for (int i = 0; i < N; i++) {
        many[i] = i;
        bytes[i] = 1600;
        r[i] = (struct ry_repeats){.row_bytes = 160, .distinct = i % 2 ? 2 : 10};
    }
    c = cluster_of(many, N, "n");
    ry_load_of(&l, c, 600, bytes, bytes, r);
    ck_assert_uint_eq(l.packed_out, 650 * (320 + 40) + 649 * 1600);
    ck_assert_uint_eq(l.scanned, 1299 * 1600);
    ry_cluster_free(c);
    free(many);
    free(bytes);
    free(r);
}
END_TEST

/* 2 nodes of 4, 1 MB for everyone, 1000 rows of 1000 bytes: of a rank's 4000 rows to a node `left` are left. */
static void by_hand_with(uint64_t left, double packed, double forward)
{
    const double mb = 1e6;
    struct ry_cluster *c = regular(2, 4);
    uint64_t *m = even(c, 1000000);
    struct ry_repeats *repeats = calloc(16, sizeof *repeats);
    for (int i = 0; i < 16; i++)
        repeats[i] = (struct ry_repeats){.row_bytes = 1000, .distinct = left};
    struct ry_load *l = loads_of(c, m, repeats);
    double search = 8 * 3 + 4 * mb / 1e6, pack = 3 + packed / 1e6, writes = 4 * 3 + 4 * mb / 1e6;
    double links = fmax(40 + 1 * 10 + 4 * packed / 3e3, 5 + 3 + 3 * mb / 200e3);
    double all = 50 + 8 * 0.2 + 2 * 15 + search + pack + links + 5 + 3 * 1 + forward / 200e3 + writes;
    near(ry_cost_estimate(&typical, c, l, NULL, RY_DEDUP), all, "dedup");
    struct ry_cost_model model = typical;
    model.node_comm = true;
    near(ry_cost_estimate(&model, c, l, NULL, RY_DEDUP),
         all - (5 + 3 * 1 + forward / 200e3) + 4 + 3 * 0.5 + forward / 800e3, "dedup, node communicator");
    /* known from the matrix: the same, here */
    const uint64_t packed_in[] = {(uint64_t)(4 * packed), (uint64_t)(4 * packed)};
    const uint64_t relayed[] = {3000000, 3000000, 3000000, 3000000, 3000000, 3000000, 3000000, 3000000};
    struct ry_cost_matrix known = {.relayed = relayed, .packed_in = packed_in};
    near(ry_cost_estimate(&typical, c, l, &known, RY_DEDUP), all, "dedup, matrix known");
    /* node 0 gets more than it sends */
    const uint64_t more_in[] = {(uint64_t)(6 * packed), (uint64_t)(4 * packed)};
    known.packed_in = more_in;
    double us = ry_cost_estimate(&typical, c, l, &known, RY_DEDUP);
    ck_assert_msg(us > all, "%f instead of more than %f", us, all);
    near(ry_cost_estimate(&typical, c, l, NULL, RY_DIRECT), 50 + 15 + 40 + 4 * 10 + 16 * mb / 3e3, "direct");
    struct ry_choice choice;
    ry_cost_choose(&choice, &typical, NULL, c, l, NULL, 0.05);
    near(choice.search_us, search, "search");
    near(choice.model_us[RY_DEDUP], all, "choice");
    ck_assert_int_eq(choice.strategy, RY_DEDUP);
    free(repeats);
    free(l);
    free(m);
    ry_cluster_free(c);
}

START_TEST(by_hand)
{
    /* 500 rows and the list are shorter than the 1000 rows of one rank: passed on as they are */
    by_hand_with(500, 516000, 3 * 516000);
    /* 2000 are longer: written out by the relay, pieces passed on */
    by_hand_with(2000, 2016000, 3e6);
}
END_TEST

/* Without relays: one rank on each node. */
START_TEST(ranks_alone)
{
    struct ry_cluster *c = regular(4, 1);
    uint64_t *m = even(c, 1000000);
    struct ry_repeats *repeats = found(c, m, 1000, 4);
    struct ry_load *l = loads_of(c, m, repeats);
    double packed = 250000 + 4000;
    near(ry_cost_estimate(&typical, c, l, NULL, RY_DEDUP),
         50 + 4 * 0.2 + 15 + (8 * 3 + 3.0) + (3 * 3 + 3 * packed / 1e6) + 40 + 3 * 10 + 3 * packed / 2e3 +
             (3 * 3 + 3.0),
         "dedup");
    struct ry_choice choice;
    ry_cost_choose(&choice, &typical, NULL, c, l, NULL, 0.05);
    ck_assert_msg(choice.strategy == RY_DEDUP && strstr(choice.why, "744 KiB instead of 2.9 MiB"), "%s", choice.why);
    free(repeats);
    repeats = found(c, m, 1000, 1);
    free(l);
    l = loads_of(c, m, repeats);
    ck_assert(isinf(ry_cost_estimate(&typical, c, l, NULL, RY_DEDUP)));
    ry_cost_choose(&choice, &typical, NULL, c, l, NULL, 0.05);
    ck_assert_msg(choice.strategy == RY_DIRECT && strstr(choice.why, "two ranks"), "%s", choice.why);
    free(repeats);
    free(l);
    free(m);
    ry_cluster_free(c);
}
END_TEST

/* Fewer bytes cross: never slower. What a rank claims beyond its bytes does not count. */
START_TEST(fewer_is_faster)
{
    for (int round = 0; round < 200; round++) {
        struct ry_cluster *c = random_cluster(24);
        size_t n = (size_t)c->nranks;
        uint64_t *m = calloc(n * n, sizeof *m);
        for (size_t i = 0; i < n * n; i++)
            m[i] = rand() % 4 ? (uint64_t)(rand() % 1000000) : 0;
        double before = INFINITY;
        for (double copies = 1; copies < 20; copies *= 1.5) {
            struct ry_repeats *repeats = found(c, m, 512, copies);
            struct ry_load *l = loads_of(c, m, repeats);
            double us = ry_cost_estimate(&typical, c, l, NULL, RY_DEDUP);
            bool saves = false;
            for (size_t r = 0; r < n; r++) {
                saves |= l[r].packed_out < l[r].cross_out;
                ck_assert_uint_le(l[r].packed_out, l[r].cross_out);
            }
            ck_assert_msg(saves == (bool)isfinite(us) && !isnan(us), "seed %u: %f us", seed, us);
            /* one that packs only some of its messages now packs more: kernels that the bytes must pay for */
            ck_assert_msg(us <= before * 1.001 + typical.copy_us * (double)n, "seed %u: %f us, then %f", seed, before,
                          us);
            before = us;
            for (size_t r = 0; r < n; r++)
                if (l[r].packed_out == l[r].cross_out)
                    l[r].packed_out = UINT64_MAX;
            ck_assert(ry_cost_estimate(&typical, c, l, NULL, RY_DEDUP) == us);
            free(l);
            free(repeats);
        }
        free(m);
        ry_cluster_free(c);
    }
}
END_TEST

/*
 * The estimate against the steps of dedup's plans, which are exact about who packs, relays and writes out what. As for
 * hierarchical: within a third where matrices and nodes are alike, within a factor of 2 for anything.
 */
START_TEST(against_plans)
{
    double worst[2] = {0}, sum[2] = {0}, sum_alike = 0;
    int nalike = 0;
    int rounds = 320, counted = 0, cut = 0;
    struct ry_cost_model model = typical;
    for (int round = 0; round < rounds; round++) {
        bool alike = round % 2;
        model.node_comm = round % 4 < 2;
        model.chunks = 4;
        /* inside the nodes as slow as between them, or nearly, so that chunks pay */
        model.link[RY_LINK_NODE].bytes_per_us = alike && round % 8 < 4 ? 4e3 : typical.link[RY_LINK_NODE].bytes_per_us;
        struct ry_cluster *c = alike ? regular(2 + rand() % 4, 1 + rand() % 6) : random_cluster(24);
        size_t n = (size_t)c->nranks;
        uint64_t *m = calloc(n * n, sizeof *m), *relayed = calloc(n, sizeof *relayed);
        uint64_t *packed_in = calloc((size_t)c->nnodes, sizeof *packed_in);
        double size = exp(uniform(4, 16));
        int zeros = alike ? 0 : rand() % 4;
        for (size_t i = 0; i < n * n; i++)
            m[i] =
                zeros && rand() % 4 < zeros ? 0 : (uint64_t)(size * (alike ? uniform(0.7, 1.3) : exp(uniform(-3, 3))));
        uint64_t row_bytes = 1 + (uint64_t)rand() % 4096;
        double copies = exp(uniform(0.1, 3));
        struct ry_repeats *repeats = found(c, m, row_bytes, copies);
        struct ry_load *l = loads_of(c, m, repeats);
        for (size_t r = 0; r < n; r++)
            l[r].scanned = 0; /* the steps come after the search */
        struct ry_choice choice;
        ry_cost_choose(&choice, &model, NULL, c, l, NULL, 0.05);
        plan_chunks = plan_parts = choice.chunks;
        free(repeats);
        repeats = found(c, m, row_bytes, copies);
        cut += choice.chunks > 1;
        double steps = from_plans(&model, c, m, repeats, RY_DEDUP, relayed, packed_in), error[2];
        plan_chunks = plan_parts = 0;
        struct ry_cost_matrix known = {.relayed = relayed, .packed_in = packed_in};
        double us = ry_cost_estimate(&model, c, l, NULL, RY_DEDUP);
        uint64_t crosses = 0, promised = 0;
        for (int node = 0; node < c->nnodes; node++)
            crosses += packed_in[node];
        for (size_t r = 0; r < n; r++)
            promised += l[r].packed_out;
        ck_assert(choice.chunks > 1 ? crosses <= promised && crosses + 16 * n * n > promised /* but for what fills up */
                                    : crosses == promised);                                  /* to the byte */
        if (isfinite(us)) {
            error[0] = log(us / steps);
            error[1] = log(ry_cost_estimate(&model, c, l, &known, RY_DEDUP) / steps);
            ck_assert_msg(fabs(error[0]) < log(2) && fabs(error[1]) < log(2),
                          "seed %u: %d ranks on %d nodes: x%.3f, matrix known x%.3f", seed, c->nranks, c->nnodes,
                          exp(error[0]), exp(error[1]));
            counted++;
            for (int i = 0; i < 2; i++) {
                worst[i] = fmax(worst[i], fabs(error[i]));
                sum[i] += fabs(error[i]);
            }
            if (alike)
                sum_alike += fabs(error[0]), nalike++;
        }
        free(l);
        free(m);
        free(repeats);
        free(relayed);
        free(packed_in);
        ry_cluster_free(c);
    }
    printf(
        "dedup's estimate over steps, %d matrices, worst (mean): x%.2f (%.3f), matrix known x%.2f (%.3f), even (%.3f)\n",
        counted, exp(worst[0]), exp(sum[0] / counted), exp(worst[1]), exp(sum[1] / counted), exp(sum_alike / nalike));
    printf("%d of the plans were in chunks\n", cut);
    ck_assert_int_gt(counted, rounds / 3);
    ck_assert_int_gt(cut, 2);
    ck_assert(sum_alike / nalike < log(1.05));
}
END_TEST

/* Chunks where work inside the nodes is worth hiding, and nowhere else. */
START_TEST(chunks)
{
    struct ry_cost_model m = typical;
    struct ry_cluster *c = regular(2, 4);
    double plain[3], cut[3];
    int most[3];
    for (int i = 0; i < 3; i++) {
        uint64_t *matrix = even(c, i ? 4 << 20 : 4096);
        struct ry_repeats *repeats = found(c, matrix, 4096, 4);
        struct ry_load *l = loads_of(c, matrix, repeats);
        struct ry_choice choice;
        m.node_comm = true;
        m.link[RY_LINK_NODE].bytes_per_us = i < 2 ? 6e3 : 800e3;
        m.chunks = 1;
        plain[i] = ry_cost_estimate(&m, c, l, NULL, RY_DEDUP);
        m.chunks = 2;
        cut[i] = ry_cost_estimate(&m, c, l, NULL, RY_DEDUP);
        ck_assert(cut[i] <= plain[i]);
        m.chunks = 4;
        double more = ry_cost_estimate(&m, c, l, NULL, RY_DEDUP);
        ck_assert(more <= cut[i]);
        cut[i] = more;
        ry_cost_choose(&choice, &m, NULL, c, l, NULL, 0.05);
        most[i] = choice.chunks;
        ck_assert_msg((choice.strategy == RY_DEDUP && choice.chunks == 4) ==
                          (strstr(choice.why, "in 4 chunks") != NULL),
                      "%s", choice.why);
        m.node_comm = false; /* then one waits for the other whatever is done */
        m.chunks = 1;
        double alone = ry_cost_estimate(&m, c, l, NULL, RY_DEDUP);
        m.chunks = 4;
        ck_assert_double_eq(ry_cost_estimate(&m, c, l, NULL, RY_DEDUP), alone);
        free(l);
        free(matrix);
        free(repeats);
    }
    printf("dedup in chunks: %.0f -> %.0f us, %.0f -> %.0f us, %.0f -> %.0f us\n", plain[0], cut[0], plain[1], cut[1],
           plain[2], cut[2]);
    ck_assert_int_eq(most[0], 1); /* small: each group costs more than there is to hide */
    ck_assert_int_eq(most[1], 4);
    ck_assert(cut[1] < 0.92 * plain[1]);
    ck_assert(cut[2] > 0.95 * plain[2]); /* there is little to hide */
    ry_cluster_free(c);
}
END_TEST

/* ---- choosing ---- */

static struct ry_choice chosen(const struct ry_cost_model *model, struct ry_cost_learned *learned, int nodes, int size,
                               uint64_t bytes, double copies)
{
    struct ry_choice choice;
    struct ry_cluster *c = regular(nodes, size);
    uint64_t *m = even(c, bytes);
    struct ry_repeats *repeats = found(c, m, 256, copies);
    struct ry_load *l = loads_of(c, m, copies > 0 ? repeats : NULL);
    ry_cost_choose(&choice, model, learned, c, l, NULL, 0.05);
    free(l);
    free(m);
    free(repeats);
    ry_cluster_free(c);
    return choice;
}

START_TEST(choices)
{
    struct ry_choice c = chosen(&typical, NULL, 2, 4, 4 << 20, 4);
    ck_assert_msg(c.strategy == RY_DEDUP && !strncmp(c.why, "dedup ", 6) && strstr(c.why, "hierarchical ") &&
                      strstr(c.why, "direct ") && strstr(c.why, "NIC of node ") &&
                      strstr(c.why, "17 MiB instead of 64 MiB"),
                  "%s", c.why);
    /* many small messages: the NIC has few bytes to save, and kernels cost more */
    c = chosen(&typical, NULL, 4, 8, 1024, 4);
    ck_assert_msg(c.strategy == RY_HIERARCHICAL && isfinite(c.us[RY_DEDUP]), "%s", c.why);
    /* nobody looked, or nothing was found: not even mentioned */
    c = chosen(&typical, NULL, 2, 4, 4 << 20, 0);
    ck_assert_msg(c.strategy == RY_DIRECT && !strstr(c.why, "dedup") && c.search_us == 0, "%s", c.why);
    c = chosen(&typical, NULL, 2, 4, 4 << 20, 1);
    ck_assert_msg(c.strategy == RY_DIRECT && !strstr(c.why, "dedup") && c.search_us > 0, "%s", c.why);
    /* memory slower than the NIC: the bytes saved are not worth it */
    struct ry_cost_model slow = typical;
    slow.copy_bytes_per_us = 1e3;
    c = chosen(&slow, NULL, 2, 4, 4 << 20, 4);
    ck_assert_msg(c.strategy == RY_DIRECT && strstr(c.why, "costs"), "%s", c.why);
    /* the more rows are equal, the sooner; and once only */
    int turns = 0, last = RY_DIRECT;
    for (double copies = 1.02; copies < 8; copies *= 1.02) {
        c = chosen(&typical, NULL, 2, 4, 1 << 20, copies);
        turns += (int)c.strategy != last;
        last = (int)c.strategy;
    }
    ck_assert_int_eq(turns, 1);
    ck_assert_int_eq(last, RY_DEDUP);
}
END_TEST

/* Where the model says dedup and is wrong it is left, where it is right it stays, and each is measured now and then. */
START_TEST(learning)
{
    for (int right = 0; right < RY_SUM; right++) {
        struct ry_cost_learned *l = calloc(1, sizeof *l);
        struct ry_choice first = chosen(&typical, NULL, 4, 8, 2048, 4), c = first;
        ck_assert(isfinite(first.us[RY_DEDUP]));
        /* all within 20 % of each other by the model: trials do the rest */
        int trials[RY_STRATEGIES] = {0}, good = 0;
        struct ry_cost_model model = typical;
        for (int i = 0; i < 400; i++) {
            c = chosen(&model, l, 4, 8, 2048, 4);
            trials[c.strategy] += c.trial;
            double us = first.us[RY_DIRECT] * (c.strategy == (enum ry_strategy)right ? 0.8 : 1) * uniform(1, 1.03);
            /* agreeing, and looking for equal rows, are over when the clock starts */
            double before[RY_STRATEGIES] = {0};
            for (int s = 0; s < RY_STRATEGIES; s++)
                before[s] = model.agreement_us + (s == RY_DEDUP ? c.search_us : 0);
            ry_cost_learn(l, c.strategy, 2048 * 32, c.model_us[c.strategy] - before[c.strategy], us - before[c.strategy]);
            good += i >= 300 && c.strategy == (enum ry_strategy)right;
            /* what was seen while others decided */
            for (int s = 0; i < RY_COST_ENOUGH && s < RY_STRATEGIES; s++)
                ry_cost_learn(l, (enum ry_strategy)s, 2048 * 32, c.model_us[s] - before[s],
                              first.us[RY_DIRECT] * (s == right ? 0.8 : 1) - before[s]);
        }
        int all = trials[0] + trials[1] + trials[2];
        ck_assert_msg(good >= 98, "right %d: %d of 100", right, good);
        ck_assert_msg(trials[right] == 0 && all >= 2 && all <= 6, "right %d: %d %d %d", right, trials[0], trials[1],
                      trials[2]);
        /* the other two are measured as often as each other */
        int a = right == 0, b = right == 2 ? 1 : 2, class = 16;
        int differ = (int)l->at[a][class].samples - (int)l->at[b][class].samples;
        ck_assert_msg(l->at[a][class].samples && abs(differ) <= 3, "right %d: %d", right, differ);
        free(l);
    }
}
END_TEST

START_TEST(incumbents_stay)
{
    /* dedup and hierarchical within the margin of each other: whoever is in stays */
    double low = 1.02, high = 50;
    for (int i = 0; i < 60; i++) {
        double mid = sqrt(low * high);
        struct ry_choice c = chosen(&typical, NULL, 4, 8, 16384, mid);
        *(isfinite(c.us[RY_DEDUP]) && c.us[RY_DEDUP] < c.us[RY_HIERARCHICAL] ? &high : &low) = mid;
    }
    struct ry_cost_learned *l = calloc(1, sizeof *l);
    struct ry_choice better = chosen(&typical, NULL, 4, 8, 16384, high * 1.02);
    ck_assert_msg(better.us[RY_DEDUP] < better.us[RY_HIERARCHICAL] &&
                      better.us[RY_DEDUP] > 0.96 * better.us[RY_HIERARCHICAL],
                  "%s", better.why);
    for (int in = RY_HIERARCHICAL; in <= RY_DEDUP; in += RY_DEDUP - RY_HIERARCHICAL) {
        memset(l, 0, sizeof *l);
        for (int class = 0; class < RY_COST_CLASSES; class ++)
            l->size[class].incumbent = (uint8_t)(1 + in);
        for (int i = 0; i < 10; i++) {
            struct ry_choice c = chosen(&typical, l, 4, 8, 16384, high * (i % 2 ? 1.02 : 0.98));
            ck_assert_msg((int)c.strategy == in, "%s", c.why);
        }
    }
    /* but for a good reason */
    ck_assert_int_eq(chosen(&typical, l, 4, 8, 16384, 1.05).strategy, RY_HIERARCHICAL);
    ck_assert_int_eq(chosen(&typical, l, 4, 8, 16384, 4).strategy, RY_DEDUP);
    free(l);
}
END_TEST

START_TEST(fast)
{
    static const int shapes[][2] = {{128, 8}, {512, 2}, {1024, 1}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct ry_cluster *c = regular(shapes[i][0], shapes[i][1]);
        struct ry_load *all = calloc(1024, sizeof *all);
        uint64_t *row = even(c, 0), choosing = UINT64_MAX, loading = UINT64_MAX;
        struct ry_repeats *r = calloc(1024, sizeof *r);
        for (int k = 0; k < 1024; k++) {
            row[k] = 4096;
            r[k] = (struct ry_repeats){.row_bytes = 256, .distinct = 4};
        }
        for (int k = 0; k < 1024; k++)
            ry_load_of(&all[k], c, k, row, row, r);
        /* others may have the processor for a while */
        for (int k = 0; k < 200 || (k < 4000 && (choosing >= 100000 || loading >= 50000)); k++) {
            struct ry_choice choice;
            struct ry_load load;
            uint64_t start = ry_now_ns();
            ry_cost_choose(&choice, &typical, NULL, c, all, NULL, 0.05);
            uint64_t then = ry_now_ns();
            ry_load_of(&load, c, 5, row, row, r);
            uint64_t done = ry_now_ns();
            choosing = then - start < choosing ? then - start : choosing;
            loading = done - then < loading ? done - then : loading;
            ck_assert(isfinite(choice.us[RY_DEDUP]));
        }
        printf("with dedup at %d x %d ranks: choice %.1f us, load %.1f us\n", shapes[i][0], shapes[i][1],
               (double)choosing / 1000, (double)loading / 1000);
#if !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
        ck_assert(choosing < 100000 && loading < 50000);
#endif
        free(all);
        free(row);
        free(r);
        ry_cluster_free(c);
    }
}
END_TEST

int main(void)
{
    begin_seed();
    Suite *s = suite_create("cost_dedup");
    TCase *t = tcase_create("dedup");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, loads);
    tcase_add_test(t, by_hand);
    tcase_add_test(t, ranks_alone);
    tcase_add_test(t, fewer_is_faster);
    tcase_add_test(t, against_plans);
    tcase_add_test(t, chunks);
    tcase_add_test(t, choices);
    tcase_add_test(t, learning);
    tcase_add_test(t, incumbents_stay);
    tcase_add_test(t, fast);
    suite_add_tcase(s, t);
    SRunner *run = srunner_create(s);
    srunner_run_all(run, CK_NORMAL);
    int failed = srunner_ntests_failed(run);
    srunner_free(run);
    return failed != 0;
}
