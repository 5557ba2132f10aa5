/*
 * test_agree_random.c: agreement under random programs and random schedules.
 *
 * A schedule: 2 to 6 ranks with one or two communicators run a random program (exchanges; stars that look like an
 * exchange at their hub only; other p2p; captured exchanges; communicators used in different orders; sizes that differ
 * or do not; sizes that do not match; exchanges begun twice) while letters are delivered in any order, twice, late;
 * ranks stop for ever, leave, lose their connection; time jumps and the yardmaster is stopped. In half of them, work
 * that goes direct blocks its rank until the other side issued its part, as a synchronous program's would. What NCCL
 * would match is counted here, apart from what the machines are told. The rules, checked on each: same path    a rank
 * carries exchange x out otherwise than direct only if all others do so in the same way, other than ranks that failed,
 * left or lost their connection before they were told; no mix-up    and only if NCCL would match every send with the
 * receive of this very exchange, of equal size and type; no wait for ever   when nothing can happen any more but time
 * passing, nobody waits for a verdict for long; no letter to nowhere   (agree_world.h); and it works   a program of
 * plain exchanges without mishaps ends engaged, every exchange from m on agreed.
 *
 * RY_TEST_SEED=n repeats schedule n alone and prints what happens in it; RY_TEST_SCHEDULES sets their number.
 */
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

#include "agree_world.h"
#include "draws.h"

#define RANKS 6
#define ROUNDS 40
#define COMMS 2
#define OPS (2 * ROUNDS + 4)

/* One call of the job, on one rank. */
struct op {
    uint8_t comm, round, to, from; /* bit masks of peers; all bits: an exchange to this rank's eyes */
    bool not_me, twice;
    uint8_t odd; /* added to one size, where it should not be */
};
enum phase { OUTSIDE, IN_GROUP, WAITING, BLOCKED, STOPPED };
struct thread {
    struct op op[OPS];
    int nops, pc;
    enum phase phase;
    bool held; /* when the group began */
};
/* What a rank did as its exchange number x on a communicator. */
struct deed {
    bool done, verify;
    int strategy;
    uint32_t sends[RANKS], recvs[RANKS]; /* issued before */
    uint64_t out[RANKS], in[RANKS];      /* bytes */
};
static struct {
    int n, comms;
    bool sync, fifo, clean;
    uint32_t dup, mishaps, stray, crossed, not_me;
    struct world w[COMMS];
    struct thread t[RANKS];
    uint32_t sends[COMMS][RANKS][RANKS], recvs[COMMS][RANKS][RANKS]; /* [rank][peer] issued */
    struct deed deed[COMMS][RANKS][OPS];
    int round_kind[ROUNDS];
} s;
static bool tell; /* print what happens */
static struct {
    long waits, agreed, reasons[RY_WHYS + 1], commits, strays, mismatched, impatient, not_me, lost, aborts;
} sum;

#define SAY(...) (tell ? (void)printf(__VA_ARGS__) : (void)0)

/* ---- programs ---- */

static struct op *add(int rank, int comm, int round, unsigned to, unsigned from)
{
    struct thread *t = &s.t[rank];
    t->op[t->nops] =
        (struct op){.comm = (uint8_t)comm, .round = (uint8_t)round, .to = (uint8_t)to, .from = (uint8_t)from};
    return &t->op[t->nops++];
}

static void write_program(void)
{
    unsigned all = (1u << s.n) - 1;
    int rounds = s.clean ? ROUNDS : 12 + (int)pick(ROUNDS - 12);
    for (int k = 0; k < rounds; k++) {
        int c = (int)pick((uint32_t)s.comms);
        s.round_kind[k] = (int)pick(3);
        if (one_in(s.stray)) { /* a star: an exchange at its hub, with itself as well; on the others it is none */
            int hub = (int)pick((uint32_t)s.n);
            for (int r = 0; r < s.n; r++)
                add(r, c, k, r == hub ? all : 1u << hub, r == hub ? all : 1u << hub);
        } else if (one_in(s.stray)) { /* a pipeline, or only a piece of it */
            int a = (int)pick((uint32_t)s.n), b = (a + 1) % s.n;
            add(a, c, k, 1u << b, 0);
            add(b, c, k, 0, 1u << a);
        } else if (s.comms == 2 && k + 1 < rounds && one_in(s.crossed)) {
            unsigned first = pick(1u << s.n);
            s.round_kind[k + 1] = s.round_kind[k];
            for (int r = 0; r < s.n; r++)
                for (int i = 0; i < 2; i++) {
                    int comm = (first >> r & 1) ^ i;
                    add(r, comm, k + comm, all, all);
                }
            k++;
        } else {
            unsigned out = one_in(s.not_me) ? (one_in(2) ? all : pick(1u << s.n)) : 0;
            int bent = one_in(s.stray) && one_in(4) ? (int)pick((uint32_t)s.n) : -1;
            for (int r = 0; r < s.n; r++) {
                struct op *o = add(r, c, k, all, all);
                o->not_me = out >> r & 1;
                o->odd = bent == r ? 1 + (uint8_t)pick(5) : 0;
                o->twice = !s.clean && one_in(400);
            }
        }
    }
    for (int r = 0; r < s.n; r++)
        if (!s.clean && one_in(25)) /* never comes to the rest */
            s.t[r].nops = (int)pick((uint32_t)s.t[r].nops + 1);
}

