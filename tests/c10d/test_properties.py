"""Random programs of every collective and message, in overlapping groups, against the exact results.

A failure ends with the smallest program found and the line that runs it again. A longer search, here of 3000 programs
a test (about 10 minutes each):
`python -m pytest tests/c10d/test_properties.py --hypothesis-profile=deep -o faulthandler_timeout=0`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import program_steps
import programs
import pytest
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine

Pool = Callable[[int], Any]


@pytest.fixture(autouse=True, scope="module")
def shrinking_ends_before_a_tests_limit() -> Iterator[None]:
    """hypothesis takes up to 300 s to shrink; pytest.ini's faulthandler_timeout would end the process before that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "MAX_SHRINKING_SECONDS", 90)
        yield


def require(pool: Pool, program: programs.Program) -> None:
    if hypothesis.currently_in_test_context():
        hypothesis.note(f'python tests/programs.py "{program}"')
    found = pool(program.world_size).run(program_steps.execute, program, env=dict(program.env), op_timeout_s=20)
    problems = [f"rank {rank}: {problem}" for rank, each in enumerate(found) for problem in each[:2]]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_op_gives_the_exact_result_in_every_dtype(rank_pool: Pool, world_size: int) -> None:
    require(rank_pool, programs.sweep(world_size))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@hypothesis.given(data=st.data())
def test_every_program_gives_the_exact_results(rank_pool: Pool, world_size: int, data: Any) -> None:
    require(rank_pool, data.draw(programs.programs(world_size)))


@hypothesis.given(program=programs.programs(3, threads=4))
def test_threads_may_use_overlapping_groups_side_by_side(rank_pool: Pool, program: programs.Program) -> None:
    require(rank_pool, program)
