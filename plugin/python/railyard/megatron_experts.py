"""RAILYARD_EXPERTS in Megatron-core jobs (0.13 or later): where experts, routers and optimizers keep what must move.

Owns: finding it, refusing what cannot be moved, the moment (before the first training step), seeing checkpoints being loaded and saved. Not: the
agreement and the exchange (experts.py).

The moment is the start of schedules.forward_backward_*: every rank of the job calls it at the start of a step, before any communication of that step,
with all of its model chunks, whatever its place in the pipeline. (GPTModel.forward would be too late with pipelines: a later stage's first
forward waits for the earlier stages, and would never come to an agreement that they wait in.) A job with a training loop of its own, without
these schedules, is met at GPTModel.forward instead, in training mode with gradients on; with pipeline parallelism it is refused there.

What is moved. Each layer's own ranks permute their own layers, found by their global number; layers for multi-token prediction and
shared experts stay. SequentialMLP: all parameters and buffers of each local expert's module. TEGroupedMLP: linear_fc1 and linear_fc2's
weight0, weight1, …, bias0, …. GroupedMLP: weight1 and weight2, whose memory is cut into equal parts, one per local expert, as its forward
does. With each parameter: its fp32 main copy, and every state of its shape that its optimizer has. Of the router: weight, bias, expert_bias and the
counters, by rows. With expert-tensor parallelism an expert-parallel group has members of one tensor index only (checked), so that parts of
an expert meet again on their new ranks.

Optimizers are not to be found from a model, so they are seen being made: weak references, from wraps of the two base classes' constructors.
A parameter that learns and is in no optimizer seen is refused: something else might hold a copy of it. Where optimizer state is sharded over data-parallel
ranks, ranks hold unlike parts of unlike experts; that is refused once there is any, but before an optimizer's first step there is none: then its fp32 copies
are made anew from the moved weights (reload_model_params, which is there for weights that changed outside). A job that resumes in
the right order has nothing to move, whatever its optimizer.
"""
import functools
import hashlib
import json
import os
import re
import weakref
from typing import Dict, List, Optional

from . import experts, job, library, say
from .experts import Holding, Layer, Refused

torch_optimizers: "weakref.WeakSet" = weakref.WeakSet()
megatron_optimizers: "weakref.WeakSet" = weakref.WeakSet()
# With RAILYARD_EXPERTS unset, experts stay, but a checkpoint's note is passed on to the next checkpoint.
mover = experts.Mover(library.setting("RAILYARD_EXPERTS"), library.expert_map, experts.PATIENCES * float(library.setting("RAILYARD_PATIENCE")))

ROUTER_ROWS = ("weight", "bias", "expert_bias", "local_tokens_per_expert", "global_tokens_per_expert")
ROUTER_OTHERS = ("ga_steps",)  # one number for all experts
PER_PARAMETER = ("Float16OptimizerWithFloat16Params", "FP32Optimizer", "ChainedOptimizer")


# ---- optimizers

