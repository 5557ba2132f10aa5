/* token_sets.c: the expert sets that tokens were sent to (anneal.h). */
#include <stdlib.h>
#include <string.h>

#include "place/anneal.h"

static int by_number(const void *a, const void *b)
{
    return *(const uint16_t *)a - *(const uint16_t *)b;
}

static int by_set(const void *a, const void *b, void *topk)
{
    const uint16_t *x = a, *y = b;
    for (int k = 0; k < *(int *)topk; k++)
        if (x[k] != y[k])
            return x[k] - y[k];
    return 0;
}

int ry_token_sets_make(struct ry_token_sets *sets, const struct ry_routing *r, const int *which, int n)
{
    size_t k = (size_t)r->topk, tokens = (size_t)r->tokens_per_sample;
    size_t most = (size_t)n * (size_t)r->layers * tokens, count = 0;
    *sets = (struct ry_token_sets){.topk = r->topk};
    char *room = most > INT32_MAX ? NULL : malloc(most * (3 * sizeof(int) + k * sizeof(uint16_t)) + 1);
    if (!room)
        return -1;
    int *sample = (int *)room, *layer = sample + most, *weight = layer + most;
    uint16_t *experts = (uint16_t *)(weight + most);
    for (int i = 0; i < n; i++) {
        for (int l = 0; l < r->layers; l++) {
            uint16_t *block = experts + count * k; /* filled behind what is kept so far, then merged in place */
            for (size_t t = 0; t < tokens; t++) {
                for (int j = 0; j < r->topk; j++)
                    block[t * k + (size_t)j] = (uint16_t)ry_choice(r, which[i], l, (int)t, j);
                qsort(block + t * k, k, sizeof *block, by_number);
            }
            qsort_r(block, tokens, k * sizeof *block, by_set, &sets->topk);
            for (size_t t = 0; t < tokens; t++) {
                if (t && !by_set(experts + (count - 1) * k, block + t * k, &sets->topk)) {
                    weight[count - 1]++;
                    continue;
                }
                memmove(experts + count * k, block + t * k, k * sizeof *block);
                sample[count] = i;
                layer[count] = l;
                weight[count++] = 1;
            }
        }
    }
    sets->count = (int)count;
    sets->experts = experts;
    sets->sample = sample;
    sets->layer = layer;
    sets->weight = weight;
    sets->owned = room;
    return 0;
}

void ry_token_sets_free(struct ry_token_sets *sets)
{
    free(sets->owned);
    *sets = (struct ry_token_sets){0};
}
