/*
 * hwloc3.c: lets hwloc 2 load the XML that hwloc 3 writes, which it refuses by the version number alone.
 *
 * Owns: the differences between the two formats, as far as they lie in what Railyard reads: the type of OS devices (a bit
 * mask in version 3, one number in version 2), infos of the whole topology, and elements that version 2 does not know.
 */
#include "xml.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* hwloc 3's bits */
enum { V3_STORAGE = 1, V3_MEMORY = 2, V3_GPU = 4, V3_COPROC = 8, V3_NETWORK = 16, V3_OPENFABRICS = 32, V3_DMA = 64 };
/* hwloc 2's numbers */
enum { V2_BLOCK = 0, V2_GPU = 1, V2_NETWORK = 2, V2_OPENFABRICS = 3, V2_DMA = 4, V2_COPROC = 5 };

static int osdev_type(unsigned long v3, const char *name)
{
    if (v3 & V3_OPENFABRICS)
        return V2_OPENFABRICS;
    if (v3 & V3_NETWORK)
        return V2_NETWORK;
    if (v3 & (V3_STORAGE | V3_MEMORY))
        return V2_BLOCK;
    if (v3 & V3_DMA)
        return V2_DMA;
    /* Both bits are set for "nvml0" and "cuda0"; version 2 called the monitored device a GPU, the computing one not. */
    bool monitor = name && (!strncmp(name, "nvml", 4) || !strncmp(name, "rsmi", 4));
    return (v3 & V3_COPROC) && !monitor ? V2_COPROC : V2_GPU;
}

static void convert_object(xmlNode *obj)
{
    xmlChar *type = xmlGetProp(obj, BAD_CAST "osdev_type");
    if (type) {
        xmlChar *name = xmlGetProp(obj, BAD_CAST "name");
        char number[16];
        snprintf(number, sizeof number, "%d", osdev_type(strtoul((const char *)type, NULL, 0), (const char *)name));
        xmlSetProp(obj, BAD_CAST "osdev_type", BAD_CAST number);
        xmlFree(name);
        xmlFree(type);
    }
    xmlUnsetProp(obj, BAD_CAST "id"); /* "obj12": the number is gp_index */
    for (xmlNode *c = obj->children; c; c = c->next)
        if (ry_xml_is(c, "object"))
            convert_object(c);
}

int ry_topo_hwloc3_to_2(xmlDoc *doc, struct ry_err *err)
{
    static const char *const known[] = {"object", "distances2", "distances2hetero", "support", "memattr", "cpukind"};
    xmlNode *top = xmlDocGetRootElement(doc), *root = NULL;
    for (xmlNode *c = top->children; c && !root; c = c->next)
        root = ry_xml_is(c, "object") ? c : NULL;
    if (!root)
        return ry_fail(err, "has no <object>, so it describes no machine");
    xmlSetProp(top, BAD_CAST "version", BAD_CAST "2.0");
    convert_object(root);

    /* Infos stand before child objects in hwloc's own files, and its reader counts on it. */
    xmlNode *place = root->children;
    for (xmlNode *c = top->children, *next; c; c = next) {
        next = c->next;
        bool keep = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            keep |= ry_xml_is(c, known[i]);
        if (keep)
            continue;
        xmlUnlinkNode(c);
        if (ry_xml_is(c, "info") && place)
            xmlAddPrevSibling(place, c);
        else if (ry_xml_is(c, "info"))
            xmlAddChild(root, c);
        else
            xmlFreeNode(c); /* pci_locality, memory tiers, blanks */
    }
    return 0;
}
