"""A group of ranks running streams of ops through the protocol, one load or store of one element at a time.

Ranks are generators that stop at every access to shared memory, so a seeded scheduler can interleave them in any way
that a sequentially consistent machine could (memory order is for the core's own tests). Plans are the real compiled
ones; the protocol around them is written out below as the design states it: strict entry, fingerprints and scratch by
parity of the sequence, refused calls, segments of long ops. Users overwrite their buffers the moment an op returns.
`Faults` leaves parts of the protocol out, to see that the checks notice.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from hxcomm import algorithms
from hxcomm.schedule import OPS, Plan, compile_plan
from hxcomm.schedule.extents import piece_elements, piece_extent
from hxcomm.schedule.plan import End, Enter, Instruction, Operand, Publish, TransferInstruction, Wait

Blocks = list[list[int]]
Steps = Generator["tuple[int, int] | None", None, None]  # yields (peer, value) where blocked, None at an access

GARBAGE = -(10**12)  # no sum of inputs comes near it
SCRATCH_ELEMENTS = 2048
WORLD_SIZES = range(2, 9)


class WrongError(AssertionError):
    """The group did what its users must never see."""


@dataclass(frozen=True)
class Faults:
    """What to leave out: a wait of a plan (rank, index of the instruction), or a part of the protocol."""

    wait: tuple[str, str, int, int] | None = None  # op, algorithm, rank, index
    lax_entry: bool = False  # wait for the arrival of those only whose memory is touched
    one_scratch: bool = False  # the same scratch for every sequence
    forget_refusal: bool = False  # go on after a refused call without waiting for anybody


@dataclass(frozen=True)
class Call:
    """What one rank asks for. counts[s][d]: elements of a block; for all but all_to_all they are all equal."""

    op: str
    algorithm: str
    root: int | None
    counts: tuple[tuple[int, ...], ...]
    window: int
    refused: bool = False

    def fingerprint(self) -> tuple[object, ...]:
        uniform = None if self.op == "all_to_all" else self.counts
        return (self.op, self.algorithm, self.root, uniform, self.window, self.refused)


@dataclass
class Buffers:
    input: Blocks
    output: Blocks


@cache
def plan_of(call_key: tuple[str, str, int | None], world_size: int, rank: int, private: bool) -> Plan:
    op, algorithm, root = call_key
    return compile_plan(algorithms.build(op, algorithm, world_size, root), rank, private)


@cache
def instructions_of(
    call_key: tuple[str, str, int | None], world_size: int, rank: int, private: bool
) -> list[Instruction]:
    return plan_of(call_key, world_size, rank, private).instructions()


@dataclass
class Group:
    world_size: int
    private: bool
    first_sequence: int
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        n = self.world_size
        # What ranks share: progress, fingerprint and descriptor (buffers, counts) by parity, scratch by parity.
        self.progress = [self.first_sequence << 16] * n
        self.fingerprint: list[list[object]] = [[None, None] for _ in range(n)]
        self.descriptor: list[list[tuple[Buffers, Call] | None]] = [[None, None] for _ in range(n)]
        self.scratch = [[[GARBAGE] * SCRATCH_ELEMENTS for _ in range(2)] for _ in range(n)]


def arrival(sequence: int) -> int:
    return (sequence << 16) + 1


class Rank:
    def __init__(self, group: Group, rank: int) -> None:
        self.group = group
        self.rank = rank
        self.sequence = group.first_sequence
        self.flush: int | None = None
        self.returned: list[Blocks] = []  # what the user has overwritten, and nobody may touch any more

    def run(self, stream: Sequence[Step]) -> Steps:
        for number, step in enumerate(stream):
            call = step.calls[self.rank]
            if self.flush is not None and not self.group.faults.forget_refusal:
                for peer in range(self.group.world_size):
                    yield peer, arrival(self.flush)
            self.flush = None
            if call.refused:
                yield from self.refuse(call)
                continue
            buffers = step.buffers(self.rank)
            mismatch = yield from self.op(call, buffers)
            where = f"step {number}, {call.op} {call.algorithm} of {self.group.world_size}, rank {self.rank}"
            if mismatch != step.mismatch:
                raise WrongError(f"{where}: mismatch is {step.mismatch}, seen as {mismatch}")
            step.check(self.rank, buffers, where)
            yield from self.overwrite(buffers)

    def refuse(self, call: Call) -> Steps:
        """A call refused on this rank uses its sequence up, so that the peers learn of it."""
        self.sequence += 1
        self.group.fingerprint[self.rank][self.sequence & 1] = ("refused", self.sequence)
        yield None
        self.group.progress[self.rank] = arrival(self.sequence)
        self.flush = self.sequence

    def op(self, call: Call, buffers: Buffers) -> Generator[tuple[int, int] | None, None, bool]:
        """Runs all segments. Returns whether it ended in a mismatch."""
        group, low, longest = self.group, 0, 1
        key = (call.op, call.algorithm, call.root)
        plan = plan_of(key, group.world_size, self.rank, group.private)
        instructions = instructions_of(key, group.world_size, self.rank, group.private)
        while low < longest:
            self.sequence += 1
            parity = self.sequence & 1
            window = _Window(self, plan, call, buffers, low)
            for index, instruction in enumerate(instructions):
                if isinstance(instruction, TransferInstruction):
                    yield from window.transfer(instruction)
                elif isinstance(instruction, Wait):
                    if group.faults.wait != (call.op, call.algorithm, self.rank, index):
                        yield instruction.peer, (self.sequence << 16) + instruction.round + 1
                elif isinstance(instruction, Publish):
                    yield None
                    group.progress[self.rank] = (self.sequence << 16) + instruction.round + 1
                elif isinstance(instruction, Enter):
                    group.fingerprint[self.rank][parity] = (*call.fingerprint(), self.sequence if low == 0 else None)
                    group.descriptor[self.rank][parity] = (buffers, call)
                    if not (yield from self.enter(instructions, compare=low == 0)):
                        return True
                    longest = window.entered()
                else:
                    assert isinstance(instruction, End)
            low += call.window
        return False

    def enter(
        self, instructions: Sequence[Instruction], compare: bool
    ) -> Generator[tuple[int, int] | None, None, bool]:
        """Publishes the arrival and waits for everybody's. Whether all fingerprints agree."""
        group = self.group
        yield None
        group.progress[self.rank] = arrival(self.sequence)
        peers = range(group.world_size)
        if group.faults.lax_entry:
            peers = sorted(_touched(instructions))  # type: ignore[assignment]
        for peer in peers:
            yield peer, arrival(self.sequence)
        mine = group.fingerprint[self.rank][self.sequence & 1]
        for peer in peers if compare else ():
            yield None
            if group.fingerprint[peer][self.sequence & 1] != mine:
                return False
        return True

    def overwrite(self, buffers: Buffers) -> Steps:
        """The user's next step, whatever came out."""
        for blocks in (buffers.input, buffers.output):
            for block in blocks:
                for i in range(len(block)):
                    block[i] = GARBAGE - 1
                    yield None
            self.returned.append(blocks)


