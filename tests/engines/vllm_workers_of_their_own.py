"""As vllm_workers, and our platform no longer names our communicator: its backend's name is all that is left."""

from __future__ import annotations

from vllm_workers import Workers

from hxcomm.engines.vllm.platform import HxcommCpuPlatform

__all__ = ["Workers"]

del HxcommCpuPlatform.get_device_communicator_cls
