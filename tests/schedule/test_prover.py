"""The prover: accepts every algorithm, and names what is wrong with schedules that break one rule each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hxcomm import algorithms
from hxcomm.schedule import Location, ProofError, Schedule, ScheduleError, Transfer, copy, lower, prove, reduce

ALGORITHMS = [(op, name) for op in algorithms.OPS for name in algorithms.names(op)]
IN_RANK_ORDER = {"one_shot", "two_shot", "direct"}


def roots(op: str, n: int) -> list[int | None]:
    return list(range(n)) if op in algorithms.ROOTED else [None]


@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_every_algorithm_is_right_for_every_world_size_and_root_in_every_form(op: str, algorithm: str) -> None:
    for n in range(1, 17):
        for root in roots(op, n):
            proof = prove(algorithms.build(op, algorithm, n, root))
            if algorithm in IN_RANK_ORDER or n == 1:
                assert proof.order == "rank order", f"{n} ranks"


def test_a_ring_says_that_it_does_not_reduce_in_rank_order() -> None:
    assert prove(algorithms.build("all_reduce", "ring", 3)).order == "other"
    assert prove(algorithms.build("reduce_scatter", "ring", 2)).order == "other"


def test_a_proof_tells_rounds_and_chunks_moved() -> None:
    proof = prove(algorithms.build("all_reduce", "two_shot", 4))
    assert (proof.rounds, proof.loaded, proof.stored, proof.pieces) == (1, 4, 4, 4)
    proof = prove(algorithms.build("all_reduce", "ring", 4))
    assert (proof.rounds, proof.loaded, proof.stored, proof.pieces) == (6, 9, 6, 4)


I0, I1 = Location(0, "input", 0), Location(1, "input", 0)
O0, O1 = Location(0, "output", 0), Location(1, "output", 0)
S0, S1 = Location(0, "scratch", 0), Location(1, "scratch", 0)


def all_reduce(*rounds: list[Transfer]) -> Schedule:
    return Schedule("all_reduce", "wrong", 2, lambda: rounds, scratch=1)


def all_gather(*rounds: list[Transfer]) -> Schedule:
    return Schedule("all_gather", "wrong", 2, lambda: rounds, scratch=1)


def gathered(rank: int) -> list[Transfer]:
    return [copy(rank, I0, Location(rank, "output", 0)), copy(rank, I1, Location(rank, "output", 1))]


WRONG: dict[str, tuple[Schedule, str]] = {
    "a rank is missing": (
        all_reduce([reduce(0, [I0, I1], O0)]),
        r"rank 1 output\[0\] must end with chunk 0 of the input of ranks 0, 1; it ends with chunk 0 of .* rank 1",
    ),
    "a rank twice": (all_reduce([reduce(0, [I0, I1, I0], O0, O1)]), r"round 1: .*adds rank 0 a second time"),
    "chunks mixed up": (
        Schedule(
            "reduce_scatter",
            "wrong",
            2,
            lambda: [[reduce(0, [Location(0, "input", 0), Location(1, "input", 1)], O0)]],
        ),
        r"rank 1 input\[1\] holds input chunk 1, rank 0 input\[0\] holds chunk 0",
    ),
    "two writers": (all_reduce([reduce(0, [I0, I1], O0), reduce(1, [I0, I1], O0)]), "second writer in this round"),
    "the same destination twice": (all_reduce([reduce(0, [I0, I1], O0, O0, O1)]), "second writer in this round"),
    "read while it is written": (
        all_gather([*gathered(0), copy(1, I0, S1), copy(1, S1, Location(1, "output", 0))]),
        r"nothing was ever stored to rank 1 scratch\[0\]",
    ),
    "read and written in one round": (
        all_gather([copy(0, I0, S0)], [copy(0, I0, S0), copy(1, S0, O1)]),
        r"round 2: .*rank 0 scratch\[0\] is overwritten in the same round by another transfer, rank 0 copies",
    ),
    "read before it is stored": (all_gather([copy(0, S0, O0)]), r"nothing was ever stored to rank 0 scratch\[0\]"),
    "partial in an output": (
        Schedule("all_reduce", "wrong", 3, lambda: [[reduce(0, [I0, I1], O0)]]),
        r"stores a partial result \(of ranks 0, 1\) to rank 0 output\[0\]",
    ),
    "final reduced again": (
        all_reduce([reduce(0, [I0, I1], S0)], [reduce(0, [S0], O0, O1)]),
        "finished result, which may not be reduced again",
    ),
    "input overwritten": (all_gather([copy(0, I0, I1)]), "the caller's input, which must stay as it is"),
    "reduce in a data movement": (all_gather([reduce(0, [I0], O0)]), "moves data and may not reduce"),
    "another rank's input changed by reduce": (
        Schedule("reduce", "wrong", 2, lambda: [[reduce(0, [I0, I1], O0, O1)]], root=0),
        r"rank 1 input\[0\] must end with its own input, unchanged",
    ),
    "wrong block": (
        all_gather([*gathered(0), copy(1, I1, O1), copy(1, I0, Location(1, "output", 1))]),
        r"rank 1 output\[0\] must end with chunk 0 of the input of rank 0",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_schedule_is_refused_and_the_mistake_named(what: str) -> None:
    schedule, message = WRONG[what]
    with pytest.raises(ProofError, match=message):
        prove(schedule)


MALFORMED: dict[str, tuple[Callable[[], object], str]] = {
    "no such rank": (
        lambda: prove(all_reduce([copy(2, I0, O0)])),
        "round 1: a transfer of rank 2: the ranks are 0 to 1",
    ),
    "no such chunk": (
        lambda: prove(all_reduce([copy(0, I0, Location(0, "scratch", 1))])),
        r"scratch\[1\] does not exist",
    ),
    "no such peer": (
        lambda: prove(all_reduce([copy(0, I0._replace(rank=7), O0)])),
        r"rank 7 input\[0\] does not exist",
    ),
    "no destination": (lambda: prove(all_reduce([copy(0, I0)])), "needs a source and a destination"),
    "two sources of a copy": (lambda: prove(all_reduce([Transfer(0, (I0, I1), (O0,), False)])), "use reduce for more"),
    "not a location": (lambda: prove(all_reduce([copy(0, (0, "input", 0), O0)])), "is not a Location"),  # type: ignore
    "not a transfer": (lambda: prove(all_reduce([(I0, O0)])), "is not a Transfer: make it with copy"),  # type: ignore
    "rounds that cannot be called": (
        lambda: Schedule("all_reduce", "x", 2, [[copy(0, I0, O0)]]),  # type: ignore
        "rounds is list; it must be a function",
    ),
    "no such op": (lambda: Schedule("allreduce", "x", 2, tuple), "there is no op 'allreduce'; the ops are: all_reduce"),
    "no ranks": (lambda: Schedule("all_reduce", "x", 0, tuple), "world size is 0"),
    "no root": (lambda: Schedule("broadcast", "x", 2, tuple), "the root is None; it must be a rank, 0 to 1"),
    "root too large": (lambda: Schedule("broadcast", "x", 2, tuple, root=2), "the root is 2"),
    "root of all_reduce": (lambda: Schedule("all_reduce", "x", 2, tuple, root=0), "has none: leave it out"),
    "no pieces": (lambda: Schedule("all_reduce", "x", 2, tuple, pieces=0), "0 pieces"),
    "gather's output elsewhere": (
        lambda: prove(Schedule("gather", "x", 2, lambda: [[copy(1, I1, O1)]], root=0)),
        "only root 0 has that buffer",
    ),
    "lowered twice": (
        lambda: lower(lower(all_reduce([reduce(0, [I0, I1], O0, O1)]), private=True), private=False),
        "lowered to its private form already",
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_schedule_is_refused_saying_what_is_allowed(what: str) -> None:
    make, message = MALFORMED[what]
    with pytest.raises(ScheduleError, match=message):
        make()


def test_lowered_forms_are_checked_for_what_they_may_touch() -> None:
    from dataclasses import replace

    remote = Schedule("all_reduce", "wrong", 2, lambda: [[], [reduce(0, [I0, I1], O0, O1)]], form="private")
    with pytest.raises(ProofError, match="is private to its rank"):
        prove(remote)
    early = replace(remote, rounds=lambda: [[copy(0, I1, S0)]], scratch=1, form="mapped")
    with pytest.raises(ProofError, match="round 0 may only copy a rank's own input"):
        prove(early)
    elsewhere = replace(early, rounds=lambda: [[copy(0, I0, S1)]])
    with pytest.raises(ProofError, match="round 0 may only copy to a rank's own scratch"):
        prove(elsewhere)
