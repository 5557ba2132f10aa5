/*
 * engine.h: what the engine's own files share.
 *
 * Owns: the process's one engine, and what is kept of each communicator. engine.c brings communicators up and down,
 * reissue.c joins a communicator's agreement, exchange.c is the way of one exchange; look.c (equal rows), sum.c (summed
 * returns), redirect.c (rows that go elsewhere), twins.c (communicators that send the same), later.c (calls that
 * return first), across.c (ranks that meet over UCX), contention.c and durations.c (what was timed) are parts of it. Not for
 * anybody else.
 */
#ifndef RY_ENGINE_ENGINE_H
#define RY_ENGINE_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "across.h"
#include "base/log.h"
#include "base/settings.h"
#include "cluster.h"
#include "contention.h"
#include "control/rendezvous.h"
#include "control/talk.h"
#include "device/device.h"
#include "direction.h"
#include "hooks.h"
#include "later.h"
#include "node_comm.h"
#include "pace.h"
#include "pairing.h"
#include "policy.h"
#include "record/record.h"
#include "redirect.h"
#include "repeats.h"
#include "row_width.h"
#include "run/run.h"
#include "sampler.h"
#include "topo.h"
#include "twins.h"
#include "waits.h"

/* What is known of the rows of the exchange at hand. */
struct rows_seen {
    uint64_t elems; /* of one row; 0: not known */
    const char *source;
    uint64_t bytes; /* by which equal ones are looked for */
    enum ry_direction direction;
    struct ry_answered answered;
    struct ry_habit *habit; /* of its kind */
    uint64_t cross;         /* bytes that it sends to other nodes */
};

/* What an exchange's begin leaves for its take and end: of the calling thread, or with what it gives away. */
struct way {
    uint64_t number, wall_ns;
    struct ry_sample *sample;
    bool captured;
    bool redirected;      /* what goes is another exchange (redirect.h) */
    bool given_away;      /* take and end are, or were, done as one by ry_exchange_carry() */
    bool passed;          /* its own yardmaster does not ask about it, and all is said */
    bool together;        /* with the communicator's twins */
    bool timed;           /* the yardmaster wants to know how long it takes */
    bool met;             /* so does who wants to know what runs beside what (contention.h) */
    uint64_t packed_out;  /* bytes that cross, if it goes by dedup */
    const char *strategy; /* NULL: not agreed on */
    bool verify;
    enum ry_node_order node;   /* with the verdict */
    bool cross;                /* UCX carries what crosses nodes: the same */
    double waited_us, late_us; /* for the verdict; of it for other ranks */
    double twins_us, twins_late_us; /* for one of all twins before, that was not replica */
    int chunks;                /* of the plan, as the yardmaster says */
    double plain_us;           /* what plain NCCL would take, as the yardmaster has it; 0: not told */
    struct rows_seen rows;
    /* the latest all-gather of 64-bit integers since the exchange before */
    char gather_comm[17];
    uint64_t gather_count;
};

/* The latest search for equal rows. */
struct searched {
    bool aside; /* under way, and nobody waits for it */
    uint64_t number;
    enum ry_direction direction;
    uint64_t row_bytes, cross, packed;
    uint64_t *send; /* [nranks], bytes */
    struct ry_scan_sums sums;
    double waited_us; /* by the job's thread, for the answer */
    const char *strategy; /* as the exchange was agreed on; NULL: it was not */
};

/* The exchange at hand, where it returns one that may be summed. */
struct summing {
    struct ry_pair *pair; /* what it returns; NULL: nothing that is remembered */
    struct ry_plan *plan; /* NULL: it may not */
    uint32_t copies;
};

/* What a communicator needs so that its exchanges can be reissued. Made when its ranks have met; NULL before, and for ever where
   nothing can be gained or somebody cannot. */
struct reissue {
    struct ry_cluster *map;
    struct ry_talk *talk;       /* NULL: nothing is reissued, equal rows are looked for to be reported */
    struct ry_chooser *chooser; /* on the yardmaster */
    struct ry_runner *runner;
    struct ry_node_comm *node;  /* NULL: none, ever */
    struct ry_twins *twins;     /* NULL: none, ever */
    struct ry_across *across;   /* what can carry what crosses nodes instead of NCCL; NULL: nothing */
    struct ry_slice slices[RY_STRATEGIES]; /* laid out at first use */
    uint64_t *send, *recv;                 /* [nranks] bytes of the exchange at hand */
    uintptr_t *send_at, *recv_at;
    bool short_before; /* the exchange before had few bytes (exchange.c) */
    struct ry_habits habits;
    struct ry_repeats *repeats; /* [nnodes]: what the latest search found */
    struct searched searched;
    struct ry_pairs pairs;
    struct summing summing;
    struct ry_redirected redirected;
    struct {
        struct ry_load load;
        double saving; /* bytes; 0: nothing promises any */
    } promising;       /* the exchange since the last SEEN that packing would save most of */
    void *manifest;    /* room for what this rank adds to it */
    uint64_t staging_wanted; /* by the latest verdict */
    int parts;               /* that messages are to be looked for in; 0: 1 */
    bool quit;               /* a mismatch was found: never again */
    _Atomic bool aborted;
    struct ry_waits waits;    /* for verdicts */
    struct ry_waits messages; /* the same without the waiting for other ranks: what agreeing itself takes */
    struct {
        _Atomic uint64_t number, bytes; /* 1 + the exchange; what this rank had to move in it */
        _Atomic double us;              /* 0: not known yet, or told */
        _Atomic uint64_t out, in, own_out, own_in; /* struct ry_beside: what ran beside it */
        _Atomic double share;
    } moved[64]; /* the latest exchanges agreed on, until the yardmaster was told how long they took */
    struct ry_pace *pace; /* on the yardmaster */
    struct {
        struct ry_sample *sample; /* begun at the end of exchange `number`; NULL: none */
        uint64_t number, bytes;
        enum ry_pace_way way;
        void *stream;
    } pacing;
    uint64_t carried_out[RY_STRATEGIES], verified;
    uint64_t over_node, over_ucx; /* of those carried out: by means of `node`; of `across` */
};

