/*
 * test_twins_random.c: twin communicators under random programs and random schedules: the agreement among all ranks of
 * all twins, with the policy that it has in the engine (twin_policy.h), beside each twin's own.
 *
 * A schedule: 2 to 4 twins of 1 to 3 ranks run random programs: exchanges whose bytes are the same on all twins or
 * differ on one, or whose counts do; ranks that say "not me"; a twin that makes an exchange more than the others, or
 * stops; ranks that leave, lose a connection; communicators of positions that come about late or not at all; letters in
 * any order, twice, late; jumps of time. An exchange by replica is over on a rank once the ranks of its twin and those
 * at its position have begun the same, any other one once those of its twin have. The rules, checked on each: one way
 * a rank carries exchange x out by replica only if all ranks of all twins do, other than those that stopped, left or
 * lost a connection before they were told; never wrong    and only if all of them send the same; each twin still agrees
 * where it is not replica, a twin's ranks all do what its own agreement says; no wait for ever; and it works    a
 * program of equal exchanges without mishaps goes by replica, all of it once the twins are engaged and their
 * communicators made.
 *
 * RY_TEST_SEED=n repeats schedule n alone and tells of it; RY_TEST_SCHEDULES sets their number.
 */
#include <stdio.h>
#include <time.h>

#include "agree_world.h"
#include "draws.h"
#include "engine/twin_policy.h"

#define TWINS 4
#define EACH 3
#define OPS 40

struct op {
    uint8_t content; /* what is sent, and how much: of the exchange, not of the twin, unless */
    bool other;      /* this twin sends something else, */
    bool longer;     /* or more */
};
enum way { NONE, DIRECT, OWN, REPLICA };
enum phase { OUTSIDE, IN_GROUP, ASKING_ALL, ASKING_OWN, BLOCKED, STOPPED };
static struct {
    int twins, each, n;
    bool clean, sync;
    uint32_t not_me, mishaps, dup;
    struct world all, own[TWINS];
    struct ry_twin_chooser *chooser;
    struct ry_cluster *map;
    struct op op[TWINS][OPS];
    int nops[TWINS];
    struct thread {
        int pc;
        enum phase phase;
        bool held[2], not_me; /* by the group begun: of all, of its own */
        enum ry_node_state comm;
        enum way way[OPS];
        bool out; /* stopped, or its connection to the others is lost, as when a process dies */
        int left; /* 1 + the exchange before which it left in good order; 0: it did not */
    } t[TWINS * EACH];
} s;
static _Atomic int forced;
static bool tell;
static struct {
    long replica, own, direct, asked, unequal, mishaps, closed;
} sum;
#define SAY(...) (tell ? (void)printf(__VA_ARGS__) : (void)0)

static uint64_t bytes_of(int twin, int x, int from, int to)
{
    const struct op *o = &s.op[twin][x];
    return 1000 + o->content * 64u + (uint64_t)(from * 7 + to * 3) + o->longer;
}

static struct ry_digest digest_of(int twin, int x, int position)
{
    const struct op *o = &s.op[twin][x];
    return (struct ry_digest){{o->content * 100u + (uint64_t)position, o->other}};
}

static bool equal(int x)
{
    for (int t = 0; t < s.twins; t++)
        if (x >= s.nops[t] || s.op[t][x].content != s.op[0][x].content || s.op[t][x].other != s.op[0][x].other ||
            s.op[t][x].longer != s.op[0][x].longer)
            return false;
    return true;
}

static void write_programs(void)
{
    int rounds = s.clean ? OPS - 2 : 10 + (int)pick(OPS - 12);
    for (int k = 0; k < rounds; k++) {
        uint8_t content = (uint8_t)pick(200);
        bool same = s.clean || !one_in(5);
        int odd = (int)pick((uint32_t)s.twins), extra = s.clean || !one_in(60) ? -1 : (int)pick((uint32_t)s.twins);
        for (int t = 0; t < s.twins; t++) {
            if (t == extra && s.nops[t] < OPS - 1)
                s.op[t][s.nops[t]++] = (struct op){.content = (uint8_t)pick(200)};
            s.op[t][s.nops[t]++] = (struct op){
                .content = content, .other = !same && t == odd && one_in(2), .longer = !same && t == odd && one_in(2)};
        }
    }
}

