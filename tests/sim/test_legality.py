"""What links can execute: the first transfer that they cannot, and the rule that it breaks."""

from __future__ import annotations

import pytest
from sim.chip_files import chip

from hxcomm import algorithms
from hxcomm.schedule import Location, Rotation, Schedule, Transfer, copy, prove, reduce
from hxcomm.sim import chips
from hxcomm.sim.engine import DeadlockError, time_schedule
from hxcomm.sim.interconnect import interconnect
from hxcomm.sim.legality import legal
from hxcomm.sim.program import prepare, pushed

RULES = [
    ("neighbours_only", True, "one_shot", "neighbours_only: from rank 2 to rank 0 it is 2 hops"),
    ("push_only", True, "one_shot", None),  # it is made to push
    ("max_sources", 3, "one_shot", "max_sources: 4 sources, a chip reduces at most 3 at a time"),
    ("multicast", False, "two_shot", "multicast: one transfer stores to one other chip, this to 3"),
    ("credits_per_link", 1, "one_shot", "waits for one of the 1 credits of link"),
]


@pytest.mark.parametrize(("rule", "value", "algorithm", "said"), RULES)
def test_a_schedule_is_refused_for_the_rule_that_it_breaks_and_for_no_other(
    rule: str, value: object, algorithm: str, said: str | None
) -> None:
    schedule = algorithms.build("all_reduce", algorithm, 4)
    free = chip()
    assert legal(schedule, free, interconnect(free, 4)) is None
    strict = chips.replace(free, f"legal.{rule}", value)
    refused = legal(schedule, strict, interconnect(strict, 4))
    if said is None:
        assert refused is None
        return
    assert refused is not None and said in refused
    assert refused.startswith(f"all_reduce {algorithm}, 4 ranks")


def test_the_first_transfer_is_named() -> None:
    strict = chip(legal__neighbours_only=True)
    schedule = algorithms.build("all_gather", "direct", 4)
    assert legal(schedule, strict, interconnect(strict, 4)) == (
        "all_gather direct, 4 ranks, round 1: rank 0 copies rank 2 input[0] to rank 0 output[2]: "
        "neighbours_only: from rank 2 to rank 0 it is 2 hops"
    )


def test_a_switch_is_no_chip_that_a_message_passes() -> None:
    strict = chip(legal__neighbours_only=True)
    schedule = algorithms.build("all_reduce", "two_shot", 4)
    for topology, fine in {"switch": True, "full": True, "line": False}.items():
        assert (legal(schedule, strict, interconnect(strict, 4, topology)) is None) == fine


def test_a_ring_is_for_links_of_neighbours_that_only_push() -> None:
    strict = chip(
        legal__neighbours_only=True,
        legal__push_only=True,
        legal__max_sources=2,
        legal__multicast=False,
        legal__credits_per_link=2,
    )
    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        for n in (1, 2, 3, 8, 300):
            assert legal(algorithms.build(op, "ring", n), strict, interconnect(strict, n)) is None
    line = interconnect(strict, 4, "line")
    refused = legal(algorithms.build("all_reduce", "ring", 4), strict, line)
    assert refused is not None and "neighbours_only: from rank 3 to rank 0 it is 3 hops" in refused


def test_a_ring_on_a_torus_is_refused_where_it_leaves_a_row() -> None:
    strict = chip(legal__neighbours_only=True)
    refused = legal(algorithms.build("all_reduce", "ring", 1024), strict, interconnect(strict, 1024, "torus:32x32"))
    assert refused == (
        "all_reduce ring, 1024 ranks, round 1: rank 0 reduces rank 1023 input[1023] + rank 0 input[1023] to rank 0 "
        "scratch[1]: neighbours_only: from rank 1023 to rank 0 it is 2 hops"
    )
    snake = interconnect(strict, 6, "line", ["slow-link:0-1:0.5x"])
    assert legal(algorithms.build("all_gather", "line", 6), strict, snake) is None


@pytest.mark.parametrize("op", [op for op in algorithms.OPS if op != "barrier"])
def test_a_pushed_schedule_reads_no_peer_and_is_still_right(op: str) -> None:
    for name in algorithms.names(op):
        for n in (1, 2, 5):
            root = n - 1 if op in algorithms.ROOTED else None
            schedule = pushed(algorithms.build(op, name, n, root))
            for _, transfers in schedule.numbered_rounds():
                for transfer in transfers:
                    assert {at.rank for at in transfer.sources} == {transfer.rank}
                    assert all(at.rank == transfer.rank or at.buffer == "message" for at in transfer.destinations)
            prove(schedule, range(n))


def test_pushed_rotations_stay_rotations() -> None:
    for name in ("ring", "ring_bidirectional"):
        schedule = pushed(algorithms.build("all_reduce", name, 6))
        assert all(isinstance(round_, Rotation) for round_ in schedule.rounds())
        assert prepare(schedule).folded is not None


def test_with_too_few_credits_a_chip_that_needs_all_its_sources_waits_for_ever() -> None:
    # Rank r reduces messages that come over one link from all ranks below it; the link takes no more than 2 of them.
    schedule = algorithms.build("all_reduce", "one_shot", 8)
    tight, enough = chip(legal__credits_per_link=2), chip(legal__credits_per_link=8)
    with pytest.raises(
        DeadlockError, match=r"the message from rank \d to rank \d waits for one of the 2 credits of li"
    ):
        time_schedule(schedule, tight, 4096)
    assert time_schedule(schedule, enough, 4096).total_ps > 0
    refused = legal(schedule, tight, interconnect(tight, 8))
    assert refused is not None and "credits_per_link: deadlock: in round 1" in refused
    assert legal(schedule, enough, interconnect(enough, 8)) is None


def test_a_credit_is_given_back_when_the_receiver_has_read() -> None:
    # Two pieces of 64 bytes from rank 0, each of which rank 1 reduces with its own: 64 ns on the link, 500 ns of way,
    # 3 x 64 ns of work.
    def rounds() -> list[list[Transfer]]:
        return [[reduce(1, [Location(r, "input", p) for r in (0, 1)], Location(1, "output", p)) for p in (0, 1)]]

    schedule = Schedule("reduce", "in_two_pieces", 2, rounds, root=1, pieces=2)
    free = chip(legal__push_only=True, collective__reduce_bytes_per_s=1e9)
    one = chips.replace(free, "legal.credits_per_link", 1)
    assert time_schedule(schedule, free, 128).total_ps == (564 + 192 + 192) * 1000
    assert time_schedule(schedule, one, 128).total_ps == (564 + 192 + 564 + 192) * 1000


def test_a_message_that_goes_on_makes_room_behind_it() -> None:
    # Two messages of 128 bytes over two links with one credit each. The first is sent on from 628 to 756 ns: then the
    # second sets out, and needs 628 ns for each link.
    schedule = Schedule(
        "broadcast",
        "far",
        3,
        lambda: [[copy(0, Location(0, "input", p), Location(2, "output", p)) for p in (0, 1)]],
        root=0,
        pieces=2,
    )
    line = {each: interconnect(each, 3, "line") for each in (chip(), chip(legal__credits_per_link=1))}
    free, one = [time_schedule(schedule, each, 256, network=network).total_ps for each, network in line.items()]
    assert free == (128 + 500 + 2 * 128 + 500) * 1000
    assert one == (756 + 2 * 628) * 1000
