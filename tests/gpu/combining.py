#!/usr/bin/env python3
"""Samples that move inside combine, on whatever device there is: every row where it is to be, forward and in backward; and what it costs.
Run it as every rank of a cluster, librailyard.so preloaded:

  tests/gpu/cluster --nodes 2 --gpus 2 --preload build/plugin/librailyard.so -- python3 tests/gpu/combining.py
  railyard emu -n 2 -g 2 --preload -- python3 tests/gpu/combining.py --emulated     without GPUs: exchanges over the emulated NCCL

Random routing, random permutations of samples; the framework's part is an all_to_all_single with its splits, told nothing. What must come is worked
out from the routing alone: the r-th row (by expert) of a token that moved stands where the r-th row stood of the token whose place it takes. Rows hold whole numbers
below 251, exact in every type. Nothing but railyard/combining.py and the library is between. With --seconds it then measures: combine as it is, redirected, and its lists.

Owns: the check (one(), which tests/live/combine_test.py uses too) and the figures. Prints them; exits 1 on the first row that is wrong.
"""
import argparse
import os
import statistics
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "plugin", "python"))


def content(torch, numbers, h, dtype, device):
    """A row of h whole numbers for each number."""
    columns = torch.arange(h)
    rows = (numbers[:, None] * 31 + columns * 7) % 251
    for i in range(min(4, h)):
        rows[:, i] = numbers // 251**i % 251
    return rows.to(dtype).to(device)


