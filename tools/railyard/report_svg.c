/*
 * report_svg.c: one communicator as a picture: who sent how much to whom, by rank and by node.
 *
 * Ranks are ordered by node, so that nodes are blocks on the diagonal. Beyond MAX_CELLS a cell stands for several
 * neighbouring ranks (or nodes). Colour is one hue from light to dark in even steps of perceived lightness (OKLab).
 */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"

#define MAX_CELLS 64
#define INK RY_SVG_INK
#define FAINT RY_SVG_FAINT
#define LINE "#c3cbd3"
#define ACCENT "#b4540a" /* node borders and what crosses them */

/* A square matrix ready to be drawn. */
struct map {
    int n;           /* cells a side */
    int group;       /* ranks (nodes) per cell */
    double *cells;   /* [n * n] bytes */
    int *first;      /* [n]: the rank (node) that a cell's label names */
    bool *border;    /* [n]: a node begins here */
    double max, min; /* of cells; min of those above zero */
    bool log;        /* colours by the logarithm */
};

static void put_text(FILE *f, const char *s)
{
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '&')
            fputs("&amp;", f);
        else if (c == '<')
            fputs("&lt;", f);
        else
            fputc(c < 32 ? '?' : c, f);
    }
}

void ry_report_svg_text(FILE *f, double x, double y, double size, const char *anchor, const char *color, const char *s)
{
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" font-size=\"%.1f\" text-anchor=\"%s\" fill=\"%s\">", x, y, size, anchor,
            color);
    put_text(f, s);
    fputs("</text>\n", f);
}

static double gamma_of(double v)
{
    v = v < 0 ? 0 : v > 1 ? 1 : v;
    return v <= 0.0031308 ? 12.92 * v : 1.055 * pow(v, 1 / 2.4) - 0.055;
}

