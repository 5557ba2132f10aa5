#!/usr/bin/env python3
"""All-to-alls of any size, skew, share of repeated rows and number of replicas, timed when told to: one rank of one job of tests/gpu/grid, which see.

It is told "go open JSON", "go warm WAY N", or "go turn WAY,WAY... N", and answers "ready ..." with JSON. All ranks change ways between the
same exchanges, as they do everything. Ways on the communicators that are forced: plain (railyard_pause) and strategies' names; on those
of which nothing is ever forced, new ones for every row: auto, and plain-auto beside it.

On the emulated cluster (--emulated) the communicators are the emulated NCCL's, and PyTorch is there for the rows and the ranks' meeting.

Owns: what is sent, and what must arrive. Not: which rows there are, how long a turn is, what figures mean (grid).
"""
import ctypes
import json
import os
import sys
import time

import torch
import torch.distributed as dist

import job_rank
from sweep_job import table

HIDDEN = 1024  # of a row, in bfloat16: 2 KiB; the job is run with RAILYARD_ROW_BYTES=2048
ROW = 2 * HIDDEN


def counts_of(skew, world, per_node, size):
    """Rows from rank to rank; `size` bytes from the rank that sends most."""
    return [[n // ROW for n in row] for row in table(skew, world, per_node, max(size, world * ROW))]


def numbers(counts, source, to, per_node, copies):
    """Which different row each row from `source` to `to` is. Of what goes to a node every one comes `copies` times, spread over its ranks."""
    node = to // per_node
    mine = counts[source][node * per_node:(node + 1) * per_node]
    different = max(1, -(-sum(mine) // copies))
    before = sum(mine[:to - node * per_node])
    return (torch.arange(counts[source][to], dtype=torch.int64) + before) % different + (node << 24)


def rows_of(source, number, device):
    """The rows themselves: whatever differs in source or number differs in about half of all bits."""
    key = (number.to(device) + (source << 32)) * -7046029254386353131  # 0x9E3779B97F4A7C15, wrapping round
    at = torch.arange(ROW // 8, dtype=torch.int64, device=device) * 6364136223846793005 + 1442695040888963407
    x = key.view(-1, 1) ^ at.view(1, -1)
    x = (x ^ (x >> 29)) * 4354685564936845354
    return (x ^ (x >> 32)).view(torch.int16).view(len(number), HIDDEN)


class Exchange:
    """A row of the table: what this rank sends and must get."""

    def __init__(self, spec, rank, world, per_node, device):
        self.counts = counts_of(spec["skew"], world, per_node, spec["size"])
        self.ins, self.outs = self.counts[rank], [row[rank] for row in self.counts]
        copies = round(1 / (1 - spec["dup"]))
        self.x = torch.cat([rows_of(rank, numbers(self.counts, rank, p, per_node, copies), device) for p in range(world)])
        self.expected = torch.cat([rows_of(p, numbers(self.counts, p, rank, per_node, copies), device) for p in range(world)])
        self.y = torch.empty_like(self.expected)
        self.x, self.y = self.x.view(torch.bfloat16), self.y.view(torch.bfloat16)
        crossing = [[sum(row[n * per_node:(n + 1) * per_node]) for n in range(world // per_node)] for row in self.counts]
        self.cross = sum(v for r, row in enumerate(crossing) for n, v in enumerate(row) if n != r // per_node) * ROW

    def right(self):
        return torch.equal(self.y.view(torch.int16), self.expected)


def main():
    a, rank, world, per_node, line, device, wait = job_rank.begin(__doc__.splitlines()[0], control=True, emulated=True)
    railyard, nccl = None if a.control else ctypes.CDLL(None), {}
    if a.emulated:
        sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "live"))
        import emulated_group
    if railyard:
        railyard.railyard_strategy.argtypes = [ctypes.c_char_p]
    forced, free, number, row = {}, None, 0, None

    def switch(way):
        if not railyard:
            return
        railyard.railyard_pause(int(way.startswith("plain")))
        if not way.startswith("plain") and railyard.railyard_strategy(way.encode()):
            raise SystemExit("grid_job: rank %d: railyard_strategy(\"%s\") refused" % (rank, way))

    def groups(twins, name):
        """Of this rank: one of `twins` communicators with one rank of each on every node, or the only one."""
        made = [dist.new_group(list(range(t, world, twins)), group_desc="grid %s" % name) for t in range(twins)]
        mine = made[rank % twins]
        if a.emulated:
            nccl[mine] = emulated_group.Nccl(torch, dist, mine)
        return mine

    def open_row(spec):
        nonlocal free, number, row
        twins = spec["replicas"]
        number += 1
        if free:
            if free in nccl:
                nccl.pop(free).end()
            dist.destroy_process_group(free)
        row = None
        switch("direct")
        if twins not in forced:
            forced[twins] = groups(twins, "forced %d" % twins)
        switch("auto")
        free = groups(twins, "free %d" % number)
        row = Exchange(spec, rank // twins, world // twins, per_node // twins, device)
        return {"bytes": row.x.numel() * 2, "cross": row.cross * twins, "torch": torch.__version__,
                "nccl": ".".join(map(str, torch.cuda.nccl.version())) if a.backend == "nccl" else None,
                "device": torch.cuda.get_device_name() if a.backend == "nccl" else "cpu"}

    def exchange(group):
        dist.all_to_all_single(row.y, row.x, row.outs, row.ins, group=group)

    def turn(way, repeats, twins):
        """Seconds that each of `repeats` exchanges took; one more comes before them, which is not counted: ranks come to it apart."""
        group = free if way in ("auto", "plain-auto") else forced[twins]
        switch(way)
        row.y.view(torch.int16).fill_(-1)
        wait()
        times = []
        for i in range(1 + repeats):
            began = time.perf_counter()
            exchange(group)
            wait()
            if i:
                times.append(time.perf_counter() - began)
        return times, row.right()

    if a.emulated:
        groups(1, "first")  # with the first communicator Railyard's engine comes, which is told of strategies
    line.say("ready")
    twins = 1
    while True:
        told = line.told(2)
        if len(told) < 3 or told[0] != "go":
            break
        if told[1] == "open":
            spec = json.loads(told[2])
            twins = spec["replicas"]
            answer = open_row(spec)
        else:
            ways, repeats = told[2].split()
            answer = {"us": {}, "right": True}
            for way in ways.split(","):
                times, right = turn(way, int(repeats), twins)
                answer["us"][way] = round(sum(times) / len(times) * 1e6, 1)
                answer["right"] &= right
        line.say("ready " + json.dumps(answer, separators=(",", ":")))
    for one in nccl.values():
        one.end()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
