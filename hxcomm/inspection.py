"""Reads from outside what the hxcomm processes of this user are doing, without their help.

A process keeps its groups' progress and a ring of its last operations in its shared segment, which /proc/PID/fd leads
to. So this works while the process is stopped, stuck, or in a deadlock. Everything read is another process's memory: it
is copied once, and every number in a copy is checked before it is used. Knows the layout of the segment (the C++
headers named below assert the same offsets) and nothing else of the package; needs no built extension and no torch.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# csrc/core/line.h: SegmentHeader {magic, version, pid, nonce}, the word `sleepers`; kSegmentMagic, kProtocolVersion.
_HEADER = struct.Struct("<QIi16s")
_MAGIC = 0x314D4F4343585848
PROTOCOL_VERSION = 6
_SLEEPERS = struct.Struct("<64xI")
# csrc/core/directory.h: Directory, DirectoryEntry {group's nonce, control_offset}.
_PAGE = 4096
_DIRECTORY_OFFSET = 256
_DIRECTORY_ENTRY = struct.Struct("<QQ")
# csrc/communicator/descriptor.h: Control; its Line begins with progress, and has membership at 40.
_CONTROL_BYTES = 4864
_PROGRESS, _MEMBERSHIP, _ABORT = 0, 40, 64
_IDENTITY = struct.Struct("<640xii48s")  # rank, world size, name
_ROUND_BITS = 16
# csrc/communicator/flight.h: Flight {n_queued, n_records}, FlightRecord.
_FLIGHT = struct.Struct("<704xQQ")
_RECORDS_OFFSET = 768
_RECORD = struct.Struct("<QqqQiBBBB24s")
_N_RECORDS = 64
# csrc/core/line.h: AbortCause, in the top byte of the abort word; the rank it is about, in the low half.
_CAUSES = (
    *("", "rank {} died", "rank {} left", "a timeout on rank {}", "abort() on rank {}", "Ctrl-C on rank {}"),
    "destroyed here",
)
# The codes of csrc/communicator/call.h (OpCode), csrc/core/types.h (DType, ReduceOp) and flight.h (FlightState).
_OPS = (
    *("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter", "gather", "scatter", "all_to_all"),
    *("barrier", "send", "recv", "put", "signal", "wait_signal"),
)
_DTYPES = (
    *("float32", "float64", "bfloat16", "float16", "int32", "int64", "uint8", "bool", "int8", "int16"),
    *("complex64", "complex128"),
)
_ITEM_BYTES = (4, 8, 2, 2, 4, 8, 1, 1, 1, 2, 8, 16)
_REDUCE_OPS = ("sum", "product", "min", "max", "avg", "band", "bor", "bxor", "premul_sum")
_STATES = ("none", "posted", "arrived", "running", "finished", "failed")
_REDUCING = ("all_reduce", "reduce", "reduce_scatter")
_MAX_WORLD_SIZE = 1 << 20


@dataclass(frozen=True)
class Operation:
    """One record of a rank's flight ring. Times are CLOCK_MONOTONIC, in nanoseconds."""

    sequence: int
    """Of the collective in its group; 0 for a message, and for a call that ended before it had one."""
    op: str
    dtype: str
    count: int
    nbytes: int
    """Of one block: a tensor, or one rank's part of it. 0 for an unequal all_to_all."""
    reduce_op: str | None
    root: int | None
    """Of a send or recv: the peer; None for any source. Of a call on a window: the other rank."""
    state: str
    """posted, arrived (waits for the others), running (all have arrived), finished or failed."""
    posted_ns: int
    ended_ns: int | None
    call_site: str

    @property
    def is_open(self) -> bool:
        return self.state in ("posted", "arrived", "running")

    @property
    def is_message(self) -> bool:
        return self.op in ("send", "recv", "put", "signal", "wait_signal")


@dataclass(frozen=True)
class RankView:
    """One rank of one group, as its process's segment shows it."""

    pid: int
    process: str
    """running, asleep (waits on its doorbell), stopped (SIGSTOP or a debugger) or dead."""
    group: str
    nonce: int
    rank: int
    world_size: int
    sequence: int
    """Of the last collective (or window of a long one) that this rank has arrived at."""
    rounds: int
    """Of it that this rank has finished, arrival included."""
    queued: int
    """Collectives posted and not ended."""
    ended_by: str
    """Why the group is closed on this rank; "" while it is not."""
    operations: tuple[Operation, ...]
    """The last 64, oldest first."""

    def open_collective(self) -> Operation | None:
        return next((op for op in reversed(self.operations) if op.is_open and not op.is_message), None)

    def open_messages(self) -> list[Operation]:
        return [op for op in self.operations if op.is_open and op.is_message]


class NotReadableError(Exception):
    """A process cannot be looked into. The text says why."""


