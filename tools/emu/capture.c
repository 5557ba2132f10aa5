/* capture.c: see capture.h. */
#include "capture.h"

#include <stdlib.h>
#include <string.h>

#include "emu.h"

#define EXPORT __attribute__((visibility("default")))

struct batch {
    struct batch *next;
    int nops;
    struct ry_emu_op ops[];
};

struct railyard_emu_graph {
    struct railyard_emu_graph *next;
    void *stream;
    struct batch *first, **end;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct railyard_emu_graph *growing;

static struct railyard_emu_graph **find(const void *stream)
{
    struct railyard_emu_graph **p = &growing;
    while (*p && (*p)->stream != stream)
        p = &(*p)->next;
    return p;
}

EXPORT int railyard_emu_capture_begin(void *stream)
{
    struct railyard_emu_graph *g = calloc(1, sizeof *g);
    pthread_mutex_lock(&lock);
    bool ok = g && stream && !*find(stream);
    if (ok) {
        g->stream = stream;
        g->end = &g->first;
        g->next = growing;
        growing = g;
    }
    pthread_mutex_unlock(&lock);
    if (!ok)
        free(g);
    return ok ? 0 : -1;
}

EXPORT bool railyard_emu_capturing(void *stream)
{
    pthread_mutex_lock(&lock);
    bool is = *find(stream) != NULL;
    pthread_mutex_unlock(&lock);
    return is;
}

EXPORT struct railyard_emu_graph *railyard_emu_capture_end(void *stream)
{
    pthread_mutex_lock(&lock);
    struct railyard_emu_graph **p = find(stream), *g = *p;
    if (g)
        *p = g->next;
    pthread_mutex_unlock(&lock);
    return g;
}

EXPORT int railyard_emu_graph_launch(const struct railyard_emu_graph *graph)
{
    ncclResult_t r = ncclSuccess;
    for (const struct batch *b = graph->first; b && r == ncclSuccess; b = b->next) {
        struct ry_emu_op *ops = malloc((size_t)b->nops * sizeof *ops); /* running changes them */
        if (!ops)
            return ncclSystemError;
        memcpy(ops, b->ops, (size_t)b->nops * sizeof *ops);
        r = ry_emu_run(ops, b->nops);
        free(ops);
    }
    return r;
}

EXPORT void railyard_emu_graph_free(struct railyard_emu_graph *graph)
{
    for (struct batch *b = graph ? graph->first : NULL, *next; b; b = next) {
        next = b->next;
        free(b);
    }
    free(graph);
}

/* One graph at a time: `ops` of other streams stay. */
static int capture_into(struct railyard_emu_graph *g, struct ry_emu_op *ops, int nops)
{
    int kept = 0;
    struct batch *b = calloc(1, sizeof *b + (size_t)nops * sizeof *b->ops);
    if (!b)
        abort();
    for (int i = 0; i < nops; i++) {
        if (ops[i].stream == g->stream)
            b->ops[b->nops++] = ops[i];
        else
            ops[kept++] = ops[i];
    }
    if (b->nops) {
        *g->end = b;
        g->end = &b->next;
    } else {
        free(b);
    }
    return kept;
}

int ry_emu_capture(struct ry_emu_op *ops, int nops)
{
    pthread_mutex_lock(&lock);
    for (struct railyard_emu_graph *g = growing; g && nops; g = g->next)
        nops = capture_into(g, ops, nops);
    pthread_mutex_unlock(&lock);
    return nops;
}
