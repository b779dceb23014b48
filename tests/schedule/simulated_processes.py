"""Processes whose users call collectives on several groups, with deaths and aborts at random points.

A process is a user (posts ops, waits for them, overwrites the buffers the moment an op returns, leaves a group after
its last op there), one lane for each of its groups that advances the head of the queue (in hxcomm: whoever waits, and
the background thread), and, when something happens, a thread that aborts or leaves a group or hears of a death. The
scheduler interleaves all lanes of all processes by single steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from schedule.simulated_group import Faults, Group, Member, Op, Steps
from schedule.streams import GARBAGE, Blocks, Step, WrongError, random_step

# Whoever has not ended this many steps after the last failure is not going to: the longest of 900 random runs took
# 12,233 steps in all.
MAX_STEPS = 100_000

Batch = list[tuple[int, Step]]  # group, step; every rank posts all of a batch before it waits for any of it


@dataclass(frozen=True)
class Failure:
    """At step `at` of the run the process dies, or a thread of it begins to abort the group, or leaves it early."""

    at: int
    kind: str  # "death", "abort" or "leave"
    process: int
    group: int


@dataclass(eq=False)
class Lane:
    process: int
    name: str
    steps: Steps
    member: Member | None = None  # the one whose queue it advances
    brief: bool = False  # a handful of steps: taken one at a time, or hardly ever interrupted
    endless: bool = False  # the run is over when only such are left
    condition: Callable[[], bool] | None = None


class World:
    """All processes, groups and lanes. WrongError for whatever users must never see."""

    def __init__(self, groups: Sequence[Group], batches: Sequence[Batch], rng: random.Random) -> None:
        self.groups = groups
        self.rng = rng
        self.n = 1 + max(process for group in groups for process in group.processes)
        self.dead = [False] * self.n
        self.failed = [False] * len(groups)  # something happened that lets ops of the group end in an error
        self.priorities = self.n  # how many lanes' owners there are
        self.members = [
            {process: self.member_of(number, r) for r, process in enumerate(group.processes)}
            for number, group in enumerate(groups)
        ]
        self.waits_for: list[Member | None] = [None] * self.n
        self.returned: list[tuple[int, Blocks]] = []  # process; overwritten by its user, for nobody to touch any more
        self.lanes = [
            Lane(process, f"rank {member.rank} of group {number}", member.drive(), member)
            for number, members in enumerate(self.members)
            for process, member in members.items()
        ]
        self.lanes += [Lane(p, f"the user of process {p}", self.user(p, batches)) for p in range(self.n)]
        self.faults = groups[0].faults

    def member_of(self, number: int, rank: int) -> Member:
        return Member(self.groups[number], rank)

    def user(self, process: int, batches: Sequence[Batch]) -> Steps:
        last = {number: index for index, batch in enumerate(batches) for number, _ in batch}
        yield from self.leave(process, [number for number in range(len(self.groups)) if number not in last])
        for index, batch in enumerate(batches):
            ops: list[tuple[int, Op, bool]] = []
            for number, step in self.own_order(process, batch):
                yield None
                member = self.members[number][process]
                too_late = member.leaving or member.group.aborted[member.rank]
                ops.append((number, member.post(step), too_late))
            self.rng.shuffle(ops)
            for number, op, too_late in ops:
                self.waits_for[process] = self.members[number][process]
                yield lambda op=op: op.outcome is not None
                self.check(process, number, op, too_late, f"batch {index}")
                if op.outcome != "ended" or self.groups[number].private:
                    yield from self.overwrite(process, op)
                else:
                    yield from self.write_over_input(op)
            yield from self.leave(process, [number for number, end in last.items() if end == index])
        self.waits_for[process] = None

    def own_order(self, process: int, batch: Batch) -> Iterator[tuple[int, Step]]:
        """The batch as this process posts it: the order within a group is given, that of the groups is its own."""
        mine = [(number, step) for number, step in batch if process in self.members[number]]
        order = [number for number, _ in mine]
        self.rng.shuffle(order)
        steps = {number: iter([step for other, step in mine if other == number]) for number in order}
        return ((number, next(steps[number])) for number in order)

    def leave(self, process: int, numbers: Sequence[int]) -> Steps:
        for number in numbers:
            member = self.members[number].get(process)
            if member is not None and not member.leaving:
                self.waits_for[process] = member
                yield from member.leave()
                name = f"giving back memory of rank {member.rank} of group {number}"
                self.lanes.append(Lane(process, name, member.give_back(self.dead)))

    def check(self, process: int, number: int, op: Op, too_late: bool, where: str) -> None:
        member = self.members[number][process]
        call = op.call
        where = f"{where}, group {number}, {call.op} {call.algorithm} of {len(op.step.calls)}, rank {member.rank}"
        if too_late and op.outcome != "ended":
            raise WrongError(f"{where}: posted after an abort, and ended as {op.outcome}")
        if op.outcome == "ended":
            if not self.failed[number]:
                raise WrongError(f"{where}: raised that the group has ended, which it has not")
        elif op.outcome != "refused":
            if (op.outcome == "mismatch") != op.step.mismatch:
                raise WrongError(f"{where}: mismatch is {op.step.mismatch}, but the op ended as {op.outcome}")
            op.step.check(member.rank, op.buffers, where)

    def overwrite(self, process: int, op: Op) -> Steps:
        """The user's next step, whatever came out."""
        for blocks in (op.buffers.input, op.buffers.output):
            for block in blocks:
                for i in range(len(block)):
                    block[i] = GARBAGE - 1
                    yield None
            self.returned.append((process, blocks))

    def write_over_input(self, op: Op) -> Steps:
        """After an error with mapped plans peers may still store to the tensors, so what they hold is undefined."""
        for block in op.buffers.input:
            for i in range(len(block)):
                block[i] = GARBAGE - 1
                yield None

    def happen(self, failure: Failure) -> None:
        process, number = failure.process, failure.group
        if self.dead[process]:
            return
        if failure.kind == "death":
            self.die(process)
            return
        self.failed[number] = True
        steps = self.members[number][process].abort() if failure.kind == "abort" else self.leave(process, [number])
        self.lanes.append(Lane(process, f"{failure.kind} of group {number} by process {process}", steps, brief=True))

    def die(self, process: int) -> None:
        self.dead[process] = True
        self.lanes = [lane for lane in self.lanes if lane.process != process]
        for number, members in enumerate(self.members):
            if process in members:
                self.failed[number] = True
        if not self.faults.no_watcher:
            survivors = [p for p in self.watchers(process) if not self.dead[p]]
            self.lanes += [Lane(p, f"the watcher of {p}", self.watch(p, process), brief=True) for p in survivors]

    def watchers(self, victim: int) -> Sequence[int]:
        """Whom the kernel tells."""
        return range(self.n)

    def watch(self, process: int, victim: int) -> Steps:
        """The watcher of a process has got word from the kernel."""
        for members in self.members:
            if process in members and victim in members:
                yield None
                if members[process].group.membership[members[victim].rank]:  # else it had said goodbye
                    yield from members[process].abort()

    def ready(self) -> list[Lane]:
        lanes = [lane for lane in self.lanes if lane.condition is None or lane.condition()]
        if self.faults.one_group_at_a_time:
            lanes = [lane for lane in lanes if lane.member is None or lane.member is self.waits_for[lane.process]]
        return lanes

    def check_memory(self) -> None:
        """Nobody touched what was given back."""
        for group in self.groups:
            group.check_given_back()
        for process, blocks in self.returned:
            if not self.dead[process] and any(element != GARBAGE - 1 for block in blocks for element in block):
                raise WrongError(f"a peer wrote to a buffer that process {process} had got back")


