"""Holds every operator on hx against the same on CPU: torch's own samples (OpInfo), all dtypes that CPU supports.

`python scripts/opinfo.py --write docs/opinfo.md` runs all in some minutes on a few cores; `--only add --dtype float32`
looks at one. What is not expected to agree is data, with a reason: opinfo_exceptions.py. tests/device/test_ops.py runs
a slice of this.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from opinfo_exceptions import ARGUMENTS_ON_CPU, EXCEPTIONS, UNINITIALIZED
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

SAMPLES = 4
SEED = 2026
OPS_A_PROCESS = 40
TIMEOUT_S = 900.0  # of one process
FORWARD, GRADIENT = "forward", "gradient"


@dataclass
class Outcome:
    """One (operator, dtype), forward or gradients: how many samples agreed, and the first that did not."""

    op: str
    dtype: str
    kind: str
    samples: int = 0
    exact: bool = True  # bit by bit
    problem: str = ""

    @property
    def reason(self) -> str:
        """Why it may fail; empty: it may not."""
        for pattern in ((self.op, self.kind), (self.op, "any")):
            if (found := EXCEPTIONS.get(pattern)) and (not found.dtypes or self.dtype in found.dtypes):
                return found.reason
        return ""


@dataclass
class Tally:
    passed: int = 0
    exact: int = 0
    excepted: list[Outcome] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    empty: int = 0  # pairs of which CPU itself runs no sample

    def add(self, outcome: Outcome) -> None:
        if not outcome.problem:
            if outcome.samples:
                self.passed += 1
                self.exact += outcome.exact
            else:
                self.empty += 1
        elif outcome.reason:
            self.excepted.append(outcome)
        else:
            self.failed.append(outcome)

    @property
    def share(self) -> float:
        total = self.passed + len(self.excepted) + len(self.failed)
        return self.passed / total if total else 1.0


def to_hx(value: Any) -> Any:
    return tree_map(lambda x: x.detach().to("hx").requires_grad_(x.requires_grad) if torch.is_tensor(x) else x, value)


def on_device(value: Any) -> Any:
    """Arguments that name a device name the other one."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value == "cpu"):
        return torch.device("hx")
    return value


def dense(value: Any) -> bool:
    return all(x.layout == torch.strided for x in tree_leaves(value) if torch.is_tensor(x))


def call(op: OpInfo, sample: Any, move: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The operator's result, and the arguments it was given."""
    others: tuple[Any, Any] = (sample.args, dict(sample.kwargs))
    arguments = (move(sample.input), *(copy_of(others) if op.name in ARGUMENTS_ON_CPU else move(others)))
    if move is to_hx:
        arguments = tree_map(on_device, arguments)
    torch.manual_seed(SEED)
    return op.op(arguments[0], *arguments[1], **arguments[2]), arguments


def copy_of(value: Any) -> Any:
    return tree_map(lambda x: x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x, value)


def compare(op: OpInfo, cpu: Any, hx: Any) -> bool:
    """Whether the results are the same bit by bit. Raises AssertionError where not even by torch's tolerances."""
    exact = True
    ours, theirs = tree_flatten(hx)[0], tree_flatten(cpu)[0]
    assert len(ours) == len(theirs), f"{len(ours)} results instead of {len(theirs)}"
    for mine, right in zip(ours, theirs, strict=True):
        if not torch.is_tensor(right):
            assert mine == right or mine != mine, f"{mine} instead of {right}"
            continue
        assert mine.device.type == "hx", f"a result on {mine.device}"
        assert mine.shape == right.shape and mine.dtype == right.dtype, f"{mine.shape} {mine.dtype}"
        assert mine.stride() == right.stride(), f"strides {mine.stride()} instead of {right.stride()}"
        if op.name not in UNINITIALIZED:
            try:
                torch.testing.assert_close(mine.cpu(), right, rtol=0, atol=0, equal_nan=True)
            except AssertionError:
                exact = False
                torch.testing.assert_close(mine.cpu(), right, equal_nan=True)
    return exact


def gradients(result: Any, arguments: Any) -> list[Any]:
    roots = [x for x in tree_leaves(result) if torch.is_tensor(x) and x.requires_grad]
    leaves = [x for x in tree_leaves(arguments) if torch.is_tensor(x) and x.requires_grad]
    torch.manual_seed(SEED)
    return list(torch.autograd.grad(roots, leaves, [torch.ones_like(x) for x in roots], allow_unused=True))


def check(op: OpInfo, dtype: torch.dtype, kind: str) -> Outcome:
    outcome = Outcome(op.full_name, str(dtype).removeprefix("torch."), kind)
    wants_gradient = kind == GRADIENT
    torch.manual_seed(SEED)
    try:
        samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=wants_gradient), SAMPLES))
    except Exception:  # torch's samples do not exist for this dtype on this machine
        return outcome
    for sample in samples:
        if not dense((sample.input, sample.args, sample.kwargs)):
            continue
        try:
            right, given = call(op, sample, copy_of)
            expected = gradients(right, given) if wants_gradient else right
            if not dense(expected):
                continue
        except Exception:  # CPU does not support this sample
            continue
        try:
            mine, arguments = call(op, sample, to_hx)
            outcome.exact &= compare(op, expected, gradients(mine, arguments) if wants_gradient else mine)
            outcome.samples += 1
        except Exception as error:
            outcome.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            break
    return outcome


