"""A rank's virtual clock: what ops and collectives add to it, who agrees with whom, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chip_file import write_chip

from hxcomm.sim import chips
from hxcomm.sim.choosing import time_collective
from hxcomm.sim.interconnect import interconnect

Run = Callable[..., list[Any]]
US, NS = 10**6, 10**3  # in ps


@pytest.fixture
def chip(tmp_path: Path) -> str:
    return write_chip(tmp_path, "round")


# --- one chip ---


def ops_of_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    from hxcomm import virtual

    x, weight = torch.ones(1, 1000, device="hx"), torch.ones(1000, 1000, device="hx")
    before = virtual.report()
    with virtual.region("product"):
        y = torch.nn.functional.linear(x, weight)
    with virtual.region("views"):
        x.t().unsqueeze(0).expand(5, 1000, 1)[1:3].view(2, 1000)
    with virtual.region("in place"):
        y.add_(y)
    with virtual.region("general way"):  # no fast path
        torch.tanh(y)
    virtual.enter("no more")
    first, second = torch.hx.Event(enable_timing=True), torch.hx.Event(enable_timing=True)
    first.record()
    torch.nn.functional.linear(x, weight)
    second.record()
    after = virtual.report()
    assert after.total_ps == after.parts.total == virtual.now_ps()
    regions = {name: (each.weights, each.kv_cache, each.other) for name, each in (after - before).regions.items()}
    return {"regions": regions, "event_ms": first.elapsed_time(second), "ops": (after - before).ops}


def test_ops_cost_what_the_chip_says_and_views_nothing(run_ranks: Run, chip: str) -> None:
    (found,) = run_ranks(ops_of_one_rank, 1, backend=None, env={"HXCOMM_SIM": chip})
    # 4 bytes each of the weight, x and y, at 1 TB/s; 2 million flops at 1 TFLOP/s take half of that; 10 ns an op.
    product = 4 * (1_000_000 + 1000 + 1000) + 10 * NS
    assert found["regions"] == {
        "product": (product, 0, 0),
        "in place": (0, 0, 4 * 3000 + 10 * NS),
        "general way": (0, 0, 4 * 2000 + 10 * NS),
        "no more": (product, 0, 0),
    }
    assert found["event_ms"] == product / 1e9
    assert found["ops"] == 4


def without_a_chip(rank: int, world_size: int) -> str:
    from hxcomm import virtual

    assert not virtual.is_running()
    assert virtual.enter("anything") == 0
    torch.ones(3, device="hx").add_(1)
    with pytest.raises(RuntimeError, match="HXCOMM_SIM") as raised:
        virtual.report()
    return str(raised.value)


def test_without_a_chip_no_clock_runs_and_a_report_says_how_to_get_one(run_ranks: Run) -> None:
    assert "set HXCOMM_SIM" in run_ranks(without_a_chip, 1, backend=None)[0]


# --- collectives ---


def ragged_calls(rank: int, world_size: int) -> dict[str, Any]:
    """All_reduces to which the ranks come at different times, one of them while the one before still travels."""
    from hxcomm import _C, virtual

    x = torch.ones(1 << 14, device="hx")
    for _ in range(rank):
        x.mul_(1.0)
    dist.all_reduce(x)
    small = torch.ones(16, device="hx")
    works = [dist.all_reduce(x, async_op=True), dist.all_reduce(small, async_op=True)]
    for work in reversed(works):
        work.wait()
    dist.all_reduce(torch.ones(4))  # on CPU: no chip's business
    dist.barrier()
    report = virtual.report()
    ((_, _, _, _, events),) = _C.clock_collectives()
    return {
        "events": [(key, starts, end_ps) for key, starts, end_ps, *_ in events],
        "now_ps": virtual.now_ps(),
        "parts": report.parts,
        "total_ps": report.total_ps,
        "untimed": report.untimed,
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_agree_on_when_collectives_end(run_ranks: Run, chip: str, tmp_path: Path, world_size: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    env = {"HXCOMM_SIM": chip, "HXCOMM_SIM_OUT": str(out)}
    first, again = (run_ranks(ragged_calls, world_size, env=env) for _ in range(2))
    assert first == again
    network = interconnect(chips.load(chip), world_size)
    ended = [0] * world_size
    for calls in zip(*(found["events"] for found in first), strict=True):
        (op, algorithm, nbytes, itemsize, _), starts, _ = calls[0]
        assert [(key, said) for key, said, _ in calls] == [(calls[0][0], starts)] * world_size
        assert op == 0  # all_reduce
        timing = time_collective(
            "all_reduce", nbytes, chips.load(chip), network, itemsize=itemsize, algorithm=algorithm, starts_ps=starts
        )
        ended = [max(pair) for pair in zip(ended, timing.finish_ps, strict=True)]
        assert [end_ps for _, _, end_ps in calls] == ended
    assert [found["now_ps"] for found in first] == ended
    for found in first:
        assert found["total_ps"] == found["now_ps"] == found["parts"].total
        assert found["parts"].hidden == 0  # calls travel at once, but nothing is computed meanwhile
        assert found["untimed"] == {"collectives of CPU tensors": 2, "messages": 0, "operations on windows": 0}


def parts_of_a_step(rank: int, world_size: int) -> dict[str, int]:
    from hxcomm import virtual

    many = torch.ones(512, 512, device="hx")
    before = virtual.report()
    dist.all_reduce(many @ many)
    torch.nn.functional.softmax(many, dim=-1)
    parts = (virtual.report() - before).parts
    return {"weights": parts.weights, "other": parts.other, "exposed": parts.exposed}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"memory.bandwidth_bytes_per_s": "5e11"}, {"other"}),
        ({"links.bandwidth_bytes_per_s": "2e9"}, {"exposed"}),
        ({"links.latency_ns": "2000"}, {"exposed"}),
        ({"collective.reduce_bytes_per_s": "1e9"}, {"exposed"}),
        ({"compute.flops_per_s.float32": "5e11"}, {"weights"}),
        ({"compute.fixed_ns_per_op": "20"}, {"weights", "other"}),
        ({"overlap_chunks": "8"}, set()),
    ],
)
def test_one_value_of_a_chip_changes_the_parts_that_depend_on_it_and_no_other(
    run_ranks: Run, tmp_path: Path, change: dict[str, str], changed: set[str]
) -> None:
    plain = step_of(run_ranks, write_chip(tmp_path, "round"))
    other = step_of(run_ranks, write_chip(tmp_path, "other", change))
    assert {name for name, ps in other.items() if ps != plain[name]} == changed


def step_of(run_ranks: Run, chip: str) -> dict[str, int]:
    first, second = run_ranks(parts_of_a_step, 2, env={"HXCOMM_SIM": chip})
    assert first == second
    return dict(first)


PROGRAM = """
import torch
import torch.distributed as dist

