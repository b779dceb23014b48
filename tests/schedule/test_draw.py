"""Drawings: what a reader sees."""

from __future__ import annotations

import pytest

from hxcomm import algorithms
from hxcomm.schedule import compile_plan, draw


def test_a_ring_is_drawn_as_a_table_of_rounds_and_ranks() -> None:
    lines = draw.text(algorithms.build("all_reduce", "ring", 3)).splitlines()
    assert lines[0] == (
        "all_reduce ring, 3 ranks; chunks: input 1 block of 3, output 1 block of 3, scratch 2; "
        "input and output are the same memory"
    )
    assert [line.split(" | ") for line in lines[4:5] + lines[6:]] == [
        ["round", "rank 0        ", "rank 1        ", "rank 2        "],
        ["    1", "2:i2 + i2 > s1", "0:i0 + i0 > s1", "1:i1 + i1 > s1"],
        ["    2", "2:s1 + i1 > o1", "0:s1 + i2 > o2", "1:s1 + i0 > o0"],
        ["    3", "2:o0 > o0     ", "0:o1 > o1     ", "1:o2 > o2"],
        ["    4", "2:o2 > o2     ", "0:o0 > o0     ", "1:o1 > o1"],
    ]


def test_ranks_in_a_row_are_drawn_as_one() -> None:
    assert "0..4:i2 > 0..4:o2" in draw.text(algorithms.build("all_reduce", "two_shot", 5))


def test_the_private_form_is_drawn_with_its_staging() -> None:
    text = draw.text(algorithms.build("all_gather", "direct", 2), private=True)
    assert "    0 | i0 > s0" in text


@pytest.mark.parametrize("op", algorithms.OPS)
def test_every_algorithm_can_be_drawn_within_the_width(op: str) -> None:
    for name in algorithms.names(op):
        for n in (1, 2, 4, 8):
            schedule = algorithms.build(op, name, n, 0 if op in algorithms.ROOTED else None)
            for private in (True, False):
                text = draw.text(schedule, private)
                assert f"{op} {name}, {n} rank" in text
                assert max(len(line) for line in text.splitlines()) <= draw.WIDTH + 40
            assert draw.plan_text(compile_plan(schedule, n - 1)).endswith("end")


def test_a_barrier_says_that_entering_is_all() -> None:
    assert "begins by waiting for all ranks" in draw.text(algorithms.build("barrier", "direct", 4))


def test_a_plan_is_drawn_one_instruction_a_line() -> None:
    lines = draw.plan_text(compile_plan(algorithms.build("all_reduce", "two_shot", 2), 0)).splitlines()
    assert lines[1:] == [
        "  copy     input[1] > scratch[1]",
        "  enter    publish arrival, wait for all",
        "  reduce   input[0], rank 1 scratch[0] > output[0] (final), rank 1 scratch[0] (final)",
        "  publish  round 1",
        "  wait     until rank 1 has finished round 1",
        "  copy     scratch[1] (final) > output[1] (final)",
        "  end",
    ]
