"""`hxcomm chips`: the list, and of one chip every value with its source and what its links can execute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sim.chip_files import TEXT

from hxcomm import algorithms, cli
from hxcomm.sim import chips


def test_the_list_has_a_line_for_each_bundled_chip(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chips"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["chip", *chips.names()]


def test_a_chip_is_explained_value_by_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT + "\n[legal]\nneighbours_only = true\n")
    assert cli.main(["chips", str(path), "--ranks", "4"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "links.0.latency_ns 500 assumed: a test" in lines
    assert "memory.capacity_bytes 1.6e+10 default, or no source given" in lines
    assert "collective.reduce_bytes_per_s 1e+12 derived: memory.bandwidth_bytes_per_s x memory.achieved" in lines
    assert "4 of them: ring of 4, two directions, 1 GB/s a link, 500 ns a hop, store_and_forward" in lines
    assert "all_reduce ring yes" in lines
    refused = "round 1: rank 0 copies rank 2 input[0] to rank 0 output[2]: neighbours_only: from rank 2 to rank 0 it is"
    assert f"all_gather direct {refused} 2 hops" in lines


def test_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chips", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == chips.names()
    assert cli.main(["chips", "lpu", "--json", "--ranks", "2"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert {key: explained[key] for key in ("name", "ranks")} == {"name": "lpu", "ranks": 2}
    pairs = {(each["op"], each["algorithm"]) for each in explained["algorithms"]}
    assert pairs == {(op, name) for op in algorithms.OPS for name in algorithms.names(op)}


def test_a_chip_that_there_is_not_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chips", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("hxcomm chips: there is no chip 'gpu'; known are: ")
