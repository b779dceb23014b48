"""vLLM's device communicator of one group of ranks (tensor, pipeline, data parallel ...), over hxcomm.

The calls of each decode step go straight to C++, past c10d's dispatcher: an all_reduce in eager mode, in a compiled
graph the operator `torch.ops.hxcomm.all_reduce_of_vllm` around the same call. The others take vLLM's way over
torch.distributed to the same group. Knows nothing of models.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

from hxcomm import _C
from hxcomm.c10d import BACKEND

# async_op, hints and timeout_ms of every call: blocking, the selector's choice, the group's timeout.
_HOW = (False, 0, -1)
_SUM = _C.ReduceOp("SUM")

# By the group's name in vLLM, which is all of a group that an operator in a graph can name.
_communicators: dict[str, _C.Communicator] = {}
_library: Any = torch.library.Library("hxcomm", "FRAGMENT")  # type: ignore[no-untyped-call]


def _all_reduce(tensor: Tensor, group: str) -> None:
    _communicators[group].all_reduce(tensor, _SUM, *_HOW)


_library.define("all_reduce_of_vllm(Tensor(a!) tensor, str group) -> ()", tags=[torch.Tag.pt2_compliant_tag])
_library.impl("all_reduce_of_vllm", _all_reduce, "CPU")
torch.library.register_fake("hxcomm::all_reduce_of_vllm", lambda tensor, group: None, lib=_library)


class HxcommCommunicator(DeviceCommunicatorBase):  # type: ignore[misc]
    """Made by vLLM on each rank of each group of more than one rank."""

    def __init__(
        self,
        cpu_group: dist.ProcessGroup,
        device: torch.device | None = None,
        device_group: dist.ProcessGroup | None = None,
        unique_name: str = "",
        use_all2all: bool = False,
    ) -> None:
        super().__init__(cpu_group, device, device_group, unique_name, use_all2all=use_all2all)
        if self.use_all2all:
            raise NotImplementedError(
                "expert parallelism over data-parallel ranks needs vLLM's all2all, which it does not have on CPU"
            )
        group = None if device_group is None else device_group._get_backend(torch.device("cpu"))
        if not isinstance(group, _C.ProcessGroup):
            raise RuntimeError(
                f"vLLM's group '{unique_name}' has the backend {type(group).__name__} for CPU tensors, not {BACKEND}"
            )
        self._calls = _C.Communicator(group, "cpu")
        _communicators[unique_name] = self._calls

    def all_reduce(self, input_: Tensor) -> Tensor:
        """The sum over all ranks, in `input_` where that is contiguous. Blocks."""
        tensor = input_.contiguous()
        if torch.compiler.is_compiling():
            torch.ops.hxcomm.all_reduce_of_vllm(tensor, self.unique_name)
        else:
            self._calls.all_reduce(tensor, _SUM, *_HOW)
        return tensor

    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """All ranks' tensors, concatenated along `dim`, on rank `dst` of the group; None on the others. Blocks."""
        here = self.rank_in_group == dst
        outputs = [torch.empty_like(input_, memory_format=torch.contiguous_format) for _ in self.ranks] if here else []
        self._calls.gather(outputs, input_.contiguous(), dst, *_HOW)
        return torch.cat(outputs, dim) if here else None

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """All ranks' tensors, concatenated along `dim`. Blocks."""
        if torch.compiler.is_compiling():
            gathered: Tensor = super().all_gather(input_, dim)  # which torch traces
            return gathered
        outputs = input_.new_empty((self.world_size, *input_.shape))
        self._calls.all_gather_single(outputs, input_.contiguous(), *_HOW)
        dim %= input_.dim()
        return outputs.movedim(0, dim).flatten(dim, dim + 1)  # of one row: a view
