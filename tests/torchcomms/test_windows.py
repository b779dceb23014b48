"""Windows on one host: puts, signals, views of other ranks' tensors, and the memory that they need."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchcomms.windows import communicator, error_of, works, zeros

from hxcomm import bootstrap, torchcomms
from hxcomm.torchcomms import TorchCommWinAccessType

DEVICES = ("cpu", "hx")
UNIFIED = TorchCommWinAccessType.WIN_ACCESS_TYPE_UNIFIED
Pool = Callable[[int], Any]


# --- what it does ---


def put_round_and_round(
    rank: int, world_size: int, device: str, dtype: torch.dtype, count: int, async_op: bool
) -> list[list[int]]:
    """Each rank puts into the window of the next; what it found in its own in each of three rounds, first and last."""
    found = []
    with communicator(device, f"round {device} {dtype} {count} {async_op}") as comm:
        window = comm.new_window(zeros(comm, world_size, count, dtype=dtype))
        after, before = (rank + 1) % world_size, (rank - 1) % world_size
        for turn in range(3):
            given = torch.full((count,), 10 * rank + turn, dtype=dtype, device=device)
            work = window.put(given, after, rank * count, async_op)
            del given
            work.wait()
            window.signal(after, async_op).wait()
            window.wait_signal(before, async_op).wait()
            mine = window.map_remote_tensor(rank)
            assert mine.data_ptr() == window.get_tensor().data_ptr()
            found.append(mine[before].cpu()[[0, -1]].tolist() if count else [10 * before + turn] * 2)
            window.signal(before, async_op).wait()  # it may be overwritten
            window.wait_signal(after, async_op).wait()
        window.tensor_deregister()
        assert works(comm)
    return found


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.float32, 4), (torch.int8, 1_000_003), (torch.bfloat16, 1024), (torch.int32, 0)], ids=str
)
def test_what_was_put_is_there_once_its_signal_was_seen(
    rank_pool: Pool, device: str, dtype: torch.dtype, count: int, async_op: bool
) -> None:
    found = rank_pool(4).run(put_round_and_round, device, dtype, count, async_op)
    assert found == [[[10 * ((rank - 1) % 4) + turn] * 2 for turn in range(3)] for rank in range(4)]


def put_everywhere(rank: int, world_size: int, device: str) -> list[int]:
    """Every rank puts its number into every window, its own among them, three times over with strided inputs."""
    with communicator(device, f"everywhere {device}") as comm:
        window = comm.new_window(zeros(comm, world_size, 6, dtype=torch.int64))
        strided = torch.full((6, 2), rank + 1, dtype=torch.int64, device=device)[:, 0]
        for peer in range(world_size):
            window.put(strided[:2], peer, rank * 6, False)
            window.put(strided[:3].reshape(3, 1), peer, rank * 6 + 3, False)
            window.signal(peer, False)
        for peer in range(world_size):
            window.wait_signal(peer, False)
        found = window.get_tensor().cpu().flatten().tolist()
        window.tensor_deregister()
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_every_rank_puts_into_every_window(rank_pool: Pool, device: str) -> None:
    wanted = [number for rank in range(3) for number in [rank + 1] * 2 + [0] + [rank + 1] * 3]
    assert rank_pool(3).run(put_everywhere, device) == [wanted] * 3


def count_signals(rank: int, world_size: int) -> list[bool]:
    with communicator("cpu", "count") as comm:
        window = comm.new_window(zeros(comm, 4))
        other = 1 - rank
        seen = []
        if rank == 0:
            for _ in range(3):
                window.signal(other, False)
            comm.barrier(False)
            comm.barrier(False)
            window.signal(other, False)
        else:
            comm.barrier(False)
            waits = [window.wait_signal(other, True) for _ in range(4)]
            for wait in waits[:3]:
                wait.wait()
            seen = [wait.is_completed() for wait in waits]
            comm.barrier(False)
            waits[3].wait()
            seen.append(waits[3].is_completed())
        window.tensor_deregister()
    return seen


def test_each_wait_is_for_one_more_signal(rank_pool: Pool) -> None:
    assert rank_pool(2).run(count_signals)[1] == [True, True, True, False, True]


def signals_of_two_windows(rank: int, world_size: int) -> bool:
    with communicator("cpu", "two windows") as comm:
        first, second = comm.new_window(zeros(comm, 4)), comm.new_window(zeros(comm, 4))
        waiting = first.wait_signal(1 - rank, True)
        second.signal(1 - rank, False)
        second.wait_signal(1 - rank, False)
        comm.barrier(False)
        early = waiting.is_completed()
        comm.barrier(False)
        first.signal(1 - rank, False)
        waiting.wait()
        second.tensor_deregister()
        first.tensor_deregister()
    return early


def test_a_signal_belongs_to_its_window(rank_pool: Pool) -> None:
    assert rank_pool(2).run(signals_of_two_windows) == [False, False]


def look_at_each_other(rank: int, world_size: int, device: str) -> dict[str, Any]:
    with communicator(device, f"views {device}") as comm:
        mine = zeros(comm, rank + 2, 3, dtype=torch.int32)
        window = comm.new_window()
        before = window.get_size(), window.shape, window.get_tensor() is None
        window.tensor_register(mine)
        about = window.get_size(), window.shape, window.dtype, window.device.type
        other = 1 - rank
        view = window.map_remote_tensor(other)
        kinds = [window.get_attr(peer).access_type is UNIFIED for peer in range(world_size)]
        view[0, 1] = 7 + rank  # through the view, into the other's tensor
        view.add_(1)
        comm.barrier(False)
        seen = mine.cpu().tolist()
        mine[1, 2] = 40 + rank
        comm.barrier(False)
        through = view.cpu().tolist()
        total = int(view.sum())
        window.tensor_deregister()
        after = view.shape == (other + 2, 3), window.get_size(), window.get_tensor() is None
        del window, mine
        comm.barrier(False)
        int(view.sum())  # whatever is there now: it is mapped as long as the view lives
    return {
        "before": before,
        "about": about,
        "kinds": kinds,
        "seen": seen,
        "through": through,
        "total": total,
        "after": after,
    }


@pytest.mark.parametrize("device", DEVICES)
def test_a_mapped_tensor_is_the_other_ranks_memory(rank_pool: Pool, device: str) -> None:
    for rank, found in enumerate(rank_pool(2).run(look_at_each_other, device)):
        other = 1 - rank
        assert found["before"] == (0, [], True)
        assert found["about"] == (12 * (rank + 2), [rank + 2, 3], torch.int32, device)
        assert found["kinds"] == [True, True]
        wanted = [[[1] * 3 for _ in range(each + 2)] for each in (0, 1)]
        for each in (0, 1):
            wanted[each][0][1] = 8 + (1 - each)
        assert found["seen"] == wanted[rank]
        wanted[other][1][2] = 40 + other
        assert found["through"] == wanted[other] and found["total"] == sum(map(sum, wanted[other]))
        assert found["after"] == (True, 0, True)


def deregister_at_once(rank: int, world_size: int) -> list[int]:
    found = []
    with communicator("hx", "fence") as comm:
        for turn in range(20):
            mine = zeros(comm, 20_000, dtype=torch.int64)
            window = comm.new_window(mine)
            window.put(torch.full((20_000,), turn + rank, device="hx"), 1 - rank, 0, True)
            window.tensor_deregister()
            found.append(int(mine.sum()) // 20_000 - turn)
    return found


def test_what_was_put_is_there_when_the_window_is_deregistered(rank_pool: Pool) -> None:
    assert rank_pool(2).run(deregister_at_once) == [[1] * 20, [0] * 20]


# --- memory ---


def allocate(rank: int, world_size: int) -> dict[str, Any]:
    allocator = torchcomms.get_mem_allocator("hxcomm")

    def on_a_chip(tensor: torch.Tensor) -> bool:
        return torch.hx.segment_offset(tensor) is not None

    before = torch.ones(3)
    with allocator as entered:
        inside = torch.ones(1000) * 2
        with allocator:
            nested = torch.arange(5)
        still = torch.zeros(3)
        elsewhere: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: elsewhere.append(torch.zeros(3)))
        thread.start()
        thread.join()
    error, _ = error_of(lambda: fail_inside(allocator))
    after = torch.ones(3)
    made = allocator.empty(2, 3, dtype=torch.int16)
    return {
        "itself": entered is allocator,
        "inside": [on_a_chip(each) for each in (inside, nested, still, made)],
        "outside": [on_a_chip(each) for each in (before, after, *elsewhere)],
        "device": (str(inside.device), str(made.device), made.dtype, tuple(made.shape)),
        "values": (inside.sum().item(), nested.tolist()),
        "error": error,
    }


def fail_inside(allocator: Any) -> None:
    with allocator:
        raise KeyError("inside")


def test_cpu_tensors_of_the_allocator_lie_where_peers_can_map_them(rank_pool: Pool) -> None:
    assert rank_pool(1).run(allocate) == [
        {
            "itself": True,
            "inside": [True] * 4,
            "outside": [False] * 3,
            "device": ("cpu", "cpu", torch.int16, (2, 3)),
            "values": (2000.0, [0, 1, 2, 3, 4]),
            "error": "KeyError",
        }
    ]


def keep_after_abort(rank: int, world_size: int) -> tuple[bool, bool]:
    with communicator("hx", "keep") as comm:
        window = comm.new_window(zeros(comm, 1 << 20))
        tensor = window.get_tensor()
        assert tensor is not None
        address = tensor.data_ptr()
        comm.barrier(False)
        comm.abort()
        window.tensor_deregister()
        del tensor, window
        reused = torch.zeros(1 << 20, device="hx").data_ptr() == address
    return reused, comm.is_aborted()


def test_memory_of_a_window_is_not_used_again_while_peers_may_write(rank_pool: Pool) -> None:
    # After the barrier neither has left when the other allocates: each leaves after its own allocation.
    assert rank_pool(1).run(keep_after_abort) == [(True, False)]
    found = rank_pool(2).run(keep_after_abort)
    assert (False, False) in found


def come_and_go(rank: int, world_size: int) -> list[int]:
    """What the process holds after each hundred windows: bytes of its chip, of its segment, descriptors, maps."""
    held = []
    process = bootstrap.runtime()
    with communicator("hx", "come and go") as comm:
        for _ in range(4):
            for turn in range(100):
                window = comm.new_window(torch.zeros(1000, device="hx"))
                view = window.map_remote_tensor(1 - rank)
                window.put(torch.ones(1000, device="hx"), 1 - rank, 0, turn % 2 == 0)
                window.tensor_deregister()
                del view
            comm.barrier(False)
            held += [torch.hx.memory_allocated(), process.allocated_bytes]
            held += [len(list(Path("/proc/self/fd").iterdir())), len(Path("/proc/self/maps").read_text().splitlines())]
    return held


def test_windows_that_have_ended_leave_nothing_behind(rank_pool: Pool) -> None:
    for held in rank_pool(2).run(come_and_go):
        assert held[4:8] == held[8:12] == held[12:16]


def not_owned(rank: int, world_size: int) -> bool:
    with communicator("cpu", "not owned") as comm:
        mine = zeros(comm, 8)
        window = comm.new_window()
        window.tensor_register(mine, owning=False)
        window.put(torch.full((8,), float(rank)), 1 - rank, 0, False)
        window.signal(1 - rank, False)
        window.wait_signal(1 - rank, False)
        same = window.map_remote_tensor(rank).data_ptr() == mine.data_ptr() and window.get_tensor() is None
        window.tensor_deregister()
    return same and mine.tolist() == [1.0 - rank] * 8


def test_a_window_need_not_own_its_tensor(rank_pool: Pool) -> None:
    assert rank_pool(2).run(not_owned) == [True, True]
