#!/usr/bin/env python3
"""Samples moved inside combine: real Megatron-core models on the emulated cluster, librailyard.so preloaded. Expert-parallel
exchanges go over the emulated NCCL, as PyTorch would issue them; everything else over gloo. Losses and gradients must be those of
training without moves but for the order of sums.

usage: combine_test.py CASE railyard [librailyard-engine.so]
"""

import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
WANTED = os.environ.get("RY_TEST_PYTHON")
if __name__ == "__main__" and WANTED and os.path.abspath(WANTED) != sys.executable and "RY_TEST_AGAIN" not in os.environ:
    os.environ["RY_TEST_AGAIN"] = "1"
    os.execv(WANTED, [WANTED] + sys.argv)
RAILYARD = sys.argv.pop(2)  # layers_test reads the rest

import emulated_group  # noqa: E402
import layers_test  # noqa: E402
from layers_test import Rank, Trainer, check, forced, layers, waits  # noqa: E402



def both(t, what, steps=4, planner=forced, **config):
    """Trained without and with moves: the same. The Mover."""
    plain = t.train(*t.model(**config), steps)
    placed = t.train(*t.model(planner, **config), steps)
    check(t.mover is not None and (t.mover.over, t.mover.why) == (None, None), f"{what}: {t.mover and (t.mover.over, t.mover.why)}")
    t.same(plain, placed, what)
    return t.mover


def inside(mover, what, share=1.0):
    """Samples moved, `share` of the times inside combine."""
    check(mover.combine is not None, f"{what}: outside")
    ways = mover.combine.carried
    check(ways > 5, f"{what}: {ways} combines were redirected")
    if mover.rank == 0:
        check(mover.counted["moves"] > 5 and not mover.counted["late"], f"{what}: {mover.counted}")
        check(mover.counted["inside"] >= share * mover.counted["moves"], f"{what}: {mover.counted}")
        if share < 1:
            check(0 < mover.counted["inside"] < mover.counted["moves"], f"{what}: {mover.counted}")


def run_forced(rank):
    """Any permutation at each layer."""
    t = Trainer(rank)
    waits(t)
    Rank.LAYERS = 4
    cases = {
        "two samples": {},
        "one sample": {"b": 1},
        "dense layers": {"moe_layer_freq": [1, 0, 1, 1]},
        "top 1": {"moe_router_topk": 1, "b": 3},
        "full, uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe", "layernorm"]},
        "dropout off, losses of balance": {
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 1e-2,
            "moe_z_loss_coeff": 1e-3,
            "moe_router_score_function": "softmax",
            "moe_router_enable_expert_bias": False,
        },
    }
    if rank.world > 2:
        cases = {what: cases[what] for what in ("two samples", "selective")}
    for what, config in cases.items():
        mover = both(t, what, **config)
        inside(mover, what)
    if rank.world == 2:
        mover = both(t, "shared experts", moe_shared_expert_intermediate_size=24)
        check(mover.combine is None and mover.moved, "shared experts' results were left behind")


def run_bits(rank):
    """What combine brings, and its gradient, to the bit."""
    sys.path.insert(0, os.path.join(HERE, "..", "gpu"))
    import combining as figures
    from railyard import combining

    torch, n = rank.torch, rank.world
    generator = torch.Generator().manual_seed(layers_test.SEED)
    for i in range(40):
        b = 1 + i % 4
        layer = figures.Layer(torch, rank.rank, n, b, 5 + i, 4 * n, 1 + i % 3, generator)
        combine = combining.Combine(rank.group, rank.rank, n, b)
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        good = figures.one(torch, rank.dist, rank.group, combine, layer, (10, 64, 1030)[i % 3], dtype, torch.device("cpu"))
        check(good or not i, "not ready")
    rank.say("combines and their gradients to the bit")


def run_mixed(rank):
    """A rank that now and then cannot redirect: all move at the block's boundary then."""
    from railyard import combining

    t = Trainer(rank)
    waits(t)
    Rank.LAYERS = 5
    own, pick = combining.Combine.ready, layers_test.random.Random(layers_test.SEED + rank.rank)
    combining.Combine.ready = lambda self, *args: own(self, *args) and pick.random() < 0.8
    inside(both(t, "sometimes", steps=6), "sometimes", 0.2)


RIDES = {"RAILYARD_RESIDUAL": "rides"}


def run_rides(rank):
    """The residual rides along: nothing else is exchanged for moves, everybody comes home inside the last combine; where that
    cannot be, it is as without."""
    from railyard import combining, moving

    t = Trainer(rank)
    waits(t)
    Rank.LAYERS = 4
    own, seen, moves = combining.Combine.ready, layers.exchange, []
    layers.exchange = moving.exchange = lambda *args: moves.append(1) or seen(*args)
    cases = {
        "rides": {},
        "three samples, dense layers": {"b": 3, "moe_layer_freq": [1, 0, 1, 1]},
        "full, block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        "RMSNorm": {"normalization": "RMSNorm"},
    }
    for what, config in cases.items() if rank.world == 2 else [("rides", {})]:
        mover = both(t, what, **config)
        inside(mover, what)
        check(mover.ride is not None and not moves, f"{what}: {len(moves)} exchanges of hidden states")
    if rank.world > 2:
        return
    pick = layers_test.random.Random(layers_test.SEED + rank.rank)
    combining.Combine.ready = lambda self, *args: own(self, *args) and pick.random() < 0.8
    mover = both(t, "sometimes", steps=6)
    check(mover.ride is not None and moves, "nobody went home behind the block")
    combining.Combine.ready = own
    mover = both(t, "selective", recompute_granularity="selective", recompute_modules=["core_attn", "layernorm"])
    check(mover.combine is not None and mover.ride is None, "it rides where it cannot")


