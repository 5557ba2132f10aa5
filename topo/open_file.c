/*
 * open_file.c: opens a saved topology.
 *
 * Owns: reading the file, telling its format by the root element, saying clearly what is wrong with it, and loading the
 * result into hwloc. Not: NCCL's format (nccl_xml.c), hwloc 3's (hwloc3.c), nor what it means (devices.c).
 *
 * Whatever the format, hwloc gets a clean document that libxml2 wrote: no comments, no encodings, no entities.
 */
#include "topo_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <libxml/parser.h>
#include <libxml/xmlerror.h>

#include "xml.h"

#define MAX_FILE (64 << 20) /* the largest machines take a few MB */

static char *read_all(const char *path, size_t *len, struct ry_err *err)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return ry_fail(err, "cannot read %s: %s", path, strerror(errno)), NULL;
    char *buf = NULL;
    size_t n = 0, room = 0;
    if (fstat(fd, &st)) {
        ry_fail(err, "cannot read %s: %s", path, strerror(errno));
        goto fail;
    }
    if (S_ISDIR(st.st_mode)) {
        ry_fail(err, "%s is a folder: name a topology file in it", path);
        goto fail;
    }
    for (;;) { /* until the end: pipes and /proc files do not tell their size */
        if (n == room) {
            char *p = n >= MAX_FILE ? NULL : realloc(buf, room += room ? room : 65536);
            if (!p) {
                ry_fail(err, "%s is larger than %d MB: no topology file is", path, MAX_FILE >> 20);
                goto fail;
            }
            buf = p;
        }
        ssize_t got = read(fd, buf + n, room - n);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            ry_fail(err, "cannot read %s: %s", path, strerror(errno));
            goto fail;
        }
        if (!got)
            break;
        n += (size_t)got;
    }
    if (!n) {
        ry_fail(err, "%s is empty: expected hwloc XML or NCCL topology XML", path);
        goto fail;
    }
    close(fd);
    *len = n;
    return buf;
fail:
    free(buf);
    close(fd);
    return NULL;
}

static xmlDoc *parse(const char *path, const char *text, size_t len, struct ry_err *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, xmlInitParser);
    xmlParserCtxt *ctxt = xmlNewParserCtxt();
    if (!ctxt)
        return ry_fail(err, "%s: no memory", path), NULL;
    xmlDoc *doc = xmlCtxtReadMemory(ctxt, text, (int)len, NULL, NULL,
                                    XML_PARSE_NONET | XML_PARSE_NOERROR | XML_PARSE_NOWARNING | XML_PARSE_NOBLANKS);
    if (!doc) {
        const xmlError *e = xmlCtxtGetLastError(ctxt);
        char why[160];
        snprintf(why, sizeof why, "%s", e && e->message ? e->message : "not XML");
        why[strcspn(why, "\n")] = 0;
        ry_fail(err, "%s is no readable XML (line %d: %s): is it complete?", path, e ? e->line : 0, why);
    }
    xmlFreeParserCtxt(ctxt);
    return doc;
}

/* Only elements and text remain; hwloc's own small parser knows nothing else. */
static void strip(xmlNode *node)
{
    for (xmlNode *c = node->children, *next; c; c = next) {
        next = c->next;
        if (c->type == XML_ELEMENT_NODE) {
            strip(c);
        } else if (c->type != XML_TEXT_NODE) {
            xmlUnlinkNode(c);
            xmlFreeNode(c);
        }
    }
}

/* hwloc's version of an hwloc document: 1 when it does not say, -1 when that is no number. */
static int hwloc_major(xmlNode *root)
{
    xmlChar *v = xmlGetProp(root, BAD_CAST "version");
    char *end = NULL;
    long major = v ? strtol((const char *)v, &end, 10) : 1;
    if (v && (end == (const char *)v || (*end && *end != '.') || major < 0 || major > 1000))
        major = -1;
    xmlFree(v);
    return (int)major;
}

/* A document that hwloc can load, from any that we can read: `doc` itself or a new one. NULL with `err`. */
static xmlDoc *as_hwloc(xmlDoc *doc, const char *path, struct ry_err *err)
{
    xmlNode *root = xmlDocGetRootElement(doc);
    struct ry_err why = {""};
    if (!root)
        return ry_fail(err, "%s holds no XML element", path), NULL;
    strip(root);
    if (ry_xml_is(root, "system")) {
        xmlDoc *out = ry_topo_nccl_to_hwloc(doc, &why);
        if (!out)
            ry_fail(err, "%s, an NCCL topology, %s", path, why.msg);
        return out;
    }
    if (!ry_xml_is(root, "topology"))
        return ry_fail(err, "%s is no topology: its root is <%.40s>, not <topology> (hwloc) or <system> (NCCL)", path,
                       (const char *)root->name),
               NULL;
    int major = hwloc_major(root), ours = (int)(hwloc_get_api_version() >> 16);
    if (major < 0 || major > 3)
        return ry_fail(err, "%s is hwloc XML of a version that Railyard does not know: write it again with "
                            "'lstopo --export-xml-flags v2 FILE.xml'", path),
               NULL;
    if (major == 3 && ours < 3 && ry_topo_hwloc3_to_2(doc, &why))
        return ry_fail(err, "%s, an hwloc topology, %s", path, why.msg), NULL;
    return doc;
}

static hwloc_topology_t load(xmlDoc *doc, const char *path, struct ry_err *err)
{
    xmlChar *text = NULL;
    int len = 0;
    hwloc_topology_t hw = NULL;
    /* hwloc's small parser skips exactly these two lines */
    if (!xmlGetIntSubset(doc))
        xmlCreateIntSubset(doc, BAD_CAST "topology", NULL, BAD_CAST "hwloc2.dtd");
    xmlDocDumpFormatMemoryEnc(doc, &text, &len, "UTF-8", 1);
    if (!text)
        return ry_fail(err, "%s: no memory", path), NULL;
    hw = ry_topo_hwloc_new(false, err);
    if (hw && (hwloc_topology_set_xmlbuffer(hw, (const char *)text, len + 1) || hwloc_topology_load(hw))) {
        hwloc_topology_destroy(hw);
        hw = NULL;
        ry_fail(err, "hwloc cannot load %s: the machine it describes does not add up (see it with 'lstopo -i FILE')", path);
    }
    xmlFree(text);
    return hw;
}

struct ry_topo *ry_topo_open_file(const char *path, struct ry_err *err)
{
    size_t len;
    hwloc_topology_t hw = NULL;
    char *text = read_all(path, &len, err);
    if (!text)
        return NULL;
    xmlDoc *doc = parse(path, text, len, err), *out = NULL;
    free(text);
    if (doc)
        out = as_hwloc(doc, path, err);
    if (out)
        hw = load(out, path, err);
    if (out && out != doc)
        xmlFreeDoc(out);
    xmlFreeDoc(doc);
    return hw ? ry_topo_from_hwloc(hw, path, err) : NULL;
}
