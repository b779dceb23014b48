"""The communicator: a group of ranks, a device, and the operations on them.

This layer is the same for every backend: it knows whether the communicator is open, runs hooks, counts op ids and
decides what an error does. The work is done by what `_calls` is: native.Native, or the adapter of a plug-in.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch._C._distributed_c10d import Store

import hxcomm
from hxcomm.errors import AbortedError, CommTimeoutError, PeerFailedError
from hxcomm.torchcomms import hook_args as args
from hxcomm.torchcomms import recovery, rendezvous, validation
from hxcomm.torchcomms.backend import PlugIn, TorchCommBackend, get_mem_allocator
from hxcomm.torchcomms.batch import BatchSendRecv, P2POp, P2POpType
from hxcomm.torchcomms.hints import number_of
from hxcomm.torchcomms.hook_args import Hooks, OpName, PostHookArgs, PreHookArgs, RemovableHandle
from hxcomm.torchcomms.native import BACKEND, Native, milliseconds
from hxcomm.torchcomms.operations import Hints, Operations
from hxcomm.torchcomms.options import CommOptions, InitHandle
from hxcomm.torchcomms.work import DONE, Together, TorchWork

if TYPE_CHECKING:
    from hxcomm.torchcomms.mem_allocator import MemAllocator
    from hxcomm.torchcomms.window import TorchCommWindow


class TorchComm(Operations):
    """A group of ranks that communicate tensors of one device. Made by new_comm(), split() or reconfigure().

    Every operation takes `async_op` and, at the end, `hints` (see new_comm) and `timeout` (of this call; None: the
    communicator's), and returns a TorchWork. async_op=False: blocks, and the result is there when it returns;
    async_op=True: returns at once, and the tensors belong to the operation until the work has ended. All ranks call the
    same collectives in the same order; where they do not, every rank raises MismatchError in that call, nothing was
    sent, and the communicator stays usable. A call that this rank got wrong (device, dtype, counts, root) raises
    ValueError here and MismatchError, quoting it, on the others. PeerFailedError, CommTimeoutError and AbortedError
    end the communicator: what then happens to the process is `abort_process_on_timeout_or_error`'s to say.

    Tensors may be non-contiguous (they are then copied), and may have no elements. "Bytes" below are what this rank
    passes, S; docs/performance.md says what moves.
    """

    def __init__(self, backend: str, device: torch.device, name: str, options: CommOptions) -> None:
        """Not for programs: new_comm() makes a communicator."""
        self._backend, self._device, self._name, self._options = backend, device, name, options
        self._calls: Any = None  # Native or PlugIn; None: it has no group (before reconfigure, after the end)
        self._all_reduce: Callable[..., Any] | None = None  # the shortest way, where one may be taken
        self._store: Store | None = options.store
        self._hooks = Hooks(self._choose_way)
        self._op_ids = itertools.count(1)
        self._why_closed = "it has no group yet: call reconfigure()"
        self._uuid: int | None = None  # of the reconfigure() that gave it its group
        self._aborted = False
        self._to_self: list[int] = [0, 0]  # receives and sends of this rank to itself that were started
        self._running: list[TorchWork] = []
        self._coalesced: list[TorchWork] | None = None
        self._registered: dict[int, int] = {}
        self._recovery: recovery.Recovery | None = None  # where it was made with enable_reconfigure=True

    # -- what it is ---------------------------------------------------------------------------------------------------

    def get_rank(self) -> int:
        """This process's number in the communicator; -1 where it has no group yet."""
        return -1 if self._calls is None else int(self._calls.rank)

    def get_size(self) -> int:
        """How many ranks there are; 0 where it has no group yet."""
        return 0 if self._calls is None else int(self._calls.size)

    def get_name(self) -> str:
        """The name that new_comm() or split() was given."""
        return self._name

    def get_device(self) -> torch.device:
        """The device whose tensors it communicates."""
        return self._device

    def get_options(self) -> CommOptions:
        """What it was made with."""
        return self._options

    def get_backend(self) -> str:
        """The name of the backend."""
        return self._backend

    def get_backend_version(self) -> str:
        """Of the backend; of hxcomm the package's."""
        return hxcomm.__version__ if self._backend == BACKEND else str(self._plugged().get_backend_version())

    def get_backend_impl(self) -> Any:
        """The backend's own object: a TorchCommBackend, or hxcomm's Native."""
        return self._calls if isinstance(self._calls, Native) else self._plugged()

    def unsafe_get_backend(self) -> Any:
        """As get_backend_impl(): TorchComms' older name of it."""
        return self.get_backend_impl()

    def _plugged(self) -> TorchCommBackend:
        impl: TorchCommBackend = self._open().backend
        return impl

    def __repr__(self) -> str:
        state = f"rank {self.get_rank()} of {self.get_size()}" if self._calls is not None else self._why_closed
        return f"TorchComm('{self._name}', backend '{self._backend}', {self._device}, {state})"

    # -- its life -----------------------------------------------------------------------------------------------------

    @property
    def _process_group(self) -> Any:
        """The c10d backend under a communicator of backend hxcomm."""
        return self._open().process_group

    def _adopt(self, calls: Any) -> None:
        """Gives it a group, of Native or PlugIn."""
        if calls is not self._calls:
            self._to_self = [0, 0]
        self._calls, self._aborted = calls, False
        self._choose_way()

    def _choose_way(self) -> None:
        """The shortest way asks for nothing and tells nobody: each look at a condition would cost it 0.05 us."""
        calls = self._calls
        short = isinstance(calls, Native) and calls.hints == 0 and not self._aborted and not self._hooks
        self._all_reduce = calls.communicator.all_reduce if short else None

    def _close(self, why: str) -> None:
        self._calls, self._running, self._why_closed = None, [], why
        self._choose_way()

    def _open(self) -> Any:
        """Where calls go. AbortedError after abort(), ValueError where there is no group."""
        if self._aborted:
            raise AbortedError(
                f"communicator '{self._name}' was aborted: only reconfigure() or finalize() may be called now"
            )
        if self._calls is None:
            raise ValueError(f"communicator '{self._name}' cannot be used: {self._why_closed}")
        return self._calls

    def finalize(self) -> None:
        """Ends what this rank still has running, at most until its timeout, and leaves. The last call; harmless twice.

        It does not wait for other ranks; one that then still needs this rank raises PeerFailedError.
        """
        op_id = next(self._op_ids)
        if self._hooks:
            self._hooks.pre(OpName.finalize, op_id, args.FinalizePreHookArgs())
        if self._calls is not None:
            if not self._aborted:
                self._drain()
            if isinstance(self._calls, Native):
                self._calls.process_group.shutdown()
            else:
                self._calls.backend.finalize()
        if self._recovery is not None:
            self._recovery.close()
            self._recovery = None
        self._close("it was finalized")
        self._aborted = False
        if self._hooks:
            self._hooks.post(op_id, args.FinalizePostHookArgs())

    def _drain(self) -> None:
        for work in self._running:
            try:
                work.wait()
            except Exception as error:  # whoever holds the work sees it; here it must not prevent leaving
                print(f"hxcomm: finalize of '{self._name}': {error}", file=sys.stderr)
        self._running = []

    def set_timeout(self, timeout: timedelta) -> None:
        """Of calls from now on that do not give their own."""
        calls = self._open()
        milliseconds(timeout)  # raises where it is none
        if isinstance(calls, Native):
            calls.process_group.set_timeout(timeout)
        else:
            calls.backend.set_timeout(timeout)
        self._options.timeout = timeout

    def set_hints(self, hints: dict[str, str]) -> None:
        """Of calls from now on that do not give their own. ValueError where one is unknown or wrong."""
        calls = self._open()
        if not isinstance(calls, Native):
            raise NotImplementedError(f"backend {self._backend!r} cannot change its hints")
        calls.hints = number_of(hints)
        self._options.hints = dict(hints)
        self._adopt(calls)

    def is_abort_supported(self) -> bool:
        """Whether abort() works with this backend."""
        return self._backend == BACKEND or type(self._plugged()).abort is not TorchCommBackend.abort

    def is_aborted(self) -> bool:
        """Whether abort() was called, or an error ended the communicator, and no reconfigure() has followed."""
        return self._aborted

    def abort(self) -> None:
        """Ends all pending work of all ranks with AbortedError. From any thread; does not block.

        After it only reconfigure() and finalize() may be called.
        """
        if self._recovery is not None and self._recovery.interrupt():
            self._hooks.abort()
        if self._aborted or self._calls is None:
            return
        self._aborted = True
        self._choose_way()
        if isinstance(self._calls, Native):
            self._calls.process_group.abort()
        else:
            self._calls.backend.abort()
        self._hooks.abort()

    def get_init_handle(self) -> InitHandle:
        """What the others name this process by in reconfigure(). Made with enable_reconfigure=True only."""
        return recovery.init_handle(self)

    def reconfigure(
        self,
        uuid: int,
        init_handles: list[InitHandle] | set[InitHandle],
        timeout: timedelta | None = None,
        hints: Hints = None,
    ) -> TorchWork:
        """Gives the communicator the group of the named processes; each of them calls it alike. Blocks."""
        return recovery.reconfigure(self, uuid, init_handles, timeout, hints)

    def split(
        self, ranks: list[int], name: str, hints: Hints = None, timeout: timedelta | None = None
    ) -> TorchComm | None:
        """The communicator of these ranks of this one, in this order; None where this rank is not among them.

        Blocks until all of them have called it alike; ranks that are left out need not. ValueError where a rank is out
        of range or named twice.
        """
        calls = self._open()
        validation.check_split(ranks, rank=calls.rank, size=calls.size)
        op_id = next(self._op_ids)
        if self._hooks:
            self._hooks.pre(OpName.split, op_id, args.SplitPreHookArgs(list(ranks), name))
        part = None
        if calls.rank in ranks:
            options = replace(
                self._options,
                timeout=self._options.timeout if timeout is None else timeout,
                hints=dict(self._options.hints if hints is None else hints),
            )
            part = TorchComm(self._backend, self._device, name, options)
            part._adopt(calls.split(list(ranks), name, options))
        if self._hooks:
            self._hooks.post(op_id, args.SplitPostHookArgs(part))
        return part

    # -- hooks --------------------------------------------------------------------------------------------------------

    def register_pre_hook(self, callback: Callable[[OpName, int, PreHookArgs], None]) -> RemovableHandle:
        """Calls callback(name, op_id, args) before every operation begins. What it raises prevents the operation on
        this rank; the others then wait for it until their timeout."""
        return self._hooks.register_pre(callback)

    def register_post_hook(self, callback: Callable[[int, PostHookArgs], None]) -> RemovableHandle:
        """Calls callback(op_id, args) after every operation was started (async) or has ended (sync)."""
        return self._hooks.register_post(callback)

    def register_abort_hook(self, callback: Callable[[], None]) -> RemovableHandle:
        """Calls callback() when the communicator is aborted, and before an error ends the process."""
        return self._hooks.register_abort(callback)

    # -- how calls are made -------------------------------------------------------------------------------------------

    def _issue(
        self,
        op: OpName,
        hook: Callable[[], PreHookArgs],
        operands: tuple[Any, ...],
        async_op: bool,
        hints: Hints,
        timeout: timedelta | None,
    ) -> TorchWork:
        calls = self._open()

        def start() -> Any:
            try:
                return calls.call(op, operands, async_op, hints, timeout)
            except TypeError as error:
                raise self._wrong_types(error, op, (*operands, async_op)) from None

        if not self._hooks:
            return self._started(start)
        op_id = next(self._op_ids)
        self._hooks.pre(op, op_id, hook())
        work = self._started(start)
        self._hooks.post(op_id, args.POST_HOOK_ARGS[op](work))
        return work

    def _started(self, start: Callable[[], Any]) -> TorchWork:
        try:
            handle = start()
        except Exception as error:
            raise self._failed(error) from None
        if handle is None:
            return DONE
        work = TorchWork(handle, self._failed)
        if len(self._running) >= 64:  # finalize() waits for what is left; what has ended need not be kept
            self._running = [each for each in self._running if not each.is_completed()]
        self._running.append(work)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _failed(self, error: Exception) -> Exception:
        """What to raise for an error of a call. Ends the process instead where the options say so."""
        if isinstance(error, (PeerFailedError, CommTimeoutError, AbortedError)):
            if self._options.abort_process_on_timeout_or_error and not isinstance(error, AbortedError):
                self._end_process(error)
            if not self._aborted:
                self._aborted = True
                self._choose_way()
                self._hooks.abort()
        return error

    def _end_process(self, error: Exception) -> NoReturn:
        self._hooks.abort()
        print(
            f"{type(error).__name__}: {error}\nhxcomm: the process ends, as abort_process_on_timeout_or_error=True, "
            "the default, asks for; new_comm(..., abort_process_on_timeout_or_error=False) raises the error instead",
            file=sys.stderr,
            flush=True,
        )
        os.abort()

    def _check_self(self, sends: int, receives: int, async_op: bool) -> None:
        """A message of this rank to itself needs both ends, or a blocking call would wait for itself."""
        started, sent = self._to_self[0] + receives, self._to_self[1] + sends
        if not async_op and (sent > started if sends else started > sent):
            what, other = ("send", "recv") if sends else ("recv", "send")
            raise ValueError(
                f"rank {self.get_rank()} of '{self._name}': a blocking {what} with itself, and no {other} was started "
                f"before: start the {other} first with async_op=True, or put both into a batch"
            )
        self._to_self = [started, sent]

    # -- more than one operation --------------------------------------------------------------------------------------

    def batch_op_create(self) -> BatchSendRecv:
        """Collects sends and receives that begin together."""
        return BatchSendRecv(self)

    def _issue_batch(self, ops: list[P2POp], async_op: bool, hints: Hints, timeout: timedelta | None) -> TorchWork:
        calls = self._open()
        validation.check_batch(ops, rank=calls.rank, size=calls.size, device=self._device)
        if not ops:
            return DONE
        sends = [each.type is P2POpType.SEND for each in ops]
        tensors, peers = [each.tensor for each in ops], [each.peer for each in ops]
        ids = []
        if self._hooks:
            for each, send in zip(ops, sends, strict=True):
                ids.append(next(self._op_ids))
                told = args.SendPreHookArgs if send else args.RecvPreHookArgs
                name = OpName.send if send else OpName.recv
                self._hooks.pre(name, ids[-1], told(each.tensor, each.peer, async_op))
        work = self._started(lambda: calls.batch(sends, tensors, peers, async_op, hints, timeout))
        for op_id, send in zip(ids, sends, strict=False):  # no ids: nobody looks on
            self._hooks.post(op_id, (args.SendPostHookArgs if send else args.RecvPostHookArgs)(work))
        return work

    # -- memory -------------------------------------------------------------------------------------------------------

    def new_window(self, tensor: torch.Tensor | None = None) -> TorchCommWindow:
        """One-sided access to a tensor of every rank. With a tensor it is registered at once, which blocks until every
        rank has done so."""
        from hxcomm.torchcomms.window import TorchCommWindow

        self._open()
        op_id = next(self._op_ids)
        if self._hooks:
            self._hooks.pre(OpName.new_window, op_id, args.NewWindowPreHookArgs())
        if self._backend == BACKEND:
            window = TorchCommWindow(self)
            if tensor is not None:
                window.tensor_register(tensor)
        else:
            window = self._plugged().new_window(tensor)
        if self._hooks:
            self._hooks.post(op_id, args.NewWindowPostHookArgs(window))
        return window

    def get_mem_allocator(self) -> MemAllocator:
        """Whose CPU tensors peers on this host can map, as windows need it."""
        allocator: MemAllocator = get_mem_allocator(self._backend)
        return allocator

    @property
    def mem_allocator(self) -> MemAllocator:
        """See get_mem_allocator."""
        return self.get_mem_allocator()

    def tensor_register(self, tensor: torch.Tensor) -> None:
        """Says that this tensor will be communicated often. Nothing needs it here; programs for other backends do."""
        self._open()
        if tensor.device.type != self._device.type or not tensor.is_contiguous():
            raise ValueError(
                f"tensor_register takes a contiguous tensor on {self._device}, not one on {tensor.device} with strides "
                f"{tensor.stride()}"
            )
        self._registered[tensor.data_ptr()] = self._registered.get(tensor.data_ptr(), 0) + 1

    def tensor_deregister(self, tensor: torch.Tensor) -> None:
        """The opposite. ValueError where it was not registered."""
        if self._registered.get(tensor.data_ptr(), 0) == 0:
            raise ValueError("tensor_deregister of a tensor that was not registered with this communicator")
        self._registered[tensor.data_ptr()] -= 1

    def start_coalescing(self) -> None:
        """See hxcomm.torchcomms.coalescing.coalesce()."""
        if self._coalesced is not None:
            raise RuntimeError(f"communicator '{self._name}' is coalescing already")
        self._open()
        self._coalesced = []

    def end_coalescing(self) -> TorchWork | None:
        """One handle for all that was started since start_coalescing(); None where that is nothing."""
        works, self._coalesced = self._coalesced, None
        if works is None:
            raise RuntimeError(f"communicator '{self._name}' is not coalescing")
        return TorchWork(Together(works)) if works else None


def new_comm(
    backend: str,
    device: torch.device | str,
    name: str,
    abort_process_on_timeout_or_error: bool | None = None,
    timeout: timedelta | None = None,
    high_priority_stream: bool | None = None,
    store: Store | None = None,
    enable_reconfigure: bool = False,
    hints: Hints = None,
) -> TorchComm:
    """A communicator of all ranks of the job. Blocks until all have called it, or InitError says who did not come.

    backend: "hxcomm", or one that register_backend() or an installed package brings (built_backends() lists them).
    device: "cpu" or "hx". name: of this communicator, the same on every rank; its keys in the store carry it. Rank and
    size are TORCHCOMM_RANK and TORCHCOMM_SIZE, else RANK and WORLD_SIZE. store: of the job; None: the one at
    MASTER_ADDR and MASTER_PORT. timeout: of its operations and of its creation (default 10 minutes).
    abort_process_on_timeout_or_error: True (the default) ends the process when an operation's timeout passes or a peer
    fails; False raises CommTimeoutError or PeerFailedError. enable_reconfigure: it has no group until reconfigure().
    hints: text to text; {"algorithm": "all_reduce:ring", "chunk": "256KiB", "determinism": "layout"}.

    ValueError for another device or an unknown hint, ModuleNotFoundError for an unknown backend.
    """
    given: dict[str, Any] = {
        "abort_process_on_timeout_or_error": abort_process_on_timeout_or_error,
        "timeout": timeout,
        "high_priority_stream": high_priority_stream,
        "store": store,
        "hints": None if hints is None else dict(hints),
    }
    options = CommOptions(
        enable_reconfigure=enable_reconfigure, **{field: value for field, value in given.items() if value is not None}
    )
    milliseconds(options.timeout)  # raises where it is none
    where = torch.device(device)
    if enable_reconfigure and backend != BACKEND:
        raise NotImplementedError(f"new_comm(enable_reconfigure=True): backend {backend!r} cannot be reconfigured")
    if backend == BACKEND:
        if where.type not in ("cpu", "hx"):
            raise ValueError(f"new_comm: backend hxcomm serves devices cpu and hx, not {where}")
        number_of(options.hints)  # raises where a hint is wrong, before anybody waits
    # A newcomer to a communicator that has groups has no rank yet, and needs none where the store is given.
    rank, size = (0, 1) if enable_reconfigure and store is not None else rendezvous.rank_and_size()
    options.store = rendezvous.store_for(name, store, rank, options.timeout)
    comm = TorchComm(backend, where, name, options)
    if backend != BACKEND:
        comm._adopt(PlugIn.create(backend, comm_name=name, device=where, options=options))
    elif enable_reconfigure:
        comm._recovery = recovery.Recovery(name)
    else:
        comm._adopt(Native.create(rank, size, device=where, name=name, options=options))
    return comm
