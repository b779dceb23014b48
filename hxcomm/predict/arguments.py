"""The command line of `hxcomm predict`, checked. Knows nothing of torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from hxcomm.predict import presets
from hxcomm.sim import chips, pictures
from hxcomm.sim.chips import Chip, ChipError
from hxcomm.sim.costs import CostError, CostModel
from hxcomm.sim.interconnect import Interconnect, InterconnectError, interconnect
from hxcomm.sim.pictures import PictureError

WEIGHTS = ("fp16", "fp8", "int4")


class UsageError(Exception):
    """What was asked for cannot be predicted. The text says which argument, and what is allowed."""


@dataclass(frozen=True)
class Settings:
    model: str
    chip: Chip
    costs: CostModel
    networks: dict[int, Interconnect]  # of each number of ranks
    batches: tuple[int, ...]
    context: int
    prompt: int
    weights: str
    overlap: bool
    plot: Path | None
    json: bool
    topology: str | None = None

    @property
    def chunks(self) -> int:
        return self.chip.overlap_chunks if self.overlap else 1


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=f"{', '.join(presets.NAMES)}; or a config.json, or its folder")
    add("--chip", default="lpu", metavar="CHIP", help="by name (`hxcomm chips`), or a .toml file (default: lpu)")
    add("--ranks", type=_counts, default=(1, 2, 4, 8), metavar="N,N", help="numbers of chips (default: 1,2,4,8)")
    add("--batch", type=_counts, default=(1,), metavar="B,B", help="sequences decoded together (default: 1)")
    add("--context", type=_count, default=2048, metavar="N", help="positions a new token attends to (default: 2048)")
    add("--prompt", type=_count, metavar="N", help="tokens of the prompt (default: 1024, or the context if shorter)")
    add("--weights", choices=WEIGHTS, default="fp16", help="how matrices are stored and multiplied (default: fp16)")
    add("--overlap", choices=("on", "off"), default="on", help="of products and their all_reduces, in as many chunks "
        "as the chip says (default: on)")  # fmt: skip
    add("--topology", metavar="T", help="other links between the chips: ring, line:4, torus:2x4, ring:8/switch:4 ...")
    add("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="another value of the chip, "
        "e.g. links.0.latency_ns=100; repeatable")  # fmt: skip
    add(
        "--costs", metavar="SOURCE", help="times of ops instead of the chip's rates: table:FILE.csv, python:MODULE.NAME"
    )
    add("--plot", type=Path, metavar="FILE.png", help="draw ms per token by chips, with and without overlap")
    add("--json", action="store_true", help="print a list of one object for each number of ranks and batch instead")


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises UsageError."""
    prompt = min(1024, options.context) if options.prompt is None else options.prompt
    if prompt > options.context:
        raise UsageError(f"--prompt {prompt}: is longer than --context {options.context}, of which it is a part")
    try:
        chip = chips.changed(chips.load(options.chip), options.changes)
        costs = CostModel(chip, options.costs)
        networks = {ranks: interconnect(chip, ranks, options.topology) for ranks in options.ranks}
        if options.plot is not None:
            pictures.require_matplotlib()
    except (ChipError, InterconnectError, PictureError) as error:
        raise UsageError(str(error)) from error
    except CostError as error:
        raise UsageError(f"--costs {error}") from error
    if options.plot is not None and not options.plot.absolute().parent.is_dir():
        raise UsageError(f"--plot {options.plot}: there is no folder {options.plot.parent}")
    return Settings(
        model=options.model,
        chip=chip,
        costs=costs,
        networks=networks,
        batches=options.batch,
        context=options.context,
        prompt=prompt,
        weights=options.weights,
        overlap=options.overlap == "on",
        plot=options.plot,
        json=options.json,
        topology=options.topology,
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 1 or more")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(each.strip()) for each in text.split(",")}))
