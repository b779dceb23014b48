"""As much of vLLM 0.32 as hxcomm's plug-in imports, so that it can be tested where vLLM is not installed.

Names, signatures and attributes are vLLM's; what they do is the least that the plug-in can see. test_vllm.py runs the
real one (scripts/test_engines.sh).
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

CPU_PLATFORM = "vllm.platforms.cpu.CpuPlatform"


class CpuArchEnum(enum.Enum):
    """vllm.platforms.interface.CpuArchEnum, two of it."""

    X86 = enum.auto()
    ARM = enum.auto()


class Compilation:
    """VllmConfig.compilation_config."""

    backend = ""


class Config:
    """VllmConfig."""

    def __init__(self) -> None:
        self.compilation_config = Compilation()
        self.additional_config = {"theirs": 1}


class CpuPlatform:
    """vllm.platforms.cpu.CpuPlatform."""

    dist_backend = "gloo"
    simple_compile_backend = "inductor"

    def is_cpu(self) -> bool:
        return True

    @classmethod
    def get_cpu_architecture(cls) -> CpuArchEnum:
        return CpuArchEnum.X86

    @classmethod
    def check_and_update_config(cls, vllm_config: Config) -> None:
        vllm_config.compilation_config.backend = "inductor"


CpuPlatform.__module__ = "vllm.platforms.cpu"


class DeviceCommunicatorBase:
    """vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase, of an ordinary group."""

    def __init__(
        self,
        cpu_group: dist.ProcessGroup,
        device: torch.device | None = None,
        device_group: dist.ProcessGroup | None = None,
        unique_name: str = "",
        use_all2all: bool = False,
    ) -> None:
        self.device_group, self.unique_name = device_group, unique_name
        self.world_size = dist.get_world_size(cpu_group)
        self.ranks = dist.get_process_group_ranks(cpu_group)
        self.rank_in_group = dist.get_group_rank(cpu_group, dist.get_rank())
        self.use_all2all = unique_name.split(":")[0] == "ep" and use_all2all

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The one that torch traces, as vLLM has it, along the first dimension."""
        assert dim == 0
        output = torch.empty((input_.shape[0] * self.world_size, *input_.shape[1:]), dtype=input_.dtype)
        dist.all_gather_into_tensor(output, input_, group=self.device_group)
        return output


def install(cpu_build: bool = True) -> ModuleType:
    """Makes `import vllm...` find this; returns vllm.platforms. cpu_build: whether this vLLM was built for CPU."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.platforms": {
            "CpuArchEnum": CpuArchEnum,
            "cpu_platform_plugin": lambda: CPU_PLATFORM if cpu_build else None,
            "current_platform": CpuPlatform(),
        },
        "vllm.utils": {},
        "vllm.utils.import_utils": {"resolve_obj_by_qualname": {CPU_PLATFORM: CpuPlatform}.__getitem__},
        "vllm.distributed": {},
        "vllm.distributed.device_communicators": {},
        "vllm.distributed.device_communicators.base_device_communicator": {
            "DeviceCommunicatorBase": DeviceCommunicatorBase
        },
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    return sys.modules["vllm.platforms"]
