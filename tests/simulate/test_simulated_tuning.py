"""`hxcomm tune --chip`: the table of simulated links, which says so, and which planners take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hxcomm import tuning
from hxcomm.cli import main
from hxcomm.select import Layout, Planner
from hxcomm.sim import chips

OUT = "table.json"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuning.Table:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--chip", "lpu", "--ranks", "4", "--out", OUT]) == 0
    monkeypatch.setenv("HXCOMM_TUNING", OUT)
    return tuning.load(OUT)


def test_the_table_says_that_it_is_simulated_and_of_which_chip(table: tuning.Table) -> None:
    assert table.simulated
    assert table.made["simulated"]["chip"] == "lpu"
    assert table.made["simulated"]["digest"] == chips.load("lpu").digest
    assert {row.device for row in table.rows} == {"hx"}
    assert table.where() == "4 ranks on hosts 0,0,0,0"


def test_a_planner_takes_it_for_tensors_of_chips_and_calls_it_simulated(table: tuning.Table) -> None:
    planner = Planner(0, Layout(4), "g", {})
    for nbytes in (1 << 10, 1 << 20, 64 << 20):
        row = table.row("all_reduce", nbytes, "hx")
        assert row is not None
        chosen = planner.choose("all_reduce", nbytes, "float16", mapped=True)
        assert chosen.algorithm == row.algorithm
        assert chosen.why.startswith(f"simulated (table.json): {row.us:g} us for {row.measured_bytes} bytes")
    assert planner.choose("all_reduce", 1 << 20, "float16", mapped=False).why.endswith("bytes on cpu)")


def test_only_algorithms_that_are_legal_on_the_chips_links_are_in_it(table: tuning.Table) -> None:
    assert {row.algorithm for row in table.rows if row.op == "all_reduce"} <= {"line", "ring", "ring_bidirectional"}
    assert {row.op for row in table.rows} >= {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce"}


def test_the_fastest_at_the_measured_size_is_what_simulate_says(
    table: tuning.Table, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    row = table.row("all_reduce", 1 << 20, "hx")
    assert row is not None
    assert main(["simulate", "all_reduce", "--chips", "4", "--sizes", str(row.measured_bytes), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (best,) = [each for each in found["rows"] if each["algorithm"] == row.algorithm]
    assert row.us == best["total_ps"] / 10**6
    assert found["fastest"] == {str(row.measured_bytes): row.algorithm}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--chip", "lpx"], "there is no chip 'lpx'; known are: "),
        (["--chip", "lpu", "--iters", "3"], "with --chip nothing is measured: leave them out"),
        (["--topology", "ring"], "--topology is of simulated links: say of which chip with --chip"),
        (["--set", "links.0.latency_ns=1"], "--set is of simulated links"),
        (["--chip", "lpu", "--topology", "torus:3x3"], "4 ranks do not fill"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_words_are_named_and_nothing_is_written(
    words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--ranks", "4", "--out", OUT, *words]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / OUT).exists()
