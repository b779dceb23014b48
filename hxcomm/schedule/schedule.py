"""A Schedule: a collective algorithm as data.

It is a list of rounds, read as a bulk-synchronous program: every source of round t is read as the rounds before t left
it; a location has one writer in a round; nobody reads what another transfer of the same round writes (a transfer may
store to the locations it reads itself: it works element by element). Rounds are numbered from 1; round 0 is the staging
that `lower` puts in front. Algorithms are written in the mapped form: any rank may read and write any rank's buffers.

On several hosts a schedule is crossed first (crossing.py): ranks of different hosts then share nothing but messages.

Nothing here moves a byte. Prover, interpreter, compiler, traffic and drawing all read this one definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from hxcomm.schedule.errors import ScheduleError
from hxcomm.schedule.ops import OPS, Layout, Op

Buffer: TypeAlias = Literal["input", "output", "scratch", "message"]
BUFFERS: tuple[Buffer, ...] = ("input", "output", "scratch", "message")  # their numbers in plans
USER_BUFFERS = frozenset({"input", "output"})  # memory of the caller; the others are the communicator's

# A rank publishes sequence * 2^16 + round + 1, so a plan has room for this many rounds, round 0 included.
MAX_ROUNDS = (1 << 16) - 2


class Location(NamedTuple):
    """A chunk of a buffer of a rank: input and output as their layouts cut them, scratch as the schedule counts it.

    (q, "message", k) is the k-th message that rank q gets in the op; its sender is the rank whose transfer writes it.
    """

    rank: int
    buffer: Buffer
    chunk: int

    def __str__(self) -> str:
        return f"rank {self.rank} {self.buffer}[{self.chunk}]"


class Transfer(NamedTuple):
    """`rank` loads the sources, reduces them in this order (or copies the only one), stores to each destination."""

    rank: int
    sources: tuple[Location, ...]
    destinations: tuple[Location, ...]
    reduce: bool

    def __str__(self) -> str:
        sources = " + ".join(map(str, self.sources))
        verb = "reduces" if self.reduce else "copies"
        return f"rank {self.rank} {verb} {sources} to {', '.join(map(str, self.destinations))}"


def copy(rank: int, source: Location, *destinations: Location) -> Transfer:
    return Transfer(rank, (source,), destinations, False)


def reduce(rank: int, sources: Iterable[Location], *destinations: Location) -> Transfer:
    return Transfer(rank, tuple(sources), destinations, True)


@dataclass(frozen=True)
class Rotation:
    """A round in which all ranks do alike: `transfers` are those of rank 0, and rank r does them rotated by r.

    Rotating adds r, modulo the world size, to every rank, and `step` times as much, modulo `step` times as much, to the
    chunk of every location in a `rotated` buffer, which thus has `step` chunks that belong to each rank.
    A ring of n ranks is thus O(n) objects instead of O(n^2): 512 ranks written out took 341 MiB.
    """

    transfers: Sequence[Transfer]
    rotated: tuple[Buffer, ...] = ()
    step: int = 1

    def expanded(self, world_size: int) -> list[Transfer]:
        def turn(location: Location, by: int) -> Location:
            rank, buffer, chunk = location
            if buffer in self.rotated:
                chunk = (chunk + by * self.step) % (world_size * self.step)
            return Location((rank + by) % world_size, buffer, chunk)

        return [
            Transfer(
                (transfer.rank + by) % world_size,
                tuple([turn(location, by) for location in transfer.sources]),
                tuple([turn(location, by) for location in transfer.destinations]),
                transfer.reduce,
            )
            for by in range(world_size)
            for transfer in self.transfers
        ]


Round: TypeAlias = Sequence[Transfer] | Rotation


@dataclass(frozen=True)
class Schedule:
    """One algorithm of one op for one world size (and root).

    op: a name of `ops.OPS`, which gives the blocks of input and output and whether they are the same memory.
    rounds: called for each walk over the schedule; yields the rounds, so that long ones are never held at once.
    pieces: how many pieces each block is cut into.
    scratch: chunks of scratch per rank, each as large as the largest chunk of input and output.
    form: "written" as the algorithm says it, rounds from 1; "mapped" or "private" after `lower`, rounds from 0.
    hosts: of a crossed schedule, the number of each rank's host. messages: the most that any rank gets.
    """

    op: str
    algorithm: str
    world_size: int
    rounds: Callable[[], Iterable[Round]]
    root: int | None = None
    pieces: int = 1
    scratch: int = 0
    form: Literal["written", "mapped", "private"] = "written"
    hosts: tuple[int, ...] | None = None
    messages: int = 0

    def __post_init__(self) -> None:
        name = f"schedule {self.op} {self.algorithm}"
        if self.op not in OPS:
            raise ScheduleError(f"{name}: there is no op {self.op!r}; the ops are: {', '.join(OPS)}")
        if self.world_size < 1:
            raise ScheduleError(f"{name}: the world size is {self.world_size}; it must be 1 or more")
        rooted = OPS[self.op].rooted
        if rooted and (self.root is None or not 0 <= self.root < self.world_size):
            raise ScheduleError(f"{name}: the root is {self.root}; it must be a rank, 0 to {self.world_size - 1}")
        if not rooted and self.root is not None:
            raise ScheduleError(f"{name}: the root is {self.root}, but {self.op} has none: leave it out")
        if not callable(self.rounds):
            raise ScheduleError(
                f"{name}: rounds is {type(self.rounds).__name__}; it must be a function that yields them"
            )
        if self.pieces < 1 or self.scratch < 0:
            raise ScheduleError(f"{name}: {self.pieces} pieces, {self.scratch} scratch chunks: at least 1 and 0")

    @property
    def meaning(self) -> Op:
        return OPS[self.op]

    @property
    def input(self) -> Layout:
        return self.meaning.layout("input", self.world_size, self.pieces)

    @property
    def output(self) -> Layout:
        return self.meaning.layout("output", self.world_size, self.pieces)

    @cached_property
    def in_place(self) -> bool:
        return self.meaning.in_place

    def chunks(self, buffer: Buffer) -> int:
        if buffer == "scratch" or buffer == "message":
            return self.scratch if buffer == "scratch" else self.messages
        return (self.input if buffer == "input" else self.output).chunks

    def has(self, rank: int, buffer: Buffer) -> bool:
        """Whether the op gives this rank this buffer: scatter has an input, gather an output at the root only."""
        if buffer == "input":
            return rank == self.root or not self.meaning.input_at_root_only
        # In place, the memory of an output that is not defined is still there, as the input.
        return buffer != "output" or rank == self.root or self.in_place or not self.meaning.output_at_root_only

    def canonical(self, location: Location) -> Location:
        """One name per memory: in place, an output location is the input location of the same chunk."""
        if location[1] == "output" and self.in_place:
            return Location(location[0], "input", location[2])
        return location

    def numbered_rounds(self) -> Iterator[tuple[int, Sequence[Transfer]]]:
        """(number, transfers of all ranks) of each round, Rotations written out one at a time."""
        first = 1 if self.form == "written" else 0
        for number, round_ in enumerate(self.rounds(), first):
            if number >= MAX_ROUNDS:
                raise ScheduleError(f"schedule {self.op} {self.algorithm} has more than {MAX_ROUNDS - 1} rounds")
            yield number, round_.expanded(self.world_size) if isinstance(round_, Rotation) else round_

    def check(self, transfer: Transfer, number: int) -> None:
        """Raises ScheduleError where a transfer of round `number` is malformed or names memory that does not exist."""

        def wrong(what: str) -> ScheduleError:
            return ScheduleError(f"{self.op} {self.algorithm}, {self.world_size} ranks, round {number}: {what}")

        if not isinstance(transfer, Transfer):
            raise wrong(f"{transfer!r} is not a Transfer: make it with copy() or reduce()")
        if not 0 <= transfer.rank < self.world_size:
            raise wrong(f"a transfer of rank {transfer.rank}: the ranks are 0 to {self.world_size - 1}")
        if not transfer.sources or not transfer.destinations:
            raise wrong(f"a transfer of rank {transfer.rank} needs a source and a destination: {transfer}")
        if not transfer.reduce and len(transfer.sources) > 1:
            raise wrong(f"a copy has one source, use reduce for more: {transfer}")
        for location in (*transfer.sources, *transfer.destinations):
            if not isinstance(location, Location) or location.buffer not in BUFFERS:
                raise wrong(f"{location!r} is not a Location(rank, 'input' | 'output' | 'scratch', chunk)")
            chunks = self.chunks(location.buffer)
            if not 0 <= location.rank < self.world_size or not 0 <= location.chunk < chunks:
                raise wrong(f"{location} does not exist: {self.world_size} ranks, {chunks} chunks ({transfer})")
            if not self.has(location.rank, location.buffer):
                raise wrong(f"{location} does not exist: only root {self.root} has that buffer ({transfer})")
