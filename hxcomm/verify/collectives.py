"""Every collective of torch.distributed: how it is called, and what must come out, computed on each rank alone.

Inputs are a function of (rank, block, position), so each rank knows the inputs of all; they are small integers, so
results are exact in every dtype and compare with ==. Nothing is compared with another backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _make_nccl_premul_sum

from hxcomm.verify.context import Context, Group, WrongError

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
# torch's documentation lists no dtypes. These are the ones that its own libraries (DDP, FSDP, object collectives) send.
EXPECTED_DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8")
PREMUL_FACTOR = 2.0
BITWISE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
# AVG and PREMUL_SUM are documented for NCCL only, the bitwise ones for all but NCCL.
EXPECTED_REDUCE_OPS = ("sum", "product", "min", "max")
REDUCE_OPS = (*EXPECTED_REDUCE_OPS, "avg", *BITWISE, "premul_sum")

LAYOUTS = ("offset", "strided", "transposed")
OUTSIDE = 99  # what stands around a tensor laid out in a larger one; no input and no result has this value


def reduce_op(name: str) -> Any:
    if name == "premul_sum":
        return _make_nccl_premul_sum(PREMUL_FACTOR)
    return getattr(dist.ReduceOp, name.upper())


def meaningful(dtype: str, op: str) -> bool:
    """Whether `op` is defined on `dtype` by everyone who offers it."""
    kind = DTYPES[dtype]
    if op == "premul_sum":
        return dtype in ("float32", "float64", "float16")
    if kind.is_complex:  # c10d itself refuses MIN, MAX, PRODUCT and the bitwise ones
        return op in ("sum", "avg")
    if op == "avg":
        return kind.is_floating_point
    if op in BITWISE:
        return not kind.is_floating_point
    return not (kind == torch.bool and op in ("sum", "product"))


def values(dtype: torch.dtype, op: str, rank: int, block: int, shape: Sequence[int], world_size: int) -> torch.Tensor:
    """What `rank` puts into `block`: whole numbers that differ by rank, block and position."""
    index = torch.arange(math.prod(shape), dtype=torch.int64)
    mixed = (index * 7 + rank * 5 + block * 3) % 11
    if op == "product":
        mixed = 1 + (mixed % 4 == 0).to(torch.int64)  # powers of two: exact in every dtype
    elif op == "avg":
        mixed = (mixed - 5) * world_size  # the mean is whole, whether the division comes before or after the sum
    elif dtype == torch.bool:
        mixed = mixed % 3 // 2
    elif dtype != torch.uint8:
        mixed -= 5
    made = mixed.reshape(tuple(shape)).to(dtype)
    return made + made * 1j if dtype.is_complex else made


def reduced(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The parts of all ranks, reduced by one process in a wide type."""
    dtype = parts[0].dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    stack = torch.stack([part.to(wide) for part in parts])
    if op in BITWISE:
        total = stack[0]
        for each in stack[1:]:
            total = BITWISE[op](total, each)
    elif op == "product":
        total = stack.prod(dim=0)
    elif op in ("min", "max"):
        total = stack.amin(dim=0) if op == "min" else stack.amax(dim=0)
    else:
        total = stack.sum(dim=0)
        if op == "avg":
            total = total / len(parts)
        elif op == "premul_sum":
            total = total * PREMUL_FACTOR
    return total.to(dtype)


