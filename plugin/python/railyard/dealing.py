"""Whole lists: what a sampler deals to all data-parallel ranks, known from the sampler of one.

Owns: recognizing samplers, and running the job's own sampler as the others run it. Not: windows and orders (batch.py).
Nothing here knows how samples are dealt: a copy of the job's sampler is told that it is another rank, and asked. Where one
copy that takes itself for the only rank says the same for less, it is asked instead; that each list holds, in its place, what
the job's own sampler yields is checked at every list (batch.py).
"""

import copy
import sys
import threading
from array import array
from typing import Any, Callable, Dict, Iterator, List, Optional

MOST = 1 << 28  # entries of permutations that copies of a sampler may hold


class TooLarge(Exception):
    """More memory than knowing the lists is worth."""


class Dealing:
    """A sampler and the numbers that matter: `mbs` samples for each of `size` ranks make a list; this one is `rank`.
    `lists()` yields whole lists, rank by rank, up to the first that is not full."""

    def __init__(self, kind: str, mbs: int, rank: int, size: int, samples: int, lists: Callable[[], Iterator[List[int]]]) -> None:
        self.kind, self.mbs, self.rank, self.size, self.samples, self.lists = kind, mbs, rank, size, samples, lists


class Lists:
    """The lists of one iteration by number, made when somebody asks for them. Threads: any."""

    def __init__(self, lists: Iterator[List[int]]) -> None:
        self._lists, self._made, self._ended = lists, 0, False
        self._kept: Dict[int, List[int]] = {}
        self._lock = threading.Lock()
        self.first = 0  # that can still be had

    def get(self, k: int) -> Optional[List[int]]:
        """None: there is none (the iteration is over before), or not any more."""
        with self._lock:
            while self._made <= k and not self._ended:
                one = next(self._lists, None)
                if one is None:
                    self._ended = True
                else:
                    self._kept[self._made] = one
                    self._made += 1
            return self._kept.get(k)

    def forget(self, before: int) -> None:
        with self._lock:
            for k in range(self.first, before):
                self._kept.pop(k, None)
            self.first = max(self.first, before)


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def recognize(sampler: Any) -> Optional[Dealing]:
    """What yields the index lists of a DataLoader: Megatron's samplers, or PyTorch's BatchSampler of a DistributedSampler.
    None: another, of which nothing is known. Reads attributes only."""
    return _megatron(sampler) or _distributed(sampler)


# ---- Megatron-LM's data_samplers.py, by the attributes that its samplers have had since 2020 ----


def _megatron(s: Any) -> Optional[Dealing]:
    names = (
        "total_samples",
        "consumed_samples",
        "micro_batch_size",
        "data_parallel_rank",
        "micro_batch_times_data_parallel_size",
    )
    a = getattr(s, "__dict__", {})
    if not all(_is_count(a.get(name)) for name in names) or hasattr(s, "global_batch_size") or hasattr(s, "num_micro_batches"):
        return None  # hybrid context parallelism deals whole global batches: another thing
    mbs, together, rank, total = (
        a["micro_batch_size"],
        a["micro_batch_times_data_parallel_size"],
        a["data_parallel_rank"],
        a["total_samples"],
    )
    if mbs < 1 or together % mbs or rank >= together // mbs or (a.get("data_parallel_size", together // mbs) != together // mbs):
        return None
    size = together // mbs

    def told(**attributes):
        other = copy.copy(s)
        other.__dict__.update(attributes)
        return iter(other)

    def each():  # one copy for each rank
        return _side_by_side([told(data_parallel_rank=r) for r in range(size)], mbs)

    if "data_sharding" not in a:
        if not hasattr(s, "get_start_end_idx"):
            return Dealing(type(s).__name__, mbs, rank, size, total, each)
        return Dealing(
            type(s).__name__,
            mbs,
            rank,
            size,
            total,
            lambda: _full(told(data_parallel_rank=0, micro_batch_size=together), together),
        )
    sharded = bool(a["data_sharding"])

    def shuffled():
        if total * (2 if sharded else 3) > MOST:
            raise TooLarge(f"shuffling {total} samples takes more memory than knowing all ranks' samples is worth")
        return each() if sharded else _dealt_in_turn(told(data_parallel_rank=0, data_parallel_size=1), mbs, size)

    return Dealing(type(s).__name__, mbs, rank, size, total, shuffled)


def _full(lists: Iterator[Any], n: int) -> Iterator[List[int]]:
    for one in lists:
        if len(one) != n:
            return
        yield list(one)


def _side_by_side(ranks: List[Iterator[Any]], mbs: int) -> Iterator[List[int]]:
    while True:
        whole: List[int] = []
        for one in ranks:
            part = next(one, ())
            if len(part) != mbs:
                return
            whole.extend(part)
        yield whole


def _dealt_in_turn(batches: Iterator[Any], mbs: int, size: int) -> Iterator[List[int]]:
    """From what a sampler yields that thinks it is the only rank, to lists rank by rank: the ranks of these samplers take
    samples in turn."""
    held: List[int] = []
    for batch in batches:
        held.extend(batch)
        while len(held) >= mbs * size:
            yield [held[j * size + r] for r in range(size) for j in range(mbs)]
            del held[: mbs * size]


# ---- PyTorch's, which DeepSpeed's loader uses ----


def _distributed(s: Any) -> Optional[Dealing]:
    data, module = sys.modules.get("torch.utils.data"), sys.modules.get("torch.utils.data.distributed")
    if data is None or module is None or type(s) is not data.BatchSampler:
        return None
    inner, cls = s.sampler, module.DistributedSampler
    if not isinstance(inner, cls) or type(inner).__iter__ is not cls.__iter__:
        return None
    mbs, rank, size, total = s.batch_size, inner.rank, inner.num_replicas, inner.total_size
    # Unshuffled ones are what validation uses, where somebody may count on which rank has which sample.
    if (
        not inner.shuffle
        or not _is_count(mbs, 1)
        or not _is_count(rank)
        or not _is_count(size, 1)
        or rank >= size
        or not _is_count(total, 1)
    ):
        return None

    def lists():
        if total > MOST:
            raise TooLarge(f"shuffling {total} samples takes more memory than knowing all ranks' samples is worth")
        other = copy.copy(inner)
        other.__dict__.update(rank=0, num_replicas=1, num_samples=inner.total_size)
        everything = array("q", iter(other))
        chunks = (everything[i : i + mbs * size] for i in range(0, len(everything), mbs * size))
        return _dealt_in_turn(chunks, mbs, size)

    return Dealing(type(inner).__name__, mbs, rank, size, total, lists)
