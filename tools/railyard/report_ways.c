/*
 * report_ways.c: what the report says of equal rows: how many there were in what went across nodes, in either
 * direction, and what sending them once saved, or would save; as text, JSON and picture.
 */
#include <inttypes.h>
#include <string.h>

#include "report.h"

#define LINE 18.0 /* height of a line of the picture */

/* Was anything searched or summed at all? Directions alone say nothing. */
static bool any(const struct ry_trace_ways *w)
{
    for (int i = 0; i < w->n; i++)
        if (w->way[i].searched || w->way[i].summed)
            return true;
    return false;
}

static double compared(const struct ry_trace_way *way)
{
    return way->took_us > 0 ? way->plain_us / way->took_us : 0;
}

/* "of rows searched 74.9 % repeat …": one direction in words. */
static void put_way(const struct ry_trace_way *way, char *out, size_t size)
{
    char a[16], b[16], c[16];
    size_t n = (size_t)snprintf(out, size, "%s: %s across nodes", way->name, ry_report_bytes((double)way->cross, a));
    if (way->summed)
        n += (size_t)snprintf(out + n, size - n, "; %s crossed as %s, rows of one token added up",
                              ry_report_bytes((double)way->summed_from, a), ry_report_bytes((double)way->summed_to, b));
    if (!way->searched) {
        snprintf(out + n, size - n, ", not searched");
        return;
    }
    n += (size_t)snprintf(out + n, size - n, "; of rows searched %.1f %% repeat, %.1f %% are padding",
                          100 * ry_way_repeated(way), 100 * ry_way_padding(way));
    if (way->packed_from > way->packed_to)
        n += (size_t)snprintf(out + n, size - n, "; %s crossed as %s", ry_report_bytes((double)way->packed_from, a),
                              ry_report_bytes((double)way->packed_to, b));
    if (ry_way_could_save(way) > ry_way_saved(way))
        n += (size_t)snprintf(out + n, size - n, "; dedup could save %s",
                              ry_report_bytes((double)ry_way_could_save(way), c));
    if (way->estimated && n < size)
        snprintf(out + n, size - n, "; %.2fx as fast as plain NCCL by the model", compared(way));
}

/* ---- text ---- */

void ry_report_ways_text(const struct ry_summary *s)
{
    const struct ry_trace_ways *w = &s->comm->ways;
    char a[16], b[16], c[16], d[16];
    if (!any(w))
        return;
    printf("  equal rows %-9s %12s %9s %9s %9s %10s %10s %10s\n", "direction", "across nodes", "searched", "repeated",
           "padding", "left", "saved", "could save");
    for (int i = 0; i < w->n; i++) {
        const struct ry_trace_way *way = &w->way[i];
        printf("             %-9s %12s", way->name, ry_report_bytes((double)way->cross, a));
        if (!way->searched) {
            printf("      none");
            if (way->summed)
                printf(" %9s %9s %10s %10s", "", "", "", ry_report_bytes((double)ry_way_saved(way), c));
            puts("");
            continue;
        }
        printf(" %9s %7.1f %% %7.1f %% %8.1f %% %10s %10s\n", ry_report_bytes((double)way->from_bytes, b),
               100 * ry_way_repeated(way), 100 * ry_way_padding(way), 100 * ry_way_left(way),
               ry_report_bytes((double)ry_way_saved(way), c), ry_report_bytes((double)ry_way_could_save(way), d));
    }
    for (int i = 0; i < w->n; i++) {
        const struct ry_trace_way *way = &w->way[i];
        if (way->summed)
            printf("             %s: rows of one token were added up before they crossed in %" PRIu64
                   " sides of exchanges: %s as %s\n",
                   way->name, way->summed, ry_report_bytes((double)way->summed_from, a),
                   ry_report_bytes((double)way->summed_to, b));
        if (way->waited)
            printf("             %s: the job's threads waited for %" PRIu64 " of %" PRIu64 " searches, %s on average\n",
                   way->name, way->waited, way->searched, ry_report_us(way->waited_us / (double)way->waited, a));
        if (way->estimated)
            printf("             %s: %" PRIu64
                   " timed exchange%s not sent plainly took %s on average, plain NCCL %s by the model: "
                   "%.2fx\n",
                   way->name, way->estimated, way->estimated == 1 ? "" : "s",
                   ry_report_us(way->took_us / (double)way->estimated, a),
                   ry_report_us(way->plain_us / (double)way->estimated, b), compared(way));
    }
}

/* ---- JSON ---- */

static json_t *number(uint64_t v)
{
    return json_integer(v > INT64_MAX ? INT64_MAX : (json_int_t)v);
}

static json_t *way_json(const struct ry_trace_way *way)
{
    json_t *searched = json_null(), *estimate = json_null();
    if (way->searched)
        searched =
            json_pack("{s:o,s:o,s:f,s:o,s:o,s:o,s:o,s:o,s:f,s:f}", "searches", number(way->searched), "waited_for",
                      number(way->waited), "waited_us", way->waited ? way->waited_us / (double)way->waited : 0.0,
                      "bytes", number(way->from_bytes), "packed_bytes", number(way->to_bytes), "rows",
                      number(way->rows), "distinct", number(way->distinct), "zero", number(way->zero), "repeated",
                      ry_way_repeated(way), "padding", ry_way_padding(way));
    if (way->estimated)
        estimate = json_pack("{s:o,s:f,s:f}", "exchanges", number(way->estimated), "plain_us",
                             way->plain_us / (double)way->estimated, "took_us", way->took_us / (double)way->estimated);
    return json_pack("{s:s,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o}", "direction", way->name, "lines", number(way->lines),
                     "bytes_cross_node", number(way->cross), "searched", searched, "packed", number(way->packed),
                     "summed", number(way->summed), "bytes_saved", number(ry_way_saved(way)), "bytes_could_save", number(ry_way_could_save(way)),
                     "estimate", estimate);
}

json_t *ry_report_ways_json(const struct ry_summary *s)
{
    json_t *list = json_array();
    for (int i = 0; i < s->comm->ways.n; i++)
        json_array_append_new(list, way_json(&s->comm->ways.way[i]));
    return list;
}

/* ---- picture ---- */

double ry_report_ways_height(const struct ry_summary *s)
{
    return any(&s->comm->ways) ? LINE * (s->comm->ways.n + 1) + 8 : 0;
}

void ry_report_ways_svg(const struct ry_summary *s, FILE *f, double x, double y)
{
    const struct ry_trace_ways *w = &s->comm->ways;
    char text[320];
    if (!any(w))
        return;
    ry_report_svg_text(f, x, y + 14, 12, "start", RY_SVG_FAINT, "equal rows, by direction of the exchange");
    for (int i = 0; i < w->n; i++) {
        put_way(&w->way[i], text, sizeof text);
        ry_report_svg_text(f, x, y + 14 + LINE * (i + 1), 12, "start", RY_SVG_INK, text);
    }
}
