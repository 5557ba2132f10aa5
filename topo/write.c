/* write.c: the formats by name, and hwloc's XML. The others have a file each: write_text.c, write_json.c, write_svg.c. */
#include "topo_internal.h"

#include <errno.h>
#include <string.h>

static const char *const names[] = {
    [RY_TOPO_TEXT] = "text", [RY_TOPO_JSON] = "json", [RY_TOPO_XML] = "xml", [RY_TOPO_SVG] = "svg"};

int ry_topo_format_parse(const char *name, enum ry_topo_format *out, struct ry_err *err)
{
    for (int i = 0; i < 4; i++)
        if (!strcmp(name, names[i]))
            return *out = (enum ry_topo_format)i, 0;
    return ry_fail(err, "unknown format '%s': known are text, json, xml and svg", name);
}

static int write_xml(const struct ry_topo *t, FILE *f, struct ry_err *err)
{
    char *text;
    int len;
    if (hwloc_topology_export_xmlbuffer(t->hw, &text, &len, 0))
        return ry_fail(err, "hwloc cannot export the topology of %s", t->source);
    fwrite(text, 1, len > 0 ? (size_t)len - 1 : 0, f); /* the length counts the final NUL */
    hwloc_free_xmlbuffer(t->hw, text);
    return 0;
}

int ry_topo_write(const struct ry_topo *t, enum ry_topo_format format, FILE *f, struct ry_err *err)
{
    static int (*const writers[])(const struct ry_topo *, FILE *, struct ry_err *) = {
        [RY_TOPO_TEXT] = ry_topo_write_text,
        [RY_TOPO_JSON] = ry_topo_write_json,
        [RY_TOPO_XML] = write_xml,
        [RY_TOPO_SVG] = ry_topo_write_svg};
    if (writers[format](t, f, err))
        return -1;
    errno = 0;
    if (fflush(f) || ferror(f))
        return ry_fail(err, "cannot write the topology: %s", errno ? strerror(errno) : "write error");
    return 0;
}
