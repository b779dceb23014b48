"""A Schedule as chips are given it, and prepared for the engine: pushed where links only push, and its waits derived.

The engine in C++ reads the rounds one at a time. Where all are Rotations it keeps rank 0's transfers for all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from hxcomm import _core
from hxcomm.schedule import Location, Rotation, Schedule, ScheduleError, Transfer, across_hosts, copy, lower


class Prepared(NamedTuple):
    """schedule: what is timed. folded: one rank's part, where the Schedule is the same for all of them."""

    schedule: Schedule
    program: _core.SimulatedProgram
    folded: _core.SimulatedProgram | None


def prepare(schedule: Schedule, push_only: bool = False) -> Prepared:
    """Raises ScheduleError where a transfer is malformed or names memory that does not exist.

    As the executor does on memory that all ranks reach: an in-place op whose round writes what others of it read goes
    through scratch. push_only: and as it does between hosts, each rank on one of its own, if any transfer reads a peer.
    """
    if push_only and reads_peers(schedule):
        schedule = pushed(schedule)
    if schedule.form == "written" and schedule.world_size > 1:
        program = _program(schedule, rotation=True)
        if isinstance(program, _core.SimulatedProgram):
            return Prepared(schedule, program, program.fold())
    program = _program(schedule, rotation=False)
    if program == "overlap" and schedule.form == "written":
        hosts = schedule.hosts
        schedule = lower(replace(schedule, hosts=None), private=False)
        schedule = replace(schedule, hosts=hosts)
        program = _program(schedule, rotation=False)
    if isinstance(program, _core.SimulatedProgram):
        return Prepared(schedule, program, None)
    for number, transfers in schedule.numbered_rounds():  # says which transfer it is
        for transfer in transfers:
            schedule.check(transfer, number)
    raise ScheduleError(f"schedule {schedule.op} {schedule.algorithm}, {schedule.world_size} ranks: {program}")


def _program(schedule: Schedule, rotation: bool) -> _core.SimulatedProgram | str:
    # Where it is lowered, round 0 is empty: the others keep their numbers.
    written_out = (transfers for number, transfers in schedule.numbered_rounds() if number > 0 or transfers)
    rounds = schedule.rounds() if rotation else written_out
    return _core.prepare_simulation(
        rounds,
        world_size=schedule.world_size,
        pieces=schedule.pieces,
        in_place=schedule.in_place,
        rotation=rotation,
        chunks=[schedule.chunks("input"), schedule.chunks("output"), schedule.scratch, schedule.messages],
    )


def reads_peers(schedule: Schedule) -> bool:
    for round_ in schedule.rounds():
        transfers = round_.transfers if isinstance(round_, Rotation) else round_
        if any(at.rank != transfer.rank for transfer in transfers for at in transfer.sources):
            return True
    return False


@lru_cache(maxsize=8)
def pushed(schedule: Schedule) -> Schedule:
    """The Schedule in which ranks touch their own memory only and send messages: hxcomm's pass for ranks on hosts of
    their own, each message sent by a transfer of its own. Rotations stay Rotations, as the pass would write out n^2
    transfers."""
    n = schedule.world_size
    rounds = list(schedule.rounds())
    rotations = [round_ for round_ in rounds if isinstance(round_, Rotation)]
    if len(rotations) == len(rounds):
        messages = [0]
        turning = list(_pushed_rotations(schedule, rotations, messages))
        return replace(schedule, rounds=lambda: turning, messages=messages[0], hosts=tuple(range(n)))
    crossed = across_hosts(schedule, range(n))
    written = [
        [single for transfer in transfers for single in _sends_of(transfer)]
        for _, transfers in crossed.numbered_rounds()
    ]
    return replace(crossed, rounds=lambda: written)


def _sends_of(transfer: Transfer) -> list[Transfer]:
    if any(at.buffer != "message" for at in transfer.destinations) or transfer.reduce:
        return [transfer]
    return [copy(transfer.rank, transfer.sources[0], message) for message in transfer.destinations]


def _pushed_rotations(schedule: Schedule, rotations: Sequence[Rotation], messages: list[int]) -> Iterator[Rotation]:
    """As across_hosts, on rank 0's transfers: it numbers the messages that each rank gets alike."""
    n = schedule.world_size

    def message() -> int:
        messages[0] += 1
        return messages[0] - 1

    for round_ in rotations:
        sent: dict[Location, int] = {}
        sends: list[Transfer] = []
        local: list[Transfer] = []
        receives: list[Transfer] = []
        for transfer in round_.transfers:
            rank = transfer.rank
            sources = []
            for at in transfer.sources:
                if at.rank != rank:
                    memory = schedule.canonical(at if rank == 0 else _turned(at, -rank, round_, n))
                    if memory not in sent:
                        sent[memory] = message()
                        owner = _turned(at, -at.rank, round_, n)
                        sends.append(copy(0, owner, Location((rank - at.rank) % n, "message", sent[memory])))
                    at = Location(rank, "message", sent[memory])
                sources.append(at)
            destinations = []
            for at in transfer.destinations:
                if at.rank != rank:
                    here = _turned(at, -at.rank, round_, n)
                    number = message()
                    receives.append(copy(0, Location(0, "message", number), here))
                    at = Location(at.rank, "message", number)
                destinations.append(at)
            local.append(Transfer(rank, tuple(sources), tuple(destinations), transfer.reduce))
        yield from [Rotation(each, round_.rotated, round_.step) for each in (sends, local, receives) if each]


def _turned(at: Location, by: int, round_: Rotation, n: int) -> Location:
    chunk = at.chunk
    if at.buffer in round_.rotated:
        chunk = (chunk + by * round_.step) % (n * round_.step)
    return Location((at.rank + by) % n, at.buffer, chunk)
