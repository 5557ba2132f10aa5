/* home_model.c: see home_model.h. */
#include "place/home_model.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "place/random.h"

#define MEMORY (1.0 / 1024) /* weight of the newest sample in the running means of sureness */
#define MOST_BUCKETS 16384
#define SURE_SAMPLES 64
#define SURE_CAPTURED 0.3
#define SURE_GAIN 0.01

struct seen { /* a sample in the window */
    int n;
    uint16_t *bucket; /* [n] */
    float *value;     /* [n]: squares sum to 1 */
};

struct sums {               /* running means over observed samples, from the second on */
    double error, variance; /* squared, per node */
    double best, got;       /* share at the best node, at the predicted one, less the even share */
};

struct ry_home_model {
    struct ry_home_options o;
    int nodes;
    double *weight; /* [buckets + 1][nodes]; the last row is the constant's */
    uint64_t observed, random;
    double mean[RY_HOME_NODES]; /* of targets */
    struct sums sums;
    int kept, next;     /* samples in the window, and which is overwritten next once it is full */
    struct seen *seen;  /* [window] */
    double *target;     /* [window][nodes]: shares less the even share */
    double *multiplier; /* [window][nodes] */
};

struct ry_home_model *ry_home_model_new(int nodes, const struct ry_home_options *options, struct ry_err *err)
{
    struct ry_home_options o = *options;
    o.buckets = o.buckets ? o.buckets : 4096;
    o.window = o.window ? o.window : 1024;
    o.replay = o.replay ? o.replay : 16;
    o.ridge = o.ridge != 0 ? o.ridge : 0.1;
    if (nodes < 1 || nodes > RY_HOME_NODES || o.buckets < 64 || o.buckets > MOST_BUCKETS ||
        (o.buckets & (o.buckets - 1)) || o.window < 1 || o.window > 1 << 20 || o.replay < 0 || !(o.ridge > 0) ||
        !isfinite(o.ridge)) {
        ry_fail(
            err,
            "home model: %d nodes, %d buckets, a window of %d, ridge %g: needed are 1 to %d nodes, a power of two of "
            "64 to %d buckets, a window above 0, a ridge above 0",
            nodes, o.buckets, o.window, o.ridge, RY_HOME_NODES, MOST_BUCKETS);
        return NULL;
    }
    struct ry_home_model *m = calloc(1, sizeof *m);
    if (m) {
        m->o = o;
        m->nodes = nodes;
        m->random = o.seed;
        m->weight = calloc((size_t)(o.buckets + 1) * (size_t)nodes, sizeof *m->weight);
        m->seen = calloc((size_t)o.window, sizeof *m->seen);
        m->target = calloc((size_t)o.window * (size_t)nodes, sizeof *m->target);
        m->multiplier = calloc((size_t)o.window * (size_t)nodes, sizeof *m->multiplier);
    }
    if (!m || !m->weight || !m->seen || !m->target || !m->multiplier) {
        ry_home_model_free(m);
        ry_fail(err, "home model: out of memory for %d buckets and a window of %d", o.buckets, o.window);
        return NULL;
    }
    return m;
}

void ry_home_model_free(struct ry_home_model *m)
{
    if (!m)
        return;
    for (int i = 0; m->seen && i < m->kept; i++)
        free(m->seen[i].value);
    free(m->seen);
    free(m->weight);
    free(m->target);
    free(m->multiplier);
    free(m);
}

uint64_t ry_home_map_id(const int *expert_node, int layers, int experts)
{
    return XXH64(expert_node, (size_t)layers * (size_t)experts * sizeof *expert_node, (uint64_t)layers);
}

static unsigned bucket_of(const struct ry_home_model *m, uint32_t token)
{
    uint64_t state = m->o.seed ^ (uint64_t)token << 20;
    return (unsigned)(ry_random(&state) & (uint64_t)(m->o.buckets - 1));
}

