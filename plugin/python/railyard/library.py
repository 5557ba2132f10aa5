"""librailyard-engine.so through ctypes: live placement (src/live/live.h) and settings.

Owns: finding and loading the library, structures, arrays in and out, errors as exceptions. Not: what is asked of it, and when.
Standard library only; arrays may be NumPy's, array.array's, or anything with the buffer protocol.
"""

import ctypes
import os
import sys
import threading
from array import array
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

ABI = 3  # RAILYARD_LIVE_ABI


class Error(Exception):
    """What the C library said, or that it is not there."""


class Plan(NamedTuple):
    moved: int  # samples that change ranks; 0: as dealt
    dealt: float  # predicted share of what is sent that leaves its place: as dealt
    placed: float  # the same, as ordered
    why: str


class State(NamedTuple):
    sure: bool
    samples: int
    crossed: float
    even: float
    captured: float
    why: str


class _Job(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32)] + [
        (name, ctypes.c_int32) for name in ("ranks", "samples", "layers", "experts", "topk", "places", "distinct")
    ] + [("rank_place", ctypes.POINTER(ctypes.c_int32)), ("expert_place", ctypes.POINTER(ctypes.c_int32))]


class _Plan(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("moved", ctypes.c_int32), ("dealt", ctypes.c_double), ("placed", ctypes.c_double),
                ("why", ctypes.c_char * 192)]


class _State(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("sure", ctypes.c_int32), ("samples", ctypes.c_uint64), ("crossed", ctypes.c_double),
                ("even", ctypes.c_double), ("captured", ctypes.c_double), ("why", ctypes.c_char * 192)]


class Ahead(NamedTuple):
    moved: int  # samples that change places
    stay: float  # rows predicted to cross to the end of the micro-batch if all stay
    go: float  # the same as decided
    why: str
    inside: bool  # combine; else behind it


class Worth(NamedTuple):
    sure: bool
    samples: int
    batches: int
    home: float
    crossed: float
    carried: float
    why: str


class _LayersJob(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32)] + [
        (name, ctypes.c_int32) for name in ("ranks", "samples", "tokens", "layers", "experts", "topk", "places", "distinct", "combine")
    ] + [("rank_place", ctypes.POINTER(ctypes.c_int32)), ("expert_place", ctypes.POINTER(ctypes.c_int32))]


class _Ahead(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("moved", ctypes.c_int32), ("inside", ctypes.c_int32), ("stay", ctypes.c_double), ("go", ctypes.c_double),
                ("why", ctypes.c_char * 192)]


class _Worth(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("sure", ctypes.c_int32), ("samples", ctypes.c_uint64), ("batches", ctypes.c_uint64),
                ("home", ctypes.c_double), ("crossed", ctypes.c_double), ("carried", ctypes.c_double),
                ("why", ctypes.c_char * 192)]


class _Buffer(ctypes.Structure):  # Py_buffer: the address of read-only memory, which ctypes' own from_buffer() refuses
    _fields_ = [("buf", ctypes.c_void_p), ("obj", ctypes.py_object), ("len", ctypes.c_ssize_t), ("itemsize", ctypes.c_ssize_t),
                ("readonly", ctypes.c_int), ("ndim", ctypes.c_int), ("format", ctypes.c_char_p),
                ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("suboffsets", ctypes.c_void_p),
                ("internal", ctypes.c_void_p)]


# ---- the library ----


def engine_path() -> str:
    """Where librailyard-engine.so is: beside the librailyard.so that is preloaded; RAILYARD_ENGINE (for tests); where this
    package was installed or built."""
    tried = []
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                file = line.rstrip("\n").partition("/")[2]
                if os.path.basename(file) == "librailyard.so":
                    tried.append("/" + os.path.join(os.path.dirname(file), "librailyard-engine.so"))
                    break
    except OSError:
        pass  # no /proc: nothing is known of what is preloaded
    if os.environ.get("RAILYARD_ENGINE"):
        tried.append(os.environ["RAILYARD_ENGINE"])
    here = os.path.dirname(os.path.abspath(__file__))
    up = [os.path.normpath(os.path.join(here, *[".."] * n)) for n in range(4)]
    tried.append(os.path.join(up[3], "librailyard-engine.so"))  # LIBDIR/railyard/python/railyard
    tried.append(os.path.join(up[3], "build", "plugin", "librailyard-engine.so"))  # plugin/python/railyard of the sources
    for file in tried:
        if os.path.exists(file):
            return file
    raise Error("librailyard-engine.so is not at " + ", nor at ".join(tried))


