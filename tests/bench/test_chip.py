"""The chip file that is made of the machine: what is written, and a run on real ranks."""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hxcomm import cli
from hxcomm.bench import chip_arguments
from hxcomm.bench.arguments import UsageError
from hxcomm.bench.chip import Measured, chip_text
from hxcomm.sim import chips

Pool = Callable[[int], Any]

MEASURED = Measured(
    world_size=2,
    cores=2,
    buffer_bytes=1 << 20,
    call_ns=4136.4,
    hand_over_ns=140.0,
    link_bytes_per_s=44.63e9,
    copied_bytes_per_s=25.7e9,
    flops_per_s=93.3e9,
    memory_bytes=12 << 30,
)


def test_the_chip_file_of_a_machine_holds_what_was_measured_and_the_command(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    path.write_text(chip_text(MEASURED, "hxcomm chips measure --ranks 2 --bytes 1048576"))
    chip = chips.load(path)
    assert chip.links[0].bandwidth_bytes_per_s == 44.6e9
    assert chip.links[0].latency_ns == 70  # in and out of the switch: one hand-over
    assert chip.collective.launch_ns == 3996
    assert chip.memory.capacity_bytes == 12 << 30
    values = {"memory.bandwidth_bytes_per_s", "compute.flops_per_s.float32", "links.0.bandwidth_bytes_per_s"}
    assert all(chip.sources[each].startswith("measured: hxcomm chips measure --ranks 2") for each in values)


def measure(rank: int, world_size: int, *words: str) -> tuple[int, str]:
    from hxcomm.bench.chip import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        return main(words), err.getvalue()


def test_ranks_measure_a_chip_that_loads(rank_pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    assert rank_pool(2).run(measure, "--out", str(path), "--bytes", "64KiB", backend=None) == [(0, ""), (0, "")]
    assert chips.load(path).links[0].bandwidth_bytes_per_s > 0


def test_each_number_of_ranks_has_its_own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(chip_arguments.subprocess, "run", run)
    words = ["chips", "measure", "--out", str(tmp_path / "here.toml"), "--ranks", "4,2", "--bytes", "1MiB"]
    assert cli.main(words) == 0
    assert [each[-3] for each in commands] == [str(tmp_path / f"here-{n}.toml") for n in (2, 4)]
    assert all(f"--nproc-per-node={n}" in each for n, each in zip((2, 4), commands, strict=True))


@pytest.mark.parametrize(
    ("words", "said"), [(["--ranks", "1"], "one rank has no links"), (["--bytes", "4KiB"], "at least 64KiB")]
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["chips", "measure", "--out", str(tmp_path / "here.toml"), *words])
    assert said in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path / "none" / "here.toml", ranks=[2], bytes=1 << 20)
    with pytest.raises(UsageError, match="there is no folder"):
        chip_arguments.run(options)
