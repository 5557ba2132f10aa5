/* returns.c: see returns.h. */
#include "returns.h"

void ry_returns_went(struct ry_returns *s, uint64_t number, double us)
{
    s->went[s->next].number = number + 1;
    s->went[s->next].us = us;
    s->next = (s->next + 1) % RY_RETURNS;
}

static bool own_transpose(const uint64_t *matrix, size_t n)
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < i; j++)
            if (matrix[i * n + j] != matrix[j * n + i])
                return false;
    return true;
}

const char *ry_returns_ask(const struct ry_returns *s, const struct ry_side *sides, const uint64_t *matrix, int nranks,
                        double *us)
{
    uint64_t answers = sides[0].answers, copies = 0;
    int found = -1;
    bool any = false;
    for (int r = 0; r < nranks; r++)
        any |= sides[r].answers != 0;
    if (!any)
        return "";
    for (int r = 0; r < nranks; r++) {
        if (!sides[r].answers || sides[r].answers != answers)
            return "the ranks do not agree that it answers the same exchange";
        if (sides[r].copies && copies && sides[r].copies != copies)
            return "the ranks do not agree on how many copies tokens have";
        copies = sides[r].copies ? sides[r].copies : copies;
    }
    for (int i = 0; i < RY_RETURNS; i++)
        if (s->went[i].number == answers)
            found = i;
    if (found < 0)
        return "what it answers did not go packed";
    if (!copies)
        return "no rank has rows to be summed";
    if (own_transpose(matrix, (size_t)nranks))
        return "with equal splits nothing tells returns from the way out";
    *us = s->went[found].us;
    return NULL;
}

double ry_returns_estimate(const struct ry_cost_model *model, const struct ry_cluster *map, const struct ry_load *loads,
                        double us)
{
    const struct ry_cost_link *inside = &model->link[model->node_comm ? RY_LINK_NODE : RY_LINK_LOCAL];
    double most = 0, gather = 0;
    for (int r = 0; r < map->nranks; r++) {
        int size = map->node_size[map->node[r]];
        double given = (double)loads[r].cross_out * (size - 1) / size;
        double took =
            given > 0 ? inside->alpha_us + loads[r].cross_sends * inside->message_us + given / inside->bytes_per_us : 0;
        most = (double)loads[r].cross_out > most ? (double)loads[r].cross_out : most;
        gather = took > gather ? took : gather;
    }
    return us + model->agreement_us + model->group_us + gather + model->copy_us + most / model->copy_bytes_per_us;
}
