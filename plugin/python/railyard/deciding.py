"""Samples moved between layers: whether at all, and who decides where they go next.

Owns: the agreement to begin; asking the library (live/layers.h), and what stands in for it in tests. Not: how ranks come to do
the same in each layer (layers.py).
"""

import json
import time
from typing import Any, Dict, List, Optional, Tuple

from . import say
from .moving import Doubt

IDLE = 4  # micro-batches one after the other that moved nobody, after which it is taken that the next would not


def judge(offers: Dict[int, Optional[dict]], world: int) -> dict:
    """What all ranks do, from what they offered: {"go": bool, "why": text, "nodes": [of each rank], "outside": why samples move
    at the block's boundary and not inside combine, or "", "apart": why the residual does not ride along, or ""}. Pure."""
    no = [r for r in range(world) if (offers.get(r) or {}).get("no")]
    missing = [r for r in range(world) if offers.get(r) is None]
    if no:
        return {"go": False, "why": f"rank {no[0]}: {offers[no[0]]['no']}"}
    if missing:
        return {
            "go": False,
            "why": f"rank {missing[0]} did not come to its first training step in time, or runs without the adapter",
        }
    for key, what in (
        ("version", "another version of Railyard's adapter"),
        ("shape", "micro-batches of another shape"),
        ("model", "another model"),
    ):
        other = [r for r in range(world) if offers[r][key] != offers[0][key]]
        if other:
            return {"go": False, "why": f"rank {other[0]} has {what} than rank 0 ({offers[other[0]][key]}, {offers[0][key]})"}
    found = {}
    for which in ("outside", "apart"):
        where = [r for r in range(world) if offers[r][which]]
        found[which] = f"rank {where[0]}: {offers[where[0]][which]}" if where else ""
    nodes = [offers[r]["node"] for r in range(world)]
    for r in range(world):
        group = offers[r]["group"]
        if r not in group or any(m not in offers or offers[m]["group"] != group for m in group):
            return {"go": False, "why": f"rank {r}'s expert-parallel group is not the same for all its members"}
        if len({nodes[m] for m in group}) < 2:
            return {"go": False, "why": f"nothing to gain: the experts of rank {r}'s samples are all on one node"}
    return {"go": True, "why": "", "nodes": nodes, **found}


def agree(board: Any, rank: int, world: int, offer: dict, patience: float) -> dict:
    """Says what this rank offers and learns what all do. Never waits longer than 1.25 times `patience`, plus what the board
    itself takes."""
    try:
        board.put(f"layers/{rank}", json.dumps(offer).encode())
    except Exception as e:  # nobody has heard a yes from this rank
        return {"go": False, "why": f"the other ranks cannot be told: {say.failure(e)}"}
    verdict = {"go": False, "why": f"rank {rank} waited {1.25 * patience:.0f} seconds for rank 0 in vain"}
    if rank == 0:
        ends, offers = time.monotonic() + patience, {}
        try:
            for other in range(world):
                text = board.wait(f"layers/{other}", max(0.0, ends - time.monotonic()))
                offers[other] = json.loads(text) if text is not None else None
                if text is None or offers[other]["no"]:
                    ends = 0.0  # it is decided
            verdict = judge(offers, world)
        except Exception as e:
            verdict = {"go": False, "why": f"rank 0 could not read all offers: {say.failure(e)}"}
    elif offer["no"]:
        return {"go": False, "why": offer["no"]}  # nobody goes without this rank's yes
    try:
        told = board.wait("layers", 1.25 * patience) if rank else None
        return json.loads(told if told is not None else board.claim("layers", json.dumps(verdict).encode()))
    except Exception as e:
        raise Doubt(
            f"railyard: rank {rank}: RAILYARD_PLACEMENT=layer: this rank agreed to move samples and cannot learn whether the "
            f"others do ({say.failure(e)}); start the job again"
        ) from e


# ---- where samples go


class Planner:
    """The library's decisions (C)."""

    def __init__(self, **job: Any) -> None:
        from . import library

        self._layers = library.Layers(**job)
        self._idle, self._moved = 0, True
        self.inside = False  # combine, what was decided last; else behind it

    def next(
        self, number: int, layer: int, sample: List[int], counts: Any, distinct: Any
    ) -> Tuple[Optional[List[int]], bool, str]:
        """(what each slot shall have in the next layer, or None: all stay; whether asking on is of use; why)"""
        order, plan = self._layers.next(layer, sample, counts, distinct)
        if layer == 0:
            self._idle, self._moved = 0 if self._moved else self._idle + 1, False
        self._moved |= plan.moved > 0
        self.inside = plan.inside
        use = self._layers.state().sure and (plan.moved > 0 or self._idle < IDLE)
        return (order if plan.moved else None), use, plan.why

    def words(self) -> str:
        s = self._layers.state()
        return (
            f"of what samples send {100 * s.crossed:.1f} % leaves its node, and {100 * s.carried:.1f} % as much their moves; "
            f"{100 * s.home:.1f} % would if they stayed at home ({s.why})"
        )


class Forced:
    """Any permutation at each layer: for tests."""

    inside = True

    def __init__(self, seed: int, stay: float = 0.2) -> None:
        import random

        self._pick, self._stay = random.Random(seed), stay

    def next(
        self, number: int, layer: int, sample: List[int], counts: Any, distinct: Any
    ) -> Tuple[Optional[List[int]], bool, str]:
        if self._pick.random() < self._stay:
            return None, True, "forced to stay"
        order = list(sample)
        self._pick.shuffle(order)
        return order, True, "forced to move"

    def words(self) -> str:
        return "forced"
