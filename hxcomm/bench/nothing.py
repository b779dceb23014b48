"""The do-nothing backend, registered with torch.distributed under a name that only the benchmark knows."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

NAME = "hxcomm_nothing"


def register() -> str:
    """Makes it known to torch.distributed, once, and returns its name there."""
    if not hasattr(dist.Backend, NAME.upper()):
        default = dist.Backend.default_device_backend_map.get("cpu")
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])
        # Registering must not change what a program gets that does not name it.
        if default is not None:
            dist.Backend.default_device_backend_map["cpu"] = default
    return NAME


def _create(options: Any, pg_options: Any) -> Any:
    from hxcomm import _C

    return _C.NothingProcessGroup(rank=options.group_rank, size=options.group_size)
