"""Compiles a Schedule into one rank's Plan: derives the waits, marks every operand, names every count.

Waits are derived, never written by hand. A transfer waits for the peers that wrote what it reads, and for the peers
that read or wrote what it overwrites. Peers on other hosts touch nothing of a rank's: what they send is received before
it is first read, and before a rank first stores to a user's memory all hosts have agreed on the call. Everything is one
walk over the rounds; the plans of other ranks are not made.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from hxcomm.schedule.errors import ScheduleError
from hxcomm.schedule.lowering import lower
from hxcomm.schedule.plan import (
    AGREE,
    CROSSES,
    END,
    ENTER,
    HEADER_WORDS,
    IN_PLACE,
    MAGIC,
    PARTIALS,
    PRIVATE,
    PUBLISH,
    RECEIVE,
    REDUCES,
    TRANSFER,
    VERSION,
    WAIT,
    Plan,
)
from hxcomm.schedule.schedule import BUFFERS, USER_BUFFERS, Location, Schedule, Transfer
from hxcomm.schedule.symbolic import NO_COUNT, Mark, State, Step, count_location, steps, title

_NUMBER = {buffer: number for number, buffer in enumerate(BUFFERS)}

_NOBODY: dict[int, int] = {}


def compile_plan(schedule: Schedule, rank: int, private: bool = True, hosts: Sequence[int] | None = None) -> Plan:
    """The plan of `rank`, for private buffers (CPU tensors) or for mapped ones. hosts: the number of each rank's host.

    Every rank of a group must compile an equal schedule; plan_hash tells. Raises ScheduleError where the schedule
    breaks a rule. Costs one walk over all ranks' transfers: two_shot of 130 ranks under a second.
    """
    if not 0 <= rank < schedule.world_size:
        raise ScheduleError(f"rank {rank} of {title(schedule)}: the ranks are 0 to {schedule.world_size - 1}")
    lowered = lower(schedule, private, hosts)
    compiler = _Compiler(lowered, rank)
    for number, found in steps(lowered, State(lowered)):
        compiler.round(number, found)
    return compiler.finish()


class _Waits:
    """Derives every rank's waits: who touched each location last, and what each rank knows to be finished.

    A rank that waits for round t of a peer also learns what that peer had learnt by then, so a wait that follows from
    others through third ranks is not made (in ring all_reduce, those before its second half).
    """

    def __init__(self, schedule: Schedule) -> None:
        self.canonical = schedule.canonical
        self.writer: dict[Location, tuple[int, int]] = {}  # (rank, round)
        self.readers: dict[Location, dict[int, int]] = {}  # rank -> last round, since the last write
        self.known: list[dict[int, int]] = [{} for _ in range(schedule.world_size)]  # peer -> finished round
        self.learnt: dict[int, dict[int, dict[int, int]]] = {}  # round -> rank -> what it knew at its end

    def before(self, transfer: Transfer) -> list[tuple[int, int]]:
        """The (peer, round) waits that must stand before a transfer."""
        needed: dict[int, int] = {}
        # Messages are in no table: they have no writer to wait for, and nobody overwrites them.
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
        return self._learn(transfer.rank, needed) if needed else []

    def _learn(self, rank: int, needed: dict[int, int]) -> list[tuple[int, int]]:
        known = self.known[rank]
        waits = []
        # The latest rounds first: they may imply the others.
        latest_first = sorted(needed.items(), key=_latest_first) if len(needed) > 1 else needed.items()
        for peer, number in latest_first:
            if peer == rank or number <= known.get(peer, 0):
                continue
            waits.append((peer, number))
            known[peer] = number
            for third, earlier in self.learnt.get(number, {}).get(peer, _NOBODY).items():
                if known.get(third, 0) < earlier:
                    known[third] = earlier
        return waits

    def after(self, transfers: Sequence[Transfer], number: int) -> None:
        for transfer in transfers:
            for at in transfer.sources:
                if at[1] == "message":
                    continue
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
                if at[1] == "message":
                    continue
                if at[1] == "output":
                    at = self.canonical(at)
                self.writer[at] = wrote
                self.readers.pop(at, None)
        # Most waits are for the round before, and forgetting only costs a wait: n ranks' knowledge is n^2 a round.
        self.learnt.pop(number - 2, None)
        self.learnt[number] = {rank: dict(self.known[rank]) for rank in {transfer.rank for transfer in transfers}}

    def at_exit(self) -> list[tuple[int, int, int]]:
        """(rank, peer, round): what a rank waits for in the end, as peers may still use its input and output."""
        needed: dict[int, dict[int, int]] = {}
        touched = [(at, peer, number) for at, (peer, number) in self.writer.items()]
        touched += [(at, peer, number) for at, readers in self.readers.items() for peer, number in readers.items()]
        for (rank, buffer, _), peer, number in touched:
            if buffer in USER_BUFFERS and rank != peer:
                peers = needed.setdefault(rank, {})
                peers[peer] = max(peers.get(peer, 0), number)
        return [(rank, *wait) for rank, peers in needed.items() for wait in self._learn(rank, peers)]


def _latest_first(wait: tuple[int, int]) -> tuple[int, int]:
    return -wait[1], wait[0]


class _Compiler:
    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule = schedule
        self.rank = rank
        self.waits = _Waits(schedule)
        self.hash = hashlib.blake2b(_identity(schedule).encode(), digest_size=8)
        self.rounds: list[list[int]] = []  # the instructions of each
        self.exit: list[int] = []
        self.awaited: set[int] = set()  # rounds that some peer waits for
        self.partials = False
        self.senders: dict[int, int] = {}  # of the messages to this rank that it has not received yet
        self.agreed = False

    def round(self, number: int, found: Sequence[Step]) -> None:
        out: list[int] = []
        words: list[int] = []
        for step in found:
            transfer = step.transfer
            _append_identity(words, transfer)
            for at in transfer.destinations:
                if at[1] == "message" and at[0] == self.rank:
                    self.senders[at[2]] = transfer.rank
            # Every rank's plan needs to know, as the size of scratch chunks must agree.
            self.partials = self.partials or step.stored.mark == Mark.PARTIAL
            waits = self.waits.before(transfer) if number > 0 else []  # ENTER waits for everybody's round 0
            if transfer.rank == self.rank:
                for peer, earlier in waits:
                    out += (WAIT, peer, earlier)
                for at in transfer.sources:
                    if at.buffer == "message" and at.chunk in self.senders:
                        out += (RECEIVE, self.senders.pop(at.chunk), at.chunk)
                if self.schedule.hosts is not None and not self.agreed and _stores_to_users(transfer):
                    out.append(AGREE)
                    self.agreed = True
                self._transfer(out, step, number)
            else:
                self.awaited.update([earlier for peer, earlier in waits if peer == self.rank])
        self.hash.update(array("i", words).tobytes())
        if number > 0:
            self.waits.after([step.transfer for step in found], number)
        self.rounds.append(out)

    def _transfer(self, out: list[int], step: Step, number: int) -> None:
        transfer, stored = step.transfer, step.stored
        self.schedule.check(transfer, number)
        if stored.mark == Mark.PARTIAL:
            for at in transfer.destinations:
                if at.buffer in USER_BUFFERS:
                    raise ScheduleError(
                        f"{title(self.schedule)}, round {number}: {transfer}: a partial result may only be stored to "
                        "scratch, where it has room for the accumulation type"
                    )
        counted = count_location(self.schedule, step)
        if counted is None:
            raise ScheduleError(f"{title(self.schedule)}, round {number}: {transfer}: {NO_COUNT}")
        final = transfer.reduce and stored.mark == Mark.FINAL
        out += (TRANSFER, int(transfer.reduce), int(final), _NUMBER[counted.buffer], counted.chunk)
        out += (len(transfer.sources), len(transfer.destinations))
        for at, value in zip(transfer.sources, step.loaded, strict=True):
            out += (at.rank, _NUMBER[at.buffer], at.chunk, value.mark)
        for at in transfer.destinations:
            out += (at.rank, _NUMBER[at.buffer], at.chunk, stored.mark)

    def finish(self) -> Plan:
        schedule = self.schedule
        out = [0] * HEADER_WORDS + self.rounds[0]
        enter = len(out)
        out.append(ENTER)
        for rank, peer, number in self.waits.at_exit():
            if rank == self.rank:
                self.exit += (WAIT, peer, number)
            elif peer == self.rank:
                self.awaited.add(number)
        for number, instructions in enumerate(self.rounds[1:], 1):
            out += instructions
            if number in self.awaited:
                out += (PUBLISH, number)
        if schedule.hosts is not None and not self.agreed:
            out.append(AGREE)
        out += self.exit
        out.append(END)
        flags = IN_PLACE * schedule.in_place | PRIVATE * (schedule.form == "private")
        flags |= REDUCES * schedule.meaning.reduces | PARTIALS * self.partials | CROSSES * (schedule.hosts is not None)
        root = -1 if schedule.root is None else schedule.root
        out[:5] = MAGIC, VERSION, schedule.world_size, self.rank, len(self.rounds)
        out[5:9] = *schedule.input, *schedule.output
        number = schedule.meaning.number
        out[9:HEADER_WORDS] = schedule.scratch, flags, len(out), enter, root, number, schedule.messages
        return Plan(array("i", out), int.from_bytes(self.hash.digest(), "little"))


def _stores_to_users(transfer: Transfer) -> bool:
    return any(at.buffer in USER_BUFFERS for at in transfer.destinations)


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
            schedule.hosts,
        )
    )


def _append_identity(words: list[int], transfer: Transfer) -> None:
    words += (transfer.rank, transfer.reduce, len(transfer.sources), len(transfer.destinations))
    for rank, buffer, chunk in transfer.sources:
        words += (rank, _NUMBER[buffer], chunk)
    for rank, buffer, chunk in transfer.destinations:
        words += (rank, _NUMBER[buffer], chunk)
