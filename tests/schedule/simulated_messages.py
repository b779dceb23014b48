"""Point to point in the protocol, one load or store of one element at a time, beside the collectives of a group.

It follows csrc/communicator/point_to_point.cpp and core/packet_ring.h, with their names: a ring of packets for each
ordered pair, eager and announced messages, requests, data and refusals, matching in order, and the lock that a poster
and the thread that drives share. Rings and packets are tiny, so that messages span many and wait for room. A driver
sleeps on its doorbell and nothing but a ring, an abort or a rank that leaves wakes it, so a lost wake-up is a run in
which nobody can go on. `broken` leaves one rule out, to see that the checks notice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from schedule.simulated_group import Group, Member, Steps
from schedule.streams import GARBAGE, WrongError

Moved = Generator["Callable[[], bool] | None", None, bool]

PAYLOAD = 2  # elements of a packet
ANY = -1


@dataclass(eq=False)
class MessageOp:
    """outcome: None while it is pending, then "done", "mismatch" or "ended"."""

    kind: str  # "send" or "recv"
    peer: int
    tag: int
    dtype: str
    memory: list[int]
    number: int = 0  # which message of its (source, tag) a recv must get, where it names its source
    wrong: bool = False  # it meets one of another count or dtype
    lends: bool = False  # of a large send, device hx: the receiver copies out of `memory` itself
    source: int = ANY
    outcome: str | None = None

    def fits(self, source: int, tag: int) -> bool:
        return self.tag == tag and self.peer in (ANY, source)


@dataclass
class Packet:
    """A slot of a ring, or a copy of one."""

    kind: str = ""
    message: int = 0
    tag: int = 0
    dtype: str = ""
    count: int = 0
    payload: list[int] = field(default_factory=list)
    lent: MessageOp | None = None


@dataclass
class Message:
    """Arrived, and no receive fits yet."""

    number: int
    tag: int
    dtype: str
    count: int
    payload: list[int] | None = None  # of an eager one
    send: MessageOp | None = None  # where this rank sent it to itself
    lent: MessageOp | None = None


@dataclass
class Channel:
    """To and from one peer."""

    produced: int = 0
    consumed: int = 0
    next_message: int = 1
    replies: deque[tuple[str, int, MessageOp | None]] = field(default_factory=deque)  # and the recv that it ends
    sends: deque[MessageOp] = field(default_factory=deque)
    announced: dict[int, MessageOp] = field(default_factory=dict)
    streams: deque[tuple[MessageOp, int, list[int]]] = field(default_factory=deque)  # what is left of it
    arrived: list[Message] = field(default_factory=list)
    incoming: dict[int, tuple[MessageOp, list[int]]] = field(default_factory=dict)  # what has come of it
    refused: bool = False


class Mail:
    """The shared memory of point to point: rings by (from, to), counters by (their writer, the other), doorbells."""

    def __init__(self, group: Group, capacity: int, broken: str = "") -> None:
        n = group.world_size
        self.group, self.capacity, self.broken = group, capacity, broken
        self.rings = [[[Packet() for _ in range(capacity)] for _ in range(n)] for _ in range(n)]
        self.produced = [[0] * n for _ in range(n)]
        self.consumed = [[0] * n for _ in range(n)]
        self.sleeps = [False] * n
        self.rung = [0] * n


class PointToPoint:
    """One rank's end."""

    def __init__(self, mail: Mail, member: Member) -> None:
        self.mail, self.member, self.rank, self.broken = mail, member, member.rank, mail.broken
        self.n = member.group.world_size
        self.channels = [Channel() for _ in range(self.n)]
        self.receives: list[MessageOp] = []
        self.copies: list[tuple[int, Message, MessageOp]] = []  # to be made before the lock is given back
        self.n_pending = 0  # ops that have not ended, and replies that are not in a ring yet
        self.next_source = 0
        self.last_any = ANY
        self.locked = self.passed_by = False
        member.is_moving = lambda: self.n_pending > 0 or self.locked
        member.owes_replies = self.owes_replies

    # What any thread of the process does.

    def post(self, op: MessageOp) -> Moved:
        """False where it only told of an earlier send that was refused: the op was not taken."""
        yield from self.lock()
        ended = self.member.left or self.member.group.aborted[self.rank]
        if ended and self.broken != "taken after the end":
            op.outcome = "ended"
        elif op.peer != ANY and (yield from self.is_refused(op.peer)):
            self.locked = False
            return False
        else:
            self.n_pending += 1
            if op.kind == "send":
                self.channels[op.peer].sends.append(op)
            elif self.broken == "matched late" or not self.match_posted(op):
                self.receives.append(op)
            yield from self.copy_lent()
        self.locked = False
        yield from self.try_advance()
        yield None
        if self.passed_by and self.broken != "passed by":
            self.passed_by = False
            self.mail.rung[self.rank] += 1
        return True

    def lock(self) -> Steps:
        while self.locked:
            yield lambda: not self.locked
        self.locked = True

    def is_refused(self, peer: int) -> Moved:
        if peer != self.rank and (yield from self.drain(peer)):
            yield from self.ring(peer)
        channel = self.channels[peer]
        told, channel.refused = channel.refused, False
        return told

    def drive(self) -> Steps:
        """Moves messages, and sleeps where nothing moves."""
        group, mail = self.member.group, self.mail
        while not self.member.gone:
            if not self.n_pending:
                yield lambda: self.n_pending > 0 or self.member.gone
                continue
            members = self.n_members()
            if self.broken == "looks before it announces" and (yield from self.try_advance()):
                continue
            yield None
            mail.sleeps[self.rank] = True
            yield None
            rung = mail.rung[self.rank]
            moved = self.broken != "looks before it announces" and (yield from self.try_advance())
            if not moved and self.n_pending:
                yield (
                    lambda rung=rung, members=members: (
                        mail.rung[self.rank] != rung or group.aborted[self.rank] or self.n_members() != members
                    )
                )
            mail.sleeps[self.rank] = False

    def owes_replies(self) -> bool:
        """A send ends by its reply, which may have to wait for room in the ring."""
        if self.broken == "leaves with replies to give":
            return False
        return any(channel.replies and self.is_member(peer) for peer, channel in enumerate(self.channels))

    def is_member(self, peer: int) -> bool:
        return self.member.group.membership[peer]

    def n_members(self) -> int:
        """Of those whose leaving is seen in memory."""
        return sum(self.member.group.membership[peer] for peer in self.member.peers)

    def try_advance(self) -> Moved:
        if self.locked:
            self.passed_by = True
            yield None
            if self.locked:  # whoever holds the lock rings when it is through
                return False
        self.locked = True
        moved = (yield from self.advance()) if self.n_pending else False
        self.locked = False
        return moved

    def advance(self) -> Moved:
        moved = self.send_to_self()
        for peer in range(self.n):
            if peer == self.rank:
                continue
            drained = yield from self.drain(peer)
            pumped = yield from self.pump(peer)
            if pumped or (drained and self.broken != "room is not rung for"):
                yield from self.ring(peer)
            moved = moved or drained or pumped
        if self.broken == "matched late":
            self.receives = [op for op in self.receives if not self.match_posted(op)]
            yield from self.copy_lent()
        yield from self.check_failures()
        yield None
        if self.member.group.aborted[self.rank] and self.broken != "pending after the end":
            self.drop_all()
        return moved

    def ring(self, peer: int) -> Steps:
        yield None
        if self.mail.sleeps[peer] and self.broken != "no ring":
            yield None
            self.mail.rung[peer] += 1

    # Under the lock.

    def drain(self, peer: int) -> Moved:
        channel, mail = self.channels[peer], self.mail
        yield None
        self.expect(not mail.group.given_back[peer], "a counter was read that had been given back")
        produced = mail.produced[peer][self.rank]
        if produced == channel.consumed:
            return False
        self.expect(produced - channel.consumed <= mail.capacity, "more packets than the ring holds")
        while channel.consumed != produced:
            slot = mail.rings[peer][self.rank][channel.consumed % mail.capacity]
            if self.broken == "consumed before copied":
                mail.consumed[self.rank][peer] = channel.consumed + 1
            yield None
            packet = Packet(slot.kind, slot.message, slot.tag, slot.dtype, slot.count, lent=slot.lent)
            for index in range(len(slot.payload)):
                yield None
                packet.payload.append(slot.payload[index] if index < len(slot.payload) else GARBAGE)
            self.take(peer, packet)
            yield from self.copy_lent()
            channel.consumed += 1
            yield None
            mail.consumed[self.rank][peer] = channel.consumed
        return True

    def take(self, peer: int, packet: Packet) -> None:
        channel, number = self.channels[peer], packet.message
        if packet.kind in ("eager", "announce"):
            payload = packet.payload if packet.kind == "eager" else None
            self.arrive(peer, Message(number, packet.tag, packet.dtype, packet.count, payload, lent=packet.lent))
        elif packet.kind == "taken":
            self.expect(number in channel.announced, "what was not announced has been taken")
            send = channel.announced.pop(number)
            if self.broken != "not lent":
                self.end(send, "done")
        elif packet.kind == "request":
            self.expect(number in channel.announced, "a request for what was not announced")
            send = channel.announced.pop(number)
            channel.streams.append((send, number, send.memory if self.broken == "ends early" else list(send.memory)))
            if self.broken == "ends early":
                self.end(send, "done")
        elif packet.kind == "data":
            self.expect(number in channel.incoming, "data that was not requested")
            recv, received = channel.incoming[number]
            received += packet.payload
            self.expect(len(received) <= len(recv.memory), "too much data")
            if len(received) == len(recv.memory):
                recv.memory[:] = received
                self.end(recv, "done")
                del channel.incoming[number]
        else:
            self.expect(packet.kind == "refuse", f"a packet of kind {packet.kind!r}")
            if number in channel.announced:
                self.end(channel.announced.pop(number), "mismatch")
            else:
                channel.refused = True

    def arrive(self, source: int, message: Message) -> None:
        order = reversed(self.receives) if self.broken == "the last receive first" else self.receives
        for recv in order:
            if recv.fits(source, message.tag):
                self.receives.remove(recv)
                self.deliver(source, message, recv)
                return
        self.channels[source].arrived.append(message)
        if self.broken == "requests what is not posted" and message.payload is None and message.send is None:
            self.reply(source, "request", message.number)

    def match_posted(self, recv: MessageOp) -> bool:
        def found(source: int) -> list[Message]:
            return [m for m in self.channels[source].arrived if recv.fits(source, m.tag)]

        sources = [recv.peer] if recv.peer != ANY else [(self.next_source + i) % self.n for i in range(self.n)]
        sources = [source for source in sources if found(source)]
        if not sources:
            return False
        source = sources[0]
        if recv.peer == ANY:
            self.expect(source != self.last_any or len(sources) == 1, "a source starves the others")
            self.last_any = source
            if self.broken != "no rotation":
                self.next_source = (source + 1) % self.n
        message = found(source)[-1 if self.broken == "the last message first" else 0]
        self.channels[source].arrived.remove(message)
        self.deliver(source, message, recv)
        return True

    def deliver(self, source: int, message: Message, recv: MessageOp) -> None:
        recv.source = source
        if (message.dtype, message.count) != (recv.dtype, len(recv.memory)):
            if message.send:
                self.end(message.send, "mismatch")
            elif source == self.rank:
                self.channels[source].refused = True
            elif self.broken != "no refusal":
                self.reply(source, "refuse", message.number)
            self.end(recv, "mismatch")
        elif message.send or message.payload is not None:
            recv.memory[:] = message.send.memory if message.send else message.payload or []
            if message.send:
                self.end(message.send, "done")
            self.end(recv, "done")
        elif message.lent:
            self.copies.append((source, message, recv))
        else:
            self.channels[source].incoming[message.number] = (recv, [])
            self.reply(source, "request", message.number)

    def copy_lent(self) -> Steps:
        for source, message, recv in self.copies:
            assert message.lent
            for index in range(len(recv.memory)):
                yield None
                recv.memory[index] = message.lent.memory[index]
            ends_here = self.broken == "nobody hears that it was taken"
            if ends_here:
                self.end(recv, "done")
            self.reply(source, "taken", message.number, None if ends_here else recv)
        self.copies = []

    def reply(self, peer: int, kind: str, number: int, recv: MessageOp | None = None) -> None:
        self.n_pending += 1
        self.channels[peer].replies.append((kind, number, recv))

    def send_to_self(self) -> bool:
        channel = self.channels[self.rank]
        moved = bool(channel.sends)
        while channel.sends:
            send = channel.sends.popleft()
            message = Message(channel.next_message, send.tag, send.dtype, len(send.memory))
            channel.next_message += 1
            if len(send.memory) <= PAYLOAD:
                message.payload = list(send.memory)
                self.end(send, "done")
            else:
                message.send = send
            self.arrive(self.rank, message)
        return moved

    def pump(self, peer: int) -> Moved:
        channel, mail, moved = self.channels[peer], self.mail, False
        room = mail.capacity + (self.broken == "one packet too many")
        while True:
            yield None
            if channel.produced - mail.consumed[peer][self.rank] >= room and self.broken != "no look for room":
                return moved
            packet = self.next_packet(channel)
            if packet is None:
                return moved
            moved = True
            channel.produced += 1
            if self.broken == "published before written":
                mail.produced[self.rank][peer] = channel.produced
            slot = mail.rings[self.rank][peer][(channel.produced - 1) % mail.capacity]
            yield None
            slot.kind, slot.message, slot.tag = packet.kind, packet.message, packet.tag
            slot.dtype, slot.count, slot.payload = packet.dtype, packet.count, [GARBAGE] * len(packet.payload)
            slot.lent = packet.lent
            for index, element in enumerate(packet.payload):
                yield None
                slot.payload[index] = element
            yield None
            mail.produced[self.rank][peer] = channel.produced

    def next_packet(self, channel: Channel) -> Packet | None:
        if channel.replies:
            self.n_pending -= 1
            kind, number, recv = channel.replies.popleft()
            if recv:  # looked at after the copy
                self.end(recv, "ended" if self.member.group.aborted[self.rank] else "done")
            return Packet(kind, number)
        if channel.sends:
            send = channel.sends.popleft()
            number, channel.next_message = channel.next_message, channel.next_message + 1
            eager = len(send.memory) <= PAYLOAD
            packet = Packet("eager" if eager else "announce", number, send.tag, send.dtype, len(send.memory))
            if eager:
                packet.payload = list(send.memory)
                self.end(send, "done")
            else:
                channel.announced[number] = send
                packet.lent = send if send.lends else None
                if packet.lent and self.broken == "not lent":
                    self.end(send, "done")
            return packet
        if not channel.streams:
            return None
        send, number, rest = channel.streams.popleft()
        if len(rest) > PAYLOAD:
            channel.streams.appendleft((send, number, rest[PAYLOAD:]))
        elif self.broken != "ends early":
            self.end(send, "done")
        return Packet("data", number, payload=rest[:PAYLOAD])

    def end(self, op: MessageOp, outcome: str) -> None:
        op.outcome = outcome
        self.n_pending -= 1

    def pending(self) -> list[MessageOp]:
        ops = list(self.receives)
        for channel in self.channels:
            ops += [*channel.sends, *channel.announced.values(), *(send for send, _, _ in channel.streams)]
            ops += [recv for recv, _ in channel.incoming.values()]
            ops += [message.send for message in channel.arrived if message.send]
            ops += [recv for _, _, recv in channel.replies if recv]
        return ops

    def drop_all(self) -> None:
        lent = [op for channel in self.channels for op in channel.announced.values() if op.lends]
        if lent and self.broken != "peers are not told":
            for peer in self.member.peers:
                self.member.group.aborted[peer] = True
        for op in self.pending():
            self.end(op, "ended")
        self.n_pending -= sum(len(channel.replies) for channel in self.channels)
        self.receives = []
        self.channels = [
            Channel(old.produced, old.consumed, old.next_message, refused=old.refused) for old in self.channels
        ]

    def check_failures(self) -> Steps:
        for op in self.pending():
            peer = op.peer if op.source == ANY or self.broken == "the source is forgotten" else op.source
            others = [each for each in range(self.n) if each != self.rank]
            for each in others if peer == ANY else [peer]:
                if not (yield from self.is_gone(each)):
                    break
            else:
                if self.broken != "no goodbye":
                    yield from self.member.abort()
                return

    def is_gone(self, peer: int) -> Moved:
        """Has it left, and will nothing more come? Membership before the ring: it puts in all it sends, and leaves."""
        if peer == self.rank:
            return False
        group = self.member.group
        drained = [False, False]
        for look in (1, 0) if self.broken == "the ring before membership" else (0, 1):
            yield None
            if look == 0:
                drained[0] = not group.membership[peer]
            else:
                drained[1] = self.mail.produced[peer][self.rank] == self.channels[peer].consumed
        return all(drained)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise WrongError(f"rank {self.rank}: {what}")
