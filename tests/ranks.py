"""Runs functions and scripts on several ranks, each a process, in the environment that torchrun gives.

The rendezvous store lives in this process and chooses its own port: ranks never race for one. Every wait here is for a
reply, the end of a process (a pidfd) or a deadline. When something fails, the error shows what each rank last printed
and, if it hung, the stack of each of its threads; only processes started here are ended, by their id.
"""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any

from rank_process import Answer, Job

HERE = Path(__file__).resolve().parent
SHOWN_BYTES = 4000  # of each rank's output, in an error: a screen or two
GRACE_S = 10.0  # what the other ranks get to end by themselves once one has failed


class RanksFailedError(AssertionError):
    """A rank did not do what was expected of it. The text holds each rank's last output."""


@dataclass(frozen=True)
class Raised:
    """What a rank that was expected to raise did raise."""

    error: str  # the exception's class
    message: str
    traceback: str


@dataclass
class Rank:
    """One process. `answer` and `status` (as subprocess has it: -9 is SIGKILL) come when they come."""

    number: int
    process: subprocess.Popen[bytes]
    pidfd: int
    output: Path
    connection: connection.Connection | None  # None: a script
    output_from: int = 0
    answer: Answer | None = None
    status: int | None = None
    notes: list[str] = field(default_factory=list)

    def shown_output(self) -> str:
        text = self.output.read_bytes()[self.output_from :]
        cut = f"... ({len(text) - SHOWN_BYTES} bytes before)\n" if len(text) > SHOWN_BYTES else ""
        return cut + text[-SHOWN_BYTES:].decode(errors="replace")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.status = self.process.wait()
        os.close(self.pidfd)
        if self.connection is not None:
            self.connection.close()


def rendezvous(address: str = "127.0.0.1") -> tuple[Any, dict[str, str]]:
    """A TCPStore for one run, to be kept until it is over, and the environment that leads ranks to it.

    It takes a port that is free and holds it, as torchrun's agent does. Each run has its own: torch puts the keys of
    every first process group of a store under the same prefix, and gloo would find the addresses of the last run.
    """
    from torch.distributed import TCPStore

    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": f"tests-{os.getpid()}",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


# Of a rank: what its command begins with, and variables of its own.
Place = Callable[[int], tuple[Sequence[str], Mapping[str, str]]]


def here(rank: int) -> tuple[Sequence[str], Mapping[str, str]]:
    return (), {}


def start(
    world_size: int, command: Sequence[str] | None, folder: Path, env: Mapping[str, str], place: Place = here
) -> list[Rank]:
    """Starts one process a rank: `command`, or, when None, one that waits for jobs."""
    ranks = []
    for number in range(world_size):
        ours = theirs = None
        if command is None:
            ours, theirs = Pipe(duplex=True)
        output = folder / f"rank{number}.txt"
        begin, variables = place(number)
        end = command or [sys.executable, str(HERE / "rank_process.py"), str(theirs.fileno() if theirs else -1)]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*begin, *end],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),) if theirs else (),
                env={**os.environ, **rank_environment(number, world_size), **env, **variables},
            )
        if theirs is not None:
            theirs.close()
        ranks.append(Rank(number, process, os.pidfd_open(process.pid), output, ours))
    return ranks


def make_job(
    fn: Callable[..., Any], args: Sequence[Any], backend: str | None, op_timeout_s: float, env: Mapping[str, str]
) -> Job:
    if "<" in fn.__qualname__ or "." in fn.__qualname__:
        raise ValueError(
            f"{fn.__qualname__} cannot run on ranks: a fresh process finds a function by its name, so it must stand at "
            "the top level of the test file (pass what it needs as arguments)"
        )
    file = inspect.getsourcefile(fn)
    assert file is not None
    return Job(file, fn.__module__, fn.__qualname__, pickle.dumps(tuple(args)), backend, op_timeout_s, dict(env))


