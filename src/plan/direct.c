/* direct.c: the strategy `direct`: what plain NCCL does, one group with one message for every pair of ranks. */
#include "strategy.h"

static size_t most_steps(const struct ry_building *b)
{
    return 2 * (size_t)b->cluster->nranks;
}

static int build(struct ry_building *b)
{
    const struct ry_plan_input *in = b->in;
    b->plan->ngroups = 1;
    for (int p = 0; p < b->cluster->nranks; p++) {
        ry_step_send(b->plan, 0, p, ry_at_send(p), in->send[p]);
        ry_step_recv(b->plan, 0, p, ry_at_recv(p), in->recv[p]);
    }
    return 0;
}

const struct ry_strategy_ops ry_direct_ops = {.name = "direct", .most_steps = most_steps, .build = build};
