"""A group of ranks in the protocol, one load or store of one element at a time.

Every part of a rank is a generator that stops at each access to shared memory, so a scheduler (simulated_processes.py)
can interleave them in any way that a sequentially consistent machine could; memory order is for the core's own tests.
Plans are the real compiled ones. The protocol around them is written out below as the design states it, with the names
of csrc/communicator/: strict entry, fingerprints and scratch by parity of the sequence, refused calls, segments of long
ops, the abort word, leaving, and giving memory back. `Faults` leaves parts out, to see that the checks notice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cache

from schedule.streams import GARBAGE, Buffers, Call, Step, WrongError

from hxcomm import algorithms
from hxcomm.schedule import Plan, compile_plan
from hxcomm.schedule.extents import piece_elements, piece_extent
from hxcomm.schedule.plan import End, Enter, Instruction, Operand, Publish, TransferInstruction, Wait

# Yields None before an access, or what must hold before it makes sense to go on.
Steps = Generator["Callable[[], bool] | None", None, None]
Verdict = Generator["Callable[[], bool] | None", None, bool]

NEW_OWNER = GARBAGE - 2  # what stands in memory that was given back
SCRATCH_ELEMENTS = 2048


class EndedError(Exception):
    """The group has ended on this rank: what PeerFailedError, AbortedError and CommTimeoutError are in hxcomm."""


@dataclass(frozen=True)
class Faults:
    """What to leave out: a wait of a plan (rank, index of the instruction), or a part of the protocol."""

    wait: tuple[str, str, int, int] | None = None  # op, algorithm, rank, index
    lax_entry: bool = False  # wait for the arrival of those only whose memory is touched
    one_scratch: bool = False  # the same scratch for every sequence
    forget_refusal: bool = False  # go on after a refused call without waiting for anybody
    one_group_at_a_time: bool = False  # a process advances only the group that its user waits for
    deaf: bool = False  # a waiter does not look at its abort word
    silent: bool = False  # an abort does not reach the peers' words
    carry_on: bool = False  # calls after an abort begin as if nothing had happened
    no_watcher: bool = False  # nobody notices deaths
    no_goodbye: bool = False  # waiters do not notice that the peer they wait for has left
    progress_before_membership: bool = False  # a waiter looks at these in the wrong order
    leave_amid_abort: bool = False  # a rank leaves while a thread of its process is aborting the group
    give_back_at_once: bool = False  # a rank that left gives its memory back while others are still in
    raise_before_telling: bool = False  # mapped plans: the user has the tensors back before all words are set
    no_last_look: bool = False  # mapped plans: an op ends well without a look at the abort word
    across_hosts: str = ""  # a rule of simulated_crossing.py


@dataclass
class Op:
    """A posted call. outcome: None while it is pending, then "done", "mismatch", "refused" or "ended"."""

    step: Step
    call: Call
    buffers: Buffers
    outcome: str | None = None


Hosts = tuple[int, ...]


@cache
def plan_of(
    call_key: tuple[str, str, int | None], world_size: int, rank: int, private: bool, hosts: Hosts | None = None
) -> Plan:
    op, algorithm, root = call_key
    return compile_plan(algorithms.build(op, algorithm, world_size, root, hosts), rank, private, hosts)


@cache
def instructions_of(
    call_key: tuple[str, str, int | None], world_size: int, rank: int, private: bool, hosts: Hosts | None = None
) -> list[Instruction]:
    return plan_of(call_key, world_size, rank, private, hosts).instructions()


@dataclass
class Group:
    """The shared memory of a group. processes[rank]: the process of that rank. hosts: of the ranks, if several; then
    only ranks of the same host share anything here."""

    processes: Sequence[int]
    private: bool
    first_sequence: int
    faults: Faults = field(default_factory=Faults)
    hosts: Hosts | None = None

    def __post_init__(self) -> None:
        n = self.world_size = len(self.processes)
        # What ranks share: progress, fingerprint and descriptor (buffers, counts) by parity, scratch by parity.
        self.progress = [self.first_sequence << 16] * n
        self.fingerprint: list[list[object]] = [[None, None] for _ in range(n)]
        self.descriptor: list[list[tuple[Buffers, Call] | None]] = [[None, None] for _ in range(n)]
        self.scratch = [[[GARBAGE] * SCRATCH_ELEMENTS for _ in range(2)] for _ in range(n)]
        self.aborted = [False] * n  # the abort words
        self.membership = [True] * n
        self.given_back = [False] * n
        # Of leaders of hosts: sequence * 2 + whether all hosts agreed on that op, and what all ranks called there.
        self.verdict = [-1] * n
        self.called: list[tuple[int, dict[int, Call]]] = [(-1, {})] * n

    def give_back(self, rank: int) -> None:
        """The rank's pages serve somebody else from now on, and nobody of the group may touch them."""
        self.given_back[rank] = True
        self.progress[rank] = self.verdict[rank] = NEW_OWNER
        self.aborted[rank] = False
        for slot in self.scratch[rank]:
            slot[:] = [NEW_OWNER] * SCRATCH_ELEMENTS

    def check_given_back(self) -> None:
        for rank in range(self.world_size):
            if not self.given_back[rank]:
                continue
            if self.aborted[rank] or self.progress[rank] != NEW_OWNER or self.verdict[rank] != NEW_OWNER:
                raise WrongError(f"the control page that rank {rank} had given back was written to")
            if any(slot.count(NEW_OWNER) != SCRATCH_ELEMENTS for slot in self.scratch[rank]):
                raise WrongError(f"the scratch that rank {rank} had given back was written to")


