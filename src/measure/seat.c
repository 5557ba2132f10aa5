/* seat.c: see seat.h. */
#include "seat.h"

#include <string.h>
#include <unistd.h>

void ry_seat_take(struct ry_seat *seat, const struct ry_device *device, const struct ry_topo *topo, int rank,
                  int ordinal, uint32_t settings_hash)
{
    *seat = (struct ry_seat){.version = RY_SEAT_VERSION,
                             .settings_hash = settings_hash,
                             .rank = rank,
                             .pid = (int32_t)getpid(),
                             .railyard = RAILYARD_VERSION};
    ry_node_identity(seat->node);
    gethostname(seat->host, sizeof seat->host - 1);
    struct ry_device_id id;
    if (!device || ordinal < 0 || device->identify(ordinal, &id, NULL))
        return;
    memcpy(seat->gpu_name, id.name, sizeof seat->gpu_name);
    memcpy(seat->gpu_pci, id.pci, sizeof seat->gpu_pci);
    memcpy(seat->gpu_uuid, id.uuid, sizeof seat->gpu_uuid);
    const struct ry_topo_gpu *gpu = topo && *id.pci ? ry_topo_gpu_by_pci(topo, id.pci) : NULL;
    if (!gpu)
        return;
    seat->nvlink_gbs = gpu->nvlink_gbs;
    if (gpu->nearest_nic >= 0) {
        const struct ry_topo_nic *nic = ry_topo_nic(topo, gpu->nearest_nic);
        memcpy(seat->nic, nic->name, sizeof seat->nic);
        seat->nic_gbs = nic->gbs;
    }
}
