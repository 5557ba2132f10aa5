/* capacity.c: see capacity.h. */
#include "place/capacity.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "place/random.h"

/* ---- the bounds ---- */

/* The continued fraction of I_x(a, b), by Lentz' method; converges fast for x < (a + 1) / (a + b + 2). */
static double fraction(double a, double b, double x)
{
    const double tiny = 1e-300;
    double c = 1, d = 1 - (a + b) * x / (a + 1);
    d = 1 / (fabs(d) < tiny ? tiny : d);
    double f = d;
    for (int m = 1; m < 10000; m++) {
        double step = 1;
        for (int odd = 0; odd < 2; odd++) {
            double k = odd ? -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
                           : m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
            d = 1 + k * d;
            c = 1 + k / c;
            d = 1 / (fabs(d) < tiny ? tiny : d);
            c = fabs(c) < tiny ? tiny : c;
            step = c * d;
            f *= step;
        }
        if (fabs(step - 1) < 1e-15)
            break;
    }
    return f;
}

/* log I_x(a, b) where the fraction converges. `log_x`, `log_y`: of x and 1 - x. */
static double log_beta_part(double a, double b, double x, double log_x, double log_y)
{
    return lgamma(a + b) - lgamma(a) - lgamma(b) + a * log_x + b * log_y - log(a) + log(fraction(a, b, x));
}

double ry_capacity_log_beyond(double delta, double d)
{
    double x = delta * delta, a = 0.5, b = (d - 1) / 2;
    if (delta <= 0)
        return 0;
    if (delta >= 1)
        return -INFINITY;
    double log_x = 2 * log(delta), log_y = log1p(-x);
    if (x < (a + 1) / (a + b + 2))
        return log1p(-exp(log_beta_part(a, b, x, log_x, log_y)));
    return log_beta_part(b, a, 1 - x, log_y, log_x);
}

/* log erfc(x), also where erfc itself is too small for a double. */
static double log_erfc(double x)
{
    if (x < 20)
        return log(erfc(x));
    double y = 1 / (2 * x * x);
    return -x * x - log(x) - 0.5 * log(M_PI) + log1p(-y + 3 * y * y);
}

struct ry_capacity_bounds ry_capacity_bounds(double delta, double d)
{
    double x = d * delta * delta / (2 - delta * delta);
    if (delta <= 0) /* no token is nearer to a gate than at a right angle: any share will do */
        return (struct ry_capacity_bounds){0, 0, 0};
    return (struct ry_capacity_bounds){-ry_capacity_log_beyond(delta, d), -log_erfc(sqrt(x)), x};
}

/* ---- gates and tokens ---- */

static double at(const void *data, size_t bytes, size_t i)
{
    return bytes == sizeof(float) ? (double)((const float *)data)[i] : ((const double *)data)[i];
}

/* A row as floats of length 1; its length, 0 for none, NaN where it is not finite. */
static double direction(float *out, const void *data, size_t bytes, size_t row, int hidden)
{
    double sum = 0;
    for (int j = 0; j < hidden; j++) {
        double v = at(data, bytes, row * (size_t)hidden + (size_t)j);
        sum += v * v;
    }
    double length = sqrt(sum);
    if (!isfinite(length))
        return NAN;
    for (int j = 0; j < hidden; j++)
        out[j] = length > 0 ? (float)(at(data, bytes, row * (size_t)hidden + (size_t)j) / length) : 0;
    return length;
}

static double dot(const float *a, const float *b, int n)
{
    float part[8] = {0};
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++)
            part[k] += a[i + k] * b[i + k];
    double sum = 0;
    for (int k = 0; k < 8; k++)
        sum += (double)part[k];
    for (; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(const double *sorted, size_t n, double q)
{
    double pos = q * (double)(n - 1);
    size_t i = (size_t)pos;
    return i + 1 < n ? sorted[i] + (pos - (double)i) * (sorted[i + 1] - sorted[i]) : sorted[n - 1];
}

#define BINS 2048
#define REACH 8.0 /* in units of 1 / sqrt(d) */

/* Distribution function of cos on the sphere. */
static double sphere_below(double cosine, double d)
{
    double half = exp(ry_capacity_log_beyond(fmin(fabs(cosine), 1), d)) / 2;
    return cosine < 0 ? half : 1 - half;
}

static double distance(const uint64_t *bins, uint64_t n, int hidden)
{
    uint64_t below = 0;
    double most = 0;
    for (int i = 0; i < BINS; i++) {
        double edge = ((i + 1) * 2 * REACH / BINS - REACH) / sqrt(hidden);
        below += bins[i];
        double off = fabs((double)below / (double)n - sphere_below(edge, hidden));
        most = off > most ? off : most;
    }
    return most;
}

static int measure_gates(struct ry_affinity *out, float *unit, const void *gates, size_t bytes, struct ry_err *err)
{
    int n = out->experts, d = out->hidden;
    out->gate_norm_min = INFINITY;
    for (int i = 0; i < n; i++) {
        double length = direction(unit + (size_t)i * (size_t)d, gates, bytes, (size_t)i, d);
        if (!(length > 0))
            return ry_fail(err, "gate weights of expert %d are %s", i, length == 0 ? "all zero" : "not finite");
        out->gate_norm_min = fmin(out->gate_norm_min, length);
        out->gate_norm_max = fmax(out->gate_norm_max, length);
    }
    double sum = 0;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < i; j++) {
            double c = fabs(dot(unit + (size_t)i * (size_t)d, unit + (size_t)j * (size_t)d, d));
            out->gate_cos_max = fmax(out->gate_cos_max, c);
            sum += c;
        }
    }
    out->gate_cos_mean = n > 1 ? sum / (n * (n - 1) / 2.0) : 0;
    return 0;
}

