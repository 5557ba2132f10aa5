"""What was routed where, seen without holding the job up.

Owns: counting on the device, the way to the host, the message (`seen/R/N` on the board), and, at the leader, adding up the
messages of ranks that hold parts of the same samples. Not: where in a framework a micro-batch begins and which tensor is its
routing (megatron.py, deepspeed.py), and what is learned from it (librailyard-engine.so).

The host never waits for the device here: no .item(), no .cpu(), no indexing by a mask. A micro-batch's counts are summed into a
buffer made beforehand, copied to pinned memory behind the kernels, and sent by a thread once an event says that they are there.
Where nothing is free to take them, they are forgone: memory is bounded, and watching is a sample anyway.
"""

import atexit
import collections
import json
import os
import queue
import struct
import threading
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

VERSION = 1
MAGIC = b"RYseen"

DENSE = 4096  # samples of the whole job, from its start, of which each is watched: what the home model's window takes
SPARSE = 16  # then one micro-batch of so many
SLOTS = 4  # micro-batches of a rank on their way to the host
QUEUE = 8  # messages waiting for the board
UNREAD = 256  # messages of a rank that the leader may leave unread
SHAPES = 8  # shapes of micro-batches, beyond which a job counts as one of variable lengths
PATIENCE = 60.0  # seconds until parts whose others never came are forgotten
FLUSH = 30.0  # seconds between two times that a recording's head is written
RETELL = 2.0  # seconds between two looks for the places


def watched(n: int, dp_size: int, b: int) -> bool:
    """Whether micro-batch n (from 0, of each data-parallel rank) is watched: the same on all ranks, by nothing but these
    numbers."""
    return n * dp_size * b < DENSE or n % SPARSE == 0


# --- The message ---


def _narrow(a: np.ndarray) -> np.ndarray:
    """The same numbers in the narrowest unsigned type of two widths."""
    return a.astype("<u2" if a.size == 0 or (int(a.max()) < 65536 and int(a.min()) >= 0) else "<u4", order="C")


class Seen:
    """One rank's part of one micro-batch.

    n: number of the micro-batch; chunk: of the model (virtual pipeline stages); dp: data-parallel index. positions[i]: tokens
    of each sample that were counted for layers[i]. counts[layers][b][experts]; distinct[layers][b][places] or None;
    tokens[b][s] or None: part `piece` = (index, of) of the samples' tokens, dealt as `deal` says ("plain": one after the
    other; "zigzag": Megatron's, chunk i and chunk 2 · of − 1 − i).
    """

    __slots__ = ("n", "chunk", "dp", "b", "layers", "positions", "counts", "distinct", "tokens", "piece", "deal")

    def __init__(self, n: int, chunk: int, dp: int, b: int, layers: Sequence[int], positions: Sequence[int], counts: np.ndarray,
                 distinct: Optional[np.ndarray], tokens: Optional[np.ndarray], piece: Tuple[int, int] = (0, 1),
                 deal: str = "plain"):
        self.n, self.chunk, self.dp, self.b = n, chunk, dp, b
        self.layers, self.positions = list(layers), list(positions)
        self.counts, self.distinct, self.tokens = counts, distinct, tokens
        self.piece, self.deal = tuple(piece), deal

    def encode(self) -> bytes:
        arrays, shapes = [], []
        for a in (self.counts, self.distinct, self.tokens):
            if a is None:
                shapes.append(None)
                continue
            a = _narrow(a)
            shapes.append([a.dtype.str, list(a.shape)])
            arrays.append(a.tobytes())
        head = json.dumps({"n": self.n, "chunk": self.chunk, "dp": self.dp, "b": self.b, "layers": self.layers,
                           "positions": self.positions,
                           "piece": self.piece, "deal": self.deal, "arrays": shapes}, separators=(",", ":")).encode()
        return b"".join([MAGIC, struct.pack("<HI", VERSION, len(head)), head] + arrays)

    @staticmethod
    def decode(message: bytes) -> "Seen":
        """ValueError for anything that encode() does not write."""
        start = len(MAGIC) + 6
        if message[:len(MAGIC)] != MAGIC or len(message) < start:
            raise ValueError("not an observation")
        version, size = struct.unpack_from("<HI", message, len(MAGIC))
        if version != VERSION:
            raise ValueError("an observation of version %d; this rank knows %d" % (version, VERSION))
        try:
            head = json.loads(bytes(message[start:start + size]))
            at, arrays = start + size, []
            for shape in head["arrays"]:
                if shape is None:
                    arrays.append(None)
                    continue
                if shape[0] not in ("<u2", "<u4"):
                    raise ValueError("numbers of type %s" % shape[0])
                n = 1
                for d in shape[1]:
                    n *= int(d)
                a = np.frombuffer(message, shape[0], n, at).reshape(shape[1])
                at += a.nbytes
                arrays.append(a)
            seen = Seen(head["n"], head["chunk"], head["dp"], head["b"], head["layers"], head["positions"], arrays[0], arrays[1],
                        arrays[2],
                        head["piece"], head["deal"])
        except (KeyError, IndexError, TypeError, UnicodeDecodeError) as e:
            raise ValueError("a malformed observation: %s" % e)
        if at != len(message):
            raise ValueError("an observation of %d bytes where its head says %d" % (len(message), at))
        rows, b = len(seen.layers), seen.b
        if (len(seen.positions) != rows or seen.counts is None or seen.counts.ndim != 3 or seen.counts.shape[:2] != (rows, b)
                or (seen.distinct is not None and (seen.distinct.ndim != 3 or seen.distinct.shape[:2] != (rows, b)))
                or (seen.tokens is not None and (seen.tokens.ndim != 2 or seen.tokens.shape[0] != b))
                or not 0 <= seen.piece[0] < seen.piece[1]):
            raise ValueError("an observation whose arrays do not fit its head")
        return seen