dist.init_process_group("hxcomm")
dist.all_reduce(torch.ones(8, device="hx"))
dist.destroy_process_group()
"""


def test_a_program_that_reports_nothing_is_told_once_when_it_ends(run_ranks: Run, chip: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    first, second = run_ranks(program, 2, env={"HXCOMM_SIM": chip})
    assert "predicted for 2 simulated chips round" in first
    assert "chip 0" in first
    assert second == ""


# --- which algorithm runs ---


def chosen(rank: int, world_size: int) -> tuple[str, set[str | None]]:
    import hxcomm

    asked: set[str | None] = set()

    def look(op: str, nbytes: int, dtype: str, layout: object, chip: str | None) -> None:
        asked.add(chip)

    hxcomm.register_selector(look)
    x = torch.full((64,), float(rank + 1), device="hx")
    dist.all_reduce(x)
    assert (x.cpu() == world_size * (world_size + 1) / 2).all()
    dist.all_reduce(torch.ones(8))
    (used,) = {row["algorithm"] for row in hxcomm.statistics() if row["memory"] == "mapped"}
    return used, asked


def test_the_chip_chooses_for_its_tensors_and_selectors_hear_its_name(run_ranks: Run, chip: str) -> None:
    from hxcomm.sim.choosing import choose

    expected = choose("all_reduce", 256, chips.load(chip), interconnect(chips.load(chip), 4), itemsize=4)
    assert run_ranks(chosen, 4, env={"HXCOMM_SIM": chip}) == [(expected.algorithm, {"round"})] * 4


# --- what is refused ---


def group(rank: int, world_size: int, of_rank: dict[int, dict[str, str]]) -> None:
    os.environ.update(of_rank.get(rank, {}))
    dist.init_process_group("hxcomm")


@pytest.mark.parametrize(
    ("variables", "error", "said"),
    [
        ({"HXCOMM_SIM": "lpv"}, "ChipError", "lpv"),
        ({"HXCOMM_ALGO": "all_reduce:one_shot"}, "ValueError", "neighbours_only"),
        ({"HXCOMM_SIM_COSTS": "table:nowhere.csv"}, "CostError", "nowhere.csv"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_anything_runs(
    run_ranks: Run, chip: str, variables: dict[str, str], error: str, said: str
) -> None:
    env = {"HXCOMM_SIM": chip, **variables}
    for each in run_ranks(group, 4, {}, backend=None, env=env, expect=dict.fromkeys(range(4), error)):
        assert said in each.message


@pytest.mark.parametrize("variables", [{"HXCOMM_SIM": ""}, {"HXCOMM_SIM": "lpu"}])
def test_ranks_that_simulate_different_chips_make_no_group(
    run_ranks: Run, chip: str, variables: dict[str, str]
) -> None:
    env, expect = {"HXCOMM_SIM": chip}, dict.fromkeys(range(2), "InitError")
    for each in run_ranks(group, 2, {1: variables}, backend=None, env=env, expect=expect):
        assert "simulating round" in each.message


def test_ranks_on_several_hosts_tell_no_virtual_time(run_ranks: Run, chip: str) -> None:
    env, expect = {"HXCOMM_SIM": chip, "HXCOMM_INSECURE": "1"}, dict.fromkeys(range(2), "InitError")
    for each in run_ranks(group, 2, {1: {"HXCOMM_HOST_ID": "b"}}, backend=None, env=env, expect=expect):
        assert "2 hosts" in each.message


def part_of_the_ring(rank: int, world_size: int) -> tuple[int, str]:
    from hxcomm import virtual

    beside, apart = dist.new_group([1, 2]), ""
    if rank in (1, 2):
        before = virtual.now_ps()
        dist.all_reduce(torch.ones(250, device="hx"), group=beside)
        took = virtual.now_ps() - before
    try:
        dist.new_group([0, 2])
    except ValueError as error:
        apart = str(error)
    return (took if rank in (1, 2) else 0), apart


def test_a_group_of_neighbours_is_timed_and_one_with_gaps_is_refused(run_ranks: Run, chip: str) -> None:
    found = run_ranks(part_of_the_ring, 4, env={"HXCOMM_SIM": chip})
    assert found[1][0] == found[2][0] > 1 * US
    assert "side by side" in found[0][1] and "side by side" in found[2][1]
    assert found[1][1] == found[3][1] == ""
