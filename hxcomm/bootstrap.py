"""How the ranks of a new group find each other: hellos over a meeting, then shared memory pair by pair.

A meeting is a key-value store, or notes in memory (lobby.py). What it brings is an untrusted hint: hellos have a strict
schema and bounds, and membership is proved by the handshake (same user, nonce). Nothing here waits without a deadline.
Knows nothing of torch: a store is anything with `set`, `get`, `add` and `check`.
"""

from __future__ import annotations

import atexit
import functools
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import msgpack

from hxcomm import _core, environment, segment_contents

# Address space, not memory: what is allocated in it is committed, the rest costs nothing.
SEGMENT_BYTES = 16 << 30
HANDSHAKE_TIMEOUT_MS = 10_000
_MAX_HELLO_BYTES = 4096
DECLINED = b"!"  # in front of the reason of a rank that cannot take part; no hello and no nonce begins so
_SCHEMA = {
    "version": int,
    "host": str,
    "pid": int,
    "address": str,
    "nonce": bytes,
    "control": int,
    "settings": str,
    "host_id": str,
    "network": str,
}

_Answer = TypeVar("_Answer")
Planner = Callable[..., tuple["_core.Plan", int]]  # hxcomm.select.Planner


class Store(Protocol):
    """The part of torch.distributed.Store that is used here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


@dataclass(frozen=True)
class Hello:
    """What a rank says of itself to the others of a group."""

    version: int
    host: str
    pid: int
    address: str
    nonce: bytes
    control: int
    settings: str
    host_id: str
    network: str

    def pack(self) -> str:
        # Stores take text; hexadecimal survives every one of them.
        return bytes(msgpack.packb(self.__dict__)).hex()

    @classmethod
    def unpack(cls, text: bytes, rank: int) -> Hello:
        """Raises ValueError saying which field is wrong."""
        if len(text) > _MAX_HELLO_BYTES:
            raise ValueError(f"rank {rank}'s hello has {len(text)} bytes, more than {_MAX_HELLO_BYTES}")
        try:
            raw = msgpack.unpackb(bytes.fromhex(text.decode("ascii")), max_map_len=16, max_array_len=0, max_ext_len=0)
        except ValueError as error:
            raise ValueError(f"rank {rank}'s hello cannot be read: {error}") from None
        if not isinstance(raw, dict) or raw.keys() != _SCHEMA.keys():
            raise ValueError(f"rank {rank}'s hello does not have the fields {', '.join(_SCHEMA)}")
        for field, kind in _SCHEMA.items():
            if type(raw[field]) is not kind:
                found = type(raw[field]).__name__
                raise ValueError(f"{field} in rank {rank}'s hello is a {found}, not {kind.__name__}")
        return cls(**raw)

    def label(self, rank: int, global_rank: int) -> str:
        """How messages name the rank: "rank 3 (host b, pid 8286)"."""
        which = f"rank {rank}" if rank == global_rank else f"rank {rank} (global rank {global_rank})"
        return f"{which} (host {self.host[:40]}, pid {self.pid})"


@functools.cache
def network() -> str:
    """Of this machine since it booted: where equal, abstract sockets reach from process to process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


_runtime: _core.Runtime | None = None
_runtime_pid = 0
_runtime_lock = threading.Lock()


def _library_folders() -> list[str]:
    """Whose frames are not the program's: this package's, and torch's where it is loaded."""
    files = [__file__, getattr(sys.modules.get("torch"), "__file__", None)]
    return [f"{Path(file).parent}/" for file in files if file]


def _stop_background(of: _core.Runtime, pid: int) -> None:
    if pid == os.getpid():  # a forked child has inherited the handler, not the thread
        of.stop_background()
        of.close_wire()


def runtime() -> _core.Runtime:
    """This process's segment and threads, made at the first call. A forked child gets its own."""
    global _runtime, _runtime_pid
    with _runtime_lock:
        if _runtime is None or _runtime_pid != os.getpid():
            isa = environment.ISA.get()
            if isa != "auto":
                _core.set_reduce_isa(isa)
            if (failpoint := environment.FAILPOINT.get()) is not None:
                _core.arm_failpoint(failpoint)
            chips = environment.CHIPS.get() if segment_contents.has_chips else 0
            _runtime = _core.Runtime(SEGMENT_BYTES, chips, environment.HBM.get() if chips else 0)
            _runtime_pid = os.getpid()
            if "callsite" in environment.TRACE.get():
                _runtime.trace_call_sites(_library_folders())
            _runtime.keep_forever()
            atexit.register(_stop_background, _runtime, _runtime_pid)
        return _runtime


