/* wrap.c: the solvers for Python's ctypes, which sees only what is exported. */
#include <stddef.h>

#include "place/assign.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT void *wrap_new(int samples, int places, int slots);
EXPORT long long wrap_solve(void *ws, int solver, int samples, int places, const int32_t *cost, const int *capacity, int *place);

void *wrap_new(int samples, int places, int slots)
{
    return ry_assign_new(samples, places, slots, NULL);
}

long long wrap_solve(void *ws, int solver, int samples, int places, const int32_t *cost, const int *capacity, int *place)
{
    struct ry_assign_problem p = {samples, places, cost, capacity, 0};
    return ry_assign(ws, (enum ry_solver)solver, &p, place);
}
