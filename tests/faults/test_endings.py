"""Groups that are ended on purpose: abort() from any thread, destroy while a peer is stopped, and forks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hxcomm import inspection

Run = Callable[..., list[Any]]
Pool = Callable[[int], Any]

BLOCKED: dict[str, Callable[[], Any]] = {
    "sync": lambda: dist.all_reduce(torch.ones(1000)),
    "async": lambda: dist.all_reduce(torch.ones(300_000), async_op=True).wait(),
    "future": lambda: dist.all_reduce(torch.ones(1000), async_op=True).get_future().wait(),
    "recv": lambda: dist.recv(torch.ones(10), 1),
}


def blocked() -> None:
    """Returns when this process has called something that has not ended."""
    while not any(op.is_open for view in inspection.ranks_of(os.getpid()) for op in view.operations):
        os.sched_yield()


def outcome_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def ended_by_another_thread(rank: int, world_size: int, how: str, ending: str) -> str:
    """Rank 0 blocks in a call that rank 1 does not answer; a second thread of rank 0 ends the group."""
    store = dist.distributed_c10d._get_default_store()
    group = dist.distributed_c10d._get_default_group()
    if rank == 1:
        store.wait(["ended"])
        return outcome_of(lambda: dist.all_reduce(torch.ones(1000)))

    def end() -> None:
        blocked()
        group.abort() if ending == "abort" else group.shutdown()

    thread = threading.Thread(target=end)
    thread.start()
    text = outcome_of(BLOCKED[how])
    thread.join()
    store.set("ended", "")
    return text


@pytest.mark.parametrize("how", BLOCKED)
def test_abort_from_another_thread_releases_a_blocked_call(rank_pool: Pool, how: str) -> None:
    for text in rank_pool(2).run(ended_by_another_thread, how, "abort", op_timeout_s=600):
        assert text.startswith("AbortedError") and "rank 0 (host" in text and "abort() was called" in text, text


@pytest.mark.parametrize("how", ["sync", "recv"])
def test_destroying_a_group_releases_a_call_that_is_blocked_in_it(rank_pool: Pool, how: str) -> None:
    texts = rank_pool(2).run(ended_by_another_thread, how, "destroy", op_timeout_s=600)
    assert texts[0].startswith("AbortedError") and "has destroyed the group" in texts[0], texts[0]
    assert texts[1].startswith("PeerFailedError") and "rank 0 (host" in texts[1], texts[1]


def leave_a_stopped_peer(rank: int, world_size: int) -> str:
    dist.all_reduce(torch.ones(10))
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.set("pid", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        return outcome_of(lambda: dist.all_reduce(torch.ones(10)))
    store.wait(["pid"])
    pid = int(store.get("pid"))
    while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "T":
        os.sched_yield()
    dist.destroy_process_group()
    os.kill(pid, signal.SIGCONT)
    return "left"


def test_a_group_can_be_destroyed_while_a_peer_is_stopped(rank_pool: Pool) -> None:
    texts = rank_pool(2).run(leave_a_stopped_peer, op_timeout_s=600)
    assert texts[0] == "left"
    assert texts[1].startswith("PeerFailedError") and "rank 0 (host" in texts[1], texts[1]
    assert "has left the group" in texts[1]


# --- fork ---


def destroy_in_a_forked_child(rank: int, world_size: int) -> int:
    """The child ends what it has inherited in every way there is, and exits as a program does."""
    dist.all_reduce(torch.ones(10))
    work = dist.all_reduce(torch.ones(10), async_op=True)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        dist.distributed_c10d._get_default_group().abort()
        dist.destroy_process_group()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    work.wait()
    tensor = torch.full((10,), float(rank))
    dist.all_reduce(tensor)
    assert tensor[0] == sum(range(world_size))
    return status


def test_a_forked_child_that_ends_the_group_leaves_its_parents_unharmed(rank_pool: Pool) -> None:
    assert rank_pool(2).run(destroy_in_a_forked_child) == [0, 0]
