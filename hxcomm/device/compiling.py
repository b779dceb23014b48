"""torch.compile for hx: inductor's C++ for CPU, on the chips' memory.

Imported when inductor asks `torch.hx` for its code generators, so `import torch` does not pay for it. A kernel takes
addresses, and a chip's memory is this process's: only what names the device in the generated Python differs from CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.device_interface import DeviceInterface, register_interface_for_device
from torch._inductor.codegen.common import register_device_op_overrides
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.cpu_device_op_overrides import CpuDeviceOpOverrides
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.scheduler import BaseSchedulerNode

from hxcomm.device import chips, streams


class Interface(DeviceInterface):
    """What dynamo asks of a device."""

    device = chips.device
    Event = streams.Event
    Stream = streams.Stream

    class Worker:
        """What worker processes ask that compile kernels."""

        set_device = staticmethod(chips.set_device)
        current_device = staticmethod(chips.current_device)
        get_device_properties = staticmethod(chips.get_device_properties)

    current_device = staticmethod(chips.current_device)
    set_device = staticmethod(chips.set_device)
    device_count = staticmethod(chips.device_count)
    is_available = staticmethod(chips.is_available)
    synchronize = staticmethod(streams.synchronize)
    current_stream = staticmethod(streams.current_stream)
    set_stream = staticmethod(streams.set_stream)

    @staticmethod
    def exchange_device(device: int) -> int:
        before = chips.current_device()
        chips.set_device(device)
        return before

    maybe_exchange_device = exchange_device

    @staticmethod
    def get_raw_stream(device_index: int) -> int:
        return 0

    @staticmethod
    def get_compute_capability(device: Any = None) -> str:
        return ""

    @staticmethod
    def is_bf16_supported(including_emulation: bool = False) -> bool:
        return True


class Wrapper(PythonWrapperCodegen):
    """The generated Python: it calls the kernels as on CPU, with addresses."""

    @staticmethod
    def create(is_subgraph: bool, name: Any, parent: Any, signatures: Any = None) -> Any:
        if is_subgraph:
            return PythonWrapperCodegen.create(is_subgraph, name, parent, signatures)
        return Wrapper()  # type: ignore[no-untyped-call]

    def generate_kernel_call(self, kernel_name: str, call_args: Any, *, device: Any = None, **others: Any) -> None:
        super().generate_kernel_call(kernel_name, call_args, device=torch.device("cpu"), **others)

    def make_allocation(self, name: str, device: torch.device, *shape: Any, **others: Any) -> str:
        """Names the chip: without it, a result would come to the current one."""
        line: str = super().make_allocation(name, device, *shape, **others)  # type: ignore[no-untyped-call]
        return line.replace("device='hx'", f"device='hx:{device.index}'") if device.type == "hx" else line


class NoCppWrapper:
    """inductor asks for one; it would allocate on CPU."""

    @staticmethod
    def create(*_: Any) -> Any:
        raise NotImplementedError("inductor's cpp_wrapper and AOTInductor are not supported on hx")


class Overrides(CpuDeviceOpOverrides):
    """The lines of the generated Python that deal with the device: a chip is made current."""

    def set_device(self, device_idx: int) -> str:
        return f"torch.hx.set_device({device_idx})"

    def synchronize(self) -> str:
        return "torch.hx.synchronize()"

    def device_guard(self, device_idx: int) -> str:
        return f"torch.hx.device({device_idx})"


def register() -> None:
    """Makes hx known to dynamo. Harmless when called twice."""
    for name in ("hx", *(f"hx:{chip}" for chip in range(chips.device_count()))):
        register_interface_for_device(name, Interface)
    register_device_op_overrides("hx", Overrides())
    BaseSchedulerNode.is_cpu = _is_cpu  # type: ignore[method-assign]


def _is_cpu(self: Any) -> bool:
    """Inductor's fusion asks this where the C++ generator needs to be treated unlike Triton."""
    device = self.get_device()
    return device is not None and device.type in ("cpu", "hx")


Scheduling = CppScheduling
register()
