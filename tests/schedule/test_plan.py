"""Plans: waits, marks, counts, the hash, and the words' own rules."""

from __future__ import annotations

import re
from array import array

import pytest

from hxcomm import algorithms
from hxcomm.schedule import Location, Plan, ProofError, Schedule, ScheduleError, compile_plan, copy, prove, reduce
from hxcomm.schedule.plan import HEADER_WORDS, End, Enter, Operand, Publish, TransferInstruction, Wait
from hxcomm.schedule.symbolic import Mark

ALGORITHMS = [(op, name) for op in algorithms.OPS for name in algorithms.names(op)]
FRESH, PARTIAL, FINAL = Mark


def build(op: str, algorithm: str, n: int) -> Schedule:
    return algorithms.build(op, algorithm, n, n - 1 if op in algorithms.ROOTED else None)


def test_the_plan_of_two_shot_is_stage_enter_reduce_publish_wait_fetch() -> None:
    assert compile_plan(build("all_reduce", "two_shot", 2), rank=0).instructions() == [
        TransferInstruction(
            False, False, "input", 1, (Operand(0, "input", 1, FRESH),), (Operand(0, "scratch", 1, FRESH),)
        ),
        Enter(),
        TransferInstruction(
            True,
            True,
            "output",
            0,
            (Operand(0, "input", 0, FRESH), Operand(1, "scratch", 0, FRESH)),
            (Operand(0, "output", 0, FINAL), Operand(1, "scratch", 0, FINAL)),
        ),
        Publish(1),
        Wait(1, 1),
        TransferInstruction(
            False, False, "output", 1, (Operand(0, "scratch", 1, FINAL),), (Operand(0, "output", 1, FINAL),)
        ),
        End(),
    ]


def test_the_header_says_what_an_executor_needs() -> None:
    plan = compile_plan(build("all_reduce", "ring", 4), rank=3)
    header = plan.header()
    assert (header.world_size, header.rank, header.rounds, header.root, header.op) == (4, 3, 7, -1, 0)
    assert (header.input, header.output) == ((1, 4), (1, 4))
    assert header.flags == 1 | 2 | 4 | 8
    assert plan.words[header.enter] == 2 and header.words == len(plan.words)
    assert compile_plan(build("gather", "direct", 4), 0, private=False).header().flags == 0


@pytest.mark.parametrize("private", [True, False], ids=["private", "mapped"])
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_plans_decode_agree_on_their_hash_and_wait_only_for_what_is_published(
    op: str, algorithm: str, private: bool
) -> None:
    for n in (1, 2, 3, 8):
        plans = [compile_plan(build(op, algorithm, n), rank, private) for rank in range(n)]
        assert len({plan.plan_hash for plan in plans}) == 1
        decoded = [plan.instructions() for plan in plans]
        published = {(r, i.round) for r in range(n) for i in decoded[r] if isinstance(i, Publish)}
        awaited = {(i.peer, i.round) for r in range(n) for i in decoded[r] if isinstance(i, Wait)}
        assert awaited == published  # nothing is published that nobody waits for
        for rank in range(n):
            waits = [i for i in decoded[rank] if isinstance(i, Wait)]
            for peer in range(n):
                rounds = [wait.round for wait in waits if wait.peer == peer]
                assert rounds == sorted(set(rounds)) and (peer != rank or not rounds)


def test_the_hash_tells_schedules_apart() -> None:
    hashes = {
        compile_plan(algorithms.build(op, name, n, root), 0, private).plan_hash
        for op, name in ALGORITHMS
        for n in (2, 3, 4)
        for root in (range(n) if op in algorithms.ROOTED else [None])
        for private in (True, False)
    }
    sizes = sum(n if op in algorithms.ROOTED else 1 for op, _ in ALGORITHMS for n in (2, 3, 4))
    assert len(hashes) == 2 * sizes
    assert all(0 <= each < 2**64 for each in hashes)


@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_private_plans_have_no_exit_waits(op: str, algorithm: str) -> None:
    for rank in range(3):
        instructions = compile_plan(build(op, algorithm, 3), rank).instructions()
        assert not isinstance(instructions[-2], Wait)


def test_mapped_plans_keep_a_rank_until_peers_are_done_with_its_buffers() -> None:
    root = compile_plan(algorithms.build("broadcast", "direct", 3, root=0), 0, private=False).instructions()
    assert root == [Enter(), Wait(1, 1), Wait(2, 1), End()]


def test_a_wait_that_follows_from_others_through_third_ranks_is_not_made() -> None:
    """Rank 0 overwrites in round 4 what rank 1 read in round 1, but it waits for rank 3's round 3, which implies it."""
    waits = [i for i in compile_plan(build("all_reduce", "ring", 4), 0).instructions() if isinstance(i, Wait)]
    assert waits == [Wait(3, 1), Wait(3, 2), Wait(3, 3), Wait(3, 4), Wait(3, 5)]