def _touched(instructions: Sequence[Instruction]) -> set[int]:
    transfers = [each for each in instructions if isinstance(each, TransferInstruction)]
    return {operand.rank for each in transfers for operand in (*each.sources, *each.destinations)}


class _Window:
    """The memory of one segment of one op, as one rank resolves it."""

    def __init__(self, rank: Rank, plan: Plan, call: Call, buffers: Buffers, low: int) -> None:
        self.rank, self.call, self.low = rank, call, low
        self.header = plan.header()
        self.pieces = self.header.input.pieces
        self.stride = piece_elements(call.window, self.pieces, quantum=1)
        self.buffers: dict[int, Buffers] = {rank.rank: buffers}
        self.parity = 0 if rank.group.faults.one_scratch else rank.sequence & 1
        assert self.header.scratch * self.stride <= SCRATCH_ELEMENTS

    def entered(self) -> int:
        """Takes the peers' descriptors. Elements of the longest block on any rank."""
        group = self.rank.group
        longest = 0
        for peer in range(group.world_size):
            descriptor = group.descriptor[peer][self.rank.sequence & 1]
            if descriptor is not None:
                buffers, call = descriptor
                self.buffers.setdefault(peer, buffers)
                longest = max(longest, *(max(row) for row in call.counts))
        return longest

    def extent(self, rank: int, buffer: str, chunk: int) -> tuple[list[int], int, int]:
        block, piece = divmod(chunk, self.pieces)
        if rank not in self.buffers:
            raise WrongError(f"rank {self.rank.rank} touches rank {rank}, whose descriptor it has not seen")
        blocks = self.buffers[rank].input if buffer == "input" else self.buffers[rank].output
        if block >= len(blocks):
            raise WrongError(f"rank {self.rank.rank} touches block {block} of rank {rank}, which has not got it")
        memory = blocks[block]
        high = self.low + self.call.window
        return (memory, *piece_extent(len(memory), self.pieces, piece, self.low, high, quantum=1))

    def place(self, operand: Operand) -> tuple[list[int], int]:
        if operand.buffer == "scratch":
            return self.rank.group.scratch[operand.rank][self.parity], operand.chunk * self.stride
        memory, first, _ = self.extent(operand.rank, operand.buffer, operand.chunk)
        return memory, first

    def transfer(self, instruction: TransferInstruction) -> Steps:
        _, first, end = self.extent(self.rank.rank, instruction.count_buffer, instruction.count_chunk)
        if first == end:
            return
        sources = [self.place(operand) for operand in instruction.sources]
        destinations = [self.place(operand) for operand in instruction.destinations]
        for i in range(end - first):
            total = 0
            for memory, at in sources:
                yield None
                if at + i >= len(memory):
                    raise WrongError(f"rank {self.rank.rank} reads beyond a block of a peer")
                total += memory[at + i]
            for memory, at in destinations:
                yield None
                if at + i >= len(memory):
                    raise WrongError(f"rank {self.rank.rank} writes beyond a block of a peer")
                memory[at + i] = total


