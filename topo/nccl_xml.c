/*
 * nccl_xml.c: NCCL's topology XML (NCCL_TOPO_FILE, NCCL_TOPO_DUMP_FILE) as hwloc XML.
 *
 * Owns: what NCCL's elements mean. <cpu> becomes a package with one NUMA node and the processors of its affinity mask,
 * <pci> of a bridge class a bridge that stands for a whole switch, other <pci> a PCI device, <net> an OS device, and the
 * <nvlink>s together the matrix NVLinkBandwidth. Not: loading the result (open_file.c) or what follows from it (devices.c).
 *
 * A file for NCCL_TOPO_FILE may leave out what NCCL can complete on the machine itself (classes above all); what is
 * left out stays unknown here.
 */
#include "topo_internal.h"

#include <stdlib.h>
#include <string.h>

#include "xml.h"

#define MAX_CPUS 16384 /* processors of one machine; more are taken for a broken mask */
#define MAX_LINKS 16384
#define MAX_ENDS 1024 /* GPUs and switches with NVLinks; a rack has a hundred or so */

struct link {
    unsigned gpu; /* gp_index */
    char target[24];
    unsigned long tclass;
    int count, sm;
};

struct build {
    xmlNode *machine;
    unsigned gp; /* last gp_index given */
    struct link *links;
    int nlinks, room;
    /* PCI objects by address, to resolve the targets of NVLinks */
    struct pci {
        char busid[24];
        unsigned gp, home;
        xmlNode *node;
    } *pci;
    int npci, pci_room;
    int ngpu;          /* <gpu> elements */
    const char *wrong; /* out of memory and the like: ends the conversion */
};

/* --- attributes ---------------------------------------------------------------------------------------------------- */

static bool attr(const xmlNode *n, const char *name, char *out, size_t size)
{
    xmlChar *v = xmlGetProp(n, BAD_CAST name);
    out[0] = 0;
    if (v)
        snprintf(out, size, "%s", (const char *)v);
    xmlFree(v);
    return *out;
}

static unsigned long attr_hex(const xmlNode *n, const char *name)
{
    char t[32];
    return attr(n, name, t, sizeof t) ? strtoul(t, NULL, 16) : 0;
}

static long attr_int(const xmlNode *n, const char *name, long otherwise)
{
    char t[32], *end;
    if (!attr(n, name, t, sizeof t))
        return otherwise;
    long v = strtol(t, &end, 10);
    return end == t ? otherwise : v;
}

/* "0000:10:1c.0" in its parts; false for anything else. NCCL also writes "0000:10:1c" for an NVLink's end. */
static bool parse_busid(const char *t, unsigned out[4])
{
    char end;
    out[3] = 0;
    int n = sscanf(t, "%x:%x:%x.%x%c", &out[0], &out[1], &out[2], &out[3], &end);
    return (n == 4 || (n == 3 && !strchr(t, '.'))) && out[0] <= 0xffff && out[1] <= 0xff && out[2] <= 0x1f && out[3] <= 7;
}

/* --- building hwloc objects ---------------------------------------------------------------------------------------- */

__attribute__((format(printf, 3, 4))) static void set(xmlNode *n, const char *name, const char *fmt, ...)
{
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    xmlSetProp(n, BAD_CAST name, BAD_CAST text);
}

static xmlNode *object(struct build *b, xmlNode *parent, const char *type)
{
    xmlNode *n = xmlNewChild(parent, NULL, BAD_CAST "object", NULL);
    if (!n) {
        b->wrong = "is too large for the memory of this machine";
        return NULL;
    }
    set(n, "type", "%s", type);
    set(n, "gp_index", "%u", ++b->gp);
    return n;
}

static void info(xmlNode *obj, const char *name, const char *value)
{
    xmlNode *n = *value ? xmlNewChild(obj, NULL, BAD_CAST "info", NULL) : NULL;
    if (n) {
        xmlSetProp(n, BAD_CAST "name", BAD_CAST name);
        xmlSetProp(n, BAD_CAST "value", BAD_CAST value);
    }
}

