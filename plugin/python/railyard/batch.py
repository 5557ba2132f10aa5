"""Which rank gets which sample: the job's samplers, obeying the board (docs/live-placement.md).

Owns: windows, decisions and applying them, in every rank. Not: what a list is (dealing.py), who decides and how (planner.py).

A DataLoader is asked for its indices through its `_index_sampler`; there a PlacedSampler steps in front of the job's own,
which stays where it was and is iterated as ever. What the job sees of its loader (sampler, batch_sampler, their attributes
and states) are its own objects.

What may fail does so before it matters: a rank computes the lists of a window, and says that it has them, one window ahead.
Only if all have said so may the leader order anything there, and obeying then takes a list of numbers and the board.
"""

import base64
import hashlib
import json
import sys
import weakref
from array import array
from typing import Any, Dict, Iterator, List, Optional

from . import job as jobs
from . import say
from .dealing import Dealing, Lists, TooLarge, recognize

LISTS = 8  # in a window
AS_DEALT = b'{"order": null}'


class Window:
    """Consecutive lists of an iteration, planned at once. Known by a digest of them, and of how often this process has run
    through lists before: whoever draws the same lists obeys the same decision, and no decision is obeyed twice. A rank that
    has run through more than the others has other digests, and nothing is ordered."""

    __slots__ = (
        "stream",
        "iteration",
        "number",
        "first",
        "lists",
        "n",
        "digest",
        "value",
        "waited",
        "order",
        "tokens",
        "reader",
        "closed",
        "plan",
    )

    def __init__(
        self, stream: int, iteration: int, number: int, first: int, lists: List[List[int]], dealing: Dealing, turn: int
    ) -> None:
        self.stream, self.iteration, self.number, self.first, self.lists = stream, iteration, number, first, lists
        self.n = dealing.mbs * dealing.size
        words = array("q", [k for one in lists for k in one])
        head = f"{dealing.kind} {dealing.mbs} {dealing.size} {dealing.samples} {first} {len(lists)} {turn} "
        self.digest = hashlib.blake2b(head.encode() + words.tobytes(), digest_size=15).hexdigest()
        self.value: Optional[bytes] = None  # the decision that stands, once it was read
        self.waited = 0.0  # seconds, for the decision
        self.order: Optional[List[List[int]]] = None
        self.tokens: List[List[bytes]] = []  # of the lists, as far as the leader has read them
        self.reader: Any = None
        self.closed = False  # the leader has come to it: too late to plan
        self.plan: Any = None


def encode(order: List[List[int]]) -> bytes:
    words = array("I", [slot for one in order for slot in one])
    return json.dumps({"order": base64.b64encode(words.tobytes()).decode()}).encode()


def decode(value: bytes, lists: int, n: int) -> Optional[List[List[int]]]:
    """The order that a decision has; None: as dealt. What is no order of so many lists counts as none, for every rank alike."""
    try:
        text = json.loads(value).get("order")
        words = array("I", base64.b64decode(text)) if isinstance(text, str) else array("I")
        order = [list(words[i : i + n]) for i in range(0, len(words), n)]
        everyone = set(range(n))
        return order if len(order) == lists and all(len(one) == n and set(one) == everyone for one in order) else None
    except (ValueError, TypeError, AttributeError):
        return None


def ends(value: bytes) -> Optional[str]:
    """Why nothing will be placed from this window on, if that is what a decision says."""
    try:
        return json.loads(value).get("end")
    except (ValueError, AttributeError):
        return None


class Unexpected(Exception):
    """The job's sampler yields something else than its copies."""


