#!/usr/bin/env python3
"""All-to-alls of rows that repeat, for as long as wanted, every received byte compared. Run it as every rank of a cluster.

  tests/gpu/cluster --nodes 2 --gpus 2 --preload build/plugin/librailyard.so --env RAILYARD_STRATEGY=dedup --env RAILYARD_VERIFY=1 \\
      --env RAILYARD_LOG=info --timeout 580 -- python3 tests/gpu/soak.py --minutes 8 --strategies dedup,dedup,auto

Owns: exchanges with what de-duplication feeds on and what could mislead it, and their comparison. Sizes, skew and types vary as in
random_exchanges.py, and the rows are
  tokens    a token's row for each of its experts: repeated within a segment, across the segments of a node, and across nodes
  padded    the same, and most places free: rows of zeros
  few       a handful of rows over and over
  one       the same row everywhere
  near      rows that are equal but for one byte or one bit, anywhere in them; -0 beside +0, NaNs beside NaNs
  distinct  no two alike
of a width that stays for some exchanges and then changes; sometimes the probabilities' exchange tells it, sometimes nothing does,
and sometimes segments are no whole number of rows. What rank i sends rank j is a function of (exchange, i, j, place), so each
receiver makes the bytes that must come itself. --strategies switches between strategies as it goes (railyard_strategy).

Prints how many exchanges, bytes and repeated rows it compared; exits 1 on the first that differs.
"""
import argparse
import ctypes
import json
import os
import random
import time

import torch
import torch.distributed as dist

import job_rank

from random_exchanges import SHAPES, bytes_table

TYPES = ["bfloat16", "bfloat16", "float16", "float32", "float64", "int8", "uint8", "int32", "int64"]
KINDS = ["tokens", "tokens", "tokens", "padded", "padded", "few", "one", "near", "distinct"]
FLIPS = (0, 0x01, 0x80, 0x40)  # of one byte of a `near` row: the last two are signs and exponents of floats
EVERY = 20  # exchanges between looks at the result


def ids(kind, rng, pool, n, first, generator, device):
    """Which row comes at each place of a segment of n rows; -1: zeros. Drawn alike by sender and receiver."""
    if kind == "one":
        return torch.zeros(n, dtype=torch.int64, device=device)
    if kind == "distinct":
        return torch.arange(first, first + n, device=device)
    found = torch.randint(0, pool, (n,), generator=generator)
    if kind == "padded":
        found[torch.rand(n, generator=generator) < 0.6] = -1
    elif kind == "tokens" and rng.random() < 0.5:
        found = found.sort().values  # as a dispatcher lays them out when a rank has one expert
    return found.to(device)


def content(kind, which, width, salt, zero_base, column):
    """The rows `which`, [n, width] bytes."""
    base = which // 4 if kind == "near" else which
    v = (base.to(torch.int32) * -1640531527 + salt).view(-1, 1) ^ (column[:width] * 40503 + 77).view(1, -1)
    v = ((v * 69069 + 1) >> 11).to(torch.uint8)
    if kind == "padded":
        v *= (which >= 0).view(-1, 1)
    if kind == "near":
        if zero_base:
            v.zero_()
        flip = torch.tensor(FLIPS, dtype=torch.uint8, device=v.device)[which % 4].view(-1, 1)
        at = ((which * 7919 + salt) % width).view(-1, 1)
        v.scatter_(1, at, v.gather(1, at) ^ flip)
    return v


