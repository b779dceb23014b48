"""Programs of collectives and messages, drawn by hypothesis, and what each tensor must hold afterwards.

A Program is data: its repr runs it again (`python tests/programs.py 'Program(...)'`). Every rank's inputs follow from a
step's seed, so each rank computes what all ranks gave and reduces it in integers or float64; program_steps.py issues
the calls. Reduced numbers are exact in their dtype; what is only moved is random bits, NaNs of every kind among them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import exact
import numpy as np
from exact import Array
from hypothesis import strategies as st

from hxcomm import algorithms


class Short:
    """The repr names only the fields that differ from their defaults."""

    def __repr__(self) -> str:
        fields = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(fields)})"


@dataclass(frozen=True, repr=False)
class Step(Short):
    """One call of every member of a group. Ranks, roots and sizes count within the group."""

    op: str
    group: int = 0  # of groups(world_size)
    dtype: str = "float32"
    reduce_op: str = "sum"
    shape: tuple[int, ...] = ()
    rows: tuple[int, ...] = (1,)  # how many `shape`s each pair exchanges, or each tensor of a list has; goes round
    root: int = 0  # modulo the group's size
    layouts: tuple[str, ...] = ("",)  # of a rank's tensors; goes round over ranks and tensors
    how: str = "sync"  # or how an async call is waited for
    lags: tuple[int, ...] = (0,)  # after how many further steps a rank waits; goes round over ranks
    special: bool = False  # infinities and NaNs among the numbers
    seed: int = 0

    def pair(self, source: int, target: int, size: int) -> int:
        return self.rows[(source * size + target) % len(self.rows)]

    def parts(self) -> list[Step]:
        """The calls that a coalesced call is made of."""
        op = self.op.removesuffix("_coalesced").removeprefix("managed_")
        return [
            dataclasses.replace(self, op=op, shape=(rows, *self.shape), rows=(1,), seed=self.seed + number)
            for number, rows in enumerate(self.rows)
        ]


@dataclass(frozen=True, repr=False)
class Program(Short):
    world_size: int
    steps: tuple[Step, ...]
    threads: int = 1  # each runs the steps of its share of the groups
    env: tuple[tuple[str, str], ...] = ()


def groups(world_size: int) -> list[list[int]]:
    """Global ranks: everybody twice, then groups that overlap."""
    world = list(range(world_size))
    return [world, world, world[:-1] or world, world[1:] or world, sorted({0, world_size - 1})]


REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
PLAIN = (
    *REDUCING,
    *("broadcast", "all_gather", "all_gather_into_tensor", "gather", "scatter", "all_to_all", "all_to_all_single"),
)
MANAGED = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
COALESCED = ("all_reduce_coalesced", "all_gather_coalesced", *(f"managed_{op}" for op in MANAGED))
MESSAGES = ("exchange", "batch", "send_recv", "any_source")
OPS = (*PLAIN, *MESSAGES, *COALESCED, "all_gather_object", "broadcast_object_list", "barrier")
IN_PLACE = ("all_reduce", "reduce", "broadcast")
HOWS = ("sync", "wait", "future", "poll")
LAYOUTS = ("", "offset", "strided", "stepped", "transposed", "expanded")

# --- what each rank gives ---


def layout_of(step: Step, rank: int, tensor: int, written: bool) -> str:
    """Only what is not written may have elements that share memory."""
    layout = step.layouts[(rank + tensor) % len(step.layouts)]
    return "" if layout == "expanded" and written else layout


def joined_shape(step: Step, size: int) -> tuple[int, ...]:
    """All ranks' blocks in one tensor: one behind the other, or along a new dimension."""
    if step.shape and step.seed % 2:
        return (size * step.shape[0], *step.shape[1:])
    return (size, *step.shape)


def input_shapes(step: Step, size: int, rank: int) -> list[tuple[int, ...]]:
    match step.op:
        case "barrier":
            return []
        case "all_gather" if len(step.rows) > 1:
            return [(step.rows[rank % len(step.rows)], *step.shape)]
        case "reduce_scatter_tensor":
            return [joined_shape(step, size)]
        case "all_to_all" | "exchange" | "batch":
            return [(step.pair(rank, target, size), *step.shape) for target in range(size)]
        case "all_to_all_single":
            return [(sum(step.pair(rank, target, size) for target in range(size)), *step.shape)]
        case "reduce_scatter":
            return [step.shape] * size
        case "scatter":
            return [step.shape] * (size if rank == step.root % size else 0)
    return [step.shape]