/* 0 ≤ t ≤ 1, light to dark blue. */
static void color_of(double t, char out[8])
{
    double L = 0.965 - 0.655 * t, chroma = 0.01 + 0.11 * sin(3.14159265 * (0.08 + 0.74 * t)) * (t > 0.02 ? 1 : 0.5),
           h = 255 * 3.14159265 / 180;
    double a = chroma * cos(h), b = chroma * sin(h);
    double l = L + 0.3963377774 * a + 0.2158037573 * b, m = L - 0.1055613458 * a - 0.0638541728 * b,
           s = L - 0.0894841775 * a - 1.2914855480 * b;
    l = l * l * l;
    m = m * m * m;
    s = s * s * s;
    double r = gamma_of(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s),
           g = gamma_of(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
           u = gamma_of(-0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s);
    snprintf(out, 8, "#%02x%02x%02x", (unsigned)(r * 255 + 0.5) & 255, (unsigned)(g * 255 + 0.5) & 255,
             (unsigned)(u * 255 + 0.5) & 255);
}

static double shade(const struct map *m, double v)
{
    if (v <= 0 || m->max <= 0)
        return 0;
    if (!m->log)
        return v / m->max;
    return m->max > m->min ? 0.08 + 0.92 * log(v / m->min) / log(m->max / m->min) : 1;
}

static int by_number(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The scale: linear, unless most cells would vanish beside a few large ones. */
static void choose_scale(struct map *m)
{
    size_t n = 0, cells = (size_t)m->n * (size_t)m->n;
    double *sorted = malloc(cells * sizeof *sorted);
    for (size_t i = 0; i < cells; i++) {
        if (m->cells[i] > m->max)
            m->max = m->cells[i];
        if (m->cells[i] > 0 && (m->min == 0 || m->cells[i] < m->min))
            m->min = m->cells[i];
        if (sorted && m->cells[i] > 0)
            sorted[n++] = m->cells[i];
    }
    if (sorted && n) {
        qsort(sorted, n, sizeof *sorted, by_number);
        m->log = sorted[n / 2] < m->max / 25;
    }
    free(sorted);
}

static bool make_map(struct map *m, int of)
{
    *m = (struct map){.group = (of + MAX_CELLS - 1) / MAX_CELLS};
    m->n = (of + m->group - 1) / m->group;
    m->cells = calloc((size_t)m->n * (size_t)m->n, sizeof *m->cells);
    m->first = calloc((size_t)m->n, sizeof *m->first);
    m->border = calloc((size_t)m->n, sizeof *m->border);
    return m->cells && m->first && m->border;
}

static void free_map(struct map *m)
{
    free(m->cells);
    free(m->first);
    free(m->border);
}

/* Ranks by node, unknown nodes last. */
static int *order_ranks(const struct ry_trace_comm *c)
{
    int *order = malloc((size_t)c->nranks * sizeof *order), n = 0;
    for (int node = 0; order && node <= c->nnodes; node++)
        for (int r = 0; r < c->nranks; r++)
            if (c->node[r] == (node < c->nnodes ? node : -1))
                order[n++] = r;
    return order;
}

static bool rank_map(struct map *m, const struct ry_trace_comm *c)
{
    int *order = order_ranks(c);
    if (!order || !make_map(m, c->nranks)) {
        free(order);
        return false;
    }
    for (int i = 0; i < c->nranks; i++) {
        if (i % m->group == 0) {
            m->first[i / m->group] = order[i];
            m->border[i / m->group] = i && c->node[order[i]] != c->node[order[i - 1]];
        }
        for (int j = 0; j < c->nranks; j++)
            m->cells[i / m->group * m->n + j / m->group] += (double)ry_trace_bytes(c, order[i], order[j]);
    }
    free(order);
    choose_scale(m);
    return true;
}

static bool node_map(struct map *m, const struct ry_summary *s)
{
    int n = s->comm->nnodes;
    if (!make_map(m, n))
        return false;
    for (int i = 0; i < n; i++) {
        if (i % m->group == 0)
            m->first[i / m->group] = i;
        for (int j = 0; j < n; j++)
            m->cells[i / m->group * m->n + j / m->group] += (double)s->nodes[i * n + j];
    }
    choose_scale(m);
    return true;
}

static double cell_size(const struct map *m, double side)
{
    double s = side / m->n;
    return s > 60 ? 60 : s;
}

/* Colour bar, `h` high, its labels to the right. */
static void draw_bar(FILE *f, const struct map *m, double x, double y, double h)
{
    enum { STEPS = 48 };
    char color[8], text[16];
    for (int i = STEPS - 1; i >= 0; i--) { /* each down to the bottom, the next over it: no seams */
        double t = m->log ? 0.08 + 0.92 * (i + 0.5) / STEPS : (i + 0.5) / STEPS;
        color_of(t, color);
        fprintf(f, "<rect x=\"%.1f\" y=\"%.2f\" width=\"12\" height=\"%.2f\" fill=\"%s\"/>\n", x,
                y + h - (i + 1) * h / STEPS, (i + 1) * h / STEPS, color);
    }
    fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"12\" height=\"%.1f\" fill=\"none\" stroke=\"" LINE "\"/>\n", x, y,
            h);
    for (int i = 0; i <= 4; i++) {
        double v = m->log ? m->min * pow(m->max / m->min, i / 4.0) : m->max * i / 4;
        double ty = y + h - h * i / 4;
        fprintf(f, "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"" FAINT "\"/>\n", x + 12, x + 16, ty,
                ty);
        ry_report_svg_text(f, x + 20, ty + 3.5, 10.5, "start", INK, ry_report_bytes(v, text));
    }
    if (m->log)
        ry_report_svg_text(f, x, y + h + 16, 10, "start", FAINT, "log scale");
}

/* The cells with their grid, and values where they fit. */
static void draw_cells(FILE *f, const struct map *m, double x, double y, double cell)
{
    char color[8], text[16];
    double side = cell * m->n, gap = cell >= 6 ? 0.5 : 0;
    fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"#ffffff\" stroke=\"" LINE "\"/>\n", x,
            y, side, side);
    for (int i = 0; i < m->n; i++) {
        for (int j = 0; j < m->n; j++) {
            double v = m->cells[i * m->n + j], t = shade(m, v), cx = x + j * cell, cy = y + i * cell;
            if (v <= 0)
                continue;
            color_of(t, color);
            fprintf(f, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\"/>\n", cx + gap, cy + gap,
                    cell - 2 * gap, cell - 2 * gap, color);
            if (cell >= 42)
                ry_report_svg_text(f, cx + cell / 2, cy + cell / 2 + 3.5, cell >= 52 ? 10.5 : 9, "middle",
                        t > 0.5 ? "#ffffff" : INK, ry_report_bytes(v, text));
        }
    }
}

static void draw_labels(FILE *f, const struct map *m, double x, double y, double cell)
{
    int step = 1;
    while (step * cell < 15 || (m->group > 1 && step * cell < 24))
        step *= 2;
    for (int i = 0; i < m->n; i += step) {
        char text[16];
        snprintf(text, sizeof text, "%d", m->first[i]);
        ry_report_svg_text(f, x - 6, y + (i + 0.5) * cell + 3.5, 10.5, "end", FAINT, text);
        ry_report_svg_text(f, x + (i + 0.5) * cell, y - 6, 10.5, "middle", FAINT, text);
    }
}