class Iteration:
    """One run through a loader, as one rank draws it: windows, one ahead."""

    def __init__(self, placed: "PlacedSampler", job: jobs.Job) -> None:
        self.job, self.dealing, self.source = job, placed.dealing, placed.source
        self.stream, self.number = placed.stream, placed.iterations
        self.turn = job.turns
        self.lists = Lists(self.dealing.lists())
        self.window: Optional[Window] = None
        self.position = 0  # in the window: of the next list drawn
        self.over = False  # as dealt from here on
        self.reader: Any = None  # the leader's: tokens.py
        self.next = self._window(0, 0)
        self.low = self.dealing.rank * self.dealing.mbs

    @property
    def leader(self) -> Any:
        return self.job.leader if self.job.rank == 0 else None

    def deal(self, own: List[int]) -> List[int]:
        """What this rank gets where its sampler yields `own`. Changes nothing of its state when it raises."""
        if self.over:
            return own
        if self.window is None or self.position == len(self.window.lists):
            if self.next is None:
                return self._end(own)
            self._obey(self.next)
            self.window, self.next, self.position = self.next, None, 0
        window, k, high = self.window, self.position, self.low + self.dealing.mbs
        samples = window.lists[k]
        if samples[self.low : high] != list(own):
            raise Unexpected(
                f"the sampler {self.dealing.kind} yields other samples than its copies, in list "
                f"{window.first + k} of iteration {self.number}"
            )
        try:  # what may fail here leaves this rank without the next window, and then nothing is ordered there
            if k == 0 and self.next is None and not self.over:
                self._look_ahead()
            if self.leader is not None:
                self.leader.drew(self)
        except Exception as e:
            self.job.stop(f"looking ahead failed: {say.failure(e)}")
        out = own if window.order is None else [samples[j] for j in window.order[k][self.low : high]]
        self.position = k + 1
        return out

    def _end(self, own: List[int]) -> List[int]:
        self.over = True
        return own

    def _window(self, number: int, first: int) -> Optional[Window]:
        lists: List[List[int]] = []
        while len(lists) < LISTS:
            one = self.lists.get(first + len(lists))
            if one is None:
                break
            lists.append(one)
        return Window(self.stream, self.number, number, first, lists, self.dealing, self.turn) if lists else None

    def _look_ahead(self) -> None:
        """Gets the next window's lists and says so: from there on this rank can obey whatever is decided."""
        window = self.window
        self.lists.forget(window.first)
        self.next = self._window(window.number + 1, window.first + len(window.lists))
        if self.next is None:
            return
        if self.job.stopped() is None or self.leader is not None:
            self.job.board.put(f"ready/{self.stream}/{self.job.rank}", json.dumps([window.digest, self.next.digest]).encode())
        if self.leader is not None:
            self.leader.propose(self, self.next)

    def _obey(self, window: Window) -> None:
        """Reads what was decided of this window. The first one of an iteration is as dealt on every rank: nobody can have
        planned it."""
        if window.number == 0:
            return
        if window.value is not None:
            return  # the second try
        if window.number == 1:
            self.job.turns = max(self.job.turns, self.turn + 1)
        leader, claim = self.leader, AS_DEALT if self.job.rank == 0 else None
        if leader is not None:
            claim = leader.reached(window)
        value = self._decision(window, claim)
        window.order = decode(value, len(window.lists), window.n)
        window.value = value
        if ends(value) is not None:
            self.over = True
        if leader is not None:
            leader.settled(window)

    def _decision(self, window: Window, claim: Optional[bytes]) -> bytes:
        """What stands of this window: `claim` at the latest, for the leader; the others wait for him, but not for ever."""
        board, key = self.job.board, f"window/{window.digest}"
        for left in (2, 1, 0):
            try:
                value = board.get(key)
                if value is None and claim is None:
                    value = self._wait(key, window)
                return value if value is not None else board.claim(key, claim or AS_DEALT)
            except Exception as e:
                if left == 0:
                    raise
                say.debug(f"the board does not answer, asked again: {say.failure(e)}")
        raise AssertionError

    def _wait(self, key: str, window: Window) -> Optional[bytes]:
        """Waits for the leader until he answers, placement is off, or patience is over: twice in a row, then not any more."""
        job = self.job
        patience = job.patience() if job.waited_in_vain < 2 else 0.0
        while window.waited < patience and job.stopped(now=window.waited > 0) is None:
            part = min(1.0 if window.waited else 0.1, patience - window.waited)
            window.waited += part
            value = job.board.wait(key, part)
            if value is not None:
                job.waited_in_vain = 0
                return value
        if 0 < patience <= window.waited:
            job.waited_in_vain += 1
            say.warn(
                f"the leader (rank 0) has not decided on a window in {patience:g} s (RAILYARD_PATIENCE): "
                "samples stay as they are dealt there"
            )
        return None


class Source:
    """What the leader needs of a loader to read samples beside it."""

    def __init__(self, loader: Any) -> None:
        self.dataset, self.workers = loader.dataset, loader.num_workers
        self.worker_init_fn, self.context = loader.worker_init_fn, loader.multiprocessing_context


