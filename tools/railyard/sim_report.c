/* sim_report.c: what `railyard sim` found, as tables and as JSON; and beside NetMoE's own figures where the cluster is
 * the paper's. */
#include <stdio.h>
#include <string.h>

#include "report.h"
#include "sim.h"

#define SCHEMA "railyard-sim"
#define VERSION 1

/* What the paper reports of its volumes, on 4 nodes of 8 A800 (Liu et al., ICLR'25). */
static const struct {
    double inter[2], intra[2], moved[2];
} paper = {{0.57, 0.66}, {0.84, 1.36}, {0.91, 0.96}};
static const char paper_differs[] =
    "the paper's models are MoE-GPT of 768 to 4096 wide with 1024 tokens a sample, whose routing is not published; "
    "its next layer's routing comes from running that router early, and its times are of whole steps, so only volumes "
    "and moves are compared";

static bool is_paper(const struct sim_point *p)
{
    return !strcmp(p->fabric.name, "netmoe") && p->fabric.nodes == 4 && p->fabric.gpus == 8;
}

/* What stands for NetMoE as the paper has it: the next layer predicted, or known where it cannot be. */
static int netmoe_of(const struct sim_point *p)
{
    static const int order[] = {RY_PLACE_NETMOE_PREDICTED, RY_PLACE_NETMOE_KNOWN};
    for (int i = 0; i < 2; i++)
        if (p->result.at[order[i]].done && p->result.at[RY_PLACE_IN_ORDER].done)
            return order[i];
    return -1;
}

void sim_scaling(const struct sim_study *s, const struct sim_point *p, char *out, size_t size)
{
    const struct ry_sim_result *r = &p->result;
    size_t at = 0;
    *out = 0;
    if (!s->dir)
        return;
#define SAY(...) (at += (size_t)snprintf(out + at, at < size ? size - at : 0, __VA_ARGS__))
    if (r->split > 1)
        SAY("each of %d recorded experts stands for %d, among which every copy chooses by chance (no locality there); ",
            r->experts / r->split, r->split);
    if (r->repeats > 1)
        SAY("each of %d recorded samples stands in a step %.1f times; ", r->pool, r->repeats);
    if (!r->pairs)
        SAY("too few token-level choices were recorded: dedup and sum are left out; ");
    else
        SAY("drawn from the %d samples with token-level choices, learned from the %d after them; ", r->pool, r->fit);
#undef SAY
    if (at >= 2 && at < size)
        out[at - 2] = 0;
}

/* ---- text ---- */

static void print_head(const struct sim_study *s, const struct sim_point *p)
{
    const struct ry_sim_result *r = &p->result;
    const struct ry_fabric *f = &p->fabric;
    char text[640], bytes[16];
    printf("%d nodes x %d GPUs = %d (%s)\n", f->nodes, f->gpus, f->nodes * f->gpus, f->about);
    if (s->cost)
        printf("  links     measured, %s: ", s->cost);
    else
        printf("  links     %g GB/s a GPU in the node, %g GB/s a node in %d NIC%s, of which NCCL reaches: ",
               f->local_gbs, f->node_gbs, f->nics, f->nics > 1 ? "s" : "");
    printf("%.3g and %.3g GB/s; one rank alone %.3g\n", p->model.link[RY_LINK_LOCAL].bytes_per_us / 1e3,
           p->model.link[RY_LINK_NIC].bytes_per_us / 1e3, p->model.nic_rank_bytes_per_us / 1e3);
    printf("  agreement %g us an exchange%s\n", p->model.agreement_us,
           p->model.agreement_us > 0 ? "" : ": hidden behind work queued before (--agreement)");
    if (p->sim.rails && !s->cost)
        printf("            a NIC for each GPU: a message between rails counts as one on its rail\n");
    printf("  routing   %s: %d layers of %d experts, top-%d; %d samples of %d tokens a step, rows of %g B\n",
           s->dir ? s->dir : "made up", r->layers, r->experts, r->topk, r->samples, r->tokens, p->sim.row_bytes);
    if (!s->dir)
        printf("            %d groups of experts, locality %g\n", r->groups, p->sim.source.locality);
    sim_scaling(s, p, text, sizeof text);
    if (*text)
        printf("  scaled    %s\n", text);
    printf("  simulated %d step%s, seed %llu, homes by %s; %.1f s, about %s\n\n", p->sim.steps,
           p->sim.steps > 1 ? "s" : "", (unsigned long long)p->sim.source.seed, ry_counting_name(p->sim.counting),
           p->seconds, ry_report_bytes(r->memory, bytes));
}

