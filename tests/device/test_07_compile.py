"""The device hx, step by step. 7: torch.compile; the kernels are inductor's C++ for CPU, on the chip's memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: install g++")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def layer(x: Tensor, weight: Tensor) -> Tensor:
    return F.silu(x @ weight).softmax(-1) * 2 + x.sum(1, keepdim=True)


def test_a_compiled_function_gives_what_it_gives_on_cpu_and_on_the_chip_of_its_inputs() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 16), torch.randn(16, 16)
    expected = torch.compile(layer)(x, weight)
    copies = torch.hx.output_copies()
    result = torch.compile(layer)(x.to("hx:2"), weight.to("hx:2"))
    assert result.device == torch.device("hx:2")
    assert result.cpu().equal(expected)
    assert torch.hx.segment_offset(result) is not None
    assert torch.hx.output_copies() == copies


def test_a_compiled_model_trains_with_the_gradients_of_cpu() -> None:
    # Whole numbers: inductor fuses and orders sums otherwise on CPU, which only rounding would show.
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for number, parameter in enumerate(net.parameters()):
        nn.init.zeros_(parameter)
        parameter.data += torch.arange(parameter.numel()).view_as(parameter) % (5 + number) - 2
    x = torch.arange(40.0).view(5, 8) % 7 - 3
    gradients = []
    for device in ("cpu", "hx"):
        net = net.to(device)
        net.zero_grad()
        torch.compile(net)(x.to(device)).square().sum().backward()
        gradients.append([p.grad.cpu() for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) == 4
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))