def wait_for(ranks: Sequence[Rank], timeout_s: float, expect: Mapping[int, Any]) -> None:
    """Waits until each rank has answered or ended, or time is up; once one has failed the others get GRACE_S."""
    deadline = time.monotonic() + timeout_s
    open_ranks = {rank.number: rank for rank in ranks}
    while open_ranks:
        waiting: dict[Any, Rank] = {rank.pidfd: rank for rank in open_ranks.values()}
        waiting.update({rank.connection: rank for rank in open_ranks.values() if rank.connection is not None})
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in {waiting[item].number: waiting[item] for item in ready}.values():
            if rank.connection is not None and rank.connection.poll():
                try:
                    rank.answer = rank.connection.recv()
                except (EOFError, ConnectionResetError):
                    rank.status = rank.process.wait(timeout=GRACE_S)
            elif rank.process.poll() is not None:
                rank.status = rank.process.returncode
            else:
                continue
            del open_ranks[rank.number]
            if problem(rank, expect):
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for rank in open_ranks.values():
        if rank.connection is not None:
            rank.process.send_signal(signal.SIGUSR1)  # prints its stacks; it does not end, so this only gives it time
            connection.wait([rank.pidfd], timeout=0.5)
        rank.notes.append("did not end in time")


def problem(rank: Rank, expect: Mapping[int, Any]) -> str | None:
    """What is wrong with how this rank ended, or None. `expect` is run_ranks's."""
    wanted = expect.get(rank.number)
    if rank.answer is None and rank.status is None:
        return "; ".join(rank.notes)
    if rank.answer is None:
        assert rank.status is not None
        ended = f"was killed by {signal.Signals(-rank.status).name}" if rank.status < 0 else f"exited {rank.status}"
        allowed = -wanted if isinstance(wanted, signal.Signals) else wanted
        if allowed is None and rank.connection is None:
            allowed = 0
        return None if rank.status == allowed else ended
    if isinstance(wanted, signal.Signals | int):
        return f"was expected to end ({wanted!r}) and returned"
    if rank.answer.error:
        return None if rank.answer.error == wanted else f"raised {rank.answer.error}"
    return None if wanted is None else f"was expected to raise {wanted} and returned"


def collect(ranks: Sequence[Rank], what: str, timeout_s: float, expect: Mapping[int, Any]) -> list[Any]:
    """Each rank's value, Raised, or None where it was expected to end; else RanksFailedError."""
    wait_for(ranks, timeout_s, expect)
    problems = {rank.number: why for rank in ranks if (why := problem(rank, expect))}
    if problems:
        lines = [f"{what} on {len(ranks)} ranks (limit {timeout_s:g} s):"]
        lines += [f"  rank {number} {why}" for number, why in problems.items()]
        for rank in ranks:
            lines += [f"---- rank {rank.number} (pid {rank.process.pid}) printed:", rank.shown_output().rstrip()]
            if rank.answer is not None and rank.answer.error:
                lines.append(rank.answer.text.rstrip())
        raise RanksFailedError("\n".join(lines))
    return [outcome(rank) for rank in ranks]


def leave(ranks: Sequence[Rank], what: str) -> None:
    """Lets the ranks that answered exit by themselves: a crash while a library is torn down is a failure, too."""
    for rank in ranks:
        if rank.answer is None:
            continue
        assert rank.connection is not None
        rank.connection.close()
        connection.wait([rank.pidfd], timeout=GRACE_S)
        if rank.process.poll() != 0:
            how = "did not exit" if rank.process.returncode is None else f"exited {rank.process.returncode}"
            raise RanksFailedError(f"{what}: rank {rank.number} had returned, then {how}:\n{rank.shown_output()}")


def outcome(rank: Rank) -> Any:
    if rank.connection is None:
        return rank.output.read_text(errors="replace")
    if rank.answer is None:
        return None
    if rank.answer.error:
        return Raised(rank.answer.error, rank.answer.message, rank.answer.text)
    return pickle.loads(rank.answer.value)