static uint64_t size_of(int round, int from, int to)
{
    switch (s.round_kind[round]) {
    case 0:
        return 64; /* equal sizes everywhere: only ordinals tell rounds apart */
    case 1:
        return (uint64_t)(round * 36 + from * 6 + to);
    default:
        return (uint64_t)((from * 7 + to * 3 + round) % 4);
    }
}

/* ---- ranks ---- */

static bool out_of_it(struct world *w, int r)
{
    return w->silent[r] || w->cut[r] || w->down[r];
}

static void issue(int r, const struct op *o)
{
    for (int p = 0; p < s.n; p++) {
        s.sends[o->comm][r][p] += o->to >> p & 1;
        s.recvs[o->comm][r][p] += o->from >> p & 1;
    }
}

static bool through(int r, const struct op *o)
{
    if (!s.sync)
        return true;
    for (int p = 0; p < s.n; p++) {
        if (out_of_it(&s.w[o->comm], p))
            continue;
        if ((o->to >> p & 1) && s.recvs[o->comm][p][r] < s.sends[o->comm][r][p])
            return false;
        if ((o->from >> p & 1) && s.sends[o->comm][p][r] < s.recvs[o->comm][r][p])
            return false;
    }
    return true;
}

static void carried_out(int r, const struct op *o, int strategy, bool verify)
{
    struct world *w = &s.w[o->comm];
    struct deed *d = &s.deed[o->comm][r][w->next[r] - 1];
    d->done = true;
    d->strategy = strategy;
    d->verify = verify;
    SAY("  rank %d comm %d exchange %lu round %d: %s\n", r, o->comm, w->next[r] - 1, o->round,
        strategy ? "agreed" : "direct");
    issue(r, o);
    s.t[r].phase = BLOCKED;
}

static void begin_exchange(int r, const struct op *o)
{
    struct world *w = &s.w[o->comm];
    struct thread *t = &s.t[r];
    uint64_t x = w->next[r]++, note = x * 100 + (uint64_t)r;
    struct deed *d = &s.deed[o->comm][r][x];
    uint32_t sent[RANKS], received[RANKS];
    bool beside = false;
    for (int p = 0; p < s.n; p++) {
        d->sends[p] = s.sends[o->comm][r][p];
        d->recvs[p] = s.recvs[o->comm][r][p];
        sent[p] = d->sends[p] - (uint32_t)x;
        received[p] = d->recvs[p] - (uint32_t)x;
        beside |= sent[p] || received[p];
        d->out[p] = size_of(o->round, r, p);
        d->in[p] = size_of(o->round, p, r);
    }
    if (o->odd)
        *(o->odd & 1 ? &d->out[o->odd % s.n] : &d->in[o->odd % s.n]) += 1;
    struct ry_manifest m = {.not_me = o->not_me || !t->held,
                            .type = 7,
                            .send = d->out,
                            .recv = d->in,
                            .ordinal = x,
                            .sent = beside ? sent : NULL,
                            .received = beside ? received : NULL,
                            .extra = &note,
                            .extra_bytes = sizeof note};
    enum ry_way path = ry_agree_exchange(w->rank[r], x, &m, &note, sizeof note);
    if (o->twice && path == RY_GO_DIRECT)
        MUST(ry_agree_exchange(w->rank[r], x, &m, &note, sizeof note) == RY_GO_DIRECT, "an exchange begun twice waits");
    MUST(!m.not_me || path == RY_GO_DIRECT, "rank %d waits although it said 'not me'", r);
    if (path == RY_WAIT_VERDICT) {
        sum.waits++;
        t->phase = WAITING;
        SAY("  rank %d comm %d exchange %lu round %d: waits\n", r, o->comm, x, o->round);
    } else {
        carried_out(r, o, 0, false);
    }
}