def cases(only: str = "", dtypes: tuple[str, ...] = ()) -> Iterator[tuple[OpInfo, list[torch.dtype]]]:
    for op in op_db:
        if only in op.full_name:
            yield op, [d for d in sorted(op.supported_dtypes("cpu"), key=str) if not dtypes or str(d)[6:] in dtypes]


def check_op(index: int, dtypes: tuple[str, ...]) -> list[Outcome]:
    """All dtypes of the operator with this number in op_db."""
    torch.set_num_threads(1)
    op = op_db[index]
    outcomes = []
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")
        for dtype in next(all_dtypes for each, all_dtypes in cases(op.full_name, dtypes) if each is op):
            outcomes.append(check(op, dtype, FORWARD))
            if op.supports_autograd and dtype in op.supported_backward_dtypes("cpu"):
                outcomes.append(check(op, dtype, GRADIENT))
    return outcomes


def work(numbers: list[int], dtypes: tuple[str, ...]) -> None:
    """In a process of its own: for each operator a line when it begins and one with its outcomes."""
    for number in numbers:
        print(json.dumps({"begins": number}), flush=True)
        outcomes = [vars(outcome) for outcome in check_op(number, dtypes)]
        copies = torch.hx.output_copies() if torch.hx.is_initialized() else 0
        print(json.dumps({"ends": number, "outcomes": outcomes, "copies": copies}), flush=True)


def look_after(numbers: list[int], dtypes: tuple[str, ...]) -> tuple[list[Outcome], int]:
    """Has processes work on these operators, one after another; one that ends its process counts as failed."""
    outcomes: list[Outcome] = []
    total_copies = 0
    while numbers:
        command = [sys.executable, __file__, "--work", ",".join(map(str, numbers[:OPS_A_PROCESS]))]
        command += [word for dtype in dtypes for word in ("--dtype", dtype)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        limit = threading.Timer(TIMEOUT_S, worker.kill)
        limit.start()
        assert worker.stdout is not None
        begun, copies = numbers[0], 0
        for line in worker.stdout:
            said = json.loads(line)
            if "begins" in said:
                begun = said["begins"]
                continue
            outcomes += [Outcome(**each) for each in said["outcomes"]]
            numbers.remove(said["ends"])
            copies = said["copies"]
        limit.cancel()
        total_copies += copies
        if worker.wait() != 0:
            problem = f"its process ended with status {worker.returncode}"
            outcomes.append(Outcome(op_db[begun].full_name, "any", FORWARD, problem=problem))
            numbers.remove(begun)
    return outcomes, total_copies


def run(only: str, dtypes: tuple[str, ...], jobs: int) -> tuple[list[Outcome], int]:
    """Every outcome, and how many outputs were copied."""
    numbers = [i for i, op in enumerate(op_db) if only in op.full_name]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(lambda part: look_after(part, dtypes), (numbers[i::jobs] for i in range(jobs))))
    return [outcome for part, _ in parts for outcome in part], sum(copies for _, copies in parts)


def report(outcomes: list[Outcome]) -> str:
    lines = []
    for kind in (FORWARD, GRADIENT):
        tally = Tally()
        for outcome in outcomes:
            if outcome.kind == kind:
                tally.add(outcome)
        total = tally.passed + len(tally.excepted) + len(tally.failed)
        lines.append(f"## {kind.capitalize()}: {100 * tally.share:.2f} %\n")
        lines.append(
            f"{tally.passed} of {total} pairs of operator and dtype agree, {tally.exact} of them bit by bit. "
            f"CPU itself runs no dense sample of {tally.empty} more.\n"
        )
        lines += [f"- {o.op}, {o.dtype}: {o.reason}" for o in tally.excepted]
        lines += [f"- **{o.op}, {o.dtype}**: {o.problem}" for o in tally.failed]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="operators whose name contains this")
    parser.add_argument("--dtype", action="append", default=[], help="only this dtype, e.g. float32; repeatable")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the result there, as Markdown")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work([int(number) for number in options.work.split(",")], tuple(options.dtype))
        return 0
    outcomes, copies = run(options.only, tuple(options.dtype), options.jobs)
    text = report(outcomes) + f"\nOutputs that were copied: {copies}\n"
    print(text)
    if options.write:
        head = "# Operators on hx, held against CPU\n\nWritten by `python scripts/opinfo.py --write`.\n\n"
        options.write.write_text(head + text)
    return 1 if any(o.problem and not o.reason for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
