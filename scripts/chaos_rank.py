"""One rank of scripts/chaos.py: runs a stream of one collective, fails as its case says, and reports what it saw.

A report is one JSON object a line in FOLDER/RANK: {"event": ..., "at": seconds of CLOCK_MONOTONIC, ...}. Events are
`call` (about to issue call number `index`), `wrong` (a result was not the exact one), `raised`, `done` and `left`; of a
soak, `ready` and `done` with its numbers of calls and of times that this rank held the GIL; of aborts, `aborts`.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CALLS = 6
COUNTS = (7, 100_000)  # one window, and four of them
GIL_HELD_S = 5
START_TIMEOUT_S = 60.0
SOAK_TIMEOUT_S = 120.0  # of an op: several ranks may hold their GIL or be stopped one after the other
GIL_EVERY_S = 600.0  # at most so long between two times that a rank of a soak holds it
EXIT_STATUS = 3  # of the fault `exit`, as the core's failpoint has it
ACTIONS = {"kill": "kill", "exit": "exit", "exception": "throw", "stop": "stop", "stop300": "stop300"}


@dataclass(frozen=True)
class Case:
    """One run. `point` is "before" (the victim fails in Python, in front of call `nth`) or a failpoint of the core."""

    op: str
    world_size: int
    fault: str
    point: str
    nth: int
    victim: int
    backend: str
    timeout_s: float
    seed: int
    device: str = "cpu"


class WrongResultError(Exception):
    """A collective returned, and its result is not the one it must have."""


def contribution(rank: int, index: int, count: int, device: str = "cpu") -> torch.Tensor:
    return (torch.arange(count, dtype=torch.int64) * (rank + 1) + index).to(device)


def expect(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    actual = actual.cpu()
    if not torch.equal(actual, expected):
        raise WrongResultError(f"{what}: {actual.flatten()[:5].tolist()} and not {expected.flatten()[:5].tolist()}")


def issue(case: Case, rank: int, index: int) -> None:
    """Call number `index` of the stream, sync or async, checked against the exact result."""
    n, count, root, device = case.world_size, COUNTS[index % 2], index % case.world_size, case.device
    mine = contribution(rank, index, count, device)
    each = [contribution(r, index, count) for r in range(n)]
    parts = [contribution(rank, index + r, count, device) for r in range(n)]  # what this rank has for each other
    whole = torch.stack(each)
    at_root = rank == root
    out = torch.zeros(n, count, dtype=torch.int64, device=device)
    row = torch.zeros(count, dtype=torch.int64, device=device)
    from_all = torch.stack([contribution(r, index + rank, count) for r in range(n)])
    ops: dict[str, tuple[Callable[[bool], Any], list[tuple[torch.Tensor, torch.Tensor]]]] = {
        "all_reduce": (lambda a: dist.all_reduce(mine, async_op=a), [(mine, whole.sum(0))]),
        "broadcast": (lambda a: dist.broadcast(mine, root, async_op=a), [(mine, each[root])]),
        "reduce": (lambda a: dist.reduce(mine, root, async_op=a), [(mine, whole.sum(0))] if at_root else []),
        "all_gather": (lambda a: dist.all_gather(list(out.unbind()), mine, async_op=a), [(out, whole)]),
        "reduce_scatter": (lambda a: dist.reduce_scatter(row, parts, async_op=a), [(row, from_all.sum(0))]),
        "gather": (
            lambda a: dist.gather(mine, list(out.unbind()) if at_root else None, root, async_op=a),
            [(out, whole)] if at_root else [],
        ),
        "scatter": (
            lambda a: dist.scatter(row, parts if at_root else None, root, async_op=a),
            [(row, contribution(root, index + rank, count))],
        ),
        "all_to_all": (lambda a: dist.all_to_all_single(out, torch.stack(parts), async_op=a), [(out, from_all)]),
        "barrier": (lambda a: dist.barrier(async_op=a), []),
    }
    call, results = ops[case.op]
    expected = [(actual, wanted.clone()) for actual, wanted in results]
    work = call(index % 3 == 2)
    if work is not None:
        work.wait()
    for actual, wanted in expected:
        expect(actual, wanted, f"{case.op} call {index} on rank {rank}")


OPS = (
    "all_reduce",
    "broadcast",
    "reduce",
    "all_gather",
    "reduce_scatter",
    "gather",
    "scatter",
    "all_to_all",
    "barrier",
)


def fail_now(fault: str) -> None:
    """What the victim does in front of a call."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        os._exit(EXIT_STATUS)
    elif fault == "exception":
        raise RuntimeError("the program failed before its call")
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "stop300":
        pid = os.getpid()
        if os.fork() == 0:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)
            os.kill(pid, signal.SIGCONT)
            os._exit(0)
        os.wait()
    elif fault == "gil":  # PyDLL, unlike CDLL, keeps the GIL while it calls
        threading.Thread(target=ctypes.PyDLL(None).sleep, args=(GIL_HELD_S,), daemon=True).start()


