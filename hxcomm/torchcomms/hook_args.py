"""What hooks are called with, and the registry that calls them.

A pre hook is fn(name, op_id, args), a post hook fn(op_id, args), an abort hook fn(). The op id joins a call's pre and
post hook. Fields and their order are TorchComms'. Knows nothing of communicators.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class OpName(Enum):
    """The operation a hook is told of; the names are TorchComm's methods."""

    send = auto()
    recv = auto()
    broadcast = auto()
    all_reduce = auto()
    reduce = auto()
    all_gather = auto()
    all_gather_v = auto()
    all_gather_single = auto()
    reduce_scatter = auto()
    reduce_scatter_v = auto()
    reduce_scatter_single = auto()
    all_to_all_single = auto()
    all_to_all_v_single = auto()
    all_to_all = auto()
    barrier = auto()
    scatter = auto()
    gather = auto()
    gather_single = auto()
    split = auto()
    new_window = auto()
    finalize = auto()


@dataclass(slots=True)
class SendPreHookArgs:
    """A send about to start; tensor is what it reads."""

    tensor: Tensor
    peer: int
    async_op: bool


@dataclass(slots=True)
class RecvPreHookArgs:
    """A recv about to start; tensor is what it will write."""

    tensor: Tensor
    peer: int
    async_op: bool


@dataclass(slots=True)
class BroadcastPreHookArgs:
    """A broadcast about to start; tensor is read on root and written elsewhere."""

    tensor: Tensor
    root: int
    async_op: bool


@dataclass(slots=True)
class AllReducePreHookArgs:
    """An all_reduce about to start; tensor is read and written."""

    tensor: Tensor
    async_op: bool


@dataclass(slots=True)
class ReducePreHookArgs:
    """A reduce about to start; tensor is read everywhere and written on root."""

    tensor: Tensor
    root: int
    async_op: bool


@dataclass(slots=True)
class AllGatherPreHookArgs:
    """An all_gather about to start: one tensor in, one per rank out."""

    input: Tensor
    output: list[Tensor]
    async_op: bool


@dataclass(slots=True)
class AllGatherVPreHookArgs:
    """An all_gather_v about to start: one tensor in, one per rank out, of any sizes."""

    input: Tensor
    output: list[Tensor]
    async_op: bool


@dataclass(slots=True)
class AllGatherSinglePreHookArgs:
    """An all_gather_single about to start: output holds every rank's input."""

    input: Tensor
    output: Tensor
    async_op: bool


@dataclass(slots=True)
class ReduceScatterPreHookArgs:
    """A reduce_scatter about to start: one tensor per rank in, one out."""

    input: list[Tensor]
    output: Tensor
    async_op: bool


@dataclass(slots=True)
class ReduceScatterVPreHookArgs:
    """A reduce_scatter_v about to start: one tensor per rank in, of any sizes, one out."""

    input: list[Tensor]
    output: Tensor
    async_op: bool


@dataclass(slots=True)
class ReduceScatterSinglePreHookArgs:
    """A reduce_scatter_single about to start: input holds one part per rank."""

    input: Tensor
    output: Tensor
    async_op: bool


@dataclass(slots=True)
class AllToAllSinglePreHookArgs:
    """An all_to_all_single about to start: equal parts."""

    input: Tensor
    output: Tensor
    async_op: bool


@dataclass(slots=True)
class AllToAllVSinglePreHookArgs:
    """An all_to_all_v_single about to start: parts of given sizes."""

    input: Tensor
    output: Tensor
    async_op: bool


@dataclass(slots=True)
class AllToAllPreHookArgs:
    """An all_to_all about to start: one tensor per rank in and out."""

    input: list[Tensor]
    output: list[Tensor]
    async_op: bool


@dataclass(slots=True)
class BarrierPreHookArgs:
    """A barrier about to start."""

    async_op: bool


@dataclass(slots=True)
class ScatterPreHookArgs:
    """A scatter about to start: one tensor per rank in (on root, elsewhere empty), one out."""

    output: Tensor
    input: list[Tensor]
    root: int
    async_op: bool


@dataclass(slots=True)
class GatherPreHookArgs:
    """A gather about to start: one tensor in, one per rank out (on root, elsewhere empty)."""

    input: Tensor
    output: list[Tensor]
    root: int
    async_op: bool


