"""Samples moved between layers with experts (NetMoE): how ranks come to do the same, and the moves.

Owns: what ranks tell in each layer, the leader's answers. Not: the agreement to begin (deciding.py), moving itself (moving.py,
combining.py), where samples should be (live/layers.h, C), where in a framework a layer begins (megatron_layers.py).

docs/live-placement.md, "Samples moved between layers", has the argument why nobody waits for ever and nobody does otherwise
than the others. In short: a rank acts on nothing but what its group's leader broadcast; whether there is a broadcast follows
from numbers that all ranks have alike; every collective here is on the job's own expert-parallel group, between two of the
job's own on it, in the order of the program.

Words: group: the expert-parallel ranks, which exchange samples. Leader: its first rank. Slot: a position in the group's
micro-batch, numbered rank by rank; `sample[slot]`: the home slot of the sample that is there now.
"""

import atexit
import os
import queue
import threading
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from . import VERSION, say
from .deciding import IDLE, Forced, Planner, agree, judge  # noqa: F401
from .moving import Doubt, Route, exchange, lawful, move, moved, route

FIRST = 2  # micro-batches in which nobody moves: their backward passes show whether layers run in ways that are not known
QUIET = 8  # micro-batches without answers, where the leader would not move anybody anyway
LATE = 0.005  # seconds that the leader waits for the solver once it can begin; then nobody moves
PATIENCES = 4  # as experts.py has it
TELL = 200  # micro-batches between two lines of what came of it

FAILED, UNFIT, UNREADY, HERE = 1, 2, 4, 8  # what a rank says of itself with its counts; HERE: its combine can be redirected
STAY, MOVE, END, INSIDE = 0, 1, 2, 3  # what the leader answers; MOVE: at the block's boundary, INSIDE: in the combine
HEAD = 4  # words: micro-batch, layer, what the rank says, whether its attention mask is the one known


# ---- a micro-batch


class Micro:
    """A training forward pass, and what its backward pass must know of it."""

    __slots__ = ("number", "sample", "routes", "ways", "held", "residual", "rides", "rode") + (
        ("deciding", "counts", "layer", "flags", "mask", "over")
    )

    def __init__(self, number: int, slots: int, flags: int, mask: Any, deciding: bool) -> None:
        self.number, self.flags, self.mask, self.deciding = number, flags, mask, deciding
        self.sample = list(range(slots))
        self.routes: Dict[int, Route] = {}  # by the layer before whose experts samples move
        self.ways: Dict[int, Any] = {}  # by the layer in whose combine samples move
        self.held: Dict[int, Any] = {}  # of a layer that is under way, its residual, and what combine has made of it:
        self.residual: Dict[int, Any] = {}
        self.rides = False  # the residual, along with each token's first row (combining.Ride)
        self.rode: Dict[int, Any] = {}  # by layer
        self.counts: Any = None  # of the layer that is under way
        self.layer = -1
        self.over = False  # the forward pass is: what runs now is recomputed