/* ---- a rank ---- */

static struct ry_load load_of(int twin, int x, int k)
{
    struct ry_load l = {0};
    for (int p = 0; p < s.each; p++) {
        if (p == k) {
            l.self = bytes_of(twin, x, k, k);
            continue;
        }
        l.cross_out += bytes_of(twin, x, k, p);
        l.cross_in += bytes_of(twin, x, p, k);
        l.cross_sends++, l.cross_recvs++, l.nodes_out++, l.nodes_in++;
    }
    l.packed_out = l.cross_out;
    return l;
}

static void carried_out(int g, enum way way)
{
    struct thread *t = &s.t[g];
    SAY("  rank %d of twin %d, exchange %d: %s\n", g % s.each, g / s.each, t->pc,
        way == REPLICA ? "replica"
        : way == OWN   ? "own"
                       : "direct");
    t->way[t->pc] = way;
    t->phase = BLOCKED;
    *(way == REPLICA ? &sum.replica : way == OWN ? &sum.own : &sum.direct) += 1;
}

static void ask_own(int g)
{
    struct thread *t = &s.t[g];
    int twin = g / s.each, k = g % s.each, x = t->pc;
    uint64_t send[EACH], recv[EACH], note = (uint64_t)x * 100 + (uint64_t)k;
    for (int p = 0; p < s.each; p++) {
        send[p] = bytes_of(twin, x, k, p);
        recv[p] = bytes_of(twin, x, p, k);
    }
    struct ry_manifest m = {.not_me = t->not_me || !t->held[1],
                            .type = 7,
                            .send = send,
                            .recv = recv,
                            .ordinal = (uint64_t)x,
                            .extra = &note,
                            .extra_bytes = sizeof note};
    t->phase = ASKING_OWN;
    if (ry_agree_exchange(s.own[twin].rank[k], (uint64_t)x, &m, &note, sizeof note) == RY_GO_DIRECT)
        carried_out(g, DIRECT);
}

static void begin_exchange(int g)
{
    struct thread *t = &s.t[g];
    int twin = g / s.each, k = g % s.each, x = t->pc, at = twin * s.each;
    uint64_t send[TWINS * EACH] = {0}, recv[TWINS * EACH] = {0};
    struct ry_twin_side side;
    memset(&side, 0, sizeof side);
    side.load = load_of(twin, x, k);
    side.node_comm = t->comm;
    side.digest = digest_of(twin, x, k);
    side.digested = (uint64_t)x + 1;
    if (twin == 0)
        side.id[0] = (uint8_t)(k + 1);
    for (int p = 0; p < s.each; p++) {
        send[at + p] = bytes_of(twin, x, k, p);
        recv[at + p] = bytes_of(twin, x, p, k);
    }
    t->not_me = !s.clean && one_in(s.not_me);
    struct ry_manifest m = {.not_me = t->not_me || !t->held[0],
                            .type = 7,
                            .send = send,
                            .recv = recv,
                            .ordinal = (uint64_t)x,
                            .extra = &side,
                            .extra_bytes = sizeof side};
    t->phase = ASKING_ALL;
    if (ry_agree_exchange(s.all.rank[g], (uint64_t)x, &m, &side, sizeof side) == RY_GO_DIRECT)
        ask_own(g);
    else
        sum.asked++;
}

static void hear_of_all(int g, const struct ry_verdict *v)
{
    struct thread *t = &s.t[g];
    struct ry_twin_order order = {0};
    MUST(v->number == (uint64_t)t->pc, "rank %d has the verdict of another exchange", g);
    if (v->extra_bytes == sizeof order)
        memcpy(&order, v->extra, sizeof order);
    if (order.make) {
        MUST(order.id[0] == g % s.each + 1, "rank %d was told the id of another position", g);
        MUST(t->comm == RY_NODE_COULD, "rank %d is to make one again", g);
        t->comm = RY_NODE_MAKING;
    }
    if (v->strategy != RY_REPLICA) {
        MUST(v->strategy == RY_DIRECT, "strategy %d", v->strategy);
        sum.unequal += !equal(t->pc);
        ask_own(g);
        return;
    }
    MUST(t->comm == RY_NODE_HAS, "rank %d has no communicator to share over", g);
    MUST(order.chunks >= 1, "in %u chunks", order.chunks);
    MUST(ry_agree_exchange(s.own[g / s.each].rank[g % s.each], (uint64_t)t->pc, NULL, NULL, 0) == RY_GO_DIRECT,
         "its own agreement makes rank %d wait", g);
    carried_out(g, REPLICA);
}