/* The sample as a vector: bucket[] and value[] (room for n or all buckets each, whichever is less); returns how many.
 */
static int features(const struct ry_home_model *m, const uint32_t *tokens, int n, uint16_t *bucket, float *value)
{
    uint32_t count[MOST_BUCKETS];
    int used = 0;
    memset(count, 0, (size_t)m->o.buckets * sizeof *count);
    for (int i = 0; i < n; i++) {
        unsigned b = bucket_of(m, tokens[i]);
        if (!count[b]++)
            bucket[used++] = (uint16_t)b;
    }
    for (int i = 0; i < used; i++)
        value[i] = sqrtf((float)count[bucket[i]] / (float)n);
    return used;
}

/* out[nodes] = weights · sample; the constant's weights are the last row. */
static void apply(const struct ry_home_model *m, const double *weight, const uint16_t *bucket, const float *value,
                  int n, double *out)
{
    enum { BLOCK = 8 }; /* nodes whose sums stay in registers: most of the time that a prediction takes */
    size_t nodes = (size_t)m->nodes;
    const double *constant = weight + (size_t)m->o.buckets * nodes;
    size_t k = 0;
    for (; k + BLOCK <= nodes; k += BLOCK) {
        double sum[BLOCK];
        memcpy(sum, constant + k, sizeof sum);
        for (int i = 0; i < n; i++) {
            const double *row = weight + bucket[i] * nodes + k;
            for (int j = 0; j < BLOCK; j++)
                sum[j] += (double)value[i] * row[j];
        }
        memcpy(out + k, sum, sizeof sum);
    }
    for (; k < nodes; k++) {
        double sum = constant[k];
        for (int i = 0; i < n; i++)
            sum += (double)value[i] * weight[bucket[i] * nodes + k];
        out[k] = sum;
    }
}

/* weights += change[nodes] · sample */
static void add(const struct ry_home_model *m, double *weight, const struct seen *s, const double *change)
{
    double *row = weight + (size_t)m->o.buckets * (size_t)m->nodes;
    for (int k = 0; k < m->nodes; k++)
        row[k] += change[k];
    for (int i = 0; i < s->n; i++) {
        row = weight + (size_t)s->bucket[i] * (size_t)m->nodes;
        for (int k = 0; k < m->nodes; k++)
            row[k] += (double)s->value[i] * change[k];
    }
}

/* One sample's multipliers right given all others'. In the optimum a multiplier is what is
   left of the target, and weights are the multipliers' sum of samples over the ridge. */
static void step(struct ry_home_model *m, int i)
{
    double now[RY_HOME_NODES], change[RY_HOME_NODES];
    const struct seen *s = &m->seen[i];
    double *multiplier = m->multiplier + (size_t)i * (size_t)m->nodes;
    const double *target = m->target + (size_t)i * (size_t)m->nodes;
    apply(m, m->weight, s->bucket, s->value, s->n, now);
    for (int k = 0; k < m->nodes; k++) {
        double by = (target[k] - now[k] - multiplier[k]) / (1 + 2 / m->o.ridge); /* 2: the sample's length, squared */
        multiplier[k] += by;
        change[k] = by / m->o.ridge;
    }
    add(m, m->weight, s, change);
}

/* Both less the even share. */
static void judge(struct ry_home_model *m, const double *seen, const double *predicted)
{
    double rate = fmax(MEMORY, 1.0 / (double)(m->observed + 1)), error = 0, variance = 0, best = seen[0];
    int at = 0;
    for (int k = 0; k < m->nodes; k++) {
        error += (seen[k] - predicted[k]) * (seen[k] - predicted[k]) / m->nodes;
        variance += (seen[k] - m->mean[k]) * (seen[k] - m->mean[k]) / m->nodes;
        best = fmax(best, seen[k]);
        at = predicted[k] > predicted[at] ? k : at;
        m->mean[k] += rate * (seen[k] - m->mean[k]);
    }
    if (!m->observed) /* all predictions are still equal: no news */
        return;
    m->sums.error += rate * (error - m->sums.error);
    m->sums.variance += rate * (variance - m->sums.variance);
    m->sums.best += rate * (best - m->sums.best);
    m->sums.got += rate * (seen[at] - m->sums.got);
}

