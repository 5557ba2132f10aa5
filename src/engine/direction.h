/*
 * direction.h: is an exchange the way out, or the way back of an earlier one?
 *
 * Owns: a guess from the counts alone. An exchange whose (receive, send) counts are the (send, receive) counts of an
 * earlier one that nothing has answered yet, the latest such, is its return; any other goes out. In an MoE layer that
 * makes dispatch "go" and combine "return", and in the backward pass, where rows repeat the other way round, combine's
 * gradient "go" and dispatch's "return": the exchanges that repeat rows have one label, those that sum them the other.
 * With equal splits, where every exchange could answer every other, they take turns.
 *
 * It is a label and may be wrong: it selects what was learned of earlier exchanges (repeats.h) and sorts reports. Which
 * bytes go where it decides nowhere but in what the user allowed to be summed (pairing.h); there a return must answer
 * one exchange and no other, so it is told which one it answers, and whether that could have been another: once two
 * exchanges of the same counts are out, nobody can tell their returns apart, nor what comes after the first of them.
 *
 * What goes out and is never answered (the tokens' probabilities, in inference) is forgotten after RY_GONE others.
 *
 * Pure state, no I/O, no allocation; one per communicator, used by one thread at a time.
 */
#ifndef RY_ENGINE_DIRECTION_H
#define RY_ENGINE_DIRECTION_H

#include <stdbool.h>
#include <stdint.h>

enum ry_direction { RY_GO, RY_RETURN, RY_DIRECTIONS };
/** "go", "return" */
const char *ry_direction_name(enum ry_direction direction);

#define RY_GONE 64

/* Zeroed at the start. */
struct ry_directions {
    int n;
    struct {
        uint64_t number, sent, received; /* hashes of the counts */
        bool doubtful;                   /* another of the same counts was out at the same time */
    } gone[RY_GONE];                     /* not answered yet, the latest last */
};

/* What a return answers. */
struct ry_answered {
    bool any;       /* anything: it is a return */
    bool ambiguous; /* it may answer another one as well */
    uint64_t number;
};

/** Exchange `number`, in elements of `type_bytes` for each of `nranks` peers. */
enum ry_direction ry_directions_see(struct ry_directions *d, uint64_t number, const uint64_t *send,
                                    const uint64_t *recv, int nranks, uint32_t type_bytes,
                                    struct ry_answered *answered);

#endif
