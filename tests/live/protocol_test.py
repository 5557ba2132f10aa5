#!/usr/bin/env python3
"""Live placement's protocol under a random scheduler: whatever the order of events and whoever fails, all ranks act on equal
decisions, every list is a permutation of what was dealt, and nobody waits beyond the patience.

usage: protocol_test.py [SCHEDULES [SEED]]

Ranks and the leader's thread are threads of which one runs at a time; at each call of the board, and at no other place do
they meet, the scheduler picks who goes on. Time is the scheduler's. A failing schedule prints its seed: give it as SEED with
SCHEDULES 1.
"""

import collections
import os
import random
import sys
import threading
import time
import types

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "..", "plugin", "python")]
os.environ["RAILYARD_LOG"] = "debug"
import samplers  # noqa: E402
from railyard import batch, board, dealing, job, library, planner, say, tokens  # noqa: E402

SETTINGS = {
    "RAILYARD_PATIENCE": "30",
    "RAILYARD_PLACEMENT": "batch",
    "RAILYARD_ROUTING": "",
    "RAILYARD_HOME_MODEL": "",
    "RAILYARD_STRATEGY": "auto",
    "RAILYARD_COMBINE": "exact",
    "RAILYARD_EXPERTS": "",
}
PATIENCE = float(SETTINGS["RAILYARD_PATIENCE"])


class Killed(BaseException):
    pass


class Injected(Exception):
    pass


class Actor:
    def __init__(self, sim, name, function, rank):
        self.sim, self.name, self.rank, self.function = sim, name, rank, function
        self.go = threading.Lock()
        self.go.acquire()
        self.weight = 10 ** sim.random.uniform(-1.5, 1)
        self.ready, self.deadline, self.over, self.killed = None, None, False, False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        self.go.acquire()
        self.sim.here.actor = self
        try:
            if not self.killed:
                self.function()
        except Killed:
            pass
        except BaseException as e:
            self.sim.error = self.sim.error or e
        self.over = True
        self.sim.hand_on(None)

    def runnable(self):
        return not self.over and (
            self.ready is None or self.killed or self.ready() or (self.deadline is not None and self.deadline <= self.sim.now)
        )


class Sim:
    """The scheduler. Everything random in a schedule comes from its seed."""

    def __init__(self, seed):
        self.random, self.now, self.actors, self.main, self.steps, self.error = (
            random.Random(seed),
            1000.0,
            [],
            threading.Lock(),
            0,
            None,
        )
        self.main.acquire()
        self.here = threading.local()

    def add(self, name, function, rank):
        actor = Actor(self, name, function, rank)
        actor.thread.start()
        self.actors.append(actor)

    def pause(self, ready=None, seconds=None):
        """The running actor lets others run, until ready() or for so long at most."""
        actor = self.here.actor
        actor.ready, actor.deadline = ready, None if seconds is None else self.now + seconds
        self.hand_on(actor)
        actor.ready = actor.deadline = None
        if actor.killed:
            raise Killed

    def hand_on(self, actor):
        """Whoever is next runs; `actor` waits until that is it again."""
        following = self._choose()
        if following is not actor or actor is None:
            (following.go if following is not None else self.main).release()
            if actor is not None:
                actor.go.acquire()

    def _choose(self):
        while True:
            living = [a for a in self.actors if not a.over]
            if self.error is None and not any(a.name.startswith("rank") for a in living) or self.steps > 200000:
                self.error = self.error or (AssertionError("no end") if self.steps > 200000 else None)
                for a in living:
                    a.killed = True  # the leader's thread is left
            if self.error is not None:
                for a in living:
                    a.killed = True
            if not living:
                return None
            able = [a for a in living if a.runnable()]
            if able:
                break
            deadlines = [a.deadline for a in living if a.deadline is not None]
            if deadlines:
                self.now = min(deadlines)
            else:
                self.error = AssertionError("all wait for ever: " + ", ".join(a.name for a in living))
        self.steps += 1
        self.now += self.random.random() * 0.01
        return self.random.choices(able, [a.weight for a in able])[0]

    def run(self):
        self.hand_on(None)
        self.main.acquire()
        for a in self.actors:
            a.thread.join()
        if self.error is not None:
            raise self.error


