"""Megatron-core 0.16: where samples can move between layers, and which options forbid it.

Owns: wrapping GPTModel.forward (a micro-batch), TransformerLayer._forward_mlp (where samples arrive), TransformerBlock.forward
(where they come home), TopKRouter.forward and the dispatcher's token_dispatch (what is told of a layer), its token_combine and
TransformerLayer._forward_post_mlp (where samples move inside combine), checkpoint() (so that what is recomputed moves as it did);
the findings. Not: moving, deciding (layers.py). megatron.py must have been loaded before.

Samples move between attention and experts: what a layer's attention has made of them (the residual stream) is all that there
is of a sample there, and the answer to the layer before has had the whole of attention to come. After the last layer they go
home behind the final norm, which looks at each token alone: so that one place serves models with and without it.
"""

import contextlib
import functools
import os
import threading
import weakref
from typing import Any, Callable, Dict, List, Optional

from . import adapt, layers, megatron, say
from .adapt import Unknown

KNOWN = (0, 16)
# A configuration's fields that must not be set, and why.
UNSURE = {
    "fp8": "scales are made of all that a rank has",
    "fp4": "scales are made of all that a rank has",
    "quant_recipe": "scales are made of all that a rank has",
    "moe_expert_capacity_factor": "which tokens are dropped depends on who shares a rank",
    "overlap_moe_expert_parallel_comm": "layers run by a schedule that passes them by",
    "delay_wgrad_compute": "layers run by a schedule of their own",
    "variable_seq_lengths": "micro-batches have no fixed shape",
    "cpu_offloading": "what is kept of a layer is elsewhere",
    "fine_grained_activation_offloading": "what is kept of a layer is elsewhere",
    "experimental_attention_variant": "not known what it keeps of a sample",
    "heterogeneous_block_specs": "layers are of several kinds",
    "is_hybrid_model": "layers are of several kinds",
    "qk_clip": "it looks at all that a rank has",
    "inference_fuse_tp_communication": "layers hand their sums on inside kernels",
}
SIZES = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size", "expert_tensor_parallel_size")

_now = threading.local()  # .micro: the micro-batch that this thread runs forward, or recomputes a part of
_state: Dict[str, Any] = {"asked": False, "mover": None}
_dispatchers: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
_norms: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()
_causal: Dict[Any, Any] = {}


# --- What options mean for moving samples between layers ---


def refusals(config: Any, facts: Dict[str, Any]) -> List[str]:
    """Why samples must stay, one line each. facts: as megatron.findings() takes them, and position (of embeddings), moe_layers
    (how many)."""
    out = [f.text() for f in megatron.findings(config, facts) if f.kind != adapt.WARN]
    told = " ".join(out)

    def refuse(option: str, why: str) -> None:
        if option not in told:
            out.append("%s: %s" % (option, why))

    if tuple(facts["version"][:2]) != KNOWN:
        refuse("megatron-core %s" % ".".join(map(str, facts["version"])), "layer placement knows %d.%d only" % KNOWN)
    for name in SIZES:
        size = getattr(config, name, 1) or 1
        if size > 1:
            refuse("%s=%d" % (name, size), "ranks that share samples would have to move them alike")
    for name, why in UNSURE.items():
        if getattr(config, name, None):
            refuse(name, why)
    if getattr(config, "moe_token_dispatcher_type", "alltoall") != "alltoall":
        refuse("moe_token_dispatcher_type=%s" % config.moe_token_dispatcher_type, "layer placement knows alltoall only")
    if (getattr(config, "cuda_graph_impl", None) or "none") != "none":
        refuse("cuda_graph_impl", "parts of layers run from CUDA graphs")
    kinds = getattr(config, "moe_router_load_balancing_type", "none")
    if "sinkhorn" in ([kinds] if isinstance(kinds, str) else list(kinds)):
        refuse("moe_router_load_balancing_type=sinkhorn", "it routes by all samples of a rank's micro-batch")
    if facts.get("position") == "mrope":
        refuse("position_embedding_type=mrope", "positions are each sample's own, in every layer")
    if facts.get("moe_layers", 2) < 2:
        refuse("moe_layer_freq", "nothing to gain: there is one layer with experts only")
    return out


OUTSIDE = {
    "moe_shared_expert_intermediate_size": "shared experts' results are where the sample was",
    "moe_permute_fusion": "the order of its rows is not known here",
    "moe_router_padding_for_quantization": "tokens have more rows than experts",
    "moe_router_padding_for_fp8": "tokens have more rows than experts",
    "moe_latent_size": "not known what combine carries",
    "mlp_chunks_for_training": "several combines for one layer",
}


