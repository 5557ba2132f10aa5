/*
 * relayed.h: messages between nodes that go by a relay: what the files of hierarchical and dedup share.
 *
 * Owns: what one rank sends to one node as a message, packed or as it is, and the staging memory it takes on each side.
 * Not: the steps (dedup.c). Only src/plan includes it.
 */
#ifndef RY_PLAN_RELAYED_H
#define RY_PLAN_RELAYED_H

#include "strategy.h"

/* The counts of what one rank sends to the ranks of one node, wherever they lie. A copy of it is a walk through them.
 */
struct ry_pieces {
    const uint64_t *bytes;
    int left;
    const int *ranks; /* bytes[ranks[0]], bytes[ranks[1]], … */
    const int *node;  /* else bytes[r] of every r with node[r] == of */
    int of, at;       /* else bytes[0], bytes[1], …: by local index */
};
static inline bool ry_next_piece(struct ry_pieces *p, int *index)
{
    if (!p->left)
        return false;
    p->left--;
    if (p->ranks)
        return *index = *p->ranks++, true;
    while (p->node && p->node[p->at] != p->of)
        p->at++;
    return *index = p->at++, true;
}
/* Of a row of the matrix; without a list of the node's ranks. */
static inline struct ry_pieces ry_pieces_of(const struct ry_cluster *c, const uint64_t *row, int node)
{
    return (struct ry_pieces){
        .bytes = row, .left = c->node_size[node], .node = c->node, .of = node, .at = c->node_first[node]};
}

struct ry_message {
    uint64_t bytes;  /* of the pieces; UINT64_MAX: they add up to more than 64 bits */
    uint64_t rows;   /* 0 where the sender did not look */
    uint64_t packed; /* its length packed; 0: it goes as it is */
    struct ry_repeats repeats;
};
struct ry_message ry_message_of(struct ry_pieces pieces, struct ry_repeats repeats);

/* Does the relay pass it on packed to the rank that gets `piece` bytes of it? Else that rank gets its rows, written
 * out. */
static inline bool ry_passed_packed(const struct ry_message *m, uint64_t piece)
{
    return piece && m->packed && m->packed <= piece;
}
/* Staging memory that it takes on its relay, which is `relay` by the index of `pieces`; */
uint64_t ry_room_on_relay(const struct ry_message *m, struct ry_pieces pieces, int relay);
/* on another rank of the node, which gets `piece` bytes; */
static inline uint64_t ry_room_behind_relay(const struct ry_message *m, uint64_t piece)
{
    return ry_passed_packed(m, piece) ? ry_stage_room(m->packed) : 0;
}

/* and on the sender: none where its pieces follow each other in memory and it goes as it is. */
struct ry_departure {
    struct ry_message m;
    int first; /* rank that gets the first piece */
    bool neighbours;
    uint64_t room;
};
struct ry_departure ry_departure_of(struct ry_pieces pieces, const uintptr_t *send_at, struct ry_repeats repeats);

/* Does rank `from` of another node send by rank `rank`? */
static inline bool ry_relays(const struct ry_cluster *c, int rank, int from)
{
    return c->local[from] % c->node_size[c->node[rank]] == c->local[rank];
}

/* The operations of both strategies; hierarchical is the case that nobody looked for equal rows. dedup.c: */
bool ry_relayed_column(const struct ry_cluster *c, int rank, int other);
size_t ry_relayed_most_steps(const struct ry_building *b);
int ry_relayed_build(struct ry_building *b);
/* Copies that lay pieces of the send buffer out at `at`; neighbours in one. */
void ry_gather(struct ry_building *b, struct ry_pieces p, uint64_t at);
/* relayed.c: */
uint64_t ry_relayed_stage_relay(const struct ry_cluster *c, int rank, const uint64_t *matrix,
                                const struct ry_repeats *repeats);
uint64_t ry_relayed_stage_pack(const struct ry_cluster *c, int rank, const uint64_t *send, const uintptr_t *send_at,
                               const struct ry_repeats *repeats);
int ry_relayed_stage_all(const struct ry_cluster *c, const uint64_t *matrix, const struct ry_repeats *repeats,
                         uint64_t *relay, uint64_t *pack, struct ry_err *err);

#endif
