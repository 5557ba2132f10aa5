/*
 * cost.h: how long an exchange takes by each strategy, and which is the fastest.
 *
 * Owns: the α–β model (Hockney: t = α + bytes / β) per link class, with costs per message and per plan; what it is fed with
 * (loads); choosing; saying why; learning from measured durations. Not: measuring links (railyard calibrate), where the
 * figures are stored (cost_file.h). No I/O, no clock.
 *
 * Times are microseconds, bandwidths bytes per microsecond (= MB/s), one direction.
 */
#ifndef RY_PLAN_COST_H
#define RY_PLAN_COST_H

#include "plan.h"

/*
 * LOCAL: inside a node, over the job's communicator. NODE: the same over a communicator of the node's ranks alone:
 * NCCL gives a pair of ranks as few channels as the communicator's peers across the network have, which is little where
 * there are any.
 */
enum ry_link { RY_LINK_SELF, RY_LINK_LOCAL, RY_LINK_NODE, RY_LINK_NIC, RY_LINKS };
const char *ry_link_name(enum ry_link link); /* "self", "local", "node", "nic" */

struct ry_load;

/*
 * The model of one group of transfers: they start together, links work side by side, each link takes
 *     alpha_us + messages * message_us + bytes / bytes_per_us        (Hockney; messages: the busier direction's, of one rank)
 * and the group takes group_us and as long as its busiest link: max(in-node, across nodes), as in NetMoE. Groups, and
 * copies between them, follow each other with all ranks in step. Transfers both ways at once do not slow each other.
 */
struct ry_cost_model {
    struct ry_cost_link {
        double alpha_us;     /* of transfers over an idle link, beyond `message_us` */
        double bytes_per_us; /* SELF, LOCAL, NODE: one rank's, each way. NIC: shared by the ranks of a node, each way */
        double message_us;   /* each message of a group, per rank */
        bool measured;       /* by railyard calibrate */
    } link[RY_LINKS];
    double nic_rank_bytes_per_us; /* the most that one rank alone gets out of its node's NIC, each way */
    double nic_incast; /* 0 to below 1: the share of its bandwidth that a NIC loses at most where many nodes send to it at once:
                          of f nodes, 1 - 1 / f of this. 0 unless somebody knows better: nobody measures it, nor is it in files */
    /* The same of what UCX carries instead of NCCL (docs/ucx-transport.md), as link[RY_LINK_NIC] and nic_rank_bytes_per_us */
    struct ry_cost_link ucx;
    double ucx_rank_bytes_per_us;
    double copy_us, copy_bytes_per_us; /* of each copy between groups; SELF is what goes through NCCL. Kernels that pack rows and
                                          write them out are copies; a search reads each byte twice, for once read and written */
    double group_us;                   /* of each NCCL group (a kernel launch) */
    double agreement_us; /* manifest to verdict, as far as the exchange has to wait for it; direct pays it too once engaged */
    double plan_us_per_rank; /* building a plan: times nranks; direct needs none */
    bool measured;           /* by railyard calibrate, at least in part, rather than guessed from the topology */
    bool node_comm; /* what is passed on inside nodes (group 1) goes over NODE, not LOCAL: the ranks have, or will have, such
                       communicators. No property of links: not kept in files, false at first, set by whoever knows */
    bool by_ucx; /* UCX carries what crosses nodes in plans, other than direct's. As node_comm: set by whoever knows */
    int chunks; /* dedup's plans may be in so many chunks at most; 0: 1. As node_comm, without which they are never in more
                   than 1: set by whoever knows */
};

/** A guess from what the seats say (NVLink and NIC bandwidth), conservative where they say nothing. */
void ry_cost_guess(struct ry_cost_model *model, const struct ry_cluster *cluster);

/**
 * What nobody measured may be far off, above all the NIC's bandwidth, which depends on how it is shared. Fit it by what plain NCCL took:
 * the time that each of a NIC's bytes takes is multiplied by 1 + (measured - estimate of direct, not engaged) / slope. For large exchanges;
 * of a short one's excess the NIC may be innocent, and it looks better to leave bytes out than it is.
 */
double ry_cost_nic_slope(const struct ry_cost_model *model, const struct ry_cluster *cluster, const struct ry_load *loads);
void ry_cost_slow_nic(struct ry_cost_model *model, double times);

