/*
 * report_local.c: what the report says of locality: how much stays on its rank and node, how far that is from staying
 * wholly, by direction, and how it went over time; as text, JSON and picture.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/kl.h"
#include "report.h"

#define LINE 18.0
#define TEXT_BINS 8

static const char *way_name(const char *name)
{
    return *name ? name : "unknown";
}

static uint64_t moved(const struct ry_local_bin *b)
{
    return b->self + b->in_node + b->cross;
}

static double share(uint64_t part, uint64_t of)
{
    return of ? (double)part / (double)of : 0;
}

static bool any(const struct ry_summary *s)
{
    return s->comm->nnodes > 1 && s->comm->local.nways && s->bytes > s->unknown;
}

/* What would be left across nodes if equal rows crossed once, of all that direction's bytes; by the exchanges searched.
 */
static double leaves_distinct(const struct ry_summary *s, const char *name, const struct ry_local_bin *b)
{
    const struct ry_trace_ways *w = &s->comm->ways;
    for (int i = 0; i < w->n; i++) {
        if (strcmp(w->way[i].name, name) || !w->way[i].searched)
            continue;
        double left = ry_way_left(&w->way[i]) * (double)b->cross, stays = (double)(b->self + b->in_node);
        return left + stays > 0 ? left / (left + stays) : NAN;
    }
    return NAN;
}

/* Bins that hold anything, and room for a matrix; NULL without memory. */
static uint64_t *room(const struct ry_summary *s, int *last)
{
    const struct ry_trace_local *l = &s->comm->local;
    *last = 0;
    for (int w = 0; w < l->nways; w++)
        for (int i = 0; i < RY_LOCAL_BINS; i++)
            if (l->way[w].bin[i].lines && i >= *last)
                *last = i + 1;
    return calloc((size_t)s->comm->nnodes * (size_t)s->comm->nnodes, sizeof(uint64_t));
}

static double distance(const struct ry_summary *s, int way, int from, int to, struct ry_local_bin *sum)
{
    return ry_local_sum(&s->comm->local, way, from, to, s->comm->nnodes, sum)
               ? ry_distance_to_local(sum->nodes, s->comm->nnodes)
               : NAN;
}

/* ---- text ---- */

void ry_report_local_text(const struct ry_summary *s)
{
    const struct ry_trace_local *l = &s->comm->local;
    struct ry_local_bin b = {0};
    int last;
    if (!any(s) || !(b.nodes = room(s, &last)))
        return;
    printf("  locality   direction   on its rank   on its node    leaves     leaves, dedup    KL to local    on its "
           "node, over the run\n");
    for (int w = 0; w < l->nways; w++) {
        double kl = distance(s, w, 0, RY_LOCAL_BINS, &b), distinct = leaves_distinct(s, l->way[w].name, &b);
        uint64_t all = moved(&b);
        if (!all)
            continue;
        printf("             %-9s   %9.1f %%   %9.1f %%   %5.1f %%", way_name(l->way[w].name), 100 * share(b.self, all),
               100 * share(b.self + b.in_node, all), 100 * share(b.cross, all));
        if (isnan(distinct))
            printf("  %15s", "");
        else
            printf("  %13.1f %%", 100 * distinct);
        if (isnan(kl))
            printf("  %13s   ", "");
        else
            printf("  %13.2f   ", kl);
        int step = (last + TEXT_BINS - 1) / TEXT_BINS;
        for (int i = 0; i < last; i += step) {
            ry_local_sum(l, w, i, i + step < last ? i + step : last, s->comm->nnodes, &b);
            if (moved(&b))
                printf(" %3.0f", 100 * share(b.self + b.in_node, moved(&b)));
            else
                printf("   .");
        }
        puts(" %");
    }
    printf("             (KL to local: 0 if all stays on its node, %.2f if it spreads evenly over %d)\n",
           ry_distance_of_even(s->comm->nnodes), s->comm->nnodes);
    free(b.nodes);
}

/* ---- JSON ---- */

static json_t *real(double v)
{
    return isnan(v) ? json_null() : json_real(v);
}

