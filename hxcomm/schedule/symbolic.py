"""What every location holds while a Schedule runs, without any data: the walk that compiler, prover and traffic share.

A value is known by the chunk of the inputs that it is made of and by the ranks that contributed to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from hxcomm.schedule.errors import ProofError
from hxcomm.schedule.schedule import Location, Schedule, Transfer

NO_COUNT = (
    "blocks may differ in count, so a transfer must have a chunk of its own rank's input or output among its locations"
)


class Mark(IntEnum):
    """fresh: ranks' own elements, in the op's dtype. partial: reduced from some of the ranks, in the accumulation type.
    final: reduced from all of them, divided where due (AVG), in the op's dtype."""

    FRESH = 0
    PARTIAL = 1
    FINAL = 2


class Value(NamedTuple):
    chunk: int
    """The chunk of the input buffers that this is, or is reduced from."""
    ranks: int
    """Bit r is set where rank r contributed."""
    folded: int
    """k where it is the left fold of ranks 0, 1, ... k-1, else 0."""
    mark: Mark


class Step(NamedTuple):
    """A transfer with the values it loads and stores."""

    transfer: Transfer
    loaded: Sequence[Value]
    stored: Value


class State:
    """The value of every location, keyed by its canonical name."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._values: dict[Location, Value] = {}

    def get(self, location: Location) -> Value | None:
        """None where nothing was stored yet. Inputs hold their rank's own elements from the start."""
        at = location if location[1] != "output" else self.schedule.canonical(location)
        value = self._values.get(at)
        if value is None and at[1] == "input" and self.schedule.has(at[0], "input"):
            value = Value(at[2], 1 << at[0], 1 if at[0] == 0 else 0, Mark.FRESH)
            self._values[at] = value  # kept, so that equal objects stay shared
        return value

    def put(self, location: Location, value: Value) -> None:
        self._values[location if location[1] != "output" else self.schedule.canonical(location)] = value


def steps(schedule: Schedule, state: State) -> Iterator[tuple[int, list[Step]]]:
    """(number, steps) of each round. `state` is that before the round while the caller looks at it.

    Raises ProofError where a transfer reads what nobody stored, or reduces what does not belong together.
    """
    for number, transfers in schedule.numbered_rounds():
        found = [_step(schedule, state, transfer, number) for transfer in transfers]
        yield number, found
        for step in found:
            for destination in step.transfer.destinations:
                state.put(destination, step.stored)


def _step(schedule: Schedule, state: State, transfer: Transfer, number: int) -> Step:
    loaded = []
    for source in transfer.sources:
        value = state.get(source)
        if value is None:
            raise ProofError(f"{title(schedule)}, round {number}: {transfer}: nothing was ever stored to {source}")
        loaded.append(value)
    if not transfer.reduce:
        return Step(transfer, loaded, loaded[0])
    chunk, ranks, folded, _ = loaded[0]
    whole = (1 << schedule.world_size) - 1
    for index, value in enumerate(loaded):
        problem = ""
        if not schedule.meaning.reduces:
            problem = f"{schedule.op} moves data and may not reduce"
        elif value.mark == Mark.FINAL:
            problem = f"{transfer.sources[index]} holds a finished result, which may not be reduced again"
        elif value.chunk != chunk:
            problem = (
                f"{transfer.sources[index]} holds input chunk {value.chunk}, {transfer.sources[0]} holds chunk {chunk}"
            )
        elif index and ranks & value.ranks:
            problem = f"{transfer.sources[index]} adds {named_ranks(ranks & value.ranks)} a second time"
        if problem:
            raise ProofError(f"{title(schedule)}, round {number}: {transfer}: {problem}")
        if index:
            ranks |= value.ranks
            # The left fold of 0..k-1 goes on only with rank k alone.
            folded = folded + 1 if folded and value.ranks == 1 << folded else 0
    return Step(transfer, loaded, Value(chunk, ranks, folded, Mark.FINAL if ranks == whole else Mark.PARTIAL))


def count_location(schedule: Schedule, step: Step) -> Location | None:
    """The chunk of the executing rank's own input or output that has as many elements as the transfer moves.

    One that occurs in it, if there is one, else, where all ranks' counts are equal, the one of the same extent; None in
    all_to_all, where a rank knows the counts of its own blocks only.
    """
    transfer, stored = step.transfer, step.stored
    for buffer in ("output", "input"):
        for at in (*transfer.destinations, *transfer.sources):
            if at.rank == transfer.rank and at.buffer == buffer:
                return at
    if not schedule.meaning.uniform:
        return None
    if schedule.has(transfer.rank, "input"):
        return Location(transfer.rank, "input", stored.chunk)
    return Location(transfer.rank, "output", stored.chunk % schedule.pieces)


def named_ranks(ranks: int) -> str:
    names = [str(rank) for rank in range(ranks.bit_length()) if ranks >> rank & 1]
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names or ["none"])


def title(schedule: Schedule) -> str:
    """As errors name a schedule: op, algorithm, world size, root, hosts, form."""
    root = "" if schedule.root is None else f", root {schedule.root}"
    form = "" if schedule.form == "written" else f" ({schedule.form} form)"
    hosts = "" if schedule.hosts is None else f", on hosts {','.join(map(str, schedule.hosts))}"
    return f"{schedule.op} {schedule.algorithm}, {schedule.world_size} ranks{root}{hosts}{form}"
