/*
 * open_live.c: opens the topology of this machine.
 *
 * Owns: how hwloc is run inside somebody's job, joining in what the NVIDIA driver tells (nvidia.h), and the link speed of
 * NICs, which hwloc leaves out. Not: what it all means (devices.c).
 *
 * In a job: no thread is rebound, no CUDA context, display or OpenCL platform is opened, and the whole machine is seen
 * even where the job may use only some of its processors and GPUs.
 */
#include "topo_internal.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#include "nvidia.h"

/* --- NIC speed ----------------------------------------------------------------------------------------------------- */

/* First line of /sys/class/…; false if it cannot be read. */
static bool sys_line(char *out, size_t size, const char *fmt, const char *name, const char *rest)
{
    char path[512];
    snprintf(path, sizeof path, fmt, name, rest);
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    bool ok = fgets(out, (int)size, f);
    fclose(f);
    if (ok)
        out[strcspn(out, "\n")] = 0;
    return ok;
}

static void note(hwloc_obj_t obj, const char *name, const char *value)
{
    if (value && *value && !hwloc_obj_get_info_by_name(obj, name))
        hwloc_obj_add_info(obj, name, value);
}

static void note_speed(hwloc_obj_t obj, double mbps, bool down)
{
    char text[32];
    if (mbps > 0) {
        snprintf(text, sizeof text, "%.0f", mbps);
        note(obj, "LinkSpeedMbps", text);
    }
    if (down)
        note(obj, "LinkState", "down");
}

static void verbs_speed(hwloc_obj_t obj)
{
    char path[320], line[128], rest[300];
    double best = 0;
    bool active = false, told = false;
    snprintf(path, sizeof path, "/sys/class/infiniband/%.200s/ports", obj->name);
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (e->d_name[0] == '.')
            continue;
        double gbit;
        snprintf(rest, sizeof rest, "%s/rate", e->d_name);
        if (sys_line(line, sizeof line, "/sys/class/infiniband/%s/ports/%s", obj->name, rest) &&
            sscanf(line, "%lf", &gbit) == 1 && gbit > best)
            best = gbit;
        snprintf(rest, sizeof rest, "%s/state", e->d_name);
        if (sys_line(line, sizeof line, "/sys/class/infiniband/%s/ports/%s", obj->name, rest)) {
            told = true;
            active |= strstr(line, "ACTIVE") != NULL;
        }
    }
    if (d)
        closedir(d);
    note_speed(obj, best * 1000, told && !active);
}

static void net_speed(hwloc_obj_t obj)
{
    char line[64];
    double mbps = 0;
    bool down = sys_line(line, sizeof line, "/sys/class/net/%s/%s", obj->name, "operstate") && !strcmp(line, "down");
    if (sys_line(line, sizeof line, "/sys/class/net/%s/%s", obj->name, "speed"))
        mbps = strtod(line, NULL); /* -1 where the driver does not know */
    note_speed(obj, mbps, down);
}

static void nic_speeds(hwloc_topology_t hw)
{
    for (hwloc_obj_t o = NULL; (o = hwloc_get_next_osdev(hw, o));) {
        if (!o->name)
            continue;
        if (ry_topo_is_verbs(o))
            verbs_speed(o);
        else if (ry_topo_is_net(o))
            net_speed(o);
    }
}

/* --- GPUs ---------------------------------------------------------------------------------------------------------- */

static hwloc_obj_t pci_obj(hwloc_topology_t hw, struct ry_pci p)
{
    return hwloc_get_pcidev_by_busid(hw, p.domain, p.bus, p.device, 0);
}

static void set_subtype(hwloc_topology_t hw, hwloc_obj_t obj, const char *subtype)
{
#if HWLOC_API_VERSION >= 0x00020a00
    hwloc_obj_set_subtype(hw, obj, subtype);
#else
    if (!obj->subtype)
        obj->subtype = strdup(subtype); /* freed by hwloc, with free() */
#endif
}

/* The object of a GPU: on PCI, or, where a container hides the PCI tree, one of our own. NULL: no memory. */
static hwloc_obj_t gpu_obj(hwloc_topology_t hw, const struct ry_nv_gpu *g)
{
    hwloc_obj_t obj = pci_obj(hw, g->pci);
    if (!obj || !ry_topo_is_gpu(obj)) {
        char text[32];
        snprintf(text, sizeof text, "%04x:%02x:%02x.0", g->pci.domain, g->pci.bus, g->pci.device);
        obj = hwloc_topology_insert_misc_object(hw, hwloc_get_root_obj(hw), g->name);
        if (!obj)
            return NULL;
        set_subtype(hw, obj, "GPU");
        note(obj, "PCIBusID", text);
    }
    note(obj, "GPUVendor", "NVIDIA Corporation");
    note(obj, "GPUModel", g->name);
    note(obj, "NVIDIAUUID", g->uuid);
    return obj;
}

struct ends {
    hwloc_obj_t *obj;
    int n;
};

static int end_index(struct ends *e, hwloc_obj_t obj)
{
    for (int i = 0; i < e->n; i++)
        if (e->obj[i] == obj)
            return i;
    e->obj[e->n] = obj;
    return e->n++;
}

