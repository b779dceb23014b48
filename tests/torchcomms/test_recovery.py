"""Abort, shrink and grow: communicators that get a new group of survivors and newcomers, and never a stale one."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hxcomm
import hxcomm.torchcomms as torchcomms
from hxcomm import bootstrap, inspection
from hxcomm.torchcomms import recovery

Run = Callable[..., list[Any]]
NEVER = timedelta(seconds=600)
SUM = torchcomms.ReduceOp.SUM


class Process:
    """One rank's process: its store, its communicator, and the handles that all have left in the store."""

    def __init__(self, number: int, **options: Any) -> None:
        self.number = number
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        settings = {"device": "cpu", "timeout": NEVER, "abort_process_on_timeout_or_error": False, **options}
        self.comm = torchcomms.new_comm("hxcomm", name="c", store=self.store, enable_reconfigure=True, **settings)
        self.store.set(f"handle/{number}", self.comm.get_init_handle())

    def handles(self, *numbers: int) -> list[str]:
        return [self.store.get(f"handle/{number}").decode() for number in numbers]

    def reconfigure(self, uuid: int, *numbers: int, timeout: timedelta | None = None) -> None:
        self.comm.reconfigure(uuid, self.handles(*numbers), timeout).wait()

    def total(self) -> float:
        """The sum of 10, 11, ... of the processes of the group."""
        tensor = torch.tensor([10.0 + self.number])
        self.comm.all_reduce(tensor, SUM, False)
        return tensor.item()

    def meet(self, what: str, count: int) -> None:
        """Waits, in the store, until so many processes have come to this point."""
        if self.store.add(what, 1) == count:
            self.store.set(f"{what}/all", "")
        self.store.wait([f"{what}/all"])


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] == "T"


# --- the group that is made -------------------------------------------------------------------------------------------


def order_of(rank: int, world_size: int) -> dict[str, Any]:
    process = Process(rank)
    before = process.comm.get_rank(), process.comm.get_size()
    process.reconfigure(7, 2, 0, 1)
    gathered = torch.empty(3)
    process.comm.all_gather_single(gathered, torch.tensor([float(rank)]), False)
    listed = process.comm.get_rank(), process.comm.get_size(), gathered.tolist()
    process.comm.reconfigure(8, set(process.handles(0, 1, 2))).wait()
    process.comm.all_gather_single(gathered, torch.tensor([float(rank)]), False)
    unordered = gathered.tolist()
    part = process.comm.split([2, 0], "pair")
    total = torch.tensor([10.0 + rank])
    if part is not None:
        part.all_reduce(total, SUM, False)
        part.finalize()
    process.comm.finalize()
    return {"before": before, "listed": listed, "unordered": unordered, "pair": total.item()}


def test_a_list_gives_the_order_of_ranks_and_a_set_one_that_all_agree_on(run_ranks: Run) -> None:
    found = run_ranks(order_of, 3, backend=None)
    assert [each["before"] for each in found] == [(-1, 0)] * 3
    assert [each["listed"] for each in found] == [(index, 3, [2, 0, 1]) for index in (1, 2, 0)]
    order = found[0]["unordered"]
    assert sorted(order) == [0, 1, 2] and all(each["unordered"] == order for each in found)
    pair = sum(10 + order[index] for index in (2, 0))
    assert [each["pair"] for each in found] == [pair if order.index(rank) != 1 else 10 + rank for rank in range(3)]


def shrink_and_grow(rank: int, world_size: int, victims: list[int]) -> list[Any]:
    """The victims are killed one after the other in a collective; the last process comes when they are gone."""
    process = Process(rank)
    members, newcomer = list(range(world_size - 1)), world_size - 1
    seen: list[Any] = []
    if rank != newcomer:
        process.reconfigure(1, *members)
        process.total()
    for uuid, victim in enumerate(victims, 2):
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank != newcomer:
            with pytest.raises(hxcomm.PeerFailedError, match="killed by SIGKILL") as caught:
                while True:
                    process.total()
            seen.append((caught.value.rank == members.index(victim), process.comm.is_aborted()))
            members.remove(victim)
            process.reconfigure(uuid, *members)
            seen.append(process.total())
    process.reconfigure(100, newcomer, *[number for number in range(newcomer) if number not in victims])
    return [*seen, process.comm.get_rank(), process.comm.get_size(), process.comm.is_aborted(), process.total()]


