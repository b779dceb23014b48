"""The device hx, step by step. 4: saving, and loading to where one wants it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_what_was_saved_on_a_chip_is_loaded_there() -> None:
    x = {"a": torch.arange(5.0, device="hx:3"), "b": torch.ones(2)}
    loaded = torch.load(saved(x))
    assert loaded["a"].device == torch.device("hx:3")
    assert loaded["b"].device.type == "cpu"
    assert loaded["a"].equal(x["a"])


@pytest.mark.parametrize("where", ["cpu", "hx", "hx:1", torch.device("hx", 2), {"hx:3": "hx:4"}])
def test_map_location_says_where_it_goes(where: Any) -> None:
    loaded = torch.load(saved(torch.arange(5.0, device="hx:3")), map_location=where)
    expected = torch.device("hx:4") if isinstance(where, dict) else torch.device(where)
    assert loaded.device.type == expected.type
    assert loaded.device.index == (expected.index if expected.index is not None or expected.type == "cpu" else 0)
    assert loaded.tolist() == [0, 1, 2, 3, 4]


def test_a_chip_that_does_not_exist_is_named() -> None:
    with pytest.raises(RuntimeError, match="8"):
        torch.load(saved(torch.ones(1)), map_location="hx:8")


def test_a_model_trained_on_cpu_goes_on_on_a_chip() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    x = torch.randn(3, 4)
    other = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).hx()
    other.load_state_dict(torch.load(saved(model.state_dict()), map_location="hx"))
    assert other(x.hx()).cpu().equal(model(x))