/* Where a link goes, or NULL: a GPU that is not in this machine's tree. */
static hwloc_obj_t remote_end(hwloc_topology_t hw, const struct ry_nv *nv, const struct ends *gpus, hwloc_obj_t self,
                              const struct ry_nv_link *l, hwloc_obj_t *hidden)
{
    for (int i = 0; l->has_pci && i < nv->n; i++)
        if (!memcmp(&nv->gpu[i].pci, &l->pci, sizeof l->pci))
            return gpus->obj[i];
    hwloc_obj_t pci = l->has_pci ? pci_obj(hw, l->pci) : NULL;
    if (l->end == RY_LINK_CPU) /* the bridge's own place is wrong on some such machines, the GPU's is right */
        return ry_topo_home(self);
    if (l->end == RY_LINK_GPU)
        return pci;
    if (pci && pci->attr->pcidev.class_id >> 8 == 0x06) {
        set_subtype(hw, pci, "NVSwitch");
        return pci;
    }
    if (!*hidden && (*hidden = hwloc_topology_insert_misc_object(hw, hwloc_get_root_obj(hw), "NVSwitch")))
        set_subtype(hw, *hidden, "NVSwitch");
    return *hidden;
}

static void add_links(hwloc_topology_t hw, const struct ry_nv *nv, struct ends *gpus)
{
    int total = nv->n;
    for (int i = 0; i < nv->n; i++)
        total += nv->gpu[i].nlinks;
    if (total == nv->n)
        return;
    struct ends all = {calloc((size_t)total, sizeof *all.obj), 0};
    int *from = calloc((size_t)total, sizeof *from), *to = calloc((size_t)total, sizeof *to), nlinks = 0;
    uint64_t *mbs = calloc((size_t)total, sizeof *mbs), *m = NULL;
    hwloc_obj_t hidden = NULL;
    if (!all.obj || !from || !to || !mbs)
        goto out;
    for (int i = 0; i < nv->n; i++)
        end_index(&all, gpus->obj[i]);
    for (int i = 0; i < nv->n; i++)
        for (int k = 0; k < nv->gpu[i].nlinks; k++) {
            const struct ry_nv_link *l = &nv->gpu[i].link[k];
            hwloc_obj_t end = remote_end(hw, nv, gpus, gpus->obj[i], l, &hidden);
            if (!end || end == gpus->obj[i])
                continue;
            from[nlinks] = i;
            to[nlinks] = end_index(&all, end);
            mbs[nlinks++] = l->mbs ? l->mbs : 1;
        }
    if (!nlinks || !(m = calloc((size_t)all.n * (size_t)all.n, sizeof *m)))
        goto out;
    for (int k = 0; k < nlinks; k++) {
        m[from[k] * all.n + to[k]] += mbs[k];
        if (to[k] >= nv->n) /* other ends do not tell their side; GPUs do */
            m[to[k] * all.n + from[k]] += mbs[k];
    }
    for (int i = 0; i < all.n; i++)
        m[i * all.n + i] = 1000000; /* as hwloc does: inside a device everything is nearer */
    ry_topo_add_matrix(hw, "NVLinkBandwidth", HWLOC_DISTANCES_KIND_FROM_OS | HWLOC_DISTANCES_KIND_MEANS_BANDWIDTH,
                       (unsigned)all.n, all.obj, m);
out:
    free(all.obj);
    free(from);
    free(to);
    free(mbs);
    free(m);
}

/* The driver's word on PCIe distances is needed only for GPUs that hwloc could not place. */
static void add_driver_paths(hwloc_topology_t hw, const struct ry_nv *nv, struct ends *gpus)
{
    bool needed = false;
    for (int i = 0; i < nv->n; i++)
        needed |= gpus->obj[i]->type == HWLOC_OBJ_MISC;
    if (!needed || nv->n < 2)
        return;
    uint64_t *v = malloc((size_t)nv->n * (size_t)nv->n * sizeof *v);
    if (!v)
        return;
    for (int i = 0; i < nv->n * nv->n; i++)
        v[i] = nv->path[i];
    ry_topo_add_matrix(hw, "PCIePath", HWLOC_DISTANCES_KIND_FROM_USER | HWLOC_DISTANCES_KIND_MEANS_LATENCY,
                       (unsigned)nv->n, gpus->obj, v);
    free(v);
}

static void join_nvidia(hwloc_topology_t hw)
{
    struct ry_nv nv;
    ry_nv_read(&nv);
    struct ends gpus = {nv.n ? calloc((size_t)nv.n, sizeof *gpus.obj) : NULL, nv.n};
    bool ok = gpus.obj;
    for (int i = 0; ok && i < nv.n; i++)
        ok = (gpus.obj[i] = gpu_obj(hw, &nv.gpu[i]));
    if (ok) {
        add_links(hw, &nv, &gpus);
        add_driver_paths(hw, &nv, &gpus);
    }
    free(gpus.obj);
    ry_nv_free(&nv);
}

struct ry_topo *ry_topo_open_live(struct ry_err *err)
{
    /* hwloc's own parts for accelerators would open contexts, displays and platforms; the NVIDIA part is ours */
    static const char *const not_wanted[] = {"cuda", "nvml", "opencl", "gl", "rsmi", "levelzero", "pci"};
    hwloc_topology_t hw = ry_topo_hwloc_new(true, err);
    if (!hw)
        return NULL;
    for (size_t i = 0; i < sizeof not_wanted / sizeof *not_wanted; i++)
        hwloc_topology_set_components(hw, HWLOC_TOPOLOGY_COMPONENTS_FLAG_BLACKLIST, not_wanted[i]);
    hwloc_topology_set_flags(hw, HWLOC_TOPOLOGY_FLAG_INCLUDE_DISALLOWED | HWLOC_TOPOLOGY_FLAG_DONT_CHANGE_BINDING);
    if (hwloc_topology_load(hw)) {
        hwloc_topology_destroy(hw);
        return ry_fail(err, "hwloc cannot read this machine's topology: is /sys mounted?"), NULL;
    }
    nic_speeds(hw);
    join_nvidia(hw);
    return ry_topo_from_hwloc(hw, "live", err);
}
