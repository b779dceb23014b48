"""generate.py on simulated chips: the same tokens, a prediction that is the same each time, and the trace of it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chip_file import write_chip

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "tp_decode"))

import generate  # noqa: E402

Run = Callable[..., list[Any]]
TOKENS = 6
ARGUMENTS = ("--random", "15M", "--device", "hx", "--ignore-eos", "--threads", "1", "--max-new-tokens", str(TOKENS))


def on_rank(rank: int, world_size: int, *arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = generate.main(arguments)
    return status, out.getvalue(), err.getvalue()


def decoded(run_ranks: Run, world_size: int, *arguments: str, **env: str) -> dict[str, Any]:
    found = run_ranks(on_rank, world_size, *ARGUMENTS, "--json", *arguments, backend=None, env=env)
    assert [status for status, _, _ in found] == [0] * world_size, found
    return dict(json.loads(found[0][1]))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_tokens_are_those_of_a_run_without_a_chip_and_two_runs_predict_the_same(
    run_ranks: Run, world_size: int
) -> None:
    plain = decoded(run_ranks, world_size)
    first = decoded(run_ranks, world_size, HXCOMM_SIM="lpu")
    again = decoded(run_ranks, world_size, "--simulate", "lpu")
    assert plain["token_ids"] == first["token_ids"] == again["token_ids"]
    simulated = first["simulated"]
    assert simulated.pop("wall_ms_per_step") > 0
    assert again["simulated"].pop("wall_ms_per_step") > 0
    assert simulated == again["simulated"]
    assert simulated["steps"] == TOKENS - 1
    for region in (simulated["parts_ms"], *simulated["regions_ms"].values()):
        sums = region["weights"] + region["kv_cache"] + region["other"] + region["exposed"]
        assert sums == pytest.approx(region["total"], rel=1e-12)
    assert {"embedding", "layer 0", "head"} <= set(simulated["regions_ms"])
    assert world_size == 1 or simulated["parts_ms"]["exposed"] > 0


def test_chunks_that_travel_leave_the_tokens_and_are_seen(run_ranks: Run) -> None:
    plain = decoded(run_ranks, 2, HXCOMM_SIM="lpu")
    overlapped = decoded(run_ranks, 2, "--overlap", "3", HXCOMM_SIM="lpu")
    assert plain["token_ids"] == overlapped["token_ids"]
    assert plain["simulated"]["parts_ms"]["hidden"] == 0
    assert overlapped["simulated"]["parts_ms"]["hidden"] > 0


def test_a_trace_and_pictures_of_both_clocks_and_all_links_are_left(run_ranks: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    decoded(run_ranks, 2, HXCOMM_SIM=write_chip(tmp_path, "round"), HXCOMM_SIM_OUT=str(out))
    assert {path.name for path in out.iterdir()} == {"trace.json", "ring.png", "timeline.png"}
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert lanes == {"ops", "collectives", "link 0->1", "link 1->0"}
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {f"{clock} time, rank {rank}" for clock in ("virtual", "real") for rank in range(2)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--simulate", "lpv"), "--simulate: "),
        (("--simulate", "lpu", "--device", "cpu"), "add --device hx"),
        (("--overlap", "0"), "--overlap 0: must be at least 1"),
    ],
)
def test_what_cannot_be_simulated_is_said_once(run_ranks: Run, arguments: tuple[str, ...], said: str) -> None:
    (found,) = run_ranks(on_rank, 1, *ARGUMENTS, *arguments, backend=None)
    status, _, err = found
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1
