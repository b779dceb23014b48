"""hxcomm's own all_reduce over shared memory, predicted from probes of the machine and measured in the same run.

    python scripts/predict_ourselves.py --plot docs/predict_ourselves.svg     (2 and 4 ranks, about a minute)

Tensors are on the device hx, whose memory peers reach: what runs is the written two_shot Schedule. Probes (those of
`hxcomm chips measure`, at buffers of 1 MiB and of 16 MiB) and measured calls alternate in every block: a machine that
slows down slows both. No all_reduce of these sizes is among the probes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hxcomm import algorithms

SIZES = tuple(4 << (10 + 2 * i) for i in range(7))  # 4 KiB to 16 MiB
# Two chips: one whose buffers stay in the caches, one whose do not. A CPU has no one bandwidth.
BUFFERS = {4 << 20: 1 << 20, 16 << 20: 16 << 20}  # sizes up to: bytes of the buffers in the exchange
BLOCKS, WARM_UP = 10, 4
TARGET_PERCENT, TARGET_MEDIAN_PERCENT = 30, 20


def predict_us(chip: Any, world_size: int, nbytes: int) -> float:
    from hxcomm.sim.engine import time_schedule

    schedule = algorithms.build("all_reduce", "two_shot", world_size)
    return time_schedule(schedule, chip, nbytes, itemsize=4).total_ps / 1e6


class Loop:
    """Calls as a program makes them: every rank writes its buffer, and all begin together."""

    def __init__(self, words: Any, call: Callable[[], object], group: Any) -> None:
        self.words, self.call, self.group = words, call, group
        self.samples_s: list[float] = []

    def sample(self, iterations: int) -> None:
        import torch.distributed as dist

        for i in range(WARM_UP + iterations):
            self.words.fill(0)
            dist.barrier(group=self.group)
            begin = time.perf_counter()
            self.call()
            if i >= WARM_UP:
                self.samples_s.append(time.perf_counter() - begin)


def measure(folder: Path) -> None:
    """What each rank runs: rank 0 leaves the chip files and the measured times there."""
    import torch
    import torch.distributed as dist

    from hxcomm.bench.chip import ChipProbes, chip_text
    from hxcomm.bench.operations import OPERATIONS, case_of
    from hxcomm.bench.probes import Probes
    from hxcomm.bench.session import TIMEOUT, use_chip
    from hxcomm.bench.timing import over_ranks
    from hxcomm.c10d import BACKEND, register_backend

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    use_chip()
    register_backend()
    group = dist.new_group(backend=BACKEND, timeout=TIMEOUT)
    floor_probes = Probes(rank, world_size)
    probes = {nbytes: ChipProbes(group, floor_probes, nbytes) for nbytes in BUFFERS.values()}
    loops = {}
    for nbytes in SIZES:
        case = case_of("all_reduce", nbytes, "float32", "sum", rank, world_size, "hx")
        buffers = OPERATIONS["all_reduce"].make(case)
        loops[nbytes] = Loop(buffers.input.words, OPERATIONS["all_reduce"].run(case, buffers, group), group)
    for _ in range(BLOCKS):
        for probe in probes.values():
            probe.sample()
        for nbytes, loop in loops.items():
            loop.sample(max(8, min(60, (64 << 20) // nbytes)))
    for nbytes, probe in probes.items():
        text = chip_text(probe.result(), f"hxcomm chips measure --ranks {world_size} --bytes {nbytes}")
        if rank == 0:
            (folder / f"{world_size}-{nbytes}.toml").write_text(text, encoding="utf-8")
    p50_us = {nbytes: over_ranks(median(loop.samples_s)) * 1e6 for nbytes, loop in loops.items()}
    if rank == 0:
        (folder / f"{world_size}.json").write_text(json.dumps(p50_us), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _buffers_for(nbytes: int) -> int:
    return next(buffers for up_to, buffers in BUFFERS.items() if nbytes <= up_to)


def compare(folder: Path, world_size: int) -> list[tuple[int, float, float]]:
    """(bytes, measured us, predicted us) of each size."""
    from hxcomm.sim import chips

    measured = json.loads((folder / f"{world_size}.json").read_text(encoding="utf-8"))
    points = []
    for nbytes in SIZES:
        chip = chips.load(folder / f"{world_size}-{_buffers_for(nbytes)}.toml")
        points.append((nbytes, measured[str(nbytes)], predict_us(chip, world_size, nbytes)))
    return points


def table(results: dict[int, list[tuple[int, float, float]]]) -> str:
    cores = len(os.sched_getaffinity(0))
    lines = ["| bytes | ranks | measured p50, us | predicted, us | error |", "|---|---|---|---|---|"]
    verdicts = []
    for world_size, points in results.items():
        errors = []
        for nbytes, measured, predicted in points:
            errors.append(100 * (predicted - measured) / measured)
            ranks = f"{world_size}" + (f" on {cores} cores" if world_size > cores else "")
            lines.append(f"| {nbytes:,} | {ranks} | {measured:,.1f} | {predicted:,.1f} | {errors[-1]:+.0f} % |")
        sizes = [abs(error) for error in errors]
        hits = sum(size <= TARGET_PERCENT for size in sizes)
        met = hits == len(sizes) and median(sizes) <= TARGET_MEDIAN_PERCENT
        verdicts.append(
            f"{world_size} ranks: {hits} of {len(sizes)} sizes within {TARGET_PERCENT} %, median {median(sizes):.0f} % "
            f"(target: all, {TARGET_MEDIAN_PERCENT} %): {'met' if met else 'missed'}."
        )
    return "\n".join([*lines, "", *verdicts])


def draw(results: dict[int, list[tuple[int, float, float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "hxcomm"
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for color, (world_size, points) in zip(("C0", "C1", "C2", "C3"), results.items(), strict=False):
        sizes = [nbytes for nbytes, _, _ in points]
        axes.plot(sizes, [us for _, us, _ in points], "o-", color=color, label=f"{world_size} ranks, measured")
        axes.plot(sizes, [us for _, _, us in points], "x--", color=color, label=f"{world_size} ranks, predicted")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SIZES, [f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB" for n in SIZES])
    axes.set_xlabel("all_reduce, bytes")
    axes.set_ylabel("microseconds")
    axes.grid(True, alpha=0.4)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="2,4", metavar="N,N")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw both curves (needs matplotlib)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave chip files and measured times there")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of is not None:
        measure(options.rank_of)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        results = {}
        for world_size in map(int, options.ranks.split(",")):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            ranks = [f"--nproc-per-node={world_size}", __file__, "--rank-of", str(folder)]
            subprocess.run([*torchrun, *ranks], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            results[world_size] = compare(folder, world_size)
    print(table(results))
    if options.plot is not None:
        draw(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
