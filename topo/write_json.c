/* write_json.c: a topology as JSON. The schema is docs/topology-json.md; a change of meaning raises its version. */
#include "topo_internal.h"

#include <string.h>

#include <jansson.h>

#define SCHEMA_VERSION 1

static json_t *text_or_null(const char *s)
{
    if (!s || !*s)
        return json_null();
    json_t *j = json_string(s);
    return j ? j : json_null(); /* not UTF-8: a saved file may hold anything */
}

static json_t *number_or_null(double v)
{
    return v > 0 ? json_real(v) : json_null();
}

static json_t *index_or_null(int i)
{
    return i >= 0 ? json_integer(i) : json_null();
}

static json_t *numa_nodes(const struct ry_topo *t)
{
    json_t *list = json_array();
    for (hwloc_obj_t n = NULL; (n = hwloc_get_next_obj_by_type(t->hw, HWLOC_OBJ_NUMANODE, n));) {
        hwloc_obj_t p = hwloc_get_ancestor_obj_by_type(t->hw, HWLOC_OBJ_PACKAGE, n);
        json_int_t bytes = (json_int_t)n->attr->numanode.local_memory;
        json_array_append_new(list, json_pack("{s:i, s:o, s:i, s:o}", "index", (int)n->os_index, "package",
                                              index_or_null(p ? (int)p->logical_index : -1), "threads",
                                              hwloc_bitmap_weight(n->cpuset), "memory_bytes",
                                              bytes ? json_integer(bytes) : json_null()));
    }
    return list;
}

static json_t *gpus(const struct ry_topo *t)
{
    json_t *list = json_array();
    for (int i = 0; i < t->ngpus; i++) {
        const struct ry_topo_gpu *g = &t->gpus[i];
        json_array_append_new(
            list, json_pack("{s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "index", i, "name", text_or_null(g->name), "pci",
                            text_or_null(g->pci), "uuid", text_or_null(g->uuid), "numa", index_or_null(g->numa),
                            "nvlink_gbs", number_or_null(g->nvlink_gbs), "nearest_nic", index_or_null(g->nearest_nic),
                            "nic_path", g->nearest_nic >= 0 ? json_string(ry_path_name(g->nic_path)) : json_null()));
    }
    return list;
}

static json_t *nics(const struct ry_topo *t)
{
    json_t *list = json_array();
    for (int i = 0; i < t->nnics; i++) {
        const struct ry_topo_nic *n = &t->nics[i];
        json_array_append_new(list, json_pack("{s:i, s:o, s:o, s:s, s:o, s:o}", "index", i, "name", text_or_null(n->name),
                                              "pci", text_or_null(n->pci), "kind", n->kind, "numa", index_or_null(n->numa),
                                              "gbs", number_or_null(n->gbs)));
    }
    return list;
}

static json_t *path_matrix(const enum ry_path *m, int rows, int columns)
{
    json_t *list = json_array();
    for (int i = 0; i < rows; i++) {
        json_t *row = json_array();
        for (int j = 0; j < columns; j++)
            json_array_append_new(row, json_string(ry_path_name(m[i * columns + j])));
        json_array_append_new(list, row);
    }
    return list;
}

static json_t *gbs_matrix(const struct ry_topo *t)
{
    json_t *list = json_array();
    for (int i = 0; i < t->ngpus; i++) {
        json_t *row = json_array();
        for (int j = 0; j < t->ngpus; j++)
            json_array_append_new(row, number_or_null(t->gpu_gbs[i * t->ngpus + j]));
        json_array_append_new(list, row);
    }
    return list;
}

int ry_topo_write_json(const struct ry_topo *t, FILE *f, struct ry_err *err)
{
    hwloc_obj_t root = hwloc_get_root_obj(t->hw);
    const char *product = hwloc_obj_get_info_by_name(root, "DMIProductName");
    if (!product)
        product = hwloc_obj_get_info_by_name(root, "PlatformModel");
    json_t *j = json_pack("{s:s, s:i, s:o, s:o, s:o, s:o, s:i, s:i, s:o, s:i, s:i, s:o, s:o, s:o, s:o, s:o}", "schema",
                          "railyard-topology", "version", SCHEMA_VERSION, "source", text_or_null(t->source), "host",
                          text_or_null(hwloc_obj_get_info_by_name(root, "HostName")), "product", text_or_null(product),
                          "note", text_or_null(ry_topo_note(t)), "packages", hwloc_get_nbobjs_by_type(t->hw, HWLOC_OBJ_PACKAGE), "threads",
                          hwloc_get_nbobjs_by_type(t->hw, HWLOC_OBJ_PU), "numa", numa_nodes(t), "nvswitches", t->nswitches,
                          "unknown_pci_devices", t->nunknown, "gpus", gpus(t), "nics", nics(t), "gpu_paths",
                          path_matrix(t->gpu_path, t->ngpus, t->ngpus), "gpu_gbs", gbs_matrix(t), "nic_paths",
                          path_matrix(t->nic_path, t->ngpus, t->nnics));
    if (!j)
        return ry_fail(err, "topology of %s: no memory for JSON", t->source);
    int rc = json_dumpf(j, f, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    json_decref(j);
    fputc('\n', f);
    return rc ? ry_fail(err, "cannot write the topology of %s as JSON", t->source) : 0;
}