def interleave(world: World, failures: Sequence[Failure] = ()) -> int:
    """Interleaves all lanes until they are done. Returns the number of steps.

    Half of the seeds choose a lane at random for some steps at a time; the other half let the runnable process with the
    highest priority run, and change priorities at a few random points (Burckhardt et al., A Randomized Scheduler with
    Probabilistic Guarantees of Finding Bugs, ASPLOS 2010), which finds what needs one rank to be very late.
    """
    rng, steps = world.rng, 0
    priority = rng.sample(range(world.priorities), world.priorities)
    by_priority = rng.random() < 0.5
    pending = sorted(failures, key=lambda failure: -failure.at)
    last = pending[0].at if pending else 0
    while not all(lane.endless for lane in world.lanes):
        ready = world.ready()
        while pending and (steps >= pending[-1].at or not ready):
            world.happen(pending.pop())
            ready = world.ready()
        if not ready and not all(lane.endless for lane in world.lanes):
            waiting = ", ".join(lane.name for lane in world.lanes if not lane.endless)
            raise WrongError(f"nobody can go on: {waiting}; progress {[group.progress for group in world.groups]}")
        if not ready:
            break  # all have died
        if by_priority:
            first = max(priority[lane.process] for lane in ready)
            ready = [lane for lane in ready if priority[lane.process] == first]
        lane = rng.choice(ready)
        turns = 1 if lane.brief else rng.choice((5, 50, 500) if by_priority else (1, 1, 3, 10, 40))
        if pending:
            turns = min(turns, pending[-1].at - steps)
        elif steps > last + MAX_STEPS:
            raise WrongError(f"still running {MAX_STEPS} steps after the last failure")
        lane.condition = None
        for _ in range(turns):
            steps += 1
            wanted = next(lane.steps, "done")
            if wanted == "done":
                world.lanes.remove(lane)
                break
            if wanted is not None and not wanted():  # type: ignore[operator]
                lane.condition = wanted  # type: ignore[assignment]
                break
        else:
            if by_priority and rng.random() < 0.3:
                priority[lane.process] = min(priority) - 1
    world.check_memory()
    return steps


def one_group(
    n: int, private: bool, first_sequence: int, faults: Faults, stream: Sequence[Step], rng: random.Random
) -> World:
    """Ranks that run a stream on one group, each op waited for before the next is posted."""
    return World([Group(range(n), private, first_sequence, faults)], [[(0, step)] for step in stream], rng)


def several_groups(n: int, private: bool, faults: Faults, rng: random.Random) -> World:
    """One group of all ranks, one of the same ranks in another order, one of some; batches of ops of any of them."""
    members = [range(n), rng.sample(range(n), n), rng.sample(range(n), rng.randint(2, n))]
    groups = [Group(each, private, rng.choice((0, 1, 2**32 - 2)), faults) for each in members]

    def step(number: int) -> tuple[int, Step]:
        kind = rng.choice(("alike", "alike", "alike", "alike", "mismatch", "refused"))
        return number, random_step(rng, groups[number].world_size, kind)

    batches = [[step(rng.randrange(len(groups))) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 3))]
    return World(groups, batches, rng)


def random_failures(world: World, kinds: Sequence[str]) -> list[Failure]:
    """One or two, at any point of a run."""
    rng = world.rng
    failures = []
    for _ in range(rng.choice((1, 1, 2))):
        group = rng.randrange(len(world.groups))
        at = rng.randrange(rng.choice((50, 500, 500 * world.n)))  # most runs are longer than this
        failures.append(Failure(at, rng.choice(kinds), rng.choice(world.groups[group].processes), group))
    return failures