def arrival(sequence: int) -> int:
    return (sequence << 16) + 1


class Member:
    """One rank of one group: its queue of ops, and what any thread of its process does to them."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group = group
        self.rank = rank
        self.peers: Sequence[int] = range(group.world_size)  # with whom it shares memory, itself included
        self.sequence = group.first_sequence
        self.flush: int | None = None
        self.queue: deque[Op] = deque()
        self.leaving = self.left = self.gone = False
        self.aborting = 0  # threads of this process that are in abort()
        self.is_moving: Callable[[], bool] = lambda: False  # has it messages that have not ended?
        self.owes_replies: Callable[[], bool] = lambda: False  # to messages of members

    def post(self, step: Step) -> Op:
        op = Op(step, step.calls[self.rank], step.buffers(self.rank))
        if self.leaving or (self.group.aborted[self.rank] and not self.group.faults.carry_on):
            op.outcome = "ended"
        else:
            self.queue.append(op)
        return op

    def drive(self) -> Steps:
        """Advances the head of the queue for as long as this rank is a member."""
        while not self.gone:
            if not self.queue:
                yield lambda: bool(self.queue) or self.gone
                continue
            op = self.queue[0]
            try:
                outcome = yield from self.execute(op)
            except EndedError:
                outcome = "ended"
                if not (self.group.private or op.outcome or self.group.faults.raise_before_telling):
                    # Peers that have not heard of it may still read this op's tensors, and the user is about to have
                    # them back. With private plans they read scratch, which stays until all have left.
                    yield from self.tell()
            self.queue.popleft()
            op.outcome = op.outcome or outcome

    def execute(self, op: Op) -> Generator[Callable[[], bool] | None, None, str]:
        if not self.group.faults.carry_on:
            yield from self.look_at_abort()
        if self.flush is not None and not self.group.faults.forget_refusal:
            for peer in range(self.group.world_size):
                yield from self.until(peer, arrival(self.flush))
        self.flush = None
        if op.call.refused:
            yield from self.refuse()
            return "refused"
        agreed = yield from self.windows(op.call, op.buffers)
        if agreed and not self.group.private and not self.group.faults.no_last_look:
            yield from self.look_at_abort()
        return "done" if agreed else "mismatch"

    def refuse(self) -> Steps:
        """A call refused on this rank uses its sequence up, so that the peers learn of it."""
        self.sequence += 1
        self.group.fingerprint[self.rank][self.sequence & 1] = ("refused", self.sequence)
        yield None
        self.group.progress[self.rank] = arrival(self.sequence)
        self.flush = self.sequence

    def windows(self, call: Call, buffers: Buffers) -> Verdict:
        """Runs all segments. Whether the ranks agreed about the call."""
        group, low, longest = self.group, 0, 1
        key = (call.op, call.algorithm, call.root)
        plan = plan_of(key, group.world_size, self.rank, group.private)
        instructions = instructions_of(key, group.world_size, self.rank, group.private)
        while low < longest:
            self.sequence += 1
            parity = self.sequence & 1
            window = Window(self, plan, call, buffers, low)
            for index, instruction in enumerate(instructions):
                if isinstance(instruction, TransferInstruction):
                    yield from window.transfer(instruction)
                elif isinstance(instruction, Wait):
                    if group.faults.wait != (call.op, call.algorithm, self.rank, index):
                        yield from self.until(instruction.peer, (self.sequence << 16) + instruction.round + 1)
                elif isinstance(instruction, Publish):
                    yield None
                    group.progress[self.rank] = (self.sequence << 16) + instruction.round + 1
                elif isinstance(instruction, Enter):
                    group.fingerprint[self.rank][parity] = (*call.fingerprint(), self.sequence if low == 0 else None)
                    group.descriptor[self.rank][parity] = (buffers, call)
                    if not (yield from self.enter(instructions, compare=low == 0)):
                        return False
                    longest = window.entered()
                else:
                    assert isinstance(instruction, End)
            low += call.window
        return True

    def enter(self, instructions: Sequence[Instruction], compare: bool) -> Verdict:
        """Publishes the arrival and waits for everybody's. Whether all fingerprints agree."""
        group = self.group
        yield None
        group.progress[self.rank] = arrival(self.sequence)
        peers = range(group.world_size)
        if group.faults.lax_entry:
            peers = sorted(_touched(instructions))  # type: ignore[assignment]
        for peer in peers:
            yield from self.until(peer, arrival(self.sequence))
        mine = group.fingerprint[self.rank][self.sequence & 1]
        for peer in peers if compare else ():
            yield None
            if group.fingerprint[peer][self.sequence & 1] != mine:
                return False
        return True

    def until(self, peer: int, value: int) -> Steps:
        """Waits for the peer's progress. EndedError when the group ends first."""
        group = self.group
        yield None
        while group.progress[peer] < value:
            yield from self.check_failures(peer, value)
            yield (
                lambda: (
                    group.progress[peer] >= value
                    or (group.aborted[self.rank] and not group.faults.deaf)
                    or not (group.membership[peer] or group.faults.no_goodbye)
                )
            )

    def check_failures(self, peer: int, value: int) -> Steps:
        group = self.group
        if not group.faults.deaf:
            yield from self.look_at_abort()
        # Membership before progress: a rank publishes all it owes before it leaves.
        if group.faults.progress_before_membership:
            yield None
            missed = group.progress[peer] < value
            yield None
            missed = missed and not group.membership[peer]
        else:
            yield None
            left = not group.membership[peer]
            yield None
            missed = left and group.progress[peer] < value
        if missed and not group.faults.no_goodbye:
            yield from self.abort()
            raise EndedError

    def look_at_abort(self) -> Steps:
        yield None
        if self.group.aborted[self.rank]:
            raise EndedError

    def abort(self) -> Steps:
        """Ends the group on every rank; any thread of the process may call it, at any time."""
        self.aborting += 1
        yield None
        if not self.group.aborted[self.rank] and not self.left:
            self.group.aborted[self.rank] = (
                True  # our own word first: if a peer's abort came before, theirs is the cause
            )
            if not self.group.faults.silent:
                yield from self.tell()
        self.aborting -= 1

    def tell(self) -> Steps:
        """Sets the words of all that are still members."""
        for peer in self.peers:
            yield None
            if peer != self.rank and self.group.membership[peer]:
                yield None
                self.group.aborted[peer] = True

    def leave(self) -> Steps:
        """Takes this rank out of the group. What is pending here ends; peers learn of it when they miss this rank."""
        self.leaving = True
        # What peers wait for although the user has been told already.
        yield lambda: self.group.aborted[self.rank] or not self.owes()
        self.left = True
        yield None
        self.group.aborted[self.rank] = True
        yield lambda: not self.queue and not self.is_moving()
        if not self.group.faults.leave_amid_abort:
            # It may be about to set the word of a peer that, once we have left, need not wait to give its page back.
            yield lambda: self.aborting == 0
        yield None
        self.group.membership[self.rank] = False
        self.gone = True

    def owes(self) -> bool:
        return self.owes_replies()

    def give_back(self, dead: Sequence[bool]) -> Steps:
        """Once all peers have left or are dead, nobody can touch this rank's pages any more. dead: by process."""
        group = self.group
        if not group.faults.give_back_at_once:
            yield (
                lambda: (
                    self.aborting == 0
                    and not any(group.membership[r] and not dead[group.processes[r]] for r in self.peers)
                )
            )
        yield None
        group.give_back(self.rank)


