"""A recorder of a communicator's operations, in the format of torch's flight recorder.

`python -m torch.distributed.flight_recorder.fr_trace FOLDER` reads a folder of dumps, one file a rank, and says which
rank did not join which collective, or joined it with other sizes. That tool decides what an entry has to look like:

- A profiling name begins with a library that it knows, so ours begin with "gloo:"; who ran the operation stands in the
  group's description, in each entry's `backend` and in `comm_lib_version`.
- It pairs entries of one group by collective_seq_id, which must therefore count collectives alone. Point-to-point
  entries go into a group of their own for each pair of ranks, numbered by message: both ends find the same number.
- It compares sizes between ranks. Where ranks may differ in good order, the entry says what must agree (_sizes).
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hxcomm.torchcomms.hook_args import (
    OpName,
    PostHookArgs,
    PreHookArgs,
    RemovableHandle,
    SplitPostHookArgs,
    SplitPreHookArgs,
)
from hxcomm.torchcomms.hooks.operands import inputs, outputs

VERSION = "2.10"  # of the format: fr_trace refuses ranks whose versions differ
_KNOWN_LIBRARIES = frozenset({"nccl", "ncclx", "xccl", "gloo", "rccl", "rcclx", "mccl", "hccl"})
_STAND_IN = "gloo"
# What fr_trace calls an operation, where it is not our name. It compares sizes of all_to_all as sums over the ranks.
_TOOL_NAMES = {OpName.gather_single: "gather", OpName.all_to_all_v_single: "all_to_all"}
# As c10 spells them, which is what the recorders of c10d write; others are written as torch spells them.
_DTYPES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}
_PACKAGE = str(Path(__file__).parent.parent)
_MAX_FRAMES = 32
_MAX_UNPOSTED = 64  # threads that may be within one call of one communicator each


@dataclass(slots=True)
class _Entry:
    """One operation. Only its own call and the end of its work write to it."""

    group: _Group
    process_group: tuple[str, str]
    record_id: int
    collective_seq_id: int
    p2p_seq_id: int
    op_id: int
    operation: str
    profiling_name: str
    sizes: tuple[list[list[int]], list[str], list[list[int]], list[str]]
    timeout_ms: int
    frames: list[tuple[str, str, int]]
    created_ns: int
    thread: tuple[int, str]
    started_ns: int | None = None
    completed_ns: int | None = None
    status: str = "NOT_STARTED"
    retired: bool = False
    work: Any = None  # while the operation runs: somebody has to look, and the caller may have dropped it

    def state(self) -> str:
        if self.completed_ns is not None:
            return "completed"
        return "scheduled" if self.started_ns is None else "started"

    def as_dict(self) -> dict[str, Any]:
        entry = {
            "record_id": self.record_id,
            "pg_id": self.group.number,
            "process_group": self.process_group,
            "collective_seq_id": self.collective_seq_id,
            "p2p_seq_id": self.p2p_seq_id,
            "is_p2p": self.p2p_seq_id > 0,
            "op_id": self.op_id,
            "profiling_name": self.profiling_name,
            "backend": self.group.backend,
            "operation": self.operation,
            "input_sizes": self.sizes[0],
            "input_dtypes": self.sizes[1],
            "output_sizes": self.sizes[2],
            "output_dtypes": self.sizes[3],
            "time_created_ns": self.created_ns,
            "time_discovered_started_ns": self.started_ns,
            "time_discovered_completed_ns": self.completed_ns,
            "state": self.state(),
            "status": self.status,
            "retired": self.retired,
            "timeout_ms": self.timeout_ms,
            "thread_id": str(self.thread[0]),
            "thread_name": self.thread[1],
            "frames": [{"name": name, "filename": filename, "line": line} for name, filename, line in self.frames],
        }
        if self.completed_ns is not None:
            entry["duration_ms"] = (self.completed_ns - self.created_ns) / 1e6
        return entry


@dataclass(slots=True)
class _Group:
    """One communicator under record, in one of its lives: reconfigure() begins another."""

    number: int
    name: str
    backend: str
    ranks: list[int]  # of the communicator that all others were split from
    rank: int
    parent: _Group | None = None  # the group that it was split from
    past: bool = False  # reconfigure() has ended it
    sequence: int = 0  # of collectives
    messages: dict[tuple[int, ...], int] = field(default_factory=dict)  # (source, destination) -> how many
    last: dict[str, int] = field(
        default_factory=lambda: {
            "last_enqueued_collective": -1,
            "last_started_collective": -1,
            "last_completed_collective": -1,
        }
    )
    # Of itself, and of the pairs of ranks that have exchanged messages in it, by name.
    config: dict[str, dict[str, str]] = field(default_factory=dict)

    def configure(self, name: str, ranks: list[int]) -> None:
        self.config[name] = {"name": name, "desc": self.backend, "ranks": _listed(ranks)}

    def has_ended(self) -> bool:
        return self.past or (self.parent is not None and self.parent.has_ended())


class _Recorder:
    """The last operations of this process, and the groups they belong to."""

    def __init__(self, max_entries: int) -> None:
        if max_entries < 0:
            raise ValueError(f"max_entries is {max_entries}, a recorder cannot keep fewer than none")
        self.lock = threading.RLock()  # seeing an end runs what others asked to be told of it
        self.entries: deque[_Entry] = deque(maxlen=max_entries)
        self.running: deque[_Entry] = deque(maxlen=max_entries)
        self.groups: list[_Group] = []
        self.records = 0

    def group(self, name: str, backend: str, ranks: list[int], rank: int, parent: _Group | None = None) -> _Group:
        """The group of this name and these ranks; one that comes back goes on where it was."""
        with self.lock:
            names = (name, f"{name}:{_listed(ranks)}")
            named = [each for each in self.groups if each.name in names and not each.has_ended()]
            for group in named:
                if group.ranks == ranks:
                    group.rank, group.parent = rank, parent
                    return group
            if named:  # another communicator of this process has the name
                name += f":{_listed(ranks)}"
            group = _Group(len(self.groups), name, backend, ranks, rank, parent)
            group.configure(name, ranks)
            self.groups.append(group)
            return group

    def record(self, group: _Group, op: OpName, op_id: int, args: PreHookArgs, timeout_ms: int) -> _Entry:
        frames = _frames()
        library = group.backend if group.backend in _KNOWN_LIBRARIES else _STAND_IN
        called = f"{library}:{_TOOL_NAMES.get(op, op.name)}"
        with self.lock:
            process_group, message = (group.name, group.backend), 0
            if op in (OpName.send, OpName.recv):
                process_group, message, ends = self._message(group, op, args.peer)  # type: ignore[union-attr]
                called += ends
                sequence = message
            else:
                group.sequence += 1
                sequence = group.last["last_enqueued_collective"] = group.sequence
            entry = _Entry(
                group, process_group, self.records, sequence, message, op_id, op.name, called,
                _sizes(op, args, group), timeout_ms, frames, time.time_ns(),
                (threading.get_ident(), threading.current_thread().name),
            )  # fmt: skip
            self.records += 1
            self.entries.append(entry)
        return entry

    def _message(self, group: _Group, op: OpName, peer: int) -> tuple[tuple[str, str], int, str]:
        """The pair's own group, the number of the message in it, and how fr_trace names its ends."""
        ends = (group.rank, peer) if op is OpName.send else (peer, group.rank)
        # Both ends of a message to oneself are entries of one rank, so they must not share a number.
        key = (*ends, op.value) if group.rank == peer else ends
        count = group.messages[key] = group.messages.get(key, 0) + 1
        odd = op is OpName.recv if group.rank == peer else group.ranks[ends[0]] > group.ranks[ends[1]]
        pair = sorted({group.ranks[end] for end in ends})
        name = f"{group.name}:{'-'.join(map(str, pair))}"
        group.configure(name, pair)
        source, destination = (pair.index(group.ranks[end]) for end in ends)
        named = f" {source}->{destination}" if op is OpName.send else f" {destination}<-{source}"
        return (name, group.backend), 2 * count + odd, named

    def started(self, entry: _Entry, work: Any) -> None:
        """work: what tells of the end; None for an operation that is done."""
        entry.started_ns = time.time_ns()
        entry.status = "INPROGRESS"
        if not entry.p2p_seq_id:
            entry.group.last["last_started_collective"] = entry.collective_seq_id
        if work is None:
            self.ended(entry, "COMPLETED")
            return
        entry.work = work
        work._on_end(lambda status: self.ended(entry, status.name))
        # A work's end is seen by whoever looks. Looking at the oldest at each new one keeps none longer than needed.
        with self.lock:
            self.running.append(entry)
            while self.running and _has_ended(self.running[0]):
                self.running.popleft()

    def ended(self, entry: _Entry, status: str) -> None:
        entry.status, entry.retired, entry.work = status, True, None
        if status == "COMPLETED":
            entry.completed_ns = time.time_ns()
            if not entry.p2p_seq_id:
                entry.group.last["last_completed_collective"] = entry.collective_seq_id

    def reset(self) -> None:
        with self.lock:
            self.entries.clear()
            self.running.clear()
            self.records = 0
            for group in self.groups:
                group.sequence = 0
                group.messages.clear()

    def dump(self, include_completed: bool, past: bool = True) -> dict[str, Any]:
        """past: with the groups that reconfigure() has ended, whose ranks were numbered otherwise."""
        from hxcomm import __version__

        for entry in tuple(self.running):
            _has_ended(entry)
        with self.lock:
            groups = [group for group in self.groups if past or not group.has_ended()]
            return {
                "version": VERSION,
                "comm_lib_version": f"hxcomm {__version__}",
                "pg_config": {name: dict(config) for group in groups for name, config in group.config.items()},
                "pg_status": {str(group.number): dict(group.last) for group in groups},
                "entries": [
                    entry.as_dict()
                    for entry in self.entries
                    if (include_completed or entry.state() != "completed") and (past or not entry.group.has_ended())
                ],
            }


