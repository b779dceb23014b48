"""A Plan: one rank's share of a lowered Schedule as flat 32-bit words, for an executor to run. Plan format, version 1.

Header, 16 words:
    0 magic 0x48585031    1 version          2 world size       3 rank
    4 rounds, round 0 included               5, 6 input blocks, pieces        7, 8 output blocks, pieces
    9 scratch chunks     10 flags: 1 in place, 2 private, 4 the op reduces, 8 some scratch chunk holds partials
   11 words in all       12 index of ENTER  13 root, or -1     14 number of the op (ops.py)      15 zero
Then instructions, each beginning with its code:
    TRANSFER  1, reduce, final, count buffer, count chunk, n sources, n destinations, then per source and per
                 destination: rank, buffer, chunk, mark
    ENTER     2  after the transfers of round 0, before all else: publish this rank's arrival, wait for everybody's,
                 compare fingerprints
    WAIT      3, peer, round: until that peer has finished its transfers of that round
    PUBLISH   4, round: this rank has
    END       0
Buffers: 0 input, 1 output, 2 scratch. A buffer is `blocks` memory extents, each cut into `pieces` (extents.py);
chunk = block * pieces + piece. Marks: 0 fresh, 1 partial, 2 final (symbolic.py). `reduce` 0 copies the only source;
`final` 1: the result is complete, so AVG divides and it is stored in the op's dtype; otherwise a reduce stores the
accumulation type. The count is that of the named chunk of the executing rank's own input or output.
`(rank, output, chunk)` in place is the memory of `(rank, input, chunk)`.

What runs a plan publishes sequence * 2^16 + round + 1 after a round, with 0 for ENTER: a wait is one comparison.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from hxcomm.schedule.errors import ScheduleError
from hxcomm.schedule.ops import Layout
from hxcomm.schedule.schedule import BUFFERS, MAX_ROUNDS, Buffer
from hxcomm.schedule.symbolic import Mark

MAGIC = 0x48585031
VERSION = 1
HEADER_WORDS = 16

END, TRANSFER, ENTER, WAIT, PUBLISH = range(5)
IN_PLACE, PRIVATE, REDUCES, PARTIALS = 1, 2, 4, 8


class Operand(NamedTuple):
    rank: int
    buffer: Buffer
    chunk: int
    mark: Mark


class TransferInstruction(NamedTuple):
    reduce: bool
    final: bool
    count_buffer: Buffer
    count_chunk: int
    sources: tuple[Operand, ...]
    destinations: tuple[Operand, ...]


class Enter(NamedTuple):
    pass


class Wait(NamedTuple):
    peer: int
    round: int


class Publish(NamedTuple):
    round: int


class End(NamedTuple):
    pass


Instruction: TypeAlias = TransferInstruction | Enter | Wait | Publish | End


class Header(NamedTuple):
    world_size: int
    rank: int
    rounds: int
    input: Layout
    output: Layout
    scratch: int
    flags: int
    words: int
    enter: int
    root: int
    op: int

    def chunks(self, buffer: Buffer) -> int:
        return self.scratch if buffer == "scratch" else (self.input if buffer == "input" else self.output).chunks


@dataclass(frozen=True)
class Plan:
    """words: array('i') in the format above. plan_hash: unsigned 64 bits, equal on all ranks of one schedule."""

    words: array[int]
    plan_hash: int

    def header(self) -> Header:
        """Raises ScheduleError where the words are not a plan of this version."""
        w = self.words
        if len(w) < HEADER_WORDS or w[0] != MAGIC:
            raise ScheduleError(f"not a plan: {len(w)} words, the first is not the magic number {MAGIC:#x}")
        if w[1] != VERSION:
            raise ScheduleError(f"a plan of version {w[1]}; this is for version {VERSION}: compile it again")
        if w[11] != len(w):
            raise ScheduleError(f"the plan says it has {w[11]} words, but there are {len(w)}")
        layouts = Layout(w[5], w[6]), Layout(w[7], w[8])
        if not (0 <= w[3] < w[2] and 1 <= w[4] <= MAX_ROUNDS and all(b >= 0 and p >= 1 for b, p in layouts)):
            raise ScheduleError(f"the plan's header is not valid: {list(w[:HEADER_WORDS])}")
        return Header(w[2], w[3], w[4], *layouts, w[9], w[10], w[11], w[12], w[13], w[14])

    def instructions(self) -> list[Instruction]:
        """Decodes the words. Raises ScheduleError naming the first that is not valid."""
        return list(_Decoder(self.words, self.header()).instructions())


class _Decoder:
    def __init__(self, words: array[int], header: Header) -> None:
        self.words = words
        self.header = header
        self.at = HEADER_WORDS

    def next(self, low: int, high: int, what: str) -> int:
        if self.at >= len(self.words):
            raise ScheduleError(f"the plan ends at word {self.at}, where {what} should be")
        value = self.words[self.at]
        if not low <= value <= high:
            raise ScheduleError(f"word {self.at} of the plan: {what} is {value}, allowed are {low} to {high}")
        self.at += 1
        return value

    def instructions(self) -> Iterator[Instruction]:
        entered = False
        last_round = self.header.rounds - 1
        while True:
            code = self.next(END, PUBLISH, "an instruction")
            if code != TRANSFER and entered == (code == ENTER):
                raise ScheduleError(
                    f"word {self.at - 1} of the plan: ENTER must come once, before WAIT, PUBLISH and END"
                )
            if code == END:
                yield End()
                return
            if code == TRANSFER:
                yield self._transfer()
            elif code == ENTER:
                entered = True
                yield Enter()
            elif code == WAIT:
                peer = self.next(0, self.header.world_size - 1, "a wait's peer")
                yield Wait(peer, self.next(1, last_round, "a wait's round"))
            else:
                yield Publish(self.next(1, last_round, "a published round"))

    def _transfer(self) -> TransferInstruction:
        reduce = self.next(0, 1, "reduce") == 1
        final = self.next(0, 1, "final") == 1
        buffer = BUFFERS[self.next(0, 1, "a count's buffer")]
        chunk = self.next(0, self.header.chunks(buffer) - 1, "a count's chunk")
        n_sources = self.next(1, 65535 if reduce else 1, "the number of sources")
        n_destinations = self.next(1, 65535, "the number of destinations")
        sources = tuple([self._operand() for _ in range(n_sources)])
        return TransferInstruction(
            reduce, final, buffer, chunk, sources, tuple([self._operand() for _ in range(n_destinations)])
        )

    def _operand(self) -> Operand:
        rank = self.next(0, self.header.world_size - 1, "a location's rank")
        buffer = BUFFERS[self.next(0, 2, "a location's buffer")]
        chunk = self.next(0, self.header.chunks(buffer) - 1, "a location's chunk")
        mark = Mark(self.next(0, 2, "a location's mark"))
        if self.header.flags & PRIVATE and rank != self.header.rank and buffer != "scratch":
            raise ScheduleError(f"word {self.at - 3} of the plan: a private plan may touch only the scratch of peers")
        if mark == Mark.PARTIAL and (buffer != "scratch" or not self.header.flags & PARTIALS):
            raise ScheduleError(f"word {self.at - 1} of the plan: partial results may only lie in scratch")
        return Operand(rank, buffer, chunk, mark)
