#!/usr/bin/env python3
"""A mixture of experts' exchanges, step by step when told to: one rank of the jobs of tests/gpu/profiler, which see.

It is told "go STEPS" and answers "ready T T ...", each step's microseconds; at the end it writes what it sent to whom, as it counts
itself, to FOLDER/rank-N.json. It knows nothing of Railyard. In a step: counts by int64 all-gather, dispatch and probabilities with
uneven splits, combine the other way round, now and then an exchange of bytes, one with nothing for some, one without splits; an
all-reduce, and a send to the next rank. Every received byte of dispatch is compared in the first step.
"""
import argparse
import json
import os
import random
import time

import torch
import torch.distributed as dist

import job_rank


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--turns", required=True)
    p.add_argument("--folder", required=True)
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--backend", **job_rank.BACKENDS)
    a = p.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    line = job_rank.Line(a.turns)
    device, wait = job_rank.join(a.backend)
    group = dist.new_group(list(range(world)), group_desc="experts")
    sent, count, step = [0] * world, 0, 0
    rows = torch.arange(a.tokens * a.hidden, dtype=torch.float32, device=device).reshape(a.tokens, a.hidden)
    rows = ((rows + rank) % 251).to(torch.bfloat16)
    total = torch.zeros(1 << 16, device=device)

    def exchange(y, x, outs, ins):
        nonlocal count
        if outs is None:
            dist.all_to_all_single(y, x, group=group)
            each = [x.numel() // world * x.element_size()] * world
        else:
            dist.all_to_all_single(y, x, outs, ins, group=group)
            each = [n * x[0].numel() * x.element_size() for n in ins] if len(x) else [0] * world
        for to, n in enumerate(each):
            sent[to] += n
        count += 1

    def splits(number):
        """How many tokens each rank sends to each: skewed, some nothing, the same on every rank."""
        rng = random.Random(number)
        table = []
        for _ in range(world):
            w = [rng.random() ** 2 * (rng.random() > 0.1) for _ in range(world)]
            s = sum(w) or 1.0
            table.append([int(v / s * a.tokens) for v in w])
        return table

    dist.barrier()
    wait()
    line.say("ready")
    while True:
        told = line.told()
        if not told or told[0] != "go":
            break
        times = []
        for _ in range(int(told[1])):
            table = splits(step)
            ins, outs = table[rank], [row[rank] for row in table]
            wait()
            began = time.perf_counter()
            counts = torch.tensor(ins, dtype=torch.int64, device=device)
            everyone = torch.empty(world * world, dtype=torch.int64, device=device)
            dist.all_gather_into_tensor(everyone, counts, group=group) if a.backend == "nccl" else None
            x = rows[: sum(ins)]
            y = torch.empty(sum(outs), a.hidden, dtype=x.dtype, device=device)
            exchange(y, x, outs, ins)
            probs = torch.empty(sum(outs), 1, dtype=torch.float32, device=device)
            exchange(probs, torch.ones(sum(ins), 1, dtype=torch.float32, device=device), outs, ins)
            back = torch.empty_like(x)
            exchange(back, y, ins, outs)
            if step % 4 == 0:
                raw = torch.empty(sum(outs), 16, dtype=torch.uint8, device=device)
                exchange(raw, torch.zeros(sum(ins), 16, dtype=torch.uint8, device=device), outs, ins)
                even = torch.empty(world * 512, dtype=torch.float32, device=device)
                exchange(even, torch.ones(world * 512, dtype=torch.float32, device=device), None, None)
            dist.all_reduce(total, group=group)
            if step % 2 == 0 and world > 1:
                ops = [dist.P2POp(dist.isend, total, (rank + 1) % world, group), dist.P2POp(dist.irecv, torch.empty_like(total), (rank - 1) % world, group)]
                for w in dist.batch_isend_irecv(ops):
                    w.wait()
            wait()
            times.append(time.perf_counter() - began)
            if step == 0 and not torch.equal(back, x):
                raise SystemExit("rank %d: what came back is not what was sent" % rank)
            step += 1
        line.say("ready " + " ".join("%.1f" % (t * 1e6) for t in times))
    with open(os.path.join(a.folder, "rank-%d.json" % rank), "w") as f:
        json.dump({"rank": rank, "sent": sent, "exchanges": count, "steps": step}, f)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
