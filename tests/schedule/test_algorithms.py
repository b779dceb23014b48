"""Finding, building and registering algorithms."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from hxcomm import algorithms
from hxcomm.schedule import Location, ProofError, Rotation, Schedule, ScheduleError, compile_plan, copy, reduce


@pytest.fixture
def registry() -> Iterator[None]:
    yield
    algorithms._registered.clear()
    algorithms._proved.clear()


def test_algorithms_are_discovered_by_their_files() -> None:
    assert {op: algorithms.names(op) for op in algorithms.OPS} == {
        "all_reduce": ["hierarchical", "line", "one_shot", "ring", "ring_bidirectional", "torus", "two_shot"],
        "broadcast": ["binomial_tree", "direct", "hierarchical", "ring"],
        "reduce": ["binomial_tree", "direct", "hierarchical", "ring"],
        "all_gather": ["direct", "hierarchical", "line", "ring", "ring_bidirectional"],
        "reduce_scatter": ["direct", "hierarchical", "ring", "ring_bidirectional"],
        "gather": ["direct"],
        "scatter": ["direct"],
        "all_to_all": ["direct"],
        "barrier": ["direct"],
    }


def test_a_schedule_carries_the_name_it_was_built_by() -> None:
    for op in algorithms.OPS:
        for name in algorithms.names(op):
            schedule = algorithms.build(op, name, 3, 2 if op in algorithms.ROOTED else None)
            assert (schedule.op, schedule.algorithm, schedule.world_size) == (op, name, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("allreduce", "ring", 2), "there is no op 'allreduce'; the ops are: all_reduce, "),
        (
            ("all_reduce", "tree", 2),
            "all_reduce has no algorithm 'tree'; it has: hierarchical, line, one_shot, ring, ring_bidirectional, torus",
        ),
        (("all_reduce", "ring", 0), "the world size is 0"),
        (("broadcast", "direct", 2), "the root of broadcast is None; it must be a rank, 0 to 1"),
        (("broadcast", "direct", 2, 2), "the root of broadcast is 2"),
        (("all_reduce", "ring", 2, 0), "all_reduce has no root, but 0 was given"),
    ],
)
def test_what_cannot_be_built_is_refused_saying_what_can(arguments: tuple[str, str, int], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        algorithms.build(*arguments)


def reversed_one_shot(world_size: int) -> Schedule:
    inputs = [Location(s, "input", 0) for s in reversed(range(world_size))]
    return Schedule(
        "all_reduce",
        "x",
        world_size,
        lambda: [[reduce(r, inputs, Location(r, "output", 0)) for r in range(world_size)]],
    )


@pytest.mark.usefixtures("registry")
def test_a_registered_algorithm_is_proved_once_and_compiles_like_any_other() -> None:
    algorithms.register("all_reduce", "reversed", reversed_one_shot)
    assert "reversed" in algorithms.names("all_reduce")
    schedule = algorithms.build("all_reduce", "reversed", 3)
    assert schedule.algorithm == "reversed"
    assert algorithms.build("all_reduce", "reversed", 3) is schedule
    assert compile_plan(schedule, 0).header().world_size == 3


@pytest.mark.usefixtures("registry")
def test_a_registered_algorithm_that_is_wrong_never_runs() -> None:
    def forgetful(world_size: int, root: int) -> Schedule:
        return Schedule("broadcast", "forgetful", world_size, tuple, root=root)

    algorithms.register("broadcast", "forgetful", forgetful)
    algorithms.build("broadcast", "forgetful", 1, root=0)
    with pytest.raises(
        ProofError, match=r"broadcast forgetful, 2 ranks, root 0: rank 1 output\[0\] must end with chunk 0"
    ):
        algorithms.build("broadcast", "forgetful", 2, root=0)


@pytest.mark.usefixtures("registry")
def test_what_is_not_an_algorithm_is_refused() -> None:
    with pytest.raises(ScheduleError, match="has an algorithm 'ring' already"):
        algorithms.register("all_reduce", "ring", reversed_one_shot)
    with pytest.raises(ScheduleError, match="no op 'allreduce'"):
        algorithms.register("allreduce", "mine", reversed_one_shot)
    with pytest.raises(ScheduleError, match="not 'my own'"):
        algorithms.register("all_reduce", "my own", reversed_one_shot)
    with pytest.raises(ScheduleError, match="is not a function that returns a Schedule"):
        algorithms.register("all_reduce", "mine", 5)  # type: ignore[arg-type]
    algorithms.register("all_reduce", "nothing", lambda world_size: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ScheduleError, match="returned NoneType, not a Schedule"):
        algorithms.build("all_reduce", "nothing", 2)
    algorithms.register("all_gather", "other", reversed_one_shot)
    with pytest.raises(ScheduleError, match=r"was asked for all_gather, .* returned a Schedule of all_reduce"):
        algorithms.build("all_gather", "other", 2)


@pytest.mark.usefixtures("registry")
def test_a_registered_algorithm_is_told_the_hosts_where_it_asks_and_proved_on_each_layout() -> None:
    asked = []

    def told(world_size: int, hosts: tuple[int, ...]) -> Schedule:
        asked.append(hosts)
        return reversed_one_shot(world_size)

    algorithms.register("all_reduce", "told", told)
    for hosts in (None, (0, 0, 0), (0, 0, 1), (0, 0, 1)):
        algorithms.build("all_reduce", "told", 3, hosts=hosts)
    assert asked == [(0, 0, 0), (0, 0, 1)]
    with pytest.raises(ScheduleError, match="in the order of the hosts' first ranks"):
        algorithms.build("all_reduce", "ring", 3, hosts=(1, 0, 0))


def test_a_rotation_is_what_every_rank_does_seen_from_itself() -> None:
    rotation = Rotation([copy(0, Location(2, "output", 1), Location(0, "scratch", 1))], rotated=("output",))
    assert rotation.expanded(3) == [
        copy(r, Location((2 + r) % 3, "output", (1 + r) % 3), Location(r, "scratch", 1)) for r in range(3)
    ]


def test_a_rotation_of_several_chunks_a_rank_turns_as_many_at_once() -> None:
    rotation = Rotation([copy(0, Location(1, "output", 5), Location(0, "output", 1))], rotated=("output",), step=2)
    assert rotation.expanded(3) == [
        copy(r, Location((1 + r) % 3, "output", (5 + 2 * r) % 6), Location(r, "output", (1 + 2 * r) % 6))
        for r in range(3)
    ]


def test_the_schedule_layer_needs_neither_torch_nor_numpy() -> None:
    program = (
        "import sys, hxcomm.schedule.draw, hxcomm.algorithms as a;"
        "[a.build(op, n, 2, 0 if op in a.ROOTED else None) for op in a.OPS for n in a.names(op)];"
        "print([m for m in ('torch', 'numpy', 'zmq') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
