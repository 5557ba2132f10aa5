"""Scenarios of experts_test.py with experts that are not Megatron-core's SequentialMLP, and with DeepSpeed.

TEGroupedMLP and GroupedMLP need a GPU to be made: modules of ours have their parameters' names and layouts, and compute what they
compute in plain torch. DeepSpeed's MoE layers are its own, on CPUs.
"""
import os
import types

from megatron_cpu import Place, Rank, check, close, experts


def run_layouts(self: Rank):
    """TEGroupedMLP's and GroupedMLP's layouts, plain torch Adam, a training loop without schedules: everything is where it must be."""
    from railyard import megatron_experts

    torch = self.torch
    each, hidden, ffn = self.EXPERTS // self.parallel["ep"], 16, 24
    position = self.dist.get_rank(self.group)
    config = types.SimpleNamespace(
        num_moe_experts=self.EXPERTS,
        num_layers=2,
        moe_layer_freq=1,
        expert_model_parallel_size=self.parallel["ep"],
        pipeline_model_parallel_size=1,
    )

    class TEGroupedMLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear_fc1, self.linear_fc2 = torch.nn.Module(), torch.nn.Module()
            for i in range(each):
                self.linear_fc1.register_parameter(f"weight{i}", torch.nn.Parameter(torch.empty(ffn, hidden)))
                self.linear_fc1.register_parameter(f"bias{i}", torch.nn.Parameter(torch.empty(ffn)))
                self.linear_fc2.register_parameter(f"weight{i}", torch.nn.Parameter(torch.empty(hidden, ffn)))

        def expert(self, i):
            return [
                getattr(self.linear_fc1, f"weight{i}"),
                getattr(self.linear_fc1, f"bias{i}"),
                getattr(self.linear_fc2, f"weight{i}"),
            ]

        def compute(self, i, x):
            w1, b1, w2 = self.expert(i)
            return torch.relu(x @ w1.t() + b1) @ w2.t()

    class GroupedMLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight1 = torch.nn.Parameter(torch.empty(hidden, each * ffn))
            self.weight2 = torch.nn.Parameter(torch.empty(each * ffn, hidden))

        def expert(self, i):  # as GroupedMLP.forward cuts them
            return [self.weight1.view(each, hidden, -1)[i], self.weight2.view(each, -1, hidden)[i]]

        def compute(self, i, x):
            w1, w2 = self.expert(i)
            return torch.relu(x @ w1) @ w2

    class BaseMoELayer(torch.nn.Module):
        def __init__(self, number, group, kind):
            super().__init__()
            self.layer_number, self.ep_group, self.num_local_experts, self.config = number, group, each, config
            self.experts, self.router = kind(), torch.nn.Module()
            self.router.weight = torch.nn.Parameter(
                torch.randn(config.num_moe_experts, hidden, generator=torch.Generator().manual_seed(number))
            )
            for i in range(each):
                generator = torch.Generator().manual_seed(number * 100 + position * each + i)
                for t in self.experts.expert(i):
                    t.data.copy_(torch.randn(t.shape, generator=generator) * 0.2)

    def forward(layer, x):
        """A mixture of experts in plain torch: every rank's tokens go to all ranks, each adds what its experts make of them."""
        probs = torch.softmax(x @ layer.router.weight.t(), dim=-1)
        weight, chosen = probs.topk(2, dim=-1)
        gates = torch.zeros_like(probs).scatter(1, chosen, weight)
        from torch.distributed.nn.functional import all_gather, reduce_scatter

        tokens, all_gates = torch.cat(all_gather(x, group=self.group)), torch.cat(all_gather(gates, group=self.group))
        out = sum(
            layer.experts.compute(i, tokens) * all_gates[:, position * each + i : position * each + i + 1] for i in range(each)
        )
        parts = torch.distributed.nn.functional.all_reduce(out, group=self.group)
        check(reduce_scatter is not None, "")
        return x + parts[position * len(x) : (position + 1) * len(x)]

    class Model(torch.nn.Module):
        def __init__(self, group, kind):
            super().__init__()
            self.config = config
            self.one, self.two = BaseMoELayer(1, group, kind), BaseMoELayer(2, group, kind)

        def forward(self, x):
            return forward(self.two, forward(self.one, x))

    gpt = types.SimpleNamespace(GPTModel=Model)
    megatron_experts.watch_model(gpt)
    for kind in (TEGroupedMLP, GroupedMLP):

        def train(steps, order_at=None, order=None):
            mover = self.scenario(order, path="")
            model = Model(self.group, kind)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            losses = []
            for step in range(steps):
                if step == order_at:
                    mover = self.scenario(order)
                x = torch.randn(10, hidden, generator=torch.Generator().manual_seed(step * 10 + self.rank))
                optimizer.zero_grad()
                loss = (model(x) - x.roll(1, 1)).square().mean()
                loss.backward()
                for layer in (model.one, model.two):
                    self.dist.all_reduce(layer.router.weight.grad)
                optimizer.step()
                losses.append(float(loss))
            return losses, mover, model, optimizer

        order = self.some_order(8, 2)
        plain, _, _, _ = train(8)
        moved, mover, model, optimizer = train(8, 3, order)
        check(mover.order == order and mover.sent > 0, "nothing was moved")
        close(plain, moved, 1e-4)
        check(plain[-1] < plain[0], "nothing is learned")
        weights = [[t.detach().clone() for i in range(each) for t in layer.experts.expert(i)] for layer in (model.one, model.two)]
        states = [v.clone() for p in model.parameters() for v in optimizer.state[p].values()]
        swap = [[1, 0, 3, 2, 7, 6, 5, 4], [7, 6, 5, 4, 3, 2, 1, 0]]  # an involution, applied twice
        for again in (False, True):
            self.scenario(swap)
            optimizer.zero_grad()
            model(torch.zeros(4, hidden))
            now = [[t.detach().clone() for i in range(each) for t in layer.experts.expert(i)] for layer in (model.one, model.two)]
            same = all(torch.equal(a, b) for x, y in zip(weights, now) for a, b in zip(x, y))
            check(same == again, f"twice the same swap: {same}")
        check(
            all(torch.equal(a, b) for a, b in zip(states, [v for p in model.parameters() for v in optimizer.state[p].values()])),
            "states",
        )
        self.say(
            f"{kind.__name__}: losses {plain[0]:.4f} to {plain[-1]:.4f}, differ by at most {max(abs(a - b) for a, b in zip(plain, moved)):.1e}"
        )
    size, experts.STAGING = experts.STAGING, 4096  # pieces
    try:
        staging = experts.exchange.__defaults__
        experts.exchange.__defaults__ = (1 << 10,)
        close(train(8)[0], train(8, 3, order)[0], 1e-4)
    finally:
        experts.STAGING, experts.exchange.__defaults__ = size, staging


