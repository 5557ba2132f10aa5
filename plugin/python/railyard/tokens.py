"""Tokens of the samples of lists to come, read by the leader.

Owns: finding token ids in a sample, reading beside the job without its noticing (random states, its own workers). Not: which
lists, and when (planner.py). With worker processes in the job's loader, a loader of our own reads in workers of its own;
without them the dataset may be used on the job's own thread only, and is read there, a list or two with every list that the
job draws.
"""

import collections
import contextlib
import random
import sys
from array import array
from collections.abc import Mapping
from typing import Any, Deque, List, Optional

KEYS = ("tokens", "input_ids", "text")
WORKERS = 8  # at most
WITH_EACH = 2  # lists read with every list drawn, where there are no workers


class Unreadable(Exception):
    """Samples in which no token ids are found."""


def token_ids(sample: Any) -> bytes:
    """The token ids of a sample as the model gets them: 32-bit words, as bytes."""
    if isinstance(sample, Mapping):
        for key in KEYS:
            if key in sample:
                ids = _words(sample[key])
                if ids is not None:  # Megatron's "text" has one token more than the model's input
                    return ids[:-4] if key == "text" else ids
        values = list(sample.values())
    elif isinstance(sample, (tuple, list)) and not (sample and isinstance(sample[0], int)):
        values = list(sample)
    else:
        values = [sample]
    for value in values:
        ids = _words(value)
        if ids is not None:
            return ids
    raise Unreadable(f"no token ids are found in a sample of type {type(sample).__name__}")


def _words(value: Any) -> Optional[bytes]:
    """As 32-bit words, if these are whole numbers in one row, and more than one."""
    if hasattr(value, "is_floating_point") and hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu().numpy()
    if hasattr(value, "dtype") and hasattr(value, "astype"):
        if value.dtype.kind not in "iu" or value.size < 2 or max(value.shape) != value.size:
            return None
        return value.reshape(-1).astype("<u4").tobytes()
    if isinstance(value, array) and value.typecode in "bBhHiIlLqQ":
        value = list(value)
    if isinstance(value, (list, tuple)) and len(value) > 1 and all(type(v) is int for v in value):
        return array("I", [v & 0xFFFFFFFF for v in value]).tobytes()
    return None


def collate(samples: List[Any]) -> List[bytes]:
    return [token_ids(sample) for sample in samples]


@contextlib.contextmanager
def _as_if_nothing_were_drawn():
    """Restores the random states that reading a sample may change."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    python = random.getstate()
    legacy = numpy.random.get_state() if numpy else None
    cpu = torch.get_rng_state() if torch else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(legacy)
        if torch:
            torch.set_rng_state(cpu)


class Inline:
    """Reads on the job's own thread, when asked."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def with_list(self, window: Any) -> None:
        """Called with each list that the job draws: reads some of `window`'s."""
        for _ in range(WITH_EACH):
            if len(window.tokens) < len(window.lists):
                window.tokens.append(self._read(window.lists[len(window.tokens)]))

    def _read(self, samples: List[int]) -> List[bytes]:
        with _as_if_nothing_were_drawn():
            if callable(getattr(self._dataset, "__getitems__", None)):
                return collate(self._dataset.__getitems__(samples))
            return collate([self._dataset[i] for i in samples])

    def fetch(self, window: Any) -> bool:
        """Called by the leader's thread: are all of `window`'s tokens there?"""
        return len(window.tokens) == len(window.lists)

    def close(self) -> None:
        pass


class Workers:
    """Reads in processes of its own. Made on the job's thread, where the job makes its own; read by the leader's thread."""

    def __init__(self, source: Any, lists: Any, first: int, timeout: float) -> None:
        import torch

        data = sys.modules["torch.utils.data"]
        self._lists, self._k = lists, first
        self._fed: Deque[int] = collections.deque()
        self._held: Any = None  # a list's number and tokens, read and not asked for yet
        options = {
            "num_workers": min(source.workers, WORKERS),
            "collate_fn": collate,
            "worker_init_fn": source.worker_init_fn,
            "multiprocessing_context": source.context,
            "timeout": timeout,
            "generator": torch.Generator(),
        }
        self._iterator = iter(data.DataLoader(source.dataset, batch_sampler=self, **options))
        # One of our workers that dies would raise in the job's own thread, by PyTorch's handler of SIGCHLD: ours are not its
        # to watch.
        torch._C._remove_worker_pids(id(self._iterator))
        self._iterator._worker_pids_set = False

    def __iter__(self):
        while True:
            self._k = max(self._k, self._lists.first)
            samples = self._lists.get(self._k)
            if samples is None:
                return
            self._fed.append(self._k)
            self._k += 1
            yield samples

    def with_list(self, window: Any) -> None:
        pass

    def fetch(self, window: Any) -> bool:
        while len(window.tokens) < len(window.lists):
            if self._held is None:
                tokens = next(self._iterator, None)
                if tokens is None:
                    return False
                self._held = (self._fed.popleft(), tokens)
            k, tokens = self._held
            want = window.first + len(window.tokens)
            if k > want:
                return False  # passed over, as the job was faster than reading
            if k == want:
                window.tokens.append(tokens)
            self._held = None
        return True

    def close(self) -> None:
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


def reader(source: Any, lists: Any, first: int, timeout: float) -> Any:
    """What reads the tokens of lists from number `first` on."""
    return Workers(source, lists, first, timeout) if source.workers else Inline(source.dataset)
