/* test_assign.c: the solvers against brute force on thousands of small cases, against each other on larger ones, and
 * what they promise about memory, limits and bounds. SciPy is asked in tests/place. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "place/assign.h"
#include "place/random.h"
#include "rounds.h"

static uint64_t rng;
static struct ry_assign *ws;

#define SAMPLES 300
#define PLACES 24

static int32_t cost[SAMPLES * PLACES];
static int capacity[PLACES], place[SAMPLES];

static void setup(void)
{
    const char *text = getenv("RY_TEST_SEED");
    rng = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    printf("RY_TEST_SEED=%llu\n", (unsigned long long)rng);
    struct ry_err err;
    ws = ry_assign_new(SAMPLES, PLACES, SAMPLES + 64, &err);
    ck_assert_msg(ws != NULL, "%s", err.msg);
}

static void teardown(void)
{
    ry_assign_free(ws);
}

static int below(int n)
{
    return (int)ry_random_below(&rng, (uint64_t)n);
}

/* Random costs of several characters; capacities uneven, some 0, with or without slack. */
static struct ry_assign_problem random_problem(int n, int p, int slack)
{
    static const int ranges[] = {2, 5, 1000, RY_ASSIGN_COST_MAX};
    int range = ranges[below(4)], bias = below(2) ? range / 2 : 0, negative = below(2);
    for (int i = 0; i < n; i++)
        for (int a = 0; a < p; a++)
            cost[i * p + a] = (below(range) - (negative ? range / 2 : 0)) / 2 + (p > 1 ? bias / (p - 1) * a : 0) / 2;
    memset(capacity, 0, sizeof capacity);
    for (int k = 0; k < n + slack; k++)
        capacity[below(3) ? below(p) : 0]++;
    return (struct ry_assign_problem){n, p, cost, capacity, (uint64_t)below(1 << 30)};
}

static void check_solution(const struct ry_assign_problem *p, const int *solution, int64_t total)
{
    int load[PLACES] = {0};
    for (int i = 0; i < p->nsamples; i++) {
        ck_assert_int_ge(solution[i], 0);
        ck_assert_int_lt(solution[i], p->nplaces);
        load[solution[i]]++;
    }
    for (int a = 0; a < p->nplaces; a++)
        ck_assert_int_le(load[a], p->capacity[a]);
    ck_assert_int_eq(ry_assign_cost(p, solution), total);
}

/* Every assignment is tried; `home` and `most` limit moves where home is given. */
struct brute {
    const struct ry_assign_problem *p;
    const int *home;
    int most, load[PLACES], place[8];
    const int32_t *affinity;
    int groups;
    int64_t best, best_busiest;
};

static void brute(struct brute *b, int i, int64_t sum, int moves)
{
    const struct ry_assign_problem *p = b->p;
    if (i == p->nsamples) {
        b->best = sum < b->best ? sum : b->best;
        if (b->affinity) {
            int64_t busiest = ry_assign_busiest_load(ws, p, b->groups, b->affinity, b->place);
            b->best_busiest = busiest < b->best_busiest ? busiest : b->best_busiest;
        }
        return;
    }
    for (int a = 0; a < p->nplaces; a++) {
        int more = b->home && b->home[i] != a;
        if (b->load[a] == p->capacity[a] || moves + more > b->most)
            continue;
        b->load[a]++;
        b->place[i] = a;
        brute(b, i + 1, sum + p->cost[i * p->nplaces + a], moves + more);
        b->load[a]--;
    }
}

START_TEST(exact_equals_brute_force)
{
    for (int round = 0; round < ROUNDS_OF(6000); round++) {
        int n = 1 + below(7), p = 1 + below(n > 5 ? 3 : 5);
        struct ry_assign_problem q = random_problem(n, p, below(3) ? 0 : below(4));
        struct brute b = {.p = &q, .most = n, .best = INT64_MAX};
        brute(&b, 0, 0, 0);
        int64_t exact = ry_assign(ws, RY_SOLVE_EXACT, &q, place);
        check_solution(&q, place, exact);
        ck_assert_msg(exact == b.best, "round %d: %d samples, %d places: exact %lld, brute force %lld", round, n, p,
                      (long long)exact, (long long)b.best);
        int64_t km = ry_assign(ws, RY_SOLVE_KUHN_MUNKRES, &q, place);
        check_solution(&q, place, km);
        ck_assert_int_eq(km, b.best);
    }
}
END_TEST

