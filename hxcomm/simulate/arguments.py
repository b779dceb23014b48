"""The command line of `hxcomm simulate`, and what `hxcomm tune --chip` shares with it. Knows nothing of timing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from hxcomm import algorithms
from hxcomm.bench.arguments import UsageError
from hxcomm.environment import parse_nbytes
from hxcomm.schedule import OPS
from hxcomm.sim import chips, pictures, trace
from hxcomm.sim.chips import Chip
from hxcomm.sim.interconnect import Interconnect, InterconnectError, interconnect

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
FACTOR = 4  # from one size of a range to the next


@dataclass(frozen=True)
class Settings:
    """What to time. `sizes` are of the largest buffer, as in hxcomm.bench; () of a barrier, which has none."""

    op: str
    chip: Chip
    network: Interconnect
    sizes: tuple[int, ...]
    algorithms: tuple[str, ...]
    forced: bool = False  # the algorithms were named: one that is not legal is an error
    dtype: str = "float16"
    root: int | None = None
    point: tuple[int, str] | None = None  # the size and algorithm to look into; None: the fastest at the largest size
    json: bool = False
    plot: Path | None = None
    links_plot: Path | None = None
    timeline_plot: Path | None = None
    trace: Path | None = None

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def n(self) -> int:
        return self.network.world_size


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("op", metavar="OP", help="a collective, e.g. all_reduce")
    add("--chips", type=_count, required=True, metavar="N", help="how many take part")
    add("--sizes", type=parse_sizes, default="1KiB..1GiB", metavar="A..B", help="of the largest buffer; or A,B,C")
    add("--algo", default="all", metavar="NAME,NAME", help="algorithms (`hxcomm info` lists them); default: all")
    add("--dtype", choices=tuple(ITEM_BYTES), default="float16", help="of the elements (default: float16)")
    add("--root", type=int, metavar="RANK", help="of an op that has one (default: 0)")
    add("--chip", default="lpu", metavar="NAME", help="`hxcomm chips` lists them; or a .toml file (default: lpu)")
    add_links_to(parser)
    add("--critical-path", metavar="SIZE:ALGO", help="what to look into; default: the fastest at the largest size")
    add("--plot", type=Path, metavar="FILE.png", help="draw time against size (needs matplotlib, as the next two)")
    add("--links-plot", type=Path, metavar="FILE.png", help="draw the links of what is looked into")
    add("--timeline-plot", type=Path, metavar="FILE.png", help="draw its timeline")
    add("--trace", type=Path, metavar="FILE", help="write its events for Perfetto: .json, or .pftrace")
    add("--json", action="store_true", help="print all as one object instead")


def add_links_to(parser: argparse.ArgumentParser) -> None:
    """What changes a chip and its links."""
    add = parser.add_argument
    add("--topology", metavar="T", help="instead of the chip's: ring, line:4, torus:8x8, ring:8/switch:4 ...")
    add("--faults", action="append", default=[], metavar="F", help="slow-link:3-4:0.5x or dead-link:3-4; repeatable")
    add(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value of the chip, e.g. links.0.latency_ns=100; repeatable",
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises UsageError naming the argument and what is allowed."""
    if options.op not in algorithms.OPS:
        raise UsageError(f"there is no op {options.op!r}; known are: {', '.join(algorithms.OPS)}")
    named = _algorithms(options.op, options.algo)
    network, chip = network_of(options, options.chips)
    settings = Settings(
        op=options.op,
        chip=chip,
        network=network,
        sizes=() if options.op == "barrier" else options.sizes,
        algorithms=named,
        forced=options.algo != "all",
        dtype=options.dtype,
        root=_root(options.op, options.root, options.chips),
        point=None if options.critical_path is None else _point(options, named),
        json=options.json,
        plot=options.plot,
        links_plot=options.links_plot,
        timeline_plot=options.timeline_plot,
        trace=options.trace,
    )
    for size in settings.sizes:
        if block_bytes(settings.op, size, settings.n, settings.itemsize) == 0:
            blocks = blocks_of(settings.op, settings.n)
            raise UsageError(
                f"--sizes: {size} bytes are less than {blocks} {settings.dtype} ({blocks * settings.itemsize} bytes), "
                f"one for each block of {settings.op}"
            )
    _check_files(settings)
    return settings


