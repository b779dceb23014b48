"""Ranks that die, leave or are interrupted: every survivor raises the right error, soon, and nothing is left behind."""

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

# Longer than any test may take: an error that comes at all did not come from a timeout.
NEVER = timedelta(seconds=600)

Run = Callable[..., list[Any]]
Pool = Callable[[int], Any]


def master_store() -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def through_future() -> None:
    """Nobody drives: the background thread does, and must find out."""
    dist.all_reduce(torch.ones(1000), async_op=True).get_future().wait()


def third_of_three() -> None:
    works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(3)]
    works[2].wait()


WAYS: dict[str, Callable[[], Any]] = {
    "sync": lambda: dist.all_reduce(torch.ones(1000)),
    "async": lambda: dist.all_reduce(torch.ones(300_000), async_op=True).wait(),
    "future": through_future,
    "barrier": dist.barrier,
    "outstanding": third_of_three,
}


def die_one_by_one(rank: int, world_size: int) -> list[tuple[str, str, int]]:
    """The last rank is killed while the others call; these make a new group, and so on. What rank 0 to n-2 raised."""
    raised = []
    store = master_store()
    for turn, way in enumerate(WAYS.values()):
        n = world_size - turn
        dist.init_process_group(
            "hxcomm", store=dist.PrefixStore(str(turn), store), rank=rank, world_size=n, timeout=NEVER
        )
        pids: list[Any] = [None] * n
        dist.all_gather_object(pids, os.getpid())
        if rank == n - 1:
            store.wait([f"{turn}/{r}" for r in range(n - 1)])
            os.kill(os.getpid(), signal.SIGKILL)
        store.set(f"{turn}/{rank}", "about to call")
        try:
            way()
        except Exception as error:
            raised.append((type(error).__name__, str(error), pids[n - 1]))
        dist.destroy_process_group()
    return raised


@pytest.mark.parametrize("spin_us", ["0", "auto", "1000000"])
def test_survivors_raise_peer_failed_naming_rank_pid_and_signal(run_ranks: Run, spin_us: str) -> None:
    n = len(WAYS) + 1
    expect = dict.fromkeys(range(1, n), signal.SIGKILL)
    survivor = run_ranks(die_one_by_one, n, backend=None, env={"HXCOMM_SPIN_US": spin_us}, expect=expect)[0]
    assert len(survivor) == len(WAYS)
    for turn, (kind, message, pid) in enumerate(survivor):
        assert kind == "PeerFailedError", f"{list(WAYS)[turn]}: {kind}: {message}"
        assert f"rank {n - 1 - turn} (host " in message and f"pid {pid})" in message and "SIGKILL" in message


def exit_in_the_middle(rank: int, world_size: int) -> str:
    dist.barrier()
    if rank == 1:
        os._exit(3)
    try:
        dist.all_reduce(torch.ones(10))
    except dist.DistBackendError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_an_exit_is_reported_with_its_status(run_ranks: Run) -> None:
    results = run_ranks(exit_in_the_middle, 2, op_timeout_s=600, expect={1: 3})
    assert results[0].startswith("PeerFailedError") and "exited with status 3" in results[0], results[0]


# --- leftovers ---


def write_and_die(rank: int, world_size: int, folder: str) -> None:
    from hxcomm import bootstrap

    dist.all_reduce(torch.ones(1 << 20))
    (Path(folder) / str(rank)).write_text(f"{os.getpid()} {bootstrap.runtime().address}")
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_is_left_behind_when_every_rank_is_killed(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(write_and_die, 3, str(tmp_path), expect=dict.fromkeys(range(3), signal.SIGKILL))
    sockets = Path("/proc/net/unix").read_text()
    for rank in range(3):
        pid, address = (tmp_path / str(rank)).read_text().split()
        assert address not in sockets
        assert not Path(f"/proc/{pid}").exists()
    shm = Path("/dev/shm")
    assert not shm.exists() or not [file for file in shm.iterdir() if "hxcomm" in file.name]


def usage() -> dict[str, int]:
    from hxcomm import bootstrap

    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "mappings": Path("/proc/self/maps").read_text().count("memfd:hxcomm"),
        "shared bytes": bootstrap.runtime().allocated_bytes,
    }


def create_and_destroy(rank: int, world_size: int) -> tuple[dict[str, int], dict[str, int]]:
    store = master_store()
    seen = []
    for turn in range(22):
        prefixed = dist.PrefixStore(f"turn {turn}", store)
        dist.init_process_group("hxcomm", store=prefixed, rank=rank, world_size=world_size, timeout=NEVER)
        part = dist.new_group([0, 1])
        for group in (None, part):
            dist.all_reduce(torch.ones(100_000), group=group)
            dist.all_reduce(torch.ones(1000), group=group, async_op=True).wait()
        seen.append(usage())
        dist.destroy_process_group()
        store.set(f"{turn}/{rank}", "")
        store.wait([f"{turn}/{r}" for r in range(world_size)])  # so all have left when the next group looks for memory
        del prefixed
    return seen[1], seen[-1]


def test_descriptors_threads_and_memory_return_to_their_baseline(rank_pool: Pool) -> None:
    for early, late in rank_pool(2).run(create_and_destroy, backend=None):
        assert early == late


# --- fork ---


def use_group_in_a_forked_child(rank: int, world_size: int) -> str:
    dist.all_reduce(torch.ones(10))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        text = "nothing was raised"
        for call in (lambda: dist.all_reduce(torch.ones(10)), lambda: dist.all_reduce(torch.ones(10), async_op=True)):
            try:
                call()
                text = "nothing was raised"
                break
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    tensor = torch.full((10,), float(rank))
    dist.all_reduce(tensor)  # the parent's group is unharmed
    assert tensor[0] == sum(range(world_size))
    return text


def test_a_forked_child_that_uses_the_group_gets_an_error(rank_pool: Pool) -> None:
    for text in rank_pool(2).run(use_group_in_a_forked_child):
        assert "belongs to the parent of this forked process" in text


# --- Ctrl-C ---


def blocked_in_a_futex(pid: int) -> None:
    """Returns when the main thread of a process sleeps on a futex, as a rank does that waits for its peers."""
    while not Path(f"/proc/{pid}/syscall").read_text().startswith("202 "):
        os.sched_yield()


def interrupted(rank: int, world_size: int, how: str) -> str:
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["pid"])
        pid = int(store.get("pid"))
        blocked_in_a_futex(pid)
        os.kill(pid, signal.SIGINT)
    else:
        store.set("pid", str(os.getpid()))
    try:
        if rank == 1:
            store.wait(["interrupted"])  # then the group is closed here, too
            dist.all_reduce(torch.ones(10))
        elif how == "sync":
            dist.all_reduce(torch.ones(10))
        else:
            dist.all_reduce(torch.ones(10), async_op=True).wait()
    except BaseException as error:
        store.set("interrupted", "")
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize("how", ["sync", "async"])
def test_ctrl_c_ends_a_blocked_call(rank_pool: Pool, how: str) -> None:
    texts = rank_pool(2).run(interrupted, how, op_timeout_s=600)
    assert texts[0].startswith("KeyboardInterrupt")
    assert texts[1].startswith("AbortedError") and "rank 0" in texts[1] and "interrupted" in texts[1]
