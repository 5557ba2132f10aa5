/* internal.h: what the files of live placement share. */
#ifndef RY_LIVE_INTERNAL_H
#define RY_LIVE_INTERNAL_H

#include "base/error.h"

/* What railyard_live_error() returns. */
extern _Thread_local struct ry_err ry_live_err;

#endif
