"""What torch.compile traces in place of a communicator's methods, and how torch learns of it.

A communicator is an opaque object to torch: an input of the graph. Dynamo takes a method's stand-in from the method's
attribute `_torchdynamo_inline`; nothing of torch is patched, and eager calls are as fast as without. Each stand-in has
the parameters of its method; `comm` is the communicator.
"""

from __future__ import annotations

from datetime import timedelta

from torch import Tensor
from torch._library.opaque_object import MemberType, register_opaque_type

from hxcomm.torchcomms.comm import TorchComm
from hxcomm.torchcomms.functional.tracing import AllIssued, Batch, Hints, Issued, blocks, issue, premul_sum
from hxcomm.torchcomms.reduce_op import ReduceOp

List = list[Tensor]
Time = timedelta | None


def all_reduce(
    comm: TorchComm, tensor: Tensor, op: ReduceOp, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    return issue(comm, "all_reduce", [tensor], [], [], op, async_op, hints, timeout, [tensor])


def reduce(
    comm: TorchComm, tensor: Tensor, root: int, op: ReduceOp, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    return issue(comm, "reduce", [tensor], [], [root], op, async_op, hints, timeout, [tensor])


def broadcast(
    comm: TorchComm, tensor: Tensor, root: int, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    return issue(comm, "broadcast", [tensor], [], [root], None, async_op, hints, timeout, [tensor])


def all_gather(
    comm: TorchComm, tensor_list: List, tensor: Tensor, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    return issue(comm, "all_gather", [tensor], tensor_list, [], None, async_op, hints, timeout, tensor_list)


def all_gather_v(
    comm: TorchComm, tensor_list: List, tensor: Tensor, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    return issue(comm, "all_gather_v", [tensor], tensor_list, [], None, async_op, hints, timeout, tensor_list)


def all_gather_single(
    comm: TorchComm, output: Tensor, input: Tensor, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    return issue(comm, "all_gather_single", [input], [output], [], None, async_op, hints, timeout, [output])


def reduce_scatter(
    comm: TorchComm,
    output: Tensor,
    input_list: List,
    op: ReduceOp,
    async_op: bool,
    hints: Hints = None,
    timeout: Time = None,
) -> Issued:
    return issue(comm, "reduce_scatter", input_list, [output], [], op, async_op, hints, timeout, [output])


def reduce_scatter_v(
    comm: TorchComm,
    output: Tensor,
    input_list: List,
    op: ReduceOp,
    async_op: bool,
    hints: Hints = None,
    timeout: Time = None,
) -> Issued:
    return issue(comm, "reduce_scatter_v", input_list, [output], [], op, async_op, hints, timeout, [output])


def reduce_scatter_single(
    comm: TorchComm,
    output: Tensor,
    input: Tensor,
    op: ReduceOp,
    async_op: bool,
    hints: Hints = None,
    timeout: Time = None,
) -> Issued:
    return issue(comm, "reduce_scatter_single", [input], [output], [], op, async_op, hints, timeout, [output])


def all_to_all_single(
    comm: TorchComm, output: Tensor, input: Tensor, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    return issue(comm, "all_to_all_single", [input], [output], [], None, async_op, hints, timeout, [output])


def all_to_all_v_single(
    comm: TorchComm,
    output: Tensor,
    input: Tensor,
    output_split_sizes: list[int],
    input_split_sizes: list[int],
    async_op: bool,
    hints: Hints = None,
    timeout: Time = None,
) -> Issued:
    return issue(
        comm,
        "all_to_all_v_single",
        [input],
        [output],
        [*output_split_sizes, *input_split_sizes],
        None,
        async_op,
        hints,
        timeout,
        [output],
    )


def all_to_all(
    comm: TorchComm,
    output_tensor_list: List,
    input_tensor_list: List,
    async_op: bool,
    hints: Hints = None,
    timeout: Time = None,
) -> Issued:
    return issue(
        comm,
        "all_to_all",
        input_tensor_list,
        output_tensor_list,
        [],
        None,
        async_op,
        hints,
        timeout,
        output_tensor_list,
    )


def scatter(
    comm: TorchComm,
    output_tensor: Tensor,
    input_tensor_list: List,
    root: int,
    async_op: bool,
    hints: Hints = None,
    timeout: Time = None,
) -> Issued:
    return issue(
        comm,
        "scatter",
        input_tensor_list if comm.get_rank() == root else [],
        [output_tensor],
        [root],
        None,
        async_op,
        hints,
        timeout,
        [output_tensor],
    )


def gather(
    comm: TorchComm,
    output_tensor_list: List,
    input_tensor: Tensor,
    root: int,
    async_op: bool,
    hints: Hints = None,
    timeout: Time = None,
) -> Issued:
    into = output_tensor_list if comm.get_rank() == root else []
    return issue(comm, "gather", [input_tensor], into, [root], None, async_op, hints, timeout, into)


def gather_single(
    comm: TorchComm, output: Tensor, input: Tensor, root: int, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    into = [output] if comm.get_rank() == root else []
    return issue(comm, "gather_single", [input], into, [root], None, async_op, hints, timeout, into)


def send(
    comm: TorchComm, tensor: Tensor, dst: int, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    return issue(comm, "send", [tensor], [], [dst], None, async_op, hints, timeout, [])


def recv(
    comm: TorchComm, tensor: Tensor, src: int, async_op: bool, hints: Hints = None, timeout: Time = None
) -> Issued:
    return issue(comm, "recv", [], [tensor], [src], None, async_op, hints, timeout, [tensor])


def barrier(comm: TorchComm, async_op: bool, hints: Hints = None, timeout: Time = None) -> Issued:
    return issue(comm, "barrier", [], [], [], None, async_op, hints, timeout, [])


def batch_op_create(comm: TorchComm) -> Batch:
    return Batch(comm)


def start_coalescing(comm: TorchComm) -> None:
    blocks.append([])


def end_coalescing(comm: TorchComm) -> AllIssued:
    return AllIssued(blocks.pop())


STAND_INS = {
    function.__name__: function
    for function in (
        all_reduce,
        reduce,
        broadcast,
        all_gather,
        all_gather_v,
        all_gather_single,
        reduce_scatter,
        reduce_scatter_v,
        reduce_scatter_single,
        all_to_all_single,
        all_to_all_v_single,
        all_to_all,
        scatter,
        gather,
        gather_single,
        send,
        recv,
        barrier,
        batch_op_create,
        start_coalescing,
        end_coalescing,
    )
}


def _prepare_to_compile(comm: TorchComm) -> None:
    """A method that is called with the communicator itself when a graph is traced: brings the operators."""
    from hxcomm.torchcomms.functional import operators  # noqa: F401


def register() -> None:
    """Tells torch of communicators. Once, when the package is imported: 0.1 ms, and no part of the compiler."""
    ReduceOp.PREMUL_SUM._torchdynamo_inline = premul_sum  # type: ignore[attr-defined]
    setattr(TorchComm, _prepare_to_compile.__name__, _prepare_to_compile)
    members = dict.fromkeys(
        ("get_rank", "get_size", "get_name", "get_device", "get_backend", "_prepare_to_compile"), MemberType.USE_REAL
    )
    for name, stand_in in STAND_INS.items():
        getattr(TorchComm, name)._torchdynamo_inline = stand_in
        members[name] = MemberType.INLINED
    # Rank and size become constants of the graph, so another communicator, or this one after reconfigure(), may need
    # another graph.
    register_opaque_type(
        TorchComm, typ="reference", members=members, guard_fn=lambda comm: [comm.get_rank(), comm.get_size()]
    )
