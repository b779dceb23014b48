"""examples/resilient_decode.py by its one command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks  # it starts ranks: not beside another test's

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "resilient_decode.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), *arguments], capture_output=True, text=True, timeout=170
    )


def test_a_sentence_survives_a_kill_and_the_next_one_runs_on_three_again() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    timeline, *texts = done.stdout.split("\n\n")
    assert "rank 1 (host" in timeline and "killed by SIGKILL" in timeline
    times = [int(time) for time in re.findall(r"^ +(\d+) ms  ", timeline, re.MULTILINE)]
    assert len(times) == 8 and times[:6] == sorted(times[:6]), timeline
    assert texts[0].startswith("The capital of France is Paris."), done.stdout
    assert texts[-1] == "both texts equal those of the undisturbed run\n"
    assert done.stderr == ""


def test_too_short_a_sentence_is_refused_before_anything_starts() -> None:
    done = run("--new-tokens", "6")
    assert done.returncode == 2
    assert "--new-tokens 6: must be more than 6" in done.stderr