#define PAIRS 20000

/* Mean cos^2 of two tokens, of pairs drawn at random. An even sphere gives 1 / d. */
static double dimensions(float *a, float *b, const void *tokens, size_t bytes, size_t n, int hidden)
{
    uint64_t random = 1;
    double sum = 0;
    int pairs = 0;
    for (int i = 0; i < PAIRS && n > 1; i++) {
        size_t s = (size_t)ry_random_below(&random, n), t = (size_t)ry_random_below(&random, n - 1);
        t += t >= s;
        if (!(direction(a, tokens, bytes, s, hidden) > 0) || !(direction(b, tokens, bytes, t, hidden) > 0))
            continue;
        double c = dot(a, b, hidden);
        sum += c * c;
        pairs++;
    }
    return sum > 0 ? pairs / sum : 0;
}

static int measure_tokens(struct ry_affinity *out, const float *gate, float *unit, double *mean, double *best,
                          uint64_t *bins, const void *tokens, size_t bytes, size_t ntokens, struct ry_err *err)
{
    int n = out->experts, d = out->hidden;
    double lengths = 0, squares = 0, sum = 0, sum2 = 0, scale = sqrt(d);
    out->delta = -1;
    for (size_t t = 0; t < ntokens; t++) {
        double length = direction(unit, tokens, bytes, t, d);
        if (isnan(length))
            return ry_fail(err, "token %zu holds a number that is not finite", t);
        if (length == 0) {
            out->zero_tokens++;
            continue;
        }
        double most = -1;
        for (int i = 0; i < n; i++) {
            double c = dot(unit, gate + (size_t)i * (size_t)d, d), z = c * scale;
            int bin = (int)floor((z + REACH) * BINS / (2 * REACH));
            bins[bin < 0 ? 0 : bin >= BINS ? BINS - 1 : bin]++;
            sum += z;
            sum2 += z * z;
            most = fmax(most, c);
        }
        for (int j = 0; j < d; j++)
            mean[j] += (double)unit[j];
        best[out->tokens++] = most;
        out->negative += most < 0;
        lengths += length;
        squares += length * length;
        out->delta = fmax(out->delta, most);
    }
    if (!out->tokens)
        return ry_fail(err, "no token has a direction: all are zero");
    double m = (double)out->tokens, pairs = m * n, drift = 0;
    for (int j = 0; j < d; j++)
        drift += mean[j] * mean[j];
    out->drift = sqrt(drift) / m;
    out->negative /= m;
    out->norm_spread = sqrt(fmax(0, squares / m - lengths / m * (lengths / m))) / (lengths / m);
    out->cos_mean = sum / pairs;
    out->cos_sd = sqrt(fmax(0, sum2 / pairs - out->cos_mean * out->cos_mean));
    out->ks = distance(bins, (uint64_t)pairs, d);
    qsort(best, out->tokens, sizeof *best, by_value);
    static const double q[] = {0.5, 0.9, 0.99};
    for (int i = 0; i < 3; i++)
        out->best[i] = quantile(best, out->tokens, q[i]);
    return 0;
}

