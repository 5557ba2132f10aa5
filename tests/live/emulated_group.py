"""Process groups' all-to-alls over the NCCL that `railyard emu` brings, as PyTorch would issue them: for tests without GPUs.

Owns: standing in for torch.distributed.all_to_all_single on groups that have a communicator here, any number of them. Everything else
goes over gloo. Works with and without librailyard.so in front.
"""

import ctypes
import os

FLOATS = {"torch.float32": 7, "torch.bfloat16": 9, "torch.int32": 2, "torch.int64": 4, "torch.float64": 8, "torch.uint8": 1, "torch.int8": 0}  # ncclDataType_t


def _check(right, what):
    if not right:
        raise AssertionError(what)


class Id(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 128)]


def _library():
    """librailyard.so, if it is in front, and else the emulated NCCL itself."""
    here = ctypes.CDLL(None)
    return here if hasattr(here, "railyard_pause") else ctypes.CDLL(os.environ.get("RAILYARD_NCCL", "libnccl.so.2"))  # PyTorch may bring another


_communicators = {}  # by group
_theirs = None  # torch.distributed.all_to_all_single as it was


def _all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
    nccl = _communicators.get(group)
    if nccl is None:
        return _theirs(output, input, output_split_sizes, input_split_sizes, group=group, async_op=async_op)
    _check(not async_op, "nobody waits for it here")
    nccl.exchange(output, input, output_split_sizes, input_split_sizes)


class Nccl:
    """A group's communicator on the emulated NCCL, behind torch.distributed.all_to_all_single until end()."""

    def __init__(self, torch, dist, group):
        global _theirs
        self.group = group
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.exchanges = 0
        self.call = _library()
        one = Id()
        if self.rank == 0:
            self._good(self.call.ncclGetUniqueId(ctypes.byref(one)))
        told = [bytes(one) if self.rank == 0 else None]
        dist.broadcast_object_list(told, dist.get_global_rank(group, 0), group=group)
        one = Id.from_buffer_copy(told[0])
        self.comm = ctypes.c_void_p()
        self.call.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, Id, ctypes.c_int]
        self._good(self.call.ncclCommInitRank(ctypes.byref(self.comm), self.n, one, self.rank))
        for name in ("ncclSend", "ncclRecv"):
            getattr(self.call, name).argtypes = [
                ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p
            ]
        if _theirs is None:
            _theirs = dist.all_to_all_single
            dist.all_to_all_single = torch.distributed.all_to_all_single = _all_to_all_single
        _communicators[group] = self

    @staticmethod
    def _good(result):
        _check(result == 0, f"NCCL gave {result}")

    def exchange(self, output, given, takes, gives):
        _check(output.is_contiguous() and given.is_contiguous() and output.dtype == given.dtype, "not as NCCL wants it")
        each, kind = output[:1].numel() or given[:1].numel(), FLOATS[str(output.dtype)]
        takes, gives = ([int(n) for n in s] if s is not None else [len(given) // self.n] * self.n for s in (takes, gives))
        out, into, size = given.data_ptr(), output.data_ptr(), output.element_size()
        self._good(self.call.ncclGroupStart())
        for p in range(self.n):
            self._good(self.call.ncclSend(out, gives[p] * each, kind, p, self.comm, None))
            self._good(self.call.ncclRecv(into, takes[p] * each, kind, p, self.comm, None))
            out, into = out + gives[p] * each * size, into + takes[p] * each * size
        self._good(self.call.ncclGroupEnd())
        self.exchanges += 1

    def end(self):
        del _communicators[self.group]
        self.call.ncclCommDestroy.argtypes = [ctypes.c_void_p]
        self._good(self.call.ncclCommDestroy(self.comm))
