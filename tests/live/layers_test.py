#!/usr/bin/env python3
"""Samples moved between layers: real Megatron-core models trained with and without (megatron_cpu.py), whose losses and gradients
must be the same but for the order of sums. What needs no framework: layers_rules.py.

usage: layers_test.py CASE [librailyard-engine.so]
"""

import contextlib
import importlib
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
import types

HERE = os.path.dirname(os.path.abspath(__file__))
CASE = sys.argv[1] if len(sys.argv) > 1 else "routes"
PURE = ("routes", "agreement", "findings")
if len(sys.argv) > 2:
    os.environ["RAILYARD_ENGINE"] = sys.argv[2]
WANTED = os.environ.get("RY_TEST_PYTHON")
if (
    __name__ == "__main__"
    and CASE not in PURE
    and WANTED
    and os.path.abspath(WANTED) != sys.executable
    and "RY_TEST_AGAIN" not in os.environ
):
    os.environ["RY_TEST_AGAIN"] = "1"
    os.execv(WANTED, [WANTED] + sys.argv)
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("RAILYARD_LOG", "info")
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
sys.path.insert(0, os.path.join(HERE, "..", "..", "plugin", "python"))

from railyard import board, job, layers  # noqa: E402
import layers_rules  # noqa: E402
from megatron_cpu import Rank, check, on_cpu, patched  # noqa: E402

SEED = int(os.environ.get("RY_TEST_SEED", random.SystemRandom().randrange(1 << 30)))
MICRO = 4  # micro-batches of a step


ACTIVATED = """
import importlib, sys
for module, names in %r.items():
    owner = importlib.import_module(module)
    for name in names:
        found = owner
        for part in name.split("."):
            found = getattr(found, part)
        assert getattr(found, "railyard_layers", False), (module, name)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import transformer_block
assert transformer_block.tensor_parallel.checkpoint.railyard_layers
wrapped, f = 0, GPTModel.forward
while hasattr(f, "__wrapped__"):
    wrapped, f = wrapped + 1, f.__wrapped__
assert wrapped == 3 and f.__qualname__ == "GPTModel.forward", wrapped  # megatron.py, megatron_experts.py, megatron_layers.py
print("activated")
"""


def run_activation():
    """What the environment variables alone bring about, in an interpreter of its own."""
    import subprocess

    names = {
        "megatron.core.models.gpt.gpt_model": ["GPTModel.forward"],
        "megatron.core.tensor_parallel": ["checkpoint"],
        "megatron.core.transformer.transformer_layer": ["TransformerLayer._forward_mlp", "TransformerLayer._forward_post_mlp"],
        "megatron.core.transformer.transformer_block": ["TransformerBlock.forward"],
        "megatron.core.transformer.moe.router": ["TopKRouter.forward"],
        "megatron.core.transformer.moe.token_dispatcher": [
            "MoEAlltoAllTokenDispatcher.token_dispatch",
            "MoEAlltoAllTokenDispatcher.token_combine",
        ],
    }
    env = {**os.environ, "RAILYARD_PLACEMENT": "layer", "PYTHONPATH": os.path.join(HERE, "..", "..", "plugin", "python")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ACTIVATED % names],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    check(done.returncode == 0 and "activated" in done.stdout and "railyard" not in done.stderr, done.stderr[-2000:])


# ---- with Megatron-core