static void print_table(const struct sim_point *p)
{
    const struct ry_sim_result *r = &p->result;
    double base = 0, best = 0;
    for (int w = 0; w < RY_PLACINGS; w++)
        for (int k = 0; k < RY_SIM_STRATEGIES && r->at[w].done; k++) {
            double us = r->at[w].by[k].step_us;
            if (!r->pairs && k >= RY_SIM_DEDUP)
                continue;
            base = base > 0 ? base : us;
            best = best > 0 && best < us ? best : us;
        }
    printf("  %-36s %-13s %9s %9s %8s %11s %8s %6s %6s\n", "placement", "strategy", "a layer", "a step", "speed",
           "across", "NIC", "moved", "load");
    printf("  %-36s %-13s %9s %9s %8s %11s %8s %6s %6s\n", "", "", "us", "ms", "", "a step", "max/mean", "", "");
    for (int w = 0; w < RY_PLACINGS; w++) {
        const struct ry_sim_placed *at = &r->at[w];
        for (int k = 0; k < RY_SIM_STRATEGIES && at->done; k++) {
            const struct ry_sim_sums *b = &at->by[k];
            char bytes[16], extra[40] = "";
            if (!r->pairs && k >= RY_SIM_DEDUP)
                continue;
            if (k == 0)
                snprintf(extra, sizeof extra, " %4.0f %% %6.2f", 100 * at->moved, at->node_load);
            printf("  %-36s %-13s %9.0f %9.2f %7.2fx %11s %8.2f%s%s\n",
                   k == 0 ? ry_placing_about((enum ry_placing)w) : "", ry_sim_strategy_name((enum ry_sim_strategy)k),
                   b->layer_us, b->step_us / 1e3, base / b->step_us, ry_report_bytes(b->cross_bytes, bytes),
                   b->nic_imbalance, extra, b->step_us <= best ? "  <- fastest" : "");
            best = b->step_us <= best ? 0 : best; /* the first of equals */
        }
    }
    for (int w = 0; w < RY_PLACINGS; w++)
        if (*r->at[w].note && (w != RY_PLACE_COPLACED_TOKENS || strcmp(r->at[w].note, r->at[RY_PLACE_COPLACED].note)))
            printf("  %s: %s\n", ry_placing_name((enum ry_placing)w), r->at[w].note);
}

static void print_paper(const struct sim_point *p)
{
    int w = is_paper(p) ? netmoe_of(p) : -1;
    if (w < 0)
        return;
    const struct ry_sim_sums *base = &p->result.at[RY_PLACE_IN_ORDER].by[RY_SIM_PLAIN],
                             *b = &p->result.at[w].by[RY_SIM_PLAIN];
    printf(
        "\n  NetMoE's paper      inter-node bytes %.2f to %.2f of in order, in-node %.2f to %.2f, %.0f to %.0f %% of "
        "samples move a layer\n",
        paper.inter[0], paper.inter[1], paper.intra[0], paper.intra[1], 100 * paper.moved[0], 100 * paper.moved[1]);
    printf("  %-19s inter-node bytes %.2f of in order, in-node %.2f, %.0f %% of samples move a layer\n",
           ry_placing_name((enum ry_placing)w), b->cross_bytes / base->cross_bytes, b->local_bytes / base->local_bytes,
           100 * p->result.at[w].moved);
    printf("  The difference: %s.\n", paper_differs);
}

static void print_growth(const struct sim_study *s)
{
    puts("\nA step's exchanges in ms, by size");
    printf("  %-36s %-13s", "placement", "strategy");
    for (int i = 0; i < s->npoints; i++)
        printf(" %8d", s->points[i].fabric.nodes * s->points[i].fabric.gpus);
    puts(" GPUs");
    for (int w = 0; w < RY_PLACINGS; w++)
        for (int k = 0; k < RY_SIM_STRATEGIES; k++) {
            bool any = false;
            for (int i = 0; i < s->npoints; i++)
                any |= s->points[i].result.at[w].done && (s->points[i].result.pairs || k < RY_SIM_DEDUP);
            if (!any)
                continue;
            printf("  %-36s %-13s", k ? "" : ry_placing_about((enum ry_placing)w),
                   ry_sim_strategy_name((enum ry_sim_strategy)k));
            for (int i = 0; i < s->npoints; i++)
                if (s->points[i].result.at[w].done)
                    printf(" %8.2f", s->points[i].result.at[w].by[k].step_us / 1e3);
                else
                    printf(" %8s", "-");
            putchar('\n');
        }
}

void sim_print(const struct sim_study *s)
{
    bool pairs = false;
    for (int i = 0; i < s->npoints; i++) {
        if (i)
            putchar('\n');
        print_head(s, &s->points[i]);
        print_table(&s->points[i]);
        print_paper(&s->points[i]);
        pairs |= s->points[i].result.pairs;
    }
    if (s->npoints > 1)
        print_growth(s);
    puts("\n  A layer has four exchanges: dispatch, combine, and their gradients. load: copies that the busiest node's "
         "experts get over the mean.");
    if (pairs)
        puts("  dedup and sum have no plan in this version: their times are put together from hierarchical's parts, "
             "with fewer bytes on the\n  NIC and three passes over memory more. sum changes rounding.");
}

/* ---- JSON ---- */

