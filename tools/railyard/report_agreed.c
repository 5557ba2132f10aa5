/*
 * report_agreed.c: what the report says of exchanges that were agreed on: how they were carried out, how long the job's
 * threads waited for verdicts, and how long exchanges took by strategy; as text, JSON and picture.
 */
#include <inttypes.h>
#include <string.h>

#include "report.h"

#define BAR 24   /* characters of the longest bar */
#define LEAST 99 /* samples; fewer say nothing of the slowest per cent */

static const char *name_of(const struct ry_trace_agreed *a, int strategy)
{
    return strategy == RY_TRACE_PLAIN ? "plain" : a->strategy[strategy];
}

/* The classes that the histogram shows. Only where somebody waited. */
static void span(const struct ry_trace_agreed *a, int *first, int *last)
{
    *first = RY_BINS;
    *last = -1;
    for (int i = 0; i < RY_BINS; i++)
        if (a->waited_bins[i] || a->messages_bins[i]) {
            *first = i < *first ? i : *first;
            *last = i;
        }
}

static uint64_t fullest(const struct ry_trace_agreed *a)
{
    uint64_t most = 1;
    for (int i = 0; i < RY_BINS; i++) {
        most = a->waited_bins[i] > most ? a->waited_bins[i] : most;
        most = a->messages_bins[i] > most ? a->messages_bins[i] : most;
    }
    return most;
}

/* A round number of microseconds: "200 us", "5 ms". */
static const char *round_us(double us, char out[16])
{
    snprintf(out, 16,
             us < 1e3   ? "%.0f us"
             : us < 1e6 ? "%.0f ms"
                        : "%.0f s",
             us < 1e3   ? us
             : us < 1e6 ? us / 1e3
                        : us / 1e6);
    return out;
}

static const char *round_bytes(double v, char out[16])
{
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB"};
    int u = 0;
    for (; v >= 1000 && u < 4; v /= 1000)
        u++;
    snprintf(out, 16, "%.0f %s", v, units[u]);
    return out;
}

/* "123 of 132 exchanges: 122 hierarchical, 1 direct; 12 verified" */
static void put_counts(const struct ry_summary *s, char *out, size_t size)
{
    size_t n = (size_t)snprintf(out, size, "%" PRIu64 " of %" PRIu64 " exchanges", s->agreed, s->exchanges);
    const char *between = ": ";
    for (int i = RY_TRACE_STRATEGIES - 1; i >= 0 && n < size; i--)
        if (s->by_strategy[i]) {
            n += (size_t)snprintf(out + n, size - n, "%s%" PRIu64 " %s", between, s->by_strategy[i],
                                  name_of(&s->comm->agreed, i));
            between = ", ";
        }
    if (s->verified && n < size)
        snprintf(out + n, size - n, "; %" PRIu64 " verified", s->verified);
}

/* ---- text ---- */

static void print_wait(const char *what, const struct ry_trace_times *t)
{
    char text[16];
    printf("             %-14s %10s", what, ry_report_us(ry_trace_quantile(t, 0.5), text));
    printf(" %10s", ry_report_us(ry_trace_quantile(t, 0.9), text));
    if (t->n >= LEAST)
        printf(" %10s", ry_report_us(ry_trace_quantile(t, 0.99), text));
    putchar('\n');
}

static void print_bar(uint64_t count, uint64_t most, bool pad)
{
    int n = (int)((count * BAR + most - 1) / most); /* one at least, where there is anything */
    printf("  %7" PRIu64 " %.*s%*s", count, n, "########################", pad ? BAR - n : 0, "");
}