@pytest.mark.parametrize("victims", [[1], [3, 0]])
def test_survivors_go_on_in_a_smaller_group_and_a_newcomer_joins_them(run_ranks: Run, victims: list[int]) -> None:
    results = run_ranks(shrink_and_grow, 5, victims, backend=None, expect=dict.fromkeys(victims, signal.SIGKILL))
    left = [number for number in range(4) if number not in victims]
    gone = [sum(10 + each for each in range(4) if each not in victims[: n + 1]) for n in range(len(victims))]
    seen = [each for total in gone for each in ((True, True), total)]
    total = 14 + sum(10 + number for number in left)
    for index, number in enumerate(left):
        assert results[number] == [*seen, index + 1, len(left) + 1, False, total]
    assert results[4] == [0, len(left) + 1, False, total]


def go_on_without_the_store(rank: int, world_size: int) -> float:
    """Rank 0 holds the store that all communicate their handles by, and dies."""
    where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    first = dist.TCPStore(*where, is_master=False)
    if rank == 0:
        store = dist.TCPStore(where[0], 0, is_master=True, wait_for_workers=False)
        first.set("port", str(store.port))
    else:
        store = dist.TCPStore(where[0], int(first.get("port")), is_master=False)
    comm = torchcomms.new_comm(
        "hxcomm", "cpu", "c", store=store, enable_reconfigure=True, abort_process_on_timeout_or_error=False
    )
    store.set(f"handle/{rank}", comm.get_init_handle())
    handles = [store.get(f"handle/{each}").decode() for each in range(world_size)]
    comm.reconfigure(1, handles)
    comm.barrier(False)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(hxcomm.PeerFailedError):
        comm.barrier(False)
    comm.reconfigure(2, handles[1:])
    tensor = torch.tensor([10.0 + rank])
    comm.all_reduce(tensor, SUM, False)
    return tensor.item()


def test_survivors_of_one_host_need_no_store(run_ranks: Run) -> None:
    assert run_ranks(go_on_without_the_store, 3, backend=None, expect={0: signal.SIGKILL}) == [None, 23, 23]


def meet_in_the_store(rank: int, world_size: int) -> list[float]:
    os.environ["HXCOMM_HOST_ID"] = f"host {rank // 2}"
    process = Process(rank)
    process.reconfigure(1, 0, 1, 2)
    first = process.total()
    process.meet("done", 3)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(hxcomm.PeerFailedError):
        while True:
            process.total()
    process.reconfigure(2, 2, 1)
    return [first, process.comm.get_rank(), process.total()]


def test_processes_of_several_hosts_reconfigure_too(run_ranks: Run) -> None:
    env = {"HXCOMM_SECRET": "a secret of more than sixteen bytes"}
    found = run_ranks(meet_in_the_store, 3, backend=None, env=env, expect={0: signal.SIGKILL})
    assert found == [None, [33, 1, 23], [33, 0, 23]]


# --- abort ------------------------------------------------------------------------------------------------------------


def abort_and_go_on(rank: int, world_size: int) -> list[Any]:
    process = Process(rank)
    hooked: list[int] = []
    process.comm.register_abort_hook(lambda: hooked.append(1))
    process.reconfigure(1, 0, 1, 2)
    if rank < 2:
        work = process.comm.all_reduce(torch.ones(4), SUM, True)
        process.meet("posted", 2)
        if rank == 0:
            threading.Thread(target=process.comm.abort).start()
        with pytest.raises(hxcomm.AbortedError, match="rank 0"):
            work.wait()
    else:
        with pytest.raises(hxcomm.AbortedError, match="rank 0"):
            process.comm.recv(torch.ones(1), 0, False)  # nothing is sent
    with pytest.raises(hxcomm.AbortedError, match="only reconfigure"):
        process.comm.broadcast(torch.ones(1), 0, False)
    state = [process.comm.is_aborted(), process.comm.is_abort_supported(), sum(hooked)]
    process.comm.abort()
    process.reconfigure(2, 1, 2, 0)
    return [*state, process.comm.is_aborted(), sum(hooked), process.total()]


def test_abort_ends_what_is_pending_everywhere_and_the_same_ranks_go_on_after_reconfigure(run_ranks: Run) -> None:
    assert run_ranks(abort_and_go_on, 3, backend=None) == [[True, True, 1, False, 1, 33]] * 3


def abort_a_reconfigure(rank: int, world_size: int) -> list[Any]:
    process = Process(rank)
    if rank == 1:
        process.store.wait(["aborted"])
        process.reconfigure(2, 0, 1)
        return [process.total()]
    hooked: list[int] = []
    process.comm.register_abort_hook(lambda: hooked.append(1))
    handles = process.handles(0, 1)
    waiting = threading.Event()
    original = recovery._Attempt.death_of

    def death_of(self: recovery._Attempt, of: int) -> str:
        waiting.set()
        return original(self, of)

    recovery._Attempt.death_of = death_of  # type: ignore[method-assign]

    def end() -> None:
        waiting.wait()
        process.comm.abort()

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(hxcomm.AbortedError, match=r"rank 0 by abort\(\)"):
        process.comm.reconfigure(1, handles)
    thread.join()
    state = process.comm.is_aborted(), process.comm.get_rank(), sum(hooked)
    process.store.set("aborted", "")
    process.reconfigure(2, 0, 1)
    return [state, process.total()]