class SimBoard(board.Board):
    """A rank's way to the shared values: pauses before and after, fails where told to."""

    def __init__(self, sim, values, world):
        self.sim, self.values, self.world = sim, values, world
        self.longest = 0.0

    def _op(self, name, function):
        self.sim.pause()
        self.world.fail("board." + name)
        out = function()
        self.world.fail("board after " + name)
        if self.sim.random.random() < 0.3:
            self.sim.pause()
        return out

    def put(self, key, value):
        assert isinstance(value, bytes) and value
        self._op("put", lambda: self.values.__setitem__(key, value))

    def get(self, key):
        return self._op("get", lambda: self.values.get(key))

    def claim(self, key, value):
        assert isinstance(value, bytes) and value
        return self._op("claim", lambda: self.values.setdefault(key, value))

    def drop(self, key):
        self._op("drop", lambda: self.values.pop(key, None))

    def wait(self, key, seconds):
        self.world.fail("board.wait")
        began = self.sim.now
        self.sim.pause(lambda: key in self.values, seconds)
        self.world.waited[self.sim.here.actor.rank] += self.sim.now - began
        return self.values.get(key)


class FakeLive:
    """Orders anything, sometimes nothing; sure after a while."""

    def __init__(self, world, samples, ranks, **_):
        self.world, self.n, self.random = world, samples * ranks, random.Random(world.sim.random.random())
        self.sure_at = world.sim.now + self.random.choice([0, 0, 0, 1])

    def state(self):
        self.world.fail("live.state")
        return library.State(self.world.sim.now >= self.sure_at, 10, 0.5, 0.5, 0.5, "so far")

    def place(self, samples):
        self.world.fail("live.place")
        assert len(samples) == self.n, (len(samples), self.n)
        order = list(range(self.n))
        if self.random.random() < 0.8:
            self.random.shuffle(order)
        return order, library.Plan(sum(a != b for a, b in enumerate(order)), 0.5, 0.3, "as told")


