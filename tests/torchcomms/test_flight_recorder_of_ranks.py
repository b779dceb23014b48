"""The recorder in programs of several ranks: their files, read by torch's own tool, also after a death."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recorded_calls import run_fr_trace

import hxcomm.torchcomms as torchcomms
from hxcomm.errors import CommTimeoutError, PeerFailedError
from hxcomm.torchcomms.hooks import FlightRecorderHook


def record_over_a_shrink(rank: int, n: int, folder: str) -> None:
    os.environ["TORCHCOMM_FR_DUMP_TEMP_FILE"] = f"{folder}/at the death/trace_"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    comm = torchcomms.new_comm(
        "hxcomm", "cpu", "world", abort_process_on_timeout_or_error=False, store=store, enable_reconfigure=True
    )
    recorder = FlightRecorderHook(isolated=True)
    recorder.register_with_comm(comm)
    store.set(f"handle/{rank}", comm.get_init_handle())
    handles = [store.get(f"handle/{each}").decode() for each in range(n)]
    comm.reconfigure(1, handles).wait()
    comm.all_reduce(torch.ones(4), torchcomms.ReduceOp.SUM, async_op=False)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerFailedError):
        comm.barrier(async_op=False)
    comm.reconfigure(2, handles[1:]).wait()
    comm.broadcast(torch.ones(4), 0, async_op=False)
    os.environ["TORCHCOMM_FR_DUMP_TEMP_FILE"] = f"{folder}/afterwards/trace_"
    recorder.dump_file(comm.get_rank())
    assert [entry["operation"] for entry in json.loads(recorder.dump_json())["entries"]] == [
        "all_reduce",
        "barrier",
        "broadcast",
    ]


def test_the_file_of_survivors_is_of_their_new_group_and_the_one_of_the_death_of_the_old(
    run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    run_ranks(record_over_a_shrink, 3, str(tmp_path), backend=None, expect={0: signal.SIGKILL})
    assert sorted(path.name for path in (tmp_path / "at the death").iterdir()) == ["trace_1", "trace_2"]
    (tmp_path / "result").mkdir()
    database, printed = run_fr_trace(tmp_path / "afterwards", tmp_path / "result" / "database")
    assert [(each.collective_name, each.pass_check) for each in database.collectives] == [("gloo:broadcast", True)]
    assert [(group.size, group.desc) for group in database.groups] == [(2, "hxcomm")], printed


def record_on_ranks(rank: int, n: int, folder: str, desynchronised: bool) -> None:
    comm = torchcomms.new_comm("hxcomm", "cpu", "world", abort_process_on_timeout_or_error=False)
    recorder = FlightRecorderHook(isolated=True)
    recorder.register_with_comm(comm)
    total = torch.ones(4)
    comm.all_reduce(total, torchcomms.ReduceOp.SUM, async_op=False)
    batch = comm.batch_op_create()
    batch.recv(torch.empty(2), (rank - 1) % n)
    batch.send(torch.ones(2), (rank + 1) % n)
    batch.issue(async_op=True)  # the work is dropped
    pair = comm.split([1, 0], "pair")
    if pair is not None:
        pair.broadcast(total, 0, async_op=True).wait()
    comm.barrier(async_op=False)
    if desynchronised and rank != 1:
        with pytest.raises(CommTimeoutError):
            comm.all_reduce(total, torchcomms.ReduceOp.SUM, async_op=False, timeout=timedelta(seconds=1))
    os.environ["TORCHCOMM_FR_DUMP_TEMP_FILE"] = f"{folder}/trace_"
    recorder.dump_file(rank)


@pytest.mark.parametrize("desynchronised", [False, True], ids=["in step", "one rank missing"])
def test_real_ranks_leave_files_that_the_tool_reads(
    rank_pool: Callable[[int], Any], tmp_path: Path, desynchronised: bool
) -> None:
    rank_pool(3).run(record_on_ranks, str(tmp_path), desynchronised, backend=None)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    printed = run.stdout + run.stderr
    assert run.returncode == 0, printed
    if desynchronised:
        assert "Not all ranks joining collective, sequence number: 3" in printed
        assert "missing ranks: {1}" in printed and "collective: gloo:all_reduce" in printed
    else:
        assert "Not all ranks" not in printed and "errors" not in printed and "ulprit" not in printed


def dump_when_a_peer_dies(rank: int, n: int, folder: str) -> None:
    os.environ["TORCHCOMM_FR_DUMP_TEMP_FILE"] = f"{folder}/trace_"
    comm = torchcomms.new_comm("hxcomm", "cpu", "world")
    FlightRecorderHook().register_with_comm(comm)
    comm.barrier(async_op=False)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_reduce(torch.ones(4), torchcomms.ReduceOp.SUM, async_op=False)


def test_a_process_that_an_error_ends_leaves_its_record_behind(
    run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    run_ranks(
        dump_when_a_peer_dies,
        2,
        str(tmp_path),
        backend=None,
        expect={0: signal.SIGABRT, 1: signal.SIGKILL},
    )
    entries = pickle.loads((tmp_path / "trace_0").read_bytes())["entries"]
    assert [(entry["operation"], entry["state"]) for entry in entries] == [
        ("barrier", "completed"),
        ("all_reduce", "scheduled"),
    ]
