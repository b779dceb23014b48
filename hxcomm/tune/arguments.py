"""The command line of the ranks that measure, and of `hxcomm tune`, which starts them. Knows nothing of torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hxcomm import tuning
from hxcomm.bench.arguments import Parser, UsageError, parse_iterations, parse_sizes

OPS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce")  # those with more than one algorithm
SIZES = tuple(64 * 4**i for i in range(11))  # 64 B to 64 MiB
BUDGET_S = 60.0


@dataclass(frozen=True)
class Settings:
    out: Path
    ops: tuple[str, ...]
    sizes: tuple[int, ...]  # bytes of the largest buffer, as hxcomm.bench has them; ascending
    devices: tuple[str, ...]
    budget_s: float
    iterations: int | None  # None: as many as fit the budget

    def words(self) -> list[str]:
        """The command line that asks for these settings."""
        return [
            *("--out", str(self.out.absolute()), "--ops", ",".join(self.ops), "--device", ",".join(self.devices)),
            *("--sizes", ",".join(map(str, self.sizes)), "--budget-s", f"{self.budget_s:g}"),
            *("--iters", str(self.iterations or "auto")),
        ]


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the table, for HXCOMM_TUNING")
    add("--ops", type=_among(OPS, "op"), default=OPS, metavar="OP,OP", help="among " + ", ".join(OPS))
    add("--sizes", type=parse_sizes, default=SIZES, metavar="SIZE,SIZE", help="default: 64, 256 ... 64MiB")
    add("--device", type=_among(tuning.DEVICES, "device"), default=("cpu",), metavar="DEV,DEV", help="cpu, hx or both")
    add("--budget-s", type=_seconds, default=BUDGET_S, metavar="S", help="about how long it may take (default: 60)")
    add("--iters", type=parse_iterations, metavar="N", help="timed iterations of each; auto: by time (default: auto)")


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises UsageError where the table cannot be written there, or a size is no element."""
    if not options.out.absolute().parent.is_dir():
        raise UsageError(f"{options.out}: there is no folder {options.out.parent}")
    if options.sizes[0] < 4:
        raise UsageError(f"a size of {options.sizes[0]} bytes is less than one float32 (4 bytes)")
    return Settings(options.out, options.ops, options.sizes, options.device, options.budget_s, options.iters)


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings of a rank. Raises UsageError."""
    parser = Parser(
        prog="python -m hxcomm.tune",
        description="Measures which algorithms are fastest here. Start it with torchrun.",
        allow_abbrev=False,
    )
    add_to(parser)
    return settings_of(parser.parse_args(arguments))


def _among(known: Sequence[str], what: str) -> Callable[[str], tuple[str, ...]]:
    def parse_words(text: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in text.split(","))
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"there is no {what} {word!r} here; known are {', '.join(known)}")
        return tuple(each for each in known if each in words)

    return parse_words


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds
