/*
 * xml.h: the little that the XML readers of topo/ share (libxml2 documents).
 *
 * Owns: turning a document into the text of hwloc XML that the hwloc we run with can load.
 */
#ifndef RY_TOPO_XML_H
#define RY_TOPO_XML_H

#include <libxml/tree.h>

#include "base/error.h"

/** Make an hwloc 3 document loadable by hwloc 2, in place. -1 with `err` when it is no such document. */
int ry_topo_hwloc3_to_2(xmlDoc *doc, struct ry_err *err);

/** A new hwloc 2 document from an NCCL topology; NULL with `err` naming what is wrong (without the file's name). */
xmlDoc *ry_topo_nccl_to_hwloc(const xmlDoc *nccl, struct ry_err *err);

static inline int ry_xml_is(const xmlNode *node, const char *name)
{
    return node->type == XML_ELEMENT_NODE && !xmlStrcmp(node->name, BAD_CAST name);
}

#endif
