"""How a collective is timed: in interleaved blocks, with or without touching its buffers.

Blocks of the subjects follow each other (A B touch A B touch ...), so that a machine that slows down slows all of them
down. Knows nothing of backends: a subject is a function that is called again and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hxcomm.bench.operations import Buffers

Step = Callable[[], object]

BLOCKS = 10
# For each subject and size: 200 iterations of gloo at 64 MiB would take a quarter of a minute, and p99 wants hundreds.
BUDGET_S = 0.4
MIN_ITERATIONS, MAX_ITERATIONS = 20, 4000
TOUCH = "touch"  # the subject that touches the buffers and calls nothing


@dataclass(frozen=True)
class Times:
    """Of one call, in seconds, averaged over the ranks, as nccl-tests does by default. What touching took is off."""

    mean_s: float
    p50_s: float
    p99_s: float
    iterations: int


def touching(call: Step, buffers: Buffers) -> Step:
    """One iteration of a program: write the whole input, call, read the whole output."""
    # Nothing to write (broadcast, but for the root): an empty call keeps the ranks' iterations alike.
    write: Step = partial(buffers.input.words.fill, 0) if buffers.input else idle
    read: Step = partial(np.bitwise_or.reduce, buffers.output.words) if buffers.output else idle

    def step() -> None:
        write()
        call()
        read()

    return step


def idle() -> None:
    """What is called where the time of everything else is wanted."""


def sample(step: Step, iterations: int) -> list[int]:
    """Nanoseconds of each iteration. The clock's own 50 ns are in each."""
    clock = time.perf_counter_ns
    samples = [0] * iterations
    for i in range(iterations):
        begin = clock()
        step()
        samples[i] = clock() - begin
    return samples


def measure(
    calls: Mapping[str, Step], buffers: Buffers, *, touched: bool, iterations: int | None, also: Sequence[Step] = ()
) -> dict[str, Times]:
    """Times each of `calls` on the same buffers. Collective: every rank calls it with the same subjects.

    `iterations` of each are timed, None: as many as fit BUDGET_S, agreed between the ranks. The functions `also` are
    called once in every block, for probes that time themselves.
    """
    if buffers.input is not None:
        buffers.input.words.fill(0)  # repeated sums of zeros stay finite
    steps = {name: touching(call, buffers) if touched else call for name, call in calls.items()}
    counts = {name: iterations or _affordable(step) for name, step in steps.items()}
    if touched:
        steps[TOUCH] = touching(idle, buffers)
        counts[TOUCH] = max(counts.values())
    blocks = min(BLOCKS, *counts.values())
    samples: dict[str, list[list[int]]] = {name: [] for name in steps}
    for _ in range(blocks):
        for name, step in steps.items():
            dist.barrier()
            if name != TOUCH:
                step()  # ranks leave the barrier one after another; the first call waits for the last of them
            samples[name].append(sample(step, -(-counts[name] // blocks)))
        for probe in also:
            dist.barrier()
            probe()
    # The mean of a block holds what preemption costs; the median of the blocks leaves out what somebody else caused.
    touch_ns = median(mean(block) for block in samples[TOUCH]) if touched else 0.0
    return {name: _summary([ns for block in samples[name] for ns in block], touch_ns) for name in calls}


def _affordable(step: Step) -> int:
    """Iterations that fit the budget on the slowest rank; at least MIN_ITERATIONS."""
    step()
    each_s = over_ranks(median(sample(step, 3)) * 1e-9, op=dist.ReduceOp.MAX)
    return max(MIN_ITERATIONS, min(MAX_ITERATIONS, int(BUDGET_S / max(each_s, 1e-9))))


def _summary(samples: list[int], touch_ns: float) -> Times:
    p50, p99 = np.percentile(samples, [50, 99])
    mean_s, p50_s, p99_s = (over_ranks(max(0.0, float(ns) - touch_ns) * 1e-9) for ns in (mean(samples), p50, p99))
    return Times(mean_s, p50_s, p99_s, len(samples))


def over_ranks(value: float, op: Any = dist.ReduceOp.AVG) -> float:
    """The average over the ranks, or what another `op` gives, through the control group. Collective."""
    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared, op=op)
    return float(shared)
