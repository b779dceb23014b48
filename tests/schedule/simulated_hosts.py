"""Processes on several hosts, whose users call collectives on groups that lie on one host or on many."""

from __future__ import annotations

import random
from collections.abc import Sequence

from schedule.layouts import layouts, renumbered
from schedule.simulated_crossing import CrossingMember
from schedule.simulated_group import Faults, Group, Hosts, Member, Steps
from schedule.simulated_processes import Batch, Lane, World
from schedule.simulated_wire import Wire
from schedule.streams import Step, random_step


class HostsWorld(World):
    """hosts: of the processes. Each has a thread that takes what other hosts send."""

    def __init__(
        self, groups: Sequence[Group], batches: Sequence[Batch], rng: random.Random, hosts: Hosts, n_credits: int
    ) -> None:
        self.hosts = hosts
        self.is_prompt = rng.random() < 0.5  # who takes frames also does a leader's duty
        self.wire = Wire(len(hosts), n_credits, rng, groups[0].faults.across_hosts)
        super().__init__(groups, batches, rng)
        self.priorities = self.n + 1  # the network has one of its own
        self.lanes.append(Lane(self.n, "the network", self.wire.carry(), endless=True))
        self.lanes += [Lane(p, f"the wire of process {p}", self.receive(p), endless=True) for p in range(self.n)]

    def member_of(self, number: int, rank: int) -> Member:
        group = self.groups[number]
        return Member(group, rank) if group.hosts is None else CrossingMember(group, rank, number, self.wire)

    def receive(self, process: int) -> Steps:
        inbox = self.wire.inbox[process]
        while True:
            yield lambda: bool(inbox)
            if not inbox:
                continue
            frame = inbox.popleft()
            if frame.kind == "lost":
                yield from self.lose(process, frame.source)
            else:
                member = self.members[frame.group][process]
                assert isinstance(member, CrossingMember)
                member.take(frame)
                if self.is_prompt:
                    yield from member.tend()

    def lose(self, process: int, victim: int) -> Steps:
        """The connection has ended, after all that came through it."""
        for members in self.members:
            if process in members and victim in members:
                member = members[process]
                if not (isinstance(member, CrossingMember) and members[victim].rank in member.remote_left):
                    yield from member.abort()

    def watchers(self, victim: int) -> Sequence[int]:
        return [process for process in range(self.n) if self.hosts[process] == self.hosts[victim]]

    def die(self, process: int) -> None:
        super().die(process)
        self.wire.die(process, (p for p in range(self.n) if self.hosts[p] != self.hosts[process] and not self.dead[p]))

    def ready(self) -> list[Lane]:
        lanes = super().ready()
        if not self.wire.blocked:
            return lanes
        blocked = self.wire.blocked
        return [lane for lane in lanes if lane.member is None or blocked.get(lane.process, lane.member) is lane.member]


def group_on(hosts: Hosts, processes: Sequence[int], private: bool, first_sequence: int, faults: Faults) -> Group:
    here = renumbered(hosts[process] for process in processes)
    return Group(processes, private, first_sequence, faults, here if max(here) > 0 else None)


def random_hosts(rng: random.Random, n: int) -> Hosts:
    return rng.choice(layouts(n)[1:])


def one_group_on(
    hosts: Hosts, private: bool, faults: Faults, stream: Sequence[Step], rng: random.Random, n_credits: int
) -> HostsWorld:
    group = group_on(hosts, range(len(hosts)), private, rng.choice((0, 1, 2**32 - 2)), faults)
    return HostsWorld([group], [[(0, step)] for step in stream], rng, hosts, n_credits)


def several_groups_on(hosts: Hosts, private: bool, faults: Faults, rng: random.Random, n_credits: int) -> HostsWorld:
    """As several_groups: of all processes, of the same in another order, of some."""
    n = len(hosts)
    members = [range(n), rng.sample(range(n), n), rng.sample(range(n), rng.randint(2, n))]
    groups = [group_on(hosts, each, private, rng.choice((0, 1, 2**32 - 2)), faults) for each in members]

    def step(number: int) -> tuple[int, Step]:
        kind = rng.choice(("alike", "alike", "alike", "alike", "mismatch", "refused"))
        return number, random_step(rng, groups[number].world_size, kind)

    batches = [[step(rng.randrange(len(groups))) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 3))]
    return HostsWorld(groups, batches, rng, hosts, n_credits)
