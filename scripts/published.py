"""What the simulator says of what others published, and its chips: the tables of docs/simulator.md.

    python scripts/published.py                             prints the first
    python scripts/published.py --write docs/simulator.md   puts them between their marks there

The rows, with sources and tolerances, are tests/sim/published.toml. A point that misses its tolerance is shown as
missed, with the reason. Nothing is fitted but what a row's `fitted` says, and never to another row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from hxcomm import algorithms
from hxcomm.sim import chips
from hxcomm.sim.chips import Chip, Collective, Legal, Links
from hxcomm.sim.engine import Message, time_messages, time_schedule
from hxcomm.sim.interconnect import Interconnect, interconnect

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "sim" / "published.toml"
WRITTEN_BY = "python scripts/published.py --write docs/simulator.md -->"
BEGIN, END = f"<!-- {WRITTEN_BY}", "<!-- end of the table -->"
BEGIN_CHIPS, END_CHIPS = f"<!-- chips: {WRITTEN_BY}", "<!-- end of the chips -->"
FREE_BYTES_PER_S = 1e18  # a rate that takes no time: what a published model leaves out
ITEM_BYTES = 2
Row = Mapping[str, Any]
Point = Mapping[str, Any]
Predictor = Callable[[Row], Sequence[float]]
PREDICTORS: dict[str, Predictor] = {}

CLASSES = {
    "engine": "engine",
    "gap": "silicon, a gap",
    "prediction": "prediction",
    "byte_counting": "byte counting",
    "calibration": "calibration",
}


@dataclass(frozen=True)
class Verdict:
    """One point of a row. error_percent: of the prediction against the published number, or the nearer end of two."""

    row: Row
    point: Point
    predicted: float

    @property
    def error_percent(self) -> float:
        low, high = _ends(self.point["published"])
        nearest = min(max(self.predicted, low), high)
        return 100 * (self.predicted - nearest) / nearest

    @property
    def hit(self) -> bool | None:
        """None where the row has no tolerance: what was fitted, and what is only reported."""
        tolerance = self.point.get("tolerance_percent")
        return None if tolerance is None else abs(self.error_percent) <= tolerance


def _ends(published: Any) -> tuple[float, float]:
    low, high = published if isinstance(published, list) else (published, published)
    return low, high


def rows() -> list[Row]:
    table: list[Row] = tomllib.loads(DATA.read_text(encoding="utf-8"))["rows"]
    return table


def verdicts(row: Row) -> list[Verdict]:
    predicted = PREDICTORS[row["predictor"]](row)
    return [Verdict(row, point, each) for point, each in zip(row["points"], predicted, strict=True)]


def predictor(function: Predictor) -> Predictor:
    PREDICTORS[function.__name__] = function
    return function


def each_point(function: Callable[[Row, Point], float]) -> Predictor:
    """A predictor whose points do not depend on each other."""

    def predict(row: Row) -> list[float]:
        return [function(row, point) for point in row["points"]]

    PREDICTORS[function.__name__] = predict
    return predict


def bare_chip(
    topology: str,
    bytes_per_s: float,
    latency_ns: float,
    *,
    forwarding: str = "cut_through",
    tick_ps: int = 1,
    launch_ns: float = 0,
) -> Chip:
    """Links and nothing else: reducing is free, and everything is legal."""
    links: Any = {"topology": topology, "forwarding": forwarding}
    return replace(
        chips.load("h100"),
        links=(Links(bandwidth_bytes_per_s=bytes_per_s, latency_ns=latency_ns, tick_ps=tick_ps, **links),),
        collective=Collective(launch_ns=launch_ns, reduce_bytes_per_s=FREE_BYTES_PER_S),
        legal=Legal(),
    )


def network_of(row: Row, point: Point) -> tuple[Chip, Interconnect]:
    """As `network` of the row says it, with what the point has otherwise."""
    said = {**row["network"], **{key: point[key] for key in ("forwarding", "latency_ns", "chips") if key in point}}
    chip = bare_chip(
        said["topology"],
        said["bytes_per_s"],
        said["latency_ns"],
        forwarding=said.get("forwarding", "cut_through"),
        tick_ps=said.get("tick_ps", 1),
    )
    return chip, interconnect(chip, said["chips"], point.get("topology"))


def all_reduce_us(algorithm: str, chip: Chip, world_size: int, nbytes: int) -> float:
    schedule = algorithms.build("all_reduce", algorithm, world_size)
    return time_schedule(schedule, chip, nbytes, itemsize=ITEM_BYTES).total_ps / 1e6


@each_point
def send(row: Row, point: Point) -> float:
    _, network = network_of(row, point)
    return time_messages(network, [Message(point["from"], point["to"], row["nbytes"], 0)])[0] / 1e3


@predictor
def sends_at_once(row: Row) -> Sequence[float]:
    _, network = network_of(row, row["points"][0])
    messages = [Message(point["from"], point["to"], row["nbytes"], 0) for point in row["points"]]
    return [arrival / 1e3 for arrival in time_messages(network, messages)]


@each_point
def direct_all_gather(row: Row, point: Point) -> float:
    _, network = network_of(row, point)
    pairs = permutations(range(network.world_size), 2)
    return max(time_messages(network, [Message(a, b, row["nbytes"], 0) for a, b in pairs])) / 1e3


@each_point
def ring_all_reduce(row: Row, point: Point) -> float:
    chip, network = network_of(row, point)
    return all_reduce_us("ring", chip, network.world_size, point["nbytes"])


@each_point
def corner_to_corner(row: Row, point: Point) -> float:
    """Half along the one edge first, half along the other."""
    _, network = network_of(row, point)
    last = network.world_size - 1
    ways = [network.route(0, corner) + network.route(corner, last) for corner in (3, 12)]
    halves = [Message(0, last, point["nbytes"] // 2, 0, way) for way in ways]
    return max(time_messages(network, halves)) / 1e6


@each_point
def two_hop_all_gather(row: Row, point: Point) -> float:
    """As the book counts it: ceil(N/2) hops, in each a shard from every chip to both its neighbours."""
    _, network = network_of(row, point)
    n = network.world_size
    now = 0
    for _ in range(n // 2):
        hop = [Message(chip, (chip + way) % n, point["nbytes"] // n, now) for chip in range(n) for way in (1, -1)]
        now = max(time_messages(network, hop))
    return now / 1e6


@each_point
def line_all_gather(row: Row, point: Point) -> float:
    """The ring algorithm; what the last chip passes to the first goes all the way back."""
    chip = replace(chips.load(row["chip"]), legal=Legal())
    network = interconnect(chip, 4, "line:4")
    schedule = algorithms.build("all_gather", "ring", 4)
    return time_schedule(schedule, chip, point["nbytes"] // 4, itemsize=ITEM_BYTES, network=network).total_ps / 1e6


@each_point
def nccl_all_reduce(row: Row, point: Point) -> float:
    def takes_us(protocol: Mapping[str, Any]) -> float:
        chip = bare_chip("ring", protocol["bytes_per_s"], protocol["latency_ns"], launch_ns=protocol["launch_ns"])
        return all_reduce_us("ring", chip, row["chips"], point["nbytes"])

    return min(takes_us(protocol) for protocol in row["protocols"])


@predictor
def one_shot(row: Row) -> Sequence[float]:
    """Every GPU reads all peers' buffers at once; what they take is linear, so two points give launch and rate."""
    n = row["chips"]
    first, *_, last = row["points"]
    seconds = (last["published"] - first["published"]) * 1e-6
    bytes_per_s = (n - 1) * (last["nbytes"] - first["nbytes"]) / seconds
    launch_ns = first["published"] * 1e3 - (n - 1) * first["nbytes"] / bytes_per_s * 1e9
    chip = bare_chip("switch", bytes_per_s, 0, launch_ns=launch_ns)
    return [all_reduce_us("one_shot", chip, n, point["nbytes"]) for point in row["points"]]


