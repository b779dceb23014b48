"""What a reduction does to the contributions of the ranks."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any, ClassVar

import torch
from torch._library.opaque_object import register_opaque_type

from hxcomm import _C


class RedOpType(Enum):
    """The kinds of ReduceOp."""

    SUM = auto()
    PRODUCT = auto()
    MIN = auto()
    MAX = auto()
    BAND = auto()
    BOR = auto()
    BXOR = auto()
    PREMUL_SUM = auto()
    AVG = auto()


class ReduceOp(_C.ReduceOp):
    """ReduceOp.SUM, PRODUCT, MIN, MAX, BAND, BOR, BXOR, AVG, or ReduceOp.PREMUL_SUM(factor).

    Contributions are combined in rank order where the algorithm keeps it (`hxcomm show`), those of 16-bit types in
    float32 and rounded once. MIN and MAX give NaN where a contribution is NaN; AVG is of floating point and complex
    types; BAND, BOR and BXOR of integers and bool.
    """

    SUM: ClassVar[ReduceOp]
    PRODUCT: ClassVar[ReduceOp]
    MIN: ClassVar[ReduceOp]
    MAX: ClassVar[ReduceOp]
    BAND: ClassVar[ReduceOp]
    BOR: ClassVar[ReduceOp]
    BXOR: ClassVar[ReduceOp]
    AVG: ClassVar[ReduceOp]

    def __init__(self, type: RedOpType, factor: float | torch.Tensor | None = None) -> None:
        super().__init__(type.name, factor)
        self._type, self.factor = type, factor

    @staticmethod
    def PREMUL_SUM(factor: float | torch.Tensor) -> ReduceOp:  # noqa: N802
        """A sum in which this rank's contribution counts `factor` times; the factor may differ by rank.

        factor: a real number, or a tensor of one element, which is read at each call.
        """
        if isinstance(factor, torch.Tensor):
            if factor.numel() != 1 or factor.is_complex():
                raise ValueError(
                    f"PREMUL_SUM takes a real number or a real tensor of one element, not a {factor.dtype} tensor of "
                    f"{factor.numel()} elements"
                )
        elif not isinstance(factor, (int, float)):
            raise ValueError(f"PREMUL_SUM takes a real number or a tensor of one element, not {factor!r}")
        return ReduceOp(RedOpType.PREMUL_SUM, factor)

    @property
    def type(self) -> RedOpType:
        """The kind, without the factor."""
        return self._type

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ReduceOp) or self._type is not other._type:
            return False
        if isinstance(self.factor, torch.Tensor) or isinstance(other.factor, torch.Tensor):
            return self.factor is other.factor  # their values are read at a call, and may change
        return self.factor == other.factor

    def __hash__(self) -> int:
        return hash(self._type)

    def __repr__(self) -> str:
        return f"ReduceOp.{self._type.name}" + (f"({self.factor})" if self.factor is not None else "")

    def __reduce__(self) -> tuple[object, ...]:
        return ReduceOp, (self._type, self.factor)

    def __fx_repr__(self) -> tuple[str, dict[str, Any]]:
        """How generated code of torch.compile writes this value, and the names which that text needs."""
        if isinstance(self.factor, torch.Tensor):
            raise TypeError("a ReduceOp whose factor is a tensor is no constant: make it inside the compiled function")
        return f"ReduceOp(RedOpType.{self._type.name}, {self.factor!r})", {"ReduceOp": ReduceOp, "RedOpType": RedOpType}


register_opaque_type(ReduceOp, typ="value")
for _type in RedOpType:
    if _type is not RedOpType.PREMUL_SUM:
        setattr(ReduceOp, _type.name, ReduceOp(_type))
