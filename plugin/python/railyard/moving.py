"""Hidden states exchanged between ranks, forth and back.

Owns: routes (what a rank gives, takes and keeps), the autograd function. Not: who goes where, and how ranks come to agree on it
(layers.py).
"""

from typing import Any, List, NamedTuple, Sequence, Tuple


class Doubt(RuntimeError):
    """The job must not go on: samples may be elsewhere than the other ranks take them to be."""


class Route(NamedTuple):
    """One rank's part of a move. Columns are those of its micro-batch. give: columns that leave, by the rank that they go to,
    gives[rank] each; take, takes: those that come; keep: (column now, column then)."""

    give: List[int]
    gives: List[int]
    take: List[int]
    takes: List[int]
    keep: List[Tuple[int, int]]

    def back(self) -> "Route":
        return Route(self.take, self.takes, self.give, self.gives, [(then, now) for now, then in self.keep])


def route(now: Sequence[int], then: Sequence[int], rank: int, b: int) -> Route:
    """From sample[slot] = now[slot] to then[slot], for rank `rank` of b columns. Between two ranks samples go in the order of
    the slots that they come to, which both know."""
    at = {sample: slot for slot, sample in enumerate(now)}
    ranks = len(now) // b
    give: List[List[int]] = [[] for _ in range(ranks)]
    take: List[List[int]] = [[] for _ in range(ranks)]
    keep = []
    for slot, sample in enumerate(then):
        source, to = at[sample], slot // b
        if source // b == rank and to == rank:
            keep.append((source % b, slot % b))
        elif source // b == rank:
            give[to].append(source % b)
        elif to == rank:
            take[source // b].append(slot % b)
    return Route(sum(give, []), [len(g) for g in give], sum(take, []), [len(t) for t in take], keep)


def lawful(order: Sequence[int], slots: int) -> bool:
    return len(order) == slots and sorted(order) == list(range(slots))


def _function() -> Any:
    """The autograd functions, made when torch is there."""
    global _moving
    if _moving is None:
        import torch

        class Moving(torch.autograd.Function):
            """Columns of [s, b, …] exchanged between ranks; gradients go back the same way."""

            @staticmethod
            def forward(ctx, hidden, way, mover):
                ctx.way, ctx.mover = way, mover
                return exchange(hidden, way, mover)

            @staticmethod
            def backward(ctx, gradient):
                return exchange(gradient, ctx.way.back(), ctx.mover), None, None

        class Moved(torch.autograd.Function):
            """The same, where the exchange was made already."""

            @staticmethod
            def forward(ctx, hidden, there, way, mover):
                ctx.way, ctx.mover = way, mover
                return there

            @staticmethod
            def backward(ctx, gradient):
                return exchange(gradient, ctx.way.back(), ctx.mover), None, None, None

        _moving = (Moving, Moved)
    return _moving


_moving: Any = None


def move(hidden: Any, way: Route, mover: Any) -> Any:
    return _function()[0].apply(hidden, way, mover)


def moved(hidden: Any, there: Any, way: Route, mover: Any) -> Any:
    """`there` is what exchange() has made of `hidden`, unseen by autograd."""
    return _function()[1].apply(hidden, there, way, mover)


def exchange(x: Any, way: Route, mover: Any) -> Any:
    """Every rank of the group takes part, those with nothing to send too."""
    import torch
    import torch.distributed as dist

    if x.shape[1] != len(way.take) + len(way.keep) or x.shape[1] != mover.b:
        raise Doubt(
            f"railyard: rank {mover.job.rank}: RAILYARD_PLACEMENT=layer: hidden states {tuple(x.shape)} for {mover.b} samples"
        )
    one = (x.shape[0],) + tuple(x.shape[2:])
    send, receive = x.new_empty((len(way.give),) + one), x.new_empty((len(way.take),) + one)
    for i, column in enumerate(way.give):
        send[i].copy_(x[:, column])
    dist.all_to_all_single(receive, send, way.takes, way.gives, group=mover.group)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for now, then in way.keep:
        out[:, then].copy_(x[:, now])
    for i, column in enumerate(way.take):
        out[:, column].copy_(receive[i])
    return out
