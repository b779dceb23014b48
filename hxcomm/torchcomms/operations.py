"""The operations of a communicator, one method each. How a call is carried out is comm.py's and the backend's."""

from __future__ import annotations

import inspect
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._opaque_base import OpaqueBaseMeta

from hxcomm.torchcomms import hook_args as args
from hxcomm.torchcomms.hook_args import Hooks, OpName
from hxcomm.torchcomms.persistent import AllGatherPHandle
from hxcomm.torchcomms.reduce_op import ReduceOp
from hxcomm.torchcomms.work import DONE, TorchWork

Hints = dict[str, str] | None
List = list[torch.Tensor]


class _Opaque(OpaqueBaseMeta, ABCMeta):
    """Of classes whose objects torch.compile takes as inputs of a graph, see functional/stand_ins.py."""


class Operations(metaclass=_Opaque):
    """What TorchComm is and does beside operations is in comm.py."""

    _hooks: Hooks
    _all_reduce: Callable[..., Any] | None

    @abstractmethod
    def _issue(
        self,
        op: OpName,
        hook: Callable[[], args.PreHookArgs],
        operands: tuple[Any, ...],
        async_op: bool,
        hints: Hints,
        timeout: timedelta | None,
    ) -> TorchWork:
        """One operation; hook() makes what pre hooks are told."""

    @abstractmethod
    def _started(self, start: Callable[[], Any]) -> TorchWork:
        """The work of what start() returns; an error of it goes the way of all errors."""

    @abstractmethod
    def _failed(self, error: Exception) -> Exception:
        """What to raise for an error of a call."""

    def _wrong_types(self, error: TypeError, op: OpName, given: tuple[Any, ...]) -> TypeError:
        """What the C++ front end says of arguments that it cannot take, in the words of the method."""
        if "incompatible function arguments" not in str(error):
            return error
        parameters = list(inspect.signature(getattr(Operations, op.name)).parameters.values())[1:]
        takes = ", ".join(f"{each.name}: {each.annotation}" for each in parameters)
        types = ", ".join(type(each).__name__ for each in given)
        return TypeError(f"{op.name} takes ({takes}), and was called with ({types}) on rank {self.get_rank()}")

    @abstractmethod
    def _check_self(self, sends: int, receives: int, async_op: bool) -> None:
        """ValueError where a blocking call would wait for this rank itself."""

    @abstractmethod
    def get_rank(self) -> int:
        """This process's number in the communicator; -1 where it has no group yet."""

    @abstractmethod
    def get_size(self) -> int:
        """How many ranks there are; 0 where it has no group yet."""

    def all_reduce(
        self,
        tensor: torch.Tensor,
        op: ReduceOp,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """Combines all ranks' tensors by op; every rank's tensor then holds the result, the same bits on each.

        tensor: any shape, the same dtype and count on every rank; read and written. Each rank moves 2 S (two_shot), or
        reads (n-1) S up to 2 KiB (one_shot).
        """
        if hints is None and timeout is None and (shortest := self._all_reduce) is not None:
            try:
                handle = shortest(tensor, op, async_op, 0, -1)
            except TypeError as error:
                raise self._wrong_types(error, OpName.all_reduce, (tensor, op, async_op)) from None
            except Exception as error:
                raise self._failed(error) from None
            return DONE if handle is None else self._started(lambda: handle)
        return self._issue(
            OpName.all_reduce,
            lambda: args.AllReducePreHookArgs(tensor, async_op),
            (tensor, op),
            async_op,
            hints,
            timeout,
        )

    def send(
        self, tensor: torch.Tensor, dst: int, async_op: bool, hints: Hints = None, timeout: timedelta | None = None
    ) -> TorchWork:
        """Sends the tensor to rank dst, whose recv must have the same dtype and count.

        Blocks (where async_op is False) until the tensor may be changed; up to 16 KiB that is at once. To this rank
        itself: the recv must have been started.
        """
        if dst == self.get_rank():
            self._check_self(1, 0, async_op)
        return self._issue(
            OpName.send, lambda: args.SendPreHookArgs(tensor, dst, async_op), (tensor, dst), async_op, hints, timeout
        )

    def recv(
        self, tensor: torch.Tensor, src: int, async_op: bool, hints: Hints = None, timeout: timedelta | None = None
    ) -> TorchWork:
        """Receives into the tensor what rank src sends. Messages of one rank arrive in the order sent."""
        if src == self.get_rank():
            self._check_self(0, 1, async_op)
        return self._issue(
            OpName.recv, lambda: args.RecvPreHookArgs(tensor, src, async_op), (tensor, src), async_op, hints, timeout
        )

    def broadcast(
        self, tensor: torch.Tensor, root: int, async_op: bool, hints: Hints = None, timeout: timedelta | None = None
    ) -> TorchWork:
        """Every rank's tensor becomes root's. The same dtype and count everywhere."""
        return self._issue(
            OpName.broadcast,
            lambda: args.BroadcastPreHookArgs(tensor, root, async_op),
            (tensor, root),
            async_op,
            hints,
            timeout,
        )

    def reduce(
        self,
        tensor: torch.Tensor,
        root: int,
        op: ReduceOp,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """As all_reduce, but only root's tensor holds the result; the others' are as before."""
        return self._issue(
            OpName.reduce,
            lambda: args.ReducePreHookArgs(tensor, root, async_op),
            (tensor, root, op),
            async_op,
            hints,
            timeout,
        )

    def all_gather(
        self,
        tensor_list: List,
        tensor: torch.Tensor,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """tensor_list[r] becomes rank r's tensor. One tensor for each rank, all of one count."""
        return self._issue(
            OpName.all_gather,
            lambda: args.AllGatherPreHookArgs(tensor, tensor_list, async_op),
            (tensor_list, tensor),
            async_op,
            hints,
            timeout,
        )

    def all_gather_v(
        self,
        tensor_list: List,
        tensor: torch.Tensor,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """As all_gather, with counts that differ by rank: tensor_list has the same counts on every rank, and
        tensor_list[own rank] that of the tensor."""
        return self._issue(
            OpName.all_gather_v,
            lambda: args.AllGatherVPreHookArgs(tensor, tensor_list, async_op),
            (tensor_list, tensor),
            async_op,
            hints,
            timeout,
        )

    def all_gather_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """output becomes all ranks' inputs, one behind the other: n times as many elements as the input."""
        return self._issue(
            OpName.all_gather_single,
            lambda: args.AllGatherSinglePreHookArgs(input, output, async_op),
            (output, input),
            async_op,
            hints,
            timeout,
        )

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input_list: List,
        op: ReduceOp,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """output becomes the combination of what all ranks have in input_list[own rank]. All of one count."""
        return self._issue(
            OpName.reduce_scatter,
            lambda: args.ReduceScatterPreHookArgs(input_list, output, async_op),
            (output, input_list, op),
            async_op,
            hints,
            timeout,
        )

    def reduce_scatter_v(
        self,
        output: torch.Tensor,
        input_list: List,
        op: ReduceOp,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """As reduce_scatter, with counts that differ by rank; input_list has the same counts on every rank."""
        return self._issue(
            OpName.reduce_scatter_v,
            lambda: args.ReduceScatterVPreHookArgs(input_list, output, async_op),
            (output, input_list, op),
            async_op,
            hints,
            timeout,
        )

    def reduce_scatter_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        op: ReduceOp,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """As reduce_scatter, the parts one behind the other in input: n times as many elements as the output."""
        return self._issue(
            OpName.reduce_scatter_single,
            lambda: args.ReduceScatterSinglePreHookArgs(input, output, async_op),
            (output, input, op),
            async_op,
            hints,
            timeout,
        )

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """The r-th part of the output's first dimension becomes what rank r has for this rank. Equal parts."""
        return self._issue(
            OpName.all_to_all_single,
            lambda: args.AllToAllSinglePreHookArgs(input, output, async_op),
            (output, input),
            async_op,
            hints,
            timeout,
        )

    def all_to_all_v_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """As all_to_all_single, with parts of given rows: input_split_sizes[j] here is output_split_sizes[own rank] on
        rank j."""
        return self._issue(
            OpName.all_to_all_v_single,
            lambda: args.AllToAllVSinglePreHookArgs(input, output, async_op),
            (output, input, output_split_sizes, input_split_sizes),
            async_op,
            hints,
            timeout,
        )

    def all_to_all(
        self,
        output_tensor_list: List,
        input_tensor_list: List,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """output_tensor_list[r] becomes what rank r has in its input_tensor_list for this rank. Counts may differ by
        pair."""
        return self._issue(
            OpName.all_to_all,
            lambda: args.AllToAllPreHookArgs(input_tensor_list, output_tensor_list, async_op),
            (output_tensor_list, input_tensor_list),
            async_op,
            hints,
            timeout,
        )

    def barrier(self, async_op: bool, hints: Hints = None, timeout: timedelta | None = None) -> TorchWork:
        """Ends when every rank has called it."""
        return self._issue(OpName.barrier, lambda: args.BarrierPreHookArgs(async_op), (), async_op, hints, timeout)

    def scatter(
        self,
        output_tensor: torch.Tensor,
        input_tensor_list: List,
        root: int,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """output_tensor becomes root's input_tensor_list[own rank]; other ranks' lists are not looked at."""
        return self._issue(
            OpName.scatter,
            lambda: args.ScatterPreHookArgs(output_tensor, input_tensor_list, root, async_op),
            (output_tensor, input_tensor_list, root),
            async_op,
            hints,
            timeout,
        )

    def gather(
        self,
        output_tensor_list: List,
        input_tensor: torch.Tensor,
        root: int,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """On root output_tensor_list[r] becomes rank r's input; other ranks' lists are not looked at."""
        return self._issue(
            OpName.gather,
            lambda: args.GatherPreHookArgs(input_tensor, output_tensor_list, root, async_op),
            (output_tensor_list, input_tensor, root),
            async_op,
            hints,
            timeout,
        )

    def gather_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        root: int,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """As gather, into one tensor with n times as many elements as the input; other ranks' outputs are not looked
        at."""
        return self._issue(
            OpName.gather_single,
            lambda: args.GatherSinglePreHookArgs(input, output, root, async_op),
            (output, input, root),
            async_op,
            hints,
            timeout,
        )

    def all_gather_p_init(
        self, output: torch.Tensor, hints: Hints = None, timeout: timedelta | None = None
    ) -> AllGatherPHandle:
        """Sets up an all_gather into this output, to be run any number of times. Moves nothing, blocks for nobody.

        hints, timeout: of runs that give none of their own.
        """
        if output.numel() % max(1, self.get_size()) != 0:
            raise ValueError(
                f"all_gather_p_init: an output of {output.numel()} elements cannot be shared equally by "
                f"{self.get_size()} ranks"
            )
        return AllGatherPHandle(output, self, hints, timeout)

    def all_gather_p_exec(
        self,
        handle: AllGatherPHandle,
        input: torch.Tensor,
        async_op: bool,
        hints: Hints = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """all_gather_single of the input into the handle's output."""
        output = handle.output_for(self, input, self.get_size())
        return self.all_gather_single(
            output,
            input,
            async_op,
            handle.hints if hints is None else hints,
            handle.timeout if timeout is None else timeout,
        )

    def all_gather_p_free(self, handle: AllGatherPHandle) -> None:
        """The handle cannot be used any more; the output is the caller's."""
        handle.check(self)
        handle.output = None
