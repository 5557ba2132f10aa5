/*
 * test_cross_need.c: the host memory that is held before UCX carries an exchange (engine/policy.h) is never less than
 * what the plans then take, and not much more: on random clusters and exchanges.
 */
#include <string.h>

#include "engine/policy.h"
#include "engine/twin_policy.h"
#include "plan_help.h"
#include "ucx/carrier.h"

/* The most of any group. */
static uint64_t taken(const struct ry_plan *p, const struct ry_cluster *map)
{
    uint64_t most = 0;
    for (int g = 0; g < p->ngroups; g++) {
        uint64_t bytes = 0;
        for (int i = 0; i < p->nsteps; i++) {
            const struct ry_step *s = &p->steps[i];
            if (ry_is_transfer(s) && s->group == g && map->node[s->peer] != map->node[p->rank])
                bytes += (s->bytes + 255) / 256 * 256;
        }
        most = bytes > most ? bytes : most;
    }
    return most;
}

START_TEST(enough)
{
    static const enum ry_strategy all[] = {RY_HIERARCHICAL, RY_BALANCED, RY_DEDUP};
    double used = 0, held = 0;
    for (int round = 0; round < 300; round++) {
        enum ry_strategy s = all[round % 3];
        struct job job = random_job(2 + (int)rnd(14), round % 4 ? 100000 : 3000, rnd(2));
        if (s == RY_DEDUP) {
            job.parts = job.chunks = 1 << rnd(3);
            random_rows(&job);
        }
        build_all(&job, s);
        for (int r = 0; r < job.n; r++) {
            uint64_t need = ry_cross_need(job.cluster, r, s, job.matrix), is = taken(job.plans[r], job.cluster);
            ck_assert_msg(is <= need, "%s, rank %d of %d: %llu are held, %llu taken", ry_strategy_name(s), r, job.n,
                          (unsigned long long)need, (unsigned long long)is);
            used += round % 4 && s == RY_HIERARCHICAL ? (double)is : 0;
            held += round % 4 && s == RY_HIERARCHICAL ? (double)need : 0;
        }
        free_plans(&job);
        free_job(&job);
    }
    printf("hierarchical takes %.2f of what is held\n", used / held);
    ck_assert_msg(used > 0.7 * held, "%.2f", used / held);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {enough, NULL};
    return run_tests("cross_need", tests);
}