def network_of(options: argparse.Namespace, n: int) -> tuple[Interconnect, Chip]:
    """The links and the chip that --chip, --topology, --faults and --set describe. Raises UsageError."""
    try:
        chip = chips.changed(chips.load(options.chip), options.changes)
        return interconnect(chip, n, options.topology, options.faults), chip
    except (chips.ChipError, InterconnectError) as error:
        raise UsageError(str(error)) from None


def refuse_links(options: argparse.Namespace) -> None:
    """Raises UsageError where the links of no chip are described."""
    given = {"--topology": options.topology, "--faults": options.faults, "--set": options.changes}
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} is of simulated links: say of which chip with --chip")


def blocks_of(op: str, n: int) -> int:
    """Of the largest buffer, whose size is given: all_gather's output and reduce_scatter's input have n."""
    meaning = OPS[op]
    return max(meaning.layout("input", n, 1).blocks, meaning.layout("output", n, 1).blocks)


def block_bytes(op: str, size: int, n: int, itemsize: int) -> int:
    """Of one block, in whole elements; 0 of a barrier, which has no blocks."""
    if blocks_of(op, n) == 0:
        return 0
    return size // (blocks_of(op, n) * itemsize) * itemsize


def parse_sizes(text: str) -> tuple[int, ...]:
    """ "1KiB..1GiB" (times 4 each, the last one in any case), "4KiB,1MiB", or both, as bytes, ascending."""
    sizes: set[int] = set()
    for word in text.split(","):
        first, dots, last = word.partition("..")
        size, end = _nbytes(first), _nbytes(last if dots else first)
        if size > end:
            raise argparse.ArgumentTypeError(f"{word!r} is empty: write it as 1KiB..1GiB")
        while size < end:
            sizes.add(size)
            size *= FACTOR
        sizes.add(end)
    return tuple(sorted(sizes))


def _nbytes(text: str) -> int:
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of chips, 1 or more")
    return int(text)


def _algorithms(op: str, text: str) -> tuple[str, ...]:
    known = algorithms.names(op)
    words = known if text == "all" else [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise UsageError(f"--algo: {op} has no algorithm {word!r}; it has: {', '.join(known)}, or all")
    return tuple(dict.fromkeys(words))


def _root(op: str, root: int | None, n: int) -> int | None:
    if op not in algorithms.ROOTED:
        if root is not None:
            raise UsageError(f"--root {root}: {op} has no root")
        return None
    if root is not None and not 0 <= root < n:
        raise UsageError(f"--root {root}: the ranks of {n} chips are 0 to {n - 1}")
    return root or 0


def _point(options: argparse.Namespace, named: tuple[str, ...]) -> tuple[int, str]:
    size, colon, algorithm = options.critical_path.rpartition(":")
    if not colon or algorithm not in named:
        raise UsageError(
            f"--critical-path {options.critical_path}: write it as SIZE:ALGO, e.g. 1MiB:{named[0]}; the algorithms "
            f"of this run are: {', '.join(named)}"
        )
    try:
        return _nbytes(size), algorithm
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--critical-path: {error}") from None


def _check_files(settings: Settings) -> None:
    """What is drawn or written at the end must not fail then."""
    try:
        for path in (settings.plot, settings.links_plot, settings.timeline_plot):
            if path is not None:
                pictures.require_matplotlib()
                if not path.absolute().parent.is_dir():
                    raise UsageError(f"{path}: there is no folder {path.parent}")
        if settings.trace is not None:
            trace.check_path(settings.trace)
    except (pictures.PictureError, trace.TraceError) as error:
        raise UsageError(str(error)) from None
