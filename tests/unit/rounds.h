/* rounds.h: how often what is drawn at random is repeated. */
#ifndef RY_TESTS_ROUNDS_H
#define RY_TESTS_ROUNDS_H

/* A third of the rounds under sanitizers, which are for what a round does to memory; the plain build makes all of them.
 */
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define ROUNDS_OF(n) ((n) / 3)
#else
#define ROUNDS_OF(n) (n)
#endif

/* Of what chance brings about seldom: has all of it been tried so often? */
static inline int fewest(const int *tried, int n)
{
    int least = tried[0];
    for (int i = 1; i < n; i++)
        least = tried[i] < least ? tried[i] : least;
    return least;
}

#endif
