"""Samples that change ranks inside an intercepted combine: which row goes where, and telling the library.

Owns: the redirected exchange of an expert-parallel group (railyard.h, railyard_redirect()) as PyTorch meets it: its lists, made
on the device from the tokens that rows are of; the same way back in backward; the residual riding along. Not: who goes where
(layers.py), where a framework combines (megatron_layers.py), hidden states that move by themselves (moving.py).

docs/live-placement.md, "Inside the combine". A sample that has come has as many rows for its token t as the one whose place it
takes had: that one's unpermute, unchanged, adds up what stands at the positions of t. Rows are told apart by their tokens alone:
in dispatch's own order each rank tells the experts' ranks which token each row is of; these sort what they hold by the rank where
it is to go, and tell that rank in turn. There the r-th row that comes of a token goes to the r-th position that the token has.
All of it is stable sorting, so that every run does the same.
"""

import ctypes
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

from .moving import Doubt, Route


class _How(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("nranks", ctypes.c_int32), ("row_bytes", ctypes.c_uint64)] + [
        (name, ctypes.c_void_p) for name in ("sends", "receives", "goes", "comes", "send_from", "recv_from")
    ]


class Library:
    """railyard.h's functions, of the librailyard.so that is preloaded."""

    def __init__(self) -> None:
        preloaded = ctypes.CDLL(None)
        pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
        self._latest = preloaded.railyard_latest_exchange  # AttributeError: it is not
        self._latest.restype = u64
        self._latest.argtypes = [ctypes.POINTER(pointer), ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int32)]
        self._ready = preloaded.railyard_redirect_ready
        self._ready.argtypes = [pointer, u64, u64, pointer]
        self._redirect = preloaded.railyard_redirect
        self._redirect.argtypes = [pointer, ctypes.POINTER(_How)]
        self._done = preloaded.railyard_redirect_done
        self._done.argtypes = [pointer]

    def latest(self) -> Any:
        """(exchanges of this thread so far, communicator of the latest or None, its ranks, this rank)"""
        comm, nranks, rank = ctypes.c_void_p(), ctypes.c_int32(), ctypes.c_int32()
        number = self._latest(ctypes.byref(comm), ctypes.byref(nranks), ctypes.byref(rank))
        return number, comm.value, nranks.value, rank.value

    def ready(self, comm: int, size: int, rows: int, stream: int) -> bool:
        return self._ready(comm, size, rows, stream) == 0

    def redirect(self, comm: int, row_bytes: int, counts: Sequence[Sequence[int]], lists: Sequence[int]) -> bool:
        """counts: sends, receives, goes, comes; lists: addresses of send_from, recv_from."""
        n = len(counts[0])
        kept = [(ctypes.c_uint64 * n)(*c) for c in counts]
        how = _How(ctypes.sizeof(_How), n, row_bytes, *(ctypes.addressof(k) for k in kept), *lists)
        return self._redirect(comm, ctypes.byref(how)) == 0

    def done(self, comm: int) -> bool:
        return self._done(comm) == 0


def matrix(counts: Any, now: Sequence[int], then: Sequence[int], ranks: int, b: int) -> List[List[int]]:
    """Rows that each expert's rank sends to each rank, samples being where `then` has them. counts: [slots][experts], of the
    samples of `now`; experts lie rank by rank. NumPy's."""
    at = {sample: slot for slot, sample in enumerate(now)}
    rows = counts.reshape(ranks * b, ranks, -1).sum(2)  # [slot][expert rank]
    moved = rows[[at[sample] for sample in then]]
    return moved.reshape(ranks, b, ranks).sum(1).T.tolist()


class Way(NamedTuple):
    """One combine, as this rank redirects it; in backward its gradient. Lists: int32, on the device."""

    sends: List[int]  # what the framework's own combine sends and receives, in rows
    receives: List[int]
    goes: List[int]  # what is sent and received instead
    comes: List[int]
    send_from: Any
    recv_from: Any
    back_from: Any
    back_to: Any
    route: Route  # of the residual


