/* write_svg.c: a topology as a picture. */
#include "topo_internal.h"

int ry_topo_write_svg(const struct ry_topo *t, FILE *f, struct ry_err *err)
{
    return ry_fail(err, "not yet");
}
