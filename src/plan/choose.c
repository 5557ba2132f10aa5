/*
 * choose.c: which strategy, and why (cost.h): corrections learned from what exchanges took, margin, hysteresis, trials.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cost_parts.h"

#define TRIAL_WITHIN 1.25
#define TRIAL_FIRST 16
#define TRIAL_LAST 1024
#define NEAR_CLASSES 3  /* a ratio is borrowed from size classes up to so far away */
#define MOST_WRONG 4.6f /* e to this, a hundredfold: beyond it something other than the model is wrong */

static int class_of(uint64_t bytes)
{
    return bytes ? 63 - __builtin_clzll(bytes) : 0;
}

void ry_cost_learn(struct ry_cost_learned *learned, enum ry_strategy strategy, uint64_t busiest_bytes,
                   double estimated_us, double measured_us)
{
    if (!(estimated_us > 0) || !(measured_us > 0) || !isfinite(estimated_us) || !isfinite(measured_us) ||
        (unsigned)strategy >= RY_STRATEGIES)
        return;
    struct ry_cost_cell *cell = &learned->at[strategy][class_of(busiest_bytes)];
    float ratio = logf((float)(measured_us / estimated_us));
    ratio = ratio > MOST_WRONG ? MOST_WRONG : ratio < -MOST_WRONG ? -MOST_WRONG : ratio;
    cell->log_ratio[cell->samples % RY_COST_MEMORY] = ratio;
    cell->samples++;
    if (!cell->samples) /* came round: not to be taken for none */
        cell->samples = RY_COST_MEMORY;
}

void ry_cost_forget(struct ry_cost_learned *learned, enum ry_strategy strategy)
{
    if ((unsigned)strategy < RY_STRATEGIES)
        memset(learned->at[strategy], 0, sizeof learned->at[strategy]);
}

/* The lower quartile of what is remembered; false: too little. */
static bool quartile(const struct ry_cost_learned *learned, int strategy, int class, double *out)
{
    if (class < 0 || class >= RY_COST_CLASSES)
        return false;
    uint32_t n = learned->at[strategy][class].samples;
    if (n < RY_COST_ENOUGH)
        return false;
    n = n < RY_COST_MEMORY ? n : RY_COST_MEMORY;
    float sorted[RY_COST_MEMORY];
    for (uint32_t i = 0; i < n; i++) {
        float v = learned->at[strategy][class].log_ratio[i];
        uint32_t k = i;
        for (; k > 0 && sorted[k - 1] > v; k--)
            sorted[k] = sorted[k - 1];
        sorted[k] = v;
    }
    *out = sorted[(n - 1) / 4];
    return true;
}

/* Of the nearest class that knows one. */
static bool nearby(const struct ry_cost_learned *learned, int strategy, int class, double *out)
{
    if (quartile(learned, strategy, class, out))
        return true;
    for (int d = 1; d <= NEAR_CLASSES; d++)
        if (quartile(learned, strategy, class - d, out) || quartile(learned, strategy, class + d, out))
            return true;
    return false;
}

/* Natural logarithm of the factor that the model is wrong by. *own: this strategy itself was measured. */
static double correction(const struct ry_cost_learned *learned, int strategy, int class, bool *own)
{
    double ratio = 0;
    *own = false;
    if (!learned)
        return 0;
    if (nearby(learned, strategy, class, &ratio) || (learned->other && nearby(learned->other, strategy, class, &ratio))) {
        *own = true;
        return ratio;
    }
    for (int s = 0; s < RY_STRATEGIES; s++)
        if (s != strategy && nearby(learned, s, class, &ratio))
            return ratio;
    return 0;
}

/* ---- why ---- */

static const char *bytes_text(uint64_t bytes, char out[16])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double v = (double)bytes;
    int u = 0;
    for (; v >= 1024 && u < 6; u++)
        v /= 1024;
    snprintf(out, 16, v < 10 && u ? "%.1f %s" : "%.0f %s", v, units[u]);
    return out;
}

/* Appends, cut at the end of `why`. */
#define SAY(choice, ...)                                                                                               \
    do {                                                                                                               \
        size_t at_ = strlen((choice)->why);                                                                            \
        snprintf((choice)->why + at_, sizeof(choice)->why - at_, __VA_ARGS__);                                         \
    } while (0)

