"""Who decides where the samples of an expert-parallel group go next.

Owns: asking the library (live/layers.h), and what stands in for it in tests. Not: how ranks come to do the same (layers.py).
"""

from typing import Any, List, Optional, Tuple

IDLE = 4  # micro-batches one after the other that moved nobody, after which it is taken that the next would not


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