static void print_waits(const struct ry_trace_agreed *a)
{
    char from[16], to[16];
    int first, last;
    uint64_t most = fullest(a);
    printf("  verdicts   %-14s %10s %10s%s\n", "waited for", "median", "90 %",
           a->waited.n >= LEAST ? "       99 %" : "");
    print_wait("in all", &a->waited);
    print_wait("messages", &a->messages);
    print_wait("late ranks", &a->late);
    span(a, &first, &last);
    printf("             %-20s  %7s %*s  %7s\n", "waits, all ranks", "in all", BAR, "", "messages");
    for (int i = first; i <= last; i++) {
        printf("             %7s to %-9s", round_us(ry_bin_from(i), from), round_us(ry_bin_from(i + 1), to));
        print_bar(a->waited_bins[i], most, true);
        print_bar(a->messages_bins[i], most, false);
        putchar('\n');
    }
}

static void print_durations(const struct ry_trace_agreed *a)
{
    char from[16], to[16], us[16], cell[48];
    bool used[RY_TRACE_STRATEGIES] = {false};
    for (int i = 0; i < a->ndurations; i++)
        used[a->durations[i].strategy] = true;
    if (!a->ndurations)
        return;
    printf("  durations  %-20s", "busiest rank moves");
    for (int k = 0; k < RY_TRACE_STRATEGIES; k++)
        if (used[k])
            printf(" %19s", name_of(a, k));
    puts("   (medians; timed exchanges)");
    for (int i = 0; i < a->ndurations;) {
        int bin = a->durations[i].bin;
        printf("             %7s to %-9s", round_bytes(ry_bin_from(bin), from), round_bytes(ry_bin_from(bin + 1), to));
        for (int k = 0; k < RY_TRACE_STRATEGIES; k++) {
            const struct ry_trace_duration *d = &a->durations[i];
            bool here = i < a->ndurations && d->bin == bin && d->strategy == k;
            if (here) {
                snprintf(cell, sizeof cell, "%s (%" PRIu64 ")", ry_report_us(d->median_us, us), d->exchanges);
                i++;
            }
            if (used[k])
                printf(" %19s", here ? cell : "");
        }
        putchar('\n');
    }
}

void ry_report_agreed_text(const struct ry_summary *s)
{
    char text[256];
    if (!s->agreed)
        return;
    put_counts(s, text, sizeof text);
    printf("  agreed on  %s\n", text);
    print_waits(&s->comm->agreed);
    print_durations(&s->comm->agreed);
}

/* ---- JSON ---- */

static json_t *wait_json(const struct ry_trace_times *t)
{
    return json_pack("{s:f,s:f,s:o}", "median_us", ry_trace_quantile(t, 0.5), "p90_us", ry_trace_quantile(t, 0.9),
                     "p99_us", t->n >= LEAST ? json_real(ry_trace_quantile(t, 0.99)) : json_null());
}

json_t *ry_report_agreed_json(const struct ry_summary *s)
{
    const struct ry_trace_agreed *a = &s->comm->agreed;
    int first, last;
    if (!s->agreed)
        return json_null();
    json_t *strategies = json_object(), *histogram = json_array(), *durations = json_array();
    for (int i = 0; i < RY_TRACE_STRATEGIES; i++)
        if (s->by_strategy[i])
            json_object_set_new(strategies, name_of(a, i), json_integer((json_int_t)s->by_strategy[i]));
    span(a, &first, &last);
    for (int i = first; i <= last; i++)
        json_array_append_new(histogram, json_pack("{s:f,s:f,s:I,s:I}", "from_us", ry_bin_from(i), "to_us",
                                                   ry_bin_from(i + 1), "waits", (json_int_t)a->waited_bins[i],
                                                   "messages", (json_int_t)a->messages_bins[i]));
    for (int i = 0; i < a->ndurations; i++) {
        const struct ry_trace_duration *d = &a->durations[i];
        json_array_append_new(durations,
                              json_pack("{s:s,s:f,s:f,s:I,s:f}", "strategy", name_of(a, d->strategy), "from_bytes",
                                        ry_bin_from(d->bin), "to_bytes", ry_bin_from(d->bin + 1), "exchanges",
                                        (json_int_t)d->exchanges, "median_us", d->median_us));
    }
    return json_pack("{s:I,s:o,s:I,s:I,s:I,s:I,s:{s:I,s:o,s:o,s:o,s:o},s:o}", "exchanges", (json_int_t)s->agreed,
                     "by_strategy", strategies, "verified", (json_int_t)s->verified, "verify_differs",
                     (json_int_t)s->verify_differs, "short_of_staging", (json_int_t)s->short_of_staging, "over_ucx", (json_int_t)s->over_ucx, "waits", "n",
                     (json_int_t)a->waited.n, "in_all", wait_json(&a->waited), "messages", wait_json(&a->messages),
                     "late_ranks", wait_json(&a->late), "histogram", histogram, "durations", durations);
}