class World:
    """One job: what it is, what goes wrong in it, what came of it."""

    def __init__(self, seed):
        self.seed, self.sim = seed, Sim(seed)
        r = self.random = random.Random(seed + 1)
        self.size, self.mbs = r.choice([2, 2, 3, 4]), r.choice([1, 1, 2])
        self.lists = r.choice([1, 2, 2, 3])
        self.epochs, self.abandon = r.choice([1, 2, 2]), r.choice([None, None, None, r.randrange(1, 30)])
        self.kind = r.choice(["sequential", "sequential", "shuffled", "sharded"])
        self.total = self.mbs * self.size * r.choice([8, 16, 40]) + r.randrange(self.mbs * self.size)
        self.consumed, self.drop_last = r.choice([0, 0, self.mbs * self.size * 2]), r.random() < 0.7
        self.step = r.choice([0, 0.3, 1, 3])
        self.ahead = r.randrange(1, 5)  # lists that a rank may be ahead of another
        self.trouble = r.choice(
            [
                None,
                None,
                None,
                "once",
                "once",
                "once",
                "always",
                "always",
                "no adapter",
                "kill",
                "kill thread",
                "late",
                "settings",
                "late hello",
            ]
        )
        self.victim = r.randrange(self.size)
        self.where = r.choice(PLACES) if self.trouble in ("once", "always") else None
        self.call, self.calls = r.randrange(1, 40) if r.random() < 0.6 else r.randrange(1, 6), 0
        self.values, self.jobs, self.drawn, self.decided = {}, {}, collections.defaultdict(dict), collections.defaultdict(dict)
        self.progress, self.gone, self.waited, self.waits = [0] * self.size, set(), collections.Counter(), collections.Counter()

    # ---- what goes wrong ----

    def fail(self, where):
        if self.where != where or getattr(self.sim.here, "actor", None) is None or self.sim.here.actor.rank != self.victim:
            return
        self.calls += 1
        if self.calls == self.call or (self.calls > self.call and self.trouble == "always"):
            raise Injected(where)

    def reached(self, rank, k):
        if self.trouble in ("kill", "kill thread") and self.victim == rank and k == self.call % 12:
            if self.trouble == "kill":
                self.gone.add(rank)
                raise Killed
            for a in self.sim.actors:
                a.killed |= a.name == "leader"

    # ---- the job ----

    def sampler(self, rank):
        if self.kind == "sequential":
            return samplers.Sequential(self.total, self.consumed, self.mbs, rank, self.size, self.drop_last)
        return samplers.Shuffled(None, self.total, self.consumed, self.mbs, rank, self.size, self.kind == "sharded")

    def rank(self, rank):
        settings = dict(SETTINGS)
        if self.trouble == "settings" and rank == self.victim:
            settings["RAILYARD_COMBINE"] = "sum"
        self.jobs[rank] = job.Job(rank, self.size, SimBoard(self.sim, self.values, self), settings, f"node{rank % 2}")
        adapted = self.trouble != "no adapter" or rank != self.victim
        if self.trouble == "late" and rank == self.victim:
            self.sim.pause(seconds=self.sim.random.uniform(1, 2.5 * PATIENCE))
        late = self.trouble == "late hello" and rank == self.victim
        sampler = self.sampler(rank)
        placed = batch.PlacedSampler(
            sampler,
            dealing.recognize(sampler),
            types.SimpleNamespace(dataset=range(self.total + 1000), workers=0),
            self.jobs[rank],
        )
        if adapted and not late:
            self.describe(rank)
        done = 0
        for epoch in range(self.epochs):
            for k, own in enumerate(placed if adapted else sampler):
                self.drawn[epoch, k][rank] = list(own)
                self.progress[rank] = done = done + 1
                self.waits[rank], self.waited[rank] = max(self.waits[rank], self.waited[rank]), 0
                if late and done == 3:
                    self.describe(rank)
                self.reached(rank, done)
                if self.step:  # the forward and backward passes
                    self.sim.pause(seconds=self.sim.random.random() * self.step)
                self.sim.pause(lambda: all(p >= done - self.ahead for r, p in enumerate(self.progress) if r not in self.gone))
                if self.abandon == k and epoch == 0:
                    break
        self.gone.add(rank)

    def describe(self, rank):
        held = 4 // (2 if self.size > 1 else 1)
        place = rank % 2
        self.jobs[rank].describe(
            dp=rank,
            dp_size=self.size,
            ep_ranks=list(range(self.size)),
            experts=range(place * held, place * held + held),
            layers=2,
            n_experts=4,
            topk=2,
            framework="a test",
        )

    # ---- what came of it ----

    def check(self, obeyed):
        """Every list that all ranks drew, against what a job without us would have drawn."""
        plain = [self.sampler(r) for r in range(self.size)]
        placed = 0
        for epoch in range(self.epochs):
            for k, parts in enumerate(zip(*plain)):
                drawn = self.drawn.get((epoch, k), {})
                if len(drawn) < self.size:
                    continue
                whole, got = sorted(x for p in parts for x in p), sorted(x for r in range(self.size) for x in drawn[r])
                assert whole == got, f"epoch {epoch}, list {k}: {got} instead of {whole}"
                placed += [list(p) for p in parts] != [drawn[r] for r in range(self.size)]
                if self.abandon == k and epoch == 0:
                    break
        for digest, by in obeyed.items():
            assert len(set(by.values())) == 1, f"window {digest}: {by}"
        for r in range(self.size):
            assert self.waits[r] <= PATIENCE * 1.01 + 1, f"rank {r} waited {self.waits[r]} s"
        if self.trouble in (None, "once"):
            for r in range(self.size):
                assert r in self.gone
        return placed


# Where something is made to raise. What comes before a rank says that it can obey, or concerns the leader's planning, may
# fail for good; what obeying takes, once.
READY = [
    "live.state",
    "live.place",
    "Lists.get",
    "Iteration._look_ahead",
    "Iteration._window",
    "Job.hellos",
    "Leader.step",
    "Leader._plan",
    "Leader._stream",
    "Leader._as_dealt",
    "Leader.propose",
    "Leader.drew",
    "Leader._finish_windows",
    "Inline._read",
    "recognize",
    "Window",
]
OBEY = [
    "board.put",
    "board.get",
    "board.claim",
    "board.wait",
    "board after put",
    "board after get",
    "board after claim",
    "Iteration.deal",
    "Iteration._obey",
    "Iteration._decision",
    "Job.setting",
    "Job.stopped",
    "Leader.reached",
    "Leader.settled",
    "decode",
    "Job.stop",
]
PLACES = READY + OBEY
world = None


def failing(owner, name, label):
    original = getattr(owner, name)

    def wrapped(*args, **more):
        world.fail(label)
        return original(*args, **more)

    setattr(owner, name, wrapped)


