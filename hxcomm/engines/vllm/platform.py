"""vLLM's CPU platform, with its kernels, workers and model runner as they are, and hxcomm between the ranks.

vLLM imports this module by name when hxcomm's plug-in is active; what is raised here ends vLLM with that message. A
backend that torch does not know would not: vLLM takes gloo then, and only warns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import CpuArchEnum, cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

import hxcomm
from hxcomm import c10d, environment

if TYPE_CHECKING:
    from vllm.config import VllmConfig

environment.CPU.get()  # raises where its value is wrong
c10d.require_backend()

# ZenCpuPlatform where zentorch is installed, else CpuPlatform.
_Base: Any = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")


def _is_inductor_trusted() -> bool:
    """Not on x86 without AVX-512, as a precaution: on one such machine torch 2.13's inductor compiled vLLM's vocabulary
    mask wrongly in 6 of 18 cases, with any backend; on one that only hides its AVX-512 from torch, in 0 of 162."""
    return _Base.get_cpu_architecture() != CpuArchEnum.X86 or torch.cpu._is_avx512_supported()


class HxcommCpuPlatform(_Base):  # type: ignore[misc]
    """What vLLM knows as `current_platform`."""

    dist_backend = c10d.BACKEND
    simple_compile_backend = "inductor" if _is_inductor_trusted() else "eager"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """Without it vLLM's own shared memory would carry all collectives of the model, whatever the backend."""
        return "hxcomm.engines.vllm.communicator.HxcommCommunicator"

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """As on CPU, but for two things: where inductor is not trusted, it does not compile the model, which is traced;
        and compiled models, which call the communicator that they were traced with, are cached apart from others."""
        super().check_and_update_config(vllm_config)
        # vLLM keeps compiled models by a hash of its configuration, which the platform is no part of.
        vllm_config.additional_config = {**vllm_config.additional_config, "hxcomm": hxcomm.__version__}
        if vllm_config.compilation_config.backend == "inductor":
            vllm_config.compilation_config.backend = cls.simple_compile_backend
