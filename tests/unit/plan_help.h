/*
 * plan_help.h: random exchanges, their plans, and carrying these out on host memory, for the tests of plans and of the
 * verifier. Random numbers come from RY_TEST_SEED, the same for each test of a program whichever are run.
 */
#ifndef RY_TESTS_PLAN_HELP_H
#define RY_TESTS_PLAN_HELP_H

#include <check.h>
#include <stdbool.h>
#include <stdint.h>

#include "cluster.h"
#include "plan/plan.h"
#include "plan/verify.h"
#include "rounds.h"

/** Below `below`, which is not 0. */
uint64_t rnd(uint64_t below);

/** Ranks on nodes: where `node` says that rank r of n sits. */
struct ry_cluster *cluster_of(int n, int (*node)(int rank, int n, int nodes), int nodes);
int blocks(int r, int n, int nodes);
int dealt(int r, int n, int nodes);
int anywhere(int r, int n, int nodes);
int uneven(int r, int n, int nodes);
struct ry_cluster *random_cluster(int n);

struct job {
    int n;
    struct ry_cluster *cluster;
    uint64_t *matrix;
    uintptr_t **send_at, **recv_at; /* NULL: apart */
    struct ry_plan **plans;
    /* Which rows are equal, and so what ranks found: [n * nnodes]; NULL: nobody looked. */
    struct ry_row_map *maps;
    struct ry_repeats *repeats;
    /* The exchange returns one whose matrix was the other way round: of that are maps and repeats. Plans are by `sum`.
     */
    bool sums;
    int twins;         /* ranks of each twin communicator, which send the same; 0: there are none */
    int chunks;        /* of plans by dedup */
    int parts;         /* of messages, to be set before their rows; 0: 1; -1: any */
    bool blind; /* plans are built without the addresses, and proved without them */
};
/** Any shape of cluster and matrix, cells up to `most`; with addresses (of memory that does not exist) unless `apart`.
 */
struct job random_job(int n, uint64_t most, bool apart);
/** Equal rows of all sorts: of any width, some ranks having not looked; some cells are made whole rows before. */
void random_rows(struct job *job);
/** The same with rows of fp32 that divide what is cut into them: what can be summed on the way back. */
void random_whole_rows(struct job *job);
/** The same for all rows alike: `equal` of each run of so many rows of `row_bytes` bytes are the same row. */
void even_rows(struct job *job, uint64_t row_bytes, uint64_t equal);
/** The exchange becomes the return of what it was: for plans by `sum`. */
void turn_round(struct job *job);
/** Every rank's plan, into job->plans; and proved by the job's addresses, or rows. */
void build_all(struct job *job, enum ry_strategy strategy);
int verify(const struct job *job, struct ry_err *err);
void free_plans(struct job *job);
void free_job(struct job *job);

/* Memory of a job whose addresses are real. */
struct memory {
    unsigned char **send, **recv, **stage; /* one block per rank */
};
/** Give a job without addresses real ones; `how` its send buffers are laid out: 0 to 3. */
void make_real(struct job *job, struct memory *mem, int how);
/** Carry the plans out on it, sums in fp32, with no thought for proofs. "", or what went wrong. */
const char *interpret(const struct job *job, const struct memory *mem);
void free_memory(struct job *job, struct memory *mem);

double seconds(void);
/** Planning takes no longer: the fastest time seen so far, or of more if need be, since shared machines run at half their pace at
 * times. Sanitized builds are not asked. */
void builds_within(const struct ry_plan_input *in, double fastest_us, double limit_us);

/** Reads the seed, prints it, runs the tests: the exit status. */
int run_tests(const char *name, const TTest *const *tests);

#endif
