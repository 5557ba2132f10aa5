#!/usr/bin/env python3
"""Token exchanges of a mixture of experts, timed when told to: one rank of one job of tests/gpu/dedup, which see.

Owns: the rows that are exchanged, as a framework's dispatcher lays them out (sorted by expert, a row for each chosen expert of a
token), what equal rows there are among them by the routing, the exchanges and their comparison with plain NCCL's result. It is told
  go open {"kind": ..., "tokens": ...}   communicators of its own for this row, its buffers, plain NCCL's result; answers with counts
  go WAY REPEATS TOGETHER                exchanges one way: REPEATS, each waited for, then TOGETHER enqueued at once; answers
                                         "right" or "WRONG" (bitwise, against plain NCCL's result), microseconds per exchange of
                                         those enqueued at once, and microseconds of each of the others
Rows of kind "replica" are of twin communicators, of the ranks of one local index each, whose k-th ranks hold the same tokens.
Rows of kind "sum" exchange as training does: a dispatch, then its combine, whose rows are those that came, each times a number of its own.
The microseconds are then combine's; after " | " follow dispatch's, and after another what judge() found. Dispatch is compared
bitwise; combine, which may come summed, as its receiver sees it: after adding up the rows of each token (see judge()).
"""
import ctypes
import json
import math
import os
import sys
import time

import torch
import torch.distributed as dist

import job_rank

POISON = 0xA5
ROUNDING = 2.0 ** -8  # of bf16: a rounding changes a number by at most this part of it


