/*
 * main.c: the benchmark: start-up, the loop over iterations and layers, the end.
 *
 * Owns: what happens in which order. An iteration is a training step as Megatron-core does it: all layers forward, then
 * all layers backward in reverse. The program is an ordinary one: it knows nothing of Railyard and calls NCCL's public
 * functions only, so that what is true of it under the preload is true of other programs.
 */
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "bench.h"
#include "rendezvous.h"

#define RENDEZVOUS_SECONDS 120

_Noreturn void ry_bench_die(const struct ry_bench *b, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    fprintf(stderr, "railyard-bench: rank %d: %s\n", b->rank, text);
    exit(1);
}

void *ry_bench_memory(const struct ry_bench *b, size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (!p)
        ry_bench_die(b, "out of memory for %zu times %zu bytes", n, size);
    return p;
}

/* Host memory if NCCL is the emulator, a GPU otherwise. */
static void open_device(struct ry_bench *b)
{
    struct ry_err err = {""};
    b->emulated = dlsym(RTLD_DEFAULT, "railyard_emu_version") != NULL;
    b->device = b->emulated ? ry_device_host() : ry_device_cuda(&err);
    if (!b->device)
        ry_bench_die(b, "%s; without a GPU, use the emulated cluster: railyard emu -n 2 -g 4 -- railyard bench",
                     err.msg);
    int devices = 0;
    RY_DEVICE(b, count, &devices);
    RY_DEVICE(b, use, b->options.ranks.local_rank % devices);
    RY_DEVICE(b, stream_create, &b->stream);
    RY_DEVICE(b, event_create, &b->before);
    RY_DEVICE(b, event_create, &b->after);
}

static void open_communicator(struct ry_bench *b)
{
    const struct ry_bench_options *o = &b->options;
    struct ry_err err = {""};
    ncclUniqueId id = {0};
    RY_NCCL(b, ncclGetVersion, &b->nccl_version);
    if (b->rank == 0)
        RY_NCCL(b, ncclGetUniqueId, &id);
    ry_rendezvous_beside_torchrun();
    if (ry_rendezvous(&o->ranks, &id, sizeof id, RENDEZVOUS_SECONDS, &err))
        ry_bench_die(b, "%s", err.msg);
    RY_NCCL(b, ncclCommInitRank, &b->comm, b->ranks, id, b->rank);
}

/* Who shares a node: NCCL_HOSTID, by which NCCL itself goes, or the host's name. */
static void find_nodes(struct ry_bench *b)
{
    char mine[RY_NODE_NAME] = "";
    const char *id = getenv("NCCL_HOSTID");
    if (id && *id)
        snprintf(mine, sizeof mine, "%s", id);
    else
        gethostname(mine, sizeof mine - 1);
    b->node_name = ry_bench_memory(b, (size_t)b->ranks, sizeof *b->node_name);
    b->node = ry_bench_memory(b, (size_t)b->ranks, sizeof *b->node);
    ry_bench_gather(b, mine, sizeof mine, b->node_name);
    for (int r = 0; r < b->ranks; r++) {
        int first = 0;
        while (strcmp(b->node_name[first], b->node_name[r]))
            first++;
        b->node[r] = first == r ? b->nodes++ : b->node[first];
    }
}

/* Which rows there are; every rank works out for itself what all ranks route where. */
static void make_layer(struct ry_bench *b, struct ry_layer *l, uint64_t iteration, int layer, uint16_t *choice)
{
    const struct ry_routing_config *c = &b->options.routing;
    int first = b->rank * b->per_rank;
    l->n_theirs = 0;
    for (int r = 0; r < b->ranks; r++) {
        ry_routing_choose(b->routing, iteration, layer, r, choice);
        l->from[r] = ry_rows_list(l->theirs + l->n_theirs, NULL, choice, c->tokens, c->top_k, r, first,
                                  first + b->per_rank, b->capacity);
        l->n_theirs += l->from[r];
        if (r != b->rank)
            continue;
        l->n_mine = ry_rows_list(l->mine, l->expert_count, choice, c->tokens, c->top_k, r, 0, c->experts, b->capacity);
        for (int peer = 0; peer < b->ranks; peer++) {
            l->to[peer] = 0;
            for (int e = 0; e < b->per_rank; e++)
                l->to[peer] += l->expert_count[peer * b->per_rank + e];
        }
    }
}

static void new_layers(struct ry_bench *b, struct ry_layer *layers)
{
    const struct ry_routing_config *c = &b->options.routing;
    size_t copies = (size_t)c->tokens * (size_t)c->top_k;
    size_t mine = b->capacity ? b->capacity * (size_t)c->experts : copies;
    /* A token goes to an expert once, so to this rank at most per_rank times. */
    size_t most = (size_t)c->tokens * (size_t)(b->per_rank < c->top_k ? b->per_rank : c->top_k);
    size_t theirs = (size_t)b->ranks * (b->capacity ? b->capacity * (size_t)b->per_rank : most);
    for (int l = 0; l < c->layers; l++) {
        layers[l].mine = ry_bench_memory(b, mine, sizeof(struct ry_row));
        layers[l].theirs = ry_bench_memory(b, theirs, sizeof(struct ry_row));
        layers[l].to = ry_bench_memory(b, (size_t)b->ranks, sizeof(uint64_t));
        layers[l].from = ry_bench_memory(b, (size_t)b->ranks, sizeof(uint64_t));
        layers[l].expert_count = ry_bench_memory(b, (size_t)c->experts, sizeof(uint64_t));
    }
}