/* Has NCCL what it needs of the others? */
static bool through(int g)
{
    const struct thread *t = &s.t[g];
    for (int p = 0; p < s.n && s.sync; p++) {
        bool twin = p / s.each == g / s.each, position = p % s.each == g % s.each;
        if ((twin || (position && t->way[t->pc] == REPLICA)) && !s.t[p].out && s.t[p].way[t->pc] == NONE)
            return false;
    }
    return true;
}

static bool step(int g)
{
    struct thread *t = &s.t[g];
    int twin = g / s.each;
    struct ry_verdict v;
    if (t->comm == RY_NODE_MAKING && one_in(s.clean ? 4 : 20))
        t->comm = s.clean || !one_in(40) ? RY_NODE_HAS : RY_NODE_CANNOT;
    switch (t->phase) {
    case OUTSIDE:
        if (t->pc >= s.nops[twin]) {
            t->phase = STOPPED;
            t->out = true;
            return false;
        }
        t->held[0] = ry_agree_hold(s.all.rank[g]);
        t->held[1] = ry_agree_hold(s.own[twin].rank[g % s.each]);
        t->phase = IN_GROUP;
        return true;
    case IN_GROUP:
        begin_exchange(g);
        return true;
    case ASKING_ALL:
        if (!ry_agree_verdict(s.all.rank[g], &v))
            return false;
        hear_of_all(g, &v);
        return true;
    case ASKING_OWN:
        if (!ry_agree_verdict(s.own[twin].rank[g % s.each], &v))
            return false;
        MUST(v.number == (uint64_t)t->pc, "rank %d has the verdict of another exchange of its own", g);
        carried_out(g, v.strategy ? OWN : DIRECT);
        return true;
    case BLOCKED:
        if (!through(g))
            return false;
        t->pc++;
        t->phase = OUTSIDE;
        return true;
    default:
        return false;
    }
}

/* ---- mail, time, mishaps ---- */

static struct world *some_world(void)
{
    return one_in(2) ? &s.all : &s.own[pick((uint32_t)s.twins)];
}

static void deliver_some(struct world *w)
{
    int i = (int)pick((uint32_t)w->nmail);
    for (int k = 0; k < i; k++) /* messages of a pair arrive in order, or the connection is lost */
        if (w->mail[k].from == w->mail[i].from && w->mail[k].to == w->mail[i].to)
            i = k;
    w->lean.strategy = !one_in(8);
    w->lean.worth = s.clean ? false : !one_in(3);
    world_deliver(w, i, one_in(s.dup) && w->mail[i].from != w->yardmaster && w->mail[i].bytes[0] == 'S');
}

static void mishap(void)
{
    struct world *w = some_world();
    int r = (int)pick((uint32_t)w->n), what = (int)pick(4);
    int g = w == &s.all ? r : (int)(w - s.own) * s.each + r;
    sum.mishaps++;
    if (what == 0) { /* comes no more, and says nothing; perhaps all of its twin */
        for (int p = 0; p < s.n; p++)
            if (p == g || (one_in(2) && p / s.each == g / s.each)) {
                s.t[p].out = true;
                s.t[p].phase = STOPPED;
            }
        return;
    }
    if (w->silent[r] || w->cut[r])
        return;
    if (what == 1 ||
        r == w->yardmaster) { /* as when the twins are others now, between two exchanges; or when it aborts */
        bool orderly = !s.t[g].out && (s.t[g].phase == OUTSIDE || s.t[g].phase == BLOCKED);
        if (w == &s.all && orderly)
            s.t[g].left = s.t[g].pc + (s.t[g].phase == BLOCKED) + 1;
        else if (w == &s.all)
            s.t[g].out = true;
        ry_agree_leave(w->rank[r]);
        w->silent[r] = true;
        if (r == w->yardmaster) {
            w->cut[r] = true;
            ry_yard_lost(w->yard, w->now, r);
        }
    } else {
        if (w == &s.all)
            s.t[g].out = true;
        world_cut(w, r, what == 2, one_in(2) || what != 2);
    }
}

