"""Records a forward pass on torch's meta device as steps: every op that reaches a kernel, and every collective.

Ops are taken where they would reach a device, after torch has taken composite ones apart, so that what is recorded is
what a device executes. Knows neither chips nor which model runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from types import NoneType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self

from hxcomm.predict.steps import Collective, LinearAllReduce, Memory, Step, Stream
from hxcomm.sim.costs import OpRecord
from hxcomm.virtual.op_records import TensorMeta, record_of

aten = torch.ops.aten

# How weights may be stored: bits of an element, and in which dtype products with them are computed.
WEIGHTS = {"fp16": (16, "float16"), "fp8": (8, "float8"), "int4": (4, "int4")}
DTYPE = torch.float16  # of activations and KV cache


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records while it is entered. `weights` and `cache` say which tensors those are.

    Matrices are stored as `stored` says (of WEIGHTS), everything else in 16 bits.
    """

    def __init__(self, weights: Iterable[Tensor], cache: Iterable[Tensor], stored: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits, self.dtype = WEIGHTS[stored]
        self.weights = {_storage(each): each for each in weights}
        self.cache = {_storage(each): each for each in cache}
        self.steps: list[Step] = []
        self.largest_op = 0
        self._inference: list[Any] = []  # of each entry: torch enters a mode again to run what decomposes
        self.multiplied: set[int] = set()  # storages of weights that are matrices of products

    def add_cache(self, tensor: Tensor) -> None:
        self.cache[_storage(tensor)] = tensor

    def __enter__(self) -> Self:
        inference = torch.inference_mode()
        inference.__enter__()
        self._inference.append(inference)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._inference.pop().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.scaled_dot_product_attention.default:
            # torch would pick the formula of a device without attention kernels, which copies keys and values.
            with self:
                return _attention(*args, **kwargs)
        if _is_composite(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        record, result = _execute(func, args, kwargs)
        if record.nbytes:
            self._add(record, _flat([*args, *kwargs.values()]))
        return result

    def _add(self, record: OpRecord, tensors: Sequence[Tensor]) -> None:
        touched = record.nbytes
        for each in tensors:
            storage = _storage(each)
            if storage in self.weights and record.kind == "weights" and record.flops:
                self.multiplied.add(storage)
                spared = _nbytes(each) - _nbytes(each) * self.bits // 16
                record = record._replace(nbytes=record.nbytes - spared, dtype=self.dtype)
            if storage in self.weights or storage in self.cache:
                touched -= min(touched, _nbytes(each))
        self.largest_op = max(self.largest_op, touched)
        self.steps.append(record)

    def stream(self) -> Stream:
        """What was recorded, and the memory of the rank."""
        sizes = {storage: each.untyped_storage().nbytes() for storage, each in self.weights.items()}
        weights = sum(size * self.bits // 16 if each in self.multiplied else size for each, size in sizes.items())
        cache = sum(each.untyped_storage().nbytes() for each in self.cache.values())
        return Stream(tuple(self.steps), Memory(weights, cache, self.largest_op))


class Peers:
    """The collectives of one rank among `world_size`, of which nothing is executed. The decoder's Communication."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.recorder: Recorder | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        self._add(Collective("all_reduce", x.nbytes, x.itemsize))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] of every rank -> [world_size, ...]."""
        self._add(Collective("all_gather", x.nbytes, x.itemsize))
        return x.new_empty(self.world_size, *x.shape)

    def linear_all_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sum over ranks of x @ weight.T."""
        recorder = self.recorder
        if self.world_size == 1 or recorder is None:
            return F.linear(x, weight)
        columns, inputs = weight.shape
        recorder.multiplied.add(_storage(weight))
        recorder.steps.append(
            LinearAllReduce(x.numel() // inputs, inputs, columns, x.itemsize, recorder.bits, recorder.dtype)
        )
        return x.new_empty(*x.shape[:-1], columns)

    def _add(self, collective: Collective) -> None:
        if self.world_size > 1 and self.recorder is not None:
            self.recorder.steps.append(collective)


# An op with such a kernel consists of other ops on every device. (OpOverload.decompose would take Python stand-ins for
# some of them, which copy where the kernel does not: dropout in evaluation.)
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """One op that reads keys and values once for all heads that share them, as the one that hx executes."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, query.new_empty(()), query.new_empty(()))
    output: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


class _Outcome(NamedTuple):
    """Of an op with arguments of some shapes."""

    record: OpRecord
    outputs: list[TensorMeta]
    kind: type  # of what it returns: a tensor, a tuple, a list; NoneType for its first argument

    def result(self, args: Sequence[Any]) -> Any:
        if self.kind is NoneType:
            return args[0]
        outputs = [
            torch.empty_strided(each.shape, each.strides, dtype=getattr(torch, each.dtype), device="meta")
            for each in self.outputs
        ]
        return self.kind(outputs) if self.kind in (tuple, list) else outputs[0]


# Layers repeat: of 70 billion parameters 79 layers of 80 find their ops here, ten times as fast as torch's own shape
# functions, many of which are Python.
_outcomes: dict[Hashable, _Outcome] = {}


def _execute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[OpRecord, Any]:
    """What the op did, and what it returns."""
    metas = _metas([*args, *kwargs.values()])
    key = (func, tuple(kwargs), _frozen(metas))
    outcome = _outcomes.get(key)
    if outcome is not None:
        return outcome.record, outcome.result(args)
    result = func(*args, **kwargs)
    outputs = _metas(_flat([result]))
    record = record_of(func._schema.name, metas, outputs)
    in_place = func._schema.is_mutable
    if (not in_place and isinstance(result, Tensor | tuple | list)) or (in_place and args and result is args[0]):
        _outcomes[key] = _Outcome(record, outputs, NoneType if in_place else type(result))
    return record, result


def _frozen(value: Any) -> Hashable:
    """A key: 1, 1.0 and True are different arguments."""
    if isinstance(value, TensorMeta):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return type(value), value


def _flat(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found += _flat(each)
    return found


def _metas(values: Sequence[Any]) -> list[Any]:
    return [
        TensorMeta.of(each) if isinstance(each, Tensor) else _metas(each) if isinstance(each, list | tuple) else each
        for each in values
    ]


def _nbytes(tensor: Tensor) -> int:
    return TensorMeta.of(tensor).nbytes


def _storage(tensor: Tensor) -> int:
    """Names the memory: views of one tensor share it."""
    name: int = tensor.untyped_storage()._cdata
    return name