@dataclass(slots=True)
class GatherSinglePreHookArgs:
    """A gather_single about to start: root's output holds every rank's input."""

    input: Tensor
    output: Tensor
    root: int
    async_op: bool


@dataclass(slots=True)
class SplitPreHookArgs:
    """A split about to start."""

    ranks: list[int]
    name: str


@dataclass(slots=True)
class NewWindowPreHookArgs:
    """A new_window about to start."""


@dataclass(slots=True)
class FinalizePreHookArgs:
    """A finalize about to start."""


PreHookArgs = (
    SendPreHookArgs
    | RecvPreHookArgs
    | BroadcastPreHookArgs
    | AllReducePreHookArgs
    | ReducePreHookArgs
    | AllGatherPreHookArgs
    | AllGatherVPreHookArgs
    | AllGatherSinglePreHookArgs
    | ReduceScatterPreHookArgs
    | ReduceScatterVPreHookArgs
    | ReduceScatterSinglePreHookArgs
    | AllToAllSinglePreHookArgs
    | AllToAllVSinglePreHookArgs
    | AllToAllPreHookArgs
    | BarrierPreHookArgs
    | ScatterPreHookArgs
    | GatherPreHookArgs
    | GatherSinglePreHookArgs
    | SplitPreHookArgs
    | NewWindowPreHookArgs
    | FinalizePreHookArgs
)


@dataclass(slots=True)
class CollectivePostHookArgs:
    """An operation that was started. work tells when and how it ends; a hook must not wait on it."""

    work: Any  # a TorchWork; this module does not know that class


class SendPostHookArgs(CollectivePostHookArgs):
    """A send that was started."""

    __slots__ = ()


class RecvPostHookArgs(CollectivePostHookArgs):
    """A recv that was started."""

    __slots__ = ()


class BroadcastPostHookArgs(CollectivePostHookArgs):
    """A broadcast that was started."""

    __slots__ = ()


class AllReducePostHookArgs(CollectivePostHookArgs):
    """An all_reduce that was started."""

    __slots__ = ()


class ReducePostHookArgs(CollectivePostHookArgs):
    """A reduce that was started."""

    __slots__ = ()


class AllGatherPostHookArgs(CollectivePostHookArgs):
    """An all_gather that was started."""

    __slots__ = ()


class AllGatherVPostHookArgs(CollectivePostHookArgs):
    """An all_gather_v that was started."""

    __slots__ = ()


class AllGatherSinglePostHookArgs(CollectivePostHookArgs):
    """An all_gather_single that was started."""

    __slots__ = ()


class ReduceScatterPostHookArgs(CollectivePostHookArgs):
    """A reduce_scatter that was started."""

    __slots__ = ()


class ReduceScatterVPostHookArgs(CollectivePostHookArgs):
    """A reduce_scatter_v that was started."""

    __slots__ = ()


class ReduceScatterSinglePostHookArgs(CollectivePostHookArgs):
    """A reduce_scatter_single that was started."""

    __slots__ = ()


class AllToAllSinglePostHookArgs(CollectivePostHookArgs):
    """An all_to_all_single that was started."""

    __slots__ = ()


class AllToAllVSinglePostHookArgs(CollectivePostHookArgs):
    """An all_to_all_v_single that was started."""

    __slots__ = ()


class AllToAllPostHookArgs(CollectivePostHookArgs):
    """An all_to_all that was started."""

    __slots__ = ()


class BarrierPostHookArgs(CollectivePostHookArgs):
    """A barrier that was started."""

    __slots__ = ()


class ScatterPostHookArgs(CollectivePostHookArgs):
    """A scatter that was started."""

    __slots__ = ()


class GatherPostHookArgs(CollectivePostHookArgs):
    """A gather that was started."""

    __slots__ = ()


class GatherSinglePostHookArgs(CollectivePostHookArgs):
    """A gather_single that was started."""

    __slots__ = ()


@dataclass(slots=True)
class SplitPostHookArgs:
    """A split that is done; new_comm is None where this rank is no member."""

    new_comm: Any  # a TorchComm; this module does not know that class


@dataclass(slots=True)
class NewWindowPostHookArgs:
    """A window that was made."""

    new_window: Any  # a TorchCommWindow; this module does not know that class