for label in PLACES:
    if "." in label and label.split(".")[0] not in ("live", "board"):
        cls, method = label.split(".")
        failing(
            {
                "Lists": dealing.Lists,
                "Iteration": batch.Iteration,
                "Job": job.Job,
                "Leader": planner.Leader,
                "Inline": tokens.Inline,
            }[cls],
            method,
            label,
        )
failing(batch, "recognize", "recognize")
failing(batch, "decode", "decode")
failing(batch, "Window", "Window")
obeyed = None
_deal = batch.Iteration.deal


def deal(self, own):
    out = _deal(self, own)
    if self.window is not None and self.window.number:
        obeyed[self.window.digest, self.window.iteration][self.job.rank] = str(self.window.order)
    return out


batch.Iteration.deal = deal


class SimLeader(planner.Leader):
    def __init__(self, of):
        super().__init__(
            of,
            make_live=lambda **k: FakeLive(world, **k),
            make_collector=lambda *a, **k: types.SimpleNamespace(collect=lambda: 0),
            clock=lambda: world.sim.now,
        )

    def start(self):
        def run():
            while True:
                try:
                    busy = self.step()
                except Exception as e:
                    self._unplaceable(f"planning failed: {say.failure(e)}")
                    self.job.stop(self.why)
                    busy = False
                world.sim.pause(self._wake.is_set, 0.02 if busy else planner.COLLECT)
                self._wake.clear()

        world.sim.add("leader", run, 0)


planner.Leader = SimLeader
planner.COLLECT = 0.05
tokens.token_ids = lambda sample: b"\0\0\0\0" * 4


def schedule(seed):
    global world, obeyed
    world, obeyed = World(seed), collections.defaultdict(dict)
    batch.LISTS, planner.KEPT = world.lists, world.ahead // world.lists + 2
    job.time = types.SimpleNamespace(monotonic=lambda: world.sim.now)
    said.clear()
    say._once.clear()
    for r in range(world.size):
        world.sim.add(f"rank {r}", lambda r=r: world.rank(r), r)
    world.sim.run()
    lost = any("whatever was decided" in line for line in said)
    if lost:  # said aloud, and only where obeying itself failed for good
        assert world.trouble == "always" and world.where in OBEY, (world.trouble, world.where)
        return world.trouble, 0
    return world.trouble, world.check(obeyed)


said = []


# Schedules that showed mistakes, with what was drawn then: run first.
FOUND = [2353188020]  # a rank that says hello late took another's windows for those of its next epoch


def main():
    schedules, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 3000, (
        int(sys.argv[2]) if len(sys.argv) > 2 else int.from_bytes(os.urandom(4), "little")
    )
    say._line = lambda level, text: said.append(
        f"{level}: rank {getattr(getattr(world.sim.here, 'actor', None), 'rank', '?')}: {text}"
    )
    print(f"seed {seed}, {schedules} schedules")
    lists, runs, with_placed, began = collections.Counter(), collections.Counter(), collections.Counter(), time.time()
    for i, one in enumerate(FOUND + list(range(seed, seed + schedules))):
        if time.time() - began > 60:
            print(f"stopped after {i} schedules: this machine is slow")
            break
        try:
            trouble, placed = schedule(one)
        except BaseException as e:
            print("\n".join(said[-40:]))
            print(
                f"schedule {one}: trouble {world.trouble} at {world.where} (call {world.call}) of rank "
                f"{world.victim}; {world.size} ranks of {world.mbs}, {world.kind}, "
                f"windows of {world.lists} lists, {world.ahead} ahead: {type(e).__name__}: {e}",
                flush=True,
            )
            if not isinstance(e, AssertionError):
                raise
            os._exit(1)
        runs[trouble] += 1
        lists[trouble] += placed
        with_placed[trouble] += placed > 0
    for trouble in sorted(runs, key=str):
        print(
            f"  {str(trouble):12} {runs[trouble]:5} schedules, "
            f"{with_placed[trouble]:5} of them with lists placed ({lists[trouble]})"
        )
    # Or the test would show nothing.
    enough = runs[None] < 50 or (with_placed[None] > runs[None] // 4 and with_placed["once"] > runs["once"] // 8)
    never = [t for t in ("no adapter", "settings") if lists[t]]
    if not enough or never:
        sys.exit(f"too little was placed, or something where nothing may be: {never}")


if __name__ == "__main__":
    main()
