/*
 * explain_svg.c: plans as a picture. Each group is a panel: senders on the left, receivers on the right, by node; a
 * line for each pair that exchanges anything, as wide as it has bytes. Beyond MAX_ROWS ranks, a row stands for a node.
 */
#include "explain.h"

#include <math.h>
#include <stdlib.h>

#include "report.h"

#define MAX_ROWS 64
#define INK "#1f2933"
#define FAINT "#66737f"
#define LINE "#c3cbd3"
#define ROW 17
#define GAP 10 /* between nodes */
#define TOP 92
#define PANEL 380
#define LEFT 74 /* of a panel: labels */
#define ACROSS 226

enum { OWN, IN_NODE, CROSS, CLASSES };
static const struct {
    const char *color, *name;
} classes[CLASSES] = {{"#9aa5b1", "to itself"}, {"#2b6ca3", "in the node"}, {"#c8590b", "across nodes"}};

struct picture {
    const struct ry_cluster *c;
    bool by_node;
    int rows;
    double *y;          /* [nranks]: where a rank's row is */
    double bottom;      /* of the rows */
    uint64_t *bytes;    /* [rows * rows] of the panel being drawn */
    uint32_t *messages; /* the same */
    uint64_t widest;    /* bytes of any pair in any panel */
};

static int row_of(const struct picture *p, int rank)
{
    return p->by_node ? p->c->node[rank] : rank;
}

static int rank_of(const struct picture *p, int row)
{
    return p->by_node ? p->c->node_first[row] : row;
}

/* What the rows exchange in one group. */
static void add_up(struct picture *p, struct ry_plan *const *plans, int group)
{
    size_t cells = (size_t)p->rows * (size_t)p->rows;
    for (size_t i = 0; i < cells; i++)
        p->bytes[i] = p->messages[i] = 0;
    for (int r = 0; r < p->c->nranks; r++)
        for (int i = 0; i < plans[r]->nsteps; i++) {
            const struct ry_step *s = &plans[r]->steps[i];
            if (s->kind != RY_STEP_SEND || s->group != group)
                continue;
            size_t cell = (size_t)row_of(p, r) * (size_t)p->rows + (size_t)row_of(p, s->peer);
            p->bytes[cell] += s->bytes;
            p->messages[cell]++;
            p->widest = p->bytes[cell] > p->widest ? p->bytes[cell] : p->widest;
        }
}

static int class_of(const struct picture *p, int from, int to)
{
    int a = rank_of(p, from), b = rank_of(p, to);
    return a == b && !p->by_node ? OWN : p->c->node[a] == p->c->node[b] ? IN_NODE : CROSS;
}

static void text(FILE *f, double x, double y, int size, const char *anchor, const char *color, const char *s)
{
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" font-size=\"%d\" text-anchor=\"%s\" fill=\"%s\">%s</text>\n", x, y, size,
            anchor, color, s);
}

static void draw_rows(const struct picture *p, double x, FILE *f)
{
    char label[64];
    for (int i = 0; i < p->rows; i++) {
        double y = p->y[rank_of(p, i)];
        snprintf(label, sizeof label, "%s %d", p->by_node ? "node" : "rank", i);
        text(f, x + LEFT - 8, y + 4, 11, "end", INK, label);
        text(f, x + LEFT + ACROSS + 8, y + 4, 11, "start", INK, label);
        fprintf(f,
                "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.5\" fill=\"" INK
                "\"/><circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.5\" fill=\"" INK "\"/>\n",
                x + LEFT, y, x + LEFT + ACROSS, y);
    }
    for (int n = 0; n < p->c->nnodes && !p->by_node; n++) { /* a bracket for each node, on both sides */
        double top = 1e9, bottom = 0;
        for (int r = 0; r < p->c->nranks; r++)
            if (p->c->node[r] == n) {
                top = fmin(top, p->y[r]);
                bottom = fmax(bottom, p->y[r]);
            }
        for (int side = 0; side < 2; side++) {
            double bx = side ? x + LEFT + ACROSS + 58 : x + LEFT - 58, in = side ? -4 : 4;
            fprintf(f, "<path d=\"M%.1f %.1fh%.1fV%.1fh%.1f\" fill=\"none\" stroke=\"" LINE "\"/>\n", bx + in, top - 6,
                    -in, bottom + 6, in);
            fprintf(f,
                    "<text transform=\"translate(%.1f %.1f) rotate(-90)\" font-size=\"10\" text-anchor=\"middle\" "
                    "fill=\"" FAINT "\">node %d</text>\n",
                    bx + (side ? 12 : -5), (top + bottom) / 2, n);
        }
    }
}