def run_deepspeed(self: Place):
    """DeepSpeed's MoE layers: fp32 without ZeRO amid training, ZeRO-1 and bf16 while fresh, refused later; saved, loaded, not moved twice."""
    torch, dist = self.torch, self.dist
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    hidden, number, layers = 16, 8, 2

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moes = torch.nn.ModuleList(
                MoE(
                    hidden,
                    torch.nn.Sequential(torch.nn.Linear(hidden, 24), torch.nn.ReLU(), torch.nn.Linear(24, hidden)),
                    num_experts=number,
                    ep_size=self_world,
                    k=2,
                    drop_tokens=False,
                    use_rts=False,
                    top2_2nd_expert_sampling=False,
                )
                for _ in range(layers)
            )

        def forward(self, x):
            y = x
            for moe in self.moes:
                y = y + moe(y)[0]
            return (y - x.roll(1, 1)).float().square().mean()

    self_world = self.world

    def engine(stage=0, bf16=False):
        torch.manual_seed(3)
        model = Model()
        for at, moe in enumerate(model.moes):
            for local, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
                generator = torch.Generator().manual_seed(at * 100 + self.rank * moe.num_local_experts + local)
                for p in expert.parameters():
                    p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "parameters"})
        optimizer = torch.optim.Adam(groups, lr=1e-2)
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
        }
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def train(one, steps, first=0):
        losses = []
        for step in range(first, first + steps):
            x = torch.randn(8, hidden, generator=torch.Generator().manual_seed(step * 10 + self.rank))
            loss = one(x.to(next(one.parameters()).dtype))
            one.backward(loss)
            one.step()
            losses.append(float(loss))
        return losses

    def weights(one):
        return [
            [
                torch.cat([p.detach().float().flatten() for p in e.parameters()])
                for e in moe.deepspeed_moe.experts.deepspeed_experts
            ]
            for moe in one.module.moes
        ]

    for kind, at in ((dict(), 3), (dict(stage=1, bf16=True), 0), (dict(bf16=True), 0)):
        self.scenario(path="")
        plain = train(engine(**kind), 7)
        one = engine(**kind)
        self.scenario(path="")
        moved = train(one, at)
        order = self.some_order(9 + at, layers)
        mover = self.scenario(order)
        before = weights(one)
        moved += train(one, 1, at)
        check(
            mover.order == order
            and mover.sent > 0
            and not all(torch.equal(a, b) for x, y in zip(before, weights(one)) for a, b in zip(x, y)),
            f"{kind}: nothing was moved",
        )
        moved += train(one, 6 - at, at + 1)
        close(plain, moved, 0.05 if kind else 1e-4)
        check(plain[-1] < plain[0], f"nothing is learned: {plain}")
        self.say(
            f"DeepSpeed {kind}: losses {plain[0]:.4f} to {plain[-1]:.4f}, differ by at most {max(abs(a - b) for a, b in zip(plain, moved)):.1e}"
        )
        lines, before = [], weights(one)
        real, experts.say.warn = experts.say.warn, lambda text: lines.append(text)
        mover = self.scenario(self.some_order(1, layers))
        mover.order = order
        one.module.train()
        with torch.enable_grad():
            one(torch.zeros(8, hidden, dtype=next(one.parameters()).dtype))
        experts.say.warn = real
        if kind:
            check(
                mover.order == order and (self.rank or ("zero_optimization.stage 1" if "stage" in kind else "bf16") in lines[0]),
                lines,
            )
            check(all(torch.equal(a, b) for x, y in zip(before, weights(one)) for a, b in zip(x, y)), "something was moved")
        elif not lines:
            folder, order = os.path.join(self.folder, "deepspeed"), self.some_order(1, layers)
            os.environ["LOCAL_RANK"] = str(self.rank)
            one.save_checkpoint(folder)
            other = engine()
            mover = self.scenario(order)
            other.load_checkpoint(folder)
            check(mover.order == order and mover.due, "the note was not read")
            close(train(one, 2, 7), train(other, 2, 7), 1e-5)
            check(not mover.due and not hasattr(mover, "sent"), "moved twice")
    dist.barrier()