int ry_affinity_measure(struct ry_affinity *out, const void *gates, size_t gate_bytes, int experts, const void *tokens,
                        size_t token_bytes, size_t ntokens, int hidden, struct ry_err *err)
{
    *out = (struct ry_affinity){.experts = experts, .hidden = hidden};
    if (experts < 1 || hidden < 2 || !ntokens)
        return ry_fail(err, "%d experts, %zu tokens of %d numbers: needs at least one of each, and two numbers",
                       experts, ntokens, hidden);
    size_t d = (size_t)hidden;
    float *gate = malloc((size_t)experts * d * sizeof *gate), *unit = malloc(2 * d * sizeof *unit);
    double *mean = calloc(d, sizeof *mean), *best = malloc(ntokens * sizeof *best);
    uint64_t *bins = calloc(BINS, sizeof *bins);
    int rc = -1;
    if (!gate || !unit || !mean || !best || !bins) {
        ry_fail(err, "out of memory for %d gates and %zu tokens", experts, ntokens);
    } else if (!measure_gates(out, gate, gates, gate_bytes, err) &&
               !measure_tokens(out, gate, unit, mean, best, bins, tokens, token_bytes, ntokens, err)) {
        out->dimensions = dimensions(unit, unit + d, tokens, token_bytes, ntokens, hidden);
        rc = 0;
    }
    free(gate);
    free(unit);
    free(mean);
    free(best);
    free(bins);
    return rc;
}

void ry_capacity_grap(float *out, int experts, int hidden)
{
    for (int i = 0; i < experts; i++) {
        for (size_t j = 0; j < (size_t)hidden; j++) { /* i d / n <= j < (i + 1) d / n */
            bool own = j * (size_t)experts / (size_t)hidden == (size_t)i;
            out[(size_t)i * (size_t)hidden + j] = own ? (float)experts / (float)hidden : 0;
        }
    }
}

/* ---- recorded routing ---- */

/* Copies per expert in a batch. */
static void load_of(uint64_t *load, const struct ry_routing *r, int layer, int first, int batch)
{
    memset(load, 0, (size_t)r->experts * sizeof *load);
    for (int s = first; s < first + batch; s++) {
        const uint16_t *c = ry_counts_at(r, s, layer);
        for (int e = 0; e < r->experts; e++)
            load[e] += c[e];
    }
}

static double even_share(const struct ry_routing *r, int batch)
{
    return (double)batch * r->tokens_per_sample * r->topk / r->experts;
}

int ry_capacity_used(struct ry_capacity_used *out, const struct ry_routing *r, int layer, int batch, struct ry_err *err)
{
    *out = (struct ry_capacity_used){.batches = batch > 0 ? r->samples / batch : 0};
    if (!out->batches)
        return ry_fail(err, "%d samples do not fill one batch of %d", r->samples, batch);
    size_t n = (size_t)out->batches, loads = n * (size_t)r->experts;
    uint64_t *load = malloc((size_t)r->experts * sizeof *load), all = 0;
    double *busiest = malloc(n * sizeof *busiest), *each = malloc(loads * sizeof *each);
    if (!load || !busiest || !each) {
        free(load);
        free(busiest);
        free(each);
        return ry_fail(err, "out of memory for %zu loads", loads);
    }
    double share = out->mean_tokens = even_share(r, batch);
    for (size_t b = 0; b < n; b++) {
        load_of(load, r, layer, (int)b * batch, batch);
        busiest[b] = 0;
        for (int e = 0; e < r->experts; e++) {
            double factor = (double)load[e] / share;
            each[b * (size_t)r->experts + (size_t)e] = factor;
            busiest[b] = fmax(busiest[b], factor);
            all += load[e];
        }
        out->busiest_mean += busiest[b] / (double)n;
    }
    out->missing = 1 - (double)all / (share * r->experts * (double)n);
    qsort(busiest, n, sizeof *busiest, by_value);
    qsort(each, loads, sizeof *each, by_value);
    static const double of_batches[] = {0.5, 0.95, 0.99}, of_loads[] = {0.05, 0.25, 0.5, 0.75, 0.95};
    for (int i = 0; i < 3; i++)
        out->busiest[i] = quantile(busiest, n, of_batches[i]);
    for (int i = 0; i < 5; i++)
        out->load[i] = quantile(each, loads, of_loads[i]);
    out->most = busiest[n - 1];
    free(load);
    free(busiest);
    free(each);
    return 0;
}

double ry_capacity_dropped(const struct ry_routing *r, int layer, int batch, double factor)
{
    double room = factor * even_share(r, batch), dropped = 0, all = 0;
    for (int first = 0; batch > 0 && first + batch <= r->samples; first += batch) {
        for (int e = 0; e < r->experts; e++) {
            double load = 0;
            for (int s = first; s < first + batch; s++)
                load += ry_counts_at(r, s, layer)[e];
            dropped += fmax(0, load - room);
            all += load;
        }
    }
    return all > 0 ? dropped / all : 0;
}