class Holders:
    """Where the optimizers of this process keep what belongs to a parameter."""

    def __init__(self) -> None:
        self.main: Dict[int, object] = {}    # id of a 16-bit parameter → its fp32 copy
        self.within: Dict[int, list] = {}    # id of what an optimizer steps → torch optimizers
        self.sharded: Dict[int, object] = {} # id of a parameter → the MegatronOptimizer that shards it
        self.reload: list = []
        for wrapper in list(megatron_optimizers):
            kind = type(wrapper).__name__
            if kind == "ChainedOptimizer":  # its parts were seen, too
                continue
            if kind in PER_PARAMETER:
                for model, main in zip(getattr(wrapper, "float16_groups", []), getattr(wrapper, "fp32_from_float16_groups", [])):
                    self.main.update((id(p), m) for p, m in zip(model, main))
            elif kind == "DistributedOptimizer":
                for group in ("model_float16_groups", "model_fp32_groups"):
                    self.sharded.update((id(p), wrapper) for params in getattr(wrapper, group, []) for p in params)
                for buffer in getattr(wrapper, "buffers", []):  # of which this rank may have no part at all
                    self.sharded.update((id(p), wrapper) for p in getattr(buffer, "params", []))
                self.reload.append(wrapper)
            else:
                for group in getattr(wrapper, "param_groups", []):
                    self.sharded.update((id(p), wrapper) for p in group["params"])
        for optimizer in list(torch_optimizers):
            if type(optimizer).__name__ == "HybridDeviceOptimizer" or getattr(optimizer, "sub_optimizers", None):
                raise Refused("--optimizer-cpu-offload (the optimizer keeps copies of parameters in host memory)")
            for group in optimizer.param_groups:
                for p in group["params"]:
                    self.within.setdefault(id(p), []).append(optimizer)

    def fresh(self, parameter, name: str) -> bool:
        """Is it sharded, and is that no harm because the optimizer remembers nothing yet?"""
        wrapper = self.sharded.get(id(parameter))
        if wrapper is None:
            return False
        kind = type(wrapper).__name__
        if kind != "DistributedOptimizer":
            raise Refused(f"{kind} holds {name} in a way that Railyard does not know (--optimizer)")
        if any(state for state in getattr(wrapper.optimizer, "state", {}).values()):
            raise Refused("--use-distributed-optimizer (the optimizer's states are sharded over data-parallel ranks, and there are some already)")
        return True

    def tensors(self, parameter, name: str) -> list:
        """[(what, tensor)] that are to be moved with this parameter, itself first, and [(what, number)] that must be the same for all experts."""
        moved, equal = [("", parameter.data)], []
        if self.fresh(parameter, name):
            return moved, [("sharded", 1)]
        main = self.main.get(id(parameter), parameter)
        if main is not parameter:
            moved.append(("main", main.data))
        optimizers = self.within.get(id(main), [])
        if parameter.requires_grad and not optimizers:
            raise Refused(f"no optimizer that Railyard has seen being made holds {name}")
        for optimizer in optimizers:
            for key, value in sorted(optimizer.state.get(main, {}).items()):
                if _is_tensor(value) and value.numel() > 1 and value.shape == parameter.shape:
                    moved.append((key, value))
                elif value is None or isinstance(value, (int, float, bool)) or (_is_tensor(value) and value.numel() == 1):
                    equal.append((key, float(value) if value is not None else None))
                elif _is_tensor(value) and not value.numel():
                    continue
                else:
                    raise Refused(f"{type(optimizer).__name__} keeps a state {key!r} of {name} that is not of the parameter's shape (--optimizer)")
        return moved, equal


def _is_tensor(value) -> bool:
    import torch
    return isinstance(value, torch.Tensor)


# ---- one layer

