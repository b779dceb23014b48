"""Keeps a JSON file of what this process's collectives have done, while it runs and when it ends.

Engines end their workers in every way there is, and a server is looked at while it runs: so the file is written each
second in which something happened, at exit, and on SIGTERM where the program does not handle that itself. Knows nothing
of torch.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from multiprocessing import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hxcomm import _core

FORMAT = 1
PERIOD_S = 1.0

_recorder: Recorder | None = None


class Recorder:
    """Writes the file of one process. A forked child gets its own with its first group."""

    def __init__(self, process: _core.Runtime, folder: str, job: int, rank: int, world_size: int) -> None:
        self.process, self.pid, self.since = process, os.getpid(), time.time()
        self.path = Path(folder) / f"hxcomm-stats-{job:016x}-rank{rank}.json"
        self.who = {
            "format": FORMAT,
            "job": f"{job:016x}",
            "rank": rank,
            "world_size": world_size,
            "host": socket.gethostname(),
            "pid": self.pid,
            "program": Path(sys.argv[0]).name if sys.argv else "",
        }
        self.written: list[dict[str, Any]] | None = None
        self.failed = False
        self.lock = threading.RLock()  # the handler of a signal may come while its thread writes
        self.ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._write_each_second, name="hxcomm-stats", daemon=True).start()
        atexit.register(self.end)
        util.Finalize(None, self.end, exitpriority=0)  # processes that multiprocessing forks end without atexit
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._end_by_signal)

    def end(self) -> None:
        if os.getpid() == self.pid:
            self.ended.set()
            self.write()

    def write(self) -> None:
        """Does nothing where nothing has happened since it wrote last."""
        with self.lock:
            rows = rows_of(self.process)
            if rows == self.written:
                return
            record = {**self.who, "since": self.since, "until": time.time(), "rows": rows}
            try:
                # Renamed into place: who reads meanwhile sees the whole of the one before.
                partial = self.path.with_suffix(".partial")
                partial.write_text(json.dumps(record), encoding="utf-8")
                partial.replace(self.path)
            except OSError as error:
                if not self.failed:
                    warnings.warn(f"HXCOMM_STATS: {self.path} cannot be written: {error}", RuntimeWarning, stacklevel=2)
                self.failed = True
            else:
                self.written = rows

    def _write_each_second(self) -> None:
        while not self.ended.wait(PERIOD_S):
            self.write()

    def _end_by_signal(self, number: int, frame: object) -> None:
        self.end()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def rows_of(process: _core.Runtime) -> list[dict[str, Any]]:
    """What all groups, those that have ended among them, did: a row for each group, op, algorithm, dtype and memory."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    keys = ("group", "op", "algorithm", "dtype", "memory")
    for each in [*process.past_statistics(), *process.statistics()]:
        if not each["calls"]:
            continue
        name = tuple(each[key] for key in keys)
        counts = {"calls": 0, "nbytes": 0, "waiting_ns": 0, "moving_ns": 0}
        row = rows.setdefault(name, {**dict(zip(keys, name, strict=True)), **counts})
        row["calls"] += each["calls"]
        row["nbytes"] += each["elements"] * each["item_bytes"]
        row["waiting_ns"] += each["waiting_ns"]
        row["moving_ns"] += each["time_ns"] - each["waiting_ns"]
    return list(rows.values())


def keep(process: _core.Runtime, folder: str, *, job: int, rank: int, world_size: int) -> None:
    """From now on, once for a process. `job`: equal on all its ranks; `rank`: of this process among them."""
    global _recorder
    if _recorder is None or _recorder.pid != os.getpid():
        _recorder = Recorder(process, folder, job, rank, world_size)
        _recorder.start()
