"""Point to point between hosts: the packets of simulated_messages.py in frames instead of a ring in shared memory.

The receiver has room for as many packets of a peer as a ring has, and says when there is room again; whatever comes
rings the process's own doorbell. Tensors are lent within a host only.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from schedule.conversations import MessageWorld, random_programs
from schedule.simulated_crossing import CrossingMember
from schedule.simulated_group import Faults, Hosts, Member, Steps
from schedule.simulated_hosts import HostsWorld, group_on
from schedule.simulated_messages import Mail, Moved, Packet, PointToPoint
from schedule.simulated_processes import Batch
from schedule.simulated_wire import Frame


class CrossingPointToPoint(PointToPoint):
    member: CrossingMember

    def __init__(self, mail: Mail, member: CrossingMember) -> None:
        super().__init__(mail, member)
        self.came: list[deque[Packet]] = [deque() for _ in range(self.n)]
        self.room_for = [0] * self.n  # packets that the peer has taken out
        member.take_packet = self.take_frame

    def take_frame(self, frame: Frame) -> None:
        if frame.kind == "packet":
            self.came[frame.source].append(frame.content)
            self.expect(len(self.came[frame.source]) <= self.mail.capacity, "more packets than there is room for")
        elif frame.kind == "room":
            self.room_for[frame.source] += 1
        if self.broken != "frames do not ring" and not (
            self.broken == "leaving does not ring" and frame.kind == "left"
        ):
            self.mail.rung[self.rank] += 1

    def is_remote(self, peer: int) -> bool:
        return peer in self.member.remote

    def is_member(self, peer: int) -> bool:
        return peer not in self.member.remote_left if self.is_remote(peer) else super().is_member(peer)

    def ring(self, peer: int) -> Steps:
        if not self.is_remote(peer):
            yield from super().ring(peer)

    def drain(self, peer: int) -> Moved:
        if not self.is_remote(peer):
            return (yield from super().drain(peer))
        came = self.came[peer]
        yield None
        moved = bool(came)
        while came:
            packet = came.popleft()
            yield None
            self.take(peer, packet)
            yield from self.copy_lent()
            self.channels[peer].consumed += 1
            if self.broken != "no room is told of":
                self.member.tell_rank(peer, Frame("room", self.member.number, self.rank))
        return moved

    def pump(self, peer: int) -> Moved:
        if not self.is_remote(peer):
            return (yield from super().pump(peer))
        channel, moved = self.channels[peer], False
        while channel.produced - self.room_for[peer] < self.mail.capacity or self.broken == "no look for room":
            packet = self.next_packet(channel)
            if packet is None:
                break
            moved = True
            channel.produced += 1
            content = replace(packet, payload=list(packet.payload))
            self.member.tell_rank(peer, Frame("packet", self.member.number, self.rank, content=content))
            yield None
        yield None
        return moved

    def is_gone(self, peer: int) -> Moved:
        if not self.is_remote(peer):
            return (yield from super().is_gone(peer))
        yield None
        left = peer in self.member.remote_left
        yield None
        return left and (not self.came[peer] or self.broken == "gone with packets to take")


class CrossingMessageWorld(MessageWorld, HostsWorld):
    def end_of(self, mail: Mail, member: Member) -> PointToPoint:
        assert isinstance(member, CrossingMember)
        return CrossingPointToPoint(mail, member)


def message_world_on(
    hosts: Hosts, collectives: Sequence[Batch], broken: str, rng: random.Random
) -> CrossingMessageWorld:
    n = len(hosts)
    mail = Mail(group_on(hosts, range(n), True, 0, Faults()), rng.choice((1, 1, 2)), broken)
    programs = random_programs(rng, n, rng.randint(3, 6 * n))
    for rank, program in enumerate(programs):
        for op in (op for batch in program for op in batch):
            op.lends = op.lends and hosts[rank] == hosts[op.peer]
    return CrossingMessageWorld(n, collectives, programs, mail, rng, hosts=hosts, n_credits=rng.choice((1, 1, 2)))
