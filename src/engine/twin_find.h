/*
 * twin_find.h: which other communicators are this one's twins: as many ranks, their k-th on the node of its k-th, for
 * every k.
 *
 * Owns: the cards by which ranks of one node that sit at the same position find each other, and the answer. Not:
 * whether their bytes are equal, what comes of it (twins.c).
 *
 * A card is a small file in /dev/shm, in a folder of the user's own, with a lock that the kernel takes away when its
 * process ends, however it does. Its name says what must be alike: the job (launchers' variables), the version and
 * settings of Railyard, how many ranks there are and on which nodes, the position, and how many communicators like that
 * this process told of before: a process that has two of a kind has each of them find the other processes' first or
 * second. Where the processes of a node do not share /dev/shm nobody finds anybody, and nothing is lost.
 *
 * Ranks may look at different times: what they find need not be the same yet. Who makes use of it must not depend on
 * that.
 *
 * Thread-safety: a card by one thread at a time.
 */
#ifndef RY_ENGINE_TWIN_FIND_H
#define RY_ENGINE_TWIN_FIND_H

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "cluster.h"

#define RY_TWINS 32          /* communicators, this one included */
#define RY_TWIN_ADDRESS 4000 /* bytes of a yardmaster's address at most */

struct ry_twin_card;

struct ry_twin_found {
    int n;                       /* communicators; 1: no twin is known */
    uint64_t key[RY_TWINS];      /* ascending, this one's among them */
    char first[RY_TWIN_ADDRESS]; /* the control address of the yardmaster of key[0] */
    size_t first_size;
};

/** Put up the card of rank `rank` of the communicator `key`, whose yardmaster has this address. Counts it. NULL with
 * `err`. */
struct ry_twin_card *ry_twin_card_new(const struct ry_cluster *map, int rank, uint64_t key, const void *address,
                                      size_t size, struct ry_err *err);
/** Take it down. */
void ry_twin_card_free(struct ry_twin_card *card);
/** Who is there now. Too many, or any doubt: n is 1. */
void ry_twin_look(const struct ry_twin_card *card, struct ry_twin_found *found);

/** For tests: cards lie in this folder; NULL: as usual. */
void ry_twin_folder(const char *path);

#endif
