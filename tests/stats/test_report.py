"""`hxcomm stats`, as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hxcomm.cli import main


def write(folder: Path, rank: int, rows: list[dict[str, Any]], job: str = "0" * 15 + "a", **other: Any) -> None:
    record = {
        "format": 1,
        "job": job,
        "rank": rank,
        "world_size": 2,
        "host": "a",
        "pid": 100 + rank,
        "program": "train.py",
        "since": 1000.0 + rank,
        "until": 1010.5,
        "rows": rows,
        **other,
    }
    (folder / f"hxcomm-stats-{job}-rank{rank}.json").write_text(json.dumps(record))


def row(op: str, algorithm: str, calls: int, nbytes: int, waiting_ns: int, moving_ns: int) -> dict[str, Any]:
    names = {"group": "0", "op": op, "algorithm": algorithm, "dtype": "float32", "memory": "staged"}
    return {**names, "calls": calls, "nbytes": nbytes, "waiting_ns": waiting_ns, "moving_ns": moving_ns}


def test_a_table_has_a_line_and_a_bar_for_each_op_and_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, [row("send", "", 4, 256, 0, 0), row("broadcast", "direct", 1, 80, 0, 1000)])
    write(
        tmp_path,
        1,
        [
            row("all_reduce", "ring", 1, 3 << 20, 0, 500_000_000),
            row("all_reduce", "direct", 60, 4096, 1_500_000_000, 0),
        ],
    )
    assert main(["stats", str(tmp_path)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("train.py: 2 ranks, 10.5 s up to ") and first.endswith(" (job 0000000a)")
    assert lines == [
        "op             rank     calls    payload    waiting     moving                            algorithm: calls",
        "all_reduce        1        61    3.0 MiB     1.50 s  500.00 ms  ██████░░░░░░░░░░░░░░░░░░  direct: 60, ring: 1",
        "broadcast         0         1       80 B    0.00 ms    0.00 ms                            direct: 1",
        "send              0         4      256 B          -          -",
        "░ waiting for other ranks   █ moving and reducing data",
    ]


def test_each_job_has_its_table_the_latest_last_and_ranks_without_a_file_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1, [], job="b" * 16, until=3000.0)
    write(tmp_path, 0, [], job="c" * 16, until=2000.0)
    write(tmp_path, 1, [], job="c" * 16)
    assert main(["stats", str(tmp_path)]) == 0
    c, b = capsys.readouterr().out.split("\n\n")
    assert "2 ranks, 1000.0 s" in c and c.splitlines()[0].endswith("(job cccccccc)")
    assert "2 ranks, none of rank 0, 1999.0 s" in b and "no collective has ended yet" in b


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no file of HXCOMM_STATS: set HXCOMM_STATS="),
        ("{", "is not a file that HXCOMM_STATS wrote (JSONDecodeError: "),
        ("[]", "is not a file that HXCOMM_STATS wrote (TypeError: "),
        ('{"format": 2}', "has format 2, this hxcomm reads 1"),
        ('{"format": 1, "rows": [{}]}', "is not a file that HXCOMM_STATS wrote (KeyError: "),
    ],
)
def test_what_cannot_be_shown_is_one_line_that_says_why(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "hxcomm-stats-1-rank0.json").write_text(content)
    assert main(["stats", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("hxcomm stats: ") and printed.err.count("\n") == 1
    assert said in printed.err


def test_a_row_with_a_number_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, [{**row("all_reduce", "ring", 1, 1, 1, 1), "calls": "many"}])
    assert main(["stats", str(tmp_path)]) == 1
    assert "(TypeError: in calls of a row)" in capsys.readouterr().err


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not a folder" in capsys.readouterr().err
