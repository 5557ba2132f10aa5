/* sim_svg.c: `railyard sim` as a picture. One size: bars, a group for each placement, a colour for each strategy.
 * Several sizes: a panel for each strategy, a line for each placement, both axes logarithmic. */
#include <math.h>
#include <string.h>

#include "report.h"
#include "sim.h"

#define INK "#1f2933"
#define FAINT "#66737f"
#define LINE "#d5dbe1"
#define WIDTH 980

static const char *const bar_color[RY_SIM_STRATEGIES] = {"#8a97a5", "#2b6ca3", "#2f8a5b", "#c8590b", "#6b4f9e"};
static const char *const line_color[RY_PLACINGS] = {"#1f2933", "#9aa5b1", "#4f9bd0", "#2b6ca3",
                                                    "#7d9c3c", "#c8590b", "#8a2f62"};

static void text(FILE *f, double x, double y, int size, const char *anchor, const char *color, const char *s)
{
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" font-size=\"%d\" text-anchor=\"%s\" fill=\"%s\">", x, y, size, anchor,
            color);
    for (; *s; s++) {
        if (*s == '&' || *s == '<')
            fputs(*s == '&' ? "&amp;" : "&lt;", f);
        else
            fputc((unsigned char)*s < 32 ? '?' : *s, f);
    }
    fputs("</text>\n", f);
}

static void begin(FILE *f, double height, const char *title, const char *sub)
{
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%.0f\" viewBox=\"0 0 %d %.0f\" "
            "font-family=\"sans-serif\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
            WIDTH, height, WIDTH, height);
    text(f, 24, 30, 17, "start", INK, title);
    text(f, 24, 50, 12, "start", FAINT, sub);
}

static void describe(const struct sim_study *s, const struct sim_point *p, char *out, size_t size)
{
    const struct ry_sim_result *r = &p->result;
    int n = snprintf(out, size, "%s, %d layers, top-%d, %d samples of %d tokens on a GPU", s->dir ? s->dir : "made up",
                     r->layers, r->topk, p->sim.source.samples / (p->fabric.nodes * p->fabric.gpus), r->tokens);
    if (!s->dir && n > 0 && (size_t)n < size)
        n += snprintf(out + n, size - (size_t)n, ", locality %g", p->sim.source.locality);
    if (n > 0 && (size_t)n < size)
        snprintf(out + n, size - (size_t)n, "; %s", s->cost ? "measured link costs" : "links by their data sheets");
}

static bool shown(const struct sim_point *p, int placing, int strategy)
{
    return p->result.at[placing].done && (p->result.pairs || strategy < RY_SIM_DEDUP);
}

/* A round number at or above v: 1, 2 or 5 times a power of ten. */
static double round_up(double v)
{
    double power = pow(10, floor(log10(v)));
    return v <= power ? power : v <= 2 * power ? 2 * power : v <= 5 * power ? 5 * power : 10 * power;
}

static void legend(FILE *f, double y, bool pairs)
{
    double x = 290;
    for (int k = 0; k < (pairs ? RY_SIM_STRATEGIES : RY_SIM_DEDUP); k++, x += 135) {
        char name[64];
        snprintf(name, sizeof name, "%s%s", ry_sim_strategy_name((enum ry_sim_strategy)k),
                 k >= RY_SIM_DEDUP ? " (modelled)" : "");
        fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"12\" height=\"12\" fill=\"%s\"/>\n", x, y - 10, bar_color[k]);
        text(f, x + 17, y, 12, "start", INK, name);
    }
}

static void bars(const struct sim_study *s, FILE *f)
{
    const struct sim_point *p = &s->points[0];
    const double left = 290, across = 520, top = 100, bar = 15, gap = 14;
    char title[200], sub[400], label[100], bytes[16];
    double most = 0, height = top;
    for (int w = 0; w < RY_PLACINGS; w++)
        for (int k = 0; k < RY_SIM_STRATEGIES; k++)
            if (shown(p, w, k)) {
                most = fmax(most, p->result.at[w].by[k].step_us / 1e3);
                height += bar;
            }
    for (int w = 0; w < RY_PLACINGS; w++)
        height += p->result.at[w].done ? gap : 0;
    double end = most > 0 ? round_up(most / 5) * ceil(most / round_up(most / 5)) : 1, y = top;
    snprintf(title, sizeof title, "Exchanges of a step on %d nodes of %d GPUs (%s)", p->fabric.nodes, p->fabric.gpus,
             p->fabric.name);
    describe(s, p, sub, sizeof sub);
    begin(f, height + 44, title, sub);
    legend(f, 78, p->result.pairs);
    for (double v = 0; v <= end * 1.001 && most > 0; v += round_up(most / 5)) {
        double x = left + across * v / end;
        fprintf(f, "<path d=\"M%.1f %.1fV%.1f\" stroke=\"" LINE "\"/>\n", x, top - 8, height);
        snprintf(label, sizeof label, "%g", v);
        text(f, x, height + 18, 11, "middle", FAINT, label);
    }
    text(f, left - 12, height + 18, 11, "end", FAINT, "ms a step; bytes across nodes");
    for (int w = 0; w < RY_PLACINGS; w++) {
        if (!p->result.at[w].done)
            continue;
        text(f, left - 12, y + bar, 12, "end", INK, ry_placing_about((enum ry_placing)w));
        for (int k = 0; k < RY_SIM_STRATEGIES; k++) {
            if (!shown(p, w, k))
                continue;
            const struct ry_sim_sums *b = &p->result.at[w].by[k];
            double width = across * b->step_us / 1e3 / end;
            fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>\n", left, y, width,
                    bar - 3, bar_color[k]);
            snprintf(label, sizeof label, "%.3g ms, %s", b->step_us / 1e3, ry_report_bytes(b->cross_bytes, bytes));
            text(f, left + width + 6, y + bar - 5, 10, "start", FAINT, label);
            y += bar;
        }
        y += gap;
    }
    fputs("</svg>\n", f);
}

