"""This rank's part in the job: who it is, what it says of itself, and whether placement is off.

Owns: the process' Job, hello, `off`, and what the leader concludes from all hellos (geometry: a pure function). Not: samples
(batch.py), windows (planner.py), what a framework must be asked (megatron.py, deepspeed.py).
"""

import hashlib
import json
import os
import threading
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from . import VERSION, say
from .board import Board, StoreBoard

ASK = 2.0  # seconds between two looks at `off` by those who ask all the time
# Settings that all ranks must have alike.
ALIKE = ("RAILYARD_PLACEMENT", "RAILYARD_EXPERTS", "RAILYARD_ROUTING", "RAILYARD_STRATEGY", "RAILYARD_COMBINE")

_job: Optional["Job"] = None
_early: Optional[str] = None  # why this rank stops, told before there was a job to tell it to
_lock = threading.RLock()


class Refused(Exception):
    """Why nothing is placed in this job."""


def setting(name: str) -> str:
    """A setting's value. Without the library nothing can be placed: that is the caller's error."""
    from . import library

    return library.setting(name)


def current() -> Optional["Job"]:
    """The job of this process: None until torch.distributed is set up, and in processes forked off a rank (data workers)."""
    global _job, _early
    if _job is not None:
        return _job if _job.pid == os.getpid() else None
    import sys

    dist = sys.modules.get("torch.distributed")
    if dist is None or not getattr(dist, "is_available", lambda: False)() or not dist.is_initialized():
        return None
    with _lock:
        if _job is None:
            from torch.distributed import distributed_c10d as c10d

            say.rank = dist.get_rank()
            made = Job(dist.get_rank(), dist.get_world_size(), StoreBoard(c10d._get_default_store()))
            if _early is not None:
                made.stop(_early)
            _job = made
    return _job


def install(job: Optional["Job"]) -> None:
    """Makes this the process' job: for tests."""
    global _job, _early
    _job, _early = job, None


def stop(why: str) -> None:
    """Placement is off for the whole job, told in one line. Never raises; may come before there is a job, which then begins
    with it."""
    global _early
    try:
        job = current()
    except Exception as e:
        say.info(f"no board: {say.failure(e)}")
        job = None
    if job is not None:
        job.stop(why)
        return
    with _lock:
        if _early is None:
            _early = why
            say.warn(f"{why}; placement is off")


def node_name() -> str:
    """What tells this node from others: NCCL's rule, as the C part has it (topo/cluster.c)."""
    name = os.environ.get("NCCL_HOSTID")
    if name:
        return name
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            boot = f.readline().strip()
    except OSError:
        boot = ""
    return f"{boot}/{os.uname().nodename}" if boot else os.uname().nodename


