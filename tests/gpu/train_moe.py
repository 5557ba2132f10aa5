#!/usr/bin/env python3
"""Train a small mixture-of-experts language model on several ranks, in plain PyTorch.

Owns: one honest MoE training job to try Railyard under. A byte-level decoder whose MoE layers spread their experts over
all ranks and exchange tokens through torch.distributed.all_to_all_single the way Megatron-core does it: expert counts in an
int64 all-gather, then tokens and router probabilities in two exchanges with the same splits, the combine on the way back,
and in backward the mirror of each. Everything else is data parallel. It knows nothing of Railyard; what it counts itself
(bytes from rank to rank, losses, step times) is what Railyard's record is held against.

Started as one rank of many with torchrun's environment (torchrun, or tests/gpu/cluster). LOCAL_DEVICE names the CUDA
device to use; without it LOCAL_RANK does. Text: the Python standard library's own sources, which every machine has.

Writes OUT/train.json (rank 0), OUT/matrix.npy: bytes sent from rank (row) to rank (column) in all exchanges on the
expert-parallel communicator, and OUT/matrix-rank-N.npy on each rank: that row alone, before any communication.
"""
import argparse
import ctypes
import hashlib
import json
import math
import os
import socket
import struct
import sys
import sysconfig
import time

# Before torch makes its first CUDA context or communicator. NCCL picks algorithm and protocol by size and topology: that
# is repeatable too, but pinned the order of additions is also independent of what it measures or of its version's tables.
if "--deterministic" in sys.argv:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

VOCAB = 256


# ----------------------------------------------------------------------------------------------------------- the data

class Text:
    """The standard library's sources, one after the other."""

    def __init__(self, limit):
        root, parts, size = sysconfig.get_path("stdlib"), [], 0
        for folder, subs, names in os.walk(root):
            subs[:] = sorted(s for s in subs if s not in ("site-packages", "dist-packages", "__pycache__", "test", "tests"))
            for name in sorted(names):
                if name.endswith(".py") and size < limit:
                    with open(os.path.join(folder, name), "rb") as f:
                        parts.append(f.read())
                    size += len(parts[-1])
        data = b"\n".join(parts)[:limit]
        if len(data) < 1 << 20:
            raise SystemExit("train_moe: only %d bytes of Python sources under %s" % (len(data), root))
        self.digest = hashlib.sha256(data).hexdigest()
        self.bytes = torch.frombuffer(bytearray(data), dtype=torch.uint8)

        self.train = len(self.bytes) * 15 // 16  # the rest is held out

    def batch(self, generator, batch, seq, device, held_out=False):
        low, high = (self.train, len(self.bytes)) if held_out else (0, self.train)
        at = torch.randint(low, high - seq - 1, (batch, 1), generator=generator)
        window = self.bytes[at + torch.arange(seq + 1)]
        return window.to(device, non_blocking=True).long()


# ------------------------------------------------------------------------------------------------------- the exchange

