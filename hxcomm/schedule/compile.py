"""Compiles a Schedule into one rank's Plan: derives the waits, marks every operand, names every count.

Waits are derived, never written by hand. A transfer waits for the peers that wrote what it reads, and for the peers
that read or wrote what it overwrites. Everything is one walk over the rounds; the plans of other ranks are not made.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from hxcomm.schedule.errors import ScheduleError
from hxcomm.schedule.lowering import lower
from hxcomm.schedule.plan import (
    END,
    ENTER,
    HEADER_WORDS,
    IN_PLACE,
    MAGIC,
    PARTIALS,
    PRIVATE,
    PUBLISH,
    REDUCES,
    TRANSFER,
    VERSION,
    WAIT,
    Plan,
)
from hxcomm.schedule.schedule import BUFFERS, Location, Schedule, Transfer
from hxcomm.schedule.symbolic import Mark, State, Step, Value, steps, title

_NUMBER = {buffer: number for number, buffer in enumerate(BUFFERS)}

_NOBODY: dict[int, int] = {}


def compile_plan(schedule: Schedule, rank: int, private: bool = True) -> Plan:
    """The plan of `rank`, for private buffers (CPU tensors) or for mapped ones.

    Every rank of a group must compile an equal schedule; plan_hash tells. Raises ScheduleError where the schedule
    breaks a rule. Costs one walk over all ranks' transfers: two_shot of 130 ranks under a second.
    """
    if not 0 <= rank < schedule.world_size:
        raise ScheduleError(f"rank {rank} of {title(schedule)}: the ranks are 0 to {schedule.world_size - 1}")
    lowered = lower(schedule, private)
    compiler = _Compiler(lowered, rank)
    for number, found in steps(lowered, State(lowered)):
        compiler.round(number, found)
    return compiler.finish()


class _Waits:
    """Who touched each location last, and what `rank` must wait for, or be waited for, because of that."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.canonical = schedule.canonical
        self.rank = rank
        self.writer: dict[Location, tuple[int, int]] = {}
        self.readers: dict[Location, dict[int, int]] = {}  # rank -> last round, since the last write
        self.waited: dict[tuple[int, int], int] = {}  # (who, for whom) -> latest round

    def before(self, transfer: Transfer) -> list[tuple[int, int]]:
        """The (peer, round) waits of a transfer that involve `rank` as who waits or as who is waited for."""
        needed: dict[int, int] = {}
        mine = transfer.rank == self.rank
        for at in transfer.sources:
            written = self.writer.get(at if at[1] != "output" else self.canonical(at))
            if written is not None and needed.get(written[0], 0) < written[1]:
                needed[written[0]] = written[1]
        for at in transfer.destinations:
            if at[1] == "output":
                at = self.canonical(at)
            written = self.writer.get(at)
            if written is not None and needed.get(written[0], 0) < written[1]:
                needed[written[0]] = written[1]
            for peer, number in self.readers.get(at, _NOBODY).items():
                if needed.get(peer, 0) < number:
                    needed[peer] = number
        peers: Iterable[int] = sorted(needed) if mine else [self.rank] if self.rank in needed else ()
        return self._new(transfer.rank, [(peer, needed[peer]) for peer in peers])

    def _new(self, who: int, waits: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those that an earlier wait for the same peer does not imply."""
        new = []
        for peer, number in waits:
            if peer != who and number > self.waited.get((who, peer), 0):
                self.waited[who, peer] = number
                new.append((peer, number))
        return new

    def after(self, transfers: Iterable[Transfer], number: int) -> None:
        for transfer in transfers:
            for at in transfer.sources:
                if at[1] == "output":
                    at = self.canonical(at)
                readers = self.readers.get(at)
                if readers is None:
                    self.readers[at] = {transfer.rank: number}
                else:
                    readers[transfer.rank] = number
        for transfer in transfers:
            wrote = (transfer.rank, number)
            for at in transfer.destinations:
                if at[1] == "output":
                    at = self.canonical(at)
                self.writer[at] = wrote
                self.readers.pop(at, None)

    def at_exit(self) -> list[tuple[int, int, int]]:
        """(who, peer, round): who is done when peer, which may still read or write its input or output, is."""
        needed: dict[tuple[int, int], int] = {}
        touched = [(at, peer, number) for at, (peer, number) in self.writer.items()]
        touched += [(at, peer, number) for at, readers in self.readers.items() for peer, number in readers.items()]
        for at, peer, number in touched:
            who = at[0]
            if at[1] != "scratch" and who != peer and self.rank in (who, peer):
                needed[who, peer] = max(needed.get((who, peer), 0), number)
        return [
            (who, *wait) for (who, peer), number in sorted(needed.items()) for wait in self._new(who, [(peer, number)])
        ]


class _Compiler:
    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule = schedule
        self.rank = rank
        self.waits = _Waits(schedule, rank)
        self.hash = hashlib.blake2b(_identity(schedule).encode(), digest_size=8)
        self.rounds: list[list[int]] = []  # the instructions of each
        self.exit: list[int] = []
        self.awaited: set[int] = set()  # rounds that some peer waits for
        self.partials = False

    def round(self, number: int, found: Sequence[Step]) -> None:
        out: list[int] = []
        words: list[int] = []
        for step in found:
            transfer = step.transfer
            _append_identity(words, transfer)
            # Every rank's plan needs to know, as the size of scratch chunks must agree.
            self.partials = self.partials or step.stored.mark == Mark.PARTIAL
            new = self.waits.before(transfer) if number > 0 else []
            if transfer.rank == self.rank:
                for peer, earlier in new:
                    out += (WAIT, peer, earlier)
                self._transfer(out, step, number)
            else:
                self.awaited.update(earlier for _, earlier in new)
        self.hash.update(array("i", words).tobytes())
        if number > 0:  # ENTER is a wait for everybody's round 0
            self.waits.after([step.transfer for step in found], number)
        self.rounds.append(out)

    def _transfer(self, out: list[int], step: Step, number: int) -> None:
        transfer, stored = step.transfer, step.stored
        self.schedule.check(transfer, number)
        if stored.mark == Mark.PARTIAL:
            for at in transfer.destinations:
                if at.buffer != "scratch":
                    raise ScheduleError(
                        f"{title(self.schedule)}, round {number}: {transfer}: a partial result may only be stored to "
                        "scratch, where it has room for the accumulation type"
                    )
        count_buffer, count_chunk = self._count(transfer, stored, number)
        final = transfer.reduce and stored.mark == Mark.FINAL
        out += (TRANSFER, int(transfer.reduce), int(final), count_buffer, count_chunk)
        out += (len(transfer.sources), len(transfer.destinations))
        for at, value in zip(transfer.sources, step.loaded, strict=True):
            out += (at.rank, _NUMBER[at.buffer], at.chunk, value.mark)
        for at in transfer.destinations:
            out += (at.rank, _NUMBER[at.buffer], at.chunk, stored.mark)

    def _count(self, transfer: Transfer, stored: Value, number: int) -> tuple[int, int]:
        """(buffer, chunk) of the executing rank's own input or output whose element count is the transfer's."""
        for buffer in (1, 0):
            for at in (*transfer.destinations, *transfer.sources):
                if at.rank == self.rank and at.buffer == BUFFERS[buffer]:
                    return buffer, at.chunk
        if not self.schedule.meaning.uniform:
            raise ScheduleError(
                f"{title(self.schedule)}, round {number}: {transfer}: blocks of {self.schedule.op} may differ in "
                "count, so a transfer must have a chunk of its own rank's input or output among its locations"
            )
        if self.schedule.has(self.rank, "input"):
            return 0, stored.chunk
        return 1, stored.chunk % self.schedule.pieces

    def finish(self) -> Plan:
        schedule = self.schedule
        out = [0] * HEADER_WORDS + self.rounds[0]
        enter = len(out)
        out.append(ENTER)
        for who, peer, number in self.waits.at_exit():
            if who == self.rank:
                self.exit += (WAIT, peer, number)
            else:
                self.awaited.add(number)
        for number, instructions in enumerate(self.rounds[1:], 1):
            out += instructions
            if number in self.awaited:
                out += (PUBLISH, number)
        out += self.exit
        out.append(END)
        flags = IN_PLACE * schedule.in_place | PRIVATE * (schedule.form == "private")
        flags |= REDUCES * schedule.meaning.reduces | PARTIALS * self.partials
        root = -1 if schedule.root is None else schedule.root
        out[:5] = MAGIC, VERSION, schedule.world_size, self.rank, len(self.rounds)
        out[5:9] = *schedule.input, *schedule.output
        out[9:HEADER_WORDS] = schedule.scratch, flags, len(out), enter, root, schedule.meaning.number, 0
        return Plan(array("i", out), int.from_bytes(self.hash.digest(), "little"))


def _identity(schedule: Schedule) -> str:
    return repr(
        (
            VERSION,
            schedule.op,
            schedule.algorithm,
            schedule.world_size,
            schedule.root,
            tuple(schedule.input),
            tuple(schedule.output),
            schedule.scratch,
            schedule.form,
        )
    )


def _append_identity(words: list[int], transfer: Transfer) -> None:
    words += (transfer.rank, transfer.reduce, len(transfer.sources), len(transfer.destinations))
    for rank, buffer, chunk in transfer.sources:
        words += (rank, _NUMBER[buffer], chunk)
    for rank, buffer, chunk in transfer.destinations:
        words += (rank, _NUMBER[buffer], chunk)