class Job:
    """A rank's view of the job. Threads: any may call anything."""

    def __init__(
        self, rank: int, world: int, board: Board, settings: Optional[Dict[str, str]] = None, node: Optional[str] = None
    ) -> None:
        self.rank, self.world, self.board = rank, world, board
        self.pid = os.getpid()
        self.node = node if node is not None else node_name()
        self._settings = settings
        self.hello: Optional[Dict[str, Any]] = None  # once it was said
        self._described = False
        self.leader: Any = None  # planner.Leader, on rank 0 from describe() on
        self.turns = 0  # of iterations that came to a window about which the board was asked
        self.streams = 0  # data loaders that samples were drawn from
        self.waited_in_vain = 0  # times in a row that the leader did not answer
        self._off: Optional[str] = None
        self._asked = 0.0
        self._hellos: Dict[int, Dict[str, Any]] = {}
        self._lock = threading.RLock()  # never held while the board is asked

    def setting(self, name: str) -> str:
        return self._settings[name] if self._settings is not None and name in self._settings else setting(name)

    def rows_once(self) -> bool:
        """Whether equal rows cross to a node once only: the library sees to that where it is preloaded and may."""
        return "librailyard" in os.environ.get("LD_PRELOAD", "") and self.setting("RAILYARD_STRATEGY") in ("auto", "dedup")

    def patience(self) -> float:
        return float(self.setting("RAILYARD_PATIENCE"))

    # ---- hello ----

    def describe(
        self,
        *,
        dp: int,
        dp_size: int,
        share: Tuple[int, int] = (0, 1),
        ep_ranks: Sequence[int],
        experts: Sequence[int],
        layers: int,
        n_experts: int,
        topk: int,
        framework: str,
    ) -> None:
        """Says hello: what this rank is in the job. experts: numbers of those it holds, as the checkpoint numbers them. Once;
        the leader begins to lead with it. What fails here is told, and placement is off."""
        try:
            with self._lock:
                if self._described:
                    return
                self._described = True
            settings = "\n".join(f"{name}={self.setting(name)}" for name in ALIKE)
            hello = {
                "version": VERSION,
                "settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
                "framework": framework,
                "node": self.node,
                "dp": int(dp),
                "dp_size": int(dp_size),
                "share": [int(share[0]), int(share[1])],
                "ep_ranks": [int(r) for r in ep_ranks],
                "experts": sorted(int(e) for e in experts),
                "layers": int(layers),
                "n_experts": int(n_experts),
                "topk": int(topk),
            }
            self.board.put(f"hello/{self.rank}", json.dumps(hello).encode())
            self.hello = hello
            if self.rank == 0:
                from . import planner

                leader = planner.Leader(self)
                leader.start()
                self.leader = leader
        except Exception as e:
            self.stop(f"saying hello failed: {say.failure(e)}")

    def hellos(self) -> Dict[int, Dict[str, Any]]:
        """Those that have been said; all of them once its length is `world`. For the leader's thread."""
        if len(self._hellos) < self.world:
            values = self.board.get_all([f"hello/{r}" for r in range(self.world)])
            for r in range(self.world):
                value = values[r] if values else None if r in self._hellos else self.board.get(f"hello/{r}")
                if value is not None:
                    self._hellos[r] = json.loads(value)
        return dict(self._hellos)

    # ---- off ----

    def stop(self, why: str) -> None:
        """Placement is off for the whole job: one line, here. Never raises."""
        with self._lock:
            if self._off is not None:
                return
            self._off = f"rank {self.rank}: {why}"
        stands = self._off
        try:
            stands = self.board.claim("off", self._off.encode("utf-8", "backslashreplace")).decode("utf-8", "replace")
        except Exception as e:
            say.info(f"the other ranks cannot be told: {say.failure(e)}")
        (say.warn if stands == self._off else say.info)(f"{why}; placement is off")

    def stopped(self, now: bool = False) -> Optional[str]:
        """Why placement is off, or None. Looks at the board from time to time, or `now`."""
        if self._off is None and (now or time.monotonic() - self._asked >= ASK):
            self._asked = time.monotonic()
            value = self.board.get("off")
            if value is not None:
                with self._lock:
                    if self._off is None:
                        self._off = value.decode("utf-8", "replace")
                        say.info(f"placement is off: {self._off}")
        return self._off


# ---- what all hellos together say ----


class Geometry(NamedTuple):
    ranks: int  # data-parallel
    layers: int
    experts: int  # of a layer
    topk: int
    places: int
    rank_place: List[int]  # [ranks]
    expert_place: List[int]  # [experts], of every layer
    nodes: int

    def words(self) -> str:
        per = [self.rank_place.count(p) for p in range(self.places)]
        ranks = str(per[0]) if len(set(per)) == 1 else ", ".join(map(str, per))
        return (
            f"{self.ranks} data-parallel ranks on {self.nodes} nodes; {self.places} places of {ranks} ranks, by which "
            f"of the {self.experts} "
            f"experts lie there"
        )


