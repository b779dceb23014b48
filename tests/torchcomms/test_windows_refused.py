"""Windows that are used wrongly, and windows whose communicator ends: typed errors, and nothing is written."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torchcomms.windows import communicator, error_of, works, zeros

from hxcomm.torchcomms import ReduceOp

Pool = Callable[[int], Any]


# --- bad input ---


def call_wrongly(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    with communicator("hx", "wrong calls") as comm:
        empty = comm.new_window()
        window = comm.new_window(torch.zeros(64, device="hx"))
        on_hx, on_cpu = torch.ones(8, device="hx"), torch.ones(8)
        found = {
            "beyond": error_of(lambda: window.put(on_hx, 1 - rank, 57, False)),
            "far beyond": error_of(lambda: window.put(on_hx, 1 - rank, (1 << 63) - 1, True)),
            "before": error_of(lambda: window.put(on_hx, 1 - rank, -1, False)),
            "dtype": error_of(lambda: window.put(on_hx.double(), 1 - rank, 0, False)),
            "device": error_of(lambda: window.put(on_cpu, 1 - rank, 0, False)),
            "sparse": error_of(lambda: window.put(on_cpu.to_sparse(), 1 - rank, 0, False)),
            "rank": error_of(lambda: window.put(on_hx, world_size, 0, False)),
            "signal": error_of(lambda: window.signal(-1, False)),
            "wait": error_of(lambda: window.wait_signal(7, True)),
            "map": error_of(lambda: window.map_remote_tensor(2)),
            "attr": error_of(lambda: window.get_attr(2)),
            "hint": error_of(lambda: window.signal(1 - rank, False, hints={"colour": "red"})),
            "timeout": error_of(lambda: window.signal(1 - rank, False, timeout=timedelta(0))),
            "twice": error_of(lambda: window.tensor_register(on_hx)),
            "no tensor": error_of(lambda: empty.put(on_hx, 1 - rank, 0, False)),
            "nothing to end": error_of(empty.tensor_deregister),
            "of GPUs": error_of(window.get_device_window),
        }
        comm.barrier(False)
        found["untouched"] = (str(int(window.get_tensor().sum())), "")  # type: ignore[union-attr]
        comm.barrier(False)
        window.put(on_hx, 1 - rank, 56, False)  # the last eight
        window.tensor_deregister()
        found["ended"] = error_of(lambda: window.put(on_hx, 1 - rank, 0, False))
        assert works(comm)
        window.tensor_register(torch.zeros(4, device="hx"))
    found["finalized"] = error_of(lambda: window.signal(1 - rank, False))
    found["finalized deregister"] = error_of(window.tensor_deregister)
    return found


WRONG = {
    "beyond": ("ValueError", "put: 8 elements at element 57 of a window of 64 elements on rank"),
    "far beyond": ("ValueError", "at element 9223372036854775807 of a window of 64"),
    "before": ("ValueError", "put: an offset of -1 elements"),
    "dtype": ("ValueError", "8 elements of float64 on device hx into a window of 64 elements of float32 on device hx"),
    "device": ("ValueError", "8 elements of float32 into a window of 64 elements of float32 on device hx"),
    "sparse": ("ValueError", "sparse"),
    "rank": ("ValueError", "the other rank is 2, but the group has ranks 0 to 1"),
    "signal": ("ValueError", "the other rank is -1"),
    "wait": ("ValueError", "the other rank is 7"),
    "map": ("ValueError", "there is no rank 2 in a group of 2"),
    "attr": ("ValueError", "there is no rank 2 in a group of 2"),
    "hint": ("ValueError", "there is no hint 'colour'; the hints are"),
    "timeout": ("ValueError", "a timeout of 0.0 s"),
    "twice": ("RuntimeError", "has a tensor already"),
    "no tensor": ("RuntimeError", "put: the window has no tensor; call tensor_register()"),
    "nothing to end": ("RuntimeError", "tensor_deregister: the window has no tensor"),
    "of GPUs": ("NotImplementedError", "hx has none"),
    "untouched": ("0", ""),
    "ended": ("RuntimeError", "put: the window has no tensor"),
    "finalized": ("ValueError", "it was finalized"),
    "finalized deregister": ("", "nothing was raised"),
}


def test_a_wrong_call_raises_with_the_values_and_writes_nothing(rank_pool: Pool) -> None:
    for found in rank_pool(2).run(call_wrongly):
        assert found.keys() == WRONG.keys()
        for name, (kind, text) in WRONG.items():
            assert found[name][0] == kind and text in found[name][1], f"{name}: {found[name]}"


def register_wrongly(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    with communicator("cpu", "wrong tensors") as comm:
        good = zeros(comm, 8, 8)
        wrong: dict[str, torch.Tensor] = {
            "not mapped": torch.zeros(8, 8),
            "strided": good.t(),
            "dtype": zeros(comm, 8, dtype=torch.float64),
            "unknown dtype": zeros(comm, 8, dtype=torch.uint16),
            "device": torch.zeros(8, 8, device="hx"),
            "deep": zeros(comm, *[1] * 9),
        }
        found = {}
        for name, tensor in wrong.items():
            window = comm.new_window()
            mine = tensor if rank == 1 else good
            found[name] = error_of(lambda window=window, mine=mine: window.tensor_register(mine))  # type: ignore[misc]
        window = comm.new_window()
        ones = torch.ones(4)
        found["another call"] = error_of(
            (lambda: window.tensor_register(good))
            if rank == 0
            else (lambda: comm.all_reduce(ones, ReduceOp.SUM, False))
        )
        assert works(comm)
        window.tensor_register(good)
        other = comm.new_window(zeros(comm, 1))
        found["deregister"] = error_of((window if rank == 0 else other).tensor_deregister)
        window.put(torch.ones(64), 1 - rank, 0, False)  # it still stands
        window.tensor_deregister()
        found["put"] = (str(int(good.sum())), "")
    return found


def test_a_tensor_that_one_rank_may_not_register_is_refused_on_all(rank_pool: Pool) -> None:
    by_rank = rank_pool(2).run(register_wrongly)
    own = {
        "not mapped": ("Float[8, 8] on cpu", "does not lie in memory that peers can map", "with comm.mem_allocator:"),
        "strided": ("is not contiguous",),
        "unknown dtype": ("has a dtype that hxcomm does not know",),
        "deep": ("has more than 8 dimensions",),
    }
    for name, texts in own.items():
        kind, text = by_rank[1][name]
        assert kind == "ValueError" and all(each in text for each in texts), (name, text)
        kind, message = by_rank[0][name]
        assert kind == "MismatchError" and "rank 1 (host" in message and texts[-1] in message, (name, message)
    for found in by_rank:
        for name, text in {"dtype": "8 elements of float64", "device": "64 elements of float32 on device hx"}.items():
            assert found[name][0] == "MismatchError" and text in found[name][1], found[name]
            assert "one dtype and one device on all ranks" in found[name][1]
        assert found["another call"][0] == "MismatchError", found["another call"]
        assert found["deregister"][0] == "MismatchError" and "deregisters window" in found["deregister"][1]
        assert found["put"] == ("64", "")


def use_in_a_child(rank: int, world_size: int) -> tuple[int, bool]:
    with communicator("cpu", "fork") as comm:
        window = comm.new_window(zeros(comm, 8))
        child = os.fork()
        if child == 0:
            errors = [error_of(lambda: window.put(torch.ones(8), 1 - rank, 0, False))]
            errors.append(error_of(lambda: window.map_remote_tensor(1 - rank)))
            errors.append(error_of(window.tensor_deregister))
            del window
            os._exit(0 if all("fork" in text for _, text in errors) else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        window.put(torch.ones(8), 1 - rank, 0, False)
        window.tensor_deregister()
        return status, works(comm)


def test_a_forked_child_is_told_that_it_has_no_windows(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(use_in_a_child, 2, backend=None) == [(0, True), (0, True)]


# --- failures ---


def die_waited_for(rank: int, world_size: int, async_op: bool) -> tuple[str, str]:
    with communicator("hx", "death") as comm:
        window = comm.new_window(torch.zeros(8, device="hx"))
        comm.barrier(False)
        if rank == 1:
            window.put(torch.ones(8, device="hx"), 0, 0, False)
            os.kill(os.getpid(), signal.SIGKILL)
        return error_of(lambda: window.wait_signal(1, async_op).wait())


@pytest.mark.parametrize("async_op", [False, True])
def test_a_waiter_raises_when_the_rank_it_waits_for_is_killed(run_ranks: Callable[..., Any], async_op: bool) -> None:
    found = run_ranks(die_waited_for, 3, async_op, backend=None, expect={1: signal.SIGKILL})
    for rank in (0, 2):
        kind, text = found[rank]
        assert kind == "PeerFailedError" and "rank 1 (host" in text and "SIGKILL" in text, text


def end_waited_for(rank: int, world_size: int, how: str) -> tuple[str, str]:
    with communicator("cpu", f"end {how}") as comm:
        window = comm.new_window(zeros(comm, 8))
        window.signal(1 - rank, False)
        window.wait_signal(1 - rank, False)
        if rank == 1:
            if how == "abort":
                comm.abort()
            elif how == "timeout":
                return error_of(lambda: window.wait_signal(0, False))
            return "", ""
        timeout = timedelta(milliseconds=200) if how == "timeout" else None
        return error_of(lambda: window.wait_signal(1, False, timeout=timeout))


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("abort", "AbortedError", "abort() was called"),
        ("timeout", "CommTimeoutError", "wait_signal of window 1 on rank 0"),
        ("finalize", "PeerFailedError", "has left the group"),
    ],
)
def test_a_waiter_is_released_with_the_error_that_says_why(rank_pool: Pool, how: str, kind: str, text: str) -> None:
    found = rank_pool(2).run(end_waited_for, how)
    assert found[0][0] == kind and text in found[0][1], found[0]
    if how == "timeout":
        assert found[1][0] == kind and text in found[1][1], found[1]


def put_to_one_that_left(rank: int, world_size: int, how: str) -> tuple[str, str]:
    with communicator("cpu", "all along") as beside, communicator("cpu", f"left {how}") as comm:
        window = comm.new_window(zeros(comm, 8))
        view = window.map_remote_tensor(1 - rank)
        if rank == 1:
            window.signal(0, False)
            comm.finalize()
        beside.barrier(False)
        found = "", ""
        if rank == 0:
            window.wait_signal(1, False)  # what it did before it left counts
            view.fill_(1)  # its memory is kept
            call = window.put if how == "put" else window.signal
            operands = (torch.ones(8), 1, 0) if how == "put" else (1,)
            found = error_of(lambda: call(*operands, False))
        beside.barrier(False)
    return found


@pytest.mark.parametrize("how", ["put", "signal"])
def test_a_put_or_signal_to_a_rank_that_has_left_raises(rank_pool: Pool, how: str) -> None:
    kind, text = rank_pool(2).run(put_to_one_that_left, how)[0]
    assert kind == "PeerFailedError" and "rank 1 (host" in text and f"{how} of window 1 on rank 0" in text, text


def put_after_the_end(rank: int, world_size: int) -> list[str]:
    with communicator("cpu", "after the end") as comm:
        window = comm.new_window(zeros(comm, 8))
        calls: list[Callable[[], Any]] = [
            comm.abort if rank == 0 else lambda: window.wait_signal(0, False),
            lambda: window.put(torch.ones(8), 1 - rank, 0, False),
            lambda: window.signal(1 - rank, True),
            comm.abort,
            window.tensor_deregister,
            lambda: window.map_remote_tensor(1 - rank),
        ]
        return [error_of(call)[0] for call in calls]


def test_a_window_of_an_aborted_communicator_only_ends(rank_pool: Pool) -> None:
    first, second = rank_pool(2).run(put_after_the_end)
    assert first == ["", "AbortedError", "AbortedError", "", "", "RuntimeError"]
    assert second == ["AbortedError", *first[1:]]


def deregister_while_it_waits(rank: int, world_size: int) -> tuple[tuple[str, str], bool]:
    with communicator("cpu", "left waiting") as comm:
        window = comm.new_window(zeros(comm, 8))
        waiting = window.wait_signal(1 - rank, True)
        window.tensor_deregister()
        return error_of(waiting.wait), works(comm)


def test_a_wait_that_is_pending_when_its_window_ends_raises(rank_pool: Pool) -> None:
    for (kind, text), well in rank_pool(2).run(deregister_while_it_waits):
        assert kind == "ValueError" and "was pending when this rank deregistered the window" in text and well


def drop_it(rank: int, world_size: int) -> bool:
    with communicator("hx", "dropped") as comm:
        for turn in range(3):
            window = comm.new_window(torch.zeros(8, device="hx"))
            view = window.map_remote_tensor(1 - rank)
            comm.barrier(False)
            del window  # without deregistering it
            view.fill_(turn)
        return works(comm)


def test_a_window_that_is_dropped_leaves_the_communicator_usable(rank_pool: Pool) -> None:
    assert rank_pool(2).run(drop_it) == [True, True]
