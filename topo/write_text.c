/* write_text.c: a topology as short tables for a terminal. */
#include "topo_internal.h"

#include <string.h>

static const char *plural(int n)
{
    return n == 1 ? "" : "s";
}

static void summary(const struct ry_topo *t, FILE *f)
{
    const char *product = hwloc_obj_get_info_by_name(hwloc_get_root_obj(t->hw), "DMIProductName");
    if (!product)
        product = hwloc_obj_get_info_by_name(hwloc_get_root_obj(t->hw), "PlatformModel");
    int packages = hwloc_get_nbobjs_by_type(t->hw, HWLOC_OBJ_PACKAGE), numa = hwloc_get_nbobjs_by_type(t->hw, HWLOC_OBJ_NUMANODE),
        pus = hwloc_get_nbobjs_by_type(t->hw, HWLOC_OBJ_PU);
    fprintf(f, "%s%s%s%s\n", t->source, product ? " (" : "", product ? product : "", product ? ")" : "");
    fprintf(f, "%d package%s, %d NUMA node%s, %d hardware thread%s, %d GPU%s", packages, plural(packages), numa, plural(numa),
            pus, plural(pus), t->ngpus, plural(t->ngpus));
    if (t->nswitches)
        fprintf(f, ", %d NVSwitch%s", t->nswitches, t->nswitches == 1 ? "" : "es");
    fprintf(f, ", %d NIC%s\n", t->nnics, plural(t->nnics));
    if (t->nunknown)
        fprintf(f, "%d PCI device%s of unknown kind: the source gives no class\n", t->nunknown, plural(t->nunknown));
    if (ry_topo_note(t))
        fprintf(f, "%s\n", ry_topo_note(t));
}

/* "0-3,6" of the devices on a NUMA node, or "-" */
static void members(const struct ry_topo *t, int numa, bool gpus, char *out, size_t size)
{
    size_t used = 0;
    int n = gpus ? t->ngpus : t->nnics;
    out[0] = 0;
    for (int i = 0; i < n;) {
        int j = i;
        while (j < n && (gpus ? t->gpus[j].numa : t->nics[j].numa) == numa)
            j++;
        if (j > i && used < size) {
            const char *sep = used ? "," : "";
            used += (size_t)(j > i + 1 ? snprintf(out + used, size - used, "%s%d-%d", sep, i, j - 1)
                                       : snprintf(out + used, size - used, "%s%d", sep, i));
        }
        i = j > i ? j : i + 1;
    }
    if (!used)
        snprintf(out, size, "-");
}

static void numa_table(const struct ry_topo *t, FILE *f)
{
    fprintf(f, "\nNUMA  package  threads     memory  GPUs      NICs\n");
    for (hwloc_obj_t n = NULL; (n = hwloc_get_next_obj_by_type(t->hw, HWLOC_OBJ_NUMANODE, n));) {
        hwloc_obj_t p = hwloc_get_ancestor_obj_by_type(t->hw, HWLOC_OBJ_PACKAGE, n);
        char gpus[64], nics[64], memory[32] = "-", package[16] = "-";
        members(t, (int)n->os_index, true, gpus, sizeof gpus);
        members(t, (int)n->os_index, false, nics, sizeof nics);
        if (n->attr->numanode.local_memory)
            snprintf(memory, sizeof memory, "%.0f GiB", (double)n->attr->numanode.local_memory / (1 << 30));
        if (p)
            snprintf(package, sizeof package, "%u", p->logical_index);
        fprintf(f, "%4u  %7s  %7d  %9s  %-8s  %s\n", n->os_index, package, hwloc_bitmap_weight(n->cpuset), memory, gpus, nics);
    }
}

static void bandwidth(double gbs, char out[24])
{
    if (gbs > 0)
        snprintf(out, 24, "%.3g GB/s", gbs);
    else
        snprintf(out, 24, "-");
}