class Trainer:
    """One rank, one model at a time: unplaced or placed, each on a board of its own."""

    def __init__(self, rank):
        self.rank, self.torch, self.runs, self.kinds = rank, rank.torch, 0, False
        self.adapter, self.megatron = (importlib.import_module("railyard." + n) for n in ("megatron_layers", "megatron"))

    def model(self, planner=None, b=2, node=None, **config):
        """planner(): who decides (None: nothing is placed)."""
        self.runs += 1
        store = self.rank.dist.PrefixStore(f"run{self.runs}", self.rank.store)
        settings = {
            "RAILYARD_PLACEMENT": "layer" if planner else "off",
            "RAILYARD_ROUTING": "",
            "RAILYARD_PATIENCE": "10",
            "RAILYARD_EXPERTS": "",
            "RAILYARD_STRATEGY": "auto",
            "RAILYARD_COMBINE": "exact",
            "RAILYARD_HOME_MODEL": "",
        }
        ep = self.rank.parallel["ep"]
        node = node or f"node{self.rank.rank % ep * 2 // ep}"
        job.install(job.Job(self.rank.rank, self.rank.world, board.StoreBoard(store), settings, node))
        self.megatron._facts.clear(), self.megatron._chunks.clear()
        self.adapter._state.update(asked=planner is None, mover=None)
        self.b = b
        made = self.rank.model(**config)
        if planner:
            start = layers.start
            self.adapter.layers.start = lambda *args, **_: start(*args, make_planner=lambda **job: planner(**job))
            self.restore = start
        return made

    @property
    def mover(self):
        return self.adapter._state["mover"]

    def localize(self, model):
        """Two kinds of tokens, even and odd ones, whose experts are on one node each in all layers but the first."""
        torch = self.torch
        kind = torch.randn(Rank.HIDDEN, generator=torch.Generator().manual_seed(SEED))
        kind /= kind.norm()
        for name, p in model.named_parameters():
            if name.endswith("word_embeddings.weight"):
                p.data += 4 * kind * (1 - 2 * (torch.arange(p.shape[0]) % 2))[:, None]
        for _, moe in self.rank.layers(model):
            if moe.layer_number > 1:
                half = torch.arange(Rank.EXPERTS) * 2 // Rank.EXPERTS
                moe.router.weight.data += 2 * kind * (1 - 2 * half)[:, None]
        self.kinds = True

    def batch(self, step, micro, b):
        generator = self.torch.Generator().manual_seed(
            SEED % 1000 + step * 1009 + micro * 101 + self.rank.state.get_data_parallel_rank()
        )
        if self.kinds:
            tokens = self.torch.randint(0, Rank.VOCABULARY // 2, (b, Rank.LENGTH), generator=generator) * 2
            return tokens + self.torch.randint(0, 2, (b, 1), generator=generator)
        return self.torch.randint(0, Rank.VOCABULARY, (b, Rank.LENGTH), generator=generator)

    def train(self, model, optimizer, steps, mask=None, meanwhile=None):
        """([loss of each sample's token], [gradients]) of each step, this rank's."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        positions, result = self.torch.arange(Rank.LENGTH)[None].expand(self.b, -1), []
        for step in range(steps):
            losses, batches = [], iter([self.batch(step, m, self.b) for m in range(MICRO)])

            def forward_step(_, module):
                tokens = next(batches)
                output = module(tokens, positions, mask, labels=tokens)
                losses.append(output.detach().clone())
                return output, lambda x: (x.float().mean(), {"loss": x.detach().float().mean()})

            model.zero_grad_buffer()
            optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=None,
                model=model,
                num_microbatches=MICRO,
                seq_length=Rank.LENGTH,
                micro_batch_size=self.b,
            )
            result.append((self.torch.stack(losses), {n: p.main_grad.clone() for n, p in model.named_parameters()}))
            optimizer.step()
            if meanwhile:
                meanwhile(step)
        self.adapter.layers.start = getattr(self, "restore", self.adapter.layers.start)
        return result

    def same(self, a, b, what, most=2e-5, later=5e-4):
        """most: of the first step, from equal weights; later: of those that follow from it through Adam, which makes much of
        little gradients."""
        worst = 0.0
        for step, ((la, ga), (lb, gb)) in enumerate(zip(a, b)):
            check(ga.keys() == gb.keys() and la.shape == lb.shape, "other tensors")
            most = later if step else most
            apart = float((la - lb).abs().max())
            check(apart <= most * max(1.0, float(la.abs().max())), f"{what}: step {step}: losses are {apart} apart")
            for name in ga:
                scale = float(ga[name].abs().max())
                apart = float((ga[name] - gb[name]).abs().max())
                check(apart <= most * max(scale, 1e-3), f"{what}: step {step}: gradient of {name} is {apart} apart, of {scale}")
                worst = max(worst, apart / max(scale, 1e-3))
        self.rank.say(f"{what}: gradients at most {worst:.1e} of their largest element apart")


class Noting(layers.Forced):
    """asked: what was decided on, in order."""

    def __init__(self):
        super().__init__(SEED)
        self.asked = []

    def next(self, number, layer, *rest):
        self.asked.append((number, layer))
        return super().next(number, layer, *rest)


def forced(**_):
    return Noting()


def waits(trainer):
    """Forced decisions are waited for, however slow this machine."""
    made = trainer.adapter.layers.Mover

    class Patient(made):
        def __init__(self, *args, **more):
            super().__init__(*args, **{**more, "late": 60.0})

    layers.Mover = Patient


def run_forced(rank):
    """Any permutation at each layer: with one and several samples, dense layers between, all kinds of recomputation, masks."""
    t = Trainer(rank)
    waits(t)
    causal = rank.torch.ones(Rank.LENGTH, Rank.LENGTH, dtype=bool).triu(1).view(1, 1, Rank.LENGTH, Rank.LENGTH)
    cases = {
        "two samples": {},
        "one sample": {"b": 1},
        "three samples": {"b": 3},
        "dense layers": {"moe_layer_freq": [1, 0, 1, 1]},
        "full, uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
        "full, block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe", "layernorm"]},
        "losses of balance": {
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 1e-2,
            "moe_z_loss_coeff": 1e-3,
            "moe_router_score_function": "softmax",
            "moe_router_enable_expert_bias": False,
        },
        "shared experts": {"moe_shared_expert_intermediate_size": 24},
    }
    if rank.world > 2:  # the others tell nothing more of more ranks
        cases = {what: cases[what] for what in ("two samples", "dense layers", "full, block", "selective")}
    Rank.LAYERS = 4
    for what, config in cases.items():
        mask = causal.expand(config.get("b", 2), 1, -1, -1) if what == "two samples" else None
        plain = t.train(*t.model(**config), 4, mask)
        placed = t.train(*t.model(forced, **config), 4, mask)
        mover = t.mover
        check(mover is not None and mover.over is None and mover.why is None, f"{what}: off: {mover and (mover.over, mover.why)}")
        check(mover.moved, f"{what}: nobody moved")
        if mover.rank == 0:
            check(mover.counted["moves"] > 5 and not mover.counted["late"], f"{what}: {mover.counted}")
            once = [(n, layer) for n in range(4 * MICRO) for layer in range(mover.layers)]
            ends = time.monotonic() + 10
            while len(mover.planner.asked) < len(once) and time.monotonic() < ends:
                time.sleep(0.01)
            check(mover.planner.asked == once, f"{what}: not each layer once: {mover.planner.asked}")
        t.same(plain, placed, what)


def run_left_alone(rank):
    """Evaluation, passes without gradients, a second model, inference: nothing of ours happens there, nor is anything changed."""
    t = Trainer(rank)
    waits(t)
    config = {"hidden_dropout": 0.0}

    def evaluate(model):
        model.eval()
        with rank.torch.no_grad():
            out = model(t.batch(99, 0, 3), rank.torch.arange(Rank.LENGTH)[None].expand(3, -1), None)
        model.train()
        with rank.torch.no_grad():
            again = model(t.batch(98, 0, 1), rank.torch.arange(Rank.LENGTH)[None].expand(1, -1), None)
        return out, again

    plain, optimizer = t.model(**config)
    kept = []
    before = t.train(plain, optimizer, 3, meanwhile=lambda _: kept.append(evaluate(plain)))
    model, optimizer = t.model(forced, **config)
    other, _ = rank.model(seed=9)
    after = []

    def meanwhile(step):
        number, moved = t.mover.number, dict(t.mover.counted)
        after.append(evaluate(model))
        other(t.batch(97, 0, 2), rank.torch.arange(Rank.LENGTH)[None].expand(2, -1), None)
        check(t.mover.number == number and t.mover.counted == moved and t.mover.why is None, "evaluation was taken for training")

    placed = t.train(model, optimizer, 3, meanwhile=meanwhile)
    check(t.mover.moved and t.mover.over is None, "nobody moved")
    t.same(before, placed, "with evaluation in between")
    for (a, b), (c, d) in zip(kept, after):
        check(float((a - c).abs().max()) < 1e-4 and float((b - d).abs().max()) < 1e-4, "evaluation differs")


def run_learned(rank):
    """The library's own decisions, and its thread as late as this machine makes it: whoever moves, training is the same, and less
    leaves the node."""
    t = Trainer(rank)
    Rank.LAYERS, steps = 4, 24
    losses = []
    for planner in (None, layers.Planner):
        model, optimizer = t.model(planner, b=4)
        t.localize(model)
        optimizer.reload_model_params()
        losses.append(t.train(model, optimizer, steps))
    check(t.mover.over is None and t.mover.why is None, (t.mover.over, t.mover.why))
    t.same(*losses, "as the library decides", later=2e-2)
    if t.mover.rank == 0:
        state = t.mover.planner._layers.state()
        rank.say(f"{t.mover.counted}; {t.mover.planner.words()}")
        check(t.mover.counted["moves"] > 5 and state.crossed + state.carried < 0.9 * state.home, "it does not pay")
        check(t.mover.number >= state.samples / 8, "a sample was learned from twice")


def run_failing(rank):
    """A rank whose adapter fails in the midst of it: everybody goes home, one rank says so, training is the same."""
    t = Trainer(rank)
    waits(t)
    plain = t.train(*t.model(), 5)
    for bad in range(rank.world):
        model, optimizer = t.model(forced)
        fails, routed = random.Random(SEED + bad).randrange(8, 14), layers.Mover.routed

        def broken(self, micro, layer, routing):
            if rank.rank == bad and micro.number * 3 + layer >= fails:
                self._mask = "no mask"
            routed(self, micro, layer, routing)

        layers.Mover.routed = broken
        try:
            placed = t.train(model, optimizer, 5)
        finally:
            layers.Mover.routed = routed
        if rank.rank // rank.parallel["ep"] == bad // rank.parallel["ep"]:  # other groups learn it from the board, in their time
            check(t.mover.over is not None, f"rank {bad} failed and rank {rank.rank} goes on")
        check(job.current().stopped(now=True) is not None, "placement is not off")
        t.same(plain, placed, f"rank {bad} fails at {fails}")


def run_late(rank):
    """A solver that is late now and then: nobody moves where it is, on no rank."""
    t = Trainer(rank)

    def slow(**_):
        planner, pick = layers.Forced(SEED), random.Random(SEED)
        own = planner.next

        def dawdles(*args):
            time.sleep(pick.choice((0, 0, 0.05)))
            return own(*args)

        planner.next = dawdles
        return planner

    plain = t.train(*t.model(), 8)
    placed = t.train(*t.model(slow), 8)
    check(t.mover.over is None and t.mover.moved, "nobody moved")
    if t.mover.rank == 0:
        check(t.mover.counted["late"] > 3 and t.mover.counted["moves"] > 3, t.mover.counted)
    t.same(plain, placed, "decisions late and in time")


def run_joint(rank):
    """Several forward passes before one backward pass, of which parts are recomputed: each moves back as it moved forth."""
    t = Trainer(rank)
    waits(t)
    positions = rank.torch.arange(Rank.LENGTH)[None].expand(2, -1)
    config = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
    Rank.LAYERS = 4
    both = []
    for planner in (None, forced):
        model, optimizer = t.model(planner, **config)
        t.train(model, optimizer, 1)  # so that moves begin
        result = []
        for step in range(1, 4):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            outs = []
            for micro in range(3):
                tokens = t.batch(step, micro, 2)
                outs.append(model(tokens, positions, None, labels=tokens))
            (outs[1].mean() + 2 * outs[0].mean() + 3 * outs[2].mean()).backward()
            model.finish_grad_sync()
            result.append(
                (rank.torch.stack([o.detach() for o in outs]), {n: p.main_grad.clone() for n, p in model.named_parameters()})
            )
        both.append(result)
    check(t.mover.moved and t.mover.over is None and t.mover.why is None, "nobody moved")
    t.same(*both, "one backward pass of three forward passes", most=5e-4)  # after a step of Adam


def run_solver_fails(rank):
    t = Trainer(rank)
    waits(t)

    def none(**_):
        raise RuntimeError("made to fail")

    plain = t.train(*t.model(), 4)
    placed = t.train(*t.model(none), 4)
    check(t.mover.over is not None and not t.mover.moved, "it goes on without a planner")
    t.same(plain, placed, "no planner")

    def broken(**_):
        planner = layers.Forced(SEED)
        own = planner.next

        def fails(number, layer, *rest):
            if number == 6 and layer == 1:
                raise RuntimeError("made to fail")
            return own(number, layer, *rest)

        planner.next = fails
        return planner

    plain = t.train(*t.model(), 4)
    placed = t.train(*t.model(broken), 4)
    check(t.mover.over is not None and t.mover.moved, "it goes on")
    t.same(plain, placed, "the solver fails")


def run_refused(rank):
    """Options, masks, shapes that are not known: nobody moves, training is the same."""
    t = Trainer(rank)
    waits(t)

    def untouched(what, config, mask=None, node=None, want=None):
        plain = t.train(*t.model(**config), 3, mask)
        placed = t.train(*t.model(forced, node=node, **config), 3, mask)
        check((t.mover is None) if want is None else want(t.mover), f"{what}: {t.mover and vars(t.mover)}")
        for (la, ga), (lb, gb) in zip(plain, placed):
            check(rank.torch.equal(la, lb) and all(rank.torch.equal(ga[n], gb[n]) for n in ga), f"{what}: not the same bits")

    untouched(
        "sinkhorn",
        {
            "moe_router_load_balancing_type": "sinkhorn",
            "moe_router_topk": 1,
            "moe_router_score_function": "softmax",
            "moe_router_enable_expert_bias": False,
        },
    )
    untouched("one node", {}, node="one")
    mask = rank.torch.ones(2, 1, Rank.LENGTH, Rank.LENGTH, dtype=bool).triu(1)
    if rank.rank == 1:
        mask[1, 0, :, 3] = True
        mask[1, 0, 3, 3] = False
    untouched("masks", {}, mask, want=lambda m: m is not None and not m.moved and m.over is None)


def run_recomputed(rank):
    """A layer that somebody recomputes in a way of his own is noticed before anybody moves."""
    from torch.utils.checkpoint import checkpoint

    t = Trainer(rank)
    waits(t)
    block = importlib.import_module("megatron.core.transformer.transformer_block").tensor_parallel
    theirs = block.checkpoint
    config = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for reentrant in (True, False):
        block.checkpoint = lambda f, _, *args: checkpoint(f, *args, use_reentrant=reentrant)
        try:
            plain = t.train(*t.model(**config), 3)
            placed = t.train(*t.model(forced, **config), 3)
        finally:
            block.checkpoint = theirs
        check(not t.mover.moved and t.mover.why is not None and "recomputed" in t.mover.why, vars(t.mover))
        t.same(plain, placed, f"torch's checkpoint, {'reentrant' if reentrant else 'not reentrant'}")


CASES = {
    "activation": [],
    "forced": [(2, {"ep": 2}, run_forced)],
    "four": [(4, {"ep": 4}, run_forced)],
    "replicas": [(4, {"ep": 2}, run_forced)],
    "left_alone": [(2, {"ep": 2}, run_left_alone)],
    "learned": [(2, {"ep": 2}, run_learned)],
    "failing": [(2, {"ep": 2}, run_failing), (4, {"ep": 2}, run_failing)],
    "late": [(4, {"ep": 4}, run_late)],
    "joint": [(2, {"ep": 2}, run_joint)],
    "solver": [(2, {"ep": 2}, run_solver_fails)],
    "refused": [(2, {"ep": 2}, run_refused)],
    "recomputed": [(2, {"ep": 2}, run_recomputed)],
}


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(rank, world, port, parallel, scenario):
    import faulthandler

    faulthandler.dump_traceback_later(200, exit=True)
    os.setpgid(0, 0)
    try:
        place = Rank(rank, world, port, SEED, parallel)
        scenario(place)
        place.goodbye()
    except BaseException:
        print(f"rank {rank} (seed {SEED}):\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)


def prepare():
    """Megatron-core on this process's CPU, the adapter's patches applied."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    on_cpu()
    states = importlib.import_module("megatron.core.tensor_parallel.random")
    states._get_all_rng_states, states._set_all_rng_states = lambda: (), lambda *_: None  # a GPU's; nothing is drawn here
    states._fork_rng = contextlib.nullcontext
    if not hasattr(states, "FP8GlobalStateManager"):  # Transformer Engine's
        states.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False)
        states.activation_recompute_forward = states.fp8_autocast = lambda **_: contextlib.nullcontext()
    for name in ("megatron", "megatron_layers"):
        patched(name)


def main():
    print(f"{CASE}: seed {SEED}", flush=True)
    if CASE in layers_rules.CASES:
        return layers_rules.CASES[CASE](SEED)
    try:
        importlib.import_module("torch")
        importlib.import_module("megatron.core")
    except ImportError as e:
        print(f"skipped: {e} (RY_TEST_PYTHON names an interpreter that has torch and megatron-core)")
        sys.exit(77)
    if CASE == "activation":
        return run_activation()
    prepare()
    for world, parallel, scenario in CASES[CASE]:
        port = free_port()
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=child, args=(rank, world, port, parallel, scenario)) for rank in range(world)]
        [p.start() for p in ranks]
        ends = time.monotonic() + 210
        while time.monotonic() < ends and any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
            time.sleep(0.05)
        bad, alive = [r for r, p in enumerate(ranks) if p.exitcode], [r for r, p in enumerate(ranks) if p.is_alive()]
        for p in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
        [p.kill() for p in ranks if p.is_alive()]
        if bad or alive:
            sys.exit(f"layers_test: {CASE}: ranks {bad} failed, {alive} were still running")


if __name__ == "__main__":
    main()
