#!/usr/bin/env python3
"""All-to-alls of a size and a shape, timed when told to: one rank of one job of tests/gpu/sweep, which see.

It is told "go WAY,WAY... SHAPE SIZE REPEATS" and answers "ready right T T ...": what each exchange took, way by way, in tenths of
a microsecond. All ranks change ways between the same exchanges, as they do everything.
"""
import ctypes
import random
import time

import torch
import torch.distributed as dist

import job_rank


def table(shape, world, per_node, size):
    """Bytes from rank to rank, `size` from the rank that sends most."""
    if shape == "uniform":
        weight = [[1.0] * world for _ in range(world)]
    elif shape == "back":  # what answers "zipf": popular ranks send most
        weight = [[1.0 / (1 + i) for _ in range(world)] for i in range(world)]
    elif shape == "pairs":  # Zipf over the receivers, in an order of each sender's own
        weight = []
        for i in range(world):
            order = list(range(world))
            random.Random(i).shuffle(order)
            weight.append([1.0 / (1 + order[j]) for j in range(world)])
    else:  # Zipf over the receivers, as experts are popular; the same for every sender
        weight = [[1.0 / (1 + j) for j in range(world)] for _ in range(world)]
    most = max(sum(row) for row in weight)
    return [[int(w / most * size) // 16 * 16 for w in row] for row in weight]


def segment(source, to, size, device):
    """What rank `source` sends to rank `to`: no two rows alike, so that there is nothing to leave out; known at both ends."""
    at = torch.arange((size + 7) // 8, dtype=torch.int64, device=device) + ((source << 12 | to) << 40)
    at = (at * -7046029254386353131) ^ (at << 17)  # 0x9E3779B97F4A7C15 and wrapping round
    at ^= at >> 29
    return at.view(torch.uint8)[:size]


def main():
    a, rank, world, per_node, line, device, wait = job_rank.begin(__doc__)
    railyard, group, number = ctypes.CDLL(None), None, 0
    line.say("ready")
    while True:
        told = line.told()
        if not told or told[0] != "go":
            break
        ways, shape, size, repeats = told[1].split(","), told[2], int(told[3]), int(told[4])
        t = table(shape, world, per_node, size)
        ins, outs = t[rank], [t[i][rank] for i in range(world)]
        x = torch.cat([segment(rank, i, n, device) for i, n in enumerate(ins)])
        y = torch.zeros(sum(outs), dtype=torch.uint8, device=device)
        times = []
        for way in ways:
            if way == "new":  # a communicator of its own, on which nothing has been seen or learned
                if group:
                    dist.destroy_process_group(group)
                number += 1
                group = dist.new_group(list(range(world)), group_desc="sweep %d" % number)
                way = "auto"
            railyard.railyard_pause(way in ("plain", "again"))
            if way not in ("plain", "again"):
                railyard.railyard_strategy(way.encode())
            wait()
            for i in range(1 + repeats):
                began = time.perf_counter()
                dist.all_to_all_single(y, x, outs, ins, group=group)
                wait()
                # The first is not counted: the ranks come to it apart, from cold caches, and from another way.
                if i:
                    times.append(time.perf_counter() - began)
        right = all(torch.equal(got, segment(i, rank, len(got), device)) for i, got in enumerate(y.split(outs)))
        del x, y
        line.say("ready %s %s" % ("right" if right else "WRONG", " ".join("%d" % (s * 1e7) for s in times)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
