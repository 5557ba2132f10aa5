/*
 * devices.c: from a loaded hwloc topology to GPUs, NICs and the paths between them.
 *
 * Owns: which objects count as GPUs and NICs, path classes, nearest NICs, reading the link matrices.
 * Not: where the topology came from (open_live.c, open_file.c), nor writing it out.
 */
#include "topo_internal.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

const char *ry_path_name(enum ry_path path)
{
    static const char *const names[] = {"LOC", "NVL", "PIX", "PXB", "PHB", "SYS", "?"};
    return names[path >= RY_PATH_LOC && path <= RY_PATH_UNKNOWN ? path : RY_PATH_UNKNOWN];
}

hwloc_topology_t ry_topo_hwloc_new(bool live, struct ry_err *err)
{
    hwloc_topology_t hw;
    if (hwloc_topology_init(&hw))
        return ry_fail(err, "topology: no memory for hwloc"), NULL;
    /* Everything of a file is kept; of this machine, every PCI device, since NVSwitches have no class of their own. */
    hwloc_topology_set_io_types_filter(hw, live ? HWLOC_TYPE_FILTER_KEEP_IMPORTANT : HWLOC_TYPE_FILTER_KEEP_ALL);
    hwloc_topology_set_type_filter(hw, HWLOC_OBJ_PCI_DEVICE, HWLOC_TYPE_FILTER_KEEP_ALL);
    hwloc_topology_set_type_filter(hw, HWLOC_OBJ_OS_DEVICE, HWLOC_TYPE_FILTER_KEEP_ALL);
    hwloc_topology_set_type_filter(hw, HWLOC_OBJ_MISC, HWLOC_TYPE_FILTER_KEEP_ALL);
    return hw;
}

int ry_topo_add_matrix(hwloc_topology_t hw, const char *name, unsigned long kind, unsigned n, hwloc_obj_t *objs,
                       const uint64_t *values)
{
    hwloc_uint64_t *v = malloc((size_t)n * n * sizeof *v);
    if (!v)
        return -1;
    for (size_t i = 0; i < (size_t)n * n; i++)
        v[i] = values[i];
    void *handle = hwloc_distances_add_create(hw, name, kind, 0);
    int rc = handle ? hwloc_distances_add_values(hw, handle, n, objs, v, 0) : -1;
    if (!rc)
        rc = hwloc_distances_add_commit(hw, handle, 0); /* no grouping: it would change the tree */
    free(v);
    return rc;
}

/* --- what an object is --------------------------------------------------------------------------------------------- */

static bool has_subtype(hwloc_obj_t obj, const char *subtype)
{
    return obj->subtype && !strcmp(obj->subtype, subtype);
}

bool ry_topo_is_gpu(hwloc_obj_t obj)
{
    if (obj->type == HWLOC_OBJ_MISC)
        return has_subtype(obj, "GPU");
    if (obj->type != HWLOC_OBJ_PCI_DEVICE)
        return false;
    unsigned vendor = obj->attr->pcidev.vendor_id, class = obj->attr->pcidev.class_id;
    if (vendor == 0x10de)
        return class >> 8 == 0x03;
    return vendor == 0x1002 && (class >> 8 == 0x03 || class == 0x1200); /* AMD's are also "processing accelerators" */
}

bool ry_topo_is_nvswitch(hwloc_obj_t obj)
{
    return has_subtype(obj, "NVSwitch") || (obj->type == HWLOC_OBJ_PCI_DEVICE &&
                                            obj->attr->pcidev.vendor_id == 0x10de && obj->attr->pcidev.class_id == 0x0680);
}

/* hwloc 3 made the type of OS devices a bit mask. */
bool ry_topo_is_verbs(hwloc_obj_t obj)
{
#if HWLOC_API_VERSION >= 0x00030000
    return obj->type == HWLOC_OBJ_OS_DEVICE && (obj->attr->osdev.types & HWLOC_OBJ_OSDEV_OPENFABRICS);
#else
    return obj->type == HWLOC_OBJ_OS_DEVICE && obj->attr->osdev.type == HWLOC_OBJ_OSDEV_OPENFABRICS;
#endif
}

