"""The keys and values that all ranks of a job share (docs/live-placement.md has the keys).

Owns: putting, reading, claiming, waiting, and a connection of our own to PyTorch's store. Not: what is written. Values are
bytes and never empty. Threads: any may call. Nothing waits longer than it is told to; a board that cannot be reached raises.
"""

import queue
import threading
import time
from datetime import timedelta
from typing import Dict, List, Optional

PREFIX = "railyard/"
ANSWER = 20.0  # seconds for the store to answer anything; longer is a failure


class Board:
    """What MemoryBoard and StoreBoard have in common."""

    def put(self, key: str, value: bytes) -> None:
        raise NotImplementedError

    def get(self, key: str) -> Optional[bytes]:
        """The value, or None where there is none yet. Does not wait."""
        raise NotImplementedError

    def claim(self, key: str, value: bytes) -> bytes:
        """Writes where nothing is written yet; the value that stands."""
        raise NotImplementedError

    def drop(self, key: str) -> None:
        raise NotImplementedError

    def get_all(self, keys: List[str]) -> Optional[List[bytes]]:
        """The values of all of them, None as long as one is missing."""
        out = []
        for key in keys:
            value = self.get(key)
            if value is None:
                return None
            out.append(value)
        return out

    def wait(self, key: str, seconds: float) -> Optional[bytes]:
        """The value as soon as there is one; None when that time is over."""
        end, pause = time.monotonic() + seconds, 0.0005
        while True:
            value = self.get(key)
            left = end - time.monotonic()
            if value is not None or left <= 0:
                return value
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, 0.05)


class MemoryBoard(Board):
    """For threads of one process: tests."""

    def __init__(self) -> None:
        self._values: Dict[str, bytes] = {}
        self._changed = threading.Condition()

    def put(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = bytes(value)
            self._changed.notify_all()

    def get(self, key: str) -> Optional[bytes]:
        with self._changed:
            return self._values.get(key)

    def claim(self, key: str, value: bytes) -> bytes:
        with self._changed:
            stands = self._values.setdefault(key, bytes(value))
            self._changed.notify_all()
            return stands

    def drop(self, key: str) -> None:
        with self._changed:
            self._values.pop(key, None)

    def wait(self, key: str, seconds: float) -> Optional[bytes]:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, seconds)
            return self._values.get(key)

    def keys(self) -> List[str]:
        with self._changed:
            return sorted(self._values)


class Gone(Exception):
    """The store does not answer."""


class StoreBoard(Board):
    """On PyTorch's store, over a connection of our own where that can be had: the job's is locked while one of its threads
    waits in it.

    A store whose server was shut down may leave a caller waiting for ever, whatever its timeout (data workers that were
    forked off the server's process keep its sockets open). So a thread of ours asks; who waits for it goes on after ANSWER
    seconds, and asks no more."""

    def __init__(self, store) -> None:
        self._store = _own_connection(store)
        self._many = bool(getattr(self._store, "has_extended_api", lambda: False)())
        self._asked: "queue.SimpleQueue" = queue.SimpleQueue()
        self._gone = False
        threading.Thread(target=self._answer, name="railyard-board", daemon=True).start()

    def _answer(self) -> None:
        while True:
            function, out, there = self._asked.get()
            try:
                out.append((function(), None))
            except Exception as e:
                out.append((None, e))
            there.set()

    def _ask(self, function):
        if self._gone:
            raise Gone("the job's store does not answer")
        out: list = []
        there = threading.Event()
        self._asked.put((function, out, there))
        if not there.wait(ANSWER):
            self._gone = True
            raise Gone(f"the job's store has not answered in {ANSWER:g} s")
        value, error = out[0]
        if error is not None:
            raise error
        return value

    def put(self, key: str, value: bytes) -> None:
        self._ask(lambda: self._store.set(PREFIX + key, bytes(value)))

    def get(self, key: str) -> Optional[bytes]:
        full = PREFIX + key
        return self._ask(lambda: self._store.get(full) if self._store.check([full]) else None)

    def claim(self, key: str, value: bytes) -> bytes:
        return self._ask(lambda: self._store.compare_set(PREFIX + key, b"", bytes(value)))

    def drop(self, key: str) -> None:
        self._ask(lambda: self._store.delete_key(PREFIX + key))

    def get_all(self, keys: List[str]) -> Optional[List[bytes]]:
        full = [PREFIX + key for key in keys]

        def read():
            if not self._store.check(full):
                return None
            return list(self._store.multi_get(full)) if self._many else [self._store.get(key) for key in full]

        return self._ask(read) if keys else []


def _own_connection(store):
    """A connection to the same store, under the same prefix. The job's own where that cannot be made: nothing of ours waits
    in it either."""
    own = store
    try:
        if hasattr(store, "clone"):
            own = store.clone()
        else:
            own = _connect(store)
        if own is not store:
            own.set_timeout(timedelta(seconds=ANSWER))
    except Exception as e:
        from . import say

        say.info(f"no connection of our own to the job's store ({say.failure(e)}); its is used")
        own = store
    return own


def _connect(store):
    """For PyTorch older than Store.clone(): a second client of the TCPStore, under a prefix of ours that is new after a
    restart."""
    import os

    import torch.distributed as dist

    inner = store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    if not isinstance(inner, dist.TCPStore):
        return store
    client = dist.TCPStore(inner.host, inner.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=ANSWER))
    return dist.PrefixStore("restart%s" % os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), client)
