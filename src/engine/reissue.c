/*
 * reissue.c: whether a communicator's exchanges may be reissued, and what it takes.
 *
 * Owns: the conditions under which a communicator joins the agreement, and bringing its parts up and down: the talk between
 * ranks, the yardmaster's chooser, the runner. Not: the way of one exchange (exchange.c).
 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "measure/cost_file.h"

bool ry_reissue_able(const struct ry_comm_info *info)
{
    return !ry_engine.observe && ry_engine.control && ry_engine.device && info->blocking;
}

const void *ry_reissue_address(const struct comm *c, size_t *size)
{
    *size = 0;
    return c->info.rank == 0 && c->seat.able ? ry_control_address(ry_engine.control, size) : NULL;
}

/* Why the communicator stays on plain NCCL, or NULL. All ranks see the same seats and come to the same answer. */
static const char *nothing_to_do(const struct comm *c, const struct ry_cluster *map, size_t address_size, char *why, size_t size)
{
    if (!c->seat.able)
        return ry_engine.observe ? "RAILYARD_STRATEGY=observe" : !c->info.blocking ? "it is non-blocking" : "this rank cannot";
    if (map->nnodes < 2 && atomic_load(&ry_engine.forced) < 0)
        return "all its ranks sit on one node";
    if (map->nranks < 2)
        return "it has one rank";
    if (!address_size)
        return "the yardmaster, rank 0, gave no address";
    for (int r = 0; r < map->nranks; r++) {
        const struct ry_seat *s = &map->seats[r];
        const char *other = !s->able ? "cannot take part"
                            : strcmp(s->railyard, c->seat.railyard) ? "runs another version of Railyard"
                            : s->settings_hash != c->seat.settings_hash ? "has other settings" : NULL;
        if (other)
            return snprintf(why, size, "rank %d on %s %s", r, s->host, other), why;
    }
    return NULL;
}

static void trouble(void *context, int peer, const char *why)
{
    const struct comm *c = context;
    if (why != ry_line_left) /* communicators end on some ranks before others */
        ry_warn("communicator %s: rank %d: %s: its exchanges go over plain NCCL from here", c->id, peer, why);
}

static void free_reissue(struct reissue *r, bool aborted)
{
    ry_twins_close(r->twins, aborted);
    if (r->talk)
        ry_talk_close(r->talk);
    ry_across_close(r->across, atomic_load(&ry_engine.closed));
    ry_node_comm_end(r->node, aborted); /* what it had to abort is under way already */
    ry_redirected_free(&r->redirected);
    if (r->runner)
        ry_runner_free(r->runner, aborted);
    ry_chooser_free(r->chooser);
    if (r->pacing.sample)
        ry_sampler_end(ry_engine.sampler, r->pacing.sample, NULL, 0, NULL, NULL, 0); /* unused */
    ry_pace_free(r->pace);
    for (int i = 0; i < RY_STRATEGIES; i++)
        ry_slice_free(&r->slices[i]);
    free(r->send);
    free(r->recv);
    free(r->send_at);
    free(r->recv_at);
    free(r->repeats);
    free(r->searched.send);
    ry_pairs_free(&r->pairs);
    free(r->manifest);
    free(r);
}

/* The yardmaster needs to know what the links are worth. */
void ry_reissue_model(struct ry_cost_model *model, const struct ry_cluster *map)
{
    struct ry_err err;
    char other[128];
    ry_cost_guess(model, map);
    int r = ry_cost_find(model, map, other, &err);
    if (r < 0)
        ry_warn("%s: strategies are chosen by a guess instead; railyard calibrate measures anew", err.msg);
    else if (r > 0)
        ry_info("this cluster was never measured (railyard calibrate): strategies are chosen by a guess");
    else if (*other)
        ry_info("%d ranks on %d nodes were not measured by themselves: links are taken to be as on %s (railyard calibrate)",
                map->nranks, map->nnodes, other);
}

bool ry_reissue_open(struct comm *c, struct ry_cluster *map, const void *address, size_t address_size)
{
    char text[160];
    struct ry_err err;
    const char *why = nothing_to_do(c, map, address_size, text, sizeof text);
    /* Where everything stays as it is, the report still says what would be saved. */
    bool only_look = ry_engine.observe && c->record && ry_engine.device && map->nnodes > 1;
    if (why && !only_look) {
        ry_info("communicator %s stays on plain NCCL: %s", c->id, why);
        return false;
    }
    size_t n = (size_t)map->nranks;
    struct reissue *r = calloc(1, sizeof *r);
    if (!r || !(r->send = calloc(n, sizeof *r->send)) || !(r->recv = calloc(n, sizeof *r->recv)) ||
        !(r->send_at = calloc(n, sizeof *r->send_at)) || !(r->recv_at = calloc(n, sizeof *r->recv_at)) ||
        !(r->searched.send = calloc(n, sizeof *r->searched.send)) ||
        !(r->repeats = calloc((size_t)map->nnodes, sizeof *r->repeats)) || !(r->manifest = malloc(ry_side_most(map->nnodes)))) {
        ry_fail(&err, "out of memory");
        goto failed;
    }
    if (!(r->runner = ry_runner_new(&ry_engine.nccl, ry_engine.device, c->info.device, c->info.nccl, &err)))
        goto failed;
    r->map = map;
    r->pairs.combine = ry_engine.combine;
    r->pairs.let_go = ry_kept_free;
    if (only_look) {
        atomic_store(&c->reissue, r);
        return true;
    }
    if (ry_engine.settings.node_comm)
        r->node = ry_node_comm_new(&ry_engine.nccl, ry_engine.device, map, c->info.rank, c->info.nccl, c->id);
    struct ry_policy policy = {0};
    if (c->info.rank == 0) {
        struct ry_policy_config config = {.map = map,
                                          .forced = &ry_engine.forced,
                                          .verify = ry_engine.settings.verify,
                                          .staging_limit = ry_engine.settings.staging,
                                          .chunks = ry_engine.chunks,
                                          .transport = &ry_engine.transport,
                                          .name = c->id};
        ry_reissue_model(&config.model, map);
        if (ry_engine.sampler && !(r->pace = ry_pace_new())) {
            ry_fail(&err, "out of memory");
            goto failed;
        }
        config.pace = r->pace;
        if (!(r->chooser = ry_chooser_new(&config, &err)))
            goto failed;
        policy = ry_chooser_policy(r->chooser);
    }
    struct ry_talk_config talk = {.control = ry_engine.control,
                                  .key = c->key,
                                  .nranks = map->nranks,
                                  .rank = c->info.rank,
                                  .address = address,
                                  .address_size = address_size,
                                  .patience = ry_engine.settings.patience,
                                  .policy = &policy,
                                  .hold = &c->face.hold,
                                  .trouble = trouble,
                                  .context = c};
    if (!(r->talk = ry_talk_open(&talk, &err)))
        goto failed;
    r->across = ry_across_open(c, map, address, address_size);
    r->twins = ry_twins_open(c, r, address, address_size);
    ry_durations_meet_others(c);
    atomic_store(&c->reissue, r);
    atomic_store(&c->face.wants, 1);
    return true;
failed:
    ry_warn("communicator %s stays on plain NCCL: %s", c->id, err.msg);
    if (r)
        free_reissue(r, false);
    return false;
}

