/*
 * agree.pml: the agreement of src/control/agree.h as a model for spin: every schedule of a few exchanges on a few ranks.
 *
 * Mirrors agree_rank.c and agree_yard.c, message by message, without their bytes. Wider than the code where that is simpler:
 * the yardmaster proposes any m at any time (what SEEN is for is a good guess only), patience may be over whenever it
 * waits, the policy may choose anything, manifests may or may not match. Letters of one pair arrive in order, but a VERDICT may
 * be overtaken by whatever else the yardmaster sends (large and small messages travel differently).
 *
 * Checked: no two ranks on different paths for one exchange (assertion in `go`), other than ranks that failed, left or were
 * cut off; when nothing can happen any more, nobody waits and no letter is left (Judge); and, as there is no cycle without
 * progress where nothing is labelled progress, no cycle at all, so every run gets there: every wait ends.
 *
 * Set from outside: N ranks, X exchanges each; and when the verifier runs (compiling it takes longer than most searches), by
 * environment variables: EPOCHS proposals, CUTS, LEAVES, STRAYS, NOT_MES: how many of each may happen; BROKEN: one of the
 * mistakes that must be found (see check.py). None of these ever changes, so they are no part of a state.
 */
#ifndef N
#define N 2
#endif
#ifndef X
#define X 3
#endif
#define BROKEN_MISSING (broken == 1)
#define BROKEN_EPOCH (broken == 2)
#define BROKEN_LATE (broken == 3)
#define BROKEN_UNANSWERED (broken == 4)
#define BROKEN_PATIENCE (broken == 5)
#define BROKEN_OVERTAKEN (broken == 6)

c_decl {
\#include <stdlib.h>
    static unsigned char number(const char *name)
    {
        const char *text = getenv(name);
        if (!text) {
            printf("%s is not set\n", name);
            exit(2);
        }
        return (unsigned char)atoi(text);
    }
}
hidden byte EPOCHS, CUTS, LEAVES, STRAYS, NOT_MES, broken;

#define ALL ((1 << N) - 1)
#define BIT(i) (1 << (i))

mtype = {promise, refuse, manifest, not_me, stray, leave, propose, end, agreed, direct, agreed_last, direct_last};

chan up[N] = [8] of {mtype, byte, byte};      /* kind, epoch, number */
chan down[N] = [8] of {mtype, byte, byte};    /* PROPOSE, END */
chan verdict[N] = [4] of {mtype, byte, byte}; /* of which one at most is on its way */

/* Ranks. */
byte next[N], epoch[N], from[N], ended[N]; /* from: m of the promise */
bool held[N], over[N], waiting[N], failed[N], halted[N], cut[N];
byte path[N * X]; /* 0 not there yet, 1 direct, 2 agreed, 3 direct because it failed */

/* The yardmaster. */
mtype = {watching, proposed, engaged, closed};
mtype state = watching;
byte now_epoch, promised, in, gathering, skipped, gone; /* sets of ranks; skipped: of exchanges, by "not me" */
byte at[N];

byte cuts, leaves, strays, not_mes;
bool judged;

#define UP(r, k, e, x) \
    if \
    :: !cut[r] -> up[r] ! k, e, x \
    :: else \
    fi
#define DOWN(c, r, k, e, x) \
    if \
    :: !cut[r] && !(gone & BIT(r)) -> c[r] ! k, e, x \
    :: else \
    fi

/* Rank r carries out exchange x. */
inline go(r, x, p)
{
    path[(r) * X + (x)] = p;
    j = 0;
    do
    :: j < N ->
        assert(p == 3 || path[j * X + (x)] == 0 || path[j * X + (x)] == 3 || path[j * X + (x)] == p);
        j++
    :: else -> break
    od;
    j = 0
}

inline observe(r)
{
    held[r] = false;
    over[r] = false;
    from[r] = 0
}

inline fail(r)
{
    failed[r] = true;
    observe(r);
    if
    :: waiting[r] -> waiting[r] = false; go(r, next[r] - 1, 3)
    :: else
    fi;
    halted[r] = true; /* all that it does from here on is direct, and its own affair */
    epoch[r] = 0; /* forget, for fewer states */
    ended[r] = 0
}

