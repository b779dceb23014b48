"""Statistics of a chip's memory and giving it back, as torch.cuda names them. torch.accelerator counts the same."""

from __future__ import annotations

from typing import Any

import torch

from hxcomm.device.chips import Device, index_of
from hxcomm.device.lifecycle import init

OutOfMemoryError = torch.OutOfMemoryError


def memory_stats(device: Device = None) -> dict[str, Any]:
    init()
    return dict(torch.accelerator.memory_stats(index_of(device)))


def memory_allocated(device: Device = None) -> int:
    """Bytes of the chip's live tensors now."""
    return int(memory_stats(device)["allocated_bytes.all.current"])


def max_memory_allocated(device: Device = None) -> int:
    """The most there have been since the start or reset_peak_memory_stats()."""
    return int(memory_stats(device)["allocated_bytes.all.peak"])


def memory_reserved(device: Device = None) -> int:
    """Bytes that this process holds for the chip: allocated, or free and not given back by empty_cache()."""
    return int(memory_stats(device)["reserved_bytes.all.current"])


def max_memory_reserved(device: Device = None) -> int:
    return int(memory_stats(device)["reserved_bytes.all.peak"])


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """(free, total) bytes of the chip."""
    init()
    free, total = torch.accelerator.get_memory_info(index_of(device))
    return free, total


def empty_cache() -> None:
    """Gives the memory of freed tensors back to the machine."""
    init()
    torch.accelerator.empty_cache()


def reset_peak_memory_stats(device: Device = None) -> None:
    init()
    torch.accelerator.reset_peak_memory_stats(index_of(device))


reset_max_memory_allocated = reset_peak_memory_stats


def reset_accumulated_memory_stats(device: Device = None) -> None:
    init()
    torch.accelerator.reset_accumulated_memory_stats(index_of(device))


def memory_summary(device: Device = None) -> str:
    """A few lines for a person."""
    stats = memory_stats(device)
    lines = [f"hx:{index_of(device)}{'current':>18}{'peak':>16}{'allocated':>18}{'freed':>18}"]
    for name in ("allocated_bytes", "active_bytes", "reserved_bytes", "requested_bytes", "allocation", "segment"):
        counts = [stats[f"{name}.all.{which}"] for which in ("current", "peak", "allocated", "freed")]
        lines.append(f"{name:<16}{counts[0]:>12}{counts[1]:>16}{counts[2]:>18}{counts[3]:>18}")
    return "\n".join([*lines, f"{'out of memory':<16}{stats['num_ooms']:>12}"])
