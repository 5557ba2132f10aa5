"""Samples moved between layers, as far as it needs no framework: routes, the agreement, options, the leader's answers."""

import os
import random
import re
import sys
import threading
import time
import types

from megatron_cpu import check
from railyard import board, layers

HERE = os.path.dirname(os.path.abspath(__file__))


def case_routes(seed):
    """What ranks give and take fits together, brings every sample where it shall be, and back."""
    pick = random.Random(seed)
    for _ in range(300):
        ranks, b = pick.randint(1, 5), pick.randint(1, 4)
        now, then = (pick.sample(range(ranks * b), ranks * b) for _ in range(2))
        ways = [layers.route(now, then, r, b) for r in range(ranks)]
        for ways, start, want in ((ways, now, then), ([w.back() for w in ways], then, now)):
            held = [start[r * b : (r + 1) * b] for r in range(ranks)]
            got = [[None] * b for _ in range(ranks)]
            wire = {}
            for r, w in enumerate(ways):
                given = iter(w.give)
                for to, n in enumerate(w.gives):
                    wire[r, to] = [held[r][next(given)] for _ in range(n)]
                for old, new in w.keep:
                    got[r][new] = held[r][old]
            for r, w in enumerate(ways):
                taken = iter(w.take)
                for source, n in enumerate(w.takes):
                    check(len(wire[source, r]) == n, "what is given is not what is taken")
                    for sample in wire[source, r]:
                        got[r][next(taken)] = sample
            check(sum(got, []) == list(want), f"{start} to {want}: {got}")
            check(all(not wire[r, r] for r in range(ranks)), "a rank sends to itself")


def an_offer(rank, **more):
    return {
        "no": "",
        "version": 1,
        "shape": [12, 2, 32, "f"],
        "model": [3, 8, 2],
        "group": [0, 1] if rank < 2 else [2, 3],
        "node": f"n{rank % 2}",
        "outside": "",
        **more,
    }


def case_agreement(_):
    offers = {r: an_offer(r) for r in range(4)}
    verdict = layers.judge(offers, 4)
    check(verdict["go"] and verdict["nodes"] == ["n0", "n1", "n0", "n1"], verdict)
    for what, rank, bad in (
        ("rank 2 did not come", 2, None),
        ("rank 1: fp8", 1, an_offer(1, no="fp8: because")),
        ("of another shape", 3, an_offer(3, shape=[12, 1, 32, "f"])),
        ("another model", 1, an_offer(1, model=[4, 8, 2])),
        ("another version", 1, an_offer(1, version=2)),
        ("not the same for all", 1, an_offer(1, group=[1, 0])),
        ("not the same for all", 1, an_offer(1, group=[1])),
        ("all on one node", 1, an_offer(1, node="n0")),
    ):
        verdict = layers.judge({**offers, rank: bad}, 4)
        check(not verdict["go"] and what in verdict["why"], f"{what}: {verdict}")

    check(layers.judge(offers, 4)["outside"] == "", "inside combine")
    verdict = layers.judge({**offers, 2: an_offer(2, outside="sums")}, 4)
    check(verdict["go"] and verdict["outside"] == "rank 2: sums", verdict)

    def together(ranks, patience=0.5, late=()):
        shared, said = board.MemoryBoard(), {}

        def one(rank):
            time.sleep(2 * patience if rank in late else 0)
            said[rank] = layers.agree(shared, rank, 4, offers[rank], patience)

        threads = [threading.Thread(target=one, args=(r,)) for r in ranks]
        [t.start() for t in threads], [t.join(20) for t in threads]
        check(len(said) == len(ranks) and all(v == said[ranks[0]] for v in said.values()), f"not all do the same: {said}")
        return said[ranks[0]]

    check(together([0, 1, 2, 3], patience=30)["go"], "all are there")
    check("rank 1 did not come" in together([0, 2, 3])["why"], "a rank that is not there")
    check("for rank 0 in vain" in together([1, 2, 3])["why"], "no rank 0")
    check(not together([0, 1, 2, 3], late=(0,))["go"] and not together([0, 1, 2, 3], late=(2,))["go"], "late")

    class Deaf(board.MemoryBoard):
        def wait(self, key, seconds):
            raise OSError("the board cannot be reached")

    try:
        layers.agree(Deaf(), 1, 4, offers[1], 0.2)
        check(False, "a rank that said yes and hears nothing must not go on")
    except layers.Doubt as e:
        check("cannot learn" in str(e), e)


