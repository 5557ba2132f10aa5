/*
 * tame.h: UCX as a guest in somebody else's process.
 *
 * Owns: that UCX, where it is there only on our behalf, leaves no signal handlers and prints nothing, and the settings
 * with which our own context uses neither device memory nor memory hooks. Nothing is done to the environment; what the
 * user set in UCX_* stays; a UCX that the job itself has brought along keeps its handlers and its log.
 */
#ifndef RY_CONTROL_TAME_H
#define RY_CONTROL_TAME_H

#include <ucp/api/ucp.h>

/** Call before ucp_init() with the configuration for it. */
void ry_tame_ucx(ucp_config_t *config);

#endif