class Mover:
    """This rank's part. Called from the thread that runs forward passes, but for _work().

    group: the process group; ranks: its global ranks; b, s: samples of a rank's micro-batch, tokens of a sample; layers,
    experts: of the model; expert_place, places: by which node holds what, as routers number experts; planner: who decides, on
    the leader.
    """

    def __init__(
        self,
        job: Any,
        group: Any,
        ranks: Sequence[int],
        b: int,
        s: int,
        layers: int,
        experts: int,
        expert_place: Sequence[int],
        places: int,
        planner: Any,
        late: float = LATE,
        combine: Any = None,
        ride: Any = None,
    ) -> None:
        self.job, self.group, self.ranks, self.late = job, group, list(ranks), late
        self.rank = self.ranks.index(job.rank)
        self.b, self.s, self.layers, self.experts = b, s, layers, experts
        self.expert_place, self.places, self.planner = list(expert_place), places, planner
        self.combine = combine  # combining.Combine; None: samples move at the block's boundary
        self.ride = ride  # combining.Ride; None: the residual moves by itself
        self.slots = b * len(self.ranks)
        self.answer_size = 4 + self.slots + (len(self.ranks) ** 2 if combine else 0)
        self.size = HEAD + b * (experts + places)
        self.number = 0  # of micro-batches so far
        self.quiet = FIRST  # no answers before this one
        self.over: Optional[str] = None  # why nobody moves any more
        self.why: Optional[str] = None  # this rank cannot go on: to be told with the next counts
        self.moved = False  # anybody, ever
        self.returned = False  # a backward pass has begun
        self.proven = False  # and ended, and no layer was run in a way that is not known
        self._mask: Any = None  # [experts][places] on the device
        self._side: Any = None
        self._jobs: "queue.SimpleQueue" = queue.SimpleQueue()
        self._answers: Dict[Tuple[int, int], Tuple[int, List[int], int, str]] = {}
        self._there = threading.Condition()
        self._left_out: Optional[int] = None  # a micro-batch in which nobody moves
        self._end = ""  # what the solver's thread has found out
        self._any = False
        self._pending: Tuple[int, int, Any] = (-1, -1, None)  # the last counts that were gathered
        self.counted = {"micro-batches": 0, "moves": 0, "inside": 0, "late": 0}
        if self.rank == 0:
            threading.Thread(target=self._work, name="railyard-layers", daemon=True).start()
            atexit.register(self.last_words)

    # ---- what wrappers call

    def begin(self, unfit: str = "", mask: Any = None) -> Optional[Micro]:
        """A training forward pass begins; unfit: why nobody must move in it; mask: a tensor of one element, not 0 where this
        rank's attention mask is the one known, or None."""
        if self.over is not None:
            return None
        self.proven = self.proven or self.returned
        flags = (UNFIT if unfit else 0) | (0 if self.proven else UNREADY)
        if unfit:
            say.warn_once("layers-unfit", f"samples stay in micro-batches like this one: {unfit}")
        micro = Micro(self.number, self.slots, flags, mask, self.number >= self.quiet)
        micro.rides = self.ride is not None and micro.deciding
        self.number += 1
        return micro

    def fail(self, why: str) -> None:
        """This rank cannot go on: the job's placement is off, and the leader learns it with the next counts."""
        if self.why is None:
            self.why = why
            self.job.stop(why)

    def routed(self, micro: Micro, layer: int, routing: Any) -> None:
        """routing: [tokens, experts], not 0 where a token goes; tokens lie at position · b + column."""
        micro.counts, micro.layer = None, layer
        if self.over is not None or self.why is not None or micro.flags & UNFIT:
            return
        try:
            import torch

            with torch.no_grad():
                chosen = routing.detach() if routing.dtype == torch.bool else routing.detach().ne(0)
                if tuple(chosen.shape) != (self.b * self.s, self.experts):
                    raise ValueError(f"routing of shape {tuple(chosen.shape)} for {self.b} samples of {self.s} tokens")
                if self._mask is None or self._mask.device != chosen.device:
                    self._mask = self._places(chosen.device)
                there = chosen.to(self._mask.dtype).matmul(self._mask).gt(0).view(self.s, self.b, self.places).sum(0)
                counts = chosen.view(self.s, self.b, self.experts).sum(0)
                micro.counts = torch.cat([counts.reshape(-1), there.reshape(-1)]).to(torch.int32)
        except Exception as e:
            self.fail(f"counting routing failed: {say.failure(e)}")

    def dispatching(self) -> None:
        if self.combine is not None:
            self.combine.begin()

    def dispatched(self, micro: Micro, layer: int, like: Any, splits: Callable[[], Any] = lambda: None) -> None:
        """Tokens of the layer are on their way to the experts: counts go to the leader behind them. like: a tensor there;
        splits(): rows that combine will send, and receive, by rank."""
        if self.over is not None:
            return
        here = 0
        try:
            asked = self.combine is not None and micro.deciding and (layer + 1 < self.layers or micro.rides)
            if asked and self.combine.ready(*splits(), like):
                here = HERE
        except Exception as e:
            self.fail(f"a combine cannot be looked at: {say.failure(e)}")
        try:
            self._gather(micro, layer, like, here)
        except Exception as e:
            raise Doubt(
                f"railyard: rank {self.job.rank}: RAILYARD_PLACEMENT=layer: counts cannot be gathered: {say.failure(e)}"
            ) from e

    def carried(self, micro: Micro, layer: int, states: Any) -> Any:
        """What dispatch carries instead of `states`, the hidden states' norms: themselves, where the residual rides along."""
        return micro.held[layer].contiguous() if micro.rides and layer in micro.held else states  # as norms are

    def boarded(self, micro: Micro, layer: int, rows: Any, norm: Any, told: Callable[[], Any]) -> Any:
        """rows: what dispatch has brought. What experts get of it; told(): as combined() has it."""
        if not micro.rides or layer not in micro.held:
            return rows
        if layer not in micro.rode:  # else it is recomputed
            with self._stream(rows, behind=True):  # while experts compute
                micro.rode[layer] = self.ride.told(*told())
        micro.residual[layer] = rows
        return norm(rows) if rows.shape[0] else rows  # not every norm's kernel takes none

    def arrive(self, micro: Micro, layer: int, hidden: Any) -> Any:
        """Hidden states [s, b, …] as the layer's experts are to have them."""
        if self.combine is None and not micro.over and micro.deciding and self.over is None and layer > 0:
            self._ask(micro, layer, hidden)
        way = micro.routes.get(layer)
        hidden = hidden if way is None else move(hidden, way, self)
        if self.combine is not None:
            micro.held[layer] = hidden
        return hidden

    def combined(self, micro: Micro, layer: int, rows: Any, original: Callable[[Any], Any], told: Callable[[], Any]) -> Any:
        """original(rows) is the layer's combine. told(): rows that it sends, and receives, by rank; the token that each row is of
        which this rank receives."""
        if self.combine is None:
            return original(rows)
        hidden = micro.held.pop(layer, None)  # None: recomputed without what is around it
        if not micro.over:
            self.combine.saw(rows)
            away = micro.rides and micro.sample != list(range(self.slots))
            if micro.deciding and self.over is None and (layer + 1 < self.layers or away):
                self._ask(micro, layer + 1, rows, told)
        way = micro.ways.get(layer)
        if layer in micro.rode:
            self._join(micro.rode[layer])
            rows = self.ride.along(rows, micro.residual.pop(layer), micro.rode[layer])
        if way is None:
            return original(rows)
        if hidden is not None and layer not in micro.rode:
            import torch

            # On its way while experts compute: the side stream has waited for the dispatch, which is behind `hidden`, but for
            # what is recomputed.
            with self._stream(hidden, behind=micro.over):
                traced = torch.is_grad_enabled()
                there = (move if traced else exchange)(hidden, way.route, self)
                if hidden.is_cuda:
                    hidden.record_stream(self._side)
            micro.residual[layer] = (there, traced)
        return self.combine.carry(way, rows, original)

    def left(self, micro: Micro, layer: int, residual: Any) -> Any:
        """The residual, as it is to be added to what combine has brought."""
        if layer in micro.rode:
            return residual.new_zeros(()).expand_as(residual)
        there, traced = micro.residual.pop(layer, (None, False))
        if there is None:
            return residual
        import torch

        self._join(there)
        return there if traced or not torch.is_grad_enabled() else moved(residual, there, micro.ways[layer].route, self)

    def home(self, micro: Micro, hidden: Any) -> Any:
        """As the micro-batch began."""
        there = list(range(self.slots))
        if micro.sample != there:
            hidden = move(hidden, route(micro.sample, there, self.rank, self.b), self)
            micro.sample = there
        if not self.returned and getattr(hidden, "requires_grad", False):
            hidden.register_hook(self._backward)
        return hidden

    def _backward(self, _: Any) -> None:
        self.returned = True

    def foreign(self, layer: int) -> None:
        """A layer was run outside of a forward pass that we know, nor is it recomputed by what we know."""
        why = (
            f"layer {layer} with experts is run, or recomputed, by something else than GPTModel.forward and Megatron's checkpoint"
        )
        if self.moved and self.over is None:
            raise Doubt(f"railyard: rank {self.job.rank}: RAILYARD_PLACEMENT=layer: {why}: its samples cannot be told")
        if self.over is None:
            self.fail(why)

    def end(self, micro: Micro) -> None:
        micro.over, micro.counts, micro.mask = True, None, None
        micro.held.clear()
        if self.rank == 0 and self.over is None:
            self.counted["micro-batches"] += 1
            if self.counted["micro-batches"] % TELL == 0 and self.planner is not None:
                self.tell()

    def last_words(self) -> None:
        if self.counted["micro-batches"] % TELL and self.planner is not None and self.job.pid == os.getpid():
            self.tell()

    def tell(self) -> None:
        c = self.counted
        say.info(
            f"layer placement: in {c['micro-batches']} micro-batches {c['moves']} moves"
            + (f" ({c['inside']} inside combine)" if self.combine is not None else "")
            + f", {c['late']} decisions too late; {self.planner.words()}"
        )

    # ---- between ranks

    def _places(self, device: Any) -> Any:
        import torch

        rows = [[float(p == place) for p in range(self.places)] for place in self.expert_place]
        host = torch.tensor(rows, dtype=torch.float32)
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True).to(torch.bfloat16)

    def _stream(self, like: Any, behind: bool = False) -> Any:
        """The side stream; behind: what the job's own has been given so far comes first."""
        import contextlib

        import torch

        if not like.is_cuda:
            return contextlib.nullcontext()
        if self._side is None:
            self._side = torch.cuda.Stream(like.device)
        if behind:
            self._side.wait_stream(torch.cuda.current_stream(like.device))
        return torch.cuda.stream(self._side)

    def _join(self, made: Any) -> None:
        """The job's own stream may use what the side stream has made."""
        import torch

        if made.is_cuda:
            now = torch.cuda.current_stream(made.device)
            now.wait_stream(self._side)
            made.record_stream(now)

    def _gather(self, micro: Micro, layer: int, like: Any, here: int) -> None:
        import torch
        import torch.distributed as dist

        flags, body = micro.flags | here, micro.counts if micro.layer == layer else None
        if self.why is not None or (body is None and not flags & UNFIT):
            flags |= FAILED
        head = torch.tensor([micro.number, layer, flags, 1], dtype=torch.int32)
        head = head.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else head
        with torch.no_grad():
            if micro.mask is not None:
                head = torch.cat([head[:3], micro.mask.view(1).to(torch.int32)])
            if body is None:
                body = torch.zeros(self.size - HEAD, dtype=torch.int32, device=like.device)
            mine = torch.cat([head, body])
        micro.counts = None
        if like.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        with self._stream(like):
            if like.is_cuda:
                self._side.wait_event(ready)
                mine.record_stream(self._side)
            every = torch.empty(len(self.ranks) * self.size, dtype=torch.int32, device=like.device)
            work = dist.all_gather_into_tensor(every, mine, group=self.group, async_op=like.is_cuda)
            if like.is_cuda:
                work.wait()  # the side stream does, not the host
            if self.rank == 0:
                host, event = every, None
                if like.is_cuda:
                    host = torch.empty(every.shape, dtype=torch.int32, pin_memory=True)
                    host.copy_(every, non_blocking=True)
                    event = torch.cuda.Event()
                    event.record(self._side)
                self._jobs.put((micro.number, layer, list(micro.sample), host, event and (event, like.device)))
                self._pending = (micro.number, layer, event)

    def _ask(self, micro: Micro, layer: int, like: Any, told: Optional[Callable[[], Any]] = None) -> None:
        try:
            self._obey(micro, layer, like, told)
        except Exception as e:
            raise Doubt(
                f"railyard: rank {self.job.rank}: RAILYARD_PLACEMENT=layer: the leader's answer is lost: {say.failure(e)}"
            ) from e

    def _obey(self, micro: Micro, layer: int, like: Any, told: Optional[Callable[[], Any]]) -> None:
        """Gets the answer to the counts of the layer before, and notes what it means for this micro-batch."""
        import torch
        import torch.distributed as dist

        words = self._answer(micro, layer - 1) if self.rank == 0 else [0] * self.answer_size
        host = torch.tensor(words, dtype=torch.int32)
        if not like.is_cuda:
            dist.broadcast(host, self.ranks[0], group=self.group)
        else:
            # From the side stream: what the host has queued on the job's own, attention, runs meanwhile.
            with self._stream(like):
                device = host.pin_memory().to(like.device, non_blocking=True)
                dist.broadcast(device, self.ranks[0], group=self.group, async_op=True).wait()
                host = torch.empty(device.shape, dtype=torch.int32, pin_memory=True)
                host.copy_(device, non_blocking=True)
                event = torch.cuda.Event()
                event.record(self._side)
            event.synchronize()
        number, at, kind, quiet, *then = host.tolist()
        then, rows = then[: self.slots], then[self.slots :]
        if (number, at) != (micro.number, layer - 1) or (kind in (MOVE, INSIDE) and not lawful(then, self.slots)):
            raise ValueError(f"an answer to layer {at} of micro-batch {number} in layer {layer} of micro-batch {micro.number}")
        if quiet:
            self.quiet, micro.deciding = micro.number + 1 + quiet, False
        if kind == END:
            self.over = "the leader has ended it"
        elif kind in (MOVE, INSIDE):
            way = route(micro.sample, then, self.rank, self.b)
            if kind == MOVE:
                micro.routes[layer] = way
            else:
                n, at_slot = len(self.ranks), {sample: slot for slot, sample in enumerate(then)}
                sends, receives, tokens = told()
                with self._stream(like):
                    micro.ways[layer - 1] = self.combine.way(
                        sends,
                        receives,
                        tokens,
                        micro.rode.get(layer - 1),
                        [at_slot[sample] for sample in micro.sample],
                        [rows[e * n : (e + 1) * n] for e in range(n)],
                        way,
                    )
                    if like.is_cuda:
                        event = torch.cuda.Event()
                        event.record(self._side)
                if like.is_cuda:
                    torch.cuda.current_stream(like.device).wait_event(event)
            micro.sample = then
            self.moved = True
            if self.rank == 0:
                self.counted["moves"] += 1
                self.counted["inside"] += kind == INSIDE
                if not self._any:
                    self._any = True
                    say.info(f"from here on samples move between layers: {self.planner.words()}")

    # ---- the leader

    def _answer(self, micro: Micro, layer: int) -> List[int]:
        """Whatever happens here, there is an answer."""
        kind, then, quiet = STAY, [], 0
        try:
            number, told, event = self._pending
            if (number, told) == (micro.number, layer):
                if event is not None:
                    event.synchronize()  # counts have come; experts are at work
                with self._there:
                    self._there.wait_for(lambda: (number, layer) in self._answers or self._end, self.late)
                    got = self._answers.pop((number, layer), None)
                if self._end:
                    kind = END
                elif got is None:
                    self.counted["late"] += 1
                else:
                    kind, then, quiet, _ = got
        except Exception as e:
            self.fail(f"answering failed: {say.failure(e)}")
            kind, then, quiet = END, [], 0
        if kind == END and self._end:
            self.fail(self._end)
        words = [micro.number, layer, kind, quiet] + then
        return words + [0] * (self.answer_size - len(words))

    def _work(self) -> None:
        """The solver's thread."""
        mine = None
        while True:
            number, layer, sample, host, waited = self._jobs.get()
            try:
                last = self.ride is not None and layer + 1 == self.layers  # home, without asking: learning comes first there
                if waited is not None:
                    event, device = waited
                    if device != mine:  # or this thread would wait by way of device 0, and take memory there
                        import torch

                        torch.cuda.set_device(device)
                        mine = device
                    event.synchronize()
                if last:
                    self._post(number, layer, self._homeward(number, sample, host))
                answer = self._decide(number, layer, sample, host)
            except Exception as e:
                with self._there:
                    self._end = self._end or f"deciding failed: {say.failure(e)}"
                    self._there.notify_all()
                continue
            if not last:
                self._post(number, layer, answer)

    def _post(self, number: int, layer: int, answer: Tuple[int, List[int], int, str]) -> None:
        with self._there:
            self._answers[(number, layer)] = answer
            for old in [k for k in self._answers if k[0] < number - 1]:
                del self._answers[old]
            self._there.notify_all()

    def _homeward(self, number: int, sample: List[int], host: Any) -> Tuple[int, List[int], int, str]:
        """Behind the last layer, inside its combine, where the residual rides along."""
        rows = host.numpy().reshape(len(self.ranks), self.size)
        home = list(range(self.slots))
        if sample == home or self._left_out == number or any(not row[2] & HERE or row[2] & FAILED for row in rows):
            return STAY, [], 0, "home behind the block"
        return INSIDE, home + self._matrix(rows, sample, home), 0, "home"

    def _matrix(self, rows: Any, sample: List[int], then: List[int]) -> List[int]:
        from . import combining

        counts = rows[:, HEAD : HEAD + self.b * self.experts].reshape(self.slots, self.experts)
        return sum(combining.matrix(counts, sample, then, len(self.ranks), self.b), [])

    def _decide(self, number: int, layer: int, sample: List[int], host: Any) -> Tuple[int, List[int], int, str]:
        import numpy as np

        rows = host.numpy().reshape(len(self.ranks), self.size)
        for r, row in enumerate(rows):
            if row[0] != number or row[1] != layer:
                raise ValueError(f"rank {self.ranks[r]} tells of layer {row[1]} of micro-batch {row[0]}, not {layer} of {number}")
            if row[2] & FAILED:
                raise ValueError(f"rank {self.ranks[r]} cannot go on")
        if layer == 0 and self.job.stopped() is not None:
            raise ValueError(self.job.stopped())
        if layer == 0:
            bad = [r for r, row in enumerate(rows) if row[2] & UNFIT or not row[3]]
            self._left_out = number if bad else None
            if bad and not rows[bad[0]][2] & UNFIT:
                say.warn_once(
                    "layers-mask",
                    f"samples stay in micro-batches like this one: rank {self.ranks[bad[0]]} has an attention mask "
                    "that is not causal for all its samples",
                )
        if self._left_out == number:
            return STAY, [], QUIET if layer == 0 else 0, "unfit"
        split = HEAD + self.b * self.experts
        counts, distinct = (np.ascontiguousarray(part, dtype=np.uint32) for part in (rows[:, HEAD:split], rows[:, split:]))
        order, ask, why = self.planner.next(number, layer, sample, counts, distinct)
        if any(row[2] & UNREADY for row in rows):
            return STAY, [], 0, "no backward pass yet"
        say.debug(f"micro-batch {number}, layer {layer}: {why}")
        quiet = 0 if ask or layer else QUIET
        if order is None:
            return STAY, [], quiet, why
        if self.combine is None or not self.planner.inside:
            return MOVE, order, quiet, why
        absent = [r for r, row in enumerate(rows) if not row[2] & HERE]
        if absent:
            if layer + 1 < self.layers and number >= self.quiet:
                say.warn_once(
                    "layers-outside",
                    f"a combine cannot be redirected on rank {self.ranks[absent[0]]} (RAILYARD_LOG=plan says why there): samples "
                    + ("stay" if self.ride else "move at the block's boundary instead"),
                )
            return (STAY, [], quiet, "not everywhere") if self.ride else (MOVE, order, quiet, why)
        return INSIDE, order + self._matrix(rows, sample, order), quiet, why


