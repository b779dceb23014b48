"""Warm ranks of one world size, and how each took part in a case: answered, died, or was still there when time was up.

Ranks are forked by multiprocessing's server, which has torch loaded. The pool ends only processes that it started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from hxcomm.verify import rank
from hxcomm.verify.rank import Answer, Job, Setup

GRACE_S = 3.0  # for the other ranks to answer, once one has answered that something is wrong
STACK_S = 1.0  # for a rank to write its stacks
LEAVE_S = 5.0  # for a rank to leave by itself


@dataclass
class Member:
    number: int
    process: ForkServerProcess
    connection: Connection
    output: Path
    written: int = 0  # bytes of output before the case

    def printed(self) -> str:
        """What the rank wrote during the case."""
        return self.output.read_bytes()[self.written :].decode(errors="replace") if self.output.exists() else ""


class Pool:
    """`world_size` ranks in one process group of the backend."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        """Starts the ranks, all with `setup` but for rank and output. Does not wait for their group: see started()."""
        self.world_size = setup.world_size
        self.members: list[Member] = []
        context = multiprocessing.get_context("forkserver")
        # The first functional collective of a process imports dynamo: seconds that belong to no check's limit.
        ours_loaded = sorted(name for name in sys.modules if name.startswith(__package__))
        context.set_forkserver_preload([*ours_loaded, "torch._dynamo"])
        for number in range(self.world_size):
            ours, theirs = context.Pipe(duplex=True)
            output = folder / f"rank{number}.txt"
            output.unlink(missing_ok=True)
            own = dataclasses.replace(setup, rank=number, output=str(output))
            process = context.Process(target=rank.serve, args=(own, theirs), daemon=True)
            process.start()
            theirs.close()
            self.members.append(Member(number, process, ours, output))

    def started(self, timeout_s: float) -> list[Answer]:
        """How making the group went, on each rank."""
        return self._collect(timeout_s)

    def run(self, job: Job) -> list[Answer]:
        """Each rank's answer; `kind` is also hung (nothing within the job's limit) or died (without announcing it)."""
        for member in self.members:
            member.written = member.output.stat().st_size
            with contextlib.suppress(OSError):  # a rank that has ended is noticed below
                member.connection.send(job)
        return self._collect(job.timeout_s)

    def _collect(self, timeout_s: float) -> list[Answer]:
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Answer] = {}
        ending: dict[int, Answer] = {}
        while waiting := [member for member in self.members if member.number not in answers]:
            handles = [handle for each in waiting for handle in (each.connection, each.process.sentinel)]
            left = deadline - time.monotonic()
            if left <= 0 or not connection.wait(handles, timeout=left):
                break
            for member in waiting:
                answer = self._next(member)
                if answer is not None and answer.kind == "ending":
                    ending[member.number] = answer
                elif answer is not None:
                    answers[member.number] = _judge_end(answer, ending.get(member.number))
                    if answers[member.number].kind in ("wrong", "raised", "refused", "lacking", "died"):
                        deadline = min(deadline, time.monotonic() + GRACE_S)
        for member in self.members:
            if member.number not in answers:
                answers[member.number] = Answer("hung", f"did not return within {timeout_s:g} s{_where(member)}")
        return [answers[number] for number in range(self.world_size)]

    @staticmethod
    def _next(member: Member) -> Answer | None:
        """The next thing that this rank said, its end included; None where it said nothing yet."""
        if member.connection.poll():
            try:
                answer: Answer = member.connection.recv()
                return answer
            except (EOFError, OSError):
                member.process.join(LEAVE_S)
        if member.process.exitcode is None:
            return None
        return Answer("died", status=member.process.exitcode, message=_last_words(member))

    def leave(self) -> None:
        """Lets the ranks destroy their group and exit, then ends what is left."""
        for member in self.members:
            member.connection.close()
        deadline = time.monotonic() + LEAVE_S
        for member in self.members:
            member.process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for member in self.members:
            member.process.kill()
        for member in self.members:
            member.process.join(LEAVE_S)
            member.connection.close()
            member.process.close()
        self.members = []


def _judge_end(answer: Answer, announced: Answer | None) -> Answer:
    if answer.kind != "died":
        return answer
    if announced is not None and announced.status == answer.status:
        return Answer("passed")
    status = answer.status
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    expected = "" if announced is None else f" instead of {announced.status}"
    return Answer("died", f"{how}{expected}{': ' + answer.message if answer.message else ''}", status=status)


def _last_words(member: Member) -> str:
    """The last line that a dead rank printed, if any: what terminate() and the like leave behind."""
    lines = [line.strip() for line in member.printed().splitlines() if line.strip()]
    said = [line for line in lines if re.search(r"error|what\(\)|abort|terminate|enforce", line, re.IGNORECASE)]
    return (said or lines or [""])[-1][:300]


def _where(member: Member) -> str:
    """Where in the checks a silent rank is, from the stacks that it writes when asked."""
    if member.process.pid is None or member.process.exitcode is not None:
        return ""
    before = len(member.printed())
    os.kill(member.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + STACK_S
    while time.monotonic() < deadline:
        stacks = member.printed()[before:]
        if re.search(
            r'/rank\.py", line \d+ in serve', stacks
        ):  # the outermost frame of the main thread: all is written
            places = re.findall(r'/(checks/\w+\.py)", line (\d+) in (\w+)', stacks)
            return " ({}:{}, in {})".format(*places[-1]) if places else ""
        connection.wait([member.process.sentinel], timeout=0.02)
    return ""
