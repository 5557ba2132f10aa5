/* policy.c: see policy.h. */
#include "policy.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"

#define MARGIN 0.05       /* a strategy must promise as much over direct */
#define DIRECT_IN_ROW 64  /* engaged exchanges without a better strategy than direct, after which it is not worth agreeing */
#define RECENT 64         /* choices remembered until their duration is known */

struct ry_chooser {
    struct ry_policy_config config;
    char name[24];
    struct ry_cost_learned learned;
    struct ry_chooser_counts counts;
    int direct_in_row;
    uint64_t engaged; /* exchanges decided, for verify */
    struct {
        uint64_t number, busiest;
        enum ry_strategy strategy;
        double us; /* the model's own estimate, uncorrected */
    } recent[RECENT];
    /* of the exchange being decided */
    struct ry_load *loads;    /* [nranks] */
    uint64_t *relayed, *need; /* [nranks] bytes; need: of staging */
    struct ry_slice *slices[RY_STRATEGIES]; /* [nranks] each, laid out at the strategy's first use; none for direct */
    char *order;                            /* what one rank is told */
    size_t order_size;
};

static bool get_loads(struct ry_chooser *c, const void *const *extra, const size_t *bytes, uint64_t *staging)
{
    for (int r = 0; r < c->config.map->nranks; r++) {
        struct ry_side side;
        if (bytes[r] != sizeof side)
            return false;
        memcpy(&side, extra[r], sizeof side);
        c->loads[r] = side.load;
        if (staging)
            staging[r] = side.staging;
    }
    return true;
}

/* What each rank passes on for others, from the matrix. */
static void find_relayed(struct ry_chooser *c, const uint64_t *matrix)
{
    const struct ry_cluster *map = c->config.map;
    int n = map->nranks;
    memset(c->relayed, 0, (size_t)n * sizeof *c->relayed);
    for (int from = 0; from < n; from++)
        for (int to = 0; to < n; to++)
            if (map->node[from] != map->node[to])
                c->relayed[ry_relay(map, from, map->node[to])] += matrix[(size_t)from * (size_t)n + (size_t)to];
}

/* Everything that telling the ranks will need: once a verdict is being sent nothing may fail. */
static bool prepare(struct ry_chooser *c, enum ry_strategy strategy)
{
    for (int r = 0; strategy != RY_DIRECT && r < c->config.map->nranks; r++) {
        struct ry_slice *s = &c->slices[strategy][r];
        if (!s->rows && ry_slice_init(s, c->config.map, r, strategy, NULL))
            return false;
        size_t bytes = sizeof(struct ry_order) + (size_t)s->nrows * (size_t)s->ncols * sizeof *s->cells;
        if (bytes <= c->order_size)
            continue;
        char *p = realloc(c->order, bytes);
        if (!p)
            return false;
        c->order = p;
        c->order_size = bytes;
    }
    return true;
}

/* ---- what the agreement asks ---- */

static bool worth(void *context, uint64_t number, const void *const *seen, const size_t *bytes)
{
    struct ry_chooser *c = context;
    (void)number;
    if (c->config.forced >= 0)
        return true; /* direct, too: that is how the agreement's own price is measured */
    if (!get_loads(c, seen, bytes, NULL))
        return false;
    struct ry_choice choice;
    ry_cost_choose(&choice, &c->config.model, &c->learned, c->config.map, c->loads, NULL, MARGIN);
    return choice.strategy != RY_DIRECT;
}

