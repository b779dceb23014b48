"""The rules of the engine once more, written to be read and not to be fast: the tests' oracle of the C++ one.

Every transfer of every rank is written out, its waits are kept as sets of transfers, sizes come from the compiler's own
walk (hxcomm/schedule/symbolic.py), events lie in one heap. Shares nothing with hxcomm/sim/engine.py and csrc/simulation
but the network's routes.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from hxcomm.schedule import Location, Schedule, Transfer
from hxcomm.schedule.extents import piece_extent
from hxcomm.schedule.schedule import USER_BUFFERS
from hxcomm.schedule.symbolic import State, count_location, steps
from hxcomm.sim.chips import Chip
from hxcomm.sim.interconnect import Interconnect

PS_PER_S = 10**12


@dataclass
class Node:
    transfer: Transfer
    nbytes: int
    number: int  # among the transfers of its rank
    after: set[int]
    left: int = 0  # of the messages of its present stage
    done: int | None = None
    begun: bool = False
    time: int = 0


@dataclass
class Reference:
    """finish: of each rank. busy: of each link, with the bytes that it carried."""

    schedule: Schedule  # as it is executed: prepare(...).schedule
    chip: Chip
    nbytes: int
    itemsize: int
    network: Interconnect
    starts: Sequence[int]
    heap: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    wave: tuple[int, int] = (-1, 0)
    free: defaultdict[object, int] = field(default_factory=lambda: defaultdict(int))
    busy: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def __post_init__(self) -> None:
        self.nodes: list[Node] = []
        self.exits: list[tuple[int, int]] = []  # (rank, node that it may not return before)
        self._write_out()
        self.finish = [start + self.chip.launch_ps for start in self.starts]
        for index, node in enumerate(self.nodes):
            if not node.after:
                self._begin(index)
        while self.heap:
            time, wave, (kind, *rest) = heapq.heappop(self.heap)
            self.wave = (time, wave)
            if kind == 0:
                self._hop(time, *rest[4:])
            else:
                self._work(time, rest[0])
        assert all(node.done is not None for node in self.nodes)
        for rank, index in self.exits:
            self.finish[rank] = max(self.finish[rank], self.nodes[index].done or 0)

    def _write_out(self) -> None:
        schedule = self.schedule
        count = self.nbytes // self.itemsize
        writer: dict[Location, int] = {}
        readers: defaultdict[Location, set[int]] = defaultdict(set)
        numbers: defaultdict[int, int] = defaultdict(int)
        for _, found in steps(schedule, State(schedule)):
            first = len(self.nodes)
            for step in found:
                transfer = step.transfer
                counted = count_location(schedule, step)
                assert counted is not None
                begin, end = piece_extent(count, schedule.pieces, counted.chunk % schedule.pieces)
                after: set[int] = set()
                for at in map(schedule.canonical, transfer.sources):
                    after |= {writer[at]} if at in writer else set()
                for at in map(schedule.canonical, transfer.destinations):
                    after |= readers[at] | ({writer[at]} if at in writer else set())
                number = numbers[transfer.rank]
                numbers[transfer.rank] += 1
                self.nodes.append(Node(transfer, (end - begin) * self.itemsize, number, after))
                self.exits.append((transfer.rank, len(self.nodes) - 1))
            for index, step in enumerate(found, first):
                for at in map(schedule.canonical, step.transfer.sources):
                    readers[at].add(index)
            for index, step in enumerate(found, first):
                for at in map(schedule.canonical, step.transfer.destinations):
                    writer[at] = index
                    readers[at] = set()
        touched = [*writer.items(), *((at, index) for at, indices in readers.items() for index in indices)]
        self.exits += [(at.rank, index) for at, index in touched if at.buffer in USER_BUFFERS]

    def _push(self, time: int, event: tuple[int, ...]) -> None:
        heapq.heappush(self.heap, (time, self.wave[1] + 1 if time == self.wave[0] else 0, event))

    def _begin(self, index: int) -> None:
        node = self.nodes[index]
        if node.begun:  # by an empty transfer that was done at once
            return
        node.begun = True
        transfer = node.transfer
        touched = (*transfer.sources, *transfer.destinations)
        ranks = {transfer.rank, *(at.rank for at in touched if at.buffer != "message")}
        node.time = max(self.starts[rank] + self.chip.launch_ps for rank in ranks)
        node.time = max([node.time, *(self.nodes[each].done or 0 for each in node.after)])
        remote = [(at.rank, transfer.rank) for at in transfer.sources if at.rank != transfer.rank]
        if remote and node.nbytes:
            self._send(index, remote, outgoing=0)
        else:
            self._arrived(index)

    def _send(self, index: int, ends: list[tuple[int, int]], outgoing: int) -> None:
        node = self.nodes[index]
        node.left = len(ends)
        for i, (source, target) in enumerate(ends):
            self._push(node.time, self._asks(0, index, outgoing, i, source, target, tail=node.time))

    def _asks(
        self, hop: int, index: int, outgoing: int, i: int, source: int, target: int, tail: int
    ) -> tuple[int, ...]:
        n = self.schedule.world_size
        up = (target - source) % n
        order = (hop, self.nodes[index].number, min(up, n - up), up)
        return (0, *order, index, outgoing, i, source, target, tail, hop)

    def _hop(self, now: int, index: int, outgoing: int, i: int, source: int, target: int, tail: int, hop: int) -> None:
        node = self.nodes[index]
        route = self.network.route(source, target)
        link = self.network.links[route[hop]]
        occupied = link.per_message_ps + int(Fraction(node.nbytes * PS_PER_S) / link.bytes_per_s)
        occupied -= occupied % link.tick_ps
        begin = max(now, self.free[route[hop]])
        end = max(begin + occupied, tail)
        self.free[route[hop]] = end
        self.busy[route[hop]][0] += occupied
        self.busy[route[hop]][1] += node.nbytes
        arrives = end + link.latency_ps
        if hop + 1 < len(route):
            asks = begin + link.latency_ps if link.forwarding == "cut_through" else arrives
            self._push(asks, self._asks(hop + 1, index, outgoing, i, source, target, arrives))
            return
        node.time = max(node.time, arrives)
        node.left -= 1
        if node.left == 0 and outgoing:
            self._done(index)
        elif node.left == 0:
            self._arrived(index)

    def _chunks_worked(self, transfer: Transfer) -> int:
        if transfer.reduce:
            return len(transfer.sources) + len(transfer.destinations)
        source = self.schedule.canonical(transfer.sources[0])
        if source.rank != transfer.rank or source.buffer == "message":
            return 0
        copies = [at for at in map(self.schedule.canonical, transfer.destinations) if at.rank == transfer.rank]
        return sum(at != source for at in copies) + any(at != source for at in copies)

    def _arrived(self, index: int) -> None:
        node = self.nodes[index]
        if self._chunks_worked(node.transfer) and node.nbytes:
            self._push(node.time, (1, index))
        else:
            self._leave(index)

    def _work(self, now: int, index: int) -> None:
        node = self.nodes[index]
        moved = node.nbytes * self._chunks_worked(node.transfer)
        begin = max(now, self.free["chip", node.transfer.rank])
        node.time = begin + int(Fraction(moved * PS_PER_S) / self.chip.reduce_bytes_per_s)
        self.free["chip", node.transfer.rank] = node.time
        self._leave(index)

    def _leave(self, index: int) -> None:
        node = self.nodes[index]
        transfer = node.transfer
        remote = [(transfer.rank, at.rank) for at in transfer.destinations if at.rank != transfer.rank]
        if remote and node.nbytes:
            self._send(index, remote, outgoing=1)
        else:
            self._done(index)

    def _done(self, index: int) -> None:
        self.nodes[index].done = self.nodes[index].time
        for later in range(index + 1, len(self.nodes)):
            after = self.nodes[later].after
            if index in after and all(self.nodes[each].done is not None for each in after):
                self._begin(later)
