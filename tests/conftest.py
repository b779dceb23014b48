"""Fixtures of all tests: ranks as processes (ranks.py says how), fresh or kept warm."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import ranks

# No deadline: an example that takes 5 ms alone took 220 ms beside four ranks on two cores, and nothing was wrong.
hypothesis.settings.register_profile("hxcomm", deadline=None, print_blob=True, report_multiple_bugs=False)
hypothesis.settings.register_profile("deep", hypothesis.settings.get_profile("hxcomm"), max_examples=3000)
hypothesis.settings.load_profile("hxcomm")
# c10d's TCPStore asks for the name of each address that connects, ::ffff:127.0.0.1, which is in no hosts file. Where
# the name server drops 1 question in 15, as one did, glibc waits 5 s before it asks again, and with it the test.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")


@pytest.fixture
def run_ranks() -> Callable[..., list[object]]:
    """run_ranks(fn_or_path, world_size, *args, ...): see ranks.run_ranks."""
    return ranks.run_ranks


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], ranks.RankPool]]:
    """rank_pool(world_size).run(fn, *args): the warm processes of that world size, kept for the whole session."""
    pools: dict[int, ranks.RankPool] = {}

    def pool(world_size: int) -> ranks.RankPool:
        return pools.setdefault(world_size, ranks.RankPool(world_size))

    yield pool
    for each in pools.values():
        each.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"run_ranks", "rank_pool"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ranks)


@cache
def starts_ranks(file: Path) -> bool:
    return re.search(r"\b(run_ranks|rank_pool|mark\.ranks)\b", file.read_text()) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that start ranks run one after another on one worker: two sets of ranks on two cores wait for each other.

    It goes by the file's text, since xdist's controller knows no markers, and xdist's own way (--dist=loadgroup) has no
    effect with pytest 9.2 and xdist 3.8: it renames tests by an attribute that pytest no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneRowOfRanks(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if starts_ranks(config.rootpath / nodeid.split("::")[0]) else nodeid

    return OneRowOfRanks(config, log)