static void say_times(struct ry_choice *c, int first, const double *factor)
{
    for (int i = 0; i < RY_STRATEGIES; i++) {
        int s = i == 0 ? first : i == first ? 0 : i;
        if (!isfinite(c->us[s]))
            continue;
        SAY(c, "%s%s %.0f us", i ? ", " : "", ry_strategy_name((enum ry_strategy)s), c->us[s]);
        if (factor[s] > 0.05 || factor[s] < -0.05)
            SAY(c, " (x%.2f)", exp(factor[s]));
    }
    SAY(c, ": ");
}

static void say_gain(struct ry_choice *c, int best, const struct ry_cost_parts *parts)
{
    char text[16], before[16];
    const struct ry_cost_parts *direct = &parts[RY_DIRECT], *p = &parts[best];
    if (best == RY_DEDUP)
        SAY(c, "NIC of node %d %s %s instead of %s", p->nic_node, p->nic_in ? "gets" : "sends",
            bytes_text(p->nic_bytes, text), bytes_text(direct->nic_bytes, before));
    if (best == RY_DEDUP && p->chunks > 1)
        SAY(c, ", in %d chunks", p->chunks);
    if (best == RY_BALANCED)
        SAY(c, "node %d %s %s evenly over its rails, in about %.0f stages", p->nic_node, p->nic_in ? "gets" : "sends",
            bytes_text(p->nic_bytes, text), p->stages);
    else if (best != RY_DEDUP)
        SAY(c, "NIC of node %d %s %s in %llu instead of %llu messages a rank", direct->nic_node,
            direct->nic_in ? "gets" : "sends", bytes_text(direct->nic_bytes, text), (unsigned long long)p->nic_messages,
            (unsigned long long)direct->nic_messages);
}

static void say_loss(struct ry_choice *c, int other, const struct ry_cost_parts *parts)
{
    char text[16];
    const struct ry_cost_parts *direct = &parts[RY_DIRECT], *p = &parts[other];
    double extra =
        p->groups - direct->groups + p->search + p->copies + p->spread + p->forward + p->overhead - direct->overhead - p->hidden;
    if (other == RY_DEDUP)
        SAY(c, "sending equal rows once costs %.0f us, saves %.0f us on the NIC of node %d", extra,
            direct->nic - p->nic, direct->nic_node);
    else if (other == RY_BALANCED)
        SAY(c, "about %.0f stages, and evening out, cost %.0f us, save %.0f us on the NIC of node %d", p->stages, extra,
            direct->nic - p->nic, direct->nic_node);
    else
        SAY(c, "relaying %s in node %d costs %.0f us, saves %.0f us of messages", bytes_text(p->forward_bytes, text),
            p->forward_node, extra, direct->nic - p->nic);
}

/* ---- the choice ---- */

static bool usable(const struct ry_cost_model *m)
{
    bool good = m->nic_rank_bytes_per_us > 0 && isfinite(m->nic_rank_bytes_per_us) && m->copy_bytes_per_us > 0;
    for (int l = 0; l < RY_LINKS; l++)
        good = good && ((l == RY_LINK_NODE && !m->node_comm) ||
                        (m->link[l].bytes_per_us > 0 && isfinite(m->link[l].bytes_per_us)));
    return good;
}

/* What few samples tell of nothing yet is to be had more of, before another is begun with. */
static uint32_t turns_had(const struct ry_cost_cell *cell)
{
    return cell->samples && cell->samples < RY_COST_ENOUGH ? 0 : cell->samples + 1;
}

/* Of those that come close to the best it is the one measured least, if it is time to measure one again; or -1. */
static int trial_of(struct ry_cost_learned *learned, int class, const bool *can, const double *us, int best)
{
    int other = -1;
    struct ry_cost_class *k = &learned->size[class];
    k->turn++;
    if (!k->gap) {
        k->gap = TRIAL_FIRST;
        k->trial_at = TRIAL_FIRST;
    }
    for (int s = 0; s < RY_STRATEGIES; s++) {
        if (s == best || !can[s] || us[s] > us[best] * TRIAL_WITHIN)
            continue;
        uint32_t n = turns_had(&learned->at[s][class]), least = other < 0 ? UINT32_MAX : turns_had(&learned->at[other][class]);
        if (n < least || (n == least && us[s] < us[other]))
            other = s;
    }
    if ((int32_t)(k->turn - k->trial_at) < 0 || other < 0)
        return -1;
    k->gap = k->gap * 2 < TRIAL_LAST ? k->gap * 2 : TRIAL_LAST;
    k->trial_at = k->turn + k->gap;
    return other;
}