def matrices_bytes(model: Mapping[str, Any]) -> tuple[int, int]:
    """(of the layers, of the output layer) that a token reads, in 16 bits: attention's four and the two or three of
    the feed-forward network; of the embedding it reads one row."""
    hidden, ffn = model["hidden"], model["ffn"]
    layer = 4 * hidden * hidden + (3 if model.get("gated", True) else 2) * hidden * ffn
    return model["layers"] * layer * ITEM_BYTES, model["vocabulary"] * hidden * ITEM_BYTES


@predictor
def gpt_fast(row: Row) -> Sequence[float]:
    """gpt-fast shards the layers and not the output layer; a layer has two all_reduces of one hidden vector."""
    chip = chips.load(row["chip"])
    layers, output = matrices_bytes(row["model"])
    one, two, *_ = row["points"]
    bytes_per_s = (layers + output) * one["published"]  # achieved by one GPU

    def reading_us(n: int) -> float:
        return (layers / n + output) / bytes_per_s * 1e6

    def reducing_us(n: int) -> float:
        each = all_reduce_us("ring", chip, n, row["model"]["hidden"] * ITEM_BYTES) if n > 1 else 0.0
        return 2 * row["model"]["layers"] * each

    factor = (1e6 / two["published"] - reading_us(2)) / reducing_us(2)
    return [1e6 / (reading_us(n) + factor * reducing_us(n)) for n in (point["chips"] for point in row["points"])]


@each_point
def weights_read(row: Row, point: Point) -> float:
    return sum(matrices_bytes(point["model"])) / point["chips"] / (row["bytes_per_s"] * point["utilization"]) * 1e3


def decode_ms(config: Mapping[str, Any], chip: Chip, world_size: int, *, context: int, overlap: bool) -> float:
    """By `hxcomm predict`'s own machinery. Its recorder needs torch and transformers, so it is imported here."""
    from hxcomm.predict.prediction import Predictor
    from hxcomm.predict.transformers_model import TransformersModel, config_of
    from hxcomm.sim.costs import CostModel

    model = TransformersModel("published", config_of(config))
    predictor = Predictor(model, chip, CostModel(chip), context=context, prompt=1, weights="fp16")
    chunks = chip.overlap_chunks if overlap else 1
    time = predictor.predict(interconnect(chip, world_size), 1, chunks=chunks).ms_per_token
    assert time is not None, f"the weights do not fit {world_size} chips"
    return time


