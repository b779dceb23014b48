"""exact.py's arrays as torch tensors, and back."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from exact import Array, factor

TORCH = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "avg": dist.ReduceOp.AVG,
    "band": dist.ReduceOp.BAND,
    "bor": dist.ReduceOp.BOR,
    "bxor": dist.ReduceOp.BXOR,
}


def reduce_op_of(name: str, rank: int) -> dist.ReduceOp:
    """torch's reduce op, with this rank's own factor for premul_sum."""
    if name == "premul_sum":
        return dist._make_nccl_premul_sum(factor(name, rank))
    return REDUCE_OPS[name]


def to_torch(array: Array, dtype: str) -> torch.Tensor:
    """A tensor with a copy of the array's bits."""
    tensor = torch.from_numpy(array.copy())
    return tensor.view(TORCH[dtype]) if dtype in ("bfloat16", "bool") else tensor


def from_torch(tensor: torch.Tensor) -> Array:
    """The bits of a tensor as exact.py stores its dtype."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
        return tensor.numpy().view(np.uint16)
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor).numpy()
