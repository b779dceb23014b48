"""The all_gather whose output is set up once and filled many times."""

from __future__ import annotations

from datetime import timedelta

import torch


class AllGatherPHandle:
    """What all_gather_p_init returned: the output that every all_gather_p_exec fills, until all_gather_p_free.

    hints, timeout: of an exec that gives none of its own.
    """

    __slots__ = ("hints", "output", "owner", "timeout")

    def __init__(
        self, output: torch.Tensor, owner: object, hints: dict[str, str] | None, timeout: timedelta | None
    ) -> None:
        self.output: torch.Tensor | None = output
        self.owner, self.hints, self.timeout = owner, hints, timeout

    def output_for(self, owner: object, input: torch.Tensor, size: int) -> torch.Tensor:
        """The output, if an exec of this input is right. ValueError otherwise."""
        output = self.check(owner)
        if output.dtype is not input.dtype or output.numel() != input.numel() * size:
            raise ValueError(
                f"all_gather_p_exec: an input of {input.numel()} elements {input.dtype} for an output of "
                f"{output.numel()} elements {output.dtype} and {size} ranks"
            )
        return output

    def check(self, owner: object) -> torch.Tensor:
        """The output. ValueError where the handle was freed, or is another communicator's."""
        if self.owner is not owner:
            raise ValueError("this handle of a persistent all_gather belongs to another communicator")
        if self.output is None:
            raise ValueError("this handle of a persistent all_gather was freed: all_gather_p_init makes a new one")
        return self.output