def places_text(places: int, expert_place: Sequence[Sequence[int]]) -> bytes:
    """The value of key `places`: expert_place[layers][experts], experts in the order in which routers number them."""
    rows = [list(map(int, row)) for row in expert_place]
    if rows and all(row == rows[0] for row in rows):
        rows = rows[:1]  # one for all layers
    return json.dumps({"places": int(places), "expert_place": rows}, separators=(",", ":")).encode()


def places_of(text: bytes, layers: int, experts: int) -> np.ndarray:
    """[layers][experts][places] of 0 and 1, float32. ValueError where the text is for another model."""
    told = json.loads(bytes(text))
    rows = np.asarray(told["expert_place"], dtype=np.int64)
    fits = rows.ndim == 2 and rows.shape[0] in (1, layers) and rows.shape[1] == experts
    if not fits or rows.min() < 0 or rows.max() >= told["places"]:
        raise ValueError("places of %s experts by layer; this model has %d layers of %d experts" %
                         (list(rows.shape), layers, experts))
    one = (rows[:, :, None] == np.arange(told["places"])).astype(np.float32)
    return np.array(np.broadcast_to(one, (layers, experts, told["places"])), order="C")


# --- Every rank ---


class _Slot:
    """Buffers for one micro-batch: counts [layers][b][experts], distinct [layers][b][places], tokens [b][s], one after the
    other in int32."""

    def __init__(self, observer: "Observer", key):
        device, b, s, places = key
        rows, experts = observer.layers, observer.experts
        self.key, self.b, self.s, self.places = key, b, s, places
        self.n_counts, self.n_distinct = rows * b * experts, rows * b * places
        size = self.n_counts + self.n_distinct + b * s
        self.device, self.host, self.event = observer.buffers(device, size)
        self.counts = self._part(self.device, 0, (rows, b, experts))
        self.distinct = self._part(self.device, self.n_counts, (rows, b, places))
        self.tokens = self._part(self.device, self.n_counts + self.n_distinct, (b, s))
        self.host_tokens = self._part(self.host, self.n_counts + self.n_distinct, (b, s))
        self.rows: Dict[int, int] = {}  # layer -> positions counted
        self.has_tokens = self.tokens_on_host = False
        self.n = self.chunk = 0
        self.stream = None

    @staticmethod
    def _part(flat, at, shape):
        n = 1
        for d in shape:
            n *= d
        return flat[at:at + n].view(shape)


