"""The leader's part: on rank 0, what is decided of windows.

Owns: library.Live (made when all hellos are in), its saving, observations' way to it, reading tokens ahead, claiming windows,
placed.jsonl, what a user is told of it. Not: obeying (batch.py), reading itself (tokens.py), observations themselves
(observe.py), learning and solving (C).

The thread decides while the job draws the window before; the job's own thread only hands it windows, and claims "as dealt"
for those that it comes to first. Everything is in step(), which does not wait for other ranks: run() calls it again and
again.
"""

import atexit
import collections
import json
import os
import threading
import time
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

from . import experts
from . import job as jobs
from . import say, tokens
from .batch import AS_DEALT, Iteration, Window, encode

KEPT = 64  # windows whose decisions stay on the board: no rank of a job is so far behind another
SAVE = 60.0  # seconds between two savings of the home model
COLLECT = 1.0  # seconds between two looks for observations
WITHOUT = 15.0  # seconds that observations wait for a data loader, which knows how many samples a rank has in a list
TELL = 100  # windows


def numbered(slot_place: List[int], order: Optional[List[List[int]]], layers: int) -> List[List[int]]:
    """[layer][expert as the checkpoint numbers them]: its place; slot s of layer l holds expert order[l][s] (None: expert s)."""
    if order is None:
        return [slot_place] * layers
    places = []
    for row in order:
        at = [0] * len(row)
        for slot, expert in enumerate(row):
            at[expert] = slot_place[slot]
        places.append(at)
    return places