def random_bits(dtype: str, random: Any, count: int) -> Array:
    if dtype == "bool":
        return random.integers(0, 2, count).astype(np.uint8)
    stored = np.dtype(exact.STORED[dtype])
    return np.frombuffer(random.bytes(count * stored.itemsize), stored)


def random_numbers(step: Step, random: Any, count: int) -> Array:
    """Whole numbers whose reduction over four ranks is exact, or rounds once where the result is stored."""
    dtype, reduce_op = step.dtype, step.reduce_op
    if dtype in exact.COMPLEX:
        parts = random.integers(-3, 4, 2 * count).astype(np.float64)
        return parts[:count] + 1j * parts[count:]
    if dtype == "bool":
        return random.integers(0, 2, count)
    if dtype not in exact.FLOATS:
        limits = np.iinfo(exact.STORED[dtype])
        low, high = (0 if limits.min == 0 else -25, 25) if reduce_op == "avg" else (limits.min, limits.max)
        return random.integers(low, high, count, endpoint=True).astype(np.int64)
    numbers = random.integers(-3, 4, count) if reduce_op == "product" else random.integers(-256, 257, count)
    numbers = numbers.astype(np.float64)
    if step.special and reduce_op != "avg":
        places = random.integers(0, 6, count)
        for place, value in enumerate((np.nan, np.inf, -np.inf)):
            numbers[places == place] = value
    return numbers


def inputs(step: Step, size: int, rank: int) -> list[Array]:
    """A rank's input tensors: as numbers where they are reduced, as stored where they are only moved."""
    made = []
    for tensor, shape in enumerate(input_shapes(step, size, rank)):
        random = np.random.default_rng([step.seed, rank, tensor])
        count = int(np.prod(shape))
        flat = random_numbers(step, random, count) if step.op in REDUCING else random_bits(step.dtype, random, count)
        array = flat.reshape(shape)
        if shape and shape[0] and layout_of(step, rank, tensor, step.op in IN_PLACE) == "expanded":
            array = np.broadcast_to(array[:1], shape)
        made.append(array)
    return made


# --- what must come out ---


def reduced(step: Step, parts: list[Array]) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        return exact.reduced([part.reshape(-1) for part in parts], step.dtype, step.reduce_op).reshape(parts[0].shape)


def outputs(step: Step, size: int, rank: int) -> list[Array]:
    """The output tensors of a rank, as stored."""
    root = step.root % size
    every = [inputs(step, size, each) for each in range(size)]
    firsts = [each[0] for each in every if each]
    match step.op:
        case "all_reduce":
            return [reduced(step, firsts)]
        case "reduce":
            return [reduced(step, firsts) if rank == root else exact.store(firsts[rank], step.dtype)]
        case "reduce_scatter":
            return [reduced(step, [each[rank] for each in every])]
        case "reduce_scatter_tensor":
            return [reduced(step, [each.reshape(size, *step.shape)[rank] for each in firsts])]
        case "broadcast" | "broadcast_object_list":
            return [firsts[root]]
        case "all_gather" | "all_gather_object":
            return firsts
        case "all_gather_into_tensor":
            return [np.stack(firsts).reshape(joined_shape(step, size))]
        case "gather":
            return firsts if rank == root else []
        case "scatter":
            return [every[root][rank]]
        case "all_to_all" | "exchange" | "batch":
            return [each[rank] for each in every]
        case "all_to_all_single":
            return [np.concatenate([block(step, size, every[source][0], source, rank) for source in range(size)])]
        case "send_recv":
            return [firsts[root]] if rank == (root + 1) % size != root else []
        case "any_source":
            return firsts if rank == root else []
    return []


def block(step: Step, size: int, whole: Array, source: int, target: int) -> Array:
    start = sum(step.pair(source, each, size) for each in range(target))
    return whole[start : start + step.pair(source, target, size)]


# --- which programs there are ---

