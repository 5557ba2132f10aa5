/* report.c: see report.h. */
#include "report.h"

#include <math.h>
#include <string.h>

static const char *const what[RY_CAL_KINDS] = {
    [RY_CAL_COPY] = "copy on the device, without NCCL",
    [RY_CAL_SELF] = "to itself through NCCL",
    [RY_CAL_PAIR] = "ranks of a node in pairs",
    [RY_CAL_LOCAL] = "every rank of a node to all others of it",
    [RY_CAL_NODE] = "the same over a communicator of the node's ranks alone",
    [RY_CAL_NIC_ONE] = "one rank of each node to the next node",
    [RY_CAL_NIC_ALL] = "all ranks of each node to the next node",
    [RY_CAL_UCX_ONE] = "one rank of each node to the next node, by way of UCX",
    [RY_CAL_UCX_ALL] = "all ranks of each node to the next node, by way of UCX",
    [RY_CAL_EXCHANGE] = "exchange: everyone to everyone (not fitted: checks the model)",
};

static const char *size_text(uint64_t bytes, char out[24])
{
    if (bytes < 1 << 10)
        snprintf(out, 24, "%llu B", (unsigned long long)bytes);
    else if (bytes < 1 << 20)
        snprintf(out, 24, "%llu KiB", (unsigned long long)(bytes >> 10));
    else
        snprintf(out, 24, "%llu MiB", (unsigned long long)(bytes >> 20));
    return out;
}

static void points_of(const struct ry_calibration *cal, enum ry_cal_kind kind, bool messages, FILE *f)
{
    for (int i = 0; i < cal->npoints; i++) {
        const struct ry_cal_point *p = &cal->points[i];
        char bytes[24], text[48];
        if (p->kind != kind || (p->messages > 0) != messages)
            continue;
        size_text(messages ? p->bytes / (uint64_t)p->messages : p->bytes, bytes);
        if (messages)
            snprintf(text, sizeof text, "%2d x %s", p->messages, bytes);
        fprintf(f, "    %12s %12.1f %12.1f %12.1f %12.1f %+8.1f %%\n", messages ? text : bytes, p->us, p->low, p->high,
                p->model_us, 100 * (p->model_us / p->us - 1));
    }
}

static void link_line(const struct ry_cost_link *l, const char *name, const char *whose, const char *guessed, FILE *f)
{
    fprintf(f, "  %-6s %9.1f us + %7.2f us a message + bytes / %8.3f GB/s (%s)%s\n", name, l->alpha_us, l->message_us,
            l->bytes_per_us / 1000, whose, l->measured ? "" : guessed);
}

void ry_calibrate_table(const struct ry_calibration *cal, const struct ry_cluster *cluster, FILE *f)
{
    const struct ry_cost_model *m = &cal->model;
    fprintf(f, "%d ranks on %d node%s. Times in microseconds: the lower quartile of the repeats, least, greatest.\n",
            cluster->nranks, cluster->nnodes, cluster->nnodes == 1 ? "" : "s");
    for (int k = 0; k < RY_CAL_KINDS; k++) {
        if (!cal->fit[k].points)
            continue;
        fprintf(f, "\n  %s: model off by %.1f %% (median), %.1f %% at worst\n", what[k], 100 * cal->fit[k].median,
                100 * cal->fit[k].worst);
        fprintf(f, "    %12s %12s %12s %12s %12s %10s\n", "a rank sends", "measured", "least", "greatest", "model",
                "off");
        points_of(cal, (enum ry_cal_kind)k, false, f);
        points_of(cal, (enum ry_cal_kind)k, true, f);
    }
    fprintf(f, "\nThe model\n");
    const char *none = "   GUESSED: there is no such link here";
    link_line(&m->link[RY_LINK_SELF], "self", "a rank", none, f);
    link_line(&m->link[RY_LINK_LOCAL], "local", "a rank, each way", none, f);
    link_line(&m->link[RY_LINK_NODE], "node", "the same over the node's own communicator",
              cluster->nnodes == 1 || cluster->nnodes == cluster->nranks ? none : "   GUESSED: taken as local", f);
    link_line(&m->link[RY_LINK_NIC], "nic", "a node, each way", none, f);
    fprintf(f, "  %-6s one rank alone gets %.3f GB/s of it, each way%s\n", "", m->nic_rank_bytes_per_us / 1000,
            m->link[RY_LINK_NIC].measured ? "" : "   GUESSED");
    if (m->ucx.measured) {
        link_line(&m->ucx, "ucx", "a node, each way, by way of UCX", "", f);
        fprintf(f, "  %-6s one rank alone gets %.3f GB/s of it, each way\n", "", m->ucx_rank_bytes_per_us / 1000);
    }
    fprintf(f, "  %-6s %9.1f us each + bytes / %.3f GB/s\n", "copy", m->copy_us, m->copy_bytes_per_us / 1000);
    fprintf(f, "  %-6s %9.1f us for each group; agreement %.0f us (guessed), planning %.2f us a rank\n", "group",
            m->group_us, m->agreement_us, m->plan_us_per_rank);
}

