"""Ranks and networks that fail while others wait on another host: every rank raises what happened, soon, or nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults.test_deaths import NEVER, WAYS, master_store
from hosts.disturbances import Job, hold, meanwhile, say, sum_until_told
from hosts.networks import Network

Networks = Callable[..., Network]
ENV = {"HXCOMM_INSECURE": "1"}
HANG_S = 10.0  # more than any of these may take: what takes longer has not noticed


def raised_by(call: Callable[[], Any]) -> tuple[str, str, float]:
    """Class and message, and when."""
    try:
        call()
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic()
    return "", "nothing was raised", time.monotonic()


# --- deaths ---


def die_one_by_one(rank: int, world_size: int) -> list[dict[str, Any]]:
    """As in faults/test_deaths.py: each turn the last rank is killed. What each survivor raised, told by rank 0."""
    store = master_store()
    rows = []
    for turn, way in enumerate(WAYS.values()):
        n = world_size - turn
        dist.init_process_group(
            "hxcomm", store=dist.PrefixStore(str(turn), store), rank=rank, world_size=n, timeout=NEVER
        )
        dist.all_reduce(torch.ones(1000))
        if rank == n - 1:
            store.wait([f"{turn}/{r}" for r in range(n - 1)])
            store.set(f"{turn}/killed", json.dumps({"pid": os.getpid(), "at": time.monotonic()}))
            store.check([f"{turn}/killed"])
            os.kill(os.getpid(), signal.SIGKILL)
        store.set(f"{turn}/{rank}", "about to call")
        kind, message, at = raised_by(way)
        store.set(f"{turn}/{rank}/raised", json.dumps([kind, message, at]))
        if rank == 0:
            killed = json.loads(store.get(f"{turn}/killed"))
            for survivor in range(n - 1):
                kind, message, at = json.loads(store.get(f"{turn}/{survivor}/raised"))
                told = {"kind": kind, "message": message, "ms": 1e3 * (at - killed["at"]), "survivor": survivor}
                rows.append({**told, "victim": n - 1, "pid": killed["pid"]})
        dist.destroy_process_group()
    return rows


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [(2, 4), (4, 1, 1)], ids=str)
def test_survivors_on_every_host_name_the_rank_that_was_killed(network: Networks, layout: tuple[int, ...]) -> None:
    n = sum(layout)
    expect = dict.fromkeys(range(1, n), signal.SIGKILL)
    rows = network(len(layout)).run_ranks(die_one_by_one, layout, backend=None, env=ENV, expect=expect)[0]
    assert len(rows) == sum(range(1, n))
    host_of = [host for host, count in enumerate(layout) for _ in range(count)]
    for row in rows:
        victim, message = row["victim"], row["message"]
        print(f"rank {row['survivor']} of {victim}: {row['ms']:.1f} ms: {message}")
        assert row["kind"] == "PeerFailedError", message
        assert f"rank {victim} (host host{host_of[victim]}, pid {row['pid']})" in message, message
        # The kernel tells how it died those beside it, and they the others; of a rank alone nobody knows.
        witnesses = [rank for rank in range(victim) if host_of[rank] == host_of[victim]]
        assert ("SIGKILL" in message) == bool(witnesses), message
        assert row["ms"] < 1e3 * HANG_S


# --- the network ---


def cut_off(rank: int, world_size: int, folder: str) -> list[tuple[str, str, float]]:
    """Waits in a call, or calls again and again, while the network between the hosts is cut."""
    dist.all_reduce(torch.ones(1000))
    say(folder, f"{rank} calls")
    if rank == 0:
        first = raised_by(lambda: dist.recv(torch.ones(3), 1))
    else:
        first = raised_by(lambda: [dist.all_reduce(torch.ones(1000)) for _ in range(10**9)])
    return [first, raised_by(lambda: dist.all_reduce(torch.ones(3)))]


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["cut", "reset"])
def test_a_lost_network_is_an_error_on_both_sides_and_stays_one(network: Networks, tmp_path: Path, how: str) -> None:
    net, job = network(2), Job(tmp_path)
    lost_at = []

    def disturb() -> None:
        job.hear(4, lambda line: line.endswith("calls"))
        lost_at.append(time.monotonic())
        net.hosts[1].disconnect() if how == "cut" else net.hosts[1].reset_connections(net.hosts[0])

    with meanwhile(disturb):
        results = net.run_ranks(cut_off, (2, 2), str(tmp_path), env=ENV, op_timeout_s=50)
    for rank, ((kind, message, at), (again, _, _)) in enumerate(results):
        print(f"{how}, rank {rank}: {1e3 * (at - lost_at[0]):.0f} ms: {message}")
        assert kind == again == "PeerFailedError", message
        assert any(f"rank {r} (host host{1 - rank // 2}" in message for r in range(4)), message
        assert at - lost_at[0] < HANG_S


@pytest.mark.ranks
def test_slow_and_stopped_ranks_and_short_outages_are_no_failures(network: Networks, tmp_path: Path) -> None:
    net, job = network(2, in_user_space=True), Job(tmp_path)

    def disturb() -> None:
        pids = job.pids(4)
        net.hosts[1].disconnect()
        hold(0.5)
        net.hosts[1].connect()
        job.goes_on()
        for victims, seconds in (([0], 0.3), ([3], 0.3), ([2], 5.0), ([2, 3], 0.3)):
            for victim in victims:
                os.kill(pids[victim], signal.SIGSTOP)
            hold(seconds)
            for victim in victims:
                os.kill(pids[victim], signal.SIGCONT)
            job.goes_on()
        net.delay(0.05)
        job.goes_on()
        net.lose(0.05)
        job.goes_on()
        net.lose(0.0)
        net.delay(0.0)
        job.is_enough()

    with meanwhile(disturb):
        counts = net.run_ranks(checked, (2, 2), str(tmp_path), env=ENV, op_timeout_s=20)
    assert min(counts) > 20


def checked(rank: int, world_size: int, folder: str) -> int:
    return sum_until_told(folder)


# --- endings ---


def group_of(seconds: float = 600) -> Any:
    return dist.new_group(timeout=timedelta(seconds=seconds))


def in_time(rank: int, store: Any, name: str, group: Any) -> tuple[str, str, float]:
    """Rank 3 does not call; the timeout of the others ends the group on all."""
    if rank == 3:
        store.wait([f"{name}/0"])
    return raised_by(lambda: dist.all_reduce(torch.ones(8), group=group))


def aborted(rank: int, store: Any, name: str, group: Any) -> tuple[str, str, float]:
    """Rank 3 does not call; rank 2, beside it, aborts while the others wait."""
    if rank == 3:
        store.wait([f"{name}/2"])
    elif rank == 2:
        store.wait([f"{name}/blocked 0", f"{name}/blocked 1"])
        threading.Timer(0.1, lambda: (store.set(f"{name}/at", str(time.monotonic())), group.abort())).start()
    store.set(f"{name}/blocked {rank}", "")
    return raised_by(lambda: dist.all_reduce(torch.ones(8), group=group))


def left(rank: int, store: Any, name: str, group: Any) -> tuple[str, str, float]:
    """Rank 3, or 2 (the leader of its host), leaves while the others wait."""
    leaver = int(name[-1])
    if rank == leaver:
        store.wait([f"{name}/blocked {r}" for r in range(4) if r != leaver])
        dist.destroy_process_group(group)
        return "", "left", 0.0
    store.set(f"{name}/blocked {rank}", "")
    return raised_by(lambda: dist.all_reduce(torch.ones(8), group=group))


def interrupted(rank: int, store: Any, name: str, group: Any) -> tuple[str, str, float]:
    """Ctrl-C on rank 1 while it waits for rank 3."""
    if rank == 3:
        store.wait([f"{name}/1"])
    elif rank == 1:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    return raised_by(lambda: dist.all_reduce(torch.ones(8), group=group))


def ended_alike(rank: int, store: Any, name: str, group: Any) -> tuple[str, str, float]:
    """Good work, then each destroys when it is ready, some while others still wait for their last call."""
    work = dist.all_reduce(torch.full((300_000,), 1.0), group=group, async_op=True)
    store.set(f"{name}/posted {rank}", "")
    if rank in (1, 2):
        store.wait([f"{name}/posted {each}" for each in (0, 3)])
    told = raised_by(work.wait)
    dist.destroy_process_group(group)
    return told


ENDINGS: dict[str, Callable[[int, Any, str, Any], tuple[str, str, float]]] = {
    "timeout": in_time,
    "abort": aborted,
    "leaves 3": left,
    "leaves 2": left,
    "leaves 0": left,
    "Ctrl-C": interrupted,
    "all well": ended_alike,
}


MISSING = (
    r"waiting for (rank 3 \(host host1, pid \d+\) \(has not called it\)"
    r"|rank 2 \(host host1, pid \d+\) \(it or a rank beside it has not called it\))"
)


def end_in_every_way(rank: int, world_size: int) -> dict[str, Any]:
    store = dist.PrefixStore("endings", master_store())
    found: dict[str, Any] = {}
    for name, ending in ENDINGS.items():
        group = group_of(1.0 if name == "timeout" else 600.0)
        dist.barrier(group)
        found[name] = ending(rank, store, name, group)
        store.set(f"{name}/{rank}", "")
        store.wait([f"{name}/{each}" for each in range(world_size)])
    found["aborted at"] = float(store.get("abort/at"))
    dist.barrier()  # the default group is unharmed
    return found


@pytest.mark.ranks
def test_a_group_that_is_ended_on_one_host_ends_on_the_others(network: Networks) -> None:
    results = network(2).run_ranks(end_in_every_way, (2, 2), env=ENV, op_timeout_s=30)
    by_name = {name: [found[name][:2] for found in results] for name in ENDINGS}
    for name, told in by_name.items():
        print(name, *told, sep="\n    ")
    print("abort, ms:", [round(1e3 * (found["abort"][2] - found["aborted at"]), 1) for found in results[:3]])
    assert [kind for kind, _ in by_name["timeout"]] == ["CommTimeoutError"] * 4
    # Rank 2, which knows, is given a moment to tell; without it the others know only whose host has not called.
    for _, message in by_name["timeout"]:
        assert re.search(
            r"rank 3 \(host host1.*has not called it|rank 2 \(host host1.*or a rank beside it has", message
        )
    assert [kind for kind, _ in by_name["abort"]] == ["AbortedError"] * 4
    assert all("rank 2 (host host1" in message and "abort()" in message for _, message in by_name["abort"])
    for leaver in (3, 2, 0):
        for rank, (kind, message) in enumerate(by_name[f"leaves {leaver}"]):
            if rank != leaver:
                assert kind == "PeerFailedError" and f"rank {leaver} (host" in message and "left" in message, message
    assert by_name["Ctrl-C"][1][0] == "KeyboardInterrupt"
    for rank in (0, 2, 3):
        kind, message = by_name["Ctrl-C"][rank]
        assert kind == "AbortedError" and "rank 1 (host host0" in message and "interrupted" in message, message
    assert by_name["all well"] == [("", "nothing was raised")] * 4


def end_without_destroy(rank: int, world_size: int) -> None:
    dist.init_process_group("hxcomm", timeout=timedelta(seconds=30))
    dist.all_reduce(torch.ones(10))


def exit_in_the_middle(rank: int, world_size: int) -> tuple[str, str, float]:
    dist.init_process_group("hxcomm", timeout=timedelta(seconds=30))
    dist.all_reduce(torch.ones(10))
    if rank == 3:
        os._exit(3)
    return raised_by(lambda: dist.all_reduce(torch.ones(10)))


@pytest.mark.ranks
def test_programs_may_end_without_destroying_their_group(network: Networks) -> None:
    net = network(2)
    assert net.run_ranks(end_without_destroy, (2, 2), backend=None, env=ENV) == [None] * 4
    results = net.run_ranks(exit_in_the_middle, (2, 2), backend=None, env=ENV, expect={3: 3})
    for kind, message, _ in results[:3]:
        assert kind == "PeerFailedError" and "rank 3 (host host1" in message, message
        assert "exited with status 3" in message, message
