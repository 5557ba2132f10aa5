/* ways.c: see ways.h. */
#include "ways.h"

#include <string.h>

struct ry_trace_way *ry_ways_of(struct ry_trace_ways *ways, const char *name)
{
    if (!*name || strlen(name) >= sizeof ways->way[0].name)
        return NULL;
    for (int i = 0; i < ways->n; i++)
        if (!strcmp(ways->way[i].name, name))
            return &ways->way[i];
    if (ways->n == RY_TRACE_WAYS)
        return NULL;
    strcpy(ways->way[ways->n].name, name);
    return &ways->way[ways->n++];
}

static double share(uint64_t part, uint64_t of)
{
    return of ? (double)part / (double)of : 0;
}

double ry_way_repeated(const struct ry_trace_way *way)
{
    return way->distinct < way->rows ? 1 - share(way->distinct, way->rows) : 0;
}

double ry_way_padding(const struct ry_trace_way *way)
{
    return share(way->zero, way->rows);
}

double ry_way_left(const struct ry_trace_way *way)
{
    return way->to_bytes < way->from_bytes ? share(way->to_bytes, way->from_bytes) : 1;
}

uint64_t ry_way_saved(const struct ry_trace_way *way)
{
    uint64_t packed = way->packed_from > way->packed_to ? way->packed_from - way->packed_to : 0;
    return packed + (way->summed_from > way->summed_to ? way->summed_from - way->summed_to : 0);
}

uint64_t ry_way_could_save(const struct ry_trace_way *way)
{
    return (uint64_t)((1 - ry_way_left(way)) * (double)way->cross);
}