class Observer:
    """A rank's observations. Called from the thread that runs forward passes; only the sending is another thread's.

    layers, experts: of the whole model; gives_counts: False where a peer counts the same tokens (tensor parallelism without
    sequence parallelism); gives_tokens: False where a peer sends the same tokens; piece, deal: which part of each sample's
    sequence its tokens are (Seen). until(): text where there is no use in watching any more, else None; called by the sending
    thread. say: module with info, warn.
    """

    def __init__(self, board, rank: int, dp: int, dp_size: int, layers: int, experts: int, gives_counts: bool = True,
                 gives_tokens: bool = True, piece: Tuple[int, int] = (0, 1), deal: str = "plain",
                 until: Optional[Callable[[], Optional[str]]] = None, say=None):
        if say is None:
            from . import say  # what tests put in its place has the same functions
        self.board, self.rank, self.dp, self.dp_size, self.layers, self.experts = board, rank, dp, dp_size, layers, experts
        self.gives_counts, self.gives_tokens, self.piece, self.deal = gives_counts, gives_tokens, piece, deal
        self.say = say
        self.until = until
        self.over: Optional[str] = None  # why nothing is watched any more
        self.opened = False
        self.sent = self.forgone = 0
        self._numbers: Dict[int, int] = {}  # chunk -> micro-batches begun
        self._n = self._chunk = 0
        self._open_tokens = None
        self._slot: Optional[_Slot] = None
        self._pools: Dict[tuple, list] = {}  # shape -> [free slots, slots made]
        self._flying: collections.deque = collections.deque()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._back: queue.SimpleQueue = queue.SimpleQueue()  # slots that the thread has read
        self._thread: Optional[threading.Thread] = None
        self._pid, self._ending = os.getpid(), False
        self._told: Optional[np.ndarray] = None  # [layers][experts][places], once the leader has told the places
        self._masks = {}  # device -> the same there

    # What a device offers, apart so that a test without one can stand in for it.

    def buffers(self, device, size: int):
        """(on the device, on the host, event or None): int32[size] each; one and the same, and no event, without a device."""
        import torch
        if device.type == "cpu":
            both = torch.zeros(size, dtype=torch.int32)
            return both, both, None
        return (torch.zeros(size, dtype=torch.int32, device=device), torch.empty(size, dtype=torch.int32, pin_memory=True),
                torch.cuda.Event())

    def capturing(self, tensor) -> bool:
        """Whether kernels are being recorded into a CUDA graph rather than run."""
        import torch
        return tensor.is_cuda and torch.cuda.is_current_stream_capturing()

    def stream(self, tensor):
        """The stream on which kernels are issued now; None without a device."""
        import torch
        return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None

    def to_device(self, array: np.ndarray, device):
        import torch
        host = torch.from_numpy(array)
        if device.type == "cpu":
            return host
        return host.pin_memory().to(device, non_blocking=True).to(torch.bfloat16)

    # The micro-batch

    def stop(self, why: str) -> None:
        """No more watching on this rank."""
        if self.over is None:
            self.over = why
            self.say.warn("no more watching of routing on this rank: " + why)
        self._abandon()
        self._pools = {}

    def open(self, tokens=None, chunk: int = 0) -> None:
        """A training forward pass of a micro-batch begins; tokens: integers [b, s] where this rank has them."""
        self.poll()
        if self.over is not None:
            return
        self._abandon()
        self._n = self._numbers.get(chunk, 0)
        self._chunk = chunk
        self._numbers[chunk] = self._n + 1
        self.opened = True
        self._open_tokens = tokens if self.gives_tokens else None

    def layer(self, number: int, routing, b: int, batch_first: bool = False) -> None:
        """Routing of layer `number` (of those with experts, from 0) of the open micro-batch; ignored where none is open.

        routing: [T, experts], not zero where a token goes; or integers [k, T]: experts, negative where there is none. Of b
        samples, whose tokens lie at s · b + sample, or, batch_first, at sample · (T / b) + s.
        """
        if not self.opened or self.over is not None or not self.gives_counts:
            return
        import torch
        if self.capturing(routing):
            return self.stop("its kernels are recorded into CUDA graphs, which replay without Python")
        if not 0 <= number < self.layers:
            return self.stop("routing of layer %d of %d" % (number, self.layers))
        slot = self._slot or self._take(b, routing)
        if slot is None or not self.opened:
            return
        if self.stream(routing) != slot.stream:  # sums and the copy to the host would not be in order
            return self.stop("its layers run on several streams")
        with torch.no_grad():
            routing = routing.detach()
            if routing.dtype in (torch.int32, torch.int64):
                k, total = routing.shape
                index = torch.where(routing < 0, self.experts, routing).to(torch.int64).t()
                chosen = torch.zeros(total, self.experts + 1, dtype=torch.bool, device=routing.device).scatter_(1, index, True)
                chosen = chosen[:, :self.experts]
            else:
                chosen = routing if routing.dtype == torch.bool else routing.ne(0)
            total = chosen.shape[0]
            if chosen.shape[1] != self.experts or slot.b != b or total % b:
                return self.stop("routing of shape %s for %d samples and %d experts" %
                                 (tuple(chosen.shape), slot.b, self.experts))
            positions = total // b
            shape = (b, positions, -1) if batch_first else (positions, b, -1)
            along = 1 if batch_first else 0
            again = number in slot.rows  # a layer that takes its tokens in several parts
            self._sum(chosen.reshape(shape), along, slot.counts[number], again)
            if slot.places:
                mask = self._masks[routing.device]
                there = torch.matmul(chosen.to(mask.dtype), mask[number]) > 0
                self._sum(there.reshape(shape), along, slot.distinct[number], again)
            slot.rows[number] = slot.rows.get(number, 0) + positions

    def close(self, whole: bool = True) -> None:
        """The forward pass ended; whole: False: by an error."""
        if whole and self.opened and self._slot is None and self._open_tokens is not None:
            self._take(self._open_tokens.shape[0], self._open_tokens)  # a stage with tokens and no layer that has experts
        slot, opened, self.opened = self._slot, self.opened, False
        self._slot = self._open_tokens = None
        if slot is None:
            return
        if not opened or not whole or not (slot.rows or slot.has_tokens):
            self._give_back(slot)
            return
        if slot.event is not None:
            n = slot.n_counts + slot.n_distinct if slot.tokens_on_host else slot.device.numel()
            if self.stream(slot.device) != slot.stream:
                self._give_back(slot)
                return self.stop("a forward pass ends on another stream than its layers run on")
            slot.host[:n].copy_(slot.device[:n], non_blocking=True)
            slot.event.record()
        self._flying.append(slot)

    def poll(self) -> None:
        """Hands what has reached the host to the thread that sends."""
        while self._flying and (self._flying[0].event is None or self._flying[0].event.query()):
            slot = self._flying.popleft()
            if self._queue.qsize() >= QUEUE:
                self.forgone += 1
                self._give_back(slot)
                continue
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="railyard-seen", daemon=True)
                self._thread.start()
                # A thread inside the store's client when the interpreter goes away could abort the process.
                atexit.register(self.finish, 3.0)
            self._queue.put(slot)
        try:
            while True:
                self._give_back(self._back.get_nowait())
        except queue.Empty:
            pass

    def finish(self, seconds: float = 10.0) -> None:
        """At the end of the process: sends what is under way and ends the thread."""
        if self._pid != os.getpid():
            return
        end, self._ending = time.monotonic() + seconds, True
        while time.monotonic() < end:
            self.poll()
            if not self._flying:
                break
            time.sleep(0.001)
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(max(0.0, end - time.monotonic()))
            self._thread = None
            atexit.unregister(self.finish)

    # Inside

    @staticmethod
    def _sum(flags, along: int, out, again: bool) -> None:
        import torch
        if again:
            out.add_(flags.sum(along, dtype=torch.int32))
        else:
            torch.sum(flags, along, dtype=torch.int32, out=out)

    def _take(self, b: int, tensor) -> Optional[_Slot]:
        """A slot for the open micro-batch, or None, and the micro-batch is closed: not one to be watched, or all are busy."""
        if not watched(self._n, self.dp_size, b):
            self.opened, self._open_tokens = False, None
            return None
        tokens, device = self._open_tokens, tensor.device
        if tokens is not None and self.capturing(tokens):
            self.stop("its kernels are recorded into CUDA graphs, which replay without Python")
            return None
        if self._told is not None and device not in self._masks:
            self._masks[device] = self.to_device(self._told, device)
        places = self._told.shape[2] if self._told is not None else 0
        key = (device, b, tokens.shape[1] if tokens is not None else 0, places)
        pool = self._pools.get(key)
        if pool is None:
            self._pools = {k: v for k, v in self._pools.items() if k[3] == places}
            if len(self._pools) >= SHAPES:
                self.stop("micro-batches of ever different shapes; give all sequences one length")
                return None
            pool = self._pools[key] = [[], 0]
        if not pool[0]:
            if pool[1] >= SLOTS:
                self.forgone += 1
                self.opened, self._open_tokens = False, None
                return None
            pool[1] += 1
            pool[0].append(_Slot(self, key))
        slot = pool[0].pop()
        slot.rows, slot.n, slot.chunk = {}, self._n, self._chunk
        slot.has_tokens, slot.tokens_on_host, slot.stream = tokens is not None, False, self.stream(tensor)
        if tokens is not None:
            if slot.event is not None and tokens.device.type == "cpu":
                slot.host_tokens.copy_(tokens)
                slot.tokens_on_host = True
            else:
                slot.tokens.copy_(tokens)
        self._slot = slot
        return slot

    def _abandon(self) -> None:
        if self._slot is not None:
            self._give_back(self._slot)
        self._slot, self.opened, self._open_tokens = None, False, None

    def _give_back(self, slot: _Slot) -> None:
        pool = self._pools.get(slot.key)
        if pool is not None:
            pool[0].append(slot)

    # The thread that sends

    def _send_all(self) -> None:
        looked = 0.0
        try:
            while True:
                slot = self._queue.get()
                if slot is None:
                    return
                seen = self._read(slot)
                self._back.put(slot)
                why = self.until() if self.until else None
                if why:
                    self.over = self.over or why  # said by whoever stopped the job's placement
                    continue
                if self.sent >= UNREAD and self.board.get("seen/%d/%d" % (self.rank, self.sent - UNREAD)) is not None:
                    self.forgone += 1  # the leader is behind: what it has not read shall not pile up
                    continue
                self.board.put("seen/%d/%d" % (self.rank, self.sent), seen.encode())
                self.sent += 1
                if self._told is None and time.monotonic() - looked >= RETELL:
                    looked = time.monotonic()
                    text = self.board.get("places")
                    if text is not None:
                        self._told = places_of(text, self.layers, self.experts)
        except Exception as e:  # the job goes on, unwatched
            self.over = self.over or "sending failed"
            tell = self.say.info if self._ending else self.say.warn
            tell("no more watching of routing on this rank: %s: %s" % (type(e).__name__, e))

    def _read(self, slot: _Slot) -> Seen:
        flat = slot.host.numpy()
        layers = sorted(slot.rows)
        counts = flat[:slot.n_counts].reshape(self.layers, slot.b, self.experts)[layers]
        distinct = None
        if slot.places:
            distinct = flat[slot.n_counts:slot.n_counts + slot.n_distinct].reshape(self.layers, slot.b, slot.places)[layers]
        tokens = None
        if slot.has_tokens:
            tokens = flat[slot.n_counts + slot.n_distinct:].reshape(slot.b, slot.s).view(np.uint32).copy()
        return Seen(slot.n, slot.chunk, self.dp, slot.b, layers, [slot.rows[l] for l in layers], counts, distinct, tokens,
                    self.piece, self.deal)