static void count_reason(const char *why)
{
    for (int i = 0; i < RY_WHYS; i++)
        if (!strcmp(why, ry_agree_why((enum ry_agree_reason)i))) {
            sum.reasons[i]++;
            return;
        }
    sum.reasons[RY_WHYS]++;
}

/* Rank r's thread goes on by one step: true if anything changed. */
static bool step(int r)
{
    struct thread *t = &s.t[r];
    const struct op *o = &t->op[t->pc];
    struct world *w = &s.w[o->comm];
    struct ry_verdict v;
    switch (t->phase) {
    case OUTSIDE:
        if (t->pc >= t->nops) {
            t->phase = STOPPED;
            return false;
        }
        t->held = ry_agree_hold(w->rank[r]);
        t->phase = IN_GROUP;
        return true;
    case IN_GROUP:
        if (o->to == (1u << s.n) - 1 && o->from == o->to) {
            begin_exchange(r, o);
        } else {
            SAY("  rank %d comm %d: p2p of round %d\n", r, o->comm, o->round);
            ry_agree_stray(w->rank[r]);
            issue(r, o);
            t->phase = BLOCKED;
        }
        return true;
    case WAITING:
        if (!ry_agree_verdict(w->rank[r], &v))
            return false;
        MUST(v.number == w->next[r] - 1, "rank %d has the verdict of another exchange", r);
        if (v.strategy) {
            const uint64_t *note = v.extra;
            MUST(v.extra_bytes == 24 && note[0] == v.number && note[1] == (uint64_t)r &&
                     note[2] == s.deed[o->comm][r][v.number].in[(r + 1) % s.n],
                 "rank %d has another's part of the verdict", r);
            sum.agreed++;
        } else {
            count_reason(v.reason);
            SAY("  (%s)\n", v.reason);
        }
        carried_out(r, o, v.strategy, v.verify);
        return true;
    case BLOCKED:
        if (!through(r, o))
            return false;
        t->pc++;
        t->phase = OUTSIDE;
        return true;
    default:
        return false;
    }
}

/* ---- mail, time, mishaps ---- */

static void deliver_some(struct world *w, bool to_yard)
{
    int i = (int)pick((uint32_t)w->nmail);
    if (s.fifo)
        for (int k = 0; k < i; k++)
            if (w->mail[k].from == w->mail[i].from && w->mail[k].to == w->mail[i].to)
                i = k;
    if (w->mail[i].to == YARD && !to_yard)
        return;
    w->lean.verify = one_in(4);
    w->lean.last = !s.clean && one_in(30);
    w->lean.rest = one_in(2) ? pick(40) : 0;
    w->lean.strategy = s.clean || !one_in(8);
    w->lean.worth = s.clean || !one_in(4);
    if (w->mail[i].from == w->yardmaster && w->mail[i].to == YARD)
        ;
    else if (one_in(s.dup)) {
        struct letter l = w->mail[i];
        l.bytes = malloc(l.size);
        memcpy(l.bytes, w->mail[i].bytes, l.size);
        if (w->nmail == w->room)
            w->mail = realloc(w->mail, (size_t)(w->room *= 2) * sizeof *w->mail);
        w->mail[w->nmail++] = l;
    }
    SAY("%c %d -> %d\n", w->mail[i].bytes[0], w->mail[i].from, w->mail[i].to);
    world_deliver(w, i, false);
}

static void leave(struct world *w, int r)
{
    SAY("rank %d leaves\n", r);
    ry_agree_leave(w->rank[r]);
    w->silent[r] = true;
    if (r == w->yardmaster && one_in(2)) {
        w->cut[r] = true;
        ry_yard_lost(w->yard, w->now, r);
    }
}

static void mishap(void)
{
    struct world *w = &s.w[pick((uint32_t)s.comms)];
    int r = (int)pick((uint32_t)s.n), what = (int)pick(3);
    if (w->silent[r] || w->cut[r])
        return;
    if (what == 0) {
        leave(w, r);
    } else if (what == 1 && r != w->yardmaster) {
        SAY("rank %d is cut off\n", r);
        int hears = (int)pick(3); /* the other end will hear of it later */
        world_cut(w, r, hears != 0, hears != 1);
    } else {
        s.t[r].nops = s.t[r].pc; /* comes no more, and says nothing */
        if (s.t[r].phase == OUTSIDE)
            s.t[r].phase = STOPPED;
    }
}