bool ry_topo_is_net(hwloc_obj_t obj)
{
#if HWLOC_API_VERSION >= 0x00030000
    return obj->type == HWLOC_OBJ_OS_DEVICE && (obj->attr->osdev.types & HWLOC_OBJ_OSDEV_NETWORK) && !ry_topo_is_verbs(obj);
#else
    return obj->type == HWLOC_OBJ_OS_DEVICE && obj->attr->osdev.type == HWLOC_OBJ_OSDEV_NETWORK;
#endif
}

static bool is_nic_osdev(hwloc_obj_t obj)
{
    return ry_topo_is_verbs(obj) || ry_topo_is_net(obj);
}

hwloc_obj_t ry_topo_home(hwloc_obj_t obj)
{
    while (obj->parent && (hwloc_obj_type_is_io(obj->type) || obj->type == HWLOC_OBJ_MISC))
        obj = obj->parent;
    return obj;
}

static int numa_of(hwloc_topology_t hw, hwloc_obj_t obj)
{
    hwloc_obj_t home = ry_topo_home(obj);
    return home->nodeset && hwloc_bitmap_weight(home->nodeset) == 1 ? hwloc_bitmap_first(home->nodeset) : -1;
}

static void pci_text(hwloc_obj_t obj, char out[16])
{
    const char *said = hwloc_obj_get_info_by_name(obj, "PCIBusID"); /* of GPUs outside the PCI tree */
    if (obj->type == HWLOC_OBJ_PCI_DEVICE)
        snprintf(out, 16, "%04x:%02x:%02x.%01x", obj->attr->pcidev.domain, obj->attr->pcidev.bus, obj->attr->pcidev.dev,
                 obj->attr->pcidev.func);
    else
        snprintf(out, 16, "%s", said ? said : "");
}

/* --- path classes ------------------------------------------------------------------------------------------------- */

/* The PCI object that a device is or hangs from, NULL if there is none (a soft NIC, a GPU outside the tree). */
static hwloc_obj_t pci_of(hwloc_obj_t obj)
{
    while (obj && obj->type == HWLOC_OBJ_OS_DEVICE)
        obj = obj->parent;
    return obj && (obj->type == HWLOC_OBJ_PCI_DEVICE || obj->type == HWLOC_OBJ_BRIDGE) ? obj : NULL;
}

static unsigned height(hwloc_obj_t obj)
{
    unsigned n = 0;
    for (; obj->parent; obj = obj->parent)
        n++;
    return n;
}

static hwloc_obj_t common_ancestor(hwloc_obj_t a, hwloc_obj_t b)
{
    unsigned ha = height(a), hb = height(b);
    for (; ha > hb; ha--)
        a = a->parent;
    for (; hb > ha; hb--)
        b = b->parent;
    while (a != b)
        a = a->parent, b = b->parent;
    return a;
}

/* Switch ports between a device and an ancestor bridge. A whole switch in one object has two: one up, one down. */
static int ports_below(hwloc_obj_t obj, hwloc_obj_t ancestor)
{
    int n = 0;
    for (obj = obj->parent; obj && obj != ancestor; obj = obj->parent)
        n += has_subtype(obj, "PCISwitch") ? 2 : 1;
    return n;
}

/* The class without NVLink, as far as the tree tells. *depth: how deep they meet; deeper is nearer. */
static enum ry_path tree_path(hwloc_topology_t hw, hwloc_obj_t x, hwloc_obj_t y, unsigned *depth)
{
    hwloc_obj_t a = pci_of(x), b = pci_of(y);
    *depth = 0;
    if (x == y)
        return RY_PATH_LOC;
    if (!a || !b)
        return RY_PATH_UNKNOWN;
    hwloc_obj_t meet = common_ancestor(a, b);
    *depth = height(meet);
    if (meet->type == HWLOC_OBJ_PCI_DEVICE)
        return RY_PATH_PIX; /* two faces of one card */
    if (meet->type == HWLOC_OBJ_BRIDGE) {
        if (meet->attr->bridge.upstream_type != HWLOC_OBJ_BRIDGE_PCI)
            return RY_PATH_PHB;
        return ports_below(a, meet) <= 1 && ports_below(b, meet) <= 1 ? RY_PATH_PIX : RY_PATH_PXB;
    }
    /* Two host bridges: near if they hang from one NUMA node or package. */
    hwloc_obj_t ha = ry_topo_home(a), hb = ry_topo_home(b);
    int na = numa_of(hw, a), nb = numa_of(hw, b);
    if ((ha == hb && ha->parent) || (na >= 0 && na == nb) || hwloc_get_nbobjs_by_type(hw, HWLOC_OBJ_NUMANODE) <= 1)
        return RY_PATH_PHB;
    return RY_PATH_SYS;
}

