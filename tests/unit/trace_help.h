/* trace_help.h: what test_record.c and test_trace.c share: a folder, random exchanges, and the truth to compare with.
 */
#ifndef RY_TEST_TRACE_HELP_H
#define RY_TEST_TRACE_HELP_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "record/record.h"
#include "record/trace.h"

static char dir[64];
static struct ry_err err;
static uint64_t seed;

/* splitmix64 */
static inline uint64_t next(uint64_t *s)
{
    uint64_t z = *s += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static void setup(void)
{
    strcpy(dir, "/tmp/ry-trace-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static void teardown(void)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    ck_assert_int_eq(system(cmd), 0);
}

static inline void choose_seed(void)
{
    const char *s = getenv("RY_TEST_SEED");
    seed = s ? strtoull(s, NULL, 0) : (uint64_t)time(NULL) * 1000003u ^ (uint64_t)getpid();
    printf("seed %llu (RY_TEST_SEED repeats it)\n", (unsigned long long)seed);
    fflush(stdout); /* Check forks: buffered text would be printed again */
}

static inline struct ry_record_config config_for(const char *where)
{
    return (struct ry_record_config){.dir = where,
                                     .max_bytes = 1 << 30,
                                     .buffer_bytes = 1 << 20,
                                     .matrix_seconds = 0,
                                     .nccl_path = "/lib/libnccl.so.2",
                                     .nccl_version = 22809};
}

static inline struct ry_record_comm_info info_for(const char *id, int nranks, int rank, const char *name,
                                                  int ranks_per_node)
{
    struct ry_record_comm_info i = {.name = name, .birth = "init", .nranks = nranks, .rank = rank, .device = rank % 8};
    snprintf(i.id, sizeof i.id, "%s", id);
    i.seat.version = RY_SEAT_VERSION;
    i.seat.rank = rank;
    snprintf(i.seat.node, sizeof i.seat.node, "node%d", rank / ranks_per_node);
    snprintf(i.seat.host, sizeof i.seat.host, "host%d", rank / ranks_per_node);
    return i;
}

/* Counts of exchange `number`, from rank i to rank j: any rank can compute them. */
static inline uint64_t count_of(uint64_t salt, uint64_t number, int i, int j)
{
    uint64_t s = salt ^ number * 1000003u ^ (uint64_t)i << 40 ^ (uint64_t)j << 52, v = next(&s);
    return v % 3 ? (v >> 8) % 5000 : 0;
}

static inline void fill(uint64_t salt, uint64_t number, int nranks, int rank, uint64_t *send, uint64_t *recv)
{
    for (int j = 0; j < nranks; j++) {
        send[j] = count_of(salt, number, rank, j);
        recv[j] = count_of(salt, number, j, rank);
    }
}

#endif
