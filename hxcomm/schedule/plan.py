"""A Plan: one rank's share of a lowered Schedule as flat 32-bit words, for an executor to run. Plan format, version 2.

Header, 16 words:
    0 magic 0x48585031    1 version          2 world size       3 rank
    4 rounds, round 0 included               5, 6 input blocks, pieces        7, 8 output blocks, pieces
    9 scratch chunks     10 flags: 1 in place, 2 private, 4 the op reduces, 8 some scratch chunk or message holds
                                   partials, 16 crosses hosts
   11 words in all       12 index of ENTER  13 root, or -1     14 number of the op (ops.py)
   15 messages, the most that any rank gets; 0 on one host
Then instructions, each beginning with its code:
    TRANSFER  1, reduce, final, count buffer, count chunk, n sources, n destinations, then per source and per
                 destination: rank, buffer, chunk, mark
    ENTER     2  after the transfers of round 0, before all else: publish this rank's arrival, wait for everybody's on
                 this host, compare fingerprints
    WAIT      3, peer, round: until that peer, of this host, has finished its transfers of that round
    PUBLISH   4, round: this rank has
    RECEIVE   5, peer, number: until that message to this rank, from a peer on another host, has arrived; stands before
                 the first transfer that reads it
    AGREE     6  until all hosts have agreed on this call. Once in every plan that crosses hosts, in no other: after
                 ENTER, before the first transfer that stores to an input or output of any rank
    END       0
Buffers: 0 input, 1 output, 2 scratch, 3 message. A message is the destination of a transfer of its sender, which sends
it, and a source of transfers of the rank that gets it: (that rank, message, number). One that goes to several ranks is
made once. A buffer is `blocks` memory extents, each cut into `pieces` (extents.py);
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
from hxcomm.schedule.schedule import BUFFERS, MAX_ROUNDS, USER_BUFFERS, Buffer
from hxcomm.schedule.symbolic import Mark

MAGIC = 0x48585031
VERSION = 2
HEADER_WORDS = 16

END, TRANSFER, ENTER, WAIT, PUBLISH, RECEIVE, AGREE = range(7)
IN_PLACE, PRIVATE, REDUCES, PARTIALS, CROSSES = 1, 2, 4, 8, 16


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


class Receive(NamedTuple):
    peer: int
    number: int


class Agree(NamedTuple):
    pass


class End(NamedTuple):
    pass


Instruction: TypeAlias = TransferInstruction | Enter | Wait | Publish | Receive | Agree | End


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
    messages: int

    def chunks(self, buffer: Buffer) -> int:
        if buffer == "scratch" or buffer == "message":
            return self.scratch if buffer == "scratch" else self.messages
        return (self.input if buffer == "input" else self.output).chunks


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
        if not (0 <= w[3] < w[2] and 1 <= w[4] <= MAX_ROUNDS and all(b >= 0 and p >= 1 for b, p in layouts)) or (
            w[15] != 0 and not (w[15] > 0 and w[10] & CROSSES)
        ):
            raise ScheduleError(f"the plan's header is not valid: {list(w[:HEADER_WORDS])}")
        return Header(w[2], w[3], w[4], *layouts, w[9], w[10], w[11], w[12], w[13], w[14], w[15])

    def instructions(self) -> list[Instruction]:
        """Decodes the words. Raises ScheduleError naming the first that is not valid."""
        return list(_Decoder(self.words, self.header()).instructions())


class _Decoder:
    def __init__(self, words: array[int], header: Header) -> None:
        self.words = words
        self.header = header
        self.at = HEADER_WORDS
        self.received: set[int] = set()  # numbers of messages

    def next(self, low: int, high: int, what: str) -> int:
        if self.at >= len(self.words):
            raise ScheduleError(f"the plan ends at word {self.at}, where {what} should be")
        value = self.words[self.at]
        if not low <= value <= high:
            raise ScheduleError(f"word {self.at} of the plan: {what} is {value}, allowed are {low} to {high}")
        self.at += 1
        return value

    def instructions(self) -> Iterator[Instruction]:
        entered = agreed = False
        last_round = self.header.rounds - 1
        crosses = self.header.flags & CROSSES != 0
        while True:
            code = self.next(END, AGREE if crosses else PUBLISH, "an instruction")
            if code != TRANSFER and entered == (code == ENTER):
                raise ScheduleError(f"word {self.at - 1} of the plan: ENTER must come once, before all but transfers")
            if code == END and crosses and not agreed:
                raise ScheduleError(f"word {self.at - 1} of the plan: it crosses hosts, and ends without AGREE")
            if code == END:
                yield End()
                return
            if code == TRANSFER:
                yield self._transfer(may_store=agreed or not crosses)
            elif code == ENTER:
                entered = True
                yield Enter()
            elif code == WAIT:
                peer = self.next(0, self.header.world_size - 1, "a wait's peer")
                yield Wait(peer, self.next(1, last_round, "a wait's round"))
            elif code == PUBLISH:
                yield Publish(self.next(1, last_round, "a published round"))
            elif code == RECEIVE:
                peer = self.next(0, self.header.world_size - 1, "a message's sender")
                number = self.next(0, self.header.messages - 1, "a message's number")
                self.received.add(number)
                yield Receive(peer, number)
            elif agreed:
                raise ScheduleError(f"word {self.at - 1} of the plan: a second AGREE")
            else:
                agreed = True
                yield Agree()

    def _transfer(self, may_store: bool) -> TransferInstruction:
        first = self.at - 1
        reduce = self.next(0, 1, "reduce") == 1
        final = self.next(0, 1, "final") == 1
        buffer = BUFFERS[self.next(0, 1, "a count's buffer")]
        chunk = self.next(0, self.header.chunks(buffer) - 1, "a count's chunk")
        n_sources = self.next(1, 65535 if reduce else 1, "the number of sources")
        n_destinations = self.next(1, 65535, "the number of destinations")
        sources = tuple([self._operand(stored=False) for _ in range(n_sources)])
        destinations = tuple([self._operand(stored=True) for _ in range(n_destinations)])
        if not may_store and any(each.buffer in USER_BUFFERS for each in destinations):
            raise ScheduleError(f"word {first} of the plan: stores to an input or output before AGREE")
        return TransferInstruction(reduce, final, buffer, chunk, sources, destinations)

    def _operand(self, stored: bool) -> Operand:
        rank = self.next(0, self.header.world_size - 1, "a location's rank")
        buffer = BUFFERS[self.next(0, 3 if self.header.flags & CROSSES else 2, "a location's buffer")]
        chunk = self.next(0, self.header.chunks(buffer) - 1, "a location's chunk")
        mark = Mark(self.next(0, 2, "a location's mark"))
        if self.header.flags & PRIVATE and rank != self.header.rank and buffer in USER_BUFFERS:
            raise ScheduleError(f"word {self.at - 3} of the plan: a private plan may touch only the scratch of peers")
        if mark == Mark.PARTIAL and (buffer in USER_BUFFERS or not self.header.flags & PARTIALS):
            raise ScheduleError(f"word {self.at - 1} of the plan: partial results may only lie in scratch")
        if buffer == "message" and stored == (rank == self.header.rank):
            raise ScheduleError(
                f"word {self.at - 4} of the plan: a message is stored to another rank, and read by the one that gets it"
            )
        if buffer == "message" and not stored and chunk not in self.received:
            raise ScheduleError(f"word {self.at - 2} of the plan: message {chunk} is read before it is received")
        return Operand(rank, buffer, chunk, mark)
