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
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include <libxml/parser.h>
#include <libxml/xmlerror.h>

#include "xml.h"

#define MAX_FILE (64 << 20) /* the largest machines take a few MB */
#define MAX_INDEX 65536     /* of hardware threads and NUMA nodes */
#define MAX_MATRIX 4096     /* objects in one distance matrix */

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

/* Both kinds of file are UTF-8. Told of other encodings libxml2 hands the text to iconv, some of which crash on what is not theirs
   (a damaged "UTF-8" is easily "UTF-7"). */
static bool other_encoding(const char *text, size_t len)
{
    const char *end = len > 5 && !strncmp(text, "<?xml", 5) ? memchr(text, '>', len) : NULL;
    const char *at = end ? memmem(text, (size_t)(end - text), "encoding", 8) : NULL;
    if (!at)
        return false;
    at += 8 + strspn(at + 8, " \t\r\n=\"'");
    return strncasecmp(at, "UTF-8", 5) && strncasecmp(at, "US-ASCII", 8) && strncasecmp(at, "ASCII", 5);
}

static xmlDoc *parse(const char *path, const char *text, size_t len, struct ry_err *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, xmlInitParser);
    if (other_encoding(text, len))
        return ry_fail(err, "%s is in another encoding than UTF-8: is it damaged?", path), NULL;
    xmlParserCtxt *ctxt = xmlNewParserCtxt();
    if (!ctxt)
        return ry_fail(err, "%s: no memory", path), NULL;
    xmlDoc *doc = xmlCtxtReadMemory(ctxt, text, (int)len, NULL, "UTF-8",
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

/* Only elements remain, and the text of matrices; hwloc's own small parser takes nothing else well. */
static void strip(xmlNode *node)
{
    bool numbers = ry_xml_is(node, "indexes") || ry_xml_is(node, "u64values");
    for (xmlNode *c = node->children, *next; c; c = next) {
        next = c->next;
        if (c->type == XML_ELEMENT_NODE) {
            strip(c);
        } else if (c->type != XML_TEXT_NODE || !numbers) {
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

/* What may be used of an object, where that is said: something of what it has. */
static bool allowed_of(const xmlNode *obj, const char *name, const char *of)
{
    xmlChar *text = xmlGetProp(obj, BAD_CAST name), *all = text ? xmlGetProp(obj, BAD_CAST of) : NULL;
    hwloc_bitmap_t allowed = text ? hwloc_bitmap_alloc() : NULL, set = all ? hwloc_bitmap_alloc() : NULL;
    bool good = !text || (allowed && set && !hwloc_bitmap_sscanf(allowed, (const char *)text) &&
                          !hwloc_bitmap_sscanf(set, (const char *)all) && hwloc_bitmap_last(allowed) < MAX_INDEX &&
                          hwloc_bitmap_intersects(allowed, set));
    hwloc_bitmap_free(allowed);
    hwloc_bitmap_free(set);
    xmlFree(all);
    xmlFree(text);
    return good;
}

/*
 * hwloc trusts its XML and crashes on objects without their sets. What is checked here is what it takes for granted:
 * every processor and memory object has its four sets, and they are sets of sane size, of which some is allowed; a thread and a NUMA node have an
 * index, and their own set holds just that; I/O and Misc objects have no sets and nothing but such objects below them.
 */
static int check_object(const xmlNode *obj, bool io, struct ry_err *err)
{
    static const char *const sets[] = {"cpuset", "complete_cpuset", "nodeset", "complete_nodeset"};
    static const char *const io_types[] = {"Bridge", "PCIDev", "OSDev", "Misc"};
    xmlChar *text = xmlGetProp(obj, BAD_CAST "type");
    char type[24] = "";
    hwloc_obj_type_t known;
    bool is_io = false;
    if (text)
        snprintf(type, sizeof type, "%s", (const char *)text);
    xmlFree(text);
    if (hwloc_type_sscanf(type, &known, NULL, 0))
        return ry_fail(err, "has an object of no known type '%s' (line %ld)", type, xmlGetLineNo(obj));
    for (size_t i = 0; i < sizeof io_types / sizeof *io_types; i++)
        is_io |= !strcmp(type, io_types[i]);
    long os_index = -1;
    text = xmlGetProp(obj, BAD_CAST "os_index");
    if (text && (sscanf((const char *)text, "%ld", &os_index) != 1 || os_index >= MAX_INDEX))
        os_index = -1;
    xmlFree(text);
    int own = known == HWLOC_OBJ_PU ? 0 : known == HWLOC_OBJ_NUMANODE ? 1 : -1; /* which pair of sets names itself */
    if (io && !is_io)
        return ry_fail(err, "has a %s inside of an I/O object (line %ld)", type, xmlGetLineNo(obj));
    for (size_t i = 0; i < 4; i++) {
        xmlChar *v = xmlGetProp(obj, BAD_CAST sets[i]);
        hwloc_bitmap_t set = v ? hwloc_bitmap_alloc() : NULL;
        bool there = v != NULL, good = set && !hwloc_bitmap_sscanf(set, (const char *)v);
        good = good && hwloc_bitmap_last(set) < MAX_INDEX;
        if (own == (int)(i / 2)) /* a thread's processor set, a NUMA node's node set: itself and no other */
            good = good && os_index >= 0 && hwloc_bitmap_weight(set) == 1 && hwloc_bitmap_first(set) == os_index;
        hwloc_bitmap_free(set);
        xmlFree(v);
        if (is_io ? there : !good)
            return ry_fail(err, is_io ? "has a %s with a %s (line %ld)" : "has a %s without a good %s (line %ld)", type,
                           sets[i], xmlGetLineNo(obj));
    }
    if (!allowed_of(obj, "allowed_cpuset", "cpuset") || !allowed_of(obj, "allowed_nodeset", "nodeset"))
        return ry_fail(err, "has a %s of which nothing is allowed to be used (line %ld)", type, xmlGetLineNo(obj));
    for (const xmlNode *c = obj->children; c; c = c->next)
        if (ry_xml_is(c, "object") && check_object(c, is_io, err))
            return -1;
    return 0;
}

static int check_hwloc(const xmlNode *top, struct ry_err *err)
{
    int objects = 0;
    for (const xmlNode *c = top->children; c; c = c->next) {
        if (ry_xml_is(c, "object") && (objects++, check_object(c, false, err)))
            return -1;
        xmlChar *v = xmlGetProp(c, BAD_CAST "nbobjs");
        long n = v ? strtol((const char *)v, NULL, 10) : 0;
        xmlFree(v);
        if (n < 0 || n > MAX_MATRIX)
            return ry_fail(err, "has a distance matrix of %ld objects (line %ld)", n, xmlGetLineNo(c));
    }
    return objects == 1 ? 0 : ry_fail(err, "has %d objects at its root, not one machine", objects);
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
    if (major == 0 || major == 1)
        return ry_fail(err, "%s is XML of hwloc 1: convert it with 'lstopo -i FILE --if xml NEW.xml'", path), NULL;
    if (major < 0 || major > 3)
        return ry_fail(err,
                       "%s is hwloc XML of a version that Railyard does not know: write it again with "
                       "'lstopo --export-xml-flags v2 FILE.xml'",
                       path),
               NULL;
    if (check_hwloc(root, &why))
        return ry_fail(err, "%s, an hwloc topology, %s", path, why.msg), NULL;
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
        ry_fail(err, "hwloc cannot load %s: the machine it describes does not add up (see it with 'lstopo -i FILE')",
                path);
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
