"""The option for a longer campaign of random interleavings."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interleavings",
        type=int,
        default=1,
        metavar="N",
        help="run N times as many random interleavings of the protocol (give tests/schedule as an argument, too)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # As tests of their own, so that each stays short and workers share them.
    if "portion" in metafunc.fixturenames:
        portions = range(metafunc.config.getoption("interleavings", default=1))
        metafunc.parametrize("portion", portions, ids=[f"portion{number}" for number in portions])