small = st.integers(0, 4)
lengths = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 255, 257, 1021, 4097, 65_537, 150_001])
shapes = st.one_of(
    st.lists(small, max_size=3).map(tuple), st.tuples(lengths), st.tuples(st.integers(1, 3), st.integers(0, 300))
)
row_counts = st.one_of(st.just((1,)), st.lists(small, min_size=1, max_size=7).map(tuple))


def kinds(op: str) -> list[tuple[str, str]]:
    """The pairs of dtype and reduce op that an op takes."""
    basic = op.removesuffix("_coalesced").removeprefix("managed_")
    return [
        (dtype, reduce_op)
        for reduce_op in (exact.REDUCE_OPS if basic in REDUCING else ("sum",))
        for dtype in exact.DTYPES
        if basic not in REDUCING or exact.supported(dtype, reduce_op)
        # Refused by torch itself.
        if basic != "all_reduce" or dtype not in exact.COMPLEX or reduce_op != "product"
    ]


def sweep(world_size: int) -> Program:
    """Every op with every pair of dtype and reduce op once; all else goes round, each at a period of its own."""

    def turn(number: int, choices: Sequence[Any]) -> Any:
        return choices[number % len(choices)]

    pairs = [(op, *kind) for op in OPS for kind in kinds(op)]
    made = [
        Step(
            op=op,
            dtype=dtype,
            reduce_op=reduce_op,
            shape=turn(number, [(33,), (), (0,), (1021,), (2, 5, 3), (1,), (17,)] * 3 + [(150_001,)]),
            rows=turn(number, [(1,), (2, 0, 3)]) if number % 22 else (1,),
            root=number % 4,
            layouts=tuple(turn(number + i, LAYOUTS) for i in range(2)),
            how=turn(number, (*HOWS, "sync")),
            lags=(number % 7, number % 3),
            special=number % 3 == 0,
            seed=number,
        )
        for number, (op, dtype, reduce_op) in enumerate(pairs)
    ]
    return Program(world_size, tuple(made))


@st.composite
def steps(draw: Any) -> Step:
    op = draw(st.sampled_from(OPS))
    dtype, reduce_op = draw(st.sampled_from(kinds(op)))
    return Step(
        op=op,
        group=draw(st.integers(0, 4)),
        dtype=dtype,
        reduce_op=reduce_op,
        shape=draw(shapes),
        rows=draw(row_counts),
        root=draw(st.integers(0, 3)),
        layouts=tuple(draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3))),
        how=draw(st.sampled_from(HOWS)),
        lags=tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))),
        special=draw(st.booleans()),
        seed=draw(st.integers(0, 255)),
    )


VARIABLES = [
    (),
    (("HXCOMM_SEGMENT", "1KiB"),),
    (("HXCOMM_EXECUTOR", "python"),),
    (("HXCOMM_SPIN_US", "0"),),
    *((("HXCOMM_ALGO", f"{op}:{name}"),) for op in algorithms.OPS for name in algorithms.names(op)),
]


def programs(world_size: int, threads: int = 1) -> st.SearchStrategy[Program]:
    return st.builds(
        Program,
        world_size=st.just(world_size),
        # Half of what lists() draws by itself is one or two long.
        steps=st.sampled_from([1, 2, 4, 8, 12, 16])
        .flatmap(lambda n: st.lists(steps(), min_size=n, max_size=n))
        .map(tuple),
        threads=st.integers(1, threads),
        env=st.sampled_from(VARIABLES),
    )


def run_again(text: str) -> int:
    """Runs a program given as its repr, and prints what went wrong on each rank."""
    import program_steps
    import ranks

    program = eval(text, {"Program": Program, "Step": Step})
    pool = ranks.RankPool(program.world_size)
    try:
        found = pool.run(program_steps.execute, program, env=dict(program.env), op_timeout_s=20)
    finally:
        pool.close()
    for rank, problems in enumerate(found):
        print(*(f"rank {rank}: {problem}" for problem in problems or ["as expected"]), sep="\n")
    return int(any(found))


if __name__ == "__main__":
    import programs as imported  # ranks find the classes under that name, not under __main__

    sys.exit(imported.run_again(sys.argv[1]))
