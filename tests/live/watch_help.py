"""What the tests of watching have in common: which Python they run in, the adapter's folder, and stand-ins for the board and
the leader's library.

RY_TEST_PYTHON names an interpreter that has torch and the frameworks; a test that needs them runs itself there, and skips (77)
where they are not.
"""
import importlib.util
import os
import random
import sys
import threading

ADAPTER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "plugin", "python")
sys.path.insert(0, ADAPTER)


def needs(*modules):
    """Goes on only in an interpreter that has all these modules."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if not missing:
        return
    other = os.environ.pop("RY_TEST_PYTHON", "")
    if other:  # once: it is not in the environment any more
        sys.stdout.flush()
        os.execv(other, [other] + sys.argv)
    print("skipped: no %s in %s (RY_TEST_PYTHON names another interpreter)" % (", ".join(missing), sys.executable))
    sys.exit(77)


def seeded():
    seed = int(os.environ.get("RY_SEED", "0")) or int.from_bytes(os.urandom(3), "big")
    print("seed %d (RY_SEED=%d repeats it)" % (seed, seed), flush=True)
    return random.Random(seed)


class Board:
    """The board's calls on a dictionary."""

    def __init__(self):
        self.lock, self.keys, self.most = threading.Lock(), {}, 0

    def put(self, key, value):
        with self.lock:
            self.keys[key] = bytes(value)
            self.most = max(self.most, len(self.keys))

    def get(self, key):
        with self.lock:
            return self.keys.get(key)

    def drop(self, key):
        with self.lock:
            self.keys.pop(key, None)


class Live:
    """Keeps what the leader is told."""

    def __init__(self):
        self.told, self.recording, self.flushed = [], None, 0

    def observe(self, tokens, counts, distinct, at):
        self.told.append((tokens.copy(), counts.copy(), None if distinct is None else distinct.copy(), at))

    def record(self, folder, tokens_per_sample, max_samples):
        self.recording = (folder, tokens_per_sample, max_samples)

    def flush(self):
        self.flushed += 1


class Say:
    """Keeps what was said."""

    def __init__(self):
        self.lines, self.keys = [], set()

    def info(self, text):
        self.lines.append(text)

    warn = error = info

    def warn_once(self, key, text):
        if key not in self.keys:
            self.keys.add(key)
            self.lines.append(text)
