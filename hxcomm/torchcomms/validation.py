"""What is checked of a call before a plug-in backend sees it: devices, dtypes, counts, roots, peers.

Every check raises before anything is sent, with the values, so the communicator stays usable. hxcomm's own backend
checks in C++ on its short path and also agrees with the other ranks; what only the other ranks know (another dtype,
another operation) cannot be seen here. One rule for each operation, found by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hxcomm.torchcomms.hook_args import OpName


@dataclass(frozen=True, slots=True)
class _Call:
    """One call under check, and what the communicator knows."""

    op: str
    rank: int
    size: int
    device: torch.device

    def wrong(self, problem: str) -> ValueError:
        return ValueError(f"{self.op} on rank {self.rank} of {self.size}: {problem}")

    def tensor(self, name: str, tensor: Any, like: Tensor | None = None) -> None:
        """A dense tensor on the communicator's device, of the same dtype as `like`."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.op} on rank {self.rank} of {self.size}: {name} must be a tensor, got {tensor!r}")
        if tensor.device.type != self.device.type or (
            self.device.index is not None and tensor.device.index != self.device.index
        ):
            raise self.wrong(f"{name} is on {tensor.device}, the communicator on {self.device}")
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            raise self.wrong(
                f"{name} must be dense and contiguous, got {tensor.layout} with strides {_strides(tensor)}"
            )
        if like is not None and tensor.dtype != like.dtype:
            raise self.wrong(f"{name} is {tensor.dtype}, but the call's other tensors are {like.dtype}")

    def list(self, name: str, tensors: Any, like: Tensor | None = None) -> None:
        """One tensor for each rank."""
        if not isinstance(tensors, list | tuple):
            raise TypeError(f"{self.op} on rank {self.rank} of {self.size}: {name} must be a list, got {tensors!r}")
        if len(tensors) != self.size:
            raise self.wrong(f"{name} has {len(tensors)} tensors, it must have one for each of the {self.size} ranks")
        for index, tensor in enumerate(tensors):
            self.tensor(f"{name}[{index}]", tensor, tensors[0] if like is None else like)

    def count(self, name: str, tensor: Tensor, want: int, why: str) -> None:
        if tensor.numel() != want:
            raise self.wrong(f"{name} has {tensor.numel()} elements, it must have {want}: {why}")

    def member(self, name: str, rank: Any) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise TypeError(f"{self.op} on rank {self.rank} of {self.size}: {name} must be a rank, got {rank!r}")
        if not 0 <= rank < self.size:
            raise self.wrong(f"{name} is {rank}, it must be in 0..{self.size - 1}")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else ()


def _peer(call: _Call, tensor: Tensor, peer: int) -> None:
    call.tensor("tensor", tensor)
    call.member("peer", peer)
    if peer == call.rank:
        raise call.wrong(
            "peer is this rank itself, and nothing would match it: put the send and its recv into one batch "
            "(batch_op_create)"
        )


def _rooted(call: _Call, tensor: Tensor, root: int, op: Any = None) -> None:
    call.tensor("tensor", tensor)
    call.member("root", root)


def _all_reduce(call: _Call, tensor: Tensor, op: Any) -> None:
    call.tensor("tensor", tensor)


def _gathered(call: _Call, outputs: Sequence[Tensor], name: str, tensor: Tensor) -> None:
    call.tensor("tensor", tensor)
    call.list(name, outputs, tensor)
    for index, output in enumerate(outputs):
        call.count(f"{name}[{index}]", output, tensor.numel(), "the count of this rank's tensor")


def _all_gather(call: _Call, tensor_list: list[Tensor], tensor: Tensor) -> None:
    _gathered(call, tensor_list, "tensor_list", tensor)


def _all_gather_v(call: _Call, tensor_list: list[Tensor], tensor: Tensor) -> None:
    call.tensor("tensor", tensor)
    call.list("tensor_list", tensor_list, tensor)
    call.count(f"tensor_list[{call.rank}]", tensor_list[call.rank], tensor.numel(), "the count of this rank's tensor")


def _all_gather_single(call: _Call, output: Tensor, input: Tensor) -> None:
    call.tensor("input", input)
    call.tensor("output", output, input)
    call.count("output", output, input.numel() * call.size, f"{call.size} times the input's {input.numel()}")


def _reduce_scatter(call: _Call, output: Tensor, input_list: list[Tensor], op: Any) -> None:
    call.tensor("output", output)
    call.list("input_list", input_list, output)
    for index, each in enumerate(input_list):
        call.count(f"input_list[{index}]", each, output.numel(), "the count of output")


def _reduce_scatter_v(call: _Call, output: Tensor, input_list: list[Tensor], op: Any) -> None:
    call.tensor("output", output)
    call.list("input_list", input_list, output)
    call.count("output", output, input_list[call.rank].numel(), f"the count of input_list[{call.rank}]")


def _reduce_scatter_single(call: _Call, output: Tensor, input: Tensor, op: Any) -> None:
    call.tensor("output", output)
    call.tensor("input", input, output)
    call.count("input", input, output.numel() * call.size, f"{call.size} times the output's {output.numel()}")


