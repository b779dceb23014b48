"""Whether this process has the device, and its name: decided in `import torch`, which must stay cheap.

A registered device becomes torch's default accelerator, and torch has room for one such device: so hx keeps out of the
way of others. `hxcomm info` prints what `problem()` says.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import torch
from torch.utils.backend_registration import (
    generate_methods_for_privateuse1_backend,
    rename_privateuse1_backend,
)

from hxcomm import build_check, environment, segment_contents

NAME = "hx"
_UNNAMED = "privateuseone"
_DLPACK_EXTENSION_DEVICE = 12  # kDLExtDev in dlpack.h


def is_registered() -> bool:
    return torch._C._get_privateuse1_backend_name() == NAME and hasattr(torch, NAME)


def problem() -> str | None:
    """Why there is no hx in this process, or None when there is, or may be."""
    wanted = environment.DEVICE.get()
    if wanted == "0":
        return "HXCOMM_DEVICE=0"
    if is_registered():
        return None
    if (wrong := build_check.problem()) is not None:
        return wrong
    if (taken := torch._C._get_privateuse1_backend_name()) != _UNNAMED:
        return f"torch has room for one such device, and {taken} has taken it"
    if wanted == "1":
        return None
    if environment.CPU.get():  # an engine computes on the accelerator there is
        return "HXCOMM_CPU=1 keeps this process on CPU; HXCOMM_DEVICE=1 registers hx all the same"
    if others := sorted(
        entry.name for entry in importlib.metadata.entry_points(group="torch.backends") if entry.name != "hxcomm"
    ):
        return f"another device for torch is installed ({', '.join(others)}); HXCOMM_DEVICE=1 registers hx all the same"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        return f"this machine has an accelerator ({accelerator.type}); HXCOMM_DEVICE=1 registers hx all the same"
    return None


def register() -> bool:
    """Gives torch's free device the name hx and `torch.hx`, unless `problem()` says why not. Makes nothing yet."""
    if is_registered():
        return True
    if problem() is not None:
        return False
    from hxcomm import _C, device

    rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, sys.modules[device.__name__])  # type: ignore[no-untyped-call]
    generate_methods_for_privateuse1_backend(for_storage=True)
    torch.Tensor.__dlpack_device__ = _dlpack_device_after(torch.Tensor.__dlpack_device__)  # type: ignore[method-assign]
    _C.device_prepare()
    segment_contents.has_chips = True
    return True


def _dlpack_device_after(original: Any) -> Any:
    """torch 2.13 knows the device there by its old name only, and raises for any other."""

    def dlpack_device(self: torch.Tensor) -> tuple[Any, int]:
        if self.device.type == NAME:
            return _DLPACK_EXTENSION_DEVICE, self.device.index
        device: tuple[Any, int] = original(self)
        return device

    dlpack_device.__doc__ = original.__doc__
    return dlpack_device


def state() -> str:
    """For `hxcomm info`: "on, 8 chips of 16 GiB each", or why not."""
    if not register():
        return f"off: {problem()}"
    return f"on: {environment.CHIPS.get()} chips of {environment.HBM.get() / (1 << 30):g} GiB each"
