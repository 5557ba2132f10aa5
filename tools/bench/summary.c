/*
 * summary.c: what all ranks saw, brought together on rank 0.
 *
 * Owns: the table, the JSON and the matrix file. The time of one exchange is that of its slowest rank; medians and
 * percentiles are over exchanges. Bytes are those of exchanges, warm-up included: the counts gathered before them, and
 * what this file itself gathers, are not in them.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "base/npy.h"
#include "bench.h"

/* What each rank contributes, besides its times. */
struct part {
    uint64_t exchanges, checked, wrong, dispatched;
    uint64_t flow_sent[RY_FLOWS];
    XXH128_canonical_t digest;
};

struct stats {
    size_t n;
    double median, p10, p90, min, max;
};

struct totals {
    uint64_t checked, wrong;
    uint64_t all, self, in_node, cross_node; /* bytes */
    uint64_t flow[RY_FLOWS];
    double imbalance; /* of dispatch: busiest rank over the mean */
    char digest[33];
    struct stats time[RY_FLOWS], step;
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Nearest rank, the middle of the two for an even median: few values must not be made to look like more. */
static struct stats statistics(double *v, size_t n)
{
    if (!n)
        return (struct stats){0};
    qsort(v, n, sizeof *v, by_value);
    return (struct stats){.n = n,
                          .median = (v[(n - 1) / 2] + v[n / 2]) / 2,
                          .p10 = v[(n - 1) / 10],
                          .p90 = v[n - 1 - (n - 1) / 10],
                          .min = v[0],
                          .max = v[n - 1]};
}

/* Slowest rank of each exchange; the statistics of each flow and of whole steps. */
static void times(struct ry_bench *b, struct totals *t)
{
    size_t layers = (size_t)b->options.routing.layers, steps = (size_t)b->options.iterations, n = layers * steps;
    double *all = ry_bench_memory(b, n * (size_t)b->ranks, sizeof *all);
    double *step = ry_bench_memory(b, steps, sizeof *step);
    for (int f = 0; f < RY_FLOWS; f++) {
        if (!b->us[f])
            continue;
        ry_bench_gather(b, b->us[f], n * sizeof *all, all);
        for (size_t r = 1; r < (size_t)b->ranks; r++)
            for (size_t i = 0; i < n; i++)
                if (all[i] < all[r * n + i])
                    all[i] = all[r * n + i];
        for (size_t i = 0; i < n; i++)
            step[i / layers] += all[i];
        t->time[f] = statistics(all, n);
    }
    t->step = statistics(step, steps);
    free(all);
    free(step);
}

static void add_up(const struct ry_bench *b, const struct part *parts, const uint64_t *matrix, struct totals *t)
{
    uint64_t busiest = 0, sum = 0;
    XXH3_state_t *state = XXH3_createState();
    if (!state)
        ry_bench_die(b, "out of memory");
    XXH3_128bits_reset(state);
    for (int r = 0; r < b->ranks; r++) {
        const struct part *p = parts + r;
        t->checked += p->checked;
        t->wrong += p->wrong;
        sum += p->dispatched;
        busiest = p->dispatched > busiest ? p->dispatched : busiest;
        for (int f = 0; f < RY_FLOWS; f++)
            t->flow[f] += p->flow_sent[f];
        XXH3_128bits_update(state, &p->digest, sizeof p->digest);
        for (int peer = 0; peer < b->ranks; peer++) {
            uint64_t bytes = matrix[(size_t)r * (size_t)b->ranks + (size_t)peer];
            t->all += bytes;
            *(r == peer ? &t->self : b->node[r] == b->node[peer] ? &t->in_node : &t->cross_node) += bytes;
        }
    }
    t->imbalance = sum ? (double)busiest * b->ranks / (double)sum : 1;
    XXH128_hash_t digest = XXH3_128bits_digest(state);
    XXH3_freeState(state);
    snprintf(t->digest, sizeof t->digest, "%016llx%016llx", (unsigned long long)digest.high64,
             (unsigned long long)digest.low64);
}

static const char *size_text(char buf[32], double bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    int u = 0;
    for (; bytes >= 1024 && u < 5; u++)
        bytes /= 1024;
    snprintf(buf, 32, u ? "%.1f %s" : "%.0f %s", bytes, units[u]);
    return buf;
}

static void print_table(const struct ry_bench *b, const struct totals *t)
{
    const struct ry_bench_options *o = &b->options;
    const struct ry_routing_config *c = &o->routing;
    char a[32], s[32], d[32];
    printf("railyard bench: %d rank%s on %d node%s, NCCL %d.%d.%d%s, %s\n", b->ranks, b->ranks == 1 ? "" : "s",
           b->nodes, b->nodes == 1 ? "" : "s", b->nccl_version / 10000, b->nccl_version / 100 % 100,
           b->nccl_version % 100, b->emulated ? " (emulated)" : "", b->emulated ? "host memory" : "CUDA");
    printf("  %d experts, top-%d, %d tokens of %d %s per rank, %d layer%s, routing %s, seed %llu", c->experts, c->top_k,
           c->tokens, o->hidden, o->type->name, c->layers, c->layers == 1 ? "" : "s", c->how,
           (unsigned long long)c->seed);
    if (b->capacity)
        printf(", padded to %zu rows per expert", b->capacity);
    printf("\n  %d iterations after %d to warm up, in %.2f s; busiest rank receives %.2f times the mean\n\n",
           o->iterations, o->warmup, b->seconds, t->imbalance);
    printf("  %-18s %9s %12s %11s %11s %11s\n", "exchange", "number", "bytes each", "median us", "10 %", "90 %");
    int steps = o->warmup + o->iterations;
    for (int f = 0; f < RY_FLOWS; f++) {
        if (!b->us[f])
            continue;
        double number = (double)steps * c->layers;
        printf("  %-18s %9.0f %12s %11.1f %11.1f %11.1f\n", ry_flow_name((enum ry_flow)f), number,
               size_text(a, (double)t->flow[f] / number), t->time[f].median, t->time[f].p10, t->time[f].p90);
    }
    printf("  %-18s %9d %12s %11.1f %11.1f %11.1f\n\n", "all of one step", steps, size_text(a, (double)t->all / steps),
           t->step.median, t->step.p10, t->step.p90);
    printf("  %llu exchanges, %s: %s to itself or in the node, %s (%.1f %%) between nodes\n",
           (unsigned long long)b->exchanges, size_text(a, (double)t->all), size_text(s, (double)(t->self + t->in_node)),
           size_text(d, (double)t->cross_node), t->all ? 100.0 * (double)t->cross_node / (double)t->all : 0.0);
    if (t->checked)
        printf("  checked %llu bytes: %llu wrong\n", (unsigned long long)t->checked, (unsigned long long)t->wrong);
    else
        printf("  not checked\n");
    if (o->digest)
        printf("  digest %s\n", t->digest);
    fflush(stdout);
}

static json_t *stats_json(const struct stats *s)
{
    return json_pack("{sI sf sf sf sf sf}", "n", (json_int_t)s->n, "median", s->median, "p10", s->p10, "p90", s->p90,
                     "min", s->min, "max", s->max);
}

static json_t *result_json(const struct ry_bench *b, const struct totals *t)
{
    const struct ry_bench_options *o = &b->options;
    const struct ry_routing_config *c = &o->routing;
    json_t *flows = json_object(), *nodes = json_array();
    for (int f = 0; f < RY_FLOWS; f++) {
        if (!b->us[f])
            continue;
        json_t *one = stats_json(&t->time[f]);
        json_object_set_new(one, "bytes", json_integer((json_int_t)t->flow[f]));
        json_object_set_new(flows, ry_flow_name((enum ry_flow)f), one);
    }
    for (int r = 0; r < b->ranks; r++)
        json_array_append_new(nodes, json_integer(b->node[r]));
    json_t *options = json_pack("{si si si si si si si ss ss ss sI ss sb sf}", "experts", c->experts, "top_k", c->top_k,
                                "tokens", c->tokens, "hidden", o->hidden, "layers", c->layers, "iterations",
                                o->iterations, "warmup", o->warmup, "type", o->type->name, "probs_type",
                                o->probs_type->name, "routing", c->how, "seed", (json_int_t)c->seed, "check",
                                ry_bench_check_names[o->check], "barrier", (int)o->barrier, "pad", o->pad);
    return json_pack("{ss ss si sb ss si si so sI sI sI sI sI sf so so sf sI sI so so}", "program", "railyard-bench",
                     "version", RAILYARD_VERSION, "nccl", b->nccl_version, "emulated", (int)b->emulated, "device",
                     b->device->name, "nodes", b->nodes, "ranks", b->ranks, "rank_node", nodes, "exchanges",
                     (json_int_t)b->exchanges, "bytes_total", (json_int_t)t->all, "bytes_self", (json_int_t)t->self,
                     "bytes_in_node", (json_int_t)t->in_node, "bytes_cross_node", (json_int_t)t->cross_node,
                     "imbalance", t->imbalance, "time_us", flows, "step_us", stats_json(&t->step), "seconds",
                     b->seconds, "checked_bytes", (json_int_t)t->checked, "errors", (json_int_t)t->wrong, "digest",
                     o->digest ? json_string(t->digest) : json_null(), "options", options);
}

static int write_json(const struct ry_bench *b, const struct totals *t, FILE *f, struct ry_err *err)
{
    json_t *result = result_json(b, t);
    int rc = !result || json_dumpf(result, f, JSON_INDENT(1)) || fputc('\n', f) == EOF;
    json_decref(result);
    rc |= fclose(f);
    return rc ? ry_fail(err, "cannot write %s: is the disk full?", b->options.json) : 0;
}

int ry_bench_summary(struct ry_bench *b, FILE *json)
{
    size_t ranks = (size_t)b->ranks;
    struct totals t = {0};
    struct part mine = {
        .exchanges = b->exchanges, .checked = b->checked, .wrong = b->wrong, .dispatched = b->dispatched};
    memcpy(mine.flow_sent, b->flow_sent, sizeof mine.flow_sent);
    XXH128_canonicalFromHash(&mine.digest, XXH3_128bits_digest(b->digest));
    struct part *parts = ry_bench_memory(b, ranks, sizeof *parts);
    uint64_t *matrix = ry_bench_memory(b, ranks * ranks, sizeof *matrix);
    ry_bench_gather(b, &mine, sizeof mine, parts);
    ry_bench_gather(b, b->sent, ranks * sizeof *matrix, matrix);
    times(b, &t);
    add_up(b, parts, matrix, &t);
    int status = t.wrong ? 1 : 0;
    if (b->rank == 0) {
        struct ry_err err = {""};
        print_table(b, &t);
        if (json && write_json(b, &t, json, &err)) {
            fprintf(stderr, "railyard-bench: %s\n", err.msg);
            status = 1;
        }
        const size_t shape[] = {ranks, ranks};
        if (b->options.matrix && ry_npy_save(AT_FDCWD, b->options.matrix, RY_NPY_U64, 2, shape, matrix, &err)) {
            fprintf(stderr, "railyard-bench: %s\n", err.msg);
            status = 1;
        }
    }
    /* Rank 0's word for all, and only now: a launcher ends all ranks when one of them fails. */
    unsigned char own = (unsigned char)status;
    unsigned char *of_all = ry_bench_memory(b, ranks, 1);
    ry_bench_gather(b, &own, 1, of_all);
    status = of_all[0];
    free(of_all);
    free(parts);
    free(matrix);
    return status;
}
