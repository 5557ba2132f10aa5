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
    if (nearby(learned, strategy, class, &ratio)) {
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
        SAY(c, "%s%s %.0f us", i ? ", " : "", s == RY_HIERARCHICAL ? "hierarchical" : "direct", c->us[s]);
        if (factor[s] > 0.05 || factor[s] < -0.05)
            SAY(c, " (x%.2f)", exp(factor[s]));
    }
    SAY(c, ": ");
}

static void say_gain(struct ry_choice *c, const struct ry_cost_parts *direct, const struct ry_cost_parts *hier)
{
    char text[16];
    SAY(c, "NIC of node %d %s %s in %llu instead of %llu messages a rank", direct->nic_node,
        direct->nic_in ? "gets" : "sends", bytes_text(direct->nic_bytes, text), (unsigned long long)hier->nic_messages,
        (unsigned long long)direct->nic_messages);
}

static void say_loss(struct ry_choice *c, const struct ry_cost_parts *direct, const struct ry_cost_parts *hier)
{
    char text[16];
    double extra = hier->groups - direct->groups + hier->copies + hier->forward + hier->overhead - direct->overhead;
    SAY(c, "relaying %s in node %d costs %.0f us, saves %.0f us of messages", bytes_text(hier->forward_bytes, text),
        hier->forward_node, extra, direct->nic - hier->nic);
}

/* ---- the choice ---- */

static bool usable(const struct ry_cost_model *m)
{
    bool good = m->nic_rank_bytes_per_us > 0 && isfinite(m->nic_rank_bytes_per_us) && m->copy_bytes_per_us > 0;
    for (int l = 0; l < RY_LINKS; l++)
        good = good && m->link[l].bytes_per_us > 0 && isfinite(m->link[l].bytes_per_us);
    return good;
}

/* Is it time to measure `other` again, which is not the best? */
static bool time_for_trial(struct ry_cost_learned *learned, int class, double other_us, double best_us)
{
    struct ry_cost_class *k = &learned->size[class];
    k->turn++;
    if (!k->gap) {
        k->gap = TRIAL_FIRST;
        k->trial_at = TRIAL_FIRST;
    }
    if ((int32_t)(k->turn - k->trial_at) < 0 || other_us > best_us * TRIAL_WITHIN)
        return false;
    k->gap = k->gap * 2 < TRIAL_LAST ? k->gap * 2 : TRIAL_LAST;
    k->trial_at = k->turn + k->gap;
    return true;
}

void ry_cost_choose(struct ry_choice *choice, const struct ry_cost_model *model, struct ry_cost_learned *learned,
                    const struct ry_cluster *cluster, const struct ry_load *loads,
                    const struct ry_cost_matrix *matrix, double margin)
{
    struct ry_cost_parts parts[RY_STRATEGIES];
    double factor[RY_STRATEGIES];
    bool own[RY_STRATEGIES];
    *choice = (struct ry_choice){.strategy = RY_DIRECT};
    int class = class_of(ry_cost_parts_of(parts, model, cluster, loads, matrix));
    for (int s = 0; s < RY_STRATEGIES; s++) {
        choice->model_us[s] = parts[s].total;
        factor[s] = correction(learned, s, class, &own[s]);
        choice->us[s] = choice->model_us[s] * exp(factor[s]);
    }
    const struct ry_cost_parts *direct = &parts[RY_DIRECT], *hier = &parts[RY_HIERARCHICAL];
    double direct_us = choice->us[RY_DIRECT], hier_us = choice->us[RY_HIERARCHICAL];
    if (cluster->nnodes < 2 || direct->nic_node < 0 || hier->forward_node < 0) {
        SAY(choice, "direct %.0f us: %s", direct_us,
            cluster->nnodes < 2    ? "one node, nothing to relay"
            : direct->nic_node < 0 ? "nothing crosses nodes"
                                   : "no node that gets anything has two ranks, nothing to relay");
        return;
    }
    if (!usable(model) || !isfinite(direct_us) || !isfinite(hier_us) || direct_us <= 0) {
        SAY(choice, "direct: the cost model is unusable, it says %g and %g us", direct_us, hier_us);
        return;
    }
    bool stays = learned && learned->size[class].incumbent == 1 + RY_HIERARCHICAL;
    bool doubt = !model->measured && !own[RY_HIERARCHICAL];
    double need = doubt ? 2 * margin + 0.1 : stays ? 0 : margin, gain = 1 - hier_us / direct_us;
    int best = gain >= need && gain > 0 ? RY_HIERARCHICAL : RY_DIRECT;
    int other = best == RY_DIRECT ? RY_HIERARCHICAL : RY_DIRECT;
    choice->strategy = (enum ry_strategy)best;
    if (learned) {
        learned->size[class].incumbent = (uint8_t)(1 + best);
        choice->trial = time_for_trial(learned, class, choice->us[other], choice->us[best]);
        if (choice->trial)
            choice->strategy = (enum ry_strategy)other;
    }
    say_times(choice, choice->strategy, factor);
    if (choice->trial)
        SAY(choice, "tried, to know better than the estimate");
    else if (best == RY_HIERARCHICAL)
        say_gain(choice, direct, hier);
    else if (gain > 0 && doubt)
        SAY(choice, "gains %.0f %%, but links are guessed: %.0f %% wanted; run railyard calibrate", 100 * gain,
            100 * need);
    else if (gain > 0)
        SAY(choice, "gains %.1f %%, less than %.1f %%", 100 * gain, 100 * need);
    else
        say_loss(choice, direct, hier);
}