class Row:
    """What this rank sends: `x`, rows to every rank in `ins` (None: equal splits), from every rank in `outs`."""

    def __init__(self, s, rank, world, device, group=None):
        g = torch.Generator(device=device).manual_seed(1000003 * s["seed"] + rank)
        per_rank = s["experts"] // world
        tokens = torch.randn(s["tokens"], s["hidden"], device=device, generator=g).to(torch.bfloat16)
        if s["kind"] == "trace":
            chosen = traced(s, rank).to(device)
        else:
            chosen = torch.rand(s["tokens"], s["experts"], device=device, generator=g).topk(s["topk"], dim=1).indices
        flat = chosen.flatten()
        order = torch.argsort(flat, stable=True)
        self.source, to = order // chosen.shape[1], flat[order] // per_rank  # of every row: its token, the rank that it goes to
        self.ins = self.outs = None
        if s["kind"] == "padded":
            # Every expert has as many places for this rank's rows; those that stay free are rows of zeros.
            places = math.ceil(s["tokens"] * s["topk"] / s["experts"] * s["capacity"])
            counts = torch.bincount(flat, minlength=s["experts"])
            within = torch.arange(len(flat), device=device) - (counts.cumsum(0) - counts)[flat[order]]
            fits = within < places
            slot = flat[order][fits] * places + within[fits]
            source = torch.full((s["experts"] * places,), -1, dtype=torch.long, device=device)
            source[slot] = self.source[fits]
            self.source, to = source, torch.arange(len(source), device=device) // places // per_rank
            x = torch.cat([tokens, tokens.new_zeros(1, s["hidden"])])[source]  # -1: the row of zeros at the end
        else:
            counts = torch.bincount(to, minlength=world)
            table = [torch.empty_like(counts) for _ in range(world)]
            dist.all_gather(table, counts, group=group)
            table = torch.stack(table).tolist()
            self.ins, self.outs = table[rank], [row[rank] for row in table]
            x = tokens[self.source]
        if s["kind"] == "combine":  # the way back: every expert's result is a row of its own
            self.ins, self.outs = self.outs, self.ins
            to = torch.repeat_interleave(torch.arange(world, device=device), torch.tensor(self.ins, device=device))
            self.source = torch.arange(len(to), device=device)
            x = torch.randn(len(to), s["hidden"], device=device, generator=g).to(torch.bfloat16)
        self.x, self.to = x.contiguous(), to
        self.y = torch.empty(sum(self.outs) if self.outs else len(x), s["hidden"], dtype=torch.bfloat16, device=device)
        # One number per row, sent with the same splits, as frameworks send the router's probabilities: this is what tells
        # how wide a row is.
        self.p = torch.rand(len(self.x), device=device, generator=g).to(torch.bfloat16)
        self.q = torch.empty(len(self.y), dtype=torch.bfloat16, device=device)
        self.summed, self.topk = s["kind"] == "sum", s["topk"]
        self.twins = s.get("twins", 1)  # of each message they send a share each
        if self.summed:
            # The way back: as many rows as came. What an expert makes of a row is that row times a number of this row's own;
            # until the first one came, anything that differs.
            self.weight = torch.rand(len(self.y), 1, device=device, generator=g) + 0.5
            self.z = torch.randn(len(self.y), s["hidden"], device=device, generator=g).to(torch.bfloat16)
            self.c = torch.empty_like(self.x)  # row i of it answers row i of x

    def counts(self, rank, world, per_node):
        """For every node (on a single node: every rank): rows, distinct rows, bytes as they are and at best; 0 for the own one."""
        row_bytes, found = self.x.shape[1] * self.x.element_size(), []
        for n in range(world // per_node):
            rows = int((self.to // per_node == n).sum()) if n != rank // per_node else 0
            distinct = int(torch.unique(self.source[self.to // per_node == n]).numel()) if rows else 0
            # What a packed message takes: distinct rows and a number for each row (src/run/rows.h).
            # Of a summed combine, seen from where it goes: a row of zeros more.
            packed = ((distinct + (self.summed and rows > 0)) * row_bytes + 15) // 16 * 16 + 4 * rows
            found.append([rows, distinct, rows * row_bytes, min(rows * row_bytes, packed) if self.twins == 1 else rows * row_bytes / self.twins])
        return found


class Judge:
    """What a combine's receiver makes of its rows, against plain NCCL's rows of the same data.

    It adds up the k rows of each token, in the order in which they lie: in "fp32"; in "bf16", rounding after every addition, as scatter_add_
    does in Megatron's unpermute; and with PyTorch's "index_add" in bf16, which Megatron takes when told to be deterministic.
    right: in fp32 a sum is off by at most ROUNDING x the sum of the rows' absolute values (every node's sum is rounded to bf16 once,
           and together they are no larger than that; 2 % more for fp32's own rounding). In bf16 each of k additions here and k - 1 there
           may round on either side: 2 k - 1 times as much.
    zeros: rows of zeros among those from other nodes, of `expected` if all that could be is summed. None of plain's are.
    far, plain_far: mean distance of the sums from those of plain's rows in fp64, and that of plain's.
    worst: the largest difference from plain's sums, in units of ROUNDING x the sum of absolute values."""

    def __init__(self, row, rows, rank, per_node):
        self.row, self.rows = row, rows.clone()
        self.place = torch.argsort(row.source, stable=True).view(-1, row.topk)  # [token, k]: where its rows lie
        self.remote = row.to // per_node != rank // per_node
        sums = torch.unique((row.to // per_node * len(self.place) + row.source)[self.remote]).numel()
        self.expected = int(self.remote.sum()) - sums
        self.exact, self.scale = self.add(rows.double()), self.add(rows.float().abs()) * ROUNDING
        self.plain = self.all(rows)

    def add(self, rows):
        total = torch.zeros(len(self.place), rows.shape[1], dtype=rows.dtype, device=rows.device)
        for at in self.place.T:
            total += rows[at]
        return total

    def all(self, rows):
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            index_add = torch.zeros(len(self.place), rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, self.row.source, rows)
        finally:
            torch.use_deterministic_algorithms(before)
        return {"fp32": self.add(rows.float()), "bf16": self.add(rows), "index_add": index_add}

    def __call__(self, rows, plain):
        """(right, what was found); of a plain exchange, right only if it is plain's bit for bit."""
        found = {"zeros": int((rows[self.remote] == 0).all(1).sum()), "expected": self.expected, "far": {}, "plain_far": {}, "worst": {}}
        right = not plain or torch.equal(rows.view(torch.int16), self.rows.view(torch.int16))
        for name, got in self.all(rows).items():
            base, got = self.plain[name].double(), got.double()
            off = (got - base).abs() / self.scale.clamp(min=1e-30)
            found["worst"][name] = float(off.max())
            found["far"][name], found["plain_far"][name] = (float((v - self.exact).abs().mean()) for v in (got, base))
            right = right and bool((off <= (1.02 if name == "fp32" else 2.0 * self.row.topk - 1)).all())  # not so where something is no number
        return right, found


def traced(s, rank):
    """Experts that a recorded model chose for this rank's tokens: as many samples as make them, at one layer."""
    import numpy
    with open(os.path.join(s["trace"], "meta.json")) as f:
        meta = json.load(f)
    choices = numpy.load(os.path.join(s["trace"], "choices.npy"), mmap_mode="r")  # [sample][layer][token][k]
    samples = s["tokens"] // meta["tokens_per_sample"]
    at = rank * samples
    if at + samples > len(choices):
        raise SystemExit("dedup_job: %s holds the choices of %d samples, rank %d wants %d to %d" % (s["trace"], len(choices), rank, at, at + samples))
    part = numpy.array(choices[at:at + samples, s["layer"]], dtype=numpy.int64)
    return torch.from_numpy(part.reshape(samples * meta["tokens_per_sample"], meta["topk"]))


def main():
    a, rank, world, per_node, line, device, wait = job_rank.begin(__doc__.splitlines()[0], control=True)
    if world == per_node:
        per_node = 1  # a single node: what is counted is the way between its GPUs
    railyard = None
    if not a.control:
        railyard = ctypes.CDLL(None)
        railyard.railyard_strategy.argtypes = [ctypes.c_char_p]

    def switch(way):
        """All ranks, between the same two exchanges."""
        if railyard:
            railyard.railyard_pause(int(way.startswith("plain")))
            if not way.startswith("plain") and railyard.railyard_strategy(way.encode()):
                raise SystemExit("dedup_job: rank %d: railyard_strategy(\"%s\") refused" % (rank, way))

    groups, number, row, expected, judge = {}, 0, None, None, None

    def exchange(y, x, ins, outs, group):
        if ins is None:
            dist.all_to_all_single(y, x, group=group)
        else:
            dist.all_to_all_single(y, x, outs, ins, group=group)

    def poison():
        row.y.view(torch.uint8).fill_(POISON)
        if row.summed:
            row.c.view(torch.uint8).fill_(POISON)

    def both(group):
        """One step of training: out, and back if this row has a way back."""
        exchange(row.y, row.x, row.ins, row.outs, group)
        if row.summed:
            exchange(row.c, row.z, row.outs, row.ins, group)

    def same():
        return torch.equal(row.y.view(torch.int16), expected.view(torch.int16))  # as integers: all bits count

    def open_row(s):
        nonlocal groups, number, row, expected, judge
        for group in groups.values():
            dist.destroy_process_group(group)
        row = expected = judge = None  # give the memory back before more is taken
        if device.type == "cuda":
            torch.cuda.empty_cache()
        number += 1
        # auto learns from what it sees, so that it has a communicator that nothing is forced on, and plain beside it.
        twins = s["twins"] = per_node if s["kind"] == "replica" else 1  # with one rank of each on every node
        members = [list(range(t, world, twins)) for t in range(twins)]
        made = {name: [dist.new_group(m, group_desc="%s %d" % (name, number)) for m in members] for name in s["groups"]}
        groups = {name: g[rank % twins] for name, g in made.items()}
        row = Row(s, rank // twins, world // twins, device, groups["forced"] if twins > 1 else None)
        for name, group in groups.items():
            switch("auto" if name == "free" else "direct")
            for _ in range(3):
                exchange(row.y, row.x, row.ins, row.outs, group)
                exchange(row.q, row.p, row.ins, row.outs, group)
                if row.summed:
                    exchange(row.c, row.z, row.outs, row.ins, group)
            wait()
        switch("plain")
        poison()
        exchange(row.y, row.x, row.ins, row.outs, groups["forced"])
        wait()
        expected = row.y.clone()
        if row.summed:
            row.z.copy_(row.y.float() * row.weight)
            exchange(row.c, row.z, row.outs, row.ins, groups["forced"])
            wait()
            judge = Judge(row, row.c, rank, per_node)
        for name, group in groups.items():  # the reference itself is what every communicator gives
            poison()
            both(group)
            wait()
            if not same() or (judge and not judge(row.c, True)[0]):
                raise SystemExit("dedup_job: rank %d: plain exchanges differ among themselves" % rank)
        return {"counts": row.counts(rank // twins, world // twins, per_node // twins), "rows": len(row.x), "bytes": (row.z if row.summed else row.x).numel() * row.x.element_size(),
                "bytes_in": (row.c if row.summed else row.y).numel() * row.y.element_size(), "torch": torch.__version__,
                "nccl": ".".join(map(str, torch.cuda.nccl.version())) if a.backend == "nccl" else None,
                "device": torch.cuda.get_device_name() if a.backend == "nccl" else "cpu"}

    line.say("ready")
    while True:
        told = line.told(2)
        if len(told) < 3 or told[0] != "go":
            break
        if told[1] == "open":
            line.say("ready " + json.dumps(open_row(json.loads(told[2])), separators=(",", ":")))
            continue
        way, (repeats, together) = told[1], map(int, told[2].split())
        group = groups["free" if way in ("auto", "plain-auto") else "forced"]
        switch(way)
        poison()
        wait()
        times, out, found = [], [], []

        def check():
            if not row.summed:
                return same()
            right, what = judge(row.c, way.startswith("plain"))
            found.append(what)
            return right and same()
        for _ in range(repeats):
            began = time.perf_counter()
            exchange(row.y, row.x, row.ins, row.outs, group)
            wait()
            if row.summed:
                out.append(time.perf_counter() - began)
                began = time.perf_counter()
                exchange(row.c, row.z, row.outs, row.ins, group)
                wait()
            times.append(time.perf_counter() - began)
        pace = 0.0
        right = not repeats or check()
        if together:
            poison()
            wait()
            began = time.perf_counter()
            for _ in range(together):
                both(group)
            wait()
            pace = (time.perf_counter() - began) / together
            right = check() and right
        line.say("ready %s %.1f %s" % ("right" if right else "WRONG", pace * 1e6, " ".join("%.1f" % (t * 1e6) for t in times)) + (
            " | %s | %s" % (" ".join("%.1f" % (t * 1e6) for t in out), json.dumps(found, separators=(",", ":"))) if row.summed else ""))
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
