"""What ranks of the jobs in this folder begin with: a device, a process group, and the line to who tells them what to do.

Owns: one rank's side of turns.py's protocol ("rank N", then an answer that begins with "ready" to everything told), choosing the device
that tests/gpu/cluster means this rank to have. Not: what a rank does when told.
"""
import argparse
import os
import socket

import torch
import torch.distributed as dist

BACKENDS = {"choices": ["nccl", "gloo"], "default": "nccl" if torch.cuda.is_available() else "gloo"}  # add_argument("--backend", **BACKENDS)


class Line:
    def __init__(self, path):
        line = socket.socket(socket.AF_UNIX)
        line.connect(path)
        self._lines = line.makefile("rw")
        self.say("rank %s" % os.environ["RANK"])

    def say(self, text):
        self._lines.write(text + "\n")
        self._lines.flush()

    def told(self, most=-1):
        """The words of the next line, of the last one the rest; none at the end."""
        return self._lines.readline().split(None, most)


def join(backend):
    """(device, a function that waits for it). PyTorch's process group is made."""
    if backend == "gloo":
        dist.init_process_group("gloo")
        return torch.device("cpu"), lambda: None
    device = torch.device("cuda", int(os.environ.get("LOCAL_DEVICE", os.environ["LOCAL_RANK"])))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device, torch.cuda.synchronize


def begin(description, control=False, emulated=False):
    """(options, rank, ranks, ranks per node, line, device, what waits for it) of a job with --turns and --backend, and --control if it can run
    without the preload, --emulated if without GPUs on the emulated cluster. All ranks have met."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--turns", required=True)
    p.add_argument("--backend", **BACKENDS)
    if control:
        p.add_argument("--control", action="store_true", help="Railyard is not preloaded: every way is plain")
    if emulated:
        p.add_argument("--emulated", action="store_true", help="on the emulated NCCL; PyTorch's own group is gloo's")
    a = p.parse_args()
    if emulated and a.emulated:
        a.backend = "gloo"
        torch.set_num_threads(1)
    line = Line(a.turns)
    device, wait = join(a.backend)
    dist.barrier()
    wait()
    return (a, *(int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")), line, device, wait)
