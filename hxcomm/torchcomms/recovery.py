"""Init handles and reconfigure: how a communicator gets a group of survivors and newcomers.

A handle names one communicator of one process, for as long as that lives: where the process is met, and a number that
no other communicator has. Handles reach the others through the program, so they are untrusted: bounded, of one
canonical form, every field checked. A group is made by those whose handles are named, under a uuid that none of them
has used: its name is drawn from all of these, so nothing of an earlier group or attempt is ever taken for its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from torch._C._distributed_c10d import PrefixStore, Store

from hxcomm import bootstrap, c10d, environment, lobby
from hxcomm.errors import AbortedError, InitError
from hxcomm.torchcomms.hints import number_of
from hxcomm.torchcomms.native import BACKEND, Native, milliseconds
from hxcomm.torchcomms.options import InitHandle
from hxcomm.torchcomms.work import DONE, TorchWork

if TYPE_CHECKING:
    from hxcomm.torchcomms.comm import TorchComm

_VERSION = 1
_BEGIN = "hxcomm:"
_MAX_HANDLE_CHARS = 1024
# How long a rank that is left out has to leave by itself, where nothing has failed, before the group is ended for it.
_GRACE_S = 0.1
# From then on, to confirm that it writes nowhere. Its watcher thread does that within milliseconds, whatever Python
# does, so who is silent for so long is stopped.
_SILENCE_S = 5.0


def _text(pattern: str) -> Any:
    return lambda value: type(value) is str and re.fullmatch(pattern, value) is not None


def _number(low: int, high: int) -> Any:
    return lambda value: type(value) is int and low <= value < high


_FIELDS = {
    "version": _number(0, 1 << 31),
    "name": _text(r"[^\x00-\x1f]{0,200}"),
    "host": _text(r"[^\x00-\x1f]{1,64}"),
    "host_id": _text(r"[^\x00-\x1f]{0,200}"),
    "network": _text(r"[0-9a-f-]{1,40}/[0-9]{1,20}"),
    "pid": _number(1, 1 << 31),
    "address": _text(r"hxcomm-[0-9a-f]{32}"),
    "process": _text(r"[0-9a-f]{32}"),
    "notes": _number(0, 1 << 48),
    "unique": _text(r"[0-9a-f]{16}"),
}


@dataclass(frozen=True)
class Handle:
    """One communicator of one process."""

    version: int
    name: str
    host: str
    host_id: str
    network: str
    pid: int
    address: str
    process: str
    notes: int
    unique: str

    @classmethod
    def of_this_process(cls, name: str, notes: int) -> Handle:
        process = bootstrap.runtime()
        return cls(
            version=_VERSION,
            name=name,
            host=socket.gethostname()[:64],
            host_id=environment.HOST_ID.get() or "",
            network=bootstrap.network(),
            pid=os.getpid(),
            address=process.address,
            process=process.nonce.hex(),
            notes=notes,
            unique=secrets.token_hex(8),
        )

    def pack(self) -> InitHandle:
        return _BEGIN + json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def unpack(cls, text: object) -> Handle:
        """ValueError saying what is wrong with it."""
        if not isinstance(text, str):
            raise ValueError(f"an init handle is text, not {type(text).__name__}")
        shown = f"init handle {text[:60]!r}"
        if len(text) > _MAX_HANDLE_CHARS:
            raise ValueError(f"{shown}... has {len(text)} characters; at most {_MAX_HANDLE_CHARS} are taken")
        if not text.startswith(_BEGIN):
            raise ValueError(f"{shown} is none of backend hxcomm: those begin with {_BEGIN!r}")
        try:
            fields = json.loads(text[len(_BEGIN) :])
        except (ValueError, RecursionError):
            raise ValueError(f"{shown} cannot be read") from None
        if not isinstance(fields, dict) or fields.keys() != _FIELDS.keys():
            raise ValueError(f"{shown} does not have the fields {', '.join(_FIELDS)}")
        for name, allows in _FIELDS.items():
            if not allows(fields[name]):
                raise ValueError(f"{shown}: its {name} cannot be {str(fields[name])[:60]!r}")
        handle = cls(**fields)
        if handle.version != _VERSION:
            raise ValueError(
                f"{shown} is of version {handle.version}, this process's hxcomm of {_VERSION}: install the same "
                "everywhere"
            )
        if handle.pack() != text:
            raise ValueError(f"{shown} is not written as get_init_handle() writes it")
        return handle

    def label(self, rank: int) -> str:
        return f"rank {rank} (host {self.host[:40]}, pid {self.pid})"


class Recovery:
    """What a communicator that was made with enable_reconfigure=True keeps from one group to the next."""

    def __init__(self, name: str) -> None:
        self.page = lobby.take_page()
        self.handle = Handle.of_this_process(name, self.page.offset)
        self.text = self.handle.pack()
        self.used: set[int] = set()  # uuids
        # The group that the communicator has, or had when a reconfigure failed: its members may still write here.
        self.last: Native | None = None
        self.members: list[InitHandle] = []
        self.lock = threading.Lock()  # of `running`, which abort() asks from any thread
        self.running = False
        self.interrupted = threading.Event()

    def interrupt(self) -> bool:
        """By abort(): ends a reconfigure that runs. False where none does."""
        with self.lock:
            if self.running:
                self.interrupted.set()
            return self.running

    def close(self) -> None:
        """The communicator has been finalized."""
        lobby.give_back(self.page)
        self.last = None


def _recovery(comm: TorchComm, what: str) -> Recovery:
    recovery: Recovery | None = comm._recovery
    if comm.get_backend() != BACKEND:
        raise NotImplementedError(f"{what}: backend {comm.get_backend()!r} cannot be reconfigured")
    if recovery is None:
        raise ValueError(
            f"{what} of communicator '{comm.get_name()}': it was made without enable_reconfigure=True, or is finalized"
        )
    return recovery


def init_handle(comm: TorchComm) -> InitHandle:
    """What this process publishes of itself, for the others to name it in reconfigure."""
    return _recovery(comm, "get_init_handle").text


def reconfigure(
    comm: TorchComm,
    uuid: int,
    init_handles: list[InitHandle] | set[InitHandle],
    timeout: timedelta | None,
    hints: dict[str, str] | None,
) -> TorchWork:
    """Makes a new group of the named processes. ValueError before anything was sent; InitError naming who failed."""
    recovery = _recovery(comm, "reconfigure")
    texts, handles = _checked(recovery, uuid, init_handles)
    options = comm.get_options()
    timeout_s = (options.timeout if timeout is None else timeout).total_seconds()
    if timeout is not None:
        milliseconds(timeout)  # raises where it is not positive
    number = number_of(options.hints if hints is None else hints)
    recovery.used.add(uuid)
    recovery.interrupted.clear()
    recovery.running = True
    comm._close("it is being reconfigured")
    attempt = _Attempt(comm, recovery, uuid, texts, handles, timeout_s)
    try:
        made = attempt.make()
        with recovery.lock:
            if recovery.interrupted.is_set():
                made.process_group.abort()
            attempt.stop_if_interrupted()
            recovery.last, recovery.members = Native(made, comm.get_device(), number), texts
            comm._uuid = uuid
            comm._adopt(recovery.last)
            recovery.running = False
    except BaseException:
        comm._close("its last reconfigure() failed; call it again with another uuid")
        comm._aborted, recovery.running = True, False
        raise
    return DONE


def _checked(recovery: Recovery, uuid: int, given: Collection[InitHandle]) -> tuple[list[InitHandle], list[Handle]]:
    """The handles in rank order. ValueError where the call is wrong."""
    if type(uuid) is not int or not -(1 << 63) <= uuid < 1 << 63:
        raise ValueError(f"reconfigure: uuid is {uuid!r}; it must be an int of 64 bits")
    if not isinstance(given, (list, tuple, set, frozenset)):
        raise ValueError(f"reconfigure takes a list of init handles (ranks in this order) or a set, not {type(given)}")
    if uuid in recovery.used:
        raise ValueError(f"reconfigure: uuid {uuid} was used before; each attempt needs a new one")
    handles = {text: Handle.unpack(text) for text in given}
    if len(handles) < len(given):
        twice = next(text for text in handles if list(given).count(text) > 1)
        raise ValueError(f"reconfigure: the handle of pid {handles[twice].pid} on {handles[twice].host} is given twice")
    for handle in handles.values():
        if handle.name != recovery.handle.name:
            raise ValueError(
                f"reconfigure of communicator '{recovery.handle.name}': the handle of pid {handle.pid} on "
                f"{handle.host} is of communicator '{handle.name}'"
            )
    if recovery.text not in handles:
        raise ValueError(
            f"reconfigure: this process's own handle (pid {os.getpid()}) is not among the {len(handles)} given ones"
        )
    order = list(given) if isinstance(given, (list, tuple)) else sorted(given)
    return order, [handles[text] for text in order]


def _half(words: Iterable[str]) -> int:
    """31 bits, not 0."""
    digest = hashlib.sha256("\0".join(words).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1 or 1


class _Attempt:
    """One call of reconfigure, once its arguments are right."""

    def __init__(
        self,
        comm: TorchComm,
        recovery: Recovery,
        uuid: int,
        texts: list[InitHandle],
        handles: list[Handle],
        timeout_s: float,
    ) -> None:
        self.comm, self.recovery, self.texts, self.handles = comm, recovery, texts, handles
        self.rank = texts.index(recovery.text)
        self.nonce = _half([str(uuid), *texts, "upper"]) << 31 | _half([str(uuid), *texts, "lower"])
        self.abouts = [_half([str(uuid), text]) << 31 | _half([str(uuid), *texts]) for text in texts]
        store = cast(Store, comm.get_options().store)  # new_comm has opened one
        self.member = c10d.Membership(
            store=PrefixStore(f"reconfigure/{uuid}/{self.nonce:x}", store),
            name=comm.get_name(),
            rank=self.rank,
            world_size=len(texts),
            global_ranks=list(range(len(texts))),
            timeout_s=timeout_s,
        )

    def make(self) -> c10d.Made:
        meet = self.meeting()
        try:
            self.fence(meet.deadline)
        except Exception as error:
            meet.decline(str(error))
            raise
        if self.recovery.last is not None:
            # What is pending here ends, and the others, who wait for this rank's hello, know that it writes nowhere.
            self.recovery.last.process_group.shutdown()
        return c10d.make_process_group(self.member, None, meet=meet)

    def meeting(self) -> bootstrap.Meeting:
        """In memory, where all are on this host; else in the communicator's store."""
        own = self.handles[self.rank]
        if all((each.network, each.host_id) == (own.network, own.host_id) for each in self.handles):
            doors = [
                lobby.Door(each.address, bytes.fromhex(each.process), each.notes, self.abouts[rank], each.label(rank))
                for rank, each in enumerate(self.handles)
            ]
            return lobby.MemoryMeeting(
                doors,
                self.recovery.page,
                self.nonce,
                rank=self.rank,
                group=self.member.name,
                timeout_s=self.member.timeout_s,
                death_of=self.death_of,
                sleep=self.recovery.interrupted.wait,
            )
        return bootstrap.StoreMeeting(
            self.member.store,
            self.rank,
            self.member.name,
            self.member.timeout_s,
            self.death_of,
            [bytes.fromhex(each.process) for each in self.handles],
        )

    def stop_if_interrupted(self) -> None:
        if self.recovery.interrupted.is_set():
            raise AbortedError(f"reconfigure of '{self.member.name}' was aborted on rank {self.rank} by abort()")

    def death_of(self, rank: int) -> str:
        """Of a member of the new group that was one of the last; AbortedError where this rank waits no longer."""
        self.stop_if_interrupted()
        last = self.recovery.last
        if last is None or self.texts[rank] not in self.recovery.members:
            return ""
        died = last.death_of(self.recovery.members.index(self.texts[rank]))
        # It begins with the rank's number in the group before.
        return f"{self.handles[rank].label(rank)} {died.partition(') ')[2]}" if died else ""

    def fence(self, deadline: float) -> None:
        """Waits until nobody who is left out can be in the middle of a write to this rank's memory."""
        last, members = self.recovery.last, self.recovery.members
        if last is None:
            return
        left_out = [rank for rank, text in enumerate(members) if text not in self.texts]
        tell_at = time.monotonic() + (_GRACE_S if last.group.is_alive() else 0.0)
        kills = environment.FENCE.get() == "kill"
        silent_at = min(deadline, tell_at + _SILENCE_S)
        pause_s = 0.0005
        while open_ranks := last.group.not_fenced(left_out, tell=time.monotonic() >= tell_at):
            self.stop_if_interrupted()
            if time.monotonic() > silent_at:
                if not kills:
                    names = ", ".join(Handle.unpack(members[rank]).label(rank) for rank in open_ranks)
                    raise InitError(
                        f"rank {self.rank} cannot set up group '{self.member.name}': {names} of the group before, left "
                        f"out of this one, has not confirmed within {_SILENCE_S:g} s that it writes to nobody's memory "
                        "any more (is it stopped?). End that process and try again with another uuid, or set "
                        "HXCOMM_FENCE=kill, which does that"
                    )
                for rank in open_ranks:
                    last.group.kill(rank)
                silent_at, kills = time.monotonic() + _SILENCE_S, False
            self.recovery.interrupted.wait(pause_s)
            pause_s = min(2 * pause_s, 0.02)
