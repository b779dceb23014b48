"""scripts/chaos.py on a few cases: one of every kind of fault, and what it says where a backend does not hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import chaos
import pytest

pytestmark = pytest.mark.ranks  # it starts ranks: not beside another test's

CHAOS = Path(__file__).resolve().parents[2] / "scripts" / "chaos.py"
LIMIT_S = 150.0
CASES = [
    "all_reduce,3,kill,judged,1",
    "all_reduce,4,kill,published,2",
    "broadcast,2,kill,abort,3",
    "reduce_scatter,3,kill,leave,4",
    "gather,3,exit,transfer,5",
    "barrier,4,exit,ended,6",
    "scatter,2,exception,before,7",
    "all_gather,3,exception,staged,8",
    "reduce,3,stop,arrived,9",
    "all_reduce,8,stop,before,10",
    "all_to_all,4,stop300,transfer,11",
    "barrier,2,gil,before,12",
]


ON_HX = [
    "all_reduce,3,kill,transfer,1",
    "all_gather,4,stop,judged,2",
    "reduce_scatter,3,exception,arrived,3",
    "all_to_all,2,kill,abort,4",
    "broadcast,3,exit,published,5",
]


def run_chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHAOS), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S)


def outcome_of(folder: Path, *arguments: str) -> tuple[Any, str, int]:
    done = run_chaos(*arguments, f"--json={folder / 'outcomes.json'}")
    return json.loads((folder / "outcomes.json").read_text()), done.stdout, done.returncode


@pytest.mark.parametrize(("case", "device"), [(c, "cpu") for c in CASES] + [(c, "hx") for c in ON_HX])
def test_survivors_notice_a_failed_rank_and_nothing_else(case: str, device: str, tmp_path: Path) -> None:
    (outcome,), printed, status = outcome_of(tmp_path, f"--case={case}", f"--device={device}")
    assert status == 0 and not outcome["problems"], printed
    assert outcome["reached"], "the victim never came to its point: the case tests nothing"
    if case.split(",")[2] not in ("stop300", "gil") and ",leave," not in case:
        assert outcome["raised"] == outcome["named"] == outcome["survivors"]


def test_every_pair_of_factors_occurs_in_the_sampled_cases() -> None:
    seen = {(case.op, case.world_size, case.fault, case.point) for case in chaos.sampled(3, "hxcomm", (2, 4))}
    for op in chaos.OPS:
        for fault in chaos.FAULTS:
            assert any(each[0] == op and each[2] == fault for each in seen), (op, fault)
    for fault in chaos.FAULTS:
        for point in chaos.POINTS:
            if chaos.is_valid(fault, point, "all_reduce", "hxcomm"):
                assert any(each[2:] == (fault, point) for each in seen), (fault, point)


def test_a_backend_that_names_no_rank_fails_with_a_line_that_repeats_the_case(tmp_path: Path) -> None:
    (outcome,), printed, status = outcome_of(tmp_path, "--backend=gloo", "--case=all_reduce,2,kill,before,5")
    assert status == 1 and "does not name" in outcome["problems"][0]
    assert "python scripts/chaos.py --backend gloo --device cpu --case all_reduce,2,kill,before,5" in printed
    assert re.search(r"^\| kill +\| 1 +\| 0 ", printed, re.MULTILINE), printed


def test_kills_are_measured_and_all_named(tmp_path: Path) -> None:
    rows, printed, status = outcome_of(tmp_path, "--kills=2", "--ranks=3", "--seed=1")
    assert status == 0 and len(rows) == 4, printed
    assert all(row["rank"] and row["signal"] and row["ms"] is not None for row in rows), printed


def test_aborts_release_every_blocked_rank(tmp_path: Path) -> None:
    done = run_chaos("--aborts=3", "--ranks=4")
    assert done.returncode == 0 and "did not raise: 0\n" in done.stdout, done.stdout


def test_ranks_that_are_held_up_for_a_moment_raise_nothing() -> None:
    done = run_chaos("--soak", "--minutes=0.4", "--ranks=4", "--seed=1")
    assert done.returncode == 0 and re.search(r" [1-9]\d* stops .* [1-9]\d* times, 0 false alarms", done.stdout), (
        done.stdout
    )


@pytest.mark.parametrize("wrong", ["--case=all_reduce,2,melt,before,1", "--ranks=1,2", "--ranks=two"])
def test_a_wrong_argument_is_refused(wrong: str) -> None:
    done = run_chaos(wrong)
    assert done.returncode == 2 and wrong.split("=")[0] in done.stdout


def test_a_communicator_recovers_over_and_over_and_holds_no_more_than_before() -> None:
    done = run_chaos("--cycles=12", "--ranks=3", "--seed=3")
    assert done.returncode == 0, done.stdout
    assert "R4: 24 named the rank, 24 the signal" in done.stdout
    assert len(re.findall("process [01]: in the second quarter", done.stdout)) == 2
