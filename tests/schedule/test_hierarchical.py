"""Hierarchical algorithms: what crosses hosts, in which order they reduce, and that one host needs none of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from schedule.layouts import layouts
from schedule.whole_ops import run_all

from hxcomm import algorithms
from hxcomm.schedule import across_hosts, prove
from hxcomm.schedule.interpret import Memory, bfloat16_to_float32, float32_to_bfloat16

OPS = [op for op in algorithms.OPS if "hierarchical" in algorithms.names(op)]
EIGHT = (0, 0, 0, 0, 1, 1, 1, 1)


def crossing_chunks(op: str, algorithm: str, hosts: tuple[int, ...]) -> Counter[tuple[int, int]]:
    """How many messages go from each host to each other, times the pieces of a block that each carries."""
    root = 1 if op in algorithms.ROOTED else None
    schedule = across_hosts(algorithms.build(op, algorithm, len(hosts), root, hosts), hosts)
    return Counter(
        (hosts[transfer.rank], hosts[at.rank])
        for _, transfers in schedule.numbered_rounds()
        for transfer in transfers
        for at in transfer.destinations
        if at.buffer == "message"
    )


def test_the_ops_that_gain_by_it_have_a_hierarchical_algorithm() -> None:
    assert OPS == ["all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter"]


def test_every_byte_crosses_to_another_host_once() -> None:
    assert crossing_chunks("all_reduce", "hierarchical", EIGHT) == {(0, 1): 4, (1, 0): 4}  # of 4 slices
    assert crossing_chunks("reduce", "hierarchical", EIGHT) == {(1, 0): 4}
    assert crossing_chunks("broadcast", "hierarchical", EIGHT) == {(0, 1): 1}
    assert crossing_chunks("broadcast", "direct", EIGHT) == {(0, 1): 4}
    for op in ("all_gather", "reduce_scatter"):
        assert crossing_chunks(op, "hierarchical", EIGHT) == {(0, 1): 4, (1, 0): 4}
        assert crossing_chunks(op, "direct", EIGHT) == {(0, 1): 16, (1, 0): 16}


def test_from_four_hosts_on_each_host_finishes_its_part_of_a_slice() -> None:
    four = crossing_chunks("all_reduce", "hierarchical", (0, 0, 1, 1, 2, 2, 3, 3))
    assert four == {
        (a, b): 4 for a in range(4) for b in range(4) if a != b
    }  # of 8 chunks, once as parts, once as results
    three = crossing_chunks("all_reduce", "hierarchical", (0, 0, 1, 1, 2, 2))
    assert three == {(a, b): 2 for a in range(3) for b in range(3) if a != b}  # of 2 chunks


@pytest.mark.parametrize("op", OPS)
def test_on_one_host_they_reduce_in_rank_order_and_need_no_scratch(op: str) -> None:
    for n in range(1, 9):
        schedule = algorithms.build(op, "hierarchical", n, n - 1 if op in algorithms.ROOTED else None)
        assert prove(schedule).order == "rank order" and schedule.scratch == 0


def test_the_proof_tells_where_hosts_keep_the_order_of_ranks() -> None:
    def order(*hosts: int) -> str:
        return prove(algorithms.build("all_reduce", "hierarchical", len(hosts), hosts=hosts), hosts).order

    assert order(0, 1, 2, 3) == order(0, 0, 0, 1) == order(0, 0, 1, 2) == "rank order"
    assert order(0, 1, 1, 1) == order(0, 1, 0, 1) == "other"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_have_the_bits_of_partial_sums_by_host_rounded_once(dtype: str) -> None:
    rng = np.random.default_rng(3)
    for hosts in layouts(5):
        inputs = [rng.standard_normal(70).astype(np.float32) for _ in hosts]
        if dtype == "bfloat16":
            stored = [float32_to_bfloat16(each) for each in inputs]
            inputs = [bfloat16_to_float32(each) for each in stored]
        else:
            stored = [each.copy() for each in inputs]
        partial: dict[int, np.ndarray] = {}
        for host, each in zip(hosts, inputs, strict=True):
            partial[host] = partial[host] + each if host in partial else each
        total = sum(list(partial.values())[1:], partial[0])
        expected = float32_to_bfloat16(total) if dtype == "bfloat16" else total
        blocks = [[each] for each in stored]
        run_all("all_reduce", "hierarchical", 5, None, True, Memory(dtype, blocks, blocks, hosts), "sum", 64, seed=1)
        assert all(own[0].tobytes() == expected.tobytes() for own in blocks), hosts
