"""The chip files that come with hxcomm and where each value is from. Read as plain TOML: a loader hides nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import hxcomm

FILES = sorted((Path(hxcomm.__file__).parent / "sim" / "chips").glob("*.toml"))
NEED_NO_SOURCE = {"name", "description"}


def values(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted name of each value, tables in arrays by their index: links.0.latency_ns."""
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from values(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, each in enumerate(value):
                yield from values(each, f"{name}.{index}.")
        else:
            yield name


def read(path: Path) -> tuple[set[str], dict[str, str]]:
    chip = tomllib.loads(path.read_text(encoding="utf-8"))
    sources = chip.pop("sources")
    return set(values(chip)) - NEED_NO_SOURCE, sources


def test_the_chips_that_the_documentation_names_are_bundled() -> None:
    expected = {"lpu", "lpu-fpga", "bertha-500", "bertha-100", "tpu-v4p", "tpu-v5e", "a100", "h100"}
    assert {path.stem for path in FILES} == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_has_a_source_and_every_source_a_value(path: Path) -> None:
    names, sources = read(path)
    assert sorted(names - set(sources)) == [], f"{path.name}: values without a line in [sources]"
    assert sorted(set(sources) - names) == [], f"{path.name}: lines in [sources] of values that are not there"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_source_is_a_citation_or_says_what_was_assumed_and_why(path: Path) -> None:
    _, sources = read(path)
    for name, source in sources.items():
        words = source.removeprefix("assumed:").split()
        assert len(words) >= 2, f"{path.name}: {name} = {source!r} says too little"
        assert source.startswith("assumed: ") or "assumed" not in source, f"{path.name}: {name}: begin with 'assumed: '"