def _all_to_all_single(call: _Call, output: Tensor, input: Tensor) -> None:
    call.tensor("input", input)
    call.tensor("output", output, input)
    call.count("output", output, input.numel(), "the count of input")
    if input.numel() % call.size:
        raise call.wrong(f"input has {input.numel()} elements, which {call.size} ranks cannot share equally")


def _all_to_all_v_single(
    call: _Call, output: Tensor, input: Tensor, output_split_sizes: list[int], input_split_sizes: list[int]
) -> None:
    call.tensor("input", input)
    call.tensor("output", output, input)
    for name, tensor, splits in (
        ("output", output, output_split_sizes),
        ("input", input, input_split_sizes),
    ):
        rows = tensor.size(0) if tensor.dim() else tensor.numel()
        if len(splits) != call.size or min(splits) < 0 or sum(splits) != rows:
            raise call.wrong(
                f"{name}_split_sizes is {list(splits)}: it must be {call.size} counts from 0 on which add up to the "
                f"{rows} rows of {name}"
            )


def _all_to_all(call: _Call, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> None:
    call.list("input_tensor_list", input_tensor_list)
    call.list("output_tensor_list", output_tensor_list, input_tensor_list[0])
    call.count(
        f"output_tensor_list[{call.rank}]",
        output_tensor_list[call.rank],
        input_tensor_list[call.rank].numel(),
        f"the count of input_tensor_list[{call.rank}], this rank's message to itself",
    )


def _scatter(call: _Call, output_tensor: Tensor, input_tensor_list: list[Tensor], root: int) -> None:
    call.tensor("output_tensor", output_tensor)
    call.member("root", root)
    if call.rank == root:
        _gathered(call, input_tensor_list, "input_tensor_list", output_tensor)


def _gather(call: _Call, output_tensor_list: list[Tensor], input_tensor: Tensor, root: int) -> None:
    call.tensor("input_tensor", input_tensor)
    call.member("root", root)
    if call.rank == root:
        _gathered(call, output_tensor_list, "output_tensor_list", input_tensor)


def _gather_single(call: _Call, output: Tensor, input: Tensor, root: int) -> None:
    call.tensor("input", input)
    call.member("root", root)
    if call.rank == root:
        call.tensor("output", output, input)
        call.count("output", output, input.numel() * call.size, f"{call.size} times the input's {input.numel()}")


def _barrier(call: _Call) -> None:
    """Nothing can be wrong with it."""


_RULES: dict[OpName, Callable[..., None]] = {
    OpName.send: _peer,
    OpName.recv: _peer,
    OpName.broadcast: _rooted,
    OpName.all_reduce: _all_reduce,
    OpName.reduce: _rooted,
    OpName.all_gather: _all_gather,
    OpName.all_gather_v: _all_gather_v,
    OpName.all_gather_single: _all_gather_single,
    OpName.reduce_scatter: _reduce_scatter,
    OpName.reduce_scatter_v: _reduce_scatter_v,
    OpName.reduce_scatter_single: _reduce_scatter_single,
    OpName.all_to_all_single: _all_to_all_single,
    OpName.all_to_all_v_single: _all_to_all_v_single,
    OpName.all_to_all: _all_to_all,
    OpName.barrier: _barrier,
    OpName.scatter: _scatter,
    OpName.gather: _gather,
    OpName.gather_single: _gather_single,
}


def check(op: OpName, operands: Sequence[Any], *, rank: int, size: int, device: torch.device) -> None:
    """Checks one call. operands are those of TorchComm's method, in its order.

    Raises TypeError for what is no tensor, list or rank, ValueError for everything else.
    """
    _RULES[op](_Call(op.name, rank, size, device), *operands)


def check_split(ranks: Sequence[int], *, rank: int, size: int) -> None:
    """Checks the ranks of a split: members of this communicator, each once."""
    call = _Call("split", rank, size, torch.device("cpu"))
    for index, each in enumerate(ranks):
        call.member(f"ranks[{index}]", each)
    twice = sorted({each for each in ranks if list(ranks).count(each) > 1})
    if twice:
        raise call.wrong(f"ranks {list(ranks)} names {twice} more than once")


def check_batch(ops: Sequence[Any], *, rank: int, size: int, device: torch.device) -> None:
    """Checks a batch of P2POp: tensors and peers, and that every message of this rank to itself has both ends."""
    call = _Call("batch_op_issue", rank, size, device)
    to_itself: dict[str, list[int]] = {"SEND": [], "RECV": []}
    for index, op in enumerate(ops):
        call.tensor(f"ops[{index}].tensor", op.tensor)
        call.member(f"ops[{index}].peer", op.peer)
        if op.peer == rank:
            to_itself[op.type.name].append(op.tensor.numel())
    if to_itself["SEND"] != to_itself["RECV"]:
        raise call.wrong(
            f"it sends itself messages of {to_itself['SEND']} elements, but receives {to_itself['RECV']} from itself"
        )