/* --- matrices ------------------------------------------------------------------------------------------------------ */

static struct hwloc_distances_s *get_matrix(hwloc_topology_t hw, const char *name)
{
    struct hwloc_distances_s *d = NULL;
    unsigned nr = 1;
    if (hwloc_distances_get_by_name(hw, name, &nr, &d, 0) || !nr || !d)
        return NULL;
    for (unsigned i = 0; i < d->nbobjs; i++)
        if (!d->objs[i]) { /* an object of it was filtered out */
            hwloc_distances_release(hw, d);
            return NULL;
        }
    return d;
}

static int find_obj(hwloc_obj_t *list, int n, hwloc_obj_t obj)
{
    for (int i = 0; i < n; i++)
        if (list[i] == obj)
            return i;
    return -1;
}

/* A GPU may stand in a matrix by its PCI device or by an OS device below it ("nvml0"). */
static int gpu_index_of(const struct ry_topo *t, hwloc_obj_t obj)
{
    for (; obj && hwloc_obj_type_is_io(obj->type); obj = obj->parent) {
        int i = find_obj(t->gpu_obj, t->ngpus, obj);
        if (i >= 0)
            return i;
    }
    return obj ? find_obj(t->gpu_obj, t->ngpus, obj) : -1;
}

static void read_links(struct ry_topo *t, const char *name)
{
    struct hwloc_distances_s *d = get_matrix(t->hw, name);
    if (!d)
        return;
    unsigned n = d->nbobjs;
    for (unsigned i = 0; i < n; i++) {
        int a = gpu_index_of(t, d->objs[i]);
        for (unsigned j = 0; a >= 0 && j < n; j++) {
            uint64_t mbs = d->values[i * n + j];
            int b = gpu_index_of(t, d->objs[j]);
            if (!mbs || a == b) /* the diagonal holds a fancy number */
                continue;
            double gbs = mbs < RY_LINK_UNKNOWN ? 0 : (double)mbs / 1000;
            t->gpus[a].nvlink_gbs += gbs;
            if (b >= 0) {
                t->gpu_gbs[a * t->ngpus + b] += gbs;
                t->gpu_path[a * t->ngpus + b] = RY_PATH_NVL;
            } else if (ry_topo_is_nvswitch(d->objs[j])) {
                t->switch_gbs[a] += gbs;
                t->switch_linked[a] = true;
            } else {
                t->cpu_gbs[a] += gbs;
            }
        }
    }
    hwloc_distances_release(t->hw, d);
}

/* All NVSwitches of a node are taken for one fabric, as NCCL does: what differs is each GPU's own share of it. */
static void join_switched(struct ry_topo *t)
{
    for (int a = 0; a < t->ngpus; a++)
        for (int b = 0; b < t->ngpus; b++) {
            if (a == b || !t->switch_linked[a] || !t->switch_linked[b])
                continue;
            t->gpu_path[a * t->ngpus + b] = RY_PATH_NVL;
            t->gpu_gbs[a * t->ngpus + b] += t->switch_gbs[a] < t->switch_gbs[b] ? t->switch_gbs[a] : t->switch_gbs[b];
        }
}

/* --- the lists ----------------------------------------------------------------------------------------------------- */

struct list {
    hwloc_obj_t *obj;
    int n, room;
};

static int append(struct list *l, hwloc_obj_t obj)
{
    if (l->n == l->room) {
        int room = l->room ? 2 * l->room : 16;
        hwloc_obj_t *p = realloc(l->obj, (size_t)room * sizeof *p);
        if (!p)
            return -1;
        l->obj = p;
        l->room = room;
    }
    l->obj[l->n++] = obj;
    return 0;
}