static void sets(xmlNode *obj, const char *cpus, const char *nodes, bool allowed)
{
    static const char *const kind[] = {"cpuset", "complete_cpuset", "allowed_cpuset"};
    static const char *const node_kind[] = {"nodeset", "complete_nodeset", "allowed_nodeset"};
    for (int i = 0; i < (allowed ? 3 : 2); i++) {
        xmlSetProp(obj, BAD_CAST kind[i], BAD_CAST cpus);
        xmlSetProp(obj, BAD_CAST node_kind[i], BAD_CAST nodes);
    }
}

/* GB/s of a PCIe link from NCCL's "16 GT/s" (or "16.0 GT/s PCIe") and lanes. */
static double pci_speed(const xmlNode *n)
{
    char t[32];
    double gts = attr(n, "link_speed", t, sizeof t) ? strtod(t, NULL) : 0;
    long lanes = attr_int(n, "link_width", 0);
    if (gts <= 0 || gts > 1000 || lanes <= 0 || lanes > 64)
        return 0;
    return gts * (double)lanes / 8 * (gts < 8 ? 0.8 : 128.0 / 130);
}

/* One lane-summed NVLink in one direction, MB/s, by the GPU's generation; 1: there is a link, of unknown speed. */
static uint64_t link_mbs(int sm)
{
    if (sm >= 100)
        return 50000;
    if (sm == 86)
        return 14062;
    if (sm >= 70)
        return 25000;
    return sm >= 60 ? 20000 : 1;
}

/* --- the PCI tree -------------------------------------------------------------------------------------------------- */

static void remember_pci(struct build *b, const unsigned id[4], xmlNode *node, unsigned home)
{
    if (b->npci == b->pci_room) {
        int room = b->pci_room ? 2 * b->pci_room : 64;
        struct pci *p = realloc(b->pci, (size_t)room * sizeof *p);
        if (!p) {
            b->wrong = "is too large for the memory of this machine";
            return;
        }
        b->pci = p;
        b->pci_room = room;
    }
    struct pci *p = &b->pci[b->npci++];
    snprintf(p->busid, sizeof p->busid, "%04x:%02x:%02x.%x", id[0], id[1], id[2], id[3]);
    p->gp = b->gp;
    p->home = home;
    p->node = node;
}

static void add_links(struct build *b, const xmlNode *gpu, unsigned gp)
{
    for (const xmlNode *c = gpu->children; c; c = c->next) {
        if (!ry_xml_is(c, "nvlink"))
            continue;
        if (b->nlinks == MAX_LINKS) {
            b->wrong = "has more NVLinks than a machine can have";
            return;
        }
        if (b->nlinks == b->room) {
            int room = b->room ? 2 * b->room : 64;
            struct link *l = realloc(b->links, (size_t)room * sizeof *l);
            if (!l) {
                b->wrong = "is too large for the memory of this machine";
                return;
            }
            b->links = l;
            b->room = room;
        }
        struct link *l = &b->links[b->nlinks];
        unsigned id[4];
        char target[32];
        attr(c, "target", target, sizeof target);
        l->gpu = gp;
        l->tclass = attr_hex(c, "tclass") >> 8;
        l->count = (int)attr_int(c, "count", 1);
        l->sm = (int)attr_int(gpu, "sm", 0);
        if (parse_busid(target, id))
            snprintf(l->target, sizeof l->target, "%04x:%02x:%02x.%x", id[0], id[1], id[2], id[3]);
        else
            l->target[0] = 0; /* a switch that the virtual machine hides */
        if (l->count > 0 && l->count <= 1024)
            b->nlinks++;
    }
}

static void add_nets(struct build *b, const xmlNode *nic, xmlNode *parent)
{
    for (const xmlNode *c = nic->children; c; c = c->next) {
        if (!ry_xml_is(c, "net"))
            continue;
        char name[64], speed[32];
        xmlNode *os = object(b, parent, "OSDev");
        if (!os)
            return;
        if (attr(c, "name", name, sizeof name))
            set(os, "name", "%s", name);
        /* NCCL's own sockets transport is the only one whose nets have no guid */
        set(os, "osdev_type", "%d", attr_hex(c, "guid") ? 3 : 2);
        if (attr(c, "speed", speed, sizeof speed))
            info(os, "LinkSpeedMbps", speed);
    }
}