# --- The leader ---


class _Partial:
    """A micro-batch of one data-parallel index, until all its parts are in."""

    __slots__ = ("born", "b", "counts", "distinct", "positions", "pieces", "of", "deal")

    def __init__(self, born: float, seen: Seen, layers: int, experts: int):
        self.born, self.b, self.of, self.deal = born, seen.b, 0, "plain"
        self.counts = np.zeros((seen.b, layers, experts), np.uint32)
        self.distinct: Optional[np.ndarray] = None
        self.positions = np.zeros(layers, np.int64)
        self.pieces: Dict[int, np.ndarray] = {}

    def add(self, seen: Seen, places: int) -> None:
        if seen.b != self.b:
            raise ValueError("parts of %d and of %d samples" % (self.b, seen.b))
        if seen.layers:
            first = not self.positions.any()
            self.counts[:, seen.layers] += seen.counts.transpose(1, 0, 2)
            if seen.distinct is None or seen.distinct.shape[2] != places:
                self.distinct = None
            elif first:
                self.distinct = np.zeros((self.b, self.counts.shape[1], places), np.uint32)
            if self.distinct is not None:
                self.distinct[:, seen.layers] += seen.distinct.transpose(1, 0, 2)
            self.positions[seen.layers] += seen.positions
        if seen.tokens is not None:
            if self.of and (self.of, self.deal) != (seen.piece[1], seen.deal):
                raise ValueError("tokens in %d pieces and in %d" % (self.of, seen.piece[1]))
            self.of, self.deal = seen.piece[1], seen.deal
            self.pieces[seen.piece[0]] = seen.tokens

    def whole(self) -> bool:
        if not self.of or len(self.pieces) < self.of:
            return False
        length = sum(p.shape[1] for p in self.pieces.values())
        if (self.positions > length).any():
            raise ValueError("%d tokens of a sample, %d of them routed" % (length, int(self.positions.max())))
        return bool((self.positions == length).all())

    def tokens(self) -> np.ndarray:
        pieces = [self.pieces[i] for i in range(self.of)]
        if self.deal == "zigzag" and self.of > 1:
            halves = [np.split(p, 2, axis=1) for p in pieces]
            pieces = [h[0] for h in halves] + [h[1] for h in reversed(halves)]
        return np.ascontiguousarray(np.concatenate(pieces, axis=1), dtype=np.uint32)