static json_t *sums_json(const struct ry_sim_sums *b, int strategy, double base)
{
    json_t *us = json_object();
    for (int e = 0; e < RY_EXCHANGES; e++)
        json_object_set_new(us, ry_sim_exchange_name(e), json_real(b->us[e]));
    return json_pack("{ss sb sf sf sf so sf sf sf}", "strategy", ry_sim_strategy_name((enum ry_sim_strategy)strategy),
                     "modelled_only", strategy >= RY_SIM_DEDUP, "us_per_layer", b->layer_us, "us_per_step", b->step_us,
                     "speed", base / b->step_us, "us", us, "cross_bytes", b->cross_bytes, "local_bytes", b->local_bytes,
                     "nic_imbalance", b->nic_imbalance);
}

static json_t *placements_json(const struct sim_point *p)
{
    json_t *list = json_array();
    double base = 0;
    for (int w = 0; w < RY_PLACINGS; w++) {
        const struct ry_sim_placed *at = &p->result.at[w];
        if (!p->sim.placings[w])
            continue;
        json_t *strategies = json_array();
        base = base > 0 ? base : at->by[RY_SIM_PLAIN].step_us;
        for (int k = 0; k < RY_SIM_STRATEGIES && at->done; k++)
            if (p->result.pairs || k < RY_SIM_DEDUP)
                json_array_append_new(strategies, sums_json(&at->by[k], k, base));
        json_t *one = json_pack("{ss sb ss so}", "placement", ry_placing_name((enum ry_placing)w), "done", at->done,
                                "note", at->note, "strategies", strategies);
        if (at->done) {
            json_object_set_new(one, "cross", json_real(at->cross));
            json_object_set_new(one, "moved", json_real(at->moved));
            json_object_set_new(one, "node_load", json_real(at->node_load));
        }
        json_array_append_new(list, one);
    }
    return list;
}

static json_t *paper_json(const struct sim_point *p, int w)
{
    const struct ry_sim_sums *base = &p->result.at[RY_PLACE_IN_ORDER].by[RY_SIM_PLAIN];
    const struct ry_sim_sums *b = &p->result.at[w].by[RY_SIM_PLAIN];
    return json_pack("{s{s[ff] s[ff] s[ff]} s{ss sf sf sf} ss}", "paper", "inter_node", paper.inter[0], paper.inter[1],
                     "in_node", paper.intra[0], paper.intra[1], "moved", paper.moved[0], paper.moved[1], "here",
                     "placement", ry_placing_name((enum ry_placing)w), "inter_node", b->cross_bytes / base->cross_bytes,
                     "in_node", b->local_bytes / base->local_bytes, "moved", p->result.at[w].moved, "differs",
                     paper_differs);
}

static json_t *point_json(const struct sim_study *s, const struct sim_point *p)
{
    const struct ry_sim_result *r = &p->result;
    const struct ry_fabric *f = &p->fabric;
    char scaled[640];
    sim_scaling(s, p, scaled, sizeof scaled);
    json_t *cluster = json_pack("{ss si si si sb sf sf}", "preset", f->name, "nodes", f->nodes, "gpus", f->gpus, "nics",
                                f->nics, "rails", p->sim.rails, "local_gbs", f->local_gbs, "node_gbs", f->node_gbs);
    json_t *model = json_pack("{sb sf sf sf sf sf sf}", "measured", s->cost != NULL, "local_bytes_per_us",
                              p->model.link[RY_LINK_LOCAL].bytes_per_us, "nic_bytes_per_us",
                              p->model.link[RY_LINK_NIC].bytes_per_us, "nic_rank_bytes_per_us",
                              p->model.nic_rank_bytes_per_us, "local_alpha_us", p->model.link[RY_LINK_LOCAL].alpha_us,
                              "nic_alpha_us", p->model.link[RY_LINK_NIC].alpha_us, "agreement_us",
                              p->model.agreement_us);
    json_t *routing = json_pack("{si si si si si si si sf ss}", "layers", r->layers, "experts", r->experts, "topk",
                                r->topk, "tokens_per_sample", r->tokens, "samples", r->samples, "expert_stands_for",
                                r->split, "fit", r->fit, "distinct", r->distinct, "scaled", scaled);
    if (s->dir) {
        json_object_set_new(routing, "dir", json_string(s->dir));
        json_object_set_new(routing, "sample_repeats", json_real(r->repeats));
    } else {
        json_object_set_new(routing, "locality", json_real(p->sim.source.locality));
        json_object_set_new(routing, "groups", json_integer(r->groups));
    }
    json_t *one =
        json_pack("{so so so si sI ss sf sf so}", "cluster", cluster, "model", model, "routing", routing, "steps",
                  p->sim.steps, "seed", (json_int_t)p->sim.source.seed, "count", ry_counting_name(p->sim.counting),
                  "row_bytes", p->sim.row_bytes, "memory_bytes", r->memory, "placements", placements_json(p));
    int w = is_paper(p) ? netmoe_of(p) : -1;
    if (w >= 0)
        json_object_set_new(one, "netmoe", paper_json(p, w));
    return one;
}

json_t *sim_json(const struct sim_study *s)
{
    json_t *list = json_array();
    for (int i = 0; i < s->npoints; i++)
        json_array_append_new(list, point_json(s, &s->points[i]));
    return json_pack("{ss si so}", "schema", SCHEMA, "version", VERSION, "clusters", list);
}
