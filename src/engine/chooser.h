/*
 * chooser.h: what the files of the yardmaster's policy share: its state. policy.c chooses and tells, policy_learn.c learns from durations,
 * finds out, and keeps the account of whether agreeing pays, policy_wire.c is the layout of what is told. For nobody else.
 */
#ifndef RY_ENGINE_CHOOSER_H
#define RY_ENGINE_CHOOSER_H

#include "fit.h"
#include "policy.h"
#include "returns.h"

#define RY_CHOOSER_RECENT 256     /* choices remembered until their duration is known */
#define RY_CHOOSER_FIRST 12       /* exchanges of the first account: soon */
#define RY_PARTS_AT 56            /* bit of a row width on its way, from which on it says in how many parts */

/* A choice, until it is known how long it took. */
struct ry_recent {
    uint64_t number, busiest;
    enum ry_strategy strategy;
    double us;    /* the model's own estimate, without the agreement */
    double least; /* duration measured by those who reported and had much to do */
    int reported; /* ranks */
    int load;     /* that it was expected to run under */
    double slope; /* of plain NCCL's: ry_cost_nic_slope(); 0: not wanted */
    struct ry_beside beside; /* what it did run beside, of those who reported */
};

/* What is on the NICs besides: cost.h says why what is known under one load is kept from what is known under the other. */
enum ry_load_kind { RY_ALONE, RY_BESIDE, RY_LOAD_KINDS };

struct ry_chooser {
    struct ry_policy_config config;
    char name[24];
    struct ry_cost_learned learned[RY_LOAD_KINDS];
    struct ry_fit fit;
    struct ry_beside beside; /* of the exchange being decided */
    int load;
    struct ry_chooser_counts counts;
    /* since the account was opened: what plain NCCL would have taken, and that less what was chosen */
    double accounted_us, saved_us;
    int accounted, account; /* exchanges in it; to be */
    int unpaid, skip;       /* accounts in a row that did not pay; proposals not made for that */
    uint64_t reissued;      /* exchanges, for verify */
    bool timed;             /* the exchange being decided is to be timed */
    struct ry_returns sums;
    bool said_unverified;
    double plain_us; /* what plain NCCL would take for it, not engaged */
    int chunks;      /* of its plans */
    int parts;       /* that messages are to have from then on */
    struct {
        int relayed; /* verdicts, until it was asked for */
        bool asked, used;
        enum ry_node_order order; /* of the exchange being decided */
    } node_comm;
    uint8_t tried[RY_LOAD_KINDS][RY_STRATEGIES][RY_COST_CLASSES]; /* exchanges made to find out */
    struct ry_recent recent[RY_CHOOSER_RECENT];
    /* of the exchange being decided */
    struct ry_side *sides;                  /* [nranks] */
    struct ry_load *loads;                  /* [nranks] */
    uint64_t *relayed, *need, *spare;       /* [nranks] bytes; need: of staging */
    uint64_t *arriving;                     /* [nranks] over a relay's NIC */
    bool looked;                            /* any rank for equal rows */
    bool all_pack;                          /* and write packed messages out */
    struct ry_repeats *repeats;             /* [nranks][nnodes] */
    uint64_t *cross_need;                   /* [nranks] bytes of host memory that UCX lacks for it */
    bool cross, crossed;                    /* UCX carries what crosses nodes; has done so before */
    uint64_t *packed_in;                    /* [nnodes] what comes across, packed or not, if looked */
    struct ry_slice *slices[RY_STRATEGIES]; /* [nranks] each, laid out at the strategy's first use; none for direct */
    struct ry_balance *balance;             /* what the words of slices by balanced are made of */
    char *order;                            /* what one rank is told */
    size_t order_size;
};

static inline int ry_load_kind_of(const struct ry_beside *b)
{
    return ry_beside_more(b) >= RY_BESIDE_MUCH ? RY_BESIDE : RY_ALONE;
}

/* ---- policy_learn.c ---- */

/** Durations that came with the manifests at hand. */
void ry_chooser_learn(struct ry_chooser *c);
/** A choice, until it is known how long it took. */
void ry_chooser_remember(struct ry_chooser *c, uint64_t number, const struct ry_choice *choice);
/** The same for one that passes, timed, while nothing is agreed on: by plain NCCL. */
void ry_chooser_remember_plain(struct ry_chooser *c, uint64_t number);
/** Of the exchange at hand: the power of two of its busiest rank's bytes. */
int ry_chooser_class(const struct ry_chooser *c);
/** The strategy to be tried next in this class; -1: all are known, or it would cost too much. */
int ry_chooser_to_find_out(const struct ry_chooser *c, const struct ry_choice *choice, int class);
/** Take that one, if there is one. */
bool ry_chooser_find_out(struct ry_chooser *c, struct ry_choice *choice);
/** Does agreeing pay, over the next so many exchanges? */
void ry_chooser_open_account(struct ry_chooser *c, int exchanges);
/** What the model expects to be gained may be lost between exchanges. False: it is; *rest: to be seen, after so many. */
bool ry_chooser_keeps_pace(struct ry_chooser *c, uint64_t number, bool engaged, unsigned *rest);
/** Make proposals rarer where it does not, again and again. */
void ry_chooser_did_it_pay(struct ry_chooser *c, bool pays);
/** Into the account. How many exchanges are to pass by now; 0: go on. */
unsigned ry_chooser_rest_after(struct ry_chooser *c, uint64_t number, const struct ry_choice *choice);

/* ---- policy_wire.c ---- */

/** Entry `i` of a list of what was found, as manifests and orders have it; NULL: nothing. */
void ry_counts_put(char *list, int i, const struct ry_repeats *r);

#endif
