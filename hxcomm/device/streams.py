"""Streams and events. Every operation is finished when its call returns, so a stream orders nothing more than that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hxcomm.device.chips import Device, index_of
from hxcomm.device.lifecycle import init


class Stream(torch.Stream):
    """A stream of a chip, as torch.cuda.Stream."""

    def __new__(cls, device: Device = None, priority: int = 0, **ids: Any) -> Any:
        init()
        if ids:  # an existing stream, by the numbers that torch gave it
            return super().__new__(cls, **ids)
        return super().__new__(cls, device=torch.device("hx", index_of(device)), priority=priority)


class Event(torch.Event):
    """A point in time of a stream, as torch.cuda.Event; elapsed_time() is of the wall clock, in ms; of
    virtual time where a chip is simulated (HXCOMM_SIM)."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
        init()
        return torch.Event(  # itself: elapsed_time() takes no object of a derived class
            device=torch.device("hx", index_of(None)),
            enable_timing=enable_timing,
            blocking=blocking,
            interprocess=interprocess,
        )


def synchronize(device: Device = None) -> None:
    """Waits until the chip has nothing to do: at once."""
    init()
    torch.accelerator.synchronize(index_of(device))


def current_stream(device: Device = None) -> torch.Stream:
    init()
    return torch.accelerator.current_stream(index_of(device))


def default_stream(device: Device = None) -> torch.Stream:
    init()
    return torch.Stream(stream_id=0, device_index=index_of(device), device_type=20)


def set_stream(stream: torch.Stream) -> None:
    init()
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Context manager: makes a stream the current one of its chip; None changes nothing."""
    if stream is None:
        yield
        return
    with stream:
        yield
