"""A c10d backend over a communicator: what torch.distributed, DDP, FSDP2 and DTensor call when they run on one.

torch's c10d.Backend cannot be subclassed in Python ("No constructor defined"), so the class is C++
(csrc/torch/communicator_backend.h) and asks `Calls` here. Over hxcomm's own backend c10d's calls go to its process
group in C++ as they are; Python makes them where hooks look on. Over a backend that somebody wrote in Python they
become calls of the communicator's methods.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from hxcomm import _C
from hxcomm.torchcomms import hook_args
from hxcomm.torchcomms.hook_args import POST_HOOK_ARGS, OpName
from hxcomm.torchcomms.native import Native
from hxcomm.torchcomms.reduce_op import RedOpType, ReduceOp
from hxcomm.torchcomms.work import DONE, Together, TorchWork

if TYPE_CHECKING:
    from hxcomm.torchcomms.batch import BatchSendRecv
    from hxcomm.torchcomms.comm import TorchComm

# How a pre hook's arguments are made from a call's: inputs, outputs, root or peer, async_op.
_HOOK_ARGS: dict[OpName, Callable[[list[Tensor], list[Tensor], int, bool], Any]] = {
    OpName.send: lambda inputs, _, peer, later: hook_args.SendPreHookArgs(inputs[0], peer, later),
    OpName.recv: lambda _, outputs, peer, later: hook_args.RecvPreHookArgs(outputs[0], peer, later),
    OpName.broadcast: lambda _, outputs, root, later: hook_args.BroadcastPreHookArgs(outputs[0], root, later),
    OpName.all_reduce: lambda _, outputs, root, later: hook_args.AllReducePreHookArgs(outputs[0], later),
    OpName.reduce: lambda _, outputs, root, later: hook_args.ReducePreHookArgs(outputs[0], root, later),
    OpName.all_gather: lambda inputs, outputs, _, later: hook_args.AllGatherPreHookArgs(inputs[0], outputs, later),
    OpName.all_gather_single: lambda inputs, outputs, _, later: hook_args.AllGatherSinglePreHookArgs(
        inputs[0], outputs[0], later
    ),
    OpName.reduce_scatter: lambda inputs, outputs, _, later: hook_args.ReduceScatterPreHookArgs(
        inputs, outputs[0], later
    ),
    OpName.reduce_scatter_single: lambda inputs, outputs, _, later: hook_args.ReduceScatterSinglePreHookArgs(
        inputs[0], outputs[0], later
    ),
    OpName.all_to_all_single: lambda inputs, outputs, _, later: hook_args.AllToAllSinglePreHookArgs(
        inputs[0], outputs[0], later
    ),
    OpName.all_to_all_v_single: lambda inputs, outputs, _, later: hook_args.AllToAllVSinglePreHookArgs(
        inputs[0], outputs[0], later
    ),
    OpName.all_to_all: lambda inputs, outputs, _, later: hook_args.AllToAllPreHookArgs(inputs, outputs, later),
    OpName.barrier: lambda _inputs, _outputs, _root, later: hook_args.BarrierPreHookArgs(later),
    OpName.scatter: lambda inputs, outputs, root, later: hook_args.ScatterPreHookArgs(outputs[0], inputs, root, later),
    OpName.gather: lambda inputs, outputs, root, later: hook_args.GatherPreHookArgs(inputs[0], outputs, root, later),
}
# c10d has forms of these that take several at a time; hooks then see one call for each.
_ONE_EACH = (OpName.all_reduce, OpName.all_gather_single, OpName.reduce_scatter_single)


class Calls:
    """What the class in C++ asks. It holds the communicator, which does not know of it."""

    def __init__(self, comm: TorchComm) -> None:
        self.comm = comm
        self._made_over = comm._open()
        self._batch: BatchSendRecv | None = None  # of plug-ins, between start_coalescing() and end_coalescing()
        self._started: list[TorchWork] = []

    @property
    def is_current(self) -> bool:
        """Whether the communicator is open and still has the group of ranks that this was made over."""
        return self.comm._calls is self._made_over and not self.comm.is_aborted()

    @property
    def native(self) -> Any:
        """The backend in C++ that runs calls, or None. AbortedError or ValueError where the communicator is closed, or
        has other ranks by now."""
        calls = self.comm._open()
        if calls is not self._made_over:
            raise ValueError(
                f"this process group was made before communicator '{self.comm.get_name()}' was reconfigured, which has "
                f"{self.comm.get_size()} ranks now: make the group, or the device mesh, again"
            )
        return calls.process_group if isinstance(calls, Native) else None

    @property
    def hooked(self) -> bool:
        """Whether hooks look on."""
        return bool(self.comm._hooks)

    def before(
        self, op: str, inputs: list[Tensor], outputs: list[Tensor], peer: int, async_op: bool
    ) -> Callable[[Any], None]:
        """Runs the pre hooks of an operation that `native` then runs. Returns what runs the post hooks, of its c10d
        Work."""
        name, hooks = OpName[op], self.comm._hooks
        each = list(zip(inputs, outputs, strict=True)) if name in _ONE_EACH and len(outputs) > 1 else None
        ids = []
        for given, taken in [([one], [other]) for one, other in each] if each is not None else [(inputs, outputs)]:
            ids.append(next(self.comm._op_ids))
            hooks.pre(name, ids[-1], _HOOK_ARGS[name](given, taken, peer, async_op))

        def after(handle: Any) -> None:
            work = TorchWork(handle) if async_op else DONE
            for op_id in ids:
                hooks.post(op_id, POST_HOOK_ARGS[name](work))

        return after

    # -- what c10d asks of any backend --------------------------------------------------------------------------------

    def abort(self) -> None:
        """destroy_process_group's companion: ends what is pending."""
        self.comm.abort()

    def shutdown(self) -> None:
        """destroy_process_group() ends the communicator; harmless when it has ended, or has other ranks by now."""
        if self.comm._calls is self._made_over:
            self.comm.finalize()

    def set_timeout(self, seconds: float) -> None:
        """Of calls from now on."""
        self.comm.set_timeout(timedelta(seconds=seconds))

    def split(self, ranks: list[int], name: str) -> _BackendWrapper | None:
        """Of split_group. The communicator's name is the group's, or is made of the ranks."""
        part = self.comm.split(ranks, name or f"{self.comm.get_name()}/{'-'.join(map(str, ranks))}")
        return None if part is None else _BackendWrapper(part)

    # -- calls over a backend in Python: c10d's arguments, the communicator's methods ---------------------------------

    def broadcast(self, tensors: list[Tensor], root: int, async_op: bool, timeout_s: float | None) -> TorchWork:
        return self.comm.broadcast(_only(tensors), root, async_op, timeout=_timeout(timeout_s))

    def all_reduce(
        self, tensors: list[Tensor], op: dist.ReduceOp, async_op: bool, timeout_s: float | None
    ) -> TorchWork:
        kind, timeout = _reduce_op(op), _timeout(timeout_s)
        return _together([self.comm.all_reduce(each, kind, async_op, timeout=timeout) for each in tensors])

    def reduce(
        self, tensors: list[Tensor], root: int, op: dist.ReduceOp, async_op: bool, timeout_s: float | None
    ) -> TorchWork:
        return self.comm.reduce(_only(tensors), root, _reduce_op(op), async_op, timeout=_timeout(timeout_s))

    def all_gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], async_op: bool, timeout_s: float | None
    ) -> TorchWork:
        into, tensor = _only(outputs), _only(inputs)
        alike = all(each.numel() == tensor.numel() for each in into)
        gather = self.comm.all_gather if alike else self.comm.all_gather_v
        return gather(into, tensor, async_op, timeout=_timeout(timeout_s))

    def all_gather_single(
        self, outputs: list[Tensor], inputs: list[Tensor], async_op: bool, timeout_s: float | None
    ) -> TorchWork:
        timeout = _timeout(timeout_s)
        pairs = zip(outputs, inputs, strict=True)
        return _together([self.comm.all_gather_single(into, each, async_op, timeout=timeout) for into, each in pairs])

    def gather(
        self, outputs: list[Tensor], inputs: list[Tensor], root: int, async_op: bool, timeout_s: float | None
    ) -> TorchWork:
        return self.comm.gather(outputs, _only(inputs), root, async_op, timeout=_timeout(timeout_s))

    def scatter(
        self, outputs: list[Tensor], inputs: list[Tensor], root: int, async_op: bool, timeout_s: float | None
    ) -> TorchWork:
        return self.comm.scatter(_only(outputs), inputs, root, async_op, timeout=_timeout(timeout_s))

    def reduce_scatter(
        self,
        outputs: list[Tensor],
        inputs: list[list[Tensor]],
        op: dist.ReduceOp,
        async_op: bool,
        timeout_s: float | None,
    ) -> TorchWork:
        parts, into = _only(inputs), _only(outputs)
        alike = all(each.numel() == into.numel() for each in parts)
        scatter = self.comm.reduce_scatter if alike else self.comm.reduce_scatter_v
        return scatter(into, parts, _reduce_op(op), async_op, timeout=_timeout(timeout_s))

    def reduce_scatter_single(
        self, outputs: list[Tensor], inputs: list[Tensor], op: dist.ReduceOp, async_op: bool, timeout_s: float | None
    ) -> TorchWork:
        kind, timeout, pairs = _reduce_op(op), _timeout(timeout_s), zip(outputs, inputs, strict=True)
        return _together(
            [self.comm.reduce_scatter_single(into, each, kind, async_op, timeout=timeout) for into, each in pairs]
        )

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        async_op: bool,
        timeout_s: float | None,
    ) -> TorchWork:
        timeout, size = _timeout(timeout_s), self.comm.get_size()
        if not output_splits and not input_splits:
            return self.comm.all_to_all_single(output, input, async_op, timeout=timeout)
        theirs = output_splits or [output.size(0) // size] * size
        ours = input_splits or [input.size(0) // size] * size
        return self.comm.all_to_all_v_single(output, input, theirs, ours, async_op, timeout=timeout)

    def all_to_all(
        self, outputs: list[Tensor], inputs: list[Tensor], async_op: bool, timeout_s: float | None
    ) -> TorchWork:
        return self.comm.all_to_all(outputs, inputs, async_op, timeout=_timeout(timeout_s))

    def barrier(self, async_op: bool, timeout_s: float | None) -> TorchWork:
        return self.comm.barrier(async_op, timeout=_timeout(timeout_s))

    def send(self, tensors: list[Tensor], to: int, tag: int) -> TorchWork:
        _without_tag(tag)
        if self._batch is None:
            return self.comm.send(_only(tensors), to, async_op=True)
        self._batch.send(_only(tensors), to)
        return DONE

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> TorchWork:
        _without_tag(tag)
        if self._batch is None:
            return self.comm.recv(_only(tensors), source, async_op=True)
        self._batch.recv(_only(tensors), source)
        return DONE

    def start_coalescing(self) -> None:
        """What is sent and received until end_coalescing() becomes one batch: its order cannot deadlock."""
        self._batch = self.comm.batch_op_create()

    def end_coalescing(self) -> TorchWork:
        batch, self._batch = self._batch, None
        return DONE if batch is None else batch.issue(async_op=True)


class _BackendWrapper(_C.CommunicatorBackend):
    """The c10d backend over a communicator, for dist.ProcessGroup._register_backend(). The name is torchcomms'.

    Collectives, point to point (tags too), coalescing and split_group work. Hooks of the communicator see every call,
    all_reduce of sparse tensors, recv from any rank and monitored_barrier excepted; those three, and tags, need backend
    hxcomm. Errors are raised where c10d raises them: abort_process_on_timeout_or_error is for the communicator's own
    methods.
    """

    def __init__(self, comm: TorchComm) -> None:
        super().__init__(rank=comm.get_rank(), size=comm.get_size(), name=comm.get_backend(), calls=Calls(comm))

    def get_comm(self) -> TorchComm:
        """The communicator."""
        comm: TorchComm = super().get_comm()
        return comm

    def get_mem_allocator(self) -> Any:
        """The communicator's."""
        return super().get_mem_allocator()


def _only(given: list[Any]) -> Any:
    if len(given) != 1:
        raise ValueError(f"one tensor (or list of them) a call, not {len(given)}")
    return given[0]


def _timeout(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


def _without_tag(tag: int) -> None:
    if tag != 0:
        raise NotImplementedError(f"tag {tag}: messages of a communicator have no tags; backend hxcomm alone has them")


def _reduce_op(op: dist.ReduceOp) -> ReduceOp:
    for kind in RedOpType:
        if kind is not RedOpType.PREMUL_SUM and op == getattr(dist.ReduceOp, kind.name):
            found: ReduceOp = getattr(ReduceOp, kind.name)
            return found
    raise NotImplementedError(
        f"{op} over a backend in Python: torch does not say the factor; call the communicator's method"
    )


def _together(works: list[TorchWork]) -> TorchWork:
    return works[0] if len(works) == 1 else TorchWork(Together(works))
