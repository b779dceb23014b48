"""Lowering: what staging and separation make of the algorithms, and of schedules that strain them."""

from __future__ import annotations

import pytest

from hxcomm import algorithms
from hxcomm.schedule import Location, Schedule, Transfer, copy, lower, prove, reduce
from hxcomm.schedule.schedule import Buffer


def rounds_of(schedule: Schedule) -> list[list[Transfer]]:
    return [list(transfers) for _, transfers in schedule.numbered_rounds()]


def at(rank: int, buffer: Buffer, chunk: int = 0) -> Location:
    return Location(rank, buffer, chunk)


def test_staged_two_shot_stages_reduces_and_pushes_then_fetches() -> None:
    n = 3
    stage, push, fetch = rounds_of(lower(algorithms.build("all_reduce", "two_shot", n), private=True))
    assert stage == [copy(r, at(r, "input", c), at(r, "scratch", c)) for r in range(n) for c in range(n) if c != r]
    assert push == [
        reduce(
            r,
            [at(s, "input" if s == r else "scratch", r) for s in range(n)],
            *[at(d, "output" if d == r else "scratch", r) for d in range(n)],
        )
        for r in range(n)
    ]
    assert fetch == [copy(r, at(r, "scratch", c), at(r, "output", c)) for r in range(n) for c in range(n) if c != r]


@pytest.mark.parametrize(("op", "algorithm"), [("all_reduce", "one_shot"), ("all_gather", "direct")])
def test_staged_pull_algorithms_have_one_round_after_staging(op: str, algorithm: str) -> None:
    stage, pull = rounds_of(lower(algorithms.build(op, algorithm, 3), private=True))
    assert stage == [copy(r, at(r, "input"), at(r, "scratch")) for r in range(3)]
    assert {transfer.rank for transfer in pull} == {0, 1, 2}


def test_nobody_stages_what_no_peer_reads() -> None:
    broadcast = rounds_of(lower(algorithms.build("broadcast", "direct", 4, root=2), private=True))
    assert broadcast[0] == [copy(2, at(2, "input"), at(2, "scratch"))]
    assert all(
        rounds_of(lower(algorithms.build(op, name, 1, 0 if op in algorithms.ROOTED else None), private=True))[0] == []
        for op in algorithms.OPS
        for name in algorithms.names(op)
    )


def test_a_ring_stores_what_its_neighbour_reads_next_twice() -> None:
    lowered = lower(algorithms.build("all_gather", "ring", 4), private=True)
    middle, last = rounds_of(lowered)[2:]
    assert all([d.buffer for d in transfer.destinations] == ["output", "scratch"] for transfer in middle)
    assert all([d.buffer for d in transfer.destinations] == ["output"] for transfer in last)


def test_mapped_one_shot_writes_aside_what_peers_still_read() -> None:
    empty, reduced, copied = rounds_of(lower(algorithms.build("all_reduce", "one_shot", 2), private=False))
    assert empty == []
    assert [transfer.destinations for transfer in reduced] == [(at(0, "scratch"),), (at(1, "scratch"),)]
    assert copied == [copy(r, at(r, "scratch"), at(r, "output")) for r in range(2)]


def test_mapped_two_shot_needs_no_scratch() -> None:
    lowered = lower(algorithms.build("all_reduce", "two_shot", 5), private=False)
    assert lowered.scratch == 0
    assert len(rounds_of(lowered)) == 2


def test_a_local_read_after_a_remote_write_sees_the_new_value() -> None:
    """Rank 0 pushes to rank 1's output, which rank 1 hands on in the next round, before it can have fetched it."""

    def pushed() -> list[list[Transfer]]:
        return [
            [copy(0, at(0, "input"), at(1, "output"))],
            [copy(1, at(1, "output"), at(2, "output"))],
        ]

    schedule = Schedule("broadcast", "pushed", 3, pushed, root=0)
    prove(schedule)
    rounds = rounds_of(lower(schedule, private=True))
    assert rounds[2] == [
        copy(1, at(1, "scratch"), at(2, "scratch")),
        copy(1, at(1, "scratch"), at(1, "output")),
    ]
    assert rounds[3] == [copy(2, at(2, "scratch"), at(2, "output"))]


def test_a_location_written_remotely_and_then_locally_is_not_fetched() -> None:
    schedule = Schedule(
        "broadcast",
        "twice",
        2,
        lambda: [[copy(0, at(0, "input"), at(1, "output"))], [copy(1, at(0, "input"), at(1, "output"))]],
        root=0,
    )
    prove(schedule)
    assert len(rounds_of(lower(schedule, private=True))) == 3


def test_aliasing_that_staging_cannot_resolve_is_separated_first() -> None:
    """Each rank pushes the result to the next one, over the input that a third rank is still reading."""
    inputs = [at(s, "input") for s in range(3)]
    schedule = Schedule(
        "all_reduce", "crossed", 3, lambda: [[reduce(r, inputs, at((r + 1) % 3, "output")) for r in range(3)]]
    )
    assert prove(schedule).order == "rank order"
    assert len(rounds_of(lower(schedule, private=True))) == 3  # stage, reduce to scratch, fetch
    assert len(rounds_of(lower(schedule, private=False))) == 3
