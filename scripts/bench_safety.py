"""What safety costs: 16 KiB all_reduce of 2 ranks, against the same core without the checks (csrc/core/checks.h).

    python scripts/bench_safety.py [--blocks 200] [--calls 2000] [--ranks 2]

Compiles the core twice, with the same flags but -DHXCOMM_UNCHECKED: without fingerprints, their comparison, polls of
the abort word and of deadlines. Two pairs of processes, one a build, run in turn, a block of calls each; a call is that
of the core from Python (no torch around it). Prints the medians and the median of the ratios of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBYTES = 16 << 10
BUILDS = {"checked": [], "unchecked": ["-DHXCOMM_UNCHECKED"]}
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def make_package(name: str, flags: list[str]) -> Path:
    """A folder with the package hxcomm, whose core is compiled with more flags, and everything else is this tree's."""
    sys.path.insert(0, str(ROOT))
    import setup  # the extension's own flags

    folder = ROOT / "build" / f"safety-{name}"
    package = folder / "hxcomm"
    package.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "hxcomm").iterdir():
        link = package / path.name
        if not path.name.startswith("_core.") and not link.exists():
            link.symlink_to(path)
    core = next(module for module in setup.extension_modules() if module.name == "hxcomm._core")
    target = package / f"_core{SUFFIX}"
    sources = [ROOT / source for source in core.sources]
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if not target.exists() or target.stat().st_mtime < newest:
        print(f"compiling the core, {name}", file=sys.stderr)
        command = [*shlex.split(os.environ.get("CXX", "c++")), "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=_core"]
        command += [*flags, *core.extra_compile_args, *(f"-I{path}" for path in core.include_dirs)]
        subprocess.run([*command, *map(str, sources), "-o", str(target), "-ldl"], check=True, timeout=900)
    return folder


def rank_main(rank: int, world_size: int, folder: Path) -> None:
    """Answers each line "CALLS" of standard input with the microseconds that one of so many calls took."""
    from torch.distributed import FileStore

    from hxcomm import _core, bootstrap
    from hxcomm.select import SEGMENT_BYTES, Layout, Planner

    planner = Planner(rank, Layout(world_size), "safety", {}, SEGMENT_BYTES)
    group = bootstrap.create_group(
        bootstrap.StoreMeeting(FileStore(str(folder / "store"), world_size), rank, "safety", timeout_s=60.0),
        world_size=world_size,
        global_ranks=list(range(world_size)),
        settings=planner.settings(),
        planner=planner,
    )
    memory = (ctypes.c_float * (NBYTES // 4))()
    block = [(ctypes.addressof(memory), len(memory))]
    call = _core.Call(op="all_reduce", dtype="float32", input=block, output=block, count=len(memory))
    for line in sys.stdin:
        calls = int(line)
        for _ in range(50):
            group.run(call)
        begin = time.perf_counter()
        for _ in range(calls):
            group.run(call)
        print((time.perf_counter() - begin) / calls * 1e6, flush=True)


class Pair:
    """The ranks of one build."""

    def __init__(self, name: str, world_size: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="safety-")
        environment = {**os.environ, "PYTHONPATH": str(make_package(name, BUILDS[name]))}
        command = [sys.executable, __file__, f"--ranks={world_size}", f"--folder={self.folder.name}"]
        self.processes = [
            subprocess.Popen(
                [*command, f"--rank={rank}"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for rank in range(world_size)
        ]

    def block_us(self, calls: int) -> float:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{calls}\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        return statistics.fmean(float(answer) for answer in answers)

    def end(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=60)
        self.folder.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--calls", type=int, default=2000, help="in a block")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank_main(args.rank, args.ranks, args.folder)
        return 0
    if args.blocks < 2 or args.calls < 1 or args.ranks < 2:
        parser.error("--blocks and --ranks are at least 2, --calls at least 1")
    pairs = {name: Pair(name, args.ranks) for name in BUILDS}
    times: dict[str, list[float]] = {name: [] for name in BUILDS}
    for number in range(args.blocks):
        for name in BUILDS if number % 2 else reversed(BUILDS):
            times[name].append(pairs[name].block_us(args.calls))
    for pair in pairs.values():
        pair.end()
    for name, values in times.items():
        print(f"{name:10} {statistics.median(values):.3f} us a call (fastest block {min(values):.3f})")
    ratios = [a / b for a, b in zip(times["checked"], times["unchecked"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"checked / unchecked: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}, of {len(ratios)} blocks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