static int widest(const struct ry_topo *t, bool gpus)
{
    size_t w = 4;
    for (int i = 0; i < (gpus ? t->ngpus : t->nnics); i++) {
        size_t n = strlen(gpus ? t->gpus[i].name : t->nics[i].name);
        w = n > w ? n : w;
    }
    return (int)w;
}

static void device_tables(const struct ry_topo *t, FILE *f)
{
    char bw[24], numa[16];
    if (t->ngpus) {
        int w = widest(t, true);
        fprintf(f, "\nGPU  PCI           NUMA  %-*s  NVLink    nearest NIC\n", w, "name");
        for (int i = 0; i < t->ngpus; i++) {
            const struct ry_topo_gpu *g = &t->gpus[i];
            bandwidth(g->nvlink_gbs, bw);
            snprintf(numa, sizeof numa, g->numa < 0 ? "?" : "%d", g->numa);
            fprintf(f, "%3d  %-12s  %4s  %-*s  %-8s  ", i, g->pci, numa, w, g->name, bw);
            if (g->nearest_nic >= 0)
                fprintf(f, "%s (%s)\n", t->nics[g->nearest_nic].name, ry_path_name(g->nic_path));
            else
                fprintf(f, "-\n");
        }
    }
    if (t->nnics) {
        int w = widest(t, false);
        fprintf(f, "\nNIC  PCI           NUMA  %-*s  kind     link\n", w, "name");
        for (int i = 0; i < t->nnics; i++) {
            const struct ry_topo_nic *n = &t->nics[i];
            bandwidth(n->gbs, bw);
            snprintf(numa, sizeof numa, n->numa < 0 ? "?" : "%d", n->numa);
            fprintf(f, "%3d  %-12s  %4s  %-*s  %-7s  %s\n", i, *n->pci ? n->pci : "-", numa, w, n->name, n->kind, bw);
        }
    }
}

static void path_matrix(const struct ry_topo *t, FILE *f)
{
    static const char *const meaning[] = {
        [RY_PATH_NVL] = "NVLink, direct or through NVSwitch",     [RY_PATH_PIX] = "one PCIe switch",
        [RY_PATH_PXB] = "several PCIe switches",                  [RY_PATH_PHB] = "the processor's PCIe host bridge",
        [RY_PATH_SYS] = "from processor to processor",            [RY_PATH_UNKNOWN] = "not known"};
    bool used[RY_PATH_UNKNOWN + 1] = {false};
    if (!t->ngpus || t->ngpus + t->nnics < 2)
        return;
    fprintf(f, "\n%-6s", "");
    for (int j = 0; j < t->ngpus + t->nnics; j++) {
        char head[24];
        snprintf(head, sizeof head, j < t->ngpus ? "GPU%d" : "NIC%d", j < t->ngpus ? j : j - t->ngpus);
        fprintf(f, " %5s", head);
    }
    for (int i = 0; i < t->ngpus; i++) {
        char head[24];
        snprintf(head, sizeof head, "GPU%d", i);
        fprintf(f, "\n%-6s", head);
        for (int j = 0; j < t->ngpus + t->nnics; j++) {
            enum ry_path p = j < t->ngpus ? t->gpu_path[i * t->ngpus + j] : t->nic_path[i * t->nnics + j - t->ngpus];
            used[p] = true;
            fprintf(f, " %5s", p == RY_PATH_LOC ? "-" : ry_path_name(p));
        }
    }
    fprintf(f, "\n\n");
    for (int p = RY_PATH_NVL; p <= RY_PATH_UNKNOWN; p++)
        if (used[p])
            fprintf(f, "%-3s  %s\n", ry_path_name((enum ry_path)p), meaning[p]);
}

int ry_topo_write_text(const struct ry_topo *t, FILE *f, struct ry_err *err)
{
    summary(t, f);
    numa_table(t, f);
    device_tables(t, f);
    path_matrix(t, f);
    return 0;
}