def place(content: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of this content laid out in a larger one, and the larger one, OUTSIDE everywhere else."""
    shape = content.shape
    if layout == "offset":
        base = torch.full((content.numel() + 8,), OUTSIDE, dtype=content.dtype, device=content.device)
        view = base[3 : 3 + content.numel()].view(shape)
    elif layout == "strided":
        base = torch.full((*shape, 2), OUTSIDE, dtype=content.dtype, device=content.device)
        view = base[..., 1]
    elif layout == "transposed":
        base = torch.full(tuple(reversed(shape)), OUTSIDE, dtype=content.dtype, device=content.device)
        view = base.permute(*reversed(range(content.dim())))
    else:
        base = view = torch.empty(shape, dtype=content.dtype, device=content.device)
    view.copy_(content)
    return view, base


@dataclass
class Call:
    """One collective on this rank, ready to be issued, and afterwards to be compared."""

    context: Context
    op: str
    dtype: torch.dtype = torch.float32
    reduce_op: str = "sum"
    root: int = 0  # of the members
    shape: tuple[int, ...] = (33,)
    layout: str = ""
    members: Sequence[int] = ()
    group: Group = None
    _expected: list[tuple[torch.Tensor, torch.Tensor, str]] = field(default_factory=list)
    _bases: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = self.members or range(self.context.world_size)
        self.size = len(self.members)
        self.me = list(self.members).index(self.context.rank)
        self.at_root = self.me == self.root

    def input_of(self, rank: int, block: int = 0) -> torch.Tensor:
        return values(self.dtype, self.reduce_op, rank, block, self.shape, self.size)

    def inputs(self, block: int = 0) -> list[torch.Tensor]:
        return [self.input_of(rank, block) for rank in range(self.size)]

    def reading(self, content: torch.Tensor, what: str) -> torch.Tensor:
        """An input; it must hold the same afterwards."""
        return self.writing(content, content, what)

    def writing(self, content: torch.Tensor | None, expected: torch.Tensor, what: str) -> torch.Tensor:
        """An output, holding `content` before (None: nothing anyone expects) and `expected` afterwards."""
        before = torch.full_like(expected, 1) if content is None else content
        view, base = place(self.context.on_device(before), self.layout)
        self._expected.append((view, expected, what))
        if base is not view:
            self._bases.append((base, view, base.clone()))
        return view

    def issue(self, async_op: bool = False) -> Any:
        """Calls the collective. Returns the Work of an async call."""
        return OPS[self.op](self)(async_op)

    def verify(self, remark: str = "") -> None:
        """Raises WrongError where an output is wrong, an input changed, or something beside them was written."""
        where = f"{self.op} of {self.dtype} {list(self.shape)}{remark}"
        for tensor, expected, what in self._expected:
            self.context.equal(tensor, expected, f"{where}: {what}")
        for base, view, before in self._bases:
            after = before.as_strided(view.size(), view.stride(), view.storage_offset())
            after.copy_(view)
            if not torch.equal(base, before):
                raise WrongError(f"{where}: wrote outside of a tensor with strides {view.stride()}")

    def overwrite(self) -> None:
        """Fills every tensor of the call with something else, as a program may once it has returned."""
        for tensor, _, _ in self._expected:
            tensor.fill_(OUTSIDE)

    def run(self, async_op: bool = False, remark: str = "") -> None:
        """Issues, waits and verifies."""
        work = self.issue(async_op)
        if async_op:
            self.context.expect(work is not None, f"{self.op}(async_op=True) returned no Work")
            work.wait()
        self.verify(remark + (" async" if async_op else ""))


Issue = Callable[[bool], Any]


def _all_reduce(call: Call) -> Issue:
    tensor = call.writing(call.input_of(call.me), reduced(call.inputs(), call.reduce_op), "result")
    return lambda later: dist.all_reduce(tensor, reduce_op(call.reduce_op), group=call.group, async_op=later)


def _reduce(call: Call) -> Issue:
    content = call.input_of(call.me)
    if call.at_root:
        tensor = call.writing(content, reduced(call.inputs(), call.reduce_op), "result")
    else:  # what is left there is nobody's promise
        tensor, _ = place(call.context.on_device(content), call.layout)
    op, root = reduce_op(call.reduce_op), call.root
    return lambda later: dist.reduce(tensor, op=op, group=call.group, async_op=later, group_dst=root)


def _broadcast(call: Call) -> Issue:
    tensor = call.writing(call.input_of(call.me), call.input_of(call.root), "result")
    return lambda later: dist.broadcast(tensor, group=call.group, async_op=later, group_src=call.root)


def _all_gather(call: Call) -> Issue:
    tensor = call.reading(call.input_of(call.me), "input")
    outputs = [call.writing(None, part, f"block of rank {rank}") for rank, part in enumerate(call.inputs())]
    return lambda later: dist.all_gather(outputs, tensor, group=call.group, async_op=later)


def _all_gather_into_tensor(call: Call) -> Issue:
    tensor = call.reading(call.input_of(call.me), "input")
    output = call.writing(None, torch.cat(call.inputs()), "result")
    return lambda later: dist.all_gather_into_tensor(output, tensor, group=call.group, async_op=later)


def _gather(call: Call) -> Issue:
    tensor = call.reading(call.input_of(call.me), "input")
    outputs = None
    if call.at_root:
        outputs = [call.writing(None, part, f"block of rank {rank}") for rank, part in enumerate(call.inputs())]
    return lambda later: dist.gather(tensor, outputs, group=call.group, async_op=later, group_dst=call.root)


def _scatter(call: Call) -> Issue:
    output = call.writing(None, call.input_of(call.root, call.me), "result")
    parts = None
    if call.at_root:
        parts = [call.reading(call.input_of(call.me, block), f"input {block}") for block in range(call.size)]
    return lambda later: dist.scatter(output, parts, group=call.group, async_op=later, group_src=call.root)


def _reduce_scatter(call: Call) -> Issue:
    output = call.writing(None, reduced(call.inputs(call.me), call.reduce_op), "result")
    parts = [call.reading(call.input_of(call.me, block), f"input {block}") for block in range(call.size)]
    return lambda later: dist.reduce_scatter(output, parts, reduce_op(call.reduce_op), group=call.group, async_op=later)


def _reduce_scatter_tensor(call: Call) -> Issue:
    output = call.writing(None, reduced(call.inputs(call.me), call.reduce_op), "result")
    whole = call.reading(torch.cat([call.input_of(call.me, block) for block in range(call.size)]), "input")
    return lambda later: dist.reduce_scatter_tensor(
        output, whole, reduce_op(call.reduce_op), group=call.group, async_op=later
    )


def _all_to_all(call: Call) -> Issue:
    parts = [call.reading(call.input_of(call.me, block), f"input {block}") for block in range(call.size)]
    outputs = [call.writing(None, call.input_of(rank, call.me), f"block of rank {rank}") for rank in range(call.size)]
    return lambda later: dist.all_to_all(outputs, parts, group=call.group, async_op=later)


def _all_to_all_single(call: Call) -> Issue:
    whole = call.reading(torch.cat([call.input_of(call.me, block) for block in range(call.size)]), "input")
    output = call.writing(None, torch.cat([call.input_of(rank, call.me) for rank in range(call.size)]), "result")
    return lambda later: dist.all_to_all_single(output, whole, group=call.group, async_op=later)


OPS: dict[str, Callable[[Call], Issue]] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "gather": _gather,
    "scatter": _scatter,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "all_to_all": _all_to_all,
    "all_to_all_single": _all_to_all_single,
}
REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
ROOTED = ("reduce", "broadcast", "gather", "scatter")
