"""A job that sums and checks until it is told that it is enough, and what a test does to it meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

JOIN_S = 30.0


def sum_until_told(folder: str) -> int:
    """Sums, each of them checked, until the test has made the file `enough`; how many."""
    torch.set_num_threads(1)
    rank, world_size, calls = dist.get_rank(), dist.get_world_size(), 0
    (Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
    while True:
        last = rank == 0 and (Path(folder) / "enough").exists()
        for count in (10, 100_000):
            tensor = torch.full((count,), rank + 1.0)
            tensor[0] = float(last)
            dist.all_reduce(tensor)
            assert bool((tensor[1:] == world_size * (world_size + 1) / 2).all())
        calls += 1
        if rank == 0:
            (Path(folder) / "calls").write_text(f"{calls}\n")
        if tensor[0] == 1:
            return calls


class Job:
    """What a test sees of a job whose ranks are in sum_until_told."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder = folder
        await_files(folder, "calls", *(f"pid{rank}" for rank in range(world_size)))
        self.pids = [int((folder / f"pid{rank}").read_text()) for rank in range(world_size)]

    def goes_on(self, calls: int = 3, timeout_s: float = 20.0) -> None:
        """Returns when that many more have come out right. (One that runs may have begun before what the test did.)"""
        until, deadline = self._calls() + calls, time.monotonic() + timeout_s
        while self._calls() < until:
            assert time.monotonic() < deadline, f"the job does not go on: {self._calls()} calls, {until} awaited"
            time.sleep(0.001)

    def _calls(self) -> int:
        text = (self.folder / "calls").read_text()
        return int(text) if text.endswith("\n") else 0  # it is being written

    def is_enough(self) -> None:
        (self.folder / "enough").touch()


def await_files(folder: Path, *names: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not come in {folder}"
        time.sleep(0.001)


@contextmanager
def meanwhile(disturb: Callable[[], None]) -> Iterator[None]:
    """Runs `disturb` beside the ranks that the block runs; its error is the test's."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            disturb()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=JOIN_S)
    assert not thread.is_alive(), "the disturbance has not ended"
    if errors:
        raise errors[0]
