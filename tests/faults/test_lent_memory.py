"""Tensors of device hx in a collective that failed: a peer that comes back must not write into anybody's new tensor."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hxcomm

Run = Callable[..., list[Any]]
COUNT = 50_000
NEVER = timedelta(seconds=600)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] == "T"


def memory() -> int:
    return torch.hx.memory_allocated()


def fail_beside(pid: int) -> int:
    """An all_reduce in which the peer is stopped, aborted here. Where its tensor, which nobody has any more, lay."""
    tensor = torch.full((COUNT,), 1, dtype=torch.int64, device="hx")
    work = dist.all_reduce(tensor, async_op=True)
    while not is_stopped(pid):
        os.sched_yield()
    dist.distributed_c10d._get_default_group().abort()
    with pytest.raises(hxcomm.AbortedError):
        work.wait()
    return tensor.data_ptr()


def outlive_a_late_store(rank: int, world_size: int, point: str) -> dict[str, Any]:
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if rank == 1:
        os.environ["HXCOMM_FAILPOINT"] = f"{point}@1=stop"
    dist.init_process_group("hxcomm", store=store, rank=rank, world_size=world_size, timeout=NEVER)
    before = memory()
    if rank == 1:
        store.set("pid", str(os.getpid()))
        tensor = torch.full((COUNT,), 2, dtype=torch.int64, device="hx")
        with pytest.raises(hxcomm.AbortedError):
            dist.all_reduce(tensor)
        store.set("resumed", "")
        store.wait(["looked"])
        dist.destroy_process_group()
        store.set("left", "")
        return {}
    pid = int(store.get("pid"))
    lost = fail_beside(pid)
    fresh = [torch.full((COUNT,), 7, dtype=torch.int64, device="hx") for _ in range(4)]
    reused = lost in [each.data_ptr() for each in fresh]
    os.kill(pid, signal.SIGCONT)
    store.wait(["resumed"])
    untouched = all(bool((each == 7).all()) for each in fresh)
    kept = memory() - before - 4 * 8 * COUNT
    del fresh
    store.set("looked", "")
    store.wait(["left"])
    dist.destroy_process_group()
    return {"reused": reused, "untouched": untouched, "kept": kept, "after": memory() - before}


@pytest.mark.parametrize("point", ["judged", "transfer"])
def test_memory_lent_to_a_failed_collective_is_kept_until_the_peer_has_left(run_ranks: Run, point: str) -> None:
    found = run_ranks(outlive_a_late_store, 2, point, backend=None)[0]
    assert found["untouched"] and not found["reused"]
    assert found["kept"] >= 8 * COUNT, "the tensor's memory was given back while a peer could still write there"
    assert found["after"] == 0


def abort_a_message(rank: int, world_size: int, then: str) -> dict[str, int]:
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    before = memory()
    if rank == 0:
        work = dist.isend(torch.ones(COUNT, device="hx"), 1)
        assert work is not None
        dist.distributed_c10d._get_default_group().abort()
        with pytest.raises(hxcomm.AbortedError):
            work.wait()
        del work
        kept = memory() - before
        store.set("looked", "")
        store.wait(["left"])
        if then == "destroy":
            dist.destroy_process_group()
        elif then == "empty_cache":
            torch.hx.empty_cache()
        else:  # all of the chip's memory
            torch.empty(torch.hx.mem_get_info()[1], dtype=torch.uint8, device="hx")
        return {"kept": kept, "after": memory() - before, "ooms": torch.hx.memory_stats()["num_ooms"]}
    with pytest.raises(hxcomm.AbortedError):
        dist.recv(torch.ones(COUNT, device="hx"), 0, tag=1)  # no such message comes
    store.wait(["looked"])
    dist.destroy_process_group()
    store.set("left", "")
    return {}


@pytest.mark.parametrize("then", ["destroy", "empty_cache", "allocate"])
def test_memory_of_a_message_that_failed_is_kept_until_the_peer_has_left(run_ranks: Run, then: str) -> None:
    found = run_ranks(abort_a_message, 2, then)[0]
    assert found["kept"] >= 4 * COUNT
    assert found["after"] == 0
    assert found["ooms"] == 0