def test_abort_ends_a_reconfigure_that_waits_for_a_rank_that_does_not_come(run_ranks: Run) -> None:
    assert run_ranks(abort_a_reconfigure, 2, backend=None) == [[(True, -1, 1), 21], [21]]


# --- who is left out --------------------------------------------------------------------------------------------------


def leave_an_idle_rank_out(rank: int, world_size: int, how: str) -> Any:
    process = Process(rank)
    process.reconfigure(1, 0, 1, 2)
    process.total()
    if rank < 2:
        if how == "holds the GIL":
            process.store.wait(["held"])
        process.reconfigure(2, 0, 1)
        total = process.total()
        process.store.set("reconfigured", "")
        process.meet("end", 3)
        return total
    if how == "finalizes":
        process.comm.finalize()
        return process.meet("end", 3)
    if how == "holds the GIL":
        library = ctypes.PyDLL(None)  # keeps the GIL while it calls
        process.store.set("held", "")
        library.usleep(500_000)
    process.store.wait(["reconfigured"])
    with pytest.raises(hxcomm.AbortedError, match=r"rank [01] .* has reconfigured the communicator without this rank"):
        process.total()
    return process.meet("end", 3)


@pytest.mark.parametrize("how", ["waits in the store", "holds the GIL", "finalizes"])
def test_a_rank_that_is_left_out_need_do_nothing_and_is_told(run_ranks: Run, how: str) -> None:
    assert run_ranks(leave_an_idle_rank_out, 3, how, backend=None) == [21, 21, None]


def leave_a_stopped_rank_out(rank: int, world_size: int, fence: str) -> Any:
    os.environ["HXCOMM_FENCE"] = fence
    recovery._SILENCE_S = 0.3  # type: ignore[misc]
    if rank == 1:
        os.environ["HXCOMM_FAILPOINT"] = "transfer@1=stop"
    process = Process(rank, device="hx")
    process.reconfigure(1, 0, 1, 2)
    process.store.set(f"pid/{rank}", str(os.getpid()))
    tensor = torch.full((50_000,), rank, dtype=torch.int64, device="hx")
    if rank == 1:  # stopped in the middle of its stores
        with pytest.raises(hxcomm.AbortedError):
            process.comm.all_reduce(tensor, SUM, False)
        return process.store.set("resumed", "")
    pid = int(process.store.get("pid/1"))
    work = process.comm.all_reduce(tensor, SUM, True)
    while not is_stopped(pid):
        os.sched_yield()
    process.comm.abort()
    with pytest.raises(hxcomm.AbortedError):
        work.wait()
    if fence == "raise":
        with pytest.raises(hxcomm.InitError, match=rf"pid {pid}\) .* has not confirmed within .* HXCOMM_FENCE=kill"):
            process.reconfigure(2, 0, 2)
        process.meet("refused", 2)
        if rank == 0:
            os.kill(pid, signal.SIGCONT)
        process.store.wait(["resumed"])
    process.reconfigure(3, 0, 2)
    tensor.fill_(7)
    process.comm.all_reduce(tensor, SUM, False)
    return tensor.unique().tolist()


@pytest.mark.parametrize("fence", ["raise", "kill"])
def test_no_group_is_made_while_a_rank_that_is_left_out_may_still_write(run_ranks: Run, fence: str) -> None:
    expect = {1: signal.SIGKILL} if fence == "kill" else None
    assert run_ranks(leave_a_stopped_rank_out, 3, fence, backend=None, expect=expect) == [[14], None, [14]]


def leave_a_slow_rank_out(rank: int, world_size: int) -> Any:
    """Rank 1 pauses between the entry of an all_reduce and its stores to its peers."""
    if rank == 1:
        os.environ["HXCOMM_FAILPOINT"] = "judged@1=pause:1500"
    process = Process(rank, device="hx")
    process.reconfigure(1, 0, 1, 2)
    process.store.set(f"pid/{rank}", str(os.getpid()))
    tensor = torch.full((50_000,), rank, dtype=torch.int64, device="hx")
    if rank == 1:
        with pytest.raises(hxcomm.AbortedError):
            process.comm.all_reduce(tensor, SUM, False)
        return process.store.set("resumed", "")
    pid = int(process.store.get("pid/1"))
    work = process.comm.all_reduce(tensor, SUM, True)
    while not any(each.state == "running" for view in inspection.ranks_of(pid) for each in view.operations):
        os.sched_yield()
    process.comm.abort()
    with pytest.raises(hxcomm.AbortedError):
        work.wait()
    process.reconfigure(2, 0, 2)
    tensor.fill_(7)
    process.store.wait(["resumed"])
    return tensor.unique().tolist()


