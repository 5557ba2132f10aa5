"""A framework's training as one rank of a job that may take turns: what megatron_moe.py and deepspeed_moe.py have in common.

Owns: options, the process group, the text (a generator, or PyTorch's DataLoader over domains.py's windows), the loop of steps
(alone or in turns), the learning rate's course, weights left and taken up (by as many ranks or others), and what is left behind in
OUT/train.json: losses of every rank and step, a digest of every rank's weights, step times, peak memory, and, if asked for, the
samples, and gradients beside it. Not: the model, the parallelism, the exchanges: those are the framework's,
unmodified. It knows nothing of Railyard.

Import this before torch: it sets what must be set first for steps that repeat bit by bit.
"""
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("NCCL_ALGO", "Ring")  # the order of additions is then independent of what NCCL measures or picks
os.environ.setdefault("NCCL_PROTO", "Simple")
os.environ.setdefault("TORCHDYNAMO_DISABLE",
                      "1")  # the frameworks' jit fusers; there may be no compiler, and compiling takes long

import argparse
import hashlib
import json
import math
import re
import struct
import sys
import time
import warnings

import torch
import torch.distributed as dist

import domains

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")  # said while the frameworks are imported

from train_moe import VOCAB, Text, Turns, gather_bytes, memory

EXPERT = re.compile(r"(.*(?:local_experts|deepspeed_experts)\.)(\d+)(\..*)")  # a parameter of a rank's n-th expert


def options(what, **defaults):
    """The common options; `defaults` are the framework's. The caller adds its own and parses."""
    p = argparse.ArgumentParser(description=what)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--turns", metavar="SOCKET", help="train only when told so there, and as many steps (tests/gpu/frameworks)")
    p.add_argument("--layers", type=int, default=defaults.get("layers", 2))
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--ffn", type=int, default=512, help="of one expert")
    p.add_argument("--experts", type=int, default=64, help="of all ranks together")
    p.add_argument("--top-k", type=int, default=defaults.get("top_k", 8))
    p.add_argument("--seq", type=int, default=1024)
    p.add_argument("--batch", type=int, default=4, help="samples per rank and step")
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--lr-warmup", type=int, default=0, metavar="STEPS", help="the rate rises to --lr in so many steps")
    p.add_argument("--lr-decay", type=int, default=0, metavar="STEPS", help="and falls to a tenth of it by then, as a cosine (0: it stays)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--warmup", type=int, default=5, help="steps left out of the median")
    p.add_argument("--text-bytes", type=int, default=8 << 20)
    p.add_argument("--loader", metavar="DIR",
                   help="text that tests/gpu/domains.py found, through PyTorch's DataLoader and DistributedSampler")
    p.add_argument("--workers", type=int, default=0, help="of the DataLoader")
    p.add_argument("--show-samples", action="store_true",
                   help="with --loader: say which samples each rank had, and leave them in train.json")
    p.add_argument("--reorder", type=int, metavar="SEED",
                   help="with --loader: the same samples in every step of all ranks, dealt to ranks and slots in another order")
    p.add_argument("--gradients", type=int, default=0, metavar="N", help="leave each rank's gradients of the last N steps in OUT")
    p.add_argument("--release", action="store_true", help="after a turn, give memory back that the next one will want: for many jobs on a GPU")
    p.add_argument("--fp32", action="store_true", help="instead of bf16")
    p.add_argument("--cpu", action="store_true", help="on CPUs over gloo, to try the drivers out: nothing is measured")
    p.add_argument("--emulated", action="store_true", help="the same, as a rank of `railyard emu`: the expert-parallel group's all-to-alls go "
                   "over the emulated NCCL")
    p.add_argument("--out", metavar="DIR", help="where train.json goes")
    p.add_argument("--load", metavar="DIR", help="weights that an equal job left there, of as many ranks or others")
    p.add_argument("--save", metavar="DIR", help="leave the weights there, each rank its own")
    return p