static bool hear_of_cuts(void)
{
    bool any = false;
    for (int i = -1; i < s.twins; i++)
        for (int r = 0; r < (i < 0 ? s.n : s.each); r++) {
            struct world *w = i < 0 ? &s.all : &s.own[i];
            if (w->down[r] && (!w->cut[r] || !w->silent[r])) {
                world_cut(w, r, !w->cut[r], !w->silent[r]);
                any = true;
            }
        }
    return any;
}

static void play(void)
{
    int events = s.clean ? 6000 : 30 + (int)pick(1200);
    for (int e = 0; e < events; e++) {
        struct world *w = some_world();
        uint32_t what = pick(100);
        if (what < 45) {
            step((int)pick((uint32_t)s.n));
        } else if (what < 93) {
            if (w->nmail)
                deliver_some(w);
        } else if (what < 97) {
            w->now += pick(s.clean ? 2 : 30);
            world_tick(w);
        } else if (one_in(s.mishaps)) {
            mishap();
        } else if (one_in(20)) {
            hear_of_cuts();
        }
    }
    for (int idle = 0, rounds = 0; idle < 80; rounds++) {
        MUST(rounds < 20000, "it goes on and on");
        bool moved = false;
        for (int g = 0; g < s.n; g++)
            while (step(g))
                moved = true;
        for (int i = -1; i < s.twins; i++) {
            struct world *w = i < 0 ? &s.all : &s.own[i];
            if (w->nmail) {
                deliver_some(w);
                moved = true;
            }
        }
        if (moved || hear_of_cuts())
            continue;
        idle++;
        for (int i = -1; i < s.twins; i++) {
            struct world *w = i < 0 ? &s.all : &s.own[i];
            uint64_t next = world_tick(w);
            if (next != UINT64_MAX) {
                w->now = next;
                world_tick(w);
            }
        }
    }
}

/* ---- the rules ---- */

static void check(void)
{
    int by_replica = 0;
    for (int g = 0; g < s.n; g++) {
        const struct thread *t = &s.t[g];
        MUST(t->phase == STOPPED, "rank %d waits for ever, in phase %d of exchange %d", g, t->phase, t->pc);
        for (int x = 0; x < OPS; x++) {
            if (t->way[x] != REPLICA)
                continue;
            by_replica++;
            MUST(equal(x), "exchange %d went by replica, though not all send the same", x);
            for (int p = 0; p < s.n; p++)
                MUST(s.t[p].way[x] == REPLICA || s.t[p].out, "exchange %d went by replica on rank %d and %s on rank %d",
                     x, g, s.t[p].way[x] == NONE ? "not at all" : "otherwise", p);
            for (int p = 0; p < s.n; p++)
                MUST(!s.t[p].left || x < s.t[p].left - 1, "exchange %d went by replica after rank %d had left", x, p);
        }
        for (int x = 0; x < OPS; x++)
            for (int p = g / s.each * s.each; p < g / s.each * s.each + s.each; p++)
                MUST(t->way[x] != OWN || s.t[p].way[x] == OWN || s.t[p].out || s.t[p].way[x] == NONE ||
                         s.own[g / s.each].cut[p % s.each] || s.own[g / s.each].silent[p % s.each],
                     "exchange %d went otherwise on ranks %d and %d of a twin", x, g, p);
    }
    for (int x = 0, first = OPS; s.clean && x < s.nops[0]; x++) {
        first = s.t[0].way[x] == REPLICA && first == OPS ? x : first;
        MUST(x < first || s.t[0].way[x] == REPLICA, "exchange %d did not go by replica, as those from %d on did", x, first);
    }
    MUST(!s.clean || by_replica > 0, "nothing went by replica");
}

