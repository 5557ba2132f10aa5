/* locality.c: see locality.h. */
#include "place/locality.h"

double ry_locality(const struct ry_routing *r, int first, int n)
{
    double seen = 0, chance = 0;
    for (int l = 0; l < r->layers && n > 1; l++) {
        double all = 0;
        for (int s = first; s < first + n; s++)
            for (int e = 0; e < r->experts; e++)
                all += ry_counts_at(r, s, l)[e];
        for (int e = 0; e < r->experts && all > 0; e++) {
            double load = 0;
            for (int s = first; s < first + n; s++)
                load += ry_counts_at(r, s, l)[e];
            double share = load / all;
            for (int s = first; s < first + n; s++) {
                const uint16_t *c = ry_counts_at(r, s, l);
                double copies = 0;
                for (int k = 0; k < r->experts; k++)
                    copies += c[k];
                double off = c[e] - copies * share;
                seen += off * off;
                chance += copies * share * (1 - share) * (1 - copies / all);
            }
        }
    }
    return chance > 0 ? seen / chance : 1;
}
