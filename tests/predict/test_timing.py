"""hxcomm/predict/timing.py: clocks of ranks, by hand."""

from __future__ import annotations

from collections.abc import Sequence

from hxcomm.predict.steps import Collective, LinearAllReduce, Memory, Pass, Step, Stream
from hxcomm.predict.timing import Parts, time_pass
from hxcomm.sim.chips import Chip, Compute, Legal, Links
from hxcomm.sim.chips import Collective as CollectiveCosts
from hxcomm.sim.chips import Memory as ChipMemory
from hxcomm.sim.costs import CostModel, OpRecord

# A byte a picosecond, and flops that never matter.
CHIP = Chip(
    name="test",
    description="",
    overlap_chunks=1,
    memory=ChipMemory(bandwidth_bytes_per_s=1e12, capacity_bytes=1e9),
    compute=Compute({"float16": 1e18}),
    collective=CollectiveCosts(),
    links=(Links("ring", 1e9, 100, "cut_through"),),
    legal=Legal(),
    power=None,
    sources={},
)
COSTS = CostModel(CHIP)
SUM = Collective("all_reduce", 8, 2)


def op(kind: str, nbytes: int) -> OpRecord:
    return OpRecord("aten::mm", kind, nbytes, 0, "float16")


def passed(*of_ranks: Sequence[Step]) -> Pass:
    streams = tuple(Stream(tuple(steps), Memory(0, 0, 0)) for steps in of_ranks)
    return Pass(streams, range(len(streams)))


def hundred_after_the_last(collective: Collective, starts: Sequence[int]) -> tuple[Sequence[int], int]:
    """100 ps after the last rank has come, of which the links are busy for 30."""
    return [max(starts) + 100] * len(starts), 30


def test_ops_of_a_rank_follow_each_other_and_are_told_apart_by_kind() -> None:
    steps = [op("weights", 5), op("kv_cache", 7), op("other", 11), op("weights", 13)]
    assert time_pass(passed(steps), COSTS, hundred_after_the_last, chunks=1) == Parts(18, 7, 11, 0, 0)


def test_who_comes_first_waits_and_the_rank_that_is_last_is_told() -> None:
    fast, slow = [op("weights", 10), SUM, op("other", 1)], [op("weights", 40), SUM, op("other", 2)]
    parts = time_pass(passed(fast, slow), COSTS, hundred_after_the_last, chunks=1)
    assert parts == Parts(40, 0, 2, 100, 0)
    assert parts.total == 142


def test_parts_add_up_to_the_time_of_the_rank_that_waited_most_too() -> None:
    fast, slow = [op("weights", 10), SUM, op("other", 5)], [op("weights", 40), SUM, op("other", 2)]
    assert time_pass(passed(fast, slow), COSTS, hundred_after_the_last, chunks=1) == Parts(10, 0, 5, 130, 0)


def test_ranks_need_not_have_equally_many_ops_between_two_collectives() -> None:
    one, two = [op("weights", 10), SUM], [op("weights", 10), op("other", 5), SUM]
    assert time_pass(passed(one, two), COSTS, hundred_after_the_last, chunks=1) == Parts(10, 0, 0, 105, 0)


# 2 rows of 4 inputs and 100 columns: a chunk of c columns reads 8 * c of weights and 16 of x, and writes 4 * c.
LINEAR = LinearAllReduce(rows=2, inputs=4, columns=100, itemsize=2, weight_bits=16, dtype="float16")


def test_a_product_in_one_piece_is_followed_by_its_sum() -> None:
    parts = time_pass(passed([LINEAR], [LINEAR]), COSTS, hundred_after_the_last, chunks=1)
    assert parts == Parts(weights=1216, kv_cache=0, other=0, exposed_communication=100, hidden_communication=0)


def test_chunks_travel_while_the_next_is_computed() -> None:
    parts = time_pass(passed([LINEAR], [LINEAR]), COSTS, hundred_after_the_last, chunks=4)
    # 4 chunks of 25 columns, 316 each; each travels for 100 while the next is computed, the last is exposed.
    assert parts == Parts(4 * 316, 0, 0, exposed_communication=100, hidden_communication=300)


def test_chunks_that_are_computed_faster_than_they_travel_share_the_links_but_not_the_latency() -> None:
    def slow(collective: Collective, starts: Sequence[int]) -> tuple[Sequence[int], int]:
        return [max(starts) + 1000] * len(starts), 400

    # Computed at 316, 632, 948, 1264; the links take them at 316, 716, 1116, 1516; the last has come at 2516.
    parts = time_pass(passed([LINEAR], [LINEAR]), COSTS, slow, chunks=4)
    assert parts == Parts(1264, 0, 0, exposed_communication=2516 - 1264, hidden_communication=1264 - 316)


def test_more_chunks_than_columns_are_as_many_as_columns() -> None:
    assert LINEAR.widths(1000) == [1] * 100
    assert LINEAR.widths(3) == [34, 33, 33]
