"""Several groups, aborts and deaths under random interleavings of single loads and stores.

Whatever happens at whatever point, every op of every surviving rank ends: right, or in an error of a group to which
something happened; and nobody touches memory that was given back. Every rule that this rests on is left out once, to
see that it is missed. For a longer campaign see test_interleavings.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from schedule.simulated_group import Faults
from schedule.simulated_processes import interleave, random_failures, several_groups
from schedule.streams import WORLD_SIZES, WrongError

SEEDS = 12  # a portion of a world size
FORMS = pytest.mark.parametrize("private", [True, False], ids=["private", "mapped"])


def trial(seed: str, n: int, private: bool, kinds: Sequence[str], faults: Faults | None = None) -> None:
    rng = random.Random(seed)
    world = several_groups(n, private, faults or Faults(), rng)
    failures = random_failures(world, kinds) if kinds else []
    try:
        interleave(world, failures)
    except WrongError as error:
        form = "private" if private else "mapped"
        raise WrongError(f"seed {seed!r}, {n} processes, {form}, {failures}: {error}") from error


@FORMS
@pytest.mark.parametrize("n", WORLD_SIZES)
def test_ops_of_overlapping_groups_come_out_right_in_whatever_order_each_rank_posts_them(
    n: int, private: bool, portion: int
) -> None:
    for number in range(portion * SEEDS, (portion + 1) * SEEDS):
        trial(f"groups {n} {private} {number}", n, private, [])


@FORMS
@pytest.mark.parametrize("n", WORLD_SIZES)
@pytest.mark.parametrize("kinds", [["abort"], ["death"], ["leave"], ["abort", "death", "leave"]], ids="+".join)
def test_every_op_ends_right_or_in_an_error_when_a_rank_aborts_or_dies_or_leaves_at_any_point(
    kinds: list[str], n: int, private: bool, portion: int
) -> None:
    for number in range(portion * SEEDS, (portion + 1) * SEEDS):
        trial(f"{kinds} {n} {private} {number}", n, private, kinds)


# What each rule needs to be missed: whether plans are private, and what happens.
RULES = {
    "one_group_at_a_time": (True, []),
    "progress_before_membership": (True, []),
    "give_back_at_once": (True, []),
    "deaf": (True, ["death"]),
    "silent": (True, ["abort"]),
    "carry_on": (True, ["abort"]),
    "no_watcher": (True, ["death"]),
    "no_goodbye": (True, ["leave"]),
    "leave_amid_abort": (True, ["abort"]),
    "raise_before_telling": (False, ["abort"]),
    "no_last_look": (False, ["abort"]),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_each_rule_of_groups_aborts_and_leaving_is_missed(n: int, rule: str) -> None:
    private, kinds = RULES[rule]
    for number in range(3000):
        try:
            trial(f"rule {rule} {n} {number}", n, private, kinds, Faults(**{rule: True}))
        except WrongError as error:
            print(f"caught after {number} seeds: {error}")
            return
    pytest.fail(f"3000 runs went right with {rule}: the check does not see it, or the rule is not needed")
