"""`torch.ops.hxcomm.linear_all_reduce(x, weight, chunks)`: a matmul whose all_reduce travels while it computes.

The result's columns are computed in chunks. Each chunk's all_reduce starts as soon as it is computed, and runs while
the next one is, so that only the last chunk's stays exposed. The result is that of all_reduce(F.linear(x, weight)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 'linear_all_reduce(Tensor x, Tensor weight, int chunks, str group_name="") -> Tensor'
_library: Any = None


def register() -> None:
    """Makes the operator known. Harmless when called again."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("hxcomm", "FRAGMENT")  # type: ignore[no-untyped-call]
    _library.define(SCHEMA)
    _library.impl("linear_all_reduce", linear_all_reduce, "CompositeExplicitAutograd")
    _library.impl("linear_all_reduce", _result_of, "Meta")
    _library.impl("linear_all_reduce", _without_gradient, "Autograd")


def linear_all_reduce(x: Tensor, weight: Tensor, chunks: int, group_name: str = "") -> Tensor:
    """x [..., in] times weight [out, in], summed up over the ranks of the group: [..., out], on every rank.

    chunks: of the columns, as equal as may be; more than there are columns are as many as there are. group_name: of a
    group of torch.distributed; "": of all ranks, or of this process alone where there is none. Blocks; every rank must
    call it with the same shapes and chunks. Raises ValueError for a wrong shape or number.
    """
    _check(x, weight, chunks)
    group = _group(group_name)
    if group is None:
        return torch.nn.functional.linear(x, weight)
    options = torch.distributed.AllreduceOptions()
    options.asyncOp = True
    parts, works = [], []
    for rows in weight.tensor_split(max(1, min(chunks, len(weight)))):
        parts.append(torch.nn.functional.linear(x, rows))
        works.append(group.allreduce([parts[-1]], options))
    for work in works:
        work.wait()
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _check(x: Tensor, weight: Tensor, chunks: int) -> None:
    if chunks < 1:
        raise ValueError(f"linear_all_reduce: {chunks} chunks; there must be at least 1")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_all_reduce: x {list(x.shape)} and weight {list(weight.shape)}; x must be [..., in] and weight "
            "[out, in]"
        )


def _group(name: str) -> Any:
    from torch import distributed

    if name:
        c10d: Any = distributed.distributed_c10d
        return c10d._resolve_process_group(name)
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.group.WORLD


def _result_of(x: Tensor, weight: Tensor, chunks: int, group_name: str = "") -> Tensor:
    _check(x, weight, chunks)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _without_gradient(x: Tensor, weight: Tensor, chunks: int, group_name: str = "") -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise NotImplementedError(
            "hxcomm::linear_all_reduce has no gradient: call it under torch.no_grad(), or call F.linear and all_reduce"
        )
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = torch.ops.hxcomm.linear_all_reduce(x, weight, chunks, group_name)
        return result
