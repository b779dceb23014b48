"""The numbered examples, as their first lines say to run them: they end well and print what they are about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Example: ranks, and lines that some rank must print.
TOUR: dict[str, tuple[int, list[str]]] = {
    "01_all_reduce": (4, ["rank 3 of 4: [6.0, 6.0, 6.0, 6.0]"]),
    "02_communicator": (
        2,
        [
            "rank 1 of 2: the sum is 3",
            "rank 0: gathered [0.0, 1.0], COMPLETED",
            "rank 1: ranks counted by tens 11",
            "rank 0: there is no hint 'algorihtm'",
        ],
    ),
    "03_batch": (3, ["rank 0: 2 from the left, 1 from the right", "rank 2: 1 from the left, 0 from the right"]),
    "04_split": (
        4,
        [
            "rank 0, replica 0: y [15.0, 51.0], mean gradient 0.5",
            "rank 3, replica 1: y [15.0, 51.0], mean gradient 0.5",
        ],
    ),
    "05_window": (
        2,
        [
            "rank 0: my mailbox holds [0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]",
            "rank 1: I read 2 in the mailbox of rank 0",
        ],
    ),
    "06_hooks": (2, ["recorded gloo:all_reduce of [[1000]]: completed", "holds NaN: 1 of 1000 elements"]),
    "07_device_mesh": (
        2,
        ["rank 1: [16, 8] of the first weight, equal: True", "rank 1: [4.0, 5.0, 6.0, 7.0] of 28 in all"],
    ),
    "08_compile": (2, ["rank 0: y 9, gradient of x 8", "rank 1: y 9, gradient of x 8"]),
}


@pytest.mark.parametrize("name", TOUR)
def test_the_example_runs_and_says_what_it_shows(run_ranks: Callable[..., list[Any]], name: str) -> None:
    ranks, lines = TOUR[name]
    printed = "\n".join(run_ranks(EXAMPLES / f"{name}.py", ranks, timeout_s=90))
    for line in lines:
        assert line in printed, printed


def test_every_numbered_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("[0-9]*.py")} == set(TOUR)


def test_each_example_stays_short_and_says_how_to_run_it() -> None:
    for name, (ranks, _) in TOUR.items():
        text = (EXAMPLES / f"{name}.py").read_text()
        assert len(text.splitlines()) < 120
        assert f"torchrun --nproc-per-node {ranks} examples/{name}.py" in text