START_TEST(exact_equals_kuhn_munkres)
{
    for (int round = 0; round < ROUNDS_OF(60); round++) {
        int n = 20 + below(SAMPLES - 20), p = 2 + below(PLACES - 1);
        struct ry_assign_problem q = random_problem(n, p, below(2) ? 0 : below(60));
        int64_t exact = ry_assign(ws, RY_SOLVE_EXACT, &q, place);
        check_solution(&q, place, exact);
        int64_t km = ry_assign(ws, RY_SOLVE_KUHN_MUNKRES, &q, place);
        check_solution(&q, place, km);
        ck_assert_msg(exact == km, "round %d: %d samples, %d places: exact %lld, Kuhn-Munkres %lld", round, n, p,
                      (long long)exact, (long long)km);
    }
}
END_TEST

START_TEST(the_others_are_valid_and_never_better)
{
    int64_t greedy = 0, heuristic = 0, best = 0;
    for (int round = 0; round < ROUNDS_OF(200); round++) {
        struct ry_assign_problem q = random_problem(1 + below(SAMPLES), 1 + below(PLACES), below(10));
        int64_t exact = ry_assign(ws, RY_SOLVE_EXACT, &q, place);
        for (int s = 0; s < RY_SOLVERS; s++) {
            if (s == RY_SOLVE_KUHN_MUNKRES)
                continue;
            memset(place, 0xff, sizeof place);
            int64_t total = ry_assign(ws, (enum ry_solver)s, &q, place);
            check_solution(&q, place, total);
            ck_assert_int_ge(total, exact);
            greedy += s == RY_SOLVE_GREEDY ? total - exact : 0;
            heuristic += s == RY_SOLVE_HEURISTIC ? total - exact : 0;
        }
        best += exact;
    }
    ck_assert_int_lt(heuristic, greedy);
}
END_TEST

START_TEST(deterministic)
{
    int again[SAMPLES];
    struct ry_assign_problem q = random_problem(SAMPLES, PLACES, 3), other;
    int32_t *kept = malloc(sizeof cost);
    memcpy(kept, cost, sizeof cost);
    for (int s = 0; s < RY_SOLVERS; s++) {
        ry_assign(ws, (enum ry_solver)s, &q, place);
        int room[PLACES];
        memcpy(room, capacity, sizeof room);
        other = random_problem(50, 5, 0); /* what the workspace held before must not matter */
        ry_assign(ws, (enum ry_solver)s, &other, again);
        memcpy(cost, kept, sizeof cost);
        memcpy(capacity, room, sizeof room);
        ry_assign(ws, (enum ry_solver)s, &q, again);
        ck_assert_mem_eq(place, again, sizeof place);
    }
    free(kept);
}
END_TEST

START_TEST(limit_on_moves)
{
    int home[SAMPLES], hit = 0, rounds = 3000;
    for (int round = 0; round < rounds; round++) {
        int n = 1 + below(6), p = 1 + below(4), most = below(n + 1);
        struct ry_assign_problem q = random_problem(n, p, below(3));
        ry_assign(ws, RY_SOLVE_RANDOM, &q, home);
        struct brute b = {.p = &q, .home = home, .most = most, .best = INT64_MAX};
        brute(&b, 0, 0, 0);
        double bound;
        int64_t got = ry_assign_moving(ws, &q, home, most, place, &bound);
        check_solution(&q, place, got);
        int moves = 0;
        for (int i = 0; i < n; i++)
            moves += place[i] != home[i];
        ck_assert_int_le(moves, most);
        ck_assert_int_ge(got, b.best);
        ck_assert_msg(bound <= (double)b.best, "bound %g is above the optimum %lld", bound, (long long)b.best);
        ck_assert_int_le(got, ry_assign_cost(&q, home));
        hit += got == b.best;
    }
    printf("limit on moves: optimal in %d of %d\n", hit, rounds);
    ck_assert_int_ge(hit, rounds * 8 / 10);
}
END_TEST