class Layer:
    """Routing of all ranks and a permutation, the same everywhere; what this rank sends and receives by them."""

    def __init__(self, torch, rank, n, b, s, experts, k, generator):
        from railyard import combining, moving

        self.torch, self.rank, self.n, self.b, self.s, self.experts, self.k = torch, rank, n, b, s, experts, k
        tokens, held = s * b, experts // n
        self.tokens = tokens
        prefer = torch.rand(n, 1, b, experts, generator=generator)  # samples differ
        liking = (torch.rand(n, s, b, experts, generator=generator) + prefer).view(n, tokens, experts)
        chosen = torch.zeros(n, tokens, experts, dtype=torch.bool).scatter_(2, liking.argsort(2)[:, :, :k], True)
        self.by_token = chosen.nonzero()[:, 2].view(n, tokens, k)  # ascending experts
        self.which = chosen.cumsum(2) - 1  # of its token's rows, which is expert e's
        pairs = chosen.transpose(1, 2).nonzero()  # (rank, expert, token), as permute sorts them
        self.got = pairs[pairs[:, 0] == rank]
        self.mine = pairs[pairs[:, 1] // held == rank]
        self.sends = torch.bincount(self.mine[:, 0], minlength=n).tolist()
        self.receives = torch.bincount(self.got[:, 1] // held, minlength=n).tolist()
        now, then = (torch.randperm(n * b, generator=generator).tolist() for _ in range(2))
        at = {sample: slot for slot, sample in enumerate(then)}
        self.to = torch.tensor([at[sample] for sample in now])
        self.every = combining.matrix(chosen.view(n, s, b, experts).sum(1).view(n * b, experts).numpy(), now, then, n, b)
        self.route = moving.route(now, then, rank, b)

    def number(self, pairs):
        return (pairs[:, 0] * self.tokens + pairs[:, 2]) * self.experts + pairs[:, 1]

    def moved(self, pairs, to):
        """The row, of the sample that is where `to` sends this one, with the same number among its token's."""
        slot = to[pairs[:, 0] * self.b + pairs[:, 2] % self.b]
        rank, token = slot // self.b, pairs[:, 2] // self.b * self.b + slot % self.b
        which = self.which[pairs[:, 0], pairs[:, 2], pairs[:, 1]]
        return self.torch.stack([rank, self.by_token[rank, token, which], token], 1)


def exchange(torch, dist, group, x, takes, gives):
    out = x.new_empty(sum(takes), x.shape[1])
    dist.all_to_all_single(out, x.contiguous(), takes, gives, group=group)
    return out


def original(torch, dist, group, layer):
    """The framework's combine, as an autograd function."""

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return exchange(torch, dist, group, x, layer.receives, layer.sends)

        @staticmethod
        def backward(ctx, x):
            return exchange(torch, dist, group, x, layer.sends, layer.receives)

    return Combine.apply


def same(torch, what, got, wanted):
    if not torch.equal(got, wanted):
        row = int((got != wanted).any(1).nonzero()[0])
        raise SystemExit("combining: %s: row %d is %s, not %s" % (what, row, got[row, :6].tolist(), wanted[row, :6].tolist()))


def one(torch, dist, group, combine, layer, h, dtype, device):
    """A layer's combine and its gradient, every row of them. False, on all ranks alike: not all of them can redirect."""
    rows = content(torch, layer.number(layer.mine), h, dtype, device).requires_grad_()
    combine.saw(rows)
    combine.begin()
    if combine.ready(layer.sends, layer.receives, rows):
        raise SystemExit("combining: ready, though no exchange was seen")
    dispatched = content(torch, layer.number(layer.got), h, dtype, device)
    same(torch, "dispatch", exchange(torch, dist, group, dispatched, layer.sends, layer.receives), rows)
    every = [None] * layer.n
    dist.all_gather_object(every, combine.ready(layer.sends, layer.receives, rows), group=group)
    if not all(every):
        return False
    tokens = layer.got[:, 2].to(device)
    way = combine.way(layer.sends, layer.receives, tokens, layer.to.tolist(), layer.every, layer.route)
    out = combine.carry(way, rows, original(torch, dist, group, layer))
    back = torch.empty_like(layer.to)
    back[layer.to] = torch.arange(len(back))
    same(torch, "combine", out, content(torch, layer.number(layer.moved(layer.got, back)), h, dtype, device))
    gradient = content(torch, layer.number(layer.got) + 17, h, dtype, device)
    (came,) = torch.autograd.grad(out, rows, gradient)
    same(torch, "combine's gradient", came, content(torch, layer.number(layer.moved(layer.mine, layer.to)) + 17, h, dtype, device))
    return True


def figures(a, torch, dist, group, combine, layer, h, dtype, device, wait):
    """Medians of interleaved runs."""
    rows = content(torch, layer.number(layer.mine), h, dtype, device)
    tokens, call = layer.got[:, 2].to(device), original(torch, dist, group, layer)
    took = {"as it is": [], "redirected": [], "lists": []}
    ends = time.monotonic() + a.seconds
    while True:
        go = torch.tensor([int(time.monotonic() < ends)], device=device)
        dist.broadcast(go, 0)  # as rank 0 says
        if not int(go):
            break
        for name in took:
            wait()
            dist.barrier()
            began = time.perf_counter()
            if name == "as it is":
                call(rows)
            elif name == "lists":
                way = combine.way(layer.sends, layer.receives, tokens, layer.to.tolist(), layer.every, layer.route)
            else:
                way = combine.way(layer.sends, layer.receives, tokens, layer.to.tolist(), layer.every, layer.route)
                wait()
                dist.barrier()
                began = time.perf_counter()
                combine.carry(way, rows, call)
            wait()
            took[name].append(time.perf_counter() - began)
    size = sum(layer.sends) * h * rows.element_size() / 1e6
    return "%.1f MB a rank: " % size + ", ".join("%s %.0f us" % (name, 1e6 * statistics.median(t)) for name, t in took.items())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--layers", type=int, default=40)
    p.add_argument("--seconds", type=float, default=0, help="measure for so long")
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--experts", type=int, default=32)
    p.add_argument("--top-k", type=int, default=2)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--emulated", action="store_true")
    a = p.parse_args()
    import torch
    import torch.distributed as dist

    import job_rank
    from railyard import combining

    if a.emulated:
        dist.init_process_group("gloo")
        device, wait = torch.device("cpu"), lambda: None
    else:
        device, wait = job_rank.join("nccl")
    n, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(list(range(n)), group_desc="EXPERT_MODEL_PARALLEL_GROUP")
    if a.emulated:
        sys.path.insert(0, os.path.join(HERE, "..", "live"))
        import emulated_group

        emulated_group.Nccl(torch, dist, group)
    generator, sizes, ready = torch.Generator().manual_seed(a.seed), [], 0
    for i in range(a.layers):
        big = i == a.layers - 1
        b, s, h = (a.samples, a.length, a.hidden) if big else (1 + i % 4, 5 + 13 * (i % 7), (16, 40, 1024, 7168)[i % 4])
        dtype = (torch.bfloat16, torch.float32)[i % 2 and not big]
        layer = Layer(torch, rank, n, b, s, a.experts, 1 + i % 6 if not big else a.top_k, generator)
        combine = combining.Combine(group, rank, n, b)
        good = one(torch, dist, group, combine, layer, h, dtype, device)  # the first ones may come before the ranks have met
        if big and not good:
            raise SystemExit("combining: a rank cannot redirect (RAILYARD_LOG=plan says why; it is about RAILYARD_STAGING, as a rule)")
        ready += good
        sizes.append(sum(layer.sends) * h * (2 if dtype == torch.bfloat16 else 4))
    if rank == 0:
        print("combining: %d ranks, %d of %d layers redirected, %.1f MB at most, every row of them and of their gradients right" % (n, ready, a.layers, max(sizes) / 1e6), flush=True)
    if a.seconds:
        text = figures(a, torch, dist, group, combine, layer, h, dtype, device, wait)
        if rank == 0:
            print("combining: " + text, flush=True)
    dist.barrier()
    if not a.emulated:
        dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