GOOD = dict(
    moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none", cuda_graph_impl="none", cuda_graph_scope=[]
)
FACTS = {"version": (0, 16, 1), "ep": 4, "dp": 4, "position": "rope", "moe_layers": 3}


def case_findings(_):
    """Each option alone is refused, by one line that names it; the table in docs/live-placement.md has these and no others."""
    from railyard import megatron_layers

    def refused(change, facts):
        return megatron_layers.refusals(types.SimpleNamespace(**{**GOOD, **change}), {**FACTS, **facts})

    check(refused({}, {}) == [], refused({}, {}))
    check(
        refused({"moe_router_load_balancing_type": "seq_aux_loss", "recompute_granularity": "full", "hidden_dropout": 0.1}, {})
        == [],
        "",
    )
    seen = set()
    cases = (
        [({n: True}, {}, n) for n in megatron_layers.UNSURE]
        + [({n: 2}, {}, n) for n in megatron_layers.SIZES]
        + [
            ({}, {"version": (0, 15, 0)}, "megatron-core"),
            ({}, {"version": (0, 17, 0)}, "megatron-core"),
            ({"moe_token_dispatcher_type": "flex"}, {}, "moe_token_dispatcher_type"),
            ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn"]}, {}, "cuda_graph_impl"),
            ({"cuda_graph_impl": "local"}, {}, "cuda_graph_impl"),
            ({"moe_router_load_balancing_type": "sinkhorn"}, {}, "moe_router_load_balancing_type=sinkhorn"),
            ({}, {"position": "mrope"}, "position_embedding_type=mrope"),
            ({}, {"moe_layers": 1}, "moe_layer_freq"),
        ]
    )
    for change, facts, option in cases:
        lines = refused(change, facts)
        check(len(lines) == 1 and option in lines[0] and "\n" not in lines[0], f"{change}, {facts}: {lines}")
        seen.add(option)
    check(len(refused({"moe_enable_routing_replay": True}, {})) == 1, "what batch placement refuses is refused here too")
    with open(os.path.join(HERE, "..", "..", "docs", "live-placement.md"), encoding="utf-8") as f:
        table = f.read().split("## Samples moved between layers")[1]
    told = set(
        re.findall(r"`([a-z0-9_=-]+)`", "".join(line for line in table.splitlines(True) if line.endswith("| refused |\n")))
    )
    check(told == seen, f"docs/live-placement.md and the adapter differ: {sorted(told ^ seen)}")
    print(f"{len(seen)} options, all in the documentation")

    def asked(setting, **config):
        return megatron_layers.outside(types.SimpleNamespace(**config), lambda name: setting.get(name, ""))

    for name in megatron_layers.OUTSIDE:
        check(asked({}, **{name: 2}).startswith(name), f"{name}: {asked({}, **{name: 2})}")
        check(f"`{name}`" in table or name == "moe_shared_expert_intermediate_size", f"{name} is not in the documentation")
    check(asked({"RAILYARD_COMBINE": "sum:2"}).startswith("RAILYARD_COMBINE"), "sums")
    check("preloaded" in asked({}, mlp_chunks_for_training=1), asked({}, mlp_chunks_for_training=1))


class Said:
    """A job of one rank, as far as a Mover asks it."""

    rank, pid = 0, 0

    def __init__(self):
        self.stops = []

    def stop(self, why):
        self.stops.append(why)

    def stopped(self, now=False):
        return self.stops[0] if self.stops else None