class Leader:
    def __init__(
        self,
        job: jobs.Job,
        make_live: Optional[Callable[..., Any]] = None,
        make_collector: Optional[Callable[..., Any]] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job, self.clock = job, clock
        # Nothing is imported by the thread: a data worker that the job forks off meanwhile would wait for that import for ever.
        if make_live is None:
            from . import library

            make_live = library.Live
        if make_collector is None:
            from . import observe

            make_collector = observe.Collector
        self._make_live, self._make_collector = make_live, make_collector
        self.live: Any = None
        self.geometry: Optional[jobs.Geometry] = None
        self.collector: Any = None
        self.why = "ranks have not met yet"  # nothing is placed; "" when something may be
        self.final = False  # and never will be
        self.sure = False
        self._record = job.setting("RAILYARD_ROUTING")
        self._model = job.setting("RAILYARD_HOME_MODEL")
        self._places = job.setting("RAILYARD_PLACEMENT") == "batch"
        self._patience = job.patience()
        self._lock = threading.Lock()
        self._open: List[Tuple[Iteration, Window]] = []
        self._done: Deque[Window] = collections.deque()
        self._iterations: List[Iteration] = []  # that have readers
        self._streams: Dict[int, Dict[int, Dict[str, Any]]] = {}
        self._bad_streams: Dict[int, str] = {}
        self._kept: Deque[str] = collections.deque()  # their digests
        self._samples: Optional[int] = None
        self._began = self._collected = self._saved = self._told = clock()
        self._seen_at: Optional[float] = None
        self._reason = ""
        self._counts = {"windows": 0, "placed": 0, "dealt": 0.0, "placed_share": 0.0, "moved": 0}
        self._any = False
        self._wake = threading.Event()
        self._ending = False
        self._thread: Optional[threading.Thread] = None

    # ---- the job's own thread ----

    def propose(self, run: Iteration, window: Window) -> None:
        """Rank 0 has got a window's lists and is one window before it."""
        self._samples = self._samples or run.dealing.mbs
        with self._lock:
            self._open.append((run, window))
        if self.sure and not self.why:
            try:
                if run.reader is None:
                    run.reader = tokens.reader(run.source, run.lists, window.first, self._patience)
                    with self._lock:
                        self._iterations.append(run)
                window.reader = run.reader
            except Exception as e:
                self._unplaceable(f"reading samples ahead failed: {say.failure(e)}")
        self._wake.set()

    def drew(self, run: Iteration) -> None:
        """Rank 0 draws a list: samples may be read on this thread now."""
        window = run.next
        if window is not None and window.reader is not None and not window.closed:
            try:
                window.reader.with_list(window)
            except Exception as e:
                window.reader = None
                self._unplaceable(f"reading samples ahead failed: {say.failure(e)}")

    def reached(self, window: Window) -> bytes:
        """Rank 0 comes to the window: what it claims if nothing is decided yet."""
        window.closed = True
        off = self.job.stopped(now=True)
        if off is None and not self.final:
            return AS_DEALT
        return json.dumps({"end": off or self.why}).encode()

    def settled(self, window: Window) -> None:
        """What stands of a window is known to rank 0."""
        self._done.append(window)
        self._wake.set()

    # ---- the thread ----

    def start(self) -> None:
        self._thread = threading.Thread(target=self.run, name="railyard-leader", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def run(self) -> None:
        while not self._ending:
            try:
                busy = self.step()
            except Exception as e:
                self._unplaceable(f"planning failed: {say.failure(e)}")
                self.job.stop(self.why)
                busy = False
            self._wake.wait(0.02 if busy else COLLECT)
            self._wake.clear()

    def close(self) -> None:
        """At the end of the process: what was learned is kept. The board is not asked: its server may be gone by now."""
        if self._ending or self.job.pid != os.getpid():
            return
        self._ending = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2.0)
        for last in (self._finish_windows, self._save, self._last_record, self._last_words, self._close_readers):
            try:
                last()
            except Exception as e:
                say.info(f"at the end: {say.failure(e)}")

    def _last_record(self) -> None:
        if self._record and getattr(self.collector, "samples", 0):
            self.live.flush()

    def _last_words(self) -> None:
        if self._places and self._counts["windows"]:
            self._tell()
        elif self.live is not None:
            self._tell_watched(self.live.state())

    def _close_readers(self) -> None:
        for run in self._iterations:
            run.reader.close()

    def step(self) -> bool:
        """One round. Are there windows that cannot be decided yet?"""
        now = self.clock()
        if self.geometry is None and not self.final:
            self._meet(now)
        if self.geometry is not None and self.live is None:
            self._set_up(now)
        if self.collector is not None and now - self._collected >= COLLECT:
            self._collected = now
            self.collector.collect()
            self._look(now)
        self._finish_windows()
        busy = self._plan_all()
        if now - self._saved >= SAVE:
            self._saved = now
            self._save()
        for run in [r for r in self._iterations if r.over]:
            with self._lock:
                self._iterations.remove(run)
            run.reader.close()
        return busy

    def _unplaceable(self, why: str) -> None:
        """Nothing will be placed any more; recording goes on."""
        if not self.final:
            self.why, self.final = why, True
            if self._places:
                say.warn(f"{why}; samples stay as they are dealt")

    # ---- meeting ----

    def _meet(self, now: float) -> None:
        hellos = self.job.hellos()
        if len(hellos) < self.job.world:
            self.why = jobs.missing(hellos, self.job.world)
            if now - self._began > self._patience:
                say.warn_once("missing", f"{self.why}; until then samples stay as they are dealt")
            return
        try:
            self.geometry = jobs.geometry(hellos, self.job.world)
            say.info(f"all {self.job.world} ranks have joined ({self.geometry.words()})")
            self.why = "nothing is learned yet"
        except jobs.Refused as e:
            self._unplaceable(str(e))
            h = hellos[0]
            if self._record and h["n_experts"] > 1 and h["dp_size"] > 0:
                # Places are needed to learn, not to record: one half of the experts each will do.
                n, ranks = h["n_experts"], h["dp_size"]
                self.geometry = jobs.Geometry(
                    ranks,
                    h["layers"],
                    n,
                    h["topk"],
                    2,
                    [r % 2 if ranks > 1 else 0 for r in range(ranks)],
                    [int(2 * x >= n) for x in range(n)],
                    0,
                )

    def _set_up(self, now: float) -> None:
        g = self.geometry
        if self._samples is None and self._places and not self.final:
            if self._seen_at is None and self.job.board.get("seen/0/0") is not None:
                self._seen_at = now
            if self._seen_at is None or now - self._seen_at < WITHOUT:
                return
            self._unplaceable("no data loader is seen that Railyard knows how to place")
        if not experts.settled():  # before the first step, which may move them
            return
        order = experts.order()
        if order is not None and (len(order) != g.layers or any(len(row) != g.experts for row in order)):
            self._unplaceable(f"experts were moved in {len(order)} layers, but {g.layers} layers are watched")
            order = None
        # With one place only for all data-parallel ranks (recording alone) there are two all the same: geometry is made up then.
        live = self._make_live(
            ranks=g.ranks if g.ranks > 1 else 2,
            samples=self._samples or 1,
            layers=g.layers,
            experts=g.experts,
            topk=g.topk,
            places=g.places,
            distinct=int(self.job.rows_once()),
            rank_place=g.rank_place if g.ranks > 1 else [0, 1],
            expert_place=sum(numbered(g.expert_place, order, g.layers), []),
        )
        if self._model and not self.final and os.path.exists(self._model):
            try:
                live.load(self._model)
                say.info(f"what earlier jobs learned is loaded from {self._model}")
            except Exception as e:
                say.warn(f"{e}; this job learns anew")
        self.collector = self._make_collector(
            self.job.board,
            self.job.world,
            live,
            g.layers,
            g.experts,
            g.places,
            g.rank_place,
            [g.expert_place] * g.layers,
            numbers=order,
            record=self._record,
        )
        self.live = live

    def _look(self, now: float) -> None:
        """Is the model sure?"""
        state = self.live.state()
        if state.sure and not self.sure and not self.final:
            say.info(f"homes of samples can be told: {state.why}")
        self.sure = state.sure
        if not self.final:
            self.why = "" if state.sure else f"homes cannot be told well enough yet: {state.why}"
        if not self._places and now - self._told >= SAVE:
            self._told = now
            self._tell_watched(state)

    def _tell_watched(self, state: Any) -> None:
        if state.samples and not self.final:
            say.info(
                f"of what {state.samples} samples sent {100 * state.crossed:.1f} % left their place; placing them "
                f"would keep {100 * state.captured:.0f} % "
                f"of what knowing their routing beforehand could keep ({state.why})"
            )

    # ---- windows ----

    def _plan_all(self) -> bool:
        with self._lock:
            proposals, self._open = self._open, []
        if proposals and self.live is not None:
            self._look(self.clock())
        later = []
        for run, window in proposals:
            if not window.closed and not run.over and not self._plan(run, window):
                later.append((run, window))
        with self._lock:
            self._open = later + self._open
        return bool(later)

    def _plan(self, run: Iteration, window: Window) -> bool:
        """Decides; False: cannot yet."""
        why = self._hindrance(run, window)
        if why is not None:
            if why:
                self._as_dealt(window, why)
            return bool(why)
        if not window.reader.fetch(window):
            return False
        order, moved, dealt, placed = [], 0, 0.0, 0.0
        for samples in window.tokens:
            one, plan = self.live.place(samples)
            order.append(list(one))
            moved += plan.moved
            dealt, placed = dealt + plan.dealt / len(window.tokens), placed + plan.placed / len(window.tokens)
        window.plan = (moved, dealt, placed)
        if not moved:
            self._as_dealt(window, plan.why)
            return True
        if self.job.stopped(now=True) is None and not window.closed:
            self.job.board.claim(f"window/{window.digest}", encode(order))
        return True

    def _hindrance(self, run: Iteration, window: Window) -> Optional[str]:
        """Why the window stays as dealt; "": not known yet; None: nothing is in the way."""
        off = self.job.stopped(now=True)
        if off is not None or not self._places:
            return off or "RAILYARD_PLACEMENT is not batch"
        if self.why or self.live is None:
            return self.why or "ranks have not met yet"
        if run.dealing.mbs != self._samples:
            return f"this loader has {run.dealing.mbs} samples of a rank in a list; places are told for {self._samples}"
        if window.reader is None:
            return "homes could not be told when its lists became known"
        expected = self._stream(run)
        if isinstance(expected, str):
            return expected
        held = self.job.board.get_all([f"ready/{window.stream}/{r}" for r in expected])
        if held is None or any(window.digest not in json.loads(value) for value in held):
            return ""
        return None

    def _stream(self, run: Iteration) -> Any:
        """The ranks that draw from this stream, as far as known; or why nothing is ordered there; "" while too few are known."""
        hellos, stream, board = self.job.hellos(), run.stream, self.job.board
        if stream in self._bad_streams:
            return self._bad_streams[stream]
        known = self._streams.setdefault(stream, {})
        mine = hellos[self.job.rank]
        # Whether a rank draws is told by the ranks that share samples with this one: pipeline stages alike, tensor-parallel
        # ranks alike.
        beside = [r for r, h in hellos.items() if h["dp"] == mine["dp"] and r not in known]
        for r in beside:
            self._look_at(stream, r, known)
        shares = {hellos[r]["share"][0] for r in known}
        expected = [r for r, h in sorted(hellos.items()) if h["share"][0] in shares]
        for r in expected:
            if r not in known:
                self._look_at(stream, r, known)
        first = known.get(self.job.rank)
        for r, f in known.items():
            h, why = hellos[r], None
            if first is not None and {k: v for k, v in f.items() if k != "rank"} != {
                k: v for k, v in first.items() if k != "rank"
            }:
                why = f"rank {r}'s data loader {stream} is another one than rank 0's ({f} instead of {first})"
            elif f["rank"] != h["dp"] or f["size"] != h["dp_size"]:
                why = f"rank {r} is data-parallel rank {h['dp']} of {h['dp_size']}, but its data loader {stream} "
                why += f"deals to rank {f['rank']} of {f['size']}"
            if why is not None:
                self._bad_streams[stream] = why
                say.warn(f"{why}; its samples stay as they are dealt")
                return why
        return expected if first is not None and all(r in known for r in expected) else ""

    def _look_at(self, stream: int, rank: int, known: Dict[int, Dict[str, Any]]) -> None:
        value = self.job.board.get(f"loader/{stream}/{rank}")
        if value is not None:
            known[rank] = json.loads(value)

    def _as_dealt(self, window: Window, why: str) -> None:
        """Said at once, so that nobody waits for rank 0 to come there."""
        self.job.board.claim(f"window/{window.digest}", AS_DEALT)
        if why != self._reason:
            self._reason = why
            say.debug(f"window {window.number} of data loader {window.stream} stays as dealt: {why}")

    # ---- afterwards ----

    def _finish_windows(self) -> None:
        while self._done:
            window = self._done.popleft()
            self._kept.append(window.digest)
            if len(self._kept) > KEPT and not self._ending:
                self.job.board.drop(f"window/{self._kept.popleft()}")
            self._count(window)
            if self._record and self._places:
                self._write(window)

    def _count(self, window: Window) -> None:
        c = self._counts
        c["windows"] += 1
        moved, dealt, placed = window.plan or (0, 0.0, 0.0)
        if window.order is not None:
            c["placed"] += 1
            c["dealt"] += dealt
            c["placed_share"] += placed
            c["moved"] += moved
            if not self._any:
                self._any = True
                say.info(
                    f"from here on samples are placed: in window {window.number} of data loader {window.stream} {moved} of "
                    f"{len(window.lists) * window.n} change "
                    f"ranks; of what they send {100 * placed:.1f} % is predicted to leave its place instead of "
                    f"{100 * dealt:.1f} %"
                )
        if c["windows"] % TELL == 0:
            self._tell()

    def _tell(self) -> None:
        c, seen = self._counts, ""
        if self.live is not None:
            s = self.live.state()
            if s.samples:
                seen = f"; observed so far: {100 * s.crossed:.1f} % leave, {100 * s.even:.1f} % had samples been placed by lot"
        if c["placed"]:
            dealt, placed = (100 * c[what] / c["placed"] for what in ("dealt", "placed_share"))
            share = f": predicted to leave their place {placed:.1f} % instead of {dealt:.1f} %"
        else:
            share = f" ({self.why or self._reason or 'nothing to gain'})"
        say.info(f"of {c['windows']} windows {c['placed']} were placed{share}{seen}")

    def _write(self, window: Window) -> None:
        """placed.jsonl: enough to know for every list which rank got which sample."""
        line = {
            "stream": window.stream,
            "iteration": window.iteration,
            "window": window.number,
            "first": window.first,
            "lists": len(window.lists),
            "dealt": window.lists,
            "order": window.order,
        }
        try:
            os.makedirs(self._record, exist_ok=True)
            with open(os.path.join(self._record, "placed.jsonl"), "a", encoding="ascii") as f:
                f.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as e:
            say.warn_once("placed", f"decisions are not recorded: {e}")

    def _save(self) -> None:
        if not self._model or self.live is None or self.geometry is None or not self.geometry.nodes:
            return
        beside = f"{self._model}.{os.getpid()}.tmp"
        try:
            self.live.save(beside)
            os.replace(beside, self._model)
        except Exception as e:
            say.warn_once("model", f"the home model is not saved to {self._model}: {e}")
