/* ridge.c: see ridge.h. Cholesky. */
#include "place/ridge.h"

#include <math.h>
#include <string.h>

void ry_ridge(const double *xx, const double *xy, size_t F, size_t O, double lambda, double *c, double *z, float *b)
{
    /* c cᵀ = xx + lambda; positive definite, as lambda > 0 */
    for (size_t i = 0; i < F; i++) {
        for (size_t j = 0; j <= i; j++) {
            double sum = xx[i * F + j] + (i == j ? lambda : 0);
            for (size_t k = 0; k < j; k++)
                sum -= c[i * F + k] * c[j * F + k];
            c[i * F + j] = i == j ? sqrt(sum) : sum / c[j * F + j];
        }
    }
    memcpy(z, xy, F * O * sizeof *z);
    for (size_t i = 0; i < F; i++) {
        for (size_t k = 0; k < i; k++)
            for (size_t e = 0; e < O; e++)
                z[i * O + e] -= c[i * F + k] * z[k * O + e];
        for (size_t e = 0; e < O; e++)
            z[i * O + e] /= c[i * F + i];
    }
    for (size_t i = F; i-- > 0;) {
        for (size_t k = i + 1; k < F; k++)
            for (size_t e = 0; e < O; e++)
                z[i * O + e] -= c[k * F + i] * z[k * O + e];
        for (size_t e = 0; e < O; e++)
            b[i * O + e] = (float)(z[i * O + e] /= c[i * F + i]);
    }
}
