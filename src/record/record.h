/*
 * record.h: writing down what a process saw: the trace.
 *
 * Owns: the trace files of this process (one .jsonl, the matrices as .npy), the buffers between the job's threads and the
 * one writer thread, the limits, and what happens when the disk is full. The format is docs/trace-format.md, read back by
 * record/trace.h. Not: deciding what is worth recording (engine), nor reports (tools).
 *
 * Guarantees: functions marked [job] are called on the job's threads: they never block, never take a lock, never touch a
 * file, and allocate only on a thread's first call (its ring buffer of `buffer_bytes`). When a ring is full the record is
 * dropped and counted; matrices stay exact, because what is dropped is added to them by the thread that drops it. The
 * writer flushes at least twice a second, so a killed job loses less than the last second. A failed write (disk full,
 * folder gone) stops recording with one warning and the job goes on; what is on disk stays readable.
 */
#ifndef RY_RECORD_RECORD_H
#define RY_RECORD_RECORD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "cluster.h"

struct ry_record; /* one per process */
struct ry_record_comm;

struct ry_record_config {
    const char *dir;       /* made if absent (one level) */
    uint64_t max_bytes;    /* of all files of this process */
    uint64_t buffer_bytes; /* per thread */
    double matrix_seconds; /* how often matrices are saved, 0: at the end only */
    const char *nccl_path; /* noted in the head */
    int nccl_version;
};

/** Open the trace of this process; starts the writer thread. NULL with `err` when the folder cannot be written. */
struct ry_record *ry_record_open(const struct ry_record_config *config, struct ry_err *err);

struct ry_record_comm_info {
    char id[17];      /* 16 hex digits: the same on all ranks of the communicator, unique in the job */
    char parent[17];  /* "" where there is none */
    const char *name; /* as the job named it, or NULL */
    const char *birth; /* "init", "init_all", "split", "shrink", "grow" */
    int nranks, rank, device;
    struct ry_seat seat; /* of this rank; seat.rank == rank */
};

/** Begin recording a communicator. Copies `info`. NULL when out of memory: the communicator is then not recorded. */
struct ry_record_comm *ry_record_comm(struct ry_record *rec, const struct ry_record_comm_info *info);

/** The complete cluster map of `comm` is known (or is not: `why` then says which ranks are missing, `map` is NULL). */
void ry_record_map(struct ry_record *rec, struct ry_record_comm *comm, const struct ry_cluster *map, const char *why);

struct ry_record_exchange {
    uint64_t number;  /* of the exchange on its communicator, from 0 */
    uint64_t wall_ns; /* when it was issued */
    int type;         /* ncclDataType_t */
    uint32_t type_bytes;
    bool one_call;    /* ncclAlltoAll */
    bool captured;    /* into a CUDA graph: recorded once, may run many times */
    const uint64_t *send_count, *recv_count; /* [nranks], elements */
    uint64_t row_elems; /* elements of one row; 0: not known */
    const char *row_source; /* "set", "ratio" or "gcd"; a string constant; NULL if not known */
    const char *direction;  /* "go" or "return"; a string constant; NULL if not known */
    /* the latest all-gather of int64 since the exchange before: Megatron's expert counts; gather_count 0: none */
    char gather_comm[17];
    uint64_t gather_count;
    /* where it was agreed on (NULL: it was not, and what follows means nothing) */
    const char *strategy;      /* a string constant, at most 15 characters */
    double waited_us, late_us; /* how long the job's thread waited for the verdict; of it for other ranks */
    double plain_us;           /* what the model says plain NCCL would have taken; 0: not known */
    bool verify;               /* carried out both ways */
};

/** [job] Record one exchange and add it to the matrices. */
void ry_record_exchange(struct ry_record *rec, struct ry_record_comm *comm, const struct ry_record_exchange *x);

/** Exchange `number` took `us` microseconds on the device. Any thread. [job] guarantees hold. */
void ry_record_duration(struct ry_record *rec, struct ry_record_comm *comm, uint64_t number, double us);

/* What a search for equal rows found in what this rank sent to other nodes in exchange `number`. */
struct ry_record_rows {
    uint64_t number;
    const char *direction; /* as in its exchange */
    uint64_t row_bytes;
    uint64_t rows, distinct, zero; /* rows; of them different, for each node by itself; of them all zero bytes */
    uint64_t cross, packed; /* bytes across nodes as they are, and with equal rows sent once */
    double waited_us;       /* how long the job's thread waited for the answer; 0: it did not */
    const char *strategy;   /* of the exchange: a string constant; NULL: not agreed on */
};

/** [job] Record that; before or after the exchange itself. Dropped where there is no room, and counted with the durations. */
void ry_record_rows(struct ry_record *rec, struct ry_record_comm *comm, const struct ry_record_rows *rows);

/**
 * One named counter of a communicator, as it stands at its end. The report infers what a communicator is for from
 * "calls.allreduce", "calls.allgather", "calls.reducescatter", "calls.broadcast", "calls.reduce", "calls.gather",
 * "calls.scatter", "calls.send", "calls.recv" and "plain_groups", and shows "short_of_staging", "over_ucx" and "verify_differs".
 */
struct ry_record_counter {
    const char *name;
    uint64_t value;
};

/** The communicator ended ("destroy", "abort", "revoke", "exit"). Its last matrices are saved; `comm` is gone after. */
void ry_record_comm_end(struct ry_record *rec, struct ry_record_comm *comm, const char *how,
                        const struct ry_record_counter *counters, int ncounters);

/** Flush everything, write the end line, stop the writer. Safe to call while other threads still record (they drop). */
void ry_record_close(struct ry_record *rec);

#endif
