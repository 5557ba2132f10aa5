/*
 * emulate.h: Railyard's kernels, from their own source, on the host.
 */
#ifndef RY_TESTS_EMULATE_H
#define RY_TESTS_EMULATE_H

#ifdef __cplusplus
extern "C" {
#endif

/** The kernel `name`, to be run with its one parameter; NULL if there is none. */
void (*emulated(const char *name))(unsigned grid, unsigned block, const void *param);

#ifdef __cplusplus
}
#endif
#endif
