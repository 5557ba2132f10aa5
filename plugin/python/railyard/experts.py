"""Experts moved between ranks before the first training step, so that slot s of layer l holds the checkpoint's expert map[l][s].

Owns: the agreement of all ranks to do it, the exchange itself, the note beside checkpoints that says which expert is where.
Not: what a framework's experts, routers and optimizers look like (expert_tensors.py, megatron_experts.py,
deepspeed_experts.py).

Why nothing but placement changes. An expert's number is the row of the router that scores it. Move expert and row alike, and a
token goes to the same expert's weights under another number: routing indices become slots, and the model computes the same
function up to the order in which sums are made (ties in the router's top-k aside). Everything that is one row or one tensor per
expert moves along: weights, their fp32 main copies, what the optimizer remembers of them, the router's biases and counters.

When. A job makes its model, wraps it (parameters become views into buffers that gradients are reduced in), makes its optimizer
(fp32 copies, Adam's moments), loads a checkpoint into all of them, and only then takes its first step: that is the one moment
when everything is there and nothing is in flight. The adapter calls `Mover.step` there, on every rank, before anything of that
step. As parameters are views, and optimizers, buffers and captured graphs hold their addresses, values are copied in place and
no tensor is ever replaced.

All or nobody. Routers are replicated on all ranks of a layer, and expert-parallel groups are replicas of each other: if one
rank stayed as it is, its router's gradients would be added to other experts' rows. So all ranks agree before anything is
touched, over the board, as it cannot hang: each rank looks at what it holds, takes the memory that it will need, and puts an
offer, `experts/N/R`: what it holds, or why it cannot. Rank 0 reads all of them, judges, and claims `experts/N`; who waits in
vain claims "nobody moves". The first claim stands and everybody obeys it. Only after "move" are there collectives, on the job's
own expert-parallel groups, in ascending order of layers: what a rank does there cannot fail for want of memory, and a rank that
dies there would have hung the job's own next exchange just so. Two failures end the job, in one line, because the alternative
is a model that is silently wrong: a failure amid the exchange, and a rank that said yes and then cannot read the decision.

Memory. Of one layer at a time, one kind of tensor at a time, in pieces: two staging buffers of STAGING bytes, whatever the size
of the model. Only experts that change slots travel.

Checkpoints. The moved model is a valid model, the same function, with experts renumbered: saving it as it is is right, and such
a checkpoint loads anywhere, with Railyard or without. What must not be forgotten is which expert is which, or the map would be
applied to the wrong ones on resuming (still the same function, but no longer the placement that was planned). So a file
`railyard-experts.json` is written into each checkpoint's folder, an expert map as `railyard plan` writes them, that says what
the slots hold; it is read when that folder is loaded, and only the difference is moved: none, when a job resumes with the map
it was saved with. Folders without it are in the checkpoint's own order. Where saving cannot be seen, one line says so.
"""

import hashlib
import json
import os
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from . import say

NOTE = "railyard-experts.json"
STAGING = 32 << 20  # bytes of each of two buffers
PATIENCES = 4  # RAILYARD_PATIENCE is for exchanges; ranks may come to their first step further apart than that

Order = List[List[int]]  # [layer][slot]: which of the checkpoint's experts sits in the slot


class Refused(Exception):
    """Experts cannot be moved here; the text names the option or the tensor that is in the way."""


class Doubt(RuntimeError):
    """The job must not go on: this rank's part of the model may not be what the other ranks take it for."""


class Layer:
    """What this rank holds of one layer. Slots are numbered over the group, rank by rank.

    slots[i]: tensors of local expert i, the same kinds in the same order for all experts on all ranks: contiguous, moved as a
    whole
    rows:     tensors that have a row for each of the layer's experts: router weights and what belongs to them, equal on all ranks
    """

    def __init__(
        self,
        index: int,
        group,
        ranks: Sequence[int],
        position: int,
        tensor_index: int,
        slots: List[list],
        rows: list,
        signature: str = "",
    ) -> None:
        self.index, self.group, self.ranks, self.position, self.tensor_index = index, group, list(ranks), position, tensor_index
        self.slots, self.rows, self.signature = slots, rows, signature


