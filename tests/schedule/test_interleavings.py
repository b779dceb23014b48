"""The protocol under random interleavings of single loads and stores: right as it is, wrong with any part missing.

`python -m pytest tests/schedule -k interleav --interleavings 50` runs 50 times as many random streams, all different,
in as many portions (with -n: on several cores). What fails prints its seed, and a seed always makes the same run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from schedule.simulated_group import Faults, instructions_of
from schedule.simulated_processes import interleave, one_group
from schedule.streams import WORLD_SIZES, Step, WrongError, random_step, random_stream

from hxcomm import algorithms
from hxcomm.schedule.extents import piece_extent
from hxcomm.schedule.plan import Wait

SEEDS = 60  # a portion of a world size
ALGORITHMS = [(op, name) for op in algorithms.OPS for name in algorithms.names(op)]


def trial(seed: str, n: int, private: bool, stream: Sequence[Step] | None = None, faults: Faults | None = None) -> None:
    rng = random.Random(seed)
    stream = list(random_stream(rng, n)) if stream is None else stream
    first = rng.choice((0, 1, 2**32 - 2))
    try:
        interleave(one_group(n, private, first, faults or Faults(), stream, rng))
    except WrongError as error:
        raise WrongError(f"seed {seed!r}, {n} ranks, {'private' if private else 'mapped'}: {error}") from error


@pytest.mark.parametrize("private", [True, False], ids=["private", "mapped"])
@pytest.mark.parametrize("n", WORLD_SIZES)
def test_streams_of_mixed_ops_mismatches_and_refused_calls_come_out_right(n: int, private: bool, portion: int) -> None:
    for number in range(portion * SEEDS, (portion + 1) * SEEDS):
        trial(f"stream {n} {private} {number}", n, private)


@pytest.mark.parametrize("private", [True, False], ids=["private", "mapped"])
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_every_algorithm_comes_out_right_in_a_row_of_its_own(
    op: str, algorithm: str, private: bool, portion: int
) -> None:
    for n in (2, 3, 5, 8):
        for number in range(portion * 5, (portion + 1) * 5):
            rng = random.Random(f"{op} {algorithm} {n} {private} {number}")
            stream = [random_step(rng, n, "alike", op, algorithm) for _ in range(4)]
            trial(f"row {op} {algorithm} {n} {private} {number}", n, private, stream)


def waits_of(op: str, algorithm: str, root: int | None, n: int, private: bool) -> Iterator[tuple[int, int, Wait]]:
    for rank in range(n):
        for index, instruction in enumerate(instructions_of((op, algorithm, root), n, rank, private)):
            if isinstance(instruction, Wait):
                yield rank, index, instruction


def long_step(rng: random.Random, n: int, op: str, algorithm: str, root: int | None) -> Step:
    """A step whose chunks are not empty, so that there is something to see."""
    pieces = algorithms.build(op, algorithm, n, root).pieces
    while True:
        step = random_step(rng, n, "alike", op, algorithm)
        call = step.calls[0]
        first, end = piece_extent(max(map(max, call.counts)), pieces, pieces - 1, high=call.window, quantum=1)
        if call.root == root and max(map(max, call.counts)) >= n and first < end:
            return step


def is_caught(
    seed: str, n: int, private: bool, op: str, algorithm: str, root: int | None, rank: int, index: int
) -> bool:
    for number in range(400):  # pipelined chains give a rank little time to be too early in
        rng = random.Random(f"{seed} {number}")
        stream = [long_step(rng, n, op, algorithm, root) for _ in range(2)]
        try:
            trial(f"{seed} {number}", n, private, stream, Faults(wait=(op, algorithm, rank, index)))
        except WrongError:
            return True
    return False


@pytest.mark.parametrize("private", [True, False], ids=["private", "mapped"])
def test_a_plan_without_any_one_of_its_waits_goes_wrong(private: bool) -> None:
    mutants, survivors = 0, []
    for op, algorithm in ALGORITHMS:
        for n in (2, 3, 4, 5):
            root = n // 2 if op in algorithms.ROOTED else None
            for rank, index, wait in waits_of(op, algorithm, root, n, private):
                mutants += 1
                if not is_caught(f"mutant {op} {algorithm} {n}", n, private, op, algorithm, root, rank, index):
                    survivors.append(f"{op} {algorithm}, {n} ranks, rank {rank} without {wait}")
    assert mutants > 50
    assert not survivors, f"{len(survivors)} of {mutants} waits are not needed, or not missed:\n" + "\n".join(survivors)


@pytest.mark.parametrize("fault", ["lax_entry", "one_scratch", "forget_refusal"])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_the_protocol_without_one_of_its_parts_goes_wrong(n: int, fault: str) -> None:
    for number in range(1000):
        try:
            trial(f"fault {fault} {n} {number}", n, private=True, faults=Faults(**{fault: True}))
        except WrongError as error:
            print(f"caught after {number} seeds: {error}")
            return
    pytest.fail(f"1000 streams went right with {fault}: the check does not see it, or the part is not needed")
