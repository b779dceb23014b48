"""Windows whose ranks are on several hosts: puts and signals over the wire. Hosts are made by HXCOMM_HOST_ID."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from torchcomms.windows import communicator, error_of, works, zeros

from hxcomm.torchcomms import TorchCommWinAccessType

ENV = {"HXCOMM_INSECURE": "1"}
COUNT = 3_000_001  # float32: 23 pieces, more than there are credits
DEADLINE_S = 30.0
RunRanks = Callable[..., list[Any]]


def on_host(hosts: Sequence[int]) -> int:
    """This process's host, which it is told to be on before it makes a communicator."""
    host = hosts[int(os.environ["RANK"])]
    os.environ["HXCOMM_HOST_ID"] = f"host {host}"
    return host


def put_round_and_round(
    rank: int, world_size: int, hosts: Sequence[int], device: str, async_op: bool
) -> tuple[list[list[float]], list[bool], list[tuple[str, str]]]:
    on_host(hosts)
    found = []
    with communicator(device, f"round {device} {async_op}") as comm:
        window = comm.new_window(zeros(comm, COUNT + 1))
        after, before = (rank + 1) % world_size, (rank - 1) % world_size
        given = torch.empty(COUNT, device=device)
        for turn in range(3):
            given.fill_(10 * rank + turn)
            work = window.put(given, after, 1, async_op)
            told = window.signal(after, async_op)
            work.wait()
            given.fill_(-1)  # what was put is what it was when the call was made
            told.wait()
            window.wait_signal(before, async_op).wait()
            mine = window.map_remote_tensor(rank).cpu()
            found.append([mine[0].item(), mine[1].item(), mine[-1].item(), float(mine[1:].double().sum()) / COUNT])
            window.signal(before, async_op).wait()
            window.wait_signal(after, async_op).wait()
        kinds = TorchCommWinAccessType
        mapped = [window.get_attr(peer).access_type is kinds.WIN_ACCESS_TYPE_UNIFIED for peer in range(world_size)]
        views = [error_of(lambda peer=peer: window.map_remote_tensor(peer)) for peer in range(world_size)]  # type: ignore[misc]
        window.tensor_deregister()
        assert works(comm)
    return found, mapped, views


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("device", ["cpu", "hx"])
def test_what_was_put_is_there_once_its_signal_was_seen(run_ranks: RunRanks, device: str, async_op: bool) -> None:
    hosts = (0, 1, 1)
    for rank, (found, mapped, views) in enumerate(
        run_ranks(put_round_and_round, 3, hosts, device, async_op, backend=None, env=ENV)
    ):
        numbers = [10 * ((rank - 1) % 3) + turn for turn in range(3)]
        assert found == [[0.0, number, number, number] for number in numbers]
        assert mapped == [hosts[rank] == host for host in hosts]
        for peer, (kind, text) in enumerate(views):
            assert kind == ("" if mapped[peer] else "ValueError")
            assert mapped[peer] or f"rank {peer} is on another host" in text


def put_while_it_calls_nothing(rank: int, world_size: int) -> bool:
    on_host((0, 1))
    with communicator("cpu", "passive") as comm:
        mine = zeros(comm, COUNT)
        window = comm.new_window(mine)
        if rank == 0:
            for turn in range(1, 4):
                window.put(torch.full((COUNT,), float(turn)), 1, 0, False)
        else:
            deadline = time.monotonic() + DEADLINE_S
            while mine[-1].item() != 3.0:  # it looks at its memory only
                assert time.monotonic() < deadline, "nobody carries out what was put here"
        window.tensor_deregister()
    return bool((mine == (3.0 if rank else 0.0)).all())


def test_puts_arrive_while_their_target_calls_nothing(run_ranks: RunRanks) -> None:
    assert run_ranks(put_while_it_calls_nothing, 2, backend=None, env=ENV) == [True, True]


def deregister_at_once(rank: int, world_size: int) -> list[bool]:
    """Puts over every connection between the hosts, the more on those that the ranks' agreement does not go over."""
    on_host((0, 0, 1, 1))
    found = []
    with communicator("hx", "fence") as comm:
        across = world_size - 1 - rank
        given = torch.empty(COUNT, device="hx")
        for turn in range(1, 6):
            mine = zeros(comm, world_size + COUNT)
            window = comm.new_window(mine)
            given.fill_(turn)
            for peer in range(world_size):
                window.put(given[:1], peer, rank, True)
            window.put(given, across, world_size, True)
            window.tensor_deregister()
            found.append(bool((mine == turn).all()))
    return found


def test_what_was_put_is_there_when_the_window_is_deregistered(run_ranks: RunRanks) -> None:
    assert run_ranks(deregister_at_once, 4, backend=None, env=ENV) == [[True] * 5] * 4


def fail(rank: int, world_size: int, how: str) -> list[tuple[str, str]]:
    on_host((0, 1))
    with communicator("cpu", f"fail {how}") as comm:
        window = comm.new_window(zeros(comm, COUNT))
        window.signal(1 - rank, False)
        window.wait_signal(1 - rank, False)
        if rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "abort":
                comm.abort()
            if how == "timeout":
                return [error_of(lambda: window.wait_signal(0, False))]
            return []
        timeout = timedelta(milliseconds=300) if how == "timeout" else None
        waited = error_of(lambda: window.wait_signal(1, False, timeout=timeout))
        put = error_of(lambda: window.put(torch.ones(8), 1, 0, False))
        comm.abort()
        return [waited, put, error_of(window.tensor_deregister)]


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("killed", "PeerFailedError", "closed its connection"),
        ("abort", "AbortedError", "abort() was called"),
        ("timeout", "CommTimeoutError", "wait_signal of window 1 on rank 0"),
        ("finalize", "PeerFailedError", "has left the group"),
    ],
)
def test_a_waiter_is_released_with_the_error_that_says_why(run_ranks: RunRanks, how: str, kind: str, text: str) -> None:
    expect = {1: signal.SIGKILL} if how == "killed" else {}
    found = run_ranks(fail, 2, how, backend=None, env=ENV, expect=expect)
    assert found[0][0][0] == kind and text in found[0][0][1], found[0]
    assert found[0][1][0] in (kind, "AbortedError") and found[0][2][0] == ""
    if how == "timeout":
        assert found[1][0][0] == kind and text in found[1][0][1]


def put_beyond(rank: int, world_size: int) -> tuple[str, str]:
    on_host((0, 1))
    with communicator("cpu", "beyond") as comm:
        window = comm.new_window(zeros(comm, 10 + rank))
        found = error_of(lambda: window.put(torch.ones(11), 1 - rank, 0, False))
        window.tensor_deregister()
        assert works(comm)
    return found


def test_a_put_beyond_the_other_ranks_part_is_refused_before_it_is_sent(run_ranks: RunRanks) -> None:
    first, second = run_ranks(put_beyond, 2, backend=None, env=ENV)
    assert first == ("", "nothing was raised")
    assert second[0] == "ValueError" and "11 elements at element 0 of a window of 10 elements on rank 0" in second[1]
