"""When a Schedule is done on simulated chips, rank by rank, and what each link does meanwhile.

Discrete events in integers of picoseconds; the loop is C++ (csrc/simulation/engine.h says its rules). A Schedule that
is the same for all ranks, on links that are, is folded: one rank is timed for all, with the same result.

Partial results travel in the dtype of the op, as chips send them; hxcomm's executor keeps those of 16-bit floats wider.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import NamedTuple

from hxcomm import _core
from hxcomm.schedule import Schedule
from hxcomm.schedule.extents import QUANTUM, piece_extent
from hxcomm.sim.chips import PS_PER_S, Chip
from hxcomm.sim.interconnect import Interconnect, Link, interconnect
from hxcomm.sim.program import Prepared, prepare

KEPT_SIMULATIONS = 256  # a run asks for some ops, each with an algorithm or two
_LARGEST = 1 << 62  # of a rate's numerator and denominator in C++


class DeadlockError(RuntimeError):
    """Every message that is left waits for a credit that only another one of them would give back."""


class LinkUse(NamedTuple):
    """busy_ps: how long the link was occupied by messages."""

    source: int
    target: int
    nbytes: int
    busy_ps: int
    messages: int


class TimedEvent(NamedTuple):
    """what: "link 3->4", "chip 2 reduces" or "chip 2 copies". predecessor: the index of the event after which this one
    could begin, None where that is the start of a rank."""

    what: str
    start_ps: int
    end_ps: int
    round: int
    nbytes: int
    predecessor: int | None


@dataclass(frozen=True)
class Timing:
    """finish_ps: when the collective is over on each rank, on the clock of starts_ps. events: where asked for."""

    finish_ps: tuple[int, ...]
    total_ps: int
    links: tuple[LinkUse, ...]
    events: tuple[TimedEvent, ...] | None
    folded: bool

    def critical_path(self) -> list[TimedEvent]:
        """The events that each could not begin before the one in front, up to the last of all. Needs record=True."""
        if self.events is None:
            raise ValueError("the critical path needs the events: ask for them with record=True")
        events = self.events
        path = []
        at = max(range(len(events)), key=lambda i: events[i].end_ps) if events else None
        while at is not None:
            path.append(events[at])
            at = events[at].predecessor
        return path[::-1]


class Message(NamedTuple):
    """nbytes from a rank to another one, from start_ps on; route: the links, where not the network's own choice."""

    source: int
    target: int
    nbytes: int
    start_ps: int = 0
    route: tuple[int, ...] | None = None


def time_schedule(
    schedule: Schedule,
    chip: Chip,
    nbytes: int,
    *,
    itemsize: int = 2,
    network: Interconnect | None = None,
    starts_ps: Sequence[int] | None = None,
    fold: bool | None = None,
    record: bool = False,
) -> Timing:
    """Times a written Schedule with blocks of `nbytes`.

    starts_ps: when each rank comes; left out, all at 0. A transfer begins when all ranks that it touches have come.
    fold: True demands it, False forbids it, None takes it where it is exact. record: keeps every event, so no folding.
    Raises ValueError for arguments that do not fit, ScheduleError for a malformed Schedule, DeadlockError where the
    credits of links run out for good.
    """
    n = schedule.world_size
    if network is None:
        network = interconnect(chip, n)
    starts = [0] * n if starts_ps is None else list(starts_ps)
    if network.world_size != n or len(starts) != n:
        raise ValueError(
            f"a Schedule of {n} ranks on a network of {network.world_size}, with {len(starts)} starts: these must agree"
        )
    sizes = piece_bytes(schedule, chip, nbytes, itemsize)
    simulation = _simulation(schedule, chip, network)
    why_not = simulation.why_not_folded(starts, sizes, record)
    if fold and why_not:
        raise ValueError(f"{schedule.op} {schedule.algorithm}, {n} ranks, cannot be folded: {why_not}")
    folded = fold is not False and not why_not
    launch = chip.launch_ps
    finish, links, events, stuck = (simulation.folded if folded else simulation.whole).run(
        piece_bytes=sizes,
        starts=[starts[0] + launch] if folded else [start + launch for start in starts],
        chip=_per_byte(chip.reduce_bytes_per_s),
        credits=chip.legal.credits_per_link or 0,
        record=record,
    )
    if stuck:
        raise DeadlockError(_deadlock(stuck, chip, network))
    if schedule.op == "barrier":
        finish = (max(starts) + launch,) * n  # entering is waiting for everybody, and there is nothing else
    if folded:
        finish = finish * n
    return Timing(
        finish,
        max(finish) - min(starts),
        _uses(network, links, n if folded else 1),
        _events(network, events) if record else None,
        folded,
    )


def time_messages(network: Interconnect, messages: Sequence[Message]) -> tuple[int, ...]:
    """When each message has arrived, on the clock of their starts. Of several that ask for a link at one time the one
    that has come fewer hops is served first, then the one that comes first here."""
    travelling = [i for i, message in enumerate(messages) if message.source != message.target]
    routes = []
    for i in travelling:
        route = messages[i].route
        routes.append(list(network.route(messages[i].source, messages[i].target) if route is None else route))
    arrivals = [message.start_ps for message in messages]
    done = _core.time_messages(
        links=_link_values(network.links),
        nbytes=[messages[i].nbytes for i in travelling],
        starts=[messages[i].start_ps for i in travelling],
        routes=routes,
    )
    for i, arrival in zip(travelling, done, strict=True):
        arrivals[i] = arrival
    return tuple(arrivals)


