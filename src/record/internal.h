/*
 * internal.h: what record.c (the job's threads) and writer.c (the one writer thread) share.
 *
 * Life times. A ry_record and its lanes are never freed, only emptied at the close: a thread of the job may look at
 * them at any time. A communicator is freed by the writer after its end, or at the close when no thread can be inside
 * any more.
 *
 * Who may touch what is said at each field: [job] the job's threads without a lock, [lock] under `lock`, [writer] the
 * writer.
 */
#ifndef RY_RECORD_INTERNAL_H
#define RY_RECORD_INTERNAL_H

#include <pthread.h>
#include <sys/stat.h>

#include "lines.h"
#include "record.h"
#include "ring.h"

/* Rows of a matrix file; docs/trace-format.md. */
enum { ROW_BYTES_SENT, ROW_BYTES_RECEIVED, ROW_SENDS, ROW_RECEIVES, ROWS };

enum state {
    OPEN,
    STOPPED, /* a write failed: nothing is recorded any more */
    CLOSED
};

/* One thread's ring. A thread that ends leaves its lane to the next new thread. */
struct lane {
    struct lane *next; /* set once, before the lane is seen */
    struct ry_record *rec;
    _Atomic bool busy;   /* the owner is inside a [job] function: the close waits for that */
    _Atomic bool vacant; /* its thread is gone */
    _Atomic bool poked;  /* the writer was woken because the ring is half full, and has not come yet */
    bool failed;         /* no memory for the ring: everything is dropped */
    struct ry_ring ring;
};

struct ry_record_comm {
    struct ry_record_comm *next; /* [lock], and read by the writer, the only one to remove */
    char id[17];
    int nranks, rank;
    char *name;                                      /* JSON text with quotes, or NULL */
    char file[192];                                  /* of its matrix */
    _Atomic uint64_t *lost;                          /* [job] [ROWS][nranks], what dropped records would have added */
    _Atomic uint64_t lost_exchanges, lost_durations; /* [job] */
    struct ry_text birth, map;                       /* [lock] lines ready to be written, empty when there are none */
    bool ended;                                      /* [lock], as are the next two */
    char how[16];
    json_t *counters;
    /* [writer] */
    uint64_t *sums; /* [ROWS][nranks] of the records that came through */
    uint64_t exchanges, saved_exchanges, told_exchanges, told_durations;
    bool saved, born, leaving; /* matrix written once; birth line written; ended when this round began */
    bool no_room;              /* made when the limit left no room for its matrix file */
};

enum record_kind { RECORD_EXCHANGE, RECORD_DURATION, RECORD_ROWS };

/* What lies in a ring. */
struct record {
    enum record_kind kind;
    struct ry_record_comm *comm;
    union {
        struct ry_record_exchange exchange; /* its count pointers are set by the writer, from counts[] */
        struct {
            uint64_t number;
            double us;
        } duration;
        struct ry_record_rows rows;
    };
    uint64_t counts[]; /* [2 * nranks] of an exchange: sent, received */
};

struct ry_record {
    struct ry_record *next_ever; /* all there were, so that none counts as leaked */
    unsigned forks;              /* how often this process had been forked off when it was opened */
    _Atomic int state;
    _Atomic bool sleeping; /* the writer waits until it is woken */
    _Atomic(struct lane *) lanes;
    _Atomic uint64_t biggest; /* bytes of the largest record of any communicator so far */
    uint64_t buffer_bytes;
    int wake;                     /* eventfd */
    pthread_mutex_t lock;         /* never taken by [job] functions */
    struct ry_record_comm *comms; /* [lock] */
    pthread_t writer;
    bool closing;                         /* [lock] the last round is due */
    char dir[1024], stem[128], name[160]; /* the folder, HOST-PID, the .jsonl's name; for messages and file names */
    int dirfd, fd;
    /* [writer] */
    struct stat file;
    uint64_t max_bytes, line_bytes, matrix_bytes, matrix_ns, exchanges, dropped, not_written;
    struct ry_text text;
    bool full;         /* max_bytes reached: no more lines of exchanges, matrices go on */
    char stopped[512]; /* why, for the end line */
};

/** Wake the writer. [job] */
void ry_record_wake(struct ry_record *rec);
/** The writer thread. */
void *ry_record_writer(void *rec);
void ry_record_comm_free(struct ry_record_comm *comm);

#endif
