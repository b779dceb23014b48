"""A member of a group on several hosts, one load, store or frame at a time: what simulated_group.py is on one host.

Ranks of a host share memory as there, and enter every op together. The leader of a host, its first rank, then tells the
other leaders what its ranks call (VERDICT), and once it knows of all hosts whether they agree, its own ranks by a word;
nobody stores to a user's memory before. Messages carry sequence and fingerprint: what comes for an op that is over, or
that this rank calls otherwise, is dropped; what comes early keeps its credit until then. A send never waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator

from schedule.simulated_group import (
    EndedError,
    Group,
    Member,
    Op,
    Steps,
    Verdict,
    Window,
    arrival,
    instructions_of,
    plan_of,
)
from schedule.simulated_wire import Frame, Wire
from schedule.streams import GARBAGE, Buffers, Call, WrongError

from hxcomm.schedule.plan import Agree, Enter, Operand, Publish, Receive, TransferInstruction, Wait


class MismatchedError(Exception):
    """The hosts do not agree on the op: MismatchError in hxcomm."""


class CrossingMember(Member):
    """sequence, fingerprint: of the window that this rank is in, or was in last (is_open says which)."""

    def __init__(self, group: Group, rank: int, number: int, wire: Wire) -> None:
        super().__init__(group, rank)
        assert group.hosts is not None
        self.number, self.wire, self.broken = number, wire, group.faults.across_hosts
        self.process = group.processes[rank]
        self.local = [each for each, host in enumerate(group.hosts) if host == group.hosts[rank]]
        self.remote = [each for each in range(group.world_size) if each not in self.local]
        self.peers = self.local
        self.leader = self.local[0]
        self.other_leaders = [rank for rank in self.remote if rank == group.hosts.index(group.hosts[rank])]
        self.op: Op | None = None
        self.first = -1  # the sequence of the op's first window
        self.fingerprint: object = None
        self.is_open = False
        self.n_messages = 0
        self.messages: dict[int, list[int]] = {}  # of this window
        self.early: dict[int, deque[Frame]] = {each: deque() for each in self.remote}
        self.remote_left: set[int] = set()
        self.take_packet: Callable[[Frame], None] = lambda frame: None  # point to point
        # A leader's: by sequence and leader. judging: the op whose outcome it owes its host.
        self.verdicts: dict[tuple[int, int], object] = {}
        self.called: dict[tuple[int, int], dict[int, Call]] = {}
        self.judging: int | None = None
        self.told_calls = self.is_at_verdict = False

    # What comes from other hosts.

    def take(self, frame: Frame) -> None:
        if self.gone:
            return
        if frame.kind == "message":
            self.take_message(frame)
        elif frame.kind == "credit":
            self.wire.returned(self.number, self.process, self.group.processes[frame.source])
        elif frame.kind == "verdict":
            self.verdicts[frame.sequence, frame.source] = frame.fingerprint
            if frame.content:
                self.called[frame.sequence, frame.source] = frame.content
        elif frame.kind == "called":
            self.called[frame.sequence, frame.source] = frame.content
        elif frame.kind in ("packet", "room"):
            self.take_packet(frame)
        elif frame.kind == "left":
            self.remote_left.add(frame.source)
            self.take_packet(frame)
        else:
            assert frame.kind == "abort"
            if not self.left:
                self.group.aborted[self.rank] = True

    def take_message(self, frame: Frame) -> None:
        is_current = self.is_open and frame.sequence == self.sequence
        if frame.sequence > self.sequence:
            self.early[frame.source].append(frame)
            if len(self.early[frame.source]) > self.wire.n_credits:
                raise WrongError(f"rank {self.rank} keeps more frames of rank {frame.source} than there are credits")
        elif is_current and (frame.fingerprint == self.fingerprint or self.broken == "no fingerprints in frames"):
            if frame.number in self.messages or frame.number >= self.n_messages:
                raise WrongError(f"rank {self.rank} has no place for message {frame.number} of rank {frame.source}")
            self.messages[frame.number] = frame.content
            self.give_credit(frame.source)
        elif self.broken not in ("dropped frames keep their credit", "frames of failed ops are kept"):
            self.give_credit(frame.source)

    def give_credit(self, peer: int) -> None:
        self.tell_rank(peer, Frame("credit", self.number, self.rank))

    def tell_rank(self, peer: int, frame: Frame) -> None:
        self.wire.fly(frame, self.process, self.group.processes[peer])

    # One op.

    def execute(self, op: Op) -> Generator[Callable[[], bool] | None, None, str]:
        if not self.group.faults.carry_on:
            yield from self.look_at_abort()
        self.op, self.first = op, self.sequence + 1
        self.told_calls = self.is_at_verdict = False
        try:
            if op.call.refused:
                yield from self.refuse()
                raise WrongError(f"rank {self.rank}: the hosts agreed on a refused call")
            yield from self.windows(op.call, op.buffers)
            if not self.group.private and not self.group.faults.no_last_look:
                yield from self.look_at_abort()
            return "done"
        except MismatchedError:
            return "refused" if op.call.refused else "mismatch"
        finally:
            self.is_open = self.broken == "an op that ended is not over"
            self.messages.clear()
            self.n_messages = 0  # their memory was the op's
            self.wire.drop_unsent(self.number, self.process)
            self.judging = None
            self.verdicts = {key: each for key, each in self.verdicts.items() if key[0] > self.first}
            self.called = {key: each for key, each in self.called.items() if key[0] > self.first}

    def open_window(self, fingerprint: object, n_messages: int) -> None:
        self.sequence += 1
        self.fingerprint, self.n_messages, self.is_open = fingerprint, n_messages, True
        self.messages.clear()
        for frames in self.early.values():
            if self.broken == "frames of failed ops are kept" and frames and frames[0].sequence < self.sequence:
                continue
            while frames and frames[0].sequence <= self.sequence:
                self.take_message(frames.popleft())

    def refuse(self) -> Steps:
        """Its user knows at once; the hosts have yet to learn of it, and this rank's leader may be itself."""
        assert self.op is not None
        self.open_window(("refused", self.first), 0)
        self.write_entry(("refused", self.first), self.op.buffers, self.op.call)
        yield None
        self.group.progress[self.rank] = arrival(self.sequence)
        self.op.outcome = "refused"
        if self.broken == "a refused leader returns at once":
            raise MismatchedError
        if self.rank == self.leader:
            for peer in self.local:
                yield from self.until(peer, arrival(self.sequence))
            self.send_verdict(None)
        yield from self.agree()

    def write_entry(self, fingerprint: object, buffers: Buffers, call: Call) -> None:
        self.group.fingerprint[self.rank][self.sequence & 1] = fingerprint
        self.group.descriptor[self.rank][self.sequence & 1] = (buffers, call)

    def windows(self, call: Call, buffers: Buffers) -> Verdict:
        group, low, longest = self.group, 0, 1
        key = (call.op, call.algorithm, call.root)
        plan = plan_of(key, group.world_size, self.rank, group.private, group.hosts)
        instructions = instructions_of(key, group.world_size, self.rank, group.private, group.hosts)
        fingerprint = (*call.fingerprint(), self.first)
        while low < longest:
            self.open_window(fingerprint, plan.header().messages)
            window = CrossingWindow(self, plan, call, buffers, low)
            for index, instruction in enumerate(instructions):
                if isinstance(instruction, TransferInstruction):
                    yield from window.transfer(instruction)
                elif isinstance(instruction, Wait):
                    if group.faults.wait == (call.op, call.algorithm, self.rank, index):
                        continue
                    yield from self.until(instruction.peer, (self.sequence << 16) + instruction.round + 1)
                elif isinstance(instruction, Publish):
                    yield None
                    group.progress[self.rank] = (self.sequence << 16) + instruction.round + 1
                elif isinstance(instruction, Receive):
                    yield from self.receive(instruction)
                elif isinstance(instruction, Agree):
                    if low == 0 and self.broken != "stores before the verdict":
                        yield from self.agree()
                        longest = self.longest(call)
                elif isinstance(instruction, Enter):
                    self.write_entry((fingerprint if low == 0 else None), buffers, call)
                    yield from self.enter_host(compare=low == 0)
                    window.entered()
            if self.broken != "ends with unsent messages":
                yield from self.wait(lambda: not self.unsent_to(), lambda: self.misses(self.unsent_to()))
            low += call.window
        return True

    def longest(self, call: Call) -> int:
        """Elements of the longest block on any rank, which all have to make as many windows for."""
        if call.op != "all_to_all":
            return max(map(max, call.counts))
        sequence, called = self.group.called[self.leader]
        if sequence != self.first or len(called) != self.group.world_size:
            raise WrongError(f"rank {self.rank} does not find the counts of other hosts in its leader's memory")
        return max(max(row) for each in called.values() for row in each.counts)

    def enter_host(self, compare: bool) -> Steps:
        group = self.group
        yield None
        group.progress[self.rank] = arrival(self.sequence)
        mine = group.fingerprint[self.rank][self.sequence & 1]
        early = self.broken == "a verdict before all have arrived"
        if early and compare and self.rank == self.leader:
            self.send_verdict(mine)
        for peer in self.local:
            yield from self.until(peer, arrival(self.sequence))
        if not compare:
            return
        alike = True
        for peer in self.local:
            yield None
            alike = alike and group.fingerprint[peer][self.sequence & 1] == mine
        if not alike and self.broken == "no verdict of a host that disagrees":
            raise MismatchedError
        if self.rank == self.leader and not early:
            self.send_verdict(mine if alike else None)
        if not alike:
            yield from self.agree()
            raise WrongError(f"rank {self.rank}: the hosts agreed, but the ranks of this one do not")

    def receive(self, instruction: Receive) -> Steps:
        peer, number = instruction
        yield from self.wait(lambda: number in self.messages, lambda: self.misses([peer]))

    def unsent_to(self) -> list[int]:
        processes = set(self.wire.unsent(self.number, self.process))
        return [rank for rank in self.remote if self.group.processes[rank] in processes]

    def send(self, peer: int, number: int, content: list[int]) -> None:
        frame = Frame("message", self.number, self.rank, self.sequence, self.fingerprint, number, content)
        self.wire.send(frame, self.process, self.group.processes[peer])

    # Agreeing.

    def here(self) -> dict[int, Call]:
        """What the ranks of this host call, as their descriptors say."""
        described = {rank: self.group.descriptor[rank][self.first & 1] for rank in self.local}
        return {rank: each[1] for rank, each in described.items() if each is not None}

    def send_verdict(self, fingerprint: object) -> None:
        assert self.op is not None
        self.judging = self.first
        self.verdicts[self.first, self.rank] = fingerprint
        uneven = self.op.call.op == "all_to_all" and fingerprint is not None
        for leader in self.other_leaders:
            content = self.here() if uneven else None
            self.tell_rank(leader, Frame("verdict", self.number, self.rank, self.first, fingerprint, content=content))

    def hosts_agree(self) -> bool | None:
        """None while a leader has not sent its verdict."""
        keys = [(self.first, leader) for leader in (self.rank, *self.other_leaders)]
        if any(key not in self.verdicts for key in keys):
            return None
        words = [self.verdicts[key] for key in keys]
        return words[0] is not None and all(word == words[0] for word in words)

    def has_all_calls(self) -> bool:
        return all((self.first, leader) in self.called for leader in self.other_leaders)

    def has_duty(self) -> bool:
        if self.broken == "a leader does its duty at the verdict only" and not self.is_at_verdict:
            return False
        agree = None if self.judging is None else self.hosts_agree()
        return agree is not None and (agree or not self.told_calls or self.has_all_calls())

    def tend(self) -> Steps:
        """A leader's duty, wherever in the op it is blocked, and in half of the runs whenever a frame asks for it."""
        if not self.has_duty():
            return
        agree = self.hosts_agree()
        if not agree and not self.told_calls:
            self.told_calls = True
            for leader in self.other_leaders:
                content = self.here()
                self.tell_rank(leader, Frame("called", self.number, self.rank, self.first, content=content))
        if not agree and not self.has_all_calls():
            return
        word = self.first * 2 + bool(agree)
        self.judging = None
        self.aborting += 1  # nor may it leave in the middle of this
        called = self.here()
        for leader in self.other_leaders:
            called |= self.called.get((self.first, leader), {})
        if self.broken == "the word before the calls":
            self.group.verdict[self.rank] = word
        yield None
        self.group.called[self.rank] = (word >> 1, called)
        yield None
        self.group.verdict[self.rank] = word
        self.aborting -= 1

    def agree(self) -> Steps:
        verdict, leader = self.group.verdict, self.leader
        self.is_at_verdict = True
        yield from self.wait(lambda: verdict[leader] >> 1 == self.first, lambda: not self.group.membership[leader])
        yield from self.look_at_verdict()

    def look_at_verdict(self) -> Steps:
        yield None
        if self.group.verdict[self.leader] != self.first * 2:
            return
        assert self.op is not None
        sequence, called = self.group.called[self.leader]
        if sequence != self.first or called != dict(enumerate(self.op.step.calls)):
            raise WrongError(f"rank {self.rank} does not find in its leader's memory what all ranks called")
        raise MismatchedError

    # Waiting.

    def until(self, peer: int, value: int) -> Steps:
        group = self.group
        yield from self.wait(lambda: group.progress[peer] >= value, lambda: not group.membership[peer])

    def misses(self, peers: list[int]) -> bool:
        """Has a rank of another host left that this one waits for? It may have left because the hosts do not agree."""
        agreed = self.group.verdict[self.leader] == self.first * 2 + 1
        if self.broken == "left before the verdict":
            agreed = True
        return agreed and not self.remote_left.isdisjoint(peers)

    def misses_leader(self) -> bool:
        if self.judging is None:
            return False
        missing = self.called if self.hosts_agree() is False else self.verdicts
        return any(leader in self.remote_left and (self.first, leader) not in missing for leader in self.other_leaders)

    def wait(self, ready: Callable[[], bool], missed: Callable[[], bool]) -> Steps:
        """Until `ready`, which is one load. `missed`: whether someone has left who would have to make it so."""
        group = self.group
        yield None
        while not ready():
            yield from self.look_at_abort()
            yield from self.tend()
            if self.broken == "the verdict before membership":
                yield from self.look_at_verdict()
            yield None
            left = missed() or self.misses_leader()
            yield None
            if ready():
                return
            # Whoever left after a mismatch had seen the verdict, so it must be looked at after membership.
            if self.broken not in ("the verdict before membership", "blocked ranks look at no verdict"):
                yield from self.look_at_verdict()
            if left and self.broken != "no goodbye":
                yield from self.abort()
                raise EndedError
            yield (
                lambda: (
                    ready()
                    or group.aborted[self.rank]
                    or ((missed() or self.misses_leader()) and self.broken != "no goodbye")
                    or (
                        group.verdict[self.leader] == self.first * 2
                        and self.broken != "blocked ranks look at no verdict"
                    )
                    or self.has_duty()
                )
            )

    # Ending.

    def tell(self) -> Steps:
        yield from super().tell()
        for peer in self.remote:
            yield None
            if peer not in self.remote_left and self.broken != "aborts stay at home":
                self.tell_rank(peer, Frame("abort", self.number, self.rank))

    def leave(self) -> Steps:
        yield from super().leave()
        for peer in self.remote:
            yield None
            self.tell_rank(peer, Frame("left", self.number, self.rank))

    def owes(self) -> bool:
        """A leader also the verdict on calls that were refused here: other hosts wait for it."""
        only_refused = bool(self.queue) and all(op.call.refused for op in self.queue)
        return super().owes() or (self.rank == self.leader and only_refused)