@dataclass(frozen=True)
class Step:
    """One position of the stream: what each rank calls, with which inputs, and what must come of it."""

    calls: tuple[Call, ...]
    inputs: tuple[Blocks, ...]

    @property
    def mismatch(self) -> bool:
        return len({call.fingerprint() for call in self.calls}) > 1

    def buffers(self, rank: int) -> Buffers:
        call, n = self.calls[rank], len(self.calls)
        meaning = OPS[call.op]
        given = [list(block) for block in self.inputs[rank]]
        if meaning.in_place:
            return Buffers(given, given)
        blocks = 0 if meaning.output_at_root_only and rank != call.root else meaning.layout("output", n, 1).blocks
        return Buffers(given, [[GARBAGE] * call.counts[block][rank] for block in range(blocks)])

    def check(self, rank: int, buffers: Buffers, where: str) -> None:
        call, n = self.calls[rank], len(self.calls)
        meaning = OPS[call.op]
        expected: dict[int, list[int]] = {}
        for block in range(len(buffers.output)):
            result = None if self.mismatch else meaning.result(rank, block, n, call.root)
            if result is not None:
                ranks, taken = result
                columns = zip(*(self.inputs[each][taken] for each in ranks), strict=True)
                expected[block] = [sum(column) for column in columns]
            elif meaning.in_place:
                expected[block] = self.inputs[rank][block]
            else:
                expected[block] = [GARBAGE] * len(buffers.output[block])
        for block, elements in expected.items():
            if buffers.output[block] != elements:
                raise WrongError(f"{where}: block {block} of the output is {buffers.output[block]}, not {elements}")
        if not meaning.in_place and buffers.input != self.inputs[rank]:
            raise WrongError(f"{where}: the input was changed to {buffers.input} from {self.inputs[rank]}")