static void draw_panel(struct picture *p, struct ry_plan *const *plans, int group, double x, FILE *f)
{
    uint64_t bytes[CLASSES] = {0}, messages[CLASSES] = {0};
    char line[200], b[16];
    add_up(p, plans, group);
    for (int r = 0; r < p->c->nranks; r++) /* counted by rank even where rows are nodes */
        for (int i = 0; i < plans[r]->nsteps; i++) {
            const struct ry_step *s = &plans[r]->steps[i];
            if (s->kind != RY_STEP_SEND || s->group != group)
                continue;
            int class = s->peer == r ? OWN : p->c->node[s->peer] == p->c->node[r] ? IN_NODE : CROSS;
            bytes[class] += s->bytes;
            messages[class]++;
        }
    snprintf(line, sizeof line, "%s, group %d", ry_strategy_name(plans[0]->strategy), group);
    text(f, x + LEFT + ACROSS / 2.0, 24, 15, "middle", INK, line);
    for (int k = CROSS; k >= OWN; k--) {
        snprintf(line, sizeof line, "%s: %llu messages, %s", classes[k].name, (unsigned long long)messages[k],
                 ry_report_bytes((double)bytes[k], b));
        text(f, x + LEFT + ACROSS / 2.0, 42 + 14 * (CROSS - k), 11, "middle", classes[k].color, line);
    }
    for (int class = OWN; class < CLASSES; class ++) /* what crosses nodes lies on top */
        for (int i = 0; i < p->rows * p->rows; i++) {
            int from = i / p->rows, to = i % p->rows;
            if (!p->bytes[i] || class_of(p, from, to) != class)
                continue;
            double y0 = p->y[rank_of(p, from)], y1 = p->y[rank_of(p, to)], x0 = x + LEFT, x1 = x0 + ACROSS;
            fprintf(f,
                    "<path d=\"M%.1f %.1fC%.1f %.1f %.1f %.1f %.1f %.1f\" fill=\"none\" stroke=\"%s\" "
                    "stroke-opacity=\".6\" "
                    "stroke-width=\"%.2f\"><title>%s %d to %d: %s in %u message%s</title></path>\n",
                    x0, y0, x0 + ACROSS / 2.0, y0, x0 + ACROSS / 2.0, y1, x1, y1, classes[class].color,
                    0.6 + 7 * (double)p->bytes[i] / (double)p->widest, p->by_node ? "node" : "rank", from, to,
                    ry_report_bytes((double)p->bytes[i], b), p->messages[i], p->messages[i] == 1 ? "" : "s");
        }
    draw_rows(p, x, f);
}

int explain_svg(const struct ry_cluster *c, struct ry_plan *const *const *sets, int nsets, FILE *f)
{
    struct picture p = {.c = c, .by_node = c->nranks > MAX_ROWS};
    p.rows = p.by_node ? c->nnodes : c->nranks;
    size_t rows = (size_t)p.rows;
    p.y = calloc((size_t)c->nranks, sizeof *p.y);
    p.bytes = malloc(rows * rows * sizeof *p.bytes);
    p.messages = malloc(rows * rows * sizeof *p.messages);
    int panels = 0;
    if (!p.y || !p.bytes || !p.messages) {
        free(p.y);
        free(p.bytes);
        free(p.messages);
        return -1;
    }
    double y = TOP;
    for (int n = 0; n < c->nnodes; n++) {
        for (int r = 0; r < c->nranks; r++)
            if (c->node[r] == n) {
                p.y[r] = y;
                y += p.by_node ? 0 : ROW;
            }
        y += p.by_node ? ROW : GAP;
    }
    p.bottom = y;
    for (int k = 0; k < nsets; k++)
        for (int g = 0; g < sets[k][0]->ngroups; g++, panels++)
            add_up(&p, sets[k], g); /* finds the widest */
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %.0f\" width=\"%d\" height=\"%.0f\" "
            "font-family=\"system-ui, sans-serif\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
            panels * PANEL + 20, p.bottom + 34, panels * PANEL + 20, p.bottom + 34);
    double x = 10;
    for (int k = 0; k < nsets; k++)
        for (int g = 0; g < sets[k][0]->ngroups; g++, x += PANEL)
            draw_panel(&p, sets[k], g, x, f);
    char b[16], line[160];
    snprintf(line, sizeof line,
             "Senders left, receivers right; the wider, the more bytes (widest: %s). A group begins when the one "
             "before has ended.",
             ry_report_bytes((double)p.widest, b));
    text(f, 20, p.bottom + 16, 11, "start", FAINT, line);
    fputs("</svg>\n", f);
    free(p.y);
    free(p.bytes);
    free(p.messages);
    return 0;
}
