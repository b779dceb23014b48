"""Random programs of sends and receives, the processes that run them beside collectives, and what must come of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from schedule.simulated_group import Faults, Group, Member, Steps
from schedule.simulated_messages import ANY, PAYLOAD, Mail, MessageOp, PointToPoint
from schedule.simulated_processes import Batch, Failure, Lane, World
from schedule.streams import GARBAGE, WrongError

Program = list[list[MessageOp]]  # batches: all of one are posted before any of it is waited for


class MessageWorld(World):
    """Processes with a user of collectives, a user of messages, and a driver of each."""

    def __init__(
        self,
        n: int,
        collectives: Sequence[Batch],
        programs: list[Program],
        mail: Mail,
        rng: random.Random,
        **where: Any,
    ) -> None:
        super().__init__([mail.group], collectives, rng, **where)
        self.has_ended = [False] * n  # the user of messages, by process
        self.leaves_early: set[int] = set()
        self.got: dict[tuple[int, int, int], list[int]] = {}  # to, from, tag: the numbers of what came from any source
        self.ends = [self.end_of(mail, self.members[0][process]) for process in range(n)]
        for process, messages in enumerate(self.ends):
            self.lanes += [
                Lane(process, f"the messages of rank {process}", messages.drive()),
                Lane(process, f"the messages' user of rank {process}", self.talk(messages, programs[process])),
            ]

    def end_of(self, mail: Mail, member: Member) -> PointToPoint:
        return PointToPoint(mail, member)

    def talk(self, messages: PointToPoint, program: Program) -> Steps:
        refusable = {op.peer for batch in program for op in batch if op.kind == "send" and op.wrong}
        for batch in program:
            for op in batch:
                while not (yield from messages.post(op)):
                    if op.peer not in refusable:
                        raise WrongError(f"rank {messages.rank} was told of a refusal by rank {op.peer}")
            order = self.rng.sample(batch, len(batch))
            for op in order:
                yield lambda op=op: op.outcome is not None
                self.check_message(messages.rank, op)
            for op in batch:  # any source: what came from one of them came in order
                if op.kind == "recv" and op.peer == ANY and op.source != ANY:  # what is lent may overtake what is sent
                    numbers = self.got.setdefault((messages.rank, op.source, op.tag), [])
                    if op.outcome == "done":
                        self.check_contents(messages.rank, op, len(numbers))
                    numbers.append(len(numbers))
            for op in batch:
                op.memory[:] = [GARBAGE - 1] * len(op.memory)
                self.returned.append((messages.rank, [op.memory]))
                yield None
        self.has_ended[messages.rank] = True

    def check_message(self, rank: int, op: MessageOp) -> None:
        where = f"rank {rank}: {op.kind} of {len(op.memory)} with {op.peer}, tag {op.tag}, number {op.number}"
        eager = op.kind == "send" and len(op.memory) <= PAYLOAD
        if op.outcome == "ended":
            if not self.failed[0]:
                raise WrongError(f"{where}: raised that the group has ended, which it has not")
        elif op.outcome != ("mismatch" if op.wrong and not eager else "done"):
            raise WrongError(f"{where}: ended as {op.outcome}, and wrong is {op.wrong}")
        elif op.kind == "recv" and op.peer != ANY and not op.wrong:
            self.check_contents(rank, op, op.number)

    def check_contents(self, rank: int, op: MessageOp, number: int) -> None:
        if op.memory != contents(op.source, rank, op.tag, number, len(op.memory)):
            raise WrongError(f"rank {rank}: {op.memory} is not message {number} of rank {op.source}, tag {op.tag}")

    def ready(self) -> list[Lane]:
        lanes = super().ready()
        if lanes or not self.failed[0]:
            return lanes
        # The message of a rank that has left may be what a receive from any source waits for: its deadline ends that.
        for process, end in enumerate(self.ends):
            if not self.dead[process] and any(op.peer == op.source == ANY for op in end.receives):
                self.lanes.append(Lane(process, f"a deadline of rank {process}", end.member.abort(), brief=True))
                break
        return super().ready()

    def happen(self, failure: Failure) -> None:
        if failure.kind == "leave":
            self.leaves_early.add(failure.process)
        super().happen(failure)

    def leave(self, process: int, numbers: Sequence[int]) -> Steps:
        yield lambda: self.has_ended[process] or process in self.leaves_early
        yield from super().leave(process, numbers)


def contents(source: int, to: int, tag: int, number: int, count: int) -> list[int]:
    return [((source * 16 + to) * 16 + tag) * 10_000 + number * 100 + i for i in range(count)]


def random_programs(rng: random.Random, n: int, length: int) -> list[Program]:
    """By rank, batches of ops: all of a batch are posted before any is waited for."""
    n_batches = rng.randint(1, 3)
    programs: list[Program] = [[[] for _ in range(n_batches)] for _ in range(n)]
    sent: dict[tuple[int, int, int], int] = {}
    for _ in range(length):
        source, to = rng.randrange(n), rng.randrange(n)
        tag = rng.choice((0, 1, 2, 2) if source != to else (0, 1))
        count = 3 if tag == 2 else rng.choice((0, 1, 2, 3, 5, 7))  # tag 2 is for any source: all alike
        if tag == 2 and to % 2:
            count = 1
        number = sent[source, to, tag] = sent.get((source, to, tag), -1) + 1
        wrong = tag != 2 and rng.random() < 0.15
        memory = contents(source, to, tag, number, count)
        send = MessageOp("send", to, tag, "int", memory, number, wrong, lends=rng.random() < 0.5)
        longer, dtype = (rng.choice((0, 1)), "float") if wrong else (0, "int")
        recv = MessageOp("recv", ANY if tag == 2 else source, tag, dtype, [GARBAGE] * (count + longer), number, wrong)
        # Any source: all large ones in one batch, as a receive that takes what a later one was to get may leave a send
        # of its batch without one.
        batch = n_batches - 1 if tag == 2 and count > PAYLOAD else rng.randrange(n_batches)
        for rank, op in ((source, send), (to, recv)):
            programs[rank][batch].append(op)
    for program in programs:
        for index, batch_ops in enumerate(program):
            program[index] = shuffled(rng, batch_ops)
    number_anew(programs)
    return programs


def shuffled(rng: random.Random, ops: list[MessageOp]) -> list[MessageOp]:
    """In any order, but that of one (kind, peer, tag) stays."""
    keys = [(op.kind, op.peer, op.tag) for op in ops]
    rows = {key: iter([op for op in ops if (op.kind, op.peer, op.tag) == key]) for key in keys}
    rng.shuffle(keys)
    return [next(rows[key]) for key in keys]


def number_anew(programs: list[Program]) -> None:
    """Messages of a (source, to, tag) are numbered in the order posted, on both sides."""
    counts: dict[tuple[str, int, int, int], int] = {}
    for rank, program in enumerate(programs):
        for op in (op for batch in program for op in batch):
            key = (op.kind, rank, op.peer, op.tag)
            op.number = counts[key] = counts.get(key, -1) + 1
            if op.kind == "send":
                op.memory[:] = contents(rank, op.peer, op.tag, op.number, len(op.memory))


def message_world(n: int, collectives: Sequence[Batch], broken: str, rng: random.Random) -> MessageWorld:
    mail = Mail(Group(range(n), True, 0, Faults()), rng.choice((1, 1, 2)), broken)
    return MessageWorld(n, collectives, random_programs(rng, n, rng.randint(3, 6 * n)), mail, rng)
