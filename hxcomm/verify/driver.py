"""Runs the selected cases at each world size and collects a Report. Never longer than one limit a case, and start-up.

Ranks stay warm from case to case; they are replaced after a case that did not pass, spoils them by design, or left
the group unusable.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch._C._distributed_c10d import TCPStore

from hxcomm.verify.pool import Pool
from hxcomm.verify.rank import Job, Setup
from hxcomm.verify.registry import Case
from hxcomm.verify.results import NO_GROUP, Report, Result, outcome

AFTERWARDS_S = 3.0  # limit of what runs after a pass only to be reported
START_S = 60.0  # a machine full of other work starts processes slowly, and that is no backend's fault
ATTEMPTS = 2  # groups in a row that may fail to start before a world size is given up

Progress = Callable[[Result], None]


class Driver:
    """Ranks of one backend, as many as asked for. A context manager: leaving it ends them."""

    def __init__(
        self, backend: str, device: str, timeout_s: float, modules: Sequence[str] = (), api: str = "c10d"
    ) -> None:
        self.report = Report(backend, device, torch.__version__, timeout_s, tuple(modules), api)
        # In the driver, where no rank's death can take it away.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="verify-")
        self._pool: Pool | None = None
        self._jobs = 0
        self._incarnation = 0

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.kill()
        self._folder.cleanup()

    def run(self, cases: Sequence[Case], world_sizes: Sequence[int], progress: Progress) -> Report:
        """Runs every case that has enough ranks, world size by world size; `progress` is told each result."""
        for world_size in world_sizes:
            failed_starts = 0
            why = ""
            for case in cases:
                if world_size < case.check.min_ranks:
                    continue
                began = time.monotonic()
                if failed_starts < ATTEMPTS and (why := self._start(world_size)):
                    failed_starts += 1
                if why:
                    verdict, message, notes = "fail", f"{NO_GROUP}: {why}", dict[str, str]()
                else:
                    failed_starts = 0
                    verdict, message, notes = self._run(case)
                result = Result(
                    case=case.id,
                    category=case.check.category,
                    check=case.check.name,
                    says=case.check.says,
                    ranks=world_size,
                    outcome=verdict,
                    message=message,
                    notes=notes,
                    duration_s=round(time.monotonic() - began, 3),
                    reproducer=self.report.reproducer(case.id, world_size),
                )
                self.report.results.append(result)
                progress(result)
            self._replace(politely=True)
        return self.report

    def _start(self, world_size: int) -> str:
        """Sees to it that there is a group. Returns why there is none, or nothing."""
        if self._pool is not None:
            return ""
        self._incarnation += 1
        setup = Setup(
            api=self.report.api,
            backend=self.report.backend,
            device=self.report.device,
            world_size=world_size,
            store_port=self._store.port,
            incarnation=self._incarnation,
            modules=self.report.modules,
        )
        self._pool = Pool(setup, Path(self._folder.name))
        answers = self._pool.started(max(START_S, self.report.timeout_s))
        if all(answer.kind == "passed" for answer in answers):
            return ""
        self._replace()
        return next(f"rank {rank}: {each.message}" for rank, each in enumerate(answers) if each.kind != "passed")

    def _run(self, case: Case) -> tuple[str, str, dict[str, str]]:
        assert self._pool is not None
        answers = self._pool.run(self._job(case, self.report.timeout_s))
        verdict, message = outcome(answers, case.optional)
        abouts = dict.fromkeys(about for answer in answers for about in answer.notes)
        notes = {
            about: "; ".join(dict.fromkeys(answer.notes[about] for answer in answers if about in answer.notes))
            for about in abouts
        }
        if verdict == "pass" and case.check.afterwards is not None:
            limit_s = min(AFTERWARDS_S, self.report.timeout_s)
            after = self._pool.run(self._job(case, limit_s, afterwards=True))
            usable, why = outcome(after, optional=False)
            notes["afterwards"] = "the group is usable" if usable == "pass" else f"the group is unusable: {why}"
            if usable != "pass":
                self._replace()
        # Not after "unsupported" either: c10d's coalescing manager, for one, stays open when a call inside is refused.
        if verdict != "pass" or case.check.spoils:
            self._replace()
        return verdict, message, notes

    def _job(self, case: Case, timeout_s: float, afterwards: bool = False) -> Job:
        self._jobs += 1
        return Job(self._jobs, case.id, timeout_s, afterwards)

    def _replace(self, politely: bool = False) -> None:
        pool, self._pool = self._pool, None
        if pool is not None and politely:
            pool.leave()
        elif pool is not None:
            pool.kill()
