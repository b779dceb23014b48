"""Proves by symbolic execution that a Schedule computes what its op means, in every form in which it may run.

The forms: as written; lowered to mapped memory, where input and output may be one; lowered to private memory; the last
two for ranks on one host or on several, which then share nothing but messages. Every value is followed as (chunk, ranks
that contributed), so one run stands for all data, counts and dtypes; who is early and who is late does not matter,
since a Schedule is bulk-synchronous and the waits keep it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hxcomm.schedule.errors import ProofError
from hxcomm.schedule.lowering import lower
from hxcomm.schedule.schedule import USER_BUFFERS, Location, Schedule
from hxcomm.schedule.symbolic import NO_COUNT, Mark, State, Step, Value, count_location, named_ranks, steps, title


@dataclass(frozen=True)
class Proof:
    """What was proved, of the schedule as written.

    order: "rank order" where every reduced chunk is the left fold of ranks 0, 1, ... n-1 (same bits as one process
    would get), else "other". rounds: their number. loaded, stored: the most chunks that one rank loads and stores;
    `pieces` of them are a block.
    """

    order: Literal["rank order", "other"]
    rounds: int
    loaded: int
    stored: int
    pieces: int


def prove(schedule: Schedule, hosts: Sequence[int] | None = None) -> Proof:
    """Raises ProofError where the schedule is wrong, naming round, transfer, location and what was expected there.

    hosts: the number of each rank's host, where they are not all on one. Raises ScheduleError where the schedule is
    malformed. A lowered schedule is checked in its own form only.
    """
    proof = _Checker(schedule).run()
    if schedule.form == "written" and schedule.hosts is None:
        for private in (False, True):
            _Checker(lower(schedule, private, hosts)).run()
    return proof


class _Checker:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.state = State(schedule)
        self.loaded = [0] * schedule.world_size
        self.stored = [0] * schedule.world_size
        self.unread: dict[Location, bool] = {}  # every message that was sent: whether nobody has read it yet

    def run(self) -> Proof:
        rounds = 0
        for number, transfers in self.schedule.numbered_rounds():
            for transfer in transfers:
                self.schedule.check(transfer, number)
        for number, found in steps(self.schedule, self.state):
            rounds += number > 0
            self._writers(number, found)
            for step in found:
                self._memory(number, step)
                self._messages(number, step)
                self.loaded[step.transfer.rank] += len(step.transfer.sources)
                self.stored[step.transfer.rank] += len(step.transfer.destinations)
        for at, unread in self.unread.items():
            if unread:
                raise ProofError(f"{title(self.schedule)}: {at} is sent, but never read")
        in_order = [self._outputs(rank) for rank in range(self.schedule.world_size)]
        return Proof(
            order="rank order" if all(in_order) else "other",
            rounds=rounds,
            loaded=max(self.loaded),
            stored=max(self.stored),
            pieces=self.schedule.pieces,
        )

    def _wrong(self, number: int, step: Step, what: str) -> ProofError:
        return ProofError(f"{title(self.schedule)}, round {number}: {step.transfer}: {what}")

    def _name(self, location: Location) -> Location:
        # As written, input and output are different memory: what aliasing breaks is the lowering's to mend.
        return location if self.schedule.form == "written" else self.schedule.canonical(location)

    def _writers(self, number: int, found: Sequence[Step]) -> None:
        """One writer of each location, and nobody else reads it in that round."""
        writer: dict[Location, Step] = {}
        for step in found:
            for at in step.transfer.destinations:
                if self._name(at) in writer:
                    other = writer[self._name(at)].transfer
                    raise self._wrong(number, step, f"{at} has a second writer in this round, {other}")
                writer[self._name(at)] = step
        for step in found:
            for at in step.transfer.sources:
                other_step = writer.get(self._name(at), step)
                if other_step is not step:
                    raise self._wrong(
                        number,
                        step,
                        f"{at} is overwritten in the same round by another transfer, {other_step.transfer}: read it in "
                        "an earlier round, or write it in a later one",
                    )

    def _memory(self, number: int, step: Step) -> None:
        """What a transfer may touch in this form and round, and where partial results may go."""
        transfer, schedule = step.transfer, self.schedule
        for at in (*transfer.sources, *transfer.destinations):
            if schedule.form == "private" and at.rank != transfer.rank and at.buffer in USER_BUFFERS:
                raise self._wrong(number, step, f"{at} is private to its rank")
        if count_location(schedule, step) is None:
            raise self._wrong(number, step, NO_COUNT)
        if number == 0 and (transfer.sources[0].buffer != "input" or transfer.sources[0].rank != transfer.rank):
            raise self._wrong(number, step, "round 0 may only copy a rank's own input")
        for at in transfer.destinations:
            if number == 0 and (at.buffer != "scratch" or at.rank != transfer.rank):
                raise self._wrong(number, step, "round 0 may only copy to a rank's own scratch")
            if at.buffer == "input" and not schedule.in_place:
                raise self._wrong(number, step, f"{at} is the caller's input, which must stay as it is")
            if at.buffer in USER_BUFFERS and step.stored.mark == Mark.PARTIAL:
                raise self._wrong(
                    number,
                    step,
                    f"stores a partial result (of {named_ranks(step.stored.ranks)}) to {at}: partial results may only "
                    "lie in scratch, which has room for the accumulation type",
                )

    def _messages(self, number: int, step: Step) -> None:
        """Hosts share messages only: each is sent once, from another host, and read by the rank that gets it."""
        transfer, hosts = step.transfer, self.schedule.hosts
        for at in (*transfer.sources, *transfer.destinations):
            if at.buffer != "message" and hosts is not None and hosts[at.rank] != hosts[transfer.rank]:
                raise self._wrong(number, step, f"{at} is memory of another host")
        for at in transfer.sources:
            if at.buffer == "message":
                if at.rank != transfer.rank:
                    raise self._wrong(number, step, f"{at} can be read by rank {at.rank} only")
                self.unread[at] = False
        for at in transfer.destinations:
            if at.buffer == "message":
                if hosts is None or hosts[at.rank] == hosts[transfer.rank]:
                    raise self._wrong(number, step, f"{at} is sent within a host")
                if at in self.unread:
                    raise self._wrong(number, step, f"{at} is sent a second time")
                self.unread[at] = True

    def _outputs(self, rank: int) -> bool:
        """Checks what a rank ends with. Whether all of it is in rank order."""
        schedule, n = self.schedule, self.schedule.world_size
        in_order = True
        pieces = schedule.output.pieces
        for chunk in range(schedule.output.chunks):
            block, piece = divmod(chunk, pieces)
            result = schedule.meaning.result(rank, block, n, schedule.root)
            if result is None:
                if schedule.in_place:
                    self._expect(Location(rank, "input", chunk), chunk, 1 << rank, "its own input, unchanged")
                continue
            contributors, input_block = result
            ranks = sum(1 << each for each in contributors)
            value = self._expect(Location(rank, "output", chunk), input_block * pieces + piece, ranks, "")
            in_order = in_order and (not schedule.meaning.reduces or value.folded == n)
        return in_order

    def _expect(self, at: Location, chunk: int, ranks: int, what: str) -> Value:
        value = self.state.get(at)
        found = "nothing" if value is None else f"chunk {value.chunk} of the input of {named_ranks(value.ranks)}"
        if value is None or (value.chunk, value.ranks) != (chunk, ranks):
            what = what or f"chunk {chunk} of the input of {named_ranks(ranks)}"
            raise ProofError(f"{title(self.schedule)}: {at} must end with {what}; it ends with {found}")
        if value.mark == Mark.PARTIAL:
            raise ProofError(f"{title(self.schedule)}: {at} ends with a partial result")
        return value