int ry_home_model_observe(struct ry_home_model *m, const uint32_t *tokens, int n, const double *rows,
                          struct ry_err *err)
{
    double total = 0, share[RY_HOME_NODES], predicted[RY_HOME_NODES];
    for (int k = 0; k < m->nodes; k++) {
        if (!(rows[k] >= 0) || !isfinite(rows[k]))
            return ry_fail(err, "home model: rows[%d] is %g", k, rows[k]);
        total += rows[k];
    }
    if (n < 1 || !(total > 0) || !isfinite(total))
        return ry_fail(err, "home model: a sample of %d tokens and %g rows", n, total);
    for (int k = 0; k < m->nodes; k++)
        share[k] = rows[k] / total - 1.0 / m->nodes;

    struct seen new = {0};
    new.value = malloc((size_t)n * (sizeof *new.value + sizeof *new.bucket));
    if (!new.value)
        return ry_fail(err, "home model: out of memory for a sample of %d tokens", n);
    new.bucket = (uint16_t *)(new.value + n);
    new.n = features(m, tokens, n, new.bucket, new.value);
    apply(m, m->weight, new.bucket, new.value, new.n, predicted);
    judge(m, share, predicted);

    int at = m->next;
    m->next = (at + 1) % m->o.window;
    double *multiplier = m->multiplier + (size_t)at * (size_t)m->nodes;
    if (at < m->kept)
        free(m->seen[at].value); /* its part of the weights stays */
    else
        m->kept++;
    m->seen[at] = new;
    memset(multiplier, 0, (size_t)m->nodes * sizeof *multiplier);
    memcpy(m->target + (size_t)at * (size_t)m->nodes, share, (size_t)m->nodes * sizeof *share);
    m->observed++;
    step(m, at);
    for (int i = 0; i < m->o.replay; i++)
        step(m, (int)ry_random_below(&m->random, (uint64_t)m->kept));
    return 0;
}

/* The step along p in all nodes' regressions at once, which are independent of each other: one round of conjugate
   gradients. left[kept][nodes] is what multipliers are off by; sum[buckets + 1][nodes] and image[kept][nodes] are room.
 */
static void descend(struct ry_home_model *m, double *left, double *p, double *image, double *sum)
{
    size_t nodes = (size_t)m->nodes, n = (size_t)m->kept * nodes, rows = (size_t)(m->o.buckets + 1) * nodes;
    double before[RY_HOME_NODES] = {0}, along[RY_HOME_NODES] = {0}, after[RY_HOME_NODES] = {0}, by[RY_HOME_NODES];
    memset(sum, 0, rows * sizeof *sum);
    for (int i = 0; i < m->kept; i++) {
        for (size_t k = 0; k < nodes; k++)
            by[k] = p[(size_t)i * nodes + k] / m->o.ridge;
        add(m, sum, &m->seen[i], by);
    }
    for (int i = 0; i < m->kept; i++)
        apply(m, sum, m->seen[i].bucket, m->seen[i].value, m->seen[i].n, image + (size_t)i * nodes);
    for (size_t j = 0; j < n; j++) {
        image[j] += p[j];
        before[j % nodes] += left[j] * left[j];
        along[j % nodes] += p[j] * image[j];
    }
    for (size_t k = 0; k < nodes; k++)
        by[k] = along[k] > 0 ? before[k] / along[k] : 0;
    for (size_t j = 0; j < rows; j++)
        m->weight[j] += by[j % nodes] * sum[j];
    for (size_t j = 0; j < n; j++) {
        m->multiplier[j] += by[j % nodes] * p[j];
        left[j] -= by[j % nodes] * image[j];
        after[j % nodes] += left[j] * left[j];
    }
    for (size_t j = 0; j < n; j++)
        p[j] = left[j] + (before[j % nodes] > 0 ? after[j % nodes] / before[j % nodes] : 0) * p[j];
}