def load(a, rank, model):
    """Before the first step; the optimizer renews its copies itself."""
    if a.load:
        model.load_state_dict(weights(a.load, rank, int(os.environ["WORLD_SIZE"])))


def weights(folder, rank, world):
    """What rank `rank` of `world` loads of weights that any number of ranks saved: experts lie rank by rank, all else is everybody's."""
    files, kept = len([n for n in os.listdir(folder) if re.fullmatch(r"rank\d+\.pt", n)]), {}

    def saved(r):
        if r not in kept:
            kept[r] = torch.load(os.path.join(folder, "rank%d.pt" % r), map_location="cpu")
        return kept[r]

    if files == world:
        return saved(rank)
    found, local = {}, 1 + max(int(m.group(2)) for m in map(EXPERT.fullmatch, saved(0)) if m)
    for name, value in saved(0).items():
        m = EXPERT.fullmatch(name)
        if not m:
            found[name] = value
        elif m.group(2) == "0":
            for i in range(local * files // world):
                e = rank * (local * files // world) + i
                found[m.group(1) + str(i) + m.group(3)] = saved(e // local)[m.group(1) + str(e % local) + m.group(3)]
    return found


def save(a, rank, model):
    if a.save:
        os.makedirs(a.save, exist_ok=True)
        torch.save(model.state_dict(), os.path.join(a.save, "rank%d.pt" % rank))


def rate(a, step):
    """The learning rate of step `step`, from 0."""
    lr = a.lr * min(1.0, (step + 1) / a.lr_warmup) if a.lr_warmup else a.lr
    return lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / a.lr_decay))) if a.lr_decay else lr


def vocabulary(a):
    return domains.Windows(a.loader, a.seq).vocabulary if a.loader else VOCAB


