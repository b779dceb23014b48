"""The engine: when collectives are done, to the picosecond."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.chip_files import chip
from sim.reference_engine import Reference

from hxcomm import algorithms
from hxcomm.schedule import Location, Rotation, Schedule, ScheduleError, copy, reduce
from hxcomm.sim.engine import LinkUse, Message, piece_bytes, time_messages, time_schedule
from hxcomm.sim.interconnect import interconnect
from hxcomm.sim.program import prepare

FREE = 1e24  # bytes a chip reduces in a second: none takes a picosecond
NS = 1000
FORWARDINGS = ("store_and_forward", "cut_through")


def ring_of_16(forwarding: str) -> Any:
    return chip(
        links__0__bandwidth_bytes_per_s=50 * 2**30,
        links__0__forwarding=forwarding,
        links__0__tick_ps=1000,
        collective__reduce_bytes_per_s=FREE,
    )


@pytest.mark.parametrize(("forwarding", "arrival_ns"), [("store_and_forward", 60_093), ("cut_through", 21_031)])
def test_a_message_over_three_hops_arrives_as_astra_network_analytical_says(forwarding: str, arrival_ns: int) -> None:
    network = interconnect(ring_of_16(forwarding), 16)
    assert time_messages(network, [Message(1, 4, 1 << 20)]) == (arrival_ns * NS,)


def test_a_contended_direct_all_gather_ends_as_astra_network_analytical_says() -> None:
    timing = time_schedule(algorithms.build("all_gather", "direct", 16), ring_of_16("store_and_forward"), 1 << 20)
    assert timing.total_ps == (36 * 19_531 + 2 * 500) * NS == 704_116 * NS
    sends = [Message(source, target, 1 << 20) for source in range(16) for target in range(16)]
    assert max(time_messages(interconnect(ring_of_16("store_and_forward"), 16), sends)) == 704_116 * NS


@pytest.mark.parametrize("nbytes", [1 << 20, 1 << 26, 1 << 30])
def test_a_ring_all_reduce_takes_what_its_closed_form_says(nbytes: int) -> None:
    ring = chip(collective__reduce_bytes_per_s=FREE)
    for n in range(2, 65):
        schedule = algorithms.build("all_reduce", "ring", n)
        total_ps = time_schedule(schedule, ring, nbytes).total_ps
        chunk = max(piece_bytes(schedule, ring, nbytes, itemsize=2))  # multiples of 16 elements, so S/n or a bit more
        assert total_ps == 2 * (n - 1) * (500 + chunk) * NS, n
        if nbytes >= 1 << 26:
            closed_ps = 2 * (n - 1) * (500 * NS + nbytes * NS // n)
            assert abs(total_ps - closed_ps) * 1000 <= closed_ps, n


def test_a_reduction_takes_the_chip_the_time_of_loading_and_storing() -> None:
    # 1,600 bytes: 800 a chunk of 2 ranks. A round is 800 ns on the link, 500 ns of way, 3 x 800 bytes at 1 byte a ns.
    two = chip(collective__reduce_bytes_per_s=1e9)
    assert (
        time_schedule(algorithms.build("all_reduce", "ring", 2), two, 1600).total_ps
        == ((800 + 500 + 2400) + (800 + 500)) * NS
    )


def test_reductions_of_one_chip_take_place_one_after_another() -> None:
    ins = [Location(0, "input", piece) for piece in (0, 1)]
    outs = [Location(0, "output", piece) for piece in (0, 1)]
    both = [reduce(0, [source], to) for source, to in zip(ins, outs, strict=True)]
    alone = Schedule("all_reduce", "two", 1, lambda: [both], pieces=2)
    timing = time_schedule(alone, chip(collective__reduce_bytes_per_s=1e9), 64 * 2)
    assert timing.total_ps == 2 * (2 * 64) * NS  # 64 bytes loaded and 64 stored, twice


def test_what_has_arrived_is_there_but_what_lies_here_is_copied_by_the_chip() -> None:
    # Rank 0 copies its own 64 bytes (128 ns) while 64 bytes arrive (564 ns); rank 1 too.
    slow = chip(collective__reduce_bytes_per_s=1e9)
    timing = time_schedule(algorithms.build("all_gather", "ring", 2), slow, 64, record=True)
    assert timing.total_ps == 564 * NS
    assert timing.events is not None
    assert [(each.what, each.end_ps) for each in timing.events if each.what.startswith("chip")] == [
        ("chip 0 copies", 128 * NS),
        ("chip 1 copies", 128 * NS),
    ]


def test_a_transfer_begins_when_all_ranks_that_it_touches_have_come() -> None:
    ring = algorithms.build("all_gather", "ring", 4)
    timing = time_schedule(ring, chip(), 64, starts_ps=[0, 0, 0, 9_000 * NS])
    # Rank 3's block goes round from 9,000 ns on, and the others' come to it.
    # Rank 0 has read the last block from it at 10,192 ns: 500 + 64 ns for each hop, 64 behind the block before.
    assert timing.finish_ps == (10_692 * NS, 10_692 * NS, 10_692 * NS, 10_192 * NS)
    assert timing.total_ps == (9_000 + 3 * 564) * NS


def test_a_rank_returns_no_sooner_than_its_readers_have_read() -> None:
    timing = time_schedule(algorithms.build("broadcast", "direct", 3, 0), chip(), 1000)
    assert timing.finish_ps == (1500 * NS,) * 3  # rank 0 has nothing to do, but is read from


def test_a_launch_is_paid_once_by_each_rank() -> None:
    ring = algorithms.build("all_reduce", "ring", 4)
    without, with_launch = time_schedule(ring, chip(), 4096), time_schedule(ring, chip(collective__launch_ns=700), 4096)
    assert with_launch.finish_ps == tuple(finish + 700 * NS for finish in without.finish_ps)


def test_a_barrier_ends_for_all_when_the_last_has_come() -> None:
    timing = time_schedule(algorithms.build("barrier", "direct", 3), chip(), 0, starts_ps=[5, 9, 7])
    assert (timing.finish_ps, timing.total_ps) == ((9, 9, 9), 4)


def test_nothing_takes_no_time() -> None:
    assert time_schedule(algorithms.build("all_reduce", "ring", 8), chip(), 0).total_ps == 0
    assert time_schedule(algorithms.build("all_reduce", "two_shot", 8), chip(), 0).total_ps == 0


def test_pieces_that_are_short_or_empty_are_timed_as_they_are_cut() -> None:
    # 40 elements of 4 ranks: pieces of 16, 16, 8 and 0 elements.
    timing = time_schedule(algorithms.build("all_reduce", "ring", 4), chip(), 80)
    assert sum(link.nbytes for link in timing.links) == 80 * 2 * 3
    assert not timing.folded
    assert sum(link.messages for link in timing.links) == 3 * 2 * 3


def test_a_link_that_is_faster_than_the_one_before_waits_for_the_tail() -> None:
    fast = chip(links__0__forwarding="cut_through")
    network = interconnect(fast, 8, "ring:8", ["slow-link:0-1:0.5x"])
    # 1,000 bytes: 2,000 ns on 0-1, whose tail is at rank 1 at 2,500 ns; the head went on at 500 ns.
    assert time_messages(network, [Message(0, 2, 1000)]) == (3_000 * NS,)
    # Behind it a short one from rank 1, which asks in the middle, is served when the link is free: at 2,500 ns.
    assert time_messages(network, [Message(0, 2, 1000), Message(1, 2, 10, 600 * NS)]) == (3_000 * NS, 3_010 * NS)


def test_a_message_may_be_given_its_links() -> None:
    network = interconnect(chip(), 8)
    down = tuple(network.link(at, (at - 1) % 8) for at in (1, 0, 7, 6, 5))
    assert time_messages(network, [Message(1, 4, 100, route=down), Message(1, 4, 100), Message(2, 2, 9, 77)]) == (
        5 * 600 * NS,
        3 * 600 * NS,
        77,
    )


def test_a_link_serves_first_whoever_asked_first() -> None:
    network = interconnect(chip(), 4)
    arrivals = time_messages(network, [Message(0, 1, 100, 50), Message(0, 1, 100, 40), Message(0, 1, 100, 40)])
    assert arrivals == ((300 + 500) * NS + 40, 600 * NS + 40, (200 + 500) * NS + 40)


def test_links_say_what_they_carried() -> None:
    timing = time_schedule(algorithms.build("all_gather", "ring", 2), chip(links__0__per_message_ns=3), 64)
    assert timing.links == (LinkUse(0, 1, 64, 67 * NS, 1), LinkUse(1, 0, 64, 67 * NS, 1))


def test_durations_are_rounded_down_to_ticks() -> None:
    coarse = chip(links__0__tick_ps=1_000_000, links__0__per_message_ns=300)
    assert time_messages(interconnect(coarse, 4), [Message(0, 1, 1_800)]) == ((2_000 + 500) * NS,)


@pytest.mark.parametrize("algorithm", algorithms.names("all_reduce"))
@pytest.mark.parametrize("forwarding", FORWARDINGS)
def test_the_critical_path_has_no_gap_but_latencies(algorithm: str, forwarding: str) -> None:
    schedule = algorithms.build("all_reduce", algorithm, 6)
    used = chip(links__0__forwarding=forwarding, collective__reduce_bytes_per_s=3e9)
    timing = time_schedule(schedule, used, 6000, record=True)
    assert timing == time_schedule(schedule, used, 6000, record=True)
    path = timing.critical_path()
    assert path[0].start_ps == 0 and path[0].predecessor is None
    for before, after in pairwise(path):
        gap = after.start_ps - before.end_ps
        begun = after.start_ps - before.start_ps  # cut-through: the next hop begins when the head has come
        assert gap in (0, 500 * NS) or begun == 500 * NS
    assert timing.total_ps - path[-1].end_ps in (0, 500 * NS)
    assert timing.events is not None
    for link in timing.links:
        mine = [each for each in timing.events if each.what == f"link {link.source}->{link.target}"]
        assert (len(mine), sum(each.nbytes for each in mine)) == (link.messages, link.nbytes)


def test_the_critical_path_needs_the_events() -> None:
    with pytest.raises(ValueError, match="ask for them with record=True"):
        time_schedule(algorithms.build("all_reduce", "ring", 2), chip(), 64).critical_path()


RESULT_CHANGES = {
    "links.0.bandwidth_bytes_per_s": 2e9,
    "links.0.achieved": 0.5,
    "links.0.latency_ns": 501,
    "links.0.per_message_ns": 1,
    "links.0.forwarding": "cut_through",
    "links.0.tick_ps": 333,
    "links.0.directions": 1,
    "links.0.topology": "line",
    "memory.bandwidth_bytes_per_s": 2e12,
    "memory.achieved": 0.5,
    "collective.reduce_bytes_per_s": 2e12,
    "collective.launch_ns": 1,
    "legal.alignment_bytes": 256,
}


@pytest.mark.parametrize("key", RESULT_CHANGES)
def test_every_value_of_links_and_reductions_changes_the_time(key: str) -> None:
    schedule = algorithms.build("all_reduce", "two_shot", 6)
    before = time_schedule(schedule, chip(), 3100)
    after = time_schedule(schedule, chip(**{key.replace(".", "__"): RESULT_CHANGES[key]}), 3100)
    assert before.total_ps != after.total_ps


def test_what_is_pushed_may_come_before_its_receiver() -> None:
    schedule = algorithms.build("broadcast", "direct", 2, 0)
    pulls, pushes = chip(), chip(legal__push_only=True)
    late = (0, 10_000 * NS)
    assert time_schedule(schedule, pulls, 64, starts_ps=late).finish_ps == (10_564 * NS, 10_564 * NS)
    assert time_schedule(schedule, pushes, 64, starts_ps=late).finish_ps == (564 * NS, 10_000 * NS)


TOPOLOGIES = ("ring", "line", "switch", "full", "torus", "mesh")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_times_are_those_of_the_rules_written_out(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    op, algorithm = data.draw(st.sampled_from([(op, name) for op in algorithms.OPS for name in algorithms.names(op)]))
    root = data.draw(st.integers(0, n - 1)) if op in algorithms.ROOTED else None
    used = chip(
        links__0__forwarding=data.draw(st.sampled_from(FORWARDINGS)),
        links__0__latency_ns=data.draw(st.sampled_from([0, 7, 500])),
        links__0__per_message_ns=data.draw(st.sampled_from([0, 20])),
        links__0__tick_ps=data.draw(st.sampled_from([1, 1000])),
        collective__reduce_bytes_per_s=data.draw(st.sampled_from([1e9, 7e9, FREE])),
        collective__launch_ns=data.draw(st.sampled_from([0, 3])),
        legal__push_only=data.draw(st.booleans()),
    )
    topology = data.draw(st.sampled_from(TOPOLOGIES))
    network = interconnect(used, n, topology)
    itemsize = data.draw(st.sampled_from([1, 2, 4]))
    nbytes = itemsize * data.draw(st.integers(0, 600))
    starts = data.draw(
        st.one_of(st.just([0] * n), st.lists(st.integers(0, 2_000_000), min_size=n, max_size=n)), label="starts"
    )
    schedule = algorithms.build(op, algorithm, n, root, network.hosts)
    timing = time_schedule(schedule, used, nbytes, itemsize=itemsize, network=network, starts_ps=starts, fold=False)
    if op == "barrier":
        return
    executed = prepare(schedule, used.legal.push_only).schedule
    reference = Reference(executed, used, nbytes, itemsize, network, starts)
    assert timing.finish_ps == tuple(reference.finish)
    assert [(link.busy_ps, link.nbytes) for link in timing.links] == [
        tuple(reference.busy[i]) for i in range(len(network.links))
    ]


def test_a_prepared_schedule_is_timed_alike_whatever_came_before() -> None:
    schedule, used, network = algorithms.build("all_reduce", "ring", 4), chip(), interconnect(chip(), 4)
    starts = ([0, 1, 2, 3], [9_000_000, 0, 0, 5], [0, 1, 2, 3])
    first, second, again = [time_schedule(schedule, used, 4096, network=network, starts_ps=each) for each in starts]
    assert first == again != second


def test_a_malformed_schedule_is_refused_with_the_transfer_that_is_wrong() -> None:
    wrong = [[copy(0, Location(0, "input", 0), Location(2, "output", 0))]]
    with pytest.raises(ScheduleError, match=r"round 1: rank 2 output\[0\] does not exist: 2 ranks"):
        time_schedule(Schedule("all_reduce", "wrong", 2, lambda: wrong), chip(), 64)
    turning = [Rotation([copy(0, Location(0, "input", 0), Location(1, "output", 0))], rotated=("input",))]
    with pytest.raises(ScheduleError, match=r"input\[1\] does not exist"):
        time_schedule(Schedule("all_reduce", "wrong", 2, lambda: turning), chip(), 64)


def test_arguments_that_do_not_fit_are_refused() -> None:
    ring = algorithms.build("all_reduce", "ring", 4)
    with pytest.raises(ValueError, match="4 ranks on a network of 8, with 4 starts"):
        time_schedule(ring, chip(), 64, network=interconnect(chip(), 8))
    with pytest.raises(ValueError, match="with 3 starts"):
        time_schedule(ring, chip(), 64, starts_ps=[0, 0, 0])
    with pytest.raises(ValueError, match="65 bytes is no number of elements of 2 bytes"):
        time_schedule(ring, chip(), 65)
