"""What ranks of the jobs in this folder begin with: a device, a process group, and the line to who tells them what to do.

Owns: one rank's side of turns.py's protocol ("rank N", then an answer that begins with "ready" to everything told), choosing the device
that tests/gpu/cluster means this rank to have. Not: what a rank does when told.
"""
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