def outside(config: Any, setting: Callable[[str], str]) -> str:
    """Why samples cannot move inside combine, so that they do at the block's boundary; "" if they can."""
    from . import combining

    for name, why in OUTSIDE.items():
        if (getattr(config, name, None) or 0) not in (0, 1) or getattr(config, name, None) is True:
            return "%s: %s" % (name, why)
    if setting("RAILYARD_COMBINE").startswith("sum"):
        return "RAILYARD_COMBINE=%s: what is redirected is not summed" % setting("RAILYARD_COMBINE")
    if os.environ.get("RY_TEST_OUTSIDE"):
        return "RY_TEST_OUTSIDE is set"
    try:
        combining.Library()
    except (AttributeError, OSError):
        return "librailyard.so is not preloaded"
    if setting("RAILYARD_STRATEGY") == "observe":
        return "RAILYARD_STRATEGY=observe: nothing is redirected"
    if setting("RAILYARD_HOLD") == "0":
        return "RAILYARD_HOLD=no: what is redirected is enqueued when it is called"
    return ""


NORMS = ("LayerNorm", "RMSNorm", "FusedLayerNorm", "FusedRMSNorm", "WrappedTorchNorm")


def apart(config: Any, setting: Callable[[str], str], norms: List[Any]) -> str:
    """Why the residual cannot ride along with results inside combine; "" if it can. norms: of the layers with experts."""
    if setting("RAILYARD_RESIDUAL") != "rides":
        return "RAILYARD_RESIDUAL=%s" % setting("RAILYARD_RESIDUAL")
    if getattr(config, "hidden_dropout", 0.0):
        return "hidden_dropout: it is behind the sum that the residual would be in"
    if getattr(config, "fp32_residual_connection", False):
        return "fp32_residual_connection: rows have fewer bits"
    if getattr(config, "recompute_granularity", None) == "selective":
        known = {"moe", "mlp", "layernorm", "moe_act"} & set(getattr(config, "recompute_modules", None) or [])
        if known:
            return "recompute_modules %s: without what is around them" % sorted(known)
    other = sorted({type(n).__name__ for n in norms} - set(NORMS))
    return "norms of kinds that are not known: %s" % other if other else ""


def unfit(shape: List[int], tokens: Any, extra: Dict[str, Any]) -> str:
    """Why nobody must move in this micro-batch; "" if somebody may."""
    if tokens is None or list(tokens.shape) != [shape[1], shape[0]]:
        return "its shape is another one than that of the first"
    for name, value in extra.items():
        if value is not None and (name != "extra_block_kwargs" or value):
            return "it has %s" % name
    return ""


def mask_is_causal(mask: Any, s: int) -> Any:
    """A tensor of one element: whether each sample's mask [b or 1, 1, s, s] hides what comes later, and nothing else."""
    import torch

    if mask.dtype != torch.bool or mask.dim() != 4 or tuple(mask.shape[1:]) != (1, s, s):
        return torch.zeros(1, dtype=torch.bool, device=mask.device)
    causal = _causal.get((s, mask.device))
    if causal is None:
        causal = _causal[(s, mask.device)] = torch.ones(s, s, dtype=torch.bool, device=mask.device).triu(1)
    return mask.eq(causal).all().view(1)


# --- The job ---


def _number(layer: Any) -> Optional[int]:
    """Among the layers with experts of the model that the job is described by; None for any other."""
    router = getattr(layer.mlp, "router", None)
    return megatron._numbers.get(router) if router is not None else None


def _offer(model: Any, tokens: Any, setting: Callable[[str], str]) -> Dict[str, Any]:
    """What this rank says before its first training step. Raises, or says no, where samples must stay."""
    from megatron.core.transformer import transformer_layer

    config = model.config
    description = megatron.describe(config)
    moe = [layer for layer in model.decoder.layers if _number(layer) is not None]
    facts = {**megatron._facts, "position": getattr(model, "position_embedding_type", None), "moe_layers": len(moe)}
    no = refusals(config, facts)
    if not no and any(type(layer) is not transformer_layer.TransformerLayer for layer in model.decoder.layers):
        no.append("layers of kinds that are not known: %s" % sorted({type(layer).__name__ for layer in model.decoder.layers}))
    if not no and len(moe) != description["layers"]:
        no.append("%d layers with experts of %d are on this rank" % (len(moe), description["layers"]))
    if not no and any("_forward_mlp" in vars(layer) or "forward" in vars(layer) for layer in model.decoder.layers):
        no.append("layers whose forward is replaced")
    if not no and any(type(p).__name__ != "Parameter" for p in model.parameters()):
        no.append("parameters that are not plain tensors (FSDP)")
    if not no and tokens is None:
        no.append("a micro-batch without tokens")
    for layer in moe:
        _dispatchers[layer.mlp.token_dispatcher] = megatron._numbers[layer.mlp.router]
        _norms[layer.mlp.token_dispatcher] = layer.pre_mlp_layernorm
    b, s = tuple(tokens.shape) if tokens is not None else (0, 0)
    return {
        "no": no[0] if no else "",
        "shape": [s, b, config.hidden_size, str(config.params_dtype)],
        "model": [description["layers"], description["n_experts"], description["topk"]],
        "group": description["ep_ranks"],
        "outside": outside(config, setting),
        "apart": apart(config, setting, [layer.pre_mlp_layernorm for layer in moe]),
    }