static int choose(void *context, const struct ry_agreed *x, bool *verify, bool *last)
{
    struct ry_chooser *c = context;
    struct ry_choice choice = {.strategy = RY_DIRECT};
    uint64_t *held = c->need;
    if (!get_loads(c, x->extra, x->extra_bytes, held)) {
        *last = true;
        return RY_DIRECT;
    }
    find_relayed(c, x->matrix);
    ry_cost_choose(&choice, &c->config.model, &c->learned, c->config.map, c->loads, c->relayed, MARGIN);
    if (c->config.forced >= 0) {
        snprintf(choice.why, sizeof choice.why, "forced by RAILYARD_STRATEGY");
        choice.strategy = (enum ry_strategy)c->config.forced;
    }
    bool enough = true;
    for (int r = 0; r < x->nranks; r++) {
        uint64_t need = choice.strategy == RY_DIRECT ? 0 : ry_plan_stage_bytes(c->config.map, r, choice.strategy, x->matrix);
        enough &= need <= held[r];
        c->need[r] = need > held[r] ? need : 0;
    }
    if (enough && !prepare(c, choice.strategy)) {
        snprintf(choice.why, sizeof choice.why, "out of memory for the verdict");
        choice.strategy = RY_DIRECT;
    }
    if (!enough) {
        snprintf(choice.why, sizeof choice.why, "%s, once the ranks hold enough staging memory",
                 ry_strategy_name(choice.strategy));
        c->counts.short_of_staging++;
        for (int r = 0; r < x->nranks; r++)
            if (c->need[r] > c->config.staging_limit)
                snprintf(choice.why, sizeof choice.why, "rank %d would need %" PRIu64 " bytes of staging: over RAILYARD_STAGING",
                         r, c->need[r]);
        choice.strategy = RY_DIRECT;
    }
    c->recent[x->number % RECENT].number = x->number;
    c->recent[x->number % RECENT].busiest = ry_cost_busiest(c->config.map, c->loads);
    c->recent[x->number % RECENT].strategy = choice.strategy;
    c->recent[x->number % RECENT].us =
        ry_cost_estimate(&c->config.model, c->config.map, c->loads, c->relayed, choice.strategy);
    c->counts.chosen[choice.strategy]++;
    c->direct_in_row = choice.strategy == RY_DIRECT ? c->direct_in_row + 1 : 0;
    *last = c->config.forced < 0 && c->direct_in_row >= DIRECT_IN_ROW;
    if (*last)
        c->direct_in_row = 0;
    *verify = choice.strategy != RY_DIRECT && c->config.verify && c->engaged++ % c->config.verify == 0;
    ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": %s (%s)%s%s", c->name, x->number,
           ry_strategy_name(choice.strategy), choice.why, *verify ? ", verified" : "",
           *last ? "; not worth agreeing any more" : "");
    return (int)choice.strategy;
}

static const void *slice(void *context, const struct ry_agreed *x, int strategy, int rank, size_t *size)
{
    struct ry_chooser *c = context;
    const struct ry_slice *s = &c->slices[strategy][rank];
    struct ry_order order = {.staging_wanted = c->need[rank]};
    size_t cells = (size_t)s->nrows * (size_t)s->ncols;
    *size = 0;
    if (strategy == RY_DIRECT && !order.staging_wanted)
        return NULL;
    memcpy(c->order, &order, sizeof order);
    uint64_t *cell = (uint64_t *)(c->order + sizeof order);
    for (int i = 0; i < s->nrows; i++)
        for (int j = 0; j < s->ncols; j++)
            *cell++ = x->matrix[(size_t)s->rows[i] * (size_t)x->nranks + (size_t)s->cols[j]];
    *size = sizeof order + cells * sizeof *cell;
    return c->order;
}

/* ---- coming and going ---- */

struct ry_chooser *ry_chooser_new(const struct ry_policy_config *config, struct ry_err *err)
{
    struct ry_chooser *c = calloc(1, sizeof *c);
    size_t n = (size_t)config->map->nranks;
    if (c) {
        c->config = *config;
        snprintf(c->name, sizeof c->name, "%s", config->name);
        for (int i = 0; i < RECENT; i++)
            c->recent[i].number = UINT64_MAX;
    }
    if (!c || !(c->loads = calloc(n, sizeof *c->loads)) || !(c->relayed = calloc(n, sizeof *c->relayed)) ||
        !(c->need = calloc(n, sizeof *c->need)) || !(c->order = malloc(c->order_size = sizeof(struct ry_order)))) {
        goto no_memory;
    }
    for (int i = 0; i < RY_STRATEGIES; i++)
        if (!(c->slices[i] = calloc(n, sizeof *c->slices[i])))
            goto no_memory;
    return c;
no_memory:
    ry_fail(err, "out of memory for the choices of %d ranks", config->map->nranks);
    ry_chooser_free(c);
    return NULL;
}

void ry_chooser_free(struct ry_chooser *c)
{
    if (!c)
        return;
    for (int i = 0; i < RY_STRATEGIES; i++) {
        for (int r = 0; c->slices[i] && r < c->config.map->nranks; r++)
            ry_slice_free(&c->slices[i][r]);
        free(c->slices[i]);
    }
    free(c->loads);
    free(c->relayed);
    free(c->need);
    free(c->order);
    free(c);
}

struct ry_policy ry_chooser_policy(struct ry_chooser *c)
{
    return (struct ry_policy){.context = c, .worth = worth, .choose = choose, .slice = slice};
}

void ry_chooser_measured(struct ry_chooser *c, uint64_t number, double us)
{
    size_t i = number % RECENT;
    if (c->recent[i].number == number)
        ry_cost_learn(&c->learned, c->recent[i].strategy, c->recent[i].busiest, c->recent[i].us, us);
}

void ry_chooser_counts(const struct ry_chooser *c, struct ry_chooser_counts *out)
{
    *out = c->counts;
}
