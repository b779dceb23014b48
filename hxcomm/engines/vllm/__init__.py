"""vLLM on CPU with its collectives over hxcomm: what vLLM's two kinds of entry points call.

vLLM calls `platform()` in each of its processes to find its platform, and `check()` when the platform is known. Both do
nothing without HXCOMM_CPU=1. Importing this imports nothing of vLLM.
"""

from __future__ import annotations

from hxcomm import environment

PLATFORM = "hxcomm.engines.vllm.platform.HxcommCpuPlatform"


def _is_asked_for() -> bool:
    """A value that HXCOMM_CPU cannot have counts as yes: vLLM drops what plug-ins raise, but not what the platform's
    module raises, which asks again."""
    try:
        return environment.CPU.get()
    except ValueError:
        return True


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: the name of our platform class. None: not asked for, or vLLM's build is for
    another device than CPU."""
    if not _is_asked_for():
        return None
    from vllm.platforms import cpu_platform_plugin

    return None if cpu_platform_plugin() is None else PLATFORM


def check() -> None:
    """Entry point `vllm.general_plugins`: raises RuntimeError where vLLM runs on CPU, but not on our platform."""
    if not _is_asked_for():
        return
    from vllm.platforms import current_platform

    chosen = f"{type(current_platform).__module__}.{type(current_platform).__name__}"
    if current_platform.is_cpu() and chosen != PLATFORM:
        raise RuntimeError(
            f"HXCOMM_CPU=1, but vLLM chose the platform {chosen}, so its collectives would not run over hxcomm. "
            "VLLM_TARGET_DEVICE=cpu makes vLLM look at no plug-in: unset it; or unset HXCOMM_CPU"
        )