/* ---- the picture ---- */

#define W 860.0
#define H 540.0
#define LEFT 70.0
#define RIGHT 250.0
#define TOP 54.0
#define BOTTOM 56.0

/* Okabe and Ito's colours: told apart by the colour-blind, too. */
static const char *const colors[RY_CAL_KINDS] = {"#777777", "#56b4e9", "#cc79a7", "#009e73",
                                                 "#000000", "#e69f00", "#d55e00", "#8c6d31",
                                                 "#7b4173", "#0072b2"};

static double scale(double v, double low, double high, double from, double to)
{
    return from + (to - from) * (log(v) - log(low)) / (log(high) - log(low));
}

static const char *us_text(double us, char out[24])
{
    snprintf(out, 24,
             us < 1000  ? "%.3g us"
             : us < 1e6 ? "%.0f ms"
                        : "%.0f s",
             us < 1000  ? us
             : us < 1e6 ? us / 1000
                        : us / 1e6);
    return out;
}

void ry_calibrate_svg(const struct ry_calibration *cal, const struct ry_cluster *cluster, FILE *f)
{
    double low = 1e300, high = 0, right = W - RIGHT, bottom = H - BOTTOM;
    char text[24];
    for (int i = 0; i < cal->npoints; i++) {
        low = fmin(low, fmin(cal->points[i].low, cal->points[i].model_us));
        high = fmax(high, fmax(cal->points[i].high, cal->points[i].model_us));
    }
    low = pow(10, floor(log10(fmax(low, 0.1))));
    high = pow(10, ceil(log10(fmax(high, low * 10))));
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" font-family=\"sans-serif\" "
            "font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n"
            "<text x=\"%.0f\" y=\"22\" font-size=\"15\" fill=\"#1f2933\">What transfers take on %d ranks, %d "
            "node%s</text>\n"
            "<text x=\"%.0f\" y=\"38\" fill=\"#66737f\">dots: measured (bars: least to greatest); lines: the "
            "model</text>\n",
            W, H, LEFT, cluster->nranks, cluster->nnodes, cluster->nnodes == 1 ? "" : "s", LEFT);
    for (double us = low; us <= high * 1.001; us *= 10) {
        double y = scale(us, low, high, bottom, TOP);
        fprintf(f,
                "<path d=\"M%.1f %.1fH%.1f\" stroke=\"#dde3e8\"/><text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\" "
                "fill=\"#66737f\">%s</text>\n",
                LEFT, y, right, LEFT - 6, y + 4, us_text(us, text));
    }
    const double least = 1024, most = 64 << 20;
    for (double b = least; b <= most; b *= 4) {
        double x = scale(b, least, most, LEFT + 12, right - 12);
        fprintf(f,
                "<path d=\"M%.1f %.1fV%.1f\" stroke=\"#eef1f4\"/><text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\" "
                "fill=\"#66737f\">%s</text>\n",
                x, TOP, bottom, x, bottom + 18, size_text((uint64_t)b, text));
    }
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\" fill=\"#66737f\">bytes that a rank sends</text>\n",
            (LEFT + right) / 2, bottom + 40);
    double legend = TOP + 16;
    for (int k = 0; k < RY_CAL_KINDS; k++) {
        bool pen = false;
        if (!cal->fit[k].points)
            continue;
        fprintf(f, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"1.6\" d=\"", colors[k]);
        for (int i = 0; i < cal->npoints; i++) {
            const struct ry_cal_point *p = &cal->points[i];
            if ((int)p->kind != k || p->messages)
                continue;
            fprintf(f, "%c%.1f %.1f", pen ? 'L' : 'M', scale((double)p->bytes, least, most, LEFT + 12, right - 12),
                    scale(fmax(p->model_us, low), low, high, bottom, TOP));
            pen = true;
        }
        fprintf(f, "\"/>\n");
        for (int i = 0; i < cal->npoints; i++) {
            const struct ry_cal_point *p = &cal->points[i];
            if ((int)p->kind != k || p->messages)
                continue;
            double x = scale((double)p->bytes, least, most, LEFT + 12, right - 12);
            fprintf(
                f,
                "<path d=\"M%.1f %.1fV%.1f\" stroke=\"%s\" opacity=\"0.5\"/><circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.4\" "
                "fill=\"%s\"/>\n",
                x, scale(fmax(p->low, low), low, high, bottom, TOP), scale(p->high, low, high, bottom, TOP), colors[k],
                x, scale(fmax(p->us, low), low, high, bottom, TOP), colors[k]);
        }
        fprintf(f,
                "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/><text x=\"%.1f\" y=\"%.1f\" fill=\"#1f2933\">%s: "
                "off by "
                "%.0f %%, worst %.0f %%</text>\n",
                right + 20, legend - 4, colors[k], right + 32, legend, ry_cal_name((enum ry_cal_kind)k),
                100 * cal->fit[k].median, 100 * cal->fit[k].worst);
        legend += 20;
    }
    fputs("</svg>\n", f);
}
