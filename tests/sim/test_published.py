"""The simulator against what others have published: tests/sim/published.toml, one test a row. Nothing is tuned here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published", ROOT / "scripts" / "published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


published = load()
ROWS: list[dict[str, Any]] = published.rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_a_point_is_within_its_tolerance_or_listed_as_missed(row: dict[str, Any]) -> None:
    wrong = []
    for verdict in published.verdicts(row):
        listed = "missed" in verdict.point
        if (verdict.hit is False) != listed:
            what = "misses its tolerance and does not say why" if not listed else "is listed as missed and is not"
            wrong.append(
                f"{row['id']}, {verdict.point['at']}: predicted {verdict.predicted:.6g}, published "
                f"{verdict.point['published']}, {verdict.error_percent:+.2f} %: {what}"
            )
    assert wrong == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_a_row_says_its_class_its_source_and_what_was_fitted(row: dict[str, Any]) -> None:
    assert row["class"] in published.CLASSES
    assert row["source"]
    assert row["fitted"]
    judged = [point for point in row["points"] if "tolerance_percent" in point]
    assert judged or row["class"] == "gap"
    if row["class"] in ("engine", "gap"):
        assert row["fitted"].startswith("nothing")
    for point in row["points"]:  # a reason is a sentence's worth, and belongs to a point that can miss
        assert len(point.get("missed", "because it is so")) > 10
        assert "missed" not in point or "tolerance_percent" in point


def test_the_table_in_the_documentation_is_the_one_of_today() -> None:
    page = (ROOT / "docs" / "simulator.md").read_text(encoding="utf-8")
    again = "run python scripts/published.py --write docs/simulator.md"
    assert published.with_table(page) == page, f"docs/simulator.md is not up to date: {again}"


def test_a_wrong_prediction_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(each for each in ROWS if each["id"] == "ring_send")
    monkeypatch.setitem(published.PREDICTORS, "send", lambda row: [60094.0, 21031.0])
    assert [verdict.hit for verdict in published.verdicts(row)] == [False, True]
