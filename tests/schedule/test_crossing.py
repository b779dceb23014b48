"""Crossing hosts: what becomes a message, what plans say of it, and whole ops on every layout of hosts."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from schedule.layouts import layouts
from schedule.whole_ops import run_op

from hxcomm import algorithms
from hxcomm.schedule import (
    Location,
    Plan,
    ProofError,
    Schedule,
    ScheduleError,
    across_hosts,
    compile_plan,
    copy,
    draw,
    lower,
    prove,
    reduce,
    ring_hop_bytes,
)
from hxcomm.schedule.plan import HEADER_WORDS, Agree, End, Enter, Receive, TransferInstruction, Wait
from hxcomm.schedule.schedule import USER_BUFFERS, Buffer

ALGORITHMS = [(op, name) for op in algorithms.OPS for name in algorithms.names(op)]
FORMS = pytest.mark.parametrize("private", [True, False], ids=["private", "mapped"])


def at(rank: int, buffer: Buffer, chunk: int = 0) -> Location:
    return Location(rank, buffer, chunk)


def build(op: str, algorithm: str, n: int, hosts: Sequence[int] | None = None) -> Schedule:
    return algorithms.build(op, algorithm, n, n // 2 if op in algorithms.ROOTED else None, hosts)


def test_what_another_host_reads_is_sent_and_what_it_is_given_is_received() -> None:
    crossed = across_hosts(build("all_reduce", "two_shot", 3), (0, 0, 1))
    sends, local, receives = (list(transfers) for _, transfers in crossed.numbered_rounds())
    assert sends == [
        copy(2, at(2, "input", 0), at(0, "message", 0)),
        copy(2, at(2, "input", 1), at(1, "message", 0)),
        copy(0, at(0, "input", 2), at(2, "message", 0)),
        copy(1, at(1, "input", 2), at(2, "message", 1)),
    ]
    assert local[0] == reduce(
        0,
        [at(0, "input", 0), at(1, "input", 0), at(0, "message", 0)],
        at(0, "output", 0),
        at(1, "output", 0),
        at(2, "message", 2),
    )
    assert receives[0] == copy(2, at(2, "message", 2), at(2, "output", 0))
    assert (crossed.messages, crossed.hosts) == (4, (0, 0, 1))


def test_what_several_ranks_of_other_hosts_read_is_made_once_and_sent_once_to_each() -> None:
    crossed = across_hosts(build("broadcast", "direct", 4), (0, 1, 2, 1))
    sends = next(iter(crossed.numbered_rounds()))[1]
    assert sends == [copy(2, at(2, "input"), at(0, "message"), at(1, "message"), at(3, "message"))]


def test_what_only_another_host_reads_is_sent_from_where_it_lies() -> None:
    lowered = lower(build("all_gather", "direct", 2), private=True, hosts=(0, 1))
    assert lowered.scratch == 0
    assert next(list(transfers) for _, transfers in lowered.numbered_rounds()) == []


def test_ranks_on_one_host_get_the_plan_that_they_had() -> None:
    schedule = build("all_reduce", "ring", 3)
    assert across_hosts(schedule, (0, 0, 0)) is schedule
    assert compile_plan(schedule, 1, hosts=(0, 0, 0)) == compile_plan(schedule, 1)


@pytest.mark.parametrize("hosts", [(0, 0), (1, 1, 1), (0, 2, 1), (0, 0, 0, 1)], ids=str)
def test_hosts_that_ranks_might_number_differently_are_refused(hosts: tuple[int, ...]) -> None:
    with pytest.raises(ScheduleError, match=r"the hosts of 3 ranks are .*in the order of the hosts' first ranks"):
        compile_plan(build("all_reduce", "ring", 3), 0, hosts=hosts)


@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_every_algorithm_is_right_on_every_layout_of_hosts(op: str, algorithm: str) -> None:
    for n in range(2, 9):
        for hosts in layouts(n):
            for root in {0, n // 2, n - 1} if op in algorithms.ROOTED else {None}:
                prove(algorithms.build(op, algorithm, n, root, hosts), hosts)


@FORMS
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_plans_that_cross_hosts_receive_what_is_sent_wait_at_home_and_agree_before_they_store(
    op: str, algorithm: str, private: bool
) -> None:
    for n in (2, 3, 5, 8):
        for hosts in layouts(n)[1:]:
            plans = [compile_plan(build(op, algorithm, n, hosts), rank, private, hosts) for rank in range(n)]
            assert len({plan.plan_hash for plan in plans}) == 1
            sent: Counter[tuple[int, int, int]] = Counter()
            received: Counter[tuple[int, int, int]] = Counter()
            for rank, plan in enumerate(plans):
                here = set()
                agreed = False
                for step in plan.instructions():
                    if isinstance(step, Receive):
                        assert hosts[step.peer] != hosts[rank]
                        here.add(step.number)
                        received[step.peer, rank, step.number] += 1
                    elif isinstance(step, Wait):
                        assert hosts[step.peer] == hosts[rank]
                    elif isinstance(step, Agree):
                        agreed = True
                    elif isinstance(step, TransferInstruction):
                        assert all(each.chunk in here for each in step.sources if each.buffer == "message")
                        stores = [each for each in step.destinations if each.buffer in USER_BUFFERS]
                        assert agreed or not stores
                        sent.update((rank, e.rank, e.chunk) for e in step.destinations if e.buffer == "message")
                        local = [e for e in (*step.sources, *step.destinations) if e.buffer != "message"]
                        assert all(hosts[each.rank] == hosts[rank] for each in local)
                assert agreed
            assert sent == received and set(sent.values()) <= {1}
            most = Counter(receiver for _, receiver, _ in sent)
            assert all(plan.header().messages == max(most.values(), default=0) for plan in plans)


def test_the_hash_tells_layouts_of_hosts_apart() -> None:
    schedule = build("barrier", "direct", 5)
    assert len({compile_plan(schedule, 0, hosts=hosts).plan_hash for hosts in layouts(5)}) == len(layouts(5))


def test_the_plan_of_a_rank_that_stores_nothing_agrees_before_it_waits_for_the_end() -> None:
    root = compile_plan(algorithms.build("broadcast", "direct", 3, root=0), 0, private=False, hosts=(0, 0, 1))
    send, *rest = [step for step in root.instructions() if not isinstance(step, Enter)]
    assert isinstance(send, TransferInstruction) and rest == [Agree(), Wait(1, 2), End()]
    assert compile_plan(build("barrier", "direct", 3), 0, hosts=(0, 0, 1)).instructions() == [Enter(), Agree(), End()]


@FORMS
@pytest.mark.parametrize(("op", "algorithm"), ALGORITHMS)
def test_every_algorithm_computes_its_op_on_every_layout_of_hosts(op: str, algorithm: str, private: bool) -> None:
    for n in range(2, 6):
        for hosts in layouts(n)[1:]:
            for count in (0, 1, 33 * n + 5):
                run_op(op, algorithm, n, count, private, hosts=hosts)
    run_op(op, algorithm, 8, 200, private, segment=64, hosts=(0, 1, 1, 2, 0, 3, 3, 3))


@FORMS
def test_all_to_all_across_hosts_takes_a_count_of_its_own_for_every_pair(private: bool) -> None:
    for n in (2, 3, 6):
        counts = [[(7 * s + 3 * d) % 40 if s != d else 0 for d in range(n)] for s in range(n)]
        for hosts in layouts(n)[1:]:
            run_op("all_to_all", "direct", n, counts, private, segment=16, hosts=hosts)


ONE, OTHER = at(0, "input"), at(1, "input")
CROSSED = Schedule("broadcast", "wrong", 2, tuple, root=0, scratch=1, hosts=(0, 1), messages=2, form="mapped")
SEND = copy(0, ONE, at(1, "message"))
KEEP = copy(1, at(1, "message"), at(1, "output"))
WRONG = {
    "memory of another host": ([[], [copy(1, ONE, at(1, "output"))]], r"rank 0 input\[0\] is memory of another host"),
    "sent twice": ([[], [SEND], [SEND], [KEEP]], r"rank 1 message\[0\] is sent a second time"),
    "sent to oneself": ([[], [copy(1, OTHER, at(1, "message"))]], "is sent within a host"),
    "read by its sender": ([[], [SEND], [copy(0, at(1, "message"), at(0, "scratch"))]], "can be read by rank 1 only"),
    "never read": ([[], [SEND, copy(0, ONE, at(1, "message", 1))], [KEEP]], r"message\[1\] is sent, but never read"),
    "never sent": ([[], [KEEP]], r"nothing was ever stored to rank 1 message\[0\]"),
    "in round 0": ([[SEND], [KEEP]], "round 0 may only copy to a rank's own scratch"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_schedule_that_crosses_hosts_otherwise_than_by_messages_is_refused(what: str) -> None:
    rounds, message = WRONG[what]
    with pytest.raises(ProofError, match=message):
        prove(replace(CROSSED, rounds=lambda: rounds))
    prove(replace(CROSSED, rounds=lambda: [[], [SEND], [KEEP]]))


def test_a_written_schedule_has_no_messages() -> None:
    with pytest.raises(ScheduleError, match=r"rank 1 message\[0\] does not exist"):
        prove(Schedule("broadcast", "wrong", 2, lambda: [[SEND], [KEEP]], root=0))


def spoiled(change: dict[int, int]) -> Plan:
    words = array("i", compile_plan(algorithms.build("broadcast", "direct", 2, root=0), 1, hosts=(0, 1)).words)
    for index, value in change.items():
        words[index] = value
    return Plan(words, 0)


FIRST = HEADER_WORDS  # ENTER, RECEIVE 0 0, AGREE, TRANSFER, END


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({10: 3}, "header is not valid"),
        ({15: -1}, "header is not valid"),
        ({15: 0}, "a message's number is 0, allowed are 0 to -1"),
        ({FIRST: 7}, "an instruction is 7, allowed are 0 to 6"),
        ({FIRST + 1: 6, FIRST + 2: 6}, "a second AGREE"),
        ({FIRST + 2: 2}, "a message's sender is 2, allowed are 0 to 1"),
        ({FIRST + 3: 1}, "a message's number is 1, allowed are 0 to 0"),
        ({FIRST: 6}, "ENTER must come once"),
        ({FIRST + 1: 0}, "it crosses hosts, and ends without AGREE"),
        ({FIRST + 1: 3, FIRST + 3: 1}, "message 0 is read before it is received"),
        ({FIRST + 12: 0}, "a message is stored to another rank, and read by the one that gets it"),
        ({FIRST + 17: 3}, "a message is stored to another rank, and read by the one that gets it"),
    ],
)
def test_words_that_cross_hosts_wrongly_are_refused_saying_where(change: dict[int, int], message: str) -> None:
    assert [type(step) for step in spoiled({}).instructions()] == [Enter, Receive, Agree, TransferInstruction, End]
    with pytest.raises(ScheduleError, match=re.escape(message)):
        spoiled(change).instructions()


def test_a_plan_that_stores_before_the_hosts_have_agreed_is_refused() -> None:
    words = list(spoiled({}).words)
    agree = words.pop(FIRST + 4)
    with pytest.raises(ScheduleError, match="word 20 of the plan: stores to an input or output before AGREE"):
        Plan(array("i", [*words[:-1], agree, words[-1]]), 0).instructions()


def test_what_crosses_hosts_goes_the_way_it_went() -> None:
    for op, name in ALGORITHMS:
        schedule = build(op, name, 4)
        for hosts in layouts(4):
            assert ring_hop_bytes(lower(schedule, private=True, hosts=hosts), 1600, 4) == ring_hop_bytes(
                schedule, 1600, 4
            )


def test_sends_messages_and_receives_are_drawn() -> None:
    drawn = draw.text(algorithms.build("broadcast", "direct", 3, root=0), hosts=(0, 1, 1))
    assert "on hosts 0,1,1" in drawn
    assert "    1 | i0 > 1:m0, 2:m0" in drawn and "m0 > o0" in drawn and draw.LEGEND_OF_HOSTS in drawn
    lines = draw.plan_text(compile_plan(build("all_reduce", "one_shot", 2), 0, hosts=(0, 1))).splitlines()
    assert lines[1:] == [
        "  enter    publish arrival, wait for all of this host",
        "  copy     input[0] > rank 1 message[0]",
        "  receive  message 0 from rank 1",
        "  agree    wait until all hosts have agreed on the call",
        "  reduce   input[0], message[0] > output[0] (final)",
        "  end",
    ]
