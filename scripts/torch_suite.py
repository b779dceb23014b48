#!/usr/bin/env python3
"""torch's own suite of torch.distributed, run against a backend: `python scripts/torch_suite.py --backend hxcomm`.

The tests are those of `torch.testing._internal.distributed.distributed_test.DistributedTest._DistTestBase`, which the
torch wheel carries. Needs expecttest (`pip install -e '.[dev]'`). The suite gives a backend that it does not know next
to nothing: it asks for gloo by name. So the class is imported as if for gloo, the backend is added to every feature set
that gloo is in, and only then the suite's BACKEND becomes the backend under test. Two results are compared with
`--against`.

One test after the other: a process of its own, which forks the ranks. A test that outlives its limit is ended, with all
that it started, and costs nobody else anything. The suite looks at rank 0's exit code alone; here every rank's counts.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

OUTCOMES = ("passed", "failed", "skipped", "hung")
# The suite asks the ranks for their stacks when the limit is over; what that takes at most, all ranks together.
STACKS_S = 25
# These two test that a rank which is behind ends with an error, whatever its exit code is; the suite skips it, too.
ANY_EXIT_CODE = ("test_ddp_has_finalized",)


class Alias(str):
    """The name of the backend under test, which is equal to that of the backend that the suite looks for, too."""

    also: str

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other == self.also

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def load(backend: str, imported_as: str, ranks: int, timeout_s: int) -> type[unittest.TestCase]:
    """The suite as one test case class, for a backend that is already registered."""
    # Each test gets a file of its own for its store; what is here only says that it is a file.
    os.environ.update(BACKEND=imported_as, WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", INIT_METHOD="file://")
    try:
        from torch.testing._internal import common_distributed
        from torch.testing._internal.distributed import distributed_test
    except ModuleNotFoundError as error:
        sys.exit(f"torch's suite needs {error.name}: pip install -e '.[dev]'")

    for backends in common_distributed.DistTestCases.backend_feature.values():
        if "gloo" in backends:
            backends.add(backend)
    for name in ("PROFILING", "CUDA_PROFILING", "SEND_RECV_PROFILING"):
        getattr(distributed_test, f"{name}_SUPPORTED_BACKENDS").append(backend)
    distributed_test.BACKEND = Alias(backend)
    distributed_test.BACKEND.also = imported_as
    common_distributed.TIMEOUT_DEFAULT = timeout_s
    common_distributed.TIMEOUT_OVERRIDE.clear()

    class TorchSuite(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
        def setUp(self) -> None:
            super().setUp()
            distributed_test.INIT_METHOD = os.environ["INIT_METHOD"]  # of this test
            # Forked instead of spawned: importing torch and this suite four times costs more than most of the tests.
            self._start_processes(multiprocessing.get_context("fork").Process)

        def _check_return_codes(self, fn: Any, elapsed_time: float) -> None:
            super()._check_return_codes(fn, elapsed_time)
            codes = [process.exitcode for process in self.processes]
            if len(set(codes)) > 1 and self._current_test_name() not in ANY_EXIT_CODE:
                raise RuntimeError(f"ExitCodesError: the ranks ended with different exit codes: {codes}")

    return TorchSuite


def judge(case: unittest.TestCase) -> dict[str, str]:
    result = unittest.TestResult()
    case.run(result)
    for _, text in result.errors + result.failures:
        return {
            "outcome": "hung" if re.search(r"Process \d+ terminated or timed out after", text) else "failed",
            "detail": first_error(text),
            "text": text,
        }
    for _, reason in result.skipped:
        return {"outcome": "skipped", "detail": reason}
    return {"outcome": "passed", "detail": ""}


def first_error(text: str) -> str:
    """The line that says what went wrong on the first rank that failed."""
    lines = [line for line in text.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    inner = [line for line in lines if not re.match(r"RuntimeError: Process \d+ exited with error code", line)]
    return (inner or lines or text.strip().splitlines()[-1:])[0][:300]


def run_one(suite: type[unittest.TestCase], name: str, timeout_s: int) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _run_as_leader(suite, name, sender, output.fileno())
        with contextlib.suppress(
            PermissionError, ProcessLookupError
        ):  # done in both: whoever is first, before the kill
            os.setpgid(pid, pid)
        sender.close()
        verdict = {"outcome": "hung", "detail": f"did not end in {timeout_s} s"}
        if receiver.poll(timeout_s + STACKS_S):
            try:
                verdict = receiver.recv()
            except EOFError:
                verdict = {"outcome": "failed", "detail": "the process that ran the test died"}
        os.killpg(pid, signal.SIGKILL)  # the process, which is not reaped yet, and what it has left behind
        os.waitpid(pid, 0)
        if verdict["outcome"] in ("failed", "hung"):
            output.seek(0)
            verdict["text"] = verdict.get("text", "") + output.read()
    return {"test": name, "seconds": round(time.monotonic() - started, 1), **verdict}


def _run_as_leader(suite: type[unittest.TestCase], name: str, sender: Any, output: int) -> None:
    """In the forked process: leads a group of its own, so that whatever it leaves behind ends with it."""
    os.setpgid(0, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        sender.send(judge(suite(name)))
    finally:
        sender.close()
        os._exit(0)


def report(backend: str, ranks: int, results: list[dict[str, Any]]) -> None:
    counts = collections.Counter(each["outcome"] for each in results)
    print(f"\n{backend}, {ranks} ranks: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES))
    for outcome in ("failed", "hung"):
        for each in results:
            if each["outcome"] == outcome:
                print(f"  {outcome:6}  {each['test']}: {each['detail']}")


def compare(backend: str, results: list[dict[str, Any]], other: dict[str, Any]) -> list[str]:
    """Prints what the other backend passes and this one does not, and the reverse; returns the first of the two."""
    mine = {each["test"]: each for each in results}
    theirs = {each["test"]: each for each in other["results"]}
    both = [name for name in mine if name in theirs]
    ours = [name for name in both if mine[name]["outcome"] == "passed"]
    others = [name for name in both if theirs[name]["outcome"] == "passed"]
    lost = [name for name in others if name not in ours]
    for title, names, table in (
        (f"{other['backend']} passes and {backend} does not", lost, mine),
        (f"{backend} passes and {other['backend']} does not", [name for name in ours if name not in others], theirs),
    ):
        print(f"\n{title}: {len(names)}")
        for name in names:
            print(f"  {table[name]['outcome']:7} {name}: {table[name]['detail']}")
    return lost


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="hxcomm", help="default: hxcomm")
    parser.add_argument(
        "--as",
        dest="imported_as",
        choices=("gloo", "mpi"),
        default="gloo",
        help="the backend that the suite's decorators are told; mpi: for the all_to_all tests, which gloo is not given",
    )
    parser.add_argument("--ranks", type=int, default=4, help="default: 4")
    parser.add_argument("-k", dest="pattern", default="", help="only tests whose name this regular expression finds")
    parser.add_argument("--timeout", type=int, default=120, metavar="S", help="for each test; default: 120 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after each test")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with another run's --json")
    parser.add_argument("--verbose", action="store_true", help="print everything that failing tests have printed")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.backend == "hxcomm":
        import hxcomm

        print(f"hxcomm from {Path(hxcomm.__file__).parent}", flush=True)
    suite = load(args.backend, args.imported_as, args.ranks, args.timeout)
    names = [name for name in unittest.TestLoader().getTestCaseNames(suite) if re.search(args.pattern, name)]
    results: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        result = run_one(suite, name, args.timeout)
        text = result.pop("text", "")
        results.append(result)
        print(f"[{i + 1}/{len(names)}] {result['outcome']:7} {result['seconds']:6.1f} s  {name}", flush=True)
        if args.verbose and text:
            print(text, flush=True)
        if args.json:
            args.json.write_text(json.dumps({"backend": args.backend, "ranks": args.ranks, "results": results}))
    report(args.backend, args.ranks, results)
    if args.against:
        return 1 if compare(args.backend, results, json.loads(args.against.read_text())) else 0
    return 1 if any(each["outcome"] in ("failed", "hung") for each in results) else 0


if __name__ == "__main__":
    sys.exit(main())