static json_t *bytes(uint64_t v)
{
    return json_integer(v > INT64_MAX ? INT64_MAX : (json_int_t)v);
}

static json_t *cell(const struct ry_local_bin *b, double kl)
{
    return json_pack("{s:o,s:o,s:o,s:o,s:o}", "bytes", bytes(moved(b)), "on_rank",
                     real(moved(b) ? share(b->self, moved(b)) : NAN), "on_node",
                     real(moved(b) ? share(b->self + b->in_node, moved(b)) : NAN), "leaves",
                     real(moved(b) ? share(b->cross, moved(b)) : NAN), "kl", real(kl));
}

json_t *ry_report_local_json(const struct ry_summary *s)
{
    const struct ry_trace_local *l = &s->comm->local;
    struct ry_local_bin b = {0};
    int last;
    if (!any(s) || !(b.nodes = room(s, &last)))
        return json_null();
    json_t *list = json_array();
    for (int w = 0; w < l->nways; w++) {
        json_t *way = json_object(), *time = json_array();
        double kl = distance(s, w, 0, RY_LOCAL_BINS, &b);
        json_object_set_new(way, "direction", *l->way[w].name ? json_string(l->way[w].name) : json_null());
        json_object_update_new(way, cell(&b, kl));
        json_object_set_new(way, "leaves_distinct", real(leaves_distinct(s, l->way[w].name, &b)));
        for (int i = 0; i < last; i++) {
            kl = distance(s, w, i, i + 1, &b);
            json_t *bin = json_pack("{s:o}", "from", bytes((uint64_t)i * l->width));
            json_object_update_new(bin, cell(&b, kl));
            json_array_append_new(time, bin);
        }
        json_object_set_new(way, "over_time", time);
        json_array_append_new(list, way);
    }
    free(b.nodes);
    return json_pack("{s:o,s:f,s:f,s:o}", "exchanges_per_bin", bytes(l->width), "kl_even",
                     ry_distance_of_even(s->comm->nnodes), "spread", RY_LOCAL_SPREAD, "directions", list);
}

/* ---- picture ---- */

#define CHART 60.0

double ry_report_local_height(const struct ry_summary *s)
{
    return any(s) ? LINE + CHART + 24 : 0;
}

void ry_report_local_svg(const struct ry_summary *s, FILE *f, double x, double y)
{
    static const char *const colors[RY_LOCAL_WAYS] = {"#4c7fb0", "#d9822b", "#8b6fb0"};
    const struct ry_trace_local *l = &s->comm->local;
    struct ry_local_bin b = {0};
    double width = 340;
    char text[160];
    int last;
    if (!any(s) || !(b.nodes = room(s, &last)))
        return;
    ry_report_svg_text(f, x, y + 14, 12, "start", RY_SVG_FAINT,
                       "what stays on its node, by direction, over the run (0 to 100 %)");
    fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"none\" stroke=\"#c3cbd3\"/>\n", x,
            y + LINE + 4, width, CHART);
    for (int w = 0; w < l->nways; w++) {
        fprintf(f, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.5\" points=\"", colors[w]);
        for (int i = 0; i < last; i++) {
            ry_local_sum(l, w, i, i + 1, s->comm->nnodes, &b);
            if (moved(&b))
                fprintf(f, "%.1f,%.1f ", x + width * (i + 0.5) / last,
                        y + LINE + 4 + CHART * (1 - share(b.self + b.in_node, moved(&b))));
        }
        fputs("\"/>\n", f);
        double kl = distance(s, w, 0, RY_LOCAL_BINS, &b);
        snprintf(text, sizeof text, "%s: %.1f %% on its node, %.1f %% on its rank", way_name(l->way[w].name),
                 100 * share(b.self + b.in_node, moved(&b)), 100 * share(b.self, moved(&b)));
        if (!isnan(kl))
            snprintf(text + strlen(text), sizeof text - strlen(text), "; KL to local %.2f", kl);
        ry_report_svg_text(f, x + width + 14, y + LINE + 18 + LINE * w, 12, "start", colors[w], text);
    }
    free(b.nodes);
}
