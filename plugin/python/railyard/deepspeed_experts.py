"""RAILYARD_EXPERTS in DeepSpeed jobs: classic MoE layers (deepspeed.moe.layer.MoE).

Owns: finding layers, groups and optimizers, the moment, seeing checkpoints. Not: the agreement and the exchange (experts.py),
what optimizers keep (expert_tensors.py).

The moment is DeepSpeedEngine.forward in training mode with gradients on: without pipelines every rank calls it first of all.
Pipelines and AutoEP layers are refused: layers have no numbers that all ranks know, and experts another layout. A layer's
number is its place among the model's MoE layers. What is moved: all parameters and buffers of each of deepspeed_experts, and
the rows of gate.wg.weight. Without ZeRO and in fp32 the optimizer keeps things per parameter. Every other optimizer of
DeepSpeed flattens; refresh_fp32_params makes its copies anew while it remembers nothing and no checkpoint was loaded into it.
ZeRO-3 has no whole parameters: refused.
"""

import functools
import os

from . import experts
from .expert_tensors import Flattened, Holders, layer_of, no_gradients, plain, watch_torch_optimizers
from .experts import Holding, Refused


def _holders(engine) -> Holders:
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    if not hasattr(wrapper, "refresh_fp32_params"):
        return Holders({}, [])
    option = f"zero_optimization.stage {stage}" if stage else "bf16 or fp16"
    if stage > 2:
        raise Refused(f"{option} (parameters are sharded)")
    if getattr(wrapper, "cpu_offload", False):
        raise Refused("zero_optimization.offload_optimizer (the optimizer keeps copies of parameters in host memory)")
    state = getattr(getattr(wrapper, "optimizer", None), "state", {})
    return Holders(
        {},
        [
            Flattened(
                option, list(engine.module.parameters()), state, wrapper.refresh_fp32_params, lambda: engine.global_steps > 0
            )
        ],
    )


def look(engine) -> Holding:
    modules = list(engine.module.modules())
    if any("AutoEP" in type(m).__name__ for m in modules):
        raise Refused("AutoEP layers, which Railyard does not know")
    moes = [
        m for m in modules if any(kind.__name__ == "MoE" and kind.__module__ == "deepspeed.moe.layer" for kind in type(m).__mro__)
    ]
    if not moes:
        raise Refused("the model has no experts")
    if len({(m.num_experts, m.ep_size) for m in moes}) > 1:
        raise Refused("layers of unlike numbers of experts or expert-parallel ranks")
    holders = []

    def one(index, moe):
        gate, block = moe.deepspeed_moe.gate, moe.deepspeed_moe.experts.deepspeed_experts
        router = list(gate.named_parameters()) + list(gate.named_buffers())
        for name, t in router:
            plain(t, f"gate.{name}", t.device)
            if name not in ("wg.weight", "wg.bias") or t.shape[0] != moe.num_experts:
                raise Refused(f"the gate has {name}, and Railyard does not know whether it is per expert")
        slots = [[(name, t, None) for name, t in list(e.named_parameters()) + list(e.named_buffers())] for e in block]
        return layer_of(
            index, f"MoE layer {index + 1}", moe.deepspeed_moe.ep_group, slots, router, holders[0], _tensor_index(moe)
        )

    def prepare(source):
        holders.append(_holders(engine))
        no_gradients([moe.deepspeed_moe for moe in moes])
        return [one(index, moe) for index, moe in enumerate(moes)]

    def settle():
        holders[0].renew()

    return Holding(len(moes), moes[0].num_experts, moes[0].ep_size, prepare, settle)


def _tensor_index(moe) -> int:
    """Among the ranks that hold parts of one expert: an expert-parallel group has members of one index only."""
    from deepspeed.utils import groups

    if not moe.enable_expert_tensor_parallelism or groups.mpu is None:
        return 0
    return (
        groups.mpu.get_tensor_model_parallel_rank()
        if hasattr(groups.mpu, "get_tensor_model_parallel_rank")
        else groups.mpu.get_model_parallel_rank()
    )


def watch_engine(module) -> None:
    import torch

    kind = module.DeepSpeedEngine
    forward, save, load = kind.forward, kind.save_checkpoint, kind.load_checkpoint

    @functools.wraps(forward)
    def placed_forward(self, *args, **kwargs):
        if experts.due() and self.training and torch.is_grad_enabled():
            experts.before_step(lambda: look(self))
        return forward(self, *args, **kwargs)

    @functools.wraps(save)
    def noted_save(self, save_dir, tag=None, *args, **kwargs):
        result = save(self, save_dir, tag, *args, **kwargs)
        experts.saved(os.path.join(save_dir, str(tag if tag is not None else f"global_step{self.global_steps}")))
        return result

    @functools.wraps(load)
    def noted_load(self, *args, **kwargs):
        result = load(self, *args, **kwargs)
        path = result[0] if isinstance(result, tuple) else None
        if isinstance(path, str):
            folders = [folder for folder in (path, os.path.dirname(path)) if os.path.isdir(folder)]
            noted = [folder for folder in folders if os.path.exists(os.path.join(folder, experts.NOTE))]
            experts.loaded((noted or folders or [os.path.dirname(path)])[0])
        return result

    kind.forward, kind.save_checkpoint, kind.load_checkpoint = placed_forward, noted_save, noted_load


def watch_pipelines(module) -> None:
    train = module.PipelineEngine.train_batch

    def never():
        raise Refused("PipelineEngine (layers have no numbers that all ranks know)")

    @functools.wraps(train)
    def refused_train(self, *args, **kwargs):
        if experts.due():
            experts.before_step(never)
        return train(self, *args, **kwargs)

    module.PipelineEngine.train_batch = refused_train


experts.begin()

WATCHES = {
    "torch.optim.optimizer": watch_torch_optimizers,
    "deepspeed.runtime.engine": watch_engine,
    "deepspeed.runtime.pipe.engine": watch_pipelines,
}