/** The model of plans whose transfers between nodes UCX carries: what is between nodes is as UCX has it. */
struct ry_cost_model ry_cost_over_ucx(const struct ry_cost_model *model);
/*
 * Contention. Other communicators of a rank's process may exchange at the same time, over the same NICs. Bytes: of an exchange
 * like those measured lately, on the average; all 0 where nothing was seen beside them. `out` and `in` are what others moved
 * across nodes while it ran, own_out and own_in what it moved itself, so that out / own_out says how much of the NIC the others
 * took, whatever this exchange has to move by another strategy: the NIC goes on giving them their part while it lasts. `share`
 * bounds that: as many others ran at a time, on the average, and a NIC that is full gives all of them the same.
 *     across nodes: bytes / bytes_per_us * (1 + min(sum of out / sum of own_out, share))       sums over a node's ranks; each way
 * So bytes across nodes cost more, steps inside nodes and messages do not, and what leaves bytes out gains as much more. Processes
 * of the node that have no rank in this communicator are not seen.
 */
struct ry_beside {
    uint64_t out, in, own_out, own_in;
    double share; /* 1: one other always ran */
};
/* From so much more time for each byte across nodes on, an exchange counts as run beside others: see ry_cost_learned. */
#define RY_BESIDE_MUCH 0.25
/** By how much more each byte across nodes takes, the worse of both ways; 0: nobody was there. */
double ry_beside_more(const struct ry_beside *beside);

/* What one rank's side of an exchange puts on the links: computed by each rank from its own row and column, O(nranks). */
struct ry_load {
    uint64_t self;
    uint64_t local_out, local_in, cross_out, cross_in;          /* bytes */
    uint32_t local_sends, local_recvs, cross_sends, cross_recvs; /* messages of direct that carry bytes */
    uint32_t nodes_out, nodes_in; /* remote nodes that it sends anything to, gets anything from */
    uint64_t scanned;    /* bytes of cross_out that were searched for equal rows; 0: not looked */
    uint64_t packed_out; /* what would cross instead of cross_out; equal to it where nothing was found or not looked */
    struct ry_beside beside; /* all 0 until somebody sets it: not a matter of the exchange itself */
};
/** `repeats` ([nnodes], or NULL: not looked) as in plan.h. O(nranks), no allocation. */
void ry_load_of(struct ry_load *load, const struct ry_cluster *cluster, int rank, const uint64_t *send, const uint64_t *recv,
                const struct ry_repeats *repeats);
/** What is beside all of them: sums; of `share` the most. */
struct ry_beside ry_cost_beside(const struct ry_cluster *cluster, const struct ry_load *loads);

/* What only the full matrix tells, where it is known (any may be NULL). Bytes. */
struct ry_cost_matrix {
    const uint64_t *relayed;   /* [nranks] what a rank relays for others, hierarchical. NULL: even among the node's ranks */
    const uint64_t *arriving;  /* [nranks] what comes over its NIC then, for itself or to be relayed. NULL: as relayed says, and an
                                  even part of the rest. Not looked at without `relayed` */
    const uint64_t *packed_in; /* [nnodes] dedup: what comes into a node. NULL: cross_in, less what all save on average */
};

/**
 * Estimate `strategy` for an exchange in which rank r has loads[r], agreement included (plain NCCL, not engaged: take
 * model->agreement_us off direct's). Dedup includes looking for equal rows, packing and writing out; it is INFINITY where
 * nobody looked or nothing was found, and is in the fastest number of chunks, of which each is passed on inside the
 * nodes while the next crosses. Balanced knows of nodes' sums only, so the number of its stages is an assumption. Sum always is INFINITY: it is not chosen by cost. O(nranks), no allocation.
 */
double ry_cost_estimate(const struct ry_cost_model *model, const struct ry_cluster *cluster, const struct ry_load *loads,
                        const struct ry_cost_matrix *matrix, enum ry_strategy strategy);

/** The same from the steps themselves: all ranks' plans, of one exchange; the search, which is over by then, is left out. For
 *  simulation and for tests of the estimate. NAN when out of memory. */
double ry_cost_plans(const struct ry_cost_model *model, const struct ry_cluster *cluster, struct ry_plan *const *plans);