def _kin(module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _plain(tensor, name: str, device) -> None:
    import torch
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise Refused(f"{name} is a {type(tensor).__name__}, no plain tensor (fully sharded, or of a quantized type)")
    if not tensor.is_contiguous() or tensor.device != device:
        raise Refused(f"{name} is not contiguous in memory, or not on the same device as the experts' weights")


def _slots(block, each: int) -> List[list]:
    """[local expert] → [(name, parameter or buffer, part)]: part None: all of it; i: the i-th of `each` equal parts of its memory."""
    named = list(block.named_parameters()) + list(block.named_buffers())
    if _kin(block, "SequentialMLP"):
        parts = [[(name, t, None) for name, t in list(one.named_parameters()) + list(one.named_buffers())] for one in block.local_experts]
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


def _grads(named) -> list:
    """Gradients that are there already and not zero would belong to the wrong experts: there are none before a step."""
    return [g for _, p in named for g in (getattr(p, "grad", None), getattr(p, "main_grad", None)) if g is not None]


def _layer(moe, index: int, holders: Holders, experts_of_layer: int) -> Layer:
    import torch
    import torch.distributed as dist
    group, block = moe.ep_group, moe.experts
    ranks, each = dist.get_process_group_ranks(group), moe.num_local_experts
    device = next(block.parameters()).device
    slots, kinds, equal = [], [], []
    for parts in _slots(block, each):
        tensors, kind = [], []
        for name, t, part in parts:
            _plain(t, name, device)
            moved, same = holders.tensors(t, name) if isinstance(t, torch.nn.Parameter) else ([("", t)], [])
            for what, one in moved:
                _plain(one, f"{name} {what}".strip(), device)
                one = one.detach() if part is None else one.detach().view(each, -1)[part]
                tensors.append(one)
                kind.append((name, what, str(one.dtype), list(one.shape)))
            equal.append([name, same])
        slots.append(tensors)
        kinds.append(kind)
    if len(slots) != each or any(kind != kinds[0] for kind in kinds):
        raise Refused(f"layer {moe.layer_number}: local experts that hold unlike tensors or optimizer states")
    if any(dict(equal[i:i + len(equal) // each]) != dict(equal[:len(equal) // each]) for i in range(0, len(equal), len(equal) // each)):
        raise Refused(f"layer {moe.layer_number}: experts whose optimizer is not at the same step")
    rows, row_kinds = [], []
    for name, t in list(moe.router.named_parameters()) + list(moe.router.named_buffers()):
        if name in ROUTER_OTHERS:
            continue
        if name not in ROUTER_ROWS or t.shape[0] != experts_of_layer:
            raise Refused(f"layer {moe.layer_number}: the router has {name}, and Railyard does not know whether it is per expert")
        moved, same = holders.tensors(t, f"router.{name}") if isinstance(t, torch.nn.Parameter) else ([("", t)], [])
        for what, one in moved:
            _plain(one, f"router.{name} {what}".strip(), one.device)
            rows.append(one.detach())
            row_kinds.append((name, what, str(one.dtype), list(one.shape), same))
    signature = hashlib.sha256(json.dumps([kinds[0], equal[:len(equal) // each], row_kinds]).encode()).hexdigest()[:16]
    tensor_group = getattr(block, "tp_group", None)
    return Layer(index, group, ranks, dist.get_rank(group), dist.get_rank(tensor_group) if tensor_group is not None else 0, slots, rows, signature)


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
    pattern = frequency if isinstance(frequency, (list, tuple)) else [1 if i % frequency == 0 else 0 for i in range(config.num_layers)]
    return [i + 1 for i, moe in enumerate(pattern[:config.num_layers]) if moe]


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
            if any(len({s // width for s in row[g:g + width]}) != 1 for g in range(0, len(row), width)):
                raise Refused("--moe-router-num-groups (tokens are routed to groups of consecutive experts, and the map would mix groups)")


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
    config = next((m.config for m in held.values()), None) or next(m.config for model in models for m in model.modules() if hasattr(m, "config"))
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
        holders.append(Holders())
        grads, layers = [], []
        for number in sorted(held):
            layers.append(_layer(held[number], index[number], holders[0], config.num_moe_experts))
            grads += _grads(held[number].experts.named_parameters()) + _grads(held[number].router.named_parameters())
        if grads and bool(torch.stack([g.detach().ne(0).any() for g in grads]).any()):
            raise Refused("there are gradients already, in the midst of a step")
        return layers

    def settle():
        for wrapper in holders[0].reload:
            wrapper.reload_model_params()

    return Holding(len(index), config.num_moe_experts, ranks, prepare, settle)


# ---- when

def _before_step(see) -> None:
    """see() → Holding. Never raises but experts.Doubt, which must end the job."""
    try:
        current = job.current()
        if current is None:
            raise Refused("torch.distributed is not set up")
    except Exception as e:
        mover.due = False
        say.error(f"RAILYARD_EXPERTS: experts stay where they are: {e}")
        return
    mover.step(current, see)


def watch_schedules(module) -> None:
    names = [name for name in vars(module) if name.startswith("forward_backward_") and callable(getattr(module, name))]
    if not names:
        raise Refused(f"{module.__name__} has no forward_backward_ functions: this Megatron-core is not known")
    for name in names:
        setattr(module, name, _stepping(getattr(module, name)))


def _stepping(original):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if mover.due and not kwargs.get("forward_only", False) and "model" in kwargs:
            _before_step(lambda: look(kwargs["model"]))
        return original(*args, **kwargs)
    return wrapper


def watch_model(module) -> None:
    import torch
    original = module.GPTModel.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        if mover.due and self.training and torch.is_grad_enabled():
            def alone():
                if self.config.pipeline_model_parallel_size > 1:
                    raise Refused("a training loop without Megatron-core's schedules and with --pipeline-model-parallel-size above 1")
                return look(self)
            _before_step(alone)
        return original(self, *args, **kwargs)
    module.GPTModel.forward = forward


def _seen(made, into):
    @functools.wraps(made)
    def wrapper(self, *args, **kwargs):
        into.add(self)
        return made(self, *args, **kwargs)
    return wrapper


def watch_torch_optimizers(module) -> None:
    module.Optimizer.__init__ = _seen(module.Optimizer.__init__, torch_optimizers)


def watch_megatron_optimizers(module) -> None:
    module.MegatronOptimizer.__init__ = _seen(module.MegatronOptimizer.__init__, megatron_optimizers)


# ---- checkpoints

def _local_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def watch_checkpoints(module) -> None:
    """megatron.core.dist_checkpointing: save and load of the formats of today."""
    save, load = module.save, module.load

    @functools.wraps(save)
    def noted_save(sharded_state_dict, checkpoint_dir, *args, **kwargs):
        result = save(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        if _local_first():
            mover.saved(str(checkpoint_dir))
        return result

    @functools.wraps(load)
    def noted_load(sharded_state_dict, checkpoint_dir, *args, **kwargs):
        result = load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        mover.loaded(str(checkpoint_dir))
        return result

    module.save, module.load = noted_save, noted_load


def watch_training_checkpoints(module) -> None:
    """megatron.training.checkpointing: --ckpt-format torch, where every rank has files of its own under iter_…, which dist_checkpointing never sees."""
    save, base = module.save_checkpoint, module._load_base_checkpoint

    @functools.wraps(save)
    def noted_save(iteration, *args, **kwargs):
        result = save(iteration, *args, **kwargs)
        if _local_first():
            options = module.get_args()
            if not getattr(options, "use_dist_ckpt", False):
                mover.saved(os.path.join(options.save, f"iter_{iteration:07d}"))
            elif getattr(options, "non_persistent_ckpt_type", None) == "local" and mover.order is not None:
                say.warn_once("experts-local", f"--non-persistent-ckpt-type local: no {experts.NOTE} is written; a job that resumes from such a "
                              "checkpoint has its experts moved once more")
        return result

    @functools.wraps(base)
    def noted_base(load_dir, args, rank0=False, *rest, **kwargs):
        result = base(load_dir, args, rank0, *rest, **kwargs)
        name = result[1] if isinstance(result, tuple) and len(result) > 1 else ""
        if not rank0 and isinstance(name, str) and name.endswith(".pt") and result[0] is not None:
            folder = os.path.dirname(name)
            mover.loaded(folder if os.path.exists(os.path.join(folder, experts.NOTE)) else os.path.dirname(folder))
        return result

    module.save_checkpoint, module._load_base_checkpoint = noted_save, noted_base


WATCHES = {
    "torch.optim.optimizer": watch_torch_optimizers,
    "megatron.core.optimizer.optimizer": watch_megatron_optimizers,
    "megatron.core.pipeline_parallel.schedules": watch_schedules,
    "megatron.core.models.gpt.gpt_model": watch_model,
    "megatron.core.dist_checkpointing": watch_checkpoints,
    "megatron.training.checkpointing": watch_training_checkpoints,
}


def order() -> Optional[experts.Order]:
    """What slots hold: order()[layer][slot] is the checkpoint's number of the expert; None: experts are where the checkpoint has them."""
    return mover.order
