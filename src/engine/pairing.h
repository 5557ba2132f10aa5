/*
 * pairing.h: may the rows of an exchange be summed, as the return of which one, and by how many copies of a row?
 *
 * Owns: RAILYARD_COMBINE's words; what a rank remembers of the exchanges that went out packed until they are answered;
 * how many copies of a token there are (K), told or learned; the rank's half of the rule when a return may be summed.
 * Not: which exchange a return answers (direction.h), counting copies and keeping index lists on the device
 * (run/run.h), whether the other ranks come to the same answer (returns.h, at the yardmaster).
 *
 * The rule. Where rows of one token come back and are only added up by whoever gets them, their sum may come in the
 * place of the first and zeros in the places of the others. That this is so the user says (RAILYARD_COMBINE=sum). Which
 * rows are of one token is known from the way out, where they were equal. On every rank, therefore:
 *   - the exchange is the return of one earlier exchange D, and nothing else it could be the return of was out at the
 *     same time; its counts are D's turned round, all of them; it comes of the same type, bf16, fp16 or fp32;
 *   - D went packed, and what it said of equal rows is still there;
 *   - equal rows were copies of one token, not of two with the same bytes: among all that this rank sent in D, to its
 *     own node and itself as well, every row occurs just K times, and no row is all zeros, which is padding. Where a few
 *     rows occur a multiple of K times, and no row any other number, those few went out unpacked, each for itself (the
 *     same word at the beginning of several samples makes such rows in every layer): nothing of theirs is added up.
 * K is told (sum:K) or the least uniform number ever seen here, which later only ever gives way to one that divides it:
 * two tokens with the same bytes make twice as many copies, and tokens that were dropped somewhere fewer of some. Before
 * a uniform number was seen, the least number of all is tried.
 * Anything else: the exchange goes unsummed.
 *
 * Pure state, no I/O; one per communicator, used by one thread at a time.
 */
#ifndef RY_ENGINE_PAIRING_H
#define RY_ENGINE_PAIRING_H

#include <stdbool.h>
#include <stdint.h>

#include "plan/plan.h"
#include "run/run.h"

struct ry_combine {
    bool sum;
    uint32_t copies; /* K; 0: to be learned */
};
#define RY_COPIES_MOST 1024
/** "exact", "sum", "sum:8". -1 with `err` that says what is understood; *out is exact then. */
int ry_combine_parse(const char *text, struct ry_combine *out, struct ry_err *err);

#define RY_PAIRS 8 /* not answered yet; more push out the oldest */

/* An exchange that went out packed. */
struct ry_pair {
    uint64_t number;
    int type;                   /* ncclDataType_t */
    uint64_t *send, *recv;      /* [nranks], bytes */
    struct ry_slice slice;      /* as the verdict told */
    struct ry_repeats *repeats; /* [nnodes], what this rank found; row_bytes 0: it did not look */
    struct ry_kept *kept;       /* not looked at here */
    struct ry_copies copies;    /* of its rows; none where none of them was packed, so that none is summed */
};

/* Zeroed at the start, but for these two. */
struct ry_pairs {
    struct ry_combine combine;
    void (*let_go)(struct ry_kept *kept); /* ry_kept_free() */
    uint32_t learned, guess;              /* K; what is tried before it is known; 0: not yet */
    int n;
    struct ry_pair *of[RY_PAIRS]; /* oldest first */
};

/** How often a token's rows go out, as far as that is known; 0: it is not. */
uint32_t ry_pairs_wanted(const struct ry_pairs *p);
/** Rows were found to go out so often: K is learned from it. False: no return of this exchange will ever be summed. */
bool ry_pairs_learn(struct ry_pairs *p, const struct ry_copies *copies);
/**
 * What `d` says went out packed: copied, but for `d->kept`, which becomes the pair's. -1 when out of memory: `kept` is
 * let go. The oldest pair makes room. d->slice as ry_slice_init() laid it out for dedup; d->repeats may be NULL.
 */
int ry_pairs_add(struct ry_pairs *p, const struct ry_cluster *map, int rank, const struct ry_pair *d);
/** Exchange `number` is being answered: the pair, which is the caller's from here on; NULL: none is known. */
struct ry_pair *ry_pairs_take(struct ry_pairs *p, uint64_t number);
void ry_pair_free(struct ry_pairs *p, struct ry_pair *pair);
/** All that are left. */
void ry_pairs_free(struct ry_pairs *p);

/**
 * May the exchange of these counts (bytes) and this type be summed as the return of `pair`, as far as this rank can
 * tell, copies not considered? NULL: it may; else why not.
 */
const char *ry_pair_refuses(const struct ry_pair *pair, const struct ry_cluster *map, const uint64_t *send,
                            const uint64_t *recv, int type);
/** The K by which it may be summed: *copies, 0 where this rank sent no rows and any K will do. NULL, or why it may not.
 */
const char *ry_pairs_copies(const struct ry_pairs *p, const struct ry_pair *pair, uint32_t *copies);

#endif