class Collector:
    """The leader's reading of observations: adds parts up and tells whole samples to `live`. One thread.

    rank_place[dp]: place of each data-parallel index; expert_place[layers][experts]: by the numbers that routers use;
    numbers[layers][experts]: what these are in the checkpoint (None: the same). record: folder to record into ("": none).
    """

    def __init__(self, board, world: int, live, layers: int, experts: int, places: int, rank_place: Sequence[int],
                 expert_place: Sequence[Sequence[int]], numbers: Optional[Sequence[Sequence[int]]] = None, record: str = "",
                 say=None,
                 clock: Callable[[], float] = time.monotonic):
        if say is None:
            from . import say
        self.board, self.live, self.layers, self.experts, self.places = board, live, layers, experts, places
        self.rank_place, self.record, self.say, self.clock = list(rank_place), record, say, clock
        self.numbers = None
        if numbers is not None:
            self.numbers = np.argsort(np.asarray(numbers, dtype=np.int64), axis=1)  # [layer][number] -> column
        self.samples = self.dropped = 0
        self._recording = False
        self._flushed = clock()
        self._next = [0] * world
        self._partial: "collections.OrderedDict[Tuple[int, int], _Partial]" = collections.OrderedDict()
        board.put("places", places_text(places, expert_place))

    def collect(self, most: int = 1024) -> int:
        """Reads what is there, at most so many messages; returns the samples told. The board's errors go to the caller."""
        told, read = 0, 0
        progress = True
        while progress and read < most:
            progress = False
            for rank in range(len(self._next)):
                key = "seen/%d/%d" % (rank, self._next[rank])
                message = self.board.get(key)
                if message is None:
                    continue
                progress = True
                read += 1
                self._next[rank] += 1
                self.board.drop(key)
                told += self._take(rank, message)
        now = self.clock()
        while self._partial:
            at, partial = next(iter(self._partial.items()))
            if now - partial.born < PATIENCE:
                break
            del self._partial[at]
            self.dropped += 1
        if self._recording and now - self._flushed > FLUSH:
            self._flushed = now
            self._guarded(self.live.flush)
        return told

    def _take(self, rank: int, message: bytes) -> int:
        at = None
        try:
            seen = Seen.decode(message)
            at = (seen.dp, seen.n)
            if not 0 <= seen.dp < len(self.rank_place):
                raise ValueError("data-parallel index %d of %d" % (seen.dp, len(self.rank_place)))
            if seen.layers and (min(seen.layers) < 0 or max(seen.layers) >= self.layers or seen.counts.shape[2] != self.experts):
                raise ValueError("layers %s of %d experts" % (seen.layers, seen.counts.shape[2]))
            partial = self._partial.get(at)
            if partial is None:
                partial = self._partial[at] = _Partial(self.clock(), seen, self.layers, self.experts)
            partial.add(seen, self.places)
            if not partial.whole():
                return 0
        except ValueError as e:
            self._partial.pop(at, None)
            self.dropped += 1
            self.say.warn_once("seen", "an observation of rank %d is left out: %s" % (rank, e))
            return 0
        del self._partial[at]
        self._tell(partial, self.rank_place[at[0]])
        self.samples += partial.b
        return partial.b

    def _guarded(self, record: Callable[[], None]) -> bool:
        """What concerns the recording: failing ends that alone."""
        try:
            record()
            return True
        except Exception as e:
            self.say.error("routing is not recorded any more: %s" % e)
            self.record, self._recording = "", False
            return False

    def _tell(self, partial: _Partial, place: int) -> None:
        tokens, counts = partial.tokens(), partial.counts
        if self.numbers is not None:
            counts = np.take_along_axis(counts, np.broadcast_to(self.numbers, counts.shape), axis=2)
        if self.record and not self._recording:
            self._recording = self._guarded(lambda: self.live.record(self.record, tokens.shape[1], 0))
        for i in range(partial.b):
            distinct = None if partial.distinct is None else np.ascontiguousarray(partial.distinct[i])
            try:
                self.live.observe(tokens[i], np.ascontiguousarray(counts[i]), distinct, place)
            except Exception as e:  # one sample's, or the recording's: the next is learned from all the same
                self.dropped += 1
                self.say.warn_once("observe", "an observation is left out: %s" % e)