class Meeting:
    """Where the ranks of a new group leave word for each other, and the deadline that all waiting shares."""

    longest_pause_s = 0.05  # between two looks for what a rank says

    def __init__(
        self,
        rank: int,
        group: str,
        timeout_s: float,
        death_of: Callable[[int], str] = lambda rank: "",
        processes: Sequence[bytes] | None = None,
    ) -> None:
        """`death_of(rank)` says what ended a rank's process where that is known already, so that nobody waits for it;
        what it raises ends the waiting. `processes`: whose hellos are taken, by rank; None: whoever comes."""
        self.rank, self.group, self.timeout_s = rank, group, timeout_s
        self.death_of, self.processes = death_of, processes
        self.deadline = time.monotonic() + timeout_s

    def publish(self, key: str, value: str) -> None:
        raise NotImplementedError

    def look(self, key: str, whose: int) -> bytes | None:
        """What that rank has published as `key`, or None. Does not block."""
        raise NotImplementedError

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fetch(self, key: str, whose: int) -> bytes:
        """Waits for what a rank publishes until the deadline, and answers Ctrl-C meanwhile.

        It asks again and again: torch's stores cannot be interrupted while they wait, and TCPStore prints two warnings
        whenever a wait for a key runs out.
        """
        pause_s = 0.0005
        while (value := self.look(key, whose)) is None:
            if death := self.death_of(whose):
                self.fail(death)
            remaining = self.deadline - time.monotonic()
            if remaining <= 0:
                self.fail(
                    f"rank {whose} did not come within {self.timeout_s:g} s (it has not started, has failed, or makes "
                    "other groups in another order)"
                )
            self.sleep(min(pause_s, remaining))
            pause_s = min(2 * pause_s, self.longest_pause_s)
        if value.startswith(DECLINED):
            self.fail(f"rank {whose} did not take part: {value[len(DECLINED) :].decode(errors='replace')[:500]}")
        return value

    def nonce(self) -> int:
        """Of the group: equal on every rank, never used before."""
        if self.rank == 0:
            self.publish("nonce", str(secrets.randbits(63) | 1))
        text = self.fetch("nonce", 0)
        if not text.isdigit() or not 0 < (nonce := int(text)) < 1 << 63:
            self.fail(
                f"rank 0 published {text[:40]!r} as the group's nonce; is another version of hxcomm installed there?"
            )
        return nonce

    def decline(self, reason: str) -> None:
        """Instead of create_group: this rank found that it cannot take part, so the others need not wait for it."""
        for key in (["nonce"] if self.rank == 0 else []) + [str(self.rank)]:
            self.publish(key, DECLINED.decode() + reason)

    def fail(self, what: str) -> NoReturn:
        from hxcomm.errors import InitError

        raise InitError(f"rank {self.rank} cannot set up group '{self.group}': {what}")


class StoreMeeting(Meeting):
    """In a key-value store, under keys of one incarnation of one group."""

    def __init__(
        self,
        store: Store,
        rank: int,
        group: str,
        timeout_s: float,
        death_of: Callable[[int], str] = lambda rank: "",
        processes: Sequence[bytes] | None = None,
    ) -> None:
        super().__init__(rank, group, timeout_s, death_of, processes)
        self.store = store
        # A program may destroy its groups and make them again over the same store: the keys of the n-th time that this
        # rank comes here carry n, so the leftovers of an earlier incarnation are never read.
        self.prefix = f"hxcomm/{self.ask(lambda: store.add(f'hxcomm/incarnations/{rank}', 1))}"

    def ask(self, question: Callable[[], _Answer]) -> _Answer:
        """A call of the store; where it fails, this rank cannot set up the group."""
        try:
            return question()
        except RuntimeError as error:  # torch's DistStoreError and DistNetworkError among them
            self.fail(
                f"the store does not answer: {str(error).splitlines()[0][:200]} (has the process that held it ended?)"
            )

    def publish(self, key: str, value: str) -> None:
        self.ask(lambda: self.store.set(f"{self.prefix}/{key}", value))

    def look(self, key: str, whose: int) -> bytes | None:
        full = f"{self.prefix}/{key}"
        return self.ask(lambda: self.store.get(full)) if self.ask(lambda: self.store.check([full])) else None


def _connect(
    group: _core.Group, meet: Meeting, mine: Hello, world_size: int, global_ranks: Sequence[int]
) -> tuple[int, ...]:
    """Connects with every rank. Returns the host of each, by number."""
    hellos = {meet.rank: mine}
    local = [meet.rank]
    for peer in range(world_size):
        if peer == meet.rank:
            continue
        try:
            hello = Hello.unpack(meet.fetch(str(peer), peer), peer)
        except ValueError as error:
            meet.fail(f"{error}; is another version of hxcomm installed there?")
        label = hello.label(peer, global_ranks[peer])
        if hello.version != mine.version:
            versions = f"protocol version {hello.version}, this rank {mine.version}"
            meet.fail(f"{label} speaks {versions}; install the same hxcomm on every rank")
        if hello.settings != mine.settings:
            both = f"here {mine.settings}; on {label} {hello.settings}"
            meet.fail(f"settings differ, and with them the algorithms: {both}")
        if meet.processes is not None and hello.nonce != meet.processes[peer]:
            meet.fail(f"{label} is another process than the one that was named")
        hellos[peer] = hello
        if hello.host_id == mine.host_id:
            near = group.connect(
                rank=peer,
                address=hello.address,
                nonce=hello.nonce,
                control_offset=hello.control,
                label=label,
                timeout_ms=max(1, min(HANDSHAKE_TIMEOUT_MS, int(1e3 * (meet.deadline - time.monotonic())))),
            )
            if near:
                local.append(peer)
            elif hello.network == mine.network:
                meet.fail(f"{label} has ended: nobody answers at '@{hello.address}'")
    if len(local) == world_size:
        return (0,) * world_size
    return _cross(group, meet, [hellos[rank] for rank in range(world_size)], sorted(local), global_ranks)


