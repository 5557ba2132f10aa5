/* assign_internal.h: what the solvers' files share: the workspace. See assign.h. */
#ifndef RY_PLACE_ASSIGN_INTERNAL_H
#define RY_PLACE_ASSIGN_INTERNAL_H

#include "place/assign.h"

struct ry_assign {
    int max_samples, max_places, max_slots;
    void *memory; /* all arrays below lie in it */
    /* exact: the graph of places */
    int32_t *arc;         /* [places][places]: length a→b */
    int *mover;           /* [places][places]: the sample that makes it */
    bool *arcs_known;     /* [places]: a's arcs are up to date; they are found when first needed */
    int *first;           /* [places]: samples at a place, as a list */
    int *next, *before;   /* [samples] */
    int *load;            /* [places] */
    int32_t *potential;   /* [places] */
    int32_t *distance;    /* [places] */
    int32_t *key;         /* [places]: orders them for the search */
    int32_t *full;        /* [places]: 1 without room, else 0 */
    int *from;            /* [places]: before it on the path */
    int *settled, *stale; /* [places]: lists */
    /* simple solvers, moves, busiest */
    int *order, *spare;     /* [samples], [places] */
    int *trial;             /* [samples] */
    int32_t *priced;        /* [samples][places] */
    int32_t *total;         /* [groups][samples] */
    double *weight, *price; /* [groups][2 places] */
    int64_t *flow;          /* [groups][2 places] */
    /* Kuhn–Munkres */
    int32_t *square;        /* [slots][slots] */
    int64_t *u, *v, *slack; /* [slots + 1] */
    int *match, *way;       /* [slots + 1] */
    bool *used;             /* [slots + 1] */
};

int64_t ry_assign_exact(struct ry_assign *ws, const struct ry_assign_problem *p, int *place);
int64_t ry_assign_kuhn_munkres(struct ry_assign *ws, const struct ry_assign_problem *p, int *place);

#endif
