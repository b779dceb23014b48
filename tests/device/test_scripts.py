"""The scripts that measure and certify the device run, and say what they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=SCRIPTS, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_benchmark_prints_a_row_for_each_operator() -> None:
    rows = run("bench_device.py", "--rounds", "1").splitlines()
    assert rows[0].split()[:3] == ["operator", "cpu", "us"]
    assert {row.split()[0] for row in rows[1:]} >= {"add", "mm", "attention", "tanh"}


def test_the_operator_check_reports_what_agrees(tmp_path: Path) -> None:
    pytest.importorskip("expecttest", reason="torch's operator tests import expecttest: pip install expecttest")
    page = tmp_path / "page.md"
    run("opinfo.py", "--only", "silu", "--dtype", "float32", "--jobs", "1", "--write", str(page))
    assert "## Forward: 100.00 %" in page.read_text()
    assert "1 of 1 pairs of operator and dtype agree, 1 of them bit by bit" in page.read_text()


def test_an_operator_that_ends_its_process_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("expecttest", reason="torch's operator tests import expecttest: pip install expecttest")
    import opinfo

    monkeypatch.setattr(sys, "executable", "/bin/false")
    outcomes, _ = opinfo.look_after([3, 5], ())
    assert [outcome.op for outcome in outcomes] == [opinfo.op_db[3].full_name, opinfo.op_db[5].full_name]
    assert all("ended with status 1" in outcome.problem for outcome in outcomes)
