"""RAILYARD_EXPERTS in Megatron-core jobs (0.13 or later): where experts, routers and optimizers keep what must move.

Owns: finding it, refusing what cannot be moved, the moment (before the first training step), seeing checkpoints being loaded
and saved. Not: the agreement and the exchange (experts.py).

The moment is the start of schedules.forward_backward_*: every rank of the job calls it at the start of a step, before any
communication of that step, with all of its model chunks, whatever its place in the pipeline. (GPTModel.forward would be too
late with pipelines: a later stage's first forward waits for the earlier stages, and would never come to an agreement that they
wait in.) A job with a training loop of its own, without these schedules, is met at GPTModel.forward instead, in training mode
with gradients on; with pipeline parallelism it is refused there.

What is moved. Each layer's own ranks permute their own layers, found by their global number; layers for multi-token prediction
and shared experts stay. SequentialMLP: all parameters and buffers of each local expert's module. TEGroupedMLP: linear_fc1 and
linear_fc2's weight0, weight1, …, bias0, …. GroupedMLP: weight1 and weight2, whose memory is cut into equal parts, one per local
expert, as its forward does. With each parameter: its fp32 main copy, and every state of its shape that its optimizer has. Of
the router: weight, bias, expert_bias and the counters, by rows. With expert-tensor parallelism an expert-parallel group has
members of one tensor index only (checked), so that parts of an expert meet again on their new ranks.

Optimizers (expert_tensors.py): Float16OptimizerWithFloat16Params and FP32Optimizer keep things per parameter, which moves.
DistributedOptimizer shards; reload_model_params makes its copies anew while it remembers nothing. A job that resumes in the
right order has nothing to move, and is not refused, whatever its optimizer.
"""

import functools
import os
import re
import weakref
from typing import Dict, List

from . import experts, say
from .expert_tensors import Flattened, Holders, layer_of, no_gradients, seen, watch_torch_optimizers
from .experts import Holding, Refused

megatron_optimizers: "weakref.WeakSet" = weakref.WeakSet()

ROUTER_ROWS = ("weight", "bias", "expert_bias", "local_tokens_per_expert", "global_tokens_per_expert")
ROUTER_OTHERS = ("ga_steps",)  # one number for all experts


# ---- optimizers


def _holders() -> Holders:
    main, flattened = {}, []
    for wrapper in list(megatron_optimizers):
        kind = type(wrapper).__name__
        if kind in ("Float16OptimizerWithFloat16Params", "FP32Optimizer"):
            for model, copies in zip(getattr(wrapper, "float16_groups", []), getattr(wrapper, "fp32_from_float16_groups", [])):
                main.update((id(p), m) for p, m in zip(model, copies))
        elif kind == "DistributedOptimizer":
            params = [p for buffer in getattr(wrapper, "buffers", []) for p in getattr(buffer, "params", [])]
            state = getattr(getattr(wrapper, "optimizer", None), "state", {})
            flattened.append(
                Flattened(
                    "--use-distributed-optimizer",
                    params,
                    state,
                    wrapper.reload_model_params,
                    lambda wrapper=wrapper: _finer(wrapper),
                )
            )
        elif kind != "ChainedOptimizer":  # its parts were seen, too
            raise Refused(f"{kind} keeps parameters in a way that Railyard does not know (--optimizer)")
    return Holders(main, flattened)


def _finer(wrapper) -> bool:
    import torch

    pairs = zip(getattr(wrapper, "shard_float16_groups", []), getattr(wrapper, "shard_fp32_from_float16_groups", []))
    return any(
        copy is not None and own is not None and not torch.equal(own.float(), copy.detach().float())
        for owns, copies in pairs
        for own, copy in zip(owns, copies)
    )


# ---- one layer