/* What became of a communicator's exchanges, for the end of its trace. */
struct reissue_counts {
    uint64_t agreed, by_strategy[RY_STRATEGIES];
    uint64_t verified, verify_differs; /* comparisons that came out equal, and 1 if one did not */
    uint64_t short_of_staging;         /* told on the yardmaster only: exchanges that went direct for want of it */
    uint64_t over_ucx;                 /* the same: UCX carried what crossed nodes */
};

struct comm {
    struct ry_comm_face face; /* first: the preload reads it */
    struct comm *next;
    uint64_t key; /* the same on all ranks; its hexadecimal form is the id in traces */
    char id[17];
    struct ry_comm_info info;
    struct ry_ticket ticket; /* where this communicator's ranks meet, and its children's */
    struct ry_seat seat;
    struct ry_row_width rows;
    struct ry_directions directions;
    struct ry_record_comm *record;
    _Atomic(struct reissue *) reissue;
    struct reissue_counts counts; /* from ry_reissue_close() on */
    struct ry_later later;
    int seat_beside; /* in ry_engine.contention; -1: none */
    struct {
        _Atomic uint64_t number, out, in; /* 1 + the exchange; bytes across nodes, as they go */
        _Atomic unsigned weight;
    } crossing[64]; /* the latest that are timed for contention's sake */
    _Atomic double clocked_us, met_us; /* how long those took that are settled, and ran beside others */
};

struct engine {
    struct ry_host host;
    struct ry_settings settings;
    struct ry_combine combine;
    int chunks; /* RAILYARD_CHUNKS; 0: by the cost model */
    _Atomic int forced; /* strategy that RAILYARD_STRATEGY names, -1: auto */
    bool observe;       /* RAILYARD_STRATEGY=observe: nothing is ever reissued */
    uint32_t settings_hash;
    struct ry_record *record;
    struct ry_rendezvous *rendezvous;
    struct ry_rendezvous *local; /* host of INIT_ALL's communicators, on loopback where no other node would find it */
    struct ry_control *control;  /* NULL: not to be had, nothing is reissued */
    struct ry_hub *hub;          /* for data over UCX; NULL: NCCL carries everything */
    enum ry_transport transport_asked;
    _Atomic int transport;       /* enum ry_transport: RAILYARD_TRANSPORT, or as the job says by railyard_strategy() */
    bool staged; /* through host memory, even where UCX can do without */
    struct ry_sampler *sampler;
    struct ry_contention *contention; /* NULL: nothing is timed */
    const struct ry_device *device; /* NULL: none could be opened */
    struct ry_nccl nccl;
    struct ry_topo *topo; /* NULL until topology_known() has returned, and if it cannot be read */
    pthread_t topo_thread;
    pthread_mutex_t lock; /* guards `comms` and the starting of parts; no [job] function takes it */
    bool topo_running, parts_tried;
    struct comm *comms;
    _Atomic bool closed;
    _Atomic int busy; /* hooks running now, so that closing can wait for them */
};
extern struct engine ry_engine;

/** Hooks come in here and leave again; after closing none comes in. */
static inline bool ry_engine_enter(void)
{
    atomic_fetch_add(&ry_engine.busy, 1);
    if (!atomic_load(&ry_engine.closed))
        return true;
    atomic_fetch_sub(&ry_engine.busy, 1);
    return false;
}

static inline void ry_engine_leave(void)
{
    atomic_fetch_sub(&ry_engine.busy, 1);
}

/* reissue.c */

/** The ranks of `c` have met: join the agreement if there is something to agree on. Takes `map` if so (true). */
bool ry_reissue_open(struct comm *c, struct ry_cluster *map, const void *address, size_t address_size);
/** End it, `aborted` telling that the communicator's streams may never get anywhere. Leaves its counts in `c`. */
void ry_reissue_close(struct comm *c, bool aborted);
/** The control address that others need of this rank, if it is the yardmaster; NULL with *size 0 otherwise. */
const void *ry_reissue_address(const struct comm *c, size_t *size);
/** May this rank's side of the communicator be reissued at all? Goes into its seat. */
bool ry_reissue_able(const struct ry_comm_info *info);

