"""Decoding of plans: words that are wrong anywhere are refused with their place, and never crash."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import call

from hxcomm import _core, algorithms
from hxcomm.schedule import compile_plan

EVERY_ALGORITHM = [(op, name) for op in algorithms.OPS for name in algorithms.names(op)]


def words_of(op: str, name: str, world_size: int = 4, rank: int = 1) -> list[int]:
    root = 2 if op in algorithms.ROOTED else None
    return list(compile_plan(algorithms.build(op, name, world_size, root), rank).words)


def decode(words: list[int]) -> _core.Plan:
    return _core.Plan(words=words, hash=7, algorithm="mine")


@pytest.mark.parametrize(("op", "name"), EVERY_ALGORITHM)
def test_every_compiled_plan_decodes(op: str, name: str) -> None:
    words = words_of(op, name)
    plan = decode(words)
    assert (plan.words, plan.hash, plan.algorithm) == (words, 7, "mine")


@pytest.mark.parametrize(("op", "name"), EVERY_ALGORITHM)
def test_a_plan_cut_short_anywhere_is_refused(op: str, name: str) -> None:
    words = words_of(op, name)
    for length in range(len(words)):
        with pytest.raises(ValueError, match="the plan of algorithm 'mine' is not valid: at word"):
            decode(words[:length])


HEADER = {
    0: ("the magic number", 0),
    1: ("the plan version", 99),
    2: ("the world size", 0),
    3: ("the rank", 4),
    4: ("the number of rounds", 1 << 20),
    5: ("the number of blocks", -1),
    6: ("the number of pieces", 0),
    9: ("the number of scratch chunks", -1),
    10: ("the flags", 1 << 10),
}


@pytest.mark.parametrize("word", HEADER)
def test_a_wrong_header_word_is_named(word: int) -> None:
    what, value = HEADER[word]
    words = words_of("all_reduce", "two_shot")
    words[word] = value
    with pytest.raises(ValueError, match=f"{what} is {value}"):
        decode(words)


def test_a_plan_needs_one_entry_before_it_waits_or_ends() -> None:
    words = words_of("barrier", "direct")
    assert words[16:] == [2, 0]
    for body, problem in (([0], "ends before ENTER"), ([2, 2, 0], "a second ENTER"), ([3, 0, 1, 2, 0], "WAIT before")):
        with pytest.raises(ValueError, match=problem):
            decode([*words[:16], *body])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_word_is_refused_with_its_place_or_is_another_plan(data: st.DataObject) -> None:
    words = words_of("all_reduce", "two_shot", world_size=1, rank=0)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        index = data.draw(st.integers(0, len(words) - 1), label="index")
        words[index] = data.draw(st.one_of(st.integers(-2, 8), st.integers(-(2**31), 2**31 - 1)), label="value")
    try:
        decode(words)
    except ValueError as error:
        assert "at word" in str(error)


def test_a_plan_for_another_rank_or_world_is_refused_when_it_is_called() -> None:
    wrong = decode(words_of("all_reduce", "two_shot", world_size=4, rank=1))
    runtime = _core.Runtime(1 << 20)
    group = _core.Group(runtime, name="g", rank=0, world_size=1, label="rank 0", nonce=1)
    group.start(planner=lambda *_: (wrong, 4096))
    array = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="not for this rank"):
        group.run(call("all_reduce", "float32", [array], [array]))
    group.leave()


@pytest.mark.parametrize("answer", [None, 5, ("plan", 4096)])
def test_a_planner_that_answers_nonsense_is_an_error_of_the_call(answer: object) -> None:
    runtime = _core.Runtime(1 << 20)
    group = _core.Group(runtime, name="g", rank=0, world_size=1, label="rank 0", nonce=1)
    group.start(planner=lambda *_: answer)  # type: ignore[arg-type, return-value]
    array = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="did not return"):
        group.run(call("all_reduce", "float32", [array], [array]))
    group.leave()