/* Walks the whole tree, I/O and Misc children included. */
static int visit(hwloc_obj_t obj, int (*fn)(hwloc_obj_t, void *), void *arg)
{
    int rc = fn(obj, arg);
    hwloc_obj_t first[] = {obj->first_child, obj->memory_first_child, obj->io_first_child, obj->misc_first_child};
    for (int k = 0; k < 4 && !rc; k++)
        for (hwloc_obj_t c = first[k]; c && !rc; c = c->next_sibling)
            rc = visit(c, fn, arg);
    return rc;
}

struct found {
    struct list gpus, nics, soft_nics;
    int nswitches, nunknown;
};

/* The OS device that names a NIC: verbs before net, since that is what NCCL uses. NULL if it has none. */
static hwloc_obj_t nic_osdev(hwloc_obj_t pci)
{
    hwloc_obj_t best = NULL;
    for (hwloc_obj_t c = pci->io_first_child; c; c = c->next_sibling) {
        if (!is_nic_osdev(c))
            continue;
        if (!best || (!ry_topo_is_verbs(best) && ry_topo_is_verbs(c)))
            best = c;
    }
    return best;
}

static int collect(hwloc_obj_t obj, void *arg)
{
    struct found *f = arg;
    if (ry_topo_is_nvswitch(obj)) {
        f->nswitches++;
        return 0;
    }
    if (ry_topo_is_gpu(obj))
        return append(&f->gpus, obj);
    if (obj->type == HWLOC_OBJ_PCI_DEVICE) {
        if (obj->attr->pcidev.class_id >> 8 == 0x02 || nic_osdev(obj))
            return append(&f->nics, obj);
        if (!obj->attr->pcidev.class_id && !obj->attr->pcidev.vendor_id && !obj->io_first_child)
            f->nunknown++;
        return 0;
    }
    if (is_nic_osdev(obj) && !pci_of(obj) && (!obj->name || strcmp(obj->name, "lo")))
        return append(&f->soft_nics, obj);
    return 0;
}

static int by_pci(const void *pa, const void *pb)
{
    const hwloc_obj_t a = *(const hwloc_obj_t *)pa, b = *(const hwloc_obj_t *)pb;
    char ta[16], tb[16];
    pci_text(a, ta);
    pci_text(b, tb);
    int c = strcmp(ta, tb); /* fixed-width hexadecimal: text order is PCI order */
    return c ? c : (a->gp_index > b->gp_index) - (a->gp_index < b->gp_index);
}

/* An info of the device itself or of an OS device below it. */
static const char *info(hwloc_obj_t obj, const char *name)
{
    const char *v = hwloc_obj_get_info_by_name(obj, name);
    for (hwloc_obj_t c = obj->io_first_child; c && !v; c = c->next_sibling)
        v = hwloc_obj_get_info_by_name(c, name);
    return v;
}

static void name_device(hwloc_obj_t obj, const char *name, char out[64])
{
    const char *vendor = hwloc_obj_get_info_by_name(obj, "PCIVendor");
    const char *device = hwloc_obj_get_info_by_name(obj, "PCIDevice");
    if (name && *name)
        snprintf(out, 64, "%s", name);
    else if (device && *device)
        snprintf(out, 64, "%s%s%s", vendor ? vendor : "", vendor ? " " : "", device);
    else if (obj->type == HWLOC_OBJ_PCI_DEVICE)
        snprintf(out, 64, "%04x:%04x", obj->attr->pcidev.vendor_id, obj->attr->pcidev.device_id);
    else
        snprintf(out, 64, "%s", obj->name ? obj->name : "?");
}

static void fill_gpu(struct ry_topo *t, int i)
{
    hwloc_obj_t obj = t->gpu_obj[i];
    struct ry_topo_gpu *g = &t->gpus[i];
    const char *uuid = info(obj, "NVIDIAUUID");
    if (!uuid)
        uuid = info(obj, "AMDUUID");
    g->index = i;
    name_device(obj, info(obj, "GPUModel"), g->name);
    pci_text(obj, g->pci);
    snprintf(g->uuid, sizeof g->uuid, "%s", uuid ? uuid : "");
    g->numa = numa_of(t->hw, obj);
    g->nearest_nic = -1;
    g->nic_path = RY_PATH_UNKNOWN;
}

