"""What carries frames between processes on different hosts.

Frames of an ordered pair of processes arrive in their order, as late as can be. Messages take a credit each, which the
receiver gives back when it has taken or dropped the frame; those without one wait at the sender. All else is short and
bounded by the protocol. When a process dies, what is under way from it may be lost, from any frame on; then its peers
learn of it.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from schedule.simulated_group import Steps

Pair = tuple[int, int, int]  # group, processes from and to


@dataclass(frozen=True)
class Frame:
    kind: str  # "message", "credit", "verdict", "called", "packet", "room", "abort", "left"; of the wire itself "lost"
    group: int
    source: int  # rank, of "lost" the process
    sequence: int = 0
    fingerprint: object = None
    number: int = 0
    content: Any = None


@dataclass
class Outgoing:
    credits: int
    unsent: deque[Frame] = field(default_factory=deque)


class Wire:
    def __init__(self, n: int, n_credits: int, rng: random.Random, broken: str) -> None:
        self.rng, self.n_credits, self.broken = rng, n_credits, broken
        self.flying: dict[tuple[int, int], deque[Frame]] = {}
        self.inbox: list[deque[Frame]] = [deque() for _ in range(n)]
        self.outgoing: defaultdict[Pair, Outgoing] = defaultdict(lambda: Outgoing(n_credits))
        self.dead: set[int] = set()
        self.blocked: dict[int, object] = {}  # by process the member whose send waits, where sends do
        # In half of the runs some pairs are served only when nothing else is under way.
        self.order = {(a, b): rng.random() for a in range(n) for b in range(n)} if rng.random() < 0.5 else None

    def fly(self, frame: Frame, source: int, to: int) -> None:
        if to not in self.dead:
            self.flying.setdefault((source, to), deque()).append(frame)

    def pair(self, group: int, source: int, to: int) -> Outgoing:
        return self.outgoing[0 if self.broken == "credits of all groups" else group, source, to]

    def send(self, frame: Frame, source: int, to: int) -> None:
        """A message: now, or when a credit comes back."""
        self.pair(frame.group, source, to).unsent.append(frame)
        self.pump(frame.group, source, to)

    def pump(self, group: int, source: int, to: int) -> None:
        pair = self.pair(group, source, to)
        while pair.unsent and pair.credits > 0:
            pair.credits -= 1
            self.fly(pair.unsent.popleft(), source, to)

    def returned(self, group: int, source: int, to: int) -> None:
        self.pair(group, source, to).credits += 1
        self.pump(group, source, to)

    def unsent(self, group: int, source: int) -> Iterator[int]:
        """The processes that messages of the group from this one wait for."""
        for (_, sender, to), pair in self.outgoing.items():
            if sender == source and any(frame.group == group for frame in pair.unsent):
                yield to

    def drop_unsent(self, group: int, source: int) -> None:
        for (_, sender, _), pair in self.outgoing.items():
            if sender == source:
                pair.unsent = deque(frame for frame in pair.unsent if frame.group != group)

    def carry(self) -> Steps:
        """The network: takes the next frame of any pair to its receiver."""
        is_flying: Callable[[], bool] = lambda: any(self.flying.values())  # noqa: E731
        while True:
            yield is_flying
            pairs = [pair for pair, frames in self.flying.items() if frames]
            if pairs:
                pair = max(pairs, key=self.order.__getitem__) if self.order else self.rng.choice(pairs)
                self.inbox[pair[1]].append(self.flying[pair].popleft())

    def die(self, process: int, peers: Iterator[int]) -> None:
        self.dead.add(process)
        self.inbox[process].clear()
        for (source, to), frames in self.flying.items():
            if to == process:
                frames.clear()
            elif source == process:
                for _ in range(self.rng.randint(0, len(frames))):
                    frames.pop()
        for peer in peers:
            if self.broken != "connections are not watched":
                self.fly(Frame("lost", 0, process), process, peer)