/* Devices and bridges of `from` under `parent`; `home` is the gp_index of the package. Widens *lo…*hi to their buses. */
static void add_pci(struct build *b, const xmlNode *from, xmlNode *parent, unsigned home, int depth, unsigned *domain,
                    unsigned *lo, unsigned *hi)
{
    for (const xmlNode *c = from->children; c && !b->wrong; c = c->next) {
        if (!ry_xml_is(c, "pci"))
            continue;
        char text[32];
        unsigned id[4];
        attr(c, "busid", text, sizeof text);
        if (!parse_busid(text, id)) {
            b->wrong = "has a <pci> whose busid is not like \"0000:3b:00.0\"";
            return;
        }
        unsigned long class = attr_hex(c, "class");
        bool children = false;
        const xmlNode *gpu = NULL, *nic = NULL;
        for (const xmlNode *k = c->children; k; k = k->next) {
            children |= ry_xml_is(k, "pci");
            gpu = ry_xml_is(k, "gpu") ? k : gpu;
            nic = ry_xml_is(k, "nic") ? k : nic;
        }
        if (!class && gpu)
            class = 0x030200;
        if (!class && nic)
            class = 0x020000;
        bool bridge = children || class >> 8 == 0x0604;
        xmlNode *o = object(b, parent, bridge ? "Bridge" : "PCIDev");
        if (!o)
            return;
        unsigned gp = b->gp;
        remember_pci(b, id, o, home);
        if (*lo > *hi)
            *domain = id[0];
        if (id[0] == *domain) {
            *lo = id[1] < *lo ? id[1] : *lo;
            *hi = id[1] > *hi ? id[1] : *hi;
        }
        set(o, "pci_busid", "%04x:%02x:%02x.%x", id[0], id[1], id[2], id[3]);
        set(o, "pci_type", "%04lx [%04lx:%04lx] [%04lx:%04lx] 00", class >> 8 & 0xffff, attr_hex(c, "vendor") & 0xffff,
            attr_hex(c, "device") & 0xffff, attr_hex(c, "subsystem_vendor") & 0xffff,
            attr_hex(c, "subsystem_device") & 0xffff);
        set(o, "pci_link_speed", "%f", pci_speed(c));
        if (bridge) {
            unsigned d = id[0], first = 1, last = 0;
            first = 0x100;
            set(o, "subtype", "PCISwitch");
            set(o, "bridge_type", "1-1");
            set(o, "depth", "%d", depth);
            add_pci(b, c, o, home, depth + 1, &d, &first, &last);
            if (first > last)
                first = last = id[1];
            set(o, "bridge_pci", "%04x:[%02x-%02x]", d, first, last);
        } else if (class >> 8 == 0x0680 && attr_hex(c, "vendor") == 0x10de) {
            set(o, "subtype", "NVSwitch");
        }
        if (gpu) {
            b->ngpu++;
            add_links(b, gpu, gp);
        }
        if (nic)
            add_nets(b, nic, o);
    }
}

/* --- processors ---------------------------------------------------------------------------------------------------- */

/* Each cpu's processors: its affinity mask where all of them make sense together, else one processor each. */
static hwloc_bitmap_t *processors(const xmlNode *system, int n, bool *known)
{
    hwloc_bitmap_t *set = calloc((size_t)n, sizeof *set), seen = hwloc_bitmap_alloc();
    bool good = set && seen;
    int i = 0;
    for (const xmlNode *c = system->children; c && set; c = c->next) {
        if (!ry_xml_is(c, "cpu"))
            continue;
        xmlChar *mask = xmlGetProp(c, BAD_CAST "affinity");
        set[i] = hwloc_bitmap_alloc();
        good = good && set[i] && mask && !hwloc_bitmap_sscanf(set[i], (const char *)mask) &&
               !hwloc_bitmap_iszero(set[i]) && hwloc_bitmap_last(set[i]) >= 0 && hwloc_bitmap_last(set[i]) < MAX_CPUS &&
               !hwloc_bitmap_intersects(set[i], seen);
        if (good)
            hwloc_bitmap_or(seen, seen, set[i]);
        xmlFree(mask);
        i++;
    }
    for (i = 0; set && i < n && !good; i++)
        if (set[i])
            hwloc_bitmap_only(set[i], (unsigned)i);
    hwloc_bitmap_free(seen);
    *known = good;
    return set;
}

