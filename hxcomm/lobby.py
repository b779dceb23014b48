"""How processes of one host meet without a store: each leaves notes in its own segment for those who know where.

Faster than a store, whose one process answers all of them, and there when that process has died. (TCPStore asks the
name server for the name of whoever disconnects; where an answer was lost, all ranks waited 2 to 5 s for their store
right after a death, in 5 of 80 trials.) What stands in a note is an untrusted hint, as what a store says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hxcomm import bootstrap

# The notes of a page: a process's hello and verdict, of its last two attempts. Who has begun one after the next has
# given the older one up.
_KEYS = 2
_ATTEMPTS = 2

_lock = threading.Lock()
_free: list[Page] = []


@dataclass
class Page:
    """Of this process's notes; `attempts` counts the meetings that it was used for."""

    offset: int
    attempts: int = 0


def take_page() -> Page:
    """One for a communicator."""
    with _lock:
        return _free.pop() if _free else Page(bootstrap.runtime().allocate_notes())


def give_back(page: Page) -> None:
    """For the next communicator. What stands there stays readable meanwhile: peers may not have read all of it."""
    with _lock:
        _free.append(page)


@dataclass(frozen=True)
class Door:
    """Where a process of this host is met, and what to call it in messages.

    about: 62 bits that tell its notes of one attempt: the upper half names it and its attempt, the lower one all who
    make the attempt together.
    """

    address: str
    process: bytes
    notes: int
    about: int
    label: str


class MemoryMeeting(bootstrap.Meeting):
    """Of processes that know each other's doors, in rank order, and a nonce that none of them has used before."""

    longest_pause_s = 0.004

    def __init__(
        self,
        doors: Sequence[Door],
        page: Page,
        nonce: int,
        *,
        rank: int,
        group: str,
        timeout_s: float,
        death_of: Callable[[int], str],
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(rank, group, timeout_s, death_of, [door.process for door in doors])
        self._doors, self._page, self._nonce, self._sleep = doors, page, nonce, sleep
        self._first = page.attempts % _ATTEMPTS * _KEYS
        page.attempts += 1
        self._own: dict[str, str] = {}
        self._neighbours: dict[int, Any] = {}

    def sleep(self, seconds: float) -> None:
        self._sleep(seconds)

    def nonce(self) -> int:
        return self._nonce

    def publish(self, key: str, value: str) -> None:
        self._own[key] = value
        about = self._doors[self.rank].about
        bootstrap.runtime().write_note(self._page.offset, self._first + self._index(key), about, value)

    def look(self, key: str, whose: int) -> bytes | None:
        if whose == self.rank:
            return self._own[key].encode()
        neighbour, door = self._neighbour(whose), self._doors[whose]
        for attempt in range(_ATTEMPTS):
            about, text = neighbour.read_note(door.notes, attempt * _KEYS + self._index(key))
            if about == door.about:
                return bytes(text)
            if about >> 31 == door.about >> 31:
                self.fail(f"{door.label} calls it with the same uuid, but other handles or another order of them")
        if neighbour.death:
            self.fail(f"{door.label} {neighbour.death}")
        return None

    def decline(self, reason: str) -> None:
        self.publish(str(self.rank), bootstrap.DECLINED.decode() + reason)

    def _index(self, key: str) -> int:
        return int(key.startswith("verdict/"))

    def _neighbour(self, rank: int) -> Any:
        if rank not in self._neighbours:
            door = self._doors[rank]
            remaining_ms = int(1e3 * (self.deadline - time.monotonic()))
            try:
                found = bootstrap.runtime().neighbour(
                    door.address, door.process, max(1, min(bootstrap.HANDSHAKE_TIMEOUT_MS, remaining_ms))
                )
            except RuntimeError as error:  # InitError: it is stopped, or it has ended just now
                self.fail(f"{door.label}: {error}")
            if found is None:
                self.fail(f"{door.label} has ended: nobody answers at '@{door.address}'")
            self._neighbours[rank] = found
        return self._neighbours[rank]