def _cross(
    group: _core.Group, meet: Meeting, hellos: Sequence[Hello], local: list[int], global_ranks: Sequence[int]
) -> tuple[int, ...]:
    """Connects with the ranks of other hosts."""
    from hxcomm import places  # it needs pyzmq, which most groups do not

    world_size = len(hellos)
    labels = [hello.label(rank, global_ranks[rank]) for rank, hello in enumerate(hellos)]
    process = runtime()
    try:
        door = places.open_wire(process)
    except Exception as error:  # the others wait for this rank's place, not for its verdict
        meet.publish(f"place/{meet.rank}", f"{DECLINED.decode()}{type(error).__name__}: {error}")
        raise
    meet.publish(f"place/{meet.rank}", door.place(local).pack())
    try:
        found = [places.Place.unpack(meet.fetch(f"place/{rank}", rank), rank, world_size) for rank in range(world_size)]
        hosts = places.host_numbers(found)
        places.check_security(found, labels)
    except ValueError as error:
        meet.fail(str(error))
    group.cross(hosts=hosts, processes=[hello.nonce for hello in hellos], labels=labels)
    peers = {rank: (hellos[rank].nonce, found[rank]) for rank in range(world_size) if rank not in local}
    patience = min(meet.deadline, time.monotonic() + HANDSHAKE_TIMEOUT_MS / 1e3)
    places.connect(process, door.address, peers, patience, meet.fail, labels)
    return hosts


def create_group(
    meet: Meeting,
    *,
    world_size: int,
    global_ranks: Sequence[int],
    settings: str,
    planner: Planner,
    transfer: Callable[..., Any] | None = None,
    lay_out: Callable[[tuple[int, ...]], None] = lambda hosts: None,
) -> _core.Group:
    """Makes this rank's end of a group; every rank of it must call this. Blocks until all have, at most the meeting's
    time.

    `lay_out(hosts)` tells the planner the host of each rank, by number, before it is first asked. `settings` is
    compared between the ranks (what decides algorithms must be equal). Raises InitError on every rank when any rank
    fails.
    """
    process, rank, nonce = runtime(), meet.rank, meet.nonce()
    spin_us = environment.SPIN_US.get()
    # A name for messages only: that two ranks share a host is proved by the handshake, or denied by HXCOMM_HOST_ID.
    host, host_id = socket.gethostname(), environment.HOST_ID.get() or ""
    label = Hello(0, host, os.getpid(), "", b"", 0, "", host_id, "").label(rank, global_ranks[rank])
    group = _core.Group(
        process,
        name=meet.group,
        rank=rank,
        world_size=world_size,
        label=label,
        nonce=nonce,
        spin_ns=-1 if spin_us is None else 1000 * spin_us,
        compare_shapes=environment.CHECK.get() == "shape",
        dump_folder=environment.DUMP.get() or "",
        keep_statistics=environment.STATS.get() is not None,
    )
    mine = Hello(
        _core.PROTOCOL_VERSION,
        host,
        os.getpid(),
        process.address,
        process.nonce,
        group.control_offset,
        settings,
        host_id,
        network(),
    )
    meet.publish(str(rank), mine.pack())
    try:
        lay_out(_connect(group, meet, mine, world_size, global_ranks))
    except BaseException as error:
        meet.publish(f"verdict/{rank}", f"{type(error).__name__}: {error}"[:1000])
        group.leave()
        raise
    meet.publish(f"verdict/{rank}", "ok")
    # A rank that could not connect raises by itself; the others must not find out only by a timeout later.
    for peer in range(world_size):
        verdict = meet.fetch(f"verdict/{peer}", peer).decode()
        if verdict != "ok":
            group.leave()
            meet.fail(f"rank {peer} failed: {verdict}")
    group.start(planner=planner, transfer=transfer)
    if (folder := environment.STATS.get()) is not None:
        from hxcomm.stats import recording  # most programs do without

        recording.keep(process, folder, job=nonce, rank=global_ranks[rank], world_size=world_size)
    return group
