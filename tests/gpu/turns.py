"""Jobs that take turns on one virtual GPU cluster, or on the emulated one.

Owns: starting a job on a standing cluster (tests/gpu/cluster up) or under `railyard emu`, telling its ranks over a socket when to work, and what
they answer. A rank connects, says "rank N", then "ready" whenever it waits; it is told a line ("go ...", "end"). Jobs that
wait do so on the host and run nothing on the GPUs, so any number can stand side by side. Not: what a job does in its turn, nor
what is compared.
"""
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CLUSTER = os.path.join(HERE, "cluster")


class Failed(Exception):
    """What was to be shown could not be."""


def cluster(*argv):
    done = subprocess.run([sys.executable, CLUSTER] + list(argv), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Failed("cluster %s: %s" % (argv[0], done.stdout.strip()))
    sys.stderr.write(done.stdout)


class Peer:
    """A rank's end of the line: what it says, line by line."""

    def __init__(self, connection):
        self.connection, self.buffer = connection, b""

    def fileno(self):
        return self.connection.fileno()

    def line(self):
        """The next line, without its end; "" when there is none to come."""
        while b"\n" not in self.buffer:
            try:
                data = self.connection.recv(4096)
            except ConnectionError:
                data = b""
            if not data:
                return ""
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line.decode()


class Emulated:
    """Where a job's ranks run under `railyard emu`, without GPUs: its tool, and options for its virtual links. As on a cluster, what ranks
    other than the first print goes to the job's folder."""

    QUIET = 'test "$RANK" = 0 || exec >"$0/rank-$RANK.log" 2>&1; exec "$@"'

    def __init__(self, tool, links):
        self.tool, self.links = os.path.abspath(tool), list(links)
        self.nccl = os.path.join(os.path.dirname(os.path.dirname(self.tool)), "emu", "libnccl.so.2")

    def command(self, nodes, gpus, folder, env, preload, timeout, command):
        """argv; `preload`: whether the librailyard.so that lies beside the tool is."""
        emu = [self.tool, "emu", "-n", str(nodes), "-g", str(gpus), *self.links, *(["--preload"] if preload else [])]
        return ["timeout", "-k", "5", "%d" % timeout, "env", "OMP_NUM_THREADS=1", "RAILYARD_NCCL=" + self.nccl, *env,
                *emu, "--", "sh", "-c", self.QUIET, folder, *command]


class Job:
    """One program as the ranks of a cluster, plain or preloaded, that works when told to."""

    def __init__(self, name, label, nodes, gpus, folder, command, env=(), preload=None, pin=True, timeout=600, turns=True,
                 patience=None, emulated=None):
        """`timeout`: seconds for the whole job; `patience`: for each answer of its ranks (None: as long as it lives); `emulated`: an
        Emulated instead of the cluster `name`."""
        self.patience = patience
        self.label, self.world, self.folder = label, nodes * gpus, os.path.join(folder, label)
        os.makedirs(self.folder, exist_ok=True)
        if emulated:
            argv = emulated.command(nodes, gpus, self.folder, env, preload, timeout, command)
        else:
            argv = [sys.executable, CLUSTER, "run", "--name", name, "--nodes", str(nodes), "--gpus", str(gpus),
                    "--log", self.folder, "--timeout", str(timeout)] + (["--pin"] if pin else [])
            argv += ["--preload", preload] if preload else []
            for kv in env:
                argv += ["--env", kv]
            argv += ["--"] + list(command)
        self.ranks, self.server, self.place = {}, None, None
        if turns:
            # Not in the folder: a socket's path may have 107 bytes only.
            self.place = tempfile.mkdtemp(prefix="turns-")
            path = os.path.join(self.place, "s")
            self.server = socket.socket(socket.AF_UNIX)
            self.server.bind(path)
            self.server.listen(self.world)
            argv += ["--turns", path]
        # Nothing of Railyard's may reach the plain job from the caller's environment.
        env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and not k.startswith("RAILYARD_")}
        self.output = os.path.join(self.folder, "output")
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=out,
                                            stderr=subprocess.STDOUT)

    def fail(self, why):
        with open(self.output, errors="replace") as f:
            tail = f.read().splitlines()[-30:]
        # Rank 0's is in the output, and a failed rank's; of one that hangs, only its log tells.
        for name in sorted(n for n in os.listdir(self.folder) if n.endswith(".log")):
            with open(os.path.join(self.folder, name), errors="replace") as f:
                tail += ["[%s] %s" % (name[:-len(".log")], line) for line in f.read().splitlines()[-4:]]
        raise Failed("the %s job %s. The end of its output:\n%s" % (self.label, why, "\n".join("  " + t for t in tail)))

    def _readable(self, sockets):
        """Those of the sockets that have something to say; fails when the job has ended instead, or says nothing for too long."""
        end = time.monotonic() + self.patience if self.patience else None
        while True:
            ready = [s for s in sockets if isinstance(s, Peer) and s.buffer] or select.select(sockets, [], [], 0.5)[0]
            if ready:
                return ready
            if self.process.poll() is not None:
                self.fail("ended early with status %d" % self.process.returncode)
            if end and time.monotonic() > end:
                self.fail("gave no answer for %g s" % self.patience)

    def connect(self):
        while len(self.ranks) < self.world:
            self._readable([self.server])
            peer = Peer(self.server.accept()[0])
            hello = peer.line().split()
            if hello[:1] != ["rank"]:
                self.fail("broke a connection off")
            self.ranks[int(hello[1])] = peer

    def wait_ready(self):
        """All ranks have finished what they were told and wait. What each said after "ready", by rank."""
        waiting, said = dict(self.ranks), {}
        while waiting:
            for peer in self._readable(list(waiting.values())):
                line = peer.line()
                if line.split(" ")[0] != "ready":
                    self.process.wait()
                    self.fail("ended early with status %d" % self.process.returncode)
                rank = next(r for r, p in waiting.items() if p is peer)
                said[rank] = line[len("ready"):].strip()
                del waiting[rank]
        return [said[r] for r in sorted(said)]

    def tell(self, what):
        try:
            for peer in self.ranks.values():
                peer.connection.sendall(what.encode() + b"\n")
        except ConnectionError:
            pass  # that rank is gone: whoever waits for the ranks next says why

    def turn(self, what):
        """Tell all ranks, wait until they are ready again, and return what they said."""
        self.tell("go " + what)
        return self.wait_ready()

    def finish(self):
        if self.server:
            self.tell("end")
        if self.process.wait():
            self.fail("failed with status %d" % self.process.returncode)

    def result(self, name):
        """The JSON file that the job left in its folder."""
        try:
            with open(os.path.join(self.folder, name)) as f:
                return json.load(f)
        except (OSError, ValueError) as e:
            self.fail("left no result (%s)" % e)

    def remarks(self):
        """What Railyard printed."""
        found = []
        for name in sorted(os.listdir(self.folder)):
            if name == "output" or name.endswith(".log"):
                with open(os.path.join(self.folder, name), errors="replace") as f:
                    found += [line.strip() for line in f if line.startswith("railyard")]
        return sorted({re.sub(r"^railyard\[.*?\]", "railyard", line) for line in found})  # each once, whoever said it

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for s in [self.server] + [peer.connection for peer in self.ranks.values()]:
            if s:
                s.close()
        if self.place:
            shutil.rmtree(self.place, ignore_errors=True)