static void fill_nic(struct ry_topo *t, int i)
{
    hwloc_obj_t obj = t->nic_obj[i], os = obj->type == HWLOC_OBJ_OS_DEVICE ? obj : nic_osdev(obj);
    struct ry_topo_nic *n = &t->nics[i];
    n->index = i;
    /* A name without any device behind it is the PCI address: more use to a reader than four equal device ids. */
    pci_text(obj, n->pci);
    if (os && os->name)
        snprintf(n->name, sizeof n->name, "%s", os->name);
    else if (*n->pci)
        snprintf(n->name, sizeof n->name, "%s", n->pci);
    else
        name_device(obj, NULL, n->name);
    const char *kind = !os ? "unknown" : ry_topo_is_verbs(os) ? "verbs" : "net";
    snprintf(n->kind, sizeof n->kind, "%s", kind);
    n->numa = numa_of(t->hw, obj);
    const char *speed = os ? hwloc_obj_get_info_by_name(os, "LinkSpeedMbps") : NULL;
    double mbps = speed ? strtod(speed, NULL) : 0;
    n->gbs = mbps > 0 && mbps < 1e9 ? mbps / 8000 : 0;
}

static bool is_down(const struct ry_topo *t, int nic)
{
    hwloc_obj_t obj = t->nic_obj[nic], os = obj->type == HWLOC_OBJ_OS_DEVICE ? obj : nic_osdev(obj);
    const char *state = os ? hwloc_obj_get_info_by_name(os, "LinkState") : NULL;
    return state && !strcmp(state, "down");
}

/* --- nearest NIC --------------------------------------------------------------------------------------------------- */

/* <0: nic x is better for the GPU than y. 0: as good. */
static int compare_nics(const struct ry_topo *t, int gpu, const unsigned *depth, int x, int y)
{
    int dx = is_down(t, x), dy = is_down(t, y);
    if (dx != dy)
        return dx - dy;
    enum ry_path px = t->nic_path[gpu * t->nnics + x], py = t->nic_path[gpu * t->nnics + y];
    if (px != py)
        return px < py ? -1 : 1;
    if (depth[x] != depth[y])
        return depth[x] > depth[y] ? -1 : 1;
    int vx = strcmp(t->nics[x].kind, "verbs") != 0, vy = strcmp(t->nics[y].kind, "verbs") != 0;
    if (vx != vy)
        return vx - vy;
    if (t->nics[x].gbs != t->nics[y].gbs)
        return t->nics[x].gbs > t->nics[y].gbs ? -1 : 1;
    return 0;
}

/*
 * GPUs to which several NICs are equally near share them out: the k-th GPU with the same choice takes the k-th NIC, which
 * is how such machines are wired and used.
 */
static int choose_nics(struct ry_topo *t)
{
    if (!t->nnics || !t->ngpus)
        return 0;
    unsigned *depth = calloc((size_t)t->nnics, sizeof *depth);
    int *best = malloc((size_t)t->ngpus * sizeof *best), *takers = calloc((size_t)t->nnics, sizeof *takers);
    if (depth && best && takers) {
        for (int g = 0; g < t->ngpus; g++) {
            int ties = 0;
            best[g] = 0;
            for (int n = 0; n < t->nnics; n++) {
                tree_path(t->hw, t->gpu_obj[g], t->nic_obj[n], &depth[n]);
                if (n && compare_nics(t, g, depth, n, best[g]) < 0)
                    best[g] = n;
            }
            for (int n = 0; n < t->nnics; n++)
                ties += !compare_nics(t, g, depth, n, best[g]);
            int pick = takers[best[g]]++ % ties; /* GPUs with the same choice share their first NIC */
            for (int n = best[g]; n < t->nnics; n++)
                if (!compare_nics(t, g, depth, n, best[g]) && pick-- == 0)
                    t->gpus[g].nearest_nic = n;
            t->gpus[g].nic_path = t->nic_path[g * t->nnics + t->gpus[g].nearest_nic];
        }
    }
    int rc = depth && best && takers ? 0 : -1;
    free(depth);
    free(best);
    free(takers);
    return rc;
}

/* --- all together -------------------------------------------------------------------------------------------------- */

