"""What the adapters of all frameworks share: what was found about a job, wrapping of methods, and joining the job.

Owns: Finding, wrap(), Watch (an Observer behind fences: nothing that fails in it reaches the job). Not: any framework's names.
"""

import functools
import inspect
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from . import say

REFUSE = "refuse"  # samples must not, or need not, change ranks: the job runs unplaced
BLIND = "blind"  # placing would be right, but routing cannot be seen: nothing new is learned (RAILYARD_HOME_MODEL still helps)
WARN = "warn"  # right but for what the framework itself makes depend on who shares a rank


class Finding(NamedTuple):
    kind: str
    option: str  # as the framework calls it
    why: str

    def text(self) -> str:
        return "%s: %s" % (self.option, self.why)


def refusals(findings: Sequence[Finding], strict: bool = False) -> List[str]:
    """One line each; strict: what would only be warned about is refused too."""
    return [f.text() for f in findings if f.kind == REFUSE or (strict and f.kind == WARN)]


class Unknown(Exception):
    """A framework's code is not what this adapter knows: it is left alone."""


def positions(function: Callable, *names: str) -> Dict[str, int]:
    """Where a method's arguments are among its positional ones, self not counted (-1: by keyword only). Unknown where one is
    missing."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    found = {}
    for i, p in enumerate(parameters):
        found[p.name] = i if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) else -1
    missing = [n for n in names if n not in found]
    if missing:
        raise Unknown("%s takes no %s" % (getattr(function, "__qualname__", function), ", ".join(missing)))
    return found


def argument(where: Dict[str, int], name: str, args: Sequence[Any], kwargs: Dict[str, Any]) -> Any:
    if name in kwargs:
        return kwargs[name]
    i = where.get(name, -1)
    return args[i] if 0 <= i < len(args) else None


def built(framework: str, look: Callable) -> Callable:
    """For wrap(): __init__, after which look(self) sees what was made. What fails there ends placement, not the job."""
    def make(original):
        def __init__(self, *args, **kwargs):
            original(self, *args, **kwargs)
            try:
                look(self)
            except Exception as e:
                from . import job
                job.stop("%s: %s: %s" % (framework, type(e).__name__, e))
        return __init__
    return make


def watched(watch: Any, begin: Callable) -> Callable:
    """For wrap(): a model's forward pass as a micro-batch, where begin(self, args, kwargs) says that it is one."""
    def make(original):
        def forward(self, *args, **kwargs):
            if watch.observer is None or compiling():
                return original(self, *args, **kwargs)
            try:
                opened = begin(self, args, kwargs)
            except Exception as e:
                watch.failed(e)
                opened = False
            if not opened:
                return original(self, *args, **kwargs)
            whole = False
            try:
                result = original(self, *args, **kwargs)
                whole = True
                return result
            finally:
                watch.close(whole)
        return forward
    return make


def wrap(cls: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """cls.name becomes make(cls.name), which keeps its name, text, signature and, as __wrapped__, the original. Once."""
    original = getattr(cls, name)
    if getattr(original, "railyard", False):
        return
    wrapper = functools.wraps(original)(make(original))
    wrapper.railyard = True
    setattr(cls, name, wrapper)


def compiling() -> bool:
    """Whether torch.compile is reading the caller: it shall read the original alone."""
    import torch
    return torch.compiler.is_compiling()


class Watch:
    """An observer as wrappers call it: after the first error in it, it is no more, in one line, and the job goes on."""

    def __init__(self) -> None:
        self.observer: Any = None

    def failed(self, e: BaseException) -> None:
        say.warn("no more watching of routing on this rank: %s: %s" % (type(e).__name__, e))
        self.observer = None

    def open(self, tokens: Any, chunk: int = 0) -> bool:
        observer = self.observer
        if observer is None:
            return False
        try:
            observer.open(tokens, chunk)
            return True
        except Exception as e:
            self.failed(e)
            return False

    def layer(self, number: int, routing: Any, b: int, batch_first: bool = False) -> None:
        observer = self.observer
        if observer is None:
            return
        try:
            observer.layer(number, routing, b, batch_first)
        except Exception as e:
            self.failed(e)

    def close(self, whole: bool) -> None:
        observer = self.observer
        if observer is None:
            return
        try:
            observer.close(whole)
        except Exception as e:
            self.failed(e)


def join(job: Any, findings: Sequence[Finding], description: Dict[str, Any], **observer: Any) -> Optional[Any]:
    """Refuses what must be refused, says hello, and returns the Observer where routing can and shall be watched."""
    from .observe import Observer
    mode, record = job.setting("RAILYARD_PLACEMENT"), job.setting("RAILYARD_ROUTING")
    refused = refusals(findings) if mode == "batch" else []
    blind = [f for f in findings if f.kind == BLIND]
    for text in refused:
        job.stop(text)
    job.describe(**description)
    if mode == "layer" and not description["framework"].startswith("megatron-core"):
        job.stop("RAILYARD_PLACEMENT=layer: samples move between the layers of Megatron-core only, not of %s" % description["framework"])
    if mode in ("off", "layer") and not record or refused and not record:
        return None
    if blind:
        if job.rank == 0:
            for f in blind:
                say.warn("routing is not watched, and nothing learned: " + f.text())
        return None
    until = None if record else job.stopped
    return Observer(job.board, job.rank, description["dp"], description["dp_size"], description["layers"],
                    description["n_experts"], until=until,
                    **observer)
