#!/usr/bin/env python3
"""Observations: the message, adding up parts, counting on a device, and never waiting for it. One case per run:
observe_test.py CASE."""
import sys

import watch_help as help

help.needs("numpy")
import numpy as np

from railyard import observe
from railyard.observe import Collector, Observer, Seen


def same(a, b, what):
    if (a is None) != (b is None) or (a is not None and not np.array_equal(a, b)):
        raise SystemExit("%s differ:\n%s\n%s" % (what, a, b))


def random_seen(r, n=0, dp=0):
    b, layers, experts, s = r.randint(1, 4), r.randint(0, 5), r.randint(1, 9), r.randint(0, 7)
    high = r.choice([3, 70000])
    g = np.random.default_rng(r.randrange(1 << 30))
    return Seen(n, r.randint(0, 3), dp, b, list(range(0, 2 * layers, 2)), [g.integers(1, 100) for _ in range(layers)],
                g.integers(0, high, (layers, b, experts)).astype(np.int32),
                g.integers(0, high, (layers, b, 2)).astype(np.int32) if r.random() < 0.5 else None,
                g.integers(0, high, (b, s)).astype(np.uint32) if r.random() < 0.7 else None, (0, r.randint(1, 3)), "plain")


def wire():
    r = help.seeded()
    for _ in range(300):
        a = random_seen(r)
        a.positions = [int(p) for p in a.positions]
        m = a.encode()
        b = Seen.decode(m)
        for name in ("n", "chunk", "dp", "b", "layers", "positions", "piece", "deal"):
            assert getattr(a, name) == getattr(b, name), name
        for name in ("counts", "distinct", "tokens"):
            same(getattr(a, name), getattr(b, name), name)
        # Whatever arrives, it is refused by ValueError or read as something whose arrays fit.
        bad = bytearray(m)
        kind = r.randrange(3)
        if kind == 0:
            bad = bad[:r.randrange(len(bad))]
        elif kind == 1:
            bad += b"x" * r.randint(1, 9)
        else:
            bad[r.randrange(min(len(bad), 40))] ^= 1 << r.randrange(8)
        try:
            c = Seen.decode(bytes(bad))
        except ValueError:
            continue
        assert kind == 2 and c.counts.shape[:2] == (len(c.layers), c.b)
    try:
        Seen.decode(a.encode().replace(observe.MAGIC + b"\x01", observe.MAGIC + b"\x02"))
    except ValueError as e:
        assert "version 2" in str(e), e
    else:
        raise SystemExit("another version was read")


