"""Waits for modules to be imported, then patches them.

Owns: the finder on sys.meta_path, and which of our modules wait for which of the frameworks'. Not: the patches.

The finder finds nothing itself. Asked for a module that somebody waits for, it lets the others find it and puts a loader around
theirs that runs the module as ever and then tells who waits; nothing of that remains on the module. It leaves sys.meta_path
when nobody waits any more.
"""

import importlib
import importlib.util
import os
import sys
import threading
from typing import Callable, Dict, List

from . import say

# What a framework's first import makes us import: modules of ours, each with WATCHES = {module: function(module)}, and
# which settings they are for (None: any that starts the adapter at all).
ADAPTERS = {
    "torch.utils.data": [("batch", ("batch",))],
    "megatron.core": [
        ("megatron", ("batch", "watch", "layer")),
        ("megatron_experts", ("batch", "watch", "experts", "layer")),
        ("megatron_layers", ("layer",)),
    ],
    "deepspeed": [("deepspeed", ("batch", "watch", "layer")), ("deepspeed_experts", ("batch", "watch", "experts"))],
}

_waiting: Dict[str, List[Callable]] = {}
_triggers: Dict[str, Callable] = {}
_lock = threading.RLock()


class _Loader:
    """Another's loader, after whose exec_module() the module's patches are applied."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec) if hasattr(self._loader, "create_module") else None

    def exec_module(self, module):
        if module.__spec__ is not None and module.__spec__.loader is self:
            module.__spec__.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        _tell(module.__name__, sys.modules.get(module.__name__, module))


class _Finder:
    """First on sys.meta_path while anybody waits."""

    def __init__(self):
        self._busy = threading.local()

    def find_spec(self, name, path=None, target=None):
        if name in _triggers:
            with _lock:
                trigger = _triggers.pop(name, None)
            if trigger is not None:
                _guarded(trigger, name, None)
        if name not in _waiting or getattr(self._busy, "name", None) == name:
            return None
        self._busy.name = name
        try:
            spec = None
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = find(name, path, target) if finder is not self and find else None
                if spec is not None:
                    break
        finally:
            self._busy.name = None
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            if spec is not None:
                _guarded(_cannot, name, None)
            return spec
        spec.loader = _Loader(spec.loader)
        return spec


_finder = _Finder()


def _cannot(_):
    raise ImportError("its loader has no exec_module()")


def _guarded(function, name, module):
    """Nothing of ours ends an import: what fails is told, and placement is off."""
    try:
        function(module)
    except Exception as e:
        from . import job

        job.stop(f"the patch of {name} failed: {say.failure(e)}")


def _tell(name, module):
    with _lock:
        functions = _waiting.pop(name, [])
        _leave()
    for function in functions:
        _guarded(function, name, module)


def _leave():
    if not _waiting and not _triggers and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _join():
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def when_imported(name: str, function: Callable) -> None:
    """Calls function(module) once, after module `name` was executed: at once if that is so already. What it raises is told in
    one line, and placement is off."""
    with _lock:
        module = sys.modules.get(name)
        begun = module is not None and getattr(getattr(module, "__spec__", None), "_initializing", False)
        if module is None or (begun and name in _waiting):
            _waiting.setdefault(name, []).append(function)
            _join()
            return
    # One that is being imported right now and whose end nobody told us of is patched as far as it goes: better than never.
    _guarded(function, name, module)


def wants() -> set:
    """What settings ask for: of "batch", "layer", "watch", "experts". From the environment alone: this runs in every process of a job."""
    env = os.environ
    out = set()
    placement = env.get("RAILYARD_PLACEMENT", "").strip().lower()
    if placement not in ("", "off"):
        out.add(placement if placement in ("batch", "layer") else "watch")
    if env.get("RAILYARD_ROUTING"):
        out.add("watch")
    if env.get("RAILYARD_EXPERTS"):
        out.add("experts")
    return out


def start(adapters=None) -> None:
    """Called by sitecustomize.py: from here on the frameworks' modules are waited for."""
    wanted = wants()
    for framework, ours in (ADAPTERS if adapters is None else adapters).items():
        names = [name for name, purposes in ours if wanted & set(purposes)]
        if not names:
            continue
        if framework in sys.modules:
            _guarded(_loads(names), framework, None)
            continue
        with _lock:
            _triggers[framework] = _loads(names)
            _join()


def _loads(names):
    """Imports these modules of ours, which then wait for what they patch. Done when the framework's own import begins, so
    that none of its modules is missed."""

    def load(_):
        for name in names:
            full = f"{__package__}.{name}"
            try:
                module = importlib.import_module(full)
            except ModuleNotFoundError as e:
                if e.name != full:
                    raise
                continue  # this Railyard has no such part
            for target, function in module.WATCHES.items():
                when_imported(target, function)

    return load