def _kin(module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _slots(block, each: int) -> List[list]:
    """[local expert] → [(name, parameter or buffer, part)]: part None: all of it; i: the i-th of `each` equal parts of its memory."""
    named = list(block.named_parameters()) + list(block.named_buffers())
    if _kin(block, "SequentialMLP"):
        parts = [
            [(name, t, None) for name, t in list(one.named_parameters()) + list(one.named_buffers())]
            for one in block.local_experts
        ]
        if sum(map(len, parts)) != len(named):
            raise Refused("experts of SequentialMLP share parameters, or it has some of its own")
        return parts
    if _kin(block, "TEGroupedMLP"):
        parts = [[] for _ in range(each)]
        for name, t in named:
            found = re.fullmatch(r"(linear_fc[12]\.(?:weight|bias))(\d+)", name)
            if not found or int(found[2]) >= each:
                raise Refused(f"TEGroupedMLP has {name}, and Railyard does not know which expert's it is")
            parts[int(found[2])].append((found[1], t, None))
        return parts
    if _kin(block, "GroupedMLP"):
        if {name for name, _ in named} != {"weight1", "weight2"}:
            raise Refused("GroupedMLP has other parameters than weight1 and weight2")
        return [[(name, t, i) for name, t in named] for i in range(each)]
    raise Refused(f"experts of type {type(block).__name__}, which Railyard does not know")


def _tensor_index(block) -> int:
    import torch.distributed as dist

    group = getattr(block, "tp_group", None)
    return dist.get_rank(group) if group is not None else 0


def _rows(router, number: int, experts_of_layer: int) -> List[tuple]:
    rows = [(name, t) for name, t in list(router.named_parameters()) + list(router.named_buffers()) if name not in ROUTER_OTHERS]
    for name, t in rows:
        if name not in ROUTER_ROWS or t.shape[0] != experts_of_layer:
            raise Refused(f"layer {number}: the router has {name}, and Railyard does not know whether it is per expert")
    return rows


# ---- the model


def _moe_layers(models) -> Dict[int, object]:
    """Layers with experts on this rank by their global number, from 1; those for multi-token prediction are left out."""
    found: Dict[int, object] = {}
    for model in models:
        for name, module in model.named_modules():
            if _kin(module, "BaseMoELayer") and "mtp" not in name.split("."):
                if found.get(module.layer_number, module) is not module:
                    raise Refused(f"two layers with the number {module.layer_number} (more than one model with experts)")
                found[module.layer_number] = module
    return found


def numbers(config) -> List[int]:
    """The global numbers, from 1, of the layers with experts, as Megatron-core makes them."""
    frequency = getattr(config, "moe_layer_freq", 1)
    pattern = (
        frequency if isinstance(frequency, (list, tuple)) else [1 if i % frequency == 0 else 0 for i in range(config.num_layers)]
    )
    return [i + 1 for i, moe in enumerate(pattern[: config.num_layers]) if moe]


def _refusals(config, source) -> None:
    for option, flag in (("fp8", "--fp8-format"), ("fp4", "--fp4-format")):
        if getattr(config, option, None):
            raise Refused(f"{flag} (scaling factors and copies of weights inside Transformer Engine do not move)")
    if getattr(config, "moe_enable_routing_replay", False):
        raise Refused("--moe-enable-routing-replay (recorded routing has experts' numbers)")
    groups = getattr(config, "moe_router_num_groups", None)
    if groups and getattr(config, "moe_router_group_topk", None):
        width = config.num_moe_experts // groups
        for row in source:
            if any(len({s // width for s in row[g : g + width]}) != 1 for g in range(0, len(row), width)):
                raise Refused(
                    "--moe-router-num-groups (tokens are routed to groups of consecutive experts, and the map would mix groups)"
                )


def _fully_sharded(models) -> None:
    for model in models:
        for module in model.modules():
            kind = type(module).__name__
            if "FullyShardedDataParallel" in kind or kind.startswith("FSDP") or kind == "MegatronFSDP":
                raise Refused("--use-megatron-fsdp or --use-torch-fsdp2 (parameters are sharded)")


def look(models) -> Holding:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise Refused("--cuda-graph-impl (the first step is being captured)")
    models = [model for model in (models if isinstance(models, (list, tuple)) else [models]) if model is not None]
    held = _moe_layers(models)
    config = next((m.config for m in held.values()), None) or next(
        m.config for model in models for m in model.modules() if hasattr(m, "config")
    )
    if not getattr(config, "num_moe_experts", None):
        raise Refused("the model has no experts")
    index = {number: i for i, number in enumerate(numbers(config))}
    strange = [number for number in held if number not in index]
    if strange:
        raise Refused(f"layer {strange[0]} has experts where --moe-layer-freq has none")
    ranks = config.expert_model_parallel_size
    holders: List[Holders] = []

    def prepare(source):
        _refusals(config, source)
        _fully_sharded(models)
        holders.append(_holders())
        no_gradients([part for moe in held.values() for part in (moe.experts, moe.router)])
        return [
            layer_of(
                index[number],
                f"layer {number}",
                moe.ep_group,
                _slots(moe.experts, moe.num_local_experts),
                _rows(moe.router, number, config.num_moe_experts),
                holders[0],
                _tensor_index(moe.experts),
            )
            for number, moe in sorted(held.items())
        ]

    def settle():
        holders[0].renew()

    return Holding(len(index), config.num_moe_experts, ranks, prepare, settle)


# ---- when


def watch_schedules(module) -> None:
    names = [name for name in vars(module) if name.startswith("forward_backward_") and callable(getattr(module, name))]
    if not names:
        raise Refused(f"{module.__name__} has no forward_backward_ functions: this Megatron-core is not known")
    for name in names:
        setattr(module, name, _stepping(getattr(module, name)))


def _stepping(original):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if experts.due() and not kwargs.get("forward_only", False) and "model" in kwargs:
            experts.before_step(lambda: look(kwargs["model"]))
        return original(*args, **kwargs)

    return wrapper


def watch_model(module) -> None:
    import torch

    original = module.GPTModel.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        if experts.due() and self.training and torch.is_grad_enabled():

            def alone():
                if self.config.pipeline_model_parallel_size > 1:
                    raise Refused(
                        "a training loop without Megatron-core's schedules and with --pipeline-model-parallel-size above 1"
                    )
                return look(self)

            experts.before_step(alone)
        return original(self, *args, **kwargs)

    module.GPTModel.forward = forward


def watch_megatron_optimizers(module) -> None:
    module.MegatronOptimizer.__init__ = seen(module.MegatronOptimizer.__init__, megatron_optimizers)


# ---- checkpoints


def watch_checkpoints(module) -> None:
    """megatron.core.dist_checkpointing: save and load of the formats of today."""
    save, load = module.save, module.load

    @functools.wraps(save)
    def noted_save(sharded_state_dict, checkpoint_dir, *args, **kwargs):
        result = save(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        experts.saved(str(checkpoint_dir))
        return result

    @functools.wraps(load)
    def noted_load(sharded_state_dict, checkpoint_dir, *args, **kwargs):
        result = load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        experts.loaded(str(checkpoint_dir))
        return result

    module.save, module.load = noted_save, noted_load


def watch_training_checkpoints(module) -> None:
    """megatron.training.checkpointing: --ckpt-format torch, where every rank has files of its own under iter_…, which dist_checkpointing never sees."""
    if not hasattr(module, "save_checkpoint") or not hasattr(module, "_load_base_checkpoint"):
        say.info(f"{module.__name__} is of a version that is not known: no {experts.NOTE} for --ckpt-format torch")
        return
    save, base = module.save_checkpoint, module._load_base_checkpoint

    @functools.wraps(save)
    def noted_save(iteration, *args, **kwargs):
        result = save(iteration, *args, **kwargs)
        options = module.get_args()
        if not getattr(options, "use_dist_ckpt", False):
            experts.saved(os.path.join(options.save, f"iter_{iteration:07d}"))
        elif getattr(options, "non_persistent_ckpt_type", None) == "local" and experts.order() is not None:
            say.warn_once(
                "experts-local",
                f"--non-persistent-ckpt-type local: no {experts.NOTE} is written; a job that resumes from such a "
                "checkpoint has its experts moved once more",
            )
        return result

    @functools.wraps(base)
    def noted_base(load_dir, args, rank0=False, *rest, **kwargs):
        result = base(load_dir, args, rank0, *rest, **kwargs)
        name = result[1] if isinstance(result, tuple) and len(result) > 1 else ""
        if not rank0 and isinstance(name, str) and name.endswith(".pt") and result[0] is not None:
            folder = os.path.dirname(name)
            experts.loaded(folder if os.path.exists(os.path.join(folder, experts.NOTE)) else os.path.dirname(folder))
        return result

    module.save_checkpoint, module._load_base_checkpoint = noted_save, noted_base


experts.begin()

WATCHES = {
    "torch.optim.optimizer": watch_torch_optimizers,
    "megatron.core.optimizer.optimizer": watch_megatron_optimizers,
    "megatron.core.pipeline_parallel.schedules": watch_schedules,
    "megatron.core.models.gpt.gpt_model": watch_model,
    "megatron.core.dist_checkpointing": watch_checkpoints,
    "megatron.training.checkpointing": watch_training_checkpoints,
}
