/*
 * tame.h: UCX as a guest in somebody else's process.
 *
 * Owns: that UCX, where it is there only on our behalf, leaves no signal handlers and prints nothing, and the settings
 * with which our own context uses neither device memory nor memory hooks. Nothing is done to the environment; what the
 * user set in UCX_* stays; a UCX that the job itself has brought along keeps its handlers and its log. And opening it so. Not:
 * what is sent (peers.c; ucx/hub.c).
 */
#ifndef RY_CONTROL_TAME_H
#define RY_CONTROL_TAME_H

#include <ucp/api/ucp.h>

#include "base/error.h"

/** Call before ucp_init() with the configuration for it. */
void ry_tame_ucx(ucp_config_t *config);

/* UCX of our own; what is not there (yet) is 0. */
struct ry_own_ucx {
    ucp_context_h context;
    ucp_worker_h worker; /* used by one thread at a time, */
    int efd;             /* which can wait for this */
    ucp_address_t *address;
    size_t address_size;
};
/**
 * UCP_FEATURE_* `features` and wake-ups, tamed; `more`, if it is not NULL, changes the configuration after that. -1 with `err`, in which
 * `use` (" for data", "") says what for: *ucx holds what was made.
 */
int ry_own_ucx_open(struct ry_own_ucx *ucx, const char *name, uint64_t features, const char *use,
                void (*more)(ucp_config_t *config, void *arg), void *arg, struct ry_err *err);

#endif
