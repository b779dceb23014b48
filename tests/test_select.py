"""Which algorithm and window a planner chooses, by where the ranks are."""

from __future__ import annotations

import pytest

from hxcomm import algorithms
from hxcomm.schedule import OPS, ScheduleError
from hxcomm.select import CROSSING_SEGMENT_BYTES, SEGMENT_BYTES, Hints, Layout, Planner, default_algorithm

PAIRS = Layout(4, (0, 0, 1, 1))
APART = Layout(4, (0, 1, 2, 3))


def test_a_layout_is_one_host_unless_it_says_where_the_ranks_are() -> None:
    assert (Layout(3).hosts, Layout(3).n_hosts) == ((0, 0, 0), 1)
    assert PAIRS.n_hosts == 2 and APART.n_hosts == 4
    with pytest.raises(ScheduleError, match="the hosts of 3 ranks are"):
        Layout(3, (0, 1))


def test_hosts_of_several_ranks_run_hierarchical_algorithms_where_there_is_one() -> None:
    chosen = {op: default_algorithm(op, 1 << 20, PAIRS)[0] for op in algorithms.OPS}
    assert chosen == {op: "hierarchical" if "hierarchical" in algorithms.names(op) else "direct" for op in chosen}


def test_ranks_each_on_a_host_of_their_own_hand_over_once_where_that_is_short() -> None:
    assert [default_algorithm("all_reduce", n, APART)[0] for n in (8192, 8193)] == ["one_shot", "two_shot"]
    pair = [default_algorithm("all_reduce", n, Layout(2, (0, 1)))[0] for n in (4 << 20, (4 << 20) + 1)]
    assert pair == ["one_shot", "two_shot"]
    assert {default_algorithm(op, 1 << 20, APART)[0] for op in algorithms.OPS if op != "all_reduce"} == {"direct"}


def test_determinism_by_layout_reduces_in_rank_order_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HXCOMM_DETERMINISM", "layout")
    planner = Planner(0, PAIRS, "g", {})
    chosen = {op: planner.choose(op, 1 << 20, "float32")[0] for op in algorithms.OPS}
    assert chosen["all_reduce"] == "two_shot" and chosen["broadcast"] == "hierarchical"
    assert all(chosen[op] == "direct" for op in OPS if OPS[op].reduces and op != "all_reduce")
    assert "rank order" in planner.settings()
    for op, name in (("all_reduce", "ring"), ("reduce", "binomial_tree"), ("all_reduce", "hierarchical")):
        with pytest.raises(ValueError, match=f"{op} {name} does not reduce in rank order on 2 hosts"):
            Planner(0, PAIRS, "g", {op: name})
    late = Planner(0, Layout(4), "g", {"all_reduce": "hierarchical"})
    late.layout = PAIRS
    with pytest.raises(ValueError, match="on 2 hosts, which HXCOMM_DETERMINISM=layout asks for"):
        late.plan("all_reduce", "hierarchical", -1, mapped=False)


def test_hints_of_a_call_win_over_what_its_group_was_asked_for() -> None:
    planner = Planner(0, PAIRS, "g", {"all_reduce": "hierarchical"})
    assert planner.choose("all_reduce", 1 << 20, "float32", hints=Hints(algorithm="ring")).algorithm == "ring"
    assert planner.choose("all_reduce", 1 << 20, "float32", hints=Hints(segment_bytes=1)).algorithm == "hierarchical"
    free, ordered = Planner(0, PAIRS, "g", {}), Hints(rank_order=True)
    assert free.choose("all_reduce", 1 << 20, "float32").algorithm == "hierarchical"
    assert free.choose("all_reduce", 1 << 20, "float32", hints=ordered).algorithm == "two_shot"
    with pytest.raises(ValueError, match="all_reduce ring does not reduce in rank order on 2 hosts"):
        free.plan("all_reduce", "ring", -1, mapped=False, hints=ordered)
    assert free.plan("all_reduce", "ring", -1, mapped=False).algorithm == "ring"
    assert free.window_bytes("float32", measured=2048, hinted=4096) == 4096


def test_windows_are_longer_across_hosts_and_fit_in_a_frame_as_accumulated() -> None:
    assert Planner(0, Layout(4), "g", {}).window_bytes("float32") == SEGMENT_BYTES
    assert Planner(0, PAIRS, "g", {}).window_bytes("float32") == CROSSING_SEGMENT_BYTES
    assert Planner(0, PAIRS, "g", {}, 4096).window_bytes("float32") == 4096
    assert Planner(0, PAIRS, "g", {}, 64 << 20).window_bytes("float32") == 4 << 20
    assert Planner(0, PAIRS, "g", {}, 64 << 20).window_bytes("bfloat16") == 2 << 20
    assert Planner(0, Layout(4), "g", {}, 64 << 20).window_bytes("bfloat16") == 64 << 20
