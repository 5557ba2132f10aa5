"""Lines on stderr: "railyard: rank 3: text", as far as RAILYARD_LOG lets them.

Owns: the format and the level. Not: the texts. The variable is read here and not through library.py, since what there is to
be said may be that the library cannot be loaded. Each line is one write(2), so that the lines of many ranks do not mix.
"""

import os
import threading
from typing import Optional

LEVELS = {"error": 0, "warn": 1, "info": 2, "plan": 3, "debug": 4}

rank: Optional[int] = None  # global rank, once it is known (job.py); until then the launcher's RANK
_once = set()
_lock = threading.Lock()


def enabled(level: str) -> bool:
    return LEVELS[level] <= LEVELS.get(os.environ.get("RAILYARD_LOG", "").strip().lower(), LEVELS["warn"])


def _line(level: str, text: str) -> None:
    if not enabled(level):
        return
    who = rank if rank is not None else os.environ.get("RANK", "")
    line = f"railyard: rank {who}: {text}\n" if who != "" else f"railyard: {text}\n"
    try:
        os.write(2, line.replace("\n", " ", line.count("\n") - 1).encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # a closed stderr ends no job


def error(text: str) -> None:
    _line("error", text)


def warn(text: str) -> None:
    _line("warn", text)


def info(text: str) -> None:
    _line("info", text)


def debug(text: str) -> None:
    _line("debug", text)


def warn_once(key: str, text: str) -> None:
    """Warns the first time in this process that something is said of `key`."""
    with _lock:
        if key in _once:
            return
        _once.add(key)
    warn(text)


def failure(e: BaseException) -> str:
    """An exception in one line, and where it came from: the innermost place that is ours."""
    where, tb = "", e.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        if os.path.dirname(code.co_filename) == os.path.dirname(__file__):
            where = f" ({os.path.basename(code.co_filename)}:{tb.tb_lineno})"
        tb = tb.tb_next
    text = " ".join(str(e).split())
    return f"{type(e).__name__}{': ' + text[:300] if text else ''}{where}"
