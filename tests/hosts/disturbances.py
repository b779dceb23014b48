"""A job that sums and checks until it is told that it is enough, and what a test does to it meanwhile."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

JOIN_S = 30.0
PIPE = "said"


def say(folder: str, line: str) -> None:
    """To the Job of that folder; lost where it does not listen."""
    pipe = os.open(Path(folder) / PIPE, os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        os.write(pipe, f"{line}\n".encode())
    os.close(pipe)


def sum_until_told(folder: str) -> int:
    """Sums, each of them checked, until the test says that it is enough; how many."""
    torch.set_num_threads(1)
    rank, world_size, calls = dist.get_rank(), dist.get_world_size(), 0
    say(folder, f"{rank} {os.getpid()}")
    while True:
        last = rank == 0 and (Path(folder) / "enough").exists()
        for count in (10, 100_000):
            tensor = torch.full((count,), rank + 1.0)
            tensor[0] = float(last)
            dist.all_reduce(tensor)
            assert bool((tensor[1:] == world_size * (world_size + 1) / 2).all())
        calls += 1
        if rank == 0:
            say(folder, "call")
        if tensor[0] == 1:
            return calls


class Job:
    """What a test hears of ranks that were given its folder. To be made before they start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.mkfifo(folder / PIPE)
        self._pipe = os.open(folder / PIPE, os.O_RDWR | os.O_NONBLOCK)
        self._lines: list[str] = []

    def hear(self, count: int, is_one: Callable[[str], bool], timeout_s: float = 30.0) -> list[str]:
        """The next `count` lines that are what the caller waits for."""
        heard: list[str] = []
        deadline = time.monotonic() + timeout_s
        while True:
            heard += filter(is_one, self._lines)
            self._lines.clear()
            if len(heard) >= count:
                return heard
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._pipe], [], [], left)[0], f"only {heard} came of {count}"
            self._lines += os.read(self._pipe, 65536).decode().split("\n")

    def pids(self, world_size: int) -> list[int]:
        """Of all ranks, once they sum."""
        said = dict(line.split() for line in self.hear(world_size, lambda line: line[:1].isdigit()))
        return [int(said[str(rank)]) for rank in range(world_size)]

    def goes_on(self, calls: int = 3) -> None:
        """Returns when that many more sums have come out right. (The first may have begun before.)"""
        while select.select([self._pipe], [], [], 0)[0]:
            os.read(self._pipe, 65536)
        self.hear(calls, lambda line: line == "call")

    def is_enough(self) -> None:
        (self.folder / "enough").touch()


def hold(seconds: float) -> None:
    """What is disturbed stays so for this long: the one thing here that is a duration and not an event."""
    threading.Event().wait(seconds)


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
