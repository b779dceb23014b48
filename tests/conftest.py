"""Fixtures of all tests: ranks as processes (ranks.py says how), fresh or kept warm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import ranks


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


@pytest.hookimpl(tryfirst=True)  # before xdist, which writes the group into the test's id
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start ranks run one after another, on one worker, and first: they are the longest row of work."""
    for item in items:
        if {"run_ranks", "rank_pool"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ranks)
        if item.get_closest_marker("ranks"):
            item.add_marker(pytest.mark.xdist_group("ranks"))
    items.sort(key=lambda item: item.get_closest_marker("ranks") is None)