def _load_quietly(path: str) -> ctypes.CDLL:
    """As src/control/load.h does it, and for its reasons: UCX comes along, and is to keep its hands off libc and signals. It
    sees an environment of its own while it is loaded; setenv() could move what another thread is reading."""
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    before = ctypes.cast(environ, ctypes.c_void_p).value
    entries, n = [], 0
    while before and environ[n] is not None:
        entries.append(environ[n])
        n += 1
    for entry in (b"UCX_MEM_EVENTS=n", b"UCX_HANDLE_ERRORS=none", b"UCX_DEBUG_SIGNO=0", b"UCX_VFS_ENABLE=n"):
        name = entry.partition(b"=")[0] + b"="
        if not any(e.startswith(name) for e in entries):
            entries.append(entry)
    copy = (ctypes.c_char_p * (len(entries) + 1))(*entries, None)
    _kept.append((entries, copy))  # for good: somebody may have kept a pointer into it
    address = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ")
    address.value = ctypes.addressof(copy)
    try:
        return ctypes.CDLL(path)
    finally:
        if address.value == ctypes.addressof(copy):  # else somebody called setenv(), which made an environment of its own
            address.value = before


_kept: List[Any] = []
_loading = threading.Lock()
_loaded: Optional[ctypes.CDLL] = None


def _library() -> ctypes.CDLL:
    global _loaded
    with _loading:
        if _loaded is not None:
            return _loaded
        if sys.byteorder != "little" or array("I").itemsize != 4:
            raise Error("this machine is none that Railyard was made for")
        path = engine_path()
        try:
            lib = _load_quietly(path)
            lib.railyard_live_abi.restype = ctypes.c_int
            abi = lib.railyard_live_abi()
        except (OSError, AttributeError) as e:
            raise Error(f"{path}: {e}") from e
        if abi != ABI:
            raise Error(f"{path}: of another version ({abi}) than Railyard's Python part ({ABI})")
        p, i32, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
        for name, result, arguments in (
            ("error", text, []),
            ("setting", ctypes.c_int, [text, p, ctypes.c_size_t]),
            ("new", p, [ctypes.POINTER(_Job)]),
            ("free", None, [p]),
            ("observe", ctypes.c_int, [p, p, i32, p, p, i32]),
            ("place", ctypes.c_int, [p, p, p, p, ctypes.POINTER(_Plan)]),
            ("state", ctypes.c_int, [p, ctypes.POINTER(_State)]),
            ("save", ctypes.c_int, [p, text]),
            ("load", ctypes.c_int, [p, text]),
            ("record", ctypes.c_int, [p, text, i32, ctypes.c_int64]),
            ("record_flush", ctypes.c_int, [p]),
            ("expert_map", ctypes.c_int, [text, i32, i32, i32, p, p, ctypes.c_size_t]),
            ("layers_new", p, [ctypes.POINTER(_LayersJob)]),
            ("layers_free", None, [p]),
            ("layers_next", ctypes.c_int, [p, i32, p, p, p, p, ctypes.POINTER(_Ahead)]),
            ("layers_state", ctypes.c_int, [p, ctypes.POINTER(_Worth)]),
        ):
            function = getattr(lib, "railyard_live_" + name)
            function.restype, function.argtypes = result, arguments
        _loaded = lib
        return lib


def _failed(lib: ctypes.CDLL) -> Error:
    return Error(lib.railyard_live_error().decode("utf-8", "replace"))


def setting(name: str) -> str:
    """A setting's value in force, in this process' environment. Error: there is none of that name, or its value is malformed."""
    lib = _library()
    out = ctypes.create_string_buffer(4096)
    if lib.railyard_live_setting(name.encode(), out, len(out)) < 0:
        raise _failed(lib)
    return os.fsdecode(out.value)


def expert_map(path: str, layers: int, experts: int, ranks: int) -> List[List[int]]:
    """An expert map from .json or .npy, checked to be for these numbers: [layer][slot], the expert that each slot is to hold."""
    lib = _library()
    out, why = (ctypes.c_int32 * (max(layers, 1) * max(experts, 1)))(), ctypes.create_string_buffer(512)
    if lib.railyard_live_expert_map(os.fsencode(path), layers, experts, ranks, out, why, len(why)) < 0:
        raise Error(why.value.decode("utf-8", "replace"))
    return [list(out[layer * experts:(layer + 1) * experts]) for layer in range(layers)]


