"""all_reduce through MPI, measured exactly as hxcomm.bench measures it: the peers' side of scripts/bench.sh --mpi.

    mpirun -n 2 --oversubscribe python scripts/bench_mpi.py --sizes 4KiB,16KiB --json mpi.json

It runs in a virtual environment of its own with mpi4py and numpy alone (Open MPI and MPICH cannot share one), so it
imports nothing of hxcomm. In place (MPI_IN_PLACE), as torch.distributed's all_reduce is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import numpy as np
from mpi4py import MPI

# These as in hxcomm/bench/timing.py and arguments.py: the two tables are compared line by line.
BLOCKS = 10
BUDGET_S = 0.4
MIN_ITERATIONS, MAX_ITERATIONS = 20, 4000
TOUCHED_BYTES = 1 << 20
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "B": 1}
WORLD = MPI.COMM_WORLD

Step = Callable[[], object]


def parse_nbytes(text: str) -> int:
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return int(text.removesuffix(unit)) * factor
    return int(text)


def sample(step: Step, iterations: int) -> list[int]:
    clock = time.perf_counter_ns
    samples = [0] * iterations
    for i in range(iterations):
        begin = clock()
        step()
        samples[i] = clock() - begin
    return samples


def touching(call: Step, words: np.ndarray) -> Step:
    def step() -> None:
        words.fill(0)
        call()
        np.bitwise_or.reduce(words)

    return step


def count_wrong(buffer: np.ndarray, call: Step) -> int:
    """Wrong elements over all ranks, on inputs that add exactly."""
    index = np.arange(buffer.size) % 8191
    buffer[:] = index % 4 + WORLD.rank
    call()
    expected = (index % 4) * WORLD.size + sum(range(WORLD.size))
    return WORLD.allreduce(int((buffer != expected).sum()))


def measure(nbytes: int) -> dict[str, object]:
    """One row, with the fields of hxcomm.bench's JSON."""
    storage = np.zeros((nbytes + 63) // 64 * 8, dtype=np.int64)
    buffer = storage.view(np.float32)[: nbytes // 4]

    def call() -> None:
        WORLD.Allreduce(MPI.IN_PLACE, buffer)

    n_wrong = count_wrong(buffer, call)
    touched = nbytes <= TOUCHED_BYTES
    storage.fill(0)
    step = touching(call, storage) if touched else call
    each_s = WORLD.allreduce(median(sample(step, 3)) * 1e-9, op=MPI.MAX)
    iterations = max(MIN_ITERATIONS, min(MAX_ITERATIONS, int(BUDGET_S / each_s)))
    samples: list[int] = []
    touches: list[float] = []
    for _ in range(BLOCKS):
        WORLD.Barrier()
        step()
        samples += sample(step, -(-iterations // BLOCKS))
        WORLD.Barrier()
        if touched:
            touches.append(mean(sample(touching(lambda: None, storage), -(-iterations // BLOCKS))))
    touch_ns = median(touches) if touched else 0.0
    p50, p99 = np.percentile(samples, [50, 99])
    mean_us, p50_us, p99_us = (
        WORLD.allreduce(max(0.0, float(ns) - touch_ns) * 1e-3) / WORLD.size for ns in (mean(samples), p50, p99)
    )
    algbw = nbytes / mean_us / 1e3 if mean_us > 0 else 0.0
    return {
        "backend": "openmpi" if "Open MPI" in MPI.Get_library_version() else "mpich",
        "op": "all_reduce",
        "nbytes": nbytes,
        "count": nbytes // 4,
        "dtype": "float32",
        "reduce_op": "sum",
        "touched": touched,
        "iterations": len(samples),
        "time_us": mean_us,
        "p50_us": p50_us,
        "p99_us": p99_us,
        "algbw_gbps": algbw,
        "busbw_gbps": algbw * 2 * (WORLD.size - 1) / WORLD.size,
        "n_wrong": n_wrong + count_wrong(buffer, call),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", default="64,4KiB,16KiB,64KiB,1MiB,64MiB", help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args()
    rows = []
    for size in options.sizes.split(","):
        row = measure(parse_nbytes(size))
        rows.append(row)
        if WORLD.rank == 0:
            columns = ("nbytes", "count", "dtype", "reduce_op", "time_us", "algbw_gbps", "busbw_gbps", "n_wrong")
            shown = [row[name] for name in (*columns, "p50_us", "p99_us")]
            print(row["backend"], *(f"{x:>10.2f}" if isinstance(x, float) else f"{x:>10}" for x in shown), flush=True)
    if WORLD.rank == 0 and options.json is not None:
        options.json.write_text(json.dumps({"world_size": WORLD.size, "rows": rows}) + "\n", encoding="utf-8")
    return 1 if any(row["n_wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
