"""Whole ops through the interpreter, all ranks' plans in a random interleaving, against what the op means."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from hxcomm import algorithms
from hxcomm.schedule import OPS, compile_plan, interpret
from hxcomm.schedule.interpret import Memory


def run_all(
    op: str,
    algorithm: str,
    n: int,
    root: int | None,
    private: bool,
    memory: Memory,
    reduce_op: str,
    segment: int,
    seed: int,
) -> None:
    """All ranks' plans, segment after segment, in a random interleaving of their instructions."""
    rng = random.Random(seed)
    schedule = algorithms.build(op, algorithm, n, root, memory.hosts)
    plans = [compile_plan(schedule, rank, private, memory.hosts) for rank in range(n)]
    longest = max((len(block) for blocks in memory.blocks.values() for own in blocks for block in own), default=0)
    for sequence, low in enumerate(range(0, max(longest, 1), segment), 1):
        window = (low, low + segment)
        memory.scratch.clear()
        running = [interpret.run(plan, memory, reduce_op, window, sequence) for plan in plans]
        for _ in range(100_000):
            if not running:
                break
            chosen = rng.choice(running)
            if next(chosen, None) is None:
                running.remove(chosen)
        assert not running, f"{op} {algorithm} of {n} ranks on hosts {memory.hosts} never ends"


def run_op(
    op: str,
    algorithm: str,
    n: int,
    count: int | Sequence[Sequence[int]],
    private: bool,
    segment: int = 1 << 40,
    hosts: Sequence[int] | None = None,
) -> None:
    """Integers, so that any order of reduction gives the same; counts as given, or [source][destination]."""
    meaning = OPS[op]
    root = n // 2 if meaning.rooted else None
    rng = np.random.default_rng(n)
    at_root = (meaning.input_at_root_only, meaning.output_at_root_only and not meaning.in_place)
    blocks = [
        [0 if only and rank != root else meaning.layout(buffer, n, 1).blocks for rank in range(n)]
        for buffer, only in zip(("input", "output"), at_root, strict=True)  # type: ignore[arg-type]
    ]

    def elements(source: int, destination: int) -> int:
        return count if isinstance(count, int) else count[source][destination]

    given = [[rng.integers(-(2**62), 2**62, elements(r, b)) for b in range(blocks[0][r])] for r in range(n)]
    inputs = [[block.copy() for block in own] for own in given]
    empty = [[np.full(elements(b, r), -1) for b in range(blocks[1][r])] for r in range(n)]
    outputs = inputs if meaning.in_place else empty
    run_all(op, algorithm, n, root, private, Memory("int64", inputs, outputs, hosts), "sum", segment, seed=n)
    for rank in range(n):
        for block, output in enumerate(outputs[rank]):
            result = meaning.result(rank, block, n, root)
            if result is None:
                np.testing.assert_array_equal(output, given[rank][block])
            else:
                expected = np.sum([given[each][result[1]] for each in result[0]], axis=0, dtype=np.int64)
                np.testing.assert_array_equal(output, expected, err_msg=f"{op} {algorithm}, {n} ranks, rank {rank}")
        if not meaning.in_place:
            for before, after in zip(given[rank], inputs[rank], strict=True):
                np.testing.assert_array_equal(before, after)
