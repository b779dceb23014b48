"""Streams of calls with random inputs, what must come of each, and what its user may see of a wrong one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hxcomm import algorithms
from hxcomm.schedule import OPS

Blocks = list[list[int]]

GARBAGE = -(10**12)  # no sum of inputs comes near it
WORLD_SIZES = range(2, 9)


class WrongError(AssertionError):
    """The group did what its users must never see."""


@dataclass(frozen=True)
class Call:
    """What one rank asks for. counts[s][d]: elements of a block; for all but all_to_all they are all equal."""

    op: str
    algorithm: str
    root: int | None
    counts: tuple[tuple[int, ...], ...]
    window: int
    refused: bool = False

    def fingerprint(self) -> tuple[object, ...]:
        uniform = None if self.op == "all_to_all" else self.counts
        return (self.op, self.algorithm, self.root, uniform, self.window, self.refused)


@dataclass
class Buffers:
    input: Blocks
    output: Blocks


@dataclass(frozen=True)
class Step:
    """One position of the stream: what each rank calls, with which inputs, and what must come of it."""

    calls: tuple[Call, ...]
    inputs: tuple[Blocks, ...]

    @property
    def mismatch(self) -> bool:
        return len({call.fingerprint() for call in self.calls}) > 1

    def buffers(self, rank: int) -> Buffers:
        call, n = self.calls[rank], len(self.calls)
        meaning = OPS[call.op]
        given = [list(block) for block in self.inputs[rank]]
        if meaning.in_place:
            return Buffers(given, given)
        blocks = 0 if meaning.output_at_root_only and rank != call.root else meaning.layout("output", n, 1).blocks
        return Buffers(given, [[GARBAGE] * call.counts[block][rank] for block in range(blocks)])

    def check(self, rank: int, buffers: Buffers, where: str) -> None:
        call, n = self.calls[rank], len(self.calls)
        meaning = OPS[call.op]
        expected: dict[int, list[int]] = {}
        for block in range(len(buffers.output)):
            result = None if self.mismatch else meaning.result(rank, block, n, call.root)
            if result is not None:
                ranks, taken = result
                columns = zip(*(self.inputs[each][taken] for each in ranks), strict=True)
                expected[block] = [sum(column) for column in columns]
            elif meaning.in_place:
                expected[block] = self.inputs[rank][block]
            else:
                expected[block] = [GARBAGE] * len(buffers.output[block])
        for block, elements in expected.items():
            if buffers.output[block] != elements:
                raise WrongError(f"{where}: block {block} of the output is {buffers.output[block]}, not {elements}")
        if not meaning.in_place and buffers.input != self.inputs[rank]:
            raise WrongError(f"{where}: the input was changed to {buffers.input} from {self.inputs[rank]}")


def random_call(rng: random.Random, n: int, op: str | None = None, algorithm: str | None = None) -> Call:
    op = op or rng.choice(algorithms.OPS)
    algorithm = algorithm or rng.choice(algorithms.names(op))
    longest = rng.choice((0, 1, n, 2 * n, 2 * n + 1))  # 2n: as many elements as the chunks of bidirectional rings
    if op == "all_to_all":
        counts = tuple(tuple(rng.randint(0, longest) for _ in range(n)) for _ in range(n))
    else:
        counts = ((longest,) * n,) * n
    window = rng.choice((max(longest, 1), max(longest, 1), (longest + 1) // 2 or 1))
    return Call(op, algorithm, rng.randrange(n) if op in algorithms.ROOTED else None, counts, window)


def random_inputs(rng: random.Random, n: int, rank: int, call: Call) -> Blocks:
    meaning = OPS[call.op]
    blocks = 0 if meaning.input_at_root_only and rank != call.root else meaning.layout("input", n, 1).blocks
    return [[rng.randrange(1, 10**9) for _ in range(call.counts[rank][block])] for block in range(blocks)]


def random_step(rng: random.Random, n: int, kind: str, op: str | None = None, algorithm: str | None = None) -> Step:
    """kind: "alike", "mismatch" (one rank calls something else) or "refused" (on one rank or more)."""
    calls = [random_call(rng, n, op, algorithm)] * n
    if kind == "mismatch":
        odd = rng.randrange(n)
        while calls[odd].fingerprint() == calls[odd - 1].fingerprint():
            calls[odd] = random_call(rng, n)
    elif kind == "refused":
        for rank in rng.sample(range(n), rng.randint(1, n)):
            calls[rank] = Call("barrier", "direct", None, calls[rank].counts, 1, refused=True)
    return Step(tuple(calls), tuple(random_inputs(rng, n, rank, calls[rank]) for rank in range(n)))


def random_stream(rng: random.Random, n: int, length: int = 6) -> Iterator[Step]:
    for _ in range(length):
        yield random_step(rng, n, rng.choice(("alike", "alike", "alike", "mismatch", "refused", "refused")))