def main():
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    p.add_argument("--minutes", type=float, default=8)
    p.add_argument("--count", type=int, default=10 ** 9, help="exchanges at most")
    p.add_argument("--max", type=float, default=48, help="MiB that the busiest rank sends at most")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--strategies", default="", help="of Railyard, to switch between, comma-separated; repeat one to have it more often")
    p.add_argument("--backend", **job_rank.BACKENDS)
    p.add_argument("--json", metavar="FILE")
    a = p.parse_args()
    rank, world, per_node = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    device, _ = job_rank.join(a.backend)
    group = dist.new_group(list(range(world)), group_desc="soak")
    control = dist.new_group(list(range(world)), group_desc="control")
    dist.barrier()
    strategies, railyard = [s for s in a.strategies.split(",") if s], None
    if strategies:
        railyard = ctypes.CDLL(None)  # fails below where Railyard is not preloaded
        railyard.railyard_strategy.argtypes = [ctypes.c_char_p]
    column = torch.arange(1 << 16, device=device, dtype=torch.int32)
    wrong = torch.zeros(1, dtype=torch.int64, device=device)
    seen = {"exchanges": 0, "taught": 0, "bytes": 0, "rows": 0, "repeated": 0, "zero": 0, "kinds": {}, "strategies": {}, "ragged": 0, "lists": 0,
            "no_splits": 0, "others": 0}
    began = last = time.monotonic()
    name = unit = width = None
    for x in range(a.count):
        rng = random.Random(a.seed * 1000003 + x)
        if x % 10 == 0 or rng.random() < 0.05:  # a new width, and perhaps another strategy
            name = rng.choice(TYPES)
            unit = torch.empty(0, dtype=getattr(torch, name)).element_size()
            width = unit * max(1, min((1 << 16) // unit, int(2 ** rng.uniform(0, 13.5)) // rng.choice([1, 1, 8, 64]) * rng.choice([1, 1, 8, 64])))
            if strategies:
                way = rng.choice(strategies)
                if railyard.railyard_strategy(way.encode()):
                    raise SystemExit("soak: railyard_strategy(\"%s\") refused" % way)
                seen["strategies"][way] = seen["strategies"].get(way, 0) + 1
        dtype, kind, shape = getattr(torch, name), rng.choice(KINDS), rng.choice(SHAPES)
        ragged = rng.random() < 0.1
        # Sizes spread over all powers of two; the largest are rare, since they take most of the time.
        total = int(2 ** rng.uniform(8, 20 + (rng.random() ** 3) * max(0.0, torch.tensor(a.max).log2().item())))
        total = min(total, width * 60000)
        table = bytes_table(rng, world, per_node, shape, total, unit if ragged else width)
        rows = [[-(-n // width) for n in row] for row in table]
        pool = {"few": rng.randint(1, 5), "near": 4 * rng.randint(1, 40)}.get(kind, max(1, int(max(map(sum, rows)) / rng.choice([1, 2, 4, 8]))))
        zero_base, sorted_draw = rng.random() < 0.3, rng.random()

        def segment(i, j):
            """What rank i sends rank j: which rows, and their bytes."""
            g = torch.Generator().manual_seed(((a.seed * 1000003 + x) * world + i) * world + j)
            which = ids(kind, random.Random(sorted_draw), pool, rows[i][j], sum(rows[i][:j]), g, device)
            return which, content(kind, which, width, (x * 7919 + i * 104729) % 2 ** 30, zero_base, column).flatten()[:table[i][j]]

        mine = [segment(rank, j) for j in range(world)]
        expected = torch.cat([segment(i, rank)[1] for i in range(world)])
        ins, outs = table[rank], [table[i][rank] for i in range(world)]
        way = rng.random()
        if way < 0.1 and a.backend == "nccl":  # a tensor for each peer, wherever it lies; gloo knows no such thing
            y = [torch.full((n,), 0xAA, dtype=torch.uint8, device=device) for n in outs]
            dist.all_to_all([t.view(dtype) for t in y], [t.clone().view(dtype) for _, t in mine], group=group)
            y = torch.cat(y)
            seen["lists"] += 1
        else:
            send = torch.cat([t for _, t in mine])
            y = torch.full((sum(outs),), 0xAA, dtype=torch.uint8, device=device)
            if shape == "uniform" and way < 0.6:
                dist.all_to_all_single(y.view(dtype), send.view(dtype), group=group)
                seen["no_splits"] += 1
            else:
                dist.all_to_all_single(y.view(dtype), send.view(dtype), [n // unit for n in outs], [n // unit for n in ins], group=group)
        wrong += (y != expected).any()
        seen["exchanges"] += 1
        seen["bytes"] += sum(map(sum, table))
        seen["kinds"][kind] = seen["kinds"].get(kind, 0) + 1
        seen["ragged"] += ragged
        for n in range(world // per_node):  # of this rank, to other nodes: what de-duplication could leave out
            which = torch.cat([mine[j][0] for j in range(n * per_node, (n + 1) * per_node)])
            if n != rank // per_node and len(which):
                seen["rows"] += len(which)
                seen["repeated"] += len(which) - int(torch.unique(which).numel())
                seen["zero"] += int((which < 0).sum())
        if not ragged and rng.random() < 0.5:  # the probabilities: one element per row, with the same splits
            p = torch.cat([torch.full((rows[rank][j] * unit,), (rank * world + j + x) % 251, dtype=torch.uint8, device=device) for j in range(world)])
            q = torch.full((sum(r[rank] for r in rows) * unit,), 0xAA, dtype=torch.uint8, device=device)
            dist.all_to_all_single(q.view(dtype), p.view(dtype), [r[rank] for r in rows], rows[rank], group=group)
            wrong += (q != torch.cat([torch.full((rows[i][rank] * unit,), (i * world + rank + x) % 251, dtype=torch.uint8, device=device)
                                      for i in range(world)])).any()
            seen["taught"] += 1
        if rng.random() < 0.05:
            seen["others"] += 1
            dist.all_reduce(torch.ones(1 + rng.randrange(1000), device=device), group=control)
        if x % EVERY == EVERY - 1:
            # Every rank hears the same, so that all stop together.
            state = torch.cat([wrong, torch.tensor([int(time.monotonic() - began > a.minutes * 60)], device=device)])
            dist.all_reduce(state, group=control, op=dist.ReduceOp.MAX)
            if state[0] > 0:
                raise SystemExit("soak: rank %d: bytes differ%s in exchanges %d to %d (seed %d)" % (
                    rank, "" if int(wrong) else " on another rank", x - EVERY + 1, x, a.seed))
            if rank == 0 and time.monotonic() - last > 30:
                last = time.monotonic()
                print("soak: %.0f s, %d exchanges, %.1f GB, all right" % (last - began, seen["exchanges"], seen["bytes"] / 1e9), flush=True)
            if state[1] > 0:
                break
    dist.all_reduce(wrong, group=control)
    if int(wrong):
        raise SystemExit("soak: bytes differ in the last exchanges (seed %d)" % a.seed)
    seen["seconds"] = time.monotonic() - began
    if rank == 0:
        print("soak: %d ranks, %d exchanges and %d of probabilities, %.2f GB, all bytes as they must be; of rank 0's %d rows to other nodes %.0f %% repeated "
              "others and %.0f %% were zeros; %d exchanges without whole rows, %d with a tensor per peer, %d without splits; kinds %s; strategies %s; %.0f s" % (
                  world, seen["exchanges"], seen["taught"], seen["bytes"] / 1e9, seen["rows"], 100 * seen["repeated"] / max(1, seen["rows"]),
                  100 * seen["zero"] / max(1, seen["rows"]), seen["ragged"], seen["lists"], seen["no_splits"],
                  " ".join("%s %d" % kv for kv in sorted(seen["kinds"].items())),
                  " ".join("%s %d" % kv for kv in sorted(seen["strategies"].items())) or "as set", seen["seconds"]), flush=True)
        if a.json:
            with open(a.json, "w") as f:
                json.dump(seen, f, indent=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