static double greatest(const double *v, size_t n)
{
    double most = 0;
    for (size_t i = 0; i < n; i++)
        most = fmax(most, fabs(v[i]));
    return most;
}

double ry_home_model_settle(struct ry_home_model *m, int rounds, double tolerance)
{
    size_t nodes = (size_t)m->nodes, n = (size_t)m->kept * nodes, rows = (size_t)(m->o.buckets + 1) * nodes;
    double *left = malloc((3 * n + rows) * sizeof *left), *p = left + n, *image = p + n, most = INFINITY;
    if (!left)
        return most;
    for (int i = 0; i < m->kept; i++)
        apply(m, m->weight, m->seen[i].bucket, m->seen[i].value, m->seen[i].n, image + (size_t)i * nodes);
    for (size_t j = 0; j < n; j++)
        p[j] = left[j] = m->target[j] - image[j] - m->multiplier[j];
    for (int r = 0; (most = greatest(left, n)) > tolerance && r < rounds; r++)
        descend(m, left, p, image, image + n);
    free(left);
    return most;
}

void ry_home_model_predict(const struct ry_home_model *m, const uint32_t *tokens, int n, float *shares)
{
    double out[RY_HOME_NODES];
    uint16_t bucket[MOST_BUCKETS];
    float value[MOST_BUCKETS];
    int used = n > 0 ? features(m, tokens, n, bucket, value) : 0;
    apply(m, m->weight, bucket, value, used, out);
    for (int k = 0; k < m->nodes; k++)
        shares[k] = (float)(out[k] + 1.0 / m->nodes);
}

void ry_home_model_trust(const struct ry_home_model *m, struct ry_home_trust *t)
{
    *t = (struct ry_home_trust){.samples = m->observed, .error = sqrt(m->sums.error), .gain = m->sums.got};
    t->explained = m->sums.variance > 0 ? 1 - m->sums.error / m->sums.variance : 0;
    t->captured = m->sums.best > 0 ? m->sums.got / m->sums.best : 0;
    t->sure = t->samples >= SURE_SAMPLES && t->captured >= SURE_CAPTURED && t->gain >= SURE_GAIN;
    if (t->samples < SURE_SAMPLES)
        snprintf(t->why, sizeof t->why, "not sure: %lu samples seen, %d are needed", (unsigned long)t->samples,
                 SURE_SAMPLES);
    else
        snprintf(t->why, sizeof t->why,
                 "%s: at the node that its tokens tell, a sample keeps %.1f %% more of its traffic than by lot, at its best "
                 "one %.1f %%",
                 t->sure ? "sure" : "not sure", 100 * m->sums.got, 100 * m->sums.best);
}

/* The file: this header, then float weight[buckets + 1][nodes], then XXH64 of all before it. Little-endian. */
struct header {
    char magic[8];
    uint32_t nodes, buckets, window, replay;
    uint64_t seed, map, observed;
    double ridge;
    struct sums sums;
};
#define MAGIC "RYHOME1"

