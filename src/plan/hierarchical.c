/*
 * hierarchical.c: the strategy `hierarchical`: one message per remote node instead of one per remote rank.
 *
 * It is dedup where nobody looked for equal rows, so that every message goes as it is: dedup.c builds the plans of
 * both. It needs less of the matrix: only what a rank relays itself.
 */
#include "relayed.h"

static bool row(const struct ry_cluster *c, int rank, int other)
{
    /* Alone on its node, a rank relays for nobody: its own column says what it gets. */
    return c->node_size[c->node[rank]] > 1 && c->node[other] != c->node[rank] && ry_relays(c, rank, other);
}

const struct ry_strategy_ops ry_hierarchical_ops = {.name = "hierarchical",
                                                    .row = row,
                                                    .column = ry_relayed_column,
                                                    .most_steps = ry_relayed_most_steps,
                                                    .build = ry_relayed_build,
                                                    .stage_relay = ry_relayed_stage_relay,
                                                    .stage_pack = ry_relayed_stage_pack,
                                                    .stage_all = ry_relayed_stage_all};