def _touched(instructions: Sequence[Instruction]) -> set[int]:
    transfers = [each for each in instructions if isinstance(each, TransferInstruction)]
    return {operand.rank for each in transfers for operand in (*each.sources, *each.destinations)}


class Window:
    """The memory of one segment of one op, as one rank resolves it."""

    def __init__(self, member: Member, plan: Plan, call: Call, buffers: Buffers, low: int) -> None:
        self.member, self.call, self.low = member, call, low
        self.header = plan.header()
        self.pieces = self.header.input.pieces
        self.stride = piece_elements(call.window, self.pieces, quantum=1)
        self.buffers: dict[int, Buffers] = {member.rank: buffers}
        self.parity = 0 if member.group.faults.one_scratch else member.sequence & 1
        assert self.header.scratch * self.stride <= SCRATCH_ELEMENTS

    def entered(self) -> int:
        """Takes the peers' descriptors. Elements of the longest block on any of them."""
        group = self.member.group
        longest = 0
        for peer in self.member.peers:
            descriptor = group.descriptor[peer][self.member.sequence & 1]
            if descriptor is not None:
                buffers, call = descriptor
                self.buffers.setdefault(peer, buffers)
                longest = max(longest, *(max(row) for row in call.counts))
        return longest

    def extent(self, rank: int, buffer: str, chunk: int) -> tuple[list[int], int, int]:
        block, piece = divmod(chunk, self.pieces)
        if rank not in self.buffers:
            raise WrongError(f"rank {self.member.rank} touches rank {rank}, whose descriptor it has not seen")
        blocks = self.buffers[rank].input if buffer == "input" else self.buffers[rank].output
        if block >= len(blocks):
            raise WrongError(f"rank {self.member.rank} touches block {block} of rank {rank}, which has not got it")
        memory = blocks[block]
        high = self.low + self.call.window
        return (memory, *piece_extent(len(memory), self.pieces, piece, self.low, high, quantum=1))

    def place(self, operand: Operand) -> tuple[list[int], int]:
        if operand.buffer == "scratch":
            return self.member.group.scratch[operand.rank][self.parity], operand.chunk * self.stride
        memory, first, _ = self.extent(operand.rank, operand.buffer, operand.chunk)
        return memory, first

    def transfer(self, instruction: TransferInstruction) -> Steps:
        _, first, end = self.extent(self.member.rank, instruction.count_buffer, instruction.count_chunk)
        if first == end:
            return
        sources = [self.place(operand) for operand in instruction.sources]
        destinations = [self.place(operand) for operand in instruction.destinations]
        for i in range(end - first):
            total = 0
            for memory, at in sources:
                yield None
                if at + i >= len(memory):
                    raise WrongError(f"rank {self.member.rank} reads beyond a block of a peer")
                total += memory[at + i]
            for memory, at in destinations:
                yield None
                if at + i >= len(memory):
                    raise WrongError(f"rank {self.member.rank} writes beyond a block of a peer")
                memory[at + i] = total
