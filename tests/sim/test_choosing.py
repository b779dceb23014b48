"""Which algorithm a chip would use."""

from __future__ import annotations

import pytest
from sim.chip_files import chip

from hxcomm import algorithms
from hxcomm.schedule import Schedule, ScheduleError
from hxcomm.sim.choosing import choose, time_collective
from hxcomm.sim.engine import time_schedule
from hxcomm.sim.interconnect import interconnect
from hxcomm.sim.legality import IllegalSchedule

SWITCH = interconnect(chip(), 8, "switch")


@pytest.mark.parametrize("nbytes", [64, 1 << 20])
def test_the_fastest_legal_algorithm_is_chosen(nbytes: int) -> None:
    choice = choose("all_reduce", nbytes, chip(), SWITCH)
    times = {
        name: time_schedule(algorithms.build("all_reduce", name, 8), chip(), nbytes, network=SWITCH).total_ps
        for name in algorithms.names("all_reduce")
    }
    assert choice.timing.total_ps == times[choice.algorithm] == min(times.values())
    assert dict(choice.others) == {name: time for name, time in times.items() if name != choice.algorithm}
    assert [time for _, time in choice.others] == sorted(time for _, time in choice.others)
    assert choice.refused == ()


def test_short_messages_take_few_hops_and_long_ones_little_bandwidth() -> None:
    ring = interconnect(chip(), 8)
    short, long = [choose("all_reduce", nbytes, chip(), ring).algorithm for nbytes in (64, 1 << 24)]
    assert short == "one_shot" and long == "ring_bidirectional"


def test_what_the_links_cannot_execute_is_not_chosen_and_says_why() -> None:
    strict = chip(legal__neighbours_only=True)
    ring = interconnect(strict, 8)
    choice = choose("all_reduce", 64, strict, ring)
    assert "neighbours_only" in dict(choice.refused)["one_shot"]
    assert dict(choice.refused).keys() | dict(choice.others).keys() | {choice.algorithm} == {
        *algorithms.names("all_reduce")
    }
    with pytest.raises(IllegalSchedule, match=r"chip round cannot execute all_reduce one_shot, 8 ranks, round 1"):
        time_collective("all_reduce", 64, strict, ring, algorithm="one_shot")
    with pytest.raises(
        IllegalSchedule, match=r"chip round can execute no all_to_all of 8 ranks: direct: all_to_all dire"
    ):
        choose("all_to_all", 64, strict, ring)


def test_of_many_ranks_only_what_is_made_of_rotations_is_tried() -> None:
    strict = chip(legal__neighbours_only=True, legal__push_only=True)
    choice = choose("all_reduce", 1 << 30, strict, interconnect(strict, 1024))
    assert choice.algorithm == "ring_bidirectional"
    assert [name for name, _ in choice.others] == ["ring"]
    assert dict(choice.refused)["two_shot"] == "not tried above 256 ranks, as it is not made of Rotations"


def test_times_depend_on_the_differences_of_starts_only() -> None:
    starts = (5_000, 0, 7_000, 1_000)
    ring = interconnect(chip(), 4)
    early = time_collective("all_reduce", 4096, chip(), ring, starts_ps=starts)
    late = time_collective("all_reduce", 4096, chip(), ring, starts_ps=[start + 10**9 for start in starts])
    assert late.finish_ps == tuple(finish + 10**9 for finish in early.finish_ps)
    assert (late.total_ps, late.links) == (early.total_ps, early.links)


def test_choices_and_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose("all_gather", 640, chip(), SWITCH)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("timed again")

    monkeypatch.setattr("hxcomm.sim.choosing.time_schedule", never)
    assert choose("all_gather", 640, chip(), SWITCH) is first
    assert time_collective("all_gather", 640, chip(), SWITCH) is first.timing
    with pytest.raises(AssertionError, match="timed again"):
        choose("all_gather", 642, chip(), SWITCH)


def test_an_algorithm_that_is_registered_later_is_a_choice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "_registered", {})
    ring = interconnect(chip(), 3)
    before = choose("barrier", 0, chip(), ring)

    def nothing(world_size: int) -> Schedule:
        return Schedule("barrier", "again", world_size, rounds=tuple)

    algorithms.register("barrier", "again", nothing)
    assert before.others == ()
    assert choose("barrier", 0, chip(), ring).others == (("direct", 0),)


def test_hierarchical_algorithms_are_built_for_the_hosts_of_the_network() -> None:
    nested = interconnect(chip(), 8, "switch:4/switch:2")
    timing = time_collective("all_reduce", 4096, chip(), nested, algorithm="hierarchical")
    schedule = algorithms.build("all_reduce", "hierarchical", 8, hosts=(0, 0, 0, 0, 1, 1, 1, 1))
    assert timing.finish_ps == time_schedule(schedule, chip(), 4096, network=nested).finish_ps


def test_an_op_or_root_that_cannot_be_is_refused() -> None:
    with pytest.raises(ScheduleError, match="there is no op 'all_sum'"):
        choose("all_sum", 64, chip(), SWITCH)
    with pytest.raises(ScheduleError, match="the root of broadcast is None"):
        choose("broadcast", 64, chip(), SWITCH)
    with pytest.raises(ScheduleError, match="all_reduce has no root, but 1 was given"):
        choose("all_reduce", 64, chip(), SWITCH, root=1)