static void add_cpu(struct build *b, const xmlNode *cpu, int numa, hwloc_bitmap_t cpus)
{
    char *cpu_text = NULL, *node_text = NULL, value[96];
    hwloc_bitmap_t node = hwloc_bitmap_alloc();
    xmlNode *package = object(b, b->machine, "Package");
    unsigned home = b->gp;
    if (node)
        hwloc_bitmap_only(node, (unsigned)numa);
    if (!package || !node || !cpus || hwloc_bitmap_asprintf(&cpu_text, cpus) < 0 ||
        hwloc_bitmap_asprintf(&node_text, node) < 0) {
        b->wrong = "is too large for the memory of this machine";
        goto out;
    }
    set(package, "os_index", "%d", numa);
    sets(package, cpu_text, node_text, false);
    static const char *const names[][2] = {
        {"vendor", "CPUVendor"}, {"familyid", "CPUFamilyNumber"}, {"modelid", "CPUModelNumber"}, {"arch", "Architecture"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (attr(cpu, names[i][0], value, sizeof value))
            info(package, names[i][1], value);
    xmlNode *mem = object(b, package, "NUMANode");
    if (mem) {
        set(mem, "os_index", "%d", numa);
        sets(mem, cpu_text, node_text, false);
    }
    int pu;
    hwloc_bitmap_foreach_begin(pu, cpus)
        xmlNode *n = b->wrong ? NULL : object(b, package, "PU");
        if (n) {
            char one[32 + MAX_CPUS / 32 * 11];
            hwloc_bitmap_t only = hwloc_bitmap_alloc();
            if (only) {
                hwloc_bitmap_only(only, (unsigned)pu);
                hwloc_bitmap_snprintf(one, sizeof one, only);
                set(n, "os_index", "%d", pu);
                sets(n, one, node_text, false);
            }
            hwloc_bitmap_free(only);
        }
    hwloc_bitmap_foreach_end();

    /* NCCL does not know host bridges; one for each processor says all there is to say. */
    bool any = false;
    for (const xmlNode *c = cpu->children; c; c = c->next)
        any |= ry_xml_is(c, "pci");
    if (any && !b->wrong) {
        unsigned domain = 0, lo = 0x100, hi = 0;
        xmlNode *host = object(b, package, "Bridge");
        if (host) {
            set(host, "bridge_type", "0-1");
            set(host, "depth", "0");
            add_pci(b, cpu, host, home, 1, &domain, &lo, &hi);
            set(host, "bridge_pci", "%04x:[%02x-%02x]", domain, lo <= hi ? lo : 0, hi);
        }
    }
    for (const xmlNode *c = cpu->children; c && !b->wrong; c = c->next)
        if (ry_xml_is(c, "nic")) /* not on PCI: a socket interface */
            add_nets(b, c, package);
out:
    free(cpu_text);
    free(node_text);
    hwloc_bitmap_free(node);
}

/* --- NVLinks ------------------------------------------------------------------------------------------------------- */

struct end {
    unsigned gp;
    const char *type;
};

static int end_of(struct end *e, int *n, unsigned gp, const char *type)
{
    for (int i = 0; i < *n; i++)
        if (e[i].gp == gp)
            return i;
    e[*n] = (struct end){gp, type};
    return (*n)++;
}

static struct pci *find_pci(struct build *b, const char *busid)
{
    for (int i = 0; i < b->npci; i++)
        if (!strcmp(b->pci[i].busid, busid))
            return &b->pci[i];
    return NULL;
}

/* The object at the far end, made as a Misc object where it is a switch that is not in the tree; -1 to leave it out. */
static int far_end(struct build *b, struct end *e, int *n, const struct link *l)
{
    struct pci *p = *l->target ? find_pci(b, l->target) : NULL;
    bool other = l->tclass && l->tclass >> 8 != 0x03; /* no GPU */
    if (p && !other)
        return p->gp == l->gpu ? -1 : end_of(e, n, p->gp, "PCIDev");
    if (l->tclass == 0x0680 && p && xmlHasProp(p->node, BAD_CAST "subtype"))
        return end_of(e, n, p->gp, "PCIDev");
    for (int i = 0; other && l->tclass != 0x0680 && i < b->npci; i++)
        if (b->pci[i].gp == l->gpu)
            return end_of(e, n, b->pci[i].home, "Package"); /* a POWER processor's bridge */
    if (!other && *l->target)
        return -1; /* a GPU that the file does not hold */
    char name[48];
    snprintf(name, sizeof name, "NVSwitch%s%s", *l->target ? " " : "", l->target);
    for (xmlNode *c = b->machine->children; c; c = c->next) {
        xmlChar *had = xmlGetProp(c, BAD_CAST "name"), *gp = xmlGetProp(c, BAD_CAST "gp_index");
        bool same = had && gp && !strcmp((const char *)had, name);
        unsigned index = gp ? (unsigned)strtoul((const char *)gp, NULL, 10) : 0;
        xmlFree(had);
        xmlFree(gp);
        if (same)
            return end_of(e, n, index, "Misc");
    }
    xmlNode *misc = object(b, b->machine, "Misc");
    if (!misc)
        return -1;
    set(misc, "name", "%s", name);
    set(misc, "subtype", "NVSwitch");
    return end_of(e, n, b->gp, "Misc");
}

static void numbers(xmlNode *parent, const char *tag, xmlBuffer *text)
{
    xmlNode *n = xmlNewTextChild(parent, NULL, BAD_CAST tag, xmlBufferContent(text));
    if (n)
        set(n, "length", "%d", xmlBufferLength(text));
    xmlBufferEmpty(text);
}

static void add_matrix(struct build *b, xmlNode *top)
{
    if (!b->nlinks)
        return;
    struct end *e = calloc(2 * (size_t)b->nlinks, sizeof *e);
    int *from = calloc((size_t)b->nlinks, sizeof *from), *to = calloc((size_t)b->nlinks, sizeof *to), n = 0;
    uint64_t *m = NULL;
    xmlBuffer *text = xmlBufferCreate();
    if (!e || !from || !to || !text)
        goto no_memory;
    for (int i = 0; i < b->nlinks; i++)
        from[i] = end_of(e, &n, b->links[i].gpu, "PCIDev");
    int gpus = n;
    for (int i = 0; i < b->nlinks && n <= MAX_ENDS; i++)
        to[i] = far_end(b, e, &n, &b->links[i]);
    if (n > MAX_ENDS) {
        b->wrong = "has NVLinks to more devices than a machine can have";
        goto out;
    }
    if (n < 2)
        goto out;
    if (!(m = calloc((size_t)n * (size_t)n, sizeof *m)))
        goto no_memory;
    for (int i = 0; i < b->nlinks; i++) {
        uint64_t mbs = (uint64_t)b->links[i].count * link_mbs(b->links[i].sm);
        if (to[i] < 0)
            continue;
        if (link_mbs(b->links[i].sm) < RY_LINK_UNKNOWN)
            mbs = 1;
        m[from[i] * n + to[i]] += mbs;
        if (to[i] >= gpus) /* the other end does not list its links */
            m[to[i] * n + from[i]] += mbs;
    }
    for (int i = 0; i < n; i++)
        m[i * n + i] = 1000000;

    xmlNode *d = xmlNewChild(top, NULL, BAD_CAST "distances2hetero", NULL);
    if (!d)
        goto no_memory;
    bool mixed = false;
    for (int i = 0; i < n; i++)
        mixed |= strcmp(e[i].type, "PCIDev") != 0;
    if (!mixed) {
        xmlNodeSetName(d, BAD_CAST "distances2");
        set(d, "type", "PCIDev");
        set(d, "indexing", "gp");
    }
    set(d, "nbobjs", "%d", n);
    set(d, "kind", "%lu",
        (unsigned long)(HWLOC_DISTANCES_KIND_FROM_OS | HWLOC_DISTANCES_KIND_MEANS_BANDWIDTH |
                        (mixed ? HWLOC_DISTANCES_KIND_HETEROGENEOUS_TYPES : 0)));
    set(d, "name", "NVLinkBandwidth");
    char one[64];
    for (int i = 0; i < n; i++) {
        snprintf(one, sizeof one, mixed ? "%s:%u " : "%.0s%u ", e[i].type, e[i].gp);
        xmlBufferCat(text, BAD_CAST one);
    }
    numbers(d, "indexes", text);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) {
            snprintf(one, sizeof one, "%llu ", (unsigned long long)m[i * n + j]);
            xmlBufferCat(text, BAD_CAST one);
        }
        numbers(d, "u64values", text);
    }
    goto out;
no_memory:
    b->wrong = "is too large for the memory of this machine";
out:
    free(e);
    free(from);
    free(to);
    free(m);
    xmlBufferFree(text);
}