class Tally:
    """What this rank has sent to each rank, counted where the exchanges are asked for."""

    def __init__(self, group):
        self.group = group
        self.world = dist.get_world_size(group)
        self.bytes = [0] * self.world
        self.exchanges = 0

    def all_to_all(self, x, out_rows, in_rows):
        """all_to_all_single; row counts per rank, or None for equal splits."""
        row = x.element_size() * math.prod(x.shape[1:])
        rows = x.shape[0] if out_rows is None else sum(out_rows)
        y = x.new_empty((rows,) + x.shape[1:])
        if in_rows is None:
            dist.all_to_all_single(y, x.contiguous(), group=self.group)
        else:
            dist.all_to_all_single(y, x.contiguous(), out_rows, in_rows, group=self.group)
        for r in range(self.world):
            self.bytes[r] += row * (x.shape[0] // self.world if in_rows is None else in_rows[r])
        self.exchanges += 1
        return y


class Exchange(torch.autograd.Function):
    """Rows to the ranks they are meant for; their gradients take the same way back."""

    @staticmethod
    def forward(ctx, x, out_rows, in_rows, tally):
        ctx.out_rows, ctx.in_rows, ctx.tally = out_rows, in_rows, tally
        return tally.all_to_all(x, out_rows, in_rows)

    @staticmethod
    def backward(ctx, g):
        return ctx.tally.all_to_all(g, ctx.in_rows, ctx.out_rows), None, None, None


class Take(torch.autograd.Function):
    """Rows of x by index, where each row is taken at most once, and an index of len(x) makes a row of zeros.

    The gradient is then a take as well, by the inverse index: no scattered additions, so nothing whose order could vary.
    """

    @staticmethod
    def forward(ctx, x, index, inverse, padded):
        ctx.save_for_backward(index, inverse)
        ctx.padded = padded
        return Take.rows(x, index, padded)

    @staticmethod
    def rows(x, index, padded):
        if padded:
            x = torch.cat([x, x.new_zeros((1,) + x.shape[1:])])
        return x[index]

    @staticmethod
    def backward(ctx, g):
        _, inverse = ctx.saved_tensors
        return Take.rows(g, inverse, ctx.padded), None, None, None


def permute(x, order):
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return Take.apply(x, order, inverse, False), inverse


# ---------------------------------------------------------------------------------------------------------- the model

def seeded(shape, std, *key):
    """Parameters that depend on what they are (the key) and not on which rank makes them, nor on how many there are."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")
    return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    def __init__(self, hidden, heads, key):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Parameter(seeded((3 * hidden, hidden), hidden ** -0.5, key, "qkv"))
        self.out = nn.Parameter(seeded((hidden, hidden), hidden ** -0.5 / 2, key, "out"))

    def forward(self, x):
        b, s, wide = len(x), x.shape[1], self.out.shape[1] // self.heads
        q, k, v = F.linear(x, self.qkv.to(x.dtype)).view(b, s, 3, self.heads, wide).permute(2, 0, 3, 1, 4)
        # Written out: the fused kernels add up their gradients in no fixed order.
        score = (q @ k.transpose(-1, -2)).float() * wide ** -0.5
        score = score.masked_fill(torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        y = score.softmax(-1).to(x.dtype) @ v
        return F.linear(y.transpose(1, 2).reshape(b, s, -1), self.out.to(x.dtype))


class MoE(nn.Module):
    """Top-k experts, sharded over the ranks of `tally`'s group in contiguous blocks."""

    def __init__(self, a, tally, key):
        super().__init__()
        self.experts, self.k, self.tally = a.experts, a.top_k, tally
        self.world, self.rank = tally.world, dist.get_rank(tally.group)
        self.local = a.experts // self.world
        self.capacity = math.ceil(a.batch * a.seq * a.top_k / a.experts * a.capacity) if a.equal_splits else None
        self.router = nn.Parameter(seeded((a.experts, a.hidden), a.hidden ** -0.5, key, "router"))
        mine = range(self.rank * self.local, (self.rank + 1) * self.local)
        self.up = nn.ParameterList([seeded((a.ffn, a.hidden), a.hidden ** -0.5, key, "up", e) for e in mine])
        self.down = nn.ParameterList([seeded((a.hidden, a.ffn), a.ffn ** -0.5 / 2, key, "down", e) for e in mine])
        self.expert_parameters = list(self.up) + list(self.down)
        self.balance = None  # the auxiliary loss of the last forward pass

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        p = F.linear(x.float(), self.router).softmax(-1)
        top, choice = p.topk(self.k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        counts = torch.bincount(choice.flatten(), minlength=self.experts)
        self.balance = self.experts * (counts.float() / choice.numel() * p.mean(0)).sum()
        rows = x.unsqueeze(1).expand(-1, self.k, -1).reshape(-1, x.shape[-1])
        y = (self.padded if self.capacity else self.dropless)(rows, top.reshape(-1, 1), choice.flatten(), counts)
        return y.view(len(x), self.k, -1).sum(1).view(shape)

    def compute(self, x, w, sizes):
        """The local experts on their rows (`sizes` each), weighted here, so that the combine is a plain sum."""
        outs = [F.linear(F.gelu(F.linear(part, u.to(x.dtype))), d.to(x.dtype))
                for part, u, d in zip(x.split(sizes), self.up, self.down)]
        return torch.cat(outs) * w.to(x.dtype)

    def dropless(self, rows, w, choice, counts):
        order = torch.argsort(choice, stable=True)
        rows, inverse = permute(rows, order)
        w, _ = permute(w, order)
        every = counts.new_empty(self.world * self.experts)
        dist.all_gather_into_tensor(every, counts, group=self.tally.group)
        table = every.view(self.world, self.world, self.local)  # from rank, to rank, local expert there
        mine = table[:, self.rank]
        host = torch.cat([table.sum(2).flatten(), mine.sum(0)]).tolist()  # the splits: the step's one wait for the device
        send = host[self.rank * self.world:(self.rank + 1) * self.world]
        recv = host[self.rank:self.world * self.world:self.world]
        sizes = host[self.world * self.world:]
        rows, w = Exchange.apply(rows, recv, send, self.tally), Exchange.apply(w, recv, send, self.tally)
        # Rows came by source rank, and by expert within each: gather each expert's together.
        owner = torch.arange(self.local, device=rows.device).repeat(self.world)
        owner = owner.repeat_interleave(mine.flatten(), output_size=sum(recv))
        rows, back = permute(rows, torch.argsort(owner, stable=True))
        w = Take.apply(w, torch.argsort(owner, stable=True), back, False)
        y, _ = permute(self.compute(rows, w, sizes), back)
        y = Exchange.apply(y, send, recv, self.tally)
        return permute(y, inverse)[0]

    def padded(self, rows, w, choice, counts):
        # Every expert has `capacity` places for each rank's rows; what does not fit is dropped, free places are zero.
        n, places = len(choice), self.experts * self.capacity
        order = torch.argsort(choice, stable=True)
        position = torch.arange(n, device=rows.device) - (counts.cumsum(0) - counts)[choice[order]]
        place = torch.where(position < self.capacity, choice[order] * self.capacity + position, places)
        source = torch.full((places + 1,), n, device=rows.device)  # place -> row; the last entry takes the dropped ones
        source[place] = order
        source = source[:places]
        target = torch.empty_like(order)  # row -> place
        target[order] = place
        rows, w = Take.apply(rows, source, target, True), Take.apply(w, source, target, True)
        rows, w = Exchange.apply(rows, None, None, self.tally), Exchange.apply(w, None, None, self.tally)

        def by_expert(t, a, b):
            return t.view(a, b, self.capacity, -1).transpose(0, 1).reshape(places, -1)
        y = self.compute(by_expert(rows, self.world, self.local), by_expert(w, self.world, self.local),
                         [self.world * self.capacity] * self.local)
        y = Exchange.apply(by_expert(y, self.local, self.world), None, None, self.tally)
        return Take.apply(y, target, source, True)


class Layer(nn.Module):
    def __init__(self, a, tally, key):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(a.hidden), nn.LayerNorm(a.hidden)
        self.attention, self.moe = Attention(a.hidden, a.heads, key), MoE(a, tally, key)

    def forward(self, x, dtype):
        x = x + self.attention(self.norm1(x).to(dtype)).float()
        return x + self.moe(self.norm2(x).to(dtype)).float()


class Model(nn.Module):
    """The residual stream and the norms in fp32; what goes through matrices and the network in `dtype`."""

    def __init__(self, a, tally, dtype):
        super().__init__()
        self.dtype = dtype
        self.embed = nn.Parameter(seeded((VOCAB, a.hidden), 0.02, a.seed, "embed"))
        self.place = nn.Parameter(seeded((a.seq, a.hidden), 0.02, a.seed, "place"))
        self.layers = nn.ModuleList([Layer(a, tally, (a.seed, i)) for i in range(a.layers)])
        self.norm = nn.LayerNorm(a.hidden)

    def forward(self, tokens):
        x = F.embedding(tokens, self.embed) + self.place
        for layer in self.layers:
            x = layer(x, self.dtype)
        return F.linear(self.norm(x).to(self.dtype), self.embed.to(self.dtype)).float()


# ------------------------------------------------------------------------------------------------------- the training

def reduce_gradients(shared, experts, world):
    """Mean over the ranks. An expert's gradient already holds every rank's tokens: it only needs the division."""
    flat = torch.cat([p.grad.flatten() for p in shared])
    dist.all_reduce(flat)
    flat /= world
    for p, g in zip(shared, flat.split([p.numel() for p in shared])):
        p.grad.copy_(g.view_as(p))
    torch._foreach_div_([p.grad for p in experts], world)


def memory(t):
    t = t.detach().cpu().contiguous()
    return ctypes.string_at(t.data_ptr(), t.numel() * t.element_size())


def gather_bytes(data, device):
    """The same number of bytes from every rank, in order of rank."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    every = mine.new_empty(len(data) * dist.get_world_size())
    dist.all_gather_into_tensor(every, mine)
    every = memory(every)
    return [every[i:i + len(data)] for i in range(0, len(every), len(data))]


def save_npy(path, rows):
    """A matrix of int64 in numpy's format 1.0."""
    head = "{'descr': '<i8', 'fortran_order': False, 'shape': (%d, %d), }" % (len(rows), len(rows[0]))
    head += " " * (-(10 + len(head) + 1) % 64) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode())
        for row in rows:
            f.write(struct.pack("<%dq" % len(row), *row))


class Turns:
    """Taking turns with another job on the same GPUs: somebody at a socket says when, and for how many steps.

    A rank says "ready"; the answer is "go N" (train N steps, then be ready again), "go N paused" (the same while Railyard,
    which must be preloaded, does not look) or "end" (finish: closing the connection says when that is done). All ranks wait on the host, so that nothing of a waiting job runs on a GPU.
    """

    def __init__(self, path, rank):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)  # a path, so that it works across network namespaces
        self.lines = self.socket.makefile("rw")
        self.paused = False
        self.say("rank %d" % rank)

    def say(self, text):
        self.lines.write(text + "\n")
        self.lines.flush()

    def next(self):
        """How many steps to train now; 0 at the end."""
        self.say("ready")
        answer = self.lines.readline().split()
        if not answer:
            raise SystemExit("train_moe: whoever gives the turns is gone")
        paused = "paused" in answer
        if paused != self.paused:
            ctypes.CDLL(None).railyard_pause(paused)  # fails where Railyard is not preloaded
            self.paused = paused
        return int(answer[1]) if answer[0] == "go" else 0


