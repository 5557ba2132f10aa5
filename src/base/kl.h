/*
 * kl.h: how far traffic between nodes is from staying where it is.
 *
 * Owns: the distance. LocMoE (arXiv 2401.13920) trains with KL(D_c || D_l), D_c being where tokens go now and D_l the
 * fully local distribution. Where D_l is 0 that is infinite; so here D_l leaves RY_LOCAL_SPREAD of each node's traffic
 * spread evenly over all nodes, and keeps the rest. Nodes weigh as much as they send.
 */
#ifndef RY_BASE_KL_H
#define RY_BASE_KL_H

#include <math.h>
#include <stdint.h>

#define RY_LOCAL_SPREAD 0.01

/** In nats, of matrix[from * n + to], n >= 1: nearly 0 where all stays, NAN where nothing was sent. */
static inline double ry_distance_to_local(const uint64_t *matrix, int n)
{
    double all = 0, sum = 0, away = RY_LOCAL_SPREAD / n, home = 1 - RY_LOCAL_SPREAD + away;
    for (int a = 0; a < n; a++) {
        double sent = 0;
        for (int b = 0; b < n; b++)
            sent += (double)matrix[(size_t)a * (size_t)n + (size_t)b];
        for (int b = 0; b < n; b++) {
            double m = (double)matrix[(size_t)a * (size_t)n + (size_t)b];
            if (m > 0)
                sum += m * log(m / sent / (a == b ? home : away));
        }
        all += sent;
    }
    return all > 0 ? sum / all : NAN;
}

/** The same where every node sends evenly to all. */
static inline double ry_distance_of_even(int n)
{
    double away = RY_LOCAL_SPREAD / n, home = 1 - RY_LOCAL_SPREAD + away;
    return (log(1.0 / n / home) + (n - 1) * log(1.0 / n / away)) / n;
}

#endif
