/* cluster.c: see cluster.h. */
#include "cluster.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* FNV-1a; only tells long identities apart that begin alike, so nothing stronger is needed. */
static uint64_t hash_text(const char *s)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (; *s; s++)
        h = (h ^ (unsigned char)*s) * UINT64_C(0x100000001b3);
    return h;
}

/* First line of a small file, "" if it cannot be read. */
static void read_line(const char *path, char *out, size_t size)
{
    ssize_t n = -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        n = read(fd, out, size - 1);
        close(fd);
    }
    out[n > 0 ? n : 0] = 0;
    out[strcspn(out, "\n")] = 0;
}

void ry_node_identity(char out[64])
{
    const char *id = getenv("NCCL_HOSTID");
    char text[512];
    if (!id || !*id) { /* an empty one names no host: NCCL would take all nodes for one */
        char boot[64], host[256];
        if (gethostname(host, sizeof host))
            host[0] = 0;
        host[sizeof host - 1] = 0;
        read_line("/proc/sys/kernel/random/boot_id", boot, sizeof boot);
        /* The host name beside the boot id: containers of one machine are told apart, as NCCL does. */
        snprintf(text, sizeof text, "%s%s%s", boot, *boot ? "/" : "", host);
        id = text;
    }
    size_t n = strlen(id);
    if (n < 64)
        memcpy(out, id, n + 1);
    else
        snprintf(out, 64, "%.46s~%016llx", id, (unsigned long long)hash_text(id));
}

/* Ranks by node identity, then rank: each node becomes one run that begins with its lowest rank. */
static int by_node(const void *a, const void *b, void *arg)
{
    const struct ry_seat *seats = arg;
    int ra = *(const int *)a, rb = *(const int *)b;
    int c = strcmp(seats[ra].node, seats[rb].node);
    return c ? c : (ra > rb) - (ra < rb);
}

/* Seats come off the wire: make every text end inside its field before anybody reads it. */
static void terminate(struct ry_seat *s)
{
#define RY_END(field) s->field[sizeof s->field - 1] = 0
    RY_END(railyard);
    RY_END(node);
    RY_END(host);
    RY_END(gpu_name);
    RY_END(gpu_pci);
    RY_END(gpu_uuid);
    RY_END(nic);
#undef RY_END
}

struct ry_cluster *ry_cluster_build(const struct ry_seat *seats, int nranks, struct ry_err *err)
{
    if (nranks <= 0)
        return ry_fail(err, "cluster map: %d ranks, but a communicator has at least one", nranks), NULL;
    for (int i = 0; i < nranks; i++)
        if (seats[i].rank != i)
            return ry_fail(err, "cluster map: the seat in place %d says that it is rank %d", i, seats[i].rank), NULL;

    size_t n = (size_t)nranks;
    struct ry_cluster *c = calloc(1, sizeof *c);
    int *order = malloc(n * sizeof *order);
    if (c) {
        c->nranks = nranks;
        c->seats = malloc(n * sizeof *c->seats);
        c->node = malloc(n * sizeof *c->node);
        c->local = malloc(n * sizeof *c->local);
        c->node_size = calloc(n, sizeof *c->node_size);
        c->node_first = malloc(n * sizeof *c->node_first);
    }
    if (!order || !c || !c->seats || !c->node || !c->local || !c->node_size || !c->node_first) {
        free(order);
        ry_cluster_free(c);
        return ry_fail(err, "cluster map: no memory for %d ranks", nranks), NULL;
    }
    memcpy(c->seats, seats, n * sizeof *seats);
    for (int i = 0; i < nranks; i++) {
        terminate(&c->seats[i]);
        order[i] = i;
    }
    qsort_r(order, n, sizeof *order, by_node, c->seats);

    /* First note for each rank the lowest rank of its node and its place there, then number the nodes in rank order. */
    int first = 0;
    for (int k = 0; k < nranks; k++) {
        if (strcmp(c->seats[order[k]].node, c->seats[order[first]].node))
            first = k;
        c->node[order[k]] = order[first];
        c->local[order[k]] = k - first;
    }
    free(order);
    for (int r = 0; r < nranks; r++) {
        if (c->node[r] == r) {
            c->node_first[c->nnodes] = r;
            c->node[r] = c->nnodes++;
        } else {
            c->node[r] = c->node[c->node[r]]; /* of a lower rank, so already its number */
        }
        c->node_size[c->node[r]]++;
    }
    return c;
}

void ry_cluster_free(struct ry_cluster *c)
{
    if (!c)
        return;
    free(c->seats);
    free(c->node);
    free(c->local);
    free(c->node_size);
    free(c->node_first);
    free(c);
}