def piece_bytes(schedule: Schedule, chip: Chip, nbytes: int, itemsize: int) -> list[int]:
    """Of each piece of a block, cut as the executor does and at multiples of what the chip's links are aligned to."""
    if nbytes < 0 or itemsize < 1 or nbytes % itemsize:
        raise ValueError(f"a block of {nbytes} bytes is no number of elements of {itemsize} bytes")
    quantum = lcm(QUANTUM * itemsize, chip.legal.alignment_bytes) // itemsize
    count, pieces = nbytes // itemsize, schedule.pieces
    extents = [piece_extent(count, pieces, piece, quantum=quantum) for piece in range(pieces)]
    return [(end - first) * itemsize for first, end in extents]


class _Simulation:
    """A Schedule on a network, with what depends on neither sizes nor starts."""

    def __init__(self, prepared: Prepared, network: Interconnect) -> None:
        self.prepared = prepared
        self.network = network

    def why_not_folded(self, starts: Sequence[int], sizes: Sequence[int], record: bool) -> str:
        if self.prepared.folded is None:
            return "its rounds are not all Rotations"
        if not self.network.rotates:
            return f"its links are not alike for all ranks: {self.network.text()}"
        if starts.count(starts[0]) != len(starts):
            return "its ranks start at different times"
        if sizes.count(sizes[0]) != len(sizes):
            return "its chunks are of different sizes"
        return "every event of every rank is recorded" if record else ""

    @cached_property
    def whole(self) -> _core.Simulation:
        network = self.network
        return _core.Simulation(self.prepared.program, _link_values(network.links), network.route)

    @cached_property
    def folded(self) -> _core.Simulation:
        """On one link for each class: link (class, rank) of a network that rotates has number class * n + rank."""
        network, n = self.network, self.network.world_size
        assert self.prepared.folded is not None

        def route(source: int, target: int) -> list[int]:
            return [link // n for link in network.route(source, target)]

        return _core.Simulation(self.prepared.folded, _link_values(network.links[::n]), route)


_kept: OrderedDict[tuple[Schedule, Interconnect, bool], _Simulation] = OrderedDict()


def _simulation(schedule: Schedule, chip: Chip, network: Interconnect) -> _Simulation:
    key = (schedule, network, chip.legal.push_only)
    found = _kept.get(key)
    if found is None:
        found = _kept[key] = _Simulation(prepare(schedule, chip.legal.push_only), network)
        if len(_kept) > KEPT_SIMULATIONS:
            _kept.popitem(last=False)
    else:
        _kept.move_to_end(key)
    return found


def _per_byte(bytes_per_s: Fraction) -> tuple[int, int]:
    """Picoseconds a byte as a fraction that C++ can hold: exact but for rates of 19 digits and more."""
    if not bytes_per_s:
        return 0, 1  # a dead link, which no route takes
    ps = PS_PER_S / bytes_per_s
    if ps.numerator >= _LARGEST or ps.denominator >= _LARGEST:
        ps = ps.limit_denominator(10**9)
    return ps.numerator, ps.denominator


def _link_values(links: Sequence[Link]) -> list[tuple[int, int, int, int, int, bool]]:
    values = []
    known: Fraction | None = None
    for link in links:
        if link.bytes_per_s is not known:
            known = link.bytes_per_s
            per_byte = _per_byte(known)
        cut_through = link.forwarding == "cut_through"
        values.append((*per_byte, link.latency_ps, link.per_message_ps, link.tick_ps, cut_through))
    return values


def _uses(network: Interconnect, totals: Sequence[tuple[int, int, int]], copies: int) -> tuple[LinkUse, ...]:
    if copies > 1:
        totals = [each for each in totals for _ in range(copies)]
    return tuple([LinkUse(link.source, link.target, *each) for link, each in zip(network.links, totals, strict=True)])


def _events(
    network: Interconnect, events: Sequence[tuple[str, int, int, int, int, int, int]]
) -> tuple[TimedEvent, ...]:
    timed = []
    for kind, index, start, end, round_, nbytes, predecessor in events:
        link = network.links[index] if kind == "link" else None
        what = f"link {link.source}->{link.target}" if link else f"chip {index} {kind}"
        timed.append(TimedEvent(what, start, end, round_, nbytes, None if predecessor < 0 else predecessor))
    return tuple(timed)


def _deadlock(stuck: Sequence[tuple[int, int, int, int]], chip: Chip, network: Interconnect) -> str:
    link, source, target, round_ = stuck[0]
    ends = network.links[link]
    others = f", and {len(stuck) - 1} more messages wait" if len(stuck) > 1 else ""
    return (
        f"deadlock: in round {round_} the message from rank {source} to rank {target} waits for one of the "
        f"{chip.legal.credits_per_link} credits of link {ends.source}->{ends.target}, whose messages are not consumed "
        f"before it comes{others}"
    )