static bool hear_of_cuts(void)
{
    bool any = false;
    for (int c = 0; c < s.comms; c++)
        for (int r = 0; r < s.n; r++) {
            struct world *w = &s.w[c];
            if (w->down[r] && (!w->cut[r] || !w->silent[r])) {
                world_cut(w, r, !w->cut[r], !w->silent[r]);
                any = true;
            }
        }
    return any;
}

static void jump(uint64_t ns)
{
    for (int c = 0; c < s.comms; c++)
        s.w[c].now += ns;
}

/* Random events; then everything that can still happen, time last. */
static void play(void)
{
    int frozen = 0; /* the yardmasters are stopped for so many events */
    int events = s.clean ? 5000 : 30 + (int)pick(1000);
    uint64_t pace = one_in(2) ? 1 : 1 + pick(20);
    for (int e = 0; e < events; e++) {
        struct world *w = &s.w[pick((uint32_t)s.comms)];
        uint32_t what = pick(100);
        if (frozen > 0)
            frozen--;
        if (what < (s.clean ? 25 : 45)) {
            step((int)pick((uint32_t)s.n));
        } else if (what < 92) {
            if (w->nmail)
                deliver_some(w, frozen == 0);
        } else if (what < 97) {
            jump(pick((uint32_t)pace));
            if (frozen == 0)
                world_tick(w);
        } else if (!s.clean && one_in(40)) {
            frozen = (int)pick(200);
            if (one_in(2))
                jump(pick(100000));
        } else if (one_in(s.mishaps)) {
            mishap();
        } else if (one_in(20)) {
            hear_of_cuts();
        }
    }
    for (int idle = 0, rounds = 0; idle < 60; rounds++) {
        MUST(rounds < 20000, "it goes on and on");
        bool moved = false;
        for (int r = 0; r < s.n; r++)
            while (step(r))
                moved = true;
        for (int c = 0; c < s.comms; c++)
            if (s.w[c].nmail) {
                deliver_some(&s.w[c], true);
                moved = true;
            }
        if (moved || hear_of_cuts())
            continue;
        /* Only time is left to pass. */
        idle++;
        for (int c = 0; c < s.comms; c++) {
            uint64_t next = world_tick(&s.w[c]);
            MUST(next == UINT64_MAX || next > s.w[c].now, "a time that is past");
            if (next != UINT64_MAX) {
                s.w[c].now = next;
                world_tick(&s.w[c]);
            } else if (s.w[c].nmail == 0 && s.comms == 1) {
                idle = 60;
            }
        }
    }
}

/* ---- the rules ---- */

static void judge(void)
{
    for (int r = 0; r < s.n; r++)
        if (s.t[r].phase == WAITING)
            ck_abort_msg("rank %d waits for ever", r);
    for (int c = 0; c < s.comms; c++) {
        struct world *w = &s.w[c];
        uint64_t first = UINT64_MAX, most = 0;
        for (int r = 0; r < s.n; r++)
            most = w->next[r] > most ? w->next[r] : most;
        for (uint64_t x = 0; x < most; x++) {
            struct deed *some = NULL;
            for (int r = 0; r < s.n && !some; r++)
                if (s.deed[c][r][x].done && s.deed[c][r][x].strategy)
                    some = &s.deed[c][r][x];
            if (!some)
                MUST(first == UINT64_MAX || !s.clean, "exchange %lu is direct in a clean run, engaged at %lu", x,
                     first);
            if (!some)
                continue;
            if (first == UINT64_MAX)
                first = x;
            for (int r = 0; r < s.n; r++) {
                struct deed *d = &s.deed[c][r][x];
                MUST(out_of_it(w, r) || (d->done && d->strategy == some->strategy && d->verify == some->verify),
                     "comm %d exchange %lu: rank %d on another path", c, x, r);
                for (int p = 0; p < s.n; p++) {
                    struct deed *q = &s.deed[c][p][x];
                    MUST(d->out[p] == q->in[r], "comm %d exchange %lu: %d -> %d sizes", c, x, r, p);
                    MUST(d->sends[p] == q->recvs[r], "comm %d exchange %lu: %d -> %d is another turn", c, x, r, p);
                }
            }
        }
        MUST(!s.clean || first != UINT64_MAX, "a clean run never engaged");
        struct ry_yard_counts k;
        ry_yard_counts(w->yard, &k);
        sum.commits += (long)k.commits, sum.aborts += (long)k.aborts, sum.strays += (long)k.strays;
        sum.mismatched += (long)k.mismatched, sum.impatient += (long)k.impatient;
        sum.not_me += (long)k.not_me, sum.lost += (long)k.lost;
    }
}