def reporter(folder: Path, rank: int) -> Callable[..., None]:
    file = (folder / str(rank)).open("a", buffering=1)

    def say(event: str, **more: object) -> None:
        print(json.dumps({"event": event, "at": time.monotonic(), **more}), file=file, flush=True)

    return say


def join(backend: str, rank: int, world_size: int, folder: Path, timeout_s: float) -> None:
    """Makes the process group, once every rank's process is there: its timeout is the ops' own."""
    parent_died = signal.SIGKILL
    ctypes.CDLL(None).prctl(1, parent_died)  # PR_SET_PDEATHSIG: nothing outlives a killed runner
    torch.set_num_threads(1)  # as torchrun does: 8 ranks' OpenMP teams on 2 cores spend seconds in their barriers
    store = dist.FileStore(str(folder / "store"), world_size)
    store.set(f"here/{rank}", "")
    store.wait([f"here/{each}" for each in range(world_size)], datetime.timedelta(seconds=START_TIMEOUT_S))
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def run(case: Case, rank: int, folder: Path) -> None:
    """A rank's whole life in a case; does not return where the fault ends the process."""
    say = reporter(folder, rank)
    is_victim = rank == case.victim
    if is_victim and case.point != "before":
        nth = 1 if case.point in ("abort", "leave") else case.nth
        os.environ["HXCOMM_FAILPOINT"] = f"{case.point}@{nth}={ACTIONS[case.fault]}"
    join(case.backend, rank, case.world_size, folder, case.timeout_s)
    try:
        for index in range(CALLS):
            if is_victim and index == case.nth and case.point == "before":
                fail_now(case.fault)
            if is_victim and index == case.nth and case.point == "abort":
                dist.distributed_c10d._get_default_group().abort()
            say("call", index=index)
            issue(case, rank, index)
        say("done")
    except WrongResultError as error:
        say("wrong", message=str(error))
    except Exception as error:
        say("raised", kind=type(error).__name__, message=str(error))
    dist.destroy_process_group()
    say("left")


def run_until_killed(rank: int, world_size: int, waiting: bool, victim: int, folder: Path) -> None:
    """all_reduce after all_reduce until a peer is killed by the runner. With `waiting`, the victim no longer calls."""
    say = reporter(folder, rank)
    join("hxcomm", rank, world_size, folder, START_TIMEOUT_S)
    tensor = torch.zeros(64)
    for _ in range(20):
        dist.all_reduce(tensor)
    say("ready")
    try:
        while not (waiting and rank == victim):
            dist.all_reduce(tensor)
        signal.pause()
    except dist.DistBackendError as error:
        say("raised", kind=type(error).__name__, message=str(error))
    dist.destroy_process_group()


def run_aborts(rank: int, world_size: int, aborts: int, seed: int, folder: Path) -> None:
    """A group for each abort: all but the last rank block in an all_reduce when a thread of rank 0 aborts."""
    say = reporter(folder, rank)
    rng = random.Random(seed)
    for number in range(aborts):
        own_folder = folder / f"group{number}"
        own_folder.mkdir(exist_ok=True)
        join("hxcomm", rank, world_size, own_folder, START_TIMEOUT_S)
        dist.barrier()
        store, group = dist.distributed_c10d._get_default_store(), dist.distributed_c10d._get_default_group()

        def end(number: int = number, delay_s: float = rng.uniform(0.005, 0.05), group: Any = group) -> None:
            time.sleep(delay_s)
            say("aborts", number=number)
            group.abort()

        if rank == world_size - 1:
            store.wait(["aborted"], datetime.timedelta(seconds=START_TIMEOUT_S))
        elif rank == 0:
            threading.Thread(target=end).start()
        try:
            dist.all_reduce(torch.zeros(64))
        except dist.DistBackendError as error:
            if rank < world_size - 1:
                say("raised", number=number, kind=type(error).__name__, message=str(error))
        if rank == 0:
            store.set("aborted", "")
        dist.destroy_process_group()


def run_soak(rank: int, world_size: int, seconds: float, seed: int, folder: Path) -> None:
    """Every op in turn, checked, until rank 0 says that time is up; at random this rank holds its GIL meanwhile."""
    say = reporter(folder, rank)
    rng = random.Random(seed + rank)
    join("hxcomm", rank, world_size, folder, SOAK_TIMEOUT_S)
    say("ready")
    ends_at = time.monotonic() + seconds
    calls = held = 0
    next_hold = time.monotonic() + rng.uniform(0, min(GIL_EVERY_S, seconds))
    try:
        while True:
            for op in OPS:
                issue(Case(op, world_size, "", "", 0, -1, "hxcomm", SOAK_TIMEOUT_S, seed), rank, calls)
                calls += 1
            if time.monotonic() > next_hold:
                fail_now("gil")
                held += 1
                next_hold = time.monotonic() + rng.uniform(GIL_HELD_S, GIL_EVERY_S)
            over = torch.tensor(time.monotonic() > ends_at)
            dist.broadcast(over, 0)
            if over:
                break
        say("done", calls=calls, held=held)
    except WrongResultError as error:
        say("wrong", message=str(error))
    except Exception as error:
        say("raised", kind=type(error).__name__, message=str(error))
    dist.destroy_process_group()