START_TEST(busiest)
{
    int hit = 0, rounds = 400;
    int32_t affinity[3 * 8 * 4];
    for (int round = 0; round < rounds; round++) {
        int n = 2 + below(6), p = 2 + below(2), groups = 1 + below(3);
        struct ry_assign_problem q = random_problem(n, p, below(2));
        for (int k = 0; k < groups * n * p; k++)
            affinity[k] = below(1000);
        struct brute b = {
            .p = &q, .most = n, .best = INT64_MAX, .best_busiest = INT64_MAX, .affinity = affinity, .groups = groups};
        brute(&b, 0, 0, 0);
        double bound;
        ry_assign(ws, RY_SOLVE_EXACT, &q, place);
        int64_t before = ry_assign_busiest_load(ws, &q, groups, affinity, place);
        int64_t got = ry_assign_busiest(ws, &q, groups, affinity, 40, place, &bound);
        check_solution(&q, place, ry_assign_cost(&q, place));
        ck_assert_int_eq(got, ry_assign_busiest_load(ws, &q, groups, affinity, place));
        ck_assert_int_le(got, before);
        ck_assert_int_ge(got, b.best_busiest);
        ck_assert_msg(bound <= (double)b.best_busiest + 1e-6, "bound %g is above the optimum %lld", bound,
                      (long long)b.best_busiest);
        hit += got == b.best_busiest;
    }
    printf("busiest: optimal in %d of %d\n", hit, rounds);
    ck_assert_int_ge(hit, rounds / 2);
}
END_TEST

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTED 0
#else
#define COUNTED 1
/* Every way to get memory, counted, for this whole program. */
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
static long requests;

void *malloc(size_t n)
{
    requests++;
    return __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
    requests++;
    return __libc_calloc(n, size);
}

void *realloc(void *p, size_t n)
{
    requests++;
    return __libc_realloc(p, n);
}

void *aligned_alloc(size_t alignment, size_t n)
{
    requests++;
    return __libc_memalign(alignment, n);
}
#endif

START_TEST(solving_allocates_nothing)
{
#if !COUNTED
    fprintf(stderr, "SKIPPED solving_allocates_nothing: the sanitizer has its own allocator\n");
#else
    int home[SAMPLES];
    struct ry_assign_problem q = random_problem(SAMPLES, PLACES, 3);
    ry_assign(ws, RY_SOLVE_RANDOM, &q, home);
    long before = requests;
    void *volatile one = malloc(1);
    free(one);
    long one_more = requests;
    for (int s = 0; s < RY_SOLVERS; s++)
        ry_assign(ws, (enum ry_solver)s, &q, place);
    ry_assign_moving(ws, &q, home, 20, place, NULL);
    for (int k = 0; k < SAMPLES * PLACES; k++)
        cost[k] = below(1000);
    ry_assign_busiest(ws, &q, 1, cost, 5, place, NULL);
    long after = requests; /* Check itself allocates, too */
    ck_assert_int_eq(one_more, before + 1);
    ck_assert_int_eq(after, one_more);
#endif
}
END_TEST

START_TEST(names)
{
    struct ry_err err;
    for (int s = 0; s < RY_SOLVERS; s++) {
        enum ry_solver got;
        ck_assert_int_eq(ry_solver_parse(ry_solver_name((enum ry_solver)s), &got, &err), 0);
        ck_assert_int_eq((int)got, s);
    }
    enum ry_solver got;
    ck_assert_int_eq(ry_solver_parse("magic", &got, &err), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "'magic'"));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("assign");
    TCase *t = tcase_create("assign");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, exact_equals_brute_force);
    tcase_add_test(t, exact_equals_kuhn_munkres);
    tcase_add_test(t, the_others_are_valid_and_never_better);
    tcase_add_test(t, deterministic);
    tcase_add_test(t, limit_on_moves);
    tcase_add_test(t, busiest);
    tcase_add_test(t, solving_allocates_nothing);
    tcase_add_test(t, names);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