/* Lines between nodes, and a label to the left of each node's rows. */
static void draw_nodes(FILE *f, const struct map *m, const struct ry_trace_comm *c, double x, double y, double cell)
{
    double side = cell * m->n;
    int from = 0;
    bool crowded = side < 36.0 * c->nnodes; /* the lines must not hide the cells */
    for (int i = 1; i <= m->n; i++) {
        if (i < m->n && !m->border[i])
            continue;
        if (i < m->n)
            fprintf(f,
                    "<path d=\"M%.2f %.2fv%.1fM%.2f %.2fh%.1f\" stroke=\"" ACCENT
                    "\" stroke-width=\"%s\" fill=\"none\"/>\n",
                    x + i * cell, y, side, x, y + i * cell, side, crowded ? "0.7\" stroke-opacity=\"0.55" : "1.6");
        int node = c->node[m->first[from]];
        if ((i - from) * cell >= 12 && m->group == 1) {
            char text[96];
            if (node < 0)
                snprintf(text, sizeof text, "node ?");
            else if (*c->hosts[node] && strlen(c->hosts[node]) < 14)
                snprintf(text, sizeof text, "node %d %s", node, c->hosts[node]);
            else
                snprintf(text, sizeof text, "node %d", node);
            double ty = y + (from + i) * cell / 2;
            fprintf(f, "<path d=\"M%.1f %.1fh-4v%.1fh4\" stroke=\"" ACCENT "\" fill=\"none\"/>\n", x - 28,
                    y + from * cell + 2, (i - from) * cell - 4);
            ry_report_svg_text(f, x - 38, ty + 3.5, 10.5, "end", ACCENT, text);
        }
        from = i;
    }
}

/* Row sums at the right, column sums below, without what stays on the rank. */
static void draw_sums(FILE *f, const struct map *m, const struct ry_summary *s, double x, double y, double cell)
{
    double side = cell * m->n, most = 0, *out = calloc(2 * (size_t)m->n, sizeof *out), *in = out ? out + m->n : NULL;
    int *order = order_ranks(s->comm);
    if (out && order) {
        for (int i = 0; i < s->comm->nranks; i++) {
            out[i / m->group] += (double)s->sent[order[i]];
            in[i / m->group] += (double)s->received[order[i]];
        }
        for (int i = 0; i < m->n; i++) {
            most = out[i] > most ? out[i] : most;
            most = in[i] > most ? in[i] : most;
        }
        for (int i = 0; i < m->n && most > 0; i++) {
            fprintf(f, "<rect x=\"%.1f\" y=\"%.2f\" width=\"%.1f\" height=\"%.2f\" fill=\"#8fa3b5\"/>\n", x + side + 8,
                    y + i * cell + cell * 0.12, 44 * out[i] / most, cell * 0.76);
            fprintf(f, "<rect x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"%.1f\" fill=\"#8fa3b5\"/>\n",
                    x + i * cell + cell * 0.12, y + side + 8, cell * 0.76, 44 * in[i] / most);
        }
        ry_report_svg_text(f, x + side + 8, y - 6, 10, "start", FAINT, "sent");
        ry_report_svg_text(f, x - 6, y + side + 20, 10, "end", FAINT, "received");
    }
    free(out);
    free(order);
}

static void draw_shares(FILE *f, const struct ry_summary *s, double x, double y, double width)
{
    const struct {
        const char *name, *color;
        uint64_t bytes;
    } parts[] = {{"cross-node", ACCENT, s->cross_node},
                 {"in-node", "#4c7fb0", s->in_node},
                 {"to self", "#c3cbd3", s->self},
                 {"nodes unknown", "#8b6fb0", s->unknown}};
    double at = x, label = x;
    for (int i = 0; i < 4; i++) {
        char size[16], text[96];
        if (!parts[i].bytes)
            continue;
        double share = (double)parts[i].bytes / (double)s->bytes;
        fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"14\" fill=\"%s\"/>\n", at, y, share * width,
                parts[i].color);
        at += share * width;
        snprintf(text, sizeof text, "%s %s (%.0f %%)", parts[i].name, ry_report_bytes((double)parts[i].bytes, size),
                 share * 100);
        fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"10\" height=\"10\" fill=\"%s\"/>\n", label, y + 22,
                parts[i].color);
        ry_report_svg_text(f, label + 15, y + 31, 11.5, "start", INK, text);
        label += 45 + 6.4 * (double)strlen(text);
    }
}