def _set_up(model: Any, tokens: Any) -> None:
    """At the first training forward pass of the model that the job is described by, on every rank."""
    from megatron.core import parallel_state

    from . import job as jobs

    _state["asked"] = True
    job = jobs.current()
    if job is None:
        return say.warn("samples stay where they are: torch.distributed is not set up")
    try:
        offer = _offer(model, tokens, job.setting)
        if job.stopped(now=True):
            offer["no"] = offer["no"] or "placement is off: %s" % job.stopped()
    except Exception as e:
        offer = {"no": say.failure(e)}
    forced = os.environ.get("RY_TEST_LAYERS")  # for tests: a seed
    made = {"make_planner": lambda **_: layers.Forced(int(forced))} if forced else {}
    group = parallel_state.get_expert_model_parallel_group()
    _state["mover"] = mover = layers.start(job, offer, group, job.rows_once(), **made)
    if forced and mover is not None:
        mover.late = 60.0
        say.warn_once("layers-forced", "RY_TEST_LAYERS=%s: samples move for no reason" % forced)
    if os.environ.get("RY_TEST_LATE") and mover is not None:  # for tests: seconds that decisions are waited for
        mover.late = float(os.environ["RY_TEST_LATE"])
    if mover is not None and job.rank == 0 and offer["shape"][1] > 1:
        for f in megatron.findings(model.config, megatron._facts):
            if f.kind == adapt.WARN:
                say.warn_once(f.option, "placed training differs slightly from unplaced: " + f.text())


# --- The micro-batch ---


def current() -> Any:
    return getattr(_now, "micro", None)


@contextlib.contextmanager
def entered(micro: Any):
    before = current()
    _now.micro = micro
    try:
        yield
    finally:
        _now.micro = before


def _wrap(owner: Any, name: str, make: Callable) -> None:
    original = getattr(owner, name)
    if getattr(original, "railyard_layers", False):
        return
    wrapper = functools.wraps(original)(make(original))
    wrapper.railyard_layers = True
    setattr(owner, name, wrapper)


def patch_model(module: Any) -> None:
    """megatron.core.models.gpt.gpt_model"""
    model = module.GPTModel
    extra = ("inference_context", "packed_seq_params", "inference_params", "padding_mask", "extra_block_kwargs")
    where = adapt.positions(model.forward, "input_ids", "attention_mask", *extra)

    def begun(self, args, kwargs) -> Optional[Any]:
        import torch

        mine = megatron._chunks.get(0)
        if not self.training or not torch.is_grad_enabled() or mine is None or mine() is not self:
            return None
        tokens = adapt.argument(where, "input_ids", args, kwargs)
        if not _state["asked"]:
            _set_up(self, tokens)
        mover = _state["mover"]
        if mover is None or mover.over is not None:
            return None
        mask, why = None, ""
        try:
            why = unfit([mover.s, mover.b], tokens, {name: adapt.argument(where, name, args, kwargs) for name in extra})
            mask = adapt.argument(where, "attention_mask", args, kwargs)
            mask = None if mask is None or why else mask_is_causal(mask, mover.s)
        except Exception as e:
            mask, why = None, say.failure(e)
        return mover.begin(why, mask)

    def make(original):
        def forward(self, *args, **kwargs):
            micro = None if adapt.compiling() or current() is not None else begun(self, args, kwargs)
            if micro is None:
                return original(self, *args, **kwargs)
            try:
                with entered(micro):
                    return original(self, *args, **kwargs)
            finally:
                _state["mover"].end(micro)

        return forward

    _wrap(model, "forward", make)


