#!/usr/bin/env python3
"""Thousands of random all-to-alls through PyTorch, every received byte compared. Run it as every rank of a cluster.

Owns: the exchanges (sizes from nothing to --max MiB per rank, every type that NCCL and PyTorch share, zero rows and columns, skew up
to all-to-one, split sizes or none, one buffer or a tensor per peer) and the comparison. What rank i sends rank j is a function of
(exchange, i, j, place), so each receiver makes the bytes that must come itself, and torch.equal compares them: the answer
that plain NCCL gives too, which a run without the preload shows. Other traffic is mixed in: all-reduces, all-gathers, point to point.

It knows nothing of Railyard. Prints how many exchanges and bytes it compared; exits 1 on the first that differs.
"""
import argparse
import json
import os
import random
import time

import torch
import torch.distributed as dist

import job_rank

TYPES = ["int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"]
SHAPES = ["uniform", "random", "zipf", "one", "zero-rows", "zero-columns", "sparse", "nothing"]


def bytes_table(rng, world, per_node, shape, total, unit):
    """Bytes from rank (row) to rank (column), multiples of `unit`; about `total` from the busiest rank."""
    if shape == "nothing":
        return [[0] * world for _ in range(world)]
    if shape == "uniform":
        weight = [[1.0] * world for _ in range(world)]
    elif shape == "zipf":
        order = rng.sample(range(world), world)
        weight = [[1.0 / (1 + order[j]) * rng.uniform(0.5, 1) for j in range(world)] for _ in range(world)]
    elif shape == "one":
        target = rng.randrange(world)
        weight = [[float(j == target) for j in range(world)] for _ in range(world)]
    else:
        weight = [[rng.random() for _ in range(world)] for _ in range(world)]
    if shape == "zero-rows":
        for i in rng.sample(range(world), max(1, world // 3)):
            weight[i] = [0.0] * world
    if shape == "zero-columns":
        for j in rng.sample(range(world), max(1, world // 3)):
            for row in weight:
                row[j] = 0.0
    if shape == "sparse":
        weight = [[w if rng.random() < 0.3 else 0.0 for w in row] for row in weight]
    most = max(max(sum(row) for row in weight), max(sum(c) for c in zip(*weight)))
    return [[int(w / most * total) // unit * unit if most else 0 for w in row] for row in weight]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--count", type=int, default=10000)
    p.add_argument("--seconds", type=float, default=0, help="stop after so long, whatever --count says (0: never)")
    p.add_argument("--max", type=float, default=64, help="MiB that the busiest rank sends at most")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--backend", **job_rank.BACKENDS)
    p.add_argument("--json", metavar="FILE")
    a = p.parse_args()
    rank, world, per_node = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    device, _ = job_rank.join(a.backend)
    group = dist.new_group(list(range(world)), group_desc="exchanges")
    control = dist.new_group(list(range(world)), group_desc="control")
    place = torch.arange(int(a.max * 2 ** 20) + 4096, device=device, dtype=torch.int32) * 40503

    def content(x, i, j, n):
        """The n bytes that rank i sends rank j in exchange x."""
        return ((place[:n] + (x * 7919 + i * 104729 + j * 1299709) % 2 ** 30) >> 9).to(torch.uint8)

    def known(name):
        """Whether this PyTorch takes the type for an all-to-all."""
        if not hasattr(torch, name):
            return False
        t = torch.zeros(world, dtype=torch.uint8, device=device).view(torch.uint8)
        size = torch.empty(0, dtype=getattr(torch, name)).element_size()
        t = torch.zeros(world * size, dtype=torch.uint8, device=device).view(getattr(torch, name))
        try:
            dist.all_to_all_single(torch.empty_like(t), t, group=control)
            return True
        except (RuntimeError, TypeError, KeyError, ValueError):
            return False

    types = [t for t in TYPES if known(t)]
    wrong = torch.zeros(1, dtype=torch.int64, device=device)
    seen = {"exchanges": 0, "bytes": 0, "types": {}, "shapes": {}, "lists": 0, "no_splits": 0, "others": 0}
    began = time.monotonic()
    for x in range(a.count):
        rng = random.Random(a.seed * 1000003 + x)
        name, shape = rng.choice(types), rng.choice(SHAPES)
        dtype = getattr(torch, name)
        unit = torch.empty(0, dtype=dtype).element_size()
        # Sizes spread over all powers of two; the largest are rare, since they take most of the time.
        total = int(2 ** rng.uniform(4, 20 + (rng.random() ** 3) * max(0, torch.tensor(a.max).log2().item())))
        table = bytes_table(rng, world, per_node, shape, total, unit)
        ins, outs = table[rank], [table[i][rank] for i in range(world)]
        sends = [content(x, rank, j, n) for j, n in enumerate(ins)]
        expected = [content(x, i, rank, n) for i, n in enumerate(outs)]
        if name == "bool":
            sends, expected = ([t & 1 for t in ts] for ts in (sends, expected))
        way = rng.random()
        if way < 0.2:  # a tensor for each peer, wherever it lies
            y = [torch.full((n,), 0xAA, dtype=torch.uint8, device=device) for n in outs]
            dist.all_to_all([t.view(dtype) for t in y], [t.view(dtype) for t in sends], group=group)
            y = torch.cat(y)
            seen["lists"] += 1
        else:
            send = torch.cat(sends)
            y = torch.full((sum(outs),), 0xAA, dtype=torch.uint8, device=device)
            if shape == "uniform" and way < 0.6:
                dist.all_to_all_single(y.view(dtype), send.view(dtype), group=group)
                seen["no_splits"] += 1
            else:
                dist.all_to_all_single(y.view(dtype), send.view(dtype), [n // unit for n in outs], [n // unit for n in ins], group=group)
        wrong += (y != torch.cat(expected)).any()
        seen["exchanges"] += 1
        seen["bytes"] += sum(map(sum, table))
        seen["types"][name] = seen["types"].get(name, 0) + 1
        seen["shapes"][shape] = seen["shapes"].get(shape, 0) + 1
        if rng.random() < 0.05:
            seen["others"] += 1
            dist.all_reduce(torch.ones(1 + rng.randrange(1000), device=device), group=control)
        if x % 100 == 99:
            # Every rank hears the same, so that all stop together.
            state = torch.cat([wrong, torch.tensor([int(a.seconds and time.monotonic() - began > a.seconds)], device=device)])
            dist.all_reduce(state, group=control, op=dist.ReduceOp.MAX)
            if state[0] > 0:
                raise SystemExit("random_exchanges: rank %d: bytes differ in exchanges %d to %d (seed %d)" % (rank, x - 99, x, a.seed))
            if state[1] > 0:
                break
    dist.all_reduce(wrong, group=control)
    if int(wrong):
        raise SystemExit("random_exchanges: rank %d: bytes differ in the last exchanges (seed %d)" % (rank, a.seed))
    seen["seconds"] = time.monotonic() - began
    if rank == 0:
        print("random_exchanges: %d ranks, %d exchanges, %.2f GB, all bytes as they must be (%d with a tensor per peer, %d without splits; "
              "types %s; %.0f s)" % (world, seen["exchanges"], seen["bytes"] / 1e9, seen["lists"], seen["no_splits"],
                                     " ".join(sorted(seen["types"])), seen["seconds"]), flush=True)
        if a.json:
            with open(a.json, "w") as f:
                json.dump(seen, f, indent=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
