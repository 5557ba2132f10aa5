#!/usr/bin/env python3
"""Token exchanges of a mixture of experts, timed when told to: one rank of one job of tests/gpu/dedup, which see.

Owns: the rows that are exchanged, as a framework's dispatcher lays them out (sorted by expert, a row for each chosen expert of a
token), what equal rows there are among them by the routing, the exchanges and their comparison with plain NCCL's result. It is told
  go open {"kind": ..., "tokens": ...}   communicators of its own for this row, its buffers, plain NCCL's result; answers with counts
  go WAY REPEATS TOGETHER                exchanges one way: REPEATS, each waited for, then TOGETHER enqueued at once; answers
                                         "right" or "WRONG" (bitwise, against plain NCCL's result), microseconds of each, and
                                         microseconds per exchange of those enqueued at once
"""
import argparse
import ctypes
import json
import math
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

POISON = 0xA5


class Row:
    """What this rank sends: `x`, rows to every rank in `ins` (None: equal splits), from every rank in `outs`."""

    def __init__(self, s, rank, world, device):
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
            dist.all_gather(table, counts)
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

    def counts(self, rank, world, per_node):
        """For every node (on a single node: every rank): rows, distinct rows, bytes as they are and at best; 0 for the own one."""
        row_bytes, found = self.x.shape[1] * self.x.element_size(), []
        for n in range(world // per_node):
            rows = int((self.to // per_node == n).sum()) if n != rank // per_node else 0
            distinct = int(torch.unique(self.source[self.to // per_node == n]).numel()) if rows else 0
            # What a packed message takes: distinct rows and a number for each row (src/run/rows.h).
            packed = (distinct * row_bytes + 15) // 16 * 16 + 4 * rows
            found.append([rows, distinct, rows * row_bytes, min(rows * row_bytes, packed)])
        return found


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
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--turns", required=True)
    p.add_argument("--backend", choices=["nccl", "gloo"], default="nccl" if torch.cuda.is_available() else "gloo")
    p.add_argument("--control", action="store_true", help="Railyard is not preloaded: every way is plain")
    a = p.parse_args()
    rank, world, per_node = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world == per_node:
        per_node = 1  # a single node: what is counted is the way between its GPUs
    line = socket.socket(socket.AF_UNIX)
    line.connect(a.turns)
    lines = line.makefile("rw")

    def say(text):
        lines.write(text + "\n")
        lines.flush()

    say("rank %d" % rank)
    if a.backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_DEVICE", os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        wait = torch.cuda.synchronize
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
        wait = lambda: None  # noqa: E731
    dist.barrier()
    wait()
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

    groups, number, row, expected = {}, 0, None, None

    def exchange(y, x, ins, outs, group):
        if ins is None:
            dist.all_to_all_single(y, x, group=group)
        else:
            dist.all_to_all_single(y, x, outs, ins, group=group)

    def poison():
        row.y.view(torch.uint8).fill_(POISON)

    def same():
        return torch.equal(row.y.view(torch.int16), expected.view(torch.int16))  # as integers: all bits count

    def open_row(s):
        nonlocal groups, number, row, expected
        for group in groups.values():
            dist.destroy_process_group(group)
        row = expected = None  # give the memory back before more is taken
        if device.type == "cuda":
            torch.cuda.empty_cache()
        number += 1
        # auto learns from what it sees, so that it has a communicator that nothing is forced on, and plain beside it.
        groups = {name: dist.new_group(list(range(world)), group_desc="%s %d" % (name, number)) for name in s["groups"]}
        row = Row(s, rank, world, device)
        for name, group in groups.items():
            switch("auto" if name == "free" else "direct")
            for _ in range(3):
                exchange(row.y, row.x, row.ins, row.outs, group)
                exchange(row.q, row.p, row.ins, row.outs, group)
            wait()
        switch("plain")
        poison()
        exchange(row.y, row.x, row.ins, row.outs, groups["forced"])
        wait()
        expected = row.y.clone()
        for name, group in groups.items():  # the reference itself is what every communicator gives
            poison()
            exchange(row.y, row.x, row.ins, row.outs, group)
            wait()
            if not same():
                raise SystemExit("dedup_job: rank %d: plain exchanges differ among themselves" % rank)
        return {"counts": row.counts(rank, world, per_node), "rows": len(row.x), "bytes": row.x.numel() * row.x.element_size(),
                "bytes_in": row.y.numel() * row.y.element_size(), "torch": torch.__version__,
                "nccl": ".".join(map(str, torch.cuda.nccl.version())) if a.backend == "nccl" else None,
                "device": torch.cuda.get_device_name() if a.backend == "nccl" else "cpu"}

    say("ready")
    while True:
        told = lines.readline().split(None, 2)
        if len(told) < 3 or told[0] != "go":
            break
        if told[1] == "open":
            say("ready " + json.dumps(open_row(json.loads(told[2])), separators=(",", ":")))
            continue
        way, (repeats, together) = told[1], map(int, told[2].split())
        group = groups["free" if way in ("auto", "plain-auto") else "forced"]
        switch(way)
        poison()
        wait()
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            exchange(row.y, row.x, row.ins, row.outs, group)
            wait()
            times.append(time.perf_counter() - began)
        pace = 0.0
        right = not repeats or same()
        if together:
            poison()
            wait()
            began = time.perf_counter()
            for _ in range(together):
                exchange(row.y, row.x, row.ins, row.outs, group)
            wait()
            pace = (time.perf_counter() - began) / together
            right = right and same()
        say("ready %s %.1f %s" % ("right" if right else "WRONG", pace * 1e6, " ".join("%.1f" % (t * 1e6) for t in times)))
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
