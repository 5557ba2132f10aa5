#!/usr/bin/env python3
"""What the leader concludes from all hellos, and reading samples' tokens. usage: geometry_test.py"""

import os
import sys
from array import array

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "..", "plugin", "python")]
from railyard import dealing, job, tokens  # noqa: E402

bad = 0


def check(name, got, want):
    global bad
    if got != want:
        bad += 1
        print(f"{name}: {got!r} instead of {want!r}")


def hellos(nodes, groups, experts=8, dp=None, share=1, **more):
    """Ranks of these nodes (a text, a letter each), expert-parallel groups as lists of ranks; `share` consecutive ranks share
    samples."""
    out = {}
    for ranks in groups:
        each = experts // len(ranks)
        for i, r in enumerate(ranks):
            out[r] = {
                "version": 1,
                "settings": "s",
                "framework": "f",
                "node": nodes[r],
                "dp": r // share if dp is None else dp[r],
                "dp_size": len(nodes) // share,
                "share": [r % share, share],
                "ep_ranks": ranks,
                "experts": list(range(i * each, (i + 1) * each)),
                "layers": 3,
                "n_experts": experts,
                "topk": 2,
                **more,
            }
    return out


def refused(h, world=None):
    try:
        return f"not refused: {job.geometry(h, world)}"
    except job.Refused as e:
        return str(e)


g = job.geometry(hellos("aabb", [[0, 1, 2, 3]]))
check(
    "one group",
    (g.ranks, g.places, g.rank_place, g.expert_place, g.layers, g.topk, g.nodes),
    (4, 2, [0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1], 3, 2, 2),
)
g = job.geometry(hellos("abab", [[0, 1], [2, 3]]))
check("two groups that span nodes alike", (g.places, g.rank_place, g.expert_place), (2, [0, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]))
g = job.geometry(hellos("abcd", [[0, 1], [2, 3]]))
check("and on nodes of their own", (g.places, g.rank_place, g.nodes), (2, [0, 1, 0, 1], 4))
g = job.geometry(hellos("aaabbb", [[0, 1, 2, 3, 4, 5]], experts=12))
check("three ranks of a node", (g.rank_place, g.expert_place), ([0, 0, 0, 1, 1, 1], [0] * 6 + [1] * 6))
g = job.geometry(hellos("aabbaabb", [list(range(8))], share=2))
check("pairs share samples", (g.ranks, g.rank_place, g.expert_place), (4, [0, 1, 0, 1], [0, 0, 1, 1, 0, 0, 1, 1]))
check("one node", refused(hellos("aaaa", [[0, 1, 2, 3]])), "nothing to gain: every rank's node holds the same experts")
check(
    "groups within nodes", refused(hellos("aabb", [[0, 1], [2, 3]])), "nothing to gain: every rank's node holds the same experts"
)
check(
    "overlap",
    refused(hellos("abbaac", [[0, 1, 2], [3, 4, 5]], experts=6)),
    "nodes hold different sets of experts that overlap: an expert has no one place",
)
check(
    "shared across nodes",
    refused(hellos("abab", [[0, 1, 2, 3]], share=2)),
    "samples of data-parallel rank 0 are shared by ranks on nodes that hold different experts",
)
h = hellos("aabb", [[0, 1, 2, 3]])
check("missing", refused({r: h[r] for r in (0, 3)}, 4), "ranks 1, 2 said no hello (no adapter there, or nothing it knows)")
check("version", refused({**h, 2: {**h[2], "version": 2}}), "rank 2 runs another version of Railyard's adapter than rank 0")
check("settings", refused({**h, 3: {**h[3], "settings": "x"}})[:30], "rank 3 has other settings (RAI")
check("experts", refused({**h, 3: {**h[3], "n_experts": 9}}), "rank 3 has another number of experts than rank 0")
check("twice", refused({**h, 3: {**h[3], "dp": 2}}), "ranks 2 and 3 say they are the same data-parallel rank 2")
check("nobody", refused({**h, 3: {**h[3], "experts": [6]}}), "expert 7 is held by nobody")
check("one rank", refused(hellos("a", [[0]])), "there is one data-parallel rank only: nobody to give a sample to")
os.environ["NCCL_HOSTID"] = "virtual"
check("node of NCCL", job.node_name(), "virtual")
del os.environ["NCCL_HOSTID"]
check("node", job.node_name().endswith("/" + os.uname().nodename), True)

words = array("I", [5, 6, 7]).tobytes()
check("dict of lists", tokens.token_ids({"x": [1.0], "input_ids": [5, 6, 7]}), words)
check("text", tokens.token_ids({"text": [5, 6, 7, 8]}), words)
check("first that fits", tokens.token_ids(([0.5, 1.5], 3, [5, 6, 7])), words)
check("ids themselves", tokens.token_ids([5, 6, 7]), words)
check("array", tokens.token_ids(array("q", [5, 6, 7])), words)
check("negative", tokens.token_ids([5, 6, -1])[8:], b"\xff\xff\xff\xff")
for nothing in ({"image": [0.5, 0.5]}, 5, "text", [True, False]):
    try:
        check(f"{nothing!r}", tokens.token_ids(nothing), "nothing")
    except tokens.Unreadable:
        pass


# Samplers: whole lists are what the copies for all ranks yield side by side.
import samplers  # noqa: E402

for make in (
    lambda r: samplers.Sequential(103, 6, 3, r, 2),
    lambda r: samplers.Sequential(103, 6, 3, r, 2, False),
    lambda r: samplers.Sequential(104, 0, 1, r, 4),
    lambda r: samplers.Shuffled(None, 103, 12, 3, r, 2, False),
    lambda r: samplers.Shuffled(None, 103, 12, 3, r, 2, True),
    lambda r: samplers.Shuffled(None, 64, 128, 2, r, 4, False),
):
    first = make(0)
    size = dealing.recognize(first).size
    mbs = first.micro_batch_size
    for r in range(size):
        s = make(r)
        d = dealing.recognize(s)
        state = dict(s.__dict__)
        whole = list(d.lists())
        check("untouched", s.__dict__, state)
        ranks = [list(make(q)) for q in range(size)]
        want = [[x for one in parts for x in one] for parts in zip(*ranks) if all(len(one) == mbs for one in parts)]
        check(f"lists of {d.kind} as rank {r}", whole, want)
check("others", [dealing.recognize(x) for x in (range(5), [[1]], object(), None)], [None] * 4)
s = samplers.Sequential(100, 0, 2, 0, 2)
s.global_batch_size = 8
check("hybrid", dealing.recognize(s), None)
huge = dealing.recognize(samplers.Shuffled(None, 1 << 28, 0, 1, 0, 2, False))
try:
    next(huge.lists())
    check("too large", "made", "refused")
except dealing.TooLarge:
    pass
# Experts that were moved: slots have places, the library is told by the checkpoint's numbers.
from railyard import planner  # noqa: E402

check("experts where they were", planner.numbered([0, 0, 1, 1], None, 2), [[0, 0, 1, 1]] * 2)
check("moved experts", planner.numbered([0, 0, 1, 1], [[2, 0, 1, 3], [3, 2, 1, 0]], 2), [[0, 1, 0, 1], [1, 1, 0, 0]])
sys.exit(1 if bad else 0)
