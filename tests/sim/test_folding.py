"""Folding: one rank timed for all of them, with the same result to the picosecond."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sim.chip_files import chip

from hxcomm import algorithms
from hxcomm.schedule import Location, Rotation, Round, Schedule, copy, reduce
from hxcomm.sim.chips import Chip
from hxcomm.sim.engine import time_schedule
from hxcomm.sim.interconnect import interconnect


def all_gather_direct(n: int) -> Schedule:
    """Every rank reads every other one's block at once: n(n-1) messages that contend for a ring's links."""

    def rounds() -> Iterator[Round]:
        yield Rotation(
            [copy(0, Location(s, "input", 0), Location(0, "output", s)) for s in range(n)], rotated=("output",)
        )

    return Schedule("all_gather", "all_at_once", n, rounds)


def all_reduce_two_shot(n: int) -> Schedule:
    """Pulls of all, a reduction, pushes to all."""

    def rounds() -> Iterator[Round]:
        ranks = range(n)
        parts = [Location(s, "input", 0) for s in ranks]
        yield Rotation([reduce(0, parts, *[Location(d, "output", 0) for d in ranks])], rotated=("input", "output"))

    return Schedule("all_reduce", "push_and_pull", n, rounds, pieces=n)


SCHEDULES = {
    "all_gather all at once": all_gather_direct,
    "all_reduce push and pull": all_reduce_two_shot,
    **{
        f"{op} {name}": lambda n, op=op, name=name: algorithms.build(op, name, n)
        for op in ("all_reduce", "all_gather", "reduce_scatter")
        for name in ("ring", "ring_bidirectional")
    },
}


def written_out(schedule: Schedule) -> Schedule:
    return dataclasses.replace(schedule, rounds=lambda: [transfers for _, transfers in schedule.numbered_rounds()])


def a_chip(draw: st.DataObject) -> Chip:
    return chip(
        links__0__forwarding=draw.draw(st.sampled_from(["store_and_forward", "cut_through"])),
        links__0__directions=draw.draw(st.sampled_from([1, 2])),
        links__0__latency_ns=draw.draw(st.sampled_from([0, 13, 500])),
        links__0__per_message_ns=draw.draw(st.sampled_from([0, 5])),
        collective__reduce_bytes_per_s=draw.draw(st.sampled_from([5e8, 1e10])),
        legal__push_only=draw.draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_folded_is_whole_and_whole_is_written_out(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SCHEDULES)))
    n = data.draw(st.integers(2, 16), label="n")
    used = a_chip(data)
    network = interconnect(used, n, data.draw(st.sampled_from(["ring", "switch", "full"])))
    schedule = SCHEDULES[name](n)
    nbytes = schedule.pieces * 32 * data.draw(st.integers(0, 40))
    folded = time_schedule(schedule, used, nbytes, network=network, fold=True)
    whole = time_schedule(schedule, used, nbytes, network=network, fold=False)
    assert folded.folded and not whole.folded
    assert dataclasses.replace(folded, folded=False) == whole
    # Three programs: of one rank, of all ranks at once, of each transfer. Pushed, the last one is made otherwise.
    if not used.legal.push_only:
        assert time_schedule(written_out(schedule), used, nbytes, network=network) == whole


@pytest.mark.parametrize("topology", ["ring", "switch", "full"])
@pytest.mark.parametrize("forwarding", ["store_and_forward", "cut_through"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_folded_is_whole_at_256_ranks(name: str, forwarding: str, topology: str) -> None:
    n = 64 if name in ("all_gather all at once", "all_reduce push and pull") and topology != "ring" else 256
    if name == "all_reduce push and pull":
        n = 64
    used = chip(links__0__forwarding=forwarding)
    network = interconnect(used, n, topology)
    schedule = SCHEDULES[name](n)
    folded = time_schedule(schedule, used, schedule.pieces * 96, network=network, fold=True)
    whole = time_schedule(schedule, used, schedule.pieces * 96, network=network, fold=False)
    assert dataclasses.replace(folded, folded=False) == whole


def test_4096_chips_fold_to_one() -> None:
    schedule = algorithms.build("all_reduce", "ring", 4096)
    used = chip(collective__reduce_bytes_per_s=1e24)
    timing = time_schedule(schedule, used, 4096 * 64)
    assert timing.folded
    assert timing.total_ps == 2 * 4095 * (500 + 64) * 1000
    assert timing.finish_ps == (timing.total_ps,) * 4096
    assert {link.messages for link in timing.links} == {2 * 4095, 0}


def test_what_is_not_alike_for_all_ranks_is_not_folded() -> None:
    ring = algorithms.build("all_reduce", "ring", 4)
    used = chip()
    reasons = {
        "its chunks are of different sizes": {"nbytes": 66},
        "its ranks start at different times": {"nbytes": 4096, "starts_ps": [0, 0, 0, 1]},
        "its links are not alike for all ranks: line of 4": {
            "nbytes": 4096,
            "network": interconnect(used, 4, "line"),
        },
        "every event of every rank is recorded": {"nbytes": 4096, "record": True},
    }
    for reason, arguments in reasons.items():
        assert not time_schedule(ring, used, **arguments).folded
        with pytest.raises(ValueError, match=reason):
            time_schedule(ring, used, fold=True, **arguments)
    with pytest.raises(ValueError, match="its rounds are not all Rotations"):
        time_schedule(algorithms.build("all_reduce", "two_shot", 4), used, 4096, fold=True)
    slowed = interconnect(used, 4, faults=["slow-link:0-1:0.5x"])
    assert not time_schedule(ring, used, 4096, network=slowed).folded


@example(credits=1)
@settings(max_examples=10, deadline=None)
@given(credits=st.integers(1, 6))
def test_folded_is_whole_with_credits(credits: int) -> None:
    used = chip(legal__credits_per_link=credits, legal__push_only=True, collective__reduce_bytes_per_s=1e8)
    for name in ("all_reduce ring", "all_reduce ring_bidirectional", "all_gather ring"):
        schedule = SCHEDULES[name](8)
        folded = time_schedule(schedule, used, schedule.pieces * 320, fold=True)
        whole = time_schedule(schedule, used, schedule.pieces * 320, fold=False)
        assert dataclasses.replace(folded, folded=False) == whole
