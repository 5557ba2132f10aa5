/*
 * locality.h: is there anything for a placement to use? Samples whose tokens choose experts as all others' do leave
 * nothing.
 *
 * Owns: the test. If each sample's tokens were dealt to it by chance, its count for an expert would scatter about its
 * share of that expert's load with the variance of a hypergeometric draw. The dispersion is the variance seen over that
 * variance, over all samples, layers and experts: 1 for chance, greater the more samples differ.
 */
#ifndef RY_PLACE_LOCALITY_H
#define RY_PLACE_LOCALITY_H

#include "place/routing.h"

/** The dispersion of samples [first, first + n); 1 where there is nothing to tell from (n < 2). */
double ry_locality(const struct ry_routing *routing, int first, int n);

/** Below this, routing is as good as chance: shuffled traces come to 1.0 to 1.1, real ones to 40 and more. */
#define RY_LOCALITY_LEAST 1.25

#endif