proctype Rank(byte r)
{
    mtype k;
    byte e, x, j;
    do
    :: atomic {
        next[r] < X && !waiting[r] && !halted[r] ->
        x = next[r];
        next[r]++;
        if
        :: !held[r] || x < from[r] -> go(r, x, 1)
        :: held[r] && x >= from[r] -> waiting[r] = true; UP(r, manifest, epoch[r], x)
        :: held[r] && x >= from[r] && not_mes < NOT_MES ->
            not_mes++;
            UP(r, not_me, epoch[r], x);
            go(r, x, 1)
        fi;
        x = 0
    }
    :: atomic { next[r] < X && !halted[r] && !waiting[r] -> halted[r] = true } /* never comes again */
    :: atomic { /* also while it waits: from another thread */
        held[r] && !over[r] && !failed[r] && strays < STRAYS ->
        strays++;
        UP(r, stray, epoch[r], 0);
        if
        :: waiting[r] -> over[r] = true
        :: else -> observe(r)
        fi
    }
    :: atomic { !failed[r] && leaves < LEAVES -> leaves++; UP(r, leave, 0, 0); fail(r) }
    :: atomic { !cut[r] && cuts < CUTS -> /* what is on its way is gone */
        cuts++;
        cut[r] = true;
        do
        :: up[r] ? k, e, x
        :: down[r] ? k, e, x
        :: verdict[r] ? k, e, x
        :: empty(up[r]) && empty(down[r]) && empty(verdict[r]) -> break
        od;
        k = 0; e = 0; x = 0
    }
    :: atomic { cut[r] && !failed[r] -> fail(r) } /* it hears of that */
    :: atomic { down[r] ? k, e, x ->
        if
        :: failed[r]
        :: !failed[r] && k == propose ->
            if
            :: e <= ended[r] || e <= epoch[r]
            :: else ->
                if
                :: held[r] || next[r] > x -> UP(r, refuse, e, x)
                :: else ->
                    held[r] = true;
                    over[r] = false;
                    epoch[r] = e;
                    from[r] = x;
                    UP(r, promise, e, x)
                fi
            fi
        :: !failed[r] && k == end ->
            if
            :: e > ended[r] -> ended[r] = e
            :: else
            fi;
            if
            :: !held[r] || e != epoch[r]
            :: else ->
                if
                :: !BROKEN_OVERTAKEN && waiting[r] && next[r] - 1 < x -> over[r] = true
                :: else ->
                    observe(r);
                    if
                    :: waiting[r] -> waiting[r] = false; go(r, next[r] - 1, 1)
                    :: else
                    fi
                fi
            fi
        fi;
        k = 0; e = 0; x = 0
    }
    :: atomic { verdict[r] ? k, e, x ->
        if
        :: !failed[r] && held[r] && e == epoch[r] && waiting[r] && x == next[r] - 1 ->
            waiting[r] = false;
            if
            :: k == agreed || k == agreed_last -> go(r, x, 2)
            :: else -> go(r, x, 1)
            fi;
            if
            :: k == agreed_last || k == direct_last ->
                if
                :: e > ended[r] -> ended[r] = e
                :: else
                fi;
                observe(r)
            :: else ->
                if
                :: over[r] -> observe(r)
                :: else
                fi
            fi
        :: else
        fi;
        k = 0; e = 0; x = 0
    }
    :: judged -> break
    od
}

inline end_epoch(how)
{
    low = X;
    j = 0;
    do
    :: j < N ->
        if
        :: at[j] < low -> low = at[j]
        :: else
        fi;
        j++
    :: else -> break
    od;
    if
    :: BROKEN_UNANSWERED && in -> low = gathering
    :: else
    fi;
    j = 0;
    do
    :: j < N ->
        if
        :: BROKEN_LATE && !(in & BIT(j))
        :: else -> DOWN(down, j, end, now_epoch, low)
        fi;
        at[j] = 0;
        j++
    :: else -> break
    od;
    j = 0; low = 0; in = 0; promised = 0; skipped = 0; gathering = 0;
    state = how
}

inline say_in(kind)
{
    j = 0;
    do
    :: j < N ->
        if
        :: in & BIT(j) -> DOWN(verdict, j, kind, now_epoch, gathering)
        :: else
        fi;
        j++
    :: else -> break
    od;
    j = 0; in = 0; gathering = 0
}

#define ENOUGH (in == ALL || (BROKEN_MISSING && in == 1))