def rule():
    """Dense until about DENSE samples of the job, then one of SPARSE; dense from the start where that is less than one
    micro-batch."""
    for dp_size, b in ((1, 1), (8, 4), (64, 1), (4096, 2)):
        dense = -(-observe.DENSE // (dp_size * b))
        for n in range(dense + 100):
            assert observe.watched(n, dp_size, b) == (n < dense or n % observe.SPARSE == 0)


def split(r, total, parts):
    cuts = sorted(r.sample(range(1, total), parts - 1)) if parts > 1 else []
    return [b - a for a, b in zip([0] + cuts, cuts + [total])]


def collect():
    """Whole samples from messages in any order that keeps each rank's, of jobs of random shape, some of them never completed."""
    r = help.seeded()
    g = np.random.default_rng(r.randrange(1 << 30))
    for round_ in range(30):
        dp_size, pieces, tp, stages = r.randint(1, 3), r.randint(1, 3), r.randint(1, 2), r.randint(1, 3)
        layers, experts, places, b = stages * r.randint(1, 3), r.randint(2, 6), 2, r.randint(1, 3)
        zigzag = r.random() < 0.5
        s = 2 * pieces * tp * r.randint(1, 4)
        numbers = None if r.random() < 0.5 else [r.sample(range(experts), experts) for _ in range(layers)]
        knows = r.choice([0.0, 0.8, 1.0, 1.0])  # how many parts have distinct tokens: of a sample all must
        micro = r.randint(1, 5)
        lost = {(dp, n) for dp in range(dp_size) for n in range(micro) if r.random() < 0.2}
        want, queues = {}, {}
        for dp in range(dp_size):
            for n in range(micro):
                tokens = g.integers(0, 1 << 31, (b, s)).astype(np.uint32)
                counts = np.zeros((layers, b, experts), np.int64)
                distinct = np.zeros((layers, b, places), np.int64)
                forgotten, every = False, True
                for stage in range(stages):
                    mine = [l for l in range(layers) if l * stages // layers == stage]
                    for cp in range(pieces):
                        if zigzag:
                            h = s // (2 * pieces)
                            part = np.concatenate([tokens[:, cp * h:(cp + 1) * h], tokens[:, s - (cp + 1) * h:s - cp * h]],
                                                  axis=1)
                        else:
                            part = tokens[:, cp * s // pieces:(cp + 1) * s // pieces]
                        for t in range(tp):
                            c = g.integers(0, 50, (len(mine), b, experts))
                            d = g.integers(0, 50, (len(mine), b, places))
                            counts[mine] += c
                            distinct[mine] += d
                            rank = ((dp * stages + stage) * pieces + cp) * tp + t
                            if (dp, n) in lost and not forgotten:
                                forgotten = True
                                continue
                            d = d if r.random() < knows else None
                            every = every and d is not None
                            queues.setdefault(rank, []).append(Seen(
                                n, 0, dp, b, mine, [s // pieces // tp] * len(mine), c, d,
                                part if stage == 0 and t == 0 else None, (cp, pieces), "zigzag" if zigzag else "plain").encode())
                if (dp, n) not in lost:
                    if numbers is not None:
                        there = np.zeros_like(counts)
                        for l in range(layers):
                            there[l][:, numbers[l]] = counts[l]
                        counts = there
                    want[tokens.tobytes()] = (tokens, counts, distinct if every else None, dp % places)
        now = [0.0]
        board, live, say = help.Board(), help.Live(), help.Say()
        collector = Collector(board, dp_size * stages * pieces * tp, live, layers, experts, places,
                              [d % places for d in range(dp_size)],
                              [[e % places for e in range(experts)]] * layers, numbers, record="somewhere", say=say,
                              clock=lambda: now[0])
        assert board.get("places") == b'{"places":2,"expert_place":[[%s]]}' % b",".join(b"%d" % (e % 2) for e in range(experts))
        sent = {rank: 0 for rank in queues}
        while any(sent[k] < len(queues[k]) for k in queues):
            rank = r.choice([k for k in queues if sent[k] < len(queues[k])])
            board.put("seen/%d/%d" % (rank, sent[rank]), queues[rank][sent[rank]])
            sent[rank] += 1
            if r.random() < 0.3:
                collector.collect()
        collector.collect()
        assert not [k for k in board.keys if k.startswith("seen/")], "keys that were read are there still"
        whole = b"".join
        assert len(live.told) == len(want) * b == collector.samples, (len(live.told), len(want), b)
        for i in range(0, len(live.told), b):
            samples = live.told[i:i + b]
            tokens, counts, distinct, at = want.pop(whole(t[0].tobytes() for t in samples))
            for k in range(b):
                same(samples[k][0], tokens[k], "tokens")
                same(samples[k][1], counts[:, k], "counts")
                same(samples[k][2], None if distinct is None else distinct[:, k], "distinct")
                assert samples[k][3] == at and samples[k][0].dtype == samples[k][1].dtype == np.uint32
        assert not want
        assert live.recording == (("somewhere", s, 0) if live.told else None)
        # What lacks a part is kept a while and then forgotten.
        incomplete = len(collector._partial)
        assert incomplete <= len(lost) and (stages * pieces * tp == 1 or incomplete == len(lost))
        now[0] += observe.PATIENCE + 1
        collector.collect()
        assert not collector._partial and collector.dropped == incomplete and not say.lines, say.lines


def confusion():
    """Messages that contradict each other or the model leave their micro-batch out, in one line; the next one counts."""
    def message(n, b=1, layers=(0,), experts=4, positions=8, s=8, dp=0):
        return Seen(n, 0, dp, b, list(layers), [positions] * len(layers), np.full((len(layers), b, experts), 4), None,
                    np.arange(b * s, dtype=np.uint32).reshape(b, s), (0, 1), "plain").encode()
    board, live, say = help.Board(), help.Live(), help.Say()
    collector = Collector(board, 1, live, 1, 4, 2, [0, 1], [[0, 0, 1, 1]], say=say)
    bad = [b"", message(0)[:-1], message(1, layers=(1,)), message(2, experts=5), message(3, positions=9), message(4, dp=2)]
    for i, m in enumerate(bad + [message(5)]):
        board.put("seen/0/%d" % i, m)
    assert collector.collect() == 1 and len(live.told) == 1 and collector.dropped == len(bad), (collector.dropped, say.lines)
    assert len(say.lines) == 1 and "rank 0" in say.lines[0], say.lines
    assert live.recording is None  # nobody asked for it


def library():
    """To the real library: what was sent is what is recorded and counted. RAILYARD_ENGINE names the engine."""
    import json
    import os
    import shutil
    import tempfile
    from railyard import library as lib
    try:
        lib.setting("RAILYARD_PLACEMENT")
    except lib.Error as e:
        print("skipped: %s" % e)
        sys.exit(77)
    r = help.seeded()
    g = np.random.default_rng(r.randrange(1 << 30))
    layers, experts, places, b, s, dp_size, k, micro = 3, 8, 2, 2, 32, 4, 2, 10
    place_of = [[r.randrange(places) if e > 1 else e for e in range(experts)] for _ in range(layers)]
    work = tempfile.mkdtemp(prefix="railyard-observe")
    live = lib.Live(ranks=dp_size, samples=b, layers=layers, experts=experts, topk=k, places=places, distinct=1,
                    rank_place=[0, 0, 1, 1],
                    expert_place=place_of)
    board, say = help.Board(), help.Say()
    folder = os.path.join(work, "routing")
    collector = Collector(board, dp_size, live, layers, experts, places, [0, 0, 1, 1], place_of, record=folder, say=say)
    want, left = {}, 0
    for dp in range(dp_size):
        for n in range(micro):
            choice = np.argsort(g.random((layers, b, s, experts)), axis=3)[..., :k]
            counts = np.zeros((layers, b, experts), np.int64)
            distinct = np.zeros((layers, b, places), np.int64)
            for l in range(layers):
                for i in range(b):
                    for t in range(s):
                        counts[l, i, choice[l, i, t]] += 1
                        distinct[l, i, sorted({place_of[l][e] for e in choice[l, i, t]})] += 1
            tokens = g.integers(0, 1 << 31, (b, s)).astype(np.uint32)
            tokens[:, 0] = [dp * micro + n, dp * micro + n + 1000]
            for i in range(b):
                want[int(tokens[i, 0])] = (tokens[i], counts[:, i])
                left += int(sum(distinct[l, i, 1 - dp // 2] for l in range(layers)))
            board.put("seen/%d/%d" % (dp, n), Seen(n, 0, dp, b, range(layers), [s] * layers, counts, distinct, tokens).encode())
    assert collector.collect() == dp_size * micro * b and not say.lines, say.lines
    live.flush()
    state = live.state()
    total = sum(int(c.sum()) for _, c in want.values())
    assert state.samples == len(want) and 0 < state.crossed < 1, state
    counts, tokens = np.load(os.path.join(folder, "counts.npy")), np.load(os.path.join(folder, "tokens.npy"))
    with open(os.path.join(folder, "meta.json")) as f:
        assert json.load(f)["samples"] == len(want)
    assert len(counts) == len(tokens) == len(want)
    for c, t in zip(counts, tokens):
        a, b_ = want.pop(int(t[0]))
        same(t, a, "tokens")
        same(c, b_, "counts")
    assert not want and total == dp_size * micro * b * layers * s * k
    # A folder that cannot be recorded into ends the recording alone.
    collector = Collector(help.Board(), 1, live, layers, experts, places, [0, 0, 1, 1], place_of,
                          record=os.path.join(folder, "counts.npy"), say=say)
    collector.board.put("seen/0/0", Seen(0, 0, 0, 1, range(layers), [s] * layers, np.full((layers, 1, experts), 4), None,
                                         np.zeros((1, s), np.uint32)).encode())
    assert collector.collect() == 1 and len(say.lines) == 1 and "not recorded" in say.lines[0], say.lines
    # And so does a sample that the library refuses: more copies than its tokens can have.
    collector.board.put("seen/0/1", Seen(1, 0, 0, 1, range(layers), [s] * layers, np.full((layers, 1, experts), 9 * k), None,
                                         np.zeros((1, s), np.uint32)).encode())
    collector.collect()
    assert len(say.lines) == 2 and "copies" in say.lines[1] and live.state().samples == state.samples + 1, say.lines
    live.close()
    shutil.rmtree(work)


def reference(routing, b, batch_first, expert_place, places):
    """Plainly: [b][experts] and [b][places] of routing[T][experts]."""
    total, experts = routing.shape
    counts, distinct = np.zeros((b, experts), np.int64), np.zeros((b, places), np.int64)
    for t in range(total):
        sample = t // (total // b) if batch_first else t % b
        chosen = [e for e in range(experts) if routing[t, e]]
        for e in chosen:
            counts[sample, e] += 1
        for p in {expert_place[e] for e in chosen}:
            distinct[sample, p] += 1
    return counts, distinct


def device():
    """Observers of a job's ranks on CPU tensors against a plain count, from open() to what the leader tells."""
    help.needs("torch")
    import torch
    r = help.seeded()
    g = torch.Generator().manual_seed(r.randrange(1 << 30))
    for round_ in range(12):
        dp_size, tp, cp, stages = r.randint(1, 2), r.randint(1, 2), r.randint(1, 2), r.randint(1, 2)
        layers, experts, b, places = stages * r.randint(1, 2), r.randint(3, 7), r.randint(1, 3), r.randint(2, 3)
        chunked, as_indices, batch_first = r.random() < 0.3, r.random() < 0.3, r.random() < 0.3
        k, micro = r.randint(1, min(3, experts)), r.randint(2, 4)
        s = 2 * cp * tp * 2 * r.randint(1, 3)
        expert_place = [[r.randrange(places) for _ in range(experts)] for _ in range(layers)]
        board, live, say = help.Board(), help.Live(), help.Say()
        world = dp_size * tp * cp * stages
        collector = Collector(board, world, live, layers, experts, places, [d % places for d in range(dp_size)], expert_place,
                              say=say)
        want = []
        for dp in range(dp_size):
            # All micro-batches' tokens and routing of this index, then each of its ranks in turn.
            tokens = torch.randint(0, 1 << 20, (micro, b, s), generator=g)
            routing = torch.zeros(micro, layers, b, s, experts, dtype=torch.bool)
            routing.scatter_(4, torch.rand(micro, layers, b, s, experts, generator=g).topk(k, dim=4)[1], True)
            for stage in range(stages):
                for c in range(cp):
                    for t in range(tp):
                        rank = ((dp * stages + stage) * cp + c) * tp + t
                        o = Observer(board, rank, dp, dp_size, layers, experts, gives_tokens=stage == 0 and t == 0, piece=(c, cp),
                                     deal="zigzag", say=say)
                        if dp % 2 or places == 3:  # told beforehand; the others learn it while they send
                            o._told = observe.places_of(board.get("places"), layers, experts)
                        h = s // (2 * cp)
                        where = list(range(c * h, (c + 1) * h)) + list(range(s - (c + 1) * h, s - c * h))
                        local = [x for i, x in enumerate(where) if i * tp // len(where) == t]
                        for n in range(micro):
                            o.layer(0, torch.ones(2, experts), b)  # outside of a micro-batch: nothing
                            o.open(tokens[n][:, where] if stage == 0 else None)
                            for l in range(layers):
                                if l * stages // layers != stage:
                                    continue
                                mine = routing[n, l][:, local]  # [b, s, experts]
                                parts = mine.split(len(local) // 2, dim=1) if chunked else [mine]
                                for part in parts:
                                    flat = (part if batch_first else part.transpose(0, 1)).reshape(-1, experts)
                                    if as_indices:
                                        index = flat.to(torch.float).topk(k, dim=1)[1]
                                        extra = torch.full((flat.shape[0], 1), -1)
                                        flat = torch.cat([index, extra], dim=1).t().to(torch.int32)
                                    elif r.random() < 0.5:
                                        flat = flat.to(torch.float)
                                    o.layer(l, flat, b, batch_first)
                            o.close()
                        o.finish()
                        assert o.over is None and o.sent + o.forgone == micro, (o.over, say.lines, o.sent, o.forgone)
            for n in range(micro):
                want.append((dp, tokens[n].numpy(), routing[n].numpy()))
        collector.collect()
        assert not say.lines, say.lines
        told = {t[0].tobytes(): t for t in live.told}
        assert len(told) == len(live.told) == micro * dp_size * b, (len(live.told), micro, dp_size, b)
        exact = 0
        for dp, tokens, routing in want:
            for i in range(b):
                seen = told.pop(tokens[i].astype(np.uint32).tobytes())
                exact += seen[2] is not None
                for l in range(layers):
                    c, d = reference(routing[l][i], 1, False, expert_place[l], places)
                    same(seen[1][l], c[0], "counts")
                    if seen[2] is not None:
                        same(seen[2][l], d[0], "distinct")
                assert seen[3] == dp % places
        assert not told and (exact or places == 2)
        if places == 3:
            assert exact == len(want) * b, exact


def bounded():
    """A board that does not take, a leader that does not read, ever new shapes, an error in forward: nothing piles up, nothing
    raises."""
    help.needs("torch")
    import threading
    import torch

    class Stuck(help.Board):
        def __init__(self):
            super().__init__()
            self.gate = threading.Event()

        def put(self, key, value):
            self.gate.wait(10)
            super().put(key, value)

    def run(o, n, s=4):
        for _ in range(n):
            o.open(torch.zeros(1, s, dtype=torch.int64))
            o.layer(0, torch.ones(s, 2, dtype=torch.bool), 1)
            o.close()

    say = help.Say()
    o = Observer(Stuck(), 0, 0, 1, 1, 2, say=say)
    run(o, 200)
    assert o.forgone >= 200 - observe.SLOTS - 1 - observe.QUEUE and sum(p[1] for p in o._pools.values()) <= observe.SLOTS
    o.board.gate.set()
    o.finish()
    assert o.sent + o.forgone == 200 and not say.lines, (o.sent, o.forgone, say.lines)

    board = help.Board()
    o = Observer(board, 3, 0, 1, 1, 2, say=say)
    while o.sent + o.forgone < observe.UNREAD + 200:
        run(o, 1)
        o.poll()
    o.finish()
    assert board.most <= observe.UNREAD + 1, board.most

    o = Observer(board, 0, 0, 1, 1, 2, say=say)
    for s in range(1, 20):
        run(o, 1, s)
    assert "shapes" in o.over and len(say.lines) == 1, say.lines
    run(o, 3)  # goes on doing nothing

    say, board = help.Say(), help.Board()
    o = Observer(board, 0, 0, 1, 1, 2, say=say)
    o.open(torch.zeros(1, 4, dtype=torch.int64))
    o.layer(0, torch.ones(4, 2, dtype=torch.bool), 1)
    o.close(whole=False)  # the forward pass raised
    o.open(torch.zeros(1, 4, dtype=torch.int64))  # and so did this one, unclosed
    run(o, 1)
    o.finish()
    assert o.sent == 1 and Seen.decode(board.get("seen/0/0")).n == 2

    o = Observer(board, 1, 0, 1, 1, 2, say=say, until=lambda: "placement is off")
    run(o, 3)
    o.finish()
    assert o.over and board.get("seen/1/0") is None

    class Broken(help.Board):
        def put(self, key, value):
            raise RuntimeError("Broken pipe")
    o = Observer(Broken(), 1, 0, 1, 1, 2, say=say)
    run(o, 3)
    o.finish()
    run(o, 3)
    assert o.over and len(say.lines) == 1 and "Broken pipe" in say.lines[0], say.lines

    say = help.Say()
    for routing, b in ((torch.ones(4, 3, dtype=torch.bool), 1), (torch.ones(4, 2, dtype=torch.bool), 3)):  # another model's
        o = Observer(board, 2, 0, 1, 1, 2, say=say)
        o.open(torch.zeros(1, 4, dtype=torch.int64))
        o.layer(0, routing, b)
        o.close()
        o.finish()
        assert o.over and not o.sent
    assert len(say.lines) == 2, say.lines


def guard():
    """On tensors that say they are on a GPU (PyTorch's fake tensors, which refuse whatever would need their values): no
    operation of watching waits, changes devices but by copy_ into the host buffer without blocking, or has a result whose
    shape depends on values."""
    help.needs("torch")
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    allowed = {"aten.sum.IntList_out", "aten.sum.dim_IntList", "aten.add_.Tensor", "aten.mm.default", "aten.gt.Scalar",
               "aten.ne.Scalar",
               "aten.lt.Scalar", "aten.where.ScalarSelf", "aten.where.self", "aten.scalar_tensor.default",
               "aten._to_copy.default", "aten.zeros.default",
               "aten.scatter_.value", "aten.copy_.default", "aten.view.default", "aten.slice.Tensor", "aten.select.int",
               "aten.t.default",
               "aten.detach.default", "aten._unsafe_view.default", "aten.clone.default", "aten.lift_fresh.default",
               "aten.expand.default",
               "prim.device.default", "aten.alias.default"}

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen, self.down = set(), 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = str(func)
            out = func(*args, **kwargs)
            self.seen.add(name)
            if name not in allowed:
                raise AssertionError("%s while watching" % name)
            if name == "aten.copy_.default" and args[0].device != args[1].device:
                assert args[0].device.type == "cpu" and len(args) > 2 and args[2] is True, "a copy that waits"
                assert args[0].dtype == args[1].dtype and args[0].is_contiguous() and \
                    args[1].is_contiguous(), "a copy through a third buffer"
                self.down += 1
            if name == "aten._to_copy.default":
                assert kwargs.get("device") in (None, args[0].device), "moved by _to_copy"
            return out

    class Event:
        def __init__(self):
            self.recorded = 0

        def record(self):
            self.recorded += 1

        def query(self):
            return False

    class Watched(Observer):
        def buffers(self, device, size):
            assert device.type == "cuda"
            return torch.zeros(size, dtype=torch.int32, device=device), torch.zeros(size, dtype=torch.int32), Event()

        def capturing(self, tensor):
            return False

        def stream(self, tensor):
            return 7

        def to_device(self, array, device):
            return torch.zeros(array.shape, dtype=torch.bfloat16, device=device)

    with FakeTensorMode():
        # The guard guards: each of these is what it must catch.
        x = torch.zeros(4, 3, device="cuda")
        for wrong in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.cpu(),
                      lambda: torch.zeros(4, 3).copy_(x)):
            try:
                with Watch():
                    wrong()
            except Exception:
                continue
            raise SystemExit("the guard lets %s pass" % wrong)
        say = help.Say()
        for tokens_on, places in (("cuda", True), ("cpu", False)):
            o = Watched(help.Board(), 0, 0, 2, 3, 8, say=say)
            if places:
                o._told = observe.places_of(observe.places_text(2, [[0, 1] * 4]), 3, 8)
            tokens = torch.zeros(2, 16, dtype=torch.int64, device=tokens_on)
            bools = torch.zeros(32, 8, dtype=torch.bool, device="cuda")
            floats = torch.zeros(32, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            index = torch.zeros(2, 32, dtype=torch.int32, device="cuda")
            with Watch() as w:
                for _ in range(6):
                    o.open(tokens)
                    o.layer(0, bools, 2)
                    o.layer(1, floats, 2, batch_first=True)
                    o.layer(2, index, 2)
                    o.layer(2, index, 2)
                    o.close()
            assert o.over is None and not say.lines, say.lines
            assert w.down == observe.SLOTS and o.forgone == 6 - observe.SLOTS, (w.down,
                                                                                o.forgone)  # events never come: slots run out
            assert all(s.event.recorded == 1 for s in o._flying)
            print("operations: %s" % ", ".join(sorted(w.seen)))


if __name__ == "__main__":
    {f.__name__: f for f in (wire, rule, collect, confusion, library, device, bounded, guard)}[sys.argv[1]]()
    print("%s: as it must be" % sys.argv[1])
