"""torch.accelerator on hx: devices, streams, events and memory, by the interface that names no vendor."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile


def test_hx_is_the_current_accelerator() -> None:
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("hx")
    assert torch.accelerator.device_count() == 8
    torch.accelerator.set_device_index(2)
    try:
        assert torch.hx.current_device() == torch.accelerator.current_device_index() == 2
        assert torch.empty(1, device="hx").device == torch.device("hx:2")
        with FakeTensorMode():  # torch.compile's and DTensor's shapes without memory
            assert torch.empty(1, device="hx").device == torch.device("hx:2")
    finally:
        torch.accelerator.set_device_index(0)


def test_streams_are_current_where_one_is_entered_and_always_idle() -> None:
    stream = torch.Stream(device="hx")
    other = torch.hx.Stream()
    assert stream != other
    assert torch.accelerator.current_stream() == torch.hx.default_stream()
    with stream:
        assert torch.accelerator.current_stream() == torch.hx.current_stream() == stream
        with torch.hx.stream(other):
            assert torch.hx.current_stream() == other
    assert stream.query()
    stream.wait_stream(other)
    stream.synchronize()
    torch.accelerator.synchronize()
    torch.ones(3, device="hx").record_stream(stream)


def test_events_measure_the_time_between_them() -> None:
    first, second = torch.hx.Event(enable_timing=True), torch.Event(device="hx", enable_timing=True)
    first.record()
    torch.ones(1000, 100, device="hx").sum()
    second.record()
    second.synchronize()
    assert second.query()
    assert first.elapsed_time(second) > 0
    assert first.elapsed_time(second) == -second.elapsed_time(first)
    with pytest.raises(ValueError, match="recorded"):
        first.elapsed_time(torch.Event(device="hx", enable_timing=True))


def test_memory_statistics_are_those_of_torch_hx() -> None:
    x = torch.ones(1000, device="hx")
    assert torch.accelerator.memory_allocated() == torch.hx.memory_allocated() >= x.nbytes
    assert torch.accelerator.get_memory_info() == torch.hx.mem_get_info()
    torch.accelerator.reset_peak_memory_stats()
    assert torch.accelerator.max_memory_allocated() == torch.accelerator.memory_allocated()
    torch.accelerator.empty_cache()


def test_properties_name_the_memory_and_the_cores() -> None:
    properties = torch.hx.get_device_properties(1)
    assert properties.total_memory == 16 << 30
    assert properties.multi_processor_count >= 1
    assert torch.hx.get_device_name() == properties.name
    with pytest.raises(RuntimeError, match="no hx:8"):
        torch.hx.get_device_properties(8)


def test_the_profiler_times_operators_by_events_of_hx() -> None:
    x = torch.ones(100, 100, device="hx")
    with torch.autograd.profiler.profile(use_device="hx") as profiled:
        x @ x
    times = {event.name: event.device_time_total for event in profiled.function_events}
    assert times["aten::mm"] > 0


def test_the_profiler_sees_operators_and_memory_of_hx() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        x = torch.ones(1000, device="hx")
        x @ x
    events = {event.key for event in profiled.key_averages()}
    assert {"aten::ones", "aten::matmul"} <= events
    assert any(
        (event.name == "[memory]" and "hx" in str(event.device_type).lower()) or event.device_memory_usage
        for event in profiled.events()
    )