def begin(a):
    """The process group and the device: (rank, world, device)."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    a.cpu = a.cpu or a.emulated
    if a.experts % world:
        raise SystemExit("moe_job: %d experts cannot be dealt evenly to %d ranks" % (a.experts, world))
    if a.cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's
        device = torch.device("cpu")
        torch.set_num_threads(1)
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_DEVICE", os.environ.get("LOCAL_RANK", "0"))))
        torch.cuda.set_device(device)
    # Only warned about: a kernel that knows no fixed order need not be one of these jobs', and the losses show whether it was.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every byte is written anyway
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(a.seed)
    return rank, world, device


def train(name, a, rank, world, device, step, parameters, groups=(), gradients=None, data=None, more=dict):
    """`step(tokens, labels, place)` trains on one batch and returns its loss (a tensor of one element). `groups`: the optimizer's,
    whose rates are set; gradients(): {parameter's name: its gradient} after a step; data: (index, size) among those with samples of their own
    (all ranks); more(): what else goes into train.json, called on all ranks."""
    own, owners = data or (rank, world)
    samples, wait = [], torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if a.loader:
        dataset, batches = domains.batches(a.loader, a.seq, a.batch, own, owners, a.seed, a.workers, a.reorder)
    else:
        text = Text(a.text_bytes)
        generator = torch.Generator().manual_seed(a.seed * 1000003 + own)

    def batch():
        if not a.loader:
            tokens = text.batch(generator, a.batch, a.seq, device)
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        drawn = next(batches)
        if a.show_samples:
            samples.append(drawn["sample"].tolist())
            print("%s: rank %d step %d samples %s (%s)" % (name, rank, len(samples), " ".join(map(str, samples[-1])),
                                                           " ".join(map(dataset.domain, samples[-1]))), flush=True)
        return drawn["tokens"].to(device, non_blocking=True), drawn["labels"].to(device, non_blocking=True)

    place = torch.arange(a.seq, device=device).unsqueeze(0).expand(a.batch, -1).contiguous()
    losses, times, blocks = [], [], []
    dist.barrier(**({"device_ids": [device.index]} if device.type == "cuda" else {}))
    wait()
    turns = Turns(a.turns, rank) if a.turns else None
    while True:
        steps = turns.next() if turns else a.steps * (not blocks)
        if not steps:
            break
        for _ in range(steps):
            for group in groups:
                group["lr"] = rate(a, len(times))
            began = time.monotonic()
            loss = step(*batch(), place)
            losses.append(loss.detach().float().reshape(1).clone())
            wait()
            times.append(time.monotonic() - began)
            if a.gradients and len(times) > a.steps - a.gradients:
                os.makedirs(a.out, exist_ok=True)
                torch.save({n: g.detach().cpu() for n, g in gradients().items()},
                           os.path.join(a.out, "gradients-step%d-rank%d.pt" % (len(times) - 1, rank)))
            if rank == 0 and not turns:
                print("%s: step %d loss %.5f (%s) %.1f ms" %
                      (name, len(times), float(losses[-1]), float(losses[-1]).hex(), times[-1] * 1e3), flush=True)
        blocks.append(steps)
        if a.release and device.type == "cuda":
            torch.cuda.empty_cache()

    # Afterwards: what every rank saw, brought together.
    steps = len(times)
    losses = [struct.unpack("<%df" % steps, b) for b in gather_bytes(memory(torch.cat(losses)), device)]
    times = [struct.unpack("<%dd" % steps, b) for b in gather_bytes(struct.pack("<%dd" % steps, *times), device)]
    digest = hashlib.sha256()
    for p in parameters:
        digest.update(memory(p))
    digests = gather_bytes(digest.digest(), device)
    peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if device.type == "cuda" else [0, 0]
    peaks = [struct.unpack("<2q", b) for b in gather_bytes(struct.pack("<2q", *peaks), device)]
    if a.show_samples and a.loader:
        form = "<%dq" % (steps * a.batch)
        flat = [struct.unpack(form, b) for b in gather_bytes(struct.pack(form, *sum(samples, [])), device)]
        samples = [[list(r[s * a.batch:(s + 1) * a.batch]) for s in range(steps)] for r in flat]  # [rank][step][sample]
    others = more()
    if rank == 0:
        mean = [math.fsum(r[s] for r in losses) / world for s in range(steps)]
        slowest = [max(r[s] for r in times) for s in range(steps)]
        warm = sorted(slowest[min(a.warmup, steps - 1):])
        median = (warm[(len(warm) - 1) // 2] + warm[len(warm) // 2]) / 2
        result = {"options": vars(a), "world": world, "nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
                  "torch": torch.__version__,
                  "nccl": ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else "none",
                  "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
                  "losses": [v.hex() for v in mean], "rank_losses": [[v.hex() for v in r] for r in losses],
                  "weights_sha256": [w.hex() for w in digests], "step_ms": [t * 1e3 for t in slowest], "blocks": blocks,
                  # The most that any rank's tensors took, and what PyTorch held for them.
                  "peak_gib": [max(p[k] for p in peaks) / 2**30 for k in (0, 1)]}
        result.update(others)
        if a.show_samples and a.loader:
            result["samples"] = samples
        if a.out:
            os.makedirs(a.out, exist_ok=True)
            with open(os.path.join(a.out, "train.json"), "w") as f:
                json.dump(result, f, indent=1)
        print("%s: %d ranks, %s, %d steps: loss %.4f -> %.4f (%s), step %.2f ms" % (
            name, world, result["device"], steps, mean[0], mean[-1], mean[-1].hex(), median * 1e3), flush=True)


LIVE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "live")


def on_cpu():
    """Megatron-core, which has no CPU mode, as the live tests run it on CPUs."""
    sys.path.insert(0, LIVE)
    import megatron_cpu
    megatron_cpu.on_cpu()


def over_nccl(a, group):
    """With --emulated, the group's all-to-alls go over the emulated NCCL; what ends that, when training is over."""
    if not a.emulated:
        return lambda: None
    sys.path.insert(0, LIVE)
    import emulated_group
    return emulated_group.Nccl(torch, dist, group).end


__all__ = ["VOCAB", "begin", "load", "on_cpu", "over_nccl", "options", "save", "train", "vocabulary", "weights"]