struct scale {
    double low, high, from, to; /* values, logarithmic; where they lie */
};

static double at(const struct scale *s, double v)
{
    return s->from + (s->to - s->from) * log(v / s->low) / log(s->high / s->low);
}

static void panel(const struct sim_study *s, int k, const struct scale *x, const struct scale *y, FILE *f)
{
    char label[64];
    snprintf(label, sizeof label, "%s%s", ry_sim_strategy_name((enum ry_sim_strategy)k),
             k >= RY_SIM_DEDUP ? " (modelled: has no plan yet)" : "");
    text(f, x->from, y->to - 10, 13, "start", INK, label);
    for (double power = pow(10, floor(log10(y->low))); power <= y->high * 1.001; power *= 10)
        for (int m = 1; m <= 5; m += m == 1 ? 1 : 3) {
            double v = power * m;
            if (v < y->low * 0.999 || v > y->high * 1.001)
                continue;
            fprintf(f, "<path d=\"M%.1f %.1fH%.1f\" stroke=\"" LINE "\"/>\n", x->from, at(y, v), x->to);
            snprintf(label, sizeof label, "%g", v);
            text(f, x->from - 6, at(y, v) + 4, 10, "end", FAINT, label);
        }
    for (int i = 0; i < s->npoints; i++) {
        int gpus = s->points[i].fabric.nodes * s->points[i].fabric.gpus;
        fprintf(f, "<path d=\"M%.1f %.1fv5\" stroke=\"" FAINT "\"/>\n", at(x, gpus), y->from);
        snprintf(label, sizeof label, "%d", gpus);
        text(f, at(x, gpus), y->from + 18, 10, "middle", FAINT, label);
    }
    for (int w = 0; w < RY_PLACINGS; w++) {
        bool pen = false;
        char path[SIM_SIZES * 32] = "";
        size_t n = 0;
        for (int i = 0; i < s->npoints; i++) {
            const struct sim_point *p = &s->points[i];
            if (!shown(p, w, k)) {
                pen = false;
                continue;
            }
            double px = at(x, p->fabric.nodes * p->fabric.gpus), py = at(y, p->result.at[w].by[k].step_us / 1e3);
            n += (size_t)snprintf(path + n, sizeof path - n, "%c%.1f %.1f", pen ? 'L' : 'M', px, py);
            fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.6\" fill=\"%s\"/>\n", px, py, line_color[w]);
            pen = true;
        }
        if (n)
            fprintf(f, "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"1.6\"/>\n", path, line_color[w]);
    }
}

static void growth(const struct sim_study *s, FILE *f)
{
    double low = INFINITY, high = 0, least = INFINITY, most = 0, tall = 210, y = 96;
    bool any[RY_PLACINGS] = {0}, pairs = false;
    char sub[400];
    for (int i = 0; i < s->npoints; i++) {
        const struct sim_point *p = &s->points[i];
        double gpus = p->fabric.nodes * p->fabric.gpus;
        least = fmin(least, gpus);
        most = fmax(most, gpus);
        pairs |= p->result.pairs;
        for (int w = 0; w < RY_PLACINGS; w++)
            for (int k = 0; k < RY_SIM_STRATEGIES; k++)
                if (shown(p, w, k)) {
                    low = fmin(low, p->result.at[w].by[k].step_us / 1e3);
                    high = fmax(high, p->result.at[w].by[k].step_us / 1e3);
                    any[w] = true;
                }
    }
    if (most <= least)
        most = least * 1.001;
    low *= 0.9;
    high *= 1.1;
    int rows = ((pairs ? RY_SIM_STRATEGIES : RY_SIM_DEDUP) + 1) / 2, placings = 0;
    for (int w = 0; w < RY_PLACINGS; w++)
        placings += any[w];
    describe(s, &s->points[0], sub, sizeof sub);
    begin(f, y + rows * (tall + 60) + (placings + 2) / 3 * 20 + 20, "Exchanges of a step by the number of GPUs, in ms",
          sub);
    for (int k = 0; k < (pairs ? RY_SIM_STRATEGIES : RY_SIM_DEDUP); k++) {
        double left = k % 2 ? 540 : 64, top = y + k / 2 * (tall + 60);
        panel(s, k, &(struct scale){least, most, left, left + 400}, &(struct scale){low, high, top + tall, top}, f);
    }
    y += rows * (tall + 60) + 6;
    for (int w = 0, n = 0; w < RY_PLACINGS; w++) {
        if (!any[w])
            continue;
        double x = 64 + n % 3 * 300, line = y + n / 3 * 20;
        fprintf(f, "<path d=\"M%.1f %.1fh22\" stroke=\"%s\" stroke-width=\"2.4\"/>\n", x, line - 4, line_color[w]);
        text(f, x + 30, line, 12, "start", INK, ry_placing_about((enum ry_placing)w));
        n++;
    }
    fputs("</svg>\n", f);
}

void sim_svg(const struct sim_study *s, FILE *f)
{
    if (s->npoints == 1)
        bars(s, f);
    else
        growth(s, f);
}