void ry_cost_choose(struct ry_choice *choice, const struct ry_cost_model *model, struct ry_cost_learned *learned,
                    const struct ry_cluster *cluster, const struct ry_load *loads, const struct ry_cost_matrix *matrix,
                    double margin)
{
    struct ry_cost_parts parts[RY_STRATEGIES];
    double factor[RY_STRATEGIES];
    double need[RY_STRATEGIES] = {0}; /* the share of direct's time that a strategy must gain */
    bool own[RY_STRATEGIES], doubt[RY_STRATEGIES] = {false};
    *choice = (struct ry_choice){.strategy = RY_DIRECT};
    int class = class_of(ry_cost_parts_of(parts, model, cluster, loads, matrix));
    for (int s = 0; s < RY_STRATEGIES; s++) {
        choice->model_us[s] = parts[s].total;
        factor[s] = correction(learned, s, class, &own[s]);
        /* What is measured begins when all have agreed, and looked for equal rows: how wrong the rest is says nothing of these. */
        double before = fmin(model->agreement_us + (s == RY_DEDUP ? parts[s].search : 0), choice->model_us[s]);
        choice->us[s] = isfinite(choice->model_us[s]) ? (choice->model_us[s] - before) * exp(factor[s]) + before : INFINITY;
    }
    choice->search_us = parts[RY_DEDUP].search;
    choice->chunks = parts[RY_DEDUP].chunks;
    const struct ry_cost_parts *direct = &parts[RY_DIRECT];
    const double *us = choice->us, direct_us = us[RY_DIRECT];
    bool can[RY_STRATEGIES] = {[RY_DIRECT] = true,
                               [RY_HIERARCHICAL] = parts[RY_HIERARCHICAL].forward_node >= 0,
                               [RY_BALANCED] = parts[RY_HIERARCHICAL].forward_node >= 0,
                               [RY_DEDUP] = isfinite(us[RY_DEDUP])};
    if (cluster->nnodes < 2 || direct->nic_node < 0 || !(can[RY_HIERARCHICAL] || can[RY_DEDUP])) {
        SAY(choice, "direct %.0f us: %s", direct_us,
            cluster->nnodes < 2    ? "one node, nothing to relay"
            : direct->nic_node < 0 ? "nothing crosses nodes"
                                   : "no node that gets anything has two ranks, nothing to relay");
        return;
    }
    if (!usable(model) || !isfinite(direct_us) || !isfinite(us[RY_HIERARCHICAL]) || direct_us <= 0) {
        SAY(choice, "direct: the cost model is unusable, it says %g and %g us", direct_us, us[RY_HIERARCHICAL]);
        return;
    }
    /* What a strategy must gain counts between two that gain enough as well: who is in stays, who is in doubt waits. */
    int best = RY_DIRECT, close = -1; /* close: the fastest other than direct */
    for (int s = 0; s < RY_STRATEGIES; s++) {
        if (s == RY_DIRECT || !can[s])
            continue;
        doubt[s] = !model->measured && !own[s];
        bool stays = learned && learned->size[class].incumbent == 1 + s;
        need[s] = doubt[s] ? 2 * margin + 0.1 : stays ? 0 : margin;
        if (1 - us[s] / direct_us >= need[s] && us[s] < direct_us &&
            (best == RY_DIRECT || us[s] / (1 - need[s]) < us[best] / (1 - need[best])))
            best = s;
        if (close < 0 || us[s] < us[close])
            close = s;
    }
    choice->strategy = (enum ry_strategy)best;
    if (learned) {
        learned->size[class].incumbent = (uint8_t)(1 + best);
        int other = trial_of(learned, class, can, us, best);
        choice->trial = other >= 0;
        if (choice->trial)
            choice->strategy = (enum ry_strategy)other;
    }
    say_times(choice, choice->strategy, factor);
    double gain = 1 - us[close] / direct_us;
    if (choice->trial)
        SAY(choice, "tried, to know better than the estimate");
    else if (best != RY_DIRECT)
        say_gain(choice, best, parts);
    else if (gain > 0 && doubt[close])
        SAY(choice, "gains %.0f %%, but links are guessed: %.0f %% wanted; run railyard calibrate", 100 * gain,
            100 * need[close]);
    else if (gain > 0)
        SAY(choice, "gains %.1f %%, less than %.1f %%", 100 * gain, 100 * need[close]);
    else
        say_loss(choice, close, parts);
}