class PlacedSampler:
    """In front of a loader's own sampler, only where the loader asks for indices. Each iteration is one of the sampler
    itself, whose yields are exchanged for those of other ranks where the board says so."""

    def __init__(self, sampler: Any, dealing: Dealing, source: Any, job: Optional[jobs.Job] = None) -> None:
        self.sampler, self.dealing, self.source = sampler, dealing, source
        self.stream: Optional[int] = None
        self.iterations = 0
        self._job = job

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name in ("sampler", "dealing", "source"):
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __reduce__(self) -> Any:
        return _itself, (self.sampler,)  # copies and pickles are of the job's own

    def __iter__(self) -> Iterator[Any]:
        run, drawn = self._begin(), 0
        early = None if run is not None else self._early()
        try:
            for own in self.sampler:
                if run is not None:
                    own, run = self._deal(run, own)
                elif early is not None:
                    drawn += 1
                    if drawn == LISTS + 1:  # other ranks may have come to a window about which they asked the board
                        early.turns += 1
                yield own
        finally:
            if run is not None:
                run.over = True

    def _begin(self) -> Optional[Iteration]:
        job = None
        try:
            job = self._job or jobs.current()
            torch = sys.modules.get("torch")
            if job is None or job.hello is None or (torch is not None and not torch.is_grad_enabled()):
                return None  # no framework that is known; or no training, where no gradients are computed
            dealing = recognize(self.sampler) if self._job is None else self.dealing  # its numbers may have changed
            if dealing is None or dealing.size < 2:
                return None
            self.dealing = dealing
            if self.stream is None:
                self.stream, job.streams = job.streams, job.streams + 1
                fingerprint = {
                    "sampler": dealing.kind,
                    "mbs": dealing.mbs,
                    "size": dealing.size,
                    "samples": dealing.samples,
                    "lists": LISTS,
                    "rank": dealing.rank,
                }
                job.board.put(f"loader/{self.stream}/{job.rank}", json.dumps(fingerprint).encode())
            else:
                self.iterations += 1
            return Iteration(self, job)
        except TooLarge as e:
            _stop(job, str(e))
        except Exception as e:
            _stop(job, f"a data loader cannot be placed: {say.failure(e)}")
        return None

    def _early(self) -> Optional[jobs.Job]:
        """The job, where this iteration begins before this rank has said hello. It counts all the same: another rank, which said so
        sooner, would take its windows for those of the next iteration here."""
        try:
            job = self._job or jobs.current()
            return job if job is not None and job.hello is None else None
        except Exception as e:
            say.info(f"a data loader's lists are not counted: {say.failure(e)}")
            return None

    def _deal(self, run: Iteration, own: Any) -> Any:
        """The rank's samples, and the iteration, or None when it has failed for good. Tried twice: what other ranks rely on
        is obeyed if at all possible."""
        for left in (1, 0):
            try:
                return run.deal(own), run
            except Exception as e:
                _stop(run.job, f"dealing samples failed: {say.failure(e)}")
                if left == 0:
                    k = run.window.first + run.position if run.window else 0
                    say.error(f"samples are as dealt here from list {k} on, whatever was decided")
                    run.over = True
        return own, None


def _itself(sampler: Any) -> Any:
    return sampler


def _stop(job: Optional[jobs.Job], why: str) -> None:
    job.stop(why) if job is not None else jobs.stop(why)


# ---- torch.utils.data ----


def _is_training(loader: Any) -> bool:
    """Datasets of Megatron-core and others know which split they are."""
    split = getattr(loader.dataset, "split", None) or getattr(loader.dataset, "index_split", None)
    name = getattr(split, "name", split)
    return not (isinstance(name, str) and name.lower().startswith(("val", "test", "eval", "dev")))


def patch(module: Any) -> None:
    """torch.utils.data: the index sampler of every DataLoader."""
    cls = module.DataLoader
    original = cls.__dict__.get("_index_sampler")
    if not isinstance(original, property) or not hasattr(module, "BatchSampler"):
        raise RuntimeError("this PyTorch's DataLoader has no _index_sampler")
    placed: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()
    known: Dict[str, bool] = {}

    def _index_sampler(self):
        sampler = original.fget(self)
        try:
            if self not in placed:
                dealing = recognize(sampler) if _is_training(self) else None
                placed[self] = PlacedSampler(sampler, dealing, Source(self)) if dealing is not None else None
                if dealing is None and not known.setdefault(type(sampler).__name__, False):
                    known[type(sampler).__name__] = True
                    say.debug(f"a data loader with a {type(sampler).__name__} is left alone")
            if placed[self] is not None and placed[self].sampler is sampler:
                return placed[self]
        except Exception as e:
            jobs.stop(f"a data loader cannot be placed: {say.failure(e)}")
        return sampler

    cls._index_sampler = property(_index_sampler)


WATCHES = {"torch.utils.data": patch}