inline handle(r)
{
    if
    :: gone & BIT(r)
    :: !(gone & BIT(r)) && k == leave ->
        gone = gone | BIT(r);
        if
        :: state == proposed || state == engaged -> end_epoch(closed)
        :: else -> state = closed
        fi
    :: !(gone & BIT(r)) && k == promise ->
        if
        :: e == now_epoch && state == proposed ->
            promised = promised | BIT(r);
            if
            :: promised == ALL -> state = engaged
            :: else
            fi
        :: else
        fi
    :: !(gone & BIT(r)) && k == refuse ->
        if
        :: e == now_epoch && state == proposed -> end_epoch(watching)
        :: else
        fi
    :: !(gone & BIT(r)) && k == stray ->
        if
        :: e == now_epoch && (state == proposed || state == engaged) -> end_epoch(watching)
        :: else
        fi
    :: !(gone & BIT(r)) && (k == manifest || k == not_me) ->
        if
        :: !(state == proposed || state == engaged) || (e != now_epoch && !BROKEN_EPOCH) || x < at[r]
        :: else ->
            if
            :: state == proposed ->
                promised = promised | BIT(r);
                if
                :: promised == ALL -> state = engaged
                :: else
                fi
            :: else
            fi;
            assert(BROKEN_EPOCH || (x == at[r] && !(in & BIT(r)))); /* what agree_yard.c ends the epoch for cannot be */
            if
            :: k == not_me ->
                skipped = skipped | BIT(x);
                if
                :: in && gathering == x -> say_in(direct)
                :: else
                fi
            :: k == manifest && (skipped & BIT(x)) -> DOWN(verdict, r, direct, now_epoch, x)
            :: k == manifest && !(skipped & BIT(x)) ->
                assert(BROKEN_EPOCH || !in || gathering == x); /* one exchange is gathered at a time */
                if
                :: true -> /* it fits */
                    gathering = x;
                    in = in | BIT(r);
                    if
                    :: ENOUGH ->
                        in = ALL;
                        if
                        :: say_in(agreed)
                        :: say_in(direct)
                        :: say_in(agreed_last); state = watching
                        :: say_in(direct_last); state = watching
                        fi
                    :: else
                    fi
                :: end_epoch(watching) /* it does not */
                fi
            fi;
            if
            :: state == proposed || state == engaged -> at[r] = x + 1
            :: else
            fi
        fi
    fi;
    k = 0; e = 0; x = 0
}

proctype Yardmaster()
{
    mtype k;
    byte e, x, j, low;
    do
    :: atomic {
        state == watching && now_epoch < EPOCHS ->
        now_epoch++;
        state = proposed;
        promised = 0;
        skipped = 0;
        if
        :: x = 0
        :: x = 1
#if X > 2
        :: x = 2
#endif
        fi;
        j = 0;
        do
        :: j < N -> at[j] = x; DOWN(down, j, propose, now_epoch, x); j++
        :: else -> break
        od;
        j = 0; x = 0
    }
    :: atomic { !BROKEN_PATIENCE && (state == proposed || in) -> end_epoch(watching) }
    :: atomic { up[0] ? k, e, x -> handle(0) }
    :: atomic { up[1] ? k, e, x -> handle(1) }
#if N > 2
    :: atomic { up[2] ? k, e, x -> handle(2) }
#endif
    :: atomic { cut[0] && !(gone & BIT(0)) -> k = leave; handle(0) } /* it hears that the rank is lost */
    :: atomic { cut[1] && !(gone & BIT(1)) -> k = leave; handle(1) }
#if N > 2
    :: atomic { cut[2] && !(gone & BIT(2)) -> k = leave; handle(2) }
#endif
    :: judged -> break
    od
}

proctype Judge()
{
    byte j;
    timeout ->
    do
    :: j < N ->
        assert(!waiting[j]);
        assert(empty(up[j]) && empty(down[j]) && empty(verdict[j]));
        j++
    :: else -> break
    od;
    judged = true
}

init
{
    atomic {
        byte i;
        c_code {
            EPOCHS = number("EPOCHS");
            CUTS = number("CUTS");
            LEAVES = number("LEAVES");
            STRAYS = number("STRAYS");
            NOT_MES = number("NOT_MES");
            broken = number("BROKEN");
        };
        do
        :: i < N -> run Rank(i); i++
        :: else -> break
        od;
        run Yardmaster();
        run Judge()
    }
}