@each_point
def lpu_predict(row: Row, point: Point) -> float:
    from hxcomm.predict.presets import CONFIGS

    chip = chips.load(row["chip"])
    if "achieved" in point:
        chip = chips.replace(chip, "memory.achieved", point["achieved"])
    return decode_ms(CONFIGS[point["preset"]], chip, point["chips"], context=point["context"], overlap=True)


@each_point
def lpu_scaling(row: Row, point: Point) -> float:
    from hxcomm.predict.presets import CONFIGS

    model, chip = row["model"], chips.load(row["chip"])
    for key, name in (("bytes_per_s", "bandwidth_bytes_per_s"), ("latency_ns", "latency_ns")):
        if key in point:
            chip = chips.replace(chip, f"links.0.{name}", point[key])
    hidden = model["hidden"]
    shape = {"num_hidden_layers": model["layers"], "num_attention_heads": model["heads"], "ffn_dim": 4 * hidden}
    config = {**CONFIGS["opt-1.3b"], **shape, "hidden_size": hidden, "word_embed_proj_dim": hidden}
    one, several = (
        decode_ms(config, chip, n, context=model["context"], overlap=point["overlap"]) for n in (1, point["chips"])
    )
    return one / several


def number(value: float) -> str:
    """Four digits, but whole numbers as they are."""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 10_000 else f"{value:,.4g}"


def table() -> str:
    lines = ["| row | class | at | published | predicted | error | tolerance | |", "|---|---|---|---|---|---|---|---|"]
    notes = []
    for row in rows():
        for i, verdict in enumerate(verdicts(row)):
            point, tolerance = verdict.point, verdict.point.get("tolerance_percent")
            published = " to ".join(number(each) for each in dict.fromkeys(_ends(point["published"])))
            what = f"{row['what']} ({row['unit']})" if i == 0 else ""
            exactly = "inside" if isinstance(point["published"], list) else "exact"
            allowed = "-" if tolerance is None else exactly if tolerance == 0 else f"{tolerance:g} %"
            said = {None: "", True: "met", False: "**missed**"}[verdict.hit]
            lines.append(
                f"| {what} | {CLASSES[row['class']] if i == 0 else ''} | {point['at']} | {published} "
                f"| {number(verdict.predicted)} | {verdict.error_percent:+.1f} % | {allowed} | {said} |"
            )
            if "missed" in point:
                notes.append(f"- **Missed**, {row['what']}, {point['at']}: {point['missed']}.")
    sources = [f"- {row['what']}: {row['source']}. Fitted: {row['fitted']}." for row in rows()]
    return "\n".join([*lines, "", *notes, "", "Sources, and what was fitted:", "", *sources])


def chips_table() -> str:
    """The bundled chips; what is assumed is in italics."""
    lines = ["| chip | memory | peak | links | collective | power |", "|---|---|---|---|---|---|"]
    for name in chips.names():
        chip = chips.load(name)

        def shown(key: str, text: str, chip: Chip = chip) -> str:
            return f"*{text}*" if chip.sources[key].startswith("assumed") else text

        memory, links = chip.memory, chip.links[0]
        peaks = [
            shown(f"compute.flops_per_s.{dtype}", f"{dtype} {rate / 1e12:g}")
            for dtype, rate in chip.compute.flops_per_s.items()
        ]
        cells = [
            f"`{name}`",
            ", ".join(
                [
                    shown("memory.bandwidth_bytes_per_s", f"{memory.bandwidth_bytes_per_s / 1e9:,.4g} GB/s"),
                    shown("memory.achieved", f"x {memory.achieved:g}"),
                    shown("memory.capacity_bytes", f"{memory.capacity_bytes / 1e9:g} GB"),
                ]
            ),
            ", ".join(peaks) + " Tflop/s",
            ", ".join(
                [
                    shown("links.0.topology", links.topology),
                    shown("links.0.bandwidth_bytes_per_s", f"{links.bandwidth_bytes_per_s / 1e9:g} GB/s"),
                    shown("links.0.achieved", f"x {links.achieved:g}"),
                    shown("links.0.latency_ns", f"{links.latency_ns:g} ns"),
                    shown("links.0.forwarding", links.forwarding),
                ]
            ),
            shown("collective.launch_ns", f"{chip.collective.launch_ns / 1e3:g} us") if chip.launch_ps else "-",
            shown("power.watts", f"{chip.power.watts:g} W") if chip.power else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page that has the marks of the table")
    page: Path | None = parser.parse_args(arguments).write
    if page is None:
        print(table())
        return 0
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def with_table(page: str) -> str:
    """The page with the tables of today."""
    for begin, end, made in ((BEGIN, END, table), (BEGIN_CHIPS, END_CHIPS, chips_table)):
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"the page has no place for a table: it needs the lines {begin} and {end}")
        page = f"{before}{begin}\n\n{made()}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    sys.exit(main())
