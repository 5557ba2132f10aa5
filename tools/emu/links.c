/* links.c: see links.h. */
#include "links.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

void ry_emu_links_init(struct ry_emu_links *seg, double nic_gbit, double nic_us, double nvlink_gbit, double nvlink_us)
{
    seg->nic = (struct ry_emu_rate){nic_gbit / 8, (uint64_t)(nic_us * 1000)};
    seg->nvlink = (struct ry_emu_rate){nvlink_gbit / 8, (uint64_t)(nvlink_us * 1000)};
    seg->magic = RY_EMU_LINKS_MAGIC;
}

static struct ry_emu_links *mapped;

static void map(void)
{
    const char *path = getenv(RY_EMU_LINKS_ENV);
    if (!path || !*path)
        return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    struct stat st;
    if (fstat(fd, &st) == 0 && (size_t)st.st_size >= sizeof(struct ry_emu_links)) {
        void *p = mmap(NULL, sizeof(struct ry_emu_links), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (p != MAP_FAILED && ((struct ry_emu_links *)p)->magic == RY_EMU_LINKS_MAGIC)
            mapped = p;
        else if (p != MAP_FAILED)
            munmap(p, sizeof(struct ry_emu_links));
    }
    close(fd);
}

struct ry_emu_links *ry_emu_links_map(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, map);
    return mapped;
}

struct ry_emu_link *ry_emu_link_claim(struct ry_emu_link *table, size_t n, uint64_t key)
{
    for (size_t i = 0; i < n; i++) {
        struct ry_emu_link *l = &table[(key + i) % n];
        uint64_t none = 0;
        if (atomic_load(&l->key) == key || atomic_compare_exchange_strong(&l->key, &none, key) || none == key)
            return l;
    }
    return NULL;
}

static uint64_t take(_Atomic uint64_t *free_at, uint64_t ready, uint64_t duration)
{
    uint64_t free = atomic_load(free_at), start;
    do
        start = free > ready ? free : ready;
    while (!atomic_compare_exchange_weak(free_at, &free, start + duration));
    return start;
}

struct ry_emu_slot ry_emu_links_reserve(struct ry_emu_link *from, struct ry_emu_link *to,
                                        const struct ry_emu_rate *rate, uint64_t ready, size_t bytes)
{
    uint64_t d = rate->bytes_per_ns > 0 ? (uint64_t)((double)bytes / rate->bytes_per_ns) : 0;
    /* Cut-through: bytes enter the far port as they leave the near one, unless that port is taken; what waits for it
     * waits in the network and does not hold up the near port. */
    uint64_t out = take(&from->out_free, ready, d), in = take(&to->in_free, out, d);
    return (struct ry_emu_slot){out + d, in + d, in + d + rate->latency_ns};
}
