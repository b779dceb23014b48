"""`torch.hx`: the simulated chips as a torch device, with the interface that torch.cuda has.

Tensors live in this process's shared segment, where peers can read them; operations run as torch's CPU kernels on the
same bytes, and are finished when they return. torch imports this module as `torch.hx`; nothing is
allocated before the device is first used. Knows nothing of collectives.

    >>> import torch
    >>> x = torch.ones(3, device="hx")
    >>> torch.hx.memory_allocated() > 0
    True
"""

from __future__ import annotations

from typing import Any

from hxcomm.device import amp
from hxcomm.device.chips import (
    Properties,
    current_device,
    device,
    device_count,
    device_of,
    get_device_capability,
    get_device_name,
    get_device_properties,
    is_available,
    set_device,
)
from hxcomm.device.lifecycle import (
    _is_in_bad_fork,
    _lazy_init,
    init,
    is_initialized,
    op_counts,
    output_copies,
    segment_offset,
)
from hxcomm.device.memory import (
    OutOfMemoryError,
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_stats,
    memory_summary,
    reset_accumulated_memory_stats,
    reset_max_memory_allocated,
    reset_peak_memory_stats,
)
from hxcomm.device.random import (
    default_generator,
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)
from hxcomm.device.streams import (
    Event,
    Stream,
    current_stream,
    default_stream,
    set_stream,
    stream,
    synchronize,
)

get_amp_supported_dtype = amp.get_amp_supported_dtype  # torch.autocast asks the module itself

__all__ = [
    "Event",
    "OutOfMemoryError",
    "Properties",
    "Stream",
    "_is_in_bad_fork",
    "_lazy_init",
    "amp",
    "current_device",
    "current_stream",
    "default_generator",
    "default_stream",
    "device",
    "device_count",
    "device_of",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "init",
    "initial_seed",
    "is_available",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "memory_summary",
    "op_counts",
    "output_copies",
    "reset_accumulated_memory_stats",
    "reset_max_memory_allocated",
    "reset_peak_memory_stats",
    "seed",
    "seed_all",
    "segment_offset",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
]


# What inductor asks the module of a device for.
_COMPILING = {
    "Scheduling": "Scheduling",
    "PythonWrapperCodegen": "Wrapper",
    "CppWrapperCodegen": "NoCppWrapper",
    "WrapperFxCodegen": "NoCppWrapper",
}


def __getattr__(name: str) -> Any:
    if name not in _COMPILING:
        raise AttributeError(f"module 'torch.hx' has no attribute {name!r}")
    from hxcomm.device import compiling

    return getattr(compiling, _COMPILING[name])