def test_only_scratch_ever_holds_partial_results() -> None:
    instructions = compile_plan(build("all_reduce", "ring", 4), 0).instructions()
    transfers = [each for each in instructions if isinstance(each, TransferInstruction)]
    partial = [
        operand for each in transfers for operand in (*each.sources, *each.destinations) if operand.mark == PARTIAL
    ]
    assert partial and all(operand.buffer == "scratch" for operand in partial)
    assert [each.final for each in transfers if each.reduce] == [False, False, True]


def test_counts_come_from_the_executing_ranks_own_buffers() -> None:
    """Rank 1 of this scatter has no input and only passes scratch on: the count is that of its own output."""
    relay = Schedule(
        "scatter",
        "relay",
        3,
        lambda: [
            [
                copy(0, Location(0, "input", 2), Location(1, "scratch", 0)),
                copy(0, Location(0, "input", 0), Location(0, "output", 0)),
            ],
            [
                copy(1, Location(1, "scratch", 0), Location(2, "scratch", 0)),
                copy(1, Location(0, "input", 1), Location(1, "output", 0)),
            ],
            [copy(2, Location(2, "scratch", 0), Location(2, "output", 0))],
        ],
        root=0,
        scratch=1,
    )
    transfers = [i for i in compile_plan(relay, 1, private=False).instructions() if isinstance(i, TransferInstruction)]
    assert (transfers[0].count_buffer, transfers[0].count_chunk) == ("output", 0)


def test_all_to_all_refuses_a_transfer_whose_count_its_rank_does_not_know() -> None:
    def through(middle: int) -> Schedule:
        blocks = [
            copy(s, Location(s, "input", d), Location(d, "output", s))
            for s in range(3)
            for d in range(3)
            if (s, d) != (0, 2)
        ]
        return Schedule(
            "all_to_all",
            "relay",
            3,
            lambda: [
                [*blocks, copy(0, Location(0, "input", 2), Location(1, "scratch", 0))],
                [copy(middle, Location(1, "scratch", 0), Location(2, "scratch", 0))],
                [copy(2, Location(2, "scratch", 0), Location(2, "output", 0))],
            ],
            scratch=1,
        )

    with pytest.raises(ScheduleError, match="may differ in count"):
        compile_plan(through(1), 1, private=False)
    with pytest.raises(ProofError, match="may differ in count"):
        prove(through(1))


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ScheduleError, match="rank 2 of all_reduce ring, 2 ranks: the ranks are 0 to 1"):
        compile_plan(build("all_reduce", "ring", 2), 2)


def test_a_partial_result_in_an_output_is_refused_when_compiled() -> None:
    wrong = Schedule(
        "all_reduce",
        "wrong",
        3,
        lambda: [[reduce(0, [Location(0, "input", 0), Location(1, "input", 0)], Location(0, "output", 0))]],
    )
    with pytest.raises(ScheduleError, match="partial result may only be stored to scratch"):
        compile_plan(wrong, 0, private=False)


def spoiled(change: dict[int, int], length: int | None = None) -> Plan:
    words = array("i", compile_plan(build("all_reduce", "two_shot", 2), rank=0).words)
    for index, value in change.items():
        words[index] = value
    return Plan(words[:length], 0)


FIRST = HEADER_WORDS


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (spoiled({0: 7}), "not a plan"),
        (spoiled({}, length=5), "not a plan"),
        (spoiled({1: 1}), "version 1; this is for version 2"),
        (spoiled({}, length=40), "says it has 76 words, but there are 40"),
        (spoiled({3: 2}), "header is not valid"),
        (spoiled({6: 0}), "header is not valid"),
        (spoiled({FIRST: 9}), "word 16 of the plan: an instruction is 9, allowed are 0 to 4"),
        (spoiled({FIRST: 0}), "ENTER must come once"),
        (spoiled({FIRST + 5: 2}), "the number of sources is 2, allowed are 1 to 1"),
        (spoiled({FIRST + 7: 2}), "a location's rank is 2, allowed are 0 to 1"),
        (spoiled({FIRST + 8: 3}), "a location's buffer is 3"),
        (spoiled({FIRST + 9: 2}), "a location's chunk is 2, allowed are 0 to 1"),
        (spoiled({FIRST + 7: 1}), "private plan may touch only the scratch of peers"),
        (spoiled({FIRST + 10: 1}), "partial results may only lie in scratch"),
        (spoiled({4: 1}), "a published round is 1, allowed are 1 to 0"),
        (spoiled({75: 4}), "the plan ends at word 76"),
    ],
)
def test_words_that_are_not_a_plan_are_refused_saying_where(plan: Plan, message: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)):
        plan.instructions()


@pytest.mark.parametrize(("algorithm", "n"), [("two_shot", 65), ("ring", 65), ("one_shot", 130)])
def test_plans_of_many_ranks_compile(algorithm: str, n: int) -> None:
    plan = compile_plan(build("all_reduce", algorithm, n), n - 1)
    assert isinstance(plan.instructions()[-1], End)
