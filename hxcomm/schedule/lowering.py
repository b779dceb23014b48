"""Passes that fit a written Schedule to the memory it will run on: what an executor is given.

`across_hosts` (crossing.py) comes first where ranks are on several hosts.
`separated` resolves what in-place aliasing breaks; `staged` turns accesses to peers' inputs and outputs into accesses
to their scratch, for buffers that peers cannot map (CPU tensors); `lower` applies the right ones. They know rounds
and locations only; the prover checks their results like any other Schedule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hxcomm.schedule.crossing import across_hosts, several
from hxcomm.schedule.errors import ScheduleError
from hxcomm.schedule.schedule import BUFFERS, USER_BUFFERS, Location, Round, Schedule, Transfer, copy


def lower(schedule: Schedule, private: bool, hosts: Sequence[int] | None = None) -> Schedule:
    """The schedule as executed, its rounds starting with round 0 (possibly empty).

    private: peers can touch nothing but a rank's scratch; otherwise those of its host map its input and output, too.
    hosts: the number of each rank's host, where they are not all on one.
    Raises ScheduleError for one that is already lowered to another form or for other hosts.
    """
    form = "private" if private else "mapped"
    if schedule.form != "written" or schedule.hosts is not None:
        if schedule.form == form and schedule.hosts == several(hosts, schedule.world_size):
            return schedule
        raise ScheduleError(f"the schedule is lowered to its {schedule.form} form already; lower the written one")
    schedule = across_hosts(schedule, hosts)
    if private:
        lowered = staged(schedule)
        # Staging resolves most aliasing by itself, since reads and writes go to different memory (one_shot).
        aliased = schedule.in_place and any(
            _conflicts(schedule, transfers) for _, transfers in schedule.numbered_rounds()
        )
        if aliased and any(_conflicts(lowered, transfers) for _, transfers in lowered.numbered_rounds()):
            lowered = staged(separated(schedule))
        return lowered
    apart = separated(schedule)

    def rounds() -> Iterator[Round]:
        yield ()
        yield from apart.rounds()

    return replace(apart, rounds=rounds, form="mapped")


def _conflicts(schedule: Schedule, transfers: Sequence[Transfer]) -> set[Location]:
    """Canonical locations that one transfer of the round writes and another one reads."""
    writer: dict[Location, int] = {}
    for index, transfer in enumerate(transfers):
        for destination in transfer.destinations:
            writer[schedule.canonical(destination)] = index
    return {
        location
        for index, transfer in enumerate(transfers)
        for location in map(schedule.canonical, transfer.sources)
        if writer.get(location, index) != index
    }


def separated(schedule: Schedule) -> Schedule:
    """Where input and output being the same memory makes a round write what others of the round read, the write goes
    to a scratch chunk of the same rank, and a round of copies follows. one_shot all_reduce is such a case."""
    if not schedule.in_place:
        return schedule
    chunks = {
        location.chunk
        for _, transfers in schedule.numbered_rounds()
        for location in _conflicts(schedule, transfers)
        if location.buffer == "input"
    }
    if not chunks:
        return schedule
    aside = {chunk: schedule.scratch + index for index, chunk in enumerate(sorted(chunks))}

    def rounds() -> Iterator[Round]:
        for _, transfers in schedule.numbered_rounds():
            conflicts = {at for at in _conflicts(schedule, transfers) if at.buffer == "input"}
            instead = {at: Location(at.rank, "scratch", aside[at.chunk]) for at in conflicts}
            yield [
                transfer._replace(
                    destinations=tuple([instead.get(schedule.canonical(at), at) for at in transfer.destinations])
                )
                for transfer in transfers
            ]
            if conflicts:
                yield [copy(at.rank, instead[at], Location(at.rank, "output", at.chunk)) for at in sorted(conflicts)]

    return replace(schedule, rounds=rounds, scratch=schedule.scratch + len(aside))


class _Sharing:
    """Which input and output locations peers touch, and what that asks of their owners.

    Each shared location gets one shadow chunk in its owner's scratch. On one host the same chunk has the same shadow on
    all ranks; across hosts ranks share different chunks, as they pass on what they are sent, so each counts its own.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.canonical = schedule.canonical
        history: defaultdict[Location, list[tuple[int, str]]] = defaultdict(list)  # per round reads, then writes
        shared: set[Location] = set()
        for number, transfers in schedule.numbered_rounds():
            for transfer in transfers:
                for at in transfer.sources:
                    if at[0] != transfer.rank and at[1] in USER_BUFFERS:
                        if at[1] == "output":
                            at = self.canonical(at)
                        history[at].append((number, "remote read"))
                        shared.add(at)
            for transfer in transfers:
                for at in transfer.destinations:
                    if at[1] in USER_BUFFERS:
                        if at[1] == "output":
                            at = self.canonical(at)
                        local = at[0] == transfer.rank
                        history[at].append((number, "local write" if local else "remote write"))
                        if not local:
                            shared.add(at)
        groups = (
            [shared]
            if schedule.hosts is None
            else [{at for at in shared if at.rank == rank} for rank in range(schedule.world_size)]
        )
        self.scratch = schedule.scratch
        self.shadow: dict[Location, Location] = {}
        for group in groups:
            kept = sorted({(BUFFERS.index(at.buffer), at.chunk) for at in group})
            chunk_of = {(BUFFERS[buffer], chunk): schedule.scratch + i for i, (buffer, chunk) in enumerate(kept)}
            self.scratch = max(self.scratch, schedule.scratch + len(kept))
            self.shadow |= {at: Location(at.rank, "scratch", chunk_of[at.buffer, at.chunk]) for at in group}
        # Read by a peer before anybody writes it: its owner copies it to the shadow before the op begins.
        self.staged = sorted(at for at in shared if history[at][0][1] == "remote read")
        # A local write that a peer reads next stores to the shadow, too.
        self.stored_twice: set[tuple[Location, int]] = set()
        # The last write came from a peer: in the round after it the owner fetches the value from the shadow.
        self.fetched: defaultdict[int, list[Location]] = defaultdict(list)
        for at in sorted(shared):
            last_write = (0, "")
            for event, (_, following) in zip(history[at], [*history[at][1:], (0, "")], strict=True):
                if event[1] != "remote read":
                    last_write = event
                if event[1] == "local write" and following == "remote read":
                    self.stored_twice.add((at, event[0]))
            if last_write[1] == "remote write":
                self.fetched[last_write[0] + 1].append(at)


