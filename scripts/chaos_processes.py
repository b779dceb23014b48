"""Processes of scripts/chaos.py: forked ranks, waited for by their pidfds, ended by their pids."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WATCHDOG_S = 60.0  # that a case may take, whatever happens


@dataclass
class Process:
    """One forked rank. `status` is os.waitpid's as subprocess has it; `ended_at` by this process's clock."""

    rank: int
    pid: int
    pidfd: int
    status: int | None = None
    ended_at: float = 0.0


def start(rank: int, folder: Path, run: Callable[[], None]) -> Process:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with (folder / f"{rank}.output").open("wb") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            run()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return Process(rank, pid, os.pidfd_open(pid))


def wait(processes: Sequence[Process], timeout_s: float, until: Callable[[], bool] = lambda: False) -> bool:
    """Until all have ended (True), `until` holds (True), or time is up (False)."""
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    by_fd = {process.pidfd: process for process in processes if process.status is None}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    while by_fd and not until():
        if time.monotonic() > deadline:
            return False
        for fd, _ in poll.poll(20):
            process = by_fd.pop(fd)
            poll.unregister(fd)
            process.ended_at = time.monotonic()
            process.status = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
    return True


def end(processes: Sequence[Process]) -> None:
    """Kills what still runs, by its pid, and reaps it."""
    for process in processes:
        if process.status is None:
            os.kill(process.pid, signal.SIGKILL)
            process.status = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
        os.close(process.pidfd)


def events(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / str(rank)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