def schedule_ranks(group: Group, stream: Sequence[Step], rng: random.Random) -> None:
    """Interleaves the ranks until all are done, and checks that nobody touched what was given back. WrongError else.

    Half of the seeds choose a rank at random for some steps at a time; the other half let the runnable rank with the
    highest priority run, and change priorities at a few random points (Burckhardt et al., A Randomized Scheduler with
    Probabilistic Guarantees of Finding Bugs, ASPLOS 2010), which finds what needs one rank to be very late.
    """
    ranks = [Rank(group, rank) for rank in range(group.world_size)]
    running = {rank.rank: rank.run(stream) for rank in ranks}
    blocked: dict[int, tuple[int, int]] = {}
    priority = rng.sample(range(group.world_size), group.world_size)
    by_priority = rng.random() < 0.5
    while running:
        ready = [r for r in running if r not in blocked or group.progress[blocked[r][0]] >= blocked[r][1]]
        if not ready:
            raise WrongError(f"every rank waits: {blocked}, progress {group.progress}")
        chosen = max(ready, key=priority.__getitem__) if by_priority else rng.choice(ready)
        blocked.pop(chosen, None)
        if by_priority:
            turns = rng.choice((5, 50, 500))
        else:
            turns = rng.choice((1, 1, 3, 10, 40))
        for _ in range(turns):
            wanted = next(running[chosen], "done")
            if wanted == "done":
                del running[chosen]
                break
            if wanted is not None and group.progress[wanted[0]] < wanted[1]:  # type: ignore[operator, index]
                blocked[chosen] = wanted  # type: ignore[assignment]
                break
        else:
            if by_priority and rng.random() < 0.3:
                priority[chosen] = min(priority) - 1
    for rank in ranks:
        for blocks in rank.returned:
            if any(element != GARBAGE - 1 for block in blocks for element in block):
                raise WrongError(f"a peer wrote to a buffer that rank {rank.rank} had got back")


def random_call(rng: random.Random, n: int, op: str | None = None, algorithm: str | None = None) -> Call:
    op = op or rng.choice(algorithms.OPS)
    algorithm = algorithm or rng.choice(algorithms.names(op))
    longest = rng.choice((0, 1, n, 2 * n + 1))
    if op == "all_to_all":
        counts = tuple(tuple(rng.randint(0, longest) for _ in range(n)) for _ in range(n))
    else:
        counts = ((longest,) * n,) * n
    window = rng.choice((max(longest, 1), max(longest, 1), (longest + 1) // 2 or 1))
    return Call(op, algorithm, rng.randrange(n) if op in algorithms.ROOTED else None, counts, window)


def random_inputs(rng: random.Random, n: int, rank: int, call: Call) -> Blocks:
    meaning = OPS[call.op]
    blocks = 0 if meaning.input_at_root_only and rank != call.root else meaning.layout("input", n, 1).blocks
    return [[rng.randrange(1, 10**9) for _ in range(call.counts[rank][block])] for block in range(blocks)]


def random_step(rng: random.Random, n: int, kind: str, op: str | None = None, algorithm: str | None = None) -> Step:
    """kind: "alike", "mismatch" (one rank calls something else) or "refused" (on one rank or more)."""
    calls = [random_call(rng, n, op, algorithm)] * n
    if kind == "mismatch":
        odd = rng.randrange(n)
        while calls[odd].fingerprint() == calls[odd - 1].fingerprint():
            calls[odd] = random_call(rng, n)
    elif kind == "refused":
        for rank in rng.sample(range(n), rng.randint(1, n)):
            calls[rank] = Call("barrier", "direct", None, calls[rank].counts, 1, refused=True)
    return Step(tuple(calls), tuple(random_inputs(rng, n, rank, calls[rank]) for rank in range(n)))


def random_stream(rng: random.Random, n: int, length: int = 6) -> Iterator[Step]:
    for _ in range(length):
        yield random_step(rng, n, rng.choice(("alike", "alike", "alike", "mismatch", "refused", "refused")))
