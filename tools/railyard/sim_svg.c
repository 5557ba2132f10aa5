#include "sim.h"
void sim_svg(const struct sim_study *s, FILE *f) {}
