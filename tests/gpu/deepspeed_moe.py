#!/usr/bin/env python3
"""Train a small language model whose mixture of experts is DeepSpeed's MoE layer (PyPI, unmodified), expert parallel over all ranks.

Started as one rank of many with torchrun's environment (tests/gpu/cluster; tests/gpu/frameworks drives it with and without Railyard).
Needs deepspeed and what it imports (tests/gpu/wheels); none of its compiled operations is used. Around the layer it is train_moe.py's
decoder: attention, norms and embedding are data parallel.

--tp N: N neighbouring ranks share each sample. Attention is dealt to them by heads, as Megatron does it; all else of theirs, the MoE layer's
input among it, is the same on each. DeepSpeed is not told (no mpu: told, it lets each of them send a part of the tokens only, whether experts
are tensor-parallel or not), and its expert-parallel groups lie across (use_data_before_expert_parallel_): rank 0, N, 2N, ... and rank 1,
N + 1, ...: twins that send the same bytes. That they do is looked at in every step and left in train.json ("twins").

The layer exchanges equal splits: every expert has as many places for each rank's tokens, and those that stay free are rows of
zeros. No second exchange tells how wide a row is, so Railyard has to be told: RAILYARD_ROW_BYTES = 2 x hidden (4 x with --fp32).
"""
import moe_job  # before torch: what must be set first

import importlib

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import deepspeed
from deepspeed.moe.layer import MoE

from train_moe import Attention, gather_bytes, reduce_gradients, seeded


class Sum(torch.autograd.Function):
    """Forward: the sum over tensor-parallel ranks. Backward: as it is."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, g):
        return g, None


class Spread(torch.autograd.Function):
    """Forward: as it is. Backward: the sum over tensor-parallel ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous()
        dist.all_reduce(g, group=ctx.group)
        return g, None


class HeadsOfMine(Attention):
    """This rank's share of the heads; the outputs are added up over the tensor-parallel ranks."""

    def __init__(self, hidden, heads, key, tp):
        if heads % tp.size:
            raise SystemExit("deepspeed_moe: %d heads cannot be dealt to %d tensor-parallel ranks" % (heads, tp.size))
        super().__init__(hidden, heads, key)
        mine = slice(tp.index * hidden // tp.size, (tp.index + 1) * hidden // tp.size)
        self.heads, self.group = heads // tp.size, tp.group
        self.qkv = nn.Parameter(self.qkv.detach().view(3, hidden, hidden)[:, mine].reshape(-1, hidden).clone())
        self.out = nn.Parameter(self.out.detach()[:, mine].clone())

    def forward(self, x):
        return Sum.apply(super().forward(Spread.apply(x, self.group)), self.group)


class TensorParallel:
    """`size` neighbouring ranks; ranks at the same position of each are data-parallel."""

    def __init__(self, size, rank, world):
        self.size, self.index, self.group, self.across = size, rank % size, None, None
        for first in range(0, world, size):
            ranks = range(first, first + size)
            group = dist.new_group(list(ranks)) if size > 1 else None
            self.group = group if rank in ranks else self.group
        for i in range(size):
            ranks = range(i, world, size)
            group = dist.new_group(list(ranks)) if size > 1 else None
            self.across = group if rank in ranks else self.across


class Expert(nn.Module):
    """Weights in fp32, computed in the dtype of what comes in."""

    def __init__(self, hidden, ffn):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(ffn, hidden)), nn.Parameter(torch.empty(hidden, ffn))

    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.up.to(x.dtype))), self.down.to(x.dtype))