/* PCI classes of all pairs, from the tree; where the tree cannot say, from a matrix that came with the topology. */
static int fill_paths(struct ry_topo *t)
{
    int n = t->ngpus + t->nnics;
    if (!n)
        return 0;
    hwloc_obj_t *objs = malloc((size_t)n * sizeof *objs);
    uint64_t *v = malloc((size_t)n * (size_t)n * sizeof *v);
    if (!objs || !v) {
        free(objs);
        free(v);
        return -1;
    }
    if (t->ngpus) /* memcpy takes no NULL, not even for nothing */
        memcpy(objs, t->gpu_obj, (size_t)t->ngpus * sizeof *objs);
    if (t->nnics)
        memcpy(objs + t->ngpus, t->nic_obj, (size_t)t->nnics * sizeof *objs);
    struct hwloc_distances_s *had = get_matrix(t->hw, "PCIePath");
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            unsigned depth;
            enum ry_path p = tree_path(t->hw, objs[i], objs[j], &depth);
            if (p == RY_PATH_UNKNOWN && had) {
                int a = hwloc_distances_obj_index(had, objs[i]), b = hwloc_distances_obj_index(had, objs[j]);
                if (a >= 0 && b >= 0 && had->values[(unsigned)a * had->nbobjs + (unsigned)b] <= RY_PATH_SYS)
                    p = (enum ry_path)had->values[(unsigned)a * had->nbobjs + (unsigned)b];
            }
            v[(size_t)i * (size_t)n + (size_t)j] = p;
            if (i < t->ngpus && j < t->ngpus)
                t->gpu_path[i * t->ngpus + j] = p;
            else if (i < t->ngpus)
                t->nic_path[i * t->nnics + (j - t->ngpus)] = p;
        }
    if (had)
        hwloc_distances_release(t->hw, had);
    else if (n > 1) /* hwloc refuses only what it already has or cannot hold; the answers here don't need the matrix */
        ry_topo_add_matrix(t->hw, "PCIePath", HWLOC_DISTANCES_KIND_FROM_USER | HWLOC_DISTANCES_KIND_MEANS_LATENCY,
                           (unsigned)n, objs, v);
    free(objs);
    free(v);
    return 0;
}

struct ry_topo *ry_topo_from_hwloc(hwloc_topology_t hw, const char *source, struct ry_err *err)
{
    struct found f = {0};
    struct ry_topo *t = calloc(1, sizeof *t);
    if (t)
        t->hw = hw;
    else
        hwloc_topology_destroy(hw);
    if (!t || !(t->source = strdup(source)) || visit(hwloc_get_root_obj(hw), collect, &f))
        goto no_memory;
    if (!f.nics.n) { /* veth and the like count only where nothing else exists */
        free(f.nics.obj);
        f.nics = f.soft_nics;
        f.soft_nics = (struct list){0};
    }
    t->ngpus = f.gpus.n;
    t->nnics = f.nics.n;
    t->nswitches = f.nswitches;
    t->nunknown = f.nunknown;
    t->gpu_obj = f.gpus.obj;
    t->nic_obj = f.nics.obj;
    f.gpus.obj = f.nics.obj = NULL;
    if (t->ngpus)
        qsort(t->gpu_obj, (size_t)t->ngpus, sizeof *t->gpu_obj, by_pci);
    if (t->nnics)
        qsort(t->nic_obj, (size_t)t->nnics, sizeof *t->nic_obj, by_pci);
    size_t g = (size_t)t->ngpus, n = (size_t)t->nnics;
    t->gpus = calloc(g + 1, sizeof *t->gpus);
    t->nics = calloc(n + 1, sizeof *t->nics);
    t->gpu_path = calloc(g * g + 1, sizeof *t->gpu_path);
    t->nic_path = calloc(g * n + 1, sizeof *t->nic_path);
    t->gpu_gbs = calloc(g * g + 1, sizeof *t->gpu_gbs);
    t->switch_gbs = calloc(g + 1, sizeof *t->switch_gbs);
    t->switch_linked = calloc(g + 1, sizeof *t->switch_linked);
    t->cpu_gbs = calloc(g + 1, sizeof *t->cpu_gbs);
    if (!t->gpus || !t->nics || !t->gpu_path || !t->nic_path || !t->gpu_gbs || !t->switch_gbs || !t->switch_linked ||
        !t->cpu_gbs)
        goto no_memory;
    for (int i = 0; i < t->ngpus; i++)
        fill_gpu(t, i);
    for (int i = 0; i < t->nnics; i++)
        fill_nic(t, i);
    if (fill_paths(t))
        goto no_memory;
    read_links(t, "NVLinkBandwidth");
    read_links(t, "XGMIBandwidth"); /* AMD's counterpart: the same class of link */
    join_switched(t);
    if (choose_nics(t))
        goto no_memory;
    hwloc_topology_refresh(hw); /* so that hwloc's own functions may be called from several threads */
    free(f.soft_nics.obj);
    return t;
no_memory:
    free(f.gpus.obj);
    free(f.nics.obj);
    free(f.soft_nics.obj);
    ry_topo_close(t);
    return ry_fail(err, "topology of %s: no memory", source), NULL;
}

