/* local.c: see local.h. */
#include "local.h"

#include <stdlib.h>
#include <string.h>

static int way_of(struct ry_trace_local *local, const char *name)
{
    if (strlen(name) >= sizeof local->way[0].name)
        return -1;
    for (int i = 0; i < local->nways; i++)
        if (!strcmp(local->way[i].name, name))
            return i;
    if (local->nways == RY_LOCAL_WAYS)
        return -1;
    strcpy(local->way[local->nways].name, name);
    return local->nways++;
}

static void pour(struct ry_local_bin *into, struct ry_local_bin *from, int nnodes)
{
    into->lines += from->lines;
    into->self += from->self;
    into->in_node += from->in_node;
    into->cross += from->cross;
    into->unknown += from->unknown;
    if (!into->nodes) {
        into->nodes = from->nodes;
    } else if (from->nodes) {
        for (int i = 0; i < nnodes * nnodes; i++)
            into->nodes[i] += from->nodes[i];
        free(from->nodes);
    }
    *from = (struct ry_local_bin){0};
}

static void widen(struct ry_trace_local *local, int nnodes)
{
    local->width *= 2;
    for (int w = 0; w < local->nways; w++)
        for (int i = 0; i < RY_LOCAL_BINS; i++) {
            struct ry_local_bin *bin = local->way[w].bin;
            if (i)
                pour(&bin[i / 2], &bin[i], nnodes);
        }
}

void ry_local_add(struct ry_trace_local *local, const char *way, uint64_t number, int rank, int nranks, const int *node,
                  int nnodes, const uint64_t *count, uint64_t type_bytes)
{
    int w = way_of(local, way);
    if (w < 0 || number >= UINT64_C(1) << 48) /* a damaged line */
        return;
    local->width = local->width ? local->width : 1;
    while (number / local->width >= RY_LOCAL_BINS)
        widen(local, nnodes);
    struct ry_local_bin *bin = &local->way[w].bin[number / local->width];
    bool known = nnodes > 0 && nnodes <= RY_LOCAL_NODES && node[rank] >= 0;
    if (known && !bin->nodes)
        bin->nodes = calloc((size_t)nnodes * (size_t)nnodes, sizeof *bin->nodes);
    bin->lines++;
    for (int r = 0; r < nranks; r++) {
        uint64_t bytes = count[r] * type_bytes;
        if (r == rank)
            bin->self += bytes;
        else if (node[r] < 0 || node[rank] < 0)
            bin->unknown += bytes;
        else if (node[r] == node[rank])
            bin->in_node += bytes;
        else
            bin->cross += bytes;
        if (known && bin->nodes && node[r] >= 0)
            bin->nodes[node[rank] * nnodes + node[r]] += bytes;
    }
}

void ry_local_free(struct ry_trace_local *local)
{
    for (int w = 0; w < local->nways; w++)
        for (int i = 0; i < RY_LOCAL_BINS; i++)
            free(local->way[w].bin[i].nodes);
    *local = (struct ry_trace_local){0};
}

bool ry_local_sum(const struct ry_trace_local *local, int way, int from, int to, int nnodes, struct ry_local_bin *sum)
{
    uint64_t *nodes = sum->nodes;
    bool any = false;
    *sum = (struct ry_local_bin){.nodes = nodes};
    if (nodes)
        memset(nodes, 0, (size_t)nnodes * (size_t)nnodes * sizeof *nodes);
    for (int i = from; i < to; i++) {
        const struct ry_local_bin *b = &local->way[way].bin[i];
        sum->lines += b->lines;
        sum->self += b->self;
        sum->in_node += b->in_node;
        sum->cross += b->cross;
        sum->unknown += b->unknown;
        for (int k = 0; nodes && b->nodes && k < nnodes * nnodes; k++)
            nodes[k] += b->nodes[k];
        any |= b->nodes != NULL;
    }
    return any;
}
