"""One run of the benchmark: groups, the sweep over ops and sizes, and what is done with the results.

Control traffic (agreeing on iterations, adding up wrong elements, lining up blocks) goes over a gloo group of its own,
so that the backends under test, gloo among them, are all used alike: each as a group made by new_group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hxcomm.bench import arguments, plot, table
from hxcomm.bench.arguments import Settings, UsageError
from hxcomm.bench.operations import OPERATIONS, Buffers, Case, Group, case_of, count_wrong
from hxcomm.bench.results import TORCHCOMM, Report, Row, bandwidths
from hxcomm.bench.timing import Times, measure, over_ranks
from hxcomm.c10d import BACKEND
from hxcomm.torchcomms import new_comm

NOTHING = "nothing"
# A backend that hangs ends the run after this long instead of torch's half hour.
TIMEOUT = datetime.timedelta(seconds=120)
Prepared = TypeVar("Prepared")


class Session:
    """What the ranks of one run share. The control group, gloo, is torch's default group."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        asked = [settings.backend, settings.compare, NOTHING if settings.floor else None]
        self.groups: dict[str, Group] = {}
        for name in asked:
            if name is not None and name not in self.groups:
                self.groups[name] = _make_group(name, settings.device)
        self.probes: Any = None
        if settings.floor:
            from hxcomm.bench.probes import Probes

            self.probes = Probes(self.rank, self.world_size)
        self.report = Report(
            world_size=self.world_size,
            backend=settings.backend,
            compare=settings.compare,
            device=settings.device,
            cores=len(os.sched_getaffinity(0)),
            torch=torch.__version__,
            command=shlex.join(sys.argv),
        )

    def run(self) -> Report:
        """Measures everything; rank 0 prints each line as it comes. Collective."""
        self._print(table.heading(self.report, floor=self.settings.floor))
        for op in self.settings.ops:
            self._print(f"# {op}")
            done = set()
            for size in (0,) if op == "barrier" else self.settings.sizes:
                case = case_of(op, size, self.settings.dtype, self.settings.reduce_op, *self._place())
                if case.nbytes not in done:  # small sizes may round to the same
                    done.add(case.nbytes)
                    self._measure(op, case)
        if self.probes is not None:
            self.report.hand_over_ns = self.probes.hand_over_ns()
            self.report.zmq = self.probes.zmq_one_way()
        return self.report

    def _place(self) -> tuple[int, int, str]:
        return self.rank, self.world_size, self.settings.device

    def _measure(self, op: str, case: Case) -> None:
        buffers = OPERATIONS[op].make(case)
        # The others are given CPU tensors over the same memory: what they know, and no copy that would slow them down.
        buffers_of = {name: buffers if name in (BACKEND, TORCHCOMM) else buffers.on_cpu() for name in self.groups}
        groups = {name: group for name, group in self.groups.items() if self._can_run(name, op, case, buffers_of[name])}
        if not groups:
            return
        wrong = {name: count_wrong(op, case, buffers_of[name], group) for name, group in groups.items()}
        touched = case.nbytes > 0 and self.settings.touched(case.nbytes)
        probe = self.probes.floor(case, touched) if self.probes is not None and op == "all_reduce" else None
        times = measure(
            {name: OPERATIONS[op].run(case, buffers_of[name], group) for name, group in groups.items()},
            buffers,
            touched=touched,
            iterations=self.settings.iterations,
            also=[probe.sample] if probe is not None else [],
        )
        for name, group in groups.items():  # measuring must not have broken anything
            n_wrong = int(
                over_ranks(wrong[name] + count_wrong(op, case, buffers_of[name], group), op=dist.ReduceOp.SUM)
            )
            self.report.rows.append(self._row(name, op, case, times[name], touched, n_wrong))
        if probe is not None:
            self.report.floors.append(probe.result())
        row = self.report.row(self.settings.backend, op, case.nbytes)
        if row is not None:
            self._print(table.line(self.report, row, floor=self.settings.floor))

    def _can_run(self, name: str, op: str, case: Case, buffers: Buffers) -> bool:
        """Tries the op once. A backend that refuses it on every rank is left out, and the report says so."""
        OPERATIONS[op].fill(case, buffers)
        problem = ""
        try:
            OPERATIONS[op].run(case, buffers, self.groups[name])()
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        failed = over_ranks(1.0 if problem else 0.0)
        if failed == 0:
            return True
        what = f"{name} does not run {op} of {case.nbytes} bytes of {case.dtype}"
        what += f" with {case.reduce_op}" if case.reduce_op else ""
        if failed < 1:
            raise RuntimeError(f"{what}: some ranks refused it and some did not; here: {problem or 'it worked'}")
        self.report.skipped.append(f"{what}: {problem}")
        self._print(self.report.skipped[-1])
        return False

    def _row(self, name: str, op: str, case: Case, times: Times, touched: bool, n_wrong: int) -> Row:
        algbw, busbw = bandwidths(case.nbytes, times.mean_s, OPERATIONS[op].bus_factor(self.world_size))
        return Row(
            backend=name,
            op=op,
            nbytes=case.nbytes,
            count=case.count,
            dtype=case.dtype,
            reduce_op=case.reduce_op,
            touched=touched,
            iterations=times.iterations,
            time_us=times.mean_s * 1e6,
            p50_us=times.p50_s * 1e6,
            p99_us=times.p99_s * 1e6,
            algbw_gbps=algbw,
            busbw_gbps=busbw,
            n_wrong=n_wrong,
        )

    def _print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def _make_group(backend: str, device: str) -> Group:
    """A group of all ranks. Raises UsageError where torch.distributed does not know the backend."""
    from hxcomm.c10d import register_backend

    register_backend()  # where hxcomm is used from its source tree, torch has not found it by itself
    if backend == TORCHCOMM:
        # Over a store that is there already: torchrun's, or the one that rank 0 opened for the default group.
        store = dist.distributed_c10d._get_default_store()
        return new_comm(
            BACKEND, device, TORCHCOMM, abort_process_on_timeout_or_error=False, timeout=TIMEOUT, store=store
        )
    name = backend
    if backend == NOTHING:
        from hxcomm.bench.nothing import register

        name = register()
    if not dist.is_backend_available(name):
        internal = ("undefined", "fake", "hxcomm_nothing")
        there = [each for each in dist.Backend.backend_list if dist.is_backend_available(each) and each not in internal]
        known = ", ".join([*sorted(there), TORCHCOMM, NOTHING])
        raise UsageError(f"torch.distributed has no backend {backend!r} here; it has {known}")
    return dist.new_group(backend=name, timeout=TIMEOUT)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark on this rank. Returns 0; 1 where a result was wrong or nothing ran; 2 for a wrong command."""

    def prepare() -> Settings:
        settings = arguments.parse(argv)
        if settings.plot is not None:
            plot.require()
        if settings.device == "hx":
            use_chip()
        return settings

    return under_torchrun("hxcomm.bench", prepare, lambda settings: _finish(Session(settings).run(), settings))


def under_torchrun(program: str, prepare: Callable[[], Prepared], run: Callable[[Prepared], int]) -> int:
    """What each rank of a program that measures does: prepare, then run inside torch's group, over gloo.

    What is wrong with the command (UsageError of either) is said once, by rank 0. Returns what `run` does, or 2.
    """
    prepared, problem = None, ""
    try:
        prepared = prepare()
    except UsageError as error:
        problem = str(error)
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    except ValueError as error:  # RANK and the like are not set
        problem = problem or f"start it with torchrun --nproc-per-node 2 -m {program} ({str(error).splitlines()[0]})"
        print(f"{program}: {problem}", file=sys.stderr)
        return 2
    try:
        if prepared is None:
            raise UsageError(problem)
        return run(prepared)
    except UsageError as error:
        if dist.get_rank() == 0:
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):  # a rank that leaves while another one still connects breaks gloo there
            dist.monitored_barrier(timeout=datetime.timedelta(seconds=5))
        return 2
    finally:
        dist.destroy_process_group()


def use_chip() -> None:
    """The chip of this rank. Raises UsageError where this process has none."""
    from hxcomm.device import registration

    if not registration.register():
        raise UsageError(f"--device hx: there is no such device here: {registration.problem()}")
    torch.accelerator.set_device_index(dist.get_node_local_rank(fallback_rank=0))


def _finish(report: Report, settings: Settings) -> int:
    if dist.get_rank() == 0:
        print(table.summary(report), flush=True)
        if settings.json is not None:
            report.save(settings.json)
        if settings.plot is not None:
            plot.draw(report, settings.plot)
    dist.barrier()
    return 1 if report.n_wrong() or not report.rows else 0