static void draw_head(FILE *f, const struct ry_summary *s, double width)
{
    const struct ry_trace_comm *c = s->comm;
    char text[512], bytes[16], nodes[48] = "";
    if (c->nnodes)
        snprintf(nodes, sizeof nodes, " on %d node%s", c->nnodes, c->nnodes == 1 ? "" : "s");
    snprintf(text, sizeof text, "%.60s", c->name ? c->name : c->id);
    if (c->name && strlen(c->name) > 60) { /* not in the middle of a character */
        size_t n = 60;
        while (n && (c->name[n] & 0xc0) == 0x80)
            n--;
        snprintf(text + n, sizeof text - n, "…");
    }
    fprintf(f, "<g font-weight=\"bold\">");
    ry_report_svg_text(f, 24, 34, 18, "start", INK, text);
    fprintf(f, "</g>");
    snprintf(text, sizeof text, "%s · %d rank%s%s · %llu exchange%s · %s", s->kind, c->nranks,
             c->nranks == 1 ? "" : "s", nodes, (unsigned long long)s->exchanges, s->exchanges == 1 ? "" : "s",
             ry_report_bytes((double)s->bytes, bytes));
    ry_report_svg_text(f, 24, 56, 12.5, "start", FAINT, text);
    if (s->bytes)
        draw_shares(f, s, 24, 70, width - 48);
}

void ry_report_svg(const struct ry_summary *s, FILE *f)
{
    const struct ry_trace_comm *c = s->comm;
    struct map ranks = {0}, nodes = {0};
    char hints[RY_HINTS][240], text[96];
    int nhints = ry_report_hints(s, hints);
    bool two = c->nnodes > 1 && node_map(&nodes, s);
    if (!rank_map(&ranks, c))
        goto out;
    double cell = cell_size(&ranks, 576), side = cell * ranks.n, ncell = two ? cell_size(&nodes, 300) : 0,
           nside = ncell * nodes.n;
    double left = 150, top = 166, width = left + side + 150, right = width + 56,
           low = top + (side < 150 ? 150 : side) + 60;
    if (two) {
        width = right + nside + 110;
        low = top + nside + 30 > low ? top + nside + 30 : low;
    }
    width = width < 760 ? 760 : width;
    double ways_at = low + ry_report_agreed_height(s), local_at = ways_at + ry_report_ways_height(s), hints_at = local_at + ry_report_local_height(s), height = hints_at + 24 + 18 * nhints + 14;
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" viewBox=\"0 0 %.0f %.0f\" "
            "font-family=\"DejaVu Sans, Helvetica, "
            "Arial, sans-serif\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
            width, height, width, height);
    draw_head(f, s, width);
    if (ranks.group > 1)
        snprintf(text, sizeof text, "bytes from (row) to (column), %d × %d ranks a cell", ranks.group, ranks.group);
    else
        snprintf(text, sizeof text, "bytes from rank (row) to rank (column)");
    ry_report_svg_text(f, left, top - 24, 12, "start", INK, text);
    draw_cells(f, &ranks, left, top, cell);
    draw_labels(f, &ranks, left, top, cell);
    draw_nodes(f, &ranks, c, left, top, cell);
    draw_sums(f, &ranks, s, left, top, cell);
    draw_bar(f, &ranks, left + side + 66, top, side < 150 ? 150 : side > 320 ? 320 : side);
    if (two) {
        ry_report_svg_text(f, right, top - 24, 12, "start", INK, nodes.group > 1 ? "several nodes a cell" : "from node to node");
        draw_cells(f, &nodes, right, top, ncell);
        draw_labels(f, &nodes, right, top, ncell);
        draw_bar(f, &nodes, right + nside + 14, top, nside < 110 ? 110 : nside);
    }
    ry_report_agreed_svg(s, f, 24, low);
    ry_report_ways_svg(s, f, 24, ways_at);
    ry_report_local_svg(s, f, 24, local_at);
    for (int i = 0; i < nhints; i++) {
        fprintf(f, "<circle cx=\"28\" cy=\"%.1f\" r=\"2.5\" fill=\"" ACCENT "\"/>\n", hints_at + 20 + 18 * i);
        ry_report_svg_text(f, 38, hints_at + 24 + 18 * i, 12, "start", INK, hints[i]);
    }
    fputs("</svg>\n", f);
out:
    free_map(&ranks);
    free_map(&nodes);
}
