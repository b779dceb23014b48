"""The chips of this process: how many, which is the current one, what they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from hxcomm import environment
from hxcomm.device.lifecycle import extension

Device = torch.device | str | int | None


@dataclass(frozen=True)
class Properties:
    """What torch.compile, accelerate and others ask of a device. Cores of this machine stand for a chip's."""

    name: str
    total_memory: int
    multi_processor_count: int
    major: int = 1
    minor: int = 0
    warp_size: int = 32
    max_threads_per_multi_processor: int = 1


def is_available() -> bool:
    """Whether there are chips: always, where torch.hx exists."""
    return device_count() > 0


def device_count() -> int:
    return environment.CHIPS.get()


def index_of(device: Device, *, optional: bool = True) -> int:
    """A chip's number from "hx:1", torch.device("hx", 1), 1, or None and "hx" for the current one."""
    if isinstance(device, int):
        index: int | None = device
    elif device is None:
        index = None
    else:
        device = torch.device(device)
        if device.type != "hx":
            raise ValueError(f"Expected a hx device, but got: {device}")
        index = device.index
    if index is None and not optional:
        raise ValueError(f"Expected a hx device with an index, such as hx:0, but got: {device}")
    return current_device() if index is None else index


def current_device() -> int:
    """The chip that "hx" without an index means in this thread."""
    return int(extension().device_current())


def set_device(device: Device) -> None:
    """Makes a chip the current one of this thread; a negative number changes nothing, as for torch.cuda."""
    if (index := index_of(device)) >= 0:
        extension().device_exchange(index)


class device:  # noqa: N801 (torch.cuda's name)
    """Context manager: makes a chip the current one. A negative number or None changes nothing."""

    def __init__(self, device: Device) -> None:
        self.index = -1 if device is None else index_of(device, optional=True)
        self.before = -1

    def __enter__(self) -> device:
        self.before = extension().device_exchange(self.index) if self.index >= 0 else -1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.before >= 0:
            extension().device_exchange(self.before)


class device_of(device):  # noqa: N801
    """Context manager: makes the chip of a tensor the current one; a tensor elsewhere changes nothing."""

    def __init__(self, tensor: Any) -> None:
        super().__init__(tensor.device.index if tensor.device.type == "hx" else None)


def get_device_name(device: Device = None) -> str:
    return get_device_properties(device).name


def get_device_capability(device: Device = None) -> tuple[int, int]:
    properties = get_device_properties(device)
    return properties.major, properties.minor


def get_device_properties(device: Device = None) -> Properties:
    index = index_of(device)
    if not 0 <= index < device_count():
        raise RuntimeError(f"there is no hx:{index}; this process has {device_count()} chips (HXCOMM_CHIPS)")
    return Properties("hx (simulated)", environment.HBM.get(), len(os.sched_getaffinity(0)))
