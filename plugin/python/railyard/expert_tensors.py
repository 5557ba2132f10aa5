"""What belongs to an expert: parameters, copies of them, what optimizers remember of them; and to a router's row.

Owns: optimizers seen being made, finding what they keep of a parameter, one layer's tensors for experts.py, refusing what is
not known. Not: how a framework's modules are laid out and wrapped (megatron_experts.py, deepspeed_experts.py).

Optimizers are not to be found from a model, so they are seen being made: weak references, from a wrap of the base class'
constructor. A parameter that learns and is in no optimizer seen is refused: something else might hold a copy of it. Where an
optimizer keeps parameters flattened or sharded over data-parallel ranks, ranks hold unlike parts of unlike experts. That is
refused once it remembers something; but as long as all that it remembers is zero, as before its first step, its fp32 copies can
be made anew from the moved weights, by the method that it has for weights that changed outside.
"""

import functools
import hashlib
import json
import weakref
from typing import Callable, Dict, List, NamedTuple

from .experts import Layer, Refused

torch_optimizers: "weakref.WeakSet" = weakref.WeakSet()


def seen(made, into):
    """A constructor that remembers what it made."""

    @functools.wraps(made)
    def wrapper(self, *args, **kwargs):
        into.add(self)
        return made(self, *args, **kwargs)

    return wrapper


def watch_torch_optimizers(module) -> None:
    global _watching
    if not _watching:  # two frameworks' adapters ask for it
        _watching = True
        module.Optimizer.__init__ = seen(module.Optimizer.__init__, torch_optimizers)


_watching = False


class Flattened(NamedTuple):
    """An optimizer that keeps parameters in a form in which experts cannot be told apart."""

    option: str  # that asks for it
    params: list
    state: dict  # what it remembers, by whatever key
    renew: Callable  # makes its copies anew from the parameters
    loses: Callable  # () → would that lose anything: are the copies more than what the parameters say?


class Holders:
    """Where the optimizers of this process keep what belongs to a parameter. main: id of a parameter → its copy, which the optimizer steps."""

    def __init__(self, main: Dict[int, object], flattened: List[Flattened]) -> None:
        self.main, self.within, self.used = main, {}, []
        self.flattened = {id(p): one for one in flattened for p in one.params}
        for optimizer in list(torch_optimizers):
            if type(optimizer).__name__ == "HybridDeviceOptimizer" or getattr(optimizer, "sub_optimizers", None):
                raise Refused("--optimizer-cpu-offload (the optimizer keeps copies of parameters in host memory)")
            for group in optimizer.param_groups:
                for p in group["params"]:
                    self.within.setdefault(id(p), []).append(optimizer)

    def _renewable(self, parameter) -> bool:
        one = self.flattened.get(id(parameter))
        if one is None:
            return False
        if all(one is not other for other in self.used):
            if any(
                _is_tensor(v) and v.numel() > 1 and bool(v.detach().ne(0).any())
                for state in one.state.values()
                for v in state.values()
            ):
                raise Refused(
                    f"{one.option} (the optimizer's states are flattened or sharded over ranks, and there are some already)"
                )
            if one.loses():
                raise Refused(
                    f"{one.option} (the optimizer's copies of parameters are more precise than the parameters, and cannot be moved)"
                )
            self.used.append(one)
        return True

    def renew(self) -> None:
        for one in self.used:
            one.renew()

    def tensors(self, parameter, name: str) -> tuple:
        """[(what, tensor)] that are to be moved with this parameter, itself first, and [(what, number)] that must be the same for all experts."""
        moved, equal = [("", parameter.data)], []
        if self._renewable(parameter):
            return moved, [("flattened", 1)]
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
                    raise Refused(
                        f"{type(optimizer).__name__} keeps a state {key!r} of {name} that is not of the parameter's shape (--optimizer)"
                    )
        return moved, equal


def _is_tensor(value) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def plain(tensor, name: str, device) -> None:
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise Refused(f"{name} is a {type(tensor).__name__}, no plain tensor (fully sharded, or of a quantized type)")
    if not tensor.is_contiguous() or tensor.device != device:
        raise Refused(f"{name} is not contiguous in memory, or not on the same device as the experts' weights")


def no_gradients(modules) -> None:
    """Gradients that are there already and not zero would belong to the wrong experts; before a step there are none."""
    import torch

    grads = [
        g
        for module in modules
        for p in module.parameters()
        for g in (getattr(p, "grad", None), getattr(p, "main_grad", None))
        if g is not None
    ]
    if grads and bool(torch.stack([g.detach().ne(0).any() for g in grads]).any()):
        raise Refused("there are gradients already, in the midst of a step")


def layer_of(
    index: int, name: str, group, slots: List[list], router: List[tuple], holders: Holders, tensor_index: int = 0
) -> Layer:
    """One layer of this rank, every tensor looked at.

    slots[i]: [(name, parameter or buffer, part)] of local expert i; part None: all of it, else the part-th of as many equal
    parts as there are experts here
    router:   [(name, parameter or buffer)] that have a row for each expert of the layer
    """
    import torch
    import torch.distributed as dist

    each = len(slots)
    device = slots[0][0][1].device
    moved_slots, kinds, equal = [], [], []
    for parts in slots:
        tensors, kind, same = [], [], []
        for what, t, part in parts:
            plain(t, f"{name}: {what}", device)
            moved, numbers = holders.tensors(t, f"{name}: {what}") if isinstance(t, torch.nn.Parameter) else ([("", t)], [])
            for copy, one in moved:
                plain(one, f"{name}: {what} {copy}".strip(), device)
                one = one.detach() if part is None else one.detach().view(each, -1)[part]
                tensors.append(one)
                kind.append((what, copy, str(one.dtype), list(one.shape)))
            same.append((what, numbers))
        moved_slots.append(tensors)
        kinds.append(kind)
        equal.append(same)
    if any(kind != kinds[0] for kind in kinds):
        raise Refused(f"{name}: local experts that hold unlike tensors or optimizer states")
    if any(same != equal[0] for same in equal):
        raise Refused(f"{name}: experts whose optimizer is not at the same step")
    rows, row_kinds = [], []
    for what, t in router:
        moved, numbers = holders.tensors(t, f"{name}: router.{what}") if isinstance(t, torch.nn.Parameter) else ([("", t)], [])
        for copy, one in moved:
            plain(one, f"{name}: router.{what} {copy}".strip(), one.device)
            rows.append(one.detach())
            row_kinds.append((what, copy, str(one.dtype), list(one.shape), numbers))
    signature = hashlib.sha256(json.dumps([kinds[0], equal[0], row_kinds]).encode()).hexdigest()[:16]
    return Layer(
        index, group, dist.get_process_group_ranks(group), dist.get_rank(group), tensor_index, moved_slots, rows, signature
    )
