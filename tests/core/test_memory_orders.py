"""The protocol between ranks (csrc/core: line.h, packet_ring.h, notes.h, signal.h) under Relacy, a model checker.

csrc/tests/model/line_model.cpp plays hand-over, sleep and wake-up, abort, leaving, notes, a ring of packets and a
window with the functions of these headers, in thousands of schedules of 2 and 3 ranks; then again without each acquire,
release and full fence. Schedules are the same in every run. It knows nothing of plans:
tests/schedule/test_interleavings.py does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
HEADERS = ("line.h", "packet_ring.h", "signal.h")
SCHEDULES = 20_000

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: install g++ or set CXX"),
    pytest.mark.skipif(
        not any((Path(root) / "include/relacy/relacy.hpp").exists() for root in ("/usr", "/usr/local")),
        reason="relacy-dev is not installed: apt-get install relacy-dev",
    ),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the model prints: a line for the protocol as it is, one for each weaker order, and the sum."""
    program = tmp_path_factory.mktemp("model") / "line_model"
    source = CSRC / "tests" / "model" / "line_model.cpp"
    for command in (
        [COMPILER, "-O1", "-std=c++20", "-Wall", "-Wextra", f"-I{CSRC}", source, "-o", program],
        [program, SCHEDULES],
    ):
        words = [str(word) for word in command]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        assert done.returncode == 0, f"{' '.join(words)}\nended with {done.returncode}:\n{done.stdout}"
    return done.stdout.splitlines()


def test_the_protocol_is_right_in_every_schedule_that_was_tried(report: list[str]) -> None:
    assert report[0] == f"as it is: right (18 checks of {SCHEDULES} schedules)"


def test_every_memory_order_that_is_taken_away_is_missed(report: list[str]) -> None:
    survivors = [line for line in report[1:-1] if "NOT CAUGHT" in line]
    assert not survivors, "\n".join(
        ["orders that no check needs: drop them, or play in line_model.cpp what needs them", *survivors]
    )
    assert report[-1] == f"caught {len(report) - 2} of {len(report) - 2}"


def test_every_memory_order_of_the_headers_is_played(report: list[str]) -> None:
    source = "".join((CSRC / "core" / name).read_text(encoding="utf-8") for name in HEADERS)
    orders = re.findall(r"std::memory_order_(?:acquire|release)\b|Atomics::full_fence\(\)", source)
    assert "acq_rel" not in source, "it counts twice: teach this test"
    assert len(orders) == len(report) - 2, "\n".join(report)


def test_memory_that_ranks_share_has_its_orders_in_these_headers_only() -> None:
    words = (
        r"atomic_thread_fence|abort\.word\."
        r"|\b(?:progress|membership|produced|consumed|ring_offset|signals)\.(?:store|load)\(std::memory_order"
    )
    found = [
        f"{path.relative_to(CSRC.parent)}:{number}: {line.strip()}"
        for layer in ("core", "transport", "communicator")
        for path in sorted((CSRC / layer).glob("*.*"))
        if path.name not in HEADERS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(words, line)
    ]
    assert not found, "\n".join(["call the function of csrc/core/line.h, packet_ring.h or signal.h instead:", *found])
