"""SGLang on CPU with its process groups over hxcomm: an entry point and a platform class.

Imported when SGLang looks for its platform. Ours is its CPU platform with another backend. A model's collectives are
then hxcomm's, except where SGLang has shared memory of its own for one host: on processors with AMX, and on arm64.
"""

from __future__ import annotations

import os

from sglang.srt.platforms.cpu import CpuSRTPlatform

from hxcomm import c10d, environment


def platform() -> str | None:
    """Entry point `sglang.srt.platforms`: the name of our platform class. None: not asked for, or SGLang was not
    asked to compute on CPU. Never raises: SGLang would go on without us; what HxcommSRTPlatform() raises ends it."""
    try:
        asked = environment.CPU.get()
    except ValueError:  # raised again by HxcommSRTPlatform()
        asked = True
    on_cpu = os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1"
    return "hxcomm.engines.sglang.HxcommSRTPlatform" if asked and on_cpu else None


class HxcommSRTPlatform(CpuSRTPlatform):  # type: ignore[misc]
    """What SGLang knows as `current_platform`."""

    def __init__(self) -> None:
        super().__init__()
        environment.CPU.get()
        c10d.require_backend()

    def get_torch_distributed_backend_str(self) -> str:
        """The backend of each group for CPU tensors."""
        return c10d.BACKEND