static void schedule(uint64_t seed)
{
    static struct ry_seat seats[TWINS * EACH];
    struct ry_err err = {""};
    memset(&s, 0, sizeof s);
    rng = seed * UINT64_C(0x9e3779b97f4a7c15) | 1;
    for (int i = 0; i < 8; i++)
        pick(2);
    s.twins = 2 + (int)pick(TWINS - 1);
    s.each = 1 + (int)pick(EACH);
    while (s.twins * s.each > MOST_RANKS)
        s.each--;
    s.n = s.twins * s.each;
    s.clean = one_in(8);
    s.sync = s.clean || one_in(2);
    s.not_me = one_in(2) ? 0 : 20;
    s.mishaps = s.clean || one_in(3) ? 0 : 4;
    s.dup = one_in(2) ? 0 : 10;
    write_programs();
    memset(seats, 0, sizeof seats);
    for (int i = 0; i < s.n; i++) {
        seats[i].rank = i;
        snprintf(seats[i].node, sizeof seats[i].node, "n%d", i % s.each);
    }
    s.map = ry_cluster_build(seats, s.n, &err);
    forced = s.clean || !one_in(4) ? RY_REPLICA : -1;
    struct ry_twin_config config = {.map = s.map, .twins = s.twins, .forced = &forced, .name = "random"};
    ry_cost_guess(&config.model, s.map);
    if (forced < 0) { /* so slow a network that it pays */
        config.model.link[RY_LINK_NIC].bytes_per_us = config.model.nic_rank_bytes_per_us = 1e-3;
        config.model.agreement_us = 1;
    }
    s.chooser = ry_twin_chooser_new(&config, &err);
    MUST(s.map && s.chooser, "%s", err.msg);
    world_open(&s.all, s.n, 0, 4, 100000);
    ry_yard_free(s.all.yard);
    struct ry_policy policy = ry_twin_chooser_policy(s.chooser);
    struct ry_yard_config yard = {s.n, 4, 100000};
    struct ry_agree_port port = {&s.all.yard_pen, world_send};
    s.all.yard = ry_yard_new(&yard, &policy, &port);
    MUST(s.all.yard, "out of memory");
    for (int t = 0; t < s.twins; t++)
        world_open(&s.own[t], s.each, 0, 4, 300000);
    for (int g = 0; g < s.n; g++)
        s.t[g].comm = RY_NODE_COULD;
    play();
    check();
    world_close(&s.all);
    for (int t = 0; t < s.twins; t++)
        world_close(&s.own[t]);
    ry_twin_chooser_free(s.chooser);
    ry_cluster_free(s.map);
}

static uint64_t at;

START_TEST(schedules)
{
    const char *one = getenv("RY_TEST_SEED"), *many = getenv("RY_TEST_SCHEDULES");
    uint64_t first = one ? strtoull(one, NULL, 0) : (uint64_t)time(NULL) * 1000000;
    uint64_t n = one ? 1 : many ? strtoull(many, NULL, 0) : 120000;
    tell = one;
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    n = many || one ? n : n / 12;
#endif
    printf("schedules from RY_TEST_SEED=%llu on\n", (unsigned long long)first);
    fflush(stdout);
    for (uint64_t i = 0; i < n; i++) {
        at = first + i;
        schedule(at);
    }
    printf("%llu schedules: %ld by replica, %ld by a twin's own agreement, %ld direct; %ld asked of all, %ld of them "
           "of unequal bytes; "
           "%ld mishaps\n",
           (unsigned long long)n, sum.replica, sum.own, sum.direct, sum.asked, sum.unequal, sum.mishaps);
    ck_assert(one ||
              (sum.replica > (long)n && sum.own > (long)n / 10 && sum.direct > (long)n && sum.unequal > (long)n / 10));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("twins_random");
    TCase *t = tcase_create("twins_random");
    tcase_add_test(t, schedules);
    tcase_set_timeout(t, 1000);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_set_fork_status(r, CK_NOFORK); /* the seed of a failure is told below */
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    if (failed)
        printf("RY_TEST_SEED=%llu repeats it\n", (unsigned long long)at);
    srunner_free(r);
    return failed ? 1 : 0;
}