/*
 * What the yardmaster of one communicator remembers, by strategy and size class (power of two of the busiest rank's bytes):
 * how long exchanges took over how long they were estimated to take, and what was chosen. Zeroed at the start. Not locked.
 *
 * A measured duration holds waiting for late ranks, always too much and never too little. So (1) it should be the least among
 * the ranks that had at least half of the busiest rank's bytes: who comes last waits for nobody. And (2) of the latest
 * RY_COST_MEMORY ratios the lower quartile counts, not the mean: it stays put while up to three quarters of them are too
 * high, and follows a change of the network within as many exchanges. Fewer than RY_COST_ENOUGH tell nothing yet. Where a
 * strategy has not been measured, its ratio is taken from the nearest size class, or from the other strategies: what is
 * wrong with the model of the links is wrong for all.
 *
 * Exchanges beside other communicators' (RY_BESIDE_MUCH) are remembered apart from those that had the links to themselves: in
 * another struct ry_cost_learned, each the `other` of the other. A duration holds what the others cost, too, the more the more its
 * strategy has to move: taken for one that had the NIC to itself it would blame the strategy for bytes that were not its own.
 * To drop all that was taken beside others will not do where exchanges always run so; nor will the model's correction alone, since
 * that NICs share evenly is an assumption. So like is compared with like, by estimates that know of the load; what was measured
 * under one load stands in under the other only for a strategy that was not measured there yet, the estimate having the rest. And a
 * duration taken under another load than its exchange was expected to run under is dropped: its estimate is one of another
 * situation.
 */
#define RY_COST_CLASSES 64
#define RY_COST_MEMORY 16
#define RY_COST_ENOUGH 3
struct ry_cost_cell {
    float log_ratio[RY_COST_MEMORY]; /* natural logarithms; the one of sample i at i modulo RY_COST_MEMORY */
    uint32_t samples;                /* ever */
};
struct ry_cost_class {
    uint32_t turn, trial_at, gap; /* choices made, turn of the next trial, its distance from the last */
    uint8_t incumbent;            /* 1 + the strategy chosen last, 0 none */
};
struct ry_cost_learned {
    struct ry_cost_cell at[RY_STRATEGIES][RY_COST_CLASSES];
    struct ry_cost_class size[RY_COST_CLASSES];
    const struct ry_cost_learned *other; /* asked where this one knows nothing of a strategy; NULL: nobody. Not asked in turn */
};
/** Ignored unless both times are above zero and finite. */
void ry_cost_learn(struct ry_cost_learned *learned, enum ry_strategy strategy, uint64_t busiest_bytes, double estimated_us,
                   double measured_us);
/** What was measured of `strategy` does not hold any more (it goes another way, as when node_comm becomes true): as if it had
 *  never been tried. Where it is in use it stays so until something else is faster. */
void ry_cost_forget(struct ry_cost_learned *learned, enum ry_strategy strategy);
/** The most that any rank sends or gets, itself included. */
uint64_t ry_cost_busiest(const struct ry_cluster *cluster, const struct ry_load *loads);

struct ry_choice {
    enum ry_strategy strategy;
    bool trial;               /* not the fastest by all that is known, but close to it and to be measured again */
    double model_us[RY_STRATEGIES]; /* what the model says: what ry_cost_learn() wants to be told as estimated */
    double us[RY_STRATEGIES]; /* corrected by what was learned */
    int chunks;               /* of a plan by dedup: the fastest number */
    double search_us;         /* part of dedup's model_us: what the ranks searched, and would have for any other strategy */
    char why[160];            /* "hierarchical 310 us, direct 420 us: NIC of node 1 sends 24 MiB in 6 instead of 12 messages" */
};
/**
 * The fastest; direct unless another is at least `margin` (0.05: 5 %) faster, or twice that and 10 % in doubt: the model was
 * never measured and neither was the strategy. Once chosen for a size class it stays as long as it is not slower than
 * direct and no third one is faster by the margin, so that noise does not make the choice flap. A strategy that comes within
 * 25 % of the best is tried now and then (after 16 choices, then 32, … up to 1024; the one measured least), since only what
 * is tried can be learned. Hierarchical and balanced are not considered where nothing would be relayed, dedup not where it is INFINITY.
 * `learned` may be NULL: no corrections, hysteresis or trials. O(nranks), no allocation.
 */
void ry_cost_choose(struct ry_choice *choice, const struct ry_cost_model *model, struct ry_cost_learned *learned,
                    const struct ry_cluster *cluster, const struct ry_load *loads, const struct ry_cost_matrix *matrix,
                     double margin);

#endif