static void count(struct reissue_counts *n, const struct reissue *r)
{
    struct ry_chooser_counts chosen = {0};
    if (r->chooser)
        ry_chooser_counts(r->chooser, &chosen);
    *n = (struct reissue_counts){.agreed = r->waits.count,
                                 .verified = r->verified,
                                 .verify_differs = r->quit,
                                 .short_of_staging = chosen.short_of_staging,
                                 .over_ucx = r->chooser ? r->over_ucx : 0};
    n->by_strategy[RY_DIRECT] = n->agreed;
    for (int i = 0; i < RY_STRATEGIES; i++) {
        if (i == RY_DIRECT)
            continue;
        n->by_strategy[i] = r->carried_out[i];
        n->by_strategy[RY_DIRECT] -= r->carried_out[i];
    }
}

void ry_reissue_close(struct comm *c, bool aborted)
{
    struct reissue *r = atomic_exchange(&c->reissue, NULL);
    if (!r)
        return;
    if (!aborted) { /* of the last exchange nobody else would */
        ry_exchange_look_at_checks(c, r);
        ry_look_pick_up(c, r);
    }
    if (r->talk)
        ry_talk_close(r->talk); /* from here on nobody else asks the chooser */
    r->talk = NULL;
    count(&c->counts, r);
    char dedup[128] = "", node[64] = "", later[64] = "", beside[96] = "";
    double clocked_us = atomic_load(&c->clocked_us);
    if (atomic_load(&c->met_us) > 0)
        snprintf(beside, sizeof beside, "; other communicators' ran %.0f %% of their time beside them", 100 * atomic_load(&c->met_us) / clocked_us);
    if (c->later.given)
        snprintf(later, sizeof later, "; %llu after their calls had returned", (unsigned long long)c->later.given);
    if (r->over_node)
        snprintf(node, sizeof node, "; %llu over communicators of the nodes' ranks", (unsigned long long)r->over_node);
    if (r->carried_out[RY_BALANCED])
        snprintf(dedup, sizeof dedup, ", %llu balanced", (unsigned long long)r->carried_out[RY_BALANCED]);
    if (r->carried_out[RY_DEDUP])
        snprintf(dedup + strlen(dedup), sizeof dedup - strlen(dedup), ", %llu dedup", (unsigned long long)r->carried_out[RY_DEDUP]);
    if (r->carried_out[RY_REPLICA])
        snprintf(dedup + strlen(dedup), sizeof dedup - strlen(dedup), ", %llu by replica", (unsigned long long)r->carried_out[RY_REPLICA]);
    if (r->carried_out[RY_SUM])
        snprintf(dedup + strlen(dedup), sizeof dedup - strlen(dedup), ", %llu summed", (unsigned long long)r->carried_out[RY_SUM]);
    if (r->waits.count)
        ry_info("communicator %s: %llu exchanges agreed on, %llu hierarchical%s, %llu verified; verdicts took %.0f / %.0f / %.0f us "
                "(half / 90 %% / 99 %% of them at most), of it %.0f / %.0f / %.0f us for messages, the rest for late ranks%s%s%s",
                c->id, (unsigned long long)r->waits.count, (unsigned long long)r->carried_out[RY_HIERARCHICAL], dedup,
                (unsigned long long)r->verified, ry_waits_quantile(&r->waits, 0.5), ry_waits_quantile(&r->waits, 0.9),
                ry_waits_quantile(&r->waits, 0.99), ry_waits_quantile(&r->messages, 0.5),
                ry_waits_quantile(&r->messages, 0.9), ry_waits_quantile(&r->messages, 0.99), node, later, beside);
    if (r->over_ucx)
        ry_info("communicator %s: UCX carried what crossed nodes in %llu of these, %llu bytes from here", c->id,
                (unsigned long long)r->over_ucx, (unsigned long long)ry_across_sent(r->across));
    struct ry_cluster *map = r->map;
    free_reissue(r, aborted);
    ry_cluster_free(map);
}
