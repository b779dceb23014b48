"""Builds csrc/tests with -fsanitize=... and runs them under a hard limit of time: what scripts/sanitize.sh calls.

The programs are csrc/tests/stress.cpp (ranks as threads, streams of operations on several groups, with the plans that
the compiler of schedules makes) and the unit tests. Objects are kept in build/sanitize-*, so a second run compiles only
what changed. No finding is suppressed.

TSan does not know atomic_thread_fence. That costs nothing here: the protocol's two fences (core/line.h) order only
atomics, to lose no wake-up, and no plain memory is handed over through them; a lost wake-up is what the model in
tests/core/test_memory_orders.py looks for. And it knows memory by its address, so under TSan the stress program maps
each segment once, where several processes would map it at several addresses. It sees nothing of what libzmq does, which
is not compiled with it: for the wire's tests it looks at our code only.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hxcomm import algorithms
from hxcomm.schedule import compile_plan
from hxcomm.schedule.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
KINDS = ("thread", "address", "undefined")
LIMIT_S = 300
# The extension's flags that decide what is correct; -O1 keeps stacks readable. GCC warns (tsan) at each fence.
FLAGS = [
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-std=c++20", "-Wall", "-Wextra", "-Wconversion", "-Wno-tsan"),
    *("-ffp-contract=off", "-pthread", "-fno-sanitize-recover=all", f"-I{CSRC}"),
]
OPTIONS = {
    "TSAN_OPTIONS": "second_deadlock_stack=1 die_after_fork=0",
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def write_plans(path: Path) -> None:
    """One plan a line, as csrc/tests/stress.cpp reads them."""
    lines = []
    for world_size in (2, 3, 4):
        for op in ("all_reduce", "broadcast", "all_gather", "barrier"):
            for root in range(world_size) if OPS[op].rooted else (None,):
                for name in algorithms.names(op):
                    schedule = algorithms.build(op, name, world_size, root)
                    for rank in range(world_size):
                        plan = compile_plan(schedule, rank)
                        head = (op, world_size, rank, -1 if root is None else root, name, plan.plan_hash)
                        lines.append(" ".join(map(str, (*head, len(plan.words), *plan.words))))
    path.write_text("\n".join(lines) + "\n")


class Build:
    """The programs of one kind (or several, joined by commas)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.folder = ROOT / "build" / f"sanitize-{kind}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.compiler = shlex.split(os.environ.get("CXX", "c++"))
        self.newest_header = max(path.stat().st_mtime for path in CSRC.rglob("*.h"))

    def run(self, *words: str | Path) -> None:
        command = [*self.compiler, *FLAGS, f"-fsanitize={self.kind}", *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S)
        if done.returncode != 0:
            sys.exit(f"{shlex.join(command)}\nended with {done.returncode}:\n{done.stdout}")

    def compiled(self, source: Path) -> Path:
        target = self.folder / f"{source.parent.name}_{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, self.newest_header):
            self.run("-c", source, "-o", target)
        return target

    def objects(self) -> list[Path]:
        sources = [path for layer in ("core", "transport", "communicator") for path in (CSRC / layer).glob("*.cpp")]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.compiled, sorted(sources)))

    def program(self, name: str, objects: list[Path]) -> Path:
        target = self.folder / name
        wraps = ["-Wl,--wrap=mmap,--wrap=munmap"] if name == "stress" and "thread" in self.kind else []
        self.run(self.compiled(CSRC / "tests" / f"{name}.cpp"), *objects, *wraps, "-ldl", "-o", target)
        return target


def loaded_libzmq() -> list[str]:
    """Where pyzmq's libzmq is: the wire finds it in a process that has loaded it, which these programs have not."""
    import zmq  # noqa: F401

    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in maps if "libzmq" in line})


def outcome_of(program: Path, arguments: list[str]) -> str:
    """ "ok", or what went wrong; what the program printed then goes to stderr."""
    # Without random addresses: with more random bits than it was built for, libtsan refuses to start.
    fixed = ["setarch", "--addr-no-randomize"]
    if shutil.which("setarch") is None or subprocess.run([*fixed, "true"], capture_output=True).returncode != 0:
        fixed = []
    environment = {**os.environ, **OPTIONS}
    if program.name.startswith("wire"):
        environment["TSAN_OPTIONS"] += " ignore_noninstrumented_modules=1"
    try:
        done = subprocess.run(
            [*fixed, str(program), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired as expired:
        print((expired.stdout or b"").decode(errors="replace"), file=sys.stderr)
        return f"killed after {LIMIT_S} s"
    if done.returncode == 0:
        return "ok"
    print(done.stdout, file=sys.stderr)
    findings = sum("SUMMARY: " in line or "runtime error: " in line for line in done.stdout.splitlines())
    return f"ended with {done.returncode}, {findings} findings"


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the C++ tests under sanitizers.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}, or several joined by commas")
    parser.add_argument("--quick", action="store_true", help="the stress program only")
    parser.add_argument("--steps", type=int, default=60, help="operations of each group in the stress program")
    parser.add_argument("--seed", type=int, default=1, help="of the stress program")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        if not set(kind.split(",")) <= set(KINDS):
            parser.error(f"there is no sanitizer {kind!r}; there are: {', '.join(KINDS)}")

    failed = False
    for kind in arguments.kinds or KINDS:
        started = time.monotonic()
        build = Build(kind)
        objects = build.objects()
        names = [
            "stress",
            *(() if arguments.quick else sorted(path.stem for path in (CSRC / "tests").glob("*_test.cpp"))),
        ]
        programs = {name: build.program(name, objects) for name in names}
        print(f"{kind}: built in {time.monotonic() - started:.0f} s", flush=True)
        plans = build.folder / "plans"
        write_plans(plans)
        for name, program in programs.items():
            started = time.monotonic()
            words = [str(plans), str(arguments.steps), str(arguments.seed)] if name == "stress" else []
            words = loaded_libzmq() if name.startswith("wire") else words
            outcome = outcome_of(program, words)
            failed = failed or outcome != "ok"
            print(f"{kind}: {name}: {outcome} ({time.monotonic() - started:.1f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