class Holding:
    """What a rank has to say of itself: all layers of the model, and those it holds. prepare(source) → [Layer] looks closely,
    only when something must be moved, and raises Refused; settle() is called after the exchange."""

    def __init__(
        self, layers: int, experts: int, ranks: int, prepare: Callable[[Order], List[Layer]], settle: Callable[[], None]
    ) -> None:
        self.layers, self.experts, self.ranks, self.prepare, self.settle = layers, experts, ranks, prepare, settle


# ---- orders


def identity(layers: int, experts: int) -> Order:
    return [list(range(experts)) for _ in range(layers)]


def check_order(order, layers: int, experts: int, name: str) -> Order:
    everyone = set(range(experts))
    if len(order) != layers or any(len(row) != experts or set(row) != everyone for row in order):
        raise Refused(f"{name}: not {layers} permutations of {experts} experts")
    return [[int(e) for e in row] for row in order]


def sources(have: Order, want: Order) -> Order:
    """source[l][s]: the slot that now holds what slot s is to get."""
    result = []
    for now, then in zip(have, want):
        slot_of = {expert: slot for slot, expert in enumerate(now)}
        result.append([slot_of[expert] for expert in then])
    return result


def moving(row: Sequence[int]) -> bool:
    return any(slot != source for slot, source in enumerate(row))


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ---- the exchange


def as_bytes(tensor):
    """A contiguous tensor's own memory."""
    import torch

    return tensor.detach().view(-1).view(torch.uint8)


class Staging:
    """Memory for the exchange, taken before the offer is made, so that it cannot be wanting afterwards."""

    def __init__(self, layers: List[Layer], source: Order, size: int = STAGING) -> None:
        import torch

        self.buffers = {}
        for layer in layers:
            if not moving(source[layer.index]):
                continue
            tensors = [t for slot in layer.slots for t in slot] + layer.rows
            need = max([size] + [t.numel() * t.element_size() for t in layer.rows] + [16 * len(layer.slots)])
            for device in {t.device for t in tensors}:
                if device not in self.buffers or self.buffers[device][0].numel() < need:
                    self.buffers[device] = [torch.empty(need, dtype=torch.uint8, device=device) for _ in range(2)]
            for device in {t.device for t in layer.rows}:  # every rank takes its own, small, before it says yes
                self.buffers[device, layer.index] = torch.tensor(source[layer.index], dtype=torch.int64, device=device)

    def of(self, device):
        return self.buffers[device]

    def index(self, device, layer: int):
        return self.buffers[device, layer]