static void free_layers(struct ry_layer *layers, int n)
{
    for (int l = 0; l < n; l++) {
        free(layers[l].mine);
        free(layers[l].theirs);
        free(layers[l].to);
        free(layers[l].from);
        free(layers[l].expert_count);
    }
}

static void work(struct ry_bench *b)
{
    const struct ry_bench_options *o = &b->options;
    const struct ry_routing_config *c = &o->routing;
    struct ry_layer *layers = ry_bench_memory(b, (size_t)c->layers, sizeof *layers);
    uint16_t *choice = ry_bench_memory(b, (size_t)c->tokens * (size_t)c->top_k, sizeof *choice);
    new_layers(b, layers);
    b->sent = ry_bench_memory(b, (size_t)b->ranks, sizeof *b->sent);
    for (int f = 0; f < RY_FLOWS; f++)
        if (!b->capacity || (f != RY_FLOW_PROBS && f != RY_FLOW_PROBS_GRAD))
            b->us[f] = ry_bench_memory(b, (size_t)o->iterations * (size_t)c->layers, sizeof(double));

    uint64_t start = ry_now_ns();
    for (int i = 0; i < o->warmup + o->iterations; i++) {
        uint64_t iteration = (uint64_t)i;
        if (i == o->warmup)
            start = ry_now_ns();
        for (int step = 0; step < 2 * c->layers; step++) {
            bool forward = step < c->layers;
            int l = forward ? step : 2 * c->layers - 1 - step;
            if (forward) {
                make_layer(b, layers + l, iteration, l, choice);
                if (!b->capacity)
                    ry_bench_swap_counts(b, iteration, l, layers + l);
            }
            for (int f = forward ? RY_FLOW_DISPATCH : RY_FLOW_COMBINE_GRAD;
                 f < (forward ? RY_FLOW_COMBINE_GRAD : RY_FLOWS); f++)
                if (b->us[f])
                    ry_bench_exchange(b, (enum ry_flow)f, iteration, l, layers + l,
                                      i < o->warmup ? NULL : b->us[f] + (i - o->warmup) * c->layers + l);
        }
    }
    b->seconds = (double)(ry_now_ns() - start) / 1e9;
    free_layers(layers, c->layers);
    free(layers);
    free(choice);
}

static void release(struct ry_bench *b)
{
    struct ry_buffer *const buffers[] = {&b->send, &b->recv, &b->small};
    for (int i = 0; i < 3; i++) {
        free(buffers[i]->host);
        RY_DEVICE(b, release, buffers[i]->device);
    }
    b->device->event_destroy(b->before);
    b->device->event_destroy(b->after);
    RY_DEVICE(b, stream_destroy, b->stream);
    for (int f = 0; f < RY_FLOWS; f++)
        free(b->us[f]);
    XXH3_freeState(b->digest);
    ry_routing_close(b->routing);
    free(b->sent);
    free(b->node);
    free(b->node_name);
}

int main(int argc, char **argv)
{
    static struct ry_bench b;
    struct ry_err err = {""};
    struct ry_bench_options *o = &b.options;
    FILE *json = NULL;
    int status;
    if (ry_bench_options(argc, argv, o, &status))
        return status;
    b.rank = o->ranks.rank;
    b.ranks = o->ranks.world;
    if (!(b.routing = ry_routing_open(&o->routing, &err))) {
        if (b.rank == 0)
            fprintf(stderr, "%s: %s\n", argv[0], err.msg);
        else
            ry_bench_let_rank_0_speak();
        return 2;
    }
    b.per_rank = o->routing.experts / b.ranks;
    if (o->pad > 0)
        b.capacity = (size_t)ceil(o->pad * o->routing.tokens * o->routing.top_k / o->routing.experts);
    /* A file that cannot be written is better known before the work than after it. */
    if (b.rank == 0 && o->json && !(json = fopen(o->json, "w")))
        ry_bench_die(&b, "cannot write %s: %s", o->json, strerror(errno));
    b.digest = XXH3_createState();
    if (!b.digest)
        ry_bench_die(&b, "out of memory");
    XXH3_128bits_reset(b.digest);

    open_device(&b);
    open_communicator(&b);
    find_nodes(&b);
    work(&b);
    status = ry_bench_summary(&b, json);
    RY_NCCL(&b, ncclCommDestroy, b.comm);
    b.comm = NULL;
    release(&b);
    return status;
}
