"""Traffic over the hops of the ring."""

from __future__ import annotations

import pytest

from hxcomm import algorithms
from hxcomm.schedule import Location, Schedule, copy, lower, ring_hop_bytes, ring_hop_chunks


def test_ring_all_reduce_moves_the_least_possible_over_every_hop() -> None:
    schedule = algorithms.build("all_reduce", "ring", 4)
    assert ring_hop_bytes(schedule, count=6400, itemsize=4) == [2 * 3 * 6400 * 4 // 4] * 4
    assert [len(chunks) for chunks in ring_hop_chunks(schedule)] == [6] * 4


def test_staging_adds_no_traffic() -> None:
    for op in algorithms.OPS:
        for name in algorithms.names(op):
            schedule = algorithms.build(op, name, 5, 1 if op in algorithms.ROOTED else None)
            assert ring_hop_bytes(lower(schedule, private=True), 1600, 4) == ring_hop_bytes(schedule, 1600, 4)


def test_partial_results_count_in_the_type_they_travel_in() -> None:
    schedule = algorithms.build("all_reduce", "ring", 4)
    narrow = ring_hop_bytes(schedule, count=64, itemsize=2)
    wide = ring_hop_bytes(schedule, count=64, itemsize=2, accumulation_itemsize=4)
    # Each hop carries 1 fresh chunk, 2 partial and 3 final ones of 16 elements.
    assert narrow == [6 * 32] * 4
    assert wide == [4 * 32 + 2 * 64] * 4


def test_values_take_the_shortest_way_round_and_upwards_in_a_tie() -> None:
    def moved(n: int, source: int, destination: int) -> list[int]:
        transfer = copy(destination, Location(source, "input", 0), Location(destination, "output", 0))
        schedule = Schedule("broadcast", "one", n, lambda: [[transfer]], root=source)
        return [len(chunks) for chunks in ring_hop_chunks(schedule)]

    assert moved(5, 0, 2) == [1, 1, 0, 0, 0]
    assert moved(5, 2, 0) == [1, 1, 0, 0, 0]
    assert moved(5, 4, 1) == [1, 0, 0, 0, 1]
    assert moved(4, 0, 2) == [1, 1, 0, 0]
    assert moved(4, 2, 0) == [0, 0, 1, 1]


def test_chunks_are_named_by_the_input_chunk_whose_extent_they_have() -> None:
    assert ring_hop_chunks(algorithms.build("scatter", "direct", 3, root=0)) == [[("input", 1)], [], [("input", 2)]]


@pytest.mark.parametrize("op", ["all_reduce", "barrier"])
def test_a_single_rank_moves_nothing(op: str) -> None:
    for name in algorithms.names(op):
        assert ring_hop_bytes(algorithms.build(op, name, 1), 100, 4) == [0]