def exchange(layer: Layer, source: Sequence[int], staging: Staging, size: int = STAGING) -> int:
    """Move one layer's experts and rows. Collective on the layer's group. Returns the bytes that this rank sent to others."""
    import torch
    import torch.distributed as dist

    each, me, sent = len(layer.slots), layer.position, 0
    # Between any two ranks, pieces are in ascending order of the slot they are for: both sides know that without being told.
    outgoing = [
        (slot // each, source[slot] - me * each)
        for slot in range(len(source))
        if source[slot] // each == me and source[slot] != slot
    ]
    incoming = sorted(
        (source[slot] // each, slot - me * each) for slot in range(me * each, (me + 1) * each) if source[slot] != slot
    )
    to = [sum(1 for rank, _ in outgoing if rank == peer) for peer in range(len(layer.ranks))]
    come = [sum(1 for rank, _ in incoming if rank == peer) for peer in range(len(layer.ranks))]
    away = sum(number for peer, number in enumerate(to) if peer != me)
    with torch.no_grad():
        for kind in range(len(layer.slots[0])):
            slots = [as_bytes(slot[kind]) for slot in layer.slots]
            send, receive = staging.of(slots[0].device)
            total, piece = slots[0].numel(), max(16, size // each // 16 * 16)
            for low in range(0, total, piece):
                width = min(piece, total - low)
                for i, (_, local) in enumerate(outgoing):
                    send[i * width : (i + 1) * width].copy_(slots[local][low : low + width])
                dist.all_to_all_single(
                    receive[: len(incoming) * width],
                    send[: len(outgoing) * width],
                    [n * width for n in come],
                    [n * width for n in to],
                    group=layer.group,
                )
                for i, (_, local) in enumerate(incoming):
                    slots[local][low : low + width].copy_(receive[i * width : (i + 1) * width])
            sent += away * total
        for tensor in layer.rows:
            send, _ = staging.of(tensor.device)
            scratch = send[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            torch.index_select(tensor.detach(), 0, staging.index(tensor.device, layer.index), out=scratch)
            tensor.detach().copy_(scratch)
    return sent


# ---- the agreement


def judge(offers: Dict[int, Optional[dict]], world: int) -> dict:
    """What all ranks do, from what they offered: {"move": bool, "why": text}. Pure."""

    def no(why):
        return {"move": False, "why": why}

    refusing = [rank for rank in range(world) if (offers.get(rank) or {}).get("no")]
    if refusing:
        return no(f"rank {refusing[0]}{f' and {len(refusing) - 1} more' if refusing[1:] else ''}: {offers[refusing[0]]['no']}")
    missing = [rank for rank in range(world) if offers.get(rank) is None]
    if missing:
        return no(
            f"rank {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''} did not come to its first training step in time, "
            "or runs without the adapter"
        )
    first = offers[0]
    for rank in range(world):
        for key, what in (
            ("model", "a model with other numbers of layers, experts or expert-parallel ranks"),
            ("want", "another expert map"),
            (
                "have",
                "another order of experts in the loaded checkpoint (is its folder, with " + NOTE + ", the same on all nodes?)",
            ),
        ):
            if offers[rank][key] != first[key]:
                return no(f"rank {rank} has {what} than rank 0")
    if not first["moves"]:
        return {"move": False, "why": "", "there": True}
    ranks_of: Dict[str, Dict[int, list]] = {}
    for rank in range(world):
        for index, held in offers[rank]["layers"].items():
            ranks_of.setdefault(index, {})[rank] = held
    nobody = [index for index in range(first["model"][0]) if str(index) not in ranks_of]
    if nobody:
        return no(f"no rank holds the {nobody[0] + 1}. layer with experts")
    for index, holders in ranks_of.items():
        one = min(holders)
        for rank, (group, tensor_index, signature) in holders.items():
            if rank not in group or len(group) != first["model"][2] or any(holders.get(r, [None])[0] != group for r in group):
                return no(
                    f"rank {rank}'s expert-parallel group of the {int(index) + 1}. layer with experts is not the same for all its members"
                )
            if any(holders[r][1] != tensor_index for r in group):
                return no(f"rank {rank}'s expert-parallel group has members of other expert-tensor-parallel positions")
            if signature != holders[one][2]:
                return no(
                    f"rank {rank} holds other tensors or optimizer states of the {int(index) + 1}. layer with experts than rank {one}"
                )
    return {"move": True, "why": ""}


def agree(board, rank: int, world: int, number: int, offer: dict, patience: float) -> dict:
    """Say what this rank can do and learn what all do. Never waits longer than 1.25 times `patience`, plus what the board itself takes."""
    decision = f"experts/{number}"
    try:
        board.put(f"{decision}/{rank}", json.dumps(offer).encode())
    except Exception as e:  # nobody has heard a yes from this rank, so nobody moves
        say.error(f"expert placement: the other ranks cannot be told: {e!r}; experts stay where they are")
        return {"move": False, "why": "", "said": True}
    if rank == 0:
        ends, offers = time.monotonic() + patience, {}
        try:
            for other in range(world):
                text = board.wait(f"{decision}/{other}", max(0.0, ends - time.monotonic()))
                offers[other] = json.loads(text) if text is not None else None
                if text is None or offers[other]["no"]:
                    ends = 0.0  # it is decided; the rest is only for telling how many there are
            verdict = judge(offers, world)
        except Exception as e:
            verdict = {"move": False, "why": f"rank 0 could not read all offers: {e!r}"}
        return _decided(board, decision, verdict, rank)
    if offer["no"]:
        return {"move": False, "why": "", "said": True}  # rank 0 says why; nobody moves without this rank's yes
    if not offer["moves"]:
        return {"move": False, "why": "", "there": True}
    try:
        text = board.wait(decision, 1.25 * patience)
    except Exception:
        text = None
    if text is not None:
        return json.loads(text)
    return _decided(
        board, decision, {"move": False, "why": f"rank {rank} waited {1.25 * patience:.0f} seconds for rank 0 in vain"}, rank
    )


def _decided(board, key: str, verdict: dict, rank: int) -> dict:
    for again in range(3):
        try:
            return json.loads(board.claim(key, json.dumps(verdict).encode()))
        except Exception as e:
            trouble = e
            time.sleep(1 << again)
    raise Doubt(
        f"railyard: rank {rank}: RAILYARD_EXPERTS: this rank agreed to move experts and cannot learn whether the others do ({trouble!r}); "
        "start the job again"
    )


# ---- what beside checkpoints says which expert is where


def write_note(folder: str, order: Optional[Order], experts_ranks: int) -> bool:
    """Into an existing folder, whole or not at all; a note of an older checkpoint there is removed where nothing was moved."""
    path = os.path.join(folder, NOTE)
    if order is None:
        if os.path.exists(path):
            os.unlink(path)
        return True
    if not os.path.isdir(folder):
        return False
    part = f"{path}.{os.uname().nodename}.{os.getpid()}"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(
            {
                "version": 1,
                "layers": len(order),
                "experts": len(order[0]),
                "ranks": experts_ranks,
                "permutation": order,
                "meaning": "Slot s of layer l in this checkpoint holds expert permutation[l][s] of the numbering that RAILYARD_EXPERTS uses. "
                "The checkpoint is complete without this file; Railyard reads it to know where experts are.",
            },
            file,
        )
    os.replace(part, path)
    return True


def read_note(folder: str) -> Tuple[Optional[Order], int]:
    """The order, and for how many expert-parallel ranks it was made; None without a note. Raises OSError, ValueError, KeyError
    or TypeError for one that cannot be read."""
    try:
        with open(os.path.join(folder, NOTE), encoding="utf-8") as file:
            note = json.load(file)
    except FileNotFoundError:
        return None, 0
    if note["version"] != 1:
        raise ValueError(f"version {note['version']}")
    return check_order(note["permutation"], note["layers"], note["experts"], folder), note["ranks"]


class Mover:
    """This process' part: which order the model is in, and when it must be brought into another.

    path: RAILYARD_EXPERTS, or "" where experts only have to be followed through checkpoints
    read(path, layers, experts, ranks) → Order, raising on a file that is none
    """

    def __init__(self, path: str, read: Callable[[str, int, int, int], Order], patience: float) -> None:
        self.path, self.read, self.patience = path, read, patience
        self.order: Optional[Order] = None  # None: the checkpoint's own
        self.ranks = 0  # expert-parallel ranks, once known
        self.due = bool(path)
        self.settled = not path  # it is known which order the model trains in
        self.number = 0  # of agreements so far: the same on all ranks, as all take the same steps
        self.trouble = ""  # why the order of a loaded checkpoint is not known

    def step(self, job, look: Callable[[], Holding]) -> None:
        """Before a training step, on every rank of the job: does its work once after each start and each load."""
        self.due = False
        number, self.number = self.number, self.number + 1
        offer, holding, layers, staging, source, want = {"no": ""}, None, [], None, [], None
        try:
            if self.trouble:
                raise Refused(self.trouble)
            holding = look()
            if holding.ranks < 2:
                raise Refused("the experts of a layer are all on one rank (--expert-model-parallel-size 1)")
            want = check_order(self._map(holding), holding.layers, holding.experts, self.path)
            have = (
                check_order(self.order, holding.layers, holding.experts, NOTE)
                if self.order
                else identity(holding.layers, holding.experts)
            )
            source = sources(have, want)
            moves = any(moving(row) for row in source)
            if moves:
                layers = holding.prepare(source)
                staging = Staging(layers, source, STAGING)
            offer.update(
                model=[holding.layers, holding.experts, holding.ranks],
                want=digest(want),
                have=digest(have),
                moves=moves,
                layers={str(layer.index): [layer.ranks, layer.tensor_index, layer.signature] for layer in layers},
            )
        except Refused as e:
            offer["no"] = str(e)
        except Exception as e:
            offer["no"] = say.failure(e)
        began = time.monotonic()
        decision = agree(job.board, job.rank, job.world, number, offer, self.patience)
        if decision["move"]:
            try:
                self._move(job, holding, layers, source, staging)
            except Exception as e:
                raise Doubt(
                    f"railyard: rank {job.rank}: RAILYARD_EXPERTS: a failure while experts were being moved: {type(e).__name__}: {e}; the model "
                    "is not whole: start the job again, without RAILYARD_EXPERTS if this comes back"
                ) from e
        elif decision.get("there"):
            if job.rank == 0:
                say.info(f"{self.path}: experts are where it wants them, nothing was moved")
        elif job.rank == 0 and not decision.get("said"):
            say.warn(f"{self.path}: experts stay where they are: {decision['why']}")
        if decision["move"] or decision.get("there"):
            self.order = want if want != identity(holding.layers, holding.experts) else None
            self.ranks = holding.ranks
        self.settled = True
        if decision["move"] and job.rank == 0:
            changed = sum(
                1
                for row in source
                for slot, s in enumerate(row)
                if slot * holding.ranks // len(row) != s * holding.ranks // len(row)
            )
            say.info(
                f"{self.path}: {changed} of {sum(map(len, source))} experts changed ranks ({self.sent / 1e6:.1f} MB sent by this rank, "
                f"{time.monotonic() - began:.1f} s with all waiting); checkpoints keep this order, {NOTE} in their folders says so"
            )

    def _map(self, holding: Holding) -> Order:
        try:
            return self.read(self.path, holding.layers, holding.experts, holding.ranks)
        except Exception as e:  # library.Error and OSError say which file and why
            raise Refused(str(e)) from e

    def _move(self, job, holding: Holding, layers: List[Layer], source: Order, staging: Staging) -> None:
        import torch

        self.sent = 0
        for layer in sorted(layers, key=lambda one: one.index):
            if moving(source[layer.index]):
                self.sent += exchange(layer, source[layer.index], staging)
        holding.settle()
        if any(t.is_cuda for layer in layers for t in layer.slots[0]):
            torch.cuda.synchronize()  # so that a failure is known here, and staging is free again

    def loaded(self, folder: str) -> None:
        """A checkpoint was loaded from there: the model is in its order now."""
        self.trouble = ""
        try:
            self.order, self.ranks = read_note(folder)
        except (OSError, ValueError, KeyError, TypeError, Refused) as e:
            self.order, self.trouble = None, f"{os.path.join(folder, NOTE)} cannot be read: {e!r}"
            say.warn(f"{self.trouble}; which expert is where is not known")
        self.due = bool(self.path)

    def saved(self, folder: str) -> None:
        """A checkpoint was, or is being, written there. One rank of each node calls this: folders need not be shared."""
        try:
            if not write_note(folder, self.order, self.ranks):
                say.warn_once(
                    "experts-note",
                    f"{folder} is no folder that {NOTE} can be written to; keep in mind that experts are in the order of {self.path}",
                )
        except OSError as e:
            say.warn_once(
                "experts-note",
                f"{folder}: {NOTE} cannot be written: {e}; a job that resumes there will not know which expert is where",
            )


# ---- this process

mover: Optional[Mover] = None


def begin() -> Mover:
    """Made when an adapter is loaded. With RAILYARD_EXPERTS unset, experts stay, but a checkpoint's note is passed on to the next checkpoint."""
    global mover
    if mover is None:
        from . import library

        mover = Mover(
            library.setting("RAILYARD_EXPERTS"), library.expert_map, PATIENCES * float(library.setting("RAILYARD_PATIENCE"))
        )
    return mover


def due() -> bool:
    return mover is not None and mover.due


def before_step(see: Callable[[], Holding]) -> None:
    """see() looks at this process' model. Never raises but Doubt, which must end the job."""
    from . import job

    try:
        current = job.current()
        if current is None:
            raise Refused("torch.distributed is not set up")
    except Exception as e:
        mover.due, mover.settled = False, True
        say.error(f"{mover.path}: experts stay where they are: {e}")
        return
    mover.step(current, see)


def saved(folder: str) -> None:
    """A checkpoint was, or is being, written there: called by all ranks."""
    if mover is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        mover.saved(folder)


def loaded(folder: str) -> None:
    if mover is not None:
        mover.loaded(folder)


def settled() -> bool:
    """Is order() what the job trains with? Not before its first step, where RAILYARD_EXPERTS may move experts."""
    return mover is None or mover.settled


def order() -> Optional[Order]:
    """What slots hold: order()[layer][slot] is the checkpoint's number of the expert; None: experts are where the checkpoint has them."""
    return mover.order if mover is not None else None