def _names(ranks: Sequence[int]) -> str:
    ranks = sorted(ranks)
    text = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def missing(hellos: Dict[int, Any], world: int) -> str:
    """Who has not said hello, in words; empty when all have."""
    absent = [r for r in range(world) if r not in hellos]
    return f"{_names(absent)} said no hello (no adapter there, or nothing it knows)" if absent else ""


def geometry(hellos: Dict[int, Dict[str, Any]], world: Optional[int] = None) -> Geometry:
    """Places, and who and what is at which: from all ranks' hellos. Refused: why nothing can or need be placed."""
    world = len(hellos) if world is None else world
    if missing(hellos, world):
        raise Refused(missing(hellos, world))
    if not hellos:
        raise Refused("there are no ranks")
    first = hellos[0]
    for key, what in (
        ("version", "runs another version of Railyard's adapter"),
        ("settings", "has other settings (" + ", ".join(ALIKE) + ")"),
        ("framework", "runs another framework"),
        ("dp_size", "has another number of data-parallel ranks"),
        ("n_experts", "has another number of experts"),
        ("topk", "sends tokens to another number of experts"),
        ("layers", "has another number of layers"),
    ):
        other = [r for r in sorted(hellos) if hellos[r].get(key) != first.get(key)]
        if other:
            raise Refused(f"{_names(other)} {what} than rank 0")
    ranks, experts = first["dp_size"], first["n_experts"]
    if ranks < 2:
        raise Refused("there is one data-parallel rank only: nobody to give a sample to")
    of = first["share"][1]
    seats = {}
    for r, h in hellos.items():
        if not 0 <= h["dp"] < ranks or h["share"][1] != of or not 0 <= h["share"][0] < of:
            raise Refused(
                f"rank {r} says it is data-parallel rank {h['dp']} of {ranks}, "
                f"part {h['share'][0]} of {h['share'][1]} that share samples"
            )
        if (h["dp"], h["share"][0]) in seats:
            raise Refused(f"ranks {seats[h['dp'], h['share'][0]]} and {r} say they are the same data-parallel rank {h['dp']}")
        seats[h["dp"], h["share"][0]] = r
        if (
            r not in h["ep_ranks"]
            or any(e not in hellos for e in h["ep_ranks"])
            or not all(0 <= e < experts for e in h["experts"])
        ):
            raise Refused(f"rank {r}'s expert-parallel group or experts are none of this job's")
    # What a rank's node holds of the experts that the rank sends tokens to.
    local = {
        r: frozenset(e for peer in h["ep_ranks"] if hellos[peer]["node"] == h["node"] for e in hellos[peer]["experts"])
        for r, h in hellos.items()
    }
    by_dp: Dict[int, set] = {}
    for r, h in hellos.items():
        by_dp.setdefault(h["dp"], set()).add(local[r])
    if sorted(by_dp) != list(range(ranks)):
        raise Refused(f"of {ranks} data-parallel ranks only {len(by_dp)} are in the job")
    split = [d for d in sorted(by_dp) if len(by_dp[d]) > 1]
    if split:
        raise Refused(f"samples of data-parallel rank {split[0]} are shared by ranks on nodes that hold different experts")
    classes: List[frozenset] = []
    for d in range(ranks):
        (held,) = by_dp[d]
        if held not in classes:
            classes.append(held)
    if len(classes) == 1:
        raise Refused("nothing to gain: every rank's node holds the same experts")
    expert_place = [-1] * experts
    for place, held in enumerate(classes):
        for e in held:
            if expert_place[e] >= 0:
                raise Refused("nodes hold different sets of experts that overlap: an expert has no one place")
            expert_place[e] = place
    if -1 in expert_place:
        raise Refused(f"expert {expert_place.index(-1)} is held by nobody")
    rank_place = [classes.index(next(iter(by_dp[d]))) for d in range(ranks)]
    return Geometry(
        ranks,
        first["layers"],
        experts,
        first["topk"],
        len(classes),
        rank_place,
        expert_place,
        len({h["node"] for h in hellos.values()}),
    )