def _listed(ranks: list[int]) -> str:
    return "[" + ",".join(map(str, ranks)) + "]"


def _has_ended(entry: _Entry) -> bool:
    work = entry.work
    return work is None or work.is_completed()


def _frames() -> list[tuple[str, str, int]]:
    """The caller's stack, innermost first, without this package's own frames on top."""
    frame = sys._getframe(1)
    frames: list[tuple[str, str, int]] = []
    while frame is not None and len(frames) < _MAX_FRAMES:
        code = frame.f_code
        if frames or not code.co_filename.startswith(_PACKAGE):
            frames.append((code.co_name, code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return frames


def _sizes(
    op: OpName, args: PreHookArgs, group: _Group
) -> tuple[list[list[int]], list[str], list[list[int]], list[str]]:
    """Sizes and dtypes in and out, so that fr_trace finds ranks in agreement exactly when they are.

    A list of equal tensors is one tensor with a dimension more. In the forms with sizes of their own for each rank
    (`_v`), the side that only this rank has is left empty: the list on the other side holds it, too.
    """
    ins = inputs(op, args, group.rank)
    outs = outputs(op, args, group.rank)
    if op in (OpName.broadcast, OpName.reduce):
        ins = outs = [args.tensor]  # type: ignore[union-attr]  # in place: every rank names the same size twice
    in_sizes, out_sizes = [list(each.shape) for each in ins], [list(each.shape) for each in outs]
    if op is OpName.all_gather:
        out_sizes = _stacked(out_sizes)
    elif op is OpName.reduce_scatter:
        in_sizes = _stacked(in_sizes)
    elif op is OpName.all_gather_v:
        in_sizes = [[]]
    elif op is OpName.reduce_scatter_v:
        out_sizes = [[]]
    elif op is OpName.all_to_all:
        in_sizes, out_sizes = [[sum(each.numel() for each in ins)]], [[sum(each.numel() for each in outs)]]
    return in_sizes, _dtypes(ins), out_sizes, _dtypes(outs)


def _stacked(sizes: list[list[int]]) -> list[list[int]]:
    return [[len(sizes), *sizes[0]]] if sizes and all(each == sizes[0] for each in sizes) else sizes


def _dtypes(tensors: list[Tensor]) -> list[str]:
    return [_DTYPES.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.") for tensor in tensors]


def _file(rank: int) -> Path:
    """Where a dump goes: TORCHCOMM_FR_DUMP_TEMP_FILE and the rank, as torchcomms' own recorder has it."""
    prefix = os.environ.get("TORCHCOMM_FR_DUMP_TEMP_FILE")
    if prefix and os.environ.get("TORCHCOMM_FR_DUMP_DYNAMIC_FILE_NAME", "").lower() in ("1", "true"):
        return Path(prefix)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(f"{prefix or cache / 'torch' / 'comm_lib_trace_rank_'}{rank}")


_shared: _Recorder | None = None
_shared_lock = threading.Lock()


def _shared_recorder(max_entries: int) -> _Recorder:
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = _Recorder(max_entries)
        return _shared


class FlightRecorderHook:
    """Records the last operations of the communicators it is registered with, and of those split from them.

    Args:
        max_entries: how many operations are kept. Recorders of one process that are not isolated share their entries,
            and the first of them says how many. 0: this one records nothing, which is what torch.distributed asks for
            where nothing else is set.
        isolated: keeps this recorder's entries apart.

    An entry is "scheduled" when its call begins, "started" when it has been issued, "completed" when its work has
    ended well; `retired` without "completed" is one that failed, and `status` says how. The dump is also written, as by
    dump_file, when a communicator is aborted.

    Example:
        >>> recorder = FlightRecorderHook(max_entries=1024)
        >>> recorder.register_with_comm(comm)
        >>> print(recorder.dump_json())
    """

    def __init__(self, max_entries: int = 2048, isolated: bool = False) -> None:
        alone = isolated or max_entries == 0
        self._recorder = _Recorder(max_entries) if alone else _shared_recorder(max_entries)
        self._handles: list[RemovableHandle] = []

    def register_with_comm(self, comm: Any) -> None:
        """Records every operation of this communicator from now on."""
        if self._recorder.entries.maxlen:
            self._register(comm, None)

    def _register(self, comm: Any, group: _Group | None) -> None:
        """group: that of a split, whose ranks only this recorder knows."""
        recorder = self._recorder
        name, backend = comm.get_name(), comm.get_backend()
        timeout_ms = int(comm.get_options().timeout.total_seconds() * 1000)
        life = comm._uuid  # of the last reconfigure()
        if group is None and comm.get_size():
            group = recorder.group(name, backend, list(range(comm.get_size())), comm.get_rank())
        current: dict[int, _Entry] = {}  # op id -> entry, between a call's pre and post hook

        def pre(op: OpName, op_id: int, args: PreHookArgs) -> None:
            nonlocal group, life
            if op is OpName.finalize:
                return
            if group is None or comm._uuid != life:
                # Other members under the same name, who all know the uuid; they all begin counting again.
                life = comm._uuid
                if group is not None:
                    group.past = True
                group = recorder.group(f"{name}#{life}", backend, list(range(comm.get_size())), comm.get_rank())
            called_in = group
            if isinstance(args, SplitPreHookArgs):
                # Only the members call it, so it is the first operation of their group, not one of this group.
                if group.rank not in args.ranks:
                    return
                members = [group.ranks[rank] for rank in args.ranks]
                called_in = recorder.group(args.name, backend, members, args.ranks.index(group.rank), group)
            current[op_id] = recorder.record(called_in, op, op_id, args, timeout_ms)
            if len(current) > _MAX_UNPOSTED:  # calls that raised: no post hook will come
                current.pop(next(iter(current)), None)

        def post(op_id: int, args: PostHookArgs) -> None:
            entry = current.pop(op_id, None)
            if entry is None:
                return
            recorder.started(entry, getattr(args, "work", None))
            if isinstance(args, SplitPostHookArgs) and args.new_comm is not None:
                self._register(args.new_comm, entry.group)

        def dump() -> None:
            if group is not None:
                self.dump_file(group.ranks[group.rank])

        self._handles += [
            comm.register_pre_hook(pre),
            comm.register_post_hook(post),
            comm.register_abort_hook(dump),
        ]

    def unregister(self) -> None:
        """Records nothing more. What was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def is_enabled(self) -> bool:
        """Whether a communicator is registered."""
        return bool(self._handles)

    def size(self) -> int:
        """How many operations are kept now."""
        return len(self._recorder.entries)

    __len__ = size

    def reset(self) -> None:
        """Forgets every operation and begins counting again. All ranks have to do it at the same point."""
        self._recorder.reset()

    def dump_json(self, include_completed: bool = True) -> str:
        """The entries, groups and versions as JSON; without include_completed only what has not ended well."""
        return json.dumps(self._recorder.dump(include_completed))

    def dump_file(self, rank: int, include_completed: bool = True) -> str:
        """Writes the dump, pickled as fr_trace wants it, and returns the file's name.

        After a reconfigure() it holds the new group only, since fr_trace takes one numbering of ranks; the abort before
        has written what was. The file is $TORCHCOMM_FR_DUMP_TEMP_FILE followed by the rank, without that variable
        ~/.cache/torch/comm_lib_trace_rank_ followed by the rank.
        """
        path = _file(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(self._recorder.dump(include_completed, past=False)))
        return str(path)
