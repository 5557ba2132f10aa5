/*
 * real.h: the real NCCL behind the preload.
 *
 * Owns: finding libnccl.so.2, and the table of its functions. Not: what is done before and after calling them.
 *
 * PyTorch's wheels load libnccl.so.2 in a local scope, where dlsym(RTLD_NEXT) does not look; so, in this order:
 * RAILYARD_NCCL, RTLD_NEXT, the copy already loaded under its soname, the path in /proc/self/maps. pncclX is taken where it
 * exists: then another preload behind us, or NCCL's own use of its public names, is not entered twice.
 */
#ifndef RY_PLUGIN_REAL_H
#define RY_PLUGIN_REAL_H

#include <stdbool.h>

#include "nccl_abi.h"

struct ry_real {
#define F(name) __typeof__(&name) name;
    RY_NCCL_FUNCTIONS(F)
#undef F
    /* called, not intercepted */
    ncclResult_t (*ncclCommCount)(const ncclComm_t, int *);
    ncclResult_t (*ncclCommUserRank)(const ncclComm_t, int *);
    ncclResult_t (*ncclCommCuDevice)(const ncclComm_t, int *);
    ncclResult_t (*ncclGetVersion)(int *);
};

extern struct ry_real ry_real;
extern _Atomic bool ry_real_found;

/** Find NCCL and fill the table, once; thread-safe. False (after one line on stderr) when there is none to be found. */
bool ry_real_load(void);

/** A symbol of the real NCCL, or NULL. */
void *ry_real_find(const char *name);
const char *ry_real_path(void);

/** What a call returns whose function the real NCCL does not have: says so once, and is invalid usage. */
ncclResult_t ry_real_missing(const char *name);

#endif
