#!/usr/bin/env python3
"""How fast all-to-alls go on this cluster: what the links give, in-node and cross-node. Run it as every rank of one.

Owns: a check that the virtual cluster is what it says (tests/gpu/cluster --nic RATE). Each pattern is timed and every
received byte compared. "link" is what the busiest node's link carried in one direction: with --nic 25gbit it comes close
to 25 Gbit/s (TCP and Ethernet headers take about 1 % of it) and never above it.
  even     everybody sends the same to everybody
  cross    to ranks of other nodes only
  incast   every other node sends to node 0 only
  in-node  to ranks of the own node only (NVLink or shared memory; no link)
"""
import argparse
import json
import os
import time

import torch
import torch.distributed as dist

import job_rank


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--backend", **job_rank.BACKENDS)
    p.add_argument("--mb", default="0.0625,1,16,64", help="MiB that each rank sends, itself included")
    p.add_argument("--patterns", default="even,cross,incast,in-node")
    p.add_argument("--seconds", type=float, default=0.5, help="roughly, for each measurement")
    p.add_argument("--json", metavar="FILE")
    a = p.parse_args()
    rank, world, per_node = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    device, wait = job_rank.join(a.backend)

    def weight(pattern, i, j):
        same = i // per_node == j // per_node
        return {"even": 1, "cross": not same, "incast": not same and j < per_node, "in-node": same}[pattern]

    def filler(i, j, n):
        """What rank i sends rank j: cheap, and different for every pair and place."""
        return ((torch.arange(n, device=device, dtype=torch.int32) * 40503 + (i * world + j) * 9973) >> 7).to(torch.int16)

    results = []
    for pattern in a.patterns.split(","):
        if world == per_node and pattern in ("cross", "incast"):
            continue
        for mb in map(float, a.mb.split(",")):
            total = int(mb * 2 ** 20) // 2
            table = [[int(weight(pattern, i, j)) for j in range(world)] for i in range(world)]
            table = [[w * total // max(1, sum(row)) for w in row] for row in table]
            ins, outs = table[rank], [table[i][rank] for i in range(world)]
            x = torch.cat([filler(rank, j, n) for j, n in enumerate(ins)])
            y = torch.empty(sum(outs), dtype=torch.int16, device=device)
            expected = torch.cat([filler(i, rank, n) for i, n in enumerate(outs)])

            def once():
                dist.all_to_all_single(y.view(torch.uint8), x.view(torch.uint8), [2 * n for n in outs], [2 * n for n in ins])

            once()
            wait()
            dist.barrier()
            start = time.monotonic()
            for _ in range(3):
                once()
            wait()
            # All ranks must agree on the number of repeats: rank 0's clock decides.
            n = torch.tensor([max(3, min(500, int(a.seconds / ((time.monotonic() - start) / 3))))], device=device)
            dist.broadcast(n, 0)
            n = int(n)
            dist.barrier()
            wait()
            start = time.monotonic()
            for _ in range(n):
                once()
            wait()
            took = torch.tensor([(time.monotonic() - start) / n, float(not torch.equal(y, expected))], dtype=torch.float64,
                                device=device)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            nodes = world // per_node
            sent, received = [0] * nodes, [0] * nodes
            for i in range(world):
                for j in range(world):
                    if i // per_node != j // per_node:
                        sent[i // per_node] += 2 * table[i][j]
                        received[j // per_node] += 2 * table[i][j]
            results.append({"pattern": pattern, "mb": mb, "ms": float(took[0]) * 1e3, "repeats": n,
                            "link_gbit": max(sent + received) * 8 / float(took[0]) / 1e9, "right": not took[1]})
    if rank == 0:
        print("%-8s %10s %10s %12s %s" % ("pattern", "MiB/rank", "ms", "link Gbit/s", "bytes"))
        for r in results:
            print("%-8s %10g %10.3f %12s %s" % (r["pattern"], r["mb"], r["ms"], "%.2f" % r["link_gbit"] if r["link_gbit"] else "-",
                                               "right" if r["right"] else "WRONG"), flush=True)
        if a.json:
            with open(a.json, "w") as f:
                json.dump(results, f, indent=1)
    dist.destroy_process_group()
    if not all(r["right"] for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
