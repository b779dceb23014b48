"""Changing any one value of a chip or its links changes the predictions that depend on it, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from predict.small_models import decoder

from hxcomm.predict.prediction import Predictor
from hxcomm.sim import chips
from hxcomm.sim.chips import Chip
from hxcomm.sim.costs import CostModel
from hxcomm.sim.interconnect import interconnect

# Every key that a chip file can have. Slow at products, so that the prompt is bound by them and the decode step is not.
EVERY_KEY = """
name = "every key"
overlap_chunks = 2
[memory]
bandwidth_bytes_per_s = 1e11
capacity_bytes = 1e9
achieved = 0.5
[compute]
achieved = 0.5
fixed_ns_per_op = 3
[compute.flops_per_s]
float32 = 1e11
bfloat16 = 4e11
float16 = 4e11
float8 = 8e11
int8 = 8e11
int4 = 16e11
[collective]
launch_ns = 100
reduce_bytes_per_s = 1e10
[[links]]
topology = "ring"
shape = [4]
directions = 2
bandwidth_bytes_per_s = 1e9
achieved = 0.5
latency_ns = 300
per_message_ns = 50
forwarding = "cut_through"
tick_ps = 1
[legal]
neighbours_only = true
push_only = false
max_sources = 8
multicast = false
alignment_bytes = 32
credits_per_link = 8
[power]
watts = 100
"""

# What does not change the times of an fp16 model on four chips of this ring, and why.
CHANGES_NOTHING = {
    "memory.capacity_bytes": "decides what fits",
    "compute.flops_per_s.float32": "nothing is multiplied in it",
    "compute.flops_per_s.bfloat16": "nothing is multiplied in it",
    "compute.flops_per_s.float8": "of weights in fp8",
    "compute.flops_per_s.int8": "nothing is multiplied in it",
    "compute.flops_per_s.int4": "of weights in int4",
    "legal.max_sources": "decides which algorithms may be used",
    "legal.credits_per_link": "decides which algorithms may be used",
}
# Another value than twice the one above.
OTHER_VALUES: dict[str, Any] = {
    "links.0.shape": [8],
    "links.0.directions": 1,
    "links.0.tick_ps": 70_000,
    "legal.alignment_bytes": 128,
}


@pytest.fixture(scope="module")
def chip(tmp_path_factory: pytest.TempPathFactory) -> Chip:
    path: Path = tmp_path_factory.mktemp("chip") / "every_key.toml"
    path.write_text(EVERY_KEY)
    return chips.load(path)


def predicted(chip: Chip, weights: str = "fp16", batch: int = 2) -> dict[str, Any]:
    predictor = Predictor(decoder(), chip, CostModel(chip), context=256, prompt=128, weights=weights)
    return predictor.predict(interconnect(chip, 4), batch, chunks=chip.overlap_chunks).as_json()


def numbers(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of all numbers, and lists of them."""
    items = enumerate(table) if isinstance(table, list) else table.items()
    for key, value in items:
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | list) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def changed(chip: Chip, key: str, value: Any) -> Chip:
    return chips.replace(chip, key, OTHER_VALUES.get(key, value * 2 if not isinstance(value, list) else value))


def test_every_number_of_a_chip_changes_the_prediction_or_is_named_with_the_reason(chip: Chip) -> None:
    before = predicted(chip)
    found = {key: predicted(changed(chip, key, value)) for key, value in numbers(chips.as_table(chip))}
    assert len(found) > 20
    unchanged = {key for key, after in found.items() if after == before}
    assert unchanged == set(CHANGES_NOTHING)


@pytest.mark.parametrize(
    ("key", "only"),
    [
        ("power.watts", {"joule_per_token"}),
        ("memory.bandwidth_bytes_per_s", {"ttft_ms", "ms_per_token", "tokens_per_s", "joule_per_token", "parts"}),
    ],
)
def test_a_value_changes_what_depends_on_it_alone(chip: Chip, key: str, only: set[str]) -> None:
    before = predicted(chip)
    after = predicted(changed(chip, key, dict(numbers(chips.as_table(chip)))[key]))
    assert {name for name, value in after.items() if value != before[name]} == only


def test_the_capacity_decides_what_fits(chip: Chip) -> None:
    assert predicted(chip)["fits"] is True
    small = predicted(chips.replace(chip, "memory.capacity_bytes", 1e5))
    assert small["fits"] is False
    assert small["ms_per_token"] is None


@pytest.mark.parametrize(("weights", "dtype"), [("fp8", "float8"), ("int4", "int4")])
def test_the_rate_of_a_narrow_dtype_is_that_of_weights_stored_so(chip: Chip, weights: str, dtype: str) -> None:
    faster = chips.replace(chip, f"compute.flops_per_s.{dtype}", 64e11)
    assert predicted(faster, weights)["ttft_ms"] < predicted(chip, weights)["ttft_ms"]
    assert predicted(faster, weights, 1)["parts"]["kv_cache"] == predicted(chip, weights, 1)["parts"]["kv_cache"]


@pytest.mark.parametrize(("key", "value"), [("legal.neighbours_only", False), ("links.0.topology", "full")])
def test_links_that_can_do_more_are_used_for_more(chip: Chip, key: str, value: Any) -> None:
    assert predicted(chips.replace(chip, key, value))["ms_per_token"] < predicted(chip)["ms_per_token"]


def test_forwarding_changes_what_goes_over_several_links(chip: Chip) -> None:
    far = chips.replace(chip, "legal.neighbours_only", False)
    later = chips.replace(far, "links.0.forwarding", "store_and_forward")
    assert predicted(later)["ttft_ms"] >= predicted(far)["ttft_ms"]