def patch_layer(module: Any) -> None:
    """megatron.core.transformer.transformer_layer"""
    layer = module.TransformerLayer
    adapt.positions(layer._forward_mlp, "hidden_states")

    def make(original):
        def _forward_mlp(self, hidden_states, *args, **kwargs):
            mover = _state["mover"]
            if mover is not None and not adapt.compiling():
                number = _number(self)
                if number is not None:
                    micro = current()
                    if micro is not None:
                        hidden_states = mover.arrive(micro, number, hidden_states)
                    elif self.training and _grad():
                        mover.foreign(number)
            return original(self, hidden_states, *args, **kwargs)

        return _forward_mlp

    _wrap(layer, "_forward_mlp", make)
    adapt.positions(layer._forward_post_mlp, "mlp_output_with_bias", "residual")

    def make_post(original):
        def _forward_post_mlp(self, mlp_output_with_bias, residual, *args, **kwargs):
            micro, number = current(), None if adapt.compiling() else _number(self)
            if micro is not None and number is not None:
                residual = _state["mover"].left(micro, number, residual)
            return original(self, mlp_output_with_bias, residual, *args, **kwargs)

        return _forward_post_mlp

    _wrap(layer, "_forward_post_mlp", make_post)


def _grad() -> bool:
    import torch

    return torch.is_grad_enabled()


def patch_block(module: Any) -> None:
    """megatron.core.transformer.transformer_block"""
    block = module.TransformerBlock
    if not hasattr(module, "tensor_parallel"):
        raise Unknown("transformer_block has no tensor_parallel")

    def make(original):
        def forward(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            micro = current()
            if micro is None or micro.over or adapt.compiling():
                return result
            if not hasattr(result, "requires_grad"):
                raise layers.Doubt("railyard: RAILYARD_PLACEMENT=layer: TransformerBlock returned %s" % type(result).__name__)
            return _state["mover"].home(micro, result)

        return forward

    _wrap(block, "forward", make)


def patch_router(module: Any) -> None:
    """megatron.core.transformer.moe.router"""

    def make(original):
        def forward(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            micro = current()
            if micro is not None and not micro.over and not adapt.compiling():
                number = megatron._numbers.get(self)
                if number is not None:
                    _state["mover"].routed(micro, number, result[1])
            return result

        return forward

    _wrap(module.TopKRouter, "forward", make)


def patch_dispatcher(module: Any) -> None:
    """megatron.core.transformer.moe.token_dispatcher"""
    dispatcher = module.MoEAlltoAllTokenDispatcher

    def splits(self) -> Any:
        """Rows that combine sends, and receives, by rank."""
        return [int(n) for n in self.output_splits], [int(n) for n in self.input_splits]

    def make(original):
        def token_dispatch(self, *args, **kwargs):
            micro, number = current(), None if adapt.compiling() else _dispatchers.get(self)
            if micro is None or number is None:
                return original(self, *args, **kwargs)
            mover = _state["mover"]
            mover.dispatching()
            rows, *rest = original(self, *args, **kwargs)
            if not micro.over:
                mover.dispatched(micro, number, rows, lambda: splits(self))
            return (mover.boarded(micro, number, rows, _norms.get(self), lambda: told(self)), *rest)

        return token_dispatch

    def told(self) -> Any:
        return (*splits(self), self.reversed_local_input_permutation_mapping)

    adapt.positions(dispatcher.dispatch_preprocess, "hidden_states", "routing_map")

    def make_first(original):
        def dispatch_preprocess(self, hidden_states, *args, **kwargs):
            micro, number = current(), None if adapt.compiling() else _dispatchers.get(self)
            if micro is not None and number is not None:
                hidden_states = _state["mover"].carried(micro, number, hidden_states)
            return original(self, hidden_states, *args, **kwargs)

        return dispatch_preprocess

    _wrap(dispatcher, "dispatch_preprocess", make_first)

    def make_combine(original):
        def token_combine(self, hidden_states, *args, **kwargs):
            micro, number = current(), None if adapt.compiling() else _dispatchers.get(self)
            if micro is None or number is None:
                return original(self, hidden_states, *args, **kwargs)
            return _state["mover"].combined(
                micro,
                number,
                hidden_states,
                lambda rows: original(self, rows, *args, **kwargs),
                lambda: told(self),
            )

        return token_combine

    _wrap(dispatcher, "token_dispatch", make)
    _wrap(dispatcher, "token_combine", make_combine)


def patch_checkpoint(module: Any) -> None:
    """megatron.core.tensor_parallel: what is recomputed belongs to the micro-batch that it was first computed in."""

    def make(original):
        def checkpoint(function, *args, **kwargs):
            micro = current()
            if micro is None:
                return original(function, *args, **kwargs)

            def again(*inputs, **more):
                with entered(micro):
                    return function(*inputs, **more)

            return original(again, *args, **kwargs)

        return checkpoint

    _wrap(module, "checkpoint", make)


WATCHES = {
    "megatron.core.models.gpt.gpt_model": patch_model,
    "megatron.core.transformer.transformer_layer": patch_layer,
    "megatron.core.transformer.transformer_block": patch_block,
    "megatron.core.transformer.moe.router": patch_router,
    "megatron.core.transformer.moe.token_dispatcher": patch_dispatcher,
    "megatron.core.tensor_parallel": patch_checkpoint,
}