def run_rides_odd(rank):
    """A rank whose experts get nothing, in all layers and micro-batches; hidden states that are not contiguous; bf16."""
    from railyard import combining

    t = Trainer(rank)
    waits(t)
    made, seen = t.model, []

    def lopsided(*args, **config):
        model, optimizer = made(*args, **config)
        for _, moe in rank.layers(model):
            moe.router.expert_bias[Rank.EXPERTS // 2 :] -= 1e4
        for layer in model.module.decoder.layers:  # some kernels cannot norm nothing
            layer.pre_mlp_layernorm.register_forward_pre_hook(lambda _, given: check(given[0].numel(), "nothing was normed"))
        return model, optimizer

    t.model = lopsided
    along = combining.Ride.along
    combining.Ride.along = staticmethod(lambda *args: (seen.append(len(args[0])), along(*args))[1])
    mover = both(t, "all tokens go to the first rank")
    check(mover.ride is not None and seen and all((n == 0) == (rank.rank == 1) for n in seen), f"rows that came: {seen[:9]}")
    combining.Ride.along, t.model = staticmethod(along), made
    arrive = layers.Mover.arrive
    layers.Mover.arrive = lambda self, micro, layer, x: arrive(self, micro, layer, x.transpose(0, 1).contiguous().transpose(0, 1))
    inside(both(t, "hidden states that are views"), "hidden states that are views")
    layers.Mover.arrive = arrive
    plain = t.train(*t.model(bf16=True), 3)
    placed = t.train(*t.model(forced, bf16=True), 3)
    inside(t.mover, "bf16")
    check(t.mover.ride is not None, "bf16: it does not ride")
    t.same(plain, placed, "bf16", most=0.25, later=1.0)  # last bits choose other experts, and Adam makes much of little gradients


def run_learned(rank):
    """The library's own decisions."""
    t = Trainer(rank)
    made = t.train
    movers = []
    t.train = lambda *args, **more: (made(*args, **more), movers.append(t.mover))[0]
    layers_test.run_learned.__globals__["Trainer"] = lambda _: t
    layers_test.run_learned(rank)
    check(movers[-1].combine is not None and movers[-1].combine.carried > 5, "no combine was redirected")


CASES = {
    "bits": (2, 1, {}, run_bits),
    "bits_four": (2, 2, {"RAILYARD_STRATEGY": "dedup"}, run_bits),
    "forced": (2, 1, {"RAILYARD_STRATEGY": "hierarchical"}, run_forced),
    "four": (2, 2, {"RAILYARD_STRATEGY": "dedup", "RAILYARD_VERIFY": "3"}, run_forced),
    "mixed": (2, 1, {}, run_mixed),
    "joint": (2, 1, {}, layers_test.run_joint),
    "failing": (2, 1, {}, layers_test.run_failing),
    "left_alone": (2, 1, {}, layers_test.run_left_alone),
    "learned": (2, 1, {}, run_learned),
    "rides": (2, 1, RIDES, run_rides),
    "rides_odd": (2, 1, RIDES, run_rides_odd),
    "rides_four": (2, 2, {**RIDES, "RAILYARD_STRATEGY": "dedup"}, run_rides),
    "rides_joint": (2, 1, RIDES, layers_test.run_joint),
    "rides_failing": (2, 1, RIDES, layers_test.run_failing),
    "rides_learned": (2, 1, RIDES, run_learned),
}


def one_rank(scenario):
    import faulthandler

    layers_test.prepare()
    faulthandler.dump_traceback_later(200, exit=True)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        place = Rank(rank, world, int(os.environ["RY_TEST_PORT"]), layers_test.SEED, {"ep": world})
        nccl = emulated_group.Nccl(place.torch, place.dist, place.group)
        if scenario is not run_bits:
            import railyard.megatron_layers as adapter

            check(not adapter.outside(place.model()[0].module.config, lambda name: "exact"), "combines cannot be redirected")
        scenario(place)
        check(nccl.exchanges > 10, "nothing went over NCCL")
        nccl.end()
        place.goodbye()
    except BaseException:
        print(f"rank {rank} (seed {layers_test.SEED}):\n{layers_test.traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)


def main():
    case = sys.argv[1]
    nodes, ranks, env, scenario = CASES[case]
    if "RY_TEST_PORT" in os.environ:
        return one_rank(scenario)
    try:
        import megatron.core  # noqa: F401
        import torch  # noqa: F401
    except ImportError as e:
        print(f"skipped: {e} (RY_TEST_PYTHON names an interpreter that has torch and megatron-core)")
        sys.exit(77)
    print(f"{case}: seed {layers_test.SEED}", flush=True)
    more = {"RY_TEST_PORT": str(layers_test.free_port()), "RY_TEST_SEED": str(layers_test.SEED), "OMP_NUM_THREADS": "1", **env}
    more["PYTHONWARNINGS"], more["RY_TEST_AGAIN"] = "ignore", "1"
    emulated = os.path.join(os.path.dirname(os.path.abspath(RAILYARD)), "..", "emu", "libnccl.so.2")
    more["RAILYARD_NCCL"] = emulated  # not the one that PyTorch brings
    arguments = [sys.executable, "-W", "ignore", os.path.abspath(__file__), case, RAILYARD, *sys.argv[2:]]
    command = [RAILYARD, "emu", "-n", str(nodes), "-g", str(ranks), "--preload", "--", *arguments]
    done = subprocess.run(command, env={**os.environ, **more}, timeout=230, check=False)
    if done.returncode:
        sys.exit(f"combine_test: {case}: ended with {done.returncode}")


if __name__ == "__main__":
    main()