# ---- arrays ----


class _Words:
    """32-bit words of somebody's: address and number, in place where they lie so. Use in `with`."""

    def __init__(self, values: Any, what: str):
        self.view: Optional[_Buffer] = None
        if isinstance(values, memoryview) and isinstance(values.obj, (bytes, bytearray)) and values.itemsize == 1:
            values = values.tobytes()  # as bytes are: words as they lie in memory
        if isinstance(values, (bytes, bytearray)):
            if len(values) % 4:
                raise Error(f"{what}: {len(values)} bytes are no 32-bit words")
        else:
            values = _as_words(values, what)
        view = _Buffer()
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(values), ctypes.byref(view), 0)  # contiguous, read-only will do
        self.view, self.address, self.count = view, view.buf, view.len // 4

    def __enter__(self) -> "_Words":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.view is not None:
            ctypes.pythonapi.PyBuffer_Release(ctypes.byref(self.view))
            self.view = None


def _as_words(values: Any, what: str) -> Any:
    """`values` if it is a contiguous buffer of 32-bit integers, else a copy that is one."""
    try:
        view = memoryview(values)
    except TypeError:
        view = None
    try:
        if view is None:
            return array("I", _flat(values))
        if view.itemsize == 4 and view.format.lstrip("@=<") in ("I", "i", "L", "l"):
            return values if view.c_contiguous else view.tobytes()
        if view.format.lstrip("@=<") not in tuple("BbHhIiLlQqNn"):
            raise TypeError(f"elements of format {view.format!r}")
        return array("I", _flat(view.tolist()))
    except (TypeError, OverflowError, ValueError) as e:
        raise Error(f"{what}: no 32-bit integers: {e}") from e


def _flat(values: Any) -> List[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, (str, float)):
        raise TypeError(f"{values!r}")
    out: List[int] = []
    for v in values:
        if hasattr(v, "__index__"):
            out.append(v.__index__())
        else:
            out.extend(_flat(v))
    return out


def _places(values: Any, count: int, what: str) -> Any:
    flat = _flat(values)
    if len(flat) != count:
        raise Error(f"{what} has {len(flat)} elements, {count} are needed")
    try:
        return (ctypes.c_int32 * count)(*flat)
    except TypeError as e:
        raise Error(f"{what}: {e}") from e


# ---- live placement ----