def processes() -> list[int]:
    """The pids of this user's processes that have an hxcomm segment, in order."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == os.geteuid() and any(_segments(int(entry.name))):
                    found.append(int(entry.name))
    return sorted(found)


def ranks_of(pid: int) -> list[RankView]:
    """What a process is doing, one view a group of it. Raises NotReadableError where that cannot be seen."""
    views: list[RankView] = []
    try:
        for path in _segments(pid):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                views += _read_segment(pid, descriptor)
            finally:
                os.close(descriptor)
    except (FileNotFoundError, ProcessLookupError):
        raise NotReadableError(f"there is no process {pid}") from None
    except PermissionError:
        raise NotReadableError(f"process {pid} belongs to another user, or hides from this one") from None
    return views


def _segments(pid: int) -> Iterator[Path]:
    """A process's own segments. Its peers' are mapped there, too, but not open."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if str(path.readlink()).startswith("/memfd:hxcomm"):
                yield path


def _read_segment(pid: int, descriptor: int) -> Iterator[RankView]:
    size = os.fstat(descriptor).st_size
    page = os.pread(descriptor, _PAGE, 0)
    if len(page) < _PAGE:
        raise NotReadableError(f"process {pid} has a segment of {size} bytes, which is none of hxcomm's")
    magic, version, _, _ = _HEADER.unpack_from(page)
    if magic != _MAGIC:
        raise NotReadableError(f"process {pid} has a segment whose header is not hxcomm's")
    if version != PROTOCOL_VERSION:
        raise NotReadableError(
            f"process {pid} runs a version of hxcomm with protocol {version}, this one has {PROTOCOL_VERSION}: use the "
            "hxcomm command of its installation"
        )
    process = _process_state(pid, asleep=_SLEEPERS.unpack_from(page)[0] > 0)
    for offset in range(_DIRECTORY_OFFSET, _PAGE, _DIRECTORY_ENTRY.size):
        nonce, control_offset = _DIRECTORY_ENTRY.unpack_from(page, offset)
        if nonce == 0 or control_offset % _PAGE or not _PAGE <= control_offset <= size - _CONTROL_BYTES:
            continue
        control = os.pread(descriptor, _CONTROL_BYTES, control_offset)
        if len(control) == _CONTROL_BYTES and (view := _read_control(pid, process, nonce, control)) is not None:
            yield view


def _process_state(pid: int, asleep: bool) -> str:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except (FileNotFoundError, ProcessLookupError):
        return "dead"
    if letter in "Tt":
        return "stopped"
    if letter in "ZX":
        return "dead"
    return "asleep" if asleep else "running"


def _read_control(pid: int, process: str, nonce: int, control: bytes) -> RankView | None:
    """None where the page is not (or no longer) that of a member of the group."""
    progress, membership, abort = (struct.unpack_from("<Q", control, at)[0] for at in (_PROGRESS, _MEMBERSHIP, _ABORT))
    rank, world_size, name = _IDENTITY.unpack_from(control)
    if membership != nonce or not 0 <= rank < world_size <= _MAX_WORLD_SIZE:
        return None
    queued, n_records = _FLIGHT.unpack_from(control)
    operations = [
        _read_record(control, _RECORDS_OFFSET + number % _N_RECORDS * _RECORD.size)
        for number in range(max(0, n_records - _N_RECORDS), n_records)
    ]
    return RankView(
        pid=pid,
        process=process,
        group=_text(name),
        nonce=nonce,
        rank=rank,
        world_size=world_size,
        sequence=progress >> _ROUND_BITS,
        rounds=progress & ((1 << _ROUND_BITS) - 1),
        queued=queued,
        ended_by=_cause(abort),
        operations=tuple(operation for operation in operations if operation is not None),
    )


def _read_record(control: bytes, offset: int) -> Operation | None:
    """None where the record is being written, or holds codes that do not exist."""
    sequence, posted_ns, ended_ns, count, root, op, dtype, reduce_op, state, call_site = _RECORD.unpack_from(
        control, offset
    )
    if not (op < len(_OPS) and dtype < len(_DTYPES) and reduce_op < len(_REDUCE_OPS) and 0 < state < len(_STATES)):
        return None
    return Operation(
        sequence=sequence,
        op=_OPS[op],
        dtype=_DTYPES[dtype],
        count=count,
        nbytes=count * _ITEM_BYTES[dtype],
        reduce_op=_REDUCE_OPS[reduce_op] if _OPS[op] in _REDUCING else None,
        root=root if root >= 0 else None,
        state=_STATES[state],
        posted_ns=posted_ns,
        ended_ns=ended_ns or None,
        call_site=_text(call_site),
    )


def _cause(abort_word: int) -> str:
    cause = abort_word >> 56
    return _CAUSES[cause].format(abort_word & 0xFFFFFFFF) if cause < len(_CAUSES) else "an unknown cause"


def _text(raw: bytes) -> str:
    """Up to the NUL, printable: it goes to a terminal."""
    text = raw.split(b"\0", 1)[0].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)
