/* relayed.c: see relayed.h: messages between nodes and the staging memory that they take. */
#include "relayed.h"

#include <stdlib.h>

struct ry_message ry_message_of(struct ry_pieces p, struct ry_repeats repeats)
{
    struct ry_message m = {.repeats = repeats};
    if (!repeats.row_bytes) {
        for (int r; ry_next_piece(&p, &r);)
            m.bytes = ry_sum(m.bytes, p.bytes[r]);
        return m;
    }
    for (int r; ry_next_piece(&p, &r);) {
        m.bytes = ry_sum(m.bytes, p.bytes[r]);
        m.rows = ry_sum(m.rows, ry_rows_of(p.bytes[r], repeats.row_bytes));
    }
    if (m.bytes < UINT64_MAX && ry_packs(repeats, m.rows, m.bytes))
        m.packed = ry_packed_bytes(repeats, m.rows);
    return m;
}

uint64_t ry_room_on_relay(const struct ry_message *m, struct ry_pieces p, int relay)
{
    if (!m->packed)
        return m->bytes == p.bytes[relay] ? 0
                                          : ry_stage_room(m->bytes); /* all of it for the relay: straight into place */
    uint64_t room = ry_stage_room(m->packed);
    for (int r; ry_next_piece(&p, &r);)
        if (r != relay && !ry_passed_packed(m, p.bytes[r]))
            room = ry_sum(room, ry_stage_room(p.bytes[r]));
    return room;
}

struct ry_departure ry_departure_of(struct ry_pieces p, const uintptr_t *send_at, struct ry_repeats repeats)
{
    struct ry_departure d = {ry_message_of(p, repeats), -1, true, 0};
    uintptr_t end = 0;
    for (int r; ry_next_piece(&p, &r);) {
        if (!p.bytes[r])
            continue;
        if (d.first < 0)
            d.first = r;
        else if (!send_at || send_at[r] != end)
            d.neighbours = false;
        end = send_at ? send_at[r] + p.bytes[r] : 0;
    }
    d.room = d.m.packed ? ry_stage_room(d.m.packed) : d.neighbours ? 0 : ry_stage_room(d.m.bytes);
    return d;
}

static struct ry_repeats found(const struct ry_cluster *c, const struct ry_repeats *repeats, int from, int node)
{
    return repeats ? repeats[(size_t)from * (size_t)c->nnodes + (size_t)node] : (struct ry_repeats){0};
}

uint64_t ry_relayed_stage_relay(const struct ry_cluster *c, int rank, const uint64_t *matrix,
                                const struct ry_repeats *repeats)
{
    uint64_t stage = 0;
    int node = c->node[rank];
    for (int from = 0; from < c->nranks; from++) {
        struct ry_repeats its = found(c, repeats, from, node);
        bool mine = ry_relays(c, rank, from);
        if (c->node[from] == node || (!mine && !its.row_bytes))
            continue;
        struct ry_pieces pieces = ry_pieces_of(c, matrix + (size_t)from * (size_t)c->nranks, node);
        struct ry_message m = ry_message_of(pieces, its);
        stage = ry_sum(stage, mine ? ry_room_on_relay(&m, pieces, rank) : ry_room_behind_relay(&m, pieces.bytes[rank]));
    }
    return stage;
}

uint64_t ry_relayed_stage_pack(const struct ry_cluster *c, int rank, const uint64_t *send, const uintptr_t *send_at,
                               const struct ry_repeats *repeats)
{
    uint64_t stage = 0;
    for (int n = 0; n < c->nnodes; n++)
        if (n != c->node[rank])
            stage = ry_sum(stage, ry_departure_of(ry_pieces_of(c, send, n), send_at, found(c, repeats, 0, n)).room);
    return stage;
}

/* Each row of the matrix once, node by node. */
int ry_relayed_stage_all(const struct ry_cluster *c, const uint64_t *matrix, const struct ry_repeats *repeats,
                         uint64_t *relay, uint64_t *pack, struct ry_err *err)
{
    size_t nranks = (size_t)c->nranks, nnodes = (size_t)c->nnodes;
    int *start = malloc((nnodes + nranks) * sizeof *start), *members = start + nnodes;
    if (!start)
        return ry_fail(err, "no memory for the staging needs of %d ranks", c->nranks);
    for (int n = 0, at = 0; n < c->nnodes; at += c->node_size[n++])
        start[n] = at;
    for (int r = 0; r < c->nranks; r++)
        members[start[c->node[r]] + c->local[r]] = r;
    for (int from = 0; from < c->nranks; from++)
        for (int n = 0; n < c->nnodes; n++) {
            if (n == c->node[from])
                continue;
            struct ry_pieces pieces = {
                .bytes = matrix + (size_t)from * nranks, .left = c->node_size[n], .ranks = members + start[n]};
            struct ry_departure d = ry_departure_of(pieces, NULL, found(c, repeats, from, n));
            int to = pieces.ranks[c->local[from] % c->node_size[n]];
            pack[from] = ry_sum(pack[from], d.room);
            relay[to] = ry_sum(relay[to], ry_room_on_relay(&d.m, pieces, to));
            for (int r; d.m.packed && ry_next_piece(&pieces, &r);)
                if (r != to)
                    relay[r] = ry_sum(relay[r], ry_room_behind_relay(&d.m, pieces.bytes[r]));
        }
    free(start);
    return 0;
}