/* --- the document -------------------------------------------------------------------------------------------------- */

static int count_cpus(const xmlNode *system)
{
    int n = 0;
    for (const xmlNode *c = system->children; c; c = c->next)
        n += ry_xml_is(c, "cpu");
    return n;
}

static const char *check_numa(const xmlNode *system, int ncpus)
{
    int n = 0;
    for (const xmlNode *c = system->children; c; c = c->next) {
        if (!ry_xml_is(c, "cpu"))
            continue;
        long id = attr_int(c, "numaid", -1);
        if (ncpus > 1 && (id < 0 || id > 4095))
            return "has several <cpu> elements, one of them without a numaid from 0 to 4095";
        for (const xmlNode *o = system->children; o && o != c; o = o->next)
            if (ry_xml_is(o, "cpu") && attr_int(o, "numaid", -1) == id)
                return "names a numaid twice: it seems to describe several hosts, and Railyard reads one at a time";
        n++;
    }
    return n ? NULL : "has no <cpu>, so it describes no machine";
}

xmlDoc *ry_topo_nccl_to_hwloc(const xmlDoc *nccl, struct ry_err *err)
{
    const xmlNode *system = xmlDocGetRootElement(nccl);
    int ncpus = count_cpus(system);
    bool affinity = false;
    struct build b = {.wrong = check_numa(system, ncpus)};
    if (b.wrong)
        return ry_fail(err, "%s", b.wrong), NULL;
    hwloc_bitmap_t *cpus = processors(system, ncpus, &affinity), all = hwloc_bitmap_alloc(), nodes = hwloc_bitmap_alloc();
    xmlDoc *doc = xmlNewDoc(BAD_CAST "1.0");
    xmlNode *top = xmlNewNode(NULL, BAD_CAST "topology");
    char *cpu_text = NULL, *node_text = NULL;
    if (!cpus || !all || !nodes || !doc || !top) {
        b.wrong = "cannot be converted: no memory";
        xmlFreeNode(top);
        goto out;
    }
    xmlDocSetRootElement(doc, top);
    set(top, "version", "2.0");
    b.machine = object(&b, top, "Machine");
    int i = 0;
    for (const xmlNode *c = system->children; c && !b.wrong; c = c->next) {
        if (!ry_xml_is(c, "cpu"))
            continue;
        long id = attr_int(c, "numaid", 0);
        id = id < 0 ? 0 : id; /* "-1": a virtual machine that does not tell, with this one processor */
        if (cpus[i])
            hwloc_bitmap_or(all, all, cpus[i]);
        hwloc_bitmap_set(nodes, (unsigned)id);
        add_cpu(&b, c, (int)id, cpus[i++]);
    }
    if (b.wrong)
        goto out;
    if (hwloc_bitmap_asprintf(&cpu_text, all) < 0 || hwloc_bitmap_asprintf(&node_text, nodes) < 0) {
        b.wrong = "cannot be converted: no memory";
        goto out;
    }
    set(b.machine, "os_index", "0");
    sets(b.machine, cpu_text, node_text, true);
    char note[160] = "";
    if (!b.ngpu)
        snprintf(note, sizeof note, "The file is for NCCL to complete on the machine itself: NVLinks are not in it%s", affinity ? "" : ". ");
    if (!affinity)
        strcat(note, "It tells no affinity: one thread stands for each processor.");
    if (*note) {
        info(b.machine, "RailyardNote", note);
        xmlNode *n = b.machine->last;
        xmlUnlinkNode(n);
        xmlAddPrevSibling(b.machine->children, n); /* infos come before child objects */
    }
    add_matrix(&b, top);
out:
    for (i = 0; cpus && i < ncpus; i++)
        hwloc_bitmap_free(cpus[i]);
    free(cpus);
    free(cpu_text);
    free(node_text);
    hwloc_bitmap_free(all);
    hwloc_bitmap_free(nodes);
    free(b.pci);
    free(b.links);
    if (b.wrong) {
        xmlFreeDoc(doc);
        doc = NULL;
        ry_fail(err, "%s", b.wrong);
    }
    return doc;
}