static void schedule(uint64_t seed)
{
    rng = (seed + 1) * UINT64_C(0x9e3779b97f4a7c15);
    for (int i = 0; i < 4; i++)
        pick(2);
    memset(&s, 0, sizeof s);
    s.n = 2 + (int)pick(one_in(3) ? 5 : 2);
    s.comms = one_in(4) ? 2 : 1;
    s.clean = one_in(30);
    s.sync = one_in(2);
    s.fifo = !one_in(4);
    s.dup = one_in(3) ? 2 + pick(30) : 0;
    s.mishaps = one_in(3) ? 1 + pick(8) : 0;
    s.stray = one_in(2) ? 8 + pick(40) : 0;
    s.crossed = one_in(2) ? 4 + pick(20) : 0;
    s.not_me = one_in(2) ? 3 + pick(10) : 0;
    uint64_t patience = one_in(3) ? 1000000000 : one_in(2) ? 300 : 20 + pick(100);
    if (s.clean)
        s.comms = 1, s.mishaps = s.stray = s.not_me = 0, s.fifo = s.sync = true, patience = UINT64_C(1) << 40;
    SAY("%d ranks, %d comms%s%s\n", s.n, s.comms, s.sync ? ", synchronous" : "", s.fifo ? "" : ", any order");
    for (int c = 0; c < s.comms; c++)
        world_open(&s.w[c], s.n, (int)pick((uint32_t)s.n), 1 + (int)pick(3), patience);
    write_program();
    play();
    judge();
    for (int c = 0; c < s.comms; c++)
        world_close(&s.w[c]);
}

static uint64_t base_seed;
static long schedules;
static uint64_t *current; /* shared with the process that reports, so that it knows whatever way a schedule ends */

START_TEST(random_schedules)
{
    for (long i = 0; i < schedules; i++) {
        *current = base_seed + (uint64_t)i;
        schedule(*current);
    }
    printf("agree_random: %ld schedules, %ld waits: %ld agreed; direct:", schedules, sum.waits, sum.agreed);
    for (int i = 1; i < RY_WHYS; i++)
        printf(" %ld %s;", sum.reasons[i], ry_agree_why((enum ry_agree_reason)i));
    printf(" %ld this rank's own failure\n", sum.reasons[0] + sum.reasons[RY_WHYS]);
    printf("agree_random: %ld commits, %ld aborts, %ld strays, %ld mismatched, %ld impatient, %ld not me, %ld lost\n",
           sum.commits, sum.aborts, sum.strays, sum.mismatched, sum.impatient, sum.not_me, sum.lost);
    if (schedules < 2000)
        return;
    /* The rules are worth nothing where nothing happens. */
    ck_assert_int_gt(sum.agreed, schedules);
    ck_assert_int_gt(sum.mismatched, schedules / 100);
    ck_assert_int_gt(sum.strays, schedules / 100);
    ck_assert_int_gt(sum.impatient, schedules / 100);
    ck_assert_int_gt(sum.not_me, schedules / 10);
    ck_assert_int_gt(sum.lost, schedules / 100);
    ck_assert_int_gt(sum.aborts, schedules / 100);
}
END_TEST

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define USUAL 10000
#else
#define USUAL 150000
#endif

int main(void)
{
    const char *seed = getenv("RY_TEST_SEED"), *count = getenv("RY_TEST_SCHEDULES");
    base_seed = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL) * 1000000;
    schedules = count ? atol(count) : seed ? 1 : USUAL;
    tell = schedules == 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    current = mmap(NULL, sizeof *current, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (current == MAP_FAILED)
        return 1;
    printf("agree_random: %ld schedules from seed %lu (RY_TEST_SEED repeats one)\n", schedules, base_seed);
    Suite *suite = suite_create("agree_random");
    TCase *t = tcase_create("agree_random");
    tcase_set_timeout(t, 110);
    tcase_add_test(t, random_schedules);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    if (failed)
        printf("agree_random: that was schedule %lu: repeat with RY_TEST_SEED=%lu\n", *current, *current);
    srunner_free(r);
    return failed ? 1 : 0;
}
