"""The command line of the benchmark, checked. Knows the names of ops and dtypes, and nothing of torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hxcomm.environment import parse_nbytes

OPS = ("all_reduce", "all_gather", "broadcast", "reduce_scatter", "barrier")
REDUCE_OPS = ("sum", "product", "min", "max", "avg")
ITEM_BYTES = {
    "float32": 4,
    "float64": 8,
    "bfloat16": 2,
    "float16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "bool": 1,
}
# Up to here the time of touching the buffers can be subtracted; above, it depends on what the collective left in the
# caches, and the difference means nothing.
TOUCHED_BYTES = 1 << 20


class UsageError(Exception):
    """The command line is wrong. The text says what and what to write."""


@dataclass(frozen=True)
class Settings:
    """What to measure. `iterations` and `plot` are None where they were not given."""

    backend: str
    compare: str | None
    ops: tuple[str, ...]
    sizes: tuple[int, ...]  # bytes, ascending
    dtype: str
    reduce_op: str
    iterations: int | None
    touch: str
    floor: bool
    device: str
    json: Path | None
    plot: Path | None

    def touched(self, nbytes: int) -> bool:
        return self.touch == "on" or (self.touch == "auto" and nbytes <= TOUCHED_BYTES)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is said once, by rank 0, instead of by every rank."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists all arguments)")


def _nbytes(text: str) -> int:
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def parse_sizes(text: str) -> tuple[int, ...]:
    """ "4KiB,64" as bytes, ascending."""
    return tuple(sorted({_nbytes(word) for word in text.split(",")}))


def _ops(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(","))
    for word in words:
        if word not in OPS:
            raise argparse.ArgumentTypeError(f"there is no op {word!r}; known are {', '.join(OPS)}")
    return words


def parse_iterations(text: str) -> int | None:
    """A number of them, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of iterations, 1 or more, or auto")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m hxcomm.bench",
        description="Measures collectives of a torch.distributed backend. Start it with torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--backend",
        default="hxcomm",
        help="the backend to measure; 'torchcomm' is hxcomm by TorchComm's calls, 'nothing' does nothing",
    )
    add("--compare", metavar="BACKEND", help="measure this one, too, interleaved, and print the ratio of the medians")
    add("--ops", type=_ops, default=OPS, metavar="OP,OP", help="among " + ", ".join(OPS))
    add("--min-bytes", type=_nbytes, default=64, metavar="SIZE", help="smallest size, e.g. 4KiB")
    add("--max-bytes", type=_nbytes, default=64 << 20, metavar="SIZE", help="largest size")
    add("--factor", type=int, default=4, metavar="F", help="from one size to the next")
    add("--sizes", type=parse_sizes, metavar="SIZE,SIZE", help="these sizes instead, e.g. 4KiB,16KiB")
    add("--dtype", choices=tuple(ITEM_BYTES), default="float32")
    add("--redop", choices=REDUCE_OPS, default="sum", help="of the ops that reduce")
    add(
        "--iters",
        type=parse_iterations,
        default=None,
        metavar="N",
        help="timed iterations; auto: by time (default: auto)",
    )
    add(
        "--touch",
        choices=("auto", "on", "off"),
        default="auto",
        help="write inputs and read outputs in every iteration and subtract the time of that; auto: up to 1 MiB",
    )
    add(
        "--device",
        choices=("cpu", "hx"),
        default="cpu",
        help="hx: hxcomm's tensors are on the simulated device, other backends' are CPU tensors over the same bytes",
    )
    add("--floor", action="store_true", help="also probe what the machine allows, in the same run")
    add("--json", type=Path, metavar="FILE", help="write all results there, too")
    add("--plot", type=Path, metavar="FILE.png", help="draw all_reduce's time against size (needs matplotlib)")
    return parser


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings that `arguments` (sys.argv without the program where None) ask for. Raises UsageError."""
    options = _parser().parse_args(arguments)
    if options.factor < 2:
        raise UsageError(f"--factor {options.factor}: must be at least 2, or there are sizes without end")
    sizes = options.sizes
    if sizes is None:
        if options.max_bytes < options.min_bytes:
            raise UsageError(f"--max-bytes {options.max_bytes} is less than --min-bytes {options.min_bytes}")
        sizes = (options.min_bytes,)
        while sizes[-1] * options.factor <= options.max_bytes:
            sizes += (sizes[-1] * options.factor,)
    if sizes[0] < ITEM_BYTES[options.dtype]:
        raise UsageError(
            f"a size of {sizes[0]} bytes is less than one {options.dtype} ({ITEM_BYTES[options.dtype]} bytes)"
        )
    if options.compare == options.backend:
        raise UsageError(f"--compare {options.compare}: is what --backend measures already")
    for path in (options.json, options.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}")
    return Settings(
        backend=options.backend,
        compare=options.compare,
        ops=options.ops,
        sizes=sizes,
        dtype=options.dtype,
        reduce_op=options.redop,
        iterations=options.iters,
        touch=options.touch,
        floor=options.floor,
        device=options.device,
        json=options.json,
        plot=options.plot,
    )