@dataclass(slots=True)
class FinalizePostHookArgs:
    """A finalize that is done."""


PostHookArgs = (
    SendPostHookArgs
    | RecvPostHookArgs
    | BroadcastPostHookArgs
    | AllReducePostHookArgs
    | ReducePostHookArgs
    | AllGatherPostHookArgs
    | AllGatherVPostHookArgs
    | AllGatherSinglePostHookArgs
    | ReduceScatterPostHookArgs
    | ReduceScatterVPostHookArgs
    | ReduceScatterSinglePostHookArgs
    | AllToAllSinglePostHookArgs
    | AllToAllVSinglePostHookArgs
    | AllToAllPostHookArgs
    | BarrierPostHookArgs
    | ScatterPostHookArgs
    | GatherPostHookArgs
    | GatherSinglePostHookArgs
    | SplitPostHookArgs
    | NewWindowPostHookArgs
    | FinalizePostHookArgs
)

# Of the operations that give a work, by name.
POST_HOOK_ARGS: dict[OpName, type[CollectivePostHookArgs]] = {
    op: globals()["".join(part.title() for part in op.name.split("_")) + "PostHookArgs"]
    for op in OpName
    if op not in (OpName.split, OpName.new_window, OpName.finalize)
}

PreHook = Callable[[OpName, int, PreHookArgs], None]
PostHook = Callable[[int, Any], None]
AbortHook = Callable[[], None]


class RemovableHandle:
    """Takes a registered hook out again."""

    __slots__ = ("_remove",)

    def __init__(self, remove: Callable[[], None]) -> None:
        self._remove: Callable[[], None] | None = remove

    def remove(self) -> None:
        """Takes the hook out; a second time does nothing. A call that runs the hook right now finishes."""
        remove, self._remove = self._remove, None
        if remove is not None:
            remove()


class Hooks:
    """The hooks of one communicator, each kind in the order of registration.

    Any thread may register and remove. The three tuples are replaced, never changed, so that calls read them without a
    lock, and a hook may register or remove hooks. `if hooks:` is True when a call has somebody to tell.
    """

    __slots__ = ("_abort", "_changed", "_lock", "_post", "_pre")

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """changed: called after every registration and removal."""
        self._changed = changed
        self._lock = threading.Lock()
        # One-element lists as entries: the same function may be registered twice, and each handle removes its own.
        self._pre: tuple[list[PreHook], ...] = ()
        self._post: tuple[list[PostHook], ...] = ()
        self._abort: tuple[list[AbortHook], ...] = ()

    def __bool__(self) -> bool:
        """Whether a pre or post hook is registered: abort hooks do not concern calls."""
        return bool(self._pre or self._post)

    def register_pre(self, hook: PreHook) -> RemovableHandle:
        return self._register("_pre", hook)

    def register_post(self, hook: PostHook) -> RemovableHandle:
        return self._register("_post", hook)

    def register_abort(self, hook: AbortHook) -> RemovableHandle:
        return self._register("_abort", hook)

    def pre(self, op: OpName, op_id: int, args: PreHookArgs) -> None:
        """Runs the pre hooks. What one raises is the caller's: the operation is then not started."""
        for (hook,) in self._pre:
            hook(op, op_id, args)

    def post(self, op_id: int, args: PostHookArgs | CollectivePostHookArgs) -> None:
        """Runs the post hooks. The operation has been started; what one raises is the caller's."""
        for (hook,) in self._post:
            hook(op_id, args)

    def abort(self) -> None:
        """Runs every abort hook. They run while something has already failed, so an error in one is only logged."""
        for (hook,) in self._abort:
            try:
                hook()
            except Exception:
                log.exception("abort hook %r failed; the abort goes on", hook)

    def _register(self, kind: str, hook: Callable[..., None]) -> RemovableHandle:
        if not callable(hook):
            raise TypeError(f"a hook must be callable, got {hook!r}")
        entry = [hook]
        with self._lock:
            setattr(self, kind, (*getattr(self, kind), entry))
        self._changed()

        def remove() -> None:
            with self._lock:
                setattr(self, kind, tuple(each for each in getattr(self, kind) if each is not entry))
            self._changed()

        return RemovableHandle(remove)