/* ---- picture ---- */

#define PLOT_HIGH 120.0

double ry_report_agreed_height(const struct ry_summary *s)
{
    return s->agreed ? PLOT_HIGH + 104 : 0;
}

static void draw_count(FILE *f, double x, double y, double width, uint64_t count, uint64_t most, const char *color)
{
    double h = PLOT_HIGH * (double)count / (double)most;
    char text[24];
    if (!count)
        return;
    fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>\n", x, y + PLOT_HIGH - h,
            width, h, color);
    snprintf(text, sizeof text, "%" PRIu64, count);
    ry_report_svg_text(f, x + width / 2, y + PLOT_HIGH - h - 3, 8.5, "middle", RY_SVG_FAINT, text);
}

void ry_report_agreed_svg(const struct ry_summary *s, FILE *f, double x, double y)
{
    static const struct {
        const char *name, *color;
    } kinds[] = {{"in all", "#8fa3b5"}, {"without waiting for late ranks", "#2f6aa3"}};
    const struct ry_trace_agreed *a = &s->comm->agreed;
    const uint64_t *bins[] = {a->waited_bins, a->messages_bins};
    char text[320], m[16], n[16], o[16], p[16];
    int first, last;
    if (!s->agreed)
        return;
    span(a, &first, &last);
    double step = last - first < 12 ? 58 : 700.0 / (last - first + 1); /* from class to class */
    size_t at = (size_t)snprintf(text, sizeof text, "agreed on: ");
    put_counts(s, text + at, sizeof text - at);
    ry_report_svg_text(f, x, y + 14, 12, "start", RY_SVG_INK, text);
    snprintf(text, sizeof text, "waits for verdicts on all ranks: median %s, 90 %% within %s; messages alone %s, %s",
             ry_report_us(ry_trace_quantile(&a->waited, 0.5), m), ry_report_us(ry_trace_quantile(&a->waited, 0.9), n),
             ry_report_us(ry_trace_quantile(&a->messages, 0.5), o),
             ry_report_us(ry_trace_quantile(&a->messages, 0.9), p));
    ry_report_svg_text(f, x, y + 32, 12, "start", RY_SVG_INK, text);
    uint64_t most = fullest(a);
    for (int k = 0; k < 2; k++) {
        fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"10\" height=\"10\" fill=\"%s\"/>\n", x + 75 * k, y + 42,
                kinds[k].color);
        ry_report_svg_text(f, x + 75 * k + 15, y + 51, 11, "start", RY_SVG_FAINT, kinds[k].name);
        for (int i = first; i <= last; i++)
            draw_count(f, x + (i - first) * step + step * (0.1 + 0.4 * k), y + 70, 0.37 * step, bins[k][i], most,
                       kinds[k].color);
    }
    for (int i = first; i <= last; i++) {
        snprintf(text, sizeof text, "< %s", round_us(ry_bin_from(i + 1), m));
        ry_report_svg_text(f, x + (i - first + 0.5) * step, y + 85 + PLOT_HIGH, 10, "middle", RY_SVG_FAINT, text);
    }
    fprintf(f, "<path d=\"M%.1f %.1fh%.1f\" stroke=\"" RY_SVG_FAINT "\"/>\n", x, y + 70 + PLOT_HIGH,
            step * (last - first + 1));
}
