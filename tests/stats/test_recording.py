"""HXCOMM_STATS: the files hold exactly what the collectives did, however the process ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hxcomm import inspection

Run = Callable[..., list[Any]]
LATER_S = 1e6  # so that only the end of a process writes
APART_NS = 20_000_000
THREE = (3, 12000)  # all_reduces of 1000 floats, as all_reduces() tells them


def records(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return sorted(found, key=lambda record: int(record["rank"]))


def counts(record: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes by op and dtype, over all groups."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for row in record["rows"]:
        calls, nbytes = found.get((row["op"], row["dtype"]), (0, 0))
        found[row["op"], row["dtype"]] = (calls + row["calls"], nbytes + row["nbytes"])
    return found


def all_reduces(record: dict[str, Any]) -> tuple[int, int] | None:
    return counts(record).get(("all_reduce", "float32"))


def use_two_groups(rank: int, world_size: int) -> None:
    for _ in range(5):
        dist.all_reduce(torch.ones(1000))
    dist.broadcast(torch.ones(10, dtype=torch.int64), src=0)
    store = dist.PrefixStore("again", dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    dist.init_process_group("hxcomm", store=store, rank=rank, world_size=world_size)
    dist.all_reduce(torch.ones(24))
    if rank == 0:
        dist.send(torch.ones(16), dst=1)
    else:
        dist.recv(torch.empty(16), src=0)
    dist.destroy_process_group()


def test_each_rank_leaves_exact_counts_of_all_its_groups_ended_ones_too(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(use_two_groups, 2, backend="hxcomm", env={"HXCOMM_STATS": str(tmp_path)})
    both = records(tmp_path)
    assert [(record["rank"], record["world_size"]) for record in both] == [(0, 2), (1, 2)]
    assert both[0]["job"] == both[1]["job"]
    for record, message in zip(both, ("send", "recv"), strict=True):
        assert counts(record) == {
            ("all_reduce", "float32"): (6, 20096),
            ("broadcast", "int64"): (1, 80),
            (message, "float32"): (1, 64),
        }
        assert all(row["moving_ns"] > 0 for row in record["rows"] if row["op"] != message)
    assert not list(tmp_path.glob("*.partial"))


def come_later(rank: int, world_size: int) -> int:
    """Rank 1 calls once rank 0 has waited for it for a while. Returns how long that was; rank 0, how long it says."""
    import hxcomm

    apart_ns = 0
    if rank == 1:
        others = dist.distributed_c10d._get_default_store()
        pid = int(others.get("pid of rank 0"))
        while not any(view.sequence == 1 for view in inspection.ranks_of(pid)):
            pass
        seen_ns = time.monotonic_ns()
        while (apart_ns := time.monotonic_ns() - seen_ns) < APART_NS:
            pass
    else:
        dist.distributed_c10d._get_default_store().set("pid of rank 0", str(os.getpid()))
    dist.all_reduce(torch.ones(8))
    [row] = hxcomm.statistics()
    assert row["waiting_ns"] <= row["time_ns"]
    return row["waiting_ns"] if rank == 0 else apart_ns


def test_time_waiting_is_at_least_what_a_peer_came_later(run_ranks: Run, tmp_path: Path) -> None:
    waited_ns, apart_ns = run_ranks(come_later, 2, backend="hxcomm", env={"HXCOMM_STATS": str(tmp_path)})
    assert waited_ns >= apart_ns >= APART_NS


def end_by(rank: int, world_size: int, number: int, folder: str) -> None:
    from hxcomm.stats import recording

    recording.PERIOD_S = LATER_S if number == signal.SIGTERM else 0.001
    dist.init_process_group("hxcomm")
    for _ in range(3):
        dist.all_reduce(torch.ones(1000))
    while number == signal.SIGKILL and [*map(all_reduces, records(Path(folder)))] != [THREE] * world_size:
        pass
    dist.barrier()
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_done_is_in_the_file_of_a_rank_that_is_killed(
    number: signal.Signals, run_ranks: Run, tmp_path: Path
) -> None:
    variables = {"HXCOMM_STATS": str(tmp_path)}
    killed = dict.fromkeys(range(2), number)
    run_ranks(end_by, 2, int(number), str(tmp_path), backend=None, env=variables, expect=killed)
    assert [*map(all_reduces, records(tmp_path))] == [THREE] * 2


def alone(store: Any = None) -> None:
    dist.init_process_group("hxcomm", store=store or dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(10))


def fork_a_worker(rank: int, world_size: int) -> int:
    from hxcomm.stats import recording

    recording.PERIOD_S = LATER_S
    worker = multiprocessing.get_context("fork").Process(target=alone)
    worker.start()
    worker.join()
    assert worker.pid is not None and worker.exitcode == 0
    return worker.pid


def test_a_worker_that_multiprocessing_forked_leaves_its_file(run_ranks: Run, tmp_path: Path) -> None:
    [pid] = run_ranks(fork_a_worker, 1, backend=None, env={"HXCOMM_STATS": str(tmp_path)})
    [record] = records(tmp_path)
    assert (record["pid"], counts(record)) == (pid, {("all_reduce", "float32"): (1, 40)})


def keep_own_handler(rank: int, world_size: int) -> bool:
    def own(number: int, frame: object) -> None:
        pass

    signal.signal(signal.SIGTERM, own)
    alone()
    return signal.getsignal(signal.SIGTERM) is own


def test_a_programs_own_handler_of_sigterm_stays(run_ranks: Run, tmp_path: Path) -> None:
    assert run_ranks(keep_own_handler, 1, backend=None, env={"HXCOMM_STATS": str(tmp_path)}) == [True]


def lose_the_folder(rank: int, world_size: int, folder: str) -> list[str]:
    import warnings

    from hxcomm.stats import recording

    recording.PERIOD_S = LATER_S
    alone()
    Path(folder).rmdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert recording._recorder is not None
        recording._recorder.write()
        recording._recorder.write()
    return [str(each.message) for each in caught]


def test_a_folder_that_goes_away_is_one_warning(run_ranks: Run, tmp_path: Path) -> None:
    (folder := tmp_path / "stats").mkdir()
    [messages] = run_ranks(lose_the_folder, 1, str(folder), backend=None, env={"HXCOMM_STATS": str(folder)})
    assert len(messages) == 1
    assert messages[0].startswith("HXCOMM_STATS: ") and "cannot be written: [Errno 2]" in messages[0]


def look_at_a_process_without(rank: int, world_size: int) -> tuple[bool, list[str], int]:
    import hxcomm

    alone()
    [row] = hxcomm.statistics()
    return "hxcomm.stats" in sys.modules, [thread.name for thread in threading.enumerate()], row["waiting_ns"]


def test_without_the_variable_nothing_is_recorded(run_ranks: Run) -> None:
    [(imported, threads, waiting_ns)] = run_ranks(look_at_a_process_without, 1, backend=None)
    assert (imported, waiting_ns) == (False, 0)
    assert "hxcomm-stats" not in threads