def test_a_group_is_made_once_a_slow_rank_that_is_left_out_has_done_its_last_store(run_ranks: Run) -> None:
    assert run_ranks(leave_a_slow_rank_out, 3, backend=None) == [[7], None, [7]]


# --- who does not come ------------------------------------------------------------------------------------------------


def wait_for_nobody(rank: int, world_size: int) -> Any:
    process = Process(rank)
    if rank == 2:
        process.meet("known", 3)
        os.kill(os.getpid(), signal.SIGKILL)
    handles = process.handles(0, 1, 2)
    process.meet("known", 3)
    with pytest.raises(hxcomm.InitError) as caught:
        process.comm.reconfigure(1, handles)
    process.reconfigure(2, 0, 1)
    return str(caught.value), process.total()


def test_a_member_that_has_ended_is_named_at_once(run_ranks: Run) -> None:
    first, second, _ = run_ranks(wait_for_nobody, 3, backend=None, expect={2: signal.SIGKILL})
    assert (first[1], second[1]) == (21, 21)
    texts = first[0], second[0]
    assert all("rank 2 (host" in text for text in texts), texts
    assert any("was killed by SIGKILL" in text or "has ended" in text for text in texts)


def wait_in_vain(rank: int, world_size: int) -> Any:
    process = Process(rank)
    handles = process.handles(0, 1)
    if rank == 0:
        with pytest.raises(hxcomm.InitError) as caught:
            process.comm.reconfigure(1, handles, timedelta(milliseconds=200))
        process.store.set("given up", "")
        return str(caught.value)
    process.store.wait(["given up"])
    with pytest.raises((hxcomm.InitError, hxcomm.PeerFailedError)):
        process.comm.reconfigure(1, handles)
        process.total()
    return None


def test_a_member_that_does_not_come_is_named_and_finds_no_stale_group_later(run_ranks: Run) -> None:
    text, _ = run_ranks(wait_in_vain, 2, backend=None)
    assert "rank 1 did not come within 0.2 s" in text


def disagree(rank: int, world_size: int, lists: list[list[int]]) -> Any:
    process = Process(rank)
    if rank == 0:
        third = torchcomms.new_comm("hxcomm", "cpu", "c", store=process.store, enable_reconfigure=True)
        process.store.set("handle/2", third.get_init_handle())
    with pytest.raises(hxcomm.InitError) as caught:
        process.reconfigure(1, *lists[rank])
    process.reconfigure(2, 0, 1)
    return str(caught.value), process.total()


@pytest.mark.parametrize("lists", [[[0, 1], [1, 0]], [[0, 1, 2], [0, 1]]])
def test_ranks_that_name_different_groups_under_one_uuid_all_raise(run_ranks: Run, lists: list[list[int]]) -> None:
    found = run_ranks(disagree, 2, lists, backend=None)
    assert [total for _, total in found] == [21, 21]
    assert all("with the same uuid, but other handles or another order of them" in text for text, _ in found)


# --- over and over ----------------------------------------------------------------------------------------------------


def resources() -> dict[str, int]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "segments": sum("memfd:hxcomm" in line for line in maps),
    }


def shrink_and_grow_often(rank: int, world_size: int, cycles: int) -> list[dict[str, int]]:
    """The last process leaves and comes back with a communicator of its own each time."""
    process = Process(rank)
    process.reconfigure(0, 0, 1, 2)
    seen = []
    for cycle in range(1, cycles + 1):
        process.total()
        if rank == 2:
            process.comm.finalize()
            process.comm = torchcomms.new_comm("hxcomm", "cpu", "c", store=process.store, enable_reconfigure=True)
            process.store.set(f"again/{cycle}", process.comm.get_init_handle())
        else:
            process.reconfigure(2 * cycle, 1, 0)
            assert process.total() == 21
        process.comm.reconfigure(2 * cycle + 1, [*process.handles(0, 1), process.store.get(f"again/{cycle}").decode()])
        assert process.total() == 33
        seen.append(resources() | {"segment": bootstrap.runtime().allocated_bytes})
    return seen


def test_groups_that_come_and_go_leave_nothing_behind(run_ranks: Run) -> None:
    for seen in run_ranks(shrink_and_grow_often, 3, 12, backend=None):
        # What a group had is given back once every peer has left it, at the latest when the next one is made.
        segment = [each.pop("segment") for each in seen]
        assert min(segment[6:]) <= min(segment[:6])
        assert seen[-1] == seen[4]