void ry_topo_close(struct ry_topo *t)
{
    if (!t)
        return;
    hwloc_topology_destroy(t->hw);
    free(t->source);
    free(t->gpus);
    free(t->nics);
    free(t->gpu_obj);
    free(t->nic_obj);
    free(t->gpu_path);
    free(t->nic_path);
    free(t->gpu_gbs);
    free(t->switch_gbs);
    free(t->switch_linked);
    free(t->cpu_gbs);
    free(t);
}

/* --- reading it ---------------------------------------------------------------------------------------------------- */

const char *ry_topo_source(const struct ry_topo *t)
{
    return t->source;
}

const char *ry_topo_note(const struct ry_topo *t)
{
    return hwloc_obj_get_info_by_name(hwloc_get_root_obj(t->hw), "RailyardNote");
}

hwloc_topology_t ry_topo_hwloc(const struct ry_topo *t)
{
    return t->hw;
}

int ry_topo_ngpus(const struct ry_topo *t)
{
    return t->ngpus;
}

int ry_topo_nnics(const struct ry_topo *t)
{
    return t->nnics;
}

const struct ry_topo_gpu *ry_topo_gpu(const struct ry_topo *t, int i)
{
    return i >= 0 && i < t->ngpus ? &t->gpus[i] : NULL;
}

const struct ry_topo_nic *ry_topo_nic(const struct ry_topo *t, int i)
{
    return i >= 0 && i < t->nnics ? &t->nics[i] : NULL;
}

const struct ry_topo_gpu *ry_topo_gpu_by_pci(const struct ry_topo *t, const char *pci)
{
    unsigned want[4], have[4];
    char end;
    if (sscanf(pci, "%x:%x:%x.%x%c", &want[0], &want[1], &want[2], &want[3], &end) != 4) {
        want[0] = 0; /* without a domain */
        if (sscanf(pci, "%x:%x.%x%c", &want[1], &want[2], &want[3], &end) != 3)
            return NULL;
    }
    for (int i = 0; i < t->ngpus; i++)
        if (sscanf(t->gpus[i].pci, "%x:%x:%x.%x", &have[0], &have[1], &have[2], &have[3]) == 4 &&
            !memcmp(want, have, sizeof want))
            return &t->gpus[i];
    return NULL;
}

enum ry_path ry_topo_gpu_path(const struct ry_topo *t, int a, int b)
{
    bool ok = a >= 0 && a < t->ngpus && b >= 0 && b < t->ngpus;
    return ok ? t->gpu_path[a * t->ngpus + b] : RY_PATH_UNKNOWN;
}

double ry_topo_gpu_gbs(const struct ry_topo *t, int a, int b)
{
    bool ok = a >= 0 && a < t->ngpus && b >= 0 && b < t->ngpus;
    return ok ? t->gpu_gbs[a * t->ngpus + b] : 0;
}

enum ry_path ry_topo_nic_path(const struct ry_topo *t, int gpu, int nic)
{
    bool ok = gpu >= 0 && gpu < t->ngpus && nic >= 0 && nic < t->nnics;
    return ok ? t->nic_path[gpu * t->nnics + nic] : RY_PATH_UNKNOWN;
}
