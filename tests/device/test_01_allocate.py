"""The device hx, step by step. 1: tensors on a chip, and the chip's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

MIB = 1 << 20


def test_a_tensor_lives_on_a_chip_with_no_import_of_ours() -> None:
    x = torch.zeros(3, 4, device="hx")
    assert x.device == torch.device("hx", 0)
    assert x.is_hx
    assert torch.ones(2).hx().device.type == "hx"
    assert torch.ones(2).to(0).device == torch.device("hx", 0)  # the accelerator's first device
    assert torch.nn.Linear(2, 2).hx().weight.device.type == "hx"


def test_what_is_copied_there_and_back_is_the_same() -> None:
    x = torch.arange(1000.0).reshape(10, 100)
    assert x.hx().cpu().equal(x)
    assert x.t().hx().cpu().equal(x.t())
    assert x.hx()[:, ::3].cpu().equal(x[:, ::3])
    assert x.hx().to("hx:3").cpu().equal(x)


def test_each_chip_is_a_device_and_one_is_the_current() -> None:
    assert torch.hx.device_count() == 8
    assert torch.hx.current_device() == 0
    with torch.hx.device(3):
        assert torch.empty(1, device="hx").device.index == 3
        assert torch.hx.current_device() == torch.accelerator.current_device_index() == 3
    assert torch.hx.current_device() == 0
    with pytest.raises(RuntimeError, match="there is no hx:8; this process has 8 chips"):
        torch.empty(1, device="hx:8")


def test_memory_is_counted_as_on_cuda() -> None:
    chip = 5
    torch.hx.empty_cache()
    before = torch.hx.memory_allocated(chip)
    torch.hx.reset_peak_memory_stats(chip)
    x = torch.empty(10 * MIB, dtype=torch.uint8, device=f"hx:{chip}")
    assert torch.hx.memory_allocated(chip) - before == 10 * MIB
    assert torch.hx.memory_reserved(chip) >= 10 * MIB
    free, total = torch.hx.mem_get_info(chip)
    assert total == 16 << 30
    assert total - free == torch.hx.memory_allocated(chip)
    del x
    assert torch.hx.memory_allocated(chip) == before
    assert torch.hx.max_memory_allocated(chip) - before == 10 * MIB
    assert torch.accelerator.max_memory_allocated(chip) - before == 10 * MIB
    torch.hx.empty_cache()
    assert torch.hx.memory_reserved(chip) < 10 * MIB
    assert "allocated_bytes" in torch.hx.memory_summary(chip)


def test_only_touched_memory_takes_memory_and_empty_cache_gives_it_back() -> None:
    def resident() -> int:  # pages of shared memory
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssShmem")) << 10

    before = resident()
    x = torch.empty(8 << 30, dtype=torch.uint8, device="hx:6")
    assert resident() - before < 8 * MIB
    x[: 64 * MIB] = 1
    assert resident() - before >= 64 * MIB
    del x
    torch.hx.empty_cache()
    assert resident() - before < 16 * MIB


def test_a_full_chip_raises_out_of_memory_with_the_numbers() -> None:
    x = torch.empty(15 << 30, dtype=torch.uint8, device="hx:7")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(2 << 30, dtype=torch.uint8, device="hx:7")
    for part in ("allocate 2.00 GiB", "hx:7", "capacity of 16.00 GiB", "15.00 GiB is allocated", "1.00 GiB is free"):
        assert part in str(raised.value)
    assert torch.hx.memory_stats(7)["num_ooms"] == 1
    del x
    torch.empty(2 << 30, dtype=torch.uint8, device="hx:7")


def test_a_tensor_is_found_in_the_segment_that_peers_map() -> None:
    x = torch.zeros(100, device="hx:1")
    y = torch.zeros(100, device="hx:1")
    distance = y.data_ptr() - x.data_ptr()
    assert torch.hx.segment_offset(y) - torch.hx.segment_offset(x) == distance
    assert torch.hx.segment_offset(x[10:]) - torch.hx.segment_offset(x) == 40
    assert torch.hx.segment_offset(torch.zeros(3)) is None


def test_pinned_memory_is_known_as_such() -> None:
    x = torch.ones(5)
    assert not x.is_pinned()
    assert x.pin_memory().is_pinned()
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert x.pin_memory().to("hx", non_blocking=True).cpu().equal(x)