class _Handle:
    """Something that the library made, and frees. Any thread may call; a process that was forked off may not."""

    KIND = ""  # of the functions: railyard_live_KINDnew and so on

    def _make(self, job: Any) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._handle: Optional[int] = None
        self._lib = _library()
        self._handle = getattr(self._lib, f"railyard_live_{self.KIND}new")(ctypes.byref(job))
        if not self._handle:
            raise _failed(self._lib)

    def _call(self, name: str, *arguments: Any) -> int:
        with self._lock:  # also so that close() does not free what another thread is using
            if not self._handle or self._pid != os.getpid():
                raise Error("live: closed" if not self._handle else "live: made by another process")
            got = getattr(self._lib, f"railyard_live_{self.KIND}{name}")(self._handle, *arguments)
            if got < 0:
                raise _failed(self._lib)
            return got

    def close(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
            if handle and self._pid == os.getpid():
                getattr(self._lib, f"railyard_live_{self.KIND}free")(handle)

    def __enter__(self) -> "_Handle":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


class Live(_Handle):
    """struct railyard_live."""

    def __init__(self, job: Optional[dict] = None, **more: Any):
        """What struct railyard_live_job has: ranks, samples, layers, experts, topk, places, distinct, rank_place[ranks],
        expert_place[layers][experts] (nested or flat), as a dict or one by one."""
        job = {"distinct": 0, **(job or {}), **more}
        names = ("ranks", "samples", "layers", "experts", "topk", "places")
        missing = [n for n in (*names, "rank_place", "expert_place") if n not in job]
        unknown = set(job) - {*names, "distinct", "rank_place", "expert_place"}
        if missing or unknown:
            raise Error(f"live: missing {missing}, unknown {sorted(unknown)}")
        self.ranks, self.samples, self.layers, self.experts, self.topk, self.places = (int(job[n]) for n in names)
        rank_place = _places(job["rank_place"], self.ranks, "rank_place")
        expert_place = _places(job["expert_place"], self.layers * self.experts, "expert_place")
        c = _Job(ctypes.sizeof(_Job), self.ranks, self.samples, self.layers, self.experts, self.topk, self.places,
                 int(bool(job["distinct"])), rank_place, expert_place)
        self._make(c)

    def observe(self, tokens: Any, counts: Any, distinct: Any, at: int) -> None:
        """Learn from a sample that was at place `at`: counts[layers][experts]; distinct[layers][places] or None. 32-bit integers."""
        with _Words(tokens, "tokens") as t, _Words(counts, "counts") as c:
            self._check("counts", c.count, self.layers * self.experts)
            if distinct is None:
                self._call("observe", t.address, t.count, c.address, None, at)
                return
            with _Words(distinct, "distinct") as d:
                self._check("distinct", d.count, self.layers * self.places)
                self._call("observe", t.address, t.count, c.address, d.address, at)

    @staticmethod
    def _check(what: str, have: int, want: int) -> None:
        if have != want:
            raise Error(f"{what} has {have} elements, {want} are needed")

    def place(self, samples: Sequence[Any]) -> Tuple[List[int], Plan]:
        """Deal a list, each sample's tokens as 32-bit integers: the sample that each slot gets, slots numbered rank by rank."""
        n = self.ranks * self.samples
        self._check("the list", len(samples), n)
        first, parts = (ctypes.c_int64 * (n + 1))(), []
        for i, s in enumerate(samples):
            with _Words(s, f"tokens of sample {i}") as w:
                parts.append(ctypes.string_at(w.address, 4 * w.count) if w.count else b"")
                first[i + 1] = first[i] + w.count
        tokens = b"".join(parts)
        order, plan = (ctypes.c_uint32 * n)(), _Plan(size=ctypes.sizeof(_Plan))
        self._call("place", tokens, first, order, ctypes.byref(plan))
        return list(order), Plan(plan.moved, plan.dealt, plan.placed, plan.why.decode("utf-8", "replace"))

    def state(self) -> State:
        s = _State(size=ctypes.sizeof(_State))
        self._call("state", ctypes.byref(s))
        return State(bool(s.sure), s.samples, s.crossed, s.even, s.captured, s.why.decode("utf-8", "replace"))

    def save(self, path: str) -> None:
        self._call("save", os.fsencode(path))

    def load(self, path: str) -> None:
        self._call("load", os.fsencode(path))

    def record(self, dir: str, tokens_per_sample: int, max_samples: int = 0) -> None:
        """From now on append observed samples of that many tokens to a routing folder, until it holds max_samples (0: no limit)."""
        self._call("record", os.fsencode(dir), tokens_per_sample, max_samples)

    def flush(self) -> None:
        """Let readers of the recording see all that was recorded."""
        self._call("record_flush")


class Layers(_Handle):
    """struct railyard_live_layers (live/layers.h)."""

    KIND = "layers_"

    def __init__(self, **job: Any):
        """What struct railyard_live_layers_job has."""
        self.slots, self.experts, self.places = job["ranks"] * job["samples"], int(job["experts"]), int(job["places"])
        rank_place = _places(job.pop("rank_place"), job["ranks"], "rank_place")
        expert_place = _places(job.pop("expert_place"), self.experts, "expert_place")
        self._make(_LayersJob(size=ctypes.sizeof(_LayersJob), rank_place=rank_place, expert_place=expert_place, **job))

    def next(self, layer: int, sample: Sequence[int], counts: Any, distinct: Any) -> Tuple[List[int], Ahead]:
        """The sample that each slot shall have when the next layer begins; 32-bit integers all of them."""
        out, plan = (ctypes.c_uint32 * self.slots)(), _Ahead(size=ctypes.sizeof(_Ahead))
        with _Words(sample, "samples") as s, _Words(counts, "counts") as c, _Words(distinct, "distinct") as d:
            Live._check("samples", s.count, self.slots)
            Live._check("counts", c.count, self.slots * self.experts)
            Live._check("distinct", d.count, self.slots * self.places)
            self._call("next", layer, s.address, c.address, d.address, out, ctypes.byref(plan))
        return list(out), Ahead(plan.moved, plan.stay, plan.go, plan.why.decode("utf-8", "replace"), bool(plan.inside))

    def state(self) -> Worth:
        s = _Worth(size=ctypes.sizeof(_Worth))
        self._call("state", ctypes.byref(s))
        return Worth(bool(s.sure), s.samples, s.batches, s.home, s.crossed, s.carried, s.why.decode("utf-8", "replace"))
