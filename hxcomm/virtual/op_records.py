"""What one executed torch op read, wrote and computed: from names and shapes, wherever it ran.

Bytes are those of the tensors really touched. Multiplications come from the registry of `torch.utils.flop_counter`,
not from a second table. Knows neither chips nor times (hxcomm/sim/costs.py), nor how the op was caught.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from hxcomm.sim.costs import OpRecord

aten = torch.ops.aten


class TensorMeta(NamedTuple):
    """A tensor that an op was given or gave."""

    shape: Sequence[int]
    strides: Sequence[int]  # of elements
    dtype: str  # float16
    nbytes: int  # really addressed: what a stride of 0 repeats counts once

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorMeta:
        """Works on meta tensors, too."""
        shape, strides = tuple(tensor.shape), tensor.stride()
        elements = 1
        for size, stride in zip(shape, strides, strict=True):
            elements *= size if stride or size == 0 else 1
        return TensorMeta(shape, strides, str(tensor.dtype).removeprefix("torch."), elements * tensor.itemsize)


# What most of the bytes of these are. Everything else is "other".
KINDS = {
    "aten::mm": "weights",
    "aten::addmm": "weights",
    "aten::linear": "weights",
    "aten::_scaled_mm": "weights",
    "aten::embedding": "weights",
    "aten::bmm": "kv_cache",
    "aten::baddbmm": "kv_cache",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "kv_cache",
    "aten::_scaled_dot_product_flash_attention": "kv_cache",
    "aten::_scaled_dot_product_efficient_attention": "kv_cache",
    "aten::scaled_dot_product_attention": "kv_cache",
}

# The same computation under another name; torch's registry has the one on the right.
SAME_FLOPS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "aten::_scaled_dot_product_flash_attention",
    "aten::scaled_dot_product_attention": "aten::_scaled_dot_product_flash_attention",
}

# Make, relabel, decide or read out without a pass over memory. (Views are known by their schemas.)
FREE = {
    "aten::_fused_sdp_choice",
    "aten::_local_scalar_dense",
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::set_",
}

# Read of their first tensor only what they give, besides their indices.
GATHERING = {"aten::embedding", "aten::gather", "aten::index", "aten::index_select", "aten::take"}

# Write into their first tensor only as many elements as their last one (the source) has.
SCATTERING = {
    "aten::_index_put_impl_",
    "aten::index_copy_",
    "aten::index_put_",
    "aten::masked_scatter_",
    "aten::scatter_",
}

# Overwrite their first tensor without reading it.
OVERWRITING = {"aten::copy_", "aten::fill_", "aten::zero_"}


def record_of(name: str, args: Sequence[object], outputs: Sequence[TensorMeta]) -> OpRecord:
    """The record of `aten::mm` and the like. `args`: a TensorMeta for each tensor, also in lists; others as they are.

    Where only the tensors among the arguments are known, that suffices: no formula in use needs more.
    """
    tensors = list(_tensors(args))
    if name in FREE or _is_view(name):
        return OpRecord(name, "other", 0, 0, _dtype(tensors or outputs))
    read, written = sum(each.nbytes for each in tensors), sum(each.nbytes for each in outputs)
    if name in GATHERING and tensors:
        read += min(written, tensors[0].nbytes) - tensors[0].nbytes
    elif name in SCATTERING and len(tensors) > 1:
        read, written = read - tensors[0].nbytes, tensors[-1].nbytes
    elif name in OVERWRITING and tensors:
        read -= tensors[0].nbytes
    return OpRecord(name, KINDS.get(name, "other"), read + written, _flops(name, args, outputs), _dtype(tensors))


def _tensors(args: Sequence[object]) -> list[TensorMeta]:
    found = []
    for each in args:
        if isinstance(each, TensorMeta):
            found.append(each)
        elif isinstance(each, list | tuple):
            found += _tensors(each)
    return found


def _dtype(tensors: Sequence[TensorMeta]) -> str:
    """Of the first that is no index: what the op computes in."""
    floating = [each.dtype for each in tensors if not _is_index(each)]
    return floating[0] if floating else tensors[0].dtype if tensors else "float32"


def _is_index(tensor: TensorMeta) -> bool:
    return tensor.dtype in ("int64", "int32", "bool")


@cache
def _packet(name: str) -> Any:
    """torch.ops' entry of aten::mm, or None where torch does not know the name."""
    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op, None)


@cache
def _is_view(name: str) -> bool:
    """Whether it relabels its first argument, as a view or in place (squeeze_). (What may copy, as reshape, decomposes
    into ops that are recorded.)"""
    packet = _packet(name)
    overloads = [getattr(packet, each) for each in packet.overloads()] if packet is not None else []
    return any(
        (each.is_view and str(each._schema.arguments[0].type) == "Tensor") or torch.Tag.inplace_view in each.tags
        for each in overloads
    )


@cache
def _formula(name: str) -> Callable[..., int] | None:
    packet = _packet(SAME_FLOPS.get(name, name))
    return flop_registry.get(packet)


def _flops(name: str, args: Sequence[object], outputs: Sequence[TensorMeta]) -> int:
    if name == "aten::linear":  # decomposes into mm or addmm, which torch's registry has; a device may do it whole
        x, weight = (each for each in args[:2] if isinstance(each, TensorMeta))
        return 2 * _product(x.shape) * weight.shape[0]
    formula = _formula(name)
    if formula is None:
        return 0
    # Formulas of products take their tensors alone: what else the op was given may stand in any order here.
    given = _tensors(args) if name in KINDS else args
    shapes = [tuple(each.shape) if isinstance(each, TensorMeta) else each for each in given]
    return int(formula(*shapes, out_val=tuple(outputs[0].shape) if outputs else None))


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