class Layer(nn.Module):
    def __init__(self, a, rank, world, key, tp):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(a.hidden), nn.LayerNorm(a.hidden)
        self.dtype = torch.float32 if a.fp32 else torch.bfloat16
        heads = max(1, a.hidden // 64)
        self.attention = HeadsOfMine(a.hidden, heads, key, tp) if tp.size > 1 else Attention(a.hidden, heads, key)
        rank, world, self.given = rank // tp.size, world // tp.size, None
        self.moe = MoE(a.hidden, Expert(a.hidden, a.ffn), num_experts=a.experts, ep_size=world, k=a.top_k, capacity_factor=a.capacity,
                       eval_capacity_factor=a.capacity, drop_tokens=not a.no_drop, use_rts=False, top2_2nd_expert_sampling=False)
        if not a.engine:  # which does it itself
            self.moe.set_deepspeed_parallelism(use_data_before_expert_parallel_=tp.size > 1)
        # DeepSpeed copies one expert; each shall be its own, whichever rank holds it, and the gate everybody's.
        inner = self.moe.deepspeed_moe
        with torch.no_grad():
            inner.gate.wg.weight.copy_(seeded((a.experts, a.hidden), a.hidden ** -0.5, key, "router"))
            for i, expert in enumerate(inner.experts.deepspeed_experts):
                e = rank * (a.experts // world) + i
                expert.up.copy_(seeded((a.ffn, a.hidden), a.hidden ** -0.5, key, "up", e))
                expert.down.copy_(seeded((a.hidden, a.ffn), a.ffn ** -0.5 / 2, key, "down", e))
        self.experts = list(inner.experts.parameters())

    def forward(self, x):
        x = x + self.attention(self.norm1(x).to(self.dtype)).float()
        self.given = self.norm2(x).to(self.dtype)
        y, balance, _ = self.moe(self.given)
        return x + y.float(), balance


class Model(nn.Module):
    def __init__(self, a, rank, world, tp):
        super().__init__()
        self.embed = nn.Parameter(seeded((moe_job.vocabulary(a), a.hidden), 0.02, a.seed, "embed"))
        self.place = nn.Parameter(seeded((a.seq, a.hidden), 0.02, a.seed, "place"))
        self.layers = nn.ModuleList([Layer(a, rank, world, (a.seed, i), tp) for i in range(a.layers)])
        self.norm, self.dtype = nn.LayerNorm(a.hidden), torch.float32 if a.fp32 else torch.bfloat16

    def forward(self, tokens):
        x, total = F.embedding(tokens, self.embed) + self.place, 0.0
        for layer in self.layers:
            x, balance = layer(x)
            total = total + balance
        return F.linear(self.norm(x).to(self.dtype), self.embed.to(self.dtype)).float(), total


def main():
    p = moe_job.options(__doc__.splitlines()[0], top_k=2)
    p.add_argument("--capacity", type=float, default=2.0, help="DeepSpeed's capacity factor: 2 leaves about half of the places free")
    p.add_argument("--no-drop", action="store_true", help="as much capacity as the fullest expert needs, instead")
    p.add_argument("--engine", action="store_true", help="let DeepSpeed's engine run the model, reduce gradients and step")
    p.add_argument("--tp", type=int, default=1, help="ranks that share each sample")
    a = p.parse_args()
    if a.tp > 1 and a.engine:
        p.error("--tp: DeepSpeed's engine would take all ranks for data-parallel ones")
    rank, world, device = moe_job.begin(a)
    if world % a.tp:
        p.error("--tp %d: of %d ranks" % (a.tp, world))
    dist.init_process_group(**({"backend": "gloo"} if a.cpu else {"backend": "nccl", "device_id": device}))
    if a.cpu:
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # compiled at first use, for minutes; not needed
    deepspeed.init_distributed(dist_backend="gloo" if a.cpu else "nccl")
    tp = TensorParallel(a.tp, rank, world)
    model = Model(a, rank, world, tp).to(device)
    experts = [e for layer in model.layers for e in layer.experts]
    ids = {id(e) for e in experts}
    dealt = [q for layer in model.layers for q in layer.attention.parameters()] if a.tp > 1 else []
    ids.update(map(id, dealt))
    shared = [q for q in model.parameters() if id(q) not in ids]
    unequal = []
    moe_job.load(a, rank, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95))

    if a.engine:
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config={
            "train_micro_batch_size_per_gpu": a.batch, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 0}})[0]

    ended = moe_job.over_nccl(a, model.layers[0].moe.deepspeed_moe.ep_group)  # there by now: the engine's, or the layers' own

    kept = {}

    def step_of_engine(tokens, labels, place):
        logits, balance = engine(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1))
        engine.backward(loss + 0.01 * balance)
        if a.gradients:  # the engine forgets them
            kept.update({n: torch.zeros_like(q) if q.grad is None else q.grad.clone() for n, q in model.named_parameters()})
        engine.step()
        return loss

    def step(tokens, labels, place):
        logits, balance = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.01 * balance).backward()
        for e in experts:
            if e.grad is None:  # no token came
                e.grad = torch.zeros_like(e)
        reduce_gradients(shared, experts, world)
        if a.tp > 1:
            torch._foreach_mul_([e.grad for e in experts], a.tp)  # the world was counted, but this is the mean over those with samples of their own
            for q in dealt:
                dist.all_reduce(q.grad, group=tp.across)
                q.grad /= world // a.tp
            sums = torch.stack([words(layer.given) for layer in model.layers])
            every = [torch.empty_like(sums) for _ in range(a.tp)]
            dist.all_gather(every, sums, group=tp.group)
            unequal.append(torch.stack([(t != sums).any() for t in every]).any())
        optimizer.step()
        return loss

    def words(t):
        """A checksum of all bits, in which every position counts."""
        v = t.detach().contiguous().view(torch.int16).flatten().long()
        return (v * (torch.arange(v.numel(), device=v.device) * 2654435761 % 1000003 + 1)).sum()

    def twins():
        """For train.json: in how many steps the tensor-parallel ranks' MoE layers were given equal bits."""
        if a.tp == 1:
            return {}
        equal = sum(not bool(u) for u in unequal)
        every = gather_bytes(equal.to_bytes(8, "little"), device)
        return {"twins": {"steps": len(unequal), "equal": min(int.from_bytes(b, "little") for b in every)}}

    if rank == 0:
        print("deepspeed_moe: DeepSpeed %s, %d experts over %d ranks" % (deepspeed.__version__, a.experts, world), flush=True)
    def gradients():
        return kept if a.engine else {n: q.grad for n, q in model.named_parameters()}

    moe_job.train("deepspeed_moe", a, rank, world, device, step_of_engine if a.engine else step, model.parameters(), optimizer.param_groups, gradients,
                  data=(rank // a.tp, world // a.tp), more=twins)
    moe_job.save(a, rank, model)
    ended()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