/** What the links of `map` are worth, by calibration or by a guess. */
void ry_reissue_model(struct ry_cost_model *model, const struct ry_cluster *map);

/* engine.c: the communicator has ended, and nobody is in a hook of it; frees it */
void ry_comm_end(struct comm *c, enum ry_death how, const struct ry_comm_counts *counts);

/* look.c */

/** What is known of the rows of this exchange; `r` may be NULL, else its counts are in bytes there. */
void ry_look_see(struct comm *c, struct reissue *r, const struct ry_exchange *x, struct rows_seen *rows);
/** Look at the answer of a search that nobody waited for, if there is one. */
void ry_look_pick_up(const struct comm *c, struct reissue *r);
/** Enqueue a search if one is due. True: this rank waits for the answer, ry_look_wait(), before its manifest. */
bool ry_look(const struct comm *c, struct reissue *r, const struct ry_buffers *b, const struct rows_seen *rows,
             uint64_t number, bool engaged);
/** Wait for it: true, and r->repeats and r->searched tell; false: it failed, takes too long, or the communicator was aborted. */
bool ry_look_wait(const struct comm *c, struct reissue *r, const struct rows_seen *rows);
/** How the exchange was carried out; `waited`: after an answer, which was made use of if `packed`. */
void ry_look_done(const struct comm *c, struct reissue *r, struct rows_seen *rows, bool waited, const char *strategy,
                  bool packed);
/** Keep in mind for SEEN what packing this exchange would save. */
void ry_look_expect(struct reissue *r, const struct rows_seen *rows, int rank);

/* sum.c */

/** A search for equal rows is about to be enqueued that will be waited for: count the copies of rows as well. */
void ry_sum_count(const struct comm *c, struct reissue *r, const struct ry_buffers *b, const struct rows_seen *rows,
                  uint64_t number);
/** The exchange went out by dedup, as `plan`: keep what summing its return will need. */
void ry_sum_keep(const struct comm *c, struct reissue *r, const struct ry_buffers *b, const struct ry_plan *plan,
                 const struct ry_repeats *repeats, const struct rows_seen *rows, uint64_t number);
/** An exchange comes. May it be summed, for all this rank knows? Then r->summing holds the plan, b->kept its lists. What it
 *  answers is forgotten either way, at ry_sum_end(). */
void ry_sum_begin(const struct comm *c, struct reissue *r, struct ry_buffers *b, const struct rows_seen *rows, uint64_t number,
                  bool engaged);
/** This rank's word on it. */
void ry_sum_offer(const struct reissue *r, struct ry_side *side);
/** The plan, which is the caller's now. */
struct ry_plan *ry_sum_plan(struct reissue *r, struct ry_err *err);
/** It was summed. */
void ry_sum_tell(const struct comm *c, const struct reissue *r, const struct ry_plan *plan, const struct rows_seen *rows,
                 uint64_t number);
void ry_sum_end(struct reissue *r);

/* exchange.c: what verify mode has found by now (a mismatch ends the engagement); then the hooks of the same names */
void ry_exchange_look_at_checks(struct comm *c, struct reissue *r);
/** This rank's side of an exchange, in bytes, which stay in `r` until the next one is described. */
struct ry_buffers ry_exchange_describe(struct reissue *r, const struct ry_exchange *x);
void *ry_exchange_begin(void *handle, const struct ry_exchange *x);
bool ry_exchange_take(void *handle, const struct ry_exchange *x, void *cookie, int *result);
void ry_exchange_end(void *handle, const struct ry_exchange *x, void *cookie, int result);
/** The whole way of an exchange whose begin left `way`, on the calling thread, plain NCCL included. The ncclResult_t. */
int ry_exchange_carry(struct comm *c, const struct ry_exchange *x, const struct way *way);
void *ry_exchange_clock(void *handle, uint64_t ordinal, void *stream);
void ry_exchange_seen(void *handle, const struct ry_exchange *x, void *clock, uint64_t wall_ns, bool ok);
void ry_exchange_stray(void *handle);
void ry_exchange_aborting(void *handle);
void ry_exchange_int64_allgather(void *handle, uint64_t count);

/* durations.c */
/** From here on the communicator's exchanges are among those that may run beside others of this process. */
void ry_durations_meet_others(struct comm *c);
/** This one is timed, and counts for `weight` when others ask what ran beside them: what it moves across nodes is noted. */
void ry_durations_cross(struct comm *c, const struct reissue *r, const struct way *w, unsigned weight);
/** It took so long: for ry_sampler_end(), the communicator being the context. */
void ry_durations_took(void *comm, uint64_t number, double began_us, double us);
/** What became known since the last manifest, for the next one; the rest of `took` is left as it is. */
void ry_durations_tell(struct reissue *r, struct ry_took took[RY_TOOK]);
/** On the yardmaster, behind each exchange: the time from the end of the last one to the end of this one. */
void ry_durations_pace(struct comm *c, struct reissue *r, const struct way *w, const struct ry_exchange *x, bool ok);

#endif
