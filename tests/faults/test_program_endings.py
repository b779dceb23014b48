"""How a program ends: silently, soon, with its own status, whatever it does with its groups."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos_endings import ENDINGS, PROGRAM

Run = Callable[..., list[Any]]


@pytest.mark.parametrize("name", [name for name in ENDINGS if name != "exception"])
def test_a_program_ends_silently_however_it_leaves_its_groups(run_ranks: Run, name: str, tmp_path: Path) -> None:
    ending, status = ENDINGS[name]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("ENDING", ending))
    ended = signal.Signals(-status) if status < 0 else status
    printed = run_ranks(program, 2, expect={0: ended, 1: ended} if status else None)
    assert printed == ["", ""]


def test_a_program_that_raises_shows_its_own_traceback_and_nothing_else(run_ranks: Run, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("ENDING", ENDINGS["exception"][0]))
    for text in run_ranks(program, 2, expect={0: 1, 1: 1}):
        lines = [line.split(": ", 1)[1] for line in text.splitlines()]  # torch puts [rank0]: in front
        assert lines[0].startswith("Traceback") and lines[-1] == "ValueError: mine" and len(lines) == 4, text