def staged(schedule: Schedule) -> Schedule:
    """The private form: peers touch nothing but a rank's scratch, where each location they share has a shadow.

    Peers read and write the shadow. The owner copies its own input there in round 0, stores there what peers read
    next, and fetches what peers wrote last. It reads its real location, unless the newest value is in the shadow only.
    What nobody but other hosts reads needs no shadow: its owner sends it from where it lies.
    """
    sharing = _Sharing(schedule)
    shadow = sharing.shadow

    def rounds() -> Iterator[Round]:
        yield [copy(at.rank, at, shadow[at]) for at in sharing.staged]
        newer: set[Location] = set()  # in the shadow than in the real location
        last = 0
        for last, transfers in schedule.numbered_rounds():
            out = [_through_shadows(transfer, last, sharing, newer) for transfer in transfers]
            for transfer in transfers:
                for at in map(schedule.canonical, transfer.destinations):
                    if at in shadow:
                        (newer.add if at[0] != transfer.rank else newer.discard)(at)
            fetched = sharing.fetched.get(last, ())
            newer.difference_update(fetched)
            yield out + [_fetch(schedule, at, shadow[at]) for at in fetched]
        if last + 1 in sharing.fetched:
            yield [_fetch(schedule, at, shadow[at]) for at in sharing.fetched[last + 1]]

    return replace(schedule, rounds=rounds, scratch=sharing.scratch, form="private")


def _fetch(schedule: Schedule, at: Location, shadow: Location) -> Transfer:
    return copy(at.rank, shadow, Location(at[0], "output", at[2]) if schedule.in_place else at)


def _through_shadows(transfer: Transfer, number: int, sharing: _Sharing, newer: set[Location]) -> Transfer:
    rank, canonical, shadow = transfer.rank, sharing.canonical, sharing.shadow
    sources = []
    for at in transfer.sources:
        if at[1] in USER_BUFFERS:
            memory = canonical(at)
            if at[0] != rank or memory in newer:
                at = shadow[memory]
        sources.append(at)
    destinations = []
    for at in transfer.destinations:
        if at[1] not in USER_BUFFERS:
            destinations.append(at)
            continue
        memory = canonical(at)
        if at[0] == rank:
            destinations.append(at)
        if at[0] != rank or (memory, number) in sharing.stored_twice:
            destinations.append(shadow[memory])
    return Transfer(rank, tuple(sources), tuple(destinations), transfer.reduce)