class CrossingWindow(Window):
    member: CrossingMember

    def place(self, operand: Operand) -> tuple[list[int], int]:
        member = self.member
        if operand.buffer != "message":
            if operand.rank not in member.local:
                raise WrongError(f"rank {member.rank} touches memory of rank {operand.rank}, on another host")
            return super().place(operand)
        if operand.rank != member.rank:
            return self.outgoing, 0
        message = member.messages[operand.chunk]
        if len(message) != len(self.outgoing):
            raise WrongError(f"rank {member.rank}: a message of {len(message)}, not {len(self.outgoing)} elements")
        return message, 0

    def transfer(self, instruction: TransferInstruction) -> Steps:
        member = self.member
        _, first, end = self.extent(member.rank, instruction.count_buffer, instruction.count_chunk)
        self.outgoing = [GARBAGE] * (end - first)
        yield from super().transfer(instruction)
        sent = [operand for operand in instruction.destinations if operand.buffer == "message"]
        # Peers' tensors: one whose op failed in the meantime has set the word before it told its user.
        if sent and not member.group.private and member.broken != "no look before sending":
            yield from member.look_at_abort()
        for operand in sent:
            member.send(operand.rank, operand.chunk, self.outgoing)
            yield None
            if member.broken == "sends wait":
                member.wire.blocked[member.process] = member
                yield lambda: not member.unsent_to() or member.group.aborted[member.rank]
                member.wire.blocked.pop(member.process)