def case_answers(_):
    """The leader's answers, whatever its thread does: late, failing, contradicted, told that somebody cannot go on."""
    try:
        import numpy as np
    except ImportError as e:
        print(f"skipped: {e}")
        sys.exit(77)

    class Plan:
        pause, fails = 0.0, False

        def next(self, number, layer, sample, counts, distinct):
            time.sleep(self.pause)
            if self.fails:
                raise RuntimeError("made to fail")
            return list(reversed(sample)), True, "reversed"

        def words(self):
            return ""

    class Host:
        def __init__(self, rows):
            self.rows = np.array(rows, dtype=np.int32)

        def numpy(self):
            return self.rows

    def told(mover, number, layer, flags=0, mask=1, rank=1):
        rows = np.zeros((2, mover.size), dtype=np.int32)
        rows[:, 0], rows[:, 1], rows[:, 3] = number, layer, 1
        rows[rank, 2], rows[rank, 3] = flags, mask
        mover._jobs.put((number, layer, list(range(mover.slots)), Host(rows), None))
        mover._pending = (number, layer, None)

    def answer(plan, late, told_of=(5, 0), asked=(5, 0), **what):
        mover = layers.Mover(Said(), None, [0, 1], 2, 12, 3, 8, [0] * 4 + [1] * 4, 2, plan, late=late)
        told(mover, *told_of, **what)
        micro = layers.Micro(asked[0], 4, 0, None, True)
        return mover, mover._answer(micro, asked[1])

    from railyard import adapt

    class Asked(Said):
        described = None

        def setting(self, name):
            return {"RAILYARD_PLACEMENT": "layer", "RAILYARD_ROUTING": ""}[name]

        def describe(self, **what):
            self.described = what

    for framework, stops in (("megatron-core 0.16.1", 0), ("deepspeed 0.19.8", 1)):
        asked = Asked()
        check(adapt.join(asked, [], {"framework": framework}) is None and asked.described, "nobody was told of the job")
        check(len(asked.stops) == stops and all(framework in why for why in asked.stops), f"{framework}: {asked.stops}")

    planner, moves = layers.Planner.__new__(layers.Planner), iter([1] + 3 * (layers.IDLE + 1) * [0] + [0, 1, 0] + [0])
    planner._idle, planner._moved = 0, True
    planner._layers = types.SimpleNamespace(
        next=lambda layer, sample, *_: (sample, types.SimpleNamespace(moved=next(moves), why="", inside=False)),
        state=lambda: types.SimpleNamespace(sure=True),
    )
    planner.next(0, 0, [], None, None)
    asked = [planner.next(1 + n, layer, [], None, None)[1] for n in range(layers.IDLE + 1) for layer in range(3)]
    check(asked[0] and not asked[-3], f"no end of asking where nobody moves: {asked}")
    [planner.next(9, layer, [], None, None) for layer in range(3)]
    check(planner.next(10, 0, [], None, None)[1], "no asking although samples would move again")

    plan = Plan()
    for layer in (0, 1):
        _, got = answer(plan, 20.0, (5, layer), (5, layer))
        check(got == [5, layer, layers.MOVE, 0, 3, 2, 1, 0], got)
    mover, got = answer(plan, 20.0, asked=(6, 0))
    check(got[2] == layers.STAY and not mover.job.stops, f"an answer to other counts: {got}")
    plan.pause = 0.5
    mover, got = answer(plan, 0.01)
    check(got[2] == layers.STAY and mover.counted["late"] == 1 and not mover.job.stops, f"late: {got}")
    time.sleep(0.7)
    told(mover, 5, 1)
    check(mover._answer(layers.Micro(5, 4, 0, None, True), 1)[2] == layers.STAY, "a late answer was taken for another layer's")
    plan.pause = 0.0
    _, got = answer(plan, 20.0, flags=layers.UNREADY)
    check(got[2:4] == [layers.STAY, 0], f"no backward pass yet: {got}")
    for what in ({"flags": layers.UNFIT}, {"mask": 0}):
        mover, got = answer(plan, 20.0, **what)
        check(got[2:4] == [layers.STAY, layers.QUIET] and not mover.job.stops, f"{what}: {got}")
        told(mover, 5, 1)
        check(mover._answer(layers.Micro(5, 4, 0, None, True), 1)[2] == layers.STAY, "moved in a micro-batch that is unfit")
    for what in ({"flags": layers.FAILED}, {"told_of": (5, 0), "fails": True}):
        plan.fails = what.pop("fails", False)
        mover, got = answer(plan, 20.0, **what)
        check(got[2] == layers.END and len(mover.job.stops) == 1, f"{what}: {got}, {mover.job.stops}")
    plan.fails = False
    mover = layers.Mover(Said(), None, [0, 1], 2, 12, 3, 8, [0] * 4 + [1] * 4, 2, plan, late=20.0)
    mover._pending = None  # anything that goes wrong in answering
    got = mover._answer(layers.Micro(5, 4, 0, None, True), 0)
    check(got[2] == layers.END and "answering failed" in mover.job.stops[0], got)


CASES = {"routes": case_routes, "agreement": case_agreement, "findings": case_findings, "answers": case_answers}