def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--backend", choices=["nccl", "gloo"], default="nccl" if torch.cuda.is_available() else "gloo",
                   help="gloo: on the CPU")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--turns", metavar="SOCKET", help="train only when told so there, and as many steps (tests/gpu/foundation)")
    p.add_argument("--warmup", type=int, default=5, help="steps left out of the median")
    p.add_argument("--eval-batches", type=int, default=2, help="held-out batches after the training")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--ffn", type=int, default=0, help="of one expert (default: 2 x hidden)")
    p.add_argument("--heads", type=int, default=0, help="default: one for each 64 of hidden")
    p.add_argument("--experts", type=int, default=16, help="of all ranks together")
    p.add_argument("--top-k", type=int, default=2)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--batch", type=int, default=8, help="samples per rank and step")
    p.add_argument("--dtype", choices=["bf16", "fp32"], default=None, help="default: bf16 with nccl, fp32 with gloo")
    p.add_argument("--equal-splits", action="store_true", help="pad to capacity: all_to_all_single without splits")
    p.add_argument("--capacity", type=float, default=1.5, help="with --equal-splits: places, as a multiple of the mean")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--text-bytes", type=int, default=8 << 20)
    p.add_argument("--deterministic", action="store_true", help="the same bits every time")
    p.add_argument("--out", metavar="DIR", help="where train.json and the matrices go")
    a = p.parse_args()
    a.ffn, a.heads = a.ffn or 2 * a.hidden, a.heads or max(1, a.hidden // 64)
    a.dtype = a.dtype or ("bf16" if a.backend == "nccl" else "fp32")
    if a.hidden % a.heads or a.top_k > a.experts or a.steps < 1:
        p.error("hidden must be a multiple of heads, top-k at most experts, steps at least 1")
    return a


def main():
    a = options()
    began = time.monotonic()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if a.experts % world:
        raise SystemExit("train_moe: %d experts cannot be dealt evenly to %d ranks" % (a.experts, world))
    if a.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # every byte is written anyway
        torch.backends.cudnn.benchmark = False
    if a.backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_DEVICE", os.environ.get("LOCAL_RANK", "0"))))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    # Expert parallelism has a communicator of its own, as in the frameworks; the world's carries the gradients.
    tally = Tally(dist.new_group(list(range(world)), group_desc="expert-parallel"))
    text = Text(a.text_bytes)
    model = Model(a, tally, torch.bfloat16 if a.dtype == "bf16" else torch.float32).to(device)
    experts = [p for layer in model.layers for p in layer.moe.expert_parameters]
    ids = {id(p) for p in experts}
    shared = [p for p in model.parameters() if id(p) not in ids]
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(a.seed * 1000003 + rank)
    losses, times = [], []
    dist.barrier()
    wait()
    ready = time.monotonic()

    def step():
        began = time.monotonic()
        tokens = text.batch(generator, a.batch, a.seq, device)
        loss = F.cross_entropy(model(tokens[:, :-1]).view(-1, VOCAB), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        (loss + a.balance * sum(layer.moe.balance for layer in model.layers)).backward()
        reduce_gradients(shared, experts, world)
        optimizer.step()
        losses.append(loss.detach())
        wait()
        times.append(time.monotonic() - began)

    turns, blocks = Turns(a.turns, rank) if a.turns else None, []
    while True:
        steps = turns.next() if turns else a.steps * (not blocks)
        if not steps:
            break
        for _ in range(steps):
            step()
        blocks.append(steps)
    trained = time.monotonic()
    # Forward only: dispatches without their mirror, so that sent and received bytes of a pair of ranks differ in the matrix.
    held_out = torch.zeros(1, device=device)
    with torch.no_grad():
        for _ in range(a.eval_batches):
            tokens = text.batch(generator, a.batch, a.seq, device, held_out=True)
            held_out += F.cross_entropy(model(tokens[:, :-1]).view(-1, VOCAB), tokens[:, 1:].reshape(-1)) / a.eval_batches
    losses.append(held_out[0])

    # Afterwards: what every rank saw, brought together.
    if a.out:
        os.makedirs(a.out, exist_ok=True)
        save_npy(os.path.join(a.out, "matrix-rank-%d.npy" % rank), [tally.bytes])
    steps = len(times)
    losses = [struct.unpack("<%df" % (steps + 1), b) for b in gather_bytes(memory(torch.stack(losses)), device)]
    times = [struct.unpack("<%dd" % steps, b) for b in gather_bytes(struct.pack("<%dd" % steps, *times), device)]
    matrix = [struct.unpack("<%dq" % world, b) for b in gather_bytes(struct.pack("<%dq" % world, *tally.bytes), device)]
    weights = hashlib.sha256()
    for p in model.parameters():
        weights.update(memory(p))
    weights = gather_bytes(weights.digest(), device)
    if rank == 0:
        digest = hashlib.sha256()
        for mine, w in zip(losses, weights):
            digest.update(struct.pack("<%df" % len(mine), *mine) + w)
        *mean, held_out = [math.fsum(r[s] for r in losses) / world for s in range(steps + 1)]
        slowest = [max(r[s] for r in times) for s in range(steps)]
        warm = sorted(slowest[min(a.warmup, steps - 1):])
        median = (warm[(len(warm) - 1) // 2] + warm[len(warm) // 2]) / 2
        result = {
            "options": vars(a), "world": world, "nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
            "torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version())) if a.backend == "nccl" else None,
            "device": torch.cuda.get_device_name() if a.backend == "nccl" else "cpu", "text_sha256": text.digest,
            "digest": digest.hexdigest(), "losses": [v.hex() for v in mean], "held_out_loss": held_out.hex(),
            "rank_losses": [[v.hex() for v in r] for r in losses], "weights_sha256": [w.hex() for w in weights],
            "exchanges": tally.exchanges, "bytes": sum(map(sum, matrix)), "matrix": matrix,
            "step_ms": [t * 1e3 for t in slowest], "step_ms_median": median * 1e3,
            "blocks": blocks, "start_s": ready - began, "train_s": trained - ready,
        }
        if a.out:
            save_npy(os.path.join(a.out, "matrix.npy"), matrix)
            with open(os.path.join(a.out, "train.json"), "w") as f:
                json.dump(result, f, indent=1)
        print("train_moe: %d ranks, %s, %d steps: loss %.4f -> %.4f (%s), held out %.4f, step %.2f ms, %d exchanges of %.2f MB, digest %s" % (
            world, result["device"], steps, mean[0], mean[-1], mean[-1].hex(), held_out, median * 1e3, tally.exchanges,
            result["bytes"] / max(1, tally.exchanges) / 1e6, result["digest"][:16]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