# ---- this process


def start(
    job: Any, offer: dict, group: Any, distinct: bool, make_planner: Optional[Callable[..., Any]] = None
) -> Optional[Mover]:
    """Agrees with all ranks; the Mover, or None where samples stay. offer: no, shape [s, b, hidden, dtype], model [layers,
    experts, topk], group."""
    offer = {"version": VERSION, "node": job.node, "outside": "not asked", "apart": "not asked", **offer}
    decision = agree(job.board, job.rank, job.world, offer, PATIENCES * job.patience())
    if not decision["go"]:
        (say.warn if job.rank == 0 else say.info)(f"samples stay where they are: {decision['why']}")
        return None
    ranks, (layers, experts, topk), (s, b) = offer["group"], offer["model"], offer["shape"][:2]
    names: List[str] = []
    for r in ranks:
        if decision["nodes"][r] not in names:
            names.append(decision["nodes"][r])
    rank_place = [names.index(decision["nodes"][r]) for r in ranks]
    held = experts // len(ranks)
    expert_place = [rank_place[e // held] for e in range(experts)]
    planner, trouble, combine, ride, outside = None, "", None, None, decision.get("outside", "not agreed on")
    if not outside:
        from . import combining

        combine = combining.Combine(group, ranks.index(job.rank), len(ranks), b)
        ride = combining.Ride(combine, topk) if not decision["apart"] else None
    if ranks[0] == job.rank:
        try:
            planner = (make_planner or Planner)(
                ranks=len(ranks),
                samples=b,
                tokens=s,
                layers=layers,
                experts=experts,
                topk=topk,
                places=len(names),
                distinct=int(distinct),
                combine=2 if ride else int(combine is not None),
                rank_place=rank_place,
                expert_place=expert_place,
            )
        except Exception as e:  # the others count on this rank by now: its answers will be "end"
            trouble = f"nobody to decide: {say.failure(e)}"
    if job.rank == 0:
        how = f"at the block's boundary ({outside})" if outside else "inside combine, the residual with it"
        if not outside and ride is None:
            how = f"inside combine, the residual by itself ({decision['apart']})"
        say.info(
            f"samples may move between layers: groups of {len(ranks)} ranks on {len(names)} nodes, {b} samples of {s} tokens each, "
            + how
        )
    mover = Mover(job, group, ranks, b, s, layers, experts, expert_place, len(names), planner, combine=combine, ride=ride)
    if trouble:
        mover.fail(trouble)
    return mover