def run_ranks(
    fn_or_path: Callable[..., Any] | str | Path,
    world_size: int,
    *args: Any,
    backend: str | None = "hxcomm",
    timeout_s: float = 60.0,
    op_timeout_s: float = 30.0,
    env: Mapping[str, str] | None = None,
    expect: Mapping[int, signal.Signals | int | str] | None = None,
) -> list[Any]:
    """Runs a function or a script on `world_size` fresh processes and returns what each rank returned.

    A function stands at the top level of the test file and is called as fn(rank, world_size, *args) inside a process
    group of `backend` whose ops time out after `op_timeout_s`; with backend=None there is none (it may make its own:
    MASTER_ADDR and so on are set). Arguments and results are pickled. A path is run as `python PATH *args`, and what
    each rank printed is returned. All processes have ended when this returns, after `timeout_s` at the latest.

    `expect` says which ranks end otherwise: {1: signal.SIGKILL} dies by it (its result is None), {1: 3} exits with 3,
    {0: "PeerFailedError"} raises that (its result is a Raised, with the message). Anything else is a
    RanksFailedError, which shows every rank's last output.
    """
    store, address = rendezvous()
    try:
        given = {**address, **(env or {})}
        return run_placed(here, fn_or_path, world_size, args, backend, timeout_s, op_timeout_s, given, expect or {})
    finally:
        del store


def run_placed(
    place: Place,
    fn_or_path: Callable[..., Any] | str | Path,
    world_size: int,
    args: Sequence[Any],
    backend: str | None,
    timeout_s: float,
    op_timeout_s: float,
    env: Mapping[str, str],
    expect: Mapping[int, signal.Signals | int | str],
) -> list[Any]:
    """run_ranks with each rank where `place` puts it; `env` says where the rendezvous is."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        if callable(fn_or_path):
            job = make_job(fn_or_path, args, backend, op_timeout_s, {})
            ranks = start(world_size, None, Path(folder), env, place)
            what = job.function
        else:
            job = None
            what = " ".join([str(fn_or_path), *map(str, args)])
            command = [sys.executable, str(fn_or_path), *map(str, args)]
            ranks = start(world_size, command, Path(folder), env, place)
        try:
            if job is not None:
                send(ranks, job)
            values = collect(ranks, what, timeout_s, expect)
            leave(ranks, what)
            return values
        finally:
            for rank in ranks:
                rank.end()


def send(ranks: Sequence[Rank], job: Job) -> None:
    for rank in ranks:
        assert rank.connection is not None
        try:
            rank.connection.send(job)
        except OSError:
            rank.notes.append("was gone before it got the call")


class RankPool:
    """Warm processes that run many functions, each in a process group of its own: saves 2 s of `import torch` a test.

    A run in which anything fails ends the processes, and the next one gets fresh ones. What a process reads only once
    (a variable at the making of the first segment, say) calls for run_ranks instead; so do ranks that are to die.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        backend: str | None = "hxcomm",
        timeout_s: float = 60.0,
        op_timeout_s: float = 30.0,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """As run_ranks, without `expect`. `env` is set for this one call."""
        store, address = rendezvous()
        job = make_job(fn, args, backend, op_timeout_s, {**address, **(env or {})})
        if any(rank.process.poll() is not None for rank in self._ranks):
            self.close()
        if not self._ranks:
            self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
            self._ranks = start(self.world_size, None, Path(self._folder.name), {})
        for rank in self._ranks:
            rank.answer, rank.notes, rank.output_from = None, [], rank.output.stat().st_size
        send(self._ranks, job)
        try:
            return collect(self._ranks, job.function, timeout_s, {})
        except BaseException:
            self.close()
            raise
        finally:
            del store

    def close(self) -> None:
        for rank in self._ranks:
            rank.end()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
