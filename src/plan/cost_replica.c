/* cost_replica.c: see cost_replica.h. */
#include "cost_replica.h"

#include <math.h>

static double larger(double a, double b)
{
    return a > b ? a : b;
}

struct sums {                     /* of one way */
    double bytes, most, messages; /* of a node, all twins; of its busiest rank */
};

static void add(struct sums *s, uint64_t bytes, uint32_t messages)
{
    s->bytes += (double)bytes;
    s->most = larger(s->most, (double)bytes);
    s->messages = larger(s->messages, messages);
}

/* Of one node's NIC, one way, for one of `chunks`. Shares of all twins make up what one of them would send alone. */
static double across_us(const struct ry_cost_model *m, const struct sums *s, int replicas, int chunks)
{
    const struct ry_cost_link *nic = &m->link[RY_LINK_NIC];
    if (s->messages <= 0)
        return 0;
    return nic->alpha_us + s->messages * nic->message_us +
           larger(s->bytes / nic->bytes_per_us, s->most / replicas / m->nic_rank_bytes_per_us) / chunks;
}

double ry_cost_replica(const struct ry_cost_model *model, const struct ry_cluster *cluster, int replicas,
                       const struct ry_load *loads, int *chunks)
{
    const struct ry_cost_model over_ucx = ry_cost_over_ucx(model);
    int each = cluster->nranks / replicas;
    model = model->by_ucx ? &over_ucx : model;
    const struct ry_cost_link *local = &model->link[RY_LINK_LOCAL], *self = &model->link[RY_LINK_SELF],
                              *node = &model->link[RY_LINK_NODE];
    double near = 0, passed = 0, messages = 0, best = INFINITY;
    for (int k = 0; k < each; k++) {
        const struct ry_load *l = &loads[k];
        double sends = l->local_sends, recvs = l->local_recvs;
        if (l->self)
            near = larger(near, self->alpha_us + self->message_us + (double)l->self / self->bytes_per_us);
        if (sends > 0)
            near =
                larger(near, local->alpha_us + sends * local->message_us + (double)l->local_out / local->bytes_per_us);
        if (recvs > 0)
            near =
                larger(near, local->alpha_us + recvs * local->message_us + (double)l->local_in / local->bytes_per_us);
        passed = larger(passed, (double)l->cross_in * (replicas - 1) / replicas);
        messages = larger(messages, (double)l->cross_recvs * (replicas - 1));
    }
    *chunks = 1;
    if (messages <= 0)
        return INFINITY;
    for (int n = 1; n <= RY_CHUNKS; n *= 2) {
        double across = 0;
        for (int at = 0; at < cluster->nnodes; at++) {
            struct sums out = {0}, in = {0};
            for (int k = 0; k < each; k++)
                if (cluster->node[k] == at) {
                    add(&out, loads[k].cross_out, loads[k].cross_sends);
                    add(&in, loads[k].cross_in, loads[k].cross_recvs);
                }
            across = larger(across, larger(across_us(model, &out, replicas, n), across_us(model, &in, replicas, n)));
        }
        double inside =
            model->group_us + node->alpha_us + messages * node->message_us + passed / node->bytes_per_us / n;
        double crossed = 0, total = 0;
        for (int i = 0; i < n; i++) {
            crossed += model->group_us + (i ? across : larger(across, near));
            total = larger(total, crossed) + inside;
        }
        if (total < best) {
            best = total;
            *chunks = n;
        }
    }
    return best + model->agreement_us + model->plan_us_per_rank * cluster->nranks;
}
