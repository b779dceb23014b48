"""The command line of `hxcomm chips measure` and of the ranks that it starts. Knows nothing of torch."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hxcomm.bench.arguments import Parser, UsageError
from hxcomm.environment import parse_nbytes

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    out: Path
    buffer_bytes: int


def add_to(parser: argparse.ArgumentParser) -> None:
    """What ranks and the command that starts them have in common."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the chip file to write, e.g. here.toml")
    add(
        "--bytes",
        type=_buffer_bytes,
        default=BUFFER_BYTES,
        metavar="SIZE",
        help="of each rank's buffer while its links are measured: a CPU is another chip for buffers that leave its "
        "caches (default: 1MiB)",
    )


def add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=_ranks,
        default=[2],
        metavar="N,N",
        help="how many at once (default: 2); with several numbers, a file for each: here-2.toml, here-4.toml",
    )


def run(options: argparse.Namespace) -> int:
    """Measures with each number of ranks, one after another. Raises UsageError."""
    folder = options.out.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{options.out}: there is no folder {options.out.parent}")
    for ranks in options.ranks:
        out = options.out.absolute()
        if len(options.ranks) > 1:
            out = out.with_name(f"{out.stem}-{ranks}{out.suffix}")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        words = ["--out", str(out), "--bytes", str(options.bytes)]
        status = subprocess.run([*torchrun, "-m", "hxcomm.bench.chip", *words]).returncode
        if status:
            return status
    return 0


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings of a rank. Raises UsageError."""
    parser = Parser(
        prog="python -m hxcomm.bench.chip",
        description="Measures what this machine allows its ranks, as a chip file. Start it with torchrun.",
        allow_abbrev=False,
    )
    add_to(parser)
    options = parser.parse_args(arguments)
    return Settings(options.out, options.bytes)


def _ranks(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of ranks, each 2 or more, as 2,4: one rank has no links")
    return sorted({int(word) for word in words})


def _buffer_bytes(text: str) -> int:
    try:
        nbytes = parse_nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if nbytes < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 64KiB, or Python's own calls are measured")
    return nbytes
