"""Importing this gives communicators' collectives gradients outside of compiled functions, too.

A call in which a tensor requires a gradient, and gradients are enabled, then goes the way of a compiled function: its
outputs carry a gradient when the call, or wait(), has returned. All other calls are as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hxcomm.torchcomms.comm import TorchComm
from hxcomm.torchcomms.functional.stand_ins import STAND_INS

DIFFERENTIABLE = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_v",
    "all_gather_single",
    "reduce_scatter",
    "reduce_scatter_v",
    "reduce_scatter_single",
    "all_to_all_single",
    "all_to_all_v_single",
    "all_to_all",
)


def _requires_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, list | tuple) and any(isinstance(each, Tensor) and each.requires_grad for each in value)


def _with_gradient(method: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: TorchComm, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not any(map(_requires_gradient, (*args, *kwargs.values()))):
            return method(self, *args, **kwargs)
        work = stand_in(self, *args, **kwargs)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    call._torchdynamo_inline = stand_in  # type: ignore[attr-defined]
    return call


def _patch() -> None:
    for name in DIFFERENTIABLE:
        method = getattr(TorchComm, name)
        if not hasattr(method, "__wrapped__"):
            setattr(TorchComm, name, _with_gradient(method, STAND_INS[name]))


_patch()