int ry_home_model_save(const struct ry_home_model *m, const char *path, struct ry_err *err)
{
    char part[4096];
    size_t count = (size_t)(m->o.buckets + 1) * (size_t)m->nodes, size = sizeof(struct header) + count * sizeof(float);
    char *data = malloc(size + sizeof(uint64_t));
    if (!data || (size_t)snprintf(part, sizeof part, "%s.tmp", path) >= sizeof part) {
        free(data);
        return ry_fail(err, "%s: %s", path, data ? "the name is too long" : "out of memory");
    }
    struct header h = {.magic = MAGIC,
                       .nodes = (uint32_t)m->nodes,
                       .buckets = (uint32_t)m->o.buckets,
                       .window = (uint32_t)m->o.window,
                       .replay = (uint32_t)m->o.replay,
                       .seed = m->o.seed,
                       .map = m->o.map,
                       .observed = m->observed,
                       .ridge = m->o.ridge,
                       .sums = m->sums};
    memcpy(data, &h, sizeof h);
    for (size_t i = 0; i < count; i++) {
        float w = (float)m->weight[i];
        memcpy(data + sizeof h + i * sizeof w, &w, sizeof w);
    }
    uint64_t sum = XXH64(data, size, 0);
    memcpy(data + size, &sum, sizeof sum);
    FILE *f = fopen(part, "wb");
    bool ok = f && fwrite(data, 1, size + sizeof sum, f) == size + sizeof sum;
    ok = (!f || !fclose(f)) && ok && !rename(part, path);
    free(data);
    if (!ok) {
        int e = errno;
        unlink(part);
        return ry_fail(err, "%s: cannot be written: %s", path, strerror(e));
    }
    return 0;
}

/* What is wrong with the file; NULL: nothing. */
static const char *look(const struct header *h, const char *data, size_t size, int nodes, uint64_t map)
{
    uint64_t sum;
    if (size < sizeof *h + sizeof sum || memcmp(h->magic, MAGIC, sizeof h->magic))
        return "no home model of version 1";
    if (h->nodes < 1 || h->nodes > RY_HOME_NODES || h->buckets < 64 || h->buckets > MOST_BUCKETS ||
        size != sizeof *h + (size_t)(h->buckets + 1) * h->nodes * sizeof(float) + sizeof sum)
        return "its length does not fit its header: cut short, or not written by Railyard";
    memcpy(&sum, data + size - sizeof sum, sizeof sum);
    if (sum != XXH64(data, size - sizeof sum, 0))
        return "its checksum is wrong: damaged";
    if ((int)h->nodes != nodes)
        return "for another number of nodes";
    if (h->map != map)
        return "learned under another expert map: learn anew";
    return NULL;
}

static char *slurp(const char *path, size_t *size, struct ry_err *err)
{
    size_t most =
        sizeof(struct header) + (size_t)(MOST_BUCKETS + 1) * RY_HOME_NODES * sizeof(float) + sizeof(uint64_t) + 1;
    FILE *f = fopen(path, "rb");
    char *data = f ? malloc(most) : NULL;
    if (!data) {
        ry_fail(err, "%s: %s", path, f ? "out of memory" : strerror(errno));
        if (f)
            fclose(f);
        return NULL;
    }
    *size = fread(data, 1, most, f);
    fclose(f);
    return data;
}

struct ry_home_model *ry_home_model_load(const char *path, int nodes, uint64_t map, struct ry_err *err)
{
    size_t size;
    struct header h = {0};
    struct ry_home_model *m = NULL;
    char *data = slurp(path, &size, err);
    if (!data)
        return NULL;
    memcpy(&h, data, size < sizeof h ? size : sizeof h);
    const char *wrong = look(&h, data, size, nodes, map);
    if (wrong) {
        ry_fail(err, "%s: %s", path, wrong);
        goto out;
    }
    struct ry_home_options o = {(int)h.buckets, (int)h.window, (int)h.replay, h.ridge, h.seed, h.map};
    if (!(m = ry_home_model_new(nodes, &o, err)))
        goto out;
    m->observed = h.observed;
    m->sums = h.sums;
    for (size_t i = 0; i < (h.buckets + 1) * (size_t)nodes; i++) {
        float w;
        memcpy(&w, data + sizeof h + i * sizeof w, sizeof w);
        if (!isfinite(w)) {
            ry_fail(err, "%s: weight %zu is no number", path, i);
            ry_home_model_free(m);
            m = NULL;
            break;
        }
        m->weight[i] = w;
    }
out:
    free(data);
    return m;
}