class Combine:
    """A group's combines. rank, ranks, b: as the Mover has them."""

    def __init__(self, group: Any, rank: int, ranks: int, b: int, library: Optional[Any] = None) -> None:
        self.group, self.rank, self.ranks, self.b = group, rank, ranks, b
        self.library = library or Library()
        self.comm: Optional[int] = None
        self.row_bytes = 0  # of the combines so far; 0: none was seen, -1: not of one width
        self.carried = 0
        self._number = 0

    # ---- can it be done?

    def begin(self) -> None:
        """Dispatch begins: its exchanges come."""
        self._number = self.library.latest()[0]

    def ready(self, sends: Sequence[int], receives: Sequence[int], like: Any) -> bool:
        """Dispatch is on its way: can the combine that follows be redirected? Then memory is held for it and its gradient."""
        number, comm, nranks, rank = self.library.latest()
        if number == self._number or not comm or (nranks, rank) != (self.ranks, self.rank) or self.row_bytes <= 0:
            return False
        rows = max(sum(sends), sum(receives), 1)
        if not self.library.ready(comm, rows * self.row_bytes, rows, _stream(like)):
            return False
        self.comm = comm
        return True

    def saw(self, rows: Any) -> None:
        """What a combine sends."""
        width = rows[0].numel() * rows.element_size() if rows.dim() == 2 and rows.is_contiguous() and rows.shape[0] else 0
        if rows.shape[0]:
            self.row_bytes = width if width and self.row_bytes in (0, width) else -1

    # ---- which row where

    def way(
        self,
        sends: Sequence[int],
        receives: Sequence[int],
        tokens: Any,
        mine: Any,
        to: Sequence[int],
        every: Any,
        route: Route,
    ) -> Way:
        """sends, receives: the combine's own; tokens: which token each row is of that this rank will receive, in their order;
        mine: of those that it sends, where that is known (Ride.told()), or None; to: the slot where the sample of each slot goes;
        every: matrix(). All ranks call it, on the stream where the lists shall be made."""
        import numpy as np
        import torch

        sends, receives = list(sends), list(receives)
        goes, comes = list(every[self.rank]), [row[self.rank] for row in every]
        if sum(goes) != sum(sends) or sum(comes) != sum(receives) or tokens.numel() != sum(receives):
            raise ValueError(f"rows {sends}, {receives}, of {tokens.numel()} tokens, are not those of {goes}, {comes}")
        device = tokens.device
        host = np.concatenate([np.asarray(to), np.repeat(np.arange(self.ranks) * self.b, sends)]).astype(np.int32)
        told = torch.from_numpy(host)
        if tokens.is_cuda:
            told = told.pin_memory().to(device, non_blocking=True)
        to_slot, first = told[: len(to)], told[len(to) :]
        tokens = tokens.to(torch.int32)
        mine = self.tell(tokens, receives, sends) if mine is None else mine >> 1
        slot = to_slot[(first + mine % self.b).long()]
        send_from = torch.argsort(slot // self.b, stable=True)
        there = (mine // self.b * self.b + slot % self.b)[send_from]
        came = torch.argsort(self.tell(there, goes, comes), stable=True)
        position = torch.argsort(tokens, stable=True)
        lists = [torch.empty(n, dtype=torch.int32, device=device) for n in (len(position), len(position), len(send_from))]
        recv_from, back_from, back_to = lists
        recv_from[position] = came.to(torch.int32)
        back_from[came] = position.to(torch.int32)
        back_to[send_from] = torch.arange(len(send_from), dtype=torch.int32, device=device)
        return Way(sends, receives, goes, comes, send_from.to(torch.int32), recv_from, back_from, back_to, route)

    def tell(self, words: Any, gives: Sequence[int], takes: Sequence[int]) -> Any:
        """A 32-bit word for each row to where the rows are."""
        import torch
        import torch.distributed as dist

        out = torch.empty(sum(takes), dtype=torch.int32, device=words.device)
        dist.all_to_all_single(out, words.contiguous(), list(takes), list(gives), group=self.group)
        return out

    # ---- doing it

    def carry(self, way: Way, rows: Any, original: Callable[[Any], Any]) -> Any:
        """The framework's combine, redirected; its gradient as well."""
        width = rows[:1].numel() * rows.element_size()
        if rows.dim() != 2 or rows.shape[0] != sum(way.sends) or width not in (0, self.row_bytes):
            raise Doubt(
                f"railyard: RAILYARD_PLACEMENT=layer: a combine of {tuple(rows.shape)}, {rows.dtype}, is not the one agreed on"
            )
        before, after = _functions()
        rows = after.apply(rows, way, self)
        self.ask(way, False)
        out = original(rows)
        self.check(way)
        self.carried += 1
        return before.apply(out, way, self)

    def ask(self, way: Way, back: bool) -> None:
        counts = (way.receives, way.sends, way.comes, way.goes) if back else (way.sends, way.receives, way.goes, way.comes)
        lists = (way.back_from, way.back_to) if back else (way.send_from, way.recv_from)
        for one in lists:
            if one.is_cuda:
                import torch

                one.record_stream(torch.cuda.current_stream(one.device))
        if not self.library.redirect(self.comm, self.row_bytes, counts, [one.data_ptr() for one in lists]):
            raise Doubt("railyard: RAILYARD_PLACEMENT=layer: the library does not redirect a combine that it was ready for")

    def check(self, way: Way) -> None:
        if not self.library.done(self.comm):
            raise Doubt("railyard: RAILYARD_PLACEMENT=layer: a combine was not redirected, though other ranks' were")


class Ride:
    """The residual, along with results. Dispatch carries hidden states instead of their norms; who has them norms them, and adds
    each token's hidden state to the first row of its results: unpermute's sum is what it was, with the residual in it, wherever it
    is made. K times the norms, and a word for each row behind every dispatch; sums are rounded otherwise.
    """

    def __init__(self, combine: Combine, topk: int) -> None:
        self.combine, self.topk = combine, topk

    def told(self, sends: Sequence[int], receives: Sequence[int], tokens: Any) -> Any:
        """Of each row that this rank has from others: its token, and in the lowest bit whether it is the first of it."""
        import torch

        order = torch.argsort(tokens, stable=True)  # rows of one token, the first one first
        word = tokens.to(torch.int32) << 1
        word[order[:: self.topk]] += 1
        return self.combine.tell(word, receives, sends)

    @staticmethod
    def along(results: Any, hidden: Any, words: Any) -> Any:
        import torch

        return torch.addcmul(results, hidden, (words & 1).to(results.dtype)[:, None])


def _stream(like: Any) -> int:
    if not like.is_cuda:
        return 0
    import torch

    return torch.cuda.current_stream(like.device).cuda_stream


def _functions() -> Any:
    """(before, after): what stands around combine in backward, where its gradient is the exchange between the two."""
    global _around
    if _around is None:
        import torch

        class Around(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, way, combine):
                ctx.way, ctx.combine = way, combine
                return x.view_as(x)

        class Before(Around):
            """The exchange of the gradient is the next one."""

            @staticmethod
            def backward(ctx, gradient):
                ctx.combine.ask(ctx.way, True)
                return gradient, None, None

        class After(Around):
            """It was."""

            @staticmethod
            def backward(ctx, gradient):
                ctx.combine.check(ctx.way)
                return gradient, None, None

        _around = (Before, After)
    return _around


_around: Any = None
